"""The blocks of a store: owners are counted, equal prefixes are found, and memory that nobody owns comes back."""

import random

import pytest

from model.engine.block_pool import ROOT, BlockPool

SIZE = 16


def fill(pool: BlockPool, ids: list[int]) -> list[int]:
    """The blocks of a new sequence, as a scheduler takes them."""
    blocks, chain = pool.find(ids, hollow=False)
    pool.own(blocks)
    for first in range(len(blocks) * SIZE, len(ids), SIZE):
        blocks.append(pool.take())
        if first + SIZE <= len(ids):
            chain = pool.know(chain, ids[first : first + SIZE], blocks[-1])
    return blocks


def count(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def test_a_prefix_is_stored_once_and_its_end_anew() -> None:
    pool = BlockPool(20, SIZE, share=True)
    first, second = fill(pool, count(50)), fill(pool, [*count(40), *count(30, 1000)])
    assert len(first) == 4 and len(second) == 5
    assert second[:2] == first[:2] and not set(second[2:]) & set(first)
    assert pool.num_used == 7 and pool.num_free == 13


def test_the_last_token_is_never_taken_from_another() -> None:
    pool = BlockPool(20, SIZE, share=True)
    first, second, longer = fill(pool, count(48)), fill(pool, count(48)), fill(pool, count(49))
    assert second[:2] == first[:2] and second[2] != first[2]
    assert longer[:3] == first


def test_equal_tokens_behind_different_pasts_are_not_the_same() -> None:
    pool = BlockPool(20, SIZE, share=True)
    fill(pool, [*count(16), *count(17, 500)])
    assert pool.find([*count(16, 100), *count(17, 500)], hollow=False) == ([], ROOT)


def test_without_sharing_nothing_is_found() -> None:
    pool = BlockPool(20, SIZE, share=False)
    assert not set(fill(pool, count(50))) & set(fill(pool, count(50)))
    assert pool.num_used == 8


def test_blocks_stay_known_while_there_is_other_memory() -> None:
    pool = BlockPool(5, SIZE, share=True)
    old = fill(pool, count(49))
    pool.give_back(old)
    assert pool.num_free == 5
    assert pool.find(count(49), hollow=False)[0] == old[:3]
    assert fill(pool, count(49)) == [*old[:3], 3]


def test_the_end_of_what_was_given_back_first_goes_first() -> None:
    pool = BlockPool(6, SIZE, share=True)
    first, second = fill(pool, count(48)), fill(pool, count(48, 100))
    pool.give_back(first)
    pool.give_back(second)
    taken = [pool.take() for _ in range(4)]
    assert taken == [*reversed(first), second[2]]
    assert pool.find(count(49), hollow=False) == ([], ROOT)
    assert pool.find(count(49, 100), hollow=False)[0] == second[:2]


def test_a_block_with_other_tokens_is_not_the_past_of_what_followed_the_old_ones() -> None:
    """The number of the first block comes again; its old child must not be found behind it."""
    pool = BlockPool(3, SIZE, share=True)
    first = fill(pool, count(32))
    pool.own(first[1:])
    pool.give_back(first)  # the second has another owner
    pool.take()
    assert pool.take() == first[0]
    other = pool.know(ROOT, count(16, 300), first[0])
    assert other not in (ROOT, 1)
    assert pool.find([*count(16, 300), *count(17, 16)], hollow=False)[0] == [first[0]]


def test_hollow_blocks_are_found_by_those_alone_that_need_nothing() -> None:
    pool = BlockPool(9, SIZE, share=True)
    blocks = fill(pool, count(49))
    pool.hollow.add(blocks[1])
    assert pool.find(count(49), hollow=True)[0] == blocks[:3]
    assert pool.find(count(49), hollow=False)[0] == blocks[:1]
    pool.give_back(blocks)
    assert {pool.take() for _ in range(9)} == set(range(9)) and not pool.hollow


@pytest.mark.parametrize("share", [True, False])
def test_no_block_is_lost_or_given_twice(share: bool) -> None:
    numbers, pool = random.Random(3), BlockPool(40, SIZE, share=share)
    owned: list[tuple[list[int], list[int]]] = []
    for _ in range(2000):
        ids = [numbers.randrange(2) for _ in range(5)] * numbers.randrange(1, 20)
        found = pool.find(ids, hollow=False)[0]
        needed = -(-len(ids) // SIZE) - len(found) + pool.count_kept(found)
        if needed <= pool.num_free and numbers.random() < 0.6:
            owned.append((fill(pool, ids), ids))
        elif owned:
            pool.give_back(owned.pop(numbers.randrange(len(owned)))[0])
        used = {block for blocks, _ in owned for block in blocks}
        assert pool.num_used == len(used) and pool.num_free == 40 - len(used)
        contents: dict[int, tuple[int, ...]] = {}
        for blocks, tokens in owned:
            for place, block in enumerate(blocks):
                whole = tuple(tokens[: (place + 1) * SIZE])
                assert contents.setdefault(block, whole) == whole

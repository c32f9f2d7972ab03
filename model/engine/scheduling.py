"""Who goes through the next pass: sequences wait, join, leave, and give way where memory ends.

What a pass holds follows from the requests and their tokens alone, never from time: a run that is repeated takes the same passes, and
so the same bits. Knows counts, blocks and ids; does not run the model and chooses no token.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.engine.block_pool import ROOT, BlockPool
from model.engine.request import Request
from model.engine.sampling import SamplingState
from model.engine.speculation import MAX_DRAFT, PromptLookup
from model.layers.cache import KeyValueCache, KeyValueStore
from model.spec.config import PREFILL_TOKENS, count_blocks

_LEAST_PREFILL_TOKENS = 16


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A request that has not ended."""

    request: Request
    """What is asked."""
    sampling: SamplingState
    """How its next token is chosen."""
    cache: KeyValueCache
    """Keys and values of its first tokens."""
    ids: list[int]
    """Prompt and new tokens."""
    lookup: PromptLookup | None = None
    """Guesses its tokens, where it may be guessed."""
    num_new: int = 0
    """New tokens."""
    hollow: bool = False
    """Whether its keys and values were left out, somewhere."""
    chain: int = field(default=ROOT)
    """Of its known blocks, see BlockPool."""
    num_known: int = 0
    """Blocks that are known."""

    @property
    def num_pending(self) -> int:
        """Tokens that have not been through the model; the next token comes with the last of them."""
        return len(self.ids) - self.cache.length

    @property
    def is_decoding(self) -> bool:
        """Whether a pass brings one token more, not a part of what is known."""
        return self.num_new > 0 and self.num_pending == 1

    @property
    def is_over(self) -> bool:
        """Whether an earlier attempt has come to its end, so that nobody needs what it would compute."""
        return self.request.known_reason is not None

    @property
    def final_ids(self) -> tuple[int, ...]:
        """Prompt and new tokens, as far as they are known from an earlier attempt."""
        return self.request.prompt_ids + self.request.known_ids

    def knows(self, ahead: int) -> int | None:
        """The new token so many places ahead, where it is known already."""
        known, place = self.request.known_ids, self.num_new + ahead
        return known[place] if place < len(known) else None


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence has in a pass."""

    sequence: LiveSequence
    """The sequence."""
    first: int
    """Tokens that it has behind it."""
    count: int
    """Tokens that go through."""
    decodes: bool
    """Whether this is one token more, see LiveSequence."""
    drafts: tuple[int, ...] = ()
    """Guesses that go through behind them."""

    @property
    def ids(self) -> list[int]:
        """What goes through."""
        return [*self.sequence.ids[self.first : self.first + self.count], *self.drafts]

    @property
    def is_last(self) -> bool:
        """Whether the next token comes of it."""
        return self.first + self.count == len(self.sequence.ids)


class Scheduler:
    """The sequences of one engine, and the blocks of its store."""

    def __init__(self, store: KeyValueStore, max_batch_size: int, *, share_prefixes: bool, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.pool = BlockPool(store.num_blocks, store.block_size, share=share_prefixes)
        self._max_batch_size, self._prefill_tokens = max_batch_size, prefill_tokens
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        """The longest ago first. Every one of them could end if all that came later gave way."""

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to plan."""
        return bool(self._waiting or self._running)

    def add(self, sequence: LiveSequence) -> None:
        """Let a new sequence wait."""
        self._waiting.append(sequence)

    def remove(self, sequence: LiveSequence) -> None:
        """A sequence has ended."""
        self._running.remove(sequence)
        self._release(sequence)

    def cancel(self, index: int) -> None:
        """Take the sequences of a request away; there may be none any longer."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request.index != index)
        for sequence in [sequence for sequence in self._running if sequence.request.index == index]:
            self.remove(sequence)

    def plan(self) -> list[Part]:
        """The next pass: a token for every sequence that decodes, then parts of prompts, up to `prefill_tokens` in all."""
        parts: dict[LiveSequence, Part] = {}
        short = False
        for sequence in list(self._running):
            if sequence in self._running and sequence.is_decoding:  # else it has given way
                if self._make_room(sequence):
                    parts[sequence] = self._take_part(sequence, 1)
                else:
                    short = True  # the youngest keeps what it has and waits for those before it
            short = short or sequence not in self._running
        for sequence, part in parts.items():
            if drafts := self._draft(sequence):
                parts[sequence] = Part(sequence, part.first, 1, True, drafts)
        # However many decode, prompts get on.
        budget = max(_LEAST_PREFILL_TOKENS, self._prefill_tokens - sum(1 + len(part.drafts) for part in parts.values()))
        self._plan_prefill(parts, budget, admits=not short)  # who has just given way must not come back at once, nor another one
        # A sequence may share blocks that one before it fills in the same pass, so the order matters.
        return [parts[sequence] for sequence in self._running if sequence in parts]

    def _plan_prefill(self, parts: dict[LiveSequence, Part], budget: int, *, admits: bool) -> None:
        """Parts of prompts. Shorter ones go before the one that came first, so that they do not wait for it; but it has a quarter of
        every pass, so that it gets on, and what they leave."""
        others = [sequence for sequence in self._running if not sequence.is_decoding and sequence not in parts]
        if not others and admits and self._admit_next():
            others = [self._running[-1]]
        if not others:
            return
        first = others.pop(0)
        others.sort(key=lambda sequence: sequence.num_pending)
        next_ones = [*others[:1], *list(self._waiting)[: int(admits)]]
        is_passed = any(sequence.num_pending < first.num_pending for sequence in next_ones)
        parts[first] = self._take_part(first, -(-budget // 4) if is_passed else budget)
        budget -= parts[first].count
        while budget > 0:
            if admits and self._waiting and (not others or len(self._waiting[0].ids) <= others[0].num_pending):
                admits = self._admit_next()
                if not admits:
                    continue
                comes = self._running[-1]
            elif others:
                comes = others.pop(0)
            else:
                break
            parts[comes] = self._take_part(comes, budget)
            budget -= parts[comes].count
        if budget > 0:
            parts[first] = self._take_part(first, parts[first].count + budget)

    def is_needed(self, parts: Sequence[Part]) -> bool:
        """Whether anybody needs what a pass computes: not where all of it has ended, and nobody may share its blocks."""
        if not all(part.sequence.is_over for part in parts):
            return True
        if not self.pool.share:
            return False
        size = self.pool.block_size
        ended = [part.sequence.final_ids[:size] for part in parts]
        live = [sequence.final_ids[:size] for sequence in (*self._running, *self._waiting) if not sequence.is_over]
        # One whose first block is not full yet may come to have the same.
        return any(len(one) == size and one[: len(other)] == other for one in ended for other in live)

    def pass_by(self, parts: Sequence[Part], *, computed: bool) -> None:
        """A pass is over, or was left out: remember which blocks hold nothing."""
        for part in parts:
            sequence = part.sequence
            if not computed:
                sequence.cache.length += part.count + len(part.drafts)
                sequence.hollow = True
            if sequence.hollow:
                size = self.pool.block_size
                self.pool.hollow.update(sequence.cache.blocks[part.first // size : count_blocks(part.first + part.count, size)])

    def _admit_next(self) -> bool:
        """Let the next one that waits run, where there is a place and memory for it."""
        if not self._waiting or len(self._running) >= self._max_batch_size or not self._admit(self._waiting[0]):
            return False
        self._running.append(self._waiting.popleft())
        return True

    def _admit(self, sequence: LiveSequence) -> bool:
        """Give a sequence the blocks of all that it knows, those that are shared first; not if there are too few."""
        pool = self.pool
        blocks, chain = pool.find(sequence.ids, hollow=sequence.is_over)
        missing = count_blocks(len(sequence.ids), pool.block_size) - len(blocks)
        if missing + pool.count_kept(blocks) > pool.num_free:
            return False
        pool.own(blocks)
        sequence.hollow = any(block in pool.hollow for block in blocks)
        sequence.chain, sequence.num_known = chain, len(blocks)
        sequence.cache.length = len(blocks) * pool.block_size
        sequence.cache.blocks[:] = [*blocks, *(pool.take() for _ in range(missing))]
        return True

    def _take_part(self, sequence: LiveSequence, budget: int) -> Part:
        """Its next tokens. Blocks that they fill are known from here on: whoever shares them comes later in this pass, or after it."""
        part = Part(sequence, sequence.cache.length, min(sequence.num_pending, budget), sequence.is_decoding)
        size = self.pool.block_size
        while (sequence.num_known + 1) * size <= part.first + part.count:
            first = sequence.num_known * size
            block = sequence.cache.blocks[sequence.num_known]
            sequence.chain = self.pool.know(sequence.chain, sequence.ids[first : first + size], block)
            sequence.num_known += 1
        return part

    def _make_room(self, sequence: LiveSequence) -> bool:
        """Memory for one token more. The youngest give way until there is; False where that is the sequence itself."""
        while sequence.num_pending + sequence.cache.length > len(sequence.cache.blocks) * self.pool.block_size:
            if self.pool.num_free:
                sequence.cache.blocks.append(self.pool.take())
            elif self._running[-1] is sequence:
                return False
            else:
                youngest = self._running.pop()
                self._release(youngest)
                self._waiting.appendleft(youngest)
        return True

    def _release(self, sequence: LiveSequence) -> None:
        self.pool.give_back(sequence.cache.blocks)
        sequence.cache.blocks.clear()
        sequence.cache.length = sequence.num_known = 0
        sequence.chain, sequence.hollow = ROOT, False

    def _draft(self, sequence: LiveSequence) -> tuple[int, ...]:
        """Guesses, as many as may still come and as there is free memory for."""
        if sequence.lookup is None:
            return ()
        drafts = sequence.lookup.draft(min(MAX_DRAFT, sequence.request.params.max_new_tokens - sequence.num_new - 1))
        blocks, size = sequence.cache.blocks, self.pool.block_size
        while len(sequence.ids) + len(drafts) > len(blocks) * size and self.pool.num_free:
            blocks.append(self.pool.take())
        return drafts[: len(blocks) * size - len(sequence.ids)]

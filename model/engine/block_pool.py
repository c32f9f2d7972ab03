"""Ownership of KV cache blocks: reference counts, and a prefix cache that lets several sequences share blocks.

A full block is identified by its tokens and its predecessor, so equal blocks have equal prefixes. A block without owners stays cached
until its memory is needed; the least recently released is evicted first.
"""

from collections.abc import Sequence

ROOT = 0
"""The predecessor of the first block of every chain; LoRA adapter N has its own, -N, since its keys and values differ."""


class BlockPool:
    """The blocks of one KV cache store."""

    def __init__(self, num_blocks: int, block_size: int, *, share: bool) -> None:
        """`share`: whether to find and reuse equal prefixes."""
        self.num_blocks, self.block_size, self.share = num_blocks, block_size, share
        self.hollow: set[int] = set()
        """Cached blocks whose keys and values were not computed, which may occur in the blocks of a finished sequence."""
        self.drafted: set[int] = set()
        """Blocks for all of whose tokens the draft model, if any, has computed its own keys and values."""
        self._owners = [0] * num_blocks
        self._untouched = 0
        """Blocks from here on have never been used, so their memory is not committed yet."""
        self._empty: list[int] = []
        """Released blocks that are not cached."""
        self._kept: dict[int, None] = {}
        """Released blocks that are cached, least recently released first."""
        # Chains have their own numbers, since a block number is reused with other tokens.
        self._chains: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        """(previous chain, tokens of the block): (chain, block)."""
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        """The key in `_chains` of each cached block."""
        self._last_chain = ROOT

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated."""
        return len(self._empty) + len(self._kept) + self.num_blocks - self._untouched

    @property
    def num_used(self) -> int:
        """Number of blocks that have owners."""
        return self.num_blocks - self.num_free

    def find(self, ids: Sequence[int], *, hollow: bool, root: int = ROOT) -> tuple[list[int], int]:
        """Return the cached blocks of the longest prefix, and the end of their chain. Leaves at least one token to compute.

        `hollow`: whether to accept blocks whose contents were not computed. `root`: predecessor of the first block.
        """
        blocks: list[int] = []
        chain = root
        for first in range(0, (len(ids) - 1) // self.block_size * self.block_size, self.block_size) if self.share else ():
            found = self._chains.get((chain, tuple(ids[first : first + self.block_size])))
            if found is None or (found[1] in self.hollow and not hollow):
                break
            chain = found[0]
            blocks.append(found[1])
        return blocks, chain

    def count_kept(self, blocks: Sequence[int]) -> int:
        """Count how many of these blocks have no owner; `own` removes those from the free blocks."""
        return sum(not self._owners[block] for block in blocks)

    def own(self, blocks: Sequence[int]) -> None:
        """Increment the reference count of each of these cached blocks."""
        for block in blocks:
            self._kept.pop(block, None)
            self._owners[block] += 1

    def take(self) -> int:
        """Allocate an empty block. At least one must be free."""
        if self._empty:
            block = self._empty.pop()
        elif self._untouched < self.num_blocks:
            block = self._untouched
            self._untouched += 1
        else:
            block = next(iter(self._kept))
            del self._kept[block]
            del self._chains[self._keys.pop(block)]
        self.hollow.discard(block)
        self.drafted.discard(block)
        self._owners[block] = 1
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        """Decrement the reference count of each block of a sequence. Its last blocks are evicted first, since they are useless without the
        earlier ones.
        """
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def know(self, chain: int, ids: Sequence[int], block: int) -> int:
        """Cache a full block after a chain and return the chain that ends with it. Of two equal blocks the first is kept."""
        if not self.share:
            return ROOT
        key = (chain, tuple(ids))
        if key not in self._chains:
            self._last_chain += 1
            self._chains[key] = self._last_chain, block
            self._keys[block] = key
        return self._chains[key][0]

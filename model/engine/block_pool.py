"""Who owns which block of a store: counts of owners, and prefixes that several sequences share.

A full block is known by its tokens and by the block before it, so that equal blocks have equal pasts. When nobody owns it any longer, it
stays known until its memory is needed, the one that was given back first goes first. Knows numbers and ids; no tensors.
"""

from collections.abc import Sequence

ROOT = 0
"""The place before the first block of every chain."""


class BlockPool:
    """The blocks of one store."""

    def __init__(self, num_blocks: int, block_size: int, *, share: bool) -> None:
        """`share`: whether equal prefixes are found again."""
        self.num_blocks, self.block_size, self.share = num_blocks, block_size, share
        self.hollow: set[int] = set()
        """Blocks that are known, but whose keys and values were left out, as those of a sequence that has ended may be."""
        self._owners = [0] * num_blocks
        self._untouched = 0
        """Blocks from here on have never been used: their memory is not there yet."""
        self._empty: list[int] = []
        """Given back, and not known."""
        self._kept: dict[int, None] = {}
        """Given back, and known, the longest ago first."""
        # A chain has a number of its own, since the number of a block comes again with other tokens in it.
        self._chains: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        """(chain before, tokens of the block): (chain, block)."""
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Of each known block."""
        self._last_chain = ROOT

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._empty) + len(self._kept) + self.num_blocks - self._untouched

    @property
    def num_used(self) -> int:
        """Blocks that somebody owns."""
        return self.num_blocks - self.num_free

    def find(self, ids: Sequence[int], *, hollow: bool) -> tuple[list[int], int]:
        """Known blocks of the longest prefix, and the end of their chain. At least one token is left over: somebody has to compute.

        `hollow`: whether blocks will do whose contents were left out.
        """
        blocks: list[int] = []
        chain = ROOT
        for first in range(0, (len(ids) - 1) // self.block_size * self.block_size, self.block_size) if self.share else ():
            found = self._chains.get((chain, tuple(ids[first : first + self.block_size])))
            if found is None or (found[1] in self.hollow and not hollow):
                break
            chain = found[0]
            blocks.append(found[1])
        return blocks, chain

    def count_kept(self, blocks: Sequence[int]) -> int:
        """How many of these nobody owns: `own` makes them count no longer as free."""
        return sum(not self._owners[block] for block in blocks)

    def own(self, blocks: Sequence[int]) -> None:
        """One owner more for each of these known blocks."""
        for block in blocks:
            self._kept.pop(block, None)
            self._owners[block] += 1

    def take(self) -> int:
        """A block with nothing in it. There has to be a free one."""
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
        self._owners[block] = 1
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        """One owner less for each block of a sequence. Its last blocks will be the first to go: who knows those needs the others."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def know(self, chain: int, ids: Sequence[int], block: int) -> int:
        """Make a full block known, behind a chain; give the chain that ends with it. Of two with equal pasts the first stays known."""
        if not self.share:
            return ROOT
        key = (chain, tuple(ids))
        if key not in self._chains:
            self._last_chain += 1
            self._chains[key] = self._last_chain, block
            self._keys[block] = key
        return self._chains[key][0]

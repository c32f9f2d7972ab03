"""Scheduler: decides which sequences go into the next pass, and admits and preempts sequences as memory allows.

The contents of a pass depend only on the requests and their tokens, never on time: a repeated run uses the same batches and so gives
bitwise identical results. Does not run the model or choose tokens.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from model.engine.block_pool import ROOT, BlockPool
from model.engine.draft_model import DraftModel
from model.engine.sequence import LiveSequence, Part
from model.engine.speculation import MAX_DRAFT
from model.layers.cache import KeyValueStore
from model.spec.config import PREFILL_TOKENS, count_blocks

_LEAST_PREFILL_TOKENS = 16


@dataclass(slots=True)
class SchedulerCounts:
    """Counters of admissions."""

    prefix_queries: int = 0
    """Tokens of admitted sequences."""
    prefix_hits: int = 0
    """Those among them that were in shared blocks."""
    preemptions: int = 0
    """Sequences that gave their blocks to older ones."""


class Scheduler:
    """The sequences of one engine and the blocks of its KV cache store."""

    def __init__(self, store: KeyValueStore, max_batch_size: int, *, share_prefixes: bool, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.pool = BlockPool(store.num_blocks, store.block_size, share=share_prefixes)
        self.counts = SchedulerCounts()
        self.draft_model: DraftModel | None = None
        """Drafts for the sequences that have a state in it."""
        self._max_batch_size, self._prefill_tokens = max_batch_size, prefill_tokens
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        """Oldest first. Each of them could finish if all younger ones were preempted."""

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._waiting or self._running)

    def add(self, sequence: LiveSequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def remove(self, sequence: LiveSequence) -> None:
        """Remove a finished sequence."""
        self._running.remove(sequence)
        self._release(sequence)

    def cancel(self, index: int) -> None:
        """Remove the sequences of a request, if any are left."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request.index != index)
        for sequence in [sequence for sequence in self._running if sequence.request.index == index]:
            self.remove(sequence)

    def spoil(self, sequence: LiveSequence, position: int) -> list[LiveSequence]:
        """Exclude a sequence's blocks from `position` on from sharing. Return the live sequences that use any of them, including itself."""
        blocks = set(sequence.cache.blocks[position // self.pool.block_size :])
        self.pool.hollow.update(blocks)
        return [one for one in self._running if not one.is_over and (one is sequence or blocks.intersection(one.cache.blocks))]

    def plan(self) -> list[Part]:
        """Plan the next pass: one token per decoding sequence, then prompt parts, up to `prefill_tokens` in all."""
        parts: dict[LiveSequence, Part] = {}
        short = False
        for sequence in list(self._running):
            if sequence in self._running and sequence.is_decoding:  # otherwise it was preempted
                if self._make_room(sequence):
                    parts[sequence] = self._take_part(sequence, 1)
                else:
                    short = True  # the youngest keeps its blocks and waits for the older ones
            short = short or sequence not in self._running
        for sequence, drafts in self._draft(list(parts)).items():
            parts[sequence] = Part(sequence, parts[sequence].first, 1, True, drafts)
        # Prompts always progress, however many sequences decode.
        budget = max(_LEAST_PREFILL_TOKENS, self._prefill_tokens - sum(1 + len(part.drafts) for part in parts.values()))
        self._plan_prefill(parts, budget, admits=not short)  # neither readmit a preempted sequence at once nor admit another one
        # A sequence may share blocks that an earlier one fills in the same pass, so the order matters.
        return [parts[sequence] for sequence in self._running if sequence in parts]

    def _plan_prefill(self, parts: dict[LiveSequence, Part], budget: int, *, admits: bool) -> None:
        """Add prompt parts. Shorter prompts overtake the oldest one, which is guaranteed a quarter of every pass plus what the others leave
        unused.
        """
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
        """Whether the results of a pass are needed: not if all its sequences are finished and none of their blocks can be shared."""
        if not all(part.sequence.is_over for part in parts):
            return True
        if not self.pool.share:
            return False
        size = self.pool.block_size
        ended = [(part.sequence.adapter, part.sequence.final_ids[:size]) for part in parts]
        live = [(one.adapter, one.final_ids[:size]) for one in (*self._running, *self._waiting) if not one.is_over]
        # A sequence whose first block is not full yet may still come to match.
        return any(
            adapter == other and len(ids) == size and ids[: len(others)] == others for adapter, ids in ended for other, others in live
        )

    def pass_by(self, parts: Sequence[Part], *, computed: bool) -> None:
        """Finish a pass, computed or skipped, and record the blocks that were not computed."""
        for part in parts:
            sequence = part.sequence
            if not computed:
                sequence.cache.length += part.count + len(part.drafts)
                sequence.hollow = True
            if sequence.hollow:
                size = self.pool.block_size
                self.pool.hollow.update(sequence.cache.blocks[part.first // size : count_blocks(part.first + part.count, size)])

    def _admit_next(self) -> bool:
        """Admit the next waiting sequence if the batch and the memory allow it."""
        if not self._waiting or len(self._running) >= self._max_batch_size or not self._admit(self._waiting[0]):
            return False
        self._running.append(self._waiting.popleft())
        return True

    def _admit(self, sequence: LiveSequence) -> bool:
        """Allocate the blocks for all tokens of a sequence, reusing shared ones; return False if there are too few."""
        pool = self.pool
        # Tokens in shared blocks do not go through the model, so they could not be scored.
        blocks: list[int] = []
        chain = ROOT - sequence.adapter
        if not sequence.num_unscored:
            blocks, chain = pool.find(sequence.ids, hollow=sequence.is_over, root=chain)
        missing = count_blocks(len(sequence.ids), pool.block_size) - len(blocks)
        if missing + pool.count_kept(blocks) > pool.num_free:
            return False
        self.counts.prefix_queries += len(sequence.ids)
        self.counts.prefix_hits += len(blocks) * pool.block_size
        pool.own(blocks)
        sequence.hollow = any(block in pool.hollow for block in blocks)
        sequence.chain, sequence.num_known = chain, len(blocks)
        sequence.cache.length = len(blocks) * pool.block_size
        sequence.cache.blocks[:] = [*blocks, *(pool.take() for _ in range(missing))]
        if self.draft_model is not None:
            self.draft_model.admit(sequence)
        return True

    def _take_part(self, sequence: LiveSequence, budget: int) -> Part:
        """Take its next tokens. Blocks that they fill are cached from here on: any sharer runs later in this pass or after it."""
        part = Part(sequence, sequence.cache.length, min(sequence.num_pending, budget), sequence.is_decoding)
        size = self.pool.block_size
        while (sequence.num_known + 1) * size <= part.first + part.count:
            first = sequence.num_known * size
            block = sequence.cache.blocks[sequence.num_known]
            sequence.chain = self.pool.know(sequence.chain, sequence.ids[first : first + size], block)
            sequence.num_known += 1
        return part

    def _make_room(self, sequence: LiveSequence) -> bool:
        """Make room for one more token by preempting the youngest sequences; return False if the youngest is this one."""
        while sequence.num_pending + sequence.cache.length > len(sequence.cache.blocks) * self.pool.block_size:
            if self.pool.num_free:
                sequence.cache.blocks.append(self.pool.take())
            elif self._running[-1] is sequence:
                return False
            else:
                youngest = self._running.pop()
                self.counts.preemptions += 1
                self._release(youngest)
                self._waiting.appendleft(youngest)
        return True

    def _release(self, sequence: LiveSequence) -> None:
        self.pool.give_back(sequence.cache.blocks)
        sequence.cache.blocks.clear()
        sequence.cache.length = sequence.num_known = 0
        if sequence.draft is not None:
            sequence.draft.cache.length = 0
        sequence.chain, sequence.hollow = ROOT, False

    def _draft(self, sequences: Sequence[LiveSequence]) -> dict[LiveSequence, tuple[int, ...]]:
        """Draft tokens of decoding sequences, limited by the remaining new tokens and by the free memory."""
        drafts: dict[LiveSequence, tuple[int, ...]] = {}
        counts: dict[LiveSequence, int] = {}
        for sequence in sequences:
            left = sequence.request.params.max_new_tokens - sequence.num_new - 1
            if sequence.draft is not None:
                counts[sequence] = self._make_draft_room(sequence, min(sequence.draft.pace.plan(), left))
            elif sequence.lookup is not None:
                found = sequence.lookup.draft(min(MAX_DRAFT, left))
                drafts[sequence] = found[: self._make_draft_room(sequence, len(found))]
        if self.draft_model is not None and counts:
            drafts |= self.draft_model.draft(counts)
        return {sequence: tokens for sequence, tokens in drafts.items() if tokens}

    def _make_draft_room(self, sequence: LiveSequence, count: int) -> int:
        """Allocate blocks for draft tokens, without preempting; return the number of tokens that fit, at most `count`."""
        blocks, size = sequence.cache.blocks, self.pool.block_size
        while len(sequence.ids) + count > len(blocks) * size and self.pool.num_free:
            blocks.append(self.pool.take())
        return min(count, len(blocks) * size - len(sequence.ids))

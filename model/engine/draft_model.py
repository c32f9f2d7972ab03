"""Speculation with a draft model: a smaller model over the same vocabulary drafts tokens that the large one verifies in one pass.

The draft model is split over the same ranks, so that every rank reads a part of it and all draft the same tokens. Its KV cache has the
large one's blocks, in a store of its own: what shares, preempts or frees a block does so for both. A draft token is sampled as the large
model will sample it, with the same options and random numbers, since that makes it most likely to be accepted. What the draft model has
not seen, or sees as NaN, costs accepted tokens and never changes the text.
"""

from collections.abc import Mapping, Sequence

from model.decoder.llama import LlamaForCausalLM
from model.engine.block_pool import BlockPool
from model.engine.choice import NO_TOKEN
from model.engine.sampling import SamplingState, sample
from model.engine.sequence import LiveSequence, ModelDraft, Part
from model.engine.speculation import DraftPace
from model.layers.batch import Span
from model.layers.cache import KeyValueCache


class DraftModel:
    """The draft model of one engine."""

    def __init__(self, model: LlamaForCausalLM, num_tokens: int, pool: BlockPool, vocab_size: int) -> None:
        """`num_tokens`: maximum draft tokens per pass. `pool` and `vocab_size` are those of the large model."""
        self._model, self._num_tokens, self._pool, self._vocab_size = model, num_tokens, pool, vocab_size
        self._store = model.build_store(pool.num_blocks, pool.block_size)

    def begin(self, sequence: LiveSequence) -> None:
        """Prepare to draft for a new sequence."""
        sequence.draft = ModelDraft(KeyValueCache(self._store, sequence.cache.blocks), DraftPace(self._num_tokens))

    def admit(self, sequence: LiveSequence) -> None:
        """Begin after the shared blocks of an admitted sequence, as far as they are filled here too."""
        if sequence.draft is not None:
            shared = sequence.cache.blocks[: sequence.num_known]
            filled = next((place for place, block in enumerate(shared) if block not in self._pool.drafted), len(shared))
            sequence.draft.cache.length = filled * self._pool.block_size

    def follow(self, parts: Sequence[Part]) -> None:
        """Process the prompt tokens of a pass."""
        spans = {}
        for part in parts:
            sequence, end = part.sequence, min(part.first + part.count, self._model.config.max_position_embeddings)
            if not part.decodes and sequence.draft is not None and sequence.draft.cache.length < end:
                if (span := self._find_span(sequence, end)) is not None:
                    spans[sequence] = span
        if spans:
            self._model(list(spans.values()))
        for sequence in spans:
            self._note_filled(sequence)

    def draft(self, counts: Mapping[LiveSequence, int]) -> dict[LiveSequence, tuple[int, ...]]:
        """Draft up to `counts` tokens for decoding sequences whose blocks have room for them."""
        drafts: dict[LiveSequence, list[int]] = {}
        states: dict[LiveSequence, SamplingState] = {}
        spans: dict[LiveSequence, Span] = {}
        for sequence, count in counts.items():
            if count > 0 and (span := self._find_span(sequence, len(sequence.ids))) is not None:
                drafts[sequence], spans[sequence] = [], span
                states[sequence] = sequence.sampling.after(())
        longest = self._model.config.max_position_embeddings
        while spans:
            following = {}
            for sequence, token in self._choose(spans, states).items():
                if token is None:
                    continue
                tokens, cache = drafts[sequence], spans[sequence].cache
                tokens.append(token)
                if len(tokens) < counts[sequence] and token not in sequence.sampling.end_ids and cache.length < longest:
                    following[sequence] = Span(cache, (token,))
            spans = following
        return {sequence: tuple(tokens) for sequence, tokens in drafts.items()}

    def settle(self, sequence: LiveSequence) -> None:
        """Drop rejected draft tokens, and note the blocks that are filled."""
        if sequence.draft is not None:
            sequence.draft.cache.length = min(sequence.draft.cache.length, len(sequence.ids) - 1)
            self._note_filled(sequence)

    def _choose(self, spans: Mapping[LiveSequence, Span], states: Mapping[LiveSequence, SamplingState]) -> dict[LiveSequence, int | None]:
        """Return the next token of each sequence; None where the large model cannot take it."""
        model = self._model
        hidden = model(list(spans.values()))
        rows, end = [], 0
        for span in spans.values():
            end += len(span.ids)
            rows.append(end - 1)
        logits = model.logits_local(hidden if len(rows) == len(hidden) else hidden[rows])
        choices = sample(logits, [states[sequence] for sequence in spans], model.shares.vocab, model.collectives)
        found = [None if choice is None or choice is NO_TOKEN or choice.token_id >= self._vocab_size else choice for choice in choices]
        return {sequence: None if choice is None else choice.token_id for sequence, choice in zip(spans, found, strict=True)}

    def _find_span(self, sequence: LiveSequence, end: int) -> Span | None:
        """Return the tokens up to `end` that the draft model has not seen; None if they do not fit it. Tokens that its vocabulary lacks end
        drafting for the sequence.
        """
        config, draft = self._model.config, sequence.draft
        if draft is None or end > config.max_position_embeddings:
            return None
        ids = sequence.ids[draft.cache.length : end]
        if max(ids) >= config.vocab_size:
            sequence.draft = None
            return None
        return Span(draft.cache, ids)

    def _note_filled(self, sequence: LiveSequence) -> None:
        if sequence.draft is not None:
            self._pool.drafted.update(sequence.cache.blocks[: sequence.draft.cache.length // self._pool.block_size])

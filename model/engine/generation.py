"""The token generator: sequences wait, are prefilled, decode in batches, and leave when finished.

Every rank runs the same engine on the same requests and takes the same steps. Both predict and serve consume the events of `step`.
`model/engine/scheduling.py` decides the contents of a pass. Works on token ids only, not text.

A resumed run prefills the resumed tokens together with their prompts (`prefill_resumed`). Without native kernels, the low-order bits of a
matmul depend on the batch size; the run then repeats the original steps with the same batches, takes the resumed tokens instead of
sampling, and skips steps whose results are not needed.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from model.decoder.llama import LlamaForCausalLM
from model.decoder.non_finite import explain, find_first_layer
from model.engine.choice import NO_TOKEN, Choice
from model.engine.draft_model import DraftModel
from model.engine.events import PromptScore, SequenceFailure, TokenEvent
from model.engine.grammar import Grammars
from model.engine.grammar_masks import share_masks
from model.engine.request import Request, check_memory, check_request
from model.engine.sampling import RandomNumbers, SamplingState, sample, score
from model.engine.scheduling import Scheduler, SchedulerCounts
from model.engine.sequence import LiveSequence, Part
from model.engine.speculation import DEFAULT_DRAFT_TOKENS, PromptLookup
from model.layers.batch import Span
from model.layers.cache import KeyValueCache
from model.spec.config import DEFAULT_BLOCK_SIZE, PREFILL_TOKENS, count_blocks
from parallel.errors import NonFiniteError, RequestError

_SCORED_ROWS = 32
"""Prompt tokens scored at a time: their logits over the whole vocabulary are in memory at once."""


@dataclass(slots=True)
class EngineTimes:
    """Counters for throughput. Resumed tokens, and steps that produced nothing new, do not count as decoding.

    A pass may hold both prompt parts and decoding tokens; its time is divided in proportion to the tokens.
    """

    prefill_tokens: int = 0
    """Prompt tokens that went through the model: excludes those in shared blocks, and counts those of preempted sequences again."""
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """Time from the engine's first step to the first new token (not a resumed one)."""
    speculated_tokens: int = 0
    """Draft tokens that went through the model."""
    accepted_tokens: int = 0
    """Draft tokens that were accepted."""


class Engine:
    """Continuous batching over one model. Requests may be added and cancelled between steps."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        max_batch_size: int = 16,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        share_prefixes: bool = True,
        speculate: bool = False,
        draft_model: LlamaForCausalLM | None = None,
        draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        prefill_tokens: int = PREFILL_TOKENS,
        prefill_resumed: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        """`num_blocks`: size of the KV cache; None reserves address space for `max_batch_size` full contexts.

        `share_prefixes`: store equal prefixes once. `speculate`: draft tokens for greedy sequences and verify several per pass.
        `draft_model`: drafts up to `draft_tokens` per pass for all sequences instead, greedy or not. Both are ignored unless the model is
        batch-invariant. `prefill_tokens`: maximum per pass. `prefill_resumed`: prefill resumed tokens with their prompts instead of one
        by one, and skip finished requests; the new tokens are bitwise identical if the model is batch-invariant.
        `grammars`: compiles the grammars of requests, on rank 0; None refuses such requests.
        Raises ConfigError for an invalid block configuration.
        """
        if num_blocks is None:
            num_blocks = max_batch_size * count_blocks(model.config.max_position_embeddings, block_size)
        self._model = model
        self._store = model.build_store(num_blocks, block_size)
        self._scheduler = Scheduler(self._store, max_batch_size, share_prefixes=share_prefixes, prefill_tokens=prefill_tokens)
        self.speculates = (speculate or draft_model is not None) and model.batch_invariant
        self._draft_model: DraftModel | None = None
        if draft_model is not None and self.speculates:
            self._draft_model = DraftModel(draft_model, draft_tokens, self._scheduler.pool, model.config.vocab_size)
            self._scheduler.draft_model = self._draft_model
        self._prefill_known, self._grammars = prefill_resumed, grammars
        self._began: float | None = None
        self._scores: list[PromptScore] = []
        self.times = EngineTimes()
        self.failures: list[SequenceFailure] = []
        """Sequences that the last step ended because their logits were NaN or infinite."""

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it exceeds the model's context or the size of the KV cache."""
        config = self._model.config
        check_request(request, config.max_position_embeddings, config.vocab_size)
        check_memory(request, self._store.num_blocks, self._store.block_size)
        penalized = set(request.prompt_ids)
        if config.pad_token_id is not None and config.pad_token_id not in config.eos_token_ids:
            penalized.add(config.pad_token_id)  # MindFormers pads rows, and its penalty covers the padding
        params = request.params
        end_ids = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)))
        sampling = SamplingState(params, penalized, RandomNumbers(params.seed), end_ids=end_ids)
        lookup = PromptLookup() if self.speculates and self._draft_model is None and not params.do_sample else None
        if lookup is not None:
            lookup.extend(request.prompt_ids)
        sequence = LiveSequence(request, sampling, KeyValueCache(self._store, []), list(request.prompt_ids), lookup)
        if request.adapter is not None:
            sequence.adapter = self._find_adapter(request.adapter)
        if self._draft_model is not None:
            self._draft_model.begin(sequence)
        if params.grammar:
            if self._grammars is None:
                raise RequestError("structured output is not available in this run")
            if self._model.collectives.rank == 0:
                sequence.grammar = self._grammars.start(params.grammar)
        if self._prefill_known:
            if request.known_reason:
                return
            for token in request.resumed_ids:
                sampling.take(token)
                self._go_on(sequence, token)
        self._scheduler.add(sequence)

    def cancel(self, index: int) -> None:
        """Drop a request, if it is still running, and free its memory. Emits no event."""
        self._scheduler.cancel(index)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything for `step` to do."""
        return self._scheduler.has_unfinished

    @property
    def num_used_blocks(self) -> int:
        """Number of KV cache blocks in use; a shared block counts once."""
        return self._scheduler.pool.num_used

    @property
    def counts(self) -> SchedulerCounts:
        """Counters of admissions."""
        return self._scheduler.counts

    def take_scores(self) -> list[PromptScore]:
        """Return the prompt scores since the last call (rank 0 only). A request's last score comes no later than its first token."""
        scores, self._scores = self._scores, []
        return scores

    def step(self) -> list[TokenEvent]:
        """Run one pass over the decoding sequences and part of the waiting prompts, and return the new tokens.

        A sequence whose logits are not finite ends with an entry in `failures`; the others are unaffected.
        """
        self.failures = []
        if not self.has_unfinished:
            return []
        started = time.perf_counter()
        self._began = started if self._began is None else self._began
        parts = self._scheduler.plan()
        assert parts, "the oldest sequence always has memory"
        # A finished sequence stays in the batch to preserve its size. Where its own prompt was skipped its result is wrong, but unused.
        computed = self._scheduler.is_needed(parts)
        masks = self._begin_masks(parts)
        hidden = self._model([Span(part.sequence.cache, part.ids, part.sequence.adapter) for part in parts]) if computed else None
        self._scheduler.pass_by(parts, computed=computed)
        if hidden is not None:
            if not all(part.decodes for part in parts):
                self._check_prompts(parts, hidden)
            self._score(parts, hidden)
            if self._draft_model is not None:
                self._draft_model.follow(parts)
        events = self._choose(parts, hidden, masks)
        for failure in self.failures:
            self._scheduler.cancel(failure.index)
        ended = time.perf_counter()
        if computed:
            self._count(parts, events, ended - started)
        if events and not self.times.first_token_seconds:
            self.times.first_token_seconds = ended - self._began
        return events

    def _count(self, parts: Sequence[Part], events: Sequence[TokenEvent], seconds: float) -> None:
        times = self.times
        prefill = sum(part.count for part in parts if not part.decodes)
        total = sum(part.count + len(part.drafts) for part in parts)
        times.prefill_tokens += prefill
        times.prefill_seconds += seconds * prefill / total
        decoding = {part.sequence.request.index for part in parts if part.decodes}
        decoded = sum(event.index in decoding for event in events)
        if decoded:
            times.decode_tokens += decoded
            times.decode_seconds += seconds * (total - prefill) / total

    def _score(self, parts: Sequence[Part], hidden: torch.Tensor) -> None:
        """Compute log-probabilities of prompt tokens from the rows before them."""
        wanted: list[tuple[int, LiveSequence, int]] = []  # row, sequence, position of the token
        end = 0
        for part in parts:
            sequence, row = part.sequence, end - part.first
            end += part.count + len(part.drafts)
            if sequence.num_unscored:
                first, last = sequence.num_scored, min(part.first + part.count, len(sequence.request.prompt_ids) - 1)
                wanted += [(row + place, sequence, place + 1) for place in range(first, last)]
                sequence.num_scored = max(first, last)
        model = self._model
        for start in range(0, len(wanted), _SCORED_ROWS):
            some = wanted[start : start + _SCORED_ROWS]
            logits = model.logits_local(hidden[[row for row, _, _ in some]])
            targets = [(sequence.ids[place], sequence.request.params.top_logprobs) for _, sequence, place in some]
            choices = score(logits, targets, model.shares.vocab, model.collectives)
            for (_, sequence, place), choice in zip(some, choices, strict=False):  # empty except on rank 0
                self._scores.append(PromptScore(sequence.request.index, place, choice))

    def _begin_masks(self, parts: Sequence[Part]) -> "Future[list[bytes]] | None":
        """Start computing the masks of all rows of constrained sequences, on rank 0."""
        jobs = [(part.sequence.grammar, part.drafts) for part in parts if part.is_last and part.sequence.grammar is not None]
        return self._grammars.compute(jobs) if jobs and self._grammars is not None else None

    def _choose(self, parts: Sequence[Part], hidden: torch.Tensor | None, masks: "Future[list[bytes]] | None") -> list[TokenEvent]:
        """Choose the next tokens of each sequence whose last token went through: resumed ones if any, otherwise sampled from `hidden`. Only
        sampled tokens become events.
        """
        rows: list[int] = []
        wanted: list[tuple[int, SamplingState]] = []  # indices into `rows`
        limited: list[int] = []  # indices into `rows` with a mask
        end = 0
        for part in parts:
            end += part.count + len(part.drafts)
            if part.is_last:
                if part.sequence.request.params.grammar:
                    limited.extend(range(len(rows), len(rows) + 1 + len(part.drafts)))
                wanted.extend((len(rows) + ahead, state) for ahead, state in _list_unknown(part))
                rows.extend(range(end - len(part.drafts) - 1, end))
        found_masks = masks.result() if masks is not None else ()  # the parsers must be idle before tokens are taken
        chosen: dict[int, Choice | None] = {}
        if wanted:
            assert hidden is not None, "a sequence that has ended knows all its tokens"
            # Include the rows of resumed tokens: the low-order bits depend on the batch size.
            logits = self._model.logits_local(hidden if len(rows) == len(hidden) else hidden[rows])
            places, states = [place for place, _ in wanted], [state for _, state in wanted]
            logits = logits if len(places) == len(rows) else logits[places]
            model, allowed = self._model, {}
            if limited:
                rows_allowed = share_masks(found_masks, len(limited), model.config.vocab_size, model.collectives)
                by_place = dict(zip(limited, rows_allowed, strict=True))
                allowed = {number: by_place[place] for number, place in enumerate(places) if place in by_place}
            find = None if model.backend.in_host_memory else model.backend.find_largest
            chosen = dict(zip(places, sample(logits, states, model.shares.vocab, model.collectives, allowed, find), strict=True))
        events: list[TokenEvent] = []
        place = 0
        for part in parts:
            if part.is_last:
                if not self._has_failed(part.sequence):
                    events += self._take(part, [chosen.get(place + ahead) for ahead in range(1 + len(part.drafts))])
                place += 1 + len(part.drafts)
        return events

    def _take(self, part: Part, chosen: Sequence[Choice | None]) -> list[TokenEvent]:
        """Append the next token, and one more for each accepted draft token."""
        sequence, events, num_right, reason = part.sequence, [], 0, None
        for ahead, found in enumerate(chosen):
            known = sequence.knows(0)
            if known is not None:
                found = Choice(known, None)
            if found is None:
                self._fail(sequence, len(sequence.ids) - 1)
                break
            if found is NO_TOKEN:
                self._fail_restricted(sequence)
                break
            token = found.token_id
            if known is not None or part.drafts:
                sequence.sampling.take(token)
            reason = self._go_on(sequence, token)
            if known is None:
                position = sequence.num_new - 1
                events.append(TokenEvent(sequence.request.index, token, found.logprob, reason, position, found.top_logprobs))
            if reason or ahead == len(part.drafts) or part.drafts[ahead] != token:
                break
            num_right += 1
        if part.drafts:
            sequence.judge(len(part.drafts), num_right)
        if self._draft_model is not None:
            self._draft_model.settle(sequence)
        if events:
            self.times.speculated_tokens += len(part.drafts)
            self.times.accepted_tokens += num_right
        if reason:
            self._scheduler.remove(sequence)
        elif part.drafts:
            sequence.cache.length = len(sequence.ids) - 1  # rejected draft tokens are overwritten
        return events

    def _check_prompts(self, parts: Sequence[Part], hidden: torch.Tensor) -> None:
        """Fail sequences with a prompt token whose hidden state is not finite: an int8 cache would store it as finite keys."""
        if hidden.isfinite().all():
            return
        is_finite, row = hidden.isfinite().all(dim=1).tolist(), 0
        for part in parts:
            count = part.count + len(part.drafts)
            bad = [place for place in range(part.count) if not is_finite[row + place]]
            if bad and not part.sequence.is_over:
                self._fail(part.sequence, part.first + bad[0])
            row += count

    def _fail(self, sequence: LiveSequence, position: int) -> None:
        """Record a failure of this sequence at `position`, and of all that share the affected blocks. They are removed at the end of the
        step.
        """
        for one in self._scheduler.spoil(sequence, position):
            if not self._has_failed(one):
                layer = find_first_layer(self._model, one.ids[: position + 1], one.adapter)
                message = explain(self._model.dtype, f"at step {one.num_new + 1}", layer)
                self.failures.append(SequenceFailure(one.request.index, one.num_new, message))

    def _fail_restricted(self, sequence: LiveSequence) -> None:
        """Record a failure of a sequence that has no token to choose from."""
        error = sequence.grammar.error if sequence.grammar is not None else ""
        message = f"no token is allowed at step {sequence.num_new + 1}: {error or 'the restrictions of the request exclude all of them'}"
        self.failures.append(SequenceFailure(sequence.request.index, sequence.num_new, message, by_request=True))

    def _find_adapter(self, name: str) -> int:
        """Return the number of an adapter. Raises RequestError for an unknown one."""
        number = self._model.adapters.get(name)
        if number is None:
            raise RequestError(f"the LoRA adapter {name!r} is not loaded: give it with --lora {name}=PATH")
        return number

    def _has_failed(self, sequence: LiveSequence) -> bool:
        return any(failure.index == sequence.request.index for failure in self.failures)

    def _go_on(self, sequence: LiveSequence, token: int) -> str | None:
        """Append a new token; return the finish reason if it is the last one."""
        request, params = sequence.request, sequence.request.params
        sequence.ids.append(token)
        sequence.num_new += 1
        if sequence.lookup is not None:
            sequence.lookup.extend((token,))
        if request.known_reason and sequence.num_new == len(request.resumed_ids):
            return request.known_reason  # regardless of the current stop ids
        ignores_eos = params.ignore_eos and not params.grammar
        if token in params.stop_token_ids or (token in self._model.config.eos_token_ids and not ignores_eos):
            return "eos"
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
        return "length" if sequence.num_new == params.max_new_tokens else None


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[TokenEvent]:
    """Run `requests` to completion and yield tokens as they are generated. Raises NonFiniteError when logits are not finite."""
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        yield from step_all(engine)


def step_all(engine: Engine) -> list[TokenEvent]:
    """Run `Engine.step` and raise NonFiniteError if any sequence failed."""
    events = engine.step()
    if engine.failures:
        raise NonFiniteError(engine.failures[0].message)
    return events


def _list_unknown(part: Part) -> Iterator[tuple[int, SamplingState]]:
    """Yield the offsets after the last token at which to sample, with their sampling states. Stops at a draft token known to be wrong."""
    sequence = part.sequence
    for ahead in range(1 + len(part.drafts)):
        known = sequence.knows(ahead)
        if known is None:
            yield ahead, sequence.sampling.after(part.drafts[:ahead]) if part.drafts else sequence.sampling
        elif sequence.num_new + ahead + 1 == len(sequence.request.resumed_ids) and sequence.is_over:
            return
        elif ahead < len(part.drafts) and known != part.drafts[ahead]:
            return

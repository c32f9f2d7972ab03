"""The one token generator: sequences wait, are prefilled, decode together, and leave when they end.

Every rank runs the same engine on the same requests and takes the same steps. Predict, evaluation and serving consume
the events of `step`. Knows token ids only: no text, no files, no processes.

A run that goes on where another one stopped takes the same steps with the same rows: how many rows go through a product together
decides its last bits. Tokens that are known already are taken instead of chosen, and steps that nobody needs are left out.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model.attention import KeyValueCache
from model.config import PREFILL_TOKENS
from model.llama import LlamaForCausalLM, Span
from model.sampling import SamplingParams, SamplingState, sample
from parallel.errors import RequestError


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to go on with."""

    index: int
    """The caller's number of it."""
    prompt_ids: tuple[int, ...]
    """Ids to start from, at least one."""
    params: SamplingParams
    """How to go on."""
    known_ids: tuple[int, ...] = ()
    """New tokens that an earlier attempt has made already."""
    known_reason: str | None = None
    """Its finish reason, when that attempt has come to its end."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token."""

    index: int
    """The request's number."""
    token_id: int
    """The token."""
    logprob: float | None
    """Its log-probability, where asked for."""
    finish_reason: str | None
    """"eos" or "length" with the last token."""
    position: int
    """How many new tokens came before it."""


@dataclass(slots=True)
class EngineTimes:
    """What the engine has done, for speeds. What was known before, and steps that made nothing new, do not count as decoding."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """From the engine's first step to the first token that was not known before."""


@dataclass(slots=True)
class _Sequence:
    request: Request
    cache: KeyValueCache
    sampling: SamplingState
    last_id: int = 0
    num_new: int = field(default=0)

    @property
    def known_id(self) -> int | None:
        """The next token, where it is known already."""
        known = self.request.known_ids
        return known[self.num_new] if self.num_new < len(known) else None


class Engine:
    """Continuous batching over one model."""

    def __init__(self, model: LlamaForCausalLM, max_batch_size: int = 16) -> None:
        self._model, self._max_batch_size = model, max_batch_size
        self._waiting: deque[Request] = deque()
        self._running: list[_Sequence] = []
        self._began: float | None = None
        self.times = EngineTimes()

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it cannot fit the model's context."""
        check_request(request, self._model.config.max_position_embeddings, self._model.config.vocab_size)
        self._waiting.append(request)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    def step(self) -> list[TokenEvent]:
        """One token more for every running sequence, or the first token of the next waiting ones; those that are new are given."""
        started = time.perf_counter()
        self._began = started if self._began is None else self._began
        times = self.times
        admitted = self._admit()
        events = self._prefill(admitted) if admitted else self._decode(list(self._running))
        ended = time.perf_counter()
        if admitted:
            times.prefill_seconds += ended - started
        elif events:
            times.decode_seconds += ended - started
            times.decode_tokens += len(events)
        if events and not times.first_token_seconds:
            times.first_token_seconds = ended - self._began
        return events

    def _decode(self, sequences: list[_Sequence]) -> list[TokenEvent]:
        if _is_over(sequences):
            return self._choose(sequences, None)
        # One that has ended runs along for its row; where its own prompt was left out it sees too little, which is nobody's loss.
        return self._choose(sequences, self._model([Span(sequence.cache, (sequence.last_id,)) for sequence in sequences]))

    def _admit(self) -> list[_Sequence]:
        admitted: list[_Sequence] = []
        while self._waiting and len(self._running) + len(admitted) < self._max_batch_size:
            request = self._waiting.popleft()
            params = request.params
            penalized = set(request.prompt_ids)
            pad = self._model.config.pad_token_id
            if pad is not None and pad not in self._model.config.eos_token_ids:
                penalized.add(pad)  # MindFormers' rows are padded, and its penalty runs over the padded row
            state = SamplingState(params, penalized, np.random.RandomState(params.seed))
            capacity = len(request.prompt_ids) + params.max_new_tokens
            admitted.append(_Sequence(request, self._model.build_cache(capacity), state))
        return admitted

    def _prefill(self, sequences: list[_Sequence]) -> list[TokenEvent]:
        """Run the prompts, as many tokens at a time as fit one pass, and take each first token."""
        events = []
        for group in _group_prompts(sequences):
            self._running.extend(group)
            if _is_over(group):
                events.extend(self._choose(group, None))
                continue
            hidden = None
            lengths = [len(sequence.request.prompt_ids) for sequence in group]
            for first in range(0, max(lengths), PREFILL_TOKENS):
                part = slice(first, first + PREFILL_TOKENS)
                hidden = self._model([Span(sequence.cache, sequence.request.prompt_ids[part]) for sequence in group])
            assert hidden is not None
            self.times.prefill_tokens += sum(lengths)
            last = hidden[-1:] if len(group) == 1 else hidden[np.cumsum(lengths) - 1]
            events.extend(self._choose(group, last))
        return events

    def _choose(self, sequences: Sequence[_Sequence], hidden: torch.Tensor | None) -> list[TokenEvent]:
        """Take the next token of each: the known one, else by its row of `hidden`. Only the latter are events."""
        model = self._model
        new = [row for row, sequence in enumerate(sequences) if sequence.known_id is None]
        chosen: dict[int, tuple[int, float | None]] = {}
        if new:
            assert hidden is not None, "a sequence that has ended knows all its tokens"
            logits = model.logits_local(hidden)
            states = [sequences[row].sampling for row in new]
            logits = logits if len(new) == len(sequences) else logits[new]
            chosen = dict(zip(new, sample(logits, states, model.shares.vocab, model.collectives), strict=True))
        events = []
        for row, sequence in enumerate(sequences):
            known = sequence.known_id
            if known is None:
                token, logprob = chosen[row]
            else:
                token, logprob = known, None
                sequence.sampling.take(token)
            sequence.last_id = token
            sequence.num_new += 1
            request, params, reason = sequence.request, sequence.request.params, None
            if request.known_reason and sequence.num_new == len(request.known_ids):
                reason = request.known_reason  # whatever ids end a sequence now
            elif token in model.config.eos_token_ids and not params.ignore_eos:
                reason = "eos"
            elif sequence.num_new == params.max_new_tokens:
                reason = "length"
            if reason:
                self._running.remove(sequence)
            if known is None:
                events.append(TokenEvent(sequence.request.index, token, logprob, reason, sequence.num_new - 1))
        return events


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[TokenEvent]:
    """Run `requests` to their ends; tokens come as they are made."""
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        yield from engine.step()


def check_request(request: Request, context_tokens: int, vocab_size: int) -> None:
    """Raise RequestError unless the prompt is not empty, of known ids, and fits the context with its new tokens."""
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError(f"prompt {request.index} has no tokens; write at least one word")
    if length >= context_tokens:
        raise RequestError(f"prompt {request.index} has {length} tokens, but the model's context is {context_tokens}: shorten it")
    if length + request.params.max_new_tokens > context_tokens:
        raise RequestError(
            f"prompt {request.index} has {length} tokens and asks for {request.params.max_new_tokens} new ones, "
            f"but the model's context is {context_tokens}"
        )
    if len(request.known_ids) > request.params.max_new_tokens or (request.known_reason and not request.known_ids):
        raise RequestError(
            f"prompt {request.index} is said to have {len(request.known_ids)} new tokens already, "
            f"but 1 to {request.params.max_new_tokens} are asked for"
        )
    unknown = next((i for i in (*request.prompt_ids, *request.known_ids) if not 0 <= i < vocab_size), None)
    if unknown is not None:
        raise RequestError(
            f"prompt {request.index} has id {unknown}, but the vocabulary has {vocab_size}: is it another model's tokenizer?"
        )


def _is_over(sequences: Sequence[_Sequence]) -> bool:
    """Whether an earlier attempt has come to the end of all of them, so that nobody needs what they would compute."""
    return all(sequence.request.known_reason for sequence in sequences)


def _group_prompts(sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    """Prompts that fit one pass together; a longer one alone."""
    group: list[_Sequence] = []
    tokens = 0
    for sequence in sequences:
        length = len(sequence.request.prompt_ids)
        if group and tokens + length > PREFILL_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(sequence)
        tokens += length
    if group:
        yield group

"""Measures the gain of speculation: real prompts, decoded one at a time with and without it, alternating.

The gain depends on the text, so there are two prompts: one whose answer mostly repeats the prompt, and one that is continued freely.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

from launcher.job.speculation_prompts import PROMPTS
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine, generate
from model.engine.request import Request, plan_blocks
from model.spec.config import DEFAULT_BLOCK_SIZE
from parallel.collectives import Collectives
from parallel.errors import RunError


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One decoded prompt."""

    ids: tuple[int, ...]
    """The new tokens."""
    tokens_per_second: float
    """Speed after the first token, on this rank's clock."""
    guessed: int
    accepted: int


def measure_speculation(
    model: LlamaForCausalLM,
    collectives: Collectives,
    requests: Sequence[Request],
    rounds: int,
    on_decoded: Callable[[], None],
    options: Mapping[str, Any] = MappingProxyType({"speculate": True}),
) -> list[dict[str, Any]] | None:
    """Return one row for each of PROMPTS, encoded in `requests`; None if this model's engine does not speculate.

    `options`: those of the engine that make it speculate. Raises RunError if speculation has changed a token.
    """
    if not Engine(model, 1, num_blocks=1, **options).speculates:
        return None
    rows = []
    for name, request in zip(PROMPTS, requests, strict=True):
        plain, guessing = list[_Decoded](), list[_Decoded]()
        for _ in range(rounds):
            for runs, chosen in ((plain, {}), (guessing, options)):
                runs.append(_decode(model, collectives, request, chosen))
                on_decoded()
        rows.append(_compare(name, plain, guessing))
    return rows


def _decode(model: LlamaForCausalLM, collectives: Collectives, request: Request, options: Mapping[str, Any]) -> _Decoded:
    engine = Engine(model, 1, num_blocks=plan_blocks([request], 1, DEFAULT_BLOCK_SIZE), **options)
    collectives.barrier()
    ids = tuple(event.token_id for event in generate(engine, [request]))
    times = engine.times
    return _Decoded(ids, times.decode_tokens / times.decode_seconds, times.speculated_tokens, times.accepted_tokens)


def _compare(name: str, plain: Sequence[_Decoded], guessing: Sequence[_Decoded]) -> dict[str, Any]:
    for run in (*plain, *guessing):
        if run.ids != plain[0].ids:
            place = next(index for index, (one, other) in enumerate(zip(run.ids, plain[0].ids, strict=True)) if one != other)
            raise RunError(
                f"new token {place} of the {name} prompt is {run.ids[place]} in one run and {plain[0].ids[place]} in another, which no "
                "speculation may cause: this is a bug in tandem, please report it"
            )
    without, speed = median(run.tokens_per_second for run in plain), median(run.tokens_per_second for run in guessing)
    guessed, accepted = (sum(getattr(run, part) for run in guessing) for part in ("guessed", "accepted"))
    return {
        "prompt": name,
        "tokens_per_second_plain": without,
        "tokens_per_second": speed,
        "gain": speed / without,
        "accepted_share": accepted / guessed if guessed else None,
        "identical": True,
    }

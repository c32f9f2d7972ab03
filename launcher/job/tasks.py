"""The tasks of a run: decode prompts, serve, evaluate, benchmark, quantize. Plain values that travel as JSON.

All text is already tokenized. The implementations are in `launcher/worker/run.py`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from model.engine.request import Request
from model.engine.sampling import SamplingParams
from model.quantization.recipe import Recipe
from model.spec.scheme import LinearScheme

EVALUATIONS = ("boolq", "perplexity")


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode a fixed set of prompts."""

    requests: tuple[Request, ...]
    """The prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Decode requests as they arrive."""

    requests: tuple[Request, ...]
    """Requests present at startup."""
    num_blocks: int
    """Number of KV cache blocks; the same on every host, whatever its memory."""
    prefill_tokens: int
    """Maximum prompt tokens per forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Score the model."""

    name: str
    """One of EVALUATIONS."""
    rows: tuple[tuple[int, ...], ...]
    """Windows of a text, or prompts of questions."""
    answers: tuple[bool, ...] = ()
    """Correct answers to the questions."""
    choices: tuple[int, int] = (0, 0)
    """Token ids of yes and no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Quantize the checkpoint's layers into a work folder."""

    recipe: Recipe
    """The quantization recipe."""
    samples: tuple[tuple[int, ...], ...]
    """Token ids of the calibration samples."""
    work_folder: str
    """Absolute path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measure speed."""

    batch_sizes: tuple[int, ...]
    """Batch sizes for decoding, measured one by one."""
    prompt_tokens: int
    """Prompt length for prefill."""
    new_tokens: int
    """Decode steps measured per round."""
    rounds: int
    """Rounds per measurement."""
    num_layers: int | None = None
    """Use only the first N layers; None uses all."""
    random_values: str | None = None
    """JSON of a config.json for which random weights are generated; None reads the checkpoint."""
    speculated: tuple[Request, ...] = ()
    """Real prompts to decode with and without speculation afterwards; if empty, speculation is not measured."""
    profile: bool = False
    """Record a profile after all other measurements."""
    command_started: float = 0.0
    """Start time of the command, on rank 0's time.monotonic()."""


Task = Decode | Serve | Evaluate | Quantize | Bench


def write_task(task: Task) -> dict[str, Any]:
    """Serialize for `read_task`."""
    return {"kind": type(task).__name__, **asdict(task)}


def read_task(raw: dict[str, Any]) -> Task:
    """Inverse of `write_task`, from JSON."""
    return _READERS[raw["kind"]](raw)


def read_request(raw: dict[str, Any]) -> Request:
    """Inverse of `asdict`, from JSON."""
    params = SamplingParams.from_json(raw["params"])
    return Request(raw["index"], tuple(raw["prompt_ids"]), params, tuple(raw["known_ids"]), raw["known_reason"])


def _read_decode(raw: dict[str, Any]) -> Decode:
    return Decode(_requests(raw["requests"]))


def _read_serve(raw: dict[str, Any]) -> Serve:
    return Serve(requests=_requests(raw["requests"]), num_blocks=raw["num_blocks"], prefill_tokens=raw["prefill_tokens"])


def _read_evaluate(raw: dict[str, Any]) -> Evaluate:
    yes, no = raw["choices"]
    return Evaluate(name=raw["name"], rows=_rows(raw["rows"]), answers=tuple(raw["answers"]), choices=(yes, no))


def _read_quantize(raw: dict[str, Any]) -> Quantize:
    recipe = dict(raw["recipe"])
    linear = LinearScheme(**recipe.pop("linear")) if recipe["linear"] else recipe.pop("linear")
    words = tuple(recipe.pop("not_converted"))
    return Quantize(
        recipe=Recipe(linear=linear, not_converted=words, **recipe), samples=_rows(raw["samples"]), work_folder=raw["work_folder"]
    )


def _read_bench(raw: dict[str, Any]) -> Bench:
    values = {name: value for name, value in raw.items() if name != "kind"}
    return Bench(**{**values, "batch_sizes": tuple(raw["batch_sizes"]), "speculated": _requests(raw["speculated"])})


def _rows(raw: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in raw)


def _requests(raw: list[dict[str, Any]]) -> tuple[Request, ...]:
    return tuple(map(read_request, raw))


_READERS: dict[str, Callable[[dict[str, Any]], Task]] = {
    "Decode": _read_decode,
    "Serve": _read_serve,
    "Evaluate": _read_evaluate,
    "Quantize": _read_quantize,
    "Bench": _read_bench,
}

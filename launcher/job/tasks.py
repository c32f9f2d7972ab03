"""What the ranks of a run do: decode prompts, serve, evaluate, measure speed, quantize. Plain values that travel as JSON.

Knows ids only: texts have been encoded. How each is run: `launcher/worker/run.py`.
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
    """Go on with prompts."""

    requests: tuple[Request, ...]
    """The prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Go on with prompts as they come."""

    requests: tuple[Request, ...]
    """Those that are there already."""
    num_blocks: int
    """Of keys and values; on every host alike, however much memory each has."""
    prefill_tokens: int
    """Of a pass at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Score the model."""

    name: str
    """One of EVALUATIONS."""
    rows: tuple[tuple[int, ...], ...]
    """Windows of a text, or prompts of questions."""
    answers: tuple[bool, ...] = ()
    """Of the questions."""
    choices: tuple[int, int] = (0, 0)
    """Ids of yes and no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Round the checkpoint's layers into a work folder."""

    recipe: Recipe
    """How."""
    samples: tuple[tuple[int, ...], ...]
    """Ids to calibrate with."""
    work_folder: str
    """Absolute path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measure speed."""

    batch_sizes: tuple[int, ...]
    """Sequences that decode together, one measurement each."""
    prompt_tokens: int
    """Of the prompt of the prefill."""
    new_tokens: int
    """Steps of decoding that are measured in a round."""
    rounds: int
    """Of each measurement."""
    num_layers: int | None = None
    """Only so many layers; None: all."""
    random_values: str | None = None
    """The JSON of a config.json: weights are made up for it; None: the checkpoint's are read."""
    speculated: tuple[Request, ...] = ()
    """Real prompts to decode with speculation and without, after that; empty: this is not measured."""
    profile: bool = False
    """Record what the time goes to, after everything else."""
    command_started: float = 0.0
    """When the command began, on rank 0's time.monotonic()."""


Task = Decode | Serve | Evaluate | Quantize | Bench


def write_task(task: Task) -> dict[str, Any]:
    """For `read_task`."""
    return {"kind": type(task).__name__, **asdict(task)}


def read_task(raw: dict[str, Any]) -> Task:
    """The inverse of `write_task`, from JSON."""
    return _READERS[raw["kind"]](raw)


def read_request(raw: dict[str, Any]) -> Request:
    """The inverse of `asdict`, from JSON."""
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

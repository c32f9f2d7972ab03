"""What the ranks of a run do: decode prompts, serve, evaluate, measure speed, quantize. Plain values.

Knows ids only: texts have been encoded. How each is run: `launcher/worker/tasks.py`; how they travel: `launcher/job/codec.py`.
"""

from msgspec import Struct

from model.engine.request import Request
from model.quantization.recipe import Recipe

EVALUATIONS = ("boolq", "perplexity")


class Decode(Struct, frozen=True, tag=True):
    """Go on with prompts."""

    requests: tuple[Request, ...]
    """The prompts."""


class Serve(Struct, frozen=True, kw_only=True, tag=True):
    """Go on with prompts as they come."""

    requests: tuple[Request, ...]
    """Those that are there already."""
    num_blocks: int
    """Of keys and values; on every host alike, however much memory each has."""
    prefill_tokens: int
    """Of a pass at most."""


class Evaluate(Struct, frozen=True, kw_only=True, tag=True):
    """Score the model."""

    name: str
    """One of EVALUATIONS."""
    rows: tuple[tuple[int, ...], ...]
    """Windows of a text, or prompts of questions."""
    answers: tuple[bool, ...] = ()
    """Of the questions."""
    choices: tuple[int, int] = (0, 0)
    """Ids of yes and no."""


class Quantize(Struct, frozen=True, kw_only=True, tag=True):
    """Round the checkpoint's layers into a work folder."""

    recipe: Recipe
    """How."""
    samples: tuple[tuple[int, ...], ...]
    """Ids to calibrate with."""
    work_folder: str
    """Absolute path."""


class Bench(Struct, frozen=True, kw_only=True, tag=True):
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

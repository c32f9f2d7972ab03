"""The tasks of a run: decode prompts, serve, evaluate, benchmark, quantize, run a program. Plain values; all text is tokenized.

The implementations are in `launcher/worker/tasks.py`; `launcher/job/codec.py` serializes them.
"""

from msgspec import Struct

from model.engine.request import Request
from model.quantization.recipe import Recipe

EVALUATIONS = ("boolq", "perplexity")
PREFILL, DECODE = "prefill", "decode"
"""Names of the top-level spans of a profile: one pass over a prompt, one decode step."""
TANDEM_RUN = "tandem run"
"""The launcher of programs that tandem itself has started."""


class Decode(Struct, frozen=True, tag=True):
    """Decode a fixed set of prompts."""

    requests: tuple[Request, ...]
    """The prompts."""


class Serve(Struct, frozen=True, kw_only=True, tag=True):
    """Decode requests as they arrive."""

    requests: tuple[Request, ...]
    """Requests present at startup."""
    num_blocks: int
    """Number of KV cache blocks; the same on every host, whatever its memory."""
    prefill_tokens: int
    """Maximum prompt tokens per forward pass."""
    memory_bytes_per_second: float | None = None
    """Read bandwidth of memory as measured by an earlier attempt; None to measure it."""
    tokenizer: str | None = None
    """Folder or file of the tokenizer, with which rank 0 parses grammars; None refuses structured output."""


class Evaluate(Struct, frozen=True, kw_only=True, tag=True):
    """Score the model."""

    name: str
    """One of EVALUATIONS."""
    rows: tuple[tuple[int, ...], ...]
    """Windows of a text, or prompts of questions."""
    answers: tuple[bool, ...] = ()
    """Correct answers to the questions."""
    choices: tuple[int, int] = (0, 0)
    """Token ids of yes and no."""


class Quantize(Struct, frozen=True, kw_only=True, tag=True):
    """Quantize the checkpoint's layers into a work folder."""

    recipe: Recipe
    """The quantization recipe."""
    samples: tuple[tuple[int, ...], ...]
    """Token ids of the calibration samples."""
    work_folder: str
    """Absolute path."""


class Bench(Struct, frozen=True, kw_only=True, tag=True):
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


class Program(Struct, frozen=True, kw_only=True, tag=True):
    """Run a user's Python program."""

    script: str
    """Path of a Python file, relative to `folder`; empty: run `module`."""
    module: str
    """Name of a module."""
    arguments: tuple[str, ...]
    """The program's own arguments."""
    folder: str
    """Working directory, absolute."""
    timeout_seconds: float
    """Maximum wait for another rank in a step of a model."""


Task = Decode | Serve | Evaluate | Quantize | Bench | Program

"""Options of the commands that measure: bench, eval and env."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from launcher.settings.option_declarations import DATA, GENERATION, MODEL, OUTPUT, option
from launcher.settings.options import DRAFT_MODEL, DRAFT_TOKENS, DRAFT_TOKENS_ALIASES, RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(RunOptions):
    """Options of `tandem bench`."""

    max_batch_size: int | None = None
    model_config: Annotated[Path | None, option("--model-config", help="Hugging Face config.json, for --random-weights.", panel=MODEL)] = (
        None
    )
    random_weights: Annotated[
        bool, option("--random-weights", help="Use random weights in the shape of --model-config or --config.", panel=MODEL)
    ] = False
    quantization: Annotated[
        str | None,
        option(
            "--quantization",
            help="Quantization of random weights: none, rtn-a16w8, a8w8 or rtn-a16w4. Default: the config's, else rtn-a16w8.",
            panel=MODEL,
        ),
    ] = None
    num_layers: Annotated[int | None, option("--num-layers", help="Use only the first N layers. Default: all.", panel=MODEL)] = None
    batch_sizes: Annotated[
        tuple[str, ...],
        option("--batch-size", help="Batch sizes to measure: 1,8 or repeated options. Default: 1,8.", panel=GENERATION),
    ] = ()
    prompt_tokens: Annotated[
        int | None, option("--prompt-tokens", help="Prompt tokens of the prefill. Default: 512, at most the context.", panel=GENERATION)
    ] = None
    new_tokens: Annotated[
        int | None, option("--new-tokens", help="Decode steps per round. Default: 32, at most the context.", panel=GENERATION)
    ] = None
    rounds: Annotated[int, option("--rounds", help="Rounds per measurement; the median is reported. Default: 3.", panel=GENERATION)] = 3
    speculate: Annotated[
        bool | None,
        option("--speculate", help="Also measure two real prompts with and without speculative decoding. Default: no.", panel=GENERATION),
    ] = False
    draft_model: Annotated[str | Path | None, DRAFT_MODEL] = None
    draft_tokens: Annotated[int | None, DRAFT_TOKENS, DRAFT_TOKENS_ALIASES] = None
    profile: Annotated[
        Path | None,
        option(
            "--profile",
            metavar="FILE",
            help="Profile a prefill and some steps: a table, and this trace for Perfetto. Default: none.",
            panel=OUTPUT,
        ),
    ] = None
    as_json: Annotated[bool, option("--json", help="Print one JSON object instead of text.", panel=OUTPUT)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Options of `tandem eval`."""

    bind_cores: str | None = None
    task: Annotated[
        Literal["boolq", "perplexity"] | None,
        option("--task", help="Required. boolq: accuracy on yes/no questions. perplexity: of a text.", panel=DATA),
    ] = None
    data: Annotated[Path | None, option("--data", "-s", help="Required. BoolQ file (JSON lines), or a text file.", panel=DATA)] = None
    limit: Annotated[int | None, option("--limit", help="Maximum questions or windows. Default: all.", panel=DATA, min=1)] = None
    window_tokens: Annotated[int, option("--window", help="perplexity: tokens per window. Default: 512.", panel=DATA)] = 512
    as_json: Annotated[bool, option("--json", help="Print one JSON object instead of text.", panel=OUTPUT)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvOptions:
    """Options of `tandem env`."""

    as_json: Annotated[bool, option("--json", help="Print one JSON object instead of text.", panel=OUTPUT)] = False

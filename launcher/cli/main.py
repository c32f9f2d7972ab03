"""The commands of `tandem`: options and their help; the work is done elsewhere.

Exit codes: 0 done, 1 the run failed, 2 usage or input (nothing had started), 130 SIGINT, 143 SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.bench import app as bench_app
from launcher.cli.checkpoint import app as checkpoint_app
from launcher.cli.option_types import (
    BatchOption,
    CacheOption,
    CheckpointOption,
    CollectivesOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KeyFileOption,
    LogDirOption,
    OverwriteOption,
    RestartsOption,
    ThreadsOption,
    TimeoutOption,
    WorkersOption,
)
from launcher.cli.predict import app as predict_app
from launcher.cli.serve import app as serve_app
from parallel.errors import InputError, TandemError

app = typer.Typer(
    name="tandem",
    help="Tensor-parallel inference for Llama-2: any number of ranks, int8 checkpoints, the same bits for every number of ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
commands = typer.Typer(rich_markup_mode="rich")


@commands.command(
    epilog="Examples: tandem quantize --checkpoint output/smollm2-135m -a rtn-a16w8  |  "
    "tandem quantize --checkpoint output/smollm2-135m -a smooth_quant -t boolq -s dev.jsonl --workers 2"
)
def quantize(
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    approach: Annotated[
        str,
        typer.Option(
            "--approach",
            "-a",
            "-q",
            help="Required. rtn-a16w8: int8 weights. rtn-c8: int8 key-value cache. smooth_quant: int8 weights and activations, outliers "
            "moved into the weights. ptq: what -w, -k, --act-quant-dtype and --outliers say. a8w8: int8 weights, activations rounded "
            "for each token. gptq, awq, rtn-a16w4: int4 weights in groups.",
        ),
    ] = "",
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-t", "--dataset_type", help="Calibration data: boolq, squad1.1, wikitext2, or ids (.npy).")
    ] = None,
    dataset_path: Annotated[
        Path | None, typer.Option("--dataset-path", "-s", "--dataset_path", help="File of the calibration data.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Samples to calibrate with at most.")] = 200,
    sample_tokens: Annotated[
        int | None, typer.Option("--sample-tokens", min=1, help="Tokens of a sample at most. Default: the context, 2048 at most.")
    ] = None,
    weight_dtype: Annotated[
        str | None, typer.Option("--weight-quant-dtype", "-w", "--weight_quant_dtype", help="ptq: int8 or none.")
    ] = None,
    kvcache_dtype: Annotated[
        str | None,
        typer.Option("--kvcache-quant-dtype", "-k", "--kvcache_quant_dtype", help="int8 or none: the key-value cache, beside the weights."),
    ] = None,
    act_quant_dtype: Annotated[
        str | None, typer.Option("--act-quant-dtype", "--act_quant_dtype", help="ptq: activations as int8 or none.")
    ] = None,
    outliers: Annotated[str | None, typer.Option("--outliers", "--outliers_suppression", help="ptq: smooth or none.")] = None,
    not_converted: Annotated[
        list[str] | None,
        typer.Option(
            "--not-converted",
            "-b",
            "--opname_blacklist",
            help="Linears whose name contains this word stay float (Hugging Face's or MindFormers' name); several words may follow.",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="smooth_quant, ptq: how far outliers move, 0 to 1. Default: the YAML's algorithm_args, else 0.5.")
    ] = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="smooth_quant, ptq: divide the norms instead of storing scales beside each linear; transformers and vLLM need that.",
        ),
    ] = False,
    group_size: Annotated[int | None, typer.Option("--group-size", help="int4: columns that share a scale. Default: 128.")] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="int4: without or with zero points, which transformers 5.24 cannot load. Default: without.",
            show_default=False,
        ),
    ] = None,
    kv_granularity: Annotated[
        str | None,
        typer.Option("--kvcache-granularity", help="per_channel: stored scales. per_token: made on the way. Default: per_channel."),
    ] = None,
    workers: WorkersOption = None,
    dtype: Annotated[str | None, typer.Option(help="Type that calibration computes in. Default: float32.")] = None,
    device: DeviceOption = None,
    threads_per_rank: ThreadsOption = None,
    collectives: CollectivesOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--output_dir", help="Folder to write. Default: output/<approach>_ckpt.")
    ] = None,
    overwrite: OverwriteOption = False,
    log_dir: LogDirOption = None,
    max_restarts: RestartsOption = None,
    timeout: TimeoutOption = None,
) -> None:
    """Quantize a float checkpoint, layer by layer, on any number of ranks.

    Written as compressed-tensors: transformers and vLLM load it (with smooth scales only after --fold). The same command
    goes on where a killed one stopped. A report goes to standard output and beside the weights.
    """
    from launcher.commands.quantize import quantize as run
    from launcher.settings.approaches import QuantizeOptions

    run(
        QuantizeOptions(
            config=config,
            checkpoint=checkpoint,
            format=format,
            key_file=key_file,
            approach=approach,
            dataset=dataset,
            dataset_path=dataset_path,
            num_samples=num_samples,
            sample_tokens=sample_tokens,
            weight_dtype=weight_dtype,
            kvcache_dtype=kvcache_dtype,
            act_quant_dtype=act_quant_dtype,
            outliers=outliers,
            not_converted=tuple(not_converted or ()),
            alpha=alpha,
            fold=fold,
            group_size=group_size,
            symmetric=symmetric,
            kv_granularity=kv_granularity,
            workers=workers,
            dtype=dtype,
            device=device,
            threads_per_rank=threads_per_rank,
            collectives=collectives,
            output=output,
            overwrite=overwrite,
            log_dir=log_dir,
            max_restarts=max_restarts,
            timeout_seconds=timeout,
        )
    )


@commands.command(
    "eval", epilog="Example: tandem eval --task perplexity --data wiki.test.raw --checkpoint output/smollm2-135m --workers 2 --limit 4"
)
def evaluate(
    task: Annotated[str, typer.Option(help="Required. boolq: yes or no, by the next token. perplexity: of a text.")] = "",
    data: Annotated[Path | None, typer.Option("--data", "-s", help="Required. BoolQ file (JSON lines), or a text file.")] = None,
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions or windows at most. Default: all.")] = None,
    window: Annotated[int, typer.Option("--window", help="perplexity: tokens of each piece of the text.")] = 512,
    workers: WorkersOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads_per_rank: ThreadsOption = None,
    collectives: CollectivesOption = None,
    kv_cache_dtype: CacheOption = None,
    max_batch_size: BatchOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    log_dir: LogDirOption = None,
    max_restarts: RestartsOption = None,
    timeout: TimeoutOption = None,
) -> None:
    """Tell how good a checkpoint is, on any number of ranks: the score does not depend on it."""
    from launcher.commands.evaluate import EvaluateOptions
    from launcher.commands.evaluate import evaluate as run

    run(
        EvaluateOptions(
            task=task,
            data=data,
            config=config,
            checkpoint=checkpoint,
            format=format,
            key_file=key_file,
            limit=limit,
            window_tokens=window,
            workers=workers,
            dtype=dtype,
            device=device,
            threads_per_rank=threads_per_rank,
            collectives=collectives,
            kv_cache_dtype=kv_cache_dtype,
            max_batch_size=max_batch_size,
            as_json=as_json,
            log_dir=log_dir,
            max_restarts=max_restarts,
            timeout_seconds=timeout,
        )
    )


@commands.command(epilog="Example: tandem env --json")
def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False) -> None:
    """Tell which launch environment was detected, and from which variables."""
    from dataclasses import asdict

    from launcher.environment.detection import read_environment
    from model.spec.quoting import quote_name

    found: dict[str, Any] = asdict(read_environment())
    if as_json:
        print(json.dumps(found))
        return
    variables, sources = found.pop("variables"), found.pop("sources")
    width = max(map(len, found)) + 1
    for name, value in found.items():
        given = [(source, variables[source]) for source in sources[name].split(", ")] if name in sources else []
        origin = ", ".join(f"{source}={quote_name(text)}" for source, text in given)
        print(f"{name + ':':<{width}} {'-' if value is None else quote_name(str(value))}{f' (from {origin})' if origin else ''}")


for group in (predict_app, serve_app, commands, bench_app, checkpoint_app):
    app.add_typer(group)


def main() -> None:
    """Run a command and end with its exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what is half written is cleaned away on the way out
    try:
        app(_spread_words(sys.argv[1:]), standalone_mode=False)
    except InputError as error:
        print(f"tandem: {error}", file=sys.stderr)
        sys.exit(2)
    except TandemError as error:
        print(f"tandem: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # A run that failed can have left work behind that the interpreter would wait for on its way out.
        os._exit(128 + number if (number := getattr(error, "signal_number", 0)) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "show"):  # a usage error of typer's own
            error.show()
            sys.exit(2)
        raise


def _spread_words(arguments: list[str]) -> list[str]:
    """`-b lm_head w2`, as Golden Stick's script takes it, as `-b lm_head -b w2`."""
    spread, flag = [], ""
    for position, word in enumerate(arguments):
        if word.startswith("-"):
            flag = word if word in ("-b", "--opname_blacklist", "--not-converted") else ""
        elif flag and arguments[position - 1] != flag:
            spread.append(flag)
        spread.append(word)
    return spread

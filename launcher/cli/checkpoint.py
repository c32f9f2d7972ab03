"""The commands that look at a checkpoint or write it in another form, without running it: options and their help."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.option_types import (
    CacheOption,
    CheckOption,
    CheckpointOption,
    ConfigOption,
    DtypeOption,
    FormatOption,
    KeyFileOption,
    OverwriteOption,
    ThreadsOption,
    WorkersOption,
)

app = typer.Typer()


@app.command(
    epilog="Examples: tandem convert model.Q4_1.gguf output/model --dtype float16  |  tandem convert output/model model.ckpt --to mindspore"
)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any readable format.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; for --to mindspore a name that ends in .ckpt is a file.")],
    to: Annotated[
        str, typer.Option("--to", help="hf: a Hugging Face folder. mindspore: a .ckpt in MindFormers' and Golden Stick's names.")
    ] = "hf",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for all float weights. Default: as they are.")] = None,
    config: ConfigOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    verify: CheckOption = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Rewrite any readable checkpoint as a Hugging Face folder or a MindSpore .ckpt. Reading a .ckpt needs its YAML (-c)."""
    from launcher.commands.convert import convert as run
    from launcher.settings.options import CheckpointOptions

    options = CheckpointOptions(config=config, checkpoint=source, format=format, key_file=key_file, verify=verify)
    run(options, target, to, dtype, overwrite=overwrite)


@app.command(epilog="Example: tandem reshard output/model-rtn output/model-rtn-8 --workers 8")
def reshard(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any readable format, rank files included.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    workers: Annotated[int, typer.Option("--workers", "-n", help="Ranks to write for; 1 gives one file again.")],
    config: ConfigOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    verify: CheckOption = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Rewrite a checkpoint, quantized or not, as one file a rank. Any number of ranks can read it back."""
    from launcher.commands.convert import reshard as run
    from launcher.settings.options import CheckpointOptions

    options = CheckpointOptions(config=config, checkpoint=source, format=format, key_file=key_file, verify=verify)
    run(options, target, workers, overwrite=overwrite)


@app.command(epilog="Examples: tandem verify output/model-rtn-8  |  tandem verify output/model --deep --json")
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint of any readable format.")],
    deep: Annotated[bool, typer.Option("--deep", help="Look for NaN and infinite values, too.")] = False,
    config: ConfigOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Check a checkpoint without building the model: checksums, shapes, types, missing, unexpected and short tensors.

    Files are hashed (sha256) and held against layout.json, SHA256SUMS, Meta's checklist.chk or a .ckpt's own CRC, where there
    is one. Exit code 2 when anything is wrong. Checksums of tensors (--json) are the same in every format that holds the same tensors.
    """
    from launcher.commands.verify import verify as run
    from launcher.settings.options import CheckpointOptions

    run(CheckpointOptions(config=config, checkpoint=checkpoint, format=format, key_file=key_file), deep=deep, as_json=as_json)


@app.command(
    epilog="Examples: tandem plan --model-config config.json --workers 8 --quantization rtn-a16w8 --bandwidth 800  |  "
    "tandem plan -c predict_llama2_70b.yaml --workers 6 --svg plan.svg"
)
def plan(
    config: ConfigOption = None,
    model_config: Annotated[Path | None, typer.Option("--model-config", help="A Hugging Face config.json.")] = None,
    checkpoint: CheckpointOption = None,
    workers: WorkersOption = None,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="As `tandem quantize -a` stores it, or none. Default: the YAML's or the checkpoint's."),
    ] = None,
    dtype: DtypeOption = None,
    kv_cache_dtype: CacheOption = None,
    threads_per_rank: ThreadsOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences that run together.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", "--max-length", help="Tokens of each sequence. Default: the model's context."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", help="GB/s that each rank's memory gives: a card's, or a host's divided by its ranks. Adds tokens/s."),
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw which rank owns what into this file.")] = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Tell what a run would need, from config and headers alone: who owns what, bytes, memory, speed, valid numbers of ranks."""
    from launcher.commands.plan import PlanOptions
    from launcher.commands.plan import plan as run

    run(
        PlanOptions(
            config=config,
            model_config=model_config,
            checkpoint=checkpoint,
            workers=workers,
            quantization=quantization,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads_per_rank=threads_per_rank,
            batch_size=batch_size,
            tokens=tokens,
            bandwidth=bandwidth,
            svg=svg,
            format=format,
            key_file=key_file,
            as_json=as_json,
        )
    )

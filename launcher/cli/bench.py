"""`tandem bench`: its options and their help; the work is done in `launcher/commands/bench.py`."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.option_types import (
    BindOption,
    CacheOption,
    CheckpointOption,
    CollectivesOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KeyFileOption,
    LogDirOption,
    RestartsOption,
    ThreadsOption,
    TimeoutOption,
    WorkersOption,
)

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    epilog="Examples: tandem bench --checkpoint output/demo/smollm2-135m-rtn --workers 2  |  "
    "tandem bench --model-config config.json --random-weights --num-layers 2 --workers 8 --json"
)
def bench(
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    model_config: Annotated[Path | None, typer.Option("--model-config", help="A Hugging Face config.json, for --random-weights.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make weights up in the shape of --model-config or --config, without any file.")
    ] = False,
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            help="Of random weights: none, rtn-a16w8, a8w8 or rtn-a16w4. Default: what the config declares, else rtn-a16w8.",
        ),
    ] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers", help="Only the first layers, so many. Default: all.")] = None,
    workers: WorkersOption = None,
    batch_size: Annotated[
        list[str] | None,
        typer.Option(
            "--batch-size", help="Sequences that decode together, one measurement each: 1,8 or given several times. Default: 1,8."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Tokens of the prompt of the prefill. Default: 512, less in a shorter context.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", help="Steps of decoding in a round. Default: 32, less in a shorter context.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of each measurement; the median counts.")] = 3,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads_per_rank: ThreadsOption = None,
    collectives: CollectivesOption = None,
    kv_cache_dtype: CacheOption = None,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Then decode two real prompts, one of them work that copies, with predict's --speculate and without. Default: no.",
        ),
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="Record a prefill and some steps after the measurements: a table by operation and layer, and this trace of all ranks "
            "for Perfetto. Default: none.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    log_dir: LogDirOption = None,
    max_restarts: RestartsOption = None,
    timeout: TimeoutOption = None,
    bind_cores: BindOption = None,
) -> None:
    """Measure how fast a model runs on this machine, beside what its memory gives in the same run.

    Prompts are random ids, those of --speculate are not. Decoding reads every weight once a step: tokens/s cannot exceed memory's
    bytes/s over these bytes.
    """
    from launcher.commands.bench import BenchOptions
    from launcher.commands.bench import bench as run

    run(
        BenchOptions(
            config=config,
            checkpoint=checkpoint,
            format=format,
            key_file=key_file,
            model_config=model_config,
            random_weights=random_weights,
            quantization=quantization,
            num_layers=num_layers,
            workers=workers,
            batch_sizes=tuple(batch_size or ()),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            dtype=dtype,
            device=device,
            threads_per_rank=threads_per_rank,
            collectives=collectives,
            kv_cache_dtype=kv_cache_dtype,
            speculate=speculate,
            profile=profile,
            as_json=as_json,
            log_dir=log_dir,
            max_restarts=max_restarts,
            timeout_seconds=timeout,
            bind_cores=bind_cores,
        )
    )

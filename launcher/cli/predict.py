"""`tandem predict`: its options and their help; the work is done in `launcher/commands/predict.py`."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.option_types import (
    BatchOption,
    BindOption,
    BlockSizeOption,
    CacheOption,
    CheckpointOption,
    CollectivesOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    KeyFileOption,
    LocalWorkersOption,
    LogDirOption,
    MasterAddrOption,
    MasterPortOption,
    NodeRankOption,
    NodesOption,
    NumBlocksOption,
    PrefixCacheOption,
    RestartsOption,
    SpeculateOption,
    ThreadsOption,
    TimeoutOption,
    WorkersOption,
)

app = typer.Typer(rich_markup_mode="rich")


@app.command(epilog="Example: tandem predict --checkpoint output/demo/smollm2-135m-rtn --workers 2 --prompt 'Once upon a time'")
def predict(
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hold the files against their recorded checksums before starting.")] = False,
    workers: WorkersOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times. Default: MindFormers' three.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts-file", help='Prompts, one a line; .jsonl: objects with "prompt".')] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="New tokens of each prompt at most. Goes over --max-length.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Prompt and new tokens together at most. Default: the YAML's max_decode_length, else 1024."),
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--greedy",
            help="Draw at random, or take the likeliest token. Default: the YAML's, else greedy.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Logits are divided by this when sampling. Default: 1.")] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample among the k likeliest, 0: all. Default: the YAML's, else 50.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample among the fewest that reach this probability. Default: the YAML's, else 1.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: seen ids are less likely. Default: the YAML's, else 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Start of each prompt's random numbers. Default: the YAML's, else 0.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Add the log-probability of each new token to --output.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads_per_rank: ThreadsOption = None,
    collectives: CollectivesOption = None,
    kv_cache_dtype: CacheOption = None,
    max_batch_size: BatchOption = None,
    block_size: BlockSizeOption = None,
    num_blocks: NumBlocksOption = None,
    prefix_cache: PrefixCacheOption = None,
    speculate: SpeculateOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Write one JSON object a prompt to this file, as prompts are finished. Default: none.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Skip the prompts that are in --output already, and add the others; give the same options. Default: start it anew.",
        ),
    ] = False,
    stats: Annotated[Path | None, typer.Option(help="Write speeds, bytes and memory of the run to this JSON file.")] = None,
    log_dir: LogDirOption = None,
    max_restarts: RestartsOption = None,
    timeout: TimeoutOption = None,
    bind_cores: BindOption = None,
    num_nodes: NodesOption = None,
    node_rank: NodeRankOption = None,
    local_workers: LocalWorkersOption = None,
    master_addr: MasterAddrOption = None,
    master_port: MasterPortOption = None,
) -> None:
    """Decode prompts with N ranks: the main job.

    Results go to standard output, one line a prompt; logs of the ranks to worker_N.log in the log folder.
    A process that torchrun, srun, mpirun or msrun started joins as one rank instead of starting any. SIGTERM and SIGINT end the run
    after the current token; prompts that are finished by then are in --output.
    """
    from launcher.commands.predict import PredictOptions
    from launcher.commands.predict import predict as run

    run(
        PredictOptions(
            config=config,
            checkpoint=checkpoint,
            format=format,
            key_file=key_file,
            verify=verify,
            workers=workers,
            prompts=tuple(prompt or ()),
            prompts_file=prompts_file,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            dtype=dtype,
            device=device,
            threads_per_rank=threads_per_rank,
            collectives=collectives,
            kv_cache_dtype=kv_cache_dtype,
            max_batch_size=max_batch_size,
            block_size=block_size,
            num_blocks=num_blocks,
            prefix_cache=prefix_cache,
            speculate=speculate,
            output=output,
            resume=resume,
            stats=stats,
            log_dir=log_dir,
            max_restarts=max_restarts,
            timeout_seconds=timeout,
            bind_cores=bind_cores,
            num_nodes=num_nodes,
            node_rank=node_rank,
            local_workers=local_workers,
            master_addr=master_addr,
            master_port=master_port,
        )
    )

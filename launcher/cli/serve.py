"""`tandem serve`: its options and their help; the work is done in `launcher/commands/serve.py`."""

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
    SpeculateOption,
    ThreadsOption,
    TimeoutOption,
    WorkersOption,
)

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    epilog="Examples: tandem serve --checkpoint output/demo/smollm2-135m-rtn --workers 2  |  "
    "tandem serve --config CONFIG --checkpoint CKPT --workers 8 --host 0.0.0.0 --api-key-file keys.txt"
)
def serve(
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    format: FormatOption = None,
    key_file: KeyFileOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hold the files against their recorded checksums before starting.")] = False,
    workers: WorkersOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at. Others than loopback need --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen at, 0: any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File of API keys, one a line; callers send one as a bearer token. Default: none.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen at any address without a key: everybody can use the model.")] = False,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="What callers call the model. Default: the checkpoint's name.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Sequences that wait at most, beside those that run; more are refused with 429.")
    ] = 256,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", help="Seconds after which an answer is broken off; a request may say less.")
    ] = 600.0,
    drain: Annotated[float, typer.Option("--drain", help="Seconds that running answers may take after SIGTERM or SIGINT.")] = 30.0,
    prefill_tokens: Annotated[
        int,
        typer.Option(
            "--prefill-tokens",
            "--max-num-batched-tokens",
            help="Tokens of a pass at most, 16 to 512: with fewer, long prompts disturb other answers less and take longer themselves.",
        ),
    ] = 256,
    max_body_mb: Annotated[float, typer.Option("--max-body-mb", help="Megabytes of a request at most.")] = 4.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", help="Origin of web pages whose scripts may call the server; may be given several times. Default: none."
        ),
    ] = None,
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
    log_dir: LogDirOption = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max-restarts", help="Starts anew after failed ranks at most; three in a row that do not come to serve end it. Default: 1000."
        ),
    ] = None,
    timeout: TimeoutOption = None,
    bind_cores: BindOption = None,
    num_nodes: NodesOption = None,
    node_rank: NodeRankOption = None,
    local_workers: LocalWorkersOption = None,
    master_addr: MasterAddrOption = None,
    master_port: MasterPortOption = None,
) -> None:
    """Answer OpenAI's HTTP API with N ranks, until SIGTERM or SIGINT.

    POST /v1/completions and /v1/chat/completions, GET /v1/models, /health, /metrics (Prometheus), and a page at /. Answers are those of
    tandem predict for the same prompt, seed and options, whatever runs beside them. A rank that dies is started again, and running
    answers go on.
    """
    from launcher.commands.serve import ServeOptions
    from launcher.commands.serve import serve as run

    run(
        ServeOptions(
            config=config,
            checkpoint=checkpoint,
            format=format,
            key_file=key_file,
            verify=verify,
            workers=workers,
            host=host,
            port=port,
            api_key_file=api_key_file,
            insecure=insecure,
            served_model_name=served_model_name,
            max_waiting=max_queue,
            request_seconds=request_timeout,
            drain_seconds=drain,
            prefill_tokens=prefill_tokens,
            max_body_megabytes=max_body_mb,
            allowed_origins=tuple(allow_origin or ()),
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

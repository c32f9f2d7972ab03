"""Options that several commands take, with their help. Knows typer; what they mean is decided elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", "--config_path", help="MindFormers YAML file.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "--load_checkpoint",
        help="Checkpoint: Hugging Face folder (compressed-tensors, GPTQ and AWQ too), GGUF, .ckpt or rank files. "
        "Default: the YAML's load_checkpoint.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Format of the checkpoint: ranks, gptq, awq, compressed-tensors, hf, meta, gguf or mindspore. Default: told from its content.",
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--key-file", help="Key of an encrypted .ckpt: 16, 24 or 32 bytes, or as many in hexadecimal digits."),
]
CheckOption = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Hold SRC's files against their recorded checksums first; what has none is taken as it is."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace DST when it exists.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-n",
        "--worker_num",
        "--tensor-parallel-size",
        help="Ranks. Default: MS_WORKER_NUM, then the YAML's model_parallel, then 1.",
    ),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: the YAML's compute_dtype, else the checkpoint's.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or npu. Default: auto.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads-per-rank", help="CPU threads of each rank. Default: the cores, shared evenly.")
]
CollectivesOption = Annotated[
    str | None, typer.Option(help="auto, shm, gloo or nccl. Default: auto, which is shm for CPU ranks on one x86-64 host.")
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        help="auto, int8 or float. int8 takes the checkpoint's scales, else one for each token. Default: auto, as checkpoint and YAML say.",
    ),
]
BatchOption = Annotated[
    int | None, typer.Option("--max-batch-size", "--max-num-seqs", help="Sequences that run together at most. Default: 16.")
]
BlockSizeOption = Annotated[
    int | None,
    typer.Option(
        "--block-size", help="Tokens of a block of the key-value cache, a multiple of 16. Default: the YAML's block_size, else 16."
    ),
]
NumBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--num-blocks",
        "--num-gpu-blocks-override",
        help="Blocks of the key-value cache at most; with few, prompts wait. Default: the YAML's num_blocks, else what the "
        "prompts need; serve: what half of the free memory holds.",
    ),
]
PrefixCacheOption = Annotated[
    bool | None,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Compute and keep equal beginnings of prompts once, or each by itself. Default: once.",
        show_default=False,
    ),
]
SpeculateOption = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess tokens of greedy prompts from what they hold, and verify several at once; the text stays the same. Default: no.",
        show_default=False,
    ),
]
LogDirOption = Annotated[Path | None, typer.Option("--log-dir", "--log_dir", help="Folder of worker_N.log. Default: output/log.")]
RestartsOption = Annotated[int | None, typer.Option("--max-restarts", help="Starts anew after a failed rank at most. Default: 1.")]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", "--cluster_time_out", help="Seconds that ranks wait for one that makes no progress. Default: 300."),
]
BindOption = Annotated[
    str | None,
    typer.Option("--bind-cores", "--bind_core", metavar="True|False", help="Keep each rank to cores of its own. Default: False."),
]
NodesOption = Annotated[
    int | None,
    typer.Option("--nnodes", help="Nodes in all; start the same command on each. Default: 1, or ranks / local workers."),
]
NodeRankOption = Annotated[int | None, typer.Option("--node-rank", "--node_rank", help="Several nodes: number of this one, from 0.")]
LocalWorkersOption = Annotated[
    int | None,
    typer.Option("--local-workers", "--local_worker_num", help="Several nodes: ranks of this one. Default: --workers, shared evenly."),
]
MasterAddrOption = Annotated[
    str | None, typer.Option("--master-addr", "--master_addr", help="Several nodes: address of node 0, on which it listens.")
]
MasterPortOption = Annotated[
    int | None, typer.Option("--master-port", "--master_port", help="Port on node 0. Default: 8118 for several nodes, else any free one.")
]

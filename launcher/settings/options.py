"""Options shared by several commands, each declared once. None means not given on the command line.

Only declarations; their meaning is determined elsewhere.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from launcher.settings.msrun_options import MsrunOptions
from launcher.settings.option_declarations import CLUSTER, GENERATION, MEMORY, MODEL, OUTPUT, PARALLELISM, also, argument, option
from model.engine.speculation import MAX_DRAFT_TOKENS

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "npu"]
CollectivesName = Literal["auto", "shm", "gloo", "nccl"]
CacheDtype = Literal["auto", "int8", "float"]
Precision = Literal["auto", "int8"]
FormatName = Literal[
    "ranks", "modelslim", "gptq", "awq", "auto-round", "fp8", "compressed-tensors", "hf", "bin", "meta", "gguf", "mindspore"
]
MAX_SECONDS = 365 * 24 * 3600
"""Maximum time limit; an infinite one cannot be waited for."""
FusedOrder = Literal["auto", "1.3", "1.4"]
CpuKernels = Literal["auto", "avx512_amx", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "none"]
LogLevel = Literal["error", "warning", "info", "debug"]
DRAFT_MODEL = option(
    "--draft-model",
    metavar="MODEL",
    help="Smaller model that drafts tokens; same output. Default: none.",
    panel=GENERATION,
)
DRAFT_TOKENS = option("--draft-tokens", help="Maximum draft tokens per pass. Default: 4.", panel=GENERATION, min=1, max=MAX_DRAFT_TOKENS)
DRAFT_TOKENS_ALIASES = also("--num-speculative-tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Which checkpoint a command reads, and how."""

    model: Annotated[
        str | None,
        argument(
            metavar="MODEL",
            help="Checkpoint folder or file, or a Hugging Face id: org/name or org/name@revision. Default: the YAML's load_checkpoint.",
        ),
    ] = None
    checkpoint: Annotated[
        str | Path | None,
        option("--checkpoint", "--model", metavar="MODEL", help="The same as the positional MODEL.", panel=MODEL),
        also("--load_checkpoint"),
    ] = None
    config: Annotated[
        Path | None,
        option("--config", "-c", help="MindFormers YAML. Default: the one in MODEL's folder, if any.", panel=MODEL),
        also("--config_path"),
    ] = None
    format: Annotated[
        FormatName | None,
        option(
            "--from",
            help="ranks, modelslim, gptq, awq, auto-round, fp8, compressed-tensors, hf, bin, meta, gguf or mindspore. Default: detected.",
            panel=MODEL,
        ),
    ] = None
    key_file: Annotated[
        Path | None, option("--key-file", help="Key of an encrypted .ckpt: 16, 24 or 32 bytes, raw or hex.", panel=MODEL)
    ] = None
    fused_order: Annotated[
        FusedOrder | None,
        option(
            "--fused-order",
            help="Row order of MindFormers' fused weights: 1.3, or 1.4 for 1.4 and later. Default: auto (detected).",
            panel=MODEL,
        ),
        also("--fused_order"),
    ] = None
    verify: Annotated[bool, option("--verify", help="Verify checksums before starting.", panel=MODEL)] = False
    offline: Annotated[bool, option("--offline", help="Never download: use local files and the cache only.", panel=MODEL)] = False
    follow_links: Annotated[
        bool, option("--follow-links", help="Allow weight files that link out of the checkpoint's folder.", panel=MODEL)
    ] = False
    model_id: str | None = None
    """The Hugging Face id given as MODEL, after it has been resolved to a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionOptions(CheckpointOptions):
    """Arithmetic that a run may use in place of the checkpoint's."""

    activations: Annotated[
        Precision | None,
        option(
            "--activations",
            help="Type of integer linears' inputs. Default: auto (as stored).",
            panel=MODEL,
        ),
    ] = None
    lm_head: Annotated[
        Precision | None,
        option(
            "--lm-head",
            help="Type of the output head. Default: auto (as stored).",
            panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(MsrunOptions, PrecisionOptions):
    """Options of every command that starts ranks."""

    vocab_file: Annotated[Path | None, option("--vocab_file", help="The YAML's vocab_file.", panel=MODEL, hidden=True)] = None
    seq_length: Annotated[int | None, option("--seq_length", help="The YAML's seq_length, in tokens.", panel=MODEL, min=1, hidden=True)] = (
        None
    )
    dtype: Annotated[Dtype | None, option("--dtype", help="Compute type. Default: the YAML's, else the checkpoint's.", panel=MODEL)] = None
    workers: Annotated[
        int | None,
        option(
            "--workers", "-n", help="Number of ranks. Default: MS_WORKER_NUM, then the YAML's model_parallel, then 1.", panel=PARALLELISM
        ),
        also("--worker_num", "--tensor-parallel-size"),
    ] = None
    device: Annotated[
        Device | None,
        option("--device", help="Device type. Default: auto (docs/devices.md).", panel=PARALLELISM),
    ] = None
    ranks_per_device: Annotated[
        int | None,
        option("--ranks-per-device", help="Maximum ranks that share a cuda or npu device. Default: 1.", panel=PARALLELISM, min=1),
    ] = None
    memory_fraction: Annotated[
        float | None,
        option(
            "--memory-fraction",
            help="Share of a device's free memory to use, up to 1. Default: 0.9.",
            panel=MEMORY,
            above=0,
            max=1,
        ),
        also("--gpu-memory-utilization"),
    ] = None
    threads_per_rank: Annotated[
        int | None,
        option("--threads-per-rank", help="CPU threads per rank. Default: an even share of the free cores.", panel=PARALLELISM, min=1),
    ] = None
    collectives: Annotated[
        CollectivesName | None,
        option("--collectives", help="Transport between ranks. Default: auto (shm on one CPU host).", panel=PARALLELISM),
    ] = None
    bind_cores: Annotated[
        str | None,
        option(
            "--bind-cores",
            metavar="True|False",
            help="Bind ranks to separate cores. Default: if enough are free.",
            panel=PARALLELISM,
        ),
        also("--bind_core"),
    ] = None
    cpu_kernels: Annotated[
        CpuKernels | None,
        option(
            "--cpu-kernels",
            help="Instruction set of the CPU kernels, or none for PyTorch's. Default: TANDEM_CPU, else auto (the fastest).",
            panel=PARALLELISM,
        ),
    ] = None
    kv_cache_dtype: Annotated[
        CacheDtype | None,
        option("--kv-cache-dtype", help="KV cache type. Default: auto (checkpoint, then YAML).", panel=MEMORY),
    ] = None
    max_batch_size: Annotated[
        int | None,
        option("--max-batch-size", help="Maximum sequences per batch. Default: 16.", panel=MEMORY, min=1),
        also("--max-num-seqs"),
    ] = None
    block_size: int | None = None
    num_blocks: int | None = None
    prefix_cache: bool | None = None
    speculate: bool | None = None
    draft_model: str | Path | None = None
    draft_tokens: int | None = None
    log_dir: Annotated[
        Path | None,
        option("--log-dir", help="Folder of the ranks' logs, worker_N.log. Default: output/log.", panel=OUTPUT),
        also("--log_dir"),
    ] = None
    max_restarts: Annotated[
        int | None, option("--max-restarts", help="Maximum restarts after a rank failure. Default: 1.", panel=PARALLELISM, min=0)
    ] = None
    timeout_seconds: Annotated[
        float | None,
        option(
            "--timeout", help="Seconds without progress before the run fails. Default: 300.", panel=PARALLELISM, above=0, max=MAX_SECONDS
        ),
        also("--cluster_time_out"),
    ] = None
    preload: Annotated[
        bool,
        option(
            "--preload/--no-preload",
            help="Fork the ranks from one process that has imported PyTorch, or start each afresh. Default: yes.",
            panel=PARALLELISM,
        ),
    ] = True
    num_nodes: int | None = None
    node_rank: int | None = None
    local_workers: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(RunOptions):
    """Options of every command that generates text."""

    lora: Annotated[
        tuple[str, ...],
        option("--lora", metavar="NAME=PATH", help="LoRA adapter, a folder of PEFT; repeatable. Default: none.", panel=MODEL),
        also("--lora-modules"),
    ] = ()
    block_size: Annotated[
        int | None, option("--block-size", help="Tokens per cache block, a multiple of 16. Default: 16.", panel=MEMORY)
    ] = None
    num_blocks: Annotated[
        int | None,
        option("--num-blocks", help="Maximum cache blocks. Default: as many as needed and fit.", panel=MEMORY),
        also("--num-gpu-blocks-override"),
    ] = None
    prefix_cache: Annotated[
        bool | None,
        option("--prefix-cache/--no-prefix-cache", help="Share the KV cache of equal prompt prefixes. Default: yes.", panel=MEMORY),
        also("--enable-prefix-caching/--no-enable-prefix-caching"),
    ] = None
    speculate: Annotated[
        bool | None,
        option(
            "--speculate/--no-speculate",
            help="Draft tokens by n-grams; same output. Default: no.",
            panel=GENERATION,
        ),
    ] = None
    draft_model: Annotated[str | Path | None, DRAFT_MODEL] = None
    draft_tokens: Annotated[int | None, DRAFT_TOKENS, DRAFT_TOKENS_ALIASES] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions(EngineOptions):
    """Options of commands that may run on several nodes."""

    num_nodes: Annotated[
        int | None, option("--nnodes", help="Number of nodes; run the same command on each. Default: 1.", panel=CLUSTER)
    ] = None
    node_rank: Annotated[int | None, option("--node-rank", help="Number of this node, from 0.", panel=CLUSTER), also("--node_rank")] = None
    local_workers: Annotated[
        int | None,
        option("--local-workers", help="Ranks on this node. Default: --workers, shared evenly.", panel=CLUSTER),
        also("--local_worker_num"),
    ] = None
    master_addr: Annotated[
        str | None, option("--master-addr", help="Address of node 0, on which it listens.", panel=CLUSTER), also("--master_addr")
    ] = None
    master_port: Annotated[
        int | None,
        option("--master-port", help="Port on node 0. Default: 8118 for several nodes, else any free one.", panel=CLUSTER),
        also("--master_port"),
    ] = None


@dataclass(frozen=True, kw_only=True)  # no slots, which only one base of a class may have
class SamplingOptions:
    """Sampling options. The defaults in the help apply if the YAML sets none."""

    max_new_tokens: Annotated[
        int | None,
        option("--max-new-tokens", help="Maximum new tokens per prompt; overrides --max-length.", panel=GENERATION),
    ] = None
    do_sample: Annotated[
        bool | None,
        option("--do-sample/--greedy", help="Sample, or take the most likely token. Default: greedy.", panel=GENERATION),
    ] = None
    temperature: Annotated[float | None, option("--temperature", help="Sampling temperature. Default: 1.", panel=GENERATION)] = None
    top_k: Annotated[int | None, option("--top-k", help="Sample from the k most likely tokens; 0: all. Default: 50.", panel=GENERATION)] = (
        None
    )
    top_p: Annotated[
        float | None,
        option("--top-p", help="Sample from the likeliest tokens of this probability. Default: 1.", panel=GENERATION),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option("--repetition-penalty", help="Values above 1 make repeated tokens less likely. Default: 1.", panel=GENERATION),
    ] = None
    seed: Annotated[int | None, option("--seed", help="Random seed of each prompt. Default: 0.", panel=GENERATION)] = None

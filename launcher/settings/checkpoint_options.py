"""Options of the commands that inspect or rewrite a checkpoint: convert, reshard, verify, plan and quantize."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from launcher.settings.option_declarations import DATA, MODEL, OUTPUT, PARALLELISM, QUANTIZATION, also, argument, option
from launcher.settings.options import CacheDtype, CheckpointOptions, Dtype, Precision, PrecisionOptions, RunOptions

DEFAULT_SAMPLES = 200
"""Golden Stick's default."""
Int8OrNone = Literal["int8", "none", "None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteOptions(CheckpointOptions):
    """Options shared by convert and reshard."""

    model: str | None = None
    checkpoint: Annotated[str | Path, argument(metavar="SRC", help="Checkpoint of any readable format, or a Hugging Face id.")]
    target: Annotated[Path, argument(metavar="DST", help="Folder to write; convert --to mindspore also writes a .ckpt file.")]
    verify: Annotated[bool, option("--verify/--no-verify", help="Verify SRC's recorded checksums first. Default: yes.", panel=MODEL)] = True
    overwrite: Annotated[bool, option("--overwrite", help="Replace DST if it exists.", panel=OUTPUT)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(RewriteOptions):
    """Options of `tandem convert`."""

    to: Annotated[
        Literal["hf", "mindspore"],
        option("--to", help="Target format: Hugging Face folder, or MindSpore .ckpt. Default: hf.", panel=OUTPUT),
    ] = "hf"
    dtype: Annotated[Dtype | None, option("--dtype", help="Type of all float weights. Default: unchanged.", panel=OUTPUT)] = None
    quantize: Annotated[
        Literal["rtn-a16w8", "rtn-a16w4", "a8w8"] | None,
        option("--quantize", help="Also quantize, by an approach of tandem quantize that needs no data. Default: none.", panel=OUTPUT),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardOptions(RewriteOptions):
    """Options of `tandem reshard`."""

    workers: Annotated[
        int, option("--workers", "-n", help="Number of ranks to write files for; 1: a single file.", panel=PARALLELISM, min=1)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(CheckpointOptions):
    """Options of `tandem verify`."""

    verify: bool = False
    deep: Annotated[bool, option("--deep", help="Also search for NaN and infinite values.", panel=OUTPUT)] = False
    as_json: Annotated[bool, option("--json", help="Print one JSON object instead of text.", panel=OUTPUT)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(PrecisionOptions):
    """Options of `tandem plan`."""

    verify: bool = False
    lora: Annotated[
        tuple[str, ...],
        option("--lora", metavar="NAME=PATH", help="LoRA adapter, a folder of PEFT; repeatable. Default: none.", panel=MODEL),
        also("--lora-modules"),
    ] = ()
    model_config: Annotated[Path | None, option("--model-config", help="Hugging Face config.json, without weights.", panel=MODEL)] = None
    quantization: Annotated[
        str | None,
        option(
            "--quantization", help="none, or an approach of tandem quantize. Default: the YAML's or the checkpoint's.", panel=QUANTIZATION
        ),
    ] = None
    dtype: Annotated[Dtype | None, option("--dtype", help="Compute type. Default: the YAML's, else the checkpoint's.", panel=MODEL)] = None
    workers: Annotated[
        int | None,
        option(
            "--workers", "-n", help="Number of ranks. Default: MS_WORKER_NUM, then the YAML's model_parallel, then 1.", panel=PARALLELISM
        ),
        also("--worker_num", "--tensor-parallel-size"),
    ] = None
    threads_per_rank: Annotated[
        int | None,
        option("--threads-per-rank", help="CPU threads per rank. Default: an even share of the free cores.", panel=PARALLELISM, min=1),
    ] = None
    kv_cache_dtype: Annotated[
        CacheDtype | None, option("--kv-cache-dtype", help="KV cache type. Default: auto (checkpoint, then YAML).", panel=MODEL)
    ] = None
    draft_model: Annotated[
        str | Path | None,
        option("--draft-model", metavar="MODEL", help="Include this draft model in every rank's part. Default: none.", panel=MODEL),
    ] = None
    batch_size: Annotated[int, option("--batch-size", help="Sequences per batch. Default: 1.", panel=OUTPUT)] = 1
    tokens: Annotated[
        int | None, option("--tokens", "--max-length", help="Tokens of each sequence. Default: the model's context.", panel=OUTPUT)
    ] = None
    bandwidth: Annotated[
        float | None,
        option("--bandwidth", help="Memory bandwidth per rank in GB/s; adds an estimate of tokens/s. Default: none.", panel=OUTPUT),
    ] = None
    device_memory: Annotated[
        str | None,
        option(
            "--device-memory",
            metavar="SIZE",
            help="Memory of each rank's device, such as 80GB or 64GiB; adds how much KV cache fits. Default: none.",
            panel=OUTPUT,
        ),
    ] = None
    memory_fraction: Annotated[
        float | None,
        option(
            "--memory-fraction",
            help="Fraction of that memory for weights and KV cache, above 0 and at most 1. Default: 0.9.",
            panel=OUTPUT,
            above=0,
            max=1,
        ),
    ] = None
    svg: Annotated[Path | None, option("--svg", metavar="FILE", help="Write a diagram of the split to this file.", panel=OUTPUT)] = None
    as_json: Annotated[bool, option("--json", help="Print one JSON object instead of a table.", panel=OUTPUT)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions(RunOptions):
    """Options of `tandem quantize`."""

    kv_cache_dtype: CacheDtype | None = None
    activations: Precision | None = None
    lm_head: Annotated[
        Precision | None,
        option(
            "--lm-head",
            help="int8: store the output head as int8 too, of a tied model as a copy. Default: auto (as the approach says).",
            panel=QUANTIZATION,
        ),
    ] = None
    max_batch_size: int | None = None
    bind_cores: str | None = None
    dtype: Annotated[Dtype | None, option("--dtype", help="Compute type of the calibration. Default: float32.", panel=QUANTIZATION)] = None
    approach: Annotated[
        str,
        option(
            "--approach",
            "-a",
            help="Required. rtn-a16w8: int8 weights. rtn-c8: int8 KV cache. a8w8: int8 weights, dynamic int8 activations. "
            "smooth_quant: int8 weights and activations. ptq: as selected by -w, -k, "
            "--act-quant-dtype and --outliers. gptq, awq, rtn-a16w4: int4 weights.",
            panel=QUANTIZATION,
        ),
        also("-q"),
    ] = ""
    dataset: Annotated[
        str | None,
        option("--dataset", "-t", help="Calibration data: boolq, squad1.1, wikitext2, or ids (.npy). Default: none.", panel=DATA),
        also("--dataset_type"),
    ] = None
    dataset_path: Annotated[
        Path | None, option("--dataset-path", "-s", help="File of the calibration data.", panel=DATA), also("--dataset_path")
    ] = None
    num_samples: Annotated[int, option("--num-samples", help="Maximum calibration samples. Default: 200.", panel=DATA, min=1)] = (
        DEFAULT_SAMPLES
    )
    sample_tokens: Annotated[
        int | None, option("--sample-tokens", help="Maximum tokens per sample. Default: the context, at most 2048.", panel=DATA, min=1)
    ] = None
    weight_dtype: Annotated[
        Int8OrNone | None,
        option("--weight-quant-dtype", "-w", help="ptq: weight type. Default: the YAML's.", panel=QUANTIZATION),
        also("--weight_quant_dtype"),
    ] = None
    kvcache_dtype: Annotated[
        Int8OrNone | None,
        option("--kvcache-quant-dtype", "-k", help="KV cache type, in addition to the weights. Default: none.", panel=QUANTIZATION),
        also("--kvcache_quant_dtype"),
    ] = None
    act_quant_dtype: Annotated[
        Int8OrNone | None,
        option("--act-quant-dtype", help="ptq: activation type. Default: the YAML's.", panel=QUANTIZATION),
        also("--act_quant_dtype"),
    ] = None
    outliers: Annotated[
        Literal["smooth", "none", "None"] | None,
        option("--outliers", help="ptq: outlier suppression. Default: the YAML's.", panel=QUANTIZATION),
        also("-o", "--outliers_suppression"),
    ] = None
    not_converted: Annotated[
        tuple[str, ...],
        option(
            "--not-converted",
            "-b",
            help="Keep linears whose name contains this word in float; takes several words (Hugging Face or MindFormers names).",
            panel=QUANTIZATION,
        ),
        also("--opname_blacklist"),
    ] = ()
    alpha: Annotated[
        float | None,
        option(
            "--alpha",
            help="smooth_quant, ptq: migration strength, 0 to 1. Default: the YAML's algorithm_args, else 0.5.",
            panel=QUANTIZATION,
        ),
    ] = None
    fold: Annotated[
        bool,
        option(
            "--fold",
            help="smooth_quant, ptq: fold the smoothing scales into the norms, as transformers and vLLM need.",
            panel=QUANTIZATION,
        ),
    ] = False
    group_size: Annotated[
        int | None, option("--group-size", help="int4: input columns that share a scale. Default: 128.", panel=QUANTIZATION)
    ] = None
    symmetric: Annotated[
        bool | None,
        option(
            "--symmetric/--asymmetric",
            help="int4: without or with zero points; transformers 5.24 cannot load the latter. Default: without.",
            panel=QUANTIZATION,
        ),
    ] = None
    kv_granularity: Annotated[
        Literal["per_channel", "per_token"] | None,
        option(
            "--kvcache-granularity",
            help="Stored scales per channel, or scales computed per token. Default: per_channel.",
            panel=QUANTIZATION,
        ),
    ] = None
    output: Annotated[
        Path | None,
        option("--output", metavar="DIR", help="Folder to write. Default: output/<approach>_ckpt.", panel=OUTPUT),
        also("--output_dir"),
    ] = None
    output_format: Annotated[
        Literal["hf", "mindformers"] | None,
        option(
            "--format",
            help="hf: a Hugging Face folder; mindformers: also DIR/rank_0/<approach>.ckpt. Default: mindformers for a .ckpt, else hf.",
            panel=OUTPUT,
        ),
    ] = None
    overwrite: Annotated[bool, option("--overwrite", help="Replace the output folder if it exists.", panel=OUTPUT)] = False

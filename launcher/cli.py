"""The commands of `tandem`: options and their help; the work is done elsewhere.

Exit codes: 0 done, 1 the run failed, 2 usage or input (nothing had started), 130 SIGINT, 143 SIGTERM.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", "--config_path", help="MindFormers YAML file.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "--load_checkpoint",
        help="Checkpoint: Hugging Face folder, GGUF file, or rank files. Default: the YAML's load_checkpoint.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace DST when it exists.")]


@app.command(epilog="Example: tandem predict --checkpoint output/demo/smollm2-135m-rtn --workers 2 --prompt 'Once upon a time'")
def predict(
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-n", "--worker_num", help="Ranks. Default: MS_WORKER_NUM, then the YAML's model_parallel, then 1."),
    ] = None,
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
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the YAML's compute_dtype, else the checkpoint's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or npu. Default: auto.")] = None,
    threads_per_rank: Annotated[
        int | None, typer.Option("--threads-per-rank", help="CPU threads of each rank. Default: the cores, shared evenly.")
    ] = None,
    collectives: Annotated[
        str | None, typer.Option(help="auto, shm, gloo or nccl. Default: auto, which is shm for CPU ranks on one x86-64 host.")
    ] = None,
    max_batch_size: Annotated[int | None, typer.Option("--max-batch-size", help="Prompts decoded together at most. Default: 16.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write one JSON object a prompt to this file.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Write speeds, bytes and memory of the run to this JSON file.")] = None,
    log_dir: Annotated[Path | None, typer.Option("--log-dir", "--log_dir", help="Folder of worker_N.log. Default: output/log.")] = None,
    max_restarts: Annotated[int | None, typer.Option("--max-restarts", help="Starts anew after a failed rank at most. Default: 1.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", "--cluster_time_out", help="Seconds that ranks wait for one that makes no progress. Default: 300."),
    ] = None,
) -> None:
    """Decode prompts with N ranks: the main job.

    Results go to standard output, one line a prompt; logs of the ranks to worker_N.log in the log folder.
    Under torchrun the process joins as one rank instead of starting any.
    """
    from launcher.predict import PredictOptions
    from launcher.predict import predict as run

    run(
        PredictOptions(
            config=config,
            checkpoint=checkpoint,
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
            max_batch_size=max_batch_size,
            output=output,
            stats=stats,
            log_dir=log_dir,
            max_restarts=max_restarts,
            timeout_seconds=timeout,
        )
    )


@app.command(epilog="Example: tandem quantize -c configs/smollm2_135m_rtn.yaml --checkpoint output/smollm2-135m -a rtn-a16w8")
def quantize(
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    approach: Annotated[
        str, typer.Option("--approach", "-a", "-q", help="Required. rtn-a16w8: int8 weights, round to nearest, one scale an output row.")
    ] = "",
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: output/<approach>_ckpt.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Quantize a float checkpoint, written as compressed-tensors: transformers and vLLM load it too."""
    from launcher.rewriting import quantize as run

    run(config, checkpoint, approach, output, overwrite=overwrite)


@app.command(epilog="Example: tandem convert model.Q4_1.gguf output/model --dtype float16")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any readable format.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    to: Annotated[str, typer.Option("--to", help="hf: a Hugging Face folder.")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for all float weights. Default: as they are.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Rewrite any readable checkpoint as a Hugging Face folder, tokenizer included."""
    from launcher.rewriting import convert as run

    run(source, target, to, dtype, overwrite=overwrite)


@app.command(epilog="Example: tandem reshard output/model-rtn output/model-rtn-8 --workers 8")
def reshard(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any readable format, rank files included.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    workers: Annotated[int, typer.Option("--workers", "-n", help="Ranks to write for; 1 gives one file again.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Rewrite a checkpoint, quantized or not, as one file a rank. Any number of ranks can read it back."""
    from launcher.rewriting import reshard as run

    run(source, target, workers, overwrite=overwrite)


@app.command(epilog="Example: tandem env --json")
def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False) -> None:
    """Tell which launch environment was detected, and from which variables."""
    from dataclasses import asdict

    from launcher.environment import read_environment

    found: dict[str, Any] = asdict(read_environment())
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {'-' if value is None else value}")


def main() -> None:
    """Run a command and end with its exit code."""
    try:
        app(standalone_mode=False)
    except InputError as error:
        _fail(error, 2)
    except TandemError as error:
        _fail(error, 128 + number if (number := getattr(error, "signal_number", 0)) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "show"):  # a usage error of typer's own
            error.show()
            sys.exit(2)
        raise


def _fail(error: Exception, code: int) -> None:
    print(f"tandem: {error}", file=sys.stderr)
    sys.exit(code)

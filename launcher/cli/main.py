"""The commands of `tandem`: names and help. Options are declared in the option dataclasses.

Exit codes: 0 success, 1 failed run, 2 usage or input error (nothing was started), 130 SIGINT, 143 SIGTERM.
"""

import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from launcher.cli.dialects import translate
from launcher.commands.early_start import prepare
from launcher.commands.refusal import refusal
from launcher.host.interruption import interruption
from launcher.host.program_version import read_version
from launcher.host.streams import guard_streams
from launcher.settings.checkpoint_options import ConvertOptions, PlanOptions, QuantizeOptions, ReshardOptions, VerifyOptions
from launcher.settings.decode_options import BatchOptions, ChatOptions, PredictOptions, ServeOptions
from launcher.settings.measure_options import BenchOptions, EnvOptions, EvaluateOptions
from launcher.settings.option_declarations import DeclaredCommand, takes
from launcher.settings.program_options import ProgramOptions
from parallel.errors import InputError, TandemError

app = typer.Typer(
    name="tandem",
    help="Run Llama-family models across processes and machines, bitwise identical for any number of ranks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    rich_markup_mode=None,
)
DEMO = "output/demo/smollm2-135m-rtn"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tandem {read_version()}")
        raise typer.Exit


@app.callback()
def tandem(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Run Llama-family models across processes and machines, bitwise identical for any number of ranks."""


@app.command(cls=DeclaredCommand, epilog=f"Example: tandem predict {DEMO} --workers 2 --prompt 'The capital of France is'")
@takes(PredictOptions, "launcher.commands.predict:predict", prepare)
def predict() -> None:
    """Generate text for one or many prompts with N ranks.

    Under torchrun, srun, mpirun or msrun's variables, each process joins as one rank. SIGINT and SIGTERM stop the run after the current
    token; finished prompts are in --output by then.
    """


@app.command(cls=DeclaredCommand, epilog=f"Example: tandem chat {DEMO} --workers 2")
@takes(ChatOptions, "launcher.commands.chat:chat", prepare)
def chat() -> None:
    """Talk to a model in the terminal, with its chat template.

    Reads one message per line; answers are streamed. /reset starts over, /exit or Ctrl-D quits, Ctrl-C stops the answer.
    """


@app.command(
    cls=DeclaredCommand,
    epilog=f"Examples: tandem serve {DEMO} --workers 2  |  tandem serve MODEL --workers 8 --host 0.0.0.0 --api-key-file keys.txt",
)
@takes(ServeOptions, "launcher.commands.serve:serve", prepare)
def serve() -> None:
    """Serve OpenAI's HTTP API with N ranks, until SIGTERM or SIGINT.

    POST /v1/completions, /v1/chat/completions, /v1/responses and /v1/messages, GET /v1/models, /health, /metrics (Prometheus), and a web
    page at /. A failed rank is restarted, and running requests continue.
    """


@app.command(
    cls=DeclaredCommand,
    epilog=f"Example: tandem batch requests.jsonl {DEMO} --output answers.jsonl --workers 2",
)
@takes(BatchOptions, "launcher.commands.batch:batch", prepare)
def batch() -> None:
    """Answer a file of requests in OpenAI's batch format with N ranks.

    Each line holds custom_id, method, url and body; url is /v1/chat/completions, /v1/completions or /v1/responses. Answers are written as
    they finish and sorted at the end. --resume continues an interrupted batch.
    """


@app.command(
    cls=DeclaredCommand,
    epilog="Examples: tandem quantize --checkpoint output/smollm2-135m -a rtn-a16w8  |  "
    "tandem quantize output/smollm2-135m -a smooth_quant -t boolq -s dev.jsonl --workers 2",
)
@takes(QuantizeOptions, "launcher.commands.quantize:quantize", prepare)
def quantize() -> None:
    """Quantize a float checkpoint, layer by layer, on any number of ranks.

    Writes compressed-tensors, which transformers and vLLM load (smoothing scales only after --fold). The same command resumes an
    interrupted one. A report goes to standard output and into the output folder.
    """


@app.command(
    "eval",
    cls=DeclaredCommand,
    epilog="Example: tandem eval --task perplexity --data wiki.test.raw --checkpoint output/smollm2-135m --limit 4",
)
@takes(EvaluateOptions, "launcher.commands.evaluate:evaluate", prepare)
def evaluate() -> None:
    """Measure the quality of a checkpoint; the score is the same for any number of ranks."""


@app.command(
    cls=DeclaredCommand,
    epilog=f"Examples: tandem bench {DEMO} --workers 2  |  "
    "tandem bench --model-config config.json --random-weights --num-layers 2 --workers 8 --json",
)
@takes(BenchOptions, "launcher.commands.bench:bench", prepare)
def bench() -> None:
    """Measure decode and prefill speed, compared with the memory bandwidth measured in the same run.

    Prompts are random ids. A decode step reads every weight once: tokens/s cannot exceed the bandwidth divided by these bytes.
    """


@app.command(
    cls=DeclaredCommand,
    epilog="Examples: tandem plan --model-config config.json --workers 8 --quantization rtn-a16w8 --bandwidth 800  |  "
    "tandem plan -c predict_llama2_70b.yaml --workers 6 --svg plan.svg",
)
@takes(PlanOptions, "launcher.commands.plan:plan", prepare)
def plan() -> None:
    """Show the requirements of a run, from config and headers alone: shares, bytes, memory, speed, valid rank counts."""


@app.command(
    cls=DeclaredCommand,
    epilog="Examples: tandem convert model.Q4_K_M.gguf output/model --quantize rtn-a16w8  |  "
    "tandem convert output/model model.ckpt --to mindspore",
)
@takes(ConvertOptions, "launcher.commands.convert:convert", prepare)
def convert() -> None:
    """Rewrite any readable checkpoint as a Hugging Face folder or a MindSpore .ckpt. Reading a .ckpt needs its YAML (-c)."""


@app.command(cls=DeclaredCommand, epilog="Example: tandem reshard output/model-rtn output/model-rtn-8 --workers 8")
@takes(ReshardOptions, "launcher.commands.convert:reshard", prepare)
def reshard() -> None:
    """Rewrite a checkpoint, quantized or not, as one file per rank. Any number of ranks can read it."""


@app.command(cls=DeclaredCommand, epilog="Examples: tandem verify output/model-rtn-8  |  tandem verify output/model --deep --json")
@takes(VerifyOptions, "launcher.commands.verify:verify", prepare)
def verify() -> None:
    """Check a checkpoint without building the model: checksums, shapes, types, missing, unexpected and short tensors.

    Files are verified against layout.json, SHA256SUMS, Meta's checklist.chk or a .ckpt's own CRC, where present. Exits with 2 if
    anything is wrong. Checksums of tensors (--json) are the same in every format that holds the same tensors.
    """


@app.command(
    cls=DeclaredCommand,
    epilog="Examples: tandem run script.py --workers 2 output/model  |  tandem run --workers 2 -m package.module --its-own-option 1",
)
@takes(ProgramOptions, "launcher.commands.run:run", prepare)
def run() -> None:
    """Run a Python program as N ranks, which load one model together through tandem.AutoModel or tandem.mindformers.

    Options of tandem come before SCRIPT or directly after it; everything else passes to the program unchanged. Rank 0's standard output
    is the command's; the rest goes to worker_N.log.
    """


@app.command(cls=DeclaredCommand, epilog="Example: tandem env --json")
@takes(EnvOptions, "launcher.commands.env:show_environment", prepare)
def env() -> None:
    """Show the detected launch environment, versions, CPU, kernels, accelerators and memory."""


@guard_streams
def main() -> None:
    """Run a command and exit with its exit code."""
    interruption.catch()
    try:
        code = app(translate(sys.argv[1:]) or ["--help"], standalone_mode=False, prog_name="tandem")
    except BaseException as error:
        if interruption.number is None:
            _exit_after(error)
        interruption.exit()  # regardless of how the interrupted code failed
    if interruption.number is not None:
        interruption.exit()
    sys.exit(code if isinstance(code, int) else 0)


def _exit_after(error: BaseException) -> NoReturn:
    if isinstance(error, InputError):
        print(f"tandem: {error}", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            refusal.tell(str(error))
        sys.exit(2)
    if isinstance(error, TandemError):
        print(f"tandem: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # A failed run may leave threads behind for which the interpreter would wait at exit.
        os._exit(128 + number if (number := getattr(error, "signal_number", 0)) else getattr(error, "exit_code", 1))
    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, Exception) and hasattr(error, "format_message"):  # a usage error from typer
        print(f"tandem: {_describe_usage_error(error)}", file=sys.stderr)
        sys.exit(2)
    raise error


def _describe_usage_error(error: Exception) -> str:
    """Return the message of a usage error, with a pointer to the command's help."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tandem"
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    return f"{message} (see {command} --help)"

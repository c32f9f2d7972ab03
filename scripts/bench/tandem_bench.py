"""One call of `tandem bench --json`: its arguments, its answer, and the machine it ran on."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parents[2]
OWN_COMMAND = f"{shlex.quote(sys.executable)} -m launcher"
"""What `tandem` is when nothing else is said: this checkout."""


DECODE_PROMPT_TOKENS = 16
"""`tandem bench` decodes behind prompts of so many tokens, whatever --prompt-tokens is: that is for its prefill."""


class BenchError(RuntimeError):
    """A program that was to be measured failed; the message is the end of what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCall:
    """What is measured: random weights in the shape of `model_config`, or a checkpoint."""

    model_config: Path | None = None
    checkpoint: Path | None = None
    quantization: str = "rtn-a16w8"
    """Of random weights; none: float."""
    workers: int = 1
    threads_per_rank: int = 1
    dtype: str = "bfloat16"
    num_layers: int | None = None
    """Of random weights; None: all."""
    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 1

    def arguments(self) -> list[str]:
        """Behind `tandem`."""
        words = ["bench", "--json", "--workers", str(self.workers), "--threads-per-rank", str(self.threads_per_rank)]
        if self.checkpoint:
            words += ["--checkpoint", str(self.checkpoint.resolve())]
        else:
            assert self.model_config is not None
            words += ["--model-config", str(self.model_config.resolve()), "--random-weights"]
            words += ["--quantization", self.quantization]
            words += ["--num-layers", str(self.num_layers)] if self.num_layers else []
        words += ["--dtype", self.dtype, "--batch-size", ",".join(map(str, self.batch_sizes))]
        return [*words, "--prompt-tokens", str(self.prompt_tokens), "--new-tokens", str(self.new_tokens), "--rounds", str(self.rounds)]

    def run(self, command: str = OWN_COMMAND, timeout_seconds: float = 3600) -> dict[str, Any]:
        """The object that it prints. Raises BenchError."""
        output = run_program([*shlex.split(command), *self.arguments()], timeout_seconds)
        try:
            return dict(json.loads(output))
        except ValueError:
            raise BenchError(f"not one JSON object: {output[-200:]!r}") from None


def build_environment() -> dict[str, str]:
    """Of a program to start: this checkout can be imported in any folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))}


def run_program(command: Sequence[str], timeout_seconds: float) -> str:
    """Standard output of a program, started in a folder of its own so that its logs go with it. Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                cwd=folder,
                env=build_environment(),
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"no end after {timeout_seconds:g} s") from None
        except OSError as error:
            raise BenchError(f"{command[0]} cannot be started: {error.strerror}") from None
    if result.returncode:
        raise BenchError(f"exit code {result.returncode}: {find_reason(result.stderr or result.stdout)}")
    return result.stdout


def find_reason(text: str) -> str:
    """The line of a failed program that tells most: its last error with a message, else its last words."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception): \S", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def name_machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(words: str) -> str:
    """Words as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")

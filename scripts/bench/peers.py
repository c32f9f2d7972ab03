"""The programs that tandem is measured beside: how each is called, and what its output says. One table, PEERS.

A peer gets the same number of threads and tokens as tandem, and decodes behind as short a prompt. Knows nothing of rounds or ratios.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tandem_bench import DECODE_PROMPT_TOKENS, BenchCall, BenchError, run_program

_TRANSFORMERS = Path(__file__).resolve().with_name("transformers_decode.py")
_LLAMA_LIBRARY = Path(__file__).resolve().with_name("llama_library.py")
_OPENVINO = Path(__file__).resolve().with_name("openvino_decode.py")
LLAMA_CPUS = ("zen4", "haswell", "sapphirerapids", "icelake", "alderlake")
"""CPU libraries of llama.cpp, as npm's package names them; haswell is AVX2."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What one run of one program gave, tokens a second."""

    prefill: float | None
    decode: Mapping[int, float]
    """By batch size."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Version, kernel, bytes: what a reader of the figures asks for."""

    def figures(self) -> dict[str, float]:
        """By metric: `prefill`, `decode@1`, …"""
        figures = {} if self.prefill is None else {"prefill": self.prefill}
        return figures | {f"decode@{size}": speed for size, speed in self.decode.items()}


@dataclass(frozen=True, slots=True)
class Contender:
    """A program with its settings, ready to be measured again and again."""

    name: str
    measure: Callable[[], Speed]
    is_tandem: bool = False


# --- tandem itself

_TANDEM_DETAILS = (
    *("version", "kernel", "collectives", "decode_bytes_per_step", "weight_bytes", "memory_bandwidth_bytes_per_second"),
    *("load_seconds", "start_to_first_token_seconds", "peak_rss_bytes"),
)


def read_tandem(answer: Mapping[str, Any]) -> Speed:
    """The answer of `tandem bench --json`."""
    decode = {int(row["batch_size"]): float(row["tokens_per_second"]) for row in answer["decode"]}
    return Speed(answer["prefill_tokens_per_second"], decode, {name: answer.get(name) for name in _TANDEM_DETAILS})


def build_tandem(options: argparse.Namespace) -> list[Contender]:
    """One for each number of ranks and each quantization."""
    contenders = []
    for quantization in options.quantization:
        for workers in options.workers:
            call = BenchCall(
                model_config=options.model_config,
                checkpoint=options.checkpoint,
                quantization=quantization,
                workers=workers,
                threads_per_rank=max(1, options.threads // workers),
                dtype=options.dtype,
                num_layers=options.layers,
                batch_sizes=tuple(options.batch_size),
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
            )
            weights = "checkpoint" if options.checkpoint else options.dtype if quantization == "none" else quantization
            name = f"tandem {workers}x{call.threads_per_rank} {weights}"
            contenders.append(
                Contender(name, lambda call=call: read_tandem(call.run(options.tandem, options.timeout)), True)  # type: ignore[misc]
            )
    return contenders


# --- llama.cpp


def read_llama_bench(output: str) -> Speed:
    """The tests of one `llama-bench -o json`: one with prompt tokens, or one with new tokens, or both."""
    tests = json.loads(output)
    prefill = next((test["avg_ts"] for test in tests if test["n_prompt"] and not test["n_gen"]), None)
    decode = next((test["avg_ts"] for test in tests if test["n_gen"] and not test["n_prompt"]), None)
    details = {"build": tests[0].get("build_commit"), "model_bytes": tests[0].get("model_size")}
    return Speed(prefill, {} if decode is None else {1: decode}, details)


def build_llama_bench(options: argparse.Namespace) -> Contender | None:
    """llama-bench measures one sequence only."""
    if not options.llama_bench:
        return None
    if not options.gguf:
        raise SystemExit("--llama-bench needs --gguf FILE; scripts/bench/random_gguf.py writes one")

    def measure() -> Speed:
        head = [str(options.llama_bench.resolve()), "-m", str(options.gguf.resolve()), "-o", "json", "-r", "1", "-t", str(options.threads)]
        prompt = read_llama_bench(run_program([*head, "-p", str(options.prompt_tokens), "-n", "0"], options.timeout))
        depth = ["-p", "0", "-n", str(options.new_tokens), "-d", str(DECODE_PROMPT_TOKENS)]
        new = read_llama_bench(run_program([*head, *depth], options.timeout))
        return Speed(prompt.prefill, new.decode, new.details)

    return Contender(f"llama.cpp {options.gguf.stem} {options.threads} threads", measure)


def build_llama_library(options: argparse.Namespace, cpu: str) -> Contender | None:
    """The prebuilt library of npm, in a process of its own; it also measures batches."""
    if not options.llama_package or cpu not in options.llama_cpu:
        return None
    if not options.gguf:
        raise SystemExit("--llama-package needs --gguf FILE; scripts/bench/random_gguf.py writes one")
    command = [sys.executable, str(_LLAMA_LIBRARY), str(options.llama_package.resolve()), str(options.gguf.resolve()), "--cpu", cpu]
    command += ["--threads", str(options.threads), *_measured_arguments(options)]
    name = f"llama.cpp {cpu} library {options.gguf.stem} {options.threads} threads"
    return Contender(name, lambda: read_transformers(run_program(command, options.timeout)))


# --- OpenVINO GenAI


def build_openvino(options: argparse.Namespace) -> Contender | None:
    """Its own environment's Python runs it, since it draws packages that tandem does not have."""
    if not options.openvino:
        return None
    model = options.openvino_model or options.gguf
    if not model:
        raise SystemExit("--openvino needs --openvino-model or --gguf, with a vocabulary: see openvino_decode.py")
    # Not resolved: the link tells Python its environment.
    command = [str(options.openvino.absolute()), str(_OPENVINO), str(model.resolve()), "--threads", str(options.threads)]
    name = f"OpenVINO GenAI {model.stem} {options.threads} threads"
    return Contender(name, lambda: read_transformers(run_program([*command, *_measured_arguments(options)], options.timeout)))


# --- distributed-llama


def read_dllama(output: str) -> Speed:
    """The two blocks at the end of `dllama inference`: evaluation of the prompt, and prediction."""
    found = {
        name: (int(tokens), float(speed))
        for name, tokens, speed in re.findall(r"^(Evaluation|Prediction)$.*?nTokens: *(\d+).*?tokens/s: *([\d.]+)", output, re.M | re.S)
    }
    if found.keys() != {"Evaluation", "Prediction"}:
        raise BenchError(f"no tokens/s of evaluation and prediction in its output, which ends: {output[-200:]!r}")
    (prompt_tokens, prefill), (new_tokens, decode) = found["Evaluation"], found["Prediction"]
    return Speed(prefill, {1: decode}, {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens})


def build_dllama(options: argparse.Namespace) -> Contender | None:
    """A root and as many workers as make the same number of ranks, all on this host. Its ranks are powers of two."""
    if not options.dllama:
        return None
    if not (options.dllama_model and options.dllama_tokenizer):
        raise SystemExit("--dllama needs --dllama-model FILE and --dllama-tokenizer FILE")
    nodes = max(options.workers)
    threads = str(max(1, options.threads // nodes))

    def run(prompt_tokens: int, new_tokens: int) -> Speed:
        program = str(options.dllama.resolve())
        ports = [_find_port() for _ in range(nodes - 1)]
        workers = [
            subprocess.Popen(
                [program, "worker", "--port", str(port), "--nthreads", threads], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for port in ports
        ]
        command = [program, "inference", "--model", str(options.dllama_model.resolve()), "--nthreads", threads]
        command += ["--tokenizer", str(options.dllama_tokenizer.resolve()), "--buffer-float-type", "q80"]
        # How many tokens the prompt is depends on the tokenizer; the answer says it.
        command += ["--prompt", " a" * prompt_tokens, "--steps", str(prompt_tokens + new_tokens + 1)]
        command += ["--workers", *(f"127.0.0.1:{port}" for port in ports)] if ports else []
        try:
            return read_dllama(run_program(command, options.timeout))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()

    def measure() -> Speed:
        prompt, new = run(options.prompt_tokens, 1), run(DECODE_PROMPT_TOKENS, options.new_tokens)
        return Speed(
            prompt.prefill, new.decode, {"prompt_tokens": prompt.details["prompt_tokens"], "new_tokens": new.details["new_tokens"]}
        )

    return Contender(f"distributed-llama {nodes}x{threads} {options.dllama_model.stem}", measure)


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- transformers


def read_transformers(output: str) -> Speed:
    """The last line of transformers_decode.py, llama_library.py and openvino_decode.py."""
    answer = json.loads(output.strip().splitlines()[-1])
    details = {name: answer[name] for name in ("version", "ranks", "dtype")}
    return Speed(answer["prefill_tokens_per_second"], {int(size): speed for size, speed in answer["decode"].items()}, details)


def build_transformers(options: argparse.Namespace) -> Contender | None:
    """One process with all threads."""
    if not options.transformers:
        return None
    command = [sys.executable, *_transformers_arguments(options, options.threads)]
    name = f"transformers 1x{options.threads} {options.dtype}"
    return Contender(name, lambda: read_transformers(run_program(command, options.timeout)))


def build_tp_plan(options: argparse.Namespace) -> Contender | None:
    """transformers' own tensor parallelism, over gloo."""
    if not options.tp_plan:
        return None
    ranks = max(options.workers)
    threads = max(1, options.threads // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [*_transformers_arguments(options, threads), "--tp-plan"]
    name = f"transformers tp_plan {ranks}x{threads} {options.dtype}"
    return Contender(name, lambda: read_transformers(run_program(command, options.timeout)))


def _transformers_arguments(options: argparse.Namespace, threads: int) -> list[str]:
    model = options.float_folder or options.model_config
    if model is None:
        raise SystemExit("transformers needs --float-folder FOLDER, or --model-config for random weights")
    words = [str(_TRANSFORMERS), os.path.realpath(model), "--threads", str(threads), "--dtype", options.dtype]
    words += ["--layers", str(options.layers)] if options.layers and not options.float_folder else []
    return [*words, *_measured_arguments(options)]


def _measured_arguments(options: argparse.Namespace) -> list[str]:
    words = ["--batch-size", ",".join(map(str, options.batch_size))]
    words += ["--prompt-tokens", str(options.prompt_tokens), "--decode-prompt-tokens", str(DECODE_PROMPT_TOKENS)]
    return [*words, "--new-tokens", str(options.new_tokens)]


PEERS: Mapping[str, Callable[[argparse.Namespace], Contender | None]] = {
    "llama.cpp": build_llama_bench,
    **{f"llama.cpp {cpu} library": partial(build_llama_library, cpu=cpu) for cpu in LLAMA_CPUS},
    "OpenVINO GenAI": build_openvino,
    "distributed-llama": build_dllama,
    "transformers": build_transformers,
    "transformers tp_plan": build_tp_plan,
}
"""Each gives a contender when the options ask for it."""

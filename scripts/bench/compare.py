"""tandem beside other programs on this machine: in turns, several rounds, as ratios.

    python scripts/bench/random_gguf.py scripts/bench/shapes/tinyllama_1.1b.json tinyllama.gguf
    python scripts/bench/compare.py --model-config scripts/bench/shapes/tinyllama_1.1b.json --workers 1,2 --rounds 5 \\
        --llama-bench llama.cpp/build/bin/llama-bench --gguf tinyllama.gguf --png compare.png
    python scripts/bench/compare.py --model-config scripts/bench/shapes/tinyllama_1.1b.json --quantization none --transformers --tp-plan
    bash scripts/bench/compare_all.sh FOLDER --rounds 5 --batch-size 1,8,32

Every program runs once a round, all with --threads threads (tandem: ranks times threads of a rank): a prefill of --prompt-tokens, and
decoding --new-tokens behind a prompt of 16 tokens, as `tandem bench` does; the order rotates. Weights are random unless --checkpoint,
--float-folder or --gguf say otherwise. A peer that fails is left out, with its reason. Prints tables; the last line is one JSON object,
which is also written to --results. A busy machine is waited for, --quiet seconds at most, and noted.
--tp-plan needs `pip install accelerate`.
compare_all.sh fetches the prebuilt llama.cpp of npm and OpenVINO GenAI into FOLDER. llama-bench: see random_gguf.py.
dllama: https://github.com/b4rtaz/distributed-llama, `make dllama`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from chart import Bar, draw_bars, load_pyplot
from peers import LLAMA_CPUS, PEERS, Contender, build_tandem
from quiet_machine import BUSY, wait_until_quiet
from rounds import collect, compare, list_metrics, rotate_order, spread
from tandem_bench import OWN_COMMAND, BenchError, name_machine, slug

RESULTS = Path(__file__).resolve().with_name("results")


def run_rounds(
    contenders: Sequence[Contender], num_rounds: int, report: Callable[[str], None], quiet_seconds: float = 0.0
) -> tuple[list[dict[str, dict[str, float]]], dict[str, Any], dict[str, str]]:
    """Figures of every round, details of every program, and why some were left out.

    A peer that fails once is not run again; what it gave before stays. tandem's own failure ends it all: BenchError.
    """
    by_name = {one.name: one for one in contenders}
    rounds: list[dict[str, dict[str, float]]] = []
    details: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for index in range(num_rounds):
        rounds.append({})
        for name in rotate_order(list(by_name), index):
            if name in left_out:
                continue
            busy = wait_until_quiet(quiet_seconds) if quiet_seconds else 0.0
            if busy >= BUSY:
                report(f"other programs use {busy:.0%} of the processors: the next figure is disturbed")
            try:
                speed = by_name[name].measure()
            except (BenchError, ValueError, LookupError) as error:
                if by_name[name].is_tandem:
                    raise BenchError(f"{name}: {error}") from error
                left_out[name] = str(error)
                report(f"{name}: left out: {error}")
                continue
            rounds[-1][name], details[name] = speed.figures(), {**details.get(name, {}), **speed.details}
            words = ", ".join(f"{metric} {value:.4g}" for metric, value in speed.figures().items())
            details[name]["busy_share"] = max(busy, details[name].get("busy_share", 0.0))
            report(f"round {index + 1} of {num_rounds}, {name}: {words}")
    return rounds, details, left_out


def print_tables(answer: dict[str, Any]) -> None:
    """Figures by program, then ratios."""
    rounds = answer["per_round"]
    print(f"{'tokens/s, median (least..most)':<36}", *(f"{metric:>26}" for metric in list_metrics(rounds)))
    for name in answer["programs"]:
        cells = []
        for metric in list_metrics(rounds):
            values = collect(rounds, name, metric)
            one = spread(values) if values else None
            cells.append(f"{one.median:.4g} ({one.least:.4g}..{one.most:.4g})" if one else "-")
        print(f"{name:<36}", *(f"{cell:>26}" for cell in cells))
    for row in answer["ratios"]:
        words = f"{row['metric']}: {row['tandem']} / {row['peer']}"
        print(f"{words}: {row['median']:.2f} ({row['least']:.2f}..{row['most']:.2f}, {row['count']} rounds)")
    for name, reason in answer["left_out"].items():
        print(f"{name}: left out: {reason}")


def draw(answer: dict[str, Any], own: Sequence[str], path: Path) -> None:
    """The figures as bars."""
    rounds = answer["per_round"]
    pairs = [(metric, name) for metric in list_metrics(rounds) for name in answer["programs"]]
    bars = [Bar(metric, name, spread(values), name in own) for metric, name in pairs if (values := collect(rounds, name, metric))]
    layers = f" ({answer['num_layers']} layers)" if answer["num_layers"] else ""
    title = f"{answer['model']}{layers}, {answer['threads']} threads of {answer['machine']}, {answer['date']}, {answer['rounds']} rounds"
    draw_bars(bars, title, path)


def find_free(folder: Path, stem: str) -> Path:
    """A JSON file that is not there yet: a later comparison of the same day gets a number."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}_{number}.json", number + 1
    return path


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def numbers(words: str) -> list[int]:
    """1,2,4"""
    values = [int(word) for word in words.split(",")]
    if min(values) < 1:
        raise ValueError(words)
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-config", type=Path, help="a config.json: random weights in its shape")
    parser.add_argument("--layers", type=int, help="only so many layers of it (write the GGUF with the same)")
    parser.add_argument("--checkpoint", type=Path, help="tandem's, instead of random weights")
    parser.add_argument("--quantization", type=lambda words: words.split(","), default=["rtn-a16w8"], help="of random weights; none: float")
    parser.add_argument("--workers", type=numbers, default=[1, 2], help="numbers of ranks, each is a program of its own here")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every program (default: all cores)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=numbers, default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet", type=float, default=60, help="wait up to so many seconds for others to leave the processors alone")
    parser.add_argument("--timeout", type=float, default=1800, help="of one program in one round, seconds")
    parser.add_argument("--tandem", default=OWN_COMMAND, help="command to measure (default: this checkout)")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--llama-package", type=Path, help="npm's @node-llama-cpp/linux-x64, unpacked: see llama_library.py")
    parser.add_argument("--llama-cpu", type=lambda words: words.split(","), default=["zen4", "haswell"], help=f"of {', '.join(LLAMA_CPUS)}")
    parser.add_argument("--openvino", type=Path, help="Python of an environment with openvino-genai: see openvino_decode.py")
    parser.add_argument("--openvino-model", type=Path, help="default: --gguf")
    parser.add_argument("--gguf", type=Path, help="the model of llama.cpp and OpenVINO")
    parser.add_argument("--dllama", type=Path)
    parser.add_argument("--dllama-model", type=Path)
    parser.add_argument("--dllama-tokenizer", type=Path)
    parser.add_argument("--transformers", action="store_true", help="in one process")
    parser.add_argument("--tp-plan", action="store_true", help="transformers on as many ranks as tandem has at most")
    parser.add_argument("--float-folder", type=Path, help="transformers' checkpoint (default: random weights)")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result file")
    options = parser.parse_args(arguments)
    if not (options.model_config or options.checkpoint):
        parser.error("give --model-config or --checkpoint")
    if unknown := set(options.llama_cpu) - set(LLAMA_CPUS):
        parser.error(f"--llama-cpu {', '.join(sorted(unknown))} is not one of {', '.join(LLAMA_CPUS)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads have to be above 0")
    if options.checkpoint:
        options.quantization = ["none"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, draw, write."""
    options = parse(arguments)
    if options.png:
        load_pyplot()  # say now that it is missing, not after an hour
    own = build_tandem(options)
    peers = [peer for build in PEERS.values() if (peer := build(options))]
    try:
        rounds, details, left_out = run_rounds([*own, *peers], options.rounds, _report, options.quiet)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    names = [one.name for one in own]
    model = (options.model_config or options.checkpoint).stem
    answer = {
        "bench": "compare",
        "model": model,
        "num_layers": options.layers,
        "threads": options.threads,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "machine": name_machine(),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "programs": [one.name for one in (*own, *peers)],
        "ratios": compare(rounds, names, [peer.name for peer in peers]),
        "figures": {
            name: {metric: asdict(spread(values)) for metric in list_metrics(rounds) if (values := collect(rounds, name, metric))}
            for name in [one.name for one in (*own, *peers)]
        },
        "per_round": rounds,
        "details": details,
        "left_out": left_out,
    }
    print_tables(answer)
    if options.png:
        draw(answer, names, options.png)
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"compare_{slug(model)}_{slug('-'.join(options.quantization))}_{slug(answer['machine'])}_{answer['date']}"
    file = find_free(options.results, name)
    file.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    _report(f"wrote {file}")
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

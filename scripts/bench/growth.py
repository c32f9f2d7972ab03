"""Decoding against ranks, context, batch and model size on this machine, through `tandem bench`; and 70B on many ranks, simulated.

    python scripts/bench/growth.py --png scripts/bench/results/growth.png
    python scripts/bench/growth.py --panels size,batch          # only these
    python scripts/bench/growth.py --draw --png growth.svg      # from what was measured before

Every point is appended to a file of --results as soon as it is measured, and not measured again. Weights are random, int8 with 16-bit
activations, in the shapes of scripts/bench/shapes. Of the 70B shape two and four layers are measured; 80 follow from their difference.
Two rates of the machine are fitted to the points of model size and the simulation is held against all points: the ratios are printed.
The curves of 70B take these rates for ranks that have a memory and cores like this machine's each, which is an assumption.
The last line is one JSON object.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from calibration import Check, check_points, fit_machine
from chart import Line, Panel, draw_panels, load_pyplot
from growth_points import BATCH_SIZES, LARGE, LARGE_LAYERS, SHAPES, SMALL, AnswerFile, Point, list_points, read_speed, scale_layers
from model.spec.config import build_config, read_config
from quiet_machine import BUSY, wait_until_quiet
from simulate import Machine, build_scheme, simulate_decode
from tandem_bench import OWN_COMMAND, BenchError, name_machine, slug

RESULTS = Path(__file__).resolve().with_name("results")
SIMULATED_RANKS = (1, 2, 4, 8, 16)
LINKS = {"in one host": (30e-6, float("inf")), "over 25 Gbit/s": (60e-6, 3.1e9)}
"""Ways from rank to rank that are assumed for the simulated curves: seconds of a gather, bytes a second that a rank receives."""

Panels = Mapping[str, Mapping[float, Point]]


def measure(points: Sequence[Point], file: AnswerFile, command: str, quiet_seconds: float) -> list[str]:
    """Measure what the file lacks; what failed."""
    failed = []
    for index, point in enumerate(points):
        if point.key in file.answers:
            continue
        print(f"point {index + 1} of {len(points)}: {point.key}", file=sys.stderr, flush=True)
        busy = wait_until_quiet(quiet_seconds) if quiet_seconds else 0.0
        if busy >= BUSY:
            print(f"other programs use {busy:.0%} of the processors: this point is disturbed", file=sys.stderr, flush=True)
        try:
            file.add(point.key, {**point.measure(command), "busy_share": busy})
        except BenchError as error:
            failed.append(f"{point.key}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
    return failed


def simulate_large(machine: Machine, context_tokens: int = 512) -> dict[str, dict[int, float]]:
    """Tokens a second of the 70B shape by link and ranks, each rank with the rates of `machine` for itself."""
    config = build_config(read_config(SHAPES / f"{LARGE}.json"))
    scheme, curves = build_scheme(config, "rtn-a16w8"), {}
    for words, (gather_seconds, link) in LINKS.items():
        rates = replace(machine, gather_seconds=gather_seconds, link_bytes_per_second=link)
        steps = {size: simulate_decode(config, scheme, rates, world_size=size, context_tokens=context_tokens) for size in SIMULATED_RANKS}
        curves[words] = {size: step.tokens_per_second for size, step in steps.items()}
    return curves


def find_sizes(points: Mapping[float, Point], answers: Mapping[str, Any]) -> dict[float, float]:
    """Billions of parameters of the shape: tokens a second; 70B from its few layers."""
    speeds = {size: read_speed(answers[point.key]) for size, point in points.items() if size > 0 and point.key in answers}
    few = [(layers, answers.get(points[-layers].key)) for layers in LARGE_LAYERS]
    measured = [(layers, read_speed(answer)) for layers, answer in few if answer]
    if len(measured) == 2:
        layers = int(read_config(SHAPES / f"{LARGE}.json")["num_hidden_layers"])
        speeds[70] = scale_layers(measured[0], measured[1], layers)
    return speeds


def build_panels(panels: Panels, answers: Mapping[str, Any], curves: Mapping[str, Mapping[int, float]]) -> list[Panel]:
    """The four panels, of the points that there are."""

    def decode(panel: str) -> list[tuple[float, float]]:
        return [(x, read_speed(answers[point.key])) for x, point in panels[panel].items() if point.key in answers]

    context = [(x, answers[point.key]) for x, point in panels["context"].items() if point.key in answers]
    batch = [answers[point.key] for point in panels["batch"].values() if point.key in answers]
    lines = {
        "ranks": [Line(label=f"{SMALL}, ranks share this machine", points=decode("ranks"))],
        "context": [
            Line(label="decode, so many tokens behind it", points=decode("context")),
            Line(label="prefill of so many tokens", points=[(x, answer["prefill_tokens_per_second"]) for x, answer in context]),
        ],
        "batch": [Line(label="decode, all sequences", points=[(size, read_speed(one, size)) for one in batch for size in BATCH_SIZES])],
        "size": [
            Line(
                label=f"decode; 70B from {LARGE_LAYERS[0]} and {LARGE_LAYERS[1]} layers",
                points=[*find_sizes(panels["size"], answers).items()],
            )
        ],
    }
    lines["ranks"] += [
        Line(label=f"70B, simulated, a memory each, {words}", points=[*curve.items()], simulated=True) for words, curve in curves.items()
    ]
    words = {
        "ranks": ("decode against ranks", "ranks"),
        "context": (f"{SMALL} against context", "tokens"),
        "batch": (f"{SMALL} against batch", "sequences"),
        "size": ("decode against model size", "parameters, billions"),
    }
    drawn = {name: [line for line in some if line.points] for name, some in lines.items()}
    return [Panel(title=words[name][0], x_label=words[name][1], lines=some) for name, some in drawn.items() if some]


def print_checks(checks: Sequence[Check], machine: Machine) -> None:
    """Rates, then measured over simulated."""
    print(
        f"fitted: {machine.bandwidth_bytes_per_second / 1e9:.1f} GB/s, {machine.layer_seconds * 1e6:.0f} us a layer, "
        f"{machine.operations_per_second / 1e9:.0f} GFLOP/s"
    )
    print(f"{'measured':>10}{'simulated':>11}{'ratio':>7}")
    for check in checks:
        print(f"{check.measured:>10.2f}{check.simulated:>11.2f}{check.ratio:>7.2f}  {check.words}{' (fitted)' if check.fitted else ''}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, check, simulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panels", default="size,ranks,batch,context", help="which to measure, with commas")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--png", type=Path, help="picture, PNG or SVG by its ending")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the measured points")
    parser.add_argument("--quiet", type=float, default=60, help="wait up to so many seconds for others to leave the processors alone")
    parser.add_argument("--tandem", default=OWN_COMMAND, help="command to measure (default: this checkout)")
    options = parser.parse_args(arguments)
    if options.png:
        load_pyplot()  # say now that it is missing, not after an hour
    machine_name, cores = name_machine(), len(os.sched_getaffinity(0))
    panels = list_points(cores)
    chosen = options.panels.split(",")
    if unknown := set(chosen) - set(panels):
        parser.error(f"--panels names {', '.join(sorted(unknown))}; there are {', '.join(panels)}")
    file = AnswerFile(options.results / f"growth_{slug(machine_name)}_{cores}-cores.jsonl")
    points = list(dict.fromkeys(point for name in chosen for point in panels[name].values()))
    failed = [] if options.draw else measure(points, file, options.tandem, options.quiet)
    every = dict.fromkeys(point for some in panels.values() for point in some.values())
    measured = [(point, file.answers[point.key]) for point in every if point.key in file.answers]
    fitted = [(point, answer) for point, answer in measured if point in panels["size"].values()]
    answer: dict[str, Any] = {"bench": "growth", "machine": machine_name, "cores": cores, "date": date.today().isoformat()}
    answer |= {"points": len(measured), "failed": failed, "tokens_per_second_by_billions": find_sizes(panels["size"], file.answers)}
    curves: dict[str, dict[int, float]] = {}
    if fitted:
        machine = fit_machine(fitted, cores)
        checks = check_points(measured, [point for point, _ in fitted], machine, cores)
        print_checks(checks, machine)
        curves = simulate_large(machine)
        for words, curve in curves.items():
            print(f"{LARGE}, simulated, {words}: " + ", ".join(f"{size} ranks {speed:.2f} tokens/s" for size, speed in curve.items()))
        rates = {"bandwidth_bytes_per_second", "operations_per_second", "layer_seconds"}
        answer["machine_rates"] = {name: value for name, value in asdict(machine).items() if name in rates}
        answer["measured_over_simulated"] = {check.words: round(check.ratio, 3) for check in checks}
        answer["simulated_70b"] = curves
    if options.png and measured:
        dates = sorted({str(one["date"]) for _, one in measured})
        title = f"tandem, random int8 weights, {cores} cores of {machine_name}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        draw_panels(build_panels(panels, file.answers, curves), title, options.png)
    print(json.dumps(answer))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

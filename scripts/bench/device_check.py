"""One run on one GPU, under eight minutes: are the kernels right, do results keep their bits, and how fast is it.

    python scripts/bench/device_check.py [--output scripts/bench/results/device_check.json] [--seconds 460] [--only NAME ...]

Needs a CUDA build of PyTorch 2.11 or newer, triton 3.6 or newer and no network. A check that fails is reported and stops no other;
checks for which no time is left are named. Prints one table and writes JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_name("results") / "device_check.json"
Rows = dict[str, Any]
Check = Callable[[], Rows]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    parser.add_argument("--seconds", type=float, default=460, help="after which no further check starts")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these checks only")
    return parser.parse_args(words)


def explain_absence() -> str | None:
    """Return why nothing can be checked here, in one sentence; None if there is a GPU."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device is visible to PyTorch {torch.__version__}: run this on a machine with a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def run_checks(checks: Mapping[str, Check], seconds: float) -> dict[str, Rows]:
    """Run the checks in order; a failed one has the row "failed", one without time "skipped"."""
    found: dict[str, Rows] = {}
    started = time.monotonic()
    for name, check in checks.items():
        if time.monotonic() - started > seconds:
            found[name] = {"skipped": "no time left"}
            continue
        begun = time.monotonic()
        try:
            rows = check()
        except Exception:
            rows = {"failed": traceback.format_exc().strip().splitlines()[-1], "traceback": traceback.format_exc()[-1500:]}
        found[name] = {**rows, "seconds": round(time.monotonic() - begun, 1)}
        print(f"{name}: {found[name]['seconds']} s", file=sys.stderr, flush=True)
    return found


def draw_table(found: Mapping[str, Rows]) -> str:
    """Return the table: one line per result, `check | what | result`."""
    lines = [("check", "what", "result")]
    for name, rows in found.items():
        lines += [(name, what, describe(value)) for what, value in rows.items() if what != "traceback"]
    widths = [max(len(line[place]) for line in lines) for place in range(3)]
    drawn = [" | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([drawn[0], "-+-".join("-" * width for width in widths), *drawn[1:]])


def describe(value: Any) -> str:
    """Return a result in few words."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {describe(one)}" for key, one in value.items())
    return str(value)


def write_json(path: Path, found: Mapping[str, Rows]) -> None:
    """Write the results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)


def main(words: Sequence[str] | None = None) -> int:
    """Check, print and write; return the exit code: 1 if a check failed, 2 if nothing can be checked."""
    options = parse(sys.argv[1:] if words is None else words)
    if reason := explain_absence():
        print(reason, file=sys.stderr)
        return 2
    sys.path.insert(0, str(PROJECT_ROOT))
    from device_check_kernels import KERNEL_CHECKS
    from device_check_models import MODEL_CHECKS

    checks = {**KERNEL_CHECKS, **MODEL_CHECKS}
    if unknown := [name for name in options.only if name not in checks]:
        print(f"there is no check {', '.join(unknown)}; there are {', '.join(checks)}", file=sys.stderr)
        return 2
    found = run_checks({name: check for name, check in checks.items() if not options.only or name in options.only}, options.seconds)
    print(draw_table(found))
    write_json(options.output, found)
    return 1 if any("failed" in rows for rows in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

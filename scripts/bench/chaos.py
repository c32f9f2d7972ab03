"""Kills ranks at random and looks at what comes of it: how soon there is a verdict, how soon it decodes again, and that nothing is lost.

    python scripts/bench/chaos.py verdict CHECKPOINT --kills 50 --workers 4
    python scripts/bench/chaos.py recovery CHECKPOINT --kills 10 --workers 2
    python scripts/bench/chaos.py soak CHECKPOINT --kills 200 --workers 3 --seconds 3600
    python scripts/bench/chaos.py faults CHECKPOINT --rounds 5 --workers 2 --timeout 6

verdict: no restarts; seconds from the signal to the exit of the whole run. recovery: seconds from the death to the next new token.
soak: kills at any moment of runs with 0 to 2 restarts; every run has to end with the reference's tokens, or with a verdict that
names a rank that was hit. faults: everything of `chaos_faults.py`, or --only some of it. Anything else, a process or a folder left
behind included, is listed and makes the exit code 1.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from chaos_faults import FAULTS, Bench, run_faults
from chaos_run import SIGNALS, check, start, wait_for_ranks


def describe(seconds: list[float]) -> str:
    """Median and worst."""
    if not seconds:
        return "no figures"
    return f"{len(seconds)} kills: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"


def main() -> int:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verdict", "recovery", "soak", "faults"))
    parser.add_argument("checkpoint")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of each of 4 prompts")
    parser.add_argument("--timeout", type=float, default=20, help="--timeout of the runs, seconds")
    parser.add_argument("--seconds", type=float, default=3600, help="end after that time, whatever has been done")
    parser.add_argument("--rounds", type=int, default=3, help="how often each of the faults is made")
    parser.add_argument("--only", action="append", choices=FAULTS, help="of the faults this one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    deadline = time.monotonic() + arguments.seconds
    kills, seconds, faults, ended = 0, [], [], {0: 0, 1: 0}
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        temporary = Path(name) / "tmp"
        temporary.mkdir()
        undisturbed = start(arguments, Path(name), 0, temporary)
        began = time.monotonic()
        if undisturbed.finish() != 0:
            print(undisturbed.read("stderr"), file=sys.stderr)
            return 2
        length, reference = time.monotonic() - began, undisturbed.read("out.jsonl")
        print(f"undisturbed: {length:.1f} s", file=sys.stderr)
        if arguments.what == "faults":
            bench = Bench(arguments, Path(name), temporary, reference, length)
            wrong = run_faults(bench, arguments.only or list(FAULTS), arguments.rounds, deadline)
            print(f"{wrong} faults")
            return 1 if wrong else 0
        while kills < arguments.kills and time.monotonic() < deadline:
            restarts = {"verdict": 0, "recovery": 1, "soak": random.randrange(3)}[arguments.what]
            run = start(arguments, Path(name), restarts, temporary)
            if arguments.what == "soak":
                for _ in range(restarts + random.randrange(2)):
                    time.sleep(random.uniform(0, length))
                    kills += run.hit(random.choice(SIGNALS)) is not None
            else:
                # At any moment from the start of the ranks to shortly before their end.
                started = wait_for_ranks(run, arguments.workers)
                low, high = (0.0, 0.6) if arguments.what == "verdict" else (0.35, 0.7)
                time.sleep(random.uniform(low, high) * length if started else 0)
                at = run.hit(signal.SIGKILL)
            code = run.finish()
            finished_at = time.time()
            if arguments.what != "soak" and at is not None:
                kills += 1
                if arguments.what == "verdict" and code == 1:
                    seconds.append(finished_at - at)
                elif arguments.what == "recovery" and code == 0:
                    seconds += json.loads(run.read("stats.json"))["recovery_seconds"]
            faults += check(run, code, reference)
            ended[code or 0] = ended.get(code or 0, 0) + 1
            print(f"{kills} kills, {sum(ended.values())} runs, {len(faults)} faults", file=sys.stderr, flush=True)
        left = [path.name for path in temporary.iterdir()]
        if left:
            faults.append(f"folders left: {left}")
        for fault in faults:
            print(fault)
    print(f"{arguments.what}: {describe(seconds)}" if arguments.what != "soak" else f"soak: {kills} kills", end="; ")
    print(f"{ended[0]} runs ended with all tokens, {ended[1]} with a verdict, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""The largest memory that quantizing takes, on a random model of a given shape, against the size of its decoder layers.

    python scripts/bench/quantize_memory.py MODEL_CONFIG.json [--approaches rtn-a16w8 smooth_quant gptq] [--layers 4]

Prints one JSON object an approach. Anonymous memory is counted (RssAnon): pages of the mapped input are not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from random_checkpoint import write_random_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--approaches", nargs="+", default=["rtn-a16w8", "smooth_quant", "gptq"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    raw = {**json.loads(arguments.config.read_text()), "num_hidden_layers": arguments.layers, "torch_dtype": "float16"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = write_random_checkpoint(folder / "float", raw).tensors
        layer_bytes = sum(2 * info.num_bytes for name, info in tensors.items() if name.startswith("model.layers.0."))
        ids = np.random.default_rng(0).integers(0, raw["vocab_size"], (arguments.samples, arguments.tokens))
        np.save(folder / "ids.npy", ids)
        for approach in arguments.approaches:
            data = [] if approach == "rtn-a16w8" else ["-t", "ids", "-s", folder / "ids.npy"]
            command = [sys.executable, "-m", "launcher", "quantize", "--checkpoint", folder / "float", "-a", approach, *data]
            command += ["--output", folder / approach, "--log-dir", folder / "log"]
            started = time.perf_counter()
            peaks = watch([str(word) for word in command])
            activations = 0 if not data else ids.size * raw["hidden_size"] * 4
            rank, idle = peaks["rank"], peaks["idle"]
            print(
                json.dumps(
                    {
                        "approach": approach,
                        "layer_float32_bytes": layer_bytes,
                        "calibration_activation_bytes": activations,
                        "rank_peak_anonymous_bytes": rank,
                        "rank_idle_anonymous_bytes": idle,
                        "layers_held": round((rank - idle - activations) / layer_bytes, 2),
                        "parent_peak_anonymous_bytes": peaks["parent"],
                        "seconds": round(time.perf_counter() - started, 1),
                    }
                ),
                flush=True,
            )


def watch(command: list[str]) -> dict[str, int]:
    """Run `command`; the largest anonymous memory of it and of its rank, and the rank's with PyTorch imported and no work."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"parent": 0, "rank": 0, "idle": idle_bytes()}
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for entry in Path("/proc").iterdir():
                try:
                    words = (entry / "comm").read_bytes() if entry.name.isdecimal() else b""
                except OSError:
                    continue
                kind = "parent" if entry.name == str(process.pid) else "rank" if words.startswith(b"tandem rank ") else None
                if kind:
                    peaks[kind] = max(peaks[kind], read_anonymous(entry / "status"))
            time.sleep(0.01)

    watcher = threading.Thread(target=look)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"tandem quantize ended with {code}")
    return peaks


def idle_bytes() -> int:
    """Anonymous memory of a process that has imported what a rank imports."""
    code = "import launcher.worker.run, pathlib; print(pathlib.Path('/proc/self/status').read_text())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return parse_anonymous(text)


def read_anonymous(path: Path) -> int:
    try:
        return parse_anonymous(path.read_text())
    except OSError:
        return 0


def parse_anonymous(status: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    main()

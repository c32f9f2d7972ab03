"""What growth.py measures: one call of `tandem bench` a point, and the file that keeps the answers so that none is measured twice.

The file has a JSON line a point: its key, machine, date, and the whole answer.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.config import read_config
from tandem_bench import DECODE_PROMPT_TOKENS, OWN_COMMAND, BenchCall

SHAPES = Path(__file__).resolve().with_name("shapes")
TINY, SMALL, MIDDLE, LARGE = "smollm2_0.1b", "tinyllama_1.1b", "llama2_7b", "llama2_70b"
LARGE_LAYERS = (2, 4)
"""Of the 70B shape this many fit: the step of all layers follows from the difference."""
RANKS = (1, 2, 4, 8)
CONTEXTS = (128, 512, 1024, 2048, 4096)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One call. A point of several panels is measured once."""

    shape: str
    workers: int
    threads_per_rank: int
    num_layers: int | None = None
    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 3

    @property
    def key(self) -> str:
        """Two points with the same key are the same measurement."""
        layers = "" if self.num_layers is None else f", {self.num_layers} layers"
        batches = "+".join(map(str, self.batch_sizes))
        ranks = f"{self.workers}x{self.threads_per_rank}"
        return f"{self.shape}{layers}, {ranks}, batch {batches}, {self.prompt_tokens}+{self.new_tokens} tokens, {self.rounds} rounds"

    @property
    def decode_context_tokens(self) -> int:
        """Tokens behind a sequence in the median step of decoding."""
        return DECODE_PROMPT_TOKENS + self.new_tokens // 2

    def measure(self, command: str = OWN_COMMAND) -> dict[str, Any]:
        """The answer. Raises BenchError."""
        raw = read_config(SHAPES / f"{self.shape}.json")
        # A context beyond the model's own costs the same as one inside.
        needed = max(self.prompt_tokens, DECODE_PROMPT_TOKENS + self.new_tokens) + max(self.batch_sizes) + 1
        raw["max_position_embeddings"] = max(raw["max_position_embeddings"], needed)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = Path(folder) / f"{self.shape}.json"
            path.write_text(json.dumps(raw), encoding="utf-8")
            call = BenchCall(
                model_config=path,
                workers=self.workers,
                threads_per_rank=self.threads_per_rank,
                num_layers=self.num_layers,
                batch_sizes=self.batch_sizes,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                rounds=self.rounds,
            )
            return call.run(command)


def list_points(cores: int) -> dict[str, dict[float, Point]]:
    """Panel: value on its axis: point. Everywhere but for the number of ranks, a rank a core up to two ranks."""
    usual = {"workers": min(2, cores), "threads_per_rank": max(1, cores // 2)}
    sizes: dict[float, Point] = {0.1: Point(shape=TINY, **usual), 1.1: Point(shape=SMALL, **usual), 7: Point(shape=MIDDLE, **usual)}
    # 70 is no single measurement: both are needed for it, so they stand under their layers.
    sizes |= {-layers: Point(shape=LARGE, num_layers=layers, **usual) for layers in LARGE_LAYERS}
    return {
        "ranks": {ranks: Point(shape=SMALL, workers=ranks, threads_per_rank=max(1, cores // ranks)) for ranks in RANKS},
        # tandem bench decodes behind a short prompt: with twice the context as new tokens, the median step has the context behind it.
        "context": {
            context: Point(shape=SMALL, prompt_tokens=context, new_tokens=2 * (context - DECODE_PROMPT_TOKENS), rounds=1, **usual)
            for context in CONTEXTS
        },
        "batch": {0: Point(shape=SMALL, batch_sizes=BATCH_SIZES, **usual)},
        "size": sizes,
    }


class AnswerFile:
    """Answers by key; one is added as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line at which a run was killed
            self.answers[row["key"]] = row["answer"]

    def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps({"key": key, "answer": answer}) + "\n")
        self.answers[key] = dict(answer)


def read_speed(answer: Mapping[str, Any], batch_size: int = 1) -> float:
    """Decode tokens a second."""
    return float(next(row["tokens_per_second"] for row in answer["decode"] if row["batch_size"] == batch_size))


def scale_layers(few: tuple[int, float], more: tuple[int, float], num_layers: int) -> float:
    """Tokens a second of a model from two of fewer layers, (layers, tokens a second): the time of a step is linear in layers."""
    (few_layers, few_speed), (more_layers, more_speed) = few, more
    layer_seconds = (1 / more_speed - 1 / few_speed) / (more_layers - few_layers)
    return 1 / (1 / more_speed + (num_layers - more_layers) * layer_seconds)

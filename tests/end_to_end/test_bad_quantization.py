"""What users get wrong about quantization, int8 caches and evaluation: exit code 2 and a sentence, before anything starts or is written.

Commands run in this process; that real ones end so is shown by test_bad_input.py.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, write_scheme

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints

Command = Sequence[str | Path]
DYNAMIC = Scheme(LinearScheme(packed=False, activation="token"), ("lm_head",))
STATIC_CACHE = Scheme(None, (), "channel")


@dataclass(frozen=True)
class Mistake:
    """A command with something wrong about it."""

    make: Callable[["Checkpoints", Path], Command]
    """The arguments of tandem, from the good checkpoints and an empty folder."""
    names: tuple[str, ...]
    """What the message has to hold, as regular expressions."""
    usage: bool = False
    """Whether the option parser itself answers, which shows the usage first."""


def _quantize(words: str, *names: str, usage: bool = False) -> Mistake:
    return Mistake(lambda good, folder: ["quantize", "--checkpoint", good.float, *words.split(), "--output", folder / "made"], names, usage)


def _with_data(words: str, kind: str, write: Callable[[Path], object] | None, *names: str) -> Mistake:
    """`write` makes the file of the data."""

    def make(good: "Checkpoints", folder: Path) -> Command:
        path = folder / ("data.npy" if kind == "ids" else "data.txt")
        if write is not None:
            write(path)
        return ["quantize", "--checkpoint", good.float, *words.split(), "-t", kind, "-s", path, "--output", folder / "made"]

    return Mistake(make, names)


def _ids(values: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.array(values))


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _declared(good: "Checkpoints", folder: Path, scheme: Scheme) -> Path:
    """The int8 checkpoint with another config.json: what it declares is held against the YAML before tensors are looked at."""
    target = folder / "checkpoint"
    shutil.copytree(good.int8, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": write_scheme(scheme)}))
    return target


def _smooth_yaml(good: "Checkpoints", folder: Path) -> Path:
    path = folder / "smooth.yaml"
    text = good.int8_config.read_text().replace("'rtn'", "'smooth_quant'").replace("activation_dtype: None", "activation_dtype: 'int8'")
    path.write_text(text.replace("outliers_suppression: None", "outliers_suppression: 'smooth'"))
    return path


def _real_file(command: str, *more: str) -> Callable[["Checkpoints", Path], Command]:
    """A command on a .ckpt without a YAML."""

    def make(good: "Checkpoints", folder: Path) -> Command:
        # One tensor of MindSpore's format: norm_out.weight, Float32, four bytes.
        tensor = b"\x08\x01\x12\x07Float32\x1a\x04\0\0\x80\x3f"
        value = b"\x0a\x15model.norm_out.weight\x12" + bytes([len(tensor)]) + tensor
        (folder / "model.ckpt").write_bytes(b"\x0a" + bytes([len(value)]) + value)
        path = folder / "model.ckpt"
        return [command, path, folder / "made"] if command == "convert" else [command, "--checkpoint", path, *more]

    return make


def _evaluate(words: str, write: Callable[[Path], object] | None, *names: str, usage: bool = False) -> Mistake:
    def make(good: "Checkpoints", folder: Path) -> Command:
        if write is not None:
            write(folder / "data.txt")
        return ["eval", "--checkpoint", good.float, *words.replace("DATA", str(folder / "data.txt")).split()]

    return Mistake(make, names, usage)


RECORD = '{"question": "a", "title": "b", "passage": "c", "answer": true}\n'
LONG_TEXT = _text("I love Beijing, because the streets are wide. " * 30)

MISTAKES = {
    # words
    "no approach": _quantize("", r"approach '' is unknown", "rtn-a16w8, rtn-c8, smooth_quant, ptq, gptq, awq", "option -a"),
    "unknown approach": _quantize("-q omni_quant", "'omni_quant'", "smooth_quant"),
    "data not given": _quantize("-a gptq --group-size 16", "-a gptq needs calibration data", "-t boolq", "-s FILE"),
    "kind of data, but no file": _quantize("-a smooth_quant -t boolq", "-a smooth_quant needs calibration data"),
    "cache without data": _quantize("-a rtn-c8", "-a rtn-c8 needs calibration data"),
    "-w with gptq": _quantize("-a gptq -w int8 -t ids -s x.npy", "-w does not go with -a gptq", "it does with ptq"),
    "-k with smooth_quant": _quantize("-a smooth_quant -k int8", "-k does not go with -a smooth_quant", "rtn-a16w8, ptq, gptq"),
    "--act-quant-dtype with rtn-a16w8": _quantize("-a rtn-a16w8 --act-quant-dtype int8", "--act-quant-dtype does not go", "with ptq"),
    "--outliers with awq": _quantize("-a awq --outliers smooth", "--outliers does not go with -a awq"),
    "--alpha with a8w8": _quantize("-a a8w8 --alpha 0.5", "--alpha does not go with -a a8w8", "smooth_quant, ptq"),
    "--fold with gptq": _quantize("-a gptq --fold", "--fold does not go with -a gptq"),
    "--group-size with rtn-a16w8": _quantize("-a rtn-a16w8 --group-size 64", "--group-size does not go", "gptq, awq, rtn-a16w4"),
    "--asymmetric with rtn-a16w8": _quantize("-a rtn-a16w8 --asymmetric", "--symmetric/--asymmetric does not go with -a rtn-a16w8"),
    "unknown type of weights": _quantize("-a ptq -w int4", "--weight-quant-dtype is 'int4'", "int8 or none"),
    "unknown outliers": _quantize("-a ptq -w int8 --outliers awq", "--outliers is 'awq'", "smooth or none"),
    "unknown granularity": _quantize("-a rtn-c8 --kvcache-granularity per_head", "'per_head'", "per_channel or per_token"),
    "alpha above 1": _quantize("-a smooth_quant --alpha 1.5", r"alpha is 1\.5", "from 0 to 1"),
    "ptq of nothing": _quantize("-a ptq", "A16W16", "A16W8 or A8W8 or C8"),
    "ptq of activations alone": _quantize("-a ptq --act-quant-dtype int8", "A8W16", "A16W8 or A8W8 or C8"),
    "no samples": _quantize("-a gptq --num-samples 0", "--num-samples", "at least 1"),
    # what does not fit the checkpoint
    "groups that do not divide": _quantize("-a rtn-a16w4 --group-size 32", "144 input channels", "groups of 32", "group size"),
    "default groups that do not divide": _quantize("-a rtn-a16w4", "144 input channels", "groups of 128"),
    "group size of nothing": _quantize("-a rtn-a16w4 --group-size 0", "--group-size is 0", "at least 1"),
    "blacklist that leaves nothing": _quantize(
        "-a rtn-a16w8 --not-converted proj lm_head", "'proj', 'lm_head'", "leaves nothing to quantize"
    ),
    "more ranks than heads": _quantize("-a rtn-a16w8 --workers 10", r"\b10 ranks", r"\b9 query heads"),
    "int8 quantized again": Mistake(
        lambda good, folder: ["quantize", "--checkpoint", good.int8, "-a", "a8w8", "--output", folder / "made"],
        (r"int8 is quantized already \(rtn-a16w8\)", "float checkpoint"),
    ),
    "target that exists": Mistake(
        lambda good, folder: ["quantize", "--checkpoint", good.float, "-a", "a8w8", "--output", good.int8],
        ("int8 exists already", "--overwrite"),
    ),
    # data
    "unknown kind of data": _with_data("-a smooth_quant", "gsm8k", _text("x"), "'gsm8k' is unknown", r"boolq, squad1\.1, wikitext2, ids"),
    "missing data": _with_data("-a smooth_quant", "boolq", None, r"data\.txt does not exist"),
    "boolq that is no JSON": _with_data("-a smooth_quant", "boolq", _text(RECORD + "yes\n"), r"data\.txt, line 2 is not JSON"),
    "boolq without answers": _with_data("-a smooth_quant", "boolq", _text(RECORD.replace("answer", "reply")), "line 1: answer is missing"),
    "empty data": _with_data("-a smooth_quant", "boolq", _text("\n"), r"data\.txt holds no sample"),
    "squad that is a list": _with_data("-a rtn-c8", "squad1.1", _text("[]"), "data is missing"),
    "unknown ids": _with_data("-a rtn-c8", "ids", _ids([[1, 2], [3, 300]]), "row 1 has id 300", "the vocabulary has 300"),
    "ids that are no integers": _with_data("-a rtn-c8", "ids", _ids([[1.0, 2.0]]), "float64", "integers"),
    "ids in one row": _with_data("-a rtn-c8", "ids", _ids([1, 2]), r"shape \[2\]", r"\[samples, length\]"),
    "ids that are text": _with_data("-a rtn-c8", "ids", _text("1 2 3"), r"data\.npy cannot be read as a \.npy file"),
    # YAML and checkpoint
    "rtn asked of int8 activations": Mistake(
        lambda good, folder: ["predict", "-c", good.int8_config, "--checkpoint", _declared(good, folder, DYNAMIC)],
        (r"rtn \(A16W8\)", r"A8W8 \(a8w8-dynamic\)", "remove quantization_config"),
    ),
    "rtn asked of a cache alone": Mistake(
        lambda good, folder: ["predict", "-c", good.int8_config, "--checkpoint", _declared(good, folder, STATIC_CACHE)],
        (r"rtn \(A16W8\)", "float weights", "-a rtn-a16w8"),
    ),
    "smooth_quant asked of a float checkpoint": Mistake(
        lambda good, folder: ["predict", "-c", _smooth_yaml(good, folder), "--checkpoint", good.float],
        (r"smooth_quant \(A8W8\)", "float weights", r"tandem quantize -c \S+smooth\.yaml --checkpoint \S+float -a smooth_quant$"),
    ),
    "smooth_quant asked of int8 weights": Mistake(
        lambda good, folder: [
            "eval",
            "--task",
            "perplexity",
            "--data",
            good.config,
            "-c",
            _smooth_yaml(good, folder),
            "--checkpoint",
            good.int8,
        ],
        (r"smooth_quant \(A8W8\)", r"A16W8 \(rtn-a16w8\)"),
    ),
    "unknown type of the cache": Mistake(
        lambda good, folder: ["predict", "--checkpoint", good.float, "--kv-cache-dtype", "fp8"],
        ("kv-cache-dtype is 'fp8'", "auto, int8, float"),
    ),
    "predict a .ckpt without YAML": Mistake(_real_file("predict"), (r"model\.ckpt", r"-c\b|--config")),
    "quantize a .ckpt without YAML": Mistake(_real_file("quantize", "-a", "rtn-a16w8"), (r"model\.ckpt", r"-c\b|--config")),
    "convert a .ckpt without YAML": Mistake(_real_file("convert"), (r"model\.ckpt", r"-c\b|--config")),
    # evaluation
    "no task": _evaluate("--data DATA", LONG_TEXT, "--task is missing", "boolq or perplexity"),
    "unknown task": _evaluate("--task mmlu --data DATA", LONG_TEXT, "--task is 'mmlu'", "boolq or perplexity"),
    "no data": _evaluate("--task perplexity", None, "--data"),
    "missing text": _evaluate("--task perplexity --data DATA", None, r"data\.txt does not exist"),
    "missing questions": _evaluate("--task boolq --data DATA", None, r"data\.txt does not exist"),
    "text for questions": _evaluate("--task boolq --data DATA", LONG_TEXT, r"data\.txt, line 1 is not JSON"),
    "no questions": _evaluate("--task boolq --data DATA", _text(""), r"data\.txt holds no question"),
    "text of one token": _evaluate("--task perplexity --data DATA", _text(""), r"data\.txt has 1 tokens", "at least 2"),
    "text that is no UTF-8": _evaluate(
        "--task perplexity --data DATA", lambda path: path.write_bytes(b"\xff\xfe"), r"data\.txt cannot be read as UTF-8"
    ),
    "window too short": _evaluate("--task perplexity --data DATA --window 1", LONG_TEXT, "--window is 1", "from 2 to 2048"),
    "window too long": _evaluate("--task perplexity --data DATA --window 4096", LONG_TEXT, "--window is 4096", "from 2 to 2048"),
    "limit of nothing": _evaluate("--task perplexity --data DATA --limit 0", LONG_TEXT, "--limit is 0", "at least 1"),
    "unknown cache of an evaluation": _evaluate(
        "--task perplexity --data DATA --kv-cache-dtype int4", LONG_TEXT, "kv-cache-dtype is 'int4'", "auto, int8, float"
    ),
    "batch of nothing": _evaluate("--task perplexity --data DATA --max-batch-size 0", LONG_TEXT, "--max-batch-size is 0", "at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_ends_with_code_2_and_a_sentence_before_anything_starts(refuse: Callable[..., None], mistake: Mistake) -> None:
    refuse(mistake.make, mistake.names, mistake.usage)

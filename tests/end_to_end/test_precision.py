"""--activations int8 and --lm-head int8: the bits of the checkpoints that store them, for any number of ranks, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem


@pytest.fixture(scope="module")
def stored(tandem: "Tandem", checkpoints: "Checkpoints") -> dict[str, Path]:
    """Checkpoints that store what the options ask for at run time."""
    folder = tandem.new_folder()
    words = {
        "a8w8": ("-a", "a8w8"),
        "int8 head": ("-a", "rtn-a16w8", "--lm-head", "int8"),
        "both": ("-a", "a8w8", "--lm-head", "int8"),
    }

    def quantize(name: str) -> Path:
        target = folder / name.replace(" ", "-")
        result = tandem.run("quantize", "--checkpoint", checkpoints.float, *words[name], "--output", target, "--workers", "2")
        assert result.returncode == 0, result.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(words, pool.map(quantize, words), strict=True))


def _predict(tandem: "Tandem", folder: Path, workers: int, *options: str) -> "Outcome":
    common = ("--threads-per-rank", "1", "--max-new-tokens", "8", "--dtype", "bfloat16", "--logprobs")
    return tandem.predict("--checkpoint", folder, "--workers", str(workers), *common, *options)


def test_precisions_asked_for_are_those_of_checkpoints_that_store_them_for_any_number_of_ranks(
    tandem: "Tandem", checkpoints: "Checkpoints", stored: dict[str, Path]
) -> None:
    runs: list[tuple[Path, int, tuple[str, ...]]] = [
        (stored["a8w8"], 1, ()),
        (checkpoints.int8, 3, ("--activations", "int8")),
        (stored["int8 head"], 2, ()),
        (checkpoints.int8, 1, ("--lm-head", "int8")),
        (stored["both"], 1, ()),
        (stored["int8 head"], 2, ("--activations", "int8")),
        (checkpoints.int8_two_ranks, 3, ("--activations", "int8", "--lm-head", "int8")),
    ]
    with ThreadPoolExecutor(2) as pool:
        dynamic, activations, head, loaded, both, partly, three = pool.map(lambda run: _predict(tandem, run[0], run[1], *run[2]), runs)
    assert activations.jsonl == dynamic.jsonl
    assert loaded.jsonl == head.jsonl
    assert three.jsonl == partly.jsonl == both.jsonl
    assert len({str(outcome.jsonl) for outcome in (dynamic, head, both)}) == 3
    assert [outcome.stats["quantization"] for outcome in (activations, loaded, three)] == [
        "a8w8-dynamic",
        "rtn-a16w8-h8",
        "a8w8-dynamic-h8",
    ]
    assert both.stats["quantization"] == partly.stats["quantization"] == "a8w8-dynamic+rtn-a16w8"
    assert both.stats["weight_bytes"] == loaded.stats["weight_bytes"]
    assert sum(three.stats["weight_bytes"]) < sum(activations.stats["weight_bytes"])


@pytest.mark.parametrize("command", ["predict", "eval", "bench", "serve", "chat", "batch"])
def test_int8_activations_of_float_weights_are_refused(refuse: "Callable[..., None]", command: str) -> None:
    words = {
        "eval": ("--task", "perplexity", "--data", "{file}"),
        "batch": ("{batch}", "--output", "{folder}/out.jsonl"),
    }

    def make(checkpoints: "Checkpoints", folder: Path) -> list[str | Path]:
        (folder / "text.txt").write_text("a b c\n")
        (folder / "requests.jsonl").write_text('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}\n')
        places = {"file": folder / "text.txt", "batch": folder / "requests.jsonl", "folder": folder}
        given = [word.format(**places) for word in words.get(command, ())]
        return [command, *given, "--checkpoint", checkpoints.float, "--activations", "int8"]

    refuse(make, ["--activations is int8, but the checkpoint holds float weights.*tandem quantize"], usage=False)


def test_a_float_head_cannot_be_kept_and_quantized(refuse: "Callable[..., None]") -> None:
    refuse(
        lambda checkpoints, folder: [
            *("quantize", "--checkpoint", checkpoints.float, "-a", "rtn-a16w8", "-b", "lm_head", "--lm-head", "int8"),
            *("--output", folder / "out"),
        ],
        ["--lm-head is int8, but -b lm_head keeps the output head in float"],
        usage=False,
    )


def test_a_quantized_head_needs_quantized_linears(refuse: "Callable[..., None]") -> None:
    refuse(
        lambda checkpoints, folder: [
            *("quantize", "--checkpoint", checkpoints.float, "-a", "rtn-c8", "--lm-head", "int8", "-t", "ids", "-s", checkpoints.config),
            *("--output", folder / "out"),
        ],
        ["--lm-head is int8, but rtn-c8 stores no integer weights"],
        usage=False,
    )


@pytest.mark.parametrize("flag", ["--activations", "--lm-head"])
def test_a_wrong_precision_names_the_right_ones(refuse: "Callable[..., None]", flag: str) -> None:
    refuse(
        lambda checkpoints, folder: ["predict", "--checkpoint", checkpoints.int8, flag, "int4"],
        [f"{flag} is 'int4', but has to be auto or int8"],
        usage=False,
    )

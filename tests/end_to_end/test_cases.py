"""The shared cases that no other end-to-end test runs: the right result on three ranks, or a refusal that names the cause."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.servers import Server
from tests.end_to_end.test_formats import find_case

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

PROMPT = "Once upon a time"
TOKENS = {
    "09-head-dim-odd-vocab": [77, 274, 452, 77, 182, 130, 194, 502, 236, 70, 342, 328, 511, 511, 151, 24, 28, 499, 342, 435],
    "10b-gptq-dynamic-negative": [255, 316, 49, 146, 220, 386, 30, 33, 196, 454, 23, 267, 382, 357, 295],
    "13-modelopt-fp8": [255, 146, 381, 33, 501, 233, 3, 310, 146, 381, 80, 357, 462, 471, 322, 159, 30, 67, 208, 186],
    "15d-ct-asym-int4": [180, 33, 33, 158, 503, 157, 33, 33, 151, 471, 106, 461],
    "18b-gguf-rope-scaling-linear": [432, 383, 286, 261, 376, 298, 315, 421, 414, 294],
}
"""New tokens, from each CASE.md; those of 13 from transformers with dequantized weights."""
PROMPT_IDS = {
    "05-added-token-not-in-json": (
        "<|im_start|>user\nOnce upon a time<|im_end|>",
        [1, 512, 318, 419, 285, 13, 441, 416, 331, 407, 261, 378, 513],
    ),
    "24-sp-legacy-false": ("Once upon</s>a time", [1, 403, 407, 2, 412, 378]),
}
"""A prompt and its ids."""
REFUSALS = {
    "12d-gptq-v1-name-v2-zeros": r"are not 8, but 9, .* set checkpoint_format to 'gptq_v2'",
    "15e-ct-zero-points-but-symmetric": r"declares symmetric values, but .* set symmetric to false in config\.json",
    "19-gguf-qkv-bias": r"holds blk\.0\.attn_q\.bias, but biases are not supported in GGUF files of llama",
}
MINDFORMERS = (
    "L09-dp2-replicas",
    "L14-ms-safetensors-param-map",
    "L16-ms-safetensors-ranks",
    "L21-msmodelslim-w8a16",
)


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("name", ["09-head-dim-odd-vocab"])
def test_one_rank_and_three_decode_the_right_tokens(tandem: "Tandem", shared_dir: Path, name: str, workers: str) -> None:
    assert decode(tandem, shared_dir, name, workers) == TOKENS[name]


@pytest.mark.parametrize("name", [name for name in TOKENS if not name.startswith("09")])
def test_three_ranks_decode_the_right_tokens(tandem: "Tandem", shared_dir: Path, name: str) -> None:
    assert decode(tandem, shared_dir, name, "3") == TOKENS[name]


def decode(tandem: "Tandem", shared: Path, name: str, workers: str) -> list[int]:
    arguments = ("--workers", workers, "--dtype", "float32", "--prompt", PROMPT, "--max-new-tokens", str(len(TOKENS[name])))
    (record,) = tandem.predict("--checkpoint", find_case(shared, name), *arguments).records
    found: list[int] = record["token_ids"]
    return found


@pytest.mark.parametrize("name", PROMPT_IDS)
def test_prompts_become_the_right_ids(tandem: "Tandem", shared_dir: Path, name: str) -> None:
    prompt, ids = PROMPT_IDS[name]
    arguments = ("--workers", "1", "--prompt", prompt, "--max-new-tokens", "2")
    (record,) = tandem.predict("--checkpoint", find_case(shared_dir, name), *arguments).records
    assert record["prompt_token_ids"] == ids


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_supported_is_refused_before_a_rank_starts(refuse: Callable[..., None], shared_dir: Path, name: str) -> None:
    case = find_case(shared_dir, name)

    def make(checkpoints: "Checkpoints", folder: Path) -> Sequence[str | Path]:
        return ["predict", "--checkpoint", case, "--prompt", PROMPT]

    refuse(make, [REFUSALS[name]], False)


def test_logits_that_are_not_finite_end_a_prompt_with_an_error(tandem: "Tandem", shared_dir: Path) -> None:
    folder = tandem.new_folder()
    case = find_case(shared_dir, "08-fp16-overflow")
    options = ("--workers", "2", "--dtype", "float16", "--prompt", PROMPT, "--max-new-tokens", "12", "--logprobs")
    result = tandem.run_command(tandem.predict_command(folder, "--checkpoint", case, *options))
    assert result.returncode == 1, result.stderr
    assert (
        "the logits are NaN or infinite in float16 at step 1, first behind layer 2 of 5: use --dtype bfloat16 or float32" in result.stderr
    )
    for line in (folder / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize("name", MINDFORMERS)
def test_layouts_of_mindformers_decode_stories260k(tandem: "Tandem", stories: Path, shared_dir: Path, name: str) -> None:
    cases = shared_dir / "cases" / "mindformers"
    if not (cases / name).is_dir():
        pytest.skip(f"no cases/mindformers/{name} among the shared data")
    truth = next(item for item in json.loads((stories / "golden_greedy_fp32.json").read_text())["items"] if len(item["prompt"]) > 5)
    config = () if (cases / name / "config.json").is_file() else ("-c", cases / "fused.yaml")
    arguments = ("--workers", "3", "--dtype", "float32", "--prompt", truth["prompt"], "--max-new-tokens", "24", "--greedy")
    (record,) = tandem.predict(*config, "--checkpoint", cases / name, *arguments).records
    expected = truth["new_ids"][:5] if not config else truth["new_ids"][:24]  # int8 differs later
    assert record["token_ids"][: len(expected)] == expected


def test_requests_of_other_programs_are_answered(tandem: "Tandem", shared_dir: Path) -> None:
    model = find_case(shared_dir, "23-server-requests")
    asked = re.findall(r"POST (\S+) '(.*)'", (model.parent / "CASE.md").read_text(encoding="utf-8"))
    server = Server(tandem, "--checkpoint", model, "--dtype", "float32", "--workers", "1")
    try:
        server.wait_until_ready()
        answers = [server.ask("POST", path, json.loads(body)) for path, body in asked]
    finally:
        server.end()
    assert [status for status, _, _ in answers] == [200] * 6
    for (_, _, answer), new in zip(answers[:2], (0, 1), strict=True):
        first, *rest = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert first is None and len(rest) == 4 + new and all(-1 < value <= 0 for value in rest)


def test_every_case_is_in_a_test(shared_dir: Path) -> None:
    cases = shared_dir / "cases"
    if not cases.is_dir():
        pytest.skip("no cases among the shared data")
    tests = Path(__file__).resolve().parents[1]
    text = "".join(file.read_text(encoding="utf-8") for file in tests.rglob("test_*.py"))
    names = [path.parent.name for path in cases.glob("*/CASE.md")]
    names += [path.name for path in (cases / "mindformers").iterdir() if path.is_dir()]
    missing = [name for name in names if name.removesuffix("-1.3-order").removesuffix("-1.4-order") not in text]
    assert names and missing == []

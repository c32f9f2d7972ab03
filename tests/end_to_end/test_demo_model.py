"""SmolLM2-135M out of its GGUF file, the model of scripts/demo.sh: converted, quantized, and decoded on several ranks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem

pytestmark = pytest.mark.slow

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = PROJECT_ROOT / "configs" / "smollm2_135m_rtn.yaml"
PROMPTS = ("The capital of France is", "Water boils at a temperature of")
NUM_NEW = 20


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The file named by TANDEM_SMOLLM2_GGUF, else the one that scripts/demo.sh leaves."""
    path = Path(os.environ.get("TANDEM_SMOLLM2_GGUF") or PROJECT_ROOT / "output" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.is_file():
        pytest.skip("no SmolLM2 GGUF file: run scripts/demo.sh, or set TANDEM_SMOLLM2_GGUF")
    return path


@pytest.fixture(scope="module")
def converted(tandem: "Tandem", gguf: Path) -> Path:
    """The file as a Hugging Face folder."""
    target = tandem.new_folder() / "smollm2"
    result = tandem.run("convert", gguf, target, "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    return target


def test_greedy_tokens_equal_those_of_transformers_on_any_number_of_ranks(
    tandem: "Tandem", converted: Path, choose_with_transformers: Callable[..., list[list[int]]]
) -> None:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = ("--checkpoint", converted, "--dtype", "float32", "--max-new-tokens", str(NUM_NEW), "--ignore-eos", *prompts)
    outcomes = {workers: tandem.predict(*options, "--workers", str(workers)) for workers in (1, 2)}
    records = outcomes[1].records
    assert [len(record["token_ids"]) for record in records] == [NUM_NEW, NUM_NEW]
    assert "Paris" in records[0]["text"]
    assert {workers: outcome.jsonl for workers, outcome in outcomes.items()} == dict.fromkeys(outcomes, outcomes[1].jsonl)
    ids = [record["prompt_token_ids"] for record in records]
    tokens = [record["token_ids"] for record in records]
    assert choose_with_transformers(converted, ids, tokens) == tokens


def test_a_rank_of_the_int8_checkpoint_needs_little_more_memory_than_its_weights(tandem: "Tandem", converted: Path) -> None:
    int8 = converted.with_name("int8")
    result = tandem.run("quantize", "-c", CONFIG, "--checkpoint", converted, "-a", "rtn-a16w8", "--output", int8)
    assert result.returncode == 0, result.stderr
    options = ("--config", CONFIG, "--checkpoint", int8, "--workers", "2", "--dtype", "bfloat16", "--max-new-tokens", str(NUM_NEW))
    outcome = tandem.predict(*options, "--prompt", PROMPTS[0])
    assert "Paris" in outcome.records[0]["text"]
    stats = outcome.stats
    assert stats["quantization"] == "rtn-a16w8"
    for peak, weights in zip(stats["peak_rss_bytes"], stats["weight_bytes"], strict=True):
        assert peak < 1.25 * weights + 300e6

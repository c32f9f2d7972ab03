"""SmolLM2-135M out of its GGUF file, the model of scripts/demo.sh: converted, quantized, and decoded on several ranks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.servers import Server

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


def test_a_server_answers_a_conversation_as_the_model_was_trained(tandem: "Tandem", converted: Path) -> None:
    options = ("--checkpoint", converted, "--workers", "2", "--dtype", "float32")
    server = Server(tandem, *options)
    question = "What is the capital of France?"
    try:
        assert "the checkpoint's chat template" in server.stderr
        fields = {"model": converted.name, "temperature": 0, "max_tokens": NUM_NEW, "extra_body": {"ignore_eos": True}}
        answer = server.client.chat.completions.create(**fields, messages=[{"role": "user", "content": question}])
    finally:
        server.end()
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    outcome = tandem.predict(*options, "--max-new-tokens", str(NUM_NEW), "--ignore-eos", "--prompt", prompt)
    assert answer.choices[0].message.content == outcome.records[0]["text"]
    assert "Paris" in outcome.records[0]["text"]
    assert answer.usage.prompt_tokens == len(outcome.records[0]["prompt_token_ids"])

"""A really trained model (stories260K): the tokens that transformers was recorded to take, on any number of ranks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_greedy_tokens_equal_the_recorded_ones_of_transformers(tandem: "Tandem", shared_dir: Path, workers: int) -> None:
    folder = shared_dir / "data" / "stories260K-hf"
    golden = json.loads((folder / "golden_greedy_fp32.json").read_text(encoding="utf-8"))
    items = golden["items"]
    prompts = [word for item in items for word in ("--prompt", item["prompt"])]
    outcome = tandem.predict(
        *("--checkpoint", folder, "--workers", str(workers), "--threads-per-rank", "1", "--dtype", "float32", "--greedy"),
        *("--max-new-tokens", str(golden["max_new_tokens"]), *prompts),
    )
    assert outcome.stats["world_size"] == workers
    assert [record["prompt"] for record in outcome.records] == [item["prompt"] for item in items]
    for record, item in zip(outcome.records, items, strict=True):
        assert record["prompt_token_ids"] == item["prompt_ids"]
        assert record["token_ids"] == item["new_ids"]

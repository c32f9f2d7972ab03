"""A family with experts and a window through the whole program: the same tokens for every number of ranks, and after a reshard."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from model.kernels.library import find_kernels
from tests.model.families import MODELS, write_model

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Outcome, Tandem

PROMPT = " ".join(f"t{(13 * i + 5) % 79}" for i in range(20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("mixtral"), "mixtral-window")
    size = MODELS["mixtral-window"][1]["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def predict(tandem: "Tandem", checkpoint: Path, workers: int) -> "Outcome":
    options = ("--greedy", "--dtype", "float32", "--max-new-tokens", "12", "--ignore-eos", "--speculate", "--kv-cache-dtype", "int8")
    return tandem.predict("--checkpoint", checkpoint, "--workers", str(workers), "--prompt", PROMPT, *options)


def test_experts_decode_to_the_same_tokens_on_one_and_three_ranks(tandem: "Tandem", folder: Path, tmp_path: Path) -> None:
    alone = predict(tandem, folder, 1)
    done = tandem.run("reshard", folder, tmp_path / "ranks", "--workers", "2")
    assert done.returncode == 0, done.stderr
    apart = predict(tandem, tmp_path / "ranks", 3)
    assert [record["token_ids"] for record in apart.records] == [record["token_ids"] for record in alone.records]
    assert len(alone.records[0]["token_ids"]) == 12
    if find_kernels() is not None:
        assert apart.stats["kernel"] == "native-float32 (plain: experts)"

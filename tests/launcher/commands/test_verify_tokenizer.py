"""What `tandem verify` says of the tokenizer of a checkpoint whose weights are whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from launcher.commands.verify import verify
from launcher.settings.checkpoint_options import VerifyOptions
from parallel.errors import CheckpointError

VOCABULARY = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with one layer and a tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCABULARY
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, VOCABULARY)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"})
    )
    return tmp_path


def write_tokenizer(folder: Path, size: int, *added: str) -> None:
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{chr(97 + place): place for place in range(2, size)}}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", *added)])
    backend.save(str(folder / "tokenizer.json"))


def run_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    verify(VerifyOptions(checkpoint=folder, deep=False, as_json=False))
    return capsys.readouterr().out.splitlines()


def test_a_checkpoint_with_its_tokenizer_is_ok(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verify(folder, capsys)[-1] == "ok"
    write_tokenizer(folder, VOCABULARY, "[PAD]")
    assert run_verify(folder, capsys)[-1] == "ok", "a padding token beyond the vocabulary is common"


def test_without_any_tokenizer_there_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    lines = run_verify(folder, capsys)
    assert lines[-2].startswith("warning: no tokenizer found: text needs one")
    assert lines[-1] == "weights ok, with warnings"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing next to its settings": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "cut": (lambda folder: cut(folder / "tokenizer.json"), r"is not a tokenizer\.json"),
    "settings cut": (lambda folder: cut(folder / "tokenizer_config.json"), "is not JSON"),
    "too large": (lambda folder: write_tokenizer(folder, VOCABULARY + 1), "has 31 tokens, but the model's vocabulary has 30"),
    "template": (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), "is not UTF-8 text"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_tokenizer_is_a_problem(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    act, words = DAMAGES[damage]
    act(folder)
    with pytest.raises(CheckpointError, match="has 1 problem"):
        run_verify(folder, capsys)
    out = capsys.readouterr().out
    assert out.endswith("not ok\n") and "problem: " in out
    with pytest.raises(CheckpointError, match=words):
        verify(VerifyOptions(checkpoint=folder, deep=False, as_json=True))
    assert json.loads(capsys.readouterr().out)["ok"] is False

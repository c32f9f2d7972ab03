"""What ends an answer: the union of what the checkpoint's files say, and the same as in transformers' generate where that reads them."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from model.checkpoint.formats import open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.text.end_of_text import EndOfText, decide_end_of_text
from model.text.tokenizer import read_tokenizer
from parallel.errors import ConfigError
from tandem import AutoModel

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 512
PROMPT = [1, 403, 407, 261, 378]
IM_END = 300
"""An id of the vocabulary that tests give the name <|im_end|>."""
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


class Files:
    """A copy of the small model whose files can be changed."""

    def __init__(self, stories: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(stories, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)

    def set(self, name: str, **values: Any) -> "Files":
        """Change keys of a JSON file; a value of `...` takes the key out."""
        path = self.folder / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        raw = {key: value for key, value in {**raw, **values}.items() if value is not ...}
        path.write_text(json.dumps(raw))
        return self

    def name_token(self, token_id: int, name: str, *, special: bool = True) -> "Files":
        """Give a token of tokenizer.json another name, and make it an added one."""
        path = self.folder / "tokenizer.json"
        raw = json.loads(path.read_text())
        (old,) = [text for text, number in raw["model"]["vocab"].items() if number == token_id]
        raw["model"]["vocab"] = {name if text == old else text: number for text, number in raw["model"]["vocab"].items()}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in raw["model"]["merges"]]
        raw["model"]["merges"] = [pair for pair in pairs if old not in ("".join(pair), *pair)]
        path.write_text(json.dumps(raw))
        backend = Backend.from_file(str(path))
        token = AddedToken(name, special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
        assert backend.token_to_id(name) == token_id
        backend.save(str(path))
        (self.folder / "tokenizer.model").unlink(missing_ok=True)
        return self

    def decide(self, named: Any = None, *, with_tokenizer: bool = True) -> EndOfText:
        source: CheckpointSource = open_checkpoint(self.folder)
        tokenizer = read_tokenizer(self.folder) if with_tokenizer else None
        return decide_end_of_text(source, VOCAB, named=named, tokenizer=tokenizer, tokenizer_path=self.folder)


@pytest.fixture
def files(stories: Path, tmp_path: Path) -> Files:
    return Files(stories, tmp_path / "model")


@pytest.mark.parametrize("ids", [426, [426], [2, 426], [426, 2], [317, 426, 317]])
def test_ids_of_generation_config_count_with_those_of_config(files: Files, ids: Any) -> None:
    found = files.set("generation_config.json", eos_token_id=ids).decide()
    assert sorted(found.ids) == sorted({2, *(ids if isinstance(ids, list) else [ids])})
    assert found.warnings == ()


def test_config_may_hold_a_list_and_generation_config_nothing(files: Files) -> None:
    assert files.set("config.json", eos_token_id=[5, 7]).decide(with_tokenizer=False).ids == (5, 7)
    assert files.set("generation_config.json", eos_token_id=None).decide(with_tokenizer=False).ids == (5, 7)


def test_the_default_of_llama_counts_only_where_no_file_names_an_id(files: Files) -> None:
    files.set("config.json", eos_token_id=...)
    assert files.decide(with_tokenizer=False).ids == (2,)
    assert files.set("generation_config.json", eos_token_id=7).decide(with_tokenizer=False).ids == (7,)
    files.set("config.json", eos_token_id=None).set("generation_config.json", eos_token_id=None)
    assert files.decide(with_tokenizer=False).ids == ()


def test_the_ids_of_the_yaml_are_all_there_are(files: Files) -> None:
    files.set("generation_config.json", eos_token_id=426)
    assert files.decide(named=9).ids == (9,)
    assert files.decide(named=[9, 10]).ids == (9, 10)


def test_an_end_token_that_only_the_tokenizer_names_counts(files: Files) -> None:
    files.name_token(IM_END, "<|im_end|>").set("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert files.decide().ids == (2,)
    files.set("special_tokens_map.json", eos_token="<|im_end|>")  # which wins over tokenizer_config.json, as in transformers
    assert sorted(files.decide().ids) == [2, IM_END]
    assert files.decide(with_tokenizer=False).ids == (2,)


def test_the_end_of_a_turn_in_the_chat_template_counts(files: Files) -> None:
    files.name_token(IM_END, "<|im_end|>").set("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert files.decide().ids == (2,), "a token alone ends nothing: base models have it too"
    files.set("tokenizer_config.json", chat_template=CHATML)
    assert sorted(files.decide().ids) == [2, IM_END]


def test_the_end_of_a_turn_that_is_plain_text_to_the_tokenizer_is_none(files: Files) -> None:
    assert files.set("tokenizer_config.json", chat_template=CHATML).decide().ids == (2,)


def test_an_id_outside_of_the_vocabulary_is_left_out_with_a_warning(files: Files) -> None:
    found = files.set("generation_config.json", eos_token_id=[426, 128009, -1]).decide()
    assert sorted(found.ids) == [2, 426]
    (warning,) = found.warnings
    assert "generation_config.json ends answers at id 128009, -1, but the vocabulary has 512" in warning


@pytest.mark.parametrize("value", ["426", [2, "426"], 426.0, True, {"id": 2}, [[2]], [None]])
def test_what_is_no_id_is_refused(files: Files, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is .+, but a whole number or a list of them is needed"):
        files.set("generation_config.json", eos_token_id=value).decide()


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[2]", "holds a list"), ("\ufeff", "is not JSON")])
def test_a_damaged_generation_config_is_refused(files: Files, text: str, words: str) -> None:
    (files.folder / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"generation_config.json {words}"):
        files.decide()


def test_settings_that_are_not_read_are_named(files: Files) -> None:
    neutral = {"do_sample": False, "temperature": 1.0, "top_p": None, "top_k": 50, "transformers_version": "4.40", "max_length": 4096}
    assert files.set("generation_config.json", eos_token_id=2, **neutral).decide().warnings == ()
    (warning,) = files.set("generation_config.json", do_sample=True, temperature=0.6, suppress_tokens=[3]).decide().warnings
    assert "do_sample true, temperature 0.6, suppress_tokens [3]" in warning


def generate_with_transformers(folder: Path, count: int) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            row = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, pad_token_id=0)[0]
    return [int(token) for token in row]


@pytest.mark.parametrize("ids", [[2, 426], 317, [421, 315, 2]])
def test_a_model_ends_where_transformers_ends_it(files: Files, ids: Any) -> None:
    files.set("generation_config.json", eos_token_id=ids, do_sample=False)
    (row,) = AutoModel.from_pretrained(files.folder, "float32").generate(PROMPT, max_new_tokens=40)
    assert row.tolist() == generate_with_transformers(files.folder, 40)
    assert len(row) < 45, "it ends early"


def end_at(model: AutoModel, ids: Iterable[int]) -> None:
    model._model.config = dataclasses.replace(model._model.config, eos_token_ids=tuple(ids))


@pytest.fixture(scope="module")
def whole(stories: Path) -> tuple[AutoModel, list[int]]:
    """A model, and 40 tokens that nothing ends."""
    model = AutoModel.from_pretrained(stories, "float32")
    end_at(model, ())
    return model, model.generate(PROMPT, max_new_tokens=40)[0].tolist()


@settings(deadline=None, max_examples=30)
@given(ids=st.sets(st.integers(0, VOCAB - 1) | st.sampled_from([426, 317, 421, 298, 376, 432]), max_size=4))
def test_an_answer_ends_at_the_first_of_the_ids(whole: tuple[AutoModel, list[int]], ids: set[int]) -> None:
    model, row = whole
    end_at(model, ids)
    found = model.generate(PROMPT, max_new_tokens=40)[0].tolist()
    end = next((place for place in range(len(PROMPT), len(row)) if row[place] in ids), len(row) - 1)
    assert found == row[: end + 1]

"""Networks in this process: when weights are read, the arguments of `generate`, tokenizers by name, streamers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint.formats import open_checkpoint
from model.export.mindspore import write_mindspore
from model.spec.config import build_config
from model.spec.scheme import Scheme
from parallel.errors import CheckpointError, ConfigError, RequestError
from tandem.mindformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MindFormerConfig,
    Model,
    Tensor,
    TextIteratorStreamer,
    TextStreamer,
    build_context,
    int32,
    transform_and_load_checkpoint,
)

YAML = """trainer:
  model_name: 'llama2_7b'
load_checkpoint: ''
parallel_config:
  model_parallel: 1
model:
  model_config:
    type: LlamaConfig
    hidden_size: 64
    num_layers: 5
    num_heads: 8
    n_kv_heads: 4
    vocab_size: 512
    intermediate_size: 172
    tie_word_embeddings: True
    seq_length: 96
    max_position_embedding: 512
    pad_token_id: 0
    compute_dtype: "float32"
    max_decode_length: 48
    do_sample: False
  arch:
    type: LlamaForCausalLM
"""
PROMPTS = ["Once upon a time, there was", "Lily likes"]


@pytest.fixture(scope="module")
def folder(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One YAML, one .ckpt and tokenizer.model."""
    folder = tmp_path_factory.mktemp("network")
    source = open_checkpoint(stories)
    write_mindspore(source, build_config(source.config), Scheme(), folder / "llama.ckpt", None, lambda done, total: None)
    (folder / "config.json").unlink()
    (folder / "predict_llama2_7b.yaml").write_text(YAML)
    shutil.copy(stories / "tokenizer.model", folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def network(folder: Path) -> Iterator[LlamaForCausalLM]:
    yield AutoModel.from_pretrained(str(folder), download_checkpoint=False)


def ids_of(tokenizer: LlamaTokenizer, prompts: list[str] = PROMPTS) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(prompts, max_length=96, padding="max_length")["input_ids"]
    return rows


def test_weights_are_read_once_and_late(folder: Path, tokenizer: LlamaTokenizer, tmp_path: Path) -> None:
    made = AutoModel.from_pretrained(folder, download_checkpoint=False)
    assert made.read_bytes == 0
    config = MindFormerConfig(folder / "predict_llama2_7b.yaml")
    shutil.copy(folder / "llama.ckpt", tmp_path / "other.ckpt")
    config.load_checkpoint = str(tmp_path / "other.ckpt")
    data = made.prepare_inputs_for_predict_layout(Tensor(np.ones((2, 96)), int32))
    model = Model(made)
    model.infer_predict_layout(*data)
    assert made.read_bytes == 0
    transform_and_load_checkpoint(config, model, made, data, do_predict=True)
    size = (folder / "llama.ckpt").stat().st_size
    assert 0.95 * size < made.read_bytes < 1.02 * size
    rows = made.generate(ids_of(tokenizer))
    again = AutoModel.from_pretrained(folder).generate(ids_of(tokenizer))  # from its own folder
    assert [row.tolist() for row in rows] == [row.tolist() for row in again]


def test_rows_are_prompts_and_continuations_up_to_the_yamls_length(network: LlamaForCausalLM, tokenizer: LlamaTokenizer) -> None:
    ids = ids_of(tokenizer)
    rows = network.generate(Tensor(ids, int32))
    assert isinstance(rows, list)
    for row, given, text in zip(rows, ids, PROMPTS, strict=True):
        assert row.dtype == np.int32 and len(row) == 48
        assert row.tolist()[: len(tokenizer.encode(text))] == [token for token in given if token]
        assert tokenizer.decode(row).startswith(f"<s>{text}"), "special tokens are kept, as in MindFormers"
        assert tokenizer.decode(row, skip_special_tokens=True).startswith(text)
    made = network.generate(ids, max_new_tokens=4, return_dict_in_generate=True, use_past=True, num_beams=1)
    assert isinstance(made, MindFormerConfig)
    longest = max(len(tokenizer.encode(text)) for text in PROMPTS)
    assert [row.tolist() for row in made.sequences] == [row.tolist()[: longest + 4] for row in rows]
    assert len(network.generate(ids, {"max_length": 40}, max_length=32)[0]) == 32, "arguments override the configuration"


def test_other_end_tokens_end_a_row_and_stay_in_it(network: LlamaForCausalLM, tokenizer: LlamaTokenizer) -> None:
    ids = ids_of(tokenizer, PROMPTS[:1])
    (row,) = network.generate(ids)
    start = len(tokenizer.encode(PROMPTS[0]))
    end = int(row[start + 5])
    stop = row.tolist().index(end, start)
    (cut,) = network.generate(ids, eos_token_id=end)
    assert cut.tolist() == row.tolist()[: stop + 1]
    (same,) = network.generate(ids, eos_token_id=[end, 3])
    assert same.tolist() == row.tolist()[: len(same)]


def test_sampling_follows_the_seed(network: LlamaForCausalLM, tokenizer: LlamaTokenizer) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.1}
        return [row.tolist() for row in network.generate(ids_of(tokenizer), seed=seed, **options)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) == draw(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, "num_beams is 4, but beam search is not supported: set it to 1"),
        ({"output_scores": True}, "output_scores is True, but output_scores is not supported"),
        ({"max_lenght": 9}, r"generate has no option 'max_lenght'; did you mean max_length\?"),
        ({"max_length": 5}, r"max_length is 5, but the longest prompt has \d+ tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but has to be at least 1"),
        ({"top_k": "3"}, "top_k is '3', but a number is needed"),
        ({"top_p": 1.5}, "top_p is 1.5, but has to be above 0 and at most 1"),
        ({"temperature": float("nan")}, "temperature is nan, but a number is needed"),
        ({"eos_token_id": 512}, "stop_token_ids names id 512, but the vocabulary has 512"),
        ({"streamer": object()}, "a streamer and 2 rows, but a streamer takes one sequence"),
    ],
)
def test_what_generate_cannot_do_is_one_sentence(
    network: LlamaForCausalLM, tokenizer: LlamaTokenizer, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        network.generate(ids_of(tokenizer), **options)


def test_ragged_and_foreign_ids_are_refused(network: LlamaForCausalLM) -> None:
    with pytest.raises(RequestError, match=r"rows of lengths \[2, 3\]"):
        network.generate([[1, 5], [1, 5, 6]])
    with pytest.raises(RequestError, match="has id 600, but the vocabulary has 512"):
        network.generate([[1, 600]])


def test_a_streamer_prints_words_as_they_are_complete(
    network: LlamaForCausalLM, tokenizer: LlamaTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ids_of(tokenizer, PROMPTS[:1])
    (row,) = network.generate(ids)
    text = tokenizer.decode(row, skip_special_tokens=True)
    network.generate(ids, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == f"{text}\n"
    parts = TextIteratorStreamer(tokenizer, skip_prompt=True)
    network.generate(ids[0], streamer=parts)
    found = list(parts)
    assert "".join(found) == text.removeprefix(PROMPTS[0]) and len(found) > 5


def test_a_tokenizer_is_found_by_the_models_name(
    folder: Path, tokenizer: LlamaTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml = tmp_path / "config" / "predict.yaml"
    yaml.parent.mkdir()
    yaml.write_text(YAML)
    config = build_context(MindFormerConfig(yaml))
    with pytest.raises(CheckpointError, match=r"no tokenizer 'llama2_7b'.*looked for tokenizer\.json and tokenizer\.model in .*config"):
        LlamaTokenizer.from_pretrained(config.trainer.model_name)
    expected = tokenizer.encode(PROMPTS[0])
    download = tmp_path / "checkpoint_download" / "llama2"
    download.mkdir(parents=True)
    shutil.copy(folder / "tokenizer.model", download)
    assert LlamaTokenizer.from_pretrained("llama2_7b").encode(PROMPTS[0]) == expected
    shutil.rmtree(download)
    for path in (folder / "llama.ckpt", folder):
        config.load_checkpoint = str(path)
        assert LlamaTokenizer.from_pretrained("llama2_7b").encode(PROMPTS[0]) == expected
    config.load_checkpoint = None
    config.processor = {"tokenizer": {"vocab_file": str(folder / "tokenizer.model")}}
    assert LlamaTokenizer.from_pretrained("llama2_7b").encode(PROMPTS[0]) == expected


def test_the_stock_script_builds_its_network_from_the_yaml(folder: Path, network: LlamaForCausalLM, tokenizer: LlamaTokenizer) -> None:
    config = MindFormerConfig(folder / "predict_llama2_7b.yaml")
    config.model.model_config.parallel_config = config.parallel_config
    config.model.model_config.batch_size = 2
    model_config = LlamaConfig(**config.model.model_config)
    model_config.checkpoint_name_or_path = None
    for made in (LlamaForCausalLM(model_config), AutoModel.from_config(config)):
        with pytest.raises(CheckpointError, match=r"the network has no weights: set config\.load_checkpoint"):
            made.generate(ids_of(tokenizer))
        config.load_checkpoint = str(folder / "llama.ckpt")
        transform_and_load_checkpoint(config, Model(made), made, None, do_predict=True)
        config.load_checkpoint = ""
        rows = made.generate(ids_of(tokenizer), max_length=24)
        assert [row.tolist() for row in rows] == [row.tolist()[:24] for row in network.generate(ids_of(tokenizer))]


def test_training_is_refused(folder: Path, network: LlamaForCausalLM) -> None:
    assert network.set_train(False) is network
    with pytest.raises(ConfigError, match="asks for training, but tandem only predicts"):
        network.set_train()
    with pytest.raises(ConfigError, match="called for training, but tandem only predicts: give do_predict=True"):
        transform_and_load_checkpoint(MindFormerConfig(), None, network, None)
    with pytest.raises(ConfigError, match="AutoModel makes networks with"):
        AutoModel()


def test_a_folder_or_option_that_does_not_exist_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="none does not exist"):
        AutoModel.from_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"AutoModel\.from_pretrained has no option 'num_layers'"):
        AutoModel.from_pretrained(folder, num_layers=2)

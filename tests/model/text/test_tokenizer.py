"""Tokenizers compared with the libraries that define them: tokenizers, sentencepiece, transformers, and recorded encodings."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from model.text.tokenizer import LlamaTokenizer, StreamDecoder, Tokenizer, continuation, read_tokenizer
from model.text.tokenizer_files import write_tokenizer
from parallel.errors import CheckpointError, RequestError

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "he said: don't we'll 12 34 567",
    "naïve café",
    "  two  spaces",
    "a b c d e f g",
] * 20
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "x</s>y <s> z",
    "<unk>",
    "The 1234567 foxes,\n\n\ttabs\r\n  and 3.14 ²",
    "杜甫杜甫 😀😀 👩‍👩‍👧‍👦 é",
    "▁already <0x41>",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return backend


def build_llama_backend() -> Backend:
    """What Hugging Face's converter makes of a Llama-2 vocabulary, with few words and all bytes."""
    words = ["▁", "a", "b", "x", "▁a", "▁x", "ab", "▁ab"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{n:02X}>" for n in range(256)), *words])}
    merges = [("▁", "a"), ("▁", "x"), ("a", "b"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def describe_byte_level(backend: Backend, pre: str, **changes: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a byte-level vocabulary."""
    raw = json.loads(backend.to_str())
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in raw["model"]["merges"]]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types, **ids, **changes}


def describe_sentencepiece(model: bytes, **changes: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a SentencePiece vocabulary."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    ids = list(range(processor.vocab_size()))
    checks = {2: processor.is_unknown, 3: processor.is_control, 6: processor.is_byte}
    types = [next((kind for kind, check in checks.items() if check(i)), 1) for i in ids]
    special = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    scores = [float(score) for score in processor.get_score(ids)]
    return {"model": "llama", "tokens": processor.id_to_piece(ids), "scores": scores, "token_type": types, **special, **changes}


def write_json_folder(folder: Path, backend: Backend, **settings: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    return folder


def write_model_folder(folder: Path, **settings: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(params=["json", "model", "gguf byte level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    makers: dict[str, Callable[[], Path]] = {
        "json": lambda: write_json_folder(tmp_path, build_llama_backend()),
        "model": lambda: write_model_folder(tmp_path),
        "gguf byte level": lambda: write_gguf(
            tmp_path / "m.gguf", describe_byte_level(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2")
        ),
    }
    return read_tokenizer(makers[request.param]())


def test_golden_encodings_of_llama2_are_met_from_both_files(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "llama2-tokenizer"
    for path in (folder, folder / "tokenizer.json", folder / "tokenizer.model"):
        tokenizer = read_tokenizer(path)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (1, 2, None, 32000)
        for golden in json.loads((folder / "golden_encodings.json").read_text()):
            assert tokenizer.encode(golden["text"]) == golden["ids_with_bos"]
            assert tokenizer.encode(golden["text"], add_special_tokens=False) == golden["ids"]
            assert tokenizer.decode(golden["ids_with_bos"]) == golden["text"]


def test_both_files_of_llama2_agree_on_special_tokens_and_on_every_decoding(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "llama2-tokenizer"
    first, second = read_tokenizer(folder / "tokenizer.json"), read_tokenizer(folder / "tokenizer.model")
    for text in TEXTS:
        ids = first.encode(text)
        assert second.encode(text) == ids, text
        for skip in (True, False):
            assert second.decode(ids, skip) == first.decode(ids, skip), text


def test_a_json_tokenizer_equals_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_json_folder(tmp_path, build_llama_backend())
    reference, tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), read_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False)["input_ids"], text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip, clean_up_tokenization_spaces=False), text


@pytest.mark.parametrize(("settings", "before"), [({"add_bos_token": False}, []), ({"add_bos_token": True}, [1]), ({}, [1])])
def test_add_bos_token_counts_for_tokenizer_model_and_not_for_tokenizer_json(
    tmp_path: Path, settings: dict[str, Any], before: list[int]
) -> None:
    """As in transformers 5; a tokenizer.model without settings begins texts with bos, as Meta and MindFormers do."""
    for name, write in (("json", lambda f: write_json_folder(f, build_llama_backend(), **settings)), ("model", None)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = read_tokenizer(write(folder) if write else write_model_folder(folder, **settings))
        expected = [1] if name == "json" else before
        assert tokenizer.encode("ab") == [*expected, *tokenizer.encode("ab", add_special_tokens=False)]


@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_the_caller_decides_over_begin_and_end_tokens(stories: Path, name: str, add_bos: bool | None, add_eos: bool | None) -> None:
    plain = read_tokenizer(stories / name)
    assert plain.encode("a dog")[0] == plain.bos_token_id == 1
    tokenizer = read_tokenizer(stories / name, add_bos=add_bos, add_eos=add_eos)
    for text in ("a dog", "", " x"):
        inner = plain.encode(text, add_special_tokens=False)
        expected = [*([1] if add_bos is not False else []), *inner, *([2] if add_eos else [])]
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode(text, add_special_tokens=False) == inner


def test_tokenizer_json_wins_over_tokenizer_model(tmp_path: Path) -> None:
    write_model_folder(write_json_folder(tmp_path, build_llama_backend()))
    assert read_tokenizer(tmp_path).vocab_size == build_llama_backend().get_vocab_size()


def test_special_tokens_are_found_without_settings_and_in_both_spellings(tmp_path: Path) -> None:
    build_llama_backend().save(str(tmp_path / "tokenizer.json"))
    bare = read_tokenizer(tmp_path / "tokenizer.json")
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id) == (1, 2, None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>", "pad_token": {"content": "<unk>"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": None}))
    set_beside = read_tokenizer(tmp_path)
    assert (set_beside.bos_token_id, set_beside.eos_token_id, set_beside.pad_token_id) == (None, 1, 0), "special_tokens_map.json wins"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": {}}))
    assert (read_tokenizer(tmp_path).eos_token_id, read_tokenizer(tmp_path).settings.eos_token) == (2, "</s>"), "without the map"


def test_tokens_added_to_a_sentencepiece_model_are_parsed_and_left_out(tmp_path: Path) -> None:
    size = read_tokenizer(write_model_folder(tmp_path)).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (size + 1, size)
    assert tokenizer.encode("the<pad>fox").count(size) == 1
    assert tokenizer.decode(tokenizer.encode("the<pad>")) == "the"


def test_a_sentencepiece_model_equals_the_library_with_bos(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_model_folder(tmp_path) / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (t for t in TEXTS if not any(special in t for special in SPECIAL)):
        assert tokenizer.encode(text) == [1, *processor.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text)), text


def test_sentencepiece_bytes_that_spell_nothing_become_one_replacement_each(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_model_folder(tmp_path))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    random_bytes = random.Random(0)
    for _ in range(200):
        ids = [random_bytes.randrange(3, 259) for _ in range(8)]
        assert tokenizer.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_gguf_sentencepiece_vocabulary_equals_the_model_it_came_from(tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(write_gguf(tmp_path / "m.gguf", describe_sentencepiece(train_sentencepiece(), **settings)))
    original = read_tokenizer(write_model_folder(tmp_path, **settings))
    for text in TEXTS:
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids, text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == original.decode(ids, skip), text


def test_a_gguf_vocabulary_without_space_prefix_neither_adds_nor_drops_one(tmp_path: Path) -> None:
    metadata = describe_sentencepiece(train_sentencepiece(), add_space_prefix=False)
    tokenizer = read_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    for text in (t for t in TEXTS if "<" not in t and "▁" not in t):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_gguf_sentencepiece_vocabulary_follows_llama_cpp_around_special_tokens(tmp_path: Path, prefix: bool | None) -> None:
    """llama.cpp finds control and user-defined tokens first, the longest first; the text after each, and the first, gets the space."""
    model = train_sentencepiece(add_dummy_prefix=prefix is not False)
    metadata = describe_sentencepiece(model, **({} if prefix is None else {"add_space_prefix": prefix}))
    own = {"<|a|>": 4, "<|a|>>": 4, "<|end|>": 3}
    size = len(metadata["tokens"])
    metadata["tokens"] += list(own)
    metadata["token_type"] += list(own.values())
    metadata["scores"] += [-1000.0] * len(own)
    tokenizer = read_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    ids = {**{token: place for place, token in enumerate(SPECIAL)}, **{token: size + place for place, token in enumerate(own)}}
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) + ")")
    for text in (*TEXTS, "fox<|a|>fox <|a|>> fox<|end|>", "<|end|><|end|> ", " <|a|> <s>x"):
        parts = [part for part in pattern.split(text) if part]
        expected = [token for part in parts for token in ([ids[part]] if part in ids else processor.encode(part))]
        assert tokenizer.encode(text) == [1, *expected], text
    assert tokenizer.decode([ids["<|a|>"], ids["<|end|>"], 1]) == "<|a|>", "user-defined tokens are text"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama without prefix"])
def test_the_tokenizer_written_for_a_gguf_file_is_the_same_here_and_in_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    if kind == "gpt2":
        metadata = describe_byte_level(train_byte_level(SPLITS["gpt-2"]()), "llama-bpe", add_eos_token=True)
    else:
        metadata = describe_sentencepiece(train_sentencepiece(), add_space_prefix=kind == "llama", padding_token_id=0)
    path, folder = write_gguf(tmp_path / "m.gguf", metadata), tmp_path / "folder"
    folder.mkdir()
    write_tokenizer(path, folder)
    original, copy, theirs = read_tokenizer(path), read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = original.encode(text)
        assert copy.encode(text) == theirs(text)["input_ids"] == ids, text
        for skip in (True, False):
            assert original.decode(ids, skip) == copy.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert (copy.bos_token_id, copy.eos_token_id, copy.pad_token_id) == (
        original.bos_token_id,
        original.eos_token_id,
        original.pad_token_id,
    )
    if kind != "gpt2":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        assert processor.encode("the fox") == original.encode("the fox", add_special_tokens=False)


SPLITS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("pre", list(SPLITS))
def test_a_gguf_byte_level_vocabulary_equals_the_tokenizer_it_came_from(tmp_path: Path, pre: str) -> None:
    backend = train_byte_level(SPLITS[pre]())
    tokenizer = read_tokenizer(write_gguf(tmp_path / "m.gguf", describe_byte_level(backend, pre)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, backend.get_vocab_size())
    assert tokenizer.special_ids == {0, 1, 2}
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids, text
        for skip in (True, False):
            assert tokenizer.decode(tokenizer.encode(text), skip) == backend.decode(backend.encode(text).ids, skip), text


def test_digits_stand_alone_in_smollm_and_in_threes_in_llama_bpe(tmp_path: Path) -> None:
    merges = {"merges": ["1 2", "12 3", "4 5"], "tokens": [*SPECIAL, *"12345", "12", "123", "45"], "token_type": [3] * 3 + [1] * 8}
    expected = {"smollm": ["1", "2", "3", "4", "5"], "gpt-2": ["123", "45"], "llama-bpe": ["123", "45"]}
    for pre, pieces in expected.items():
        backend = train_byte_level(SPLITS["gpt-2"]())
        tokenizer = read_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", describe_byte_level(backend, pre, **merges)))
        ids = tokenizer.encode("12345", add_special_tokens=False)
        assert [tokenizer.decode([i]) for i in ids] == pieces, pre


def test_llama_bpe_begins_with_bos_unless_the_metadata_say_no(tmp_path: Path) -> None:
    backend = train_byte_level(SPLITS["gpt-2"]())
    for changes, before in (({}, [1]), ({"add_bos_token": True}, [1]), ({"add_bos_token": False}, [])):
        metadata = describe_byte_level(backend, "llama-bpe", **changes)
        tokenizer = read_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
        assert tokenizer.encode("fox") == [*before, *tokenizer.encode("fox", add_special_tokens=False)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "'tekken', but only default, gpt-2, smollm, qwen2, llama-bpe"),
        ({"model": "bert"}, "'bert', but only 'llama' and 'gpt2'"),
        ({"merges": ["qq zz"]}, "do not fit together"),
        ({"model": "llama"}, r"lack tokenizer\.ggml\.scores"),
    ],
)
def test_a_gguf_vocabulary_that_cannot_be_read_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", describe_byte_level(train_byte_level(SPLITS["gpt-2"]()), "gpt-2") | changes)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", b"", r"neither tokenizer\.json nor tokenizer\.model"),
        ("tokenizer.json", b"{}", r"is not a tokenizer\.json"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is not a whole SentencePiece model"),
        ("missing.model", b"", "does not exist"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tmp_path / name)


def test_settings_that_are_no_json_object_are_refused(tmp_path: Path) -> None:
    write_json_folder(tmp_path, build_llama_backend())
    for content, message in (("[1]", r"holds \[1\], but a JSON object is needed"), ("{", "is not JSON")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_tokenizer(tmp_path)


def stream(tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer, prompt_ids)
    return [*(decoder.push(i) for i in new_ids), decoder.finish()]


def test_streamed_pieces_join_to_the_text_wherever_the_prompt_ends(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for cut in range(len(ids) + 1):
            pieces = stream(tokenizer, ids[:cut], ids[cut:])
            assert "".join(pieces) == continuation(tokenizer, ids[:cut], ids[cut:]), (text, cut)
        assert "".join(stream(tokenizer, [], ids)) == tokenizer.decode(ids)


def test_no_piece_holds_half_a_character_and_none_waits_longer_than_needed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab 杜甫杜 😀😀 x")
    pieces = stream(tokenizer, [], ids)
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""
    for seen in range(len(ids) + 1):
        now = tokenizer.decode(ids[:seen])
        if not now.endswith("\ufffd"):
            assert "".join(pieces[:seen]) == now


def test_a_stream_of_special_and_unfinished_tokens_ends_as_the_whole_does(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_model_folder(tmp_path))
    chance = random.Random(1)
    for _ in range(300):
        ids = [chance.choice([chance.randrange(3), chance.randrange(3, 259), chance.randrange(tokenizer.vocab_size)]) for _ in range(16)]
        cut = chance.randrange(len(ids) + 1)
        assert "".join(stream(tokenizer, ids[:cut], ids[cut:])) == continuation(tokenizer, ids[:cut], ids[cut:]), (ids, cut)


def test_a_continuation_keeps_the_space_that_begins_it(tokenizer: Tokenizer) -> None:
    prompt, full = tokenizer.encode("ab"), tokenizer.encode("ab x")
    assert full[: len(prompt)] == prompt
    assert continuation(tokenizer, prompt, full[len(prompt) :]) == " x"
    assert continuation(tokenizer, prompt, []) == ""


def test_the_mindformers_tokenizer_fills_with_unk_on_the_right(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(str(write_model_folder(tmp_path)))
    rows = [tokenizer.encode("the fox"), tokenizer.encode("a")]
    batch = tokenizer(["the fox", "a"], max_length=20, padding="max_length")
    assert batch["input_ids"] == [row + [0] * (20 - len(row)) for row in rows]
    assert batch["attention_mask"] == [[1] * len(row) + [0] * (20 - len(row)) for row in rows]
    assert tokenizer("the fox") == {"input_ids": rows[0], "attention_mask": [1] * len(rows[0])}
    assert [len(row) for row in tokenizer(["the fox", "a"], padding=True)["input_ids"]] == [len(rows[0])] * 2


def test_the_mindformers_tokenizer_cuts_only_without_padding_or_on_request(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(write_model_folder(tmp_path))
    whole = tokenizer.encode("the quick brown fox")
    assert tokenizer("the quick brown fox", max_length=3)["input_ids"] == whole[:3]
    assert tokenizer("the quick brown fox", max_length=3, padding="max_length")["input_ids"] == whole
    assert tokenizer("the quick brown fox", max_length=3, padding="max_length", truncation=True)["input_ids"] == whole[:3]
    for padding, max_length in (("max_length", None), ("left", 3)):
        with pytest.raises(RequestError, match=padding):
            tokenizer("a", max_length=max_length, padding=padding)


def test_the_mindformers_tokenizer_shows_special_tokens_without_a_space(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(write_model_folder(tmp_path))
    ids = [*tokenizer.encode("the fox"), 2, 0]
    assert tokenizer.decode(ids) == "<s>the fox</s><unk>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the fox"


def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    byte_level, llama = tmp_path / "byte_level.json", tmp_path / "llama.json"
    train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)).save(str(byte_level))
    build_llama_backend().save(str(llama))
    for path, space in ((tmp_path / "tokenizer.model", " "), (byte_level, ""), (llama, " ")):
        tokenizer = read_tokenizer(path)
        for text in ("ab x", "naïve 杜甫 😀", "x</s>a"):
            found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
            assert found.decode().replace(" ", "") == text.replace(" ", ""), path
            assert found.startswith(space.encode())
        assert tokenizer.token_bytes(10**6) == b""

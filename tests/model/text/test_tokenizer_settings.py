"""Ids and texts of every form of a tokenizer next to those of transformers' AutoTokenizer, for 200 texts."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from model.text.tokenizer import read_tokenizer
from model.text.tokenizer_settings import read_tokenizer_settings
from parallel.errors import CheckpointError

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "he said: don't we'll 12 34",
    "naïve café",
    "a b c d e f g",
    "def f(x): return x",
] * 20
SPECIAL = ("<unk>", "<s>", "</s>")
PARTS = (
    *(
        "the",
        "quick",
        "fox",
        "don't",
        "a",
        "b",
        "12",
        "naïve",
        "café",
        "é",
        "杜甫",
        "😀",
        "👩‍👩‍👧",
        "ñ",
        "ﬁ",
        "\u00a0",
        "\u200b",
        "▁",
        "▁▁",
    ),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", ".", ",", "!?", "def f(x):\n    return x", "<0x41>", "<", ">", "|", "²", "Ⅷ"),
    *SPECIAL,
    *("<|user|>", "<|end|>", "<x>", "[PAD]", "<mask>", "word"),
)


def make_texts() -> list[str]:
    chance = random.Random(16)
    fixed = [
        "",
        " ",
        "  ",
        "</s>",
        " </s> ",
        "a</s>b",
        "a </s> b",
        "</s></s>",
        "<|user|>a<|end|>",
        " <x> ",
        "a<x>b",
        "\n",
        "▁a",
        "the fox",
        "a ",
    ]
    made = ["".join(chance.choice(PARTS) for _ in range(chance.randrange(1, 12))) for _ in range(190)]
    return fixed + made


TEXTS = make_texts()


@pytest.fixture(scope="module")
def sentencepiece_model() -> Callable[..., bytes]:
    """A function that trains a SentencePiece model; each kind once."""
    made: dict[str, bytes] = {}

    def train(**options: Any) -> bytes:
        key = json.dumps(options)
        if key not in made:
            file = io.BytesIO()
            defaults = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True, "vocab_size": 330}
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS),
                model_writer=file,
                hard_vocab_limit=False,
                minloglevel=2,
                **{"model_type": "bpe", **defaults, **options},
            )
            made[key] = file.getvalue()
        return made[key]

    return train


def build_llama_json() -> Backend:
    """What Hugging Face's converter makes of a Llama vocabulary, with few words and all bytes."""
    words = ["▁", *"abtheqx", "▁a", "▁b", "▁t", "ab", "th", "he", "the", "▁the", "▁ab", "▁▁"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *(f"<0x{n:02X}>" for n in range(256)), *words]))}
    merges = [("▁", "▁"), ("▁", "a"), ("▁", "b"), ("▁", "t"), ("a", "b"), ("t", "h"), ("h", "e"), ("t", "he"), ("▁", "the"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend


def build_byte_level_json(*, prefix: bool = False) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens(
        [AddedToken("<|user|>", lstrip=True), AddedToken("<x>", rstrip=True, normalized=False), AddedToken("word", single_word=True)]
    )
    return backend


def write(folder: Path, vocabulary: bytes | Backend, settings: dict[str, Any] | None = None, **files: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    if isinstance(vocabulary, bytes):
        (folder / "tokenizer.model").write_bytes(vocabulary)
    else:
        vocabulary.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": settings, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content: str, **flags: bool) -> dict[str, Any]:
    base = {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return {"content": content, **base, **flags}


def compare(folder: Path, texts: list[str] = TEXTS, *, adds_bos: bool = False) -> None:
    """`adds_bos`: transformers 5 leaves the begin token out where tokenizer_config.json is missing."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)
    before = [ours.bos_token_id] if adds_bos else []
    for text in texts:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == before + expected, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        for skip in (True, False):
            assert ours.decode(expected, skip) == theirs.decode(expected, skip_special_tokens=skip), (text, skip)
    assert ours.special_ids == {number for number, one in theirs.added_tokens_decoder.items() if one.special}
    declared = {role: text for role, text in theirs.special_tokens_map.items()}
    assert declared.items() <= {role: one.content for role, one in ours.settings.special_tokens.items() if one}.items()


LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DECODER = {
    "0": token("<unk>", special=True),
    "1": token("<s>", special=True),
    "2": token("</s>", special=True),
}


def add(size: int, *tokens: dict[str, Any]) -> dict[str, Any]:
    return {**DECODER, **{str(size + place): one for place, one in enumerate(tokens)}}


FLAGS = (
    token("<|user|>", special=True, rstrip=True),
    token("<|end|>", lstrip=True),
    token("<x>", normalized=True),
    token("word", single_word=True),
    token("[PAD]", special=True, lstrip=True, rstrip=True),
)


def is_exact(text: str) -> bool:
    """Texts that begin with a space get Llama 2's own ids with `legacy`, which transformers 5 does not give."""
    return not text.startswith((" ", "▁"))


@pytest.mark.parametrize("legacy", [True, False, None], ids=["legacy", "not legacy", "silent"])
@pytest.mark.parametrize("prefix", [True, False, None], ids=["prefix", "no prefix", "silent"])
@pytest.mark.parametrize("form", ["model", "json"])
def test_llama_tokenizers_equal_transformers(
    tmp_path: Path, sentencepiece_model: Callable[..., bytes], legacy: bool | None, prefix: bool | None, form: str
) -> None:
    vocabulary = sentencepiece_model() if form == "model" else build_llama_json()
    settings = {**LLAMA, "legacy": legacy, "add_prefix_space": prefix, "pad_token": "</s>"}
    settings = {name: value for name, value in settings.items() if value is not None}
    doubles = legacy is True and prefix is not False
    compare(write(tmp_path, vocabulary, settings), [text for text in TEXTS if is_exact(text) or not doubles])


@pytest.mark.parametrize("form", ["model", "json"])
@pytest.mark.parametrize("legacy", [True, False])
def test_flags_of_added_tokens_equal_transformers(
    tmp_path: Path, sentencepiece_model: Callable[..., bytes], form: str, legacy: bool
) -> None:
    vocabulary = sentencepiece_model() if form == "model" else build_llama_json()
    size = read_tokenizer(write(tmp_path, vocabulary, LLAMA)).vocab_size
    settings = {**LLAMA, "legacy": legacy, "added_tokens_decoder": add(size, *FLAGS), "pad_token": "[PAD]"}
    compare(write(tmp_path, vocabulary, settings), [text for text in TEXTS if is_exact(text) or not legacy])
    assert read_tokenizer(tmp_path).pad_token_id == size + 4


@pytest.mark.parametrize("form", ["model", "json"])
def test_code_llama_is_never_legacy(tmp_path: Path, sentencepiece_model: Callable[..., bytes], form: str) -> None:
    vocabulary = sentencepiece_model() if form == "model" else build_llama_json()
    infilling = dict.fromkeys(("prefix_token", "middle_token", "suffix_token", "eot_token", "fill_token"))
    compare(write(tmp_path, vocabulary, {**LLAMA, "tokenizer_class": "CodeLlamaTokenizer", "legacy": True, **infilling}))


OTHER_FILES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "added_tokens.json": (LLAMA, {"added_tokens": {"<|user|>": 0, "<|end|>": 1}}),
    "added_tokens.json with special ones": (
        {**LLAMA, "additional_special_tokens": ["<|end|>"]},
        {"added_tokens": {"<|user|>": 0, "<|end|>": 1}},
    ),
    "special_tokens_map.json": (
        {**LLAMA, "pad_token": "<x>"},
        {"special_tokens_map": {"pad_token": token("[PAD]", lstrip=True), "eos_token": "</s>"}, "added_tokens": {"[PAD]": 0}},
    ),
    "special_tokens_map.json extra": (LLAMA, {"special_tokens_map": {"additional_special_tokens": ["<|user|>", "<x>"]}}),
    "extra_special_tokens": ({**LLAMA, "extra_special_tokens": ["<|user|>"]}, {}),
    "named extra_special_tokens": ({**LLAMA, "extra_special_tokens": {"image_token": "<x>"}, "boi_token": "<|end|>"}, {}),
    "all roles": (
        {**LLAMA, "cls_token": "[PAD]", "sep_token": "<x>", "mask_token": {"__type": "AddedToken", **token("<mask>", lstrip=True)}},
        {},
    ),
    "no bos": ({**LLAMA, "add_bos_token": False, "add_eos_token": True}, {}),
    "bos silent": ({"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "another class": ({**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}, {"added_tokens": {"<x>": 0}}),
    "no class": ({"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}, {}),
    "split special tokens": ({**LLAMA, "split_special_tokens": True}, {}),
}


@pytest.mark.parametrize("form", ["model", "json", "byte level"])
@pytest.mark.parametrize("name", list(OTHER_FILES))
def test_every_settings_file_counts_as_in_transformers(
    tmp_path: Path, sentencepiece_model: Callable[..., bytes], name: str, form: str
) -> None:
    vocabulary = {"model": sentencepiece_model, "json": build_llama_json, "byte level": build_byte_level_json}[form]()
    settings, files = OTHER_FILES[name]
    size = read_tokenizer(write(tmp_path, vocabulary, {"tokenizer_class": "LlamaTokenizer"})).vocab_size
    if "added_tokens" in files:  # numbered from the end of the vocabulary
        files = {**files, "added_tokens": {text: size + place for text, place in files["added_tokens"].items()}}
        if form == "byte level" and name != "special_tokens_map.json":
            files.pop("added_tokens")
    compare(write(tmp_path, vocabulary, settings, **files))


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_level_vocabularies_equal_transformers(tmp_path: Path, prefix: bool) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": not prefix}
    compare(write(tmp_path, build_byte_level_json(prefix=prefix), settings))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<x>", "<|user|>"]},
        {"control_symbols": ["<|end|>"]},
        {"byte_fallback": False},
        {"model_type": "unigram", "vocab_size": 300},
    ],
    ids=str,
)
def test_a_bare_tokenizer_model_equals_transformers_and_begins_with_bos(
    tmp_path: Path, sentencepiece_model: Callable[..., bytes], options: dict[str, Any]
) -> None:
    compare(write(tmp_path, sentencepiece_model(**options)), adds_bos=True)
    assert read_tokenizer(tmp_path).encode("the")[0] == 1


def test_a_bare_tokenizer_model_equals_sentencepiece(tmp_path: Path, sentencepiece_model: Callable[..., bytes]) -> None:
    write(tmp_path, sentencepiece_model())
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    tokenizer = read_tokenizer(tmp_path)
    for text in (text for text in TEXTS if not any(special in text for special in SPECIAL)):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text)), text


@pytest.mark.parametrize(
    ("settings", "files", "message"),
    [
        ({"added_tokens_decoder": {"999": token("<x>")}}, {}, r"'<x>' is declared with id 999, but in this vocabulary it has id"),
        ({"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"1": token("<x>")}}, {}, r"'<x>' is declared with id 1, but"),
        ({"added_tokens_decoder": {"x": token("<x>")}}, {}, "has the id 'x', but a number"),
        ({"added_tokens_decoder": {"1": "<x>"}}, {}, "but an object with 'content' is needed"),
        ({"added_tokens_decoder": {"1": token("<s>", special=1)}}, {}, "special of the token '<s>' is 1, but true or false"),  # type: ignore[arg-type]
        ({"added_tokens_decoder": []}, {}, "but an object of ids and tokens is needed"),
        ({"bos_token": 1}, {}, "'bos_token' is 1, but a token is needed"),
        ({"legacy": "no"}, {}, "legacy is 'no', but true or false is needed"),
        ({"add_bos_token": 1}, {}, "add_bos_token is 1, but true or false is needed"),
        ({"tokenizer_class": 1}, {}, "tokenizer_class is 1, but a name is needed"),
        ({"additional_special_tokens": "<x>"}, {}, "but a list of tokens is needed"),
        ({"additional_special_tokens": [1]}, {}, "1 is listed as a token"),
        ({}, {"added_tokens": {"<x>": "1"}}, "the id of '<x>' is '1', but a number"),
        ({}, {"added_tokens": {"<x>": 330, "<y>": 330}}, "gives id 330 to '<x>' and to '<y>'"),
        ({}, {"added_tokens": {"<x>": 999}}, "'<x>' is declared with id 999, but"),
        ({"eos_token": "\ud800"}, {}, "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("form", ["model", "json"])
def test_settings_that_contradict_the_vocabulary_are_refused(
    tmp_path: Path,
    sentencepiece_model: Callable[..., bytes],
    settings: dict[str, Any],
    files: dict[str, Any],
    message: str,
    form: str,
) -> None:
    write(tmp_path, sentencepiece_model() if form == "model" else build_llama_json(), settings, **files)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tmp_path)


def test_the_settings_name_every_role(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": None, "image_token": "<x>"}))
    settings = read_tokenizer_settings(tmp_path)
    assert (settings.eos_token, settings.pad_token, settings.bos_token, settings.find("image_token")) == ("</s>", None, None, "<x>")


CASES = {
    "05-added-token-not-in-json": (
        "<|im_start|>user\nOnce upon a time<|im_end|>",
        [1, 512, 318, 419, 285, 13, 441, 416, 331, 407, 261, 378, 513],
    ),
    "24-sp-legacy-false": ("Once upon</s>a time", [1, 403, 407, 2, 412, 378]),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_cases_of_tokens_have_the_right_ids(shared_dir: Path, case: str) -> None:
    text, ids = CASES[case]
    assert read_tokenizer(shared_dir / "cases" / case / "model").encode(text) == ids

"""5,000 damaged tokenizer files, seeded: each is read, or refused with one sentence, in little time and memory."""

import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.text.chat_templates import load_chat_templates
from model.text.tokenizer import read_tokenizer
from parallel.errors import CheckpointError, InputError

NUM_MUTANTS = 5000
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        10**30,
        1.5,
        -0.0,
        float("nan"),
        float("inf"),
        "",
        "a",
        "<s>",
        "\ud800",
        "\0",
        "é" * 50,
    ),
    *(
        "a" * 100_000,
        [],
        [[]],
        [None],
        ["<s>", "<s>"],
        {},
        {"": {}},
        {"content": "<s>"},
        {"content": 1},
        {"type": "BPE"},
        {"__type": "AddedToken"},
    ),
)


def build_json() -> dict[str, Any]:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": place, "content": text, **token} for place, text in enumerate(TOKENS[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: place for place, text in enumerate(TOKENS)},
            "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]],
        },
    }


def build_model() -> bytes:
    from model.text.gguf_vocabulary import write_sentencepiece_model
    from model.text.sentencepiece_model import Piece, SentencePieceModel

    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    pieces = tuple(Piece(text, -float(place), kind) for place, (text, kind) in enumerate(zip(TOKENS, kinds, strict=True)))
    model = SentencePieceModel(pieces=pieces, algorithm=2, byte_fallback=True, remove_extra_whitespaces=False)
    return write_sentencepiece_model(model, {"bos": 1, "eos": 2})


SETTINGS: dict[str, Any] = {
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
        "pad_token": None,
        "legacy": True,
        "additional_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "265": {"content": "<x>", "special": False}},
    },
    "special_tokens_map.json": {"bos_token": "<s>", "pad_token": {"content": "</s>", "lstrip": True}, "additional_special_tokens": ["<y>"]},
    "added_tokens.json": {"<x>": 265, "<y>": 266},
    "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}",
    "chat_template.json": {"chat_template": "{{ messages }}"},
}
NAMES = ("tokenizer.json", "tokenizer.model", *SETTINGS)


def list_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from list_places(part, (*place, key))


def change_value(raw: Any, chance: random.Random) -> Any:
    """One value, whichever, becomes another, is left out, or is nested deeply."""
    raw = json.loads(json.dumps(raw))
    if "model" in raw:  # else nearly every change would be one of 265 tokens
        places = [*list_places({**raw, "model": {**raw["model"], "vocab": {}}}), ("model", "vocab", chance.choice(TOKENS))]
    else:
        places = list(list_places(raw))
    place = chance.choice(places)
    if not place:
        return chance.choice(VALUES)
    parent = raw
    for key in place[:-1]:
        parent = parent[key]
    if chance.random() < 0.2:
        del parent[place[-1]]
    else:
        parent[place[-1]] = chance.choice(VALUES)
    return raw


def damage(data: bytes, chance: random.Random) -> bytes:
    """Bytes cut off, turned, doubled, in another encoding, or nested deeply."""
    kind = chance.randrange(7)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        spoiled = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 30))):
            spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
        return bytes(spoiled)
    if kind == 2:
        start, stop = sorted(chance.choices(range(len(data) + 1), k=2))
        return data[:start] + data[stop:]
    if kind == 3:
        start, stop = sorted(chance.choices(range(len(data) + 1), k=2))
        return data[:stop] + data[start:]
    if kind == 4:
        return data.decode("latin-1").encode(chance.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
    if kind == 5:
        number = b"[" if chance.random() < 0.5 else b'{"a":'
        return number * chance.choice((100, 100_000)) + data
    return chance.randbytes(chance.choice((0, 1, 100, 10_000)))


def write_mutant(folder: Path, number: int, originals: dict[str, bytes]) -> None:
    chance = random.Random(number)
    name = NAMES[number % len(NAMES)]
    data = originals[name]
    if name.endswith(".json") and chance.random() < 0.6:
        data = json.dumps(change_value(json.loads(data), chance)).encode()
    else:
        data = damage(data, chance)
    wanted = {name}
    if name not in ("tokenizer.json", "tokenizer.model"):
        wanted.add(chance.choice(("tokenizer.json", "tokenizer.model")))
    if name != "tokenizer_config.json" and chance.random() < 0.4:
        wanted.add("tokenizer_config.json")
    for other in NAMES:
        if other == name:
            (folder / other).write_bytes(data)
        elif other in wanted:
            (folder / other).write_bytes(originals[other])
        else:
            (folder / other).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    settings = {name: (text if isinstance(text, str) else json.dumps(text)).encode() for name, text in SETTINGS.items()}
    return {"tokenizer.json": json.dumps(build_json()).encode(), "tokenizer.model": build_model(), **settings}


def test_whole_files_are_read(tmp_path: Path, originals: dict[str, bytes]) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        for other, data in originals.items():
            if other not in ("tokenizer.json", "tokenizer.model"):
                (tmp_path / other).write_bytes(data)
        (tmp_path / name).write_bytes(originals[name])
        assert read_tokenizer(tmp_path).encode("ab<x>") == [1, 264, 265]
        templates, _ = load_chat_templates(tmp_path, read_tokenizer(tmp_path).settings)
        assert templates.sources == {"default": SETTINGS["chat_template.jinja"]}
        (tmp_path / name).unlink()


def test_every_damaged_file_is_read_or_refused_in_a_sentence(tmp_path: Path, originals: dict[str, bytes]) -> None:
    read = slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(NUM_MUTANTS):
        write_mutant(tmp_path, number, originals)
        start = time.process_time()
        try:
            tokenizer = read_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("a b<x> é</s>ab"))
            load_chat_templates(tmp_path, tokenizer.settings)
            read += 1
        except InputError as error:
            assert 0 < len(str(error)) < 1500 and "\n" not in str(error), (number, str(error))
        except BaseException as error:
            raise AssertionError(f"mutant {number} of {NAMES[number % len(NAMES)]}: {error!r}") from error
        slowest = max(slowest, time.process_time() - start)
    assert 0.05 * NUM_MUTANTS < read < 0.8 * NUM_MUTANTS, "most mutants must be refused, and some be read"
    assert slowest < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "broken link": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "huge": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**12),
}


@pytest.mark.parametrize("kind", list(SPECIAL_FILES))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "chat_template.json"])
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path, originals: dict[str, bytes], name: str, kind: str) -> None:
    if name not in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "tokenizer.model").write_bytes(originals["tokenizer.model"])
    SPECIAL_FILES[kind](tmp_path / name)
    with pytest.raises(CheckpointError):
        load_chat_templates(tmp_path, read_tokenizer(tmp_path).settings)

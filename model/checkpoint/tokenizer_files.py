"""Puts a checkpoint's tokenizer into another folder: files are copied, a GGUF file's vocabulary is written out.

Knows files; the vocabularies themselves stand in `gguf_vocabulary.py`.
"""

import shutil
from pathlib import Path
from typing import Any

from model.checkpoint.folder_writing import write_json
from model.checkpoint.gguf_header import read_gguf_header
from model.checkpoint.gguf_vocabulary import build_byte_level_bpe, build_sentencepiece_model, find_pre_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
"""What travels with a checkpoint besides weights and config.json."""


def write_tokenizer(source: Path | None, folder: Path) -> None:
    """Write the tokenizer of `source` (a folder, or a file as `read_tokenizer` takes) into `folder`; None has none."""
    if source is None:
        return
    if source.suffix == ".gguf":
        _write_gguf_tokenizer(source, folder)
        return
    home = source if source.is_dir() else source.parent
    for name in TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)


def _write_gguf_tokenizer(path: Path, folder: Path) -> None:
    metadata = read_gguf_header(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    settings: dict[str, Any] = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            settings[role] = tokens[number]
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        build_byte_level_bpe(metadata).save(str(folder / "tokenizer.json"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["add_bos_token"] = find_pre_tokenizer(metadata).add_bos if add_bos is None else add_bos
    else:
        (folder / "tokenizer.model").write_bytes(build_sentencepiece_model(metadata))
        settings["tokenizer_class"] = "LlamaTokenizer"
        settings["add_bos_token"] = True if add_bos is None else add_bos
    settings["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)

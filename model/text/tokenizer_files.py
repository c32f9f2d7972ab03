"""Copy a checkpoint's tokenizer to another folder; the vocabulary of a GGUF file is converted to files."""

import shutil
from pathlib import Path
from typing import Any

from model.checkpoint.folder_writing import write_json
from model.checkpoint.gguf_header import read_gguf_header
from model.text.chat_templates import TEMPLATE_FILE, TEMPLATE_FOLDER, read_chat_templates
from model.text.gguf_vocabulary import read_gguf_tokenizer, read_sentencepiece, write_sentencepiece_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
"""Tokenizer files that accompany weights and config.json."""


def write_tokenizer(source: Path | None, folder: Path) -> None:
    """Write the tokenizer of `source` (a folder, or a file that `read_tokenizer` supports) into `folder`; nothing if it is None."""
    if source is None:
        return
    if source.suffix == ".gguf":
        _write_gguf_tokenizer(source, folder)
        return
    home = source if source.is_dir() else source.parent
    for name in TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    for template in (home / TEMPLATE_FOLDER).glob("*.jinja"):
        if template.is_file():
            (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(template, folder / TEMPLATE_FOLDER / template.name)


def _write_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write tokenizer.json with llama.cpp's rules, its settings, and a SentencePiece vocabulary as tokenizer.model for programs that need
    one.
    """
    metadata, tokenizer = read_gguf_header(path).metadata, read_gguf_tokenizer(path)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    if metadata.get("tokenizer.ggml.model") == "llama":
        special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
        (folder / "tokenizer.model").write_bytes(write_sentencepiece_model(read_sentencepiece(metadata), special))
    said = tokenizer.settings
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: token.content for role, token in said.special_tokens.items() if token is not None},
        "add_bos_token": said.add_bos_token,
        "add_eos_token": said.add_eos_token,
    }
    templates = read_chat_templates(path)
    if templates is not None:
        named = [{"name": name, "template": source} for name, source in templates.items()]
        settings["chat_template"] = named if len(named) > 1 or "default" not in templates else templates["default"]
    write_json(folder / "tokenizer_config.json", settings)

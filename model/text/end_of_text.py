"""Decide which ids end generation, given all places that define such ids.

Precedence: ids given in the YAML (`model_config.eos_token_id`) replace all others, as in MindFormers. Otherwise the union applies:
config.json and generation_config.json (`eos_token_id`, a number or a list), the metadata and token names of a GGUF file, the tokenizer's
eos token, and the end-of-turn tokens in its chat template. vLLM uses the union of generation_config.json and the tokenizer; transformers
uses generation_config.json alone, or config.json alone if that is missing. tandem therefore stops where transformers does, or earlier at
a token that other files of the checkpoint define as an end. If no file defines one, LlamaConfig's default of 2 applies.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.gguf_end_tokens import TURN_ENDS, drop_message_ends
from model.checkpoint.source import CheckpointSource
from model.spec.config import read_config
from model.spec.quoting import quote
from model.text.chat_templates import read_chat_templates
from model.text.tokenizer import Tokenizer
from parallel.errors import CheckpointError, ConfigError

GENERATION_CONFIG = "generation_config.json"
_DEFAULT_ID = 2
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "temperature": (1, 0),
    "top_p": (1,),
    "top_k": (50, 0),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "early_stopping": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
}
"""Keys of generation_config.json for sampling, with the values that have no effect."""
_SILENT = frozenset(
    "eos_token_id bos_token_id pad_token_id decoder_start_token_id _from_model_config transformers_version use_cache max_length"
    " max_new_tokens return_dict_in_generate output_attentions output_hidden_states output_scores output_logits chat_format".split()
)
"""Keys that do not affect sampling; tandem has its own lengths."""


@dataclass(frozen=True, slots=True)
class EndOfText:
    """The decision."""

    ids: tuple[int, ...]
    """Ids that end generation."""
    warnings: tuple[str, ...] = ()
    """Warnings about the files, one sentence each."""


def decide_end_of_text(
    source: CheckpointSource, vocab_size: int, *, named: Any = None, tokenizer: Tokenizer | None = None, tokenizer_path: Path | None = None
) -> EndOfText:
    """Decide for a checkpoint; see the module docstring for the precedence.

    `named`: ids from the YAML, a number or a list; None if not set. `tokenizer` and its path: None if there is none. Ids outside of the
    vocabulary are dropped with a warning, since they cannot be generated. Raises ConfigError for a malformed generation_config.json and
    for invalid ids.
    """
    if named is not None:
        return _keep_known({"the YAML": _read_ids(named, "the YAML")}, vocab_size)
    generation = _read_generation_config(source)
    found = {
        "config.json": _read_ids(source.config.get("eos_token_id"), "config.json"),
        GENERATION_CONFIG: _read_ids(generation.get("eos_token_id"), GENERATION_CONFIG),
    }
    if tokenizer is not None and tokenizer_path is not None:
        # The metadata of a GGUF file are in `source.config`, under their own rules; a guessed name may not be a special token.
        if tokenizer_path.suffix != ".gguf" and tokenizer.eos_token_id in tokenizer.special_ids:
            found["the tokenizer"] = [tokenizer.eos_token_id]
        found["the chat template"] = _find_turn_ends(tokenizer, tokenizer_path)
    decided = _keep_known(found, vocab_size)
    if not any(found.values()) and "eos_token_id" not in source.config:
        decided = EndOfText((_DEFAULT_ID,))
    unread = _describe_unread(generation)
    return EndOfText(decided.ids, (*decided.warnings, unread)) if unread else decided


def _keep_known(found: Mapping[str, Iterable[int]], vocab_size: int) -> EndOfText:
    ids: list[int] = []
    warnings: list[str] = []
    for place, some in found.items():
        unknown = [one for one in some if not 0 <= one < vocab_size]
        if unknown:
            listed = ", ".join(map(str, unknown[:5]))
            warnings.append(f"{place} ends answers at id {listed}, but the vocabulary has {vocab_size}: this id is left out")
        ids += [one for one in some if 0 <= one < vocab_size]
    return EndOfText(tuple(dict.fromkeys(ids)), tuple(warnings))


def _read_ids(value: Any, place: str) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(type(one) is not int for one in ids):
        raise ConfigError(f"{place}: eos_token_id is {quote(value)}, but a whole number or a list of them is needed")
    return list(ids)


def _read_generation_config(source: CheckpointSource) -> dict[str, Any]:
    path = source.tokenizer_path() or source.path
    if path.suffix == ".gguf":
        return {}
    file = (path if path.is_dir() else path.parent) / GENERATION_CONFIG
    return read_config(file) if file.exists() else {}


def _find_turn_ends(tokenizer: Tokenizer, path: Path) -> list[int]:
    """Return the ids of end-of-turn tokens in the chat template that the tokenizer has as special tokens."""
    try:
        template = tokenizer.settings.chat_template or "".join((read_chat_templates(path) or {}).values())
    except CheckpointError:
        return []  # reported when chatting
    names = drop_message_ends(name for name in sorted(TURN_ENDS) if name in template)
    rows = [tokenizer.encode(name, add_special_tokens=False) for name in names]
    return [row[0] for row in rows if len(row) == 1 and row[0] in tokenizer.special_ids]


def _describe_unread(generation: Mapping[str, Any]) -> str | None:
    unread = {
        key: value
        for key, value in generation.items()
        if key not in _SILENT and value is not None and not any(value == neutral for neutral in _NEUTRAL.get(key, ()))
    }
    if not unread:
        return None
    listed = ", ".join(f"{key[:40]} {json.dumps(value, default=str)[:40]}" for key, value in list(unread.items())[:8])
    return f"{GENERATION_CONFIG} is read for eos_token_id only; set what is needed of the rest by options: {listed}"

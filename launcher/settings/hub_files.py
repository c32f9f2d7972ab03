"""The files of a repository on the Hugging Face Hub that a run reads, and whether a downloaded folder holds them all.

Works on file names alone.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from model.checkpoint.cache_scales import CACHE_SCALES_FILE
from parallel.errors import CheckpointError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_GGUF_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHOWN = 12


def choose_files(name: str, files: Sequence[str], variant: str | None = None) -> list[str]:
    """Select the files to download from a repository; `variant` selects one of its GGUF files.

    Raises CheckpointError if none of its weights can be read, or if the GGUF file is not determined.
    """
    top = [file for file in files if "/" not in file]
    safetensors = [file for file in top if file.endswith(".safetensors") and not file.startswith(("consolidated", "adapter_"))]
    meta = [file for file in top if re.fullmatch(r"consolidated.*\.pth", file)] if "params.json" in top else []
    bins = [file for file in top if re.fullmatch(r"pytorch_model.*\.bin", file)] if "config.json" in top else []
    ckpts = [file for file in top if file.endswith(".ckpt")]
    if variant is not None:
        weights = choose_gguf(name, files, variant)
    elif "model.safetensors" in safetensors:
        weights = ["model.safetensors"]
    else:
        weights = safetensors or choose_gguf(name, files) or meta or ckpts or bins
    if not weights:
        raise CheckpointError(f"{name} holds no weights that can be read (safetensors, GGUF, .bin, consolidated.*.pth or .ckpt)")
    beside = [
        file
        for file in top
        if file.endswith((".json", ".jinja", ".model", ".yaml", ".yml", ".chk"))
        or file in ("merges.txt", "vocab.txt", "SHA256SUMS", "sha256sums", CACHE_SCALES_FILE)
    ]
    unused = ("adapter_",) if weights == bins else ("adapter_", "pytorch_model")
    return sorted({*weights, *(file for file in beside if not file.startswith(unused))})


def choose_gguf(name: str, files: Sequence[str], variant: str | None = None) -> list[str]:
    """Return the GGUF file of a repository, or all parts of it, in any folder; nothing if there is none and no `variant` is given.

    `variant`: its path, or a part of its name between other signs, such as Q4_K_M. Raises CheckpointError unless it is one file.
    """
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.endswith(".gguf") and not file.rpartition("/")[2].startswith("mmproj"):
            part = _GGUF_PART.fullmatch(file)
            groups.setdefault(part["stem"] if part else file.removesuffix(".gguf"), []).append(file)
    if variant is not None:
        word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(variant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [stem for stem, parts in groups.items() if variant in parts] or [stem for stem in groups if word.search(stem)]
        if len(found) != 1:
            raise CheckpointError(f"{name} holds {len(found)} GGUF files named {variant}: {_list_variants(name, found or list(groups))}")
        return groups[found[0]]
    if len(groups) > 1:
        raise CheckpointError(f"{name} holds {len(groups)} GGUF files: {_list_variants(name, list(groups))}")
    return next(iter(groups.values()), [])


def is_whole(parts: Sequence[str]) -> bool:
    """Return whether these are all parts of a GGUF file."""
    part = _GGUF_PART.fullmatch(parts[0]) if parts else None
    return bool(parts) and len(parts) == (int(part["count"]) if part else 1)


def _list_variants(name: str, stems: list[str]) -> str:
    if not stems:
        return "it has no GGUF files at all"
    words = sorted(stem.rpartition("/")[2] for stem in stems)
    more = f", and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    example = re.split(r"[-.](?=[^-.]+$)", words[0])[-1]
    return f"{', '.join(words[:_SHOWN])}{more}; name one, as in {name}:{example}"


def find_missing(folder: Path, *, needs_tokenizer: bool = True) -> str | None:
    """Return the first file missing from a downloaded folder, as far as can be determined; None if it is complete."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    if any(name.endswith((".gguf", ".ckpt")) for name in names) or {"params.json", "tokenizer.model"} <= names:
        return None
    if "config.json" not in names:
        return "config.json"
    if needs_tokenizer and not names & {"tokenizer.json", "tokenizer.model"}:
        return "the tokenizer"
    if names & {"model.safetensors", "pytorch_model.bin"}:
        return None
    needed: set[str] = set()
    for index in _INDEXES:
        if index in names:
            try:
                needed |= set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return index
    for match in filter(None, map(_SHARD.fullmatch, names)):
        needed |= {f"{match[1]}-{number:05}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)}
    if not needed and not any(name.endswith(".safetensors") for name in names):
        return "the weights"
    return next(iter(sorted(needed - names)), None)

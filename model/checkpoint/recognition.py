"""Recognize unsupported paths: other formats, other quantizations, adapters, incomplete downloads.

Depends on names, first bytes and config.json; does not read tensors. Every message says what the path is, then what to do.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.spec.file_kind import describe_file
from model.spec.quantization_keys import OTHER_METHODS, SUPPORTED_METHODS
from model.spec.quoting import quote, quote_name
from parallel.errors import CheckpointError
from parallel.regular_file import describe_kind

_SPLIT_GGUF = re.compile(r".+-\d{5}-of-(\d{5})\.gguf")
_SAVE_AGAIN = "load it with transformers and save it again with save_pretrained(folder), which writes safetensors"
_FILES = {
    ".bin": "is a file of torch.save: give its folder, which has to hold a config.json and pytorch_model*.bin",
    ".pt": f"is a file of torch.save, which is not read because its pickle can run code: {_SAVE_AGAIN}",
    ".pth": "is a file of torch.save: only Meta's consolidated.NN.pth next to params.json are read; give their folder",
    ".ckpt": "is a file of torch.save, as PyTorch Lightning writes, not of MindSpore: export the model with save_pretrained()",
    ".onnx": "is an ONNX model, which is not supported: give the original Hugging Face folder or a GGUF file",
    ".npz": "is a NumPy archive, which is not supported: give the original Hugging Face folder or a GGUF file",
    ".h5": f"is a TensorFlow checkpoint, which is not supported: {_SAVE_AGAIN}",
    ".msgpack": f"is a Flax checkpoint, which is not supported: {_SAVE_AGAIN}",
    ".safetensors": "is a safetensors file without a config.json next to it: give a folder that holds both",
    ".zip": "is a zip archive: unpack it first",
}
"""Descriptions by file name suffix, for inconclusive contents."""
_STRATEGY = "strategy files of MindSpore, which tell how ranks were cut and hold no weights: give the folder of the checkpoint itself"
_ZIPPED = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".zip")
_FOLDER_PARTS = (
    ("pytorch_model*.bin", "holds pytorch_model.bin, but no config.json: copy the whole checkpoint"),
    ("qmodel.pt", "holds HQQ weights (qmodel.pt), which are not supported: give the original checkpoint"),
    ("tf_model*.h5", f"holds a TensorFlow checkpoint, which is not supported: {_SAVE_AGAIN}"),
    ("flax_model*.msgpack", f"holds a Flax checkpoint, which is not supported: {_SAVE_AGAIN}"),
    ("*.onnx", "holds an ONNX model, which is not supported: give the original Hugging Face folder or a GGUF file"),
    ("weights*.npz", "holds MLX weights (weights.npz), which are not supported: give the original Hugging Face folder"),
    ("*.pt", f"holds files of torch.save (.pt), which are not read because their pickles can run code: {_SAVE_AGAIN}"),
)
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_FLOAT_NAMES = ("mxfp4", "mxfp6", "mxfp8", "nvfp4")
_DRAFT_WORDS = {"eagle": "an EAGLE", "medusa": "a Medusa", "speculator": "a speculator"}


def name_path(path: Path) -> str | None:
    """Describe an unsupported path in one sentence; None if it is not recognized."""
    try:
        return _name_folder(path) if path.is_dir() else _name_file(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def check_method(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a safetensors folder that is a model head, an adapter or of an unsupported quantization."""
    words = _name_head(config) or _name_method(path, config)
    if (path / "adapter_config.json").is_file() and any(path.glob("adapter_model.*")):
        words = "holds a LoRA adapter next to a model: merge it with merge_and_unload(), or remove adapter_config.json to leave it out"
    if words:
        raise CheckpointError(f"{path} {words}")


def _name_file(path: Path) -> str | None:
    found, suffix = describe_file(path), path.suffix.lower()
    part = _SPLIT_GGUF.fullmatch(path.name)
    if suffix == ".ckpt" and "strategy" in path.name:
        return f"{path} is one of the {_STRATEGY}"
    if found == "is a zip file" or (found is not None and "pickle" in found):
        return f"{path} {_FILES[suffix] if suffix in _ZIPPED else found + ', not a checkpoint'}"
    if found is not None:
        return f"{path} {found}"
    if part:
        return f"{path} is no whole part of a split GGUF file of {int(part[1])} parts: download it again"
    return f"{path} {_FILES[suffix]}" if suffix in _FILES and suffix != ".ckpt" else None


def _name_folder(path: Path) -> str | None:
    names = {file.name for file in path.iterdir()}
    if not names:
        return f"{path} is an empty folder"
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) > 1:
        return f"{path} holds {len(ggufs)} GGUF files: give one of them, such as {quote_name(ggufs[0])}"
    if "adapter_config.json" in names:
        return f"{path} {_name_adapter(path)}"
    if any("strategy" in name for name in names if name.endswith(".ckpt")):
        return f"{path} holds {_STRATEGY}"
    for pattern, words in _FOLDER_PARTS:
        if any(path.glob(pattern)):
            return f"{path} {words}"
    shards = sorted(path / name for name in names if name.endswith(".safetensors"))
    if shards and "config.json" not in names:
        return f"{path} holds safetensors files, but no config.json: copy the whole checkpoint"
    for shard in shards:
        if not shard.exists():
            return f"{shard} is a broken link, to {shard.readlink()}"
        if not shard.is_file():
            return f"{shard} is {describe_kind(shard.stat().st_mode)}, but a regular file is needed"
    inner = _find_inner(path)
    if inner:
        more = f", one of {len(inner)} such folders" if len(inner) > 1 else ""
        return f"{path} holds no checkpoint itself: give {inner[0]}{more}"
    if "config.json" in names:
        return f"{path} holds config.json, but no weights (*.safetensors): copy or download them"
    if "params.json" in names:
        return f"{path} holds params.json, but no consolidated.NN.pth: copy or download them"
    return None


def _name_adapter(path: Path) -> str:
    base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
    of = f" for {quote_name(base)}" if isinstance(base, str) and base else ""
    return f"is a LoRA adapter{of}, not a model: merge it with PEFT's merge_and_unload(), save the result and give that folder"


def _find_inner(path: Path) -> list[Path]:
    """Return subfolders that look like checkpoints: snapshots of a hub cache, or folders of a download."""
    places = path / "snapshots" if (path / "snapshots").is_dir() else path
    marks = ("config.json", "layout.json", "params.json", "param_name_map.json")

    def is_checkpoint(folder: Path) -> bool:
        return any((folder / mark).is_file() for mark in marks) or (folder / "rank_0").is_dir() or any(folder.glob("*.ckpt"))

    return sorted(one for one in places.iterdir() if one.is_dir() and is_checkpoint(one))


def _name_head(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures")
    names = [*architectures, config.get("model_type")] if isinstance(architectures, list) else [config.get("model_type")]
    for name in names:
        for word, what in _DRAFT_WORDS.items():
            if isinstance(name, str) and word in name.lower():
                return f"is {what} draft head ({quote(name)}), not a model: give the model that it was trained for"
    if "medusa_num_heads" in config:
        return "is a Medusa draft head (medusa_num_heads), not a model: give the model that it was trained for"
    if "draft_vocab_size" in config:
        return "is an EAGLE draft head (draft_vocab_size), not a model: give the model that it was trained for"
    return None


def _name_method(path: Path, config: Mapping[str, Any]) -> str | None:
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, Mapping) else {}
    method = settings.get("quant_method")
    method = method.lower() if isinstance(method, str) else None
    tail = f"which are not supported; supported: {SUPPORTED_METHODS}"
    if "quantization" in config and method is None:
        return f"holds MLX quantized weights (quantization in config.json), {tail}, or a folder without quantization"
    if method in OTHER_METHODS:
        kind = settings.get("quant_algo") or settings.get("quant_type") or settings.get("weights") or settings.get("fmt")
        more = f" ({kind})" if isinstance(kind, str) and len(kind) < 20 and kind.isprintable() else ""
        return f"holds {OTHER_METHODS[method]}{more} weights (quant_method {quote(method)}), {tail}"
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return f"holds bitsandbytes weights, {tail}"
    if method == "compressed-tensors":
        return _name_float_type(settings, tail)
    return None


def _name_float_type(settings: Mapping[str, Any], tail: str) -> str | None:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        format = group.get("format") or settings.get("format") if isinstance(group, Mapping) else None
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("type") == "float" and format not in _FLOAT_FORMATS:
            kind = f"FP{weights.get('num_bits')}" if type(weights.get("num_bits")) is int else "float"
            kind = next((name.upper() for name in _FLOAT_NAMES if isinstance(format, str) and format.startswith(name)), kind)
            return f"holds {kind} weights (compressed-tensors format {quote(format)}), {tail}"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 20:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

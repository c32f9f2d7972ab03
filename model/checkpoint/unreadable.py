"""Files and folders that users take for checkpoints but that hold none, and what to do about each.

Looks at names and first bytes only; what can be read is told by the table in `model/checkpoint/formats.py`.
"""

from pathlib import Path

_LFS = b"version https://git-lfs"
_WEIGHT_ENDS = (".safetensors", ".gguf", ".ckpt", ".pth", ".bin")


def explain_unreadable(path: Path) -> str | None:
    """Why nothing there can be read, in a sentence; None where nothing speaks against it."""
    try:
        return _explain_folder(path) if path.is_dir() else _explain_file(path)
    except OSError as error:
        return f"the checkpoint {path} cannot be read: {error.strerror}"


def _explain_folder(folder: Path) -> str | None:
    entries = list(folder.iterdir())
    if not entries:
        return f"the checkpoint {folder} is an empty folder"
    names = {entry.name for entry in entries}
    for entry in entries:
        if entry.name.endswith(_WEIGHT_ENDS) and entry.is_file() and _is_lfs_pointer(entry):
            return f"{entry} is a Git LFS pointer, not the weights: run git lfs pull in {folder}"
    readable = any(name.endswith((".safetensors", ".gguf", ".ckpt", ".pth", ".index.json")) for name in names)
    if not readable and any(name.endswith((".bin", ".pt", ".msgpack", ".h5", ".onnx")) for name in names):
        kind = next(name for name in sorted(names) if name.endswith((".bin", ".pt", ".msgpack", ".h5", ".onnx")))
        return f"{folder} holds {kind}, which is not read: save the model as safetensors with save_pretrained(..., safe_serialization=True)"
    if "adapter_config.json" in names and "config.json" not in names:
        return f"{folder} holds a LoRA adapter, not a model: merge it into its base model first"
    return None


def _explain_file(file: Path) -> str | None:
    if not file.is_file():
        return f"the checkpoint {file} is neither a file nor a folder"
    if _is_lfs_pointer(file):
        return f"{file} is a Git LFS pointer, not the weights: run git lfs pull in {file.parent}"
    if file.suffix == ".bin":
        return f"{file} holds PyTorch .bin weights, which are not read: save the model as safetensors"
    return None


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_LFS)) == _LFS

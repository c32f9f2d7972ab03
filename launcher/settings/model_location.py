"""Resolution of MODEL to a path or a Hugging Face Hub repository, and the YAML in its folder.

Depends on neither PyTorch nor the checkpoint readers, so that errors are reported immediately.
"""

import difflib
from pathlib import Path

from launcher.settings.hub_models import fetch_model, parse_hub_name
from launcher.settings.yaml_file import YAML_ENDS
from model.checkpoint.recognition import name_path
from model.spec.file_kind import GGUF_WORDS, describe_file
from parallel.errors import CheckpointError
from parallel.regular_file import describe_kind

_WEIGHT_ENDS = (".safetensors", ".gguf", ".ckpt", ".pth")
"""Extensions of files that a format may read weights from."""
_READABLE_ENDS = (*_WEIGHT_ENDS, ".json")
_LFS = "Git LFS"


def find_model(text: str, *, offline: bool) -> tuple[Path, str | None]:
    """Return a model's path, and its id if it comes from the Hub. Raises CheckpointError if it does not exist."""
    path = Path(text).expanduser()
    name = parse_hub_name(text)
    is_url = "://" in text
    if name is not None and not _exists(path) and (is_url or not _exists(Path(path.parts[0]))):
        return fetch_model(name, offline=offline), name.id
    if is_url:
        raise CheckpointError(f"{text} is not a model page on huggingface.co: give org/name, or download it and give its path")
    if not _exists(path):
        raise CheckpointError(_explain_absence(path))
    if path.suffix in YAML_ENDS:
        raise CheckpointError(f"{path} is a configuration, not a checkpoint: give it with --config")
    try:
        problem = _name_unreadable(path)
    except OSError as error:
        problem = f"the checkpoint {path} cannot be read: {error.strerror}"
    if problem:
        raise CheckpointError(problem)
    return path, None


def _explain_absence(path: Path) -> str:
    try:
        if path.is_symlink():
            return f"{path} is a broken link, to {path.readlink()}"
    except OSError as error:
        return f"the checkpoint {path} cannot be read: {error.strerror}"
    return f"the checkpoint {path} does not exist{_suggest(path)}"


def _name_unreadable(path: Path) -> str | None:
    """Return a sentence about why no format can read a path; None if the formats have to inspect it."""
    if path.is_file():
        words = describe_file(path)
        if path.name.endswith(_READABLE_ENDS) or words == GGUF_WORDS:  # a GGUF file is read under any name
            return f"{path} {words}" if words and _LFS in words else None
        return name_path(path)
    if not path.is_dir():
        return f"the checkpoint {path} is {describe_kind(path.stat().st_mode)}, but a file or a folder is needed"
    entries = list(path.iterdir())
    for entry in entries:
        words = describe_file(entry) if entry.name.endswith((*_READABLE_ENDS, ".bin")) and entry.is_file() else None
        if words and _LFS in words:
            return f"{entry} {words}"
    return None if any(map(_may_hold_weights, entries)) else name_path(path)


def _may_hold_weights(entry: Path) -> bool:
    if entry.name.endswith(".bin"):
        return entry.name.startswith("pytorch_model") and (entry.parent / "config.json").is_file()
    return entry.is_dir() or (entry.name.endswith(_WEIGHT_ENDS) and not entry.name.startswith("adapter_"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long or contains a null byte
        return False


def _suggest(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""

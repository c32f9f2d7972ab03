"""Where the MODEL of a command line is: a path, or a repository of the Hugging Face hub; and the YAML in its folder.

Depends on neither PyTorch nor the checkpoint readers, so that errors are reported at once.
"""

import difflib
from pathlib import Path

import yaml

from launcher.hub_models import fetch_model, parse_hub_name
from model.checkpoint.unreadable import explain_unreadable
from parallel.errors import CheckpointError, ConfigError

YAML_ENDS = (".yaml", ".yml")


def find_model(text: str, *, offline: bool) -> tuple[Path, str | None]:
    """The path of a model, and its id where it is one of the hub. Raises CheckpointError when there is none."""
    path = Path(text).expanduser()
    name = parse_hub_name(text)
    is_url = "://" in text
    if name is not None and not _exists(path) and (is_url or not _exists(Path(path.parts[0]))):
        return fetch_model(name, offline=offline), name.id
    if is_url:
        raise CheckpointError(f"{text} is not a model page on huggingface.co: give org/name, or download it and give its path")
    if not _exists(path):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a broken link, to {path.readlink()}")
        raise CheckpointError(f"the checkpoint {path} does not exist{_suggest(path)}")
    if path.suffix in YAML_ENDS:
        raise CheckpointError(f"{path} is a configuration, not a checkpoint: give it with --config")
    if problem := explain_unreadable(path):
        raise CheckpointError(problem)
    return path, None


def find_yaml(folder: Path) -> Path | None:
    """The MindFormers YAML file of a folder, told by its `model.model_config`; None without one. Raises ConfigError for several."""
    if not folder.is_dir():
        return None
    found = [path for path in sorted(folder.iterdir()) if path.suffix in YAML_ENDS and path.is_file() and _is_mindformers(path)]
    if len(found) > 1:
        raise ConfigError(f"{folder} holds {len(found)} MindFormers YAML files ({found[0].name}, {found[1].name}): choose with --config")
    return found[0] if found else None


def _is_mindformers(path: Path) -> bool:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    model = raw.get("model") if isinstance(raw, dict) else None
    return isinstance(model, dict) and isinstance(model.get("model_config"), dict)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def _suggest(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""

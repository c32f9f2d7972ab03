"""Locating and parsing a MindFormers YAML file. Does not interpret its keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from parallel.regular_file import MAX_YAML_BYTES, read_text

YAML_ENDS = (".yaml", ".yml")
_FILE_ENDS = (".ckpt", ".safetensors")
"""Extensions of checkpoint files that come with a YAML."""


def find_yaml(checkpoint: Path) -> Path | None:
    """Return the MindFormers YAML of a checkpoint, recognized by its `model.model_config`; None if there is none.

    It is in the folder of the checkpoint, or in the one that holds its rank_N folder. Of several, the only one with run_mode predict is
    chosen. Raises ConfigError if that leaves several.
    """
    folder = checkpoint.parent if checkpoint.suffix in _FILE_ENDS else checkpoint
    if not folder.is_dir():
        return None
    if folder != checkpoint and (folder / "config.json").exists():
        return None  # belongs to the file; the YAML may belong to another one
    found = _list_yaml(folder)
    if not found and re.fullmatch(r"rank_\d+", folder.name):
        found = _list_yaml(folder.resolve().parent)
    predicting = [path for path, raw in found.items() if raw.get("run_mode") == "predict"]
    chosen = predicting if len(predicting) == 1 else list(found)
    if len(chosen) > 1:
        raise ConfigError(f"{folder} holds {len(chosen)} MindFormers YAML files ({chosen[0].name}, {chosen[1].name}): choose with --config")
    return chosen[0] if chosen else None


def _list_yaml(folder: Path) -> dict[Path, Mapping[str, Any]]:
    """Return the contents of a folder's MindFormers YAML files."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in YAML_ENDS or not path.is_file():
            continue
        try:
            raw = read_mapping(path)
        except ConfigError:
            continue
        model = raw.get("model")
        if isinstance(model, Mapping) and isinstance(model.get("model_config"), Mapping):
            found[path] = raw
    return found


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which PyYAML silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Return the content of the file. Raises ConfigError naming the file if it is not a YAML mapping."""
    try:
        raw = yaml.load(read_text(path, MAX_YAML_BYTES, encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a MindFormers YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raise ConfigError(f"{path} is empty; start from one of the files in configs/")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, but a mapping of keys is needed")
    return raw

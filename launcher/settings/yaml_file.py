"""Locating and parsing a MindFormers YAML file. Does not interpret its keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from parallel.regular_file import MAX_YAML_BYTES, read_text

YAML_ENDS = (".yaml", ".yml")


def find_yaml(checkpoint: Path) -> Path | None:
    """Return the MindFormers YAML in a checkpoint's folder, recognized by its `model.model_config`; None if there is none.

    Raises ConfigError if there are several.
    """
    folder = checkpoint.parent if checkpoint.suffix == ".ckpt" else checkpoint
    if not folder.is_dir():
        return None
    if folder != checkpoint and (folder / "config.json").exists():
        return None  # belongs to the .ckpt; the YAML may belong to another one
    found = [path for path in sorted(folder.iterdir()) if path.suffix in YAML_ENDS and path.is_file() and _is_mindformers(path)]
    if len(found) > 1:
        raise ConfigError(f"{folder} holds {len(found)} MindFormers YAML files ({found[0].name}, {found[1].name}): choose with --config")
    return found[0] if found else None


def _is_mindformers(path: Path) -> bool:
    try:
        model = read_mapping(path).get("model")
    except ConfigError:
        return False
    return isinstance(model, Mapping) and isinstance(model.get("model_config"), Mapping)


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

"""MindFormers' configuration objects: dictionaries with attribute access, read from and written to YAML."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.host.atomic_write import atomic_write
from launcher.settings.yaml_file import YAML_ENDS, read_mapping
from launcher.settings.yaml_settings import DEFAULT_SEQ_LENGTH
from parallel.errors import ConfigError


class MindFormerConfig(dict[str, Any]):
    """A YAML file of MindFormers as nested dictionaries with attribute access; a missing attribute is None.

    Takes paths of YAML files (later ones override earlier ones), mappings, and keys. `None` written bare in a file is the text 'None', as
    YAML has it. Values are checked when a context or a network is built from them.
    """

    def __init__(self, *sources: "str | os.PathLike[str] | Mapping[str, Any]", **keys: Any) -> None:
        super().__init__()
        for source in (*sources, keys):
            self.update(source if isinstance(source, Mapping) else read_mapping(_check_name(source)))
        self.source_files = tuple(str(source) for source in sources if not isinstance(source, Mapping))

    def update(self, *sources: Any, **keys: Any) -> None:
        """Set keys; mappings become configurations too."""
        for key, value in dict(*sources, **keys).items():
            self[key] = value

    def merge_from_dict(self, options: Mapping[str, Any]) -> None:
        """Set keys that may be nested (`{"model.model_config.seq_length": 2048}`); mappings are merged key by key."""
        for path, value in options.items():
            config, (*parents, key) = self, str(path).split(".")
            for parent in parents:
                if not isinstance(config.get(parent), MindFormerConfig):
                    config[parent] = {}
                config = config[parent]
            if isinstance(value, Mapping) and isinstance(config.get(key), MindFormerConfig):
                config[key].merge_from_dict(value)
            else:
                config[key] = value

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries."""
        return {key: value.to_dict() if isinstance(value, MindFormerConfig) else value for key, value in self.items()}

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write a YAML file atomically."""
        try:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ConfigError(f"the configuration cannot be written as YAML: {' '.join(str(error).split())}") from None
        atomic_write(Path(path), text)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, MindFormerConfig(value) if type(value) is dict else value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, after setting it to the default if it is missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python, such as copying
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "source_files":
            super().__setattr__(name, value)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(name)
        del self[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> "MindFormerConfig":
        made = type(self)(copy.deepcopy(dict(self), memo))
        made.source_files = self.source_files
        return made


class LlamaConfig(MindFormerConfig):
    """The keys of `model.model_config`: `LlamaConfig(**config.model.model_config)`."""

    def __init__(self, **keys: Any) -> None:
        super().__init__({"seq_length": DEFAULT_SEQ_LENGTH, **keys})


def _check_name(source: "str | os.PathLike[str]") -> Path:
    if Path(source).suffix not in YAML_ENDS:
        raise ConfigError(f"MindFormerConfig got {source!r}, but a path that ends in .yaml or .yml, or a mapping, is needed")
    return Path(source)

"""The adapters that --lora names, and which of them a command uses. Depends on neither PyTorch nor the weights."""

from collections.abc import Collection, Iterable
from pathlib import Path

from model.spec.lora_config import read_lora_config
from parallel.errors import ConfigError
from parallel.regular_file import describe_kind


def list_adapters(words: Iterable[str]) -> dict[str, Path]:
    """Return the folder of each adapter by its name, given NAME=PATH, or PATH for one named like its folder.

    Raises ConfigError for a name that is given twice, or empty.
    """
    adapters: dict[str, Path] = {}
    for word in words:
        name, equals, text = word.partition("=")
        path = Path(text if equals else word).expanduser()
        name = name if equals else path.absolute().name
        if not name.strip() or not str(text if equals else word).strip():
            raise ConfigError(f"--lora is {word!r}, but NAME=PATH is needed")
        if name in adapters:
            raise ConfigError(f"--lora names two adapters {name!r}, {adapters[name]} and {path}: give each a name of its own")
        adapters[name] = path
    return adapters


def check_adapters(words: Iterable[str]) -> None:
    """Check the folders and settings files of the adapters. Raises ConfigError, CheckpointError."""
    for name, path in list_adapters(words).items():
        if not path.exists():
            raise ConfigError(f"--lora {name}={path}: this folder does not exist")
        if not path.is_dir():
            kind = "a file" if path.is_file() else describe_kind(path.stat().st_mode)
            raise ConfigError(f"--lora {name}={path} is {kind}, but the folder of a PEFT adapter is needed")
        read_lora_config(path)


def choose_adapter(words: Collection[str], chosen: str | None) -> str | None:
    """Return the adapter that all prompts of a command use: `chosen`, else the only one. Raises ConfigError."""
    names = list(list_adapters(words))
    if chosen is None:
        if len(names) > 1:
            raise ConfigError(f"--lora gives {len(names)} adapters, {', '.join(names)}: choose one with --adapter")
        return names[0] if names else None
    if chosen not in names:
        raise ConfigError(f"--adapter is {chosen!r}, but --lora gives {', '.join(names) or 'no adapter'}")
    return chosen

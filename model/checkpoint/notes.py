"""Notes on an opened checkpoint that are not errors: unused keys, and stored values that are ignored as in other programs."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from model.checkpoint.source import CheckpointSource
from model.checkpoint.stored_facts import describe_rotary
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme, describe_scheme_keys
from model.spec.weights import plan_weights

_SETTINGS = "config.json"


@runtime_checkable
class HasNotes(Protocol):
    """A source with its own notes."""

    notes: tuple[str, ...]


def name_settings(source: CheckpointSource) -> Path:
    """Name the file with the settings of a checkpoint for messages: its config.json, or the checkpoint itself."""
    file = source.path / _SETTINGS
    return file if file.is_file() else source.path


def list_dropped(source: CheckpointSource, config: LlamaConfig, scheme: Scheme) -> list[str]:
    """Return the names of stored tensors that the model does not use; each is compared with the value used instead."""
    specs = plan_weights(config, scheme)
    return [name for name in source.tensors if name not in specs]


def list_notes(source: CheckpointSource, config: LlamaConfig) -> list[str]:
    """Return one line per kind of unused data."""
    notes = list(source.notes) if isinstance(source, HasNotes) else []
    file = name_settings(source)
    if file.name == _SETTINGS:
        notes += config.architecture.keys.describe(source.config, str(file))
        notes += [f"{file}: {line}" for line in describe_scheme_keys(source.config)]
    return notes + describe_rotary(source, config)

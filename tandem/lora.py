"""LoRA adapters of an `LLM`: loaded when it is created, chosen by each call."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, RequestError

_VLLM_LIMITS = ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras")
"""Options of vLLM that size its memory for adapters, which are loaded later there."""


@dataclass(frozen=True)
class LoRARequest:
    """One adapter of an `LLM`, with vLLM's fields; only the name chooses it."""

    lora_name: str
    lora_int_id: int = 0
    """Not used."""
    lora_path: str | os.PathLike[str] | None = None
    """If given, it has to be the folder that was loaded under this name."""

    def find_name(self, loaded: Mapping[str, str]) -> str:
        """Return the name among the loaded adapters. Raises RequestError for an adapter that is not loaded."""
        path = loaded.get(self.lora_name)
        if path is None:
            known = f"the adapters are {', '.join(loaded)}" if loaded else "this LLM has no adapters"
            raise RequestError(f"there is no adapter {self.lora_name!r}: {known}; give LLM(..., lora={{{self.lora_name!r}: path}})")
        if self.lora_path is not None and Path(self.lora_path).expanduser().resolve() != Path(path).resolve():
            raise RequestError(f"lora_path of {self.lora_name!r} is {os.fspath(self.lora_path)}, but {path} was loaded under this name")
        return self.lora_name


def read_adapters(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an `LLM` with adapters as texts NAME=PATH. Raises ConfigError."""
    given = {name: value for name, value in options.items() if name not in _VLLM_LIMITS}
    lora = given.get("lora")
    if options.get("enable_lora") and not lora:
        raise ConfigError("LLM loads adapters when it is created: add lora={name: path} next to enable_lora")
    if isinstance(lora, Mapping):
        given["lora"] = [f"{name}={os.fspath(path)}" for name, path in lora.items()]
    return given

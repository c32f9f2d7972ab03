"""The file for scales of an int8 KV cache that only tandem reads.

Other programs keep their cache in float, and vLLM refuses tensors that its model has no place for. Its loader, like others, takes every
*.safetensors file of a folder, so the file has another ending; its format is safetensors. Checkpoints with the scales among their weights
load all the same.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model.spec.quantization_sections import KV_CACHE_KEY

CACHE_SCALES_FILE = "tandem_kv_cache_scales.st"


def list_cache_scales(config: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """Return which tensors belong into the file, given the values of config.json: all scales, if only tandem knows the cache's type."""
    if not config.get(KV_CACHE_KEY):
        return frozenset()
    return frozenset(name for name in names if name.endswith((".k_scale", ".v_scale")))


def find_cache_scales(folder: Path) -> list[Path]:
    """Return the file of a folder, if there is one."""
    path = folder / CACHE_SCALES_FILE
    return [path] if path.is_file() else []

"""The metadata of a GGUF file, each of the type and size that its key needs.

Knows which values a Llama model can have; not what they mean for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.quoting import quote
from parallel.errors import CheckpointError

_MAX_WHOLE, _MAX_FLOAT32 = (1 << 31) - 1, 3.4e38
NO_TOKEN = (1 << 32) - 1
"""llama.cpp's -1 in an unsigned number: there is no such token."""
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class _Kind:
    """Which values are accepted."""

    words: str
    """In a message, after "but"."""
    accepts: Callable[[Any], bool]


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


_SIZE = _Kind(f"one whole number from 1 to {_MAX_WHOLE}, for all layers,", _is_whole(1, _MAX_WHOLE))
_COUNT = _Kind("a whole number of at least 0", _is_whole(0, _MAX_WHOLE))
_TOKEN = _Kind("the number of a token", _is_whole(0, NO_TOKEN))
_NUMBER = _Kind("a number above 0", lambda value: type(value) in (int, float) and 0 < value < _MAX_FLOAT32)
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_LIST = _Kind("an array", lambda value: isinstance(value, list))

_KINDS: Mapping[str, _Kind] = {
    "general.architecture": _TEXT,
    "split.count": _COUNT,
    "llama.expert_count": _COUNT,
    "llama.embedding_length": _SIZE,
    "llama.feed_forward_length": _SIZE,
    "llama.block_count": _SIZE,
    "llama.attention.head_count": _SIZE,
    "llama.attention.head_count_kv": _SIZE,
    "llama.attention.key_length": _SIZE,
    "llama.context_length": _SIZE,
    "llama.attention.layer_norm_rms_epsilon": _NUMBER,
    "llama.rope.freq_base": _NUMBER,
    "llama.rope.scaling.type": _TEXT,
    "llama.rope.scaling.factor": _NUMBER,
    "tokenizer.ggml.tokens": _LIST,
    "tokenizer.ggml.bos_token_id": _TOKEN,
    "tokenizer.ggml.eos_token_id": _TOKEN,
    "tokenizer.ggml.padding_token_id": _TOKEN,
}


class GgufMetadata:
    """The values of one file. Raises CheckpointError, which names the key, for one that is missing or cannot be what it is for."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self._values, self._path = values, path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def read(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value, or the default where there is none."""
        if key not in self._values:
            if default is _REQUIRED:
                raise CheckpointError(f"{self._path} lacks the metadata key {key}: convert it again with a current llama.cpp")
            return default
        value, kind = self._values[key], _KINDS[key]
        if not kind.accepts(value):
            raise CheckpointError(f"{self._path}: {key} is {quote(value)}, but {kind.words} is needed: copy it again or convert it again")
        return value

    def read_token(self, key: str) -> int | None:
        """The number of a special token; None where there is none."""
        found = self.read(f"tokenizer.ggml.{key}_token_id", NO_TOKEN)
        return None if found == NO_TOKEN else int(found)

    def clear(self) -> None:
        """Forget the values: a vocabulary alone is tens of megabytes of Python strings, in every rank."""
        self._values.clear()

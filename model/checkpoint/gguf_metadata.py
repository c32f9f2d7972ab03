"""The metadata of a GGUF file, with the type and range of each value checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.architecture import GgufNames
from model.spec.key_table import KeyTable
from model.spec.quoting import quote
from parallel.errors import CheckpointError, ConfigError

_MAX_WHOLE, _MAX_FLOAT32 = (1 << 31) - 1, 3.4e38
NO_TOKEN = (1 << 32) - 1
"""llama.cpp's -1 as an unsigned number: no such token."""
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class _Kind:
    """Accepted values of a key."""

    words: str
    """Description for messages, following "but"."""
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
    "llama.attention.value_length": _SIZE,
    "llama.rope.dimension_count": _SIZE,
    "llama.rope.scale_linear": _NUMBER,
    "llama.rope.scaling.factor": _NUMBER,
    "llama.rope.scaling.original_context_length": _SIZE,
    "llama.vocab_size": _SIZE,
    "tokenizer.ggml.tokens": _LIST,
    "tokenizer.ggml.bos_token_id": _TOKEN,
    "tokenizer.ggml.eos_token_id": _TOKEN,
    "tokenizer.ggml.padding_token_id": _TOKEN,
    "tokenizer.ggml.eot_token_id": _TOKEN,
    "tokenizer.ggml.eom_token_id": _TOKEN,
    "tokenizer.ggml.fim_pad_token_id": _TOKEN,
    "tokenizer.ggml.fim_rep_token_id": _TOKEN,
    "tokenizer.ggml.fim_sep_token_id": _TOKEN,
    "tokenizer.ggml.token_type": _LIST,
}
_FAMILY_KINDS: Mapping[str, _Kind] = {
    "llama.attention.sliding_window": _COUNT,
    "llama.expert_feed_forward_length": _SIZE,
    "llama.expert_used_count": _SIZE,
}
"""Keys that are read for some families only (GgufNames)."""
_PREFIX = "llama."


GGUF_KEYS = KeyTable(
    name="GGUF",
    read=frozenset({*_KINDS, "split.count", "split.no", "split.tensors.count"}),
    fixed={
        "general.type": ("model",),
        "llama.attention.causal": (True,),
        "llama.attention.clamp_kqv": (0,),
        "llama.attention.key_length_mla": (0,),
        "llama.attention.max_alibi_bias": (0,),
        "llama.attention.scale": (0,),
        "llama.attention.sliding_window": (0,),
        "llama.attention.temperature_length": (0,),
        "llama.attention.temperature_scale": (0,),
        "llama.attention.value_length_mla": (0,),
        "llama.attn_logit_softcapping": (0,),
        "llama.embedding_scale": (0, 1),
        "llama.expert_feed_forward_length": (0,),
        "llama.expert_shared_count": (0,),
        "llama.expert_used_count": (0,),
        "llama.final_logit_softcapping": (0,),
        "llama.interleave_moe_layer_step": (0,),
        "llama.leading_dense_block_count": (0,),
        "llama.logit_scale": (0, 1),
        "llama.pooling_type": (0,),
        "llama.residual_scale": (0, 1),
        "llama.rope.scaling.attn_factor": (1,),
        "llama.rope.scaling.yarn_attn_factor": (1,),
        "llama.rope.scaling.yarn_beta_fast": (32,),
        "llama.rope.scaling.yarn_beta_slow": (1,),
        "llama.rope.scaling.yarn_ext_factor": (1, -1),
        "llama.rope.scaling.yarn_log_multiplier": (0,),
        "llama.rope.freq_base_swa": (),
        "llama.swin_norm": (False,),
        "llama.tensor_data_layout": ("Meta AI original pth",),
        "llama.use_parallel_residual": (False,),
    },
    harmless=frozenset(
        {
            "llama.attention.layer_norm_epsilon",
            "llama.rope.scaling.finetuned",
            "quantize.imatrix.chunks_count",
            "quantize.imatrix.dataset",
            "quantize.imatrix.entries_count",
            "quantize.imatrix.file",
        }
    ),
    harmless_prefixes=("general.", "quantize.", "split.", "tokenizer.", "training."),
)
"""Keys of a file of architecture llama, and of another one with its own prefix; model/text/gguf_vocabulary.py reads those of the
tokenizer. Unknown keys are reported."""


class GgufMetadata:
    """The values of one file. Raises CheckpointError naming the key if it is missing or its value is invalid."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self._values, self._path = values, path
        found = values.get("general.architecture")
        self._prefix = f"{found}." if isinstance(found, str) else _PREFIX

    def check_keys(self, family: GgufNames) -> tuple[str, ...]:
        """Return notes on unused keys. Raises CheckpointError for an unsupported value that changes the arithmetic."""
        table = GGUF_KEYS.adapt(GGUF_KEYS.name, read=[_PREFIX + key for key in (*family.sizes, *family.optional)])
        values = {self._find_key(key): value for key, value in self._values.items()}
        try:
            table.check(values, str(self._path))
        except ConfigError as error:
            raise CheckpointError(str(error).replace(_PREFIX, self._prefix)) from None
        return tuple(line.replace(_PREFIX, self._prefix) for line in table.describe(values, str(self._path)))

    def _find_key(self, key: str) -> str:
        """Return the key of the table for one of the file."""
        if self._prefix == _PREFIX:
            return key
        if key.startswith(_PREFIX):
            return f"unused {key}"
        return _PREFIX + key.removeprefix(self._prefix) if key.startswith(self._prefix) else key

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def read(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return the value, or the default if it is missing. Keys have the prefix `llama.`, whatever the architecture."""
        kind = _KINDS[key] if key in _KINDS else _FAMILY_KINDS[key]
        key = self._prefix + key.removeprefix(_PREFIX) if key.startswith(_PREFIX) else key
        if key not in self._values:
            if default is _REQUIRED:
                raise CheckpointError(f"{self._path} lacks the metadata key {key}: convert it again with a current llama.cpp")
            return default
        value = self._values[key]
        if not kind.accepts(value):
            raise CheckpointError(f"{self._path}: {key} is {quote(value)}, but {kind.words} is needed: copy it again or convert it again")
        return value

    def read_token(self, key: str) -> int | None:
        """Return the id of a special token, or None."""
        found = self.read(f"tokenizer.ggml.{key}_token_id", NO_TOKEN)
        return None if found == NO_TOKEN else int(found)

    def clear(self) -> None:
        """Drop the values: a vocabulary alone takes tens of megabytes of Python strings on every rank."""
        self._values.clear()

"""Settings from a MindFormers YAML, parsed and validated.

Depends on the file's keys and the defaults of MindFormers' LlamaConfig; not on the command line, the environment or weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.settings.quantization import QuantizationSettings, build_quantization
from launcher.settings.rope_scaling import ROPE_SCALING, describe_scaling, read_rope_scaling
from launcher.settings.yaml_family import DEFAULT_TYPE, find_family, read_biased
from launcher.settings.yaml_file import find_yaml, read_mapping
from launcher.settings.yaml_null import is_null
from launcher.settings.yaml_schema import check_keys, list_warnings
from model.spec.config import LlamaConfig, build_config
from model.spec.families import list_architectures
from model.spec.rope_scaling import build_scaling
from model.spec.scheme import Scheme
from parallel.errors import ConfigError

_HUGGING_FACE_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
    "intermediate_size": "intermediate_size",
    "theta": "rope_theta",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
"""Maps keys of model_config to keys of config.json."""

_NOT_COMPARED = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""A YAML may use other stop or padding tokens than the checkpoint."""

_MODEL_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CACHE_DTYPES = ("auto", "int8", "float")
DEFAULT_SEQ_LENGTH = 2048
"""MindFormers' default."""
_DEFAULT_MULTIPLE_OF = 256
_DEFAULT_COMPUTE_DTYPE = "float16"

_FLOATS = {"rms_norm_eps", "rope_theta", "top_p", "repetition_penalty", "temperature", "timeout_seconds"}
"""Keys whose integer values are converted to float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """Sampling settings; None means unset."""

    max_length: int | None = None
    """Maximum tokens of prompt and continuation (`max_decode_length`)."""
    do_sample: bool | None = None
    """Sample instead of decoding greedily."""
    top_k: int | None = None
    """Sample from the k most likely tokens; 0 means all."""
    top_p: float | None = None
    """Sample from the most likely tokens with this total probability."""
    repetition_penalty: float | None = None
    """Logits of earlier tokens are divided by this."""
    temperature: float | None = None
    """Logits are divided by this before sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TandemSettings:
    """Settings under `tandem:`; None means unset."""

    threads_per_rank: int | None = None
    """CPU threads per rank."""
    collectives: str | None = None
    """Transport between ranks: "auto", "shm", "gloo" or "nccl"."""
    device: str | None = None
    """"auto", "cpu", "cuda" or "npu"."""
    ranks_per_device: int | None = None
    """Maximum ranks that share a device."""
    memory_fraction: float | None = None
    """Fraction of a device's free memory to use."""
    dtype: str | None = None
    """Compute dtype; overrides `compute_dtype`."""
    activations: str | None = None
    """"auto" or "int8": inputs of integer linears."""
    lm_head: str | None = None
    """"auto" or "int8": the output head."""
    temperature: float | None = None
    """Logits are divided by this before sampling."""
    max_batch_size: int = 16
    """Maximum sequences per batch."""
    prefix_cache: bool | None = None
    """Share the KV cache of equal prompt prefixes."""
    speculate: bool | None = None
    """Use speculative decoding for greedy sequences."""
    max_restarts: int | None = None
    """Maximum restarts after a rank failure."""
    timeout_seconds: float | None = None
    """Seconds without progress before the run fails."""
    max_new_tokens: int | None = None
    """Maximum new tokens per prompt."""
    log_dir: str | None = None
    """Folder of the log files."""
    fused_order: str | None = None
    """Row order of fused weights: "auto", "1.3" or "1.4"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings in a YAML file that affect a run; None means unset."""

    source: str
    """Path of the file."""
    model_type: str | None
    """The model family, if the file names it."""
    biased: bool | None
    """Whether queries, keys and values have biases."""
    model_values: Mapping[str, Any]
    """Model sizes and constants set in the file, by their Hugging Face names."""
    multiple_of: int | None
    """The feed-forward width, unless set, is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None
    """Factor for the feed-forward width, unless that is set."""
    max_position_embedding: int | None
    """Maximum position embeddings of the model, in tokens."""
    seq_length: int | None
    """Maximum sequence length of a run, in tokens."""
    model_parallel: int | None
    """Number of ranks."""
    load_checkpoint: str | None
    """Path of the checkpoint."""
    pretrained_model_dir: str | None
    """Hugging Face folder with tokenizer and config, and with the weights unless load_checkpoint is set."""
    compute_dtype: str | None
    """Compute dtype."""
    block_size: int | None
    """Tokens per KV cache block."""
    num_blocks: int | None
    """Maximum number of KV cache blocks."""
    seed: int | None
    """Random seed for sampling."""
    sampling: SamplingSettings
    """Sampling settings."""
    quantization: QuantizationSettings | None
    """Quantization settings."""
    vocab_file: str | None
    """Path of the tokenizer file."""
    tokenizer_file: str | None
    """Path of a tokenizer.json, for fast tokenizers without a vocab_file."""
    chat_template: str | None
    """Chat template, which takes precedence over that of the tokenizer's files."""
    add_bos_token: bool | None
    """Whether texts begin with the begin token; None: as the tokenizer's files say."""
    add_eos_token: bool | None
    """Whether texts end with the end token."""
    tandem: TandemSettings
    """Settings that MindFormers does not have."""
    ignored: tuple[str, ...]
    """Dotted names of ignored keys."""
    warnings: tuple[str, ...]
    """Notes for the user about ignored keys."""

    def __post_init__(self) -> None:
        unknown = self.model_values.keys() - {*_HUGGING_FACE_NAMES.values(), ROPE_SCALING}
        assert not unknown, f"names that config.json does not have: {unknown}"

    def build_model_config(self) -> LlamaConfig:
        """Build the model's config from the file alone, with MindFormers' defaults."""
        # Without a checkpoint, weights would be created in the compute dtype.
        dtype = self.compute_dtype or _DEFAULT_COMPUTE_DTYPE
        return build_config({**self._fill_model_values(), "dtype": dtype}, self.source)

    def build_model_values(self) -> dict[str, Any] | None:
        """Return the substitute for config.json for a checkpoint without one; None if the file does not describe the model."""
        return self._fill_model_values() if self.model_values else None

    def _fill_model_values(self) -> dict[str, Any]:
        kind = self.model_type or "llama"
        # Other types have other defaults, which are those of the family.
        is_default = DEFAULT_TYPE in list_architectures()[kind].mindformers
        values = {"model_type": kind, **(_MODEL_DEFAULTS if is_default else {}), **self.model_values}
        if "hidden_size" not in values:
            raise ConfigError(f"{self.source}: model.model_config lacks hidden_size")
        values.setdefault("intermediate_size", self._derive_intermediate_size(values["hidden_size"]))
        # MindFormers computes rotary positions up to the larger one.
        positions = [count for count in (self.max_position_embedding, self.seq_length) if count]
        values["max_position_embeddings"] = max(positions, default=DEFAULT_SEQ_LENGTH)
        return values

    def decide_cache(self, option: str | None, scheme: Scheme) -> str | None:
        """Return the kv_cache name of a run: the command line's, otherwise that of checkpoint and file. Raises ConfigError if unknown."""
        if option not in (None, *CACHE_DTYPES):
            raise ConfigError(f"kv-cache-dtype is {option!r}, but has to be one of {', '.join(CACHE_DTYPES)}")
        if option == "float":
            return None
        wanted = self.quantization is not None and self.quantization.kvcache_dtype == "int8"
        # Without stored scales, each token gets its own, which needs no calibration.
        return scheme.kv_cache or ("token" if option == "int8" or wanted else None)

    def compare_model_config(self, config: LlamaConfig, checkpoint: str) -> None:
        """Raise ConfigError if the file and the checkpoint's config disagree, naming every such key with both values."""
        names = self.model_values.keys() - {*_NOT_COMPARED, ROPE_SCALING}
        said = {key: self.model_values[name] for key, name in _HUGGING_FACE_NAMES.items() if name in names}
        if self.ffn_dim_multiplier is not None and "intermediate_size" not in said:
            said["intermediate_size"] = self._derive_intermediate_size(said.get("hidden_size", config.hidden_size))
        disagreements = [
            f"{_name_both(key)} is {value} against {found}"
            for key, value in said.items()
            if not _equal(value, found := getattr(config, _HUGGING_FACE_NAMES[key]))
        ]
        if (stretch := self.model_values.get(ROPE_SCALING)) and (wanted := build_scaling(stretch, None)) != config.rope_scaling:
            disagreements.append(
                f"extend_method (rope_scaling) is {describe_scaling(wanted)} against {describe_scaling(config.rope_scaling)}"
            )
        if self.biased not in (None, config.attention_bias):
            disagreements.append(f"qkv_has_bias is {self.biased} against {config.attention_bias}")
        if disagreements:
            raise ConfigError(
                f"{self.source} and {checkpoint} disagree: {', '.join(disagreements)};"
                " use the YAML of this model, or remove these keys from it"
            )

    def _derive_intermediate_size(self, hidden_size: int) -> int:
        width = 4 * hidden_size
        if self.ffn_dim_multiplier is not None:
            width = int((self.ffn_dim_multiplier + 0.01) * width)  # MindFormers adds 0.01
        width = int(2 * width / 3)
        multiple_of = self.multiple_of or _DEFAULT_MULTIPLE_OF
        return -(-width // multiple_of) * multiple_of


def read_settings(path: Path) -> Settings:
    """Read the settings of a YAML file. Raises ConfigError naming the file if it is invalid."""
    raw = read_mapping(path)
    try:
        return build_settings(raw, str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_settings(path: Path | None, checkpoint: str | Path | None = None) -> Settings:
    """Read the YAML of the command line, otherwise the only one next to a MindSpore checkpoint; without one, return the defaults.

    Raises ConfigError as `read_settings` does, and if several files are next to a checkpoint.
    """
    if path is None and checkpoint is not None:
        path = find_yaml(Path(checkpoint))
    return read_settings(path) if path else build_settings({}, "no config")


def build_settings(raw: Mapping[str, Any], source: str) -> Settings:
    """Interpret the content of a YAML file. `source` names it in messages. Raises ConfigError for unknown keys and invalid values."""
    ignored = check_keys(raw)
    model = _find(raw, "model", "model_config") or {}
    family = find_family(model, _find(raw, "model", "arch", "type"))
    own = dict(_find(raw, "tandem") or {})
    if not is_null(own.get("fused_order")):
        own["fused_order"] = str(own["fused_order"])
    return Settings(
        source=source,
        model_type=None if family is None else family.model_type,
        biased=read_biased(model),
        model_values={**_said(model, {name: key for key, name in _HUGGING_FACE_NAMES.items()}), **read_rope_scaling(model)},
        multiple_of=_find(model, "multiple_of"),
        ffn_dim_multiplier=_find(model, "ffn_dim_multiplier"),
        max_position_embedding=_find(model, "max_position_embedding") or _find(model, "max_position_embeddings"),
        seq_length=_find(model, "seq_length"),
        model_parallel=_find(raw, "parallel_config", "model_parallel"),
        load_checkpoint=_find(raw, "load_checkpoint") or _find(raw, "pretrained_model_dir") or None,
        pretrained_model_dir=_find(raw, "pretrained_model_dir") or None,
        compute_dtype=_find(model, "compute_dtype"),
        block_size=_find(model, "block_size"),
        num_blocks=_find(model, "num_blocks"),
        seed=_find(raw, "seed"),
        sampling=SamplingSettings(
            **_said(
                {**model, **({} if is_null(own.get("temperature")) else {"temperature": own["temperature"]})},
                {**_same_names(SamplingSettings), "max_length": "max_decode_length"},
            )
        ),
        quantization=build_quantization(_find(model, "quantization_config")),
        vocab_file=_find(raw, "processor", "tokenizer", "vocab_file") or None,
        tokenizer_file=_find(raw, "processor", "tokenizer", "tokenizer_file") or None,
        chat_template=_find(raw, "processor", "tokenizer", "chat_template") or None,
        add_bos_token=_find(raw, "processor", "tokenizer", "add_bos_token"),
        add_eos_token=_find(raw, "processor", "tokenizer", "add_eos_token"),
        tandem=TandemSettings(**_said(own, _same_names(TandemSettings))),
        ignored=tuple(ignored),
        warnings=tuple(list_warnings(raw)),
    )


def _find(raw: Any, *names: str) -> Any:
    for name in names:
        raw = None if is_null(raw) else raw.get(name)
    return None if is_null(raw) else raw


def _said(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {name: float(raw[key]) if name in _FLOATS else raw[key] for name, key in names.items() if not is_null(raw.get(key))}


def _same_names(kind: type[SamplingSettings] | type[TandemSettings]) -> dict[str, str]:
    return {entry.name: entry.name for entry in fields(kind)}


def _name_both(key: str) -> str:
    name = _HUGGING_FACE_NAMES[key]
    return key if key == name else f"{key} ({name})"


def _equal(here: Any, there: Any) -> bool:
    # Some formats store constants as float32, so 1e-5 is read as 9.999999747378752e-06.
    return math.isclose(here, there, rel_tol=1e-6) if isinstance(here, float) else bool(here == there)

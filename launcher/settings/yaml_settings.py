"""What a MindFormers YAML says about a run, read and checked.

Knows the file's keys and the defaults of MindFormers' LlamaConfig; not the command line, the environment or the weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from launcher.settings.quantization import QuantizationSettings, build_quantization
from launcher.settings.yaml_schema import check_keys, is_null, list_warnings
from model.spec.config import LlamaConfig, build_config
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
"""Key of model_config: key of config.json."""

_NOT_COMPARED = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""A YAML may well end or pad a sequence in another way than the checkpoint does."""

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
_DEFAULT_SEQ_LENGTH = 2048
_DEFAULT_MULTIPLE_OF = 256
_DEFAULT_COMPUTE_DTYPE = "float16"

_FLOATS = {"rms_norm_eps", "rope_theta", "top_p", "repetition_penalty", "temperature", "timeout_seconds"}
"""Keys whose whole numbers are floats all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen; None is not said."""

    max_length: int | None = None
    """Prompt and continuation together, tokens (`max_decode_length`)."""
    do_sample: bool | None = None
    """Draw from the distribution instead of taking the best."""
    top_k: int | None = None
    """Draw from this many best tokens; 0 is all."""
    top_p: float | None = None
    """Draw from the best tokens that together reach this probability."""
    repetition_penalty: float | None = None
    """Scores of tokens seen before are divided by this."""
    temperature: float | None = None
    """Scores are divided by this before drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TandemSettings:
    """The settings under `tandem:`; None is not said."""

    threads_per_rank: int | None = None
    """Compute threads of each rank."""
    collectives: str | None = None
    """What carries tensors between ranks: auto, shm, gloo or nccl."""
    device: str | None = None
    """auto, cpu, cuda or npu."""
    dtype: str | None = None
    """Type to compute in; goes over `compute_dtype`."""
    temperature: float | None = None
    """Scores are divided by this before drawing."""
    max_batch_size: int = 16
    """Sequences decoded together."""
    prefix_cache: bool | None = None
    """Keep equal beginnings of sequences once."""
    speculate: bool | None = None
    """Guess tokens of greedy sequences."""
    max_restarts: int | None = None
    """How often a failed run starts again."""
    timeout_seconds: float | None = None
    """A step without progress for this long is a failure."""
    max_new_tokens: int | None = None
    """Longest continuation, tokens."""
    log_dir: str | None = None
    """Folder of the log files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything in a YAML file that shapes a run; None is not said."""

    source: str
    """The file."""
    model_values: Mapping[str, Any]
    """Sizes and constants that the file says, in Hugging Face's names."""
    multiple_of: int | None
    """The feed-forward's width is rounded up to a multiple of this, where it is not given."""
    ffn_dim_multiplier: float | None
    """Widens the feed-forward, where its width is not given."""
    max_position_embedding: int | None
    """Longest sequence the positions are made for, tokens."""
    seq_length: int | None
    """Longest sequence of a run, tokens."""
    model_parallel: int | None
    """Ranks."""
    load_checkpoint: str | None
    """Path of the checkpoint."""
    compute_dtype: str | None
    """Type to compute in."""
    block_size: int | None
    """Tokens of a block of keys and values."""
    num_blocks: int | None
    """Such blocks at most."""
    seed: int | None
    """Seed of the sampling."""
    sampling: SamplingSettings
    """How the next token is chosen."""
    quantization: QuantizationSettings | None
    """How the weights are quantized."""
    vocab_file: str | None
    """Path of the tokenizer's file."""
    tandem: TandemSettings
    """The settings that MindFormers does not have."""
    ignored: tuple[str, ...]
    """Dotted names of keys that mean nothing here."""
    warnings: tuple[str, ...]
    """What the user should know about the ignored keys."""

    def __post_init__(self) -> None:
        unknown = self.model_values.keys() - set(_HUGGING_FACE_NAMES.values())
        assert not unknown, f"names that config.json does not have: {unknown}"

    def build_model_config(self) -> LlamaConfig:
        """The model's shape from the file alone, with MindFormers' defaults for what it leaves out."""
        # Without a checkpoint the weights would be made in the type that computes.
        dtype = self.compute_dtype or _DEFAULT_COMPUTE_DTYPE
        return build_config({**self._fill_model_values(), "dtype": dtype}, self.source)

    def build_model_values(self) -> dict[str, Any] | None:
        """What stands for config.json beside a checkpoint that has none; None where the file says nothing of the model."""
        return {"model_type": "llama", **self._fill_model_values()} if self.model_values else None

    def _fill_model_values(self) -> dict[str, Any]:
        values = {**_MODEL_DEFAULTS, **self.model_values}
        values.setdefault("intermediate_size", self._derive_intermediate_size(values["hidden_size"]))
        values["max_position_embeddings"] = self.max_position_embedding or self.seq_length or _DEFAULT_SEQ_LENGTH
        return values

    def decide_cache(self, option: str | None, scheme: Scheme) -> str | None:
        """The kv_cache word of a run: the command line's, else what checkpoint and file say. Raises ConfigError for another word."""
        if option not in (None, *CACHE_DTYPES):
            raise ConfigError(f"kv-cache-dtype is {option!r}, but has to be one of {', '.join(CACHE_DTYPES)}")
        if option == "float":
            return None
        wanted = self.quantization is not None and self.quantization.kvcache_dtype == "int8"
        # Without stored scales each token gets its own, which needs no calibration.
        return scheme.kv_cache or ("token" if option == "int8" or wanted else None)

    def compare_model_config(self, config: LlamaConfig, checkpoint: str) -> None:
        """Raise ConfigError when the file and the checkpoint's config disagree, naming every such key and both values."""
        names = self.model_values.keys() - _NOT_COMPARED
        said = {key: self.model_values[name] for key, name in _HUGGING_FACE_NAMES.items() if name in names}
        if self.ffn_dim_multiplier is not None and "intermediate_size" not in said:
            said["intermediate_size"] = self._derive_intermediate_size(said.get("hidden_size", config.hidden_size))
        disagreements = [
            f"{_name_both(key)} is {value} against {found}"
            for key, value in said.items()
            if not _equal(value, found := getattr(config, _HUGGING_FACE_NAMES[key]))
        ]
        if disagreements:
            raise ConfigError(
                f"{self.source} and {checkpoint} disagree: {', '.join(disagreements)};"
                " take the YAML of this model, or remove these keys from it"
            )

    def _derive_intermediate_size(self, hidden_size: int) -> int:
        width = 4 * hidden_size
        if self.ffn_dim_multiplier is not None:
            width = int((self.ffn_dim_multiplier + 0.01) * width)  # the hundredth is MindFormers' own
        width = int(2 * width / 3)
        multiple_of = self.multiple_of or _DEFAULT_MULTIPLE_OF
        return -(-width // multiple_of) * multiple_of


def read_settings(path: Path) -> Settings:
    """The settings of a YAML file. Raises ConfigError, which names the file, for anything that cannot be used."""
    raw = _read_mapping(path)
    try:
        return _build_settings(raw, str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_settings(path: Path | None) -> Settings:
    """Those of the YAML file of a command line, or what holds without one."""
    return read_settings(path) if path else _build_settings({}, "no config")


def _build_settings(raw: Mapping[str, Any], source: str) -> Settings:
    ignored = check_keys(raw)
    model = _find(raw, "model", "model_config") or {}
    own = _find(raw, "tandem") or {}
    return Settings(
        source=source,
        model_values=_said(model, {name: key for key, name in _HUGGING_FACE_NAMES.items()}),
        multiple_of=_find(model, "multiple_of"),
        ffn_dim_multiplier=_find(model, "ffn_dim_multiplier"),
        max_position_embedding=_find(model, "max_position_embedding"),
        seq_length=_find(model, "seq_length"),
        model_parallel=_find(raw, "parallel_config", "model_parallel"),
        load_checkpoint=_find(raw, "load_checkpoint") or None,
        compute_dtype=_find(model, "compute_dtype"),
        block_size=_find(model, "block_size"),
        num_blocks=_find(model, "num_blocks"),
        seed=_find(raw, "seed"),
        sampling=SamplingSettings(
            **_said({**model, "temperature": own.get("temperature")}, {**_same_names(SamplingSettings), "max_length": "max_decode_length"})
        ),
        quantization=build_quantization(_find(model, "quantization_config")),
        vocab_file=_find(raw, "processor", "tokenizer", "vocab_file") or None,
        tandem=TandemSettings(**_said(own, _same_names(TandemSettings))),
        ignored=tuple(ignored),
        warnings=tuple(list_warnings(raw)),
    )


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, PyYAML silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def _read_mapping(path: Path) -> Mapping[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
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
    # Some formats keep constants as float32, so 1e-5 comes back as 9.999999747378752e-06.
    return math.isclose(here, there, rel_tol=1e-6) if isinstance(here, float) else bool(here == there)

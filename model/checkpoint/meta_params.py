"""Convert Meta's params.json to the values of a Hugging Face config.json, filling the gaps from known models and tensor shapes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.spec.config import read_config
from model.spec.key_table import KeyTable
from model.spec.quoting import quote
from model.spec.rope_scaling import RopeScaling
from model.spec.tensor_info import TensorInfo
from parallel.errors import ConfigError

_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads")
_CONSTANTS = ("norm_eps", "rope_theta")
_MAX_NUMBER = 1 << 53
_CONTEXTS = {500000.0: 8192, 1000000.0: 16384}
"""Maximum context by rope_theta, which identifies Llama 3 and Code Llama."""
_DEFAULT_CONTEXT, _SCALED_CONTEXT = 4096, 131072
_TOKEN_IDS = {128256: (128000, 128001)}
"""Begin and end tokens by vocabulary size: Llama 3."""
_SMALLEST_WITH_FACTOR_8 = 4096
"""params.json does not state the rope scaling factor: Llama 3.2's models are narrower than this and use 32."""


META_KEYS = KeyTable(
    name="params.json",
    read=frozenset({*_SIZES, *_CONSTANTS, "head_dim", "use_scaled_rope"}),
    fixed={
        "causal": (True,),
        "llama_4_scaling": (),
        "lora_args": (),
        "moe": (),
        "moe_args": (),
        "quantization": (),
        "quantization_args": (),
        "rope_high_freq_factor": (),
        "rope_scaling_factor": (),
        "sliding_window": (),
        "use_biases": (False,),
        "vision_args": (),
        "vision_chunk_size": (),
        "vision_num_cross_attention_layers": (),
        "use_qk_norm": (False,),
        "nope_layer_interval": (),
        "yarn": (),
    },
    harmless=frozenset({"ffn_dim_multiplier", "hidden_dim", "max_batch_size", "max_seq_len", "multiple_of", "vocab_size"}),
)
"""Keys of params.json, Meta's and Mistral's; vocabulary and feed-forward sizes are taken from the tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaParams:
    """Contents of params.json; vocabulary and feed-forward sizes are taken from the tensors."""

    dim: int
    """Width of the residual stream."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies."""
    is_rope_scaled: bool
    """Whether the frequencies are scaled as in Llama 3.1."""
    notes: tuple[str, ...] = ()
    """Notes on unused keys."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    def build_config(self, embedding: TensorInfo, intermediate_size: int, *, tied: bool) -> dict[str, Any]:
        """Return the values of a config.json."""
        bos, eos = _TOKEN_IDS.get(embedding.shape[0], (1, 2))
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": embedding.shape[0],
            "max_position_embeddings": _SCALED_CONTEXT if self.is_rope_scaled else _CONTEXTS.get(self.rope_theta, _DEFAULT_CONTEXT),
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": tied,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": None,
            "torch_dtype": embedding.dtype_name,
        }
        if self.is_rope_scaled:
            scaling = RopeScaling(
                factor=8.0 if self.dim >= _SMALLEST_WITH_FACTOR_8 else 32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            )
            config["rope_scaling"] = {"rope_type": "llama3", **asdict(scaling)}
        return config


def read_meta_params(file: Path) -> MetaParams:
    """Read params.json. Raises ConfigError when it is missing, not JSON, or lacks a valid value."""
    raw = {"rope_theta": 10000.0} | read_config(file)
    META_KEYS.check(raw, str(file))
    if raw.get("n_kv_heads") is None:
        raw["n_kv_heads"] = raw.get("n_heads")
    for key in _SIZES + _CONSTANTS:
        value, whole = raw.get(key), key in _SIZES
        if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool) or not 0 < value < _MAX_NUMBER:
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{file}: {key} is {quote(value)}, but a {kind} above 0 is needed: copy the file again")
    if raw["dim"] % (2 * raw["n_heads"]):
        raise ConfigError(f"{file}: dim {raw['dim']} does not divide into {raw['n_heads']} heads of an even width: copy the file again")
    width = raw["dim"] // raw["n_heads"]
    if raw.get("head_dim") not in (None, width):
        raise ConfigError(f"{file}: head_dim is {quote(raw['head_dim'])}, but only dim / n_heads, {width}, is supported")
    return MetaParams(
        dim=raw["dim"],
        num_layers=raw["n_layers"],
        num_heads=raw["n_heads"],
        num_kv_heads=raw["n_kv_heads"],
        norm_eps=float(raw["norm_eps"]),
        rope_theta=float(raw["rope_theta"]),
        is_rope_scaled=raw.get("use_scaled_rope") is True,
        notes=tuple(META_KEYS.describe(raw, str(file))),
    )

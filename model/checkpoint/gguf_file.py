"""A GGUF file of a known family as a checkpoint: Hugging Face names and config, rows dequantized as they are read.

`gguf_header.py` parses headers, `gguf_parts.py` finds the files, `gguf_types.py` dequantizes, and `model/text/tokenizer.py` reads the
tokenizer.
"""

from __future__ import annotations

import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.checkpoint.checksum_file import read_sha256sums
from model.checkpoint.gguf_end_tokens import find_end_ids
from model.checkpoint.gguf_header import StoredTensor
from model.checkpoint.gguf_metadata import GgufMetadata
from model.checkpoint.gguf_parts import GgufParts, read_parts
from model.checkpoint.gguf_types import cut_experts, describe_tensor, read_stored_rows
from model.spec.architecture import Architecture, GgufNames
from model.spec.families import list_architectures
from model.spec.quoting import quote
from model.spec.rope_scaling import RopeScaling, scale_frequency
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERTS = "expert_count"
_ROPE_FREQUENCIES = "rope_freqs.weight"
_SAME_SIZES = {
    "llama.attention.value_length": "head_dim",
    "llama.rope.dimension_count": "head_dim",
    "llama.vocab_size": "vocab_size",
}
_SIZE_WORDS = {"head_dim": "heads have the width", "vocab_size": "the rows of token_embd.weight are"}
"""Keys that repeat a size, by the key of config.json."""


class GgufFile:
    """A GGUF file as a CheckpointSource."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for another architecture, an unsupported tensor type, or a truncated or corrupt file."""
        parts = read_parts(path)
        self.files = parts.files
        self.path = path = parts.files[0]
        self.checksums = read_sha256sums(path.parent, self.files)
        metadata = GgufMetadata(parts.metadata, path)
        self._has_vocabulary = "tokenizer.ggml.tokens" in metadata
        self._family, self._names = self._find_family(metadata)
        self.notes = metadata.check_keys(self._names)
        parts.check_tensors()
        self._stored = self._name_tensors(parts)
        rope = self._stored.pop(_ROPE_FREQUENCIES, None)
        self.tensors = {name: describe_tensor(stored) for name, (_, stored) in self._stored.items()}
        self.config = self._build_config(metadata)
        if rope is not None:
            self._add_rope_scaling(*rope)
        self._heads = (
            {}
            if not self._names.interleaved
            else {
                "self_attn.q_proj.weight": self.config["num_attention_heads"],
                "self_attn.k_proj.weight": self.config["num_key_value_heads"],
            }
        )
        self._check_heads()
        for name, (_, stored) in self._stored.items():
            if heads := self._heads.get(name.split(".", 3)[-1]):
                self.tensors[name] = describe_tensor(stored, stored.shape[0] // heads)
        metadata.clear()

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, dequantized; q and k rows in Hugging Face's order."""
        file, stored = self._stored[name]
        heads = self._heads.get(name.split(".", 3)[-1])
        if heads is None:
            return read_stored_rows(reader, file, stored, start, stop)
        # llama.cpp interleaves the two halves of each head's rotary pairs, so rows are located by whole heads.
        head_rows = stored.shape[0] // heads
        first = start // head_rows * head_rows
        last = max(first, -(-stop // head_rows) * head_rows)
        rows = read_stored_rows(reader, file, stored, first, last)
        ordered = rows.view(-1, head_rows // 2, 2, stored.shape[1]).transpose(1, 2).reshape(last - first, stored.shape[1])
        return ordered[start - first : stop - first].contiguous()

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return nothing: most rows are dequantized or reordered."""
        return []

    def tokenizer_path(self) -> Path | None:
        """Return the file itself if it holds a vocabulary."""
        return self.path if self._has_vocabulary else None

    def _find_family(self, metadata: GgufMetadata) -> tuple[Architecture, GgufNames]:
        architecture = metadata.read("general.architecture")
        known = [(family, family.gguf) for family in list_architectures().values() if family.gguf is not None]
        found = [(family, names) for family, names in known if names.architecture == architecture]
        if not found:
            words = ", ".join(sorted({repr(names.architecture) for _, names in known}))
            raise CheckpointError(f"{self.path} holds architecture {quote(architecture)}, but only {words} are supported")
        experts = metadata.read("llama.expert_count", 0)
        fitting = [(family, names) for family, names in found if (_EXPERTS in names.sizes) == (experts > 0)]
        if not fitting:
            raise CheckpointError(f"{self.path} holds {experts} experts a layer, which architecture {architecture!r} does not have here")
        return fitting[0]

    def _name_tensors(self, parts: GgufParts) -> dict[str, tuple[Path, StoredTensor]]:
        out: dict[str, tuple[Path, StoredTensor]] = {}
        for name, (file, tensor) in parts.tensors.items():
            for target, part in self._find_targets(name, tensor):
                if target in out:
                    raise CheckpointError(f"{self.path} holds {target} twice, once as {name}: convert it again")
                out[target] = (file, part)
        bias = next((name for name in out if name.endswith(".bias") and name.split(".", 3)[-1] not in self._names.layer.values()), None)
        if bias is not None:
            raise CheckpointError(
                f"{self.path} holds {bias}, but biases are not supported in GGUF files of {self._family.model_type} models"
            )
        return out

    def _find_targets(self, name: str, tensor: StoredTensor) -> list[tuple[str, StoredTensor]]:
        """Return the Hugging Face names of a llama.cpp tensor, several for one of all experts; unknown names are kept."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return [(_TOP_NAMES.get(name, name), tensor)]
        layer, rest = match["layer"], match["rest"]
        names, experts = {**_LAYER_NAMES, **self._names.layer}, self._family.experts
        if _EXPERTS in self._names.sizes:
            stored = {"ffn_gate": experts.gate, "ffn_up": experts.up, "ffn_down": experts.down}
            names["ffn_gate_inp.weight"] = f"{experts.router}.weight"
            kind, _, end = rest.partition("_exps")
            if kind in stored and end == ".weight" and len(tensor.shape) == 3:
                return [
                    (f"model.layers.{layer}.{stored[kind].format(number)}.weight", part) for number, part in enumerate(cut_experts(tensor))
                ]
            kind, _, number = rest.removesuffix(".weight").partition(".")  # older files
            if kind in stored and number.isdigit():
                return [(f"model.layers.{layer}.{stored[kind].format(number)}.weight", tensor)]
        return [(f"model.layers.{layer}.{names[rest]}" if rest in names else name, tensor)]

    def _check_heads(self) -> None:
        for name, (_, tensor) in self._stored.items():
            heads = self._heads.get(name.split(".", 3)[-1])
            if heads is not None and (len(tensor.shape) != 2 or tensor.shape[0] % (2 * heads)):
                raise CheckpointError(f"{name} of shape {list(tensor.shape)} does not divide into {heads} heads of an even width")

    def _build_config(self, metadata: GgufMetadata) -> dict[str, Any]:
        hidden, heads = metadata.read("llama.embedding_length"), metadata.read("llama.attention.head_count")
        embedding = self.tensors.get("model.embed_tokens.weight")
        query = self.tensors.get("model.layers.0.self_attn.q_proj.weight")
        config: dict[str, Any] = {
            "architectures": [self._family.class_names[0]],
            "model_type": self._family.model_type,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": metadata.read("llama.feed_forward_length"),
            "num_hidden_layers": metadata.read("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.read("llama.attention.head_count_kv", heads),
            "head_dim": metadata.read("llama.attention.key_length", hidden // heads),
            "vocab_size": embedding.shape[0] if embedding else len(metadata.read("tokenizer.ggml.tokens")),
            "max_position_embeddings": metadata.read("llama.context_length"),
            "rms_norm_eps": _shorten_float32(metadata.read("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _shorten_float32(metadata.read("llama.rope.freq_base", 10000.0)),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": metadata.read_token("bos"),
            "eos_token_id": _unwrap(find_end_ids(metadata)),
            "pad_token_id": metadata.read_token("padding"),
            "torch_dtype": query.dtype_name if query else "float32",
        }
        config |= self._names.values
        config |= {name: metadata.read(f"llama.{key}") for key, name in self._names.sizes.items()}
        # 0 means none.
        config |= {name: metadata.read(f"llama.{key}", 0) or None for key, name in self._names.optional.items()}
        self._compare_sizes(metadata, config)
        scaling = self._read_rope_scaling(metadata)
        if scaling is not None:
            config["rope_scaling"] = scaling
        return config

    def _compare_sizes(self, metadata: GgufMetadata, config: dict[str, Any]) -> None:
        """Check sizes that the metadata repeats. Raises CheckpointError if they differ."""
        for key, name in _SAME_SIZES.items():
            found = metadata.read(key, config[name])
            if found != config[name]:
                raise CheckpointError(
                    f"{self.path}: {key} is {found}, but {_SIZE_WORDS[name]} {config[name]}: only files where both are equal are supported"
                )

    def _read_rope_scaling(self, metadata: GgufMetadata) -> dict[str, Any] | None:
        """Return `rope_scaling` for config.json, from today's keys or from `scale_linear` of older files."""
        # llama.cpp defaults to "linear" if no type is given.
        kind, factor = metadata.read("llama.rope.scaling.type", "linear"), metadata.read("llama.rope.scaling.factor", None)
        old = metadata.read("llama.rope.scale_linear", factor)
        if factor not in (None, old):
            raise CheckpointError(f"{self.path}: llama.rope.scale_linear is {old}, but llama.rope.scaling.factor is {factor}")
        factor = 1.0 if old is None else old
        if kind == "none" and factor != 1.0:
            raise CheckpointError(f"{self.path}: llama.rope.scaling.type is 'none', but the factor is {factor}: convert it again")
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return None
        scaling = {"rope_type": kind, "factor": factor}
        original = metadata.read("llama.rope.scaling.original_context_length", None)
        return scaling if original is None or kind == "linear" else scaling | {"original_max_position_embeddings": original}

    def _add_rope_scaling(self, file: Path, stored: StoredTensor) -> None:
        """Recover the llama3 scaling, of which llama.cpp stores only the frequency divisors, by finding constants that reproduce them."""
        width, theta = self.config["head_dim"], self.config["rope_theta"]
        if stored.shape != (width // 2,):
            raise CheckpointError(
                f"{self.path}: {_ROPE_FREQUENCIES} has shape {list(stored.shape)}, but heads of width {width} need [{width // 2}]: "
                "copy it again or convert it again"
            )
        reader = FileReader()
        divisors = read_stored_rows(reader, file, stored, 0, stored.shape[0]).double()
        reader.close()
        if torch.all(divisors == 1):
            return
        if "rope_scaling" in self.config:
            raise CheckpointError(f"{self.path} holds both {_ROPE_FREQUENCIES} and a rope scaling: use the Hugging Face checkpoint")
        if not bool(torch.all((divisors > 0) & divisors.isfinite())):
            raise CheckpointError(f"{self.path}: {_ROPE_FREQUENCIES} holds what is no divisor: copy it again")
        # Llama 3.1 to 3.3 share these constants; only the factor differs, and the longest wavelength reveals it.
        scaling = RopeScaling(
            factor=float(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        )
        plain = [theta ** (-2 * i / width) for i in range(stored.shape[0])]
        expected = torch.tensor([f / scale_frequency(f, scaling) for f in plain], dtype=torch.float64)
        if not torch.allclose(divisors, expected, rtol=1e-4, atol=0):
            raise CheckpointError(f"{self.path}: {_ROPE_FREQUENCIES} does not hold {scaling}: use the Hugging Face checkpoint")
        self.config["rope_scaling"] = {"rope_type": "llama3", **asdict(scaling)}


def _unwrap(ids: list[int]) -> list[int] | int | None:
    """Unwrap single ids, as config.json writes them."""
    return ids if len(ids) > 1 else next(iter(ids), None)


def _shorten_float32(value: float) -> float:
    """Return the shortest decimal of the same float32, as in the original config.json: 1e-05, not 9.999999747378752e-06."""
    return next(short for digits in range(1, 10) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == struct.pack("<f", value))

"""Compare a checkpoint's small tensors with its settings before ranks start: scales, zero points, groups, shapes, rotary buffers.

Does not read the weights themselves.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from model.checkpoint.source import CheckpointSource
from model.checkpoint.stored_values import read_values
from model.spec.config import LlamaConfig
from model.spec.linear_scheme import LinearScheme
from model.spec.rope_scaling import compute_frequencies
from model.spec.scheme import Scheme
from model.spec.tensor_info import TensorInfo
from model.spec.weights import linear_names, linear_shape
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

SAMPLE_BYTES = 64 << 20
"""Maximum bytes read before a run. In larger checkpoints, every n-th linear is checked here, and all of them while ranks load."""
_ZERO_POINTS = ("weight_zero_point", "input_zero_point", "k_zero_point", "v_zero_point")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 128
"""Of a tied head, at its start, middle and end before a run."""
_INV_FREQ = "rotary_emb.inv_freq"
_TOLERANCE = 2.0**-6
"""Relative tolerance for rotary buffers, some of which were saved as bfloat16."""


@runtime_checkable
class ChecksLinears(Protocol):
    """A source whose format stores properties of a linear that it does not expose as tensors."""

    def check_linear(self, reader: FileReader, linear: str) -> None:
        """Raise CheckpointError if stored zero points or groups contradict the settings."""
        ...


def check_facts(source: CheckpointSource, config: LlamaConfig, scheme: Scheme, *, deep: bool = False) -> None:
    """Raise CheckpointError at the first contradiction. `deep`: check every linear, regardless of the bytes read."""
    for problem in find_contradictions(source, config, scheme, deep=deep):
        raise CheckpointError(problem)


def find_contradictions(source: CheckpointSource, config: LlamaConfig, scheme: Scheme, *, deep: bool = False) -> Iterator[str]:
    """Describe contradictions between stored tensors and the settings, one line per tensor."""
    reader = FileReader()
    try:
        quantized = {name: linear for name in (*linear_names(config), "lm_head") if (linear := scheme.find_linear(name)) is not None}
        for name in _sample(source, quantized, deep=deep):
            yield from _check_linear(source, reader, config, name, quantized[name])
        if scheme.kv_cache in ("channel", "tensor"):
            for name in source.tensors:
                if name.endswith(("k_scale", "v_scale")):
                    yield from _check_scale(source, reader, name)
                elif name.endswith(("k_zero_point", "v_zero_point")):
                    yield from _check_zeros(source, reader, name, None)
        yield from _check_tied_head(source, reader, config, deep=deep)
    finally:
        reader.close()


def _check_tied_head(source: CheckpointSource, reader: FileReader, config: LlamaConfig, *, deep: bool) -> Iterator[str]:
    """A head that is stored although it is the embedding has its rows: where readers do not untie it, it would be dropped."""
    if not config.tie_word_embeddings or not {_HEAD, _EMBEDDING} <= source.tensors.keys():
        return
    count = min(source.tensors[name].shape[0] for name in (_HEAD, _EMBEDDING))
    starts = range(0, count, _COMPARED_ROWS) if deep else sorted({0, count // 2, max(0, count - _COMPARED_ROWS)})
    for start in starts:
        stop = min(count, start + _COMPARED_ROWS)
        head, embedding = (read_values(source, reader, name, start, stop) for name in (_HEAD, _EMBEDDING))
        if not np.array_equal(head, embedding):
            yield (
                f"{source.path}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}: set tie_word_embeddings to false if "
                "the head is to be used"
            )
            return


def describe_rotary(source: CheckpointSource, config: LlamaConfig) -> list[str]:
    """Return a note if stored rotary frequencies, which are computed instead, differ from those of the settings."""
    names = [name for name in source.tensors if name.endswith(_INV_FREQ)]
    width, scaling = config.head_dim, config.rope_scaling
    expected = [compute_frequencies(config.rope_theta, width, one) for one in (scaling, None)]
    reader = FileReader()
    try:
        for name in names:
            found = read_values(source, reader, name).astype(np.float64).reshape(-1)
            if not any(found.shape == one.shape and np.allclose(found, one, rtol=_TOLERANCE, atol=1e-6) for one in expected):
                words = "differs from the frequencies of rope_theta and rope_scaling: ignored, as in transformers"
                return [f"{source.path}: {name} {words}"]
    finally:
        reader.close()
    return []


def _sample(source: CheckpointSource, quantized: Mapping[str, LinearScheme], *, deep: bool) -> list[str]:
    names = list(quantized)
    size = sum(info.num_bytes for name, info in source.tensors.items() if name.endswith(("weight_scale", "weight_zero_point")))
    step = 1 if deep else max(1, -(-size // SAMPLE_BYTES))
    return names if step == 1 else [*names[::step], *names[-1:]]


def _check_linear(source: CheckpointSource, reader: FileReader, config: LlamaConfig, name: str, linear: LinearScheme) -> Iterator[str]:
    if isinstance(source, ChecksLinears):
        try:
            source.check_linear(reader, name)
        except CheckpointError as error:
            yield str(error)
    yield from _check_scale(source, reader, f"{name}.weight_scale")
    if linear.activation == "tensor":
        yield from _check_scale(source, reader, f"{name}.input_scale")
    for part in _ZERO_POINTS[:2]:
        symmetric = linear.symmetric if part == "weight_zero_point" else linear.activation_symmetric
        if f"{name}.{part}" in source.tensors and symmetric:
            yield from _check_zeros(source, reader, f"{name}.{part}", linear)
    shape = (config.vocab_size, config.hidden_size) if name == "lm_head" else linear_shape(config, name.split(".", 3)[-1])
    stored = f"{name}.weight_shape"
    if stored in source.tensors and (sizes := read_values(source, reader, stored).tolist()) != list(shape):
        yield f"{source.path}: {stored} is {sizes}, but the config needs {list(shape)}: give the config.json of this checkpoint"
    index = f"{name}.weight_g_idx"
    if index in source.tensors:
        groups, found = linear.num_groups(shape[1]), read_values(source, reader, index)
        wrong = int(np.count_nonzero((found < 0) | (found >= groups)))
        if wrong:
            yield f"{source.path}: {wrong} of {found.size} entries of {index} are not groups from 0 to {groups - 1}: copy it again"


def _check_scale(source: CheckpointSource, reader: FileReader, name: str) -> Iterator[str]:
    if name in source.tensors:
        found = read_values(source, reader, name)
        wrong = int(np.count_nonzero(~np.isfinite(found)))
        if wrong:
            yield f"{source.path}: {wrong} of {found.size} values of {name} are NaN or infinite: quantize or copy it again"


def _check_zeros(source: CheckpointSource, reader: FileReader, name: str, linear: LinearScheme | None) -> Iterator[str]:
    """Check that the zero points of a symmetric scheme are 0, plain or packed."""
    found, zero = read_values(source, reader, name), 0
    if linear is not None and name.endswith("weight_zero_point") and _is_packed(source.tensors, name, linear):
        zero = 0x88888888 - (1 << 32) if linear.bits == 4 else 0x80808080 - (1 << 32)
    wrong = int(np.count_nonzero(found != zero))
    if wrong:
        what = "words of packed zero points" if zero else "zero points"
        yield (
            f"{source.path} declares symmetric values, but {wrong} of {found.size} {what} in {name} are not 0: if they are to be used, "
            "set symmetric to false in config.json"
        )


def _is_packed(tensors: Mapping[str, TensorInfo], name: str, linear: LinearScheme) -> bool:
    scale = tensors.get(name.replace("weight_zero_point", "weight_scale"))
    info = tensors[name]
    return (
        scale is not None and info.dtype == ElementType.INT32 and info.shape[0] == -(-scale.shape[0] * linear.bits // 32) != scale.shape[0]
    )

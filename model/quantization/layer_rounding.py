"""Quantize the linears of one decoder layer according to a recipe and the observations of a calibration.

Each rank rounds its own rows; values over all rows (largest weights of an input channel, errors) are exchanged. Results are unpacked:
`X.weight` int8, `X.weight_scale`, `X.weight_zero_point` int8, and the rest as named in model/spec/scheme.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from model.backends.float_linear import float_linear
from model.layers.rounding import asymmetric_scale, quantize_groups, quantize_rows, symmetric_scale
from model.quantization.awq import dequantize, search_scale, sum_columns
from model.quantization.gptq import invert_hessian, quantize_gptq
from model.quantization.observing import InputObserver, Observations
from model.quantization.recipe import Recipe
from model.quantization.smoothing import smooth_scale
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.weights import has_bias, list_fused, list_norms
from parallel.collectives import Collectives

_MEASURED_ROWS = 1024
"""Rows whose errors are measured at a time; a multiple of a tile."""
_VALUES = "self_attn.v_proj"
_NORMS = {"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"}
"""The norm whose output is the input of other linears, by the attribute of its module."""


@dataclass(slots=True)
class RoundedLayer:
    """One quantized layer: this rank's rows."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """By full name; replicated tensors in full."""
    report: list[dict[str, Any]] = field(default_factory=list)
    """One entry per linear: its quantization error."""


class LayerRounder:
    """Quantizes the layers of one checkpoint on one rank."""

    def __init__(
        self,
        config: LlamaConfig,
        scheme: Scheme,
        recipe: Recipe,
        collectives: Collectives,
        read: Callable[[str], torch.Tensor],
        first_row: Callable[[str], int],
    ) -> None:
        """`read`: returns this rank's rows of a stored tensor; `first_row`: their offset in the full tensor."""
        self._config, self._scheme, self._recipe = config, scheme, recipe
        self._collectives, self._read, self._first_row = collectives, read, first_row
        self._consumers: Mapping[str, str] = {}

    def round_layer(self, index: int, seen: Observations | None) -> RoundedLayer:
        """Quantize decoder layer `index`. `seen` is None where the recipe needs no samples."""
        prefix, out, fused = f"model.layers.{index}", RoundedLayer(), list_fused(self._config, index)
        self._consumers = _find_consumers(fused)
        scales = self._choose_scales(prefix, fused, seen)
        left = Counter(seen.inputs.values()) if seen else Counter()
        inverted: dict[InputObserver, torch.Tensor] = {}
        for group, names in fused.items():
            observer = seen.inputs[group] if seen else None
            for short in names:
                name = f"{prefix}.{short}"
                if self._scheme.is_quantized(name):
                    if self._recipe.method == "gptq":
                        assert observer is not None
                        if observer not in inverted:
                            assert observer.hessian is not None
                            inverted[observer] = invert_hessian(observer.hessian)
                            observer.hessian = None  # already overwritten
                    upper = None if observer is None else inverted.get(observer)
                    self._round_linear(name, self._read_scaled(name, short, scales), scales.get(short), observer, upper, out)
                self._fold_bias(name, short, scales, out)
            if observer is not None:
                left[observer] -= 1
                if not left[observer]:  # no other expert has the same input
                    inverted.pop(observer, None)
            if group in _NORMS and self._recipe_folds and names[0] in scales:
                norm = f"{prefix}.{list_norms(self._config)[_NORMS[group]]}.weight"
                out.tensors[norm] = self._divide_norm(self._read(norm), scales[names[0]])
        if self._recipe.kv_cache == "channel":
            assert seen is not None
            keys, values = seen.cache.absmax
            divisor = self._row_divisor(f"{prefix}.self_attn.v_proj", _VALUES, len(values), scales)
            for kind, absmax in (("k_scale", keys), ("v_scale", values if divisor is None else values / divisor)):
                scale = symmetric_scale(absmax).half()
                out.tensors[f"{prefix}.self_attn.{kind}"] = torch.where(scale == 0, torch.ones_like(scale), scale)
        return out

    def round_head(self, observer: InputObserver | None) -> RoundedLayer:
        """Quantize the output head, always rounding to nearest: no later layer compensates for its errors."""
        out = RoundedLayer()
        if self._scheme.is_quantized("lm_head"):
            weight, scale = self._read("model.embed_tokens.weight" if self._config.tie_word_embeddings else "lm_head.weight"), None
            if self._recipe.smooth and not self._recipe.int8_head and observer is not None:
                scale = smooth_scale(observer.absmax, self._column_absmax([weight]), self._recipe.alpha)
                if self._recipe_folds:
                    out.tensors["model.norm.weight"] = self._divide_norm(self._read("model.norm.weight"), scale)
                weight = _scale_columns(weight, scale)
            self._round_linear("lm_head", weight, scale, observer, None, out)
        return out

    def _divide_norm(self, weight: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        offset = 1 if self._config.norm_offset else 0
        return ((weight.float() + offset) / divisor - offset).to(weight.dtype)

    @property
    def _recipe_folds(self) -> bool:
        return self._recipe.fold or self._recipe.method == "awq"

    def _choose_scales(self, prefix: str, fused: Mapping[str, tuple[str, ...]], seen: Observations | None) -> dict[str, torch.Tensor]:
        """Return the multiplier of each linear's weight and divisor of its input: float32 [columns], by its name in the layer."""
        recipe, scales = self._recipe, {}
        if seen is None or not (recipe.smooth or recipe.method == "awq"):
            return {}
        for group, names in fused.items():
            quantized = [name for name in names if self._scheme.is_quantized(f"{prefix}.{name}")]
            if not self._recipe_folds:
                for name in quantized:
                    weight = self._read(f"{prefix}.{name}.weight")
                    scales[name] = smooth_scale(seen.inputs[group].absmax, self._column_absmax([weight]), recipe.alpha)
            elif quantized == list(names) and self._can_fold(prefix, group, names[0]):
                # Linears with the same input share one scale, since the preceding layer can be divided by only one vector.
                scale = self._choose_shared_scale([f"{prefix}.{name}" for name in names], group, seen.inputs[group])
                scales.update(dict.fromkeys(names, scale))
        return scales

    def _can_fold(self, prefix: str, group: str, name: str) -> bool:
        """Return whether the input can be divided where it is computed; that of experts cannot, since the router reads it too."""
        producer = next((short for short, consumer in self._consumers.items() if consumer == name), None)
        return group in _NORMS or (producer is not None and self._scheme.is_quantized(f"{prefix}.{producer}"))

    def _fold_bias(self, name: str, short: str, scales: dict[str, torch.Tensor], out: RoundedLayer) -> None:
        """Divide the bias of a linear whose output is another linear's input, like its rows."""
        if has_bias(self._config, short) and self._recipe_folds and self._consumers.get(short) in scales:
            bias = self._read(f"{name}.bias")
            divisor = self._row_divisor(name, short, len(bias), scales)
            assert divisor is not None
            out.tensors[f"{name}.bias"] = (bias.float() / divisor).to(bias.dtype)

    def _choose_shared_scale(self, names: list[str], group: str, observer: InputObserver) -> torch.Tensor:
        weights = [self._read(f"{name}.weight") for name in names]
        share = self._share_heads if group == "o_proj" else _keep
        linear = self._recipe.linear
        assert linear is not None
        if self._recipe.method == "awq":
            return search_scale(
                weights,
                observer.kept,
                share(observer.mean_absolute),
                linear.bits,
                linear.group_size or weights[0].shape[1],
                symmetric=linear.symmetric,
                add_up=lambda place, errors: self._add_up([errors], [names[place]])[0],
                share=share,
            )
        return smooth_scale(share(observer.absmax), share(self._column_absmax(weights)), self._recipe.alpha)

    def _share_heads(self, channels: torch.Tensor) -> torch.Tensor:
        """Return, for the query heads that share a value head, the largest of their channels, since only that head can scale them:
        [columns].
        """
        kv_heads, head_dim = self._config.num_key_value_heads, self._config.head_dim
        grouped = channels.view(kv_heads, -1, head_dim)
        return grouped.amax(dim=1, keepdim=True).expand_as(grouped).reshape(-1)

    def _read_scaled(self, name: str, short: str, scales: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return local rows of a weight, divided if their output is another linear's input, and multiplied by their own scale."""
        weight = self._read(f"{name}.weight")
        divisor = self._row_divisor(name, short, weight.shape[0], scales)
        if divisor is not None:
            weight = (weight.float() / divisor.unsqueeze(1)).to(weight.dtype)
        return weight if short not in scales else _scale_columns(weight, scales[short])

    def _row_divisor(self, name: str, short: str, num_rows: int, scales: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the divisor of a linear's local rows, if their output is another linear's input: [rows]."""
        consumer = self._consumers.get(short)
        if not self._recipe_folds or consumer not in scales:
            return None
        divisor = scales[consumer]
        if short == _VALUES:
            divisor = divisor.view(self._config.num_key_value_heads, -1, self._config.head_dim)[:, 0].reshape(-1)
        first = self._first_row(f"{name}.weight")
        return divisor[first : first + num_rows]

    def _round_linear(
        self,
        name: str,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        observer: InputObserver | None,
        upper: torch.Tensor | None,
        out: RoundedLayer,
    ) -> None:
        linear, tensors = self._scheme.find_linear(name), out.tensors
        assert linear is not None
        zero_points = None
        if upper is not None:
            group = linear.group_size or weight.shape[1]
            integers, scales, zero_points = quantize_gptq(weight, upper, linear.bits, group, symmetric=linear.symmetric)
        elif linear.group_size is None and linear.symmetric:
            integers, scales = quantize_rows(weight, linear.bits)
        else:
            group = linear.group_size or weight.shape[1]
            integers, scales, zero_points = quantize_groups(weight, linear.bits, group, symmetric=linear.symmetric)
        if self._recipe.half_scales and not (name == "lm_head" and self._recipe.int8_head):
            scales = scales.half()
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = integers, scales
        if zero_points is not None:
            tensors[f"{name}.weight_zero_point"] = zero_points
        input_scale = None
        if linear.activation == "tensor":
            assert observer is not None
            divisor = torch.ones(1) if scale is None else scale
            input_scale, zero_point = asymmetric_scale((observer.low / divisor).amin(), (observer.high / divisor).amax())
            tensors[f"{name}.input_scale"], tensors[f"{name}.input_zero_point"] = input_scale.reshape(1), zero_point.reshape(1)
        if scale is not None and not self._recipe_folds:
            tensors[f"{name}.smooth_scale"] = scale
        out.report.append(self._measure(name, weight, integers, scales, zero_points, scale, observer, tensors))

    def _measure(
        self,
        name: str,
        weight: torch.Tensor,
        integers: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        scale: torch.Tensor | None,
        observer: InputObserver | None,
        tensors: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Return the relative error of the outputs for the kept inputs (of the weight if nothing was observed), and the outliers."""
        entry: dict[str, Any] = {"linear": name, "error_of": "weight" if observer is None else "output"}
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        x = rounded_x = None
        if observer is not None:
            x = observer.kept if scale is None else observer.kept / scale
            rounded_x = self._round_inputs(name, x, tensors)
        # Measured in parts: float copies of a layer's largest weight would dominate the memory use.
        for first in range(0, weight.shape[0], _MEASURED_ROWS):
            rows = slice(first, first + _MEASURED_ROWS)
            exact = weight[rows].float()
            rounded = dequantize(integers[rows], scales[rows], None if zero_points is None else zero_points[rows])
            if x is None or rounded_x is None:
                parts.append(((rounded - exact).square().sum(dim=1), exact.square().sum(dim=1)))
            else:
                output = float_linear(x, exact)
                parts.append((sum_columns((float_linear(rounded_x, rounded) - output).square()), sum_columns(output.square())))
        if observer is not None:
            absmax = observer.absmax
            channel = int(absmax.argmax())
            entry |= {"outlier": float(absmax[channel]), "outlier_channel": channel, "median_absmax": float(absmax.median())}
        error, size = self._add_up([torch.cat(column) for column in zip(*parts, strict=True)], [name])
        return entry | {"relative_error": (error / size) ** 0.5 if size else 0.0}

    def _round_inputs(self, name: str, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        linear = self._scheme.find_linear(name)
        assert linear is not None
        if linear.activation == "tensor":
            scale, zero_point = tensors[f"{name}.input_scale"], tensors[f"{name}.input_zero_point"]
            return ((x / scale + zero_point).round().clamp(-128, 127) - zero_point) * scale
        if linear.activation == "token":
            row_scale = x.abs().amax(dim=1, keepdim=True).div(127.5).clamp_min(1e-30)
            return (x / row_scale).round().clamp(-128, 127) * row_scale
        return x

    def _column_absmax(self, weights: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the largest magnitude of each input channel over the rows of all ranks, float32 [columns]."""
        local = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
        ranks = self._collectives.world_size
        return self._collectives.gather_columns(local.unsqueeze(0), [local.numel()] * ranks).view(ranks, -1).amax(dim=0)

    def _add_up(self, rows: list[torch.Tensor], names: list[str]) -> list[float]:
        """Sum over the rows of all ranks, in row order; rows held by several ranks count once."""
        ranks, first = self._collectives.world_size, self._first_row(f"{names[0]}.weight")
        width = self._collectives.gather_columns(torch.tensor([[first, len(rows[0])]]), [2] * ranks).view(ranks, 2).tolist()
        sums = []
        for local in rows:
            whole = self._collectives.gather_columns(local.double().unsqueeze(0), [count for _, count in width])[0]
            parts, place, end = [], 0, -1
            for start, count in width:
                if start > end:
                    parts.append(whole[place : place + count])
                    end = start + count - 1
                place += count
            sums.append(float(torch.cat(parts).sum()))
        return sums


def _find_consumers(fused: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the linears of a layer whose output is another linear's input, with that linear: values, and the second factor."""
    return {
        names[-1]: fused[consumer][0]
        for path, names in fused.items()
        if (consumer := path.replace("qkv_proj", "o_proj").replace("gate_up_proj", "down_proj")) != path
    }


def _scale_columns(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() * scale).to(weight.dtype)


def _keep(channels: torch.Tensor) -> torch.Tensor:
    return channels

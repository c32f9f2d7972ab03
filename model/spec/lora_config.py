"""adapter_config.json of a LoRA adapter in PEFT's format: ranks, scales, and the linears that it changes.

Every key of PEFT's LoraConfig that changes the arithmetic is either read or refused; so is every unknown key that is set.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.spec.json_file import parse_json_object, read_optional_text
from model.spec.quoting import quote, quote_name
from parallel.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 1024
_READ = (
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern "
    "base_model_name_or_path task_type init_lora_weights"
).split()
_HARMLESS = (
    "auto_mapping peft_version revision inference_mode lora_dropout megatron_core loftq_config eva_config runtime_config "
    "qalora_group_size ensure_weight_tying"
).split()
"""Keys that do not change what an adapter computes after training."""
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "adapters that replace whole weights are not supported",
    "bias": "trained biases are not supported",
    "lora_bias": "biases of lora_B are not supported",
    "fan_in_fan_out": "transposed weights are not supported",
    "layer_replication": "repeated layers are not supported",
    "trainable_token_indices": "trained embeddings are not supported",
    "target_parameters": "adapters of experts and other parameters are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "megatron_config": "Megatron layers are not supported",
}
_TASKS = (None, "CAUSAL_LM")
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the weights of the base model as they are."""
_MAX_QUANTIFIERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The settings of one adapter."""

    rank: int
    alpha: float
    is_rank_stabilized: bool
    """Whether updates are scaled by alpha / sqrt(rank) instead of alpha / rank."""
    ranks: tuple[tuple[str, int], ...]
    """(pattern, rank) of linears with another rank."""
    alphas: tuple[tuple[str, float], ...]
    """(pattern, alpha) of linears with another alpha."""
    targets: tuple[str, ...] | None
    """Names or ends of names of the linears; None: given by a regular expression, or all linears."""
    excluded: tuple[str, ...] | None
    """The same of linears that are left out; None: given by a regular expression."""
    layers: tuple[int, ...] | None
    """The only layers that are changed; None: all."""
    base: str | None
    """Name of the model that it was trained on."""

    def find_rank(self, name: str) -> int:
        """Return the rank of a linear, by its full name."""
        rank: int = _find(self.ranks, name, self.rank)
        return rank

    def find_scale(self, name: str) -> float:
        """Return the factor of a linear's update."""
        rank = self.find_rank(name)
        alpha: float = _find(self.alphas, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def changes(self, name: str) -> bool | None:
        """Return whether a linear, by its full name, is changed; None if only a regular expression tells."""
        if self.targets is None or self.excluded is None:
            return None
        layer = re.search(r"layers\.(\d+)\.", name)
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return False
        return _ends_with_any(name, self.targets) and not _ends_with_any(name, self.excluded)


def read_lora_config(folder: Path) -> LoraConfig:
    """Read the adapter_config.json of a folder. Raises CheckpointError for an adapter that cannot be served."""
    path = folder / CONFIG_FILE
    text = read_optional_text(path)
    if text is None:
        raise CheckpointError(f"{folder} is no LoRA adapter: it has no {CONFIG_FILE}, which PEFT's save_pretrained writes")
    values = parse_json_object(text, path)
    _refuse(path, values)
    base, targets = values.get("base_model_name_or_path"), values.get("target_modules")
    return LoraConfig(
        rank=_read_rank(path, "r", values.get("r", 8)),
        alpha=_read_alpha(path, "lora_alpha", values.get("lora_alpha", 8)),
        is_rank_stabilized=_read_flag(path, "use_rslora", values.get("use_rslora")),
        ranks=tuple((key, _read_rank(path, "rank_pattern", value)) for key, value in _read_patterns(path, "rank_pattern", values)),
        alphas=tuple((key, _read_alpha(path, "alpha_pattern", value)) for key, value in _read_patterns(path, "alpha_pattern", values)),
        targets=_read_names(path, "target_modules", targets) or None,
        excluded=_read_names(path, "exclude_modules", values.get("exclude_modules")),
        layers=_read_layers(path, values),
        base=base if isinstance(base, str) and base else None,
    )


def _refuse(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {quote(kind)}, but only LORA adapters are supported")
    if values.get("task_type") not in _TASKS:
        raise CheckpointError(f"{path}: task_type is {quote(values['task_type'])}, but an adapter for CAUSAL_LM is needed")
    for key, words in _REFUSED.items():
        if not _is_unset(values.get(key)):
            raise CheckpointError(f"{path}: {key} is {quote(values[key])}, but {words}: merge the adapter into its base model instead")
    way = values.get("init_lora_weights")
    if not any(way is one or (isinstance(one, str) and way == one) for one in _INITIALIZATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights is {quote(way)}, which changes the base model's weights: save the adapter with "
            "path_initial_model_for_weight_conversion, or merge it into its base model"
        )
    known = {*_READ, *_HARMLESS, *_REFUSED}
    unknown = next((key for key, value in values.items() if key not in known and not _is_unset(value)), None)
    if unknown is not None:
        raise CheckpointError(f"{path}: {quote_name(unknown)} is {quote(values[unknown])}, but this key of PEFT is not supported")


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value == "none" or (isinstance(value, (list, dict, str)) and not value)


def _read_rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise CheckpointError(f"{path}: {key} is {quote(value)}, but a rank from 1 to {MAX_RANK} is needed")
    return int(value)


def _read_alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {key} is {quote(value)}, but a number is needed")
    return float(value)


def _read_flag(path: Path, key: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{path}: {key} is {quote(value)}, but true or false is needed")
    return bool(value)


def _read_names(path: Path, key: str, value: Any) -> tuple[str, ...] | None:
    """Return a list of names; None for a regular expression."""
    if isinstance(value, str) and value:
        return None
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"{path}: {key} is {quote(value)}, but a list of names is needed")
    return tuple(names)


def _read_layers(path: Path, values: Mapping[str, Any]) -> tuple[int, ...] | None:
    value, pattern = values.get("layers_to_transform"), values.get("layers_pattern")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if any(type(layer) is not int or layer < 0 for layer in layers):
        raise CheckpointError(f"{path}: layers_to_transform is {quote(value)}, but numbers of layers are needed")
    if pattern not in (None, [], "", "layers", ["layers"]):
        raise CheckpointError(f"{path}: layers_pattern is {quote(pattern)}, but only 'layers' is supported")
    return tuple(layers)


def _read_patterns(path: Path, key: str, values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {key} is {quote(found)}, but an object of patterns is needed")
    for pattern in found:
        # Adapters are untrusted: a nested quantifier may take exponential time.
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > _MAX_QUANTIFIERS:
            raise CheckpointError(f"{path}: {key} has the pattern {quote(pattern)}, but repeated groups are not supported")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{path}: {key} has the pattern {quote(pattern)}, which is not valid: {error}") from None
    return found.items()


def _find(patterns: Iterable[tuple[str, Any]], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a name, as PEFT does."""
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _ends_with_any(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)

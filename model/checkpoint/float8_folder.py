"""FP8 folders of other tools than compressed-tensors: DeepSeek's and Qwen's `fp8`, `fbgemm_fp8`, and NVIDIA ModelOpt.

    X.weight             float8_e4m3fn [rows, columns]
    X.weight_scale       float [] or [1], [rows] or [rows, 1], or one for each block of rows and columns
    X.weight_scale_inv   another name of the same: it multiplies the weight too
    X.input_scale, X.activation_scale, X.input_scale_ub, A.k_scale, A.v_scale
                         scales of FP8 activations and caches, which stay in the compute dtype here

They are exposed under the names of `model/spec/scheme.py`. The tensors tell which linears are FP8, and the shape of each scale tells the
rows that share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint.hf_folder import HuggingFaceFolder
from model.checkpoint.safetensors_file import StoredTensor
from model.spec.config import build_config, read_config
from model.spec.key_table import KeyTable
from model.spec.linear_scheme import LinearScheme
from model.spec.quantization_keys import FBGEMM_KEYS, FLOAT8_KEYS, MODELOPT_FILE_KEYS, MODELOPT_KEYS
from model.spec.quantization_sections import read_block
from model.spec.quoting import quote
from model.spec.scheme import declare_scheme, group_linears
from model.spec.tensor_info import TensorInfo
from model.spec.weights import stored_linear_names
from parallel.element_type import ElementType
from parallel.errors import CheckpointError, ConfigError

MODELOPT_FILE = "hf_quant_config.json"
_METHODS: Mapping[str, KeyTable] = {"fp8": FLOAT8_KEYS, "fbgemm_fp8": FBGEMM_KEYS, "modelopt": MODELOPT_KEYS}
_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale")
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_BLOCK = (128, 128)
"""Of `fp8` and ModelOpt's FP8_PB_WO, where the settings name no other."""


def is_float8(path: Path) -> bool:
    """Return whether a folder declares FP8 weights in one of these dialects; False if it cannot be read."""
    try:
        declared = read_config(path / "config.json").get("quantization_config")
    except (ConfigError, OSError):
        return False
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return (isinstance(method, str) and method.lower() in _METHODS) or (method is None and (path / MODELOPT_FILE).is_file())


class Float8Folder(HuggingFaceFolder):
    """Such a folder; opening it reads the headers.

    Raises ConfigError for unsupported settings, CheckpointError for scales that are missing or of another shape.
    """

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        table, settings, source = _read_settings(read_config(path / "config.json"), path)
        super().__init__(path, follow_links=follow_links)
        table.check(settings, source)
        block = _read_block_size(settings, source)
        model = build_config(self.config)
        names = [*stored_linear_names(model), "lm_head"]
        linears = {name: self._canonize(name, block) for name in names if self._is_float8(f"{name}.weight")}
        if not linears:
            raise CheckpointError(f"{path} declares FP8 weights, but none of its linears is float8_e4m3fn; give the quantized checkpoint")
        dropped = [name for name in self._stored if name.endswith(tuple(f".{part}" for part in _INPUT_SCALES))]
        for name in dropped:
            del self._stored[name]
        self.tensors = {name: stored.info for name, (_, stored) in self._stored.items()}
        self.config = declare_scheme(self.config, group_linears(linears, tuple(name for name in names if name not in linears)))
        self.notes += tuple(table.describe(settings, source))
        if dropped or settings.get("activation_scheme") or table is not FLOAT8_KEYS:
            self.notes += (f"{source}: the inputs of FP8 linears and the KV cache are not quantized: they stay in the compute type",)

    def _is_float8(self, name: str) -> bool:
        found = self._stored.get(name)
        return found is not None and found[1].info.dtype == ElementType.FLOAT8_E4M3FN

    def _canonize(self, linear: str, block: tuple[int, int] | None) -> LinearScheme:
        """Rename and reshape the scale of a linear, and return its scheme."""
        found = [name for part in _SCALES if (name := f"{linear}.{part}") in self._stored]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.path}: {linear}.weight is FP8 with {len(found)} scales, but needs one of {' and '.join(_SCALES)}: copy it again"
            )
        (file, scale), shape = self._stored.pop(found[0]), self._stored[f"{linear}.weight"][1].info.shape
        if len(shape) != 2:
            raise CheckpointError(f"{self.path}: {linear}.weight has shape {list(shape)}, but 2 dimensions are needed: copy it again")
        canonical, scheme = self._find_form(found[0], scale, (shape[0], shape[1]), block)
        self._stored[f"{linear}.weight_scale"] = file, replace(scale, info=TensorInfo(canonical, scale.info.dtype))
        return scheme

    def _find_form(
        self, name: str, scale: StoredTensor, shape: tuple[int, int], block: tuple[int, int] | None
    ) -> tuple[tuple[int, ...], LinearScheme]:
        rows, columns = shape
        plain = LinearScheme(packed=False, float8=True)
        forms: dict[tuple[int, ...], tuple[tuple[int, ...], LinearScheme]] = {(rows,): ((rows, 1), plain), (rows, 1): ((rows, 1), plain)}
        if block is not None:
            blocks = -(-rows // block[0]), -(-columns // block[1])
            forms = {blocks: (blocks, replace(plain, row_block=block[0], group_size=block[1]))}
        else:
            forms |= {one: ((1,), replace(plain, row_block=None)) for one in ((), (1,), (1, 1))}
        if scale.info.shape not in forms:
            words = f"{list(blocks)} for blocks of {list(block)}" if block else f"[1] for the whole weight or [{rows}, 1] for its rows"
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(scale.info.shape)}, but a weight of {list(shape)} needs {words}: give the "
                "config.json of this checkpoint"
            )
        return forms[scale.info.shape]


def _read_settings(config: Mapping[str, Any], path: Path) -> tuple[KeyTable, Mapping[str, Any], str]:
    """Return the keys' table, the settings, and their name for messages."""
    declared = config.get("quantization_config")
    if isinstance(declared, Mapping) and declared.get("quant_method") is not None:
        table, settings, source = _METHODS[str(declared["quant_method"]).lower()], declared, f"{path}: quantization_config"
    else:
        source = str(path / MODELOPT_FILE)
        table, settings = MODELOPT_FILE_KEYS, _read_file(path / MODELOPT_FILE)
    if table in (MODELOPT_KEYS, MODELOPT_FILE_KEYS) and settings.get("quant_algo") not in _ALGORITHMS:
        raise ConfigError(
            f"{source}: ModelOpt {quote(settings.get('quant_algo'))} weights are not supported; there are {', '.join(_ALGORITHMS)}"
        )
    return table, settings, source


def _read_file(path: Path) -> Mapping[str, Any]:
    found = read_config(path).get("quantization")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: quantization is {quote(found)}, but an object is needed")
    return found


def _read_block_size(settings: Mapping[str, Any], source: str) -> tuple[int, int] | None:
    if settings.get("quant_algo") == "FP8_PB_WO":
        return _BLOCK
    if "weight_block_size" not in settings or settings["weight_block_size"] is None:
        return None
    return read_block(settings["weight_block_size"], "weight_block_size")

"""FP8 checkpoints in the dialects of several tools, and the same weights dequantized by compressed-tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

FLOAT8 = torch.float8_e4m3fn
BLOCK = (32, 48)


def quantize(weight: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to FP8: the weight, and scales of compressed-tensors' shape for the strategy."""
    rows, columns = weight.shape
    if strategy == "tensor":
        scale = weight.abs().amax().view(1) / 448
        return (weight / scale).to(FLOAT8), scale
    height, width = {"channel": (1, columns), "group": (1, 16), "block": BLOCK}[strategy]
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scale = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-6) / 448
    spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    return (weight / spread).to(FLOAT8), scale


def write_float8(source: Path, folder: Path, strategy: str, dialect: str = "compressed-tensors") -> tuple[Path, Path]:
    """Write the FP8 form of a float folder and its dequantized form; the head stays float."""
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    plain, stored = dict(tensors), dict(tensors)
    args: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    args |= {"group_size": 16} if strategy == "group" else {"block_structure": list(BLOCK)} if strategy == "block" else {}
    for name in [name for name in tensors if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))]:
        weight, scale = quantize(tensors[name].float(), strategy)
        plain[name] = dequantize(weight, scale, args=QuantizationArgs(**args)).contiguous()
        stored |= {name: weight, **name_scales(name.removesuffix(".weight"), scale, dialect)}
    folder.mkdir(parents=True)
    for path, content, values in (
        (folder / "plain", plain, config),
        (folder / "fp8", stored, config | declare(dialect, strategy, args)),
    ):
        path.mkdir()
        save_file(content, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(values))
    if dialect == "modelopt-file":
        told = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        (folder / "fp8" / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": told}))
    return folder / "fp8", folder / "plain"


def name_scales(linear: str, scale: torch.Tensor, dialect: str) -> dict[str, torch.Tensor]:
    one = torch.tensor(0.5)
    if dialect == "fp8":
        return {f"{linear}.weight_scale_inv": scale}
    if dialect == "fp8-static":
        return {f"{linear}.weight_scale": scale.reshape(()), f"{linear}.input_scale": one}
    if dialect == "fbgemm_fp8":
        return {f"{linear}.weight_scale": scale, f"{linear}.input_scale_ub": one.view(1)}
    if dialect.startswith("modelopt"):
        caches = {f"{linear}.k_scale": one.clone()} if linear.endswith("k_proj") else {}
        return {f"{linear}.weight_scale": scale.reshape(()), f"{linear}.input_scale": one, **caches}
    return {f"{linear}.weight_scale": scale} | ({f"{linear}.input_scale": one.view(1)} if dialect == "compressed-tensors-static" else {})


def declare(dialect: str, strategy: str, args: Mapping[str, Any]) -> dict[str, Any]:
    if dialect == "modelopt-file":
        return {}
    if dialect.startswith("compressed-tensors"):
        group: dict[str, Any] = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
        if dialect == "compressed-tensors-static":
            group["input_activations"] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head"],
            }
        }
    settings: dict[str, Any] = {"quant_method": dialect.split("-")[0]}
    if dialect == "fp8":
        settings |= {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK) if strategy == "block" else None}
    elif dialect == "fp8-static":
        settings |= {"activation_scheme": "static", "ignored_layers": ["lm_head"]}
    elif dialect == "fbgemm_fp8":
        settings |= {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    else:
        settings |= {"quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
    return {"quantization_config": settings}

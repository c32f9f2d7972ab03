"""Write a random model in every readable format, and return the float32 weights that its stored values represent.

The writers follow the formats' documents; only rank files are written by the project itself, from one of the others.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from differential_foreign import write_gguf, write_meta, write_mindspore
from differential_models import FAMILIES, DrawnModel, Limits, list_linears
from differential_packing import AWQ_ORDER, Rounded, pack, round_weight
from model.checkpoint.formats import OpenOptions, open_checkpoint
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.scheme import read_scheme

Tensors = dict[str, torch.Tensor]
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint."""

    path: Path
    weights: Tensors
    """For transformers, by Hugging Face name."""
    options: OpenOptions = field(default_factory=OpenOptions)


@dataclass(frozen=True, slots=True)
class TestedFormat:
    """One format."""

    limits: Limits
    write: Callable[[Path, DrawnModel, random.Random], Written]


def _cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Stored tensors, and their values in float32."""
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return stored, {name: tensor.float() for name, tensor in stored.items()}


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def write_hf(folder: Path, model: DrawnModel, random: random.Random) -> Written:
    """One file, shards with or without an index, names with another prefix, any float type, a tied head stored or not."""
    dtype = random.choice(list(_FLOATS))
    stored, weights = _cast(model.tensors, _FLOATS[dtype])
    if model.values["tie_word_embeddings"]:
        stored.pop("lm_head.weight")
        if random.random() < 0.3:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    prefix = random.choice(("model.", "model.", "", "transformer.", "model.language_model."))
    stored = {prefix + name.removeprefix("model.") if name.startswith("model.") else name: one for name, one in stored.items()}
    config = {**model.values, random.choice(("dtype", "torch_dtype")): dtype}
    if "dtype" in config:
        config.pop("torch_dtype")
    _write_json(folder / "config.json", config)
    count = random.choice((1, 1, 2, 3))
    names = [f"model-{place + 1:05d}-of-{count:05d}.safetensors" for place in range(count)] if count > 1 else ["model.safetensors"]
    places = {name: names[random.randrange(count)] for name in stored}
    for file in names:
        save_file({name: stored[name].contiguous() for name in stored if places[name] == file}, folder / file, metadata={"format": "pt"})
    if count > 1 and random.random() < 0.6:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return Written(folder, weights)


def _write_rounded(
    folder: Path,
    model: DrawnModel,
    random: random.Random,
    settings: Mapping[str, Any],
    convert: Callable[[str, torch.Tensor], tuple[Tensors, Rounded] | None],
) -> Written:
    """Linears as `convert` stores them, the rest as floats. None: the linear stays a float."""
    dtype = random.choice(list(_FLOATS))
    stored, weights = _cast(model.tensors, _FLOATS[dtype])
    if model.values["tie_word_embeddings"]:
        stored.pop("lm_head.weight")
    for name in (*list_linears(model.values), "lm_head"):
        if f"{name}.weight" in stored and (found := convert(name, model.tensors[f"{name}.weight"])) is not None:
            del stored[f"{name}.weight"]
            stored |= found[0]
            weights[f"{name}.weight"] = found[1].weight
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", {**model.values, "torch_dtype": dtype, "quantization_config": settings})
    return Written(folder, weights)


def write_compressed(folder: Path, model: DrawnModel, random: random.Random) -> Written:
    """Two kinds of linears at most: 4 or 8 bits, groups or rows, packed or not, with zero points or without, act-order."""
    kinds = [_draw_arguments(random) for _ in range(random.choice((1, 1, 2)))]
    targets: list[list[str]] = [["re:.*self_attn.*"], ["re:.*(mlp|block_sparse_moe).*"]] if len(kinds) > 1 else [["Linear"]]
    ignore = random.choice((["lm_head"], ["lm_head"], [], ["lm_head", "re:.*down_proj"])) if len(kinds) == 1 else ["lm_head"]
    scale_dtype = random.choice(list(_FLOATS.values()))
    groups = {}
    for place, (kind, _, act_order) in enumerate(kinds):
        weights = {**kind, "type": "int", "dynamic": False, **({"actorder": "group"} if act_order else {})}
        group = {"targets": targets[place], "weights": weights, "input_activations": None, "output_activations": None}
        groups[f"group_{place}"] = group | ({"format": "pack-quantized" if kinds[place][1] else "int-quantized"} if len(kinds) > 1 else {})
    formats = {"pack-quantized" if packed else "int-quantized" for _, packed, _ in kinds}
    settings = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignore,
    }

    def convert(name: str, weight: torch.Tensor) -> tuple[Tensors, Rounded] | None:
        if name in ignore or ("down_proj" in name and len(ignore) > 1):
            return None
        kind, packed, act_order = kinds[0] if "self_attn" in name else kinds[-1]
        bits, size = kind["num_bits"], kind.get("group_size", -1)
        index = _shuffle(weight.shape[1], size, random) if act_order else None
        rounded = round_weight(weight, bits, size, symmetric=kind["symmetric"], scale_dtype=scale_dtype, index=index)
        tensors = {f"{name}.weight_scale": rounded.scales}
        if packed:
            tensors[f"{name}.weight_packed"] = pack(rounded.integers, bits)
            tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
        else:
            tensors[f"{name}.weight"] = (rounded.integers - rounded.zeros).to(torch.int8)
        if not kind["symmetric"]:
            tensors[f"{name}.weight_zero_point"] = pack(rounded.zeros.T, bits).T
        if act_order:
            tensors[f"{name}.weight_g_idx"] = rounded.index.to(torch.int32)
        return tensors, rounded

    return _write_rounded(folder, model, random, settings, convert)


def _draw_arguments(random: random.Random) -> tuple[dict[str, Any], bool, bool]:
    """The arguments of the weights, whether they are packed, and whether groups lie anywhere."""
    bits = random.choice((4, 8))
    if bits == 8 and random.random() < 0.5:
        return {"num_bits": 8, "symmetric": True, "strategy": "channel"}, random.random() < 0.5, False
    kind: dict[str, Any] = {"num_bits": bits, "symmetric": bits == 8 or random.random() < 0.5}
    if random.random() < 0.3:
        return kind | {"strategy": "channel"}, True, False
    return kind | {"strategy": "group", "group_size": random.choice((16, 32))}, True, random.random() < 0.3


def _shuffle(inputs: int, size: int, random: random.Random) -> torch.Tensor:
    """Groups of `size` inputs that lie anywhere."""
    index = [place // size for place in range(inputs)]
    random.shuffle(index)
    return torch.tensor(index)


def write_gptq(folder: Path, model: DrawnModel, random: random.Random) -> Written:
    """4 or 8 bits, both conventions of zero points, act-order, linears with separate settings or left out."""
    bits, version, order = random.choice((4, 4, 8)), random.choice(("gptq", "gptq_v2")), random.random() < 0.4
    size, symmetric = random.choice((16, 32, -1)), bits == 8 or random.random() < 0.5
    settings: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": order}
    if version == "gptq_v2" or random.random() < 0.5:
        settings["checkpoint_format"] = version
    dynamic = random.choice((None, None, "-:.*down_proj", "+:.*down_proj"))
    if dynamic:
        settings["dynamic"] = {dynamic: {"bits": 8, "sym": True} if dynamic.startswith("+") else {}}

    def convert(name: str, weight: torch.Tensor) -> tuple[Tensors, Rounded] | None:
        mine, even = bits, symmetric
        if name == "lm_head" or (dynamic and "down_proj" in name and dynamic.startswith("-")):
            return None
        if dynamic and "down_proj" in name:
            mine, even = 8, True
        index = _shuffle(weight.shape[1], size, random) if order and size > 0 else None
        rounded = round_weight(weight, mine, size, symmetric=even, scale_dtype=torch.float16, index=index)
        zeros = rounded.zeros if version == "gptq_v2" else (rounded.zeros - 1) % (1 << mine)
        tensors = {
            f"{name}.qweight": pack(rounded.integers, mine).T,
            f"{name}.qzeros": pack(zeros.T, mine),
            f"{name}.scales": rounded.scales.T,
            f"{name}.g_idx": rounded.index.to(torch.int32),
        }
        return tensors, rounded

    return _write_rounded(folder, model, random, settings, convert)


def write_awq(folder: Path, model: DrawnModel, random: random.Random) -> Written:
    """Groups of inputs, with zero points or without."""
    size, zero_point = random.choice((16, 32, -1)), random.random() < 0.7
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": zero_point, "version": "gemm"}

    def convert(name: str, weight: torch.Tensor) -> tuple[Tensors, Rounded] | None:
        if name == "lm_head":
            return None
        rounded = round_weight(weight, 4, size, symmetric=not zero_point, scale_dtype=torch.float16)
        tensors = {
            f"{name}.qweight": pack(rounded.integers.T, 4, AWQ_ORDER),
            f"{name}.qzeros": pack(rounded.zeros.T, 4, AWQ_ORDER),
            f"{name}.scales": rounded.scales.T,
        }
        return tensors, rounded

    return _write_rounded(folder, model, random, settings, convert)


def write_modelslim(folder: Path, model: DrawnModel, random: random.Random) -> Written:
    """Golden Stick 1.4's and ModelSlim's W8A16; some linears are floats."""
    config = {**model.values, "torch_dtype": "float32"}
    tensors, weights, description = dict(model.tensors), dict(model.tensors), {"model_quant_type": "W8A16"}
    if model.values["tie_word_embeddings"]:
        tensors.pop("lm_head.weight")
    left = random.choice((None, "down_proj"))
    for name in list_linears(model.values):
        if left and left in name:
            continue
        rounded = round_weight(model.tensors[f"{name}.weight"], 8, -1, symmetric=True, scale_dtype=torch.float32)
        tensors[f"{name}.weight"] = (rounded.integers - 128).to(torch.int8)
        tensors |= {f"{name}.weight_scale": rounded.scales, f"{name}.weight_offset": torch.zeros_like(rounded.scales)}
        weights[f"{name}.weight"] = rounded.weight
        description |= {f"{name}.{part}": "W8A16" for part in ("weight", "weight_scale", "weight_offset")}
    description |= {name: "FLOAT" for name in tensors if name not in description}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "quant_model_weight_w8a16.safetensors")
    _write_json(folder / "quant_model_description_w8a16.json", description)
    _write_json(folder / "config.json", config)
    return Written(folder, weights)


def write_ranks(folder: Path, model: DrawnModel, random: random.Random) -> Written:
    """Rank files of two or three ranks, resharded from another format."""
    write = random.choice((write_hf, write_compressed, write_gptq, write_awq))
    (folder / "source").mkdir()
    written = write(folder / "source", model, random)
    source = open_checkpoint(written.path, written.options)
    write_rank_files(source, build_config(source.config), read_scheme(source.config), random.choice((2, 3)), folder / "ranks")
    return Written(folder / "ranks", written.weights)


def _write_foreign(
    write: Callable[[Path, DrawnModel, random.Random], tuple[Path, Tensors, dict[str, Any]]],
) -> Callable[[Path, DrawnModel, random.Random], Written]:
    def run(folder: Path, model: DrawnModel, random: random.Random) -> Written:
        path, weights, options = write(folder, model, random)
        return Written(path, weights, OpenOptions(**options))

    return run


_UNFUSED = tuple(family for family in FAMILIES if family != "phi3")
"""phi3's rows of several linears may lie in one word of packed zero points."""
TESTED: Mapping[str, TestedFormat] = {
    "hf": TestedFormat(Limits(), write_hf),
    "compressed-tensors": TestedFormat(Limits(inputs=16, families=_UNFUSED), write_compressed),
    "gptq": TestedFormat(Limits(inputs=32, outputs=8), write_gptq),
    "awq": TestedFormat(Limits(inputs=32, outputs=8), write_awq),
    "gguf": TestedFormat(
        Limits(inputs=32, biases=False, families=("llama",), ropes=("default", "linear", "yarn"), yarn_details=False),
        _write_foreign(write_gguf),
    ),
    "mindspore": TestedFormat(Limits(biases=False, tied=False, families=("llama",)), _write_foreign(write_mindspore)),
    "meta": TestedFormat(
        Limits(biases=False, families=("llama",), ropes=("default",), head_dims=False, inputs=2, outputs=2), _write_foreign(write_meta)
    ),
    "modelslim": TestedFormat(Limits(biases=False, families=_UNFUSED), write_modelslim),
    "ranks": TestedFormat(Limits(inputs=32, outputs=8), write_ranks),
}
"""By name."""

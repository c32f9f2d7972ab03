"""GPTQ and AWQ folders: the integers, scales and zero points that went in come out under canonical names, row by row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.awq_folder import AwqFolder, is_awq
from model.checkpoint.column_packed import ColumnPackedFolder
from model.checkpoint.gptq_folder import GptqFolder, is_gptq
from model.spec.config import build_config
from model.spec.packing import unpack_integers
from model.spec.scheme import Scheme, read_scheme
from model.spec.weights import compare_tensors, linear_names, linear_shape, plan_weights
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "torch_dtype": "float16",
}
LINEARS = list(linear_names(build_config(LLAMA)))
GATE = "model.layers.1.mlp.gate_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Truth = dict[str, torch.Tensor]
"""Dequantized float32 [outputs, inputs] of each linear."""


def pack_words(values: list[int], bits: int) -> int:
    """The int32 word of unsigned integers, the first in the lowest bits."""
    word = sum(value << (bits * place) for place, value in enumerate(values))
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_down(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[a, b] to [a * bits / 32, b]."""
    return pack_across(values.T, bits, tuple(range(32 // bits))).T.contiguous()


def pack_across(values: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """[a, b] to [a, b * bits / 32]; place i of a word holds value order[i]."""
    per_word = len(order)
    rows = []
    for row in values.tolist():
        words = [row[first : first + per_word] for first in range(0, len(row), per_word)]
        rows.append([pack_words([word[place] for place in order], bits) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def llama_tensors() -> dict[str, torch.Tensor]:
    """All that stays float."""
    out = {name: torch.randn(96, 64).half() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    out["model.norm.weight"] = torch.randn(64).half()
    for layer in range(2):
        out.update(
            {f"model.layers.{layer}.{name}.weight": torch.randn(64).half() for name in ("input_layernorm", "post_attention_layernorm")}
        )
    return out


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None, *, file: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    config = {**LLAMA, "quantization_config": settings} if settings else LLAMA
    (folder / "config.json").write_text(json.dumps(config))


def gptq(
    bits: int, group: int, *, sym: bool, act_order: bool = False, v2: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Truth]:
    """Tensors, settings and truth of a GPTQ checkpoint."""
    torch.manual_seed(5)
    tensors, truth, top = llama_tensors(), {}, 1 << bits
    for name in LINEARS:
        outputs, inputs = linear_shape(build_config(LLAMA), name.split(".", 3)[3])
        size = inputs if group == -1 else group
        groups = inputs // size
        q = torch.randint(0, top, (inputs, outputs))
        zeros = torch.full((groups, outputs), top // 2) if sym else torch.randint(0, top, (groups, outputs))
        scales = (torch.rand(groups, outputs) + 0.1).half()
        index = torch.arange(inputs) // size
        if act_order:
            index = index[torch.randperm(inputs)]
        tensors[f"{name}.qweight"] = pack_down(q, bits)
        tensors[f"{name}.qzeros"] = pack_across(zeros if v2 else (zeros - 1) % top, bits, tuple(range(32 // bits)))
        tensors[f"{name}.scales"] = scales
        tensors[f"{name}.g_idx"] = index.int()
        tensors[f"{name}.bias"] = torch.zeros(outputs).half()
        truth[name] = (scales.float()[index] * (q - zeros[index])).T
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": sym}
    return tensors, {**settings, "checkpoint_format": "gptq_v2"} if v2 else settings, truth


def awq(group: int, *, zero_point: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any], Truth]:
    """Tensors, settings and truth of an AWQ checkpoint."""
    torch.manual_seed(6)
    tensors, truth = llama_tensors(), {}
    for name in LINEARS:
        outputs, inputs = linear_shape(build_config(LLAMA), name.split(".", 3)[3])
        size = inputs if group == -1 else group
        q, scales = torch.randint(0, 16, (inputs, outputs)), (torch.rand(inputs // size, outputs) + 0.1).half()
        zeros = torch.randint(0, 16, scales.shape) if zero_point else torch.full(scales.shape, 8)
        tensors[f"{name}.qweight"] = pack_across(q, 4, AWQ_ORDER)
        tensors[f"{name}.qzeros"] = pack_across(zeros, 4, AWQ_ORDER)
        tensors[f"{name}.scales"] = scales
        index = torch.arange(inputs) // size
        truth[name] = (scales.float()[index] * (q - zeros[index])).T
    return tensors, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm"}, truth


CASES: dict[str, tuple[Callable[[Path], ColumnPackedFolder], Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any], Truth]]]] = {
    "gptq-4-32-sym": (GptqFolder, lambda: gptq(4, 32, sym=True)),
    "gptq-4-32-asym": (GptqFolder, lambda: gptq(4, 32, sym=False)),
    "gptq-4-32-asym-v2": (GptqFolder, lambda: gptq(4, 32, sym=False, v2=True)),
    "gptq-4-32-sym-v2": (GptqFolder, lambda: gptq(4, 32, sym=True, v2=True)),
    "gptq-4-32-sym-act-order": (GptqFolder, lambda: gptq(4, 32, sym=True, act_order=True)),
    "gptq-4-32-asym-act-order": (GptqFolder, lambda: gptq(4, 32, sym=False, act_order=True)),
    "gptq-4-row-sym": (GptqFolder, lambda: gptq(4, -1, sym=True)),
    "gptq-4-row-asym-act-order": (GptqFolder, lambda: gptq(4, -1, sym=False, act_order=True)),
    "gptq-8-32-sym": (GptqFolder, lambda: gptq(8, 32, sym=True)),
    "gptq-8-32-sym-v2": (GptqFolder, lambda: gptq(8, 32, sym=True, v2=True)),
    "gptq-8-row-sym": (GptqFolder, lambda: gptq(8, -1, sym=True)),
    "awq-32": (AwqFolder, lambda: awq(32)),
    "awq-row": (AwqFolder, lambda: awq(-1)),
    "awq-32-sym": (AwqFolder, lambda: awq(32, zero_point=False)),
}


def open_case(path: Path, case: str) -> tuple[ColumnPackedFolder, Truth]:
    open_folder, make = CASES[case]
    tensors, settings, truth = make()
    write(path, tensors, settings)
    return open_folder(path), truth


def read(folder: ColumnPackedFolder, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    reader = FileReader()
    try:
        return folder.read_rows(reader, name, start, folder.tensors[name].shape[0] if stop is None else stop)
    finally:
        reader.close()


def dequantize(folder: ColumnPackedFolder, scheme: Scheme, name: str) -> torch.Tensor:
    """As the docstring of model/spec/scheme.py says."""
    linear = scheme.find_linear(name)
    assert linear is not None
    rows, columns = read(folder, f"{name}.weight_shape").tolist()
    weight = unpack_integers(read(folder, f"{name}.weight_packed"), linear.bits, columns).int()
    index = torch.arange(columns) // (linear.group_size or columns)
    if linear.act_order:
        index = read(folder, f"{name}.weight_g_idx").long()
    if not linear.symmetric:
        weight -= unpack_integers(read(folder, f"{name}.weight_zero_point").T, linear.bits, rows).T.int()[:, index]
    return weight * read(folder, f"{name}.weight_scale").float()[:, index]


@pytest.mark.parametrize("case", CASES)
def test_the_canonical_tensors_are_exactly_the_weights(tmp_path: Path, case: str) -> None:
    folder, truth = open_case(tmp_path, case)
    scheme = read_scheme(folder.config)
    assert scheme.linear is not None and scheme.ignore == ("lm_head",)
    assert scheme.linear.act_order == (case.endswith("act-order") and "row" not in case)
    for name in LINEARS:
        assert torch.equal(dequantize(folder, scheme, name), truth[name]), name


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_that_the_model_needs_and_read_as_declared(tmp_path: Path, case: str) -> None:
    folder, _ = open_case(tmp_path, case)
    specs = plan_weights(build_config(folder.config), read_scheme(folder.config))
    assert compare_tensors(specs, folder.tensors, tied=False).describe() == ""
    for name, info in folder.tensors.items():
        found = read(folder, name)
        assert (tuple(found.shape), found.dtype, found.is_contiguous()) == (info.shape, info.dtype.torch_dtype, True), name


@pytest.mark.parametrize("case", CASES)
def test_any_range_of_rows_is_that_part_of_the_whole(tmp_path: Path, case: str) -> None:
    folder, _ = open_case(tmp_path, case)
    for name in [name for name in folder.tensors if name.startswith(GATE)]:
        whole = read(folder, name)
        count = len(whole)
        ranges = [(0, count), (0, 1), (count - 1, count), (count // 3, count // 2 + 1), (1, 1), (5, 21), (8, 16), (count // 2, count)]
        for start, stop in ranges:
            if stop <= count:
                assert torch.equal(read(folder, name, start, stop), whole[start:stop]), (name, start, stop)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # qweight: 16 of 128 columns; qzeros of 2 groups: 2 words; g_idx: whole.
        ("gptq-4-32-sym", 8 * 16 * 4 + 2 * 2 * 4 + 64 * 4),
        ("gptq-8-32-sym", 16 * 16 * 4 + 2 * 4 * 4 + 64 * 4),
        ("gptq-4-32-asym-act-order", 8 * 16 * 4),
        ("awq-32", 64 * 2 * 4),
        ("awq-32-sym", 64 * 2 * 4 + 2 * 2 * 4),
    ],
)
def test_only_the_bytes_of_the_rows_are_read(tmp_path: Path, case: str, expected: int) -> None:
    folder, _ = open_case(tmp_path, case)
    reader = FileReader()
    folder.read_rows(reader, f"{GATE}.weight_packed", 32, 48)
    assert reader.read_bytes == expected
    folder.read_rows(reader, f"{GATE}.weight_scale", 32, 48)
    assert reader.read_bytes == expected + 2 * 16 * 2
    folder.read_rows(reader, f"{GATE}.weight_shape", 0, 2)
    assert reader.read_bytes == expected + 2 * 16 * 2
    reader.close()


def test_awq_agrees_with_the_converter_of_compressed_tensors(tmp_path: Path) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    tensors, settings, _ = awq(32)
    write(tmp_path, tensors, settings)
    folder = AwqFolder(tmp_path)
    expected = converters.AutoAWQConverter.from_autoawq_config(settings).process(dict(tensors))
    assert set(expected) == set(folder.tensors)
    for name, tensor in expected.items():
        assert torch.equal(read(folder, name), tensor), name


def test_linears_that_are_float_are_ignored_by_name(tmp_path: Path) -> None:
    tensors, settings, _ = awq(32)
    for name in [name for name in tensors if name.startswith(GATE)]:
        del tensors[name]
    tensors[f"{GATE}.weight"] = torch.randn(128, 64).half()
    write(tmp_path, tensors, settings)
    folder = AwqFolder(tmp_path)
    scheme = read_scheme(folder.config)
    assert scheme.ignore == (GATE, "lm_head")
    assert compare_tensors(plan_weights(build_config(folder.config), scheme), folder.tensors, tied=False).describe() == ""
    assert torch.equal(read(folder, f"{GATE}.weight", 7, 30), tensors[f"{GATE}.weight"][7:30])


def test_dynamic_settings_go_to_the_first_pattern_that_matches(tmp_path: Path) -> None:
    tensors, settings, truth = gptq(4, 32, sym=True)
    others, _, wide = gptq(8, -1, sym=True)
    eight = [name for name in LINEARS if name.endswith("down_proj") or name.startswith("model.layers.1.self_attn")]
    tensors |= {name: tensor for name, tensor in others.items() if name.rpartition(".")[0] in eight}
    changes = {"bits": 8, "group_size": -1, "mse": 2.0}
    settings["dynamic"] = {"+:.*down_proj": changes, r"model\.layers\.1\.self_attn": changes, "+:.*": {}, r"+:.*\.0\..*": {"bits": 8}}
    write(tmp_path, tensors, settings)
    folder = GptqFolder(tmp_path)
    scheme = read_scheme(folder.config)
    assert compare_tensors(plan_weights(build_config(folder.config), scheme), folder.tensors, tied=False).describe() == ""
    assert scheme.name == "a16w4-g32+rtn-a16w8"
    for name in LINEARS:
        assert torch.equal(dequantize(folder, scheme, name), (wide if name in eight else truth)[name]), name


def test_a_quantized_head_is_not_ignored(tmp_path: Path) -> None:
    tensors, settings, _ = gptq(4, 64, sym=True)
    del tensors["lm_head.weight"]
    q = torch.randint(0, 16, (64, 96))
    tensors["lm_head.qweight"], tensors["lm_head.qzeros"] = pack_down(q, 4), torch.full((1, 12), 0x77777777, dtype=torch.int32)
    tensors["lm_head.scales"] = torch.ones(1, 96).half()
    write(tmp_path, tensors, settings)
    folder = GptqFolder(tmp_path)
    scheme = read_scheme(folder.config)
    assert scheme.ignore == ()
    assert torch.equal(dequantize(folder, scheme, "lm_head"), (q.T - 8).float())


def test_settings_may_lie_beside_config_json_in_the_old_spelling(tmp_path: Path) -> None:
    tensors, _, truth = awq(32)
    write(tmp_path, tensors, None)
    assert not is_awq(tmp_path)
    (tmp_path / "quant_config.json").write_text(json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}))
    assert is_awq(tmp_path) and not is_gptq(tmp_path)
    folder = AwqFolder(tmp_path)
    assert torch.equal(dequantize(folder, read_scheme(folder.config), GATE), truth[GATE])


def test_the_file_may_have_the_name_that_autogptq_gave_it(tmp_path: Path) -> None:
    tensors, settings, truth = gptq(4, 32, sym=True)
    write(tmp_path, tensors, None, file="gptq_model-4bit-32g.safetensors")
    del settings["quant_method"]
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    assert is_gptq(tmp_path) and not is_awq(tmp_path)
    folder = GptqFolder(tmp_path)
    assert folder.tokenizer_path() == tmp_path == folder.path
    assert torch.equal(dequantize(folder, read_scheme(folder.config), GATE), truth[GATE])


def test_a_folder_is_told_by_what_it_declares(tmp_path: Path) -> None:
    assert not is_gptq(tmp_path) and not is_gptq(tmp_path / "absent")
    config = tmp_path / "config.json"
    assert not is_gptq(config)
    for text in ("{", "[]", '{"quantization_config": 3}', '{"quantization_config": {}}'):
        config.write_text(text)
        assert not is_gptq(config) and not is_gptq(tmp_path) and not is_awq(tmp_path), text
    config.write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert is_awq(tmp_path) and not is_gptq(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert not is_gptq(tmp_path), "config.json is believed first"
    config.write_text("{}")
    assert is_gptq(tmp_path) and not is_awq(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"quant_method": "awq"}')
    assert not is_gptq(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "weights of 3 bits are not supported; there are 4 and 8"),
        ({"bits": None}, "weights of None bits are not supported; there are 4 and 8"),
        ({"bits": 8, "sym": False}, "8-bit weights with zero points are not supported"),
        ({"group_size": 0}, "group_size is 0, but a whole number of at least 1 is needed, or -1"),
        ({"group_size": "all"}, "group_size is 'all'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; there are 'gptq' and 'gptq_v2'"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin' is not supported"),
        ({"dynamic": {"+:.*down_proj": {"bits": 3}, "-:.*up_proj": {}}}, "weights of 3 bits are not supported"),
        ({"dynamic": {"+:.*down_proj": 8}}, r"dynamic gives '\+:\.\*down_proj' 8, but an object is needed"),
        ({"dynamic": {"+:.*down_proj": {"new": 8}}}, r"dynamic changes 'new' for '\+:\.\*down_proj', which is not supported"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "in dynamic is no pattern"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format is 'gptq', but format is 'gptq_v2': remove the wrong one"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard', but only null is supported"),
    ],
)
def test_gptq_settings_that_are_not_supported_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors, settings, _ = gptq(4, 32, sym=True)
    write(tmp_path, tensors, {**settings, **changes})
    with pytest.raises(ConfigError, match=message):
        GptqFolder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "weights of 8 bits are not supported; there is 4"),
        ({"version": "GEMV"}, "AWQ version 'GEMV' is not supported; only 'gemm' is"),
        ({"group_size": -2}, "group_size is -2"),
    ],
)
def test_awq_settings_that_are_not_supported_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors, settings, _ = awq(32)
    write(tmp_path, tensors, {**settings, **changes})
    with pytest.raises(ConfigError, match=message):
        AwqFolder(tmp_path)


def _put(name: str, value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("act_order", "change", "message"),
    [
        (False, _put(f"{GATE}.bias", torch.eye(128)[3]), rf"1 of 128 values of {GATE}.bias are not 0"),
        (False, _put(f"{GATE}.scales", None), rf"{GATE}.qweight, but no {GATE}.scales"),
        (True, _put(f"{GATE}.g_idx", None), rf"{GATE}.qweight, but no {GATE}.g_idx"),
        (
            False,
            _put(f"{GATE}.scales", torch.ones(1, 128)),
            r"scales is float32 \[1, 128\], but float16 \[2, 128\] belongs to this qweight",
        ),
        (False, _put(f"{GATE}.qzeros", torch.ones(2, 128)), r"qzeros is float32 \[2, 128\], but int32 \[2, 16\]"),
        (False, _put(f"{GATE}.qweight", torch.ones(8, 128)), r"qweight is float32 \[8, 128\], but int32 of 2 dimensions is needed"),
    ],
)
def test_tensors_that_cannot_be_used_are_found_at_opening(
    tmp_path: Path, act_order: bool, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors, settings, _ = gptq(4, 32, sym=False, act_order=act_order)
    change(tensors)
    write(tmp_path, tensors, settings)
    with pytest.raises(CheckpointError, match=message):
        GptqFolder(tmp_path)


def test_a_folder_without_quantized_linears_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, llama_tensors(), awq(32)[1])
    with pytest.raises(CheckpointError, match="declares quantized weights, but 0 of its tensors are a qweight"):
        AwqFolder(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_symmetric_weights_with_zero_points_are_an_error_where_the_rows_have_them(tmp_path: Path, method: str) -> None:
    tensors, settings, _ = gptq(4, 32, sym=True) if method == "gptq" else awq(32, zero_point=False)
    tensors[f"{GATE}.qzeros"][1, 5] ^= 0x300  # nibble 2: output 2 of its word, or 4 in AWQ's order
    write(tmp_path, tensors, settings)
    folder = GptqFolder(tmp_path) if method == "gptq" else AwqFolder(tmp_path)
    row = 42 if method == "gptq" else 44
    read(folder, f"{GATE}.weight_packed", 0, row)
    read(folder, f"{GATE}.weight_packed", row + 1, 128)
    with pytest.raises(CheckpointError, match=rf"symmetric weights, but 1 of 20 zero points .* rows {row} to {row + 10} are not 8"):
        read(folder, f"{GATE}.weight_packed", row, row + 10)


def test_shuffled_groups_that_are_not_declared_are_an_error(tmp_path: Path) -> None:
    tensors, settings, _ = gptq(4, 32, sym=True)
    tensors[f"{GATE}.g_idx"][[0, 63]] = tensors[f"{GATE}.g_idx"][[63, 0]]
    write(tmp_path, tensors, settings)
    with pytest.raises(CheckpointError, match=r"2 of 64 entries of .*g_idx are others; set desc_act to true"):
        read(GptqFolder(tmp_path), f"{GATE}.weight_packed")


def test_a_group_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    tensors, settings, _ = gptq(4, 32, sym=True, act_order=True)
    tensors[f"{GATE}.g_idx"][9] = 2
    write(tmp_path, tensors, settings)
    with pytest.raises(CheckpointError, match="g_idx names group 2, but there are 2"):
        read(GptqFolder(tmp_path), f"{GATE}.weight_g_idx")


def test_awq_inputs_that_do_not_fill_words_are_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.awq_folder._BLOCK_BYTES", 100)
    tensors, settings, _ = awq(-1)
    q = torch.randint(0, 16, (61, 24))
    tensors["x.qweight"], tensors["x.scales"] = pack_across(q, 4, AWQ_ORDER), torch.ones(1, 24).half()
    tensors["x.qzeros"] = torch.zeros(1, 3, dtype=torch.int32)
    write(tmp_path, tensors, settings)
    found = unpack_integers(read(AwqFolder(tmp_path), "x.weight_packed"), 4, 64)
    assert torch.equal(found[:, :61], (q.T - 8).to(torch.int8)) and not found[:, 61:].any()


def test_shards_may_have_the_names_that_autogptq_gave_them(tmp_path: Path) -> None:
    tensors, settings, truth = gptq(4, 32, sym=True)
    names = list(tensors)
    for number in (1, 2, 3):
        part = {name: tensors[name] for name in names[number - 1 :: 3]}
        write(tmp_path, part, settings, file=f"gptq_model-4bit-32g-0000{number}-of-00003.safetensors")
    weight_map = {name: f"gptq_model-4bit-32g-0000{1 + place % 3}-of-00003.safetensors" for place, name in enumerate(names)}
    (tmp_path / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    folder = GptqFolder(tmp_path)
    assert len(folder.files) == 3
    assert torch.equal(dequantize(folder, read_scheme(folder.config), GATE), truth[GATE])
    (tmp_path / "gptq_model-4bit-32g-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"gptq_model-4bit-32g-00002-of-00003\.safetensors is missing: copy it"):
        GptqFolder(tmp_path)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_linear_of_two_or_three_bits_is_refused(tmp_path: Path, bits: int) -> None:
    tensors, settings, _ = gptq(4, 32, sym=True)
    write(tmp_path, tensors, settings | {"dynamic": {"+:.*down_proj": {"bits": bits}}})
    with pytest.raises(ConfigError, match=rf"weights of {bits} bits are not supported; there are 4 and 8"):
        GptqFolder(tmp_path)

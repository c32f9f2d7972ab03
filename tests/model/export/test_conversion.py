"""Rewriting: round to nearest against numpy and against other programs' files, other float types, and failures on the way."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model.checkpoint import folder_writing
from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.folder_writing import check_target
from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine, generate
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.export.conversion import convert_checkpoint
from model.layers.batch import Span
from model.layers.rounding import quantize_rows
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.packing import pack_integers, unpack_integers
from model.spec.scheme import Scheme, read_scheme
from parallel.errors import CheckpointError, ConfigError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pass_over(done: int, total: int) -> None:
    pass


def quantize_plainly(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Golden Stick's formula, row by row, in the weight's type; numpy rounds halves to even."""
    codes, scales = np.empty(weight.shape, np.int8), np.empty((len(weight), 1), weight.dtype)
    for row, values in enumerate(weight):
        scale = (np.float32(2) * np.abs(values).max().astype(np.float32) / np.float32(255)).astype(weight.dtype)
        scales[row] = scale if scale else 1
        quotient = values / scales[row]
        assert quotient.dtype == weight.dtype
        codes[row] = np.clip(np.round(quotient), -128, 127).astype(np.int8)
    return codes, scales


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("spread", [0.02, 1.0, 300.0])
def test_round_to_nearest_is_the_formula_in_the_type_of_the_weight(dtype: type, spread: float) -> None:
    weight = (np.random.default_rng(2).standard_normal((70, 333)) * spread).astype(dtype)
    weight[7] = 0
    codes, scales = quantize_plainly(weight)
    found, scale = quantize_rows(torch.from_numpy(weight))
    assert found.dtype == torch.int8 and np.array_equal(found.numpy(), codes)
    assert np.array_equal(scale.numpy(), scales) and scale.numpy().dtype == dtype
    assert codes.min() == -128 and codes.max() == 127


def test_halves_go_to_the_even_side_and_the_ends_are_clipped() -> None:
    weight = torch.tensor([[127.5, -127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scale = quantize_rows(weight)
    assert scale.tolist() == [[1.0]] and codes.tolist() == [[127, -128, 0, 2, 2, 0, -2, -2]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_packing_is_four_codes_a_word_and_unpacking_undoes_it(rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8)
    packed = pack_integers(torch.from_numpy(codes), 8)
    assert packed.dtype == torch.int32 and packed.shape == (rows, -(-columns // 4))
    words = packed.numpy().view(np.uint32)
    for column in range(columns):
        assert np.array_equal(((words[:, column // 4] >> (8 * (column % 4))) & 255).astype(int) - 128, codes[:, column])
    assert torch.equal(unpack_integers(packed, 8, columns), torch.from_numpy(codes))


@pytest.mark.parametrize("name", ["nine_heads", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_quantized_folder_holds_the_codes_of_every_linear_and_the_rest_as_it_was(
    name: str, dtype: str, tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]
) -> None:
    convert_checkpoint(open_checkpoint(tiny_llama(name)), tmp_path / "float", dtype, pass_over)
    scheme = quantize(tmp_path / "float", tmp_path / "int8", "lm_head")
    before, after = load_file(tmp_path / "float" / "model.safetensors"), load_file(tmp_path / "int8" / "model.safetensors")
    expected = {}
    for key, weight in before.items():
        if key.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            codes, scale = quantize_rows(weight)
            expected |= {f"{key}_packed": pack_integers(codes, 8), f"{key}_scale": scale, f"{key}_shape": torch.tensor(weight.shape)}
        else:
            expected[key] = weight
    assert set(after) == set(expected) and len(after) == len(before) + 2 * 2 * len(LINEARS)
    for key, tensor in expected.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    source = open_checkpoint(tmp_path / "int8")
    assert read_scheme(source.config) == scheme
    check_checkpoint(source, build_config(source.config), scheme)


def test_linears_whose_names_hold_a_word_stay_float(
    tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]
) -> None:
    scheme = quantize(tiny_llama("nine_heads"), tmp_path / "int8", "layers.1.mlp", "o_proj")
    names = set(load_file(tmp_path / "int8" / "model.safetensors"))
    kept = {f"model.layers.1.mlp.{name}" for name in LINEARS[4:]} | {f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)}
    assert set(scheme.ignore) == kept
    assert kept == {name.removesuffix(".weight") for name in names if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS))}
    assert "lm_head.weight_packed" in names and "lm_head.weight" not in names


def test_nothing_left_to_quantize_is_an_error(tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]) -> None:
    with pytest.raises(ConfigError, match=re.escape("modules_to_not_convert ['proj', 'lm_head'] leaves nothing to quantize")):
        quantize(tiny_llama("nine_heads"), tmp_path / "int8", "proj", "lm_head")


def test_a_failure_on_the_way_leaves_no_checkpoint(
    tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]
) -> None:
    def fail(done: int, total: int) -> None:
        if done > total * 0.9:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        quantize(tiny_llama("tied"), tmp_path / "int8", on_progress=fail)
    with pytest.raises(OSError, match="no space left"):
        convert_checkpoint(open_checkpoint(tiny_llama("tied")), tmp_path / "half", "float16", fail)
    # The layers that are rounded already stay, for the same command to go on with.
    assert [path.name for path in tmp_path.iterdir()] == [".int8.quantizing"]


def test_progress_goes_up_to_all_bytes(tmp_path: Path, tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme]) -> None:
    steps: list[tuple[int, int]] = []
    quantize(tiny_llama("tied"), tmp_path / "int8", on_progress=lambda done, total: steps.append((done, total)))
    total = sum(info.num_bytes for info in open_checkpoint(tmp_path / "int8").tensors.values())
    assert steps[-1] == (total, total) and steps == sorted(steps) and {whole for _, whole in steps} == {total}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_a_converted_folder_holds_every_tensor_in_the_type_asked_for(
    dtype: str | None, tmp_path: Path, tiny_llama: Callable[[str], Path]
) -> None:
    convert_checkpoint(open_checkpoint(tiny_llama("tied")), tmp_path / "out", dtype, pass_over)
    wanted = getattr(torch, dtype or "float32")
    before, after = load_file(tiny_llama("tied") / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    assert all(after[name].dtype == wanted and torch.equal(after[name], before[name].to(wanted)) for name in before)
    assert build_config(open_checkpoint(tmp_path / "out").config).dtype == (dtype or "float32")


def test_a_large_checkpoint_is_cut_in_files_with_an_index(
    tmp_path: Path, tiny_llama: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, quantize: Callable[..., Scheme]
) -> None:
    monkeypatch.setattr(folder_writing, "MAX_FILE_BYTES", 150_000)
    quantize(tiny_llama("nine_heads"), tmp_path / "int8")
    files = sorted((tmp_path / "int8").glob("*.safetensors"))
    assert len(files) > 1 and [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "int8" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    monkeypatch.undo()
    quantize(tiny_llama("nine_heads"), tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for file in files for name, tensor in load_file(file).items()) and set(whole) == set(held)
    check_checkpoint(open_checkpoint(tmp_path / "int8"), build_config(open_checkpoint(tmp_path / "int8").config), Scheme(LinearScheme()))


def test_a_target_that_holds_something_is_replaced_only_when_asked(tmp_path: Path) -> None:
    check_target(tmp_path / "new", overwrite=False)
    check_target(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists already; name another place or add --overwrite"):
        check_target(tmp_path, overwrite=False)
    with pytest.raises(CheckpointError, match="exists already"):
        check_target(tmp_path / "file", overwrite=False)
    check_target(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["nine_heads", "tied"])
def test_transformers_reads_a_quantized_folder_as_the_same_model(
    name: str,
    tmp_path: Path,
    tiny_llama: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
    quantize: Callable[..., Scheme],
) -> None:
    import compressed_tensors  # noqa: F401  (transformers asks for it at run time only)
    import transformers

    quantize(tiny_llama(name), tmp_path / "int8", "lm_head", "layers.0.self_attn")
    reference, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "int8", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = [(7 * i + 3) % 80 for i in range(24)]
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    model = build_model(tmp_path / "int8")
    found = model.logits_local(model([Span(model.build_cache(len(ids)), ids)]))
    assert (found - expected).norm() / expected.norm() < 1e-3
    assert torch.equal(found.argmax(1), expected.argmax(1))


def check_golden(model: LlamaForCausalLM, golden: Path) -> None:
    """All prompts in one batch, each to the length of its golden tokens."""
    items = json.loads(golden.read_text())["items"]
    requests = [
        Request(index, tuple(item["prompt_ids"]), SamplingParams(max_new_tokens=len(item["new_ids"]))) for index, item in enumerate(items)
    ]
    found: list[list[int]] = [[] for _ in items]
    for event in generate(Engine(model), requests):
        found[event.index].append(event.token_id)
    assert found == [item["new_ids"] for item in items] and min(map(len, found)) > 20


def test_the_trained_model_gives_the_tokens_of_transformers(shared_dir: Path, build_model: Callable[..., LlamaForCausalLM]) -> None:
    folder = shared_dir / "data" / "stories260K-hf"
    check_golden(build_model(folder), folder / "golden_greedy_fp32.json")


def test_the_trained_model_quantized_by_compressed_tensors_gives_its_tokens(
    shared_dir: Path, build_model: Callable[..., LlamaForCausalLM]
) -> None:
    folder = shared_dir / "data" / "quant_examples" / "stories260K-w8a16-ct"
    check_golden(build_model(folder), folder / "golden_greedy.json")


def test_codes_and_scales_are_those_of_golden_stick(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "mindspore_ckpt" / "golden_stick"
    before, after = np.load(folder / "fp_float32.npz"), np.load(folder / "rtn-a16w8_float32.npz")
    scales = [name for name in after.files if name.endswith("._weight_quantizer.scale")]
    assert len(scales) == 14
    for name in scales:
        linear = name.removesuffix("._weight_quantizer.scale")
        codes, scale = quantize_rows(torch.from_numpy(before[f"{linear}.weight"]))
        assert np.array_equal(codes.numpy(), after[f"{linear}._handler.weight"]), linear
        assert np.array_equal(scale[:, 0].numpy(), after[name].reshape(-1)), linear

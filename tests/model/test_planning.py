"""Plans against what they predict: models that are built, caches, bytes that loading reads, parameter counts of real models."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.kernels.library import find_kernels, kernels_disabled
from model.layers.quantized_linear import QuantizedColumnParallelLinear
from model.planning import PROCESS_BYTES, RankPlan, Workload, measure_balance, plan_ranks
from model.spec.config import LlamaConfig, build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.run_scheme import plan_run_scheme
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from model.spec.stored_form import StoredForm
from model.spec.weights import find_not_converted, linear_shape, plan_weights
from parallel.errors import LayoutError

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
WORLD_SIZES = (1, 2, 3, 5, 8)
FEW = (1, 5)

UNTIED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 144,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
# 172 columns are no whole number of groups of 16, 130 rows no whole number of units.
TIED = {**UNTIED, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
TIED |= {"vocab_size": 130, "tie_word_embeddings": True}
MODELS = {"untied": UNTIED, "tied": TIED}

INT8, DYNAMIC = LinearScheme(), LinearScheme(packed=False, activation="token")
STATIC = LinearScheme(packed=False, activation="tensor", activation_symmetric=False)
SCHEMES: dict[str, tuple[LinearScheme | None, tuple[str, ...], str | None]] = {
    # linears, words of those that stay float, cache
    "float": (None, (), None),
    "int8": (INT8, ("lm_head",), None),
    "int8 with its head": (INT8, (), None),
    "int8, some of a fused product float": (INT8, ("lm_head", "k_proj", "layers.1.mlp.up_proj"), None),
    "int4 in groups": (LinearScheme(bits=4, group_size=16), ("lm_head",), None),
    "int4 with zero points": (LinearScheme(bits=4, group_size=16, symmetric=False), ("lm_head",), None),
    "int4 in shuffled groups": (LinearScheme(bits=4, group_size=16, act_order=True), ("lm_head",), None),
    "a8w8 dynamic": (DYNAMIC, ("lm_head",), "token"),
    "a8w8 static": (STATIC, ("lm_head", "w2"), None),
    "smooth": (replace(STATIC, smooth=True), ("lm_head", "w2"), None),
    "a8w4 in groups": (LinearScheme(bits=4, group_size=16, activation="token"), ("lm_head",), None),
    "int8 cache by channel": (None, (), "channel"),
    "int8 cache by tensor": (INT8, ("lm_head",), "tensor"),
}


@dataclass(frozen=True)
class SilentCollectives:
    """A rank that talks to nobody."""

    rank: int
    world_size: int
    name: str = "none"

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError

    def barrier(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def build_scheme(config: LlamaConfig, name: str) -> Scheme:
    linear, words, cache = SCHEMES[name]
    return Scheme(linear, find_not_converted(config, words) if linear else (), cache)


def make_tensor(config: LlamaConfig, scheme: Scheme, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Random elements that mean something under this name."""
    owner, _, part = name.rpartition(".")
    if part == "weight_shape":
        return torch.tensor((config.vocab_size, config.hidden_size) if owner == "lm_head" else linear_shape(config, owner.split(".", 3)[3]))
    if part == "weight_g_idx":
        assert scheme.linear is not None and scheme.linear.group_size is not None
        return (torch.randperm(shape[0]) // scheme.linear.group_size).int()
    kind: torch.dtype = getattr(torch, dtype)
    if kind.is_floating_point:
        return (torch.rand(shape) + 0.1).to(kind)
    return torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, shape, dtype=kind)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """A function that writes a random checkpoint: (key of MODELS, key of SCHEMES, type of what is float)."""

    def run(model: str, scheme_name: str, dtype: str) -> Path:
        values = {**MODELS[model], "torch_dtype": dtype}
        config, folder = build_config(values), tmp_path_factory.mktemp("checkpoint")
        scheme = build_scheme(config, scheme_name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            tensors = {
                name: make_tensor(config, scheme, name, spec.shape, spec.dtypes[0] if len(spec.dtypes) == 1 else dtype)
                for name, spec in plan_weights(config, scheme).items()
            }
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(declare_scheme(values, scheme)))
        return folder

    return run


def load(folder: Path, rank: int, world_size: int, dtype: str, asked: Scheme | None = None) -> tuple[LlamaForCausalLM, int]:
    """One rank's model and the bytes that were read for it. `asked`: the scheme of the run; None: the checkpoint's."""
    source = open_checkpoint(folder)
    config, scheme = build_config(source.config), asked or read_scheme(source.config)
    model = LlamaForCausalLM(config, scheme, SilentCollectives(rank, world_size), dtype=dtype, device=torch.device("cpu"))
    return model, load_model(model, source)


def plan(folder: Path, world_size: int, workload: Workload) -> list[RankPlan]:
    """From config.json and, as `tandem plan --checkpoint` does it, the types in the headers."""
    source = open_checkpoint(folder)
    stored = {name: info.form for name, info in source.tensors.items()}
    return plan_ranks(build_config(source.config), read_scheme(source.config), world_size, workload, stored)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_keeps_and_reads_the_bytes_of_its_plan(
    write: Callable[[str, str, str], Path], model: str, scheme: str, dtype: str
) -> None:
    folder, workload = write(model, scheme, dtype), Workload(dtype=dtype, kv_cache=SCHEMES[scheme][2], batch_size=3, tokens=50)
    config = build_config({**MODELS[model], "torch_dtype": dtype})
    for world_size in WORLD_SIZES if dtype == "float32" or scheme in ("float", "int8") else FEW:
        plans = plan(folder, world_size, workload)
        assert [one.rank for one in plans] == list(range(world_size))
        workload_only = plan_ranks(config, build_scheme(config, scheme), world_size, workload)
        assert workload_only == plans, "config.json alone says the same"
        for one in plans:
            built, read_bytes = load(folder, one.rank, world_size, dtype)
            assert one.weight_bytes == built.weight_bytes, one
            assert one.file_bytes == read_bytes, one
            assert one.kv_cache_bytes == built.build_cache(50).store.bytes_per_token * 64 * 3, one
            embedding = 0 if config.tie_word_embeddings else sum(tensor.nbytes for tensor in built.embed_tokens.parameters())
            assert one.streamed_bytes == one.weight_bytes - embedding, one
            assert one.peak_bytes >= PROCESS_BYTES[dtype][0] + one.weight_bytes + one.kv_cache_bytes + one.activation_bytes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", ["float", "int8"])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_head_that_is_quantized_while_loading_has_the_bytes_of_its_plan(
    write: Callable[[str, str, str], Path], model: str, scheme: str, kernels: bool
) -> None:
    """A tied embedding stays as stored, is read once more, and is then not streamed."""
    folder, config = write(model, scheme, "bfloat16"), build_config(MODELS[model])
    source = open_checkpoint(folder)
    stored = {name: info.form for name, info in source.tensors.items()}
    asked = plan_run_scheme(read_scheme(source.config), tied=config.tie_word_embeddings, kv_cache=None, activations="auto", lm_head="int8")
    with nullcontext() if kernels else kernels_disabled():
        workload = Workload(dtype="bfloat16", tokens=50, own_kernels=kernels and find_kernels() is not None)
        for world_size in FEW:
            plans = plan_ranks(build_config(source.config), asked, world_size, workload, stored)
            before = plan(folder, world_size, workload)
            extra = config.vocab_size * config.hidden_size * 2 if config.tie_word_embeddings else 0
            assert sum(one.file_bytes for one in plans) - sum(one.file_bytes for one in before) == extra
            for one in plans:
                built, read_bytes = load(folder, one.rank, world_size, "bfloat16", asked)
                assert (one.weight_bytes, one.file_bytes) == (built.weight_bytes, read_bytes)
                embedding = sum(tensor.nbytes for tensor in built.embed_tokens.parameters())
                assert one.streamed_bytes == one.weight_bytes - embedding
                assert isinstance(built.lm_head, QuantizedColumnParallelLinear)
                share = one.vocab_rows[1] - one.vocab_rows[0]
                assert built.lm_head.weight_bytes == share * (config.hidden_size + 4)


def test_types_in_the_headers_go_over_config_json(write: Callable[[str, str, str], Path]) -> None:
    folder = write("untied", "int8", "float16")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": "float32"}))
    workload = Workload(dtype="float32", tokens=8)
    for one in plan(folder, 3, workload):
        assert one.file_bytes == load(folder, one.rank, 3, "float32")[1]
    config = build_config(json.loads((folder / "config.json").read_text()))
    assert plan_ranks(config, build_scheme(config, "int8"), 1, workload)[0].file_bytes > plan(folder, 1, workload)[0].file_bytes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache", [None, "channel", "token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_takes_what_its_tensors_take(model: str, cache: str | None, dtype: str) -> None:
    config, workload = build_config(MODELS[model]), Workload(dtype=dtype, kv_cache=cache, batch_size=4, tokens=33)
    for world_size in WORLD_SIZES:
        for one in plan_ranks(config, Scheme(), world_size, workload):
            ranks = SilentCollectives(one.rank, world_size)
            built = LlamaForCausalLM(config, Scheme(kv_cache=cache), ranks, dtype=dtype, device=torch.device("cpu"))
            assert one.kv_cache_bytes == built.build_cache(33).store.bytes_per_token * 48 * 4


@pytest.mark.parametrize("model", MODELS)
def test_the_ranks_own_every_head_and_every_row_once(model: str) -> None:
    config = build_config(MODELS[model])
    sizes = {
        "heads": config.num_attention_heads,
        "hidden_rows": config.hidden_size,
        "intermediate_rows": config.intermediate_size,
        "vocab_rows": config.vocab_size,
    }
    for world_size in range(1, config.layout().max_world_size + 1):
        plans = plan_ranks(config, Scheme(), world_size, Workload(dtype="float32", tokens=1))
        for field, size in sizes.items():
            ranges = [getattr(one, field) for one in plans]
            assert ranges[0][0] == 0 and ranges[-1][1] == size
            assert all(before[1] == after[0] for before, after in pairwise(ranges)), (field, ranges)
            assert all(start < stop for start, stop in ranges), (field, ranges)
        # Ranks may share a key-value head, and each keeps those of its own query heads.
        group = config.num_attention_heads // config.num_key_value_heads
        for one in plans:
            assert one.kv_heads == (one.heads[0] // group, (one.heads[1] - 1) // group + 1), one
        assert {head for one in plans for head in range(*one.kv_heads)} == set(range(config.num_key_value_heads))


@pytest.mark.parametrize(("model", "limit"), [("untied", 9), ("tied", 8)])
def test_too_many_ranks_are_refused_with_the_numbers_that_work(model: str, limit: int) -> None:
    config, workload = build_config(MODELS[model]), Workload(dtype="float32", tokens=1)
    assert len(plan_ranks(config, Scheme(), limit, workload)) == limit
    with pytest.raises(LayoutError, match=rf"{limit + 1} ranks are too many: the model has {limit} query heads; 1 to {limit} all work"):
        plan_ranks(config, Scheme(), limit + 1, workload)
    with pytest.raises(LayoutError, match="the number of ranks is 0, but at least 1 is needed"):
        plan_ranks(config, Scheme(), 0, workload)


def test_balance_is_one_where_every_rank_has_as_much_and_less_elsewhere() -> None:
    config = build_config({**UNTIED, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128, "vocab_size": 128})
    config = replace(config, intermediate_size=256)
    assert measure_balance(config, Scheme(), 1) == 1
    # Norms are on every rank, so that no number of ranks makes them smaller.
    assert measure_balance(config, Scheme(), 2) == measure_balance(config, Scheme(), 4) == 1
    assert 0.5 < measure_balance(config, Scheme(), 3) < 0.95
    assert 0.2 < measure_balance(build_config(UNTIED), Scheme(LinearScheme()), 5) < 1


def test_more_tokens_sequences_and_threads_need_more_memory() -> None:
    config, scheme = build_config({**UNTIED, "num_hidden_layers": 4}), Scheme(LinearScheme(), ("lm_head",))
    least = Workload(dtype="bfloat16", tokens=16)
    (one,) = plan_ranks(config, scheme, 1, least)
    for changes in ({"tokens": 6400}, {"batch_size": 400}):
        (more,) = plan_ranks(config, scheme, 1, replace(least, **changes))
        assert more.peak_bytes > one.peak_bytes and more.kv_cache_bytes == 400 * one.kv_cache_bytes
        assert (more.weight_bytes, more.file_bytes) == (one.weight_bytes, one.file_bytes)
    large = build_config({**UNTIED, "intermediate_size": 200_000})
    few, many = (plan_ranks(large, scheme, 1, replace(least, num_threads=number, own_kernels=False))[0] for number in (1, 4))
    assert many.peak_bytes > few.peak_bytes


def test_planning_imports_no_pytorch() -> None:
    """It alone would take longer than a whole plan."""
    code = "import sys, launcher.commands.plan; assert 'torch' not in sys.modules, sorted(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_real_models_have_their_known_numbers_of_parameters(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "model_configs"
    if not folder.is_dir():
        pytest.skip("no data/model_configs among the shared data")
    counts = json.loads((folder / "PARAM_COUNTS.json").read_text())
    assert len(counts) > 10
    for name, count in counts.items():
        config = replace(build_config(json.loads((folder / f"{name}.json").read_text())), dtype="float16")
        workload = Workload(dtype="float16", tokens=1)
        (one,) = plan_ranks(config, Scheme(), 1, workload)
        assert one.file_bytes == 2 * count, name
        # On several ranks only norms are read more than once, up to the number of key-value heads.
        ranks = min(8, config.num_key_value_heads)
        norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
        assert sum(rank.file_bytes for rank in plan_ranks(config, Scheme(), ranks, workload)) == 2 * (count + (ranks - 1) * norms), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_threads", [1, 3, 40])
@pytest.mark.parametrize("own_kernels", [True, False])
def test_equal_layers_are_planned_as_if_each_were_planned_alone(
    monkeypatch: pytest.MonkeyPatch, scheme: str, num_threads: int, own_kernels: bool
) -> None:
    config = build_config({**UNTIED, "num_hidden_layers": 60})
    workload = Workload(dtype="bfloat16", tokens=20, num_threads=num_threads, own_kernels=own_kernels)
    # Runs of 1, 17 and 41 layers, and one layer in between whose stored type differs.
    stored = {f"model.layers.{layer}.mlp.up_proj.weight_scale": StoredForm("float32") for layer in (0, 18)}
    together = plan_ranks(config, build_scheme(config, scheme), 3, workload, stored)
    monkeypatch.setattr("model.planning._find_equal_layers", lambda config, *_: [(layer, 1) for layer in range(config.num_hidden_layers)])
    assert plan_ranks(config, build_scheme(config, scheme), 3, workload, stored) == together


def test_ten_thousand_layers_are_planned_as_fast_as_a_few() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    config = build_config({**UNTIED, **sizes, "num_hidden_layers": 10_000})
    scheme = Scheme(LinearScheme(), tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(0, 10_000, 2)))
    for one in (Scheme(), Scheme(LinearScheme()), scheme):
        started = time.thread_time()
        plans = plan_ranks(config, one, 8, Workload(dtype="bfloat16", tokens=100))
        # 0.4 s of processor time on an idle machine, where layer by layer takes 15 s; neighbours slow a processor, too.
        assert time.thread_time() - started < 4
        assert sum(plan.file_bytes for plan in plans) > 10_000 * 8192 * 28672


def test_the_cache_ends_where_its_blocks_do() -> None:
    sizes = {"dtype": "float32", "batch_size": 4, "tokens": 33}
    for block_size, num_blocks, tokens in ((16, None, 192), (64, None, 256), (16, 12, 192), (16, 5, 80), (16, 500, 192)):
        assert Workload(**sizes, block_size=block_size, num_blocks=num_blocks).cached_tokens == tokens


def test_dequantized_blocks_need_memory_for_the_library_but_their_own_bytes_of_the_file() -> None:
    config, workload, name = build_config(UNTIED), Workload(dtype="bfloat16", tokens=8), "model.layers.0.mlp.up_proj.weight"
    plain, packed = (
        plan_ranks(config, Scheme(), 2, workload, {name: form}) for form in (StoredForm("float32"), StoredForm("float32", "Q4_K", 144))
    )
    for one, other in zip(plain, packed, strict=True):
        rows = one.intermediate_rows[1] - one.intermediate_rows[0]
        assert one.file_bytes - other.file_bytes == rows * (4 * config.hidden_size - 144)
        assert one.weight_bytes == other.weight_bytes and one.peak_bytes < other.peak_bytes < one.peak_bytes + 20_000_000

"""All layers in one call: the bits of layers one by one, for any passes, threads and ranks, and a peer that dies within one."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore

from model.decoder.llama import LlamaForCausalLM
from model.kernels.library import find_kernels, kernels_disabled
from model.layers.batch import Span
from model.layers.cache import KeyValueCache
from model.spec.scheme import Scheme, write_scheme
from parallel.shared_memory import SharedMemoryCollectives

PROJECT_ROOT = Path(__file__).resolve().parents[3]
DTYPES = ("float32", "bfloat16", "float16")
WINDOW = 21
FUSED = (
    "nine_heads", "nine_heads-int8", "tied-int8", "llama3_rope-int8", "nine_heads-token", "nine_heads-channel", "nine_heads-window",
)  # fmt: skip
"""Models whose linears are all plain; in the float models of `ALL` that are not here, some unit of rows does not fill a tile."""
ALL = (*FUSED, "tied", "llama3_rope", "stories", "stories-int8")
PROMPTS = ([(7 * i + 3) % 80 for i in range(90)], [5, 60, 7, 33, 2], [(11 * i) % 79 for i in range(37)])
"""The first has more tokens than go through all layers in one call."""
LATER = [[11, 12, 13], [0, 1, 2], [71, 72, 73]]

pytestmark = [
    pytest.mark.skipif(
        find_kernels() is None,
        reason="no kernels: the package was built without them, or this processor has neither AVX2 nor NEON with dot products",
    ),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ranks share memory on x86-64 only"),
]


@pytest.fixture(scope="module")
def folder(
    tiny_llama: Callable[[str], Path],
    quantize: Callable[..., Scheme],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[[str], Path]:
    """Folder of a model of `ALL`."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        base, _, kind = name.partition("-")
        if base == "stories":
            source: Path = request.getfixturevalue("shared_dir") / "data" / "stories260K-hf"
            if not source.is_dir():
                pytest.skip("no data/stories260K-hf among the shared data")
        else:
            source = tiny_llama(base)
        if not kind:
            return source
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            if kind == "int8":
                quantize(source, made[name], "lm_head")
            elif kind == "window":
                write_with_window(source, made[name])
            else:
                write_with_cache(source, made[name], kind)
        return made[name]

    return find


def write_with_window(source: Path, folder: Path) -> None:
    """The weights as a Mistral model with a window over which the first prompt goes far."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
    (folder / "config.json").write_text(json.dumps(config))


def write_with_cache(source: Path, folder: Path, kind: str) -> None:
    """The model with an int8 cache; with stored scales a part of what occurs is cut."""
    shutil.copytree(source, folder)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    config["quantization_config"] = write_scheme(Scheme(kv_cache=kind))
    rows = config["num_key_value_heads"] * config["head_dim"]
    for layer in range(config["num_hidden_layers"] if kind == "channel" else 0):
        for place, scale in enumerate(("k_scale", "v_scale")):
            sizes = 1 + torch.rand(rows, generator=torch.Generator().manual_seed(10 * layer + place))
            tensors[f"model.layers.{layer}.self_attn.{scale}"] = (sizes * 4 / 127).half()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def build_caches(model: LlamaForCausalLM) -> list[KeyValueCache]:
    """Of all prompts, in one store, whose blocks take turns."""
    store, length = model.build_store(24, 16), len(PROMPTS)
    return [KeyValueCache(store, list(range(number, 24, length))[::-1]) for number in range(length)]


def run_pass(model: LlamaForCausalLM, spans: list[Span]) -> torch.Tensor:
    hidden = model(spans)
    return torch.cat((hidden.float(), model.collectives.gather_columns(model.logits_local(hidden), model.shares.vocab)), dim=1)


def compute(model: LlamaForCausalLM, size: int = 1000) -> list[torch.Tensor]:
    """Hidden states and logits of each prompt and the tokens behind it: in steps of `size` tokens, sequences beside each other."""
    ids = [prompt + later for prompt, later in zip(PROMPTS, LATER, strict=True)]
    caches, parts = build_caches(model), [[torch.empty(0, model.config.hidden_size + model.config.vocab_size)] for _ in ids]
    while any(cache.length < len(one) for cache, one in zip(caches, ids, strict=True)):
        spans, numbers = [], []
        for number, (cache, one) in enumerate(zip(caches, ids, strict=True)):
            stop = len(PROMPTS[number]) if cache.length < len(PROMPTS[number]) else cache.length + 1
            if cache.length < len(one):
                spans.append(Span(cache, one[cache.length : min(stop, cache.length + size)]))
                numbers.append(number)
        found = torch.split(run_pass(model, spans), [len(span.ids) for span in spans])
        for number, part in zip(numbers, found, strict=True):
            parts[number].append(part)
    return [torch.cat(some) for some in parts]


def hold_equal(found: list[torch.Tensor], expected: list[torch.Tensor], *note: object) -> None:
    assert len(found) == len(expected) == len(PROMPTS), note
    for a, b in zip(found, expected, strict=True):
        assert b.isfinite().all() and torch.equal(a, b), note


def run_shared(
    build_model: Callable[..., LlamaForCausalLM],
    folder: Path,
    world_size: int,
    work: Callable[[LlamaForCausalLM], Any],
    dtype: str = "float32",
    timeout_seconds: float = 60,
) -> list[Any]:
    """What `work` gives on every rank; ranks are threads with shared memory between them."""
    store = HashStore()

    def run_rank(rank: int) -> Any:
        torch.set_num_threads(1)
        collectives = SharedMemoryCollectives(store, rank, world_size, timeout_seconds)
        try:
            return work(build_model(folder, dtype, collectives))
        finally:
            collectives.close()

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run_rank, range(world_size)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_layers_in_one_call_give_the_bits_of_layers_one_by_one(
    name: str, dtype: str, folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM], keep_torch_threads: None
) -> None:
    apart, together = (build_model(folder(name), dtype) for _ in range(2))
    apart.fuses_layers = False
    torch.set_num_threads(1)
    expected = compute(apart)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hold_equal(compute(together), expected, threads)
    assert apart._fused is None and (together._fused is not None) == together.fuses_layers
    assert together.fuses_layers or name not in FUSED


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_a_prompt_in_one_pass_gives_the_bits_of_token_by_token(
    name: str, dtype: str, folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM], keep_torch_threads: None
) -> None:
    torch.set_num_threads(1)
    model = build_model(folder(name), dtype)
    assert model.batch_invariant
    expected = compute(model)
    for size in (1, 7, 64):
        hold_equal(compute(model, size), expected, size)
    cache = model.build_cache(len(PROMPTS[0]))  # alone, in a store and a block of its own
    assert torch.equal(run_pass(model, [Span(cache, PROMPTS[0])]), expected[0][: len(PROMPTS[0])])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_plain_pytorch_gives_nearly_the_same(
    name: str, dtype: str, folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    found = torch.cat(compute(build_model(folder(name), dtype)))
    with kernels_disabled():
        model = build_model(folder(name), dtype)
        assert not model.batch_invariant
        expected = torch.cat(compute(model))
        assert model._fused is None
    allowed = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    if name in ("nine_heads-token", "nine_heads-channel"):  # a last bit may move a key by a whole step
        allowed = max(allowed, 1e-2)
    assert (found - expected).norm() / expected.norm() < allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FUSED, "stories-int8"])
def test_ranks_with_shared_memory_give_the_bits_of_one(
    name: str, dtype: str, folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    def work(model: LlamaForCausalLM) -> list[torch.Tensor]:
        found = compute(model)
        assert model._fused is not None
        return found

    expected = work(build_model(folder(name), dtype))
    for world_size in (2, 3):
        for found in run_shared(build_model, folder(name), world_size, work, dtype):
            hold_equal(found, expected, world_size)


def test_a_window_gives_what_transformers_gives(folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> None:
    model = build_model(folder("nine_heads-window"))
    reference = transformers.MistralForCausalLM.from_pretrained(folder("nine_heads-window"))
    vocab = model.config.vocab_size
    for found, prompt, later in zip(compute(model, 64), PROMPTS, LATER, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt + later])).logits[0]
        torch.testing.assert_close(found[:, -vocab:], expected, rtol=2e-4, atol=2e-4)
    assert model._fused is not None and model.plain_features == ()


def test_rows_that_do_not_fit_a_slot_go_in_several_rounds(
    folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel.shared_memory._SLOT_BYTES", 2048)
    expected = compute(build_model(folder("nine_heads")))
    for found in run_shared(build_model, folder("nine_heads"), 3, compute):
        hold_equal(found, expected)


def test_fused_and_other_passes_and_ranks_may_take_turns(
    folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    """Each goes on with the numbers of gathers where the other stopped."""

    def work(model: LlamaForCausalLM) -> torch.Tensor:
        caches, found = build_caches(model), []
        for step in range(9):
            model.fuses_layers = (step + (model.shares.rank if step > 4 else 0)) % 2 == 0  # in the end, not all ranks alike
            found.append(run_pass(model, [Span(cache, [5 * step, 7]) for cache in caches[: 1 + step % 3]]))
        return torch.cat(found)

    expected = work(build_model(folder("nine_heads-int8")))
    for world_size in (2, 3):
        for found in run_shared(build_model, folder("nine_heads-int8"), world_size, work):
            assert torch.equal(found, expected)


DYING = """
import os, sys, time
from pathlib import Path
import torch
from torch.distributed import FileStore
from model.layers.batch import Span
from model.checkpoint.formats import open_checkpoint
from model.spec.config import build_config
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.spec.scheme import read_scheme
from parallel.errors import PeerError
from parallel.shared_memory import SharedMemoryCollectives

path, folder, end, count, rank = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), 0
for other in (1, 2):
    if os.fork() == 0:
        rank = other
        break
torch.set_num_threads(1)
collectives = SharedMemoryCollectives(FileStore(path, 3), rank, 3, 2 if end == "stops" else 30)
source = open_checkpoint(folder)
model = LlamaForCausalLM(build_config(source.config), read_scheme(source.config), collectives, dtype="float32", device=torch.device("cpu"))
load_model(model, source)
cache = model.build_cache(200)
model([Span(cache, [1, 2, 3])])
assert model._fused is not None
run = model._fused._run

def leave(layers, first, number, one, ranks):  # behind the gathers of the first layer
    assert run(layers, first, 1, one, ranks) == 0
    begun = time.monotonic()  # however slow the machine is, a rank that stops is still there when the others give up
    while end == "stops" and len(list(Path(path).parent.glob("*-told"))) < 2 and time.monotonic() - begun < 50:
        time.sleep(0.05)
    os._exit(0)

if rank == 1:
    model._fused._run = leave
started = time.monotonic()
try:
    model([Span(cache, [5] * count)])
except PeerError as error:
    waited = time.monotonic() - started
    os.write(1, f"{rank} {error.peer} {error.died} {waited < 30} {error}\\n".encode())
    Path(f"{path}-{rank}-told").touch()
"""


@pytest.mark.parametrize("tokens", [2, 100], ids=["all layers in a call", "a layer in a call"])
@pytest.mark.parametrize("end", ["dies", "stops"])
def test_a_peer_that_is_lost_within_a_pass_is_named(end: str, tokens: int, folder: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING, str(tmp_path / "store"), str(folder("nine_heads-int8")), end, str(tokens)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    words = {"dies": "rank 1 died while rank {} waited for it in gather_columns",
             "stops": "rank 1 did not reach gather_columns within 2 s of rank {}; a longer --timeout allows slower ranks"}[end]  # fmt: skip
    assert sorted(done.stdout.splitlines()) == [f"{rank} 1 {end == 'dies'} True {words.format(rank)}" for rank in (0, 2)]

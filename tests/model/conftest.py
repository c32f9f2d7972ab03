"""Tiny random Llama checkpoints, and ranks that run as threads of one process."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.backends.interface import Backend
from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.export.quantized_folder import write_quantized
from model.quantization.calibration import quantize_layers
from model.quantization.recipe import Recipe
from model.quantization.work_folder import WorkFolder
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, read_scheme
from parallel.collectives import Collectives, IdentityCollectives
from tests.model.interpreted_kernels import build_interpreted_backend

_SIZES: dict[str, dict[str, Any]] = {
    "nine_heads": {
        "hidden_size": 144,
        "intermediate_size": 208,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "vocab_size": 97,
        "tie_word_embeddings": False,
    },
    "tied": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 130,
        "tie_word_embeddings": True,
    },
    "llama3_rope": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 80,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


@pytest.fixture(scope="session", autouse=True)
def share_cores() -> None:
    """Tests that run beside others have their part of the cores: threads that wait for one another would take the rest."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products this small take ten times as long on two threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The Triton backend for CPU tensors, in the interpreter."""
    return build_interpreted_backend(monkeypatch)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random float32 checkpoint, written by transformers: "nine_heads", "tied" or "llama3_rope"."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            torch.manual_seed(3)
            config = transformers.LlamaConfig(
                num_hidden_layers=2, max_position_embeddings=1200, rms_norm_eps=1e-5, initializer_range=0.12, **_SIZES[name]
            )
            model = transformers.LlamaForCausalLM(config)
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return build


@pytest.fixture(scope="session")
def build_model() -> Callable[..., LlamaForCausalLM]:
    """A function that loads one rank's model: (folder, dtype, collectives, threads)."""
    return _build_model


@pytest.fixture(scope="session")
def quantize() -> Callable[..., Scheme]:
    """A function that writes a checkpoint with int8 linears, round to nearest: (folder, target, words of linears that stay float)."""

    def run(folder: Path, target: Path, *words: str, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Scheme:
        source, recipe = open_checkpoint(folder), Recipe(approach="rtn-a16w8", linear=LinearScheme(), not_converted=words)
        config, work = build_config(source.config), WorkFolder(target.with_name(f".{target.name}.quantizing"), 1)
        scheme = recipe.build_scheme(config)
        work.open({})
        device = torch.device("cpu")
        quantize_layers(
            source,
            config,
            recipe,
            (),
            IdentityCollectives(),
            work,
            dtype="float32",
            device=device,
            num_threads=1,
            on_progress=lambda done, total: None,
        )
        write_quantized(source, config, scheme, work, target, {}, on_progress)
        work.remove()
        return scheme

    return run


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """A function that runs `work(model)` on every rank at once, a thread each, and gives the ranks' results."""

    def run(
        folder: Path, world_size: int, work: Callable[[LlamaForCausalLM], Any], *, dtype: str = "float32", num_threads: int = 1
    ) -> list[Any]:
        meeting = _Meeting(world_size)
        models = [_build_model(folder, dtype, _ThreadCollectives(meeting, rank), num_threads) for rank in range(world_size)]

        def run_rank(model: LlamaForCausalLM) -> Any:
            torch.set_num_threads(num_threads)
            try:
                return work(model)
            except BaseException:
                meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(run_rank, models))

    return run


@pytest.fixture(scope="session")
def gather_ranks() -> Callable[..., list[Any]]:
    """A function that runs `work(collectives)` on `world_size` ranks at once, and gives the ranks' results."""

    def run(world_size: int, work: Callable[[Collectives], Any]) -> list[Any]:
        meeting = _Meeting(world_size)

        def run_rank(rank: int) -> Any:
            try:
                return work(_ThreadCollectives(meeting, rank))
            except BaseException:
                meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(run_rank, range(world_size)))

    return run


@pytest.fixture
def keep_torch_threads() -> Iterator[None]:
    """Puts PyTorch's number of threads back after the test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _build_model(folder: Path, dtype: str = "float32", collectives: Collectives | None = None, num_threads: int = 1) -> LlamaForCausalLM:
    source = open_checkpoint(folder)
    model = LlamaForCausalLM(
        build_config(source.config),
        read_scheme(source.config),
        collectives or IdentityCollectives(),
        dtype=dtype,
        device=torch.device("cpu"),
        num_threads=num_threads,
    )
    load_model(model, source)
    return model


class _Meeting:
    """Where the threads meet."""

    def __init__(self, world_size: int) -> None:
        self.parts: list[torch.Tensor] = [torch.empty(0)] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)


class _ThreadCollectives:
    """Collectives of threads: plain references and torch.cat."""

    name = "threads"

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting, self.rank, self.world_size = meeting, rank, len(meeting.parts)

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        assert local.shape[1] == sizes[self.rank] and len(sizes) == self.world_size
        self._meeting.parts[self.rank] = local
        self._meeting.barrier.wait()
        joined = torch.cat(self._meeting.parts, dim=1)
        self._meeting.barrier.wait()
        return joined

    def barrier(self) -> None:
        self._meeting.barrier.wait()

    def close(self) -> None:
        pass

"""How many operations a decoding step of a large model starts on its device, counted on tensors without memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.backends.interface import Backend
from model.decoder import llama
from model.decoder.llama import DecoderLayer, LlamaForCausalLM
from model.layers.linear import ColumnParallelLinear
from model.layers.norm import RMSNorm
from model.layers.quantized_linear import QuantizedColumnParallelLinear, StoredLinear
from model.layers.step_batch import StepBatch, count_integers
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme

CPU = torch.device("cpu")
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "num_hidden_layers": 80, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
}  # fmt: skip
VIEWS = (
    "view",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "alias",
    "detach",
    "as_strided",
    "split",
    "t.",
)
ALLOCATIONS = ("empty", "new_empty")


class CountingGathers:
    """Gathers of a rank without peers; each is one operation on the device, or none if the rank is alone."""

    name = "counting"

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size, self.count = 0, world_size, 0

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self.count += 1
        return local.new_empty((local.shape[0], sum(sizes)))

    def barrier(self) -> None:
        pass

    def beat(self) -> None:
        pass

    def close(self) -> None:
        pass


class Counter(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").lstrip("_")
        if not name.startswith((*VIEWS, *ALLOCATIONS, "prim::")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def fill(model: LlamaForCausalLM) -> None:
    """Give every layer weights."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedColumnParallelLinear):
            rows = sum(block.num_rows for block in module.blocks)
            weight = torch.empty((rows, module.in_features), dtype=torch.int8)
            module.assign(StoredLinear(weight=weight, scale=torch.empty((rows, 1))), CPU)
        elif isinstance(module, ColumnParallelLinear):
            module.assign(torch.empty((sum(block.num_rows for block in module.blocks), module.in_features), dtype=torch.bfloat16), CPU)
        elif isinstance(module, RMSNorm):
            module.assign(torch.empty(module.weight.shape, dtype=torch.bfloat16), CPU)


@pytest.mark.parametrize(("world_size", "limit"), [(1, 1000), (8, 1700)])
def test_a_step_of_a_70b_model_starts_few_operations(
    world_size: int, limit: int, triton_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    launches: list[str] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **options: launches.append(self.fn.__name__))
    monkeypatch.setattr(llama, "find_backend", lambda device_type: triton_backend)
    config, gathers = build_config(LLAMA_70B), CountingGathers(world_size)
    scheme = Scheme(linear=LinearScheme(), ignore=("lm_head",))
    model = LlamaForCausalLM(config, scheme, gathers, dtype="bfloat16", device=CPU)
    blocks = 256
    with torch.inference_mode(), FakeTensorMode():
        fill(model)
        assert isinstance(model.layers[0], DecoderLayer) and sum(layer.qkv_proj is not None for layer in model.layers) == 80
        store = model.build_store(blocks, 16)
        batch = StepBatch(torch.empty(count_integers(1, blocks, 128, 1), dtype=torch.int32), 1, blocks, store, 128, 1)
        with Counter() as counter:
            logits = model.logits_local(model._run_step(batch))
            found = triton_backend.find_largest(logits, 1)
        assert found[1].shape == (1, 1)
    assert launches.count("int8_product") == 4 * 80 and gathers.count == (4 * 80 + 1 if world_size > 1 else 4 * 80)
    assert len(launches) + len(counter.names) + (gathers.count if world_size > 1 else 0) < limit

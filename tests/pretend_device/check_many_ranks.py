"""Run with the pretend device on PYTHONPATH: three of 64 ranks of Llama-2-70B, in shapes only.

PyTorch's fake tensors have a shape, a dtype and a device but no memory, and its fake process group only checks shapes.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import model.backends.upload
import model.decoder.loading
import parallel.device_collectives
from model.checkpoint.random_source import RandomSource
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import ModelLoader
from model.layers.batch import Span
from model.planning import Workload, plan_ranks
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, declare_scheme
from parallel.collectives import IdentityCollectives
from parallel.device_collectives import DeviceCollectives

WORLD_SIZE = 64
NUM_LAYERS = 2  # of 80 equal ones
DEVICE = torch.device("npu", 0)
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


class Host(IdentityCollectives):
    """What a rank would have for tensors in host memory."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world_size = rank, WORLD_SIZE  # type: ignore[misc]


def check(rank: int, scheme: Scheme) -> int:
    """Load and run the model of a rank; returns the bytes of its weights."""
    config = build_config(LLAMA_70B)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
    try:
        with FakeTensorMode():
            collectives = DeviceCollectives(Host(rank), FakeStore(), "fake", DEVICE, 1.0)
            decoder = LlamaForCausalLM(config, scheme, collectives, dtype="bfloat16", device=DEVICE)
            loader = ModelLoader(decoder, RandomSource(declare_scheme(LLAMA_70B, scheme), Path("config.json")))  # without threads
            loader.load_embedding()
            for index in range(NUM_LAYERS):
                loader.load_layer(index)
            loader.load_head()
            loader.finish()
            cache = decoder.build_cache(16)
            hidden = decoder([Span(cache, range(5))])
            logits = decoder.logits_local(hidden[-1:])
            whole = collectives.gather_columns(logits, decoder.shares.vocab)
    finally:
        dist.destroy_process_group()
    assert loader.done_bytes == loader.total_bytes
    assert (hidden.shape, hidden.dtype, hidden.device) == ((5, 8192), torch.bfloat16, DEVICE)
    assert logits.dtype == torch.float32 and logits.shape[1] == decoder.shares.vocab[rank]
    assert (whole.shape, whole.device) == ((1, 32000), DEVICE)
    assert cache.store.data.shape[3] == 1, "eight ranks hold the same KV head"
    return decoder.weight_bytes


# What has no shape: memory pages, pinned memory, connections between processes, a wait for the device.
model.decoder.loading.ask_for_huge_pages = lambda tensor: None
model.backends.upload._open = lambda device: SimpleNamespace(copy=lambda tensor: tensor.to(device))  # type: ignore[assignment, return-value]
parallel.device_collectives.PeerLines = lambda *arguments: SimpleNamespace(close=lambda: None)  # type: ignore[assignment, misc]
DeviceCollectives._wait = lambda self, device: None  # type: ignore[assignment, method-assign]

for some_scheme in (Scheme(), Scheme(LinearScheme(packed=False), ignore=("lm_head",))):
    plans = plan_ranks(build_config(LLAMA_70B), some_scheme, WORLD_SIZE, Workload(dtype="bfloat16", tokens=16, own_kernels=False))
    for each in (0, 37, WORLD_SIZE - 1):
        assert check(each, some_scheme) == plans[each].weight_bytes

"""How many KV cache blocks fit next to the weights of the 70B on devices of several sizes."""

import pytest

from launcher.job.device_memory import fit_ranks, parse_bytes
from model.planning import Workload, plan_ranks
from model.spec.config import build_config
from model.spec.scheme import Scheme
from parallel.errors import ConfigError

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("world_size", "kv_heads"), [(1, 8), (2, 4), (8, 1), (64, 1)])
def test_what_the_weights_leave_is_divided_into_blocks(world_size: int, kv_heads: int, batch_size: int) -> None:
    workload = Workload(dtype="bfloat16", tokens=4096, batch_size=batch_size)
    plans = plan_ranks(build_config(LLAMA_70B), Scheme(), world_size, workload)
    block_bytes = 16 * 80 * 2 * kv_heads * 128 * 2  # tokens, layers, keys and values, heads, their width, bytes
    for budget in (3 * 10**9, 80 * 10**9, 200 * 10**9):
        fit = fit_ranks(plans, workload.cached_tokens, workload.block_size, budget)
        assert fit.block_bytes == block_bytes
        for plan in plans:
            needed = plan.weight_bytes + plan.activation_bytes
            assert needed + fit.num_blocks * block_bytes <= budget
        assert fit.needed_bytes + (fit.num_blocks + 1) * block_bytes > budget
    assert fit_ranks(plans, workload.cached_tokens, workload.block_size, 2 * 10**9).num_blocks < 1, "no weights of a rank fit"


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("64GiB", 64 << 30), ("1.5 tb", 1_500_000_000_000), ("512m", 512_000_000), ("123456", 123456), ("8Ki", 8192)],
)
def test_a_size_has_the_units_that_people_write(text: str, size: int) -> None:
    assert parse_bytes("--device-memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "80 XB", "1e9", "0.1", "80GB 2"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--device-memory is "):
        parse_bytes("--device-memory", text)

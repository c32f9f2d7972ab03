"""The checks of `device_check.py` on whole models: goldens through the command, a killed rank, graphs, speed beside transformers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from device_check_kernels import DEVICE, clock
from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.layers.cache import KeyValueCache
from model.layers.linear import ColumnParallelLinear, VocabParallelEmbedding
from model.layers.norm import RMSNorm
from model.layers.quantized_linear import QuantizedColumnParallelLinear, StoredLinear
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme
from parallel.collectives import IdentityCollectives

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}
"""hidden_size, intermediate_size, layers, heads of Llama 2."""
CONTEXT = 1024
"""Tokens before the first decoded one."""
PROMPT = "Once upon a time there was a little girl who"


def find_models() -> dict[str, Path]:
    """Return the small trained models that are here: stories260K among the shared data, SmolLM2 where scripts/demo.sh has put it."""
    shared = Path(os.environ.get("TANDEM_SHARED") or PROJECT_ROOT.parent / "shared")
    folders = {"stories260K": shared / "data" / "stories260K-hf", "SmolLM2 int8": PROJECT_ROOT / "output" / "demo" / "smollm2-135m-rtn"}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def predict(folder: Path, device: str, ranks: int, tokens: int, while_running: Callable[[int], None] = lambda pid: None) -> list[Any]:
    """Run `tandem predict`, all ranks on one device, and return what it writes. `while_running` gets its process id."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "out.jsonl"
        words = ["predict", str(folder), "--device", device, "-n", str(ranks), "--prompt", PROMPT, "--greedy", "--dtype", "bfloat16"]
        words += ["--max-new-tokens", str(tokens), "--ignore-eos", "--output", str(output)]
        words += ["--ranks-per-device", str(ranks)] if ranks > 1 and device != "cpu" else []
        run = subprocess.Popen(
            [sys.executable, "-m", "launcher", *words], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            while_running(run.pid)
            said, _ = run.communicate(timeout=120)
        finally:
            run.kill()
        if run.returncode:
            raise RuntimeError(said.decode(errors="replace").strip()[-400:])
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def find_texts(results: list[Any]) -> list[Any]:
    """Return the texts of results, without what is measured."""
    return [one.get("text", one.get("output")) if isinstance(one, dict) else one for one in results]


def goldens() -> dict[str, Any]:
    """Greedy text on one rank, on four ranks that share the GPU, and on the CPU."""
    found: dict[str, Any] = {}
    for name, folder in find_models().items():
        one, four, cpu = (find_texts(predict(folder, *where, 64)) for where in (("cuda", 1), ("cuda", 4), ("cpu", 1)))
        found[name] = {"4 ranks as 1": one == four, "as the CPU": one == cpu}
    return found or {"skipped": "no trained model is here: see find_models"}


def recovery() -> dict[str, Any]:
    """Kill one of two ranks while it decodes: the text is that of an undisturbed run."""
    folder = next(iter(find_models().values()), None)
    if folder is None:
        return {"skipped": "no trained model is here: see find_models"}
    killed: list[int] = []

    def kill_rank(parent: int) -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            time.sleep(0.2)
            killed.extend(pid for pid in list_descendants(parent) if read_name(pid) == "tandem rank 1")
        time.sleep(4)  # until it decodes
        os.kill(killed[0], signal.SIGKILL)

    expected = find_texts(predict(folder, "cuda", 2, 400))
    return {"same text after a kill": find_texts(predict(folder, "cuda", 2, 400, kill_rank)) == expected}


def list_descendants(parent: int) -> list[int]:
    """List the processes below one."""
    found = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in map(int, task.read_text().split()):
            found += [pid, *list_descendants(pid)]
    return found


def read_name(pid: int) -> str:
    """Return the name of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def build(size: str, scheme: Scheme) -> LlamaForCausalLM:
    """Build a model with random weights on the GPU."""
    hidden, inner, layers, heads = SIZES[size]
    config = build_config(
        {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 32000,
         "num_attention_heads": heads, "num_key_value_heads": heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    )  # fmt: skip
    model = LlamaForCausalLM(config, scheme, IdentityCollectives(), dtype="bfloat16", device=DEVICE)
    torch.manual_seed(0)
    for module in list(model.modules()):
        if isinstance(module, QuantizedColumnParallelLinear):
            shape = sum(block.num_rows for block in module.blocks), module.in_features
            weight = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
            module.assign(StoredLinear(weight=weight, scale=torch.full((shape[0], 1), 2e-4, device=DEVICE)), DEVICE)
        elif isinstance(module, ColumnParallelLinear):
            shape = sum(block.num_rows for block in module.blocks), module.in_features
            module.assign(torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) * 0.02, DEVICE)
        elif isinstance(module, RMSNorm):
            module.assign(torch.ones(module.weight.shape, device=DEVICE), DEVICE)
    assert isinstance(model.embed_tokens, VocabParallelEmbedding)
    return model


def decode(model: LlamaForCausalLM, *, graphs: bool) -> tuple[float, torch.Tensor]:
    """Return seconds per decoded token behind CONTEXT tokens, with or without graphs, and the logits of the last."""
    blocks = CONTEXT // 16 + 16
    cache = KeyValueCache(model.build_store(blocks, 16), list(range(blocks)))
    recorder = model.backend.recorder
    model.backend.recorder = recorder if graphs else None
    try:
        model([Span(cache, [(7 * place) % 32000 for place in range(CONTEXT)])])
        logits = torch.empty(0)

        def step() -> None:
            nonlocal logits
            cache.length = CONTEXT
            logits = model.logits_local(model([Span(cache, [11])]))
            model.backend.find_largest(logits, 1)[1].tolist()

        seconds = clock(step, 30)
        return seconds, logits.clone()
    finally:
        model.backend.recorder = recorder


def speed(size: str, scheme: Scheme) -> dict[str, Any]:
    """Decoded tokens a second by graph and eager, whether their bits agree, and the share of a copy's bandwidth."""
    from device_check_kernels import measure_copy

    model = build(size, scheme)
    (eager, plain), (replayed, recorded) = (decode(model, graphs=graphs) for graphs in (False, True))
    share = model.weight_bytes / replayed / measure_copy()
    return {"graph tokens/s": 1 / replayed, "eager tokens/s": 1 / eager, "same bits": torch.equal(plain, recorded), "of bandwidth": share}


def speed_of_transformers(size: str, *, compiled: bool) -> dict[str, Any]:
    """Decoded tokens a second of transformers in bfloat16, with a static cache, as it is or compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    hidden, inner, layers, heads = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device(DEVICE), torch.inference_mode():
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        cache = StaticCache(config=config, max_cache_len=CONTEXT + 64)
        ids = torch.arange(CONTEXT)[None] * 7 % 32000
        model(ids, past_key_values=cache, cache_position=torch.arange(CONTEXT), use_cache=True, logits_to_keep=1)
        run = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
        token, place = torch.tensor([[11]]), torch.tensor([CONTEXT])
        seconds = clock(lambda: run(token, past_key_values=cache, cache_position=place, use_cache=True).logits[:, -1].argmax().item(), 30)
    return {"tokens/s": 1 / seconds}


INT8, FLOAT = Scheme(linear=LinearScheme(), ignore=("lm_head",)), Scheme()
MODEL_CHECKS = {
    "goldens": goldens,
    "recovery": recovery,
    "7B int8": lambda: speed("7B", INT8),
    "7B bf16": lambda: speed("7B", FLOAT),
    "7B transformers": lambda: speed_of_transformers("7B", compiled=False),
    "7B transformers, compiled": lambda: speed_of_transformers("7B", compiled=True),
    "13B int8": lambda: speed("13B", INT8),
    "13B bf16": lambda: speed("13B", FLOAT),
    "13B transformers": lambda: speed_of_transformers("13B", compiled=False),
}
"""By the name in the table."""

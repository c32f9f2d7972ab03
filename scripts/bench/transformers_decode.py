"""Prefill and decode speed of transformers on this machine: forward passes with its cache, greedy, as its generate does them.

    python scripts/bench/transformers_decode.py FOLDER_OR_CONFIG.json [--threads 2] [--batch-size 1,8]
    torchrun --nproc-per-node 2 scripts/bench/transformers_decode.py FOLDER_OR_CONFIG.json --tp-plan

A config.json means random weights in its shape. With --tp-plan every rank loads its part with tp_plan="auto", which goes through
files, so random weights are written first. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def load(model: Path, dtype: torch.dtype, layers: int | None) -> Any:
    """A model in this process, of random weights when `model` is a file."""
    if model.is_dir():
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_parallel(model: Path, dtype: torch.dtype, layers: int | None) -> Any:
    """This rank's part of a model."""
    dist.init_process_group("gloo")
    if model.is_dir():
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, tp_plan="auto")
    names = [tempfile.mkdtemp(prefix="bench-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    folder = Path(str(names[0]))
    try:
        if dist.get_rank() == 0:
            load(model, dtype, layers).save_pretrained(folder)
        dist.barrier()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto")
        dist.barrier()
        return loaded
    finally:
        if dist.get_rank() == 0:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


@torch.inference_mode()
def measure(
    model: Any, prompt_tokens: int, decode_prompt_tokens: int, new_tokens: int, batch_sizes: list[int]
) -> tuple[float, dict[int, float]]:
    """Tokens a second of a prompt, and of decoding behind a prompt of its own by batch size."""
    prompt = torch.randint(3, model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    model(prompt[:, :2], use_cache=True, logits_to_keep=1)  # the first pass sets things up
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    prefill, decode = prompt_tokens / (time.perf_counter() - started), {}
    for size in batch_sizes:
        output = model(prompt[:, :decode_prompt_tokens], use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(size)
        ids = output.logits[:, -1:].argmax(-1).repeat(size, 1)
        started = time.perf_counter()
        for _ in range(new_tokens):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        decode[size] = size * new_tokens / (time.perf_counter() - started)
    return prefill, decode


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch-size", default="1", help="one, or several with commas")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tp-plan", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = (load_parallel if options.tp_plan else load)(options.model, dtype, options.layers).eval()
    sizes = [int(size) for size in options.batch_size.split(",")]
    prefill, decode = measure(model, options.prompt_tokens, options.decode_prompt_tokens, options.new_tokens, sizes)
    if int(os.environ.get("RANK", "0")) == 0:
        answer = {"version": transformers.__version__, "ranks": int(os.environ.get("WORLD_SIZE", "1")), "dtype": options.dtype}
        print(json.dumps({**answer, "prefill_tokens_per_second": prefill, "decode": decode}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

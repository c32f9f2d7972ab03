"""Prefill and decode speed of OpenVINO GenAI on this machine, with its own pipeline and its own measure of time.

    python -m venv openvino && openvino/bin/pip install openvino-genai
    python scripts/bench/random_gguf.py scripts/bench/shapes/tinyllama_1.1b.json tinyllama.gguf --vocabulary
    openvino/bin/python scripts/bench/openvino_decode.py tinyllama.gguf [--threads 2] [--batch-size 1,8]

Runs in the environment of OpenVINO and needs nothing of this project. MODEL is a GGUF file (Q8_0 stays int8 in groups of 32) or a folder in
OpenVINO's format. Random ids; 8-bit activations, which are OpenVINO's default on CPUs. The time to the first token gives the prefill, the
rest of a generation the decoding. The last line is one JSON object.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai


def generate(pipeline: Any, prompt_tokens: int, new_tokens: int, batch_size: int) -> Any:
    """Decode random prompts greedily; returns OpenVINO's measurements."""
    choose = random.Random(prompt_tokens)
    ids = np.array([[choose.randrange(3, 1000) for _ in range(prompt_tokens)] for _ in range(batch_size)], dtype=np.int64)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = new_tokens, True
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    result = pipeline.generate(inputs, config)
    lengths = {len(row) for row in result.tokens}
    if lengths != {new_tokens}:
        raise SystemExit(f"OpenVINO GenAI made {sorted(lengths)} tokens in place of {new_tokens}")
    return result.perf_metrics


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", default="1", help="one, or several with commas")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    pipeline = openvino_genai.LLMPipeline(str(options.model), "CPU", INFERENCE_NUM_THREADS=options.threads)
    generate(pipeline, 2, 2, 1)  # the first pass sets things up
    prefill = options.prompt_tokens / (generate(pipeline, options.prompt_tokens, 1, 1).get_ttft().mean / 1e3)
    decode = {}
    for size in map(int, options.batch_size.split(",")):
        metrics = generate(pipeline, options.decode_prompt_tokens, options.new_tokens + 1, size)
        decode[size] = size * options.new_tokens / ((metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1e3)
    answer = {"version": openvino_genai.__version__, "ranks": 1, "dtype": "int8"}
    print(json.dumps({**answer, "prefill_tokens_per_second": prefill, "decode": decode}))


if __name__ == "__main__":
    main()

"""Prefill and decode speed of the prebuilt llama.cpp of npm's @node-llama-cpp/linux-x64, with the CPU library that is asked for.

    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz
    python scripts/bench/llama_library.py package model.gguf --cpu zen4 [--threads 2] [--batch-size 1,8]

Forward passes as llama-bench does them: random ids, no sampling, flash attention and cache type as the library sets them; the sequences of
a batch decode together. The last line is one JSON object. The package has no header, so the few functions are called as llama.h of that
release declares them; what the library then says of its context is checked against what was asked for.
"""

import argparse
import ctypes
import json
import random
import time
from pathlib import Path
from typing import Any

_PARAMETER_BYTES = 1024
"""More than llama.cpp's structures of parameters have. They are passed by value as last arguments, so what follows them is not read."""
_CONTEXT_NUMBERS = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")
"""The first fields of llama_context_params, 32 bits each."""


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _PARAMETER_BYTES),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def find_library(package: Path, cpu: str) -> tuple[Path, Path, Path]:
    """Return the paths of libggml, the CPU library and libllama. Raises SystemExit if the package lacks one."""
    folder = package / "bins" / "linux-x64"
    found = []
    for pattern in ("libggml.v*.so", f"libggml-cpu-{cpu}.so", "libllama.v*.so"):
        paths = sorted(folder.glob(pattern))
        if not paths:
            names = sorted(path.stem.removeprefix("libggml-cpu-") for path in folder.glob("libggml-cpu-*.so"))
            raise SystemExit(f"{folder} has no {pattern}; CPU libraries: {', '.join(names) or 'none'}")
        found.append(paths[-1])
    return found[0], found[1], found[2]


class Llama:
    """A loaded model and its context."""

    def __init__(self, package: Path, cpu: str, gguf: Path, threads: int, context: int, batch: int, sequences: int) -> None:
        ggml_path, cpu_path, llama_path = find_library(package, cpu)
        ggml = ctypes.CDLL(str(ggml_path), mode=ctypes.RTLD_GLOBAL)
        ggml.ggml_backend_load.restype, ggml.ggml_backend_load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        if not ggml.ggml_backend_load(str(cpu_path).encode()):
            raise SystemExit(f"{cpu_path.name} does not run on this processor")
        self._library = library = ctypes.CDLL(str(llama_path))
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Parameters
        library.llama_model_load_from_file.restype = library.llama_init_from_model.restype = ctypes.c_void_p
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
        library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Parameters]
        library.llama_batch_init.restype, library.llama_batch_init.argtypes = _Batch, [ctypes.c_int32] * 3
        library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
        library.llama_get_memory.restype, library.llama_get_memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        library.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
        library.llama_synchronize.argtypes = [ctypes.c_void_p]
        library.llama_print_system_info.restype = ctypes.c_char_p
        library.llama_backend_init()
        model = library.llama_model_load_from_file(str(gguf).encode(), library.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        parameters = library.llama_context_default_params()
        numbers = ctypes.cast(ctypes.byref(parameters), ctypes.POINTER(ctypes.c_uint32))
        wanted = dict(zip(_CONTEXT_NUMBERS, (context, batch, min(batch, 512), sequences), strict=True))
        for index, value in enumerate(wanted.values()):
            numbers[index] = value
        self._context = library.llama_init_from_model(model, parameters)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        for name, value in wanted.items():
            getter = getattr(library, f"llama_{name}")
            getter.argtypes, getter.restype = [ctypes.c_void_p], ctypes.c_uint32
            if getter(self._context) < value:
                raise SystemExit(f"llama.cpp has {name} {getter(self._context)} in place of {value}: another layout of its parameters")
        library.llama_set_n_threads(self._context, threads, threads)
        self._batch = library.llama_batch_init(batch, 0, 1)

    def describe(self) -> str:
        """Features of the CPU library, as it says."""
        return str(self._library.llama_print_system_info().decode()).strip()

    def clear(self) -> None:
        """Forget all sequences."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def decode(self, tokens: list[tuple[int, int, int]], logits: set[int]) -> None:
        """Run tokens (id, position, sequence) as one batch; logits for those at the indices `logits`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index in logits
        failed = self._library.llama_decode(self._context, batch)
        if failed:
            raise SystemExit(f"llama_decode returned {failed}")
        self._library.llama_synchronize(self._context)


def measure(llama: Llama, prompt_tokens: int, short_tokens: int, new_tokens: int, batch_sizes: list[int]) -> dict[str, Any]:
    """Tokens per second of a prompt, and of decoding after a short one by batch size."""
    choose = random.Random(0)

    def prompt(count: int, sequence: int) -> list[tuple[int, int, int]]:
        return [(choose.randrange(3, 1000), position, sequence) for position in range(count)]

    llama.decode(prompt(2, 0), {1})  # the first pass sets things up
    llama.clear()
    tokens = prompt(prompt_tokens, 0)
    started = time.perf_counter()
    llama.decode(tokens, {prompt_tokens - 1})
    prefill, decode = prompt_tokens / (time.perf_counter() - started), {}
    for size in batch_sizes:
        llama.clear()
        for sequence in range(size):
            llama.decode(prompt(short_tokens, sequence), {short_tokens - 1})
        steps = [[(choose.randrange(3, 1000), short_tokens + step, sequence) for sequence in range(size)] for step in range(new_tokens + 1)]
        llama.decode(steps[0], set(range(size)))
        started = time.perf_counter()
        for step in steps[1:]:
            llama.decode(step, set(range(size)))
        decode[size] = size * new_tokens / (time.perf_counter() - started)
    return {"prefill_tokens_per_second": prefill, "decode": decode}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--cpu", default="zen4", help="name of the CPU library: zen4, haswell (AVX2), …")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", default="1", help="one, or several with commas")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    sizes = [int(size) for size in options.batch_size.split(",")]
    longest = options.decode_prompt_tokens + options.new_tokens + 1
    context = max(options.prompt_tokens, max(sizes) * longest)
    batch = max(options.prompt_tokens, options.decode_prompt_tokens, *sizes)
    llama = Llama(options.package, options.cpu, options.gguf, options.threads, context, batch, max(sizes))
    answer = measure(llama, options.prompt_tokens, options.decode_prompt_tokens, options.new_tokens, sizes)
    version = next((options.package / "bins" / "linux-x64").glob("libllama.v*.so")).name.removeprefix("libllama.").removesuffix(".so")
    print(json.dumps({"version": version, "ranks": 1, "dtype": options.cpu, "system": llama.describe(), **answer}))


if __name__ == "__main__":
    main()

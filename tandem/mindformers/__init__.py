"""The names that MindFormers' example script imports from mindformers and mindspore: it runs here after changing its import lines.

    import tandem.mindformers as ms
    from tandem.mindformers import AutoModel, LlamaTokenizer, MindFormerConfig, Model, Tensor, build_context, build_parallel_config
    from tandem.mindformers import initializer as init
    from tandem.mindformers import logger, transform_and_load_checkpoint

Each process is one rank of msrun, torchrun, srun, mpirun or `tandem run`, or the only one. Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.mindformers import initializer
    from tandem.mindformers.config import LlamaConfig, MindFormerConfig
    from tandem.mindformers.context import build_context, build_parallel_config
    from tandem.mindformers.log import logger
    from tandem.mindformers.network import AutoModel, LlamaForCausalLM, Model, transform_and_load_checkpoint
    from tandem.mindformers.streamers import TextIteratorStreamer, TextStreamer
    from tandem.mindformers.tensor import Tensor, bfloat16, bool_, float16, float32, int8, int32, int64
    from tandem.mindformers.tokenizer import LlamaTokenizer

__all__ = [
    "AutoModel",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaTokenizer",
    "MindFormerConfig",
    "Model",
    "Tensor",
    "TextIteratorStreamer",
    "TextStreamer",
    "bfloat16",
    "bool_",
    "build_context",
    "build_parallel_config",
    "float16",
    "float32",
    "initializer",
    "int8",
    "int32",
    "int64",
    "logger",
    "transform_and_load_checkpoint",
]

_MODULES = {
    "config": ("LlamaConfig", "MindFormerConfig"),
    "context": ("build_context", "build_parallel_config"),
    "log": ("logger",),
    "network": ("AutoModel", "LlamaForCausalLM", "Model", "transform_and_load_checkpoint"),
    "streamers": ("TextIteratorStreamer", "TextStreamer"),
    "tensor": ("Tensor", "bfloat16", "bool_", "float16", "float32", "int8", "int32", "int64"),
    "tokenizer": ("LlamaTokenizer",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "initializer":
        return import_module("tandem.mindformers.initializer")
    if name not in _PLACES:
        raise AttributeError(f"module 'tandem.mindformers' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"tandem.mindformers.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

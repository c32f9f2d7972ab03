"""tandem's Python API: a model on separate ranks (`LLM`), or this program's processes as the ranks (`init`, `AutoModel`).

Light to import: each name is loaded on first use, and only `init` and `AutoModel` need PyTorch in this process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from parallel.errors import InputError, RunError

if TYPE_CHECKING:
    from launcher.supervision.verdict import RanksFailedError
    from model.text.tokenizer import LlamaTokenizer
    from tandem.auto_model import AutoModel
    from tandem.llm import LLM
    from tandem.lora import LoRARequest
    from tandem.outputs import CompletionOutput, Logprob, RequestOutput, StreamedToken
    from tandem.ranks import init
    from tandem.sampling_params import SamplingParams
    from tandem.structured_outputs import StructuredOutputsParams

    __version__: str

__all__ = [
    "LLM",
    "AutoModel",
    "CompletionOutput",
    "InputError",
    "LlamaTokenizer",
    "LoRARequest",
    "Logprob",
    "RanksFailedError",
    "RequestOutput",
    "RunError",
    "SamplingParams",
    "StreamedToken",
    "StructuredOutputsParams",
    "__version__",
    "init",
]

_PLACES = {
    "AutoModel": "tandem.auto_model",
    "LLM": "tandem.llm",
    "LoRARequest": "tandem.lora",
    "SamplingParams": "tandem.sampling_params",
    "StructuredOutputsParams": "tandem.structured_outputs",
    **dict.fromkeys(("CompletionOutput", "Logprob", "RequestOutput", "StreamedToken"), "tandem.outputs"),
    "LlamaTokenizer": "model.text.tokenizer",
    "RanksFailedError": "launcher.supervision.verdict",
    "init": "tandem.ranks",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("launcher.host.program_version").read_version()
    if name not in _PLACES:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

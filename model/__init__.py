"""The model: forward pass, generation, tokenizers, checkpoint formats. Starts no process and reads no environment.

`AutoModel` and `LlamaTokenizer` are for programs that decode in their own process, in MindFormers' words.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.auto_model import AutoModel
    from model.text.tokenizer import LlamaTokenizer

__all__ = ["AutoModel", "LlamaTokenizer"]


def __getattr__(name: str) -> Any:
    # On first use: a rank imports parts of this package and should not pay for tokenizers.
    if name == "AutoModel":
        from model.auto_model import AutoModel

        return AutoModel
    if name == "LlamaTokenizer":
        from model.text.tokenizer import LlamaTokenizer

        return LlamaTokenizer
    raise AttributeError(f"module 'model' has no attribute {name!r}; it has {', '.join(__all__)}")

"""The model: forward pass, generation, tokenizers, checkpoint formats. Starts no process and does not read the environment.

`AutoModel` and `LlamaTokenizer` serve programs that decode in their own process, with the API of MindFormers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.auto_model import AutoModel
    from model.text.tokenizer import LlamaTokenizer

__all__ = ["AutoModel", "LlamaTokenizer"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a rank imports parts of this package and should not load tokenizers.
    if name == "AutoModel":
        from model.auto_model import AutoModel

        return AutoModel
    if name == "LlamaTokenizer":
        from model.text.tokenizer import LlamaTokenizer

        return LlamaTokenizer
    raise AttributeError(f"module 'model' has no attribute {name!r}; it has {', '.join(__all__)}")

"""`LlamaTokenizer` that also takes a model's name: its vocabulary is found beside the checkpoint of the current configuration."""

import os
from collections.abc import Iterator
from pathlib import Path

from model.text import tokenizer as text
from parallel.errors import CheckpointError
from tandem.mindformers.context import find_context

_FILES = ("tokenizer.json", "tokenizer.model")
_DOWNLOADS = Path("checkpoint_download")
"""Where MindFormers keeps the vocabularies that it has downloaded, in a folder for each kind of model."""


class LlamaTokenizer(text.LlamaTokenizer):
    """A tokenizer with MindFormers' calls; `decode` keeps special tokens unless told otherwise, as MindFormers does."""

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlamaTokenizer":
        """Load from a folder or file; or by a model's name, such as "llama2_13b", after `build_context`.

        For a name, the YAML's vocab_file is used, otherwise the vocabulary next to its checkpoint or next to the YAML itself, otherwise
        the one that MindFormers has downloaded into ./checkpoint_download. Raises CheckpointError if there is none.
        """
        if os.path.lexists(path):
            return cls(text.read_tokenizer(Path(path)))
        places = list(dict.fromkeys(_list_places(str(path))))
        for place in places:
            if place.is_file() or any((place / name).is_file() for name in _FILES):
                return cls(text.read_tokenizer(place))
        looked = f"; looked for {' and '.join(_FILES)} in {', '.join(map(str, places))}" if places else ""
        raise CheckpointError(
            f"no tokenizer {str(path)!r}: neither a path nor found by the configuration{looked}; put tokenizer.model next to the "
            "checkpoint, or name it as processor.tokenizer.vocab_file in the YAML"
        )


def _list_places(name: str) -> Iterator[Path]:
    config = find_context()
    if config is not None:
        processor = config.processor or {}
        vocab_file = (processor.get("tokenizer") or {}).get("vocab_file")
        for place in (vocab_file, config.load_checkpoint, config.pretrained_model_dir, *config.source_files):
            if place and place != "None":
                path = Path(place)
                yield path if path.is_dir() or place == vocab_file else path.parent
    yield _DOWNLOADS / name.partition("_")[0]

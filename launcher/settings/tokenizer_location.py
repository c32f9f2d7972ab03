"""The tokenizer of a run: the one that the YAML names, otherwise the one that comes with the checkpoint.

Depends on file names only; `model/text/tokenizer.py` reads the files.
"""

from pathlib import Path

from launcher.settings.yaml_settings import Settings
from parallel.errors import ConfigError

_SECTION = "processor.tokenizer"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_WEIGHTS = (".ckpt", ".safetensors", ".bin", ".pth", ".pt")


def locate_tokenizer(settings: Settings, of_checkpoint: Path | None) -> Path | None:
    """Return the folder or file of the tokenizer; None if there is none.

    `of_checkpoint`: the tokenizer that the checkpoint comes with. A relative path in the YAML is relative to the current folder, or else
    to the YAML's. Raises ConfigError if the YAML names a file that does not exist or holds no tokenizer.
    """
    yaml_folder = Path(settings.source).parent if Path(settings.source).is_file() else None
    keys = {"vocab_file": settings.vocab_file, "tokenizer_file": settings.tokenizer_file}
    named = next(((key, value) for key, value in keys.items() if value), None)
    if named is None:
        if of_checkpoint is None and settings.pretrained_model_dir:
            return Path(settings.pretrained_model_dir)
        return of_checkpoint or (yaml_folder if yaml_folder is not None and _holds_vocabulary(yaml_folder) else None)
    path = next((one for one in (Path(named[1]), Path(yaml_folder or "") / named[1]) if one.exists()), None)
    problem = f"{settings.source}: {_SECTION}.{named[0]} is {named[1]!r}"
    if path is None:
        remedy = (
            f"remove the key to use the tokenizer of {of_checkpoint}" if of_checkpoint else "put tokenizer.model or tokenizer.json there"
        )
        raise ConfigError(f"{problem}, which does not exist: correct it, or {remedy}")
    if path.suffix in _WEIGHTS:
        raise ConfigError(f"{problem}, which is a file of weights: name a tokenizer.model or tokenizer.json")
    if path.name == "vocab.json":
        if not (path.parent / _VOCABULARIES[0]).is_file():
            raise ConfigError(f"{problem}, but vocab.json with merges.txt is not read: put the model's {_VOCABULARIES[0]} next to it")
        return path.parent
    return path


def _holds_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)

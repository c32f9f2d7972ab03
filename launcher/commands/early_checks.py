"""Checks of a model's small files before PyTorch is imported: number of ranks, tokenizer, device.

The same checks run again once the headers are read; these report a mistake in a fraction of a second. They skip formats and files that
they cannot judge, which are reported later.
"""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from launcher.host.accelerators import is_cpu_build
from launcher.settings.decode_options import ChatOptions, PredictOptions, ServeOptions
from launcher.settings.measure_options import BenchOptions
from launcher.settings.options import RunOptions
from launcher.settings.tokenizer_location import locate_tokenizer
from launcher.settings.yaml_settings import Settings
from model.spec.config import LlamaConfig, build_config, read_config
from parallel.errors import ConfigError, InputError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Files of a folder whose config.json describes it, and whose tokenizer is in it."""


def check_model(options: RunOptions, settings: Settings, world_size: int) -> None:
    """Check the small files of the model. Raises LayoutError for too many ranks, CheckpointError without a tokenizer, ConfigError
    for a tokenizer that the YAML names in vain and for a device that this PyTorch was built without.
    """
    _check_device(options.device or settings.tandem.device or "auto")
    path = None if options.checkpoint is None else Path(options.checkpoint)
    is_folder = path is not None and any((path / name).is_file() for name in _WEIGHTS)
    place = path / "config.json" if path is not None and is_folder else None
    if isinstance(options, BenchOptions) and options.model_config is not None:
        place = options.model_config
    config = _read_config(place)
    if config is not None:
        config.layout().check(world_size)
    if is_folder and isinstance(options, PredictOptions | ChatOptions | ServeOptions):
        tokenizer = locate_tokenizer(settings, path)
        if tokenizer is not None and tokenizer.is_dir():
            # Only now: the tokenizer libraries take a tenth of a second, which earlier refusals need not wait for.
            from model.text.tokenizer import require_vocabulary

            require_vocabulary(tokenizer)


def _read_config(place: Path | None) -> LlamaConfig | None:
    if place is not None and place.is_file():
        with suppress(InputError):
            return build_config(read_config(place), str(place))
    return None


def _check_device(word: str) -> None:
    """Raise ConfigError if PyTorch is known not to support a device. PyTorch itself is asked later."""
    if is_cpu_build() and (word == "cuda" or (word == "npu" and find_spec("torch_npu") is None)):
        raise ConfigError(f"--device is {word}, but this PyTorch supports cpu only: install a {word} build, or drop --device")

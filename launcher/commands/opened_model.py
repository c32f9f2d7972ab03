"""Opening the checkpoint and the tokenizer of a command, validated against config.json and the YAML before any process starts."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.host.file_errors import describe_os_error
from launcher.reporting.console import ByteProgress
from launcher.settings.lora_options import list_adapters
from launcher.settings.options import CheckpointOptions
from launcher.settings.precedence import first_not_none
from launcher.settings.yaml_settings import Settings
from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import OpenOptions, open_checkpoint, settle_options
from model.checkpoint.lora_folder import LoraFolder
from model.checkpoint.notes import list_notes, name_settings
from model.checkpoint.source import CheckpointSource
from model.checkpoint.stored_facts import check_facts
from model.checkpoint.verification import require_intact
from model.spec.config import LlamaConfig, build_config, read_config
from model.spec.scheme import Scheme, read_scheme
from model.text.tokenizer import Tokenizer, read_tokenizer
from parallel.errors import CheckpointError, ConfigError
from parallel.regular_file import open_regular


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose headers match its config and the YAML."""

    source: CheckpointSource
    config: LlamaConfig
    scheme: Scheme
    opening: OpenOptions
    """The options it was opened with."""


def plan_opening(options: CheckpointOptions, settings: Settings) -> OpenOptions:
    """Return the options for opening the checkpoint."""
    key_file = str(options.key_file.absolute()) if options.key_file else None
    if options.key_file:
        try:
            open_regular(options.key_file).close()
        except OSError as error:
            raise ConfigError(f"--key-file cannot be read: {describe_os_error(error)}") from None
    fused_order = first_not_none(options.fused_order, settings.tandem.fused_order)
    values = settings.build_model_values()
    if values is None and settings.pretrained_model_dir and (folder := Path(settings.pretrained_model_dir)).is_dir():
        values = read_config(folder / "config.json")
    return OpenOptions(format=options.format, key_file=key_file, follow_links=options.follow_links, values=values, fused_order=fused_order)


def find_checkpoint(option: str | Path | None, settings: Settings) -> Path:
    """Return the checkpoint of the command line, otherwise the YAML's. Raises ConfigError if neither names one."""
    path = option or settings.load_checkpoint
    if not path:
        raise ConfigError("no checkpoint: give --checkpoint")
    return Path(path)


def open_model(options: CheckpointOptions, settings: Settings, *, quantized: bool = True) -> OpenedModel:
    """Open a checkpoint and validate it against its config.json, the YAML and, on request, its checksums. Raises InputError.

    `quantized`: whether the YAML's quantization_config describes this checkpoint, rather than one yet to be written.
    """
    path = find_checkpoint(options.checkpoint, settings)
    opening = plan_opening(options, settings)
    source = open_checkpoint(path, opening)
    config, scheme = build_config(source.config, str(name_settings(source))), read_scheme(source.config)
    settings.compare_model_config(config, str(path))
    for note in list_notes(source, config):
        print(note if note.startswith("warning: ") else f"note: {note}", file=sys.stderr)
    if quantized and settings.quantization is not None:
        settings.quantization.check_scheme(scheme, config, str(path), settings.source)
    check_checkpoint(source, config, scheme)
    check_facts(source, config, scheme)
    if options.verify:
        require_intact(source, ByteProgress("verifying"))
    return OpenedModel(source, config, scheme, settle_options(source, opening))


def open_adapters(words: Iterable[str], base: OpenedModel, *, follow_links: bool) -> dict[str, LoraFolder]:
    """Open the adapters of --lora for a base model, by name. Raises InputError."""
    return {name: LoraFolder(path, base.config, follow_links=follow_links) for name, path in list_adapters(words).items()}


def read_tokenizer_of(path: Path, config: LlamaConfig, settings: Settings) -> Tokenizer:
    """Read the tokenizer in `path` with the settings of the YAML.

    Raises CheckpointError if it is missing or unreadable, or if its ids do not match the model.
    """
    ends = {"add_bos": settings.add_bos_token, "add_eos": settings.add_eos_token}
    tokenizer = read_tokenizer(path, **ends, chat_template=settings.chat_template)
    # Added tokens may exceed the vocabulary: many checkpoints add a padding token without an embedding row. Prompts are checked separately.
    if tokenizer.base_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {path} has {tokenizer.base_size} tokens, but the model's vocabulary has {config.vocab_size}; "
            "use the tokenizer that belongs to this model"
        )
    return tokenizer

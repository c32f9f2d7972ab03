"""The draft model of a command: opened and checked against the large one before any process starts."""

from dataclasses import dataclass, replace
from pathlib import Path

from launcher.commands.opened_model import OpenedModel, open_model
from launcher.job.job import DraftCheckpoint
from launcher.settings.options import CheckpointOptions
from launcher.settings.tokenizer_location import locate_tokenizer
from launcher.settings.yaml_file import find_yaml
from launcher.settings.yaml_settings import Settings, open_settings
from model.checkpoint.fingerprint import read_fingerprint
from model.planning import RankPlan, Workload, plan_ranks
from model.text.tokenizer import Tokenizer, read_tokenizer
from model.text.vocabulary import describe_difference
from parallel.errors import CheckpointError, ConfigError, LayoutError


@dataclass(frozen=True, slots=True)
class OpenedDraftModel:
    """A draft model whose headers match its own config and YAML."""

    opened: OpenedModel
    settings: Settings
    """Those of the YAML in its folder, if any; the large model's describe another model."""

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError unless every token id means the same token as in the large model's `tokenizer`."""
        source = self.opened.source
        path = locate_tokenizer(self.settings, source.tokenizer_path())
        if path is None and source.path.suffix != ".gguf":
            raise CheckpointError(f"the draft model {source.path} has no tokenizer to compare with the model's: put a copy next to it")
        difference = describe_difference(read_tokenizer(path or source.path), tokenizer)
        if difference is not None:
            raise ConfigError(
                f"the draft model {source.path} has another vocabulary than the model: its {difference}; give a draft model whose "
                "tokenizer is the same"
            )

    def describe(self, cache: str | None) -> DraftCheckpoint:
        """Return what the ranks need. `cache`: --kv-cache-dtype."""
        opened = self.opened
        return DraftCheckpoint(
            checkpoint=str(opened.source.path.absolute()),
            opening=opened.opening,
            fingerprint=read_fingerprint(opened.source, opened.config, opened.scheme),
            kv_cache=self.settings.decide_cache(cache, opened.scheme),
        )

    def plan(self, world_size: int, workload: Workload, cache: str | None) -> list[RankPlan]:
        """Plan the ranks' parts of it for the workload of the large model."""
        opened = self.opened
        stored = {name: info.form for name, info in opened.source.tensors.items()}
        own = replace(workload, kv_cache=self.settings.decide_cache(cache, opened.scheme))
        return plan_ranks(opened.config, opened.scheme, world_size, own, stored)


def open_draft_model(options: CheckpointOptions, path: Path, world_size: int) -> OpenedDraftModel:
    """Open a draft model. Raises InputError, also if it has too few units for the ranks."""
    own = replace(options, checkpoint=path, format=None, key_file=None, fused_order=None, config=find_yaml(path))
    settings = open_settings(own.config)
    opened = open_model(own, settings)
    try:
        opened.config.layout().check(world_size)
    except LayoutError as error:
        raise LayoutError(f"the draft model {path} has too few parts: {error}") from None
    return OpenedDraftModel(opened, settings)

"""`AutoModel`, `LlamaForCausalLM`, `Model` and `transform_and_load_checkpoint` of MindFormers, over tandem's ranks.

A network reads no weights when it is made: they are loaded by `transform_and_load_checkpoint`, otherwise by the first `generate` from the
network's own folder. Each rank loads its slice only, whatever number of ranks wrote the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher.commands.preparation import locate_model
from launcher.rendezvous.run_identity import describe_run
from launcher.settings.model_location import find_model
from launcher.settings.options import RunOptions
from launcher.settings.python_options import read_options
from launcher.settings.yaml_settings import Settings, build_settings, open_settings
from launcher.worker.rank import load_rank
from model.spec.config import LlamaConfig as ModelConfig
from parallel.errors import CheckpointError, ConfigError
from tandem import auto_model
from tandem.mindformers.config import LlamaConfig, MindFormerConfig
from tandem.mindformers.context import check_config
from tandem.mindformers.generation import Rows, plan_call
from tandem.mindformers.log import logger
from tandem.mindformers.streamers import Streamer
from tandem.mindformers.tensor import Tensor
from tandem.ranks import init

_FROM_PRETRAINED = "AutoModel.from_pretrained"


class LlamaForCausalLM:
    """A network: `generate` decodes with it."""

    def __init__(self, config: LlamaConfig) -> None:
        """`config`: the keys of a YAML's `model.model_config`. The weights come from `transform_and_load_checkpoint`."""
        raw = {"model": {"model_config": config.to_dict(), "arch": {"type": "LlamaForCausalLM"}}}
        name = config.checkpoint_name_or_path
        own = Path(name) if isinstance(name, str) and Path(name).exists() else None
        self._describe(build_settings(raw, "LlamaConfig"), RunOptions(checkpoint=own))

    @classmethod
    def _build(cls, settings: Settings, options: RunOptions) -> "LlamaForCausalLM":
        network = cls.__new__(cls)
        network._describe(settings, options)
        return network

    def _describe(self, settings: Settings, options: RunOptions) -> None:
        self._settings, self._options = settings, options
        self._model: auto_model.AutoModel | None = None
        self.phase = "predict"

    @property
    def config(self) -> ModelConfig:
        """Sizes and constants of the model; loads it if necessary."""
        return self._loaded().config

    @property
    def read_bytes(self) -> int:
        """Bytes that this rank has read from the checkpoint; 0 before it is loaded."""
        return self._model.read_bytes if self._model is not None else 0

    def set_train(self, mode: bool = True) -> "LlamaForCausalLM":
        """Return the network; it only predicts. Raises ConfigError for training."""
        if mode:
            raise ConfigError("set_train(True) asks for training, but tandem only predicts: call set_train(False)")
        return self

    def prepare_inputs_for_predict_layout(self, input_ids: Tensor, **others: Any) -> tuple[Tensor]:
        """Return the inputs from which MindFormers would plan the layout; tandem plans it from the checkpoint's headers."""
        return (input_ids,)

    def load(self, checkpoint: str | Path | None = None) -> None:
        """Load this rank's slice of `checkpoint`, or of the network's own. Raises InputError on every rank if any of them cannot."""
        group = init()
        job = group.agree(lambda: auto_model.plan_job(group, *self._locate(checkpoint)), describe_run)
        self._model = auto_model.AutoModel(*load_rank(group.open_rank(job, logger.warning)))

    def generate(
        self,
        input_ids: Any,
        generation_config: Mapping[str, Any] | None = None,
        logits_processor: None = None,
        streamer: Streamer | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Rows | MindFormerConfig:
        """Return prompts with their continuations, one int32 array per row; the same on every rank.

        input_ids: one row, or rows of equal length padded on the right. A row ends after its end-of-sequence id, or at `max_length`, the
        length of prompt and continuation (default: the YAML's max_decode_length); `max_new_tokens` is added to the longest prompt.
        Further options: do_sample, temperature, top_k, top_p, repetition_penalty, min_length, min_new_tokens, eos_token_id,
        pad_token_id; they default to the YAML's values. With return_dict_in_generate, returns a dictionary with `sequences`.

        Raises RequestError for options that are not supported, such as num_beams above 1, and for prompts that do not fit.
        """
        if logits_processor is not None:
            raise ConfigError("generate got a logits_processor, which tandem does not support: leave it out")
        model = self._loaded()
        call = plan_call(input_ids, {**(generation_config or {}), **options}, streamer, seed, self._settings, model.config)
        model.require_agreement(call.describe())
        rows = [list(request.prompt_ids) for request in call.requests]
        if streamer is not None:
            streamer.put(np.array(rows[0], dtype=np.int32))
        for event in model.decode(call.requests):
            rows[event.index].append(event.token_id)
            if streamer is not None:
                streamer.put(np.array([event.token_id], dtype=np.int32))
        if streamer is not None:
            streamer.end()
        sequences = [np.array(row, dtype=np.int32) for row in rows]
        return MindFormerConfig(sequences=sequences) if call.returns_dict else sequences

    def _loaded(self) -> auto_model.AutoModel:
        if self._model is None:
            self.load()
        assert self._model is not None
        return self._model

    def _locate(self, checkpoint: str | Path | None) -> tuple[RunOptions, Settings]:
        """Return the options and settings with which to open a checkpoint. Raises InputError."""
        options, settings = self._options, self._settings
        if checkpoint is None:
            if options.checkpoint is None:
                raise CheckpointError("the network has no weights: set config.load_checkpoint and call transform_and_load_checkpoint")
            return options, settings
        path, model_id = find_model(str(checkpoint), offline=options.offline)
        return replace(options, checkpoint=path, model_id=model_id), settings


class AutoModel:
    """Makes networks from folders and configurations."""

    def __init__(self) -> None:
        raise ConfigError("AutoModel makes networks with from_pretrained(folder) or from_config(config)")

    @staticmethod
    def from_pretrained(path: str | Path, download_checkpoint: bool = True, **options: Any) -> LlamaForCausalLM:
        """Return the network of a folder with a YAML and a checkpoint, of any other readable checkpoint, or of a Hugging Face id.

        Weights are read later, with or without `download_checkpoint`. Further options are those of `tandem.AutoModel.from_pretrained`.
        Raises InputError on every rank if any of them cannot read the folder.
        """
        return init().agree(lambda: _open(path, options), lambda network: {})

    @staticmethod
    def from_config(config: MindFormerConfig, download_checkpoint: bool = True) -> LlamaForCausalLM:
        """Return the network of a configuration, with the weights of its load_checkpoint. Raises ConfigError."""
        settings = check_config(config)
        own = Path(settings.load_checkpoint) if settings.load_checkpoint else None
        return LlamaForCausalLM._build(settings, RunOptions(checkpoint=own))


class Model:
    """A network to be run, as MindSpore has it."""

    def __init__(self, network: LlamaForCausalLM, *others: Any, **more: Any) -> None:
        self.predict_network = network

    def infer_predict_layout(self, *data: Any) -> None:
        """Return nothing: the layout needs no compilation."""


def transform_and_load_checkpoint(
    config: MindFormerConfig,
    model: Model | None,
    network: LlamaForCausalLM | None,
    dataset: Any,
    optimizer: object | None = None,
    do_eval: bool = False,
    do_predict: bool = False,
) -> None:
    """Load this rank's slice of `config.load_checkpoint`: one file, rank folders or safetensors, whatever number of ranks wrote it.

    Without load_checkpoint, the network's own checkpoint is loaded. Nothing is transformed on disk. Raises InputError on every rank if
    any of them cannot load it.
    """
    if optimizer is not None or not (do_predict or do_eval):
        raise ConfigError("transform_and_load_checkpoint is called for training, but tandem only predicts: give do_predict=True")
    if network is None:
        if model is None:
            raise ConfigError("transform_and_load_checkpoint needs a network")
        network = model.predict_network
    path = config.load_checkpoint
    network.load(None if path in (None, "", "None") else path)


def _open(path: str | Path, options: Mapping[str, Any]) -> LlamaForCausalLM:
    """Return the network of a folder after a look at its YAML. Raises InputError."""
    given = {**options, "checkpoint": str(path)}
    found = locate_model(read_options(RunOptions, given, _FROM_PRETRAINED, allowed=(*auto_model.MODEL_OPTIONS, "checkpoint")))
    return LlamaForCausalLM._build(open_settings(found.config, found.checkpoint), found)

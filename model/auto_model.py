"""A model in the current process with the API of MindFormers: `AutoModel.from_pretrained(dir).generate(ids, ...)`.

Runs a single rank; use `tandem predict` for several.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.checkpoint.formats import open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.checkpoint.stored_facts import check_facts
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import check_checkpoint, load_model
from model.engine.generation import Engine, generate
from model.engine.request import Request, plan_blocks
from model.engine.sampling import SamplingParams
from model.spec.config import DEFAULT_BLOCK_SIZE, build_config
from model.spec.scheme import read_scheme
from model.text.end_of_text import decide_end_of_text
from model.text.tokenizer import read_tokenizer
from parallel.collectives import IdentityCollectives
from parallel.errors import CheckpointError, RequestError

MAX_LENGTH = 20
"""MindFormers' GenerationConfig.max_length, the default length."""


class AutoModel:
    """A loaded model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self.config = model.config

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str | None = None, device: str = "cpu") -> "AutoModel":
        """Load a checkpoint of any supported format. `dtype`: float32, bfloat16 or float16; None for the checkpoint's dtype."""
        source = open_checkpoint(Path(path))
        config = build_config(source.config, str(path))
        end = decide_end_of_text(source, config.vocab_size, **_read_tokenizer(source))
        for warning in end.warnings:
            warnings.warn(warning, stacklevel=2)
        config = replace(config, eos_token_ids=end.ids)
        scheme = read_scheme(source.config)
        check_checkpoint(source, config, scheme)
        check_facts(source, config, scheme)
        model = LlamaForCausalLM(
            config,
            scheme,
            IdentityCollectives(),
            dtype=dtype or config.dtype,
            device=torch.device(device),
            num_threads=torch.get_num_threads(),
        )
        load_model(model, source)
        return cls(model)

    def generate(
        self,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any],
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> list[npt.NDArray[np.int32]]:
        """Return prompts with their continuations, one int32 array per row.

        input_ids: one row, or rows of equal length padded on the right with the pad id. As in MindFormers, `max_length` is the length of
        the whole row, and `max_new_tokens` is added to the longest prompt; a row ends there or after its end-of-sequence id. Raises
        RequestError for rows of different lengths and for prompts beyond the maximum length.
        """
        prompts = self._strip_padding(input_ids)
        longest = max(map(len, prompts))
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}, but has to be at least 1")
        limit = longest + max_new_tokens if max_new_tokens is not None else MAX_LENGTH if max_length is None else max_length
        limit = min(limit, self.config.max_position_embeddings)
        if limit <= longest:
            raise RequestError(f"max_length is {limit}, but the longest prompt has {longest} tokens; set a larger max_length")
        requests = [
            Request(
                index,
                prompt,
                SamplingParams(
                    max_new_tokens=limit - len(prompt),
                    do_sample=do_sample,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    repetition_penalty=repetition_penalty,
                    seed=seed or 0,
                ),
            )
            for index, prompt in enumerate(prompts)
        ]
        rows = [list(prompt) for prompt in prompts]
        num_blocks = plan_blocks(requests, len(requests), DEFAULT_BLOCK_SIZE)
        for event in generate(Engine(self._model, max_batch_size=len(requests), num_blocks=num_blocks), requests):
            rows[event.index].append(event.token_id)
        return [np.array(row, dtype=np.int32) for row in rows]

    def _strip_padding(self, input_ids: Any) -> list[tuple[int, ...]]:
        rows = [input_ids] if len(input_ids) and np.ndim(input_ids[0]) == 0 else list(input_ids)
        lengths = sorted({len(row) for row in rows})
        if len(lengths) != 1:
            raise RequestError(f"input_ids has rows of lengths {lengths}; fill them up to one length with the pad id at the right")
        pad = self.config.pad_token_id
        pad = 0 if pad is None else pad
        stripped = []
        for row in rows:
            ids = [int(i) for i in row]
            while len(ids) > 1 and ids[-1] == pad:
                ids.pop()
            stripped.append(tuple(ids))
        return stripped


def _read_tokenizer(source: CheckpointSource) -> dict[str, Any]:
    """Return the tokenizer and its path; None if the checkpoint has no readable one, since only ids are required."""
    path = source.tokenizer_path()
    if path is None:
        return {}
    try:
        return {"tokenizer": read_tokenizer(path), "tokenizer_path": path}
    except CheckpointError:
        return {}

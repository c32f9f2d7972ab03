"""`tandem.AutoModel`: a model in the user's own process, as one rank of the program, with the API of MindFormers.

Under torchrun, msrun, srun, mpirun or `tandem run`, each rank loads its slice only and returns the same tokens; otherwise one rank has all.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launcher.commands.job_plan import build_job
from launcher.commands.opened_model import open_model
from launcher.commands.opened_run import Run
from launcher.commands.preparation import locate_model
from launcher.environment.detection import LaunchEnvironment, decide_world_size
from launcher.environment.device_transports import bind_device_transports
from launcher.job.job import Job
from launcher.job.tasks import Decode
from launcher.rendezvous.nodes import Nodes
from launcher.rendezvous.run_identity import describe_run
from launcher.settings.options import RunOptions
from launcher.settings.python_options import read_options
from launcher.settings.yaml_settings import Settings, open_settings
from launcher.worker.rank import load_rank
from launcher.worker.rank_group import RankGroup
from model.decoder.llama import LlamaForCausalLM
from model.engine.events import TokenEvent
from model.engine.generation import Engine, generate
from model.engine.request import Request, plan_blocks
from model.engine.sampling_params import SamplingParams
from model.spec.config import DEFAULT_BLOCK_SIZE
from model.text.tokenizer import Tokenizer
from parallel.errors import ConfigError, InputError, NonFiniteError, RequestError, RunError
from tandem.ranks import init

MAX_LENGTH = 20
"""MindFormers' GenerationConfig.max_length, the default length."""
_CALL = "AutoModel.from_pretrained"
MODEL_OPTIONS = (
    "config",
    "format",
    "key_file",
    "fused_order",
    "verify",
    "offline",
    "follow_links",
    "workers",
    "dtype",
    "device",
    "ranks_per_device",
    "memory_fraction",
    "threads_per_rank",
    "collectives",
    "cpu_kernels",
    "activations",
    "lm_head",
    "kv_cache_dtype",
)
"""Options of the command line that describe a model and its ranks."""


class AutoModel:
    """A loaded model: this rank's slice of it."""

    def __init__(self, model: LlamaForCausalLM, read_bytes: int = 0) -> None:
        self._model, self._is_broken = model, False
        self.config = model.config
        self.read_bytes = read_bytes
        """Bytes that this rank has read from the checkpoint."""

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str | None = None, device: str | None = None, **options: Any) -> "AutoModel":
        """Load this rank's slice of a checkpoint of any supported format: a path, or a Hugging Face id.

        `dtype`: float32, bfloat16 or float16; None for the YAML's, else the checkpoint's. `device`: cpu, cuda or npu; None for the CPU.
        Further options are those of `tandem predict` that describe a model and its ranks, such as `config`, `threads_per_rank` and
        `kv_cache_dtype`. Joins the ranks of the environment first, see `tandem.init`; all ranks have to load the same models in the same
        order.

        Raises InputError on every rank if any of them cannot load the model, RunError if a rank fails.
        """
        group = init()
        given = {"dtype": dtype, "device": device, **options}
        job = group.agree(lambda: _plan_job(group, path, given), describe_run)
        bind_device_transports(job.device, group.seat.address)
        return cls(*load_rank(group.open_rank(job, _warn)))

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
        prompts = strip_padding(input_ids, self.config.pad_token_id)
        longest = max(map(len, prompts))
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}, but has to be at least 1")
        self.require_agreement([prompts, max_length, max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed])
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
        for event in self.decode(requests):
            rows[event.index].append(event.token_id)
        return [np.array(row, dtype=np.int32) for row in rows]

    def decode(self, requests: list[Request]) -> Iterator[TokenEvent]:
        """Yield the tokens of the requests as they are decoded, all requests in one batch.

        Every rank has to make the same requests, see `require_agreement`, and take all tokens.
        """
        num_blocks = plan_blocks(requests, len(requests), DEFAULT_BLOCK_SIZE)
        with self._in_step():
            yield from generate(Engine(self._model, max_batch_size=len(requests), num_blocks=num_blocks), requests)

    def require_agreement(self, call: Any) -> None:
        """Raise RequestError unless every rank makes this call: with different prompts they would wait for each other forever."""
        collectives = self._model.collectives
        if collectives.world_size == 1:
            return
        if self._is_broken:
            raise RunError("an earlier generate ended in the middle, so the ranks are no longer in step: start the program again")
        digest = int.from_bytes(hashlib.sha256(json.dumps(call).encode()).digest()[:6], "big")  # float64 represents 48 bits exactly
        mine = torch.tensor([[digest]], dtype=torch.float64, device=self._model.device)
        with self._in_step():
            digests = collectives.gather_columns(mine, [1] * collectives.world_size)[0].tolist()
        other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
        if other is not None:
            raise RequestError(f"rank {other} calls generate with other ids or options than rank 0: every rank has to make the same calls")

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Context of steps that all ranks take together; whatever interrupts them leaves the ranks out of step."""
        try:
            yield
        except NonFiniteError:  # on every rank, in the same step
            raise
        except BaseException:
            self._is_broken = True
            raise


def strip_padding(input_ids: Any, pad_token_id: int | None) -> list[tuple[int, ...]]:
    """Return the prompts of one row, or of rows of equal length padded on the right. Raises RequestError for rows of other lengths."""
    rows = [input_ids] if len(input_ids) and np.ndim(input_ids[0]) == 0 else list(input_ids)
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise RequestError(f"input_ids has rows of lengths {lengths}; fill them up to one length with the pad id at the right")
    stripped = []
    for row in rows:
        ids = [int(i) for i in row]
        while len(ids) > 1 and ids[-1] == (pad_token_id or 0):
            ids.pop()
        stripped.append(tuple(ids))
    return stripped


def _plan_job(group: RankGroup, path: str | Path, given: Mapping[str, Any]) -> Job:
    options = read_options(RunOptions, {**given, "checkpoint": str(path)}, _CALL, allowed=(*MODEL_OPTIONS, "checkpoint"))
    options = locate_model(options)
    return plan_job(group, options, open_settings(options.config, options.checkpoint))


def plan_job(group: RankGroup, options: RunOptions, settings: Settings) -> Job:
    """Open the checkpoint and resolve all settings. Raises InputError."""
    environment = _describe_environment(group)
    world_size = decide_world_size(options.workers, environment, settings.model_parallel) if environment.is_rank else 1
    if world_size != (options.workers or world_size):
        raise ConfigError(f"workers is {options.workers}, but this program is a single rank: start it with tandem run, torchrun or msrun")
    opened = open_model(options, settings)
    opened.config.layout().check(world_size)
    run = Run(options, settings, environment, world_size, Nodes(), opened)
    return build_job(run, Decode(()), tokenizer=_find_tokenizer(run))


def _describe_environment(group: RankGroup) -> LaunchEnvironment:
    """Return the environment of this rank as its group knows it."""
    if group.world_size == 1:
        return LaunchEnvironment()
    return LaunchEnvironment(
        launcher=group.launcher,
        rank=group.rank,
        world_size=group.world_size,
        local_rank=group.local_rank,
        local_world_size=group.local_world_size,
    )


def _find_tokenizer(run: Run) -> Tokenizer | None:
    """Return the tokenizer, whose stop tokens end a sequence; None without a readable one, since only ids are required."""
    try:
        return run.read_tokenizer()
    except InputError:
        return None


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)

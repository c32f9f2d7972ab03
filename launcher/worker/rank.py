"""The context of a rank for its tasks: job, placement, collectives, and reporting; also loads the model."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from launcher.host.process_memory import give_back_memory
from launcher.job.job import DraftCheckpoint, Job
from launcher.job.messages import Event, Loading, RankWarning, Stopped, Working
from launcher.rendezvous.placement import RankPlacement
from launcher.worker.service import Inbox
from model.checkpoint.fingerprint import Fingerprint, check_unchanged, read_state
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.lora_folder import LoraFolder
from model.checkpoint.source import CheckpointSource
from model.decoder.adapters import load_adapter
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.kernels.library import choose_kernels, explain_absence
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from parallel.collectives import Collectives
from parallel.progress import Progress
from parallel.shared_memory import SharedMemoryCollectives
from parallel.torch_internals import Store
from parallel.watched_collectives import WatchedCollectives

Emit = Callable[[Event], None]
NO_DRAFTS = "{} has no effect: here the low-order bits of a row depend on the batch size"


class StopRequested(Exception):
    """This rank was asked to stop and has finished its current work."""


@dataclass(slots=True)
class Kept:
    """What a rank that has lost a peer keeps for the next attempt."""

    collectives: WatchedCollectives | None = None
    """Those that the model refers to; each attempt gives them other peers."""
    threads: int = 0
    model: LlamaForCausalLM | None = None
    """The loaded model, if the rank can go on with it."""
    draft_model: LlamaForCausalLM | None = None
    """The loaded draft model, if there is one."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The context a task runs with."""

    job: Job
    collectives: Collectives
    device: torch.device
    threads: int
    started: float
    """time.perf_counter() when the rank started."""
    emit: Emit
    """Sends an event to the parent; no effect on ranks above 0."""
    inbox: Inbox
    """Receives messages from the server."""
    progress: Progress
    seat: RankPlacement
    store: Store | None = None
    """Shared by the ranks; None for a single one."""
    kept: Kept = field(default_factory=Kept)

    def report(self, kind: type[Loading | Working]) -> Callable[[int, int], None]:
        """Sends (done, total) as an event of this kind, and tells the watcher and the peers that this rank gets on."""

        def send(done: int, total: int) -> None:
            self.keep_on()
            self.emit(kind(done, total))

        return send

    def keep_on(self) -> None:
        """Tell the watcher and the peers that this rank gets on. Raises StopRequested if it was asked to stop."""
        self.collectives.beat()
        self.raise_if_stopping()

    def raise_if_stopping(self) -> None:
        """Raise StopRequested if this rank was asked to stop."""
        if self.progress.asked_to_stop:
            self.emit(Stopped())
            raise StopRequested

    def gather(self, values: list[int]) -> list[list[int]]:
        """Gather the integers of every rank, one row each."""
        mine = torch.tensor([values], dtype=torch.float64)
        sizes = [len(values)] * self.job.world_size
        return self.collectives.gather_columns(mine, sizes).view(-1, len(values)).long().tolist()


def open_own_checkpoint(job: Job | DraftCheckpoint) -> CheckpointSource:
    """Open the job's checkpoint. Raises CheckpointReplacedError if its files have changed since the job was planned."""
    opened: list[CheckpointSource] = []

    def read() -> Fingerprint:
        opened.append(open_checkpoint(Path(job.checkpoint), job.opening))
        return read_state(opened[0])

    check_unchanged(job.fingerprint, read)
    return opened[0]


def load_rank(me: Rank, source: CheckpointSource | None = None) -> tuple[LlamaForCausalLM, int]:
    """Load this rank's part of the checkpoint, or of `source`; returns the model and the number of bytes read, 0 if it was kept."""
    if me.kept.model is not None:
        me.progress.note_kept_weights()
        me.collectives.barrier()
        return me.kept.model, 0
    give_back_memory()
    me.progress.set_operation("loading")
    job = me.job
    choose_kernels(job.cpu_kernels)
    own = source is None
    source = source or open_own_checkpoint(job)
    config = replace(
        build_config(source.config),
        max_position_embeddings=job.context_tokens,
        eos_token_ids=job.eos_token_ids,
        pad_token_id=job.pad_token_id,
    )
    scheme = job.plan_scheme(config, read_scheme(source.config))
    model = LlamaForCausalLM(config, scheme, me.collectives, dtype=job.dtype, device=me.device, num_threads=me.threads)
    read_bytes = load_model(model, source, me.report(Loading))
    for adapter in job.adapters:
        folder = LoraFolder(Path(adapter.path), config, follow_links=job.opening.follow_links)
        read_bytes += load_adapter(model, adapter.name, folder)
        check_unchanged(adapter.fingerprint, partial(read_state, folder))
    if own:
        check_unchanged(job.fingerprint, partial(read_state, source))
    if model.backend.in_host_memory and (absence := explain_absence()):
        me.emit(RankWarning(absence))
    if not model.backend.is_split_invariant(model.dtype, me.threads):
        me.emit(RankWarning("on this device the last bits of results may differ between numbers of ranks"))
    if own and me.collectives.name == SharedMemoryCollectives.name:
        me.kept.model = model
        me.progress.note_kept_weights()
    me.collectives.barrier()
    return model, read_bytes


def load_draft_model(me: Rank, model: LlamaForCausalLM) -> LlamaForCausalLM | None:
    """Load this rank's part of the draft model after `model`, for which it drafts; None without one.

    Warns and returns None if `model` cannot verify drafts, because the low-order bits of its rows depend on the batch size.
    """
    job = me.job
    draft = job.draft
    if draft is None:
        return None
    if not model.batch_invariant:
        me.emit(RankWarning(NO_DRAFTS.format("--draft-model")))
        return None
    if me.kept.draft_model is None:
        me.progress.set_operation("loading")
        source = open_own_checkpoint(draft)
        config = build_config(source.config)
        config = replace(config, max_position_embeddings=min(config.max_position_embeddings, job.context_tokens))
        scheme = replace(read_scheme(source.config), kv_cache=draft.kv_cache)
        loaded = LlamaForCausalLM(config, scheme, me.collectives, dtype=job.dtype, device=me.device, num_threads=me.threads)
        load_model(loaded, source, lambda done, total: me.keep_on())
        check_unchanged(draft.fingerprint, partial(read_state, source))
        me.kept.draft_model = loaded
    me.collectives.barrier()
    return me.kept.draft_model

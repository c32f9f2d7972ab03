"""What rank 0 and its parent tell each other: events of the rank, commands of the parent.

Plain values. How they travel between processes: `launcher/job/codec.py`. Ranks above 0 tell the parent nothing.
"""

from typing import Any

from msgspec import Struct

from model.engine.events import PromptScore, SequenceFailure, TokenEvent
from model.engine.request import Request


class Loading(Struct, frozen=True, tag=True):
    """How far rank 0 is with loading its part of the checkpoint."""

    done: int
    """Bytes."""
    total: int
    """Bytes."""


class Working(Struct, frozen=True, tag=True):
    """How far a run that ends in one result is."""

    done: int
    """Rounds, windows, questions or layers, by the task."""
    total: int
    """The same units."""


class RankWarning(Struct, frozen=True, tag=True):
    """Something that the user should know; the run continues."""

    message: str
    """A sentence."""


class Tokens(Struct, frozen=True, tag=True):
    """The new tokens of one step."""

    tokens: tuple[TokenEvent, ...]
    """At most one for each sequence, or several in order where guesses were right."""


class Scores(Struct, frozen=True, tag=True):
    """Log-probabilities of prompt tokens, from one step of a server."""

    scores: tuple[PromptScore, ...]
    """In the order of each prompt."""


class Failures(Struct, frozen=True, tag=True):
    """The sequences that one step ended because their logits were not finite."""

    failures: tuple[SequenceFailure, ...]
    """At least one."""


class Refused(Struct, frozen=True, tag=True):
    """A request that cannot run. The others are not affected."""

    index: int
    """The request's number."""
    message: str
    """Why, and what to do."""


class Failed(Struct, frozen=True, tag=True):
    """The whole task cannot be done, on any rank: a restart would find the same."""

    message: str
    """Why, and what to do."""


class Stopped(Struct, frozen=True, tag=True):
    """Rank 0 was asked to stop and has finished its current token."""


class _Running(Struct, frozen=True, kw_only=True):
    """Description of the run; the common fields of Stats and Serving."""

    world_size: int
    """Ranks."""
    threads_per_rank: int
    """Threads of rank 0."""
    device: str
    """cpu, or an accelerator's device type."""
    dtype: str
    """Compute type: float32, bfloat16 or float16."""
    quantization: str
    """Name of the checkpoint's scheme."""
    kernel: str
    """Name of the matmul kernel, and what runs without native kernels."""
    collectives: str
    """Name of the collectives."""
    cores_bound: bool = False
    """Whether each rank is bound to cores of its own."""


class Stats(_Running, frozen=True, kw_only=True, tag=True):
    """Measurements of a decoding run, sent at its end. Lists have one value per rank."""

    load_seconds: float
    """Seconds from the start of rank 0 until the model was loaded."""
    prefill_tokens_per_second: float
    """Prompt tokens per second of prefill."""
    decode_tokens_per_second: float
    """New tokens of all sequences per second of decoding."""
    time_to_first_token_seconds: float
    """Seconds from the first step to the first new token."""
    speculated_tokens: int
    """Draft tokens that were verified."""
    accepted_tokens: int
    """Draft tokens that were accepted."""
    acceptance_rate: float | None
    """Accepted share of the draft tokens; None if there were none."""
    weight_bytes: list[int]
    """Bytes of weights in memory."""
    adapter_bytes: list[int]
    """Bytes of LoRA adapters in memory."""
    draft_weight_bytes: list[int]
    """Bytes of the draft model's weights in memory, besides; 0 without one."""
    read_bytes: list[int]
    """Bytes read from the checkpoint."""
    peak_rss_bytes: list[int]
    """Largest resident memory of the process, bytes."""
    peak_device_bytes: list[int]
    """Largest memory allocated on the device, bytes; 0 on CPUs."""
    kv_cache_dtype: str
    """Type of keys and values in the cache."""
    kv_cache_bytes_per_token: list[int]
    """Bytes of the cache for one token, the draft model's included."""


class Serving(_Running, frozen=True, kw_only=True, tag=True):
    """The model is loaded, and the ranks of a server take requests."""

    memory_bytes_per_second: float
    """Read bandwidth of memory, all ranks together."""
    hosts: tuple[str, ...]
    """Host name of each rank."""
    pids: tuple[int, ...]
    """Process id of each rank on its host."""


class RankReport(Struct, frozen=True, kw_only=True):
    """One rank of a server, over its last steps."""

    step_seconds: float | None
    """Median seconds of a step; None before the first step."""
    gather_seconds: float | None
    """Median seconds that a step spent in collectives; None before the first step."""
    rss_bytes: int
    """Resident memory now, bytes."""
    device_bytes: int = 0
    """Memory allocated on the device now, bytes; 0 on CPUs."""


class Report(Struct, frozen=True, kw_only=True, tag=True):
    """The state of a server's ranks, twice a second."""

    ranks: tuple[RankReport, ...]
    """By rank."""
    slowest_seconds: float
    """Seconds of rank 0's slowest recent step; 0 before the first step."""
    blocks_used: int
    """KV cache blocks in use."""
    prefill_tokens: int
    """Prompt tokens that went through the model since the ranks started."""
    prefix_queries: int = 0
    """Tokens of admitted sequences since the ranks started."""
    prefix_hits: int = 0
    """Those among them that were in the KV cache."""
    preemptions: int = 0
    """Sequences that gave their KV cache to others since the ranks started."""
    speculated_tokens: int = 0
    """Draft tokens that were verified since the ranks started."""
    accepted_tokens: int = 0
    """Those among them that were accepted."""


class Result(Struct, frozen=True, tag=True):
    """Result of an evaluation, a benchmark or a quantization."""

    values: dict[str, Any]
    """By name; the command that started the task knows them."""


class Printed(Struct, frozen=True, tag=True):
    """Standard output of a user's program on rank 0."""

    text: str
    """Any bytes, decoded with surrogateescape."""


Event = (
    Loading | Working | RankWarning | Tokens | Scores | Failures | Refused | Failed | Stopped | Stats | Serving | Report | Result | Printed
)
"""From rank 0 to its parent."""


class Add(Struct, frozen=True, tag=True):
    """Add a request to the batch."""

    request: Request
    """The request, with its resumed tokens."""


class Cancel(Struct, frozen=True, tag=True):
    """Cancel a request whose client has disconnected."""

    index: int
    """The request's number."""


class End(Struct, frozen=True, tag=True):
    """No request will follow: end when all have been answered."""


Command = Add | Cancel | End
"""From the parent to rank 0, which passes it on to the other ranks."""

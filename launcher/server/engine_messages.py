"""What a program and the engine process of its `LLM` tell each other. Does not depend on PyTorch, which only the engine needs.

JSON over a socket, private to one version of the program.
"""

from typing import Any, NamedTuple

import msgspec
from msgspec import Struct


class Start(Struct, frozen=True, tag=True):
    """The first message: start the ranks."""

    options: dict[str, Any]
    """Fields of EngineOptions that are set, paths as texts."""


class Sequence(Struct, frozen=True):
    """One sequence to continue."""

    prompt: int
    """Position of its prompt in the call, for messages."""
    prompt_ids: list[int]
    params: dict[str, Any]
    """Fields of `model.engine.sampling_params.SamplingParams`."""
    limit: dict[str, Any] = {}
    """Fields of `launcher.server.structured_output.StructuredOutputs`; empty: any text."""
    adapter: str | None = None
    """Name of its LoRA adapter."""


class Submit(Struct, frozen=True, tag=True):
    """Run sequences, or reject all of them if one cannot run."""

    first: int
    """Index of the first; the others follow."""
    sequences: list[Sequence]


class CancelSequences(Struct, frozen=True, tag=True):
    """Cancel sequences; no effect on finished ones."""

    indices: list[int]


Instruction = Start | Submit | CancelSequences
"""From the program to the engine."""


class Opened(Struct, frozen=True, tag=True):
    """The checkpoint is valid, and the ranks are about to start."""

    name: str
    """Name of the model."""
    world_size: int
    context_tokens: int
    """Maximum length of a sequence, prompt included."""
    tokenizer_path: str
    add_bos: bool | None = None
    """Whether texts begin with the begin token; None: as the tokenizer's files say."""
    add_eos: bool | None = None
    """Whether texts end with the end token."""
    chat_template: str | None = None
    """Of the YAML, if it has one."""
    adapters: dict[str, str] = {}
    """Absolute path of each LoRA adapter, by its name."""


class Ready(Struct, frozen=True, tag=True):
    """The ranks have loaded the model; sent again after each restart."""

    pids: list[int]
    """Process id of each rank."""


class Token(NamedTuple):
    """One generated token; the fields of NewToken, preceded by its sequence."""

    sequence: int
    """Index of its sequence."""
    token_id: int
    finish_reason: str | None
    """"eos" or "length" on the last token."""
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


class Tokens(Struct, frozen=True, tag=True):
    """New tokens of some sequences."""

    tokens: list[Token]


class Rejected(Struct, frozen=True, tag=True):
    """A Submit that cannot run; none of its sequences has started."""

    first: int
    message: str


class SequenceFailed(Struct, frozen=True, tag=True):
    """A sequence that ended without a last token."""

    index: int
    message: str


class Ended(Struct, frozen=True, tag=True):
    """The last message: why the engine exits."""

    kind: str
    """"input", "ranks" or "run"."""
    message: str
    verdict: str | None = None
    """Verdict as JSON, if ranks failed."""
    is_input: bool = False
    """Whether the ranks failed because of the checkpoint or a setting."""


Notice = Opened | Ready | Tokens | Rejected | SequenceFailed | Ended
"""From the engine to the program."""

encode = msgspec.json.encode
decode_instruction = msgspec.json.Decoder(Instruction).decode
decode_notice = msgspec.json.Decoder(Notice).decode

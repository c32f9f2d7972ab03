"""What `LLM.generate` returns: answers with the fields of vLLM's, and single tokens of a stream."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token that was considered at a position."""

    logprob: float
    """Natural logarithm of its probability, from the unmodified logits."""
    rank: int | None
    """1 for the most likely token; None if it is not among those requested."""
    decoded_token: str
    """Its text alone."""


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    """Number of the answer, below n."""
    text: str = ""
    """The new text, without the prompt and special tokens."""
    token_ids: list[int] = field(default_factory=list)
    """The new tokens, including an end-of-sequence token."""
    cumulative_logprob: float | None = None
    """Sum of the log-probabilities of the tokens, if requested."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token, the chosen one first and then the most likely ones, if requested."""
    finish_reason: str | None = None
    """"stop" (end-of-sequence token, stop token or stop text), or "length"."""
    stop_reason: int | str | None = None
    """The stop token id of the request that ended it, or "stop" text; None for the model's own end-of-sequence token."""

    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    """Position of the prompt in the call."""
    prompt: str
    """The prompt as text; decoded if it was given as ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class StreamedToken:
    """One token of a stream."""

    index: int
    """Position of its prompt in the call."""
    output_index: int
    """Number of the answer, below n."""
    token_id: int
    text: str
    """The text that it completes, often empty: texts of an answer add up to its whole text."""
    logprobs: dict[int, Logprob] | None
    """As in CompletionOutput, if requested."""
    finish_reason: str | None
    """"stop" or "length" on the last token of an answer."""

    def __str__(self) -> str:
        return self.text

"""What is asked of the token generator: one sequence to go on with, and whether that can be.

Knows ids and numbers; no model, no tensors.
"""

from dataclasses import dataclass

from model.engine.sampling import SamplingParams
from model.spec.config import count_blocks
from parallel.errors import RequestError


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to go on with."""

    index: int
    """The caller's number of it."""
    prompt_ids: tuple[int, ...]
    """Ids to start from, at least one."""
    params: SamplingParams
    """How to go on."""
    known_ids: tuple[int, ...] = ()
    """New tokens that an earlier attempt has made already."""
    known_reason: str | None = None
    """Its finish reason, when that attempt has come to its end."""

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept at its end: all but the last, which nobody looks at."""
        return len(self.prompt_ids) + self.params.max_new_tokens - 1


def check_request(request: Request, context_tokens: int, vocab_size: int) -> None:
    """Raise RequestError unless the prompt is not empty, of known ids, and fits the context with its new tokens."""
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError(f"prompt {request.index} has no tokens; write at least one word")
    if length >= context_tokens:
        raise RequestError(f"prompt {request.index} has {length} tokens, but the model's context is {context_tokens}: shorten it")
    if length + request.params.max_new_tokens > context_tokens:
        raise RequestError(
            f"prompt {request.index} has {length} tokens and asks for {request.params.max_new_tokens} new ones, "
            f"but the model's context is {context_tokens}"
        )
    if len(request.known_ids) > request.params.max_new_tokens or (request.known_reason and not request.known_ids):
        raise RequestError(
            f"prompt {request.index} is said to have {len(request.known_ids)} new tokens already, "
            f"but 1 to {request.params.max_new_tokens} are asked for"
        )
    unknown = next((i for i in (*request.prompt_ids, *request.known_ids) if not 0 <= i < vocab_size), None)
    if unknown is not None:
        raise RequestError(
            f"prompt {request.index} has id {unknown}, but the vocabulary has {vocab_size}: is it another model's tokenizer?"
        )


def check_memory(request: Request, num_blocks: int, block_size: int) -> None:
    """Raise RequestError unless the request fits the key-value cache when it has that to itself."""
    if count_blocks(request.cached_tokens, block_size) > num_blocks:
        raise RequestError(
            f"prompt {request.index} has {len(request.prompt_ids)} tokens and asks for {request.params.max_new_tokens} new ones, "
            f"but the key-value cache holds {num_blocks} blocks of {block_size} = {num_blocks * block_size} tokens: "
            "set a larger --num-blocks, or ask for less"
        )


def plan_blocks(requests: tuple[Request, ...] | list[Request], max_batch_size: int, block_size: int) -> int:
    """Blocks with which none of these requests ever waits for memory."""
    needed = sorted((count_blocks(request.cached_tokens, block_size) for request in requests), reverse=True)
    return max(1, sum(needed[:max_batch_size]))

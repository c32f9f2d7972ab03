"""The prompts that the gain of speculation is measured with, and the words of a result."""

from typing import Any

from model.engine.request import Request, check_request
from model.engine.sampling_params import SamplingParams
from model.text.tokenizer import Tokenizer

_PASSAGE = """The old ferry leaves the harbour at seven every morning. Anna, who has steered it for twenty years, checks the ropes, \
greets the baker with his two baskets of bread, and waits for the last children on their way to school. When the bell rings, the boat \
turns slowly around the lighthouse and crosses the bay in half an hour. On windy days the waves wash over the deck, and the passengers \
stand close together in the small cabin, drink hot tea from paper cups, and tell each other what they have heard about the new bridge."""
PROMPTS = {
    "copy": f"Original text:\n\n{_PASSAGE}\n\nThe same text again, word for word, but the name Anna is replaced by Maria:\n\n",
    "free": "Once upon a time, in a small village at the foot of the mountains, there lived",
}
"""Keyed by the name of the result's row."""
NEW_TOKENS = 64
"""New tokens per prompt, regardless of stop tokens; fewer in a short context."""


def encode_prompts(tokenizer: Tokenizer, context_tokens: int, vocab_size: int) -> tuple[Request, ...]:
    """Tokenize PROMPTS, truncated on the left to the context. Raises RequestError for ids outside the model's vocabulary."""
    new_tokens = min(NEW_TOKENS, max(2, context_tokens // 2))  # the speed is measured after the first token
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    rows = [tuple(tokenizer.encode(text)[new_tokens - context_tokens :]) for text in PROMPTS.values()]
    requests = tuple(Request(index, row, params) for index, row in enumerate(rows))
    for request in requests:
        check_request(request, context_tokens, vocab_size)
    return requests


def describe_row(row: dict[str, Any]) -> str:
    """Format a row of the result for the terminal."""
    share = row["accepted_share"]
    guesses = "no draft tokens" if share is None else f"{share:.0%} of the draft tokens were accepted"
    return (
        f"speculate {row['tokens_per_second']:8.1f} tokens/s, {row['prompt']} prompt, batch 1: {row['gain']:.2f} times the "
        f"{row['tokens_per_second_plain']:.1f} without; {guesses}, the tokens are identical"
    )

"""The sampling options of one sequence."""

from dataclasses import dataclass

from parallel.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options of one sequence. The defaults are those of MindFormers' GenerationConfig."""

    max_new_tokens: int
    """Maximum number of new tokens."""
    do_sample: bool = False
    """Sample randomly; False means greedy."""
    temperature: float = 1.0
    """Divisor of the logits when sampling."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the smallest set of most likely tokens whose probabilities reach this sum."""
    repetition_penalty: float = 1.0
    """Divisor of the logits of ids that have occurred (multiplier if the logit is negative)."""
    seed: int = 0
    """Seed of the sequence's own random numbers."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence id."""
    logprobs: bool = False
    """Report the log-probability of each new token, computed from the unmodified logits."""
    top_logprobs: int = 0
    """Number of most likely tokens to report with their log-probabilities."""
    prompt_logprobs: bool = False
    """Report the log-probability of each prompt token but the first, and of `top_logprobs` alternatives."""
    frequency_penalty: float = 0.0
    """OpenAI's: subtracted from the logit of each new id for each of its occurrences."""
    presence_penalty: float = 0.0
    """OpenAI's: subtracted once from the logit of each new id that has occurred."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, bias to add to its logit)."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end this sequence in addition to the model's; as in vLLM, `ignore_eos` does not affect them."""
    min_p: float = 0.0
    """Sample among tokens at least this likely, relative to the most likely one."""
    min_tokens: int = 0
    """Number of new tokens before one that ends the sequence; no effect with a grammar."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that the new tokens must not contain."""
    allowed_token_ids: tuple[int, ...] = ()
    """If any, the only ids to choose from."""
    grammar: str = ""
    """Grammar that the text has to match, see `model/engine/grammar.py`; it overrides `ignore_eos`."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0 (for the likeliest token, use --greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
            ("top_logprobs", self.top_logprobs >= 0, "at least 0"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_new_tokens, f"from 0 to the {self.max_new_tokens} new tokens asked for"),
        )
        for name, holds, needed in checks:
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}, but has to be {needed}")

"""`tandem.SamplingParams`: how `LLM` chooses tokens, with vLLM's names and defaults."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from parallel.errors import RequestError
from tandem.structured_outputs import StructuredOutputsParams, read_limit

_LEAST_TEMPERATURE = 1e-6
"""Lower temperatures decode greedily: no other token has a chance, and the scaled logits would overflow."""
_MAX_CHOICES = 64
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "best_of": (None, 1),
    "logits_processors": (None, [], ()),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (None,),
}
"""vLLM's options that do not exist here, with the values that have no effect."""


@dataclass(kw_only=True)
class SamplingParams:
    """How to choose the tokens of an answer. Raises InputError (from `LLM.generate` too) for a value out of range."""

    n: int = 1
    """Number of answers to each prompt."""
    max_tokens: int | None = 16
    """Maximum number of new tokens; None: as many as the context holds. Always ends at the context."""
    temperature: float = 1.0
    """Divisor of the logits; 0: always the most likely token (greedy)."""
    top_p: float = 1.0
    """Sample among the smallest set of most likely tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 and -1: all."""
    seed: int | None = None
    """Random seed of each prompt, from 0 to 4294967295; None: another one each time."""
    stop: str | Sequence[str] | None = None
    """Texts before which an answer ends."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end an answer, even with `ignore_eos`."""
    ignore_eos: bool = False
    """Continue past the end-of-sequence token."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each new token that has occurred; from -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of each new token for each of its occurrences; from -2 to 2."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens less likely that occur in the prompt or the answer."""
    logit_bias: Mapping[int, float] | None = None
    """Token id to the value added to its logit."""
    logprobs: int | None = None
    """Number of most likely tokens to report with their log-probabilities, next to the chosen one; None: no log-probabilities."""
    min_p: float = 0.0
    """Sample among tokens at least this likely, relative to the most likely one."""
    min_tokens: int = 0
    """Number of new tokens before one that ends the answer."""
    allowed_token_ids: Sequence[int] | None = None
    """If any, the only token ids to choose from."""
    bad_words: Sequence[str] | None = None
    """Texts that an answer must not contain, as far as they are tokenized as alone or after a space."""
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    """Limits the form of the text. It overrides `ignore_eos` and `min_tokens`; an answer that `max_tokens` cuts is incomplete."""
    guided_decoding: StructuredOutputsParams | Mapping[str, Any] | None = None
    """The older name of `structured_outputs`."""
    prompt_logprobs: int | None = None
    """Not supported: None only. The same holds for the values below, which are vLLM's defaults."""
    best_of: int | None = None
    logits_processors: Sequence[Any] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise InputError for a value out of range or an option that is not supported. Fields may have been set since."""
        for name, neutral in _UNSUPPORTED.items():
            if (value := getattr(self, name)) not in neutral:
                raise RequestError(f"{name} is {value!r}, but tandem does not support {name}: leave it out")
        for name in ("n", "max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if type(value) is not int and (value is not None or name in ("n", "top_k")):
                raise RequestError(f"{name} is {value!r}, but a whole number is needed")
        if type(self.min_tokens) is not int:
            raise RequestError(f"min_tokens is {self.min_tokens!r}, but a whole number is needed")
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise RequestError(f"{name} is {value!r}, but a number is needed")
        ranges = (
            ("n", 1 <= self.n <= _MAX_CHOICES, f"from 1 to {_MAX_CHOICES}"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0 (0: the most likely token)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            ("top_k", self.top_k >= -1, "at least 1, or 0 for all"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32, "from 0 to 4294967295"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        )
        for name, holds, needed in ranges:
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}, but has to be {needed}")
        if not all(type(text) is str and text for text in self.stops):
            raise RequestError(f"stop is {self.stop!r}, but texts that are not empty are needed")
        if isinstance(self.bad_words, str) or not all(type(text) is str and text.strip() for text in self.bad_words or ()):
            raise RequestError(f"bad_words is {self.bad_words!r}, but a list of texts that are not empty is needed")
        self.read_limit()

    def read_limit(self) -> dict[str, Any]:
        """Return the limit on the form of the text, as fields of the server's StructuredOutputs; empty without one."""
        return read_limit(self.structured_outputs, self.guided_decoding)

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def plan_choices(self, new_tokens: int) -> list[dict[str, Any]]:
        """Return the engine's parameters of each of the n answers, with consecutive seeds."""
        is_greedy = self.temperature < _LEAST_TEMPERATURE
        seed = secrets.randbits(32) if self.seed is None else self.seed
        params = {
            "max_new_tokens": new_tokens,
            "do_sample": not is_greedy,
            "temperature": 1.0 if is_greedy else float(self.temperature),
            "top_k": max(0, self.top_k),
            "top_p": float(self.top_p),
            "min_p": float(self.min_p),
            "min_tokens": min(self.min_tokens, new_tokens),
            "allowed_token_ids": [int(token) for token in self.allowed_token_ids or ()],
            "repetition_penalty": float(self.repetition_penalty),
            "ignore_eos": bool(self.ignore_eos),
            "stop_token_ids": [int(token) for token in self.stop_token_ids or ()],
            "presence_penalty": float(self.presence_penalty),
            "frequency_penalty": float(self.frequency_penalty),
            "logit_bias": [(int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()],
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs or 0,
        }
        return [{**params, "seed": (seed + choice) % 2**32} for choice in range(self.n)]

    def __repr__(self) -> str:
        said = (f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if getattr(self, field.name) != field.default)
        return f"SamplingParams({', '.join(said)})"

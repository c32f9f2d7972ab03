"""What callers of a server may ask, in OpenAI's words, and what that means to the token generator.

Shapes and ranges are checked here; whether prompts fit the model is checked where its context is known.
"""

import secrets
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model.engine.sampling import SamplingParams

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_PROMPTS = 128
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's."""
_MAX_STOP_LENGTH = 1000
_MAX_ID_DIGITS = 10
_LEAST_TEMPERATURE = 1e-6
"""Below, the likeliest token is taken: no other one has a chance, and logits divided by less overflow."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "user": (),
    "metadata": (),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "verbosity": (None, "medium"),
    "best_of": (None, 1),
}
"""OpenAI's fields that mean nothing here, with the values that ask for nothing; none listed: any."""

Token = Annotated[int, Field(strict=True, ge=0)]


class _Asked(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: "StreamOptions | None" = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1)] = 0
    """Not OpenAI's: sample among the k likeliest; 0 and -1: all."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Not OpenAI's: MindFormers'."""
    ignore_eos: bool = False
    """Not OpenAI's: go on after the end-of-sequence token."""
    timeout: float | None = Field(None, gt=0)
    """Not OpenAI's: seconds after which the caller wants no answer any longer."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError(f"the body is a {type(raw).__name__}, but a JSON object is needed")
        kept = {}
        for name, value in raw.items():
            if name in _NEUTRAL and name not in cls.model_fields:
                if _NEUTRAL[name] and value not in _NEUTRAL[name]:
                    raise ValueError(f"{name} is not supported here; leave it out")
            elif name not in cls.model_fields:
                near = get_close_matches(name, cls.model_fields, 1)
                raise ValueError(f"{name[:100]!r} is no field of this request" + (f"; did you mean {near[0]!r}?" if near else ""))
            elif value is not None:  # null is OpenAI's way to say nothing
                kept[name] = value
        return kept

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"stop takes up to {MAX_STOPS} texts, none of them empty or longer than {_MAX_STOP_LENGTH} characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (
            len(value) > 300 or not all(key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS for key in value)
        ):
            raise ValueError("logit_bias takes up to 300 token ids, as strings of digits, each with a bias from -100 to 100")
        return value

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return self.stop if isinstance(self.stop, list) else []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def plan_sampling(self, new_tokens: int, logprobs: int | None) -> list[SamplingParams]:
        """How each of the n choices goes on; their seeds follow on each other. `logprobs`: None for none, else how many likeliest."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return [
            SamplingParams(
                max_new_tokens=new_tokens,
                do_sample=self.temperature >= _LEAST_TEMPERATURE,
                temperature=max(self.temperature, _LEAST_TEMPERATURE),
                top_k=max(0, self.top_k),
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                seed=(seed + choice) % 2**32,
                ignore_eos=self.ignore_eos,
                logprobs=logprobs is not None,
                top_logprobs=logprobs or 0,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            )
            for choice in range(self.n)
        ]


class StreamOptions(BaseModel):
    """OpenAI's."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, as texts or ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        if not 1 <= len(self.prompts) <= MAX_PROMPTS or self.prompt == []:
            raise ValueError(f"prompt holds {len(self.prompts)} prompts, but from 1 to {MAX_PROMPTS} are taken at once")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported here: log-probabilities are of new tokens only")
        return self


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def to_template(self) -> dict[str, str]:
        """As chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

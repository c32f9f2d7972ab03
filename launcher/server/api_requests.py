"""Request bodies of the OpenAI API: fields, types, ranges, and their translation to sampling parameters.

Decoding is in `launcher/server/request_body.py`; whether a prompt fits the context is checked by the request planner.
"""

import secrets
from typing import Annotated, Any

from msgspec import Meta, Struct

from model.engine.sampling import SamplingParams

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_TOKEN_IDS = 256
MAX_PROMPTS = 128
MAX_MESSAGES = 10_000
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 300
MAX_PROMPT_LOGPROBS = 400_000
"""Maximum number of prompt log-probabilities per request, including the top alternatives; each takes about 250 bytes."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_STOP_LENGTH = 1000
_MAX_ID_DIGITS = 10
_LEAST_TEMPERATURE = 1e-6
"""Lower temperatures decode greedily: no other token has a chance, and the scaled logits would overflow."""

NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "user": (),
    "metadata": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "verbosity": ("medium",),
    "best_of": (1,),
}
"""Unimplemented OpenAI fields with the values, besides null, that have no effect; an empty tuple accepts any value."""

_MAX_INTEGER = 2**31 - 1
Token = Annotated[int, Meta(ge=0, le=_MAX_INTEGER)]


class StreamOptions(Struct, frozen=True, kw_only=True):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """The fields common to both routes. An absent or null field takes its default."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """As in OpenAI's API, 0 keeps only the most likely token."""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []
    stop_token_ids: list[Token] = []
    """vLLM extension: additional stop token ids; they apply even with `ignore_eos`."""
    seed: int | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    top_k: Annotated[int, Meta(ge=-1)] = 0
    """Extension: sample from the k most likely tokens; 0 and -1 disable the filter."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    """Extension: MindFormers' repetition penalty."""
    ignore_eos: bool = False
    """Extension: continue past the end-of-sequence token."""
    timeout: Annotated[float, Meta(gt=0)] | None = None
    """Extension: time limit of the request in seconds."""

    def __post_init__(self) -> None:
        if len(self.stops) > MAX_STOPS or any(not 0 < len(stop) <= _MAX_STOP_LENGTH for stop in self.stops):
            raise ValueError(f"stop takes up to {MAX_STOPS} texts, none of them empty or longer than {_MAX_STOP_LENGTH} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids holds {len(self.stop_token_ids)} ids, but the maximum is {MAX_STOP_TOKEN_IDS}")
        if len(self.logit_bias) > MAX_BIASES or not all(
            key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS for key in self.logit_bias
        ):
            raise ValueError(f"logit_bias takes up to {MAX_BIASES} token ids, as strings of digits, each with a bias from -100 to 100")

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def plan_sampling(self, new_tokens: int, logprobs: int | None, *, prompt_logprobs: bool = False) -> list[SamplingParams]:
        """Build the sampling parameters of each of the n choices, with consecutive seeds.

        `logprobs` is the number of top alternatives to report, or None to report no log-probabilities; `prompt_logprobs` adds those of the
        prompt.
        """
        seed = secrets.randbits(32) if self.seed is None else self.seed
        logit_bias = tuple((int(token), bias) for token, bias in self.logit_bias.items())
        return [
            SamplingParams(
                max_new_tokens=new_tokens,
                do_sample=self.temperature >= _LEAST_TEMPERATURE and self.top_p > 0,
                temperature=max(self.temperature, _LEAST_TEMPERATURE),
                top_k=max(0, self.top_k),
                top_p=self.top_p or 1.0,
                repetition_penalty=self.repetition_penalty,
                seed=(seed + choice) % 2**32,
                ignore_eos=self.ignore_eos,
                stop_token_ids=tuple(self.stop_token_ids),
                logprobs=logprobs is not None,
                top_logprobs=logprobs or 0,
                prompt_logprobs=prompt_logprobs,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                logit_bias=logit_bias,
            )
            for choice in range(self.n)
        ]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | Token | list[Token]]
    """A text, token ids, or a list of either; mixtures are rejected by `launcher/server/request_body.py`."""
    max_tokens: Annotated[int, Meta(ge=0, le=_MAX_INTEGER)] | None = None
    """0 decodes nothing; used to score an echoed prompt."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        GenerationRequest.__post_init__(self)
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(self.prompts)} prompts, but must hold 1 to {MAX_PROMPTS}")

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, as texts or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]  # type: ignore[list-item]
        return prompt  # type: ignore[return-value]


class TextPart(Struct, frozen=True, kw_only=True):
    """One part of a message's content."""

    type: str
    text: str | None = None

    def __post_init__(self) -> None:
        if self.type != "text":
            raise ValueError(f"type is {self.type[:100]!r}, but only parts of type 'text' are supported")
        if self.text is None:
            raise ValueError("text is missing")


class ToolFunction(Struct, frozen=True, kw_only=True):
    """The function of a tool call in the message history."""

    name: str
    arguments: str | dict[str, Any] = "{}"
    """OpenAI sends JSON in a string; some clients send the object itself."""


class ToolCall(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call made by the assistant earlier in the conversation."""

    function: ToolFunction
    id: str | None = None
    type: str = "function"

    def to_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates expect."""
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": self.function.arguments}}
        return call if self.id is None else {"id": self.id, **call}


class Message(Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role[:100]!r}, but has to be one of {', '.join(ROLES)}")
        if self.function_call is not None:
            raise ValueError("function_call is not supported: send tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the role assistant, not to {self.role}")

    def to_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates expect."""
        content = self.content if isinstance(self.content, str) else "".join(part.text or "" for part in self.content or [])
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.to_template() for call in self.tool_calls]
        message |= {key: value for key, value in (("name", self.name), ("tool_call_id", self.tool_call_id)) if value is not None}
        return message


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        GenerationRequest.__post_init__(self)
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise ValueError(f"messages holds {len(self.messages)} messages, but must hold 1 to {MAX_MESSAGES}")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")

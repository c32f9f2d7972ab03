"""Request bodies of the OpenAI API: fields, types, ranges, and their translation to sampling parameters.

Decoding is in `launcher/server/request_body.py`; whether a prompt fits the context is checked by the request planner.
"""

import secrets
from typing import Annotated, Any

from msgspec import Meta, Struct

from launcher.server.chat_messages import Message, NamedChoice, Tool, check_tools
from launcher.server.structured_output import ResponseFormat, StructuredOutputs, combine
from model.engine.sampling_params import SamplingParams

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_TOKEN_IDS = 256
MAX_PROMPTS = 128
MAX_MESSAGES = 10_000
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 300
MAX_BAD_WORDS = 256
MAX_PROMPT_LOGPROBS = 400_000
"""Maximum number of prompt log-probabilities per request, including the top alternatives; each takes about 250 bytes."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default."""
_MAX_STOP_LENGTH = 1000
_MAX_ID_DIGITS = 10
_LEAST_TEMPERATURE = 1e-6
"""Lower temperatures decode greedily: no other token has a chance, and the scaled logits would overflow."""

NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    "user": (),
    "metadata": (),
    "store": (),
    "service_tier": (),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (None,),
    "prediction": (None,),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "chat_template": (None,),
    "kv_transfer_params": (None,),
    "guided_decoding_backend": (),
    "request_id": (),
    "cache_salt": (),
}
"""Unimplemented fields of OpenAI and vLLM with the values, besides null, that have no effect; an empty tuple accepts any value."""

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

    # Of vLLM. ------------------------------------------------------------------------------------------------------------------------
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Sample among tokens at least this likely, relative to the most likely one."""
    min_tokens: Annotated[int, Meta(ge=0, le=_MAX_INTEGER)] = 0
    """New tokens before one that ends the answer."""
    bad_words: list[str] = []
    """Texts that the answer must not contain."""
    allowed_token_ids: list[Token] | None = None
    """The only ids to choose from."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, at the end of the answer."""
    skip_special_tokens: bool = True
    """Leave out the text of special tokens."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=_MAX_INTEGER)] | None = None
    """Use only the last tokens of a prompt; -1: as many as fit."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Report log-probabilities of the prompt with this many alternatives."""
    return_token_ids: bool = False
    """Report token ids of prompt and answer."""
    priority: Annotated[int, Meta(ge=-_MAX_INTEGER, le=_MAX_INTEGER)] = 0
    """Among the queued requests of one client, lower values go first."""
    response_format: ResponseFormat | None = None
    """OpenAI's limit on the form of the text."""
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if len(self.stops) > MAX_STOPS or any(not 0 < len(stop) <= _MAX_STOP_LENGTH for stop in self.stops):
            raise ValueError(f"stop takes up to {MAX_STOPS} texts, none of them empty or longer than {_MAX_STOP_LENGTH} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids holds {len(self.stop_token_ids)} ids, but the maximum is {MAX_STOP_TOKEN_IDS}")
        if len(self.logit_bias) > MAX_BIASES or not all(
            key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS for key in self.logit_bias
        ):
            raise ValueError(f"logit_bias takes up to {MAX_BIASES} token ids, as strings of digits, each with a bias from -100 to 100")
        if len(self.bad_words) > MAX_BAD_WORDS or any(not 0 < len(word.strip()) <= _MAX_STOP_LENGTH for word in self.bad_words):
            raise ValueError(
                f"bad_words takes up to {MAX_BAD_WORDS} texts, none of them empty or longer than {_MAX_STOP_LENGTH} characters"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty, but must hold at least one id")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not available in a stream")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is 0, but has to be at least 1, or -1")
        self.form  # noqa: B018 - raises ValueError

    @property
    def form(self) -> StructuredOutputs:
        """The limit on the form of the text."""
        names = ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")
        return combine(self.response_format, self.structured_outputs, {name: getattr(self, f"guided_{name}") for name in names})

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_choices(self) -> int:
        """Number of sequences to generate per prompt."""
        return self.n

    def plan_sampling(
        self,
        new_tokens: int,
        logprobs: int | None,
        *,
        prompt_logprobs: int | None = None,
        bad_words: tuple[tuple[int, ...], ...] = (),
        grammar: str = "",
    ) -> list[SamplingParams]:
        """Build the sampling parameters of each choice, with consecutive seeds. Raises RequestError.

        `logprobs` is the number of top alternatives to report, or None to report no log-probabilities; `prompt_logprobs` the same for the
        prompt. `bad_words` are token ids.
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
                top_logprobs=max(logprobs or 0, prompt_logprobs or 0),
                prompt_logprobs=prompt_logprobs is not None,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                logit_bias=logit_bias,
                min_p=self.min_p,
                min_tokens=self.min_tokens,
                bad_words=bad_words,
                allowed_token_ids=tuple(sorted(set(self.allowed_token_ids or ()))),
                grammar=grammar,
            )
            for choice in range(self.num_choices)
        ]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | Token | list[Token]]
    """A text, token ids, or a list of either; mixtures are rejected by `launcher/server/request_body.py`."""
    max_tokens: Annotated[int, Meta(ge=0, le=_MAX_INTEGER)] | None = None
    """0 decodes nothing; used to score an echoed prompt."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """Generate this many choices per prompt and return the n most likely ones, by log-probability per token."""
    add_special_tokens: bool = True
    """Begin a prompt given as text with the begin token, if the model was trained with it."""

    def __post_init__(self) -> None:
        GenerationRequest.__post_init__(self)
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, but has to be at least n, which is {self.n}")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of is not available in a stream")
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(self.prompts)} prompts, but must hold 1 to {MAX_PROMPTS}")

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, as texts or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]  # type: ignore[list-item]
        return prompt  # type: ignore[return-value]

    @property
    def num_choices(self) -> int:
        """Number of sequences to generate per prompt."""
        return self.best_of or self.n


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[Tool] = []
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """vLLM extension: continue the last message instead of beginning a new one."""
    add_special_tokens: bool = False
    """vLLM extension: begin the prompt with the begin token although the template writes its own."""
    echo: bool = False
    """vLLM extension: begin the answer with the last message, if it is the assistant's."""
    chat_template_kwargs: dict[str, Any] = {}
    """vLLM extension: additional variables of the chat template."""
    documents: list[dict[str, Any]] | None = None
    """vLLM extension: documents for the chat template."""
    reasoning_effort: str | None = None
    """A variable of the chat template."""
    include_reasoning: bool = True
    """vLLM extension: report the reasoning of the answer."""

    def __post_init__(self) -> None:
        GenerationRequest.__post_init__(self)
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise ValueError(f"messages holds {len(self.messages)} messages, but must hold 1 to {MAX_MESSAGES}")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt: false")
        check_tools(self.tools, self.tool_choice)
        if self.forced_choice and not self.form.is_empty:
            raise ValueError("tool_choice 'required' or a named function excludes response_format and structured_outputs")

    @property
    def forced_choice(self) -> str | NamedChoice | None:
        """The tool choice if it demands a call."""
        return self.tool_choice if self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice) else None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

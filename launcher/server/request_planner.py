"""Conversion of request bytes to token ids and sampling parameters: fields, chat template, tokenizer, and context limits.

Runs in the threads of `launcher/server/request_threads.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.server.api_answers import ChoiceText, Naming, TextRules, token_text
from launcher.server.api_requests import DEFAULT_COMPLETION_TOKENS, MAX_PROMPT_LOGPROBS, ChatRequest, CompletionRequest
from launcher.server.bounded_log import OnceLog
from launcher.server.chat_prompts import ChatPrompt, ChatPrompts
from launcher.server.engine_client import EngineClient
from launcher.server.errors import ServiceError
from launcher.server.inflight_requests import NewToken
from launcher.server.messages_requests import MessagesRequest
from launcher.server.request_body import BodyReader
from launcher.server.responses_requests import ResponsesRequest
from launcher.server.token_requests import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest, build_tokens
from model.engine.grammar import Grammars
from model.engine.request import Request, check_length, check_memory, check_request
from model.engine.sampling_params import SamplingParams
from model.text.bad_words import encode_bad_words
from model.text.tokenizer import Tokenizer
from parallel.errors import RequestError

_LONGEST_CUT = 4
"""Size limit of a prompt that is cut, as a multiple of the longest one that is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One planned request, as text and token ids."""

    naming: Naming
    adapter: str | None
    """Name of the LoRA adapter to use."""
    prompts: Sequence[tuple[int, ...]]
    choices: Sequence[tuple[tuple[int, ...], SamplingParams]]
    """Token ids and sampling parameters of each choice; n choices per prompt."""
    texts: Sequence[ChoiceText]
    echo: Sequence[str]
    """Echoed text that precedes each choice."""
    has_echo: bool
    """Whether the answer begins with the prompt."""
    scored: Sequence[list[NewToken]]
    """Prompt tokens of each choice received so far, if their log-probabilities are reported."""
    new_tokens: int
    """Maximum new tokens per choice; 0 evaluates only the prompt."""
    num_returned: int
    """Number of choices to return per prompt, the most likely ones."""
    logprobs: int | None
    """Number of top alternatives to report with each token; None reports no log-probabilities."""
    prompt_logprobs: int | None
    """The same for the prompt."""
    with_token_ids: bool
    with_reasoning: bool
    short_call_ids: bool
    priority: int
    with_usage: bool
    is_stream: bool
    timeout_seconds: float


class RequestPlanner:
    """Plans the requests of one server."""

    def __init__(self, front: EngineClient, tokenizer: Tokenizer, chat: ChatPrompts, max_seconds: float, *, strict_fields: bool) -> None:
        """`max_seconds` caps the deadline of a request. `strict_fields` rejects unknown fields instead of ignoring them."""
        self._front, self._tokenizer, self._chat, self._max_seconds = front, tokenizer, chat, max_seconds
        served = front.served
        self._grammars = Grammars(lambda: tokenizer, served.config.vocab_size, served.job.eos_token_ids)
        self._fingerprint = f"tandem-{front.served.version}"
        self._unknown_fields = OnceLog()
        note = None if strict_fields else self._note_unknown
        self._completions, self._chats = BodyReader(CompletionRequest, note), BodyReader(ChatRequest, note)
        self._responses, self._messages = BodyReader(ResponsesRequest, note), BodyReader(MessagesRequest, note)
        self._texts, self._conversations = BodyReader(TokenizeRequest, note), BodyReader(TokenizeChatRequest, note)
        self._tokens = BodyReader(DetokenizeRequest, note)

    def plan_completion(self, raw: bytes) -> PlannedRequest:
        """Plan a completion. Raises ServiceError, RequestError."""
        body = self._completions.read(raw)
        self.check_model(body.model)
        self._front.dispatcher.check_count(len(body.prompts) * body.num_choices)
        new_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        prompts = self._encode(body, body.prompts, new_tokens, add_special_tokens=body.add_special_tokens)
        return self._plan(body, prompts, new_tokens, body.logprobs, has_echo=body.echo)

    def plan_chat(self, raw: bytes) -> PlannedRequest:
        """Plan a chat completion. Raises ServiceError, RequestError."""
        return self._plan_conversation(self._chats.read(raw))

    def plan_response(self, raw: bytes) -> tuple[ResponsesRequest, PlannedRequest]:
        """Plan a request of /v1/responses. Raises ServiceError, RequestError."""
        body = self._responses.read(raw)
        return body, self._plan_conversation(_translate(body))

    def plan_message(self, raw: bytes) -> PlannedRequest:
        """Plan a request of /v1/messages. Raises ServiceError, RequestError."""
        return self._plan_conversation(_translate(self._messages.read(raw)))

    def tokenize(self, raw: bytes) -> dict[str, Any]:
        """Answer a request of /tokenize, which names a text or a conversation. Raises ServiceError, RequestError."""
        body: TokenizeRequest | TokenizeChatRequest
        if b'"messages"' in raw and b'"prompt"' not in raw:
            body = self._conversations.read(raw)
            text = self._chat.build(body).text
        else:
            body = self._texts.read(raw)
            text = body.prompt
        self.check_model(body.model)
        self._check_size(0, text, self._room)
        ids = tuple(self._tokenizer.encode(text, body.add_special_tokens))
        return build_tokens(self._tokenizer, ids, self._front.served.job.context_tokens, with_texts=body.return_token_strs)

    def detokenize(self, raw: bytes) -> dict[str, Any]:
        """Answer a request of /detokenize. Raises ServiceError, RequestError."""
        body = self._tokens.read(raw)
        self.check_model(body.model)
        unknown = next((token for token in body.tokens if token >= self._front.served.config.vocab_size), None)
        if unknown is not None:
            raise RequestError(f"tokens holds id {unknown}, but the vocabulary has {self._front.served.config.vocab_size}")
        return {"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)}

    def _plan_conversation(self, body: ChatRequest) -> PlannedRequest:
        self.check_model(body.model)
        limit = body.max_completion_tokens or body.max_tokens
        prompt = self._chat.build(body)
        (ids,) = self._encode(body, [prompt.text], limit or 1, add_special_tokens=body.add_special_tokens)
        new_tokens = limit or max(1, self._room - len(ids))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._plan(body, [ids], new_tokens, logprobs, has_echo=False, chat=prompt)

    def _note_unknown(self, name: str, hint: str) -> None:
        words = f"unknown field {name!r} in a request is ignored{hint} (reported once; --strict-fields refuses such requests)"
        self._unknown_fields.report(name, f"warning: {words}")

    def _plan(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        logprobs: int | None,
        *,
        has_echo: bool,
        chat: ChatPrompt | None = None,
    ) -> PlannedRequest:
        served, num_choices, adapter = self._front.served, body.num_choices, self.check_model(body.model)
        echo_logprobs = logprobs if has_echo else None
        prompt_logprobs = body.prompt_logprobs if echo_logprobs is None else max(echo_logprobs, body.prompt_logprobs or 0)
        grammar = body.form.build() if chat is None else chat.grammar
        if grammar:
            self._check_grammar(grammar)
        all_params = body.plan_sampling(
            max(1, new_tokens),
            0 if logprobs is None and num_choices > body.n else logprobs,
            prompt_logprobs=prompt_logprobs,
            bad_words=encode_bad_words(self._tokenizer, body.bad_words),
            grammar=grammar,
        )
        choices: list[tuple[tuple[int, ...], SamplingParams]] = []
        for number, ids in enumerate(prompts):
            token_request = Request(number, ids, all_params[0])  # the choices of a prompt differ only in their seeds
            check_request(token_request, served.job.context_tokens, served.config.vocab_size)
            check_memory(token_request, served.num_blocks, served.job.block_size)
            choices.extend((ids, params) for params in all_params)
        unknown = next((token for token, _ in all_params[0].logit_bias if token >= served.config.vocab_size), None)
        if unknown is not None:
            raise RequestError(f"logit_bias names id {unknown}, but the vocabulary has {served.config.vocab_size}")
        is_scored = prompt_logprobs is not None
        num_scored = (1 + (prompt_logprobs or 0)) * num_choices * sum(map(len, prompts)) if is_scored else 0
        if num_scored > MAX_PROMPT_LOGPROBS:
            words = f"{num_scored} log-probabilities of prompts, but the maximum is {MAX_PROMPT_LOGPROBS}: send fewer prompts"
            raise RequestError(f"{'echo with logprobs' if has_echo else 'prompt_logprobs'} requests {words}")
        echo = [self._tokenizer.decode(ids) if has_echo else "" for ids in prompts]
        if isinstance(body, ChatRequest) and body.echo and body.messages[-1].role == "assistant":
            echo = [body.messages[-1].text]
        rules = self._build_rules(body, chat)
        return PlannedRequest(
            adapter=adapter,
            naming=Naming.new(adapter or served.name, is_chat=chat is not None, fingerprint=self._fingerprint),
            prompts=prompts,
            choices=choices,
            texts=[ChoiceText(self._tokenizer, ids, rules, None if chat is None else chat.build_reader()) for ids, _ in choices],
            has_echo=has_echo,
            echo=[text for text in echo for _ in range(num_choices)],
            scored=[[NewToken(ids[0], None, None, ())] if is_scored else [] for ids, _ in choices],
            new_tokens=new_tokens,
            num_returned=body.n,
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
            with_token_ids=body.return_token_ids,
            with_reasoning=not isinstance(body, ChatRequest) or body.include_reasoning,
            short_call_ids=chat is not None and chat.short_ids,
            priority=body.priority,
            with_usage=body.includes_usage,
            is_stream=body.stream,
            timeout_seconds=min(body.timeout or self._max_seconds, self._max_seconds),
        )

    def _check_grammar(self, grammar: str) -> None:
        try:
            self._grammars.check(grammar)
        except RequestError as error:
            raise RequestError(f"the schema, pattern or grammar of the answer cannot be used: {error}") from None

    def _build_rules(self, body: CompletionRequest | ChatRequest, chat: ChatPrompt | None) -> TextRules:
        special = self._tokenizer.special_ids
        marks = frozenset[str]() if chat is None else chat.marks
        return TextRules(
            stops=body.stops,
            stop_token_ids=frozenset(body.stop_token_ids) - frozenset(self._front.served.job.eos_token_ids),
            keeps_stop=body.include_stop_str_in_output,
            shown_ids=frozenset(token for token in special if not body.skip_special_tokens or token_text(self._tokenizer, token) in marks),
        )

    def _encode(
        self, body: CompletionRequest | ChatRequest, prompts: Sequence[str | list[int]], new_tokens: int, *, add_special_tokens: bool
    ) -> list[tuple[int, ...]]:
        """Tokenize texts; token ids pass through. Raises RequestError for a text that is too long to tokenize or not valid Unicode."""
        kept = body.truncate_prompt_tokens
        if kept is None:
            return [self._encode_one(number, one, add_special_tokens) for number, one in enumerate(prompts)]
        kept = max(1, self._room - new_tokens) if kept == -1 else kept
        rows: list[tuple[int, ...]] = []
        for number, one in enumerate(prompts):
            if isinstance(one, str):
                self._check_size(number, one, _LONGEST_CUT * self._room)
                one = self._tokenizer.encode(one, add_special_tokens)
            rows.append(tuple(one[-kept:]))
        return rows

    def _encode_one(self, number: int, prompt: str | list[int], add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        self._check_size(number, prompt, self._room)
        ids = tuple(self._tokenizer.encode(prompt, add_special_tokens))
        check_length(number, len(ids), self._front.served.job.context_tokens)  # before the next one is tokenized
        return ids

    def _check_size(self, number: int, prompt: str, room: int) -> None:
        """Raise RequestError for a text that is not valid Unicode, or longer than `room` of the longest tokens."""
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError:
            raise RequestError("the text holds a lone surrogate, which is not a character") from None
        # Reject by the longest possible token first: tokenizing an oversized text would take seconds.
        if size > room and size > (most := room * self._longest_token):
            words = f"{most}: {room} tokens of at most {self._longest_token} bytes each"
            raise RequestError(f"prompt {number} has {size} bytes, but this model can take at most {words}")

    @cached_property
    def _longest_token(self) -> int:
        """Length of the longest token of the vocabulary, in bytes."""
        return max((len(self._tokenizer.token_bytes(token_id)) for token_id in range(self._tokenizer.vocab_size)), default=1) or 1

    @property
    def _room(self) -> int:
        """Maximum number of tokens of a sequence."""
        served = self._front.served
        return min(served.job.context_tokens, served.num_blocks * served.job.block_size + 1)

    def check_model(self, name: str | None) -> str | None:
        """Return the LoRA adapter that a request's `model` names; None for the base model. Raises ServiceError for any other name."""
        served = self._front.served
        if name is None or name == served.name:
            return None
        if name not in served.adapters:
            known = " and ".join(map(repr, (served.name, *served.adapters)))
            verb = "are" if served.adapters else "is"
            raise ServiceError(404, f"the model {name[:100]!r} is not served here; {known} {verb}", param="model", code="model_not_found")
        return name


def _translate(body: ResponsesRequest | MessagesRequest) -> ChatRequest:
    try:
        return body.to_chat()
    except ValueError as error:
        raise ServiceError(400, str(error), param=str(error).partition(" ")[0]) from None

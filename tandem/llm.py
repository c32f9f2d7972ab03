"""`tandem.LLM`: a model on separate ranks, started by any program: scripts, notebooks, threads.

The ranks belong to an engine process that never imports the program's main module; this process needs no PyTorch. A rank that dies is
restarted, and the answers continue with the same tokens.
"""

import operator
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from launcher.commands.engine_process import EngineProcess
from launcher.commands.preparation import prepare
from launcher.environment.detection import read_environment
from launcher.server import engine_messages
from launcher.server.api_answers import ChoiceText, TextRules, token_text
from launcher.server.chat_rendering import ChatRenderer
from launcher.server.engine_messages import Token
from launcher.settings.options import EngineOptions
from launcher.settings.python_options import read_options
from model.text.tokenizer import LlamaTokenizer, Tokenizer, read_tokenizer
from parallel.errors import CheckpointError, ConfigError, RequestError
from tandem.lora import LoRARequest, read_adapters
from tandem.outputs import CompletionOutput, Logprob, RequestOutput, StreamedToken
from tandem.sampling_params import SamplingParams

if TYPE_CHECKING:
    from launcher.server.inflight_requests import NewToken

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
"""One message of a conversation: {"role": ..., "content": ...}."""
Adapters = LoRARequest | Sequence[LoRARequest | None] | None
"""The LoRA adapter of all prompts of a call, or of each."""


class LLM:
    """A model that separate ranks hold until `close`. Thread-safe: concurrent calls share the batch."""

    def __init__(self, model: str | os.PathLike[str], workers: int | None = None, **options: Any) -> None:
        """Start `workers` ranks and load the model: a path of any supported format, or a Hugging Face id.

        `options` are those of `tandem serve` that describe the model and its ranks, with underscores: `dtype`, `max_batch_size`,
        `kv_cache_dtype`, `log_dir`, `max_restarts`, `threads_per_rank`, ... `workers` defaults to MS_WORKER_NUM, then to the YAML's
        model_parallel, then to 1. `lora` maps the names of LoRA adapters to their folders; `generate` and `chat` choose one with
        `lora_request`.

        Raises InputError before anything starts, RanksFailedError if the ranks fail.
        """
        given = {"checkpoint": os.fspath(model), "workers": workers, **read_adapters(options)}
        self._engine: EngineProcess | None = None
        asked = read_options(EngineOptions, given, "LLM")
        _require_program()
        self._engine = EngineProcess(_list_values(prepare(asked)))
        self._close = weakref.finalize(self, self._engine.close)
        opened = self._engine.opened
        self.world_size = opened.world_size
        """Number of ranks."""
        self.context_tokens = opened.context_tokens
        """Maximum tokens of a prompt and its answer."""
        self._adapters = opened.adapters
        self._name, self._tokenizer_path = opened.name, Path(opened.tokenizer_path)
        self._tokenizer = read_tokenizer(
            self._tokenizer_path, add_bos=opened.add_bos, add_eos=opened.add_eos, chat_template=opened.chat_template
        )
        self._renderer: ChatRenderer | None = None

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        lora_request: Adapters = None,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        lora_request: Adapters = None,
    ) -> Iterator[StreamedToken]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        lora_request: Adapters = None,
    ) -> list[RequestOutput] | Iterator[StreamedToken]:
        """Continue one or many prompts; returns their answers in order, or yields single tokens as they are decoded if `stream`.

        `sampling_params` holds for all prompts, or is a list with one entry for each; so does `lora_request`, one of the adapters given as
        `lora` when this LLM was created. Ctrl-C and leaving the stream cancel the rest of
        the call; later calls are not affected.

        Raises InputError for a prompt or parameter that cannot be used, RanksFailedError if the ranks failed and no restart is left,
        RunError if the LLM is closed or a sequence cannot be continued.
        """
        asked = [self._read_prompt(number, prompt) for number, prompt in enumerate(_list_prompts(prompts))]
        return self._run(asked, sampling_params, lora_request, stream=stream)

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        lora_request: Adapters = None,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        lora_request: Adapters = None,
    ) -> Iterator[StreamedToken]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        lora_request: Adapters = None,
    ) -> list[RequestOutput] | Iterator[StreamedToken]:
        """Answer one or many conversations with the model's chat template; as `generate` otherwise.

        Raises InputError if the model has no usable chat template or the template rejects the messages.
        """
        self._require_open()
        texts = [self._render(number, conversation) for number, conversation in enumerate(_list_conversations(messages))]
        asked = [_Prompt(text, tuple(self._tokenizer.encode(text, add_special_tokens=False))) for text in texts]
        return self._run(asked, sampling_params, lora_request, stream=stream)

    def get_tokenizer(self) -> LlamaTokenizer:
        """Return the model's tokenizer, with `encode` and `decode`."""
        return LlamaTokenizer(self._tokenizer)

    def close(self) -> None:
        """Stop the ranks and wait until they have exited; unfinished calls raise RunError. Also at exit and by garbage collection."""
        if self._renderer is not None:
            self._renderer.close()
        self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self._name!r}, workers={self.world_size})"

    def _require_open(self) -> EngineProcess:
        assert self._engine is not None
        self._engine.require_alive()
        return self._engine

    def _read_prompt(self, number: int, prompt: Prompt) -> "_Prompt":
        """Tokenize a prompt. Raises InputError."""
        if isinstance(prompt, Mapping):
            known = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
            if not known:
                raise RequestError(f"prompt {number} has the keys {', '.join(map(str, prompt))}, but prompt or prompt_token_ids is needed")
            prompt = prompt[known[0]]
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise RequestError(f"prompt {number} holds a lone surrogate, which is not a character") from None
            return _Prompt(prompt, tuple(self._tokenizer.encode(prompt)))
        try:
            ids = tuple(operator.index(token) for token in cast("Sequence[int]", prompt))
        except TypeError:
            raise RequestError(f"prompt {number} is a {type(prompt).__name__}, but a text or a list of token ids is needed") from None
        return _Prompt(None, ids)

    def _render(self, number: int, messages: Sequence[Message]) -> str:
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer_path, self._tokenizer.settings)
        if self._renderer.reason is not None:
            raise CheckpointError(f"chat needs a chat template, but {self._renderer.reason}; generate needs none")
        return self._renderer.render([_read_message(number, place, message) for place, message in enumerate(messages)])

    def _run(
        self,
        prompts: "list[_Prompt]",
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: Adapters,
        *,
        stream: bool,
    ) -> list[RequestOutput] | Iterator[StreamedToken]:
        engine = self._require_open()
        params = _spread_params(sampling_params, len(prompts))
        adapters = self._spread_adapters(lora_request, len(prompts))
        sequences: list[engine_messages.Sequence] = []
        answers: list[_Answer] = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            for choice, planned in enumerate(one.plan_choices(self._plan_length(number, prompt, one))):
                sequences.append(engine_messages.Sequence(number, list(prompt.ids), planned, adapters[number]))
                answers.append(_Answer(number, choice, prompt, one, self._tokenizer))
        tokens = self._follow(engine, sequences, answers)
        if stream:
            return tokens
        for _ in tokens:
            pass
        outputs: list[list[CompletionOutput]] = [[] for _ in prompts]
        for answer in answers:
            outputs[answer.number].append(answer.output)
        return [
            RequestOutput(str(number), prompt.find_text(self._tokenizer), list(prompt.ids), outputs[number])
            for number, prompt in enumerate(prompts)
        ]

    def _follow(
        self, engine: EngineProcess, sequences: list[engine_messages.Sequence], answers: "list[_Answer]"
    ) -> Iterator[StreamedToken]:
        """Run the sequences and yield their tokens. Holds this LLM: its ranks run as long as a stream is read."""
        if not sequences:
            return
        with engine.submit(sequences) as call:
            for number, token in call:
                streamed = answers[number].push(token)
                if streamed.finish_reason:
                    call.stop(number)
                yield streamed

    def _spread_adapters(self, lora_request: Adapters, count: int) -> list[str | None]:
        """Return the adapter of each prompt. Raises RequestError for one that is not loaded."""
        several = [lora_request] * count if lora_request is None or isinstance(lora_request, LoRARequest) else list(lora_request)
        if len(several) != count:
            raise RequestError(f"lora_request has {len(several)} entries, but there are {count} prompts")
        return [None if one is None else one.find_name(self._adapters) for one in several]

    def _plan_length(self, number: int, prompt: "_Prompt", params: SamplingParams) -> int:
        room = self.context_tokens - len(prompt.ids)
        if not prompt.ids:
            raise RequestError(f"prompt {number} has no tokens; write at least one word")
        if room < 1:
            raise RequestError(f"prompt {number} has {len(prompt.ids)} tokens, but the context is {self.context_tokens}: shorten it")
        return room if params.max_tokens is None else min(params.max_tokens, room)


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str | None
    ids: tuple[int, ...]

    def find_text(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self.ids) if self.text is None else self.text


class _Answer:
    """One answer to a prompt, as its tokens arrive."""

    def __init__(self, number: int, choice: int, prompt: _Prompt, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.number, self.output = number, CompletionOutput(choice)
        self._tokenizer = tokenizer
        rules = TextRules(stops=params.stops, stop_token_ids=frozenset(params.stop_token_ids or ()))
        self._text = ChoiceText(tokenizer, prompt.ids, rules)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def push(self, token: Token) -> StreamedToken:
        """Add a token."""
        piece, output, logprobs = self._text.push(cast("NewToken", token)), self.output, None  # equal fields
        output.text += piece.text
        output.token_ids.append(token.token_id)
        if output.logprobs is not None and output.cumulative_logprob is not None:
            logprobs = self._list_logprobs(token)
            output.logprobs.append(logprobs)
            output.cumulative_logprob += logprobs[token.token_id].logprob
        if piece.finish_reason:
            output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason
        return StreamedToken(self.number, output.index, token.token_id, piece.text, logprobs, piece.finish_reason)

    def _list_logprobs(self, token: Token) -> dict[int, Logprob]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top_logprobs, 1)}
        assert token.logprob is not None, "log-probabilities were requested"
        values = {token.token_id: token.logprob, **dict(token.top_logprobs)}
        return {token_id: Logprob(value, ranks.get(token_id), token_text(self._tokenizer, token_id)) for token_id, value in values.items()}


def _require_program() -> None:
    """Raise ConfigError in a rank: each rank would start more ranks."""
    groups = sys.modules.get("launcher.worker.rank_group")  # not loaded: this process has not joined, and PyTorch need not be imported
    group = groups.find_group() if groups is not None else None
    launcher = group.launcher if group is not None else "none"
    if launcher == "none":
        launcher = read_environment().launcher
    if launcher != "none":
        raise ConfigError(
            f"LLM starts its own ranks, but {launcher} started this process as one of several: use AutoModel, or start the program alone"
        )


def _list_values(options: EngineOptions) -> dict[str, Any]:
    """Return the options that are set, paths as texts."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    given = {name: value for name, value in values.items() if value is not None and name != "model_id"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _list_prompts(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [cast("Prompt", prompts)]
    try:
        several = list(prompts)
    except TypeError:
        raise RequestError(f"prompts is a {type(prompts).__name__}, but a text, token ids, or a list of them is needed") from None
    return [several] if several and hasattr(several[0], "__index__") else several


def _spread_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Return the parameters of each prompt. Raises RequestError."""
    if params is None:
        params = SamplingParams()
    several = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(several) != count:
        raise RequestError(f"sampling_params has {len(several)} entries, but there are {count} prompts")
    for one in several:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params is a {type(one).__name__}, but tandem.SamplingParams is needed")
        one.check()
    return several


def _list_conversations(messages: Any) -> list[Sequence[Message]]:
    several = list(messages) if isinstance(messages, list | tuple) else []
    conversations = [several] if several and isinstance(several[0], Mapping) else several
    if not isinstance(messages, list | tuple) or not all(isinstance(one, list | tuple) for one in conversations):
        raise RequestError(f"messages is {messages!r:.100}, but a list of messages, or of such lists, is needed")
    return conversations


def _read_message(conversation: int, place: int, message: Any) -> dict[str, Any]:
    """Return a message for the template, with the text parts of its content joined. Raises RequestError."""
    where = f"message {place} of conversation {conversation}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} is {message!r:.100}, but a dictionary with role and content is needed")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        if any(not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
            raise RequestError(f"{where} has a part that is not text: only parts of type text are supported")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise RequestError(f"{where} has a {type(content).__name__} as its content, but a text is needed")
    return {**message, "content": content}

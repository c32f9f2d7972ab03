"""`tandem.LLM`: a model on separate ranks, started by any program: scripts, notebooks, threads.

The ranks belong to an engine process that never imports the program's main module; this process needs no PyTorch. A rank that dies is
restarted, and the answers continue with the same tokens.
"""

import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from launcher.commands.engine_process import EngineProcess
from launcher.commands.preparation import prepare
from launcher.environment.detection import read_environment
from launcher.server import engine_messages
from launcher.server.chat_rendering import ChatRenderer
from launcher.settings.options import EngineOptions
from launcher.settings.python_options import read_options
from model.text.bad_words import encode_bad_words
from model.text.tokenizer import LlamaTokenizer, read_tokenizer
from parallel.errors import CheckpointError, ConfigError, RequestError
from tandem.answers import GrowingAnswer
from tandem.lora import LoRARequest, read_adapters
from tandem.outputs import CompletionOutput, RequestOutput, StreamedToken
from tandem.prompts import Message, Prompt, PromptTokens, list_conversations, list_prompts, read_message, read_prompt, read_tools
from tandem.sampling_params import SamplingParams
from tandem.speculative_config import read_speculative_config

Adapters = LoRARequest | Sequence[LoRARequest | None] | None
"""The LoRA adapter of all prompts of a call, or of each."""


class LLM:
    """A model that separate ranks hold until `close`. Thread-safe: concurrent calls share the batch."""

    def __init__(self, model: str | os.PathLike[str], workers: int | None = None, **options: Any) -> None:
        """Start `workers` ranks and load the model: a path of any supported format, or a Hugging Face id.

        `options` are those of `tandem serve` that describe the model and its ranks, with underscores: `dtype`, `max_batch_size`,
        `kv_cache_dtype`, `log_dir`, `max_restarts`, `threads_per_rank`, `draft_model`, ... `workers` defaults to MS_WORKER_NUM, then to
        the YAML's model_parallel, then to 1. vLLM's `speculative_config` is understood. `lora` maps the names of LoRA
        adapters to their folders; `generate` and `chat` choose one with `lora_request`.

        Raises InputError before anything starts, RanksFailedError if the ranks fail.
        """
        given = {"checkpoint": os.fspath(model), "workers": workers, **read_speculative_config(read_adapters(options))}
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
        asked = [read_prompt(number, prompt, self._tokenizer) for number, prompt in enumerate(list_prompts(prompts))]
        return self._run(asked, sampling_params, lora_request, stream=stream)

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora_request: Adapters = None,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora_request: Adapters = None,
    ) -> Iterator[StreamedToken]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora_request: Adapters = None,
    ) -> list[RequestOutput] | Iterator[StreamedToken]:
        """Answer one or many conversations with the model's chat template; as `generate` otherwise.

        `tools`: functions that the model may call, in OpenAI's form. The answer's text holds calls as the model writes them.

        Raises InputError if the model has no usable chat template or the template rejects the messages.
        """
        self._require_open()
        functions = read_tools(tools)
        texts = [self._render(number, conversation, functions) for number, conversation in enumerate(list_conversations(messages))]
        asked = [PromptTokens(text, tuple(self._tokenizer.encode(text, add_special_tokens=False))) for text in texts]
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

    def _render(self, number: int, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer_path, self._tokenizer.settings)
        if self._renderer.reason is not None:
            raise CheckpointError(f"chat needs a chat template, but {self._renderer.reason}; generate needs none")
        return self._renderer.render([read_message(number, place, message) for place, message in enumerate(messages)], tools)

    def _run(
        self,
        prompts: list[PromptTokens],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: Adapters,
        *,
        stream: bool,
    ) -> list[RequestOutput] | Iterator[StreamedToken]:
        engine = self._require_open()
        params = _spread_params(sampling_params, len(prompts))
        adapters = self._spread_adapters(lora_request, len(prompts))
        sequences: list[engine_messages.Sequence] = []
        answers: list[GrowingAnswer] = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            limit, bad_words = one.read_limit(), encode_bad_words(self._tokenizer, one.bad_words or ())
            for choice, planned in enumerate(one.plan_choices(self._plan_length(number, prompt, one))):
                sequences.append(
                    engine_messages.Sequence(number, list(prompt.ids), {**planned, "bad_words": bad_words}, limit, adapters[number])
                )
                answers.append(GrowingAnswer(number, choice, prompt, one, self._tokenizer))
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
        self, engine: EngineProcess, sequences: list[engine_messages.Sequence], answers: list[GrowingAnswer]
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

    def _plan_length(self, number: int, prompt: PromptTokens, params: SamplingParams) -> int:
        room = self.context_tokens - len(prompt.ids)
        if not prompt.ids:
            raise RequestError(f"prompt {number} has no tokens; write at least one word")
        if room < 1:
            raise RequestError(f"prompt {number} has {len(prompt.ids)} tokens, but the context is {self.context_tokens}: shorten it")
        return room if params.max_tokens is None else min(params.max_tokens, room)


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

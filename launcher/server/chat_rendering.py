"""Rendering of chat messages to prompt text, off the event loop and with resource limits.

An unusable template disables chat and records the reason; completions still work.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.server.errors import ServiceError
from launcher.server.template_process import TemplateProcess
from model.text.chat_templates import ChatTemplates, load_chat_templates
from model.text.tokenizer_settings import TokenizerSettings
from parallel.errors import InputError, RequestError

_MARK = "(the system prompt)"

_WAIT_SECONDS = 30.0
"""Maximum time a conversation waits for others to be rendered; each may take up to 15 s."""


class ChatRenderer:
    """The chat templates of one checkpoint."""

    def __init__(self, path: Path, settings: TokenizerSettings, process: TemplateProcess | None = None) -> None:
        """Read and check the templates in `path` (from the checkpoint, or next to the tokenizer)."""
        self.reason: str | None = None
        """Why chat is disabled, or None if it is enabled."""
        self.words = "no"
        """Description of the templates' origin."""
        self._templates: ChatTemplates | None = None
        self._system_prompt: Future[str | None] | None = None
        self._process = process or TemplateProcess()
        # A single thread: a slow template delays other conversations but nothing else.
        self._thread = ThreadPoolExecutor(1, "chat-template")
        if find_spec("jinja2") is None:
            self.reason = "jinja2 is not installed; install tandem-launcher[serve]"
            return
        try:
            self._templates, self.words = load_chat_templates(path, settings)
            for source in self._templates.sources.values():
                self._thread.submit(self._process.check, source, self._templates.where).result()
        except InputError as error:
            self.reason = str(error)
            return
        # On the thread, so that neither the start nor the first request waits for it.
        self._system_prompt = self._thread.submit(self._find_system_prompt)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        more: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Render the prompt, including special tokens and the generation prompt. `more` holds additional template variables.

        Blocks until the template is rendered, so do not call it on the event loop. Raises RequestError if the template rejects the messages
        or fails, and ServiceError if chat is disabled or too many conversations are waiting.
        """
        templates, source = self._choose(with_tools=bool(tools))
        variables = templates.build_variables(messages, tools, documents, more, add_generation_prompt=add_generation_prompt)
        try:
            work = self._thread.submit(self._run, source, templates.where, variables)
            return work.result(_WAIT_SECONDS)
        except FutureTimeoutError:
            work.cancel()
            raise ServiceError(503, "too many conversations wait for the chat template; try again", kind="server_error") from None

    def read_source(self, *, with_tools: bool) -> str:
        """Return the template of a conversation with or without tools. Raises ServiceError, RequestError if there is none."""
        return self._choose(with_tools=with_tools)[1]

    def _choose(self, *, with_tools: bool) -> tuple[ChatTemplates, str]:
        if self.reason is not None or self._templates is None:
            raise ServiceError(400, f"chat is disabled for this model: {self.reason}; use /v1/completions", code="chat_disabled")
        return self._templates, self._templates.choose(with_tools=with_tools)

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that the template adds to a conversation without one; None if there is none, or it is not known yet."""
        return self._system_prompt.result() if self._system_prompt is not None and self._system_prompt.done() else None

    def _find_system_prompt(self) -> str | None:
        assert self._templates is not None
        source, question = self._templates.choose(with_tools=False), {"role": "user", "content": "Hello"}
        try:
            given, default = (
                self._run(source, self._templates.where, self._templates.build_variables(messages, add_generation_prompt=True))
                for messages in ([{"role": "system", "content": _MARK}, question], [question])
            )
        except (InputError, RequestError):
            return None
        # Where the template has its own system prompt, it stands between the same texts as the given one.
        before, found, after = given.partition(_MARK)
        if not found or not default.startswith(before) or not default.endswith(after) or len(default) < len(before) + len(after):
            return None
        return default[len(before) : len(default) - len(after)] or None

    def close(self) -> None:
        """Terminate the template process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._process.close()

    def _run(self, source: str, where: str, variables: Mapping[str, Any]) -> str:
        try:
            return self._process.render(source, where, variables)
        except (RecursionError, ValueError) as error:
            if isinstance(error, InputError):
                raise RequestError(str(error)) from None
            raise RequestError("the conversation is nested too deeply for a chat template") from None

"""The prompts and conversations that `LLM` takes, read into texts and token ids."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from model.text.tokenizer import Tokenizer
from parallel.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
"""One message of a conversation: {"role": ..., "content": ...}."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A tokenized prompt."""

    text: str | None
    """Its text; None if it was given as token ids."""
    ids: tuple[int, ...]

    def find_text(self, tokenizer: Tokenizer) -> str:
        """Return its text, decoded if it was given as token ids."""
        return tokenizer.decode(self.ids) if self.text is None else self.text


def read_prompt(number: int, prompt: Prompt, tokenizer: Tokenizer) -> PromptTokens:
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
        return PromptTokens(prompt, tuple(tokenizer.encode(prompt)))
    try:
        ids = tuple(operator.index(token) for token in cast("Sequence[int]", prompt))
    except TypeError:
        raise RequestError(f"prompt {number} is a {type(prompt).__name__}, but a text or a list of token ids is needed") from None
    return PromptTokens(None, ids)


def list_prompts(prompts: Any) -> list[Prompt]:
    """Return one prompt, or several, as a list. Raises RequestError."""
    if isinstance(prompts, str | Mapping):
        return [cast("Prompt", prompts)]
    try:
        several = list(prompts)
    except TypeError:
        raise RequestError(f"prompts is a {type(prompts).__name__}, but a text, token ids, or a list of them is needed") from None
    return [several] if several and hasattr(several[0], "__index__") else several


def list_conversations(messages: Any) -> list[Sequence[Message]]:
    """Return one conversation, or several, as a list. Raises RequestError."""
    several = list(messages) if isinstance(messages, list | tuple) else []
    conversations = [several] if several and isinstance(several[0], Mapping) else several
    if not isinstance(messages, list | tuple) or not all(isinstance(one, list | tuple) for one in conversations):
        raise RequestError(f"messages is {messages!r:.100}, but a list of messages, or of such lists, is needed")
    return conversations


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the functions that the template describes, in OpenAI's form; None without any. Raises RequestError."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"tools is {tools!r:.100}, but a list of dictionaries is needed")
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f'tool {number} is {tool!r:.100}, but {{"type": "function", "function": {{"name": ...}}}} is needed')
    return [dict(tool) for tool in tools] or None


def read_message(conversation: int, place: int, message: Any) -> dict[str, Any]:
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

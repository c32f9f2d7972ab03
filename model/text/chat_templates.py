"""The chat templates of a checkpoint: finding them, choosing one, and the variables it gets besides the conversation.

`chat_template.py` runs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.gguf_header import read_gguf_header
from model.spec.json_file import read_optional_object, read_optional_text
from model.spec.quoting import quote
from model.text.chat_template import build_variables
from model.text.tokenizer_settings import TokenizerSettings
from parallel.errors import CheckpointError, RequestError

LLAMA_2_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('after an optional system message, roles have to alternate: user, assistant, user, ...') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- (bos_token or '') + '[INST] ' + ((system if loop.index0 == 0 else '') + message['content']).strip() + ' [/INST]' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' + message['content'].strip() + ' ' + (eos_token or '') -}}
  {%- else -%}
    {{- raise_exception('a system message can only be the first one') -}}
  {%- endif -%}
{%- endfor -%}"""
"""The format of Llama-2-Chat's training (Meta's `chat_completion`): each pair of turns between begin and end tokens."""
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
_PROCESSOR_FILE = "chat_template.json"
_DEFAULT, _TOOL_USE = "default", "tool_use"
_MAX_TEMPLATES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplates:
    """The templates of a checkpoint."""

    sources: Mapping[str, str]
    """By name."""
    special_tokens: Mapping[str, Any]
    """Variables of every conversation: special tokens by role, and `additional_special_tokens`."""
    where: str
    """Their origin, for messages."""

    def choose(self, *, with_tools: bool) -> str:
        """Return the template source for a conversation with or without tools. Raises RequestError when there is none."""
        if with_tools and _TOOL_USE in self.sources:
            return self.sources[_TOOL_USE]
        if _DEFAULT in self.sources:
            return self.sources[_DEFAULT]
        names = ", ".join(sorted(map(quote, self.sources)))
        raise RequestError(f"{self.where} has the chat templates {names}, but none is called 'default'")

    def build_variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        more: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> dict[str, Any]:
        """Build the template's variables for a conversation; see `chat_template.build_variables`."""
        return build_variables(
            messages, self.special_tokens, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt, more=more
        )


def load_chat_templates(path: Path, settings: TokenizerSettings) -> tuple[ChatTemplates, str]:
    """Load the template of the settings, the checkpoint's, or Llama-2's; also return a description.

    Raises CheckpointError for malformed files.
    """
    own = settings.chat_template
    found = read_chat_templates(path) if own is None else {_DEFAULT: own}
    tokens: dict[str, Any] = {role: token.content for role, token in settings.special_tokens.items() if token is not None}
    extra = settings.extra_special_tokens or settings.listed_special_tokens
    if extra:
        tokens["additional_special_tokens"] = [token.content for token in extra]
    if found is None:
        return ChatTemplates(sources={_DEFAULT: LLAMA_2_TEMPLATE}, special_tokens=tokens, where="Llama-2"), "Llama-2's"
    words = ("the checkpoint's", str(path)) if own is None else ("the YAML's", "processor.tokenizer.chat_template")
    return ChatTemplates(sources=found, special_tokens=tokens, where=words[1]), words[0]


def read_chat_templates(path: Path) -> dict[str, str] | None:
    """Read the templates in a folder or .gguf file, by name; None if there are none.

    Template files override those of tokenizer_config.json. Raises CheckpointError for malformed files.
    """
    if path.suffix == ".gguf":
        return _read_gguf_templates(path)
    folder = path if path.is_dir() else path.parent
    files = {_DEFAULT: folder / TEMPLATE_FILE}
    if (folder / TEMPLATE_FOLDER).is_dir():
        files |= {file.name.removesuffix(".jinja"): file for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))[:_MAX_TEMPLATES]}
    texts = {name: read_optional_text(file) for name, file in files.items()}
    found = {name: text for name, text in texts.items() if text is not None}
    if found:
        return found
    for name in ("tokenizer_config.json", _PROCESSOR_FILE):
        raw = read_optional_object(folder / name).get("chat_template")
        if raw is not None:
            return _read_named(raw, folder / name)
    return None


def _read_named(raw: Any, path: Path) -> dict[str, str]:
    """Read one template, or several given as a list of named templates or as an object."""
    if isinstance(raw, str):
        return {_DEFAULT: raw}
    if isinstance(raw, list) and all(isinstance(one, dict) for one in raw):
        pairs = [(one.get("name"), one.get("template")) for one in raw]
    else:
        pairs = list(raw.items()) if isinstance(raw, dict) else []
    found = {name: source for name, source in pairs if isinstance(name, str) and isinstance(source, str)}
    if not found or len(pairs) > _MAX_TEMPLATES or any(not isinstance(part, str) for pair in pairs for part in pair):
        raise CheckpointError(f"{path}: chat_template is {quote(raw)}, but a text, or a list of templates with names, is needed")
    return found


def _read_gguf_templates(path: Path) -> dict[str, str] | None:
    prefix = "tokenizer.chat_template"
    metadata = read_gguf_header(path).metadata
    found = {key: value for key, value in metadata.items() if key == prefix or key.startswith(f"{prefix}.")}
    for key, value in found.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: {key} is {quote(value)}, but a text is needed")
    return {key.removeprefix(prefix).removeprefix(".") or _DEFAULT: value for key, value in found.items()} or None

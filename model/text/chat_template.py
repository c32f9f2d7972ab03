"""From the messages of a conversation to the text that the model was trained to see: the chat template of the checkpoint.

Templates are Jinja programs out of files, so they run in a sandbox, with the functions that transformers gives them. Knows texts; the
ids are the tokenizer's affair.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from model.checkpoint.gguf_header import read_gguf_header
from model.text.tokenizer import Tokenizer
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
    {{- bos_token + '[INST] ' + ((system if loop.index0 == 0 else '') + message['content']).strip() + ' [/INST]' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
  {%- else -%}
    {{- raise_exception('a system message can only be the first one') -}}
  {%- endif -%}
{%- endfor -%}"""
"""How Llama-2-Chat was trained (Meta's `chat_completion`): each pair of turns between begin and end tokens."""
TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """One template."""

    def __init__(self, source: str, tokenizer: Tokenizer, where: str) -> None:
        """`where` it comes from, for messages. Raises CheckpointError when it is no template."""
        # Only a server needs it, and importing it takes time.
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._where = where
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
        self._errors: tuple[type[Exception], ...] = (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
            OverflowError,
        )
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template of {where} is no Jinja template: {error}") from None
        self._tokens = {
            role: "" if token_id is None else tokenizer.decode([token_id], skip_special_tokens=False)
            for role, token_id in (("bos_token", tokenizer.bos_token_id), ("eos_token", tokenizer.eos_token_id))
        }

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text, special tokens included, with the opening of the answer. Raises RequestError where the template refuses."""
        try:
            return str(self._template.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **self._tokens))
        except self._errors as error:
            raise RequestError(f"the chat template of {self._where} does not take these messages: {error}") from None


def read_chat_template(path: Path) -> str | None:
    """The template that a folder, or a .gguf file, brings along; None where there is none. Raises CheckpointError for broken files."""
    if path.suffix == ".gguf":
        found = read_gguf_header(path).metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None
    folder = path if path.is_dir() else path.parent
    try:
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / TEMPLATE_FILE} cannot be read: {error}") from None
    settings = folder / "tokenizer_config.json"
    try:
        raw = json.loads(settings.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{settings} cannot be read: {error}") from None
    found = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def load_chat_template(path: Path, tokenizer: Tokenizer) -> tuple[ChatTemplate, str]:
    """The checkpoint's template, else Llama-2's own; and which it is, in words."""
    source = read_chat_template(path)
    if source is None:
        return ChatTemplate(LLAMA_2_TEMPLATE, tokenizer, "Llama-2"), "Llama-2's"
    return ChatTemplate(source, tokenizer, str(path)), "the checkpoint's"


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

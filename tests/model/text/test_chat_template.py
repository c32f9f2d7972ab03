"""Chat templates: Llama-2's own against transformers', those of checkpoints, and what a template must not do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model.text.chat_template import LLAMA_2_TEMPLATE, ChatTemplate, load_chat_template, read_chat_template
from model.text.tokenizer import Tokenizer, read_tokenizer
from parallel.errors import CheckpointError, RequestError

LLAMA_2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""What stands in the tokenizer_config.json of Llama-2-7b-chat-hf."""

SYSTEM = {"role": "system", "content": " You are brief.\n"}
FIRST = {"role": "user", "content": "  Who are you? "}
ANSWER = {"role": "assistant", "content": " A llama.\n"}
SECOND = {"role": "user", "content": "And\nthen <s>?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer whose begin and end tokens are <s> and </s>, with no template."""
    backend = Backend(models.BPE({"a": 3}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path)
    return tmp_path


def write_settings(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))


@pytest.fixture
def build(folder: Path) -> Callable[[str], ChatTemplate]:
    tokenizer = read_tokenizer(folder)
    return lambda source: ChatTemplate(source, tokenizer, "here")


@pytest.mark.parametrize(
    "messages",
    [[FIRST], [SYSTEM, FIRST], [FIRST, ANSWER, SECOND], [SYSTEM, FIRST, ANSWER, SECOND, ANSWER, FIRST], [FIRST, ANSWER]],
    ids=lambda messages: " ".join(message["role"] for message in messages),
)
def test_llama_2s_template_is_the_one_that_transformers_applies(
    build: Callable[[str], ChatTemplate], folder: Path, messages: list[dict[str, str]]
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    expected = theirs.apply_chat_template(messages, chat_template=LLAMA_2_CHAT, tokenize=False, add_generation_prompt=True)
    assert build(LLAMA_2_TEMPLATE).render(messages) == expected
    assert build(LLAMA_2_CHAT).render(messages) == expected


def test_llama_2s_template_in_full(build: Callable[[str], ChatTemplate]) -> None:
    assert build(LLAMA_2_TEMPLATE).render([SYSTEM, FIRST, ANSWER, SECOND]) == (
        "<s>[INST] <<SYS>>\n You are brief.\n\n<</SYS>>\n\n  Who are you? [/INST] A llama. </s><s>[INST] And\nthen <s>? [/INST]"
    )


@pytest.mark.parametrize("messages", [[ANSWER], [SYSTEM, ANSWER], [FIRST, SECOND], [FIRST, ANSWER, ANSWER]])
def test_a_wrong_order_of_roles_is_refused(build: Callable[[str], ChatTemplate], messages: list[dict[str, str]]) -> None:
    for source in (LLAMA_2_TEMPLATE, LLAMA_2_CHAT):
        with pytest.raises(RequestError, match=r"the chat template of here does not take these messages: .*alternat"):
            build(source).render(messages)
    with pytest.raises(RequestError, match="does not take these messages"):
        build(LLAMA_2_TEMPLATE).render([FIRST, SYSTEM])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(build: Callable[[str], ChatTemplate], source: str) -> None:
    with pytest.raises(RequestError, match="does not take these messages"):
        build(source).render([FIRST])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ messages[0]['content'].__class__ }}",
        "{{ messages[0]['content'] | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    ],
)
def test_what_a_template_may_not_see_is_not_there(build: Callable[[str], ChatTemplate], source: str) -> None:
    try:
        assert build(source).render([FIRST]) == ""
    except RequestError:
        pass


def test_the_callers_messages_are_left_as_they_are(build: Callable[[str], ChatTemplate]) -> None:
    messages = [dict(FIRST)]
    build("{% set messages = [] %}{% for m in messages %}{% endfor %}").render(messages)
    assert messages == [FIRST]


def test_a_text_that_looks_like_a_template_stays_a_text(build: Callable[[str], ChatTemplate]) -> None:
    hostile = {"role": "user", "content": "{{ 7 * 7 }}{% raw %}<&>"}
    assert build("{{ messages[0].content }}").render([hostile]) == hostile["content"]


def test_templates_have_what_transformers_gives_them(build: Callable[[str], ChatTemplate]) -> None:
    source = (
        "{%- for message in messages %}\n"
        "    {%- if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "    {{- bos_token + (message | tojson) + eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '>' }}{% endif %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert build(source).render([{"role": "user", "content": "é<"}, SECOND]) == '<s>{"role": "user", "content": "é<"}</s>>4'


def test_what_is_no_template_is_the_checkpoints_fault(build: Callable[[str], ChatTemplate]) -> None:
    with pytest.raises(CheckpointError, match="the chat template of here is no Jinja template"):
        build("{% for %}")


def test_a_tokenizer_without_begin_and_end_gives_empty_ones(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    assert ChatTemplate("{{ bos_token }}|{{ eos_token }}", tokenizer, "here").render([FIRST]) == "|"


def write_gguf(path: Path, **values: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_string(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_templates_are_found_wherever_checkpoints_have_them(folder: Path) -> None:
    assert read_chat_template(folder) is None
    write_settings(folder, chat_template="one")
    assert read_chat_template(folder) == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    write_settings(folder, chat_template=named)
    assert read_chat_template(folder) == "several"
    assert read_chat_template(folder / "tokenizer.json") == "several", "beside a tokenizer's file"
    (folder / "chat_template.jinja").write_text("a file é")
    assert read_chat_template(folder) == "a file é"
    write_settings(folder, chat_template=named[:1])
    (folder / "chat_template.jinja").unlink()
    assert read_chat_template(folder) is None
    assert read_chat_template(write_gguf(folder / "with.gguf", chat_template="from gguf")) == "from gguf"
    assert read_chat_template(write_gguf(folder / "without.gguf", pre="x")) is None


def test_files_that_cannot_be_read_are_told(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        read_chat_template(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        read_chat_template(folder)


def test_a_checkpoint_without_a_template_talks_as_llama_2(folder: Path) -> None:
    tokenizer: Tokenizer = read_tokenizer(folder)
    template, words = load_chat_template(folder, tokenizer)
    assert (words, template.render([FIRST])) == ("Llama-2's", "<s>[INST] Who are you? [/INST]")
    write_settings(folder, chat_template="{{ messages | length }}")
    template, words = load_chat_template(folder, tokenizer)
    assert (words, template.render([FIRST])) == ("the checkpoint's", "1")

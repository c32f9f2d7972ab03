"""Chat templates: Llama-2's own against transformers', those of checkpoints, and what a template must not do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model.text.chat_template import ChatTemplate, build_variables
from model.text.chat_templates import LLAMA_2_TEMPLATE, load_chat_templates, read_chat_templates
from model.text.tokenizer import read_tokenizer
from model.text.tokenizer_files import write_tokenizer
from model.text.tokenizer_settings import read_tokenizer_settings
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


class Renderer:
    """A template with the tokens of the folder."""

    def __init__(self, source: str) -> None:
        self._template = ChatTemplate(source, "here")

    def render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return self._template.render(build_variables(messages, {"bos_token": "<s>", "eos_token": "</s>"}, more=more))


@pytest.fixture
def build() -> Callable[[str], Renderer]:
    return Renderer


@pytest.mark.parametrize(
    "messages",
    [[FIRST], [SYSTEM, FIRST], [FIRST, ANSWER, SECOND], [SYSTEM, FIRST, ANSWER, SECOND, ANSWER, FIRST], [FIRST, ANSWER]],
    ids=lambda messages: " ".join(message["role"] for message in messages),
)
def test_llama_2s_template_is_the_one_that_transformers_applies(
    build: Callable[[str], Renderer], folder: Path, messages: list[dict[str, str]]
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    expected = theirs.apply_chat_template(messages, chat_template=LLAMA_2_CHAT, tokenize=False, add_generation_prompt=True)
    assert build(LLAMA_2_TEMPLATE).render(messages) == expected
    assert build(LLAMA_2_CHAT).render(messages) == expected


def test_llama_2s_template_in_full(build: Callable[[str], Renderer]) -> None:
    assert build(LLAMA_2_TEMPLATE).render([SYSTEM, FIRST, ANSWER, SECOND]) == (
        "<s>[INST] <<SYS>>\n You are brief.\n\n<</SYS>>\n\n  Who are you? [/INST] A llama. </s><s>[INST] And\nthen <s>? [/INST]"
    )


@pytest.mark.parametrize("messages", [[ANSWER], [SYSTEM, ANSWER], [FIRST, SECOND], [FIRST, ANSWER, ANSWER]])
def test_a_wrong_order_of_roles_is_refused(build: Callable[[str], Renderer], messages: list[dict[str, str]]) -> None:
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
def test_a_template_cannot_leave_its_sandbox(build: Callable[[str], Renderer], source: str) -> None:
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
def test_what_a_template_may_not_see_is_not_there(build: Callable[[str], Renderer], source: str) -> None:
    try:
        assert build(source).render([FIRST]) == ""
    except RequestError:
        pass


def test_the_callers_messages_are_left_as_they_are(build: Callable[[str], Renderer]) -> None:
    messages = [dict(FIRST)]
    build("{% set messages = [] %}{% for m in messages %}{% endfor %}").render(messages)
    assert messages == [FIRST]


def test_a_text_that_looks_like_a_template_stays_a_text(build: Callable[[str], Renderer]) -> None:
    hostile = {"role": "user", "content": "{{ 7 * 7 }}{% raw %}<&>"}
    assert build("{{ messages[0].content }}").render([hostile]) == hostile["content"]


def test_templates_have_what_transformers_gives_them(build: Callable[[str], Renderer]) -> None:
    source = (
        "{%- for message in messages %}\n"
        "    {%- if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "    {{- bos_token + (message | tojson) + eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '>' }}{% endif %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert build(source).render([{"role": "user", "content": "é<"}, SECOND]) == '<s>{"role": "user", "content": "é<"}</s>>4'


def test_what_is_no_template_is_the_checkpoints_fault(build: Callable[[str], Renderer]) -> None:
    with pytest.raises(CheckpointError, match="the chat template of here is not a valid Jinja template"):
        build("{% for %}")


def test_llama_2s_template_needs_no_begin_and_end() -> None:
    template = ChatTemplate(LLAMA_2_TEMPLATE, "here")
    assert template.render(build_variables([FIRST, ANSWER], {})) == "[INST] Who are you? [/INST] A llama. "


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ undefined_thing.x }}", "'undefined_thing' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages | tojson(indent=[]) }}", "does not take these messages"),
        ("{% for i in range(1000) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 10000 characters"),
    ],
)
def test_whatever_a_template_does_wrong_is_a_sentence(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(source, "here").render(build_variables([FIRST], {}), max_characters=10_000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def write_gguf(path: Path, values: dict[str, str]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_string(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_templates_are_found_wherever_checkpoints_have_them(folder: Path) -> None:
    assert read_chat_templates(folder) is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert read_chat_templates(folder) == {"default": "of a processor"}
    write_settings(folder, chat_template="one")
    assert read_chat_templates(folder) == {"default": "one"}
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    write_settings(folder, chat_template=named)
    assert read_chat_templates(folder) == {"tool_use": "tools", "default": "several"}
    assert read_chat_templates(folder / "tokenizer.json") == read_chat_templates(folder), "next to a tokenizer's file"
    write_settings(folder, chat_template={"default": "an object"})
    assert read_chat_templates(folder) == {"default": "an object"}
    (folder / "chat_template.jinja").write_text("a file é")
    assert read_chat_templates(folder) == {"default": "a file é"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    assert read_chat_templates(folder) == {"default": "a file é", "rag": "documents"}
    assert read_chat_templates(write_gguf(folder / "with.gguf", {"chat_template": "from gguf", "chat_template.tool_use": "t"})) == {
        "default": "from gguf",
        "tool_use": "t",
    }
    assert read_chat_templates(write_gguf(folder / "without.gguf", {"pre": "x"})) is None


def test_templates_travel_with_the_tokenizer(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("a file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    copy = folder / "copy"
    copy.mkdir()
    write_tokenizer(folder, copy)
    assert read_chat_templates(copy) == read_chat_templates(folder) == {"default": "a file", "rag": "documents"}


def test_the_template_for_tools_is_chosen_as_in_transformers(folder: Path) -> None:
    write_settings(folder, chat_template=[{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}])
    templates, words = load_chat_templates(folder, read_tokenizer_settings(folder))
    assert (templates.choose(with_tools=True), templates.choose(with_tools=False), words) == ("tools", "plain", "the checkpoint's")
    write_settings(folder, chat_template=[{"name": "tool_use", "template": "tools"}])
    templates, _ = load_chat_templates(folder, read_tokenizer_settings(folder))
    with pytest.raises(RequestError, match="has the chat templates 'tool_use', but none is called 'default'"):
        templates.choose(with_tools=False)


@pytest.mark.parametrize("value", [1, [], {}, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"default": 1}])
def test_what_cannot_be_a_template_is_refused(folder: Path, value: Any) -> None:
    write_settings(folder, chat_template=value)
    with pytest.raises(CheckpointError, match="but a text, or a list of templates with names, is needed"):
        read_chat_templates(folder)


def test_files_that_cannot_be_read_are_told(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        read_chat_templates(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8 text: byte 0 is 0xff"):
        read_chat_templates(folder)


def test_a_checkpoint_without_a_template_talks_as_llama_2(folder: Path) -> None:
    templates, words = load_chat_templates(folder, read_tokenizer(folder).settings)
    text = ChatTemplate(templates.choose(with_tools=False), "here").render(templates.build_variables([FIRST]))
    assert (words, text) == ("Llama-2's", "<s>[INST] Who are you? [/INST]")


# As transformers renders


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a <city> & more, naïvely",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call0001x", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [FIRST],
    "system": [SYSTEM, FIRST],
    "turns": [SYSTEM, FIRST, ANSWER, SECOND],
    "names": [{**FIRST, "name": "Ann"}, {**ANSWER, "name": "llama"}, {**SECOND, "name": "Bob"}],
    "tools": [
        SYSTEM,
        FIRST,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "call0001x", "content": '{"sun": true}'},
        {"role": "assistant", "content": "Sunny.", "reasoning": "It says so."},
        SECOND,
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": " here"}]}],
}
TEMPLATES = {
    "chatml": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message.content is string %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{- bos_token }}\n{%- set date = strftime_now('%d %b %Y')[:0] %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + date + system }}\n"
        "{%- if tools is not none %}\n{%- for t in tools %}\n{{- t | tojson(indent=4) }}\n{{- '\n\n' }}\n{%- endfor %}\n{%- endif %}\n"
        "{{- '<|eot_id|>' }}\n"
        "{%- for message in messages %}\n    {%- if 'tool_calls' in message %}\n"
        "        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('only one tool call') }}{%- endif %}\n"
        "        {%- set call = message.tool_calls[0].function %}\n"
        '        {{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}\n'
        "        {{- call.arguments | tojson }}\n        {{- '}' + eos_token }}\n"
        "    {%- elif message.role == 'tool' or message.role == 'ipython' %}\n"
        "        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}\n"
        "    {%- elif message.content is string %}\n        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
        "        {% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
    ),
    "mistral": (
        "{%- set ns = namespace(index=0, last=none) %}{{- bos_token }}"
        "{%- for m in messages | selectattr('role', 'in', ['user', 'assistant', 'tool']) %}{%- set ns.index = ns.index + 1 %}"
        "{%- if m.role == 'user' %}{%- if tools %}{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}{%- set tool = tool.function %}"
        "{{- '{' }}{%- for key, val in tool.items() if key != 'return' %}"
        "{%- if val is string %}{{- '\"' + key + '\": \"' + val + '\"' }}{%- else %}{{- '\"' + key + '\": ' + val | tojson }}{%- endif %}"
        "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}' }}{%- endfor %}{{- '][/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{{- '[INST] ' ~ m.content ~ '[/INST]' }}"
        "{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}{%- set out = call.function | tojson %}"
        "{{- out[:-1] }}{%- if call.id is defined and call.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}"
        "{{- ', \"id\": \"' + call.id + '\"}' }}{%- endfor %}{{- ']' + eos_token }}"
        "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' ~ m.content ~ ', \"call_id\": \"' ~ m.tool_call_id ~ '\"}' }}"
        "{%- else %}{{- ' ' ~ m.content ~ eos_token }}{%- endif %}{%- endfor %}{{- ns.index }}"
    ),
    "qwen": (
        "{%- if tools %}\n    {{- '<|im_start|>system\n' }}\n    {{- '# Tools\n<tools>' }}\n    {%- for tool in tools %}\n"
        '        {{- "\\n" }}\n        {{- tool | tojson(ensure_ascii=True, sort_keys=True, separators=(",", ":")) }}\n    {%- endfor %}\n'
        "    {{- '</tools><|im_end|>\n' }}\n{%- endif %}\n"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}\n'
        "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n    {%- if message.role == 'system' %}{%- continue %}{%- endif %}\n"
        "    {{- '<|im_start|>' + message.role + (' name=' + message.name if message.name else '') + '\n' }}\n"
        "    {%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}\n"
        "    {%- if message.content is string %}{{- message.content }}\n"
        "    {%- else %}{%- for part in message.content or [] %}{{- part.text }}{%- endfor %}{%- endif %}\n"
        "    {%- for call in message.tool_calls or [] %}{{- '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}{%- endfor %}\n"
        "    {{- '<|im_end|>\n' }}\n{%- endfor %}\n"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}{{- ns.last_query_index }}"
    ),
    "every token": (
        "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ cls_token is defined }}|{{ sep_token }}|{{ mask_token }}|"
        "{{ image_token }}|{{ messages | length }}|{{ documents is none }}|{{ dict(a=1, b=[2]) | tojson(indent='--') }}"
        "{% for d in documents or [] %}{{ d.title }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", list(CONVERSATIONS))
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_texts_are_those_of_transformers(folder: Path, template: str, name: str) -> None:
    from transformers import AutoTokenizer

    roles = {"unk_token": "<unk>", "pad_token": "</s>", "sep_token": "<sep>", "mask_token": "<mask>", "image_token": "<img>"}
    write_settings(folder, chat_template=TEMPLATES[template], tokenizer_class="PreTrainedTokenizerFast", **roles)
    theirs = AutoTokenizer.from_pretrained(folder)
    templates, _ = load_chat_templates(folder, read_tokenizer(folder).settings)
    for tools in (None, [WEATHER]):
        for documents in (None, [{"title": "A", "text": "B"}]):
            for more in ({}, {"enable_thinking": False}):
                expected = theirs.apply_chat_template(
                    CONVERSATIONS[name], tools=tools, documents=documents, tokenize=False, add_generation_prompt=True, **more
                )
                variables = templates.build_variables(CONVERSATIONS[name], tools, documents, more)
                assert ChatTemplate(templates.choose(with_tools=bool(tools)), "here").render(variables) == expected


CASES = {
    "20-template-generation-tag": "<|user|>Once upon a time<|a|>",
    "21-template-other-tokens": "<s><0x01>user<unk>Once upon a time<0x01>",
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_cases_of_templates_have_the_right_text(shared_dir: Path, case: str) -> None:
    folder = shared_dir / "cases" / case / "model"
    templates, _ = load_chat_templates(folder, read_tokenizer(folder).settings)
    variables = templates.build_variables([{"role": "user", "content": "Once upon a time"}])
    assert ChatTemplate(templates.choose(with_tools=False), "here").render(variables) == CASES[case]


def test_a_template_of_the_caller_takes_precedence(stories: Path, tmp_path: Path) -> None:
    """MindFormers' YAML files carry the template."""
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text("of the files")
    tokenizer = read_tokenizer(folder, chat_template="{{ bos_token }}of the YAML")
    templates, words = load_chat_templates(folder, tokenizer.settings)
    assert (dict(templates.sources), words) == ({"default": "{{ bos_token }}of the YAML"}, "the YAML's")
    assert templates.special_tokens["bos_token"] == "<s>"
    assert load_chat_templates(folder, read_tokenizer(folder).settings)[1] == "the checkpoint's"

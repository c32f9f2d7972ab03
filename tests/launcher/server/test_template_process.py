"""Hostile chat templates: each ends in bounded time with a sentence, and the process that runs them ends with its parent."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.server.chat_rendering import ChatRenderer
from launcher.server.errors import ServiceError
from launcher.server.template_process import TemplateProcess
from model.text.chat_template import ChatTemplate
from model.text.tokenizer_settings import read_tokenizer_settings
from parallel.errors import CheckpointError, InputError, RequestError

NUM_TEMPLATES = 1000
MESSAGES = [{"role": "user", "content": "Hi é 😀"}]
VARIABLES = {"messages": MESSAGES, "tools": None, "bos_token": "<s>", "add_generation_prompt": True}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = (
    "{{ 'a' * N }}",
    "{{ ('a' * N) | length }}",
    "{{ [0] * N }}",
    "{{ range(N) | list | length }}",
    "{{ N ** N }}",
    "{{ 'a' | center(N) }}",
    "{{ '%Nd' | format(1) }}",
    "{{ '{:>N}'.format(1) }}",
    "{{ lipsum(n=N) | length }}",
    "{{ (range(9999) | list * N) | sum }}",
    "{{ 'a'.ljust(N) }}",
    "{{ ('a ' * N) | wordwrap(1) | length }}",
    "{{ 'x' | indent(N) }}",
    "{{ strftime_now('%Y' * N) | length }}",
    "{{ ('[' * N) | tojson }}",
    "{% for i in range(N) %}{{ 'flood' * 9999 }}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(N) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(N) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{{ raise_exception('no' * N) }}",
    "{{ messages | map('string') | list * N | join }}",
)
WRONG = (
    "{{ 1 / 0 }}",
    "{{ 1 % 0 }}",
    "{{ [][1] }}",
    "{{ {}['a'] + 1 }}",
    "{{ 'a'.join(1) }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'é' | int + 'a' }}",
    "{{ '\\ud800' }}",
    "{{ namespace(__class__=1) }}",
    "{{ dict(1, 2, 3) }}",
    "{{ messages | tojson(indent=messages) }}",
    "{{ self() }}",
    "{{ caller() }}",
    "{{ 'a' | nothing }}",
    "{% generation %}",
    "{% break %}",
    "{{ '" + "9" * 5000 + "' | int + 0 }}",
)
NESTED = ("(", "[", "{'a':", "-", "not ", "{{", "{% if 1 %}", "{% for a in b %}", "{% generation %}", "{% raw %}", "a.", "a|b(", "'", "{#")


def make_hostile(number: int) -> str:
    chance = random.Random(number)
    kind = chance.randrange(100)
    if kind < 1:
        return ENDLESS
    if kind < 40:
        size = chance.choice((0, 3, 1000, 99_999, 10**7, 10**9, 10**12, 10**30))
        return chance.choice(GREEDY).replace("N", str(size))
    if kind < 60:
        return chance.choice(WRONG)
    if kind < 80:
        return chance.choice(("", "{{ ")) + chance.choice(NESTED) * chance.choice((1, 30, 1000, 20_000))
    parts = [
        chance.choice((*WRONG, "{% if ", "%}", "{{", "}}", "endfor", "x", "|", "(", "messages", "{% endif %}", "\n")) for _ in range(6)
    ]
    return "".join(parts)


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess(seconds=0.3, wall_seconds=60, memory_bytes=96_000_000, max_characters=1_000_000)
    yield process
    process.close()


def find_pid(process: TemplateProcess) -> int:
    started = process._process
    assert started is not None
    return started.pid


@pytest.mark.slow
def test_every_hostile_template_ends_with_a_sentence_or_a_text(process: TemplateProcess) -> None:
    refused, peak = 0, 0
    for number in range(NUM_TEMPLATES):
        source = make_hostile(number)
        start = time.monotonic()
        try:
            assert len(process.render(source, "here", VARIABLES)) <= 1_000_000
        except InputError as error:
            refused += 1
            assert 0 < len(str(error)) < 500 and "\n" not in str(error) and "here" in str(error), (source[:200], str(error))
        assert time.monotonic() - start < 70, source[:200]
        if number % 20 == 0 and process._process is not None:
            status = Path(f"/proc/{find_pid(process)}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
    assert NUM_TEMPLATES * 0.5 < refused < NUM_TEMPLATES * 0.95
    assert 5_000 < peak < 200_000, "kilobytes"
    assert process.render("{{ messages[0].content }}", "here", VARIABLES) == "Hi é 😀"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ENDLESS, r"took more than 0\.3 s of processor time"),
        ("{{ 'a' * 10 ** 9 }}", "needs too much memory"),
        ("{{ 1 / 0 }}", "does not take these messages: division by zero"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than 1000000 characters"),
        ("{{ range(10 ** 9) }}", "Range too big"),
    ],
)
def test_the_limits_are_named(process: TemplateProcess, source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        process.render(source, "here", VARIABLES)


def test_a_template_that_cannot_be_compiled_is_the_checkpoints_fault(process: TemplateProcess) -> None:
    for source in ("{% for %}", "(" * 10 + "{{ " + "(" * 5000):
        with pytest.raises(CheckpointError, match="the chat template of here"):
            process.check(source, "here")
    process.check("{{ messages }}", "here")


def test_one_small_process_is_used_again_and_replaced_when_it_has_ended(process: TemplateProcess) -> None:
    source = "{{ messages[0].content }}{{ tools is none }}"
    expected = ChatTemplate(source, "here").render(VARIABLES)
    assert process.render(source, "here", VARIABLES) == expected
    pid = find_pid(process)
    assert process.render(source, "here", VARIABLES) == expected
    assert find_pid(process) == pid
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    os.kill(pid, signal.SIGKILL)
    assert process.render(source, "here", VARIABLES) == expected
    assert find_pid(process) != pid


def wait_for_end(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("is_busy", [True, False])
def test_the_process_ends_with_a_killed_parent(is_busy: bool) -> None:
    program = f"""
import threading, time
from launcher.server.template_process import TemplateProcess
process = TemplateProcess(seconds=600, wall_seconds=600)
process.render("", "here", {{}})
print(process._process.pid, flush=True)
if {is_busy}:
    process.render({ENDLESS!r}, "here", {{}})
time.sleep(600)
"""
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3 if is_busy else 0)
    finally:
        parent.kill()
        parent.communicate()
    assert wait_for_end(pid)


def test_close_ends_the_process_even_in_a_loop() -> None:
    import threading

    process = TemplateProcess(seconds=600, wall_seconds=600)
    process.check("", "here")
    pid = find_pid(process)
    caught: list[str] = []

    def render() -> None:
        try:
            process.render(ENDLESS, "here", VARIABLES)
        except RequestError as error:
            caught.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    time.sleep(0.2)
    process.close()
    thread.join(20)
    assert not thread.is_alive() and caught and wait_for_end(pid)
    with pytest.raises(RequestError, match="shutting down"):
        process.render("", "here", VARIABLES)


def test_files_in_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "launcher", "json", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    process = TemplateProcess()
    try:
        assert process.render("{{ 1 }}", "here", {}) == "1"
    finally:
        process.close()


# The renderer of a server


def write_template(folder: Path, source: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": source}))
    return folder


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "is not a valid Jinja template"),
        (7, "chat_template is 7, but a text"),
        ("{{ ('a' * 10 ** 8) | upper }}", "needs too much memory"),
        ("{{ 9 | round(9) + 9 ** 99999999 }}", "processor time"),
        ({"tool_use": "{{ ( }}"}, "is not a valid Jinja template"),
    ],
)
def test_a_broken_template_disables_chat_with_a_reason(tmp_path: Path, source: Any, reason: str) -> None:
    chat = ChatRenderer(write_template(tmp_path, source), read_tokenizer_settings(tmp_path), TemplateProcess(seconds=0.3, wall_seconds=60))
    try:
        assert chat.reason is not None and reason in chat.reason
        with pytest.raises(ServiceError, match="chat is disabled for this model: ") as caught:
            chat.render(MESSAGES)
        assert caught.value.status == 400 and reason in str(caught.value)
    finally:
        chat.close()


def test_an_endless_template_leaves_the_event_loop_free(tmp_path: Path) -> None:
    source = "{% if messages[0].content == 'loop' %}" + ENDLESS + "{% endif %}{{ bos_token }}"
    chat = ChatRenderer(write_template(tmp_path, source), read_tokenizer_settings(tmp_path), TemplateProcess(seconds=0.5, wall_seconds=60))

    async def run() -> tuple[int, Any, str]:
        work = asyncio.create_task(asyncio.to_thread(chat.render, [{"role": "user", "content": "loop"}]))
        ticks = 0
        while not work.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, work.exception(), chat.render(MESSAGES)

    try:
        ticks, error, text = asyncio.run(run())
        assert ticks > 5 and isinstance(error, RequestError) and "processor time" in str(error) and text == "<s>"
    finally:
        chat.close()


def test_a_conversation_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    chat = ChatRenderer(write_template(tmp_path, "{{ messages }}"), read_tokenizer_settings(tmp_path))
    try:
        with pytest.raises(RequestError, match="nested too deeply"):
            chat.render([{"role": "user", "content": deep}])
    finally:
        chat.close()


OWN_SYSTEM_PROMPT = (
    "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (OWN_SYSTEM_PROMPT, "Be kind."),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}", None),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", None),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}", None),
    ],
)
def test_the_system_prompt_of_a_template_is_found(tmp_path: Path, source: str, found: str | None) -> None:
    chat = ChatRenderer(write_template(tmp_path, source), read_tokenizer_settings(tmp_path))
    try:
        chat.render(MESSAGES)  # Behind the search, on the same thread.
        assert chat.system_prompt == found
    finally:
        chat.close()

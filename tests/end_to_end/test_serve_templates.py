"""Chat templates that do harm, in a running server: chat is answered with a reason, completions and /health with what they always say."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.servers import Server

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

pytestmark = pytest.mark.slow

OPTIONS = ("--workers", "1", "--threads-per-rank", "1", "--dtype", "float32")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HARM = {
    "divide": "{{ 1 / 0 }}",
    "fill": "{{ 'a' * 3000000000 }}",
    "flood": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "recurse": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop": ENDLESS,
}


def copy(checkpoints: "Checkpoints", folder: Path, template: str) -> Path:
    shutil.copytree(checkpoints.float, folder / "tiny")
    (folder / "tiny" / "chat_template.jinja").write_text(template)
    return folder / "tiny"


def chat(server: Server, content: str) -> tuple[int, Any]:
    messages = [{"role": "user", "content": content}]
    status, _, answer = server.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 2, "temperature": 0})
    return status, answer


def test_a_harmful_template_neither_blocks_nor_outlives_the_server(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    branches = "".join(f"{{% if messages[0].content == '{word}' %}}{source}{{% endif %}}" for word, source in HARM.items())
    server = Server(tandem, "--checkpoint", copy(checkpoints, tmp_path, branches + "{{ messages[0].content }}"), *OPTIONS)
    try:
        server.wait_until_ready()
        reasons = {"divide": "division by zero", "fill": "too much memory", "flood": "characters", "recurse": "recursion"}
        for word, reason in reasons.items():
            status, answer = chat(server, word)
            assert status == 400 and reason in answer["error"]["message"], answer
        results: list[tuple[int, Any]] = []
        caller = threading.Thread(target=lambda: results.append(chat(server, "loop")))
        caller.start()
        longest = 0.0
        while caller.is_alive():
            start = time.monotonic()
            assert server.health == (200, "ok")
            longest = max(longest, time.monotonic() - start)
            time.sleep(0.05)
        assert longest < 3
        ((status, answer),) = results
        assert status == 400 and answer["error"]["message"].split(" took ")[1] in ("more than 5 s of processor time", "longer than 15 s")
        assert chat(server, "I love")[0] == 200
        assert server.complete("I love", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert "Traceback" not in server.stderr
        # Killed in the middle of a loop, it leaves nothing.
        threading.Thread(target=lambda: _ask_in_vain(server), daemon=True).start()
        time.sleep(0.5)
        os.kill(server.running.process.pid, signal.SIGKILL)
        assert server.running.wait_until_gone(30) == []
    finally:
        server.end()


def _ask_in_vain(server: Server) -> None:
    try:
        chat(server, "loop")
    except OSError:
        pass


def test_a_broken_template_disables_chat_only(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    server = Server(tandem, "--checkpoint", copy(checkpoints, tmp_path, "{% for %}"), *OPTIONS)
    try:
        server.wait_until_ready()
        assert "warning: chat is disabled: the chat template of " in server.stderr
        status, answer = chat(server, "Hi")
        assert (status, answer["error"]["code"]) == (400, "chat_disabled")
        assert "is not a valid Jinja template" in answer["error"]["message"]
        assert server.complete("I love", max_tokens=2)["usage"]["completion_tokens"] == 2
        os.kill(server.running.process.pid, signal.SIGTERM)
        assert server.running.wait_until_gone(60) == []
        assert "Traceback" not in server.stderr
    finally:
        server.end()

"""`tandem chat` on the tiny model with its messages on standard input: the answers are those of predict for the same text."""

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.end_to_end.conftest import SECONDS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

OPTIONS = ("--max-new-tokens", "12", "--dtype", "float32", "--threads-per-rank", "1")
MESSAGES = "I love tea\n/nothing\nand you?\n/reset\nand you?\n\n/exit\nnever read\n"


def test_a_conversation_on_standard_input(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    (folder / "messages").write_text(MESSAGES)
    command = [sys.executable, "-m", "launcher", "chat", checkpoints.float, "--workers", "2", "--log-dir", folder / "logs", *OPTIONS]
    running = tandem.start(command, stdin=folder / "messages")
    written, told = running.process.communicate(timeout=SECONDS)
    assert running.process.returncode == 0, told
    assert "unknown command /nothing" in told and "the conversation starts over" in told
    assert running.wait_until_gone(10) == [], "no rank is left"

    # Llama-2's template, since the checkpoint has none; predict adds the first <s> itself.
    first = _predict(tandem, checkpoints, "[INST] I love tea [/INST]")
    second = _predict(tandem, checkpoints, f"[INST] I love tea [/INST] {first.strip()} </s><s>[INST] and you? [/INST]")
    alone = _predict(tandem, checkpoints, "[INST] and you? [/INST]")
    assert written == f"{first}\n{second}\n{alone}\n"


def _predict(tandem: "Tandem", checkpoints: "Checkpoints", prompt: str) -> str:
    """The continuation, by one rank."""
    path = tandem.new_folder() / "prompts.jsonl"  # the model's text may hold characters that no command line does
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    outcome = tandem.predict("--checkpoint", checkpoints.float, "--workers", "1", *OPTIONS, "--prompts-file", path)
    return str(outcome.records[0]["text"])


def test_a_rank_of_a_launcher_does_not_chat(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    result: subprocess.CompletedProcess[str] = tandem.run("chat", checkpoints.float, **rank)
    assert result.returncode == 2
    assert result.stderr == "tandem: tandem chat needs a single process, but torchrun started this one as a rank\n"

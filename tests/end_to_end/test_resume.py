"""--resume: a command that was killed, given again, ends with the bytes of an undisturbed one."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

PROMPTS = ("I love Beijing, because", "A llama", "Two riders sit on one", "Huawei is a company")


def arguments(checkpoints: "Checkpoints", workers: int, *more: str) -> list[str | Path]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = (
        "--max-batch-size",
        "2",
        "--max-new-tokens",
        "12",
        "--ignore-eos",
        "--dtype",
        "float32",
        "--logprobs",
        "--threads-per-rank",
        "1",
    )
    return ["--checkpoint", checkpoints.float, "--workers", str(workers), *options, *prompts, *more]


@pytest.fixture(scope="module")
def undisturbed(tandem: "Tandem", checkpoints: "Checkpoints") -> "Outcome":
    return tandem.predict(*arguments(checkpoints, 2))


@pytest.mark.parametrize(("done", "workers"), [(1, 1), (3, 3)])
def test_a_run_goes_on_after_what_is_in_the_file(
    tandem: "Tandem", checkpoints: "Checkpoints", undisturbed: "Outcome", done: int, workers: int
) -> None:
    lines = undisturbed.jsonl.splitlines(keepends=True)
    folder = tandem.new_folder()
    (folder / "results.jsonl").write_text("".join(lines[-done:]) + lines[0][:40])  # the last ones, and a torn one
    result = tandem.run_command(tandem.predict_command(folder, *arguments(checkpoints, workers, "--resume")))
    assert result.returncode == 0, result.stderr
    assert (folder / "results.jsonl").read_text() == undisturbed.jsonl
    assert result.stdout == undisturbed.stdout


def test_nothing_is_started_when_all_is_done(tandem: "Tandem", checkpoints: "Checkpoints", undisturbed: "Outcome") -> None:
    folder = tandem.new_folder()
    (folder / "results.jsonl").write_text(undisturbed.jsonl)
    result = tandem.run_command(tandem.predict_command(folder, *arguments(checkpoints, 2, "--resume")))
    assert (result.returncode, result.stdout) == (0, undisturbed.stdout)
    assert "nothing to do: all 4 prompts are in" in result.stderr
    assert (folder / "results.jsonl").read_text() == undisturbed.jsonl and not (folder / "logs").exists()


def test_a_file_of_other_options_is_refused(tandem: "Tandem", checkpoints: "Checkpoints", undisturbed: "Outcome") -> None:
    folder = tandem.new_folder()
    (folder / "results.jsonl").write_text(undisturbed.jsonl)
    result = tandem.run_command(tandem.predict_command(folder, *arguments(checkpoints, 2, "--resume", "--max-new-tokens", "13")))
    assert result.returncode == 2 and "ended by length after 12 tokens, but 13 are asked for now" in result.stderr
    assert (folder / "results.jsonl").read_text() == undisturbed.jsonl
    plain = tandem.run("predict", *arguments(checkpoints, 2, "--resume"))
    assert plain.returncode == 2 and "--resume skips what is in the file of --output; give --output" in plain.stderr

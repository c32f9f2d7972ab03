"""`tandem predict --resume`: a run that was cut short ends like one that was not, with the same bits, on any number of ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

# One total length, so that long prompts end first: prompt 1, then 2, then 0.
PROMPTS = ("tea", "Huawei is a company that makes telephones. Two", "I love Beijing, because", "LLaMA is a")
TORN = '{"index": 3, "prompt": "LLa'


def _options(checkpoints: "Checkpoints") -> list[str | Path]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    files = ("--config", checkpoints.config, "--checkpoint", checkpoints.float)
    return [*files, "--dtype", "float32", "--max-length", "40", "--max-batch-size", "2", "--logprobs", *prompts]


@pytest.fixture(scope="module")
def undisturbed(tandem: "Tandem", checkpoints: "Checkpoints") -> "Outcome":
    """All four prompts in one run."""
    outcome = tandem.predict(*_options(checkpoints), "--workers", "1")
    counts = [len(record["token_ids"]) for record in outcome.records]
    assert len(counts) == len(PROMPTS) and len(outcome.texts) == len(PROMPTS)
    assert counts[1] < counts[2] < counts[0], "the prompts have to end in another order than theirs"
    return outcome


@pytest.mark.parametrize(("workers", "kept"), [("1", (1,)), ("2", (1, 2, 0)), ("3", (1, 2))])
def test_a_run_that_was_cut_ends_like_one_that_was_not(
    tandem: "Tandem", checkpoints: "Checkpoints", undisturbed: "Outcome", workers: str, kept: tuple[int, ...]
) -> None:
    folder, lines = tandem.new_folder(), undisturbed.jsonl.splitlines(keepends=True)
    results = folder / "results.jsonl"
    results.write_text("".join(lines[index] for index in kept) + TORN, encoding="utf-8")
    command = tandem.predict_command(folder, *_options(checkpoints), "--workers", workers, "--resume")
    result = tandem.run_command(command)
    assert result.returncode == 0, result.stderr
    assert results.read_bytes() == (undisturbed.folder / "results.jsonl").read_bytes()
    assert result.stdout == undisturbed.stdout
    assert "nothing to do" not in result.stderr


def test_a_run_that_was_not_cut_starts_no_rank(tandem: "Tandem", checkpoints: "Checkpoints", undisturbed: "Outcome") -> None:
    folder = tandem.new_folder()
    results = folder / "results.jsonl"
    results.write_text("".join(undisturbed.jsonl.splitlines(keepends=True)[index] for index in (1, 2, 0, 3)), encoding="utf-8")
    result = tandem.run_command(tandem.predict_command(folder, *_options(checkpoints), "--workers", "2", "--resume"))
    assert result.returncode == 0, result.stderr
    assert f"nothing to do: all 4 prompts are in {results}" in result.stderr
    assert result.stdout == undisturbed.stdout
    assert results.read_text(encoding="utf-8") == undisturbed.jsonl, "it is in order now"
    assert list((undisturbed.folder / "logs").rglob("worker*.log")), "a run with ranks leaves logs"
    assert list(folder.iterdir()) == [results]


def test_resume_without_output_is_refused(refuse: Callable[..., None]) -> None:
    refuse(
        lambda made, folder: ["predict", *_options(made), "--resume"],
        ["--resume skips prompts already in the --output file; give --output"],
        False,
    )


def test_results_of_other_prompts_are_refused_and_left_alone(refuse: Callable[..., None], undisturbed: "Outcome", tmp_path: Path) -> None:
    def make(made: "Checkpoints", folder: Path) -> list[str | Path]:
        shutil.copy(undisturbed.folder / "results.jsonl", folder)
        others = [word if word != PROMPTS[2] else "a llama" for word in _options(made)]
        return ["predict", *others, "--output", folder / "results.jsonl", "--resume"]

    words = ["results.jsonl, line 3: prompt 2 was 'I love Beijing, because', but is 'a llama' now", "--resume requires the same"]
    refuse(make, words, False)
    assert (tmp_path / "results.jsonl").read_text(encoding="utf-8") == undisturbed.jsonl


def test_only_the_first_node_prints_what_is_done(
    tandem: "Tandem",
    checkpoints: "Checkpoints",
    undisturbed: "Outcome",
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from launcher.cli.main import main

    folder = tandem.new_folder()
    (folder / "results.jsonl").write_text(undisturbed.jsonl)
    monkeypatch.setattr("launcher.commands.predict.run_job", lambda *arguments: 0)  # no other node is there to meet
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # the handlers of this process stay
    for number, printed in (("0", undisturbed.stdout), ("1", "")):
        nodes = ("--nnodes", "2", "--node-rank", number, "--master-addr", "127.0.0.1", "--master-port", "29400")
        command = tandem.predict_command(folder, *_options(checkpoints), "--workers", "2", "--resume", *nodes)
        monkeypatch.setattr("sys.argv", ["tandem", *map(str, command[command.index("predict") :])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code, capsys.readouterr().out) == (0, printed)

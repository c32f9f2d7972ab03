"""Weights that are replaced under a run, and nodes or ranks that have other weights of the same shapes: no answer comes of two models."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.end_to_end.servers import Server

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Running, Tandem

SECONDS = 90
FINGERPRINT = "[0-9a-f]{16}"
DECODING = ("--threads-per-rank", "1", "--dtype", "float32", "--max-batch-size", "1", "--max-new-tokens", "300", "--ignore-eos")


@pytest.fixture
def own(checkpoints: "Checkpoints", tmp_path: Path) -> Path:
    """The tiny checkpoint in a folder that the test may change."""
    return Path(shutil.copytree(checkpoints.float, tmp_path / "own"))


@pytest.fixture
def other(checkpoints: "Checkpoints", tmp_path: Path) -> Path:
    """Another model with tensors of the same names, shapes and types."""
    folder = Path(shutil.copytree(checkpoints.float, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_verdict(folder: Path) -> dict[str, Any]:
    """What a run left in its log folder."""
    verdict: dict[str, Any] = json.loads((folder / "logs" / "verdict.json").read_text())
    return verdict


def check_refusal(words: str, file: Path) -> None:
    """Both fingerprints are named, and the file."""
    found = re.search(
        rf"not restarted: the checkpoint was replaced during the run \({file} .*\): its fingerprint was ({FINGERPRINT}) at the start and "
        rf"is ({FINGERPRINT}) now; start again to use the new one",
        words,
    )
    assert found and found[1] != found[2], words


def test_a_run_is_not_restarted_on_replaced_weights(tandem: "Tandem", own: Path, other: Path) -> None:
    folder = tandem.new_folder()
    arguments = ("--checkpoint", own, "--workers", "2", *DECODING, "--max-restarts", "2")
    running = tandem.start(tandem.predict_command(folder, *arguments))
    assert running.process.stdout is not None and running.process.stdout.readline()
    os.replace(other / "model.safetensors", own / "model.safetensors")
    os.kill(running.find_ranks()[1], signal.SIGKILL)
    _, stderr = running.process.communicate(timeout=SECONDS)
    assert running.process.returncode == 1 and running.find_processes() == [], stderr
    verdict = read_verdict(folder)
    assert (verdict["first_failed_rank"], verdict["signal"], verdict["restarts_used"]) == (1, "SIGKILL", 0)
    for words in (verdict["exception"], stderr):
        check_refusal(words, own / "model.safetensors")


def test_an_answer_of_a_server_ends_with_an_error_when_its_weights_are_cut_and_a_rank_dies(tandem: "Tandem", own: Path) -> None:
    server = Server(tandem, "--checkpoint", own, "--workers", "2", "--threads-per-rank", "1", "--dtype", "float32")
    try:
        server.wait_until_ready()
        with server.stream("A llama", max_tokens=2000, ignore_eos=True, logprobs=0) as stream:
            begun = list(itertools.islice(stream, 5))
            os.truncate(own / "model.safetensors", 100_000)
            os.kill(server.running.find_ranks()[0], signal.SIGKILL)
            events = [*begun, *stream]
        assert "error" in events[-1] and not any("error" in event for event in events[:-1])
        assert server.running.process.wait(30) == 1
        assert server.running.wait_until_gone(5) == []
        verdict = read_verdict(server.folder)
        assert (verdict["first_failed_rank"], verdict["signal"]) == (0, "SIGKILL")
        words = f"not restarted: the checkpoint was replaced during the run and can no longer be opened (.*{own}.*): its fingerprint was"
        assert re.search(f"{words.replace('(', '[(]').replace(')', '[)]')} {FINGERPRINT} at the start", verdict["exception"]), verdict
        assert "Traceback" not in server.stderr
    finally:
        server.end()


REPLACING = """
import os, sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    import launcher.worker.rank

    plain = launcher.worker.rank.{function}

    def replace_and_go_on(*arguments, **options):
        if os.environ["RANK"] == "1":
            os.utime({file!r}, ns=(1, 1))
        return plain(*arguments, **options)

    launcher.worker.rank.{function} = replace_and_go_on
"""


@pytest.mark.parametrize("function", ["open_checkpoint", "load_model"])
def test_weights_that_are_replaced_while_ranks_start_or_load_are_not_used(
    tandem: "Tandem", own: Path, tmp_path: Path, function: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REPLACING.format(file=str(own / "model.safetensors"), function=function))
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[2]}"}
    folder = tandem.new_folder()
    command = tandem.predict_command(folder, "--checkpoint", own, "--workers", "2", *DECODING, "--max-restarts", "0")
    result = tandem.run_command(command, **paths)
    assert result.returncode == 1 and result.stdout == "", result.stderr
    verdict = read_verdict(folder)
    assert verdict["first_failed_rank"] in (0, 1)  # rank 0 compares the fingerprint too, and either may be the first to see it
    assert f"the checkpoint was replaced during the run ({own / 'model.safetensors'} has" in verdict["exception"]


def start_together(tandem: "Tandem", commands: list[list[str | Path]], variables: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Run commands side by side to their ends; exit code, standard output and standard error of each."""
    started: list[Running] = [tandem.start(command, **given) for command, given in zip(commands, variables, strict=True)]
    ended = []
    for running in started:
        stdout, stderr = running.process.communicate(timeout=SECONDS)
        ended.append((running.process.returncode, stdout, stderr))
    assert [running.find_processes() for running in started] == [[]] * len(started)
    return ended


@pytest.mark.parametrize("how", ["nodes", "ranks"])
def test_nodes_and_joined_ranks_with_other_weights_of_the_same_shapes_are_refused(
    tandem: "Tandem", own: Path, other: Path, how: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands: list[list[str | Path]] = []
    variables: list[dict[str, str]] = []
    for number, checkpoint in enumerate((own, other)):
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "launcher",
            "predict",
            "--checkpoint",
            checkpoint,
            "--log-dir",
            tandem.new_folder(),
        ]
        command += ["--prompt", "A llama", *DECODING]
        where = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", port)
        commands.append([*command, "--workers", "2", *where] if how == "nodes" else command)
        joined = {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(number)}
        variables.append({} if how == "nodes" else {**joined, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    ended = start_together(tandem, commands, variables)
    assert [(code, stdout) for code, stdout, _ in ended] == [(2, ""), (2, "")], ended
    word = "node" if how == "nodes" else "rank"
    for _, _, stderr in ended:
        found = re.search(
            rf"^tandem: {word} (\d) has checkpoint fingerprint ({FINGERPRINT}), but {word} (\d) has ({FINGERPRINT}): "
            "copy the same checkpoint to every node$",
            stderr,
            re.MULTILINE,
        )
        assert found and found[1] != found[3] and found[2] != found[4] and "Traceback" not in stderr, stderr

"""The script of MindFormers' users, with changed import lines only: the text of `tandem predict`, alone and as ranks of launchers."""

import re
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

PROJECT_ROOT = Path(__file__).resolve().parents[2]
COUNT_BYTES = Path(__file__).parent / "scripts" / "count_bytes.py"
SCRIPT = PROJECT_ROOT / "scripts" / "examples" / "run_llama2_generate.py"
SECONDS = 170
TOPO_SECONDS = 120
TRAINER = "trainer:\n  type: CausalLanguageModelingTrainer\n  model_name: 'llama2_7b'\n"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def folders(tandem: "Tandem", checkpoints: "Checkpoints") -> dict[str, Path]:
    """Folders with one YAML, one .ckpt and the tokenizer: float, and quantized by RTN."""
    made = {}
    for name, source, config in (
        ("float", checkpoints.float, checkpoints.config),
        ("rtn", checkpoints.int8, checkpoints.int8_config),
    ):
        made[name] = tandem.new_folder()
        result = tandem.run("convert", source, made[name] / f"llama2_{name}.ckpt", "--to", "mindspore")
        assert result.returncode == 0, result.stderr
        (made[name] / "config.json").unlink()
        text = config.read_text().replace(
            "    do_sample: False\n", "    do_sample: False\n    top_k: 3\n    top_p: 1\n    seq_length: 64\n"
        )
        (made[name] / f"predict_llama2_{name}.yaml").write_text(TRAINER + text)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoints.float / file, made[name])
    return made


def list_words(folder: Path, *rest: str | Path) -> list[str | Path]:
    (config,) = folder.glob("*.yaml")
    return ["--config_path", config, "--network_dir", folder, *rest]


def as_printed(outcome: "Outcome") -> str:
    """The results of a predict, one a line. What runs the script reads any line end as one."""
    printed = "".join(f"{text}\n" for text in outcome.texts)
    return printed.replace("\r\n", "\n").replace("\r", "\n")


def leave_out_special(stdout: str) -> str:
    """What the script has printed but for special tokens, which MindFormers' `decode` keeps and `tandem predict` leaves out."""
    return re.sub("<s>|</s>|<unk>", "", stdout)


def run_msrun(tandem: "Tandem", *commands: list[str | Path]) -> list[tuple[str, str, int]]:
    """Standard output, standard error and exit code of the scheduler and the workers that msrun would start, one with each command."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {
        "MS_WORKER_NUM": str(len(commands)),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": port,
        "MS_TOPO_TIMEOUT": str(TOPO_SECONDS),
    }
    started = [tandem.start(commands[0], MS_ROLE="MS_SCHED", RANK_ID="0", **common)]
    for rank, command in enumerate(commands):
        own = {"MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": str(rank)}
        started.append(tandem.start(command, MS_ROLE="MS_WORKER", **own, **common))
    return [(*running.process.communicate(timeout=SECONDS), running.process.returncode) for running in started]


def print_as_msrun(tandem: "Tandem", count: int, command: list[str | Path]) -> list[str]:
    """Standard output of the scheduler and the workers of a run that ends well."""
    outcomes = run_msrun(tandem, *[command] * count)
    assert [code for _, _, code in outcomes] == [0] * (count + 1), outcomes
    return [leave_out_special(stdout) for stdout, _, _ in outcomes]


@pytest.fixture(scope="module")
def expected(tandem: "Tandem", folders: dict[str, Path]) -> dict[str, str]:
    """The text of `tandem predict` on one rank from the same files."""
    return {name: as_printed(tandem.predict(folder, "--workers", "1")) for name, folder in folders.items()}


def test_one_process_prints_the_text_of_predict(tandem: "Tandem", folders: dict[str, Path], expected: dict[str, str]) -> None:
    """Weights named by load_checkpoint, and those of the network's own folder."""
    named = list_words(folders["float"], "--load_checkpoint", folders["float"] / "llama2_float.ckpt")
    for name, words in (("float", named), ("rtn", list_words(folders["rtn"]))):
        result = tandem.run_command([sys.executable, SCRIPT, *words])
        assert result.returncode == 0, result.stderr
        assert leave_out_special(result.stdout) == expected[name]


def test_ranks_of_torchrun_read_the_checkpoint_once(tandem: "Tandem", folders: dict[str, Path], expected: dict[str, str]) -> None:
    checkpoint, counts = folders["rtn"] / "llama2_rtn.ckpt", tandem.new_folder()
    words = list_words(folders["rtn"], "--use_parallel", "--load_checkpoint", checkpoint)
    logs = tandem.new_folder()  # torchrun starts unbuffered ranks, whose lines would mix in one stream
    own_logs = ("--redirects", "3", "--log-dir", logs)
    result = tandem.run_command([sys.executable, *TORCHRUN, "3", *own_logs, COUNT_BYTES, counts, SCRIPT, *words])
    assert result.returncode == 0, result.stderr
    printed = [leave_out_special(path.read_text(encoding="utf-8")) for path in sorted(logs.rglob("stdout.log"))]
    assert printed == 3 * [expected["rtn"]], "each rank prints all, as the script says"
    read = [int((counts / f"rank_{rank}.txt").read_text()) for rank in range(3)]  # more than one line would be more than one load
    assert 0.95 * checkpoint.stat().st_size < sum(read) < 1.02 * checkpoint.stat().st_size


def test_ranks_of_msrun_print_the_text_of_predict(tandem: "Tandem", folders: dict[str, Path], expected: dict[str, str]) -> None:
    words = list_words(folders["float"], "--use_parallel", "--load_checkpoint", folders["float"] / "llama2_float.ckpt")
    scheduler, *workers = print_as_msrun(tandem, 2, [sys.executable, SCRIPT, *words])
    assert (scheduler, *workers) == ("", expected["float"], expected["float"])


def test_a_rank_without_its_tokenizer_ends_the_others_with_its_reason(tandem: "Tandem", folders: dict[str, Path]) -> None:
    """It ends before the ranks compare their models; without its reason the others wait for MS_TOPO_TIMEOUT."""
    bare = tandem.new_folder()
    for path in (*folders["float"].glob("*.yaml"), *folders["float"].glob("*.ckpt")):
        (bare / path.name).symlink_to(path)
    words = [[sys.executable, SCRIPT, *list_words(folder, "--use_parallel")] for folder in (bare, folders["float"], folders["float"])]
    started = time.monotonic()
    _, refused, *others = run_msrun(tandem, *words)
    assert time.monotonic() - started < TOPO_SECONDS / 2
    assert refused[2] == 1 and "CheckpointError: no tokenizer 'llama2_7b'" in refused[1]
    for stdout, stderr, code in others:
        assert (stdout, code) == ("", 1)
        assert "RunError: rank 0 has ended: no tokenizer 'llama2_7b': neither a path nor" in stderr


def test_three_ranks_load_what_two_have_written(tandem: "Tandem", shared_dir: Path) -> None:
    cases = shared_dir / "cases" / "mindformers"
    if not cases.is_dir():
        pytest.skip("no cases/mindformers among the shared data")
    sliced = cases / "L05-two-steps-each-rank"
    folder = tandem.new_folder()
    shutil.copy(cases / "fused.yaml", folder / "predict_llama2.yaml")
    shutil.copy(sliced / "tokenizer.model", folder)
    shutil.copy(sliced / "rank_0" / "llama_rank_0-1_2.ckpt", folder / "not_loaded.ckpt")
    truth = tandem.predict("-c", folder / "predict_llama2.yaml", "--checkpoint", sliced, "--workers", "1")
    words = list_words(folder, "--use_parallel", "--load_checkpoint", sliced)
    _, *workers = print_as_msrun(tandem, 3, [sys.executable, SCRIPT, *words])
    assert workers == 3 * [as_printed(truth)]

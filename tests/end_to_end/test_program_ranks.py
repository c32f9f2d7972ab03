"""A user's program as ranks: torchrun, msrun's variables, mpirun's, `tandem run`, and alone. Each rank loads its slice; all agree."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tandem import AutoModel
from tests.end_to_end.conftest import PROMPTS, SECONDS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

PROGRAM = """
import atexit, json, os, sys
from pathlib import Path
import tandem

model = tandem.AutoModel.from_pretrained(sys.argv[1], dtype="float32", threads_per_rank=1)
group = tandem.init()
assert tandem.init() is group
tokenizer = tandem.LlamaTokenizer.from_pretrained(sys.argv[1])
outputs = [model.generate(tokenizer.encode(prompt), max_new_tokens=12)[0].tolist() for prompt in json.loads(sys.argv[3])]
second = tandem.AutoModel.from_pretrained(sys.argv[2], dtype="float32", threads_per_rank=1) if sys.argv[2] else None
report = {
    "world_size": group.world_size,
    "outputs": outputs,
    "second": second and second.generate(outputs[0][:4], max_new_tokens=5)[0].tolist(),
    "again": model.generate(outputs[0][:4], max_new_tokens=5)[0].tolist(),
    "read_bytes": model.read_bytes,
    "arguments": sys.argv[5:],
    "name": __name__,
}
Path(sys.argv[4], f"{group.rank}.json").write_text(json.dumps(report))
if group.rank == 0:
    atexit.register(print, "at exit")
    print("\\u00e9 from rank 0")
    os.system("echo from its child")
else:
    print("from another rank")
sys.exit(0)
"""


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read_reports(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.json"))
    assert [path.stem for path in paths] == [str(rank) for rank in range(len(paths))]
    return [json.loads(path.read_text()) for path in paths]


def _build(tandem: "Tandem", first: Path, second: Path | str = "") -> tuple[Path, list[str]]:
    """A folder with the program, and its arguments up to its own ones."""
    folder = tandem.new_folder()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "out").mkdir()
    return folder, [str(first), str(second), json.dumps(PROMPTS), str(folder / "out")]


def _assert_equals_predict(tandem: "Tandem", checkpoints: "Checkpoints", reports: list[dict[str, Any]], world_size: int) -> None:
    options = ("--max-new-tokens", "12", "--dtype", "float32", "--threads-per-rank", "1")
    outcome = tandem.predict("--checkpoint", checkpoints.float, "--workers", str(world_size), *options)
    expected = [record["prompt_token_ids"] + record["token_ids"] for record in outcome.records]
    assert [report["world_size"] for report in reports] == [world_size] * world_size
    assert all(report["outputs"] == expected for report in reports)
    assert [report["read_bytes"] for report in reports] == outcome.stats["read_bytes"], "each rank reads its slice"
    size = (checkpoints.float / "model.safetensors").stat().st_size
    assert 0.98 * size < sum(report["read_bytes"] for report in reports) < 1.02 * size
    assert all(report[key] == reports[0][key] for report in reports for key in ("second", "again"))


def _run_all(tandem: "Tandem", command: Sequence[str | Path], environments: Sequence[dict[str, str]]) -> list[tuple[int, str, str]]:
    started = [tandem.start(command, **variables) for variables in environments]
    ended = []
    for running in started:
        written, told = running.process.communicate(timeout=SECONDS)
        ended.append((running.process.returncode, written, told))
    return ended


def test_under_torchrun_two_models_are_loaded_slice_by_slice(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder, arguments = _build(tandem, checkpoints.float, checkpoints.int8)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_find_port())]
    result = tandem.run_command([*torchrun, folder / "program.py", *arguments], cwd=folder)
    assert result.returncode == 0, result.stderr
    reports = _read_reports(folder / "out")
    _assert_equals_predict(tandem, checkpoints, reports, 2)
    alone = AutoModel.from_pretrained(checkpoints.int8, dtype="float32").generate(reports[0]["outputs"][0][:4], max_new_tokens=5)[0]
    assert reports[0]["second"] == alone.tolist()


def test_with_the_variables_of_msrun_the_scheduler_only_serves(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder, arguments = _build(tandem, checkpoints.float)
    common = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(_find_port())}
    roles = [{"MS_ROLE": "MS_SCHED"}, *({"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank)} for rank in range(2))]
    ended = _run_all(tandem, [sys.executable, folder / "program.py", *arguments], [{**common, **role} for role in roles])
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert ended[0][1] == "" and "from rank 0" in ended[1][1] and "from another rank" in ended[2][1]
    _assert_equals_predict(tandem, checkpoints, _read_reports(folder / "out"), 2)


def test_with_the_variables_of_mpirun_rank_0_stays_until_the_others_have_finished(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder, arguments = _build(tandem, checkpoints.float)
    common = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "MASTER_PORT": str(_find_port())}
    ranks = [{"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)} for rank in range(3)]
    ended = _run_all(tandem, [sys.executable, folder / "program.py", *arguments], [{**common, **rank} for rank in ranks])
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    _assert_equals_predict(tandem, checkpoints, _read_reports(folder / "out"), 3)


def test_without_a_launcher_it_is_one_rank(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder, arguments = _build(tandem, checkpoints.float)
    result = tandem.run_command([sys.executable, folder / "program.py", *arguments], cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    _assert_equals_predict(tandem, checkpoints, _read_reports(folder / "out"), 1)


def test_tandem_run_passes_arguments_output_and_success(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder, arguments = _build(tandem, checkpoints.float)
    own = ["--workers", "7", "-h", "", "two words"]
    result = tandem.run("run", "program.py", "--workers", "2", "--log-dir", "logs", *arguments, *own, cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\u00e9 from rank 0\nfrom its child\nat exit\n", "")
    reports = _read_reports(folder / "out")
    _assert_equals_predict(tandem, checkpoints, reports, 2)
    assert all((report["arguments"], report["name"]) == (own, "__main__") for report in reports)
    assert "from rank 0" in (folder / "logs" / "worker_0.log").read_text(encoding="utf-8")
    assert "from another rank" in (folder / "logs" / "worker_1.log").read_text(encoding="utf-8")
    assert not (folder / "logs" / "verdict.json").exists()


GROUP = """
import os
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")  # env://, as under torchrun
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(int(total), os.environ["MASTER_ADDR"], os.environ["LOCAL_RANK"], dist.get_world_size())
if dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(5)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_program_may_open_its_own_process_group_as_under_torchrun(tandem: "Tandem") -> None:
    """Also after a restart, when the port of the first attempt may still be taken."""
    folder = tandem.new_folder()
    (folder / "group.py").write_text(GROUP)
    result = tandem.run("run", "group.py", "--workers", "2", "--max-restarts", "1", "--log-dir", "logs", cwd=folder, MASTER_PORT="1")
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()) == {"3 127.0.0.1 0 2"}
    assert "restart 1 of 1: all ranks run the program again" in result.stderr


MODULE = """
import sys
import time
import tandem

group = tandem.init()
print(sys.argv[1:], group)
time.sleep(group.rank)  # a rank that fails ends the others at once: rank 0 has printed by then
if "wrong" in sys.argv:
    raise KeyError("missing") if group.rank else SystemExit(0)
if "model" in sys.argv:
    tandem.AutoModel.from_pretrained("/no/such/model" if group.rank else sys.argv[-1])
if "differ" in sys.argv:
    model = tandem.AutoModel.from_pretrained(sys.argv[-1])
    try:
        model.generate([1, 2 + group.rank])
    except tandem.InputError as error:
        print(error)
if "other" in sys.argv:
    tandem.AutoModel.from_pretrained(sys.argv[-1], dtype="bfloat16" if group.rank else "float32")
"""


@pytest.mark.parametrize(
    ("word", "code", "printed", "told"),
    [
        ("wrong", 1, "", "rank 1 failed first .*: KeyError: 'missing'"),
        ("model", 2, "", "failed first .*: .*the checkpoint /no/such/model does not exist"),
        ("differ", 0, "rank 1 calls generate with other ids or options than rank 0: every rank has to make the same calls\n", ""),
        ("other", 2, "", "has dtype .* every rank has to load the same models in the same order"),
    ],
)
def test_ranks_that_fail_or_differ_say_so(
    tandem: "Tandem", checkpoints: "Checkpoints", word: str, code: int, printed: str, told: str
) -> None:
    folder = tandem.new_folder()
    (folder / "package").mkdir()
    (folder / "package" / "work.py").write_text(MODULE)
    result = tandem.run("run", "-m", "package.work", "-n", "2", word, checkpoints.float, cwd=folder)
    assert result.returncode == code, result.stderr
    assert result.stdout == f"['{word}', '{checkpoints.float}'] RankGroup(rank=0, world_size=2)\n{printed}"
    if told:
        assert re.search(told, result.stderr), result.stderr
        assert json.loads((folder / "output" / "log" / "verdict.json").read_text())["restarts_used"] == 0
    else:
        assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no program: give a Python file"),
        (("nothing.py",), "the program nothing.py does not exist"),
        (("-n", "2", "."), r"the program . is a folder, but a Python file is needed"),
        (("-m", "no_such_module_here"), "there is no module 'no_such_module_here' in"),
        (("--wrkers", "2", "x.py"), "No such option: --wrkers"),
        (("x.py", "--workers", "0"), "--workers is 0, but has to be at least 1"),
    ],
)
def test_a_program_that_cannot_run_is_refused(tandem: "Tandem", words: tuple[str, ...], told: str) -> None:
    folder = tandem.new_folder()
    result: subprocess.CompletedProcess[str] = tandem.run("run", *words, cwd=folder)
    assert (result.returncode, result.stdout) == (2, "") and told in result.stderr
    assert list(folder.iterdir()) == []

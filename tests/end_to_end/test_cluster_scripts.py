"""The scripts for clusters with the real programs: Slurm and Open MPI on this machine, the schemas of Kubernetes, systemd, shellcheck.

Where a program is missing or cannot start, its tests are skipped and say so (`pytest -rs` shows it).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml

from launcher.cli.main import app

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Running, Tandem

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = PROJECT_ROOT / "scripts" / "cluster"
SCRIPTS = sorted([*(PROJECT_ROOT / "scripts").rglob("*.sh"), CLUSTER / "slurm.sbatch", PROJECT_ROOT / ".ci" / "run"])
KUBERNETES_VERSION = "1.31"
ODD = 'it\'s "two" $words'
OPTIONS = ("--max-new-tokens", "8", "--dtype", "float32", "--logprobs", "--ignore-eos")
LONG = ("--max-batch-size", "1", "--max-new-tokens", "500", "--ignore-eos", "--dtype", "float32", "--timeout", "20")

# The system's programs for administrators are not on every path; the Python of these tests is to be the first.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"missing on this machine: {', '.join(missing)} (scripts/cluster/install_tools.sh installs them)")


def _parse(command: str, words: list[str]) -> dict[str, Any]:
    """What `tandem COMMAND WORDS` would be called with; raises what it would refuse with."""
    return typer.main.get_group(app).commands[command].make_context(command, list(words)).params


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    _need("shellcheck")
    result = subprocess.run(["shellcheck", "-x", str(script)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


# Kubernetes


def _load_kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    return service, job


def test_kubernetes_knows_every_field() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="the package kubernetes-validate, with the schemas, is not installed")
    for document in _load_kubernetes():
        validate.validate(document, KUBERNETES_VERSION, strict=True)
    _, job = _load_kubernetes()
    job["spec"]["completionmode"] = "Indexed"
    with pytest.raises(validate.ValidationError, match="completionmode"):
        validate.validate(job, KUBERNETES_VERSION, strict=True)


def test_pods_call_tandem_with_options_that_it_has_and_find_each_other() -> None:
    service, job = _load_kubernetes()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["command"], container["args"][0]) == (["tandem"], "predict")
    assert container["args"][container["args"].index("--node-rank") + 1] == "$(JOB_COMPLETION_INDEX)"
    found = _parse("predict", ["1" if word == "$(JOB_COMPLETION_INDEX)" else word for word in container["args"][1:]])
    assert found["num_nodes"] == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert found["master_addr"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert [port["containerPort"] for port in container["ports"]] == [found["master_port"]]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts["/checkpoint"] is True and mounts["/output"] is False
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


# systemd


UNITS = ("tandem.service", "tandem-serve.service")


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    _need("systemd-analyze")
    text = (CLUSTER / name).read_text()
    unit = tmp_path / name
    patched, count = re.subn(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text)
    assert count == 1
    unit.write_text(patched)
    result = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    if result.returncode and "Failed to initialize manager" in result.stderr:
        pytest.skip(f"systemd-analyze cannot run here: {result.stderr.strip()}")
    # It warns of unknown words with exit code 0; of other units of this machine it may say what it likes.
    assert result.returncode == 0, result.stderr
    assert name not in result.stderr, result.stderr


@pytest.mark.parametrize(("name", "command"), [*zip(UNITS, ("predict", "serve"), strict=True)])
def test_the_unit_calls_tandem_with_options_that_it_has(name: str, command: str) -> None:
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"(?m)^ExecStart=(.*)$", text)
    words = shlex.split(line)
    assert words[0].endswith("/bin/tandem") and words[1] == command
    variables = dict(word.split("=", 1) for word in shlex.split(re.findall(r"(?m)^Environment=(.*)$", text)[0]))
    assert _parse(command, [re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], word) for word in words[2:]])["workers"] == 2


# Ranks that Slurm and Open MPI start


@pytest.fixture(scope="module")
def odd(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path has blanks and quotes, with the tiny model and its YAML in it."""
    folder = tmp_path_factory.mktemp("cluster") / ODD
    folder.mkdir()
    shutil.copytree(checkpoints.float, folder / "check point")
    shutil.copy(checkpoints.config, folder / "con fig.yaml")
    return folder


@pytest.fixture
def work(odd: Path, tmp_path: Path) -> Path:
    """An empty folder whose path has blanks and quotes."""
    folder = tmp_path / ODD
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def expected(tandem: "Tandem", odd: Path) -> str:
    """The results of one rank."""
    arguments = ("--config", odd / "con fig.yaml", "--checkpoint", odd / "check point", "--workers", "1", *OPTIONS)
    return tandem.predict(*arguments).jsonl


@pytest.fixture(scope="module")
def slurm(tandem: "Tandem") -> Iterator[dict[str, str]]:
    """A Slurm of this machine alone: the variables that lead to it."""
    _need("slurmctld", "slurmd", "munged", "srun", "sbatch")
    script = CLUSTER / "local_slurm.sh"
    folder = Path(tempfile.mkdtemp(prefix="tandem-slurm-")) / "s"  # a short path: sockets lie in it
    # Not by `tandem`, which ends whatever a command leaves.
    environment = {**os.environ, "PATH": PATH}
    result = subprocess.run(["bash", str(script), "start", str(folder)], capture_output=True, text=True, timeout=60, env=environment)
    if result.returncode:
        folder.parent.rmdir()
        pytest.skip(f"Slurm cannot start here: {result.stderr[-2000:]}")
    name, value = result.stdout.removeprefix("export ").strip().split("=", 1)
    assert (name, shlex.split(value)) == ("SLURM_CONF", [str(folder / "slurm.conf")])
    yield {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    subprocess.run(["bash", str(script), "stop", str(folder)], check=True, timeout=60)
    folder.parent.rmdir()


@pytest.fixture(scope="module")
def mpi(tandem: "Tandem") -> dict[str, str]:
    """Variables with which mpirun starts processes here."""
    _need("mpirun")
    variables = {"PATH": PATH, "OMPI_MCA_oob_tcp_if_include": "lo"}
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    result = tandem.run_command(["mpirun", *root, "--host", "localhost:2", "true"], **variables)
    if result.returncode:
        pytest.skip(f"mpirun cannot start a process here: {result.stderr[-2000:]}")
    return variables


def _files(work: Path) -> list[str | Path]:
    return ["--output", work / "results.jsonl", "--log-dir", work / "logs"]


def _srun(odd: Path, work: Path, *options: str | Path) -> list[str | Path]:
    paths = ("--config", odd / "con fig.yaml", "--checkpoint", odd / "check point")
    command = ("srun", "--ntasks=2", sys.executable, "-m", "launcher", "predict")
    return [*command, *paths, "--threads-per-rank", "1", *options, *_files(work)]


def _sbatch(odd: Path, checkpoint: Path, work: Path, *options: str | Path) -> list[str | Path]:
    command = ("sbatch", "--wait", "--ntasks=2", "--cpus-per-task=1", f"--output={work / 'job.out'}", CLUSTER / "slurm.sbatch")
    return [*command, odd / "con fig.yaml", checkpoint, *options, *_files(work)]


def _mpirun(odd: Path, checkpoint: Path, work: Path, *options: str | Path) -> list[str | Path]:
    hostfile = work / "host file"
    hostfile.write_text("# this machine\n\nlocalhost slots=2\n")
    command = ("bash", CLUSTER / "openmpi.sh", hostfile, odd / "con fig.yaml", checkpoint, "--threads-per-rank", "1")
    return [*command, *options, *_files(work)]


def test_srun_gives_the_results_of_one_rank(tandem: "Tandem", slurm: dict[str, str], odd: Path, work: Path, expected: str) -> None:
    result = tandem.run_command(_srun(odd, work, *OPTIONS), **slurm)
    assert result.returncode == 0, result.stderr
    assert (work / "results.jsonl").read_text() == expected
    assert result.stdout.count("'text_generation_text'") == len(expected.splitlines())


@pytest.mark.slow  # sbatch --wait looks every ten seconds
def test_sbatch_gives_the_results_of_one_rank(tandem: "Tandem", slurm: dict[str, str], odd: Path, work: Path, expected: str) -> None:
    # Not from the project's root, whose place Slurm's copy of the script cannot know.
    command = _sbatch(odd, odd / "check point", work, *OPTIONS)
    result = tandem.run_command(command, cwd=work, TANDEM_ROOT=str(PROJECT_ROOT), **slurm)
    output = (work / "job.out").read_text()
    assert result.returncode == 0, result.stderr + output
    assert (work / "results.jsonl").read_text() == expected
    assert output.count("'text_generation_text'") == len(expected.splitlines())


def test_mpirun_gives_the_results_of_one_rank(tandem: "Tandem", mpi: dict[str, str], odd: Path, work: Path, expected: str) -> None:
    result = tandem.run_command(_mpirun(odd, odd / "check point", work, *OPTIONS), cwd=work, **mpi)
    assert result.returncode == 0, result.stderr
    assert (work / "results.jsonl").read_text() == expected
    assert result.stdout.count("'text_generation_text'") == len(expected.splitlines())


@pytest.mark.slow  # sbatch --wait looks every ten seconds
def test_an_input_that_cannot_be_used_comes_through_sbatch_as_2(tandem: "Tandem", slurm: dict[str, str], odd: Path, work: Path) -> None:
    result = tandem.run_command(_sbatch(odd, odd / "nothing", work), cwd=PROJECT_ROOT, **slurm)
    output = (work / "job.out").read_text()
    assert result.returncode == 2, output
    assert "nothing" in output
    # The node is free again.
    assert tandem.run_command(["squeue", "--noheader"], **slurm).stdout == ""


def test_an_input_that_cannot_be_used_comes_through_mpirun_as_2(tandem: "Tandem", mpi: dict[str, str], odd: Path, work: Path) -> None:
    result = tandem.run_command(_mpirun(odd, odd / "nothing", work), cwd=work, **mpi)
    assert result.returncode == 2, result.stderr
    assert "nothing" in result.stderr


def test_sbatch_outside_the_root_says_what_to_set(tandem: "Tandem", slurm: dict[str, str], odd: Path, work: Path) -> None:
    result = tandem.run_command(_sbatch(odd, odd / "check point", work), cwd=work, **slurm)
    assert result.returncode == 2
    assert re.search(r"slurm\.sbatch: '.*' is not tandem's root.*TANDEM_ROOT", (work / "job.out").read_text())


def _kill_a_rank(running: "Running", rank_variable: str) -> tuple[int, str]:
    """Kill rank 1 while it decodes; the exit code of the whole, and its standard error."""
    assert running.process.stdout is not None
    first_line = running.process.stdout.readline()
    assert first_line.startswith("'text_generation_text': "), running.process.communicate(timeout=60)
    (victim,) = [pid for pid in running.find_processes() if _is_rank(pid, rank_variable, 1)]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = running.process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert running.wait_until_gone(10) == []
    return running.process.returncode, stderr


def _is_rank(pid: int, variable: str, rank: int) -> bool:
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"python" in Path(os.fsdecode(program)).name.encode() and f"{variable}={rank}".encode() in environ


def test_a_rank_that_is_killed_under_srun_ends_the_job(tandem: "Tandem", slurm: dict[str, str], odd: Path, work: Path) -> None:
    code, stderr = _kill_a_rank(tandem.start(_srun(odd, work, *LONG), **slurm), "SLURM_PROCID")
    assert code == 128 + signal.SIGKILL, stderr
    assert tandem.run_command(["squeue", "--noheader"], **slurm).stdout == ""


def test_a_rank_that_is_killed_under_mpirun_ends_the_run(tandem: "Tandem", mpi: dict[str, str], odd: Path, work: Path) -> None:
    command = _mpirun(odd, odd / "check point", work, *LONG)
    code, stderr = _kill_a_rank(tandem.start(command, **mpi), "OMPI_COMM_WORLD_RANK")
    assert code == 128 + signal.SIGKILL, stderr


# What the scripts refuse, and how the local Slurm ends


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no hostfile"),
        ("# nothing\n", "names no host"),
        ("node0\n", "'node0' in .* has no slots=N"),
        ("node0 slots=0\n", "'node0' in .* has no slots=N"),
        ("localhost slots=2\nnode1 slots=2\n", "the first of the 2 hosts"),
    ],
)
def test_openmpi_refuses_a_hostfile_that_cannot_work(tandem: "Tandem", work: Path, text: str | None, words: str) -> None:
    if text is not None:
        (work / "hosts").write_text(text)
    result = tandem.run_command(["bash", CLUSTER / "openmpi.sh", work / "hosts", "c.yaml", "ckpt"])
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(words, result.stderr)


def test_the_example_hostfile_is_accepted(tandem: "Tandem", work: Path) -> None:
    fake = work / "mpirun"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n")
    fake.chmod(0o755)
    command = ["bash", CLUSTER / "openmpi.sh", CLUSTER / "hostfile.example", "c.yaml", "ck pt", "--prompt", "a 'b"]
    result = tandem.run_command(command, PATH=f"{work}{os.pathsep}{PATH}")
    words = result.stdout.splitlines()
    assert result.returncode == 7
    assert words[words.index("-n") + 1] == "8" and "MASTER_ADDR=node0" in words
    assert words[words.index("-m") :] == ["-m", "launcher", "predict", "--config", "c.yaml", "--checkpoint", "ck pt", "--prompt", "a 'b"]


def test_the_batch_script_outside_of_slurm_says_how_to_start_it(tandem: "Tandem") -> None:
    result = tandem.run_command(["bash", CLUSTER / "slurm.sbatch", "c.yaml", "ckpt"])
    assert (result.returncode, result.stdout) == (2, "")
    assert "sbatch --ntasks" in result.stderr


def test_the_local_slurm_listens_on_loopback_and_is_made_once(tandem: "Tandem", slurm: dict[str, str]) -> None:
    _need("ss")
    folder = Path(slurm["SLURM_CONF"]).parent
    status = tandem.run_command(["bash", CLUSTER / "local_slurm.sh", "status", folder], **slurm)
    assert (status.returncode, status.stdout) == (0, ""), status.stderr
    again = tandem.run_command(["bash", CLUSTER / "local_slurm.sh", "start", folder], **slurm)
    assert again.returncode == 2 and "is there already" in again.stderr
    pids = [(folder / f"{name}.pid").read_text().split()[0] for name in ("munged", "slurmctld", "slurmd")]
    lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True, env={"PATH": PATH}).stdout.splitlines()
    addresses = [line.split()[3] for line in lines if any(f"pid={pid}," in line for pid in pids)]
    assert len(addresses) == 2 and all(address.startswith("127.0.0.1:") for address in addresses)


@pytest.mark.parametrize(("path", "words"), [("a b", "cannot hold the path"), ("x" * 70, "has .* characters, .* room for 60")])
def test_the_local_slurm_refuses_a_path_that_slurm_cannot_hold(tandem: "Tandem", path: str, words: str) -> None:
    result = tandem.run_command(["bash", CLUSTER / "local_slurm.sh", "start", path], PATH=PATH)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(words, result.stderr)


def test_the_local_slurm_stops_nothing_that_it_did_not_start(tandem: "Tandem", work: Path) -> None:
    (work / "slurmd.pid").write_text(f"{os.getpid()} 1\n")
    result = tandem.run_command(["bash", CLUSTER / "local_slurm.sh", "stop", work])
    assert (result.returncode, (work / "slurmd.pid").exists()) == (2, True)


def test_install_tools_does_nothing_where_all_is_there(tandem: "Tandem", work: Path) -> None:
    names = ("mpirun", "slurmctld", "munged", "ss", "shellcheck", "systemd-analyze", "chromium", "chromedriver")
    for name in names:
        (work / name).write_text("#!/bin/sh\nexit 1\n")
        (work / name).chmod(0o755)
    result = tandem.run_command(["bash", CLUSTER / "install_tools.sh"], PATH=f"{work}{os.pathsep}{os.environ['PATH']}")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

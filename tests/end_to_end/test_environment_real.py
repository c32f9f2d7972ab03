"""`tandem env` under the MPI launchers that this machine has, and in the text that people read."""

import json
import re
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Tandem

ENV = (sys.executable, "-m", "launcher", "env")


def find_launcher(*names: str) -> str:
    """The first of these programs that is there, or a skip."""
    for name in names:
        if path := shutil.which(name):
            return path
    reason = f"none of these programs is on the PATH: {', '.join(names)}"
    print(reason)
    pytest.skip(reason)


def read_ranks(tandem: "Tandem", *command: str) -> list[dict[str, object]]:
    """What each rank of a launcher found, by rank. Root must ask Open MPI for leave."""
    result = tandem.run_command((*command, *ENV, "--json"), OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert result.returncode == 0, result.stderr
    # Two ranks may write at once, so a line may hold two objects.
    decoder, text, found = json.JSONDecoder(), result.stdout.strip(), []
    while text:
        entry, end = decoder.raw_decode(text)
        found.append(entry)
        text = text[end:].lstrip()
    return sorted(found, key=lambda entry: int(entry["rank"] or 0))


def test_mpirun(tandem: "Tandem") -> None:
    mpirun = find_launcher("mpirun.openmpi", "mpirun")
    version = tandem.run_command((mpirun, "--version"))
    if not re.search("Open MPI|OpenRTE", version.stdout):
        pytest.skip(f"{mpirun} is not Open MPI's: {version.stdout.splitlines()[:1]}")
    ranks = read_ranks(tandem, mpirun, "--oversubscribe", "--bind-to", "none", "-n", "2")
    assert [entry["rank"] for entry in ranks] == [0, 1]
    for entry in ranks:
        assert (entry["launcher"], entry["world_size"], entry["local_world_size"], entry["local_rank"]) == ("openmpi", 2, 2, entry["rank"])
        assert (entry["master_addr"], entry["store_host"]) == ("127.0.0.1", "rank 0")
        sources = entry["sources"]
        assert isinstance(sources, dict)
        # The proof of a real mpirun, and its key, which no variable of ours replaces.
        assert sources["launcher"] in ("OMPI_MCA_ess_base_jobid", "PRTE_LAUNCHED")
        assert sources["run_key"] == sources["master_port"] == "PMIX_NAMESPACE"
    assert ranks[0]["run_key"] == ranks[1]["run_key"] and ranks[0]["master_port"] == ranks[1]["master_port"]

    (lone,) = read_ranks(tandem, mpirun, "--bind-to", "none", "-n", "1")
    assert (lone["launcher"], lone["rank"], lone["sources"]) == ("none", None, {"launcher": "OMPI_COMM_WORLD_SIZE"})


def test_hydra(tandem: "Tandem") -> None:
    mpiexec = find_launcher("mpiexec.hydra")
    ranks = read_ranks(tandem, mpiexec, "-n", "2")
    assert [entry["rank"] for entry in ranks] == [0, 1]
    for entry in ranks:
        assert (entry["launcher"], entry["world_size"], entry["local_world_size"], entry["local_rank"]) == ("pmi", 2, 2, entry["rank"])
        assert (entry["master_addr"], entry["master_port"]) == ("127.0.0.1", 29500)


def test_torchrun(tandem: "Tandem") -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = tandem.run_command((*torchrun, "-m", "launcher", "env"), SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_NTASKS="3")
    assert result.returncode == 0, result.stderr
    assert "store_host:       launcher (from TORCHELASTIC_USE_AGENT_STORE=True)" in result.stdout
    for rank in ("0", "1"):
        assert f"rank:             {rank} (from RANK={rank})" in result.stdout


def test_text_tells_where_each_field_comes_from(tandem: "Tandem") -> None:
    step = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    result = tandem.run("env", MASTER_ADDR="odd\x1bname", **step)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    for line in (
        "launcher:         slurm (from SLURM_STEP_ID=0, SLURM_PROCID=1)",
        "rank:             1 (from SLURM_PROCID=1)",
        "local_rank:       -",
        "run_key:          41.0 (from SLURM_JOB_ID=41, SLURM_STEP_ID=0)",
        "store_host:       rank 0",
    ):
        assert line in lines
    assert "\x1b" not in result.stdout
    assert "(from MASTER_ADDR='odd\\x1bname')" in result.stdout

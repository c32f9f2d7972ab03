"""What the environment variables of launchers say, and who decides how many ranks there are."""

import pytest

from launcher.environment.detection import LaunchEnvironment, decide_world_size, read_environment
from parallel.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in TORCHRUN.items() if name not in names}


def test_plain_environment_is_no_rank() -> None:
    environment = read_environment({"HOME": "/root", "PATH": "/bin"})
    assert environment == LaunchEnvironment()
    assert environment.launcher == "none" and not environment.is_rank and environment.variables == {}


def test_environment_of_this_process_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MS_WORKER_NUM", "3")
    assert read_environment().worker_num == 3


def test_torchrun_makes_a_rank() -> None:
    environment = read_environment({**TORCHRUN, "HOME": "/root"})
    assert environment.launcher == "torchrun" and environment.is_rank
    assert (environment.rank, environment.world_size) == (5, 8)
    assert (environment.local_rank, environment.local_world_size) == (1, 4)
    assert (environment.master_addr, environment.master_port) == ("node0", 29500)
    assert environment.variables == TORCHRUN


def test_local_world_size_may_be_missing() -> None:
    environment = read_environment(without("LOCAL_WORLD_SIZE"))
    assert environment.rank == 5 and environment.local_world_size is None


def test_address_alone_makes_no_rank() -> None:
    assert not read_environment({"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}).is_rank


def test_empty_variable_says_nothing() -> None:
    assert read_environment({"RANK": "", "WORLD_SIZE": " ", "MS_WORKER_NUM": ""}) == LaunchEnvironment()


def test_worker_num_is_no_rank_but_decides() -> None:
    environment = read_environment({"MS_WORKER_NUM": "4"})
    assert (environment.launcher, environment.worker_num, environment.variables) == ("none", 4, {"MS_WORKER_NUM": "4"})


@pytest.mark.parametrize("mark", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_incomplete_set_names_what_is_missing(mark: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment({mark: "1"})
    said, missing = str(refused.value).split(" but lacks ")
    assert f"torchrun's ({mark}=1)" in said
    for name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - {mark}:
        assert name in missing.split(";")[0].split(", ")


def test_rank_without_world_size_names_world_size_only() -> None:
    with pytest.raises(ConfigError, match="but lacks WORLD_SIZE;"):
        read_environment(without("WORLD_SIZE"))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["two", "-1", "1.5", "1_0", "٣"])
def test_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment({**TORCHRUN, name: text})
    assert str(refused.value).startswith(f"{name} is {text!r}, but a whole number")


def test_worker_num_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="MS_WORKER_NUM is 'many', but a whole number"):
        read_environment({"MS_WORKER_NUM": "many"})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("RANK", "8", "RANK is 8, but WORLD_SIZE is 8: 0 to 7 is needed"),
        ("RANK", "12", "RANK is 12, but WORLD_SIZE is 8: 0 to 7 is needed"),
        ("LOCAL_RANK", "4", "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4: 0 to 3 is needed"),
        ("LOCAL_RANK", "9", "LOCAL_RANK is 9, but WORLD_SIZE is 8: 0 to 7 is needed"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0, but a whole number of at least 1 is needed"),
        ("MASTER_PORT", "65536", "MASTER_PORT is 65536, but a port of at most 65535 is needed"),
        ("MS_WORKER_NUM", "0", "MS_WORKER_NUM is 0, but a whole number of at least 1 is needed"),
    ],
)
def test_number_out_of_range_names_both(name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment({**TORCHRUN, name: text})
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("workers", "worker_num", "model_parallel", "world_size"),
    [(None, None, None, 1), (None, None, 8, 8), (None, 4, 8, 4), (2, 4, 8, 2), (1, None, 8, 1)],
)
def test_option_goes_over_variable_over_yaml(
    workers: int | None, worker_num: int | None, model_parallel: int | None, world_size: int
) -> None:
    assert decide_world_size(workers, LaunchEnvironment(worker_num=worker_num), model_parallel) == world_size


@pytest.mark.parametrize(
    ("workers", "worker_num", "model_parallel", "words"),
    [
        (0, None, None, "--workers is 0"),
        (-2, 4, 8, "--workers is -2"),
        (None, 0, None, "MS_WORKER_NUM is 0"),
        (None, None, 0, "parallel_config.model_parallel is 0"),
    ],
)
def test_fewer_than_one_rank_is_refused(workers: int | None, worker_num: int | None, model_parallel: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}, but at least 1 rank is needed"):
        decide_world_size(workers, LaunchEnvironment(worker_num=worker_num), model_parallel)


def test_rank_has_the_world_size_of_its_launcher() -> None:
    environment = read_environment({**TORCHRUN, "MS_WORKER_NUM": "8"})
    assert decide_world_size(None, environment, 2) == 8
    assert decide_world_size(8, environment, None) == 8


def test_option_that_disagrees_with_the_launcher_names_both() -> None:
    with pytest.raises(ConfigError, match="--workers is 2, but torchrun's WORLD_SIZE is 8"):
        decide_world_size(2, read_environment(TORCHRUN), None)


def test_variable_that_disagrees_with_the_launcher_names_both() -> None:
    with pytest.raises(ConfigError, match="MS_WORKER_NUM is 4, but torchrun's WORLD_SIZE is 8"):
        decide_world_size(8, read_environment({**TORCHRUN, "MS_WORKER_NUM": "4"}), None)


# What real launchers set, without what says nothing here; hosts are renamed.
SRUN = {  # Slurm 22.05: srun -N3 -n5, task 3
    "SLURM_GTIDS": "3",
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "gpu-a[01-02],gpu-b7",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-a[01-02],gpu-b7",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,1(x2)",
    "SLURM_TASKS_PER_NODE": "3,1(x2)",
}
SBATCH = {  # the batch script of sbatch -N3 -n5
    "SLURM_GTIDS": "0",
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "gpu-a[01-02],gpu-b7",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "3,1(x2)",
}
MPIRUN = {  # Open MPI 4.1: mpirun -n 2, rank 1
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "1118437377",
    "OMPI_MCA_orte_hnp_uri": "1118437376.0;tcp://192.0.2.2:57687",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_NAMESPACE": "1118437377",
    "PMIX_RANK": "1",
}
MPIRUN_5 = {  # Open MPI 5.0: mpirun -n 2, rank 1
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node0-15766@1",
    "PMIX_RANK": "1",
    "PRTE_LAUNCHED": "1",
}
HYDRA = {  # MPICH 4.0: mpiexec -n 2, rank 1
    "HYDI_CONTROL_FD": "7",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "8",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}
SRUN_PMI = {"PMI_FD": "12", "PMI_JOBID": "41.0", "PMI_RANK": "3", "PMI_SIZE": "5"}  # what srun --mpi=pmi2 adds
MSRUN = {  # msrun of MindSpore 2.7: --worker_num 2, worker 1
    "DEVICE_ID": "1",
    "MS_NODE_ID": "1",
    "MS_NODE_RANK": "-1",
    "MS_ROLE": "MS_WORKER",
    "MS_SCHED_HOST": "127.0.0.1",
    "MS_SCHED_PORT": "8218",
    "MS_TOPO_TIMEOUT": "60",
    "MS_WORKER_NUM": "2",
    "RANK_ID": "1",
    "RANK_SIZE": "2",
}
AGENT = {  # what torchrun --nnodes 2 --master-addr adds
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "26123",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
# Below a launcher that started one process a node of three: srun's variables, as orted and hydra's proxy hand them on.
ONE_A_NODE = {
    **SRUN,
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_TASKS_PER_NODE": "1(x3)",
}
OVER_NODES = {
    "OMPI_COMM_WORLD_SIZE": "5",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}


def drop(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in variables.items() if name not in names}


def counted(environment: LaunchEnvironment) -> tuple[str, int | None, int | None, int | None, int | None]:
    return environment.launcher, environment.rank, environment.world_size, environment.local_rank, environment.local_world_size


def meeting_point(environment: LaunchEnvironment) -> tuple[str | None, int | None, str]:
    return environment.master_addr, environment.master_port, environment.store_host


@pytest.mark.parametrize(("text", "seconds"), [("60", 60.0), ("2.5", 2.5), ("-1", 31536000.0), ("1e12", 31536000.0)])
def test_msruns_limit_for_the_start_is_read(text: str, seconds: float) -> None:
    assert read_environment({**MSRUN, "MS_TOPO_TIMEOUT": text}).join_seconds == seconds
    assert read_environment(drop(MSRUN, "MS_TOPO_TIMEOUT")).join_seconds is None


@pytest.mark.parametrize("text", ["soon", "0", "nan", "inf"])
def test_a_limit_that_is_no_time_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"MS_TOPO_TIMEOUT is '{text}', but seconds are needed, or -1 for no limit"):
        read_environment({**MSRUN, "MS_TOPO_TIMEOUT": text})


def test_srun_makes_a_rank() -> None:
    environment = read_environment(SRUN)
    assert counted(environment) == ("slurm", 3, 5, 0, 1)
    assert environment.is_rank and environment.run_key == "41.0"
    address, port, store_host = meeting_point(environment)
    assert (address, store_host) == ("gpu-a01", "rank 0") and port is not None and 20000 <= port < 30000
    assert environment.sources == {
        "launcher": "SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NODELIST",
        "rank": "SLURM_PROCID",
        "world_size": "SLURM_STEP_NUM_TASKS",
        "local_rank": "SLURM_LOCALID",
        "local_world_size": "SLURM_STEP_TASKS_PER_NODE, SLURM_NODEID",
        "master_addr": "SLURM_STEP_NODELIST",
        "master_port": "SLURM_JOB_ID, SLURM_STEP_ID",
        "run_key": "SLURM_JOB_ID, SLURM_STEP_ID",
    }
    assert environment.variables == {name: SRUN[name] for name in environment.variables}


def test_ranks_of_a_step_share_port_and_key_and_steps_do_not() -> None:
    first, other = read_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}), read_environment(SRUN)
    next_step = read_environment({**SRUN, "SLURM_STEP_ID": "1"})
    assert (first.run_key, first.master_port) == (other.run_key, other.master_port)
    assert first.run_key != next_step.run_key and first.master_port != next_step.master_port
    # Another Python, another process: the number must be the same there.
    assert first.master_port == 27709


def test_step_of_one_node_meets_on_loopback() -> None:
    environment = read_environment({**SRUN, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu-a01"})
    assert (environment.master_addr, environment.sources["master_addr"]) == ("127.0.0.1", "SLURM_STEP_NUM_NODES")


@pytest.mark.parametrize("variables", [SRUN, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, HYDRA])
def test_address_and_port_by_hand_go_over_the_launcher(variables: dict[str, str]) -> None:
    environment = read_environment({**variables, "MASTER_ADDR": " head ", "MASTER_PORT": "1234"})
    assert meeting_point(environment) == ("head", 1234, "rank 0")
    assert (environment.sources["master_addr"], environment.sources["master_port"]) == ("MASTER_ADDR", "MASTER_PORT")


def test_count_of_the_step_goes_over_that_of_the_allocation() -> None:
    preserved = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}  # srun --preserve-env -n2
    assert counted(read_environment({**SRUN, **preserved})) == ("slurm", 1, 2, 0, 1)
    environment = read_environment(drop(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"))
    assert counted(environment) == ("slurm", 3, 5, 0, 1)
    assert (environment.sources["world_size"], environment.sources["local_world_size"]) == (
        "SLURM_NTASKS",
        "SLURM_TASKS_PER_NODE, SLURM_NODEID",
    )


def test_batch_script_is_no_rank() -> None:
    environment = read_environment(SBATCH)
    assert environment == LaunchEnvironment()
    assert decide_world_size(4, environment, None) == 4
    # sbatch called inside `srun --pty bash` hands that step's variables on.
    stale = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu-a01", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert not read_environment({**SBATCH, **stale}).is_rank


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS"),
        ({**SRUN, **SRUN_PMI, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_RANK": "0", "PMI_SIZE": "1"}, "SLURM_STEP_NUM_TASKS"),
        ({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({**SRUN, **MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({**HYDRA, "PMI_SIZE": "1", "PMI_RANK": "0"}, "PMI_SIZE"),
    ],
)
def test_lone_program_of_srun_or_mpirun_starts_its_own_ranks(variables: dict[str, str], names: str) -> None:
    environment = read_environment(variables)
    assert environment == LaunchEnvironment(variables={names: "1"}, sources={"launcher": names})
    assert not environment.is_rank and decide_world_size(4, environment, None) == 4


def test_lone_rank_of_torchrun_and_msrun_is_a_rank() -> None:
    assert read_environment({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}).is_rank
    assert read_environment({**MSRUN, "MS_WORKER_NUM": "1", "RANK_SIZE": "1", "MS_NODE_ID": "0", "RANK_ID": "0"}).is_rank


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node", "node"),
        ("node1,node2", "node1"),
        ("node[01-03,7],other", "node01"),
        ("node[7,01-03]", "node7"),
        ("node[003]", "node003"),
        ("other,node[01-03]", "other"),
        ("rack[1-2]n[08-10]", "rack1n08"),
        ("gpu[0-1].site.org,x", "gpu0.site.org"),
        ("vm-a.site.org", "vm-a.site.org"),
    ],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert read_environment({**SRUN, "SLURM_STEP_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize("nodes", [",node", "node[01-03", "node]", "[]", "node[],x", "node[,1]"])
def test_list_of_hosts_that_cannot_be_read_is_named(nodes: str) -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST is .*, but hosts such as .* are needed; export MASTER_ADDR"):
        read_environment({**SRUN, "SLURM_STEP_NODELIST": nodes})


@pytest.mark.parametrize(
    ("tasks", "node", "count"), [("2(x3),1", 0, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("5", 0, 5), ("3,1(x2)", 2, 1), ("2", 1, None)]
)
def test_tasks_of_a_node(tasks: str, node: int, count: int | None) -> None:
    environment = read_environment({**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)})
    assert environment.local_world_size == count


def test_tasks_of_a_node_that_cannot_be_read_are_named() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE is '2\(x\)', but tasks of each node such as"):
        read_environment({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x)"})


@pytest.mark.parametrize(
    ("variables", "key"), [(MPIRUN, "1118437377"), (drop(MPIRUN, "PMIX_NAMESPACE"), "1118437377"), (MPIRUN_5, "prterun-node0-15766@1")]
)
def test_mpirun_makes_a_rank(variables: dict[str, str], key: str) -> None:
    environment = read_environment(variables)
    assert counted(environment) == ("openmpi", 1, 2, 1, 2)
    address, port, store_host = meeting_point(environment)
    assert (address, store_host, environment.run_key) == ("127.0.0.1", "rank 0", key)
    assert port is not None and 20000 <= port < 30000
    assert environment.sources["master_addr"] == "OMPI_COMM_WORLD_LOCAL_SIZE, OMPI_COMM_WORLD_SIZE"


def test_mpirun_without_a_key_takes_the_usual_port() -> None:
    environment = read_environment({name: text for name, text in MPIRUN.items() if name.startswith("OMPI_COMM_WORLD_")})
    assert (environment.launcher, environment.master_port, environment.run_key) == ("openmpi", 29500, None)
    assert "master_port" not in environment.sources


def test_hydra_makes_a_rank() -> None:
    environment = read_environment(HYDRA)
    assert counted(environment) == ("pmi", 1, 2, 1, 2)
    assert meeting_point(environment) == ("127.0.0.1", 29500, "rank 0")


def test_pmi_alone_says_nothing_of_the_host() -> None:
    environment = read_environment({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "node0"})
    assert counted(environment) == ("pmi", 1, 2, None, None)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**MPIRUN, **OVER_NODES}, "OMPI_COMM_WORLD_SIZE is 5, but OMPI_COMM_WORLD_LOCAL_SIZE is 1: .*mpirun -x MASTER_ADDR="),
        ({**HYDRA, "PMI_SIZE": "4"}, "PMI_SIZE is 4, but MPI_LOCALNRANKS is 2: .*mpiexec -genv MASTER_ADDR "),
        (drop(SRUN, "SLURM_STEP_NODELIST"), "SLURM_STEP_NUM_TASKS is 5, but SLURM_STEP_TASKS_PER_NODE is 1: .*export MASTER_ADDR="),
    ],
)
def test_ranks_on_other_hosts_need_an_address(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_environment(variables)


def test_msrun_makes_a_rank() -> None:
    environment = read_environment(MSRUN)
    assert counted(environment) == ("mindspore", 1, 2, 1, None)
    assert environment.is_rank and not environment.is_scheduler and environment.worker_num == 2
    assert meeting_point(environment) == ("127.0.0.1", 8218, "scheduler")
    assert environment.sources["rank"] == "MS_NODE_ID" and environment.sources["world_size"] == "MS_WORKER_NUM"
    with pytest.raises(ConfigError, match="--workers is 4, but mindspore's MS_WORKER_NUM is 2"):
        decide_world_size(4, environment, None)


def test_scheduler_of_msrun_is_no_rank() -> None:
    environment = read_environment({**drop(MSRUN, "DEVICE_ID", "MS_NODE_ID"), "MS_ROLE": "MS_SCHED", "RANK_ID": "0"})
    assert (environment.launcher, environment.is_scheduler, environment.is_rank) == ("mindspore", True, False)
    assert (environment.rank, environment.local_rank, environment.worker_num) == (None, None, 2)
    assert meeting_point(environment) == ("127.0.0.1", 8218, "scheduler")
    assert read_environment({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2", "MS_SCHED_HOST": "h", "MS_SCHED_PORT": "1"}).is_scheduler


def test_other_roles_of_mindspore_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"MS_ROLE is 'MS_PSERVER', but only MS_WORKER .* and MS_SCHED .* are supported"):
        read_environment({**MSRUN, "MS_ROLE": "MS_PSERVER"})


def test_mindspore_node_id_may_be_any_text() -> None:
    environment = read_environment({**MSRUN, "MS_NODE_ID": "worker-b", "RANK_ID": "0"})
    assert (environment.rank, environment.sources["rank"]) == (0, "RANK_ID")
    with pytest.raises(ConfigError, match=r"the environment looks like mindspore's .* but lacks RANK_ID;"):
        read_environment({**drop(MSRUN, "RANK_ID"), "MS_NODE_ID": "worker-b"})
    with pytest.raises(ConfigError, match="but lacks MS_NODE_ID or RANK_ID;"):
        read_environment(drop(MSRUN, "MS_NODE_ID", "RANK_ID"))


@pytest.mark.parametrize("device", [None, "6"])
def test_device_that_numbers_no_rank_is_no_local_rank(device: str | None) -> None:
    variables = drop(MSRUN, "DEVICE_ID") if device is None else {**MSRUN, "DEVICE_ID": device}
    assert counted(read_environment(variables)) == ("mindspore", 1, 2, None, None)


@pytest.mark.parametrize("name", ["MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT"])
@pytest.mark.parametrize("role", ["MS_WORKER", "MS_SCHED"])
def test_incomplete_set_of_mindspore_names_what_is_missing(name: str, role: str) -> None:
    with pytest.raises(ConfigError, match=f"looks like mindspore's .* but lacks {name};"):
        read_environment({**drop(MSRUN, name), "MS_ROLE": role})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**MSRUN, "RANK_SIZE": "8"}, "MS_WORKER_NUM is 2, but RANK_SIZE is 8; make them equal, or unset RANK_SIZE"),
        ({**MSRUN, "RANK_ID": "0"}, "MS_NODE_ID is 1, but RANK_ID is 0; make them equal"),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but SLURM_STEP_NUM_TASKS is 5: torchrun and slurm disagree"),
        ({**drop(SRUN, "SLURM_STEP_NUM_TASKS"), **TORCHRUN}, "WORLD_SIZE is 8, but SLURM_NTASKS is 5: torchrun and slurm disagree"),
        ({**SRUN, **TORCHRUN, "WORLD_SIZE": "5", "RANK": "1"}, "RANK is 1, but SLURM_PROCID is 3: torchrun and slurm disagree"),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is 2, but SLURM_STEP_NUM_TASKS is 5"),
        ({**MPIRUN, **TORCHRUN}, "WORLD_SIZE is 8, but OMPI_COMM_WORLD_SIZE is 2: torchrun and openmpi disagree"),
        ({**SRUN, **MPIRUN, **TORCHRUN}, "WORLD_SIZE is 8, but OMPI_COMM_WORLD_SIZE is 2: torchrun and openmpi disagree"),
        ({**SRUN, **drop(MSRUN, "MS_TOPO_TIMEOUT")}, "MS_WORKER_NUM is 2, but SLURM_STEP_NUM_TASKS is 5: mindspore and slurm disagree"),
        ({**SRUN, **SRUN_PMI, "PMI_RANK": "2"}, "SLURM_PROCID is 3, but PMI_RANK is 2: slurm and pmi disagree"),
    ],
)
def test_sources_that_disagree_are_named(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment(variables)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({**SRUN, **TORCHRUN, "WORLD_SIZE": "5", "RANK": "3"}, "torchrun"),
        # As batch scripts for PyTorch write them: not enough for torchrun, and no hindrance to Slurm.
        ({**SRUN, "WORLD_SIZE": "5", "RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}, "slurm"),
        ({**SRUN, **SRUN_PMI}, "slurm"),
        ({**MPIRUN, **TORCHRUN, "WORLD_SIZE": "2", "RANK": "1"}, "torchrun"),
        ({**MPIRUN, **HYDRA}, "openmpi"),
        ({**MPIRUN, **drop(MSRUN, "MS_TOPO_TIMEOUT")}, "mindspore"),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "5", "OMPI_COMM_WORLD_RANK": "3", "MASTER_ADDR": "head"}, "openmpi"),
    ],
)
def test_among_sources_that_agree_the_one_with_more_to_say_counts(variables: dict[str, str], launcher: str) -> None:
    environment = read_environment(variables)
    assert environment.launcher == launcher
    if "MASTER_ADDR" in variables:
        assert environment.master_addr == variables["MASTER_ADDR"]


@pytest.mark.parametrize("around", [SRUN, {**SRUN, **SRUN_PMI}, MPIRUN, MPIRUN_5, HYDRA, {**SRUN, **MPIRUN}, MSRUN])
def test_torchrun_inside_another_launcher_counts(around: dict[str, str]) -> None:
    environment = read_environment({**drop(around, "MS_WORKER_NUM"), **AGENT})
    assert counted(environment) == ("torchrun", 2, 4, 0, 2)
    assert meeting_point(environment) == ("node0", 26123, "launcher")
    assert environment.restart_count == 1
    assert environment.sources["launcher"] == "TORCHELASTIC_RUN_ID"


def test_key_of_torchrun_is_its_run_id_unless_that_is_everybodys() -> None:
    assert read_environment({**AGENT, "TORCHELASTIC_RUN_ID": "811c2e2b"}).run_key == "811c2e2b"
    assert read_environment(AGENT).run_key is None
    assert read_environment({**AGENT, "TORCHELASTIC_USE_AGENT_STORE": "False"}).store_host == "rank 0"


@pytest.mark.parametrize("around", [SBATCH, ONE_A_NODE, {**ONE_A_NODE, **SRUN_PMI}])
def test_mpirun_inside_slurm_counts(around: dict[str, str]) -> None:
    environment = read_environment({**around, **MPIRUN, **OVER_NODES, "MASTER_ADDR": "gpu-a01"})
    assert counted(environment) == ("openmpi", 3, 5, 0, 1)
    assert read_environment({**around, **MPIRUN_5}).launcher == "openmpi"


@pytest.mark.parametrize("around", [SBATCH, ONE_A_NODE])
def test_hydra_inside_slurm_counts(around: dict[str, str]) -> None:
    # Through srun, hydra's HYDI_CONTROL_FD does not reach the ranks.
    environment = read_environment({**around, **drop(HYDRA, "HYDI_CONTROL_FD")})
    assert counted(environment) == ("pmi", 1, 2, 1, 2)


@pytest.mark.parametrize("around", [SRUN, MPIRUN, HYDRA])
def test_msrun_inside_another_launcher_counts(around: dict[str, str]) -> None:
    environment = read_environment({**around, **MSRUN, "MS_WORKER_NUM": "8", "RANK_SIZE": "8", "MS_NODE_ID": "5", "RANK_ID": "5"})
    assert (environment.launcher, environment.rank, environment.world_size) == ("mindspore", 5, 8)


@pytest.mark.parametrize("around", [{**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, SBATCH])
def test_launcher_inside_a_lone_step_counts(around: dict[str, str]) -> None:
    assert read_environment({**around, **MPIRUN}).launcher == "openmpi"
    assert read_environment({**around, **TORCHRUN}).launcher == "torchrun"
    assert read_environment({**around, "PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "h"}).launcher == "pmi"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (drop(MPIRUN, "OMPI_COMM_WORLD_RANK"), "looks like openmpi's .* but lacks OMPI_COMM_WORLD_RANK;"),
        ({"PMI_RANK": "1"}, r"looks like pmi's \(PMI_RANK=1\) but lacks PMI_SIZE;"),
        (drop(SRUN, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), "slurm's .* but lacks SLURM_STEP_NUM_TASKS or SLURM_NTASKS;"),
        ({**SRUN, "SLURM_PROCID": "5"}, "SLURM_PROCID is 5, but SLURM_STEP_NUM_TASKS is 5: 0 to 4 is needed"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK": "x"}, "OMPI_COMM_WORLD_LOCAL_RANK is 'x', but a whole number"),
        ({**SRUN, "MASTER_PORT": "0"}, "MASTER_PORT is 0, but a whole number of at least 1 is needed"),
    ],
)
def test_sets_of_other_launchers_are_checked_too(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_environment(variables)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "pmi"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "openmpi"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "a1"}, "slurm"),
    ],
)
def test_the_least_that_a_launcher_says_makes_a_rank_of_one_host(variables: dict[str, str], launcher: str) -> None:
    environment = read_environment(variables)
    assert (environment.launcher, environment.rank, environment.world_size, environment.master_port) == (launcher, 1, 2, 29500)
    assert environment.master_addr == ("a1" if launcher == "slurm" else "127.0.0.1")


def test_one_program_a_node_is_no_rank_when_it_says_what_each_node_starts() -> None:
    assert not read_environment(SRUN).as_program().is_rank
    assert read_environment(TORCHRUN).as_program().is_rank

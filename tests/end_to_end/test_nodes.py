"""Runs on two nodes: network namespaces of this machine, and two parents on loopback that do not come together.

Where namespaces cannot be made, the tests in them are skipped and say so (`pytest -rs` shows it).
"""

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Running, Tandem

SECONDS = 90
PORT = "8118"
IP = shutil.which("ip", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
NAMESPACES = Path("/run/netns")
LISTENING = "0A"
"""A state in /proc/PID/net/tcp."""


def _arguments(checkpoints: "Checkpoints", *options: str) -> list[str | Path]:
    # One prompt after the other: the line of the first tells that the second is being decoded.
    plain = ("--max-batch-size", "1", "--max-new-tokens", "40", "--ignore-eos", "--dtype", "float32", "--threads-per-rank", "1")
    return ["--checkpoint", checkpoints.float, *plain, *options]


@dataclass(frozen=True)
class Network:
    """Two namespaces with a link between them."""

    namespaces: tuple[str, str]
    device: str
    """Node 1's end of the link."""
    addresses: tuple[str, str]

    def set_link(self, state: str) -> None:
        """Take the link up or down."""
        _ip("-n", self.namespaces[1], "link", "set", self.device, state)


@dataclass(frozen=True)
class Node:
    """One node's parent, and where its files land."""

    running: "Running"
    folder: Path

    @property
    def verdict(self) -> dict[str, Any]:
        """Its verdict."""
        read: dict[str, Any] = json.loads((self.folder / "logs" / "verdict.json").read_text())
        return read

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; exit code, standard output and standard error."""
        stdout, stderr = self.running.process.communicate(timeout=SECONDS)
        return self.running.process.returncode, stdout, stderr


def _ip(*words: str) -> None:
    assert IP is not None
    subprocess.run([IP, *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two namespaces, gone at the end."""
    if IP is None or os.getuid() != 0:
        pytest.skip("network namespaces need root and the program ip (package iproute2)")
    mark, subnet = os.getpid() % 100000, f"10.77.{os.getpid() % 250}"
    network = Network((f"tdm{mark}a", f"tdm{mark}b"), f"tdm{mark}w", (f"{subnet}.1", f"{subnet}.2"))
    try:
        try:
            for name in network.namespaces:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            first, second = network.namespaces
            _ip("-n", first, "link", "add", f"tdm{mark}v", "type", "veth", "peer", "name", network.device, "netns", second)
            for name, device, address in zip(network.namespaces, (f"tdm{mark}v", network.device), network.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield network
    finally:
        for name in network.namespaces:
            subprocess.run([IP, "netns", "del", name], check=False, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def alone(tandem: "Tandem", checkpoints: "Checkpoints") -> "Outcome":
    """The run on one rank of one node."""
    return tandem.predict(*_arguments(checkpoints))


def _start_node(tandem: "Tandem", number: int, address: str, port: str, *words: str | Path, namespace: str | None = None) -> Node:
    folder = tandem.new_folder()
    where = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", address, "--master-port", port)
    network = None if namespace is None else NAMESPACES / namespace
    return Node(tandem.start(tandem.predict_command(folder, *words, *where), network=network), folder)


def _start(tandem: "Tandem", network: Network, checkpoints: "Checkpoints", *options: str) -> tuple[list[Node], str]:
    """Both nodes, decoding on three ranks, and the line of the first result."""
    words = [*_arguments(checkpoints, *options), "--workers", "3"]
    nodes = [
        _start_node(tandem, number, network.addresses[0], PORT, *words, namespace=name) for number, name in enumerate(network.namespaces)
    ]
    stdout = nodes[0].running.process.stdout
    assert stdout is not None
    line = stdout.readline()
    assert line.startswith("'text_generation_text': "), [node.finish() for node in nodes]
    assert [sorted(node.running.find_ranks()) for node in nodes] == [[0, 1], [2]], "decoding has begun, and is not over"
    return nodes, line


def _list_listeners(pid: int) -> set[str]:
    """The addresses at which somebody listens in the namespace of a process."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == LISTENING:
                words = bytes.fromhex(local.partition(":")[0])
                raw = b"".join(words[first : first + 4][::-1] for first in range(0, len(words), 4))
                found.add(str(ipaddress.ip_address(raw)))
    return found


def test_two_nodes_give_the_results_of_one_rank_and_listen_to_each_other_only(
    tandem: "Tandem", network: Network, checkpoints: "Checkpoints", alone: "Outcome"
) -> None:
    nodes, line = _start(tandem, network, checkpoints)
    listeners = [_list_listeners(node.running.process.pid) for node in nodes]
    ended = [node.finish() for node in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert network.addresses[0] in listeners[0], listeners
    for address, found in zip(network.addresses, listeners, strict=True):
        assert all(other == address or other.startswith("127.") for other in found), listeners
    assert (nodes[0].folder / "results.jsonl").read_text() == alone.jsonl
    assert [line + ended[0][1], ended[1][1]] == [alone.stdout, ""], "only the first node prints"
    stats = json.loads((nodes[0].folder / "stats.json").read_text())
    assert (stats["collectives"], stats["world_size"], stats["restarts"]) == ("shm+gloo", 3, 0)
    logs = [sorted(path.name for path in (node.folder / "logs").iterdir()) for node in nodes]
    assert logs == [["worker_0.log", "worker_1.log"], ["worker_2.log"]]
    assert [node.running.find_processes() for node in nodes] == [[], []]


def test_a_rank_that_is_killed_on_another_node_is_named_by_both(tandem: "Tandem", network: Network, checkpoints: "Checkpoints") -> None:
    nodes, _ = _start(tandem, network, checkpoints, "--max-restarts", "0")
    pid = nodes[1].running.find_ranks()[2]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = [node.finish() for node in nodes]
    assert [code for code, _, _ in ended] == [1, 1] and time.monotonic() - killed < 10, ended
    first, second = (node.verdict for node in nodes)
    assert first == second
    assert (first["first_failed_rank"], first["signal"], first["pid"], first["exit_code"]) == (2, "SIGKILL", pid, None)
    assert all("rank 2 failed first" in stderr and "SIGKILL" in stderr for _, _, stderr in ended), ended
    assert [node.running.find_processes() for node in nodes] == [[], []]


def test_a_rank_that_is_killed_on_another_node_is_started_again(
    tandem: "Tandem", network: Network, checkpoints: "Checkpoints", alone: "Outcome"
) -> None:
    nodes, line = _start(tandem, network, checkpoints, "--max-restarts", "1")
    os.kill(nodes[1].running.find_ranks()[2], signal.SIGKILL)
    ended = [node.finish() for node in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (nodes[0].folder / "results.jsonl").read_text() == alone.jsonl
    assert line + ended[0][1] == alone.stdout, "each result is printed once"
    assert json.loads((nodes[0].folder / "stats.json").read_text())["restarts"] == 1
    assert "a rank failed on another node; restart 1 of 1" in ended[0][2]
    assert "rank 2 failed (ended by SIGKILL); restart 1 of 1" in ended[1][2]
    assert not any((node.folder / "logs" / "verdict.json").exists() for node in nodes)
    assert [node.running.find_processes() for node in nodes] == [[], []]


def test_a_link_that_is_down_for_less_than_the_timeout_costs_no_restart(
    tandem: "Tandem", network: Network, checkpoints: "Checkpoints", alone: "Outcome"
) -> None:
    nodes, line = _start(tandem, network, checkpoints, "--timeout", "60", "--max-restarts", "0")
    network.set_link("down")
    time.sleep(5)
    network.set_link("up")
    ended = [node.finish() for node in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (nodes[0].folder / "results.jsonl").read_text() == alone.jsonl and line + ended[0][1] == alone.stdout
    assert [node.running.find_processes() for node in nodes] == [[], []]


def test_a_node_whose_launcher_is_killed_is_named_at_once(tandem: "Tandem", network: Network, checkpoints: "Checkpoints") -> None:
    nodes, _ = _start(tandem, network, checkpoints, "--max-restarts", "1")
    nodes[1].running.process.kill()
    killed = time.monotonic()
    code, _, stderr = nodes[0].finish()
    assert code == 1 and time.monotonic() - killed < 15, stderr
    assert nodes[0].verdict["first_failed_rank"] == 2 and "node 1 was lost: its launcher exited" in stderr, stderr
    nodes[1].running.process.communicate(timeout=SECONDS)
    assert [node.running.find_processes() for node in nodes] == [[], []]


def test_a_link_that_is_down_for_longer_than_the_timeout_ends_both_nodes(
    tandem: "Tandem", network: Network, checkpoints: "Checkpoints"
) -> None:
    """Each names the other one, of which it hears no more."""
    nodes, _ = _start(tandem, network, checkpoints, "--timeout", "8")
    network.set_link("down")
    try:
        down = time.monotonic()
        ended = [node.finish() for node in nodes]
        seconds = time.monotonic() - down
    finally:
        network.set_link("up")
    assert [code for code, _, _ in ended] == [1, 1] and seconds < 20, (seconds, ended)
    for other, node, (_, _, stderr) in zip((1, 0), nodes, ended, strict=True):
        assert f"node {other} was lost" in node.verdict["exception"] and f"node {other} was lost" in stderr
        assert node.verdict["host"] == f"node {other}" and node.verdict["first_failed_rank"] == (0, 2)[other]
    assert [node.running.find_processes() for node in nodes] == [[], []]


def test_nodes_that_do_not_come_together_say_why(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """On loopback, all at once: a port in use, a node that never comes, a node with another --dtype."""
    address, words = "127.0.0.1", [*_arguments(checkpoints), "--workers", "2"]
    with socket.socket() as taken, socket.socket() as lonely, socket.socket() as odd:
        for listener in (taken, lonely, odd):
            listener.bind((address, 0))
        ports = [str(listener.getsockname()[1]) for listener in (taken, lonely, odd)]
        lonely.close()
        odd.close()
        taken.listen()
        in_use = _start_node(tandem, 0, address, ports[0], *words)
        waiting = _start_node(tandem, 0, address, ports[1], *words, "--timeout", "4")
        differing = [_start_node(tandem, number, address, ports[2], *words, *("--dtype", "bfloat16") * number) for number in (0, 1)]
        nodes = [in_use, waiting, *differing]
        ended = [node.finish() for node in nodes]
    assert [code for code, _, _ in ended] == [1, 1, 2, 2], ended
    assert waiting.verdict["first_failed_rank"] == 1
    expected = [
        f"cannot listen on {address}, port {ports[0]}: Address already in use",
        f"node 1 did not join within 4 s (--timeout): 1 of 2 nodes have joined at {address}, port {ports[1]}",
        "tandem: node 1 has dtype bfloat16, but node 0 has float32: start all with the same options\n",
        "tandem: node 0 has dtype float32, but node 1 has bfloat16: start all with the same options\n",
    ]
    for node, (_, stdout, stderr), said in zip(nodes, ended, expected, strict=True):
        assert stdout == "" and "Traceback" not in stderr
        assert said in stderr and (node in differing or said in node.verdict["exception"])
        assert node.running.find_processes() == []

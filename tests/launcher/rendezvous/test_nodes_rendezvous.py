"""The store that listens at one address only, and nodes that meet, do not come, differ, or vanish. Nodes are threads here."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.host.loopback import is_loopback
from launcher.rendezvous import nodes_rendezvous as rendezvous
from launcher.rendezvous.errors import DifferentRunError, NodesError, RunOver, StoreError
from launcher.rendezvous.key_value_store import connect_store, find_own_address, open_store
from launcher.rendezvous.nodes_rendezvous import NodeRendezvous

GREETING = {"world_size": 2, "local_workers": 1, "dtype": "float32"}


def listening_addresses(port: int) -> set[str]:
    """Local addresses, as the kernel writes them, on which something listens at the port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == port:
                found.add(address.split(":")[0])
    return found


def meet(nodes: list[NodeRendezvous]) -> list[Any]:
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(lambda node: node.next_attempt(), nodes))


def make_nodes(count: int, *, timeout_seconds: float = 20, greetings: list[dict[str, Any]] | None = None) -> list[NodeRendezvous]:
    said = greetings or [{**GREETING, "world_size": count}] * count
    first = NodeRendezvous(0, count, "127.0.0.1", 0, timeout_seconds, said[0])
    return [first, *(NodeRendezvous(node, count, "127.0.0.1", first.port, timeout_seconds, said[node]) for node in range(1, count))]


def test_store_listens_at_its_address_only() -> None:
    store, port = open_store("127.0.0.1", 0)
    assert listening_addresses(port) == {"0100007F"}
    client = connect_store("127.0.0.1", port, 5)
    client.set("key", "text")
    assert store.get("key") == b"text"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            StoreError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another --master-port"
        ):
            open_store("127.0.0.1", port)


def test_a_store_that_nobody_opens_is_named_with_the_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(StoreError, match=f"no answer from 127.0.0.1, port {port} within 0.3 s"):
            connect_store("127.0.0.1", port, 0.3)


def test_own_address_towards_a_host() -> None:
    assert find_own_address("127.0.0.1") == "127.0.0.1" and find_own_address("localhost") == "127.0.0.1"
    for address in ("127.8.9.1", "::1", "localhost"):
        assert is_loopback(address)
    for address in ("10.0.0.1", "127.evil.example", "127.0.0.1.evil.example", "::", ""):
        assert not is_loopback(address)


def test_nodes_keep_their_numbers_and_follow_each_other_into_the_next_attempt() -> None:
    nodes = make_nodes(3)
    try:
        assert meet(nodes) == [0, 0, 0] and [node.first_ranks for node in nodes] == [[0, 1, 2]] * 3
        assert not any(node.is_behind() for node in nodes)
        again = threading.Thread(target=nodes[1].next_attempt)
        again.start()
        for node in (nodes[0], nodes[2]):
            while not node.is_behind():
                pass
        meet([nodes[0], nodes[2]])
        again.join()
        assert [node.attempt for node in nodes] == [1, 1, 1]
    finally:
        for node in nodes:
            node.shutdown()


def test_nodes_wait_for_each_others_ends_and_follow_one_that_restarts() -> None:
    nodes = make_nodes(2)
    try:
        meet(nodes)
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(nodes[0].wait_for_end, 20)
            again = pool.submit(nodes[1].next_attempt)
            assert waiting.result(10) is False, "node 1 needs another attempt"
            assert (nodes[0].next_attempt(), again.result(10)) == (1, 1)
            assert list(pool.map(lambda node: node.wait_for_end(20), nodes)) == [True, True]
        assert nodes[0].wait_for_end(0)
    finally:
        for node in nodes:
            node.shutdown()


def test_what_one_node_shares_the_others_get() -> None:
    nodes = make_nodes(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            heard = pool.submit(nodes[1].wait_for, "task/0")
            nodes[0].share("task/0", "decode")
            assert heard.result(10) == "decode"
    finally:
        for node in nodes:
            node.shutdown()


def test_a_node_that_does_not_come_is_named() -> None:
    first = NodeRendezvous(0, 2, "127.0.0.1", 0, 0.5, GREETING)
    try:
        with pytest.raises(
            NodesError, match=r"node 1 did not join within 0.5 s \(--timeout\): 1 of 2 nodes have joined at 127.0.0.1"
        ) as refused:
            first.next_attempt()
        assert refused.value.node == 1
    finally:
        first.shutdown()


def test_nodes_with_other_settings_are_named() -> None:
    nodes = make_nodes(2, greetings=[GREETING, {**GREETING, "dtype": "bfloat16"}])
    try:
        with pytest.raises(DifferentRunError, match="node 1 has dtype bfloat16, but node 0 has float32: start all with the same options"):
            meet(nodes)
    finally:
        for node in nodes:
            node.shutdown()


def test_nodes_that_start_too_few_ranks_are_named() -> None:
    nodes = make_nodes(2, greetings=[{**GREETING, "world_size": 3}] * 2)
    try:
        with pytest.raises(NodesError, match=r"the nodes start 1 \+ 1 ranks, but --workers is 3"):
            meet(nodes)
    finally:
        for node in nodes:
            node.shutdown()


def test_a_node_that_falls_silent_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_BEAT_SECONDS", 0.1)
    nodes = make_nodes(2, timeout_seconds=2)
    meet(nodes)
    try:
        while nodes[0].find_lost() or not nodes[0]._pulse._counts:  # until the first sign of life
            pass
        nodes[1]._pulse.end()
        with pytest.raises(NodesError, match=r"node 1 was lost: no heartbeat for 2 s \(--timeout\)"):
            while True:
                nodes[0].is_behind()
    finally:
        for node in nodes:
            node.shutdown()


def test_a_node_whose_launcher_ends_is_missed_at_once() -> None:
    nodes = make_nodes(2, timeout_seconds=60)
    meet(nodes)
    try:
        assert nodes[0].find_lost() == nodes[1].find_lost() == {}
        nodes[1].shutdown()
        with pytest.raises(NodesError, match="node 1 was lost: its launcher exited"):
            while True:
                nodes[0].is_behind()
    finally:
        nodes[0].shutdown()


def test_a_verdict_ends_the_run_on_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_BEAT_SECONDS", 0.1)
    nodes = make_nodes(2)
    meet(nodes)
    try:
        with ThreadPoolExecutor(2) as pool:
            said = pool.submit(nodes[1].exchange_verdicts, json.dumps("rank 1"))
            with pytest.raises(RunOver):
                while True:
                    nodes[0].is_behind()
            assert nodes[0].exchange_verdicts(json.dumps("echo")) == {0: '"echo"', 1: '"rank 1"'} == said.result(15)
    finally:
        for node in nodes:
            node.shutdown()

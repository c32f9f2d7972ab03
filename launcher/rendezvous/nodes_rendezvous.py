"""Where the parents of a run's nodes meet, once for every attempt: a rendezvous of PyTorch's elastic agent.

Unlike the agent's own ones it keeps nodes in the order of --node-rank, listens at one address only, notices within seconds that a
node has gone, and hands on what went wrong there. Nodes count attempts together: who fails starts the next, the others follow.
Knows nodes and short texts; nothing of ranks' work.
"""

import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from launcher.rendezvous.key_value_store import connect_store, open_store
from parallel.errors import RunError

NODE_SILENCE_SECONDS = 10.0
"""A node that has not been heard of for so long has gone."""
_BEAT_SECONDS = 0.5
_POLL_SECONDS = 0.05
_NAMESPACE = "tandem"


class NodesError(RunError):
    """Nodes did not come together, or one was lost."""

    def __init__(self, message: str, node: int) -> None:
        super().__init__(message)
        self.node = node
        """The node that is to blame."""


class RunOver(RunError):
    """Another node has ended the run, with a verdict."""


class NodeRendezvous(RendezvousHandler):
    """One node's side. `port` 0 takes any free port, for a single node."""

    def __init__(self, node: int, num_nodes: int, address: str, port: int, join_seconds: float, greeting: Mapping[str, Any]) -> None:
        self.node, self.num_nodes = node, num_nodes
        self._join_seconds, self._greeting = join_seconds, json.dumps(greeting, sort_keys=True)
        self.attempt = -1
        self.first_ranks: list[int] = [0] * num_nodes
        """The first rank of every node, once they have met."""
        if node == 0:
            raw, port = open_store(address, port)
        else:
            raw = connect_store(address, port, join_seconds)
        self._raw = raw  # the first node's is the server, which ends with it
        self.address, self.port = address, port
        self.store: Store = PrefixStore(_NAMESPACE, raw)
        self._pulse = _Pulse(node, num_nodes, address, port) if num_nodes > 1 else None
        if self._pulse is not None:
            self._pulse.start()

    def get_backend(self) -> str:
        """The name in the agent's records."""
        return "tandem"

    @property
    def use_agent_store(self) -> bool:
        """The ranks use this store too."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet all nodes for the next attempt. Raises NodesError for one that does not come, or comes with other settings; RunOver."""
        self.attempt = max(self.attempt + 1, self._pulse.furthest if self._pulse else 0)
        prefix, deadline = f"attempt_{self.attempt}", time.monotonic() + self._join_seconds
        self.store.set(f"{prefix}/node_{self.node}", self._greeting)
        if self._pulse:
            self._pulse.reached = self.attempt
        for node in range(self.num_nodes):
            while not self.store.check([f"{prefix}/node_{node}"]):
                self._check_peers()
                if time.monotonic() > deadline:
                    came = sum(self.store.check([f"{prefix}/node_{other}"]) for other in range(self.num_nodes))
                    raise NodesError(
                        f"node {node} did not come within {self._join_seconds:g} s (--timeout): {came} of {self.num_nodes} nodes are at "
                        f"{self.address}, port {self.port}; start the same command there with --node-rank {node}",
                        node,
                    )
                time.sleep(_POLL_SECONDS)
            self._compare(node, json.loads(self.store.get(f"{prefix}/node_{node}")))
        self._count_ranks(prefix)
        store = PrefixStore(prefix, self.store)
        return RendezvousInfo(store, self.node, self.num_nodes, RendezvousStoreInfo(self.address, self.port))

    def num_nodes_waiting(self) -> int:
        """Above 0 when another node has begun a new attempt, which this one has to follow. Raises NodesError, RunOver."""
        self._check_peers()
        return int(self._pulse is not None and self._pulse.furthest > self.attempt)

    def is_closed(self) -> bool:
        """A run ends by its verdict, not by a closed rendezvous."""
        return False

    def set_closed(self) -> None:
        """See `is_closed`."""

    def get_run_id(self) -> str:
        """The name under which the agents meet."""
        return _NAMESPACE

    def shutdown(self) -> bool:
        """Stop the signs of life."""
        if self._pulse is not None:
            self._pulse.end()
        return True

    def share(self, key: str, text: str) -> None:
        """Leave a text for the other nodes."""
        self.store.set(key, text)

    def wait_for(self, key: str) -> str:
        """The text that another node leaves or has left. Raises NodesError, RunOver."""
        while not self.store.check([key]):
            self._check_peers()
            time.sleep(_POLL_SECONDS)
        return self.store.get(key).decode()

    def exchange_verdicts(self, mine: str) -> dict[int, str]:
        """Leave what this node says of the failure and collect what the others say, as far as they still can."""
        pulse = self._pulse
        if pulse is None:
            return {self.node: mine}
        pulse.verdict = mine
        deadline = time.monotonic() + NODE_SILENCE_SECONDS + 1
        while time.monotonic() < deadline:
            silent = pulse.find_silent()
            if all(node in pulse.verdicts or node in silent for node in range(self.num_nodes) if node != self.node):
                break
            time.sleep(_POLL_SECONDS)
        # The first node's store answers the others' last questions.
        time.sleep(3 * _BEAT_SECONDS)
        return {**pulse.verdicts, self.node: mine}

    def say_verdict(self, mine: str) -> None:
        """Leave what this node says, and see to it that it is sent."""
        if self._pulse is not None:
            self._pulse.verdict = mine
            time.sleep(3 * _BEAT_SECONDS)

    def find_silent(self) -> list[int]:
        """Nodes that have not been heard of for NODE_SILENCE_SECONDS."""
        return self._pulse.find_silent() if self._pulse else []

    def _check_peers(self) -> None:
        pulse = self._pulse
        if pulse is None:
            return
        if pulse.verdicts:
            raise RunOver("another node has ended the run")
        for node in pulse.find_silent():
            raise NodesError(f"node {node} has gone: no sign of life for {NODE_SILENCE_SECONDS:g} s", node)

    def _compare(self, node: int, greeting: Mapping[str, Any]) -> None:
        mine = json.loads(self._greeting)
        for name, value in greeting.items():
            if name != "local_workers" and value != mine.get(name):
                raise NodesError(
                    f"node {node} has {name} {value}, but node {self.node} has {mine.get(name)}: start every node with the same options",
                    node,
                )

    def _count_ranks(self, prefix: str) -> None:
        counts = [json.loads(self.store.get(f"{prefix}/node_{node}"))["local_workers"] for node in range(self.num_nodes)]
        wanted = json.loads(self._greeting)["world_size"]
        if sum(counts) != wanted:
            started = " + ".join(map(str, counts))
            raise NodesError(f"the nodes start {started} ranks, but --workers is {wanted}: set --local-workers", self.node)
        self.first_ranks = [sum(counts[:node]) for node in range(self.num_nodes)]


class _Pulse(threading.Thread):
    """Signs of life to and from the other nodes, over a connection of its own: a call to a host that has gone can block for minutes."""

    def __init__(self, node: int, num_nodes: int, address: str, port: int) -> None:
        super().__init__(daemon=True, name="signs of life")
        self._node, self._others = node, [other for other in range(num_nodes) if other != node]
        self._where = (address, port)
        self.reached = -1
        self.furthest = 0
        self.verdict: str | None = None
        self.verdicts: dict[int, str] = {}
        now = time.monotonic()
        self._answered = now
        self._counts: dict[int, bytes] = {}
        self._heard = dict.fromkeys(self._others, float("inf"))  # before its first sign a node is late, not gone
        self._ended = threading.Event()

    def run(self) -> None:
        """Until `end`."""
        beats = 0
        with suppress(RuntimeError, RunError):  # the store's host has gone: `find_silent` tells
            store = PrefixStore(_NAMESPACE, connect_store(*self._where, NODE_SILENCE_SECONDS))
            while not self._ended.wait(_BEAT_SECONDS):
                beats += 1
                store.set(f"alive/{self._node}", str(beats))
                store.set(f"reached/{self._node}", str(self.reached))
                if self.verdict is not None:
                    store.set(f"verdict/{self._node}", self.verdict)
                for other in self._others:
                    self._ask(store, other)
                self._answered = time.monotonic()

    def end(self) -> None:
        """No more signs."""
        self._ended.set()

    def find_silent(self) -> list[int]:
        """Nodes not heard of for too long; when the store itself does not answer, its host."""
        now = time.monotonic()
        if self._node != 0 and now - self._answered > NODE_SILENCE_SECONDS:
            return [0]
        return [node for node, heard in self._heard.items() if now - heard > NODE_SILENCE_SECONDS]

    def _ask(self, store: Store, other: int) -> None:
        if store.check([f"alive/{other}"]):
            count = store.get(f"alive/{other}")
            if self._counts.get(other) != count:
                self._counts[other], self._heard[other] = count, time.monotonic()
        if store.check([f"reached/{other}"]):
            self.furthest = max(self.furthest, int(store.get(f"reached/{other}")))
        if other not in self.verdicts and store.check([f"verdict/{other}"]):
            self.verdicts[other] = store.get(f"verdict/{other}").decode()


def host_name() -> str:
    """What this host calls itself."""
    return socket.gethostname()

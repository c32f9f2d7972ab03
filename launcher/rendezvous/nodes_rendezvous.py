"""Rendezvous of the parents of a run's nodes, once per attempt, over the key-value store of the first node.

The exit of a node's launcher is noticed at once, an unreachable node after --timeout. Attempts are counted across nodes: the one that fails
starts the next attempt, and the others follow.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed import DistError

from launcher.rendezvous.errors import NodesError, RunOver, StoreError
from launcher.rendezvous.key_value_store import connect_store, find_own_address, open_store
from launcher.rendezvous.run_identity import compare_runs
from parallel.errors import PeerError, RunError
from parallel.observed_time import ObservedTime
from parallel.peer_lines import PeerLines
from parallel.torch_internals import PrefixStore, Store

_BEAT_SECONDS = 0.5
_CALL_SECONDS = 2.0
"""Time limit of a heartbeat: after an interrupted link, a new connection recovers sooner than an old one."""
_VERDICT_SECONDS = 10.0
"""How long exiting nodes wait for the verdicts of the others."""
_POLL_SECONDS = 0.05
_NAMESPACE = "tandem"


class NodeRendezvous:
    """One node's part in the rendezvous. With `port` 0, node 0 listens on any free one."""

    def __init__(
        self,
        node: int,
        num_nodes: int,
        address: str,
        port: int,
        timeout_seconds: float,
        greeting: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`timeout_seconds` limits the wait for a node that does not join or is silent. `check` is called while waiting and may raise.

        Raises StoreError.
        """
        self.node, self.num_nodes = node, num_nodes
        self._check = check
        self._timeout_seconds, self._greeting = timeout_seconds, json.dumps(greeting, sort_keys=True)
        self.attempt = -1
        self.first_ranks: list[int] = [0] * num_nodes
        """The first rank of each node, known after the rendezvous."""
        if node == 0:
            raw, port = open_store(address, port)
        else:
            raw = connect_store(address, port, timeout_seconds, check=check)
        self._raw = raw  # the first node's store is the server, and exits with it
        self.address, self.port = address, port
        self.store: Store = PrefixStore(_NAMESPACE, raw)
        self._pulse = _Pulse(node, num_nodes, address, port, timeout_seconds) if num_nodes > 1 else None
        self._lines: PeerLines | None = None
        if self._pulse is not None:
            self._pulse.start()

    def next_attempt(self) -> int:
        """Wait for all nodes to join the next attempt and return its number. Raises NodesError if one does not join, DifferentRunError if
        one belongs to another run, RunOver, and StoreError."""
        with _answering():
            self._meet()
        return self.attempt

    def _meet(self) -> None:
        self.attempt = max(self.attempt + 1, self._pulse.furthest if self._pulse else 0)
        prefix, clock = f"attempt_{self.attempt}", ObservedTime()
        self.store.set(f"{prefix}/node_{self.node}", self._greeting)
        if self._pulse:
            self._pulse.reached = self.attempt
        for node in range(self.num_nodes):
            while not self.store.check([f"{prefix}/node_{node}"]):
                self._check_peers()
                if clock.read() > self._timeout_seconds:
                    came = sum(self.store.check([f"{prefix}/node_{other}"]) for other in range(self.num_nodes))
                    raise NodesError(
                        f"node {node} did not join within {self._timeout_seconds:g} s (--timeout): {came} of {self.num_nodes} nodes have "
                        f"joined at {self.address}, port {self.port}; start the same command there with --node-rank {node}",
                        node,
                    )
                time.sleep(_POLL_SECONDS)
            self._compare(node, json.loads(self.store.get(f"{prefix}/node_{node}")))
        self._count_ranks(prefix)
        self._connect_parents()

    def is_behind(self) -> bool:
        """Return whether another node has begun a new attempt, which this one must follow. Raises NodesError, RunOver."""
        self._check_peers()
        return self._pulse is not None and self._pulse.furthest > self.attempt

    def wait_for_end(self, seconds: float) -> bool:
        """Tell the other nodes that the ranks of this one have ended well, and wait until theirs have, or are lost, for at most `seconds`.

        Returns False if another node has begun a new attempt instead. The first node's store must outlive its users.
        """
        with suppress(DistError, RunError):  # the others need this node no longer, or it has ended well all the same
            prefix, clock = f"attempt_{self.attempt}", ObservedTime()
            self.store.set(f"{prefix}/ended_{self.node}", "")
            for node in range(self.num_nodes):
                while not self.store.check([f"{prefix}/ended_{node}"]) and clock.read() < seconds:
                    if self.is_behind():
                        return False
                    time.sleep(_POLL_SECONDS)
            if self.node == 0:
                time.sleep(2 * _POLL_SECONDS)  # the others ask for the last time
        return True

    def shutdown(self) -> None:
        """Stop the heartbeats."""
        if self._pulse is not None:
            self._pulse.end()
        if self._lines is not None:
            self._lines.close()

    def share(self, key: str, text: str) -> None:
        """Publish a text for the other nodes. Raises StoreError."""
        with _answering():
            self.store.set(key, text)

    def wait_for(self, key: str) -> str:
        """Wait for a text published by another node. Raises NodesError, RunOver, StoreError."""
        with _answering():
            while not self.store.check([key]):
                self._check_peers()
                time.sleep(_POLL_SECONDS)
            return self.store.get(key).decode()

    def exchange_verdicts(self, mine: str) -> dict[int, str]:
        """Publish this node's verdict and collect those of the other nodes that are still reachable."""
        pulse = self._pulse
        if pulse is None:
            return {self.node: mine}
        pulse.verdict = mine
        deadline = time.monotonic() + _VERDICT_SECONDS
        while time.monotonic() < deadline:
            silent = self.find_lost()
            if all(node in pulse.verdicts or node in silent for node in range(self.num_nodes) if node != self.node):
                break
            time.sleep(_POLL_SECONDS)
        # The first node's store must answer the others' last requests.
        time.sleep(3 * _BEAT_SECONDS)
        return {**pulse.verdicts, self.node: mine}

    def say_verdict(self, mine: str) -> None:
        """Publish this node's verdict and wait until it is sent."""
        if self._pulse is not None:
            self._pulse.verdict = mine
            time.sleep(3 * _BEAT_SECONDS)

    def find_lost(self) -> dict[int, str]:
        """Return lost nodes with the reason: the launcher exited, or no heartbeat within the timeout."""
        ended = self._lines.find_gone() if self._lines else []
        silent = self._pulse.find_silent() if self._pulse else []
        words = f"no heartbeat for {self._timeout_seconds:g} s (--timeout)"
        return {
            **{node: f"node {node} was lost: {words}" for node in silent},
            **{node: f"node {node} was lost: its launcher exited" for node in ended},
        }

    def _check_peers(self) -> None:
        self._check()
        pulse = self._pulse
        if pulse is None:
            return
        if pulse.verdicts:
            raise RunOver("another node has ended the run")
        for node, words in self.find_lost().items():
            raise NodesError(words, node)

    def _compare(self, node: int, greeting: Mapping[str, Any]) -> None:
        mine, theirs = ({**given, "local_workers": None} for given in (json.loads(self._greeting), greeting))
        compare_runs(f"node {node}", theirs, f"node {self.node}", mine)

    def _connect_parents(self) -> None:
        """Connect to the other launchers; these connections survive attempts and close when a launcher exits."""
        if self.num_nodes == 1 or self._lines is not None:
            return
        store, address = PrefixStore("launchers", self.store), find_own_address(self.address)
        try:
            self._lines = PeerLines(store, self.node, range(self.num_nodes), address, self._timeout_seconds)
        except PeerError as error:
            raise NodesError(f"node {error.peer} cannot be reached: {error}", error.peer or 0) from None

    def _count_ranks(self, prefix: str) -> None:
        counts = [json.loads(self.store.get(f"{prefix}/node_{node}"))["local_workers"] for node in range(self.num_nodes)]
        wanted = json.loads(self._greeting)["world_size"]
        if sum(counts) != wanted:
            started = " + ".join(map(str, counts))
            raise NodesError(f"the nodes start {started} ranks, but --workers is {wanted}: set --local-workers", self.node)
        self.first_ranks = [sum(counts[:node]) for node in range(self.num_nodes)]


@contextmanager
def _answering() -> Iterator[None]:
    """Convert the error of a store whose host has ended."""
    try:
        yield
    except DistError as error:
        raise StoreError(f"the first node no longer answers: {str(error).partition(chr(10))[0]}") from error


class _Pulse(threading.Thread):
    """Heartbeats to and from the other nodes, on a separate connection: a request to a dead host can block for minutes."""

    def __init__(self, node: int, num_nodes: int, address: str, port: int, silence_seconds: float) -> None:
        super().__init__(daemon=True, name="heartbeats")
        self._node, self._others = node, [other for other in range(num_nodes) if other != node]
        self._where, self._silence_seconds, self._clock = (address, port), silence_seconds, ObservedTime()
        self._beats = 0
        self.reached = -1
        self.furthest = 0
        self.verdict: str | None = None
        self.verdicts: dict[int, str] = {}
        self._answered = 0.0
        self._counts: dict[int, bytes] = {}
        self._heard = dict.fromkeys(self._others, float("inf"))  # until its first heartbeat a node is late, not lost
        self._ended = threading.Event()

    def run(self) -> None:
        """Run until `end`."""
        while not self._ended.is_set():
            # An unreachable store is reported by `find_silent`, unless it recovers soon.
            with suppress(RuntimeError, RunError):
                self._exchange(PrefixStore(_NAMESPACE, connect_store(*self._where, _CALL_SECONDS, call_seconds=_CALL_SECONDS)))

    def _exchange(self, store: Store) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            self._beats += 1
            store.set(f"alive/{self._node}", str(self._beats))
            store.set(f"reached/{self._node}", str(self.reached))
            if self.verdict is not None:
                store.set(f"verdict/{self._node}", self.verdict)
            for other in self._others:
                self._ask(store, other)
            self._answered = self._clock.read()

    def end(self) -> None:
        """Stop the heartbeats and wait for the call at work: the interpreter's exit would abort a thread inside of it."""
        self._ended.set()
        if self.is_alive():
            self.join(2 * _CALL_SECONDS)

    def find_silent(self) -> list[int]:
        """Return nodes without a heartbeat for too long; if the store itself does not respond, its host."""
        now = self._clock.read()
        if self._node != 0 and now - self._answered > self._silence_seconds:
            return [0]
        return [node for node, heard in self._heard.items() if now - heard > self._silence_seconds]

    def _ask(self, store: Store, other: int) -> None:
        if store.check([f"alive/{other}"]):
            count = store.get(f"alive/{other}")
            if self._counts.get(other) != count:
                self._counts[other], self._heard[other] = count, self._clock.read()
        if store.check([f"reached/{other}"]):
            self.furthest = max(self.furthest, int(store.get(f"reached/{other}")))
        if other not in self.verdicts and store.check([f"verdict/{other}"]):
            self.verdicts[other] = store.get(f"verdict/{other}").decode()

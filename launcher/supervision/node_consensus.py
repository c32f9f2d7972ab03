"""Agreement on a failure among the parents of a multi-node run: each node's verdict, and the common one.

Depends on this node's watch and the rendezvous; starts and stops nothing.
"""

import json
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.host.control_groups import MemoryGroup, read_memory_group
from launcher.rendezvous.errors import DifferentRunError, NodesError, RunOver
from launcher.rendezvous.nodes import Nodes
from launcher.supervision.rank_watch import FirstFailure
from launcher.supervision.verdict import Verdict, judge_failure
from model.checkpoint.fingerprint import CheckpointReplacedError

if TYPE_CHECKING:
    from launcher.rendezvous.nodes_rendezvous import NodeRendezvous


class RanksEnded(Exception):
    """A rank of this node failed, and no restarts are left."""


def judge(
    error: Exception,
    failure: FirstFailure | None,
    nodes: Nodes,
    rendezvous: "NodeRendezvous | None",
    attempt: int,
    log_dir: Path,
    before: MemoryGroup,
) -> tuple[Verdict, bool]:
    """Return this node's verdict, and whether it only echoes a failure elsewhere.

    `failure` is the first one of this node's ranks in this attempt, `before` the control group at the start.
    """
    restarts, host_name = max(0, attempt), socket.gethostname()
    if failure is not None:
        first_rank = rendezvous.first_ranks[nodes.node_rank] if rendezvous else 0
        verdict = judge_failure(
            failure,
            first_rank=first_rank,
            host=host_name,
            log_dir=log_dir,
            restarts=restarts,
            before=before,
            now=read_memory_group(),
        )
        if isinstance(error, CheckpointReplacedError):  # the next attempt had already begun
            said = "; ".join(filter(None, (verdict.exception, f"not restarted: {error}")))
            return replace(verdict, exception=said, restarts_used=max(0, restarts - 1)), False
        return verdict, failure.is_echo
    if isinstance(error, CheckpointReplacedError):  # a rank of another node failed
        return Verdict(
            first_failed_rank=None, host=host_name, exception=f"not restarted: {error}", restarts_used=max(0, restarts - 1)
        ), False
    blamed = error.node if isinstance(error, NodesError) else 0
    # Before the rendezvous, assume that the other nodes start the same number of ranks.
    rank = (rendezvous.first_ranks[blamed] if rendezvous else 0) or blamed * nodes.local_workers
    verdict = Verdict(first_failed_rank=rank, host=f"node {blamed}", exception=str(error), restarts_used=restarts)
    return verdict, isinstance(error, RunOver)


def agree(mine: Verdict, is_echo: bool, rendezvous: "NodeRendezvous | None") -> Verdict:
    """Return the common verdict of all nodes: the first one with a cause, otherwise that a node is gone. Raises DifferentRunError if
    another node has rejected the run."""
    if rendezvous is None or rendezvous.num_nodes == 1:
        return mine
    said = {node: json.loads(text) for node, text in rendezvous.exchange_verdicts(_write_entry(mine, is_echo)).items()}
    for entry in said.values():
        if entry["refusal"]:
            raise DifferentRunError(entry["refusal"])
    causes = [entry for entry in said.values() if not entry["echo"]]
    if causes:
        return Verdict.from_json(min(causes, key=lambda entry: entry["at"])["verdict"])
    for node, words in rendezvous.find_lost().items():
        if node in said:
            continue
        return replace(
            mine,
            first_failed_rank=rendezvous.first_ranks[node],
            host=f"node {node}",
            pid=None,
            exit_code=None,
            signal=None,
            exception=words,
            traceback_tail=None,
            log_file=None,
        )
    return mine


def announce_stop(rendezvous: "NodeRendezvous | None", number: int, nodes: Nodes) -> None:
    """Stop the other nodes after a signal has stopped this one."""
    if rendezvous is not None and nodes.num_nodes > 1:
        words = f"node {nodes.node_rank} was stopped by {signal.Signals(number).name}"
        verdict = Verdict(first_failed_rank=None, host=socket.gethostname(), exception=words, restarts_used=max(0, rendezvous.attempt))
        rendezvous.say_verdict(_write_entry(verdict, False))


def refuse(error: DifferentRunError, rendezvous: "NodeRendezvous") -> None:
    """Stop the other nodes, once they can compare: the nodes were started for different runs."""
    rendezvous.exchange_verdicts(_write_entry(Verdict(first_failed_rank=None, host=socket.gethostname()), False, refusal=str(error)))


def _write_entry(verdict: Verdict, is_echo: bool, *, refusal: str | None = None) -> str:
    return json.dumps({"echo": is_echo, "at": time.time(), "verdict": verdict.to_json(), "refusal": refusal})

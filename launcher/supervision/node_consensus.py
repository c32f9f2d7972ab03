"""What the parents of a run's nodes make of a failure together: what each has to say, and the one verdict of all.

Knows the watch of this node and the rendezvous; starts and ends nothing.
"""

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launcher.host.control_groups import MemoryGroup, read_memory_group
from launcher.rendezvous.nodes import Nodes
from launcher.rendezvous.nodes_rendezvous import NODE_SILENCE_SECONDS, NodeRendezvous, NodesError, RunOver, host_name
from launcher.supervision.rank_watch import RankWatch
from launcher.supervision.verdict import Verdict, judge_failure


class RanksEnded(Exception):
    """The agent's result: ranks of this node failed, by number, and it has no restarts left."""

    def __init__(self, failures: Mapping[int, ProcessFailure]) -> None:
        super().__init__()
        self.failures = failures


def judge(
    error: Exception, watch: RankWatch, nodes: Nodes, rendezvous: NodeRendezvous | None, log_dir: Path, before: MemoryGroup
) -> tuple[Verdict, bool]:
    """What this node has to say, and whether it only felt what happened elsewhere. `before`: the control group at the start."""
    restarts = max(0, rendezvous.attempt) if rendezvous else 0
    failure = watch.look_again()
    if failure is not None:
        assert rendezvous is not None, "a rank has been started"
        first_rank = rendezvous.first_ranks[nodes.node_rank]
        if isinstance(error, RanksEnded) and (found := error.failures.get(first_rank + failure.local_rank)) is not None:
            failure = failure.with_exit_code(found.exitcode)
        verdict = judge_failure(
            failure,
            first_rank=first_rank,
            host=host_name(),
            log_dir=log_dir,
            restarts=restarts,
            before=before,
            now=read_memory_group(),
        )
        return verdict, failure.is_echo
    if isinstance(error, RanksEnded):  # the only rank of this node, and the agent was faster than the watch
        rank, first = min(error.failures.items(), key=lambda item: item[1].timestamp)
        code = first.exitcode
        verdict = Verdict(
            first_failed_rank=rank,
            host=host_name(),
            pid=first.pid,
            exit_code=code if code >= 0 else None,
            signal=signal.Signals(-code).name if code < 0 else None,
            log_file=str(log_dir / f"worker_{rank}.log"),
            restarts_used=restarts,
        )
        return verdict, False
    blamed = error.node if isinstance(error, NodesError) else 0
    # Before the nodes have met, this one can only suppose that the others start as many ranks.
    rank = (rendezvous.first_ranks[blamed] if rendezvous else 0) or blamed * nodes.local_workers
    verdict = Verdict(first_failed_rank=rank, host=f"node {blamed}", exception=str(error), restarts_used=restarts)
    return verdict, isinstance(error, RunOver)


def agree(mine: Verdict, is_echo: bool, rendezvous: NodeRendezvous | None) -> Verdict:
    """The one verdict of all nodes: of those that saw a cause the first, else that a node has gone."""
    if rendezvous is None or rendezvous.num_nodes == 1:
        return mine
    said = {node: json.loads(text) for node, text in rendezvous.exchange_verdicts(_write_entry(mine, is_echo)).items()}
    causes = [entry for entry in said.values() if not entry["echo"]]
    if causes:
        return Verdict.from_json(min(causes, key=lambda entry: entry["at"])["verdict"])
    for node in rendezvous.find_silent():
        return replace(
            mine,
            first_failed_rank=rendezvous.first_ranks[node],
            host=f"node {node}",
            pid=None,
            exit_code=None,
            signal=None,
            exception=f"node {node} has gone: no sign of life for {NODE_SILENCE_SECONDS:g} s",
            traceback_tail=None,
            log_file=None,
        )
    return mine


def say_stopped(rendezvous: NodeRendezvous | None, number: int, nodes: Nodes) -> None:
    """Have the other nodes end too: a signal has ended this one."""
    if rendezvous is not None and nodes.num_nodes > 1:
        words = f"node {nodes.node_rank} was stopped by {signal.Signals(number).name}"
        verdict = Verdict(first_failed_rank=None, host=host_name(), exception=words, restarts_used=max(0, rendezvous.attempt))
        rendezvous.say_verdict(_write_entry(verdict, False))


def _write_entry(verdict: Verdict, is_echo: bool) -> str:
    return json.dumps({"echo": is_echo, "at": time.time(), "verdict": verdict.to_json()})

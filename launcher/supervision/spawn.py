"""Starts the ranks of a job on this host, supervises them until they exit, and turns whatever ends the run into one verdict."""

from collections.abc import Mapping
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from launcher.host.control_groups import read_memory_group
from launcher.host.run_folder import open_run_folder
from launcher.job.job import Job
from launcher.job.observer import RunObserver
from launcher.rendezvous.errors import DifferentRunError, NodesError, RunOver, StoreError
from launcher.rendezvous.nodes import Nodes
from launcher.supervision.event_receiver import EventReceiver
from launcher.supervision.node_consensus import RanksEnded, agree, announce_stop, judge, refuse
from launcher.supervision.rank_process import BOARD_FILE, SOCKET_FILE
from launcher.supervision.rank_starter import RankStarter
from launcher.supervision.rank_watch import RankWatch
from launcher.supervision.signals import GRACE_SECONDS, GracefulStop, StoppedError
from launcher.supervision.supervisor import ObserverFailedError, OnRestart, Supervisor
from launcher.supervision.verdict import RanksFailedError
from model.checkpoint.fingerprint import CheckpointReplacedError
from parallel.progress import ProgressBoard


def spawn_ranks(
    job: Job,
    nodes: Nodes,
    log_dir: Path,
    max_restarts: int,
    observer: RunObserver,
    on_restart: OnRestart,
    starter: RankStarter | None = None,
) -> int:
    """Run `job` in new processes on this node; returns the number of restarts.

    `starter` may have been started early; this call ends it. CheckpointReplacedError of `on_restart` becomes the verdict. Raises
    RanksFailedError with the verdict, DifferentRunError if nodes were started for different runs, StoppedError on SIGINT and SIGTERM. No
    rank is left running on return or on error.
    """
    memory = read_memory_group()
    with open_run_folder() as folder:
        board = ProgressBoard(folder / BOARD_FILE, nodes.local_workers, create=True)
        watch = RankWatch(board, folder, job.timeout_seconds)

        def ask_to_stop(number: int) -> float:
            seconds = observer.ask_to_stop(number)
            if seconds is None:
                board.ask_to_stop(0)
            return GRACE_SECONDS if seconds is None else seconds

        stop = GracefulStop(ask_to_stop, observer.takes_signal)
        with Listener(str(folder / SOCKET_FILE), "AF_UNIX") as listener, stop:
            receiver = EventReceiver(listener, observer, stop.answer)
            receiver.start()
            supervisor = Supervisor(
                job,
                nodes,
                starter or RankStarter(),
                watch,
                board,
                folder,
                log_dir,
                max_restarts,
                observer,
                on_restart,
                stop,
                receiver,
            )
            try:
                if nodes.num_nodes > 1:
                    from launcher.rendezvous.nodes_rendezvous import NodeRendezvous

                    supervisor.rendezvous = NodeRendezvous(
                        nodes.node_rank,
                        nodes.num_nodes,
                        nodes.master_addr,
                        nodes.master_port,
                        job.timeout_seconds,
                        _greet(job, nodes),
                        supervisor.raise_if_over,
                    )
                supervisor.run()
            except ObserverFailedError:
                pass  # raised below, after the ranks have ended
            except StoppedError as error:
                announce_stop(supervisor.rendezvous, error.signal_number, nodes)
                raise
            except DifferentRunError as error:
                assert supervisor.rendezvous is not None, "nodes have met"
                refuse(error, supervisor.rendezvous)
                raise
            except (RanksEnded, StoreError, NodesError, RunOver, CheckpointReplacedError) as error:
                supervisor.end_ranks()
                receiver.finish()
                failure, rendezvous = watch.failure, supervisor.rendezvous
                verdict, is_echo = judge(error, failure, nodes, rendezvous, supervisor.attempt, log_dir, memory)
                is_input = failure is not None and failure.is_input
                raise RanksFailedError(agree(verdict, is_echo, rendezvous), is_input=is_input) from None
            finally:
                supervisor.end_ranks()
                supervisor.close()
                receiver.finish()
                watch.close()
                if supervisor.rendezvous is not None:
                    supervisor.rendezvous.shutdown()
        if receiver.error is not None:
            raise receiver.error
    return max(0, supervisor.attempt)


def _greet(job: Job, nodes: Nodes) -> Mapping[str, Any]:
    """Return this node's identity for comparison; all but its number of ranks must match on every node."""
    from launcher.rendezvous.run_identity import describe_run

    return {**describe_run(job), "local_workers": nodes.local_workers}

"""What a node starts, from the options of several nodes."""

import pytest

from launcher.rendezvous.nodes import Nodes, plan_nodes
from parallel.errors import ConfigError

NOTHING = {"num_nodes": None, "node_rank": None, "local_workers": None, "master_addr": None, "master_port": None}


def test_one_node_listens_on_loopback_on_any_port() -> None:
    assert plan_nodes(3, **NOTHING) == Nodes(num_nodes=1, node_rank=0, local_workers=3, master_addr="127.0.0.1", master_port=0)


@pytest.mark.parametrize(("node", "workers"), [(0, 3), (1, 2), (2, 2)])
def test_ranks_are_shared_evenly(node: int, workers: int) -> None:
    nodes = plan_nodes(7, **{**NOTHING, "num_nodes": 3, "node_rank": node, "master_addr": "head"})
    assert (nodes.local_workers, nodes.master_addr, nodes.master_port) == (workers, "head", 8118)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7])
def test_every_rank_belongs_to_one_node(num_nodes: int) -> None:
    said = [{**NOTHING, "num_nodes": num_nodes, "node_rank": node, "master_addr": "head"} for node in range(num_nodes)]
    assert [rank for one in said for rank in plan_nodes(7, **one).local_ranks(7)] == list(range(7))


def test_local_workers_say_how_many_nodes_there_are_as_with_msrun() -> None:
    nodes = plan_nodes(8, **{**NOTHING, "local_workers": 4, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 9000})
    assert nodes == Nodes(num_nodes=2, node_rank=1, local_workers=4, master_addr="10.0.0.1", master_port=9000)


def test_the_defaults_of_msrun_are_one_node() -> None:
    assert plan_nodes(8, **{**NOTHING, "local_workers": 8, "node_rank": -1, "master_addr": "127.0.0.1"}).num_nodes == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_nodes": 2}, "--nnodes 2 needs --node-rank and --master-addr"),
        ({"num_nodes": 2, "master_addr": "head"}, "needs --node-rank:"),
        ({"num_nodes": 2, "node_rank": 2, "master_addr": "head"}, "--node-rank is 2, but --nnodes is 2: 0 to 1"),
        ({"num_nodes": 2, "node_rank": -1, "master_addr": "head"}, "--node-rank is -1, but --nnodes is 2"),
        ({"num_nodes": 0}, "--nnodes is 0, but at least 1"),
        ({"num_nodes": 5, "node_rank": 0, "master_addr": "head"}, "--nnodes is 5, but the run has 4 ranks"),
        ({"local_workers": 5}, "--local-workers is 5, but the run has 4 ranks"),
        ({"local_workers": 3}, "4 ranks are not a multiple of --local-workers 3"),
        ({"local_workers": 0}, "--local-workers is 0, but at least 1"),
        ({"node_rank": 1}, "--node-rank is 1, but --nnodes is 1"),
        ({"master_port": 70000}, "--master-port is 70000, but a port of at most 65535"),
        ({"master_port": 0}, "--master-port is 0, but at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(said: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_nodes(4, **{**NOTHING, **said})
    assert words in str(refused.value)

"""The part of a run that one node starts, from `--nnodes`, `--node-rank`, `--local-workers`, `--master-addr` and `--master-port`."""

from dataclasses import dataclass

from parallel.errors import ConfigError

DEFAULT_MASTER_PORT = 8118
"""msrun's default."""
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a run, as seen from one of them."""

    num_nodes: int = 1
    """Total number of nodes."""
    node_rank: int = 0
    """Index of this node."""
    local_workers: int = 1
    """Number of ranks on this node."""
    master_addr: str = "127.0.0.1"
    """Address of node 0 that all nodes can reach."""
    master_port: int = 0
    """Port on node 0; with a single node, 0 selects any free one."""

    def local_ranks(self, world_size: int) -> range:
        """Return the ranks of this node if they are shared evenly; the first nodes take one more if there is a remainder."""
        first = self.node_rank * (world_size // self.num_nodes) + min(self.node_rank, world_size % self.num_nodes)
        return range(first, min(first + self.local_workers, world_size))


def plan_nodes(
    world_size: int,
    *,
    num_nodes: int | None,
    node_rank: int | None,
    local_workers: int | None,
    master_addr: str | None,
    master_port: int | None,
) -> Nodes:
    """Fill in the options that are None. Raises ConfigError.

    As in msrun, the number of nodes defaults to world_size / --local-workers. Without --local-workers, ranks are shared evenly; the first
    nodes take one more if there is a remainder.
    """
    for name, value, least in (("--nnodes", num_nodes, 1), ("--local-workers", local_workers, 1), ("--master-port", master_port, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, but at least {least} is needed")
    if master_port is not None and master_port > _MAX_PORT:
        raise ConfigError(f"--master-port is {master_port}, but a port of at most {_MAX_PORT} is needed")
    if local_workers is not None and local_workers > world_size:
        raise ConfigError(f"--local-workers is {local_workers}, but the run has {world_size} ranks: make it at most that")
    if num_nodes is None:
        if local_workers is not None and world_size % local_workers:
            raise ConfigError(f"{world_size} ranks are not a multiple of --local-workers {local_workers}: give --nnodes, too")
        num_nodes = world_size // local_workers if local_workers else 1
    if num_nodes > world_size:
        raise ConfigError(f"--nnodes is {num_nodes}, but the run has {world_size} ranks: give --workers, the ranks of all nodes together")
    if node_rank is not None and node_rank == -1 and num_nodes == 1:
        node_rank = 0  # msrun's default
    if num_nodes > 1:
        missing = [name for name, value in (("--node-rank", node_rank), ("--master-addr", master_addr)) if value is None]
        if missing:
            raise ConfigError(f"--nnodes {num_nodes} needs {' and '.join(missing)}: this node's number from 0, and the address of node 0")
    node_rank = node_rank or 0
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(f"--node-rank is {node_rank}, but --nnodes is {num_nodes}: 0 to {num_nodes - 1} is needed")
    each, more = divmod(world_size, num_nodes)
    return Nodes(
        num_nodes=num_nodes,
        node_rank=node_rank,
        local_workers=local_workers or each + (node_rank < more),
        master_addr=master_addr or "127.0.0.1",
        master_port=master_port or (DEFAULT_MASTER_PORT if num_nodes > 1 else 0),
    )

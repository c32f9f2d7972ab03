"""Which connections a server holds, and how many the limit of open files allows."""

import resource

import pytest

from launcher.server import connection_places
from launcher.server.connection_places import DEFAULT_MAX_CONNECTIONS, ConnectionPlaces, plan_connections
from parallel.errors import ConfigError


class FakeConnection:
    def __init__(self, is_idle: bool = True) -> None:
        self.is_idle, self.is_closed = is_idle, False

    def give_way(self) -> None:
        self.is_closed = True


def enter(places: ConnectionPlaces, client: str, count: int, is_idle: bool = True) -> list[FakeConnection]:
    connections = [FakeConnection(is_idle) for _ in range(count)]
    for connection in connections:
        assert places.enter(connection, client)
    return connections


def test_the_longest_idle_connection_of_the_client_with_most_gives_way() -> None:
    places = ConnectionPlaces(5, 5)
    few, many = enter(places, "few", 2), enter(places, "many", 3)
    places.note_idle(many[0])  # it had a request in progress until now
    assert places.enter(FakeConnection(), "new")
    assert [one.is_closed for one in (*few, *many)] == [False, False, False, True, False]
    assert (len(places), places.count("many"), places.count("new")) == (5, 2, 1)


def test_connections_with_a_request_in_progress_stay() -> None:
    places = ConnectionPlaces(3, 3)
    busy, idle = enter(places, "a", 2, is_idle=False), enter(places, "b", 1)
    assert places.enter(FakeConnection(is_idle=False), "a")
    assert idle[0].is_closed and not any(one.is_closed for one in busy)
    refused = FakeConnection()
    assert not places.enter(refused, "b")
    assert len(places) == 4, "it is there until it is closed"
    places.leave(refused)
    places.leave(busy[0])
    assert places.enter(FakeConnection(), "b")


def test_a_client_at_its_own_limit_loses_connections_of_its_own() -> None:
    places = ConnectionPlaces(10, 2)
    other, mine = enter(places, "other", 2), enter(places, "me", 2)
    assert places.enter(FakeConnection(is_idle=False), "me")
    assert [one.is_closed for one in (*other, *mine)] == [False, False, True, False]
    mine[1].is_idle = False
    assert not places.enter(FakeConnection(), "me")
    assert places.enter(FakeConnection(), "third")


def test_leaving_twice_changes_nothing() -> None:
    places = ConnectionPlaces(2, 2)
    (one,) = enter(places, "a", 1)
    places.leave(one)
    places.leave(one)
    places.note_idle(one)
    assert (len(places), places.count("a")) == (0, 0)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limit of open files, (soft, hard); the last one is in force. 30 are open."""
    limits = [(1024, 1024)]
    monkeypatch.setattr(connection_places.resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(connection_places.resource, "setrlimit", lambda kind, pair: limits.append(pair))
    monkeypatch.setattr(connection_places.os, "listdir", lambda path: ["0"] * 30)
    return limits


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_descriptors_for_ranks_and_restarts_are_left_over(limit: list[tuple[int, int]], ranks: int) -> None:
    planned = plan_connections(None, ranks)
    assert 800 < planned <= 1024 - 30 - 20 - 8 * ranks
    assert plan_connections(planned, ranks) == planned
    with pytest.raises(ConfigError, match=rf"the limit of open files is 1024, but --max-connections {planned + 1} needs 1025"):
        plan_connections(planned + 1, ranks)


def test_the_soft_limit_is_raised_to_the_hard_one(limit: list[tuple[int, int]]) -> None:
    limit.append((256, 4096))
    assert plan_connections(None, 2) == DEFAULT_MAX_CONNECTIONS
    assert limit[-1] == (4096, 4096)
    assert plan_connections(2000, 2) == 2000
    limit.append((resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert plan_connections(None, 2) == DEFAULT_MAX_CONNECTIONS


def test_too_low_a_limit_is_refused(limit: list[tuple[int, int]]) -> None:
    limit.append((64, 64))
    with pytest.raises(ConfigError, match="the limit of open files is 64, but a server of 2 ranks needs 110: raise it with ulimit -n"):
        plan_connections(None, 2)
    limit.append((110, 110))
    assert plan_connections(None, 2) == 16

"""Limits and kills of memory control groups, from files as both versions of Linux's control groups write them."""

from pathlib import Path

from launcher.host.control_groups import MemoryGroup, read_memory_group


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/jobs/a\n")
    write(tmp_path / "fs/jobs/a/memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n")
    write(tmp_path / "fs/jobs/a/memory.max", "1000000\n")
    assert read_memory_group(tmp_path / "fs", tmp_path / "own") == MemoryGroup(1000000, 2)


def test_version_2_inside_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/kubepods/pod1\n")
    write(tmp_path / "fs/memory.events", "oom_kill 1\n")
    write(tmp_path / "fs/memory.max", "max\n")
    assert read_memory_group(tmp_path / "fs", tmp_path / "own") == MemoryGroup(None, 1)


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path / "own", "5:cpu,cpuacct:/\n4:memory:/jobs/a\n0::/\n")
    write(tmp_path / "fs/memory/jobs/a/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    write(tmp_path / "fs/memory/jobs/a/memory.limit_in_bytes", "2000000\n")
    assert read_memory_group(tmp_path / "fs", tmp_path / "own") == MemoryGroup(2000000, 4)


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path / "own", "4:memory:/\n")
    write(tmp_path / "fs/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert read_memory_group(tmp_path / "fs", tmp_path / "own") == MemoryGroup(None, 0)


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert read_memory_group(tmp_path / "fs", tmp_path / "own") == MemoryGroup(None, 0)

"""Damage to checkpoints of every format: what cannot be used is refused with one error, and costs no memory.

Whole small checkpoints are cut, changed byte by byte and, where they are JSON, value by value; then everything in them is read.
"""

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.model.checkpoint.conftest import Checkpoint

MEMORY_BYTES, ADDRESS_BYTES = 300 << 20, 2 << 30
CUTS, BYTES, VALUES = (settings(max_examples=count, deadline=None, derandomize=True) for count in (60, 120, 120))
NUMBERS = [0, 1, 7, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
ENDS = 2000
"""Headers and directories lie in so many bytes at the start and at the end of a file."""

json_values = st.one_of(
    st.sampled_from([None, True, False, "", "x", "../x", [], {}, [[]], [None], {"a": 1}, float("nan"), float("inf"), 0.5, 8.0]),
    st.sampled_from([*NUMBERS, -1, 1 << 16, 10**9, 10**40, 10**400]),
    st.sampled_from(
        ["group", "channel", "tensor", "static", "re:(", "gptq", "llama3", "float32", "I8", "F64", "\ud800", "a\nb", "9" * 5000]
    ),
)


def read_status(key: str) -> int:
    """Bytes of a line of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Fails when the peak grows by MEMORY_BYTES; asking for ADDRESS_BYTES at once fails on the spot."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    limits, before = resource.getrlimit(resource.RLIMIT_AS), read_status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (read_status("VmSize") + ADDRESS_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert read_status("VmHWM") - before < MEMORY_BYTES


def draw_file(data: st.DataObject, files: dict[Path, Any]) -> Path:
    return data.draw(st.sampled_from(sorted(files)))


def draw_place(data: st.DataObject, size: int) -> int:
    return data.draw(st.one_of(st.integers(0, min(ENDS, size - 1)), st.integers(max(0, size - ENDS), size - 1), st.integers(0, size - 1)))


def damage_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Bytes overwritten, inserted, left out, or all but the first ones replaced."""
    place = draw_place(data, len(content))
    number = st.sampled_from(NUMBERS).map(lambda value: struct.pack("<Q", value))
    kind = data.draw(st.sampled_from(["flip", "overwrite", "number", "insert", "delete", "repeat", "random"]))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "repeat":
        return content[:place] + content[data.draw(st.integers(0, place)) :]
    if kind == "random":
        return content[: data.draw(st.sampled_from([0, 4, 8, 16]))] + data.draw(st.binary(max_size=300))
    new = data.draw(number if kind == "number" else st.binary(min_size=1, max_size=16))
    skip = {"insert": 0, "delete": len(new)}.get(kind, len(new))
    return content[:place] + (b"" if kind == "delete" else new) + content[place + skip :]


def list_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from list_places(inner, (*path, key))


def damage_json(data: st.DataObject, value: Any) -> Any:
    """One value in it replaced or left out."""
    changed = json.loads(json.dumps(value))
    *parents, last = data.draw(st.sampled_from(list(list_places(value))))
    inner = changed
    for key in parents:
        inner = inner[key]
    if data.draw(st.integers(0, 5)):
        inner[last] = data.draw(json_values)
    else:
        del inner[last]
    return changed


@CUTS
@given(data=st.data())
def test_a_weight_file_that_is_cut_anywhere_is_refused(checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, checkpoint.weights)
    content = checkpoint.weights[file]
    assert not checkpoint.read_with(file, content[: draw_place(data, len(content))])


@BYTES
@given(data=st.data())
def test_a_weight_file_with_other_bytes_is_read_as_declared_or_refused(checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, checkpoint.weights)
    checkpoint.read_with(file, damage_bytes(data, checkpoint.weights[file]))


@VALUES
@given(data=st.data())
def test_a_header_with_another_value_is_read_as_declared_or_refused(safetensors_checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, safetensors_checkpoint.weights)
    content = safetensors_checkpoint.weights[file]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(damage_json(data, json.loads(content[8 : 8 + length]))).encode()
    safetensors_checkpoint.read_with(file, struct.pack("<Q", len(header)) + header + content[8 + length :])


@VALUES
@given(data=st.data())
def test_settings_with_another_value_are_read_as_declared_or_refused(configured_checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, configured_checkpoint.settings)
    configured_checkpoint.read_with(file, json.dumps(damage_json(data, configured_checkpoint.settings[file])).encode())


@BYTES
@given(data=st.data())
def test_settings_with_other_bytes_are_read_as_declared_or_refused(configured_checkpoint: "Checkpoint", data: st.DataObject) -> None:
    file = draw_file(data, configured_checkpoint.settings)
    configured_checkpoint.read_with(file, damage_bytes(data, json.dumps(configured_checkpoint.settings[file]).encode()))

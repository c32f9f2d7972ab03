"""Rows read straight from files: the right ones, only their bytes, and a clear error where they are not there."""

from pathlib import Path

import pytest
import torch

from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows


def store(path: Path, tensor: torch.Tensor, start: int = 0, lead: bytes = b"lead") -> StoredRows:
    """Write the rows of `tensor` behind `lead`; they are rows from `start` on of a larger one."""
    path.write_bytes(lead + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return StoredRows(path, len(lead), start, start + tensor.shape[0], tuple(tensor.shape[1:]), ElementType.of(tensor.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("row_shape", [(), (3,), (2, 5)], ids=str)
def test_a_range_of_rows_is_read_and_nothing_else(tmp_path: Path, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(-100, 100, (11, *row_shape)).to(dtype)
    part = store(tmp_path / "a", tensor)
    for start, stop in [(0, 11), (0, 1), (4, 9), (10, 11), (5, 5)]:
        reader = FileReader()
        found = reader.read_rows([part], start, stop)
        assert found.dtype == dtype and torch.equal(found, tensor[start:stop])
        assert reader.read_bytes == (stop - start) * part.row_bytes
        reader.close()


def test_rows_are_joined_from_several_files(tmp_path: Path) -> None:
    tensor = torch.arange(60).view(20, 3)
    parts = [store(tmp_path / f"{start}", tensor[start:stop], start, b"x" * start) for start, stop in [(0, 7), (7, 8), (8, 20)]]
    for start in range(20):
        for stop in range(start, 21):
            assert torch.equal(FileReader().read_rows(parts, start, stop), tensor[start:stop])


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_rows_are_read_into_place_as_they_are_or_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("parallel.file_slices._CHUNK_BYTES", 50)
    monkeypatch.setattr("parallel.file_slices._PIECE_BYTES", 30)
    tensor = torch.arange(60, dtype=torch.int32).view(20, 3)
    parts = [store(tmp_path / f"{start}", tensor[start:stop], start, b"x" * start) for start, stop in [(0, 7), (7, 8), (8, 20)]]
    reader = FileReader(num_threads)
    whole = torch.full((20, 3), -1, dtype=dtype)
    reader.read_into(whole[4:17], parts, 2)
    assert torch.equal(whole[4:17], tensor[2:15].to(dtype)) and (whole[:4] == -1).all() and (whole[17:] == -1).all()
    assert reader.read_bytes == 13 * 3 * 4
    wide = torch.empty((13, 6), dtype=dtype)
    reader.read_into(wide, parts, 2, lambda rows: rows.repeat(1, 2).neg_())
    assert torch.equal(wide, -tensor[2:15].repeat(1, 2).to(dtype))
    (tmp_path / "8").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"8 ends at byte \d+, but a tensor reaches byte"):
        reader.read_into(wide, parts, 2, lambda rows: rows.repeat(1, 2))
    reader.close()


def test_rows_that_lie_in_two_files_are_read_once(tmp_path: Path) -> None:
    tensor = torch.arange(30).view(10, 3)
    parts = [store(tmp_path / f"{start}", tensor[start:stop], start) for start, stop in [(0, 6), (0, 6), (4, 10)]]
    reader = FileReader()
    assert torch.equal(reader.read_rows(parts, 1, 9), tensor[1:9])
    assert reader.read_bytes == 8 * 3 * 8


def test_rows_that_no_file_holds_are_an_error_that_names_them(tmp_path: Path) -> None:
    tensor = torch.arange(10)
    parts = [store(tmp_path / "a", tensor[:4]), store(tmp_path / "b", tensor[6:], 6)]
    with pytest.raises(CheckpointError, match="rows 4 to 8 of a tensor are stored in none of its files"):
        FileReader().read_rows(parts, 2, 8)


def test_a_short_file_is_an_error_that_names_it_and_both_sizes(tmp_path: Path) -> None:
    part = store(tmp_path / "a", torch.arange(10, dtype=torch.int32))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-6])
    assert FileReader().read_rows([part], 0, 8).tolist() == list(range(8))
    with pytest.raises(CheckpointError, match=r"a ends at byte 38, but a tensor reaches byte 44: copy it again"):
        FileReader().read_rows([part], 0, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_columns_are_read_alone_or_with_their_rows_where_they_are_many(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(7 * 40).view(7, 40).to(dtype)
    part = store(tmp_path / "a", tensor, start=5)
    for first, last, whole in [(0, 40, True), (3, 4, False), (31, 40, False), (30, 40, True), (0, 39, True), (12, 12, False)]:
        reader = FileReader()
        found = reader.read_columns(part, first, last)
        assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, tensor[:, first:last])
        assert reader.read_bytes == 7 * (40 if whole else last - first) * dtype.itemsize
        reader.close()


def test_columns_of_rows_that_do_not_fit_one_chunk_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.file_slices._CHUNK_BYTES", 100)
    tensor = torch.arange(7 * 10, dtype=torch.int32).view(7, 10)
    assert torch.equal(FileReader().read_columns(store(tmp_path / "a", tensor), 2, 9), tensor[:, 2:9])


def test_columns_of_a_short_file_are_an_error_that_names_both_sizes(tmp_path: Path) -> None:
    part = store(tmp_path / "a", torch.zeros(3, 10, dtype=torch.int32))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-6])
    with pytest.raises(CheckpointError, match=r"a ends at byte 118, but a tensor reaches byte 124: copy it again"):
        FileReader().read_columns(part, 8, 10)


def test_a_span_of_bytes_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    reader = FileReader()
    assert bytes(reader.read_span(tmp_path / "a", 17, 20).tolist()) == bytes(range(17, 37))
    assert reader.read_bytes == 20


def test_the_count_goes_on_over_files_and_stays_after_closing(tmp_path: Path) -> None:
    parts = [store(tmp_path / name, torch.zeros(8, dtype=torch.int8)) for name in "ab"]
    reader = FileReader()
    for part in (*parts, parts[0]):
        reader.read_rows([part], 0, 5)
    reader.close()
    assert reader.read_bytes == 15
    assert reader.read_rows([parts[0]], 0, 1).tolist() == [0], "a closed reader opens its files again"
    reader.close()

"""Where a format says that rows lie, the same rows have to lie that it reads; what runs ahead of the ranks asks for these alone."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from launcher.job.prefetch import find_places, prefetch
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from model.spec.weights import plan_weights
from parallel.file_slices import FileReader

if TYPE_CHECKING:
    from tests.model.checkpoint.conftest import Checkpoint


def test_located_rows_are_those_that_are_read(checkpoint: "Checkpoint") -> None:
    source, reader = checkpoint.open(), FileReader()
    for name, info in source.tensors.items():
        size = info.shape[0] if info.shape else 1
        for start, stop in ((0, size), (size // 3, size // 2 + 1), (size, size)):
            parts = source.locate_rows(name, start, stop)
            if parts:
                assert torch.equal(reader.read_rows(parts, start, stop), source.read_rows(reader, name, start, stop)), name
    reader.close()


@pytest.mark.parametrize("name", ["hf", "hf-indexed", "compressed-tensors", "ranks"])
def test_what_formats_store_as_it_is_kept_is_located(name: str, make_checkpoint: Callable[[str], "Checkpoint"]) -> None:
    source = make_checkpoint(name).open()
    assert all(source.locate_rows(tensor, 0, info.shape[0]) for tensor, info in source.tensors.items() if info.shape)


@pytest.mark.parametrize("name", ["hf-indexed", "ranks"])
def test_what_is_asked_for_ahead_is_what_the_ranks_read(name: str, make_checkpoint: Callable[[str], "Checkpoint"]) -> None:
    source = make_checkpoint(name).open()
    config, scheme = build_config(source.config), read_scheme(source.config)
    for ranks in (range(1), range(1, 2), range(2)):
        expected = sorted(
            source.read_rows(FileReader(), tensor, *spec.rows(rank, 2)).view(torch.uint8).numpy().tobytes()
            for tensor, spec in plan_weights(config, scheme).items()
            for rank in ranks
        )
        places = find_places(source, config, scheme, ranks, 2)
        assert sorted(path.read_bytes()[offset : offset + length] for path, offset, length in places) == expected


def test_no_more_is_asked_for_than_may_be(make_checkpoint: Callable[[str], "Checkpoint"], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.job.prefetch._MOST_BYTES", 3000)
    source = make_checkpoint("hf").open()
    config, scheme = build_config(source.config), read_scheme(source.config)
    assert sum(length for _, _, length in find_places(source, config, scheme, range(2), 2)) == 3000


def test_reading_ahead_leaves_a_missing_file_to_the_ranks(checkpoint: "Checkpoint", monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint.open()
    config, scheme = build_config(source.config), read_scheme(source.config)
    before = len(os.listdir("/proc/self/fd"))
    prefetch(source, config, scheme, range(1), 1).join()
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    prefetch(source, config, scheme, range(1), 1).join()
    assert len(os.listdir("/proc/self/fd")) == before

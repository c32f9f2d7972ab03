"""Values of stored tensors as arrays: every code of the small types, and rows of files and of converted tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.safetensors_file import read_header
from model.checkpoint.stored_values import decode_values, read_values
from parallel.element_type import ElementType
from parallel.file_slices import FileReader, StoredRows


@pytest.mark.parametrize(
    ("kind", "codes"), [(ElementType.FLOAT8_E4M3FN, 1 << 8), (ElementType.BFLOAT16, 1 << 16), (ElementType.FLOAT16, 1 << 16)]
)
def test_every_code_of_a_small_float_is_pytorchs_value(kind: ElementType, codes: int) -> None:
    stored = np.arange(codes).astype(np.uint8 if codes == 256 else np.uint16).view(np.uint8).reshape(8, -1)
    found = decode_values(stored, kind)
    expected = torch.from_numpy(stored.copy()).view(kind.torch_dtype).float().numpy()
    assert found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found)[~np.isnan(found)], np.signbit(expected)[~np.isnan(expected)])


class _Source:
    """One tensor, stored as it is or only given as a tensor."""

    def __init__(self, path: Path, *, is_located: bool) -> None:
        self._stored = read_header(path)
        self._path, self._is_located = path, is_located
        self.tensors = {name: stored.info for name, stored in self._stored.items()}

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        return [self._stored[name].stored_rows(self._path)] if self._is_located else []

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        return reader.read_rows([self._stored[name].stored_rows(self._path)], start, stop)


@pytest.mark.parametrize("is_located", [True, False])
@pytest.mark.parametrize("kind", list(ElementType), ids=lambda kind: kind.label)
def test_rows_have_the_values_of_the_tensor(tmp_path: Path, kind: ElementType, is_located: bool) -> None:
    if kind in (ElementType.UINT64, ElementType.UINT32, ElementType.UINT16):
        kind = ElementType.INT16  # safetensors files do not hold unsigned types that are read
    tensor = torch.tensor([[0, 1, 1], [3, 2, 5], [7, 0, 1], [1, 4, 6]]).to(kind.torch_dtype)
    save_file({"a": tensor, "b": tensor[0].clone()}, tmp_path / "x.safetensors")
    source = _Source(tmp_path / "x.safetensors", is_located=is_located)
    reader = FileReader()
    for name, whole in (("a", tensor), ("b", tensor[0])):
        for start, stop in ((0, None), (1, 3), (2, 2)):
            found = read_values(source, reader, name, start, stop)  # type: ignore[arg-type]
            expected = whole[start:stop]
            assert found.tolist() == (expected.float() if kind.is_floating_point else expected).tolist(), (name, start, stop)
    reader.close()

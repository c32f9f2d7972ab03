"""The part of `mindspore.Tensor` that describes model inputs: a NumPy array, or a shape that is not filled until it is read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import RequestError
from tandem.mindformers.initializer import Constant

bool_, int8, int32, int64 = (np.dtype(name) for name in ("bool", "int8", "int32", "int64"))
float16, float32 = np.dtype("float16"), np.dtype("float32")
bfloat16 = float32
"""NumPy has no bfloat16; inputs of a model are integers anyway."""


class Tensor:
    """Values, or the shape, dtype and initializer of values."""

    def __init__(
        self,
        input_data: Any = None,
        dtype: npt.DTypeLike | None = None,
        shape: int | Sequence[int] | None = None,
        init: Constant | None = None,
    ) -> None:
        if (input_data is None) == (shape is None):
            raise RequestError("Tensor needs either input_data, or shape with dtype and init")
        if shape is not None and None in (dtype, init):
            raise RequestError("Tensor with a shape needs dtype and init too, as in Tensor(shape=(2, 8), dtype=ms.int32, init=init.One())")
        self._init = init
        self._values: npt.NDArray[Any] | None = None
        if shape is None:
            self._values = np.asarray(input_data.asnumpy() if isinstance(input_data, Tensor) else input_data, dtype=dtype)
            self.shape, self.dtype = self._values.shape, self._values.dtype
        else:
            self.shape = (shape,) if isinstance(shape, int) else tuple(int(size) for size in shape)
            self.dtype = np.dtype(dtype)

    def asnumpy(self) -> npt.NDArray[Any]:
        """Return the values."""
        if self._values is None:
            assert self._init is not None
            self._values = np.full(self.shape, self._init.value, dtype=self.dtype)
        return self._values

    def init_data(self) -> "Tensor":
        """Return itself; the values are made when they are read."""
        return self

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.asnumpy(), dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, place: Any) -> Any:
        return self.asnumpy()[place]

    def __repr__(self) -> str:
        return f"Tensor(shape={list(self.shape)}, dtype={self.dtype})"

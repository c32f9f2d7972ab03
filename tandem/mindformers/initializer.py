"""The part of `mindspore.common.initializer` that describes the contents of a Tensor: constants."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constant:
    """Fill with one value."""

    value: float


class One(Constant):
    """Fill with 1."""

    def __init__(self) -> None:
        super().__init__(1)


class Zero(Constant):
    """Fill with 0."""

    def __init__(self) -> None:
        super().__init__(0)

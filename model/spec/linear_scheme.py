"""How the weights of a linear are stored: integers or FP8 numbers with scales, and the quantization of its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.spec.quoting import quote
from parallel.errors import ConfigError

MAX_GROUP = (1 << 31) - 1
"""Most columns or rows that can share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScheme:
    """Storage and arithmetic of a checkpoint's quantized linears."""

    bits: int = 8
    """Bits per weight: 4 or 8."""
    group_size: int | None = None
    """Columns that share a scale; None: the whole row."""
    symmetric: bool = True
    """Whether weight zero points are 0 and not stored."""
    packed: bool = True
    """Whether integers are packed in int32 words."""
    act_order: bool = False
    """Whether the columns of a group may be anywhere, as given by `weight_g_idx`."""
    activation: str | None = None
    """None: float; "token": int8 with a scale per row; "tensor": int8 with a stored scale."""
    activation_symmetric: bool = True
    """Whether zero points of static activations are 0 and not stored."""
    smooth: bool = False
    """Whether inputs are divided by a stored vector first."""
    float8: bool = False
    """Whether weights are float8_e4m3fn instead of integers."""
    row_block: int | None = 1
    """FP8: output rows that share a scale; None: all."""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ConfigError(f"quantization_config: weights of {quote(self.bits)} bits are not supported; there are 4 and 8")
        if self.group_size is not None and (type(self.group_size) is not int or not 0 < self.group_size <= MAX_GROUP):
            raise ConfigError(
                f"quantization_config: group_size is {quote(self.group_size)}, but a whole number from 1 to {MAX_GROUP} is needed"
            )
        if self.activation == "tensor" and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ConfigError("quantization_config: static int8 activations need symmetric 8-bit weights with one scale an output row")
        if self.activation == "token" and not self.activation_symmetric:
            raise ConfigError("quantization_config: dynamic int8 activations with zero points are not supported; symmetric ones are")
        if self.float8 and (self.bits != 8 or self.packed or not self.symmetric or self.act_order or self.activation or self.smooth):
            raise ConfigError("quantization_config: FP8 weights have to be 8 bits, symmetric and in the order of the inputs")
        if self.row_block != 1 and not self.float8:
            raise ConfigError("quantization_config: integers with one scale for several rows are not supported; one an output row is")
        if not self.packed and not self.float8 and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ConfigError("quantization_config: format int-quantized needs symmetric 8-bit weights with one scale an output row")
        if self.bits == 8 and not self.symmetric:
            raise ConfigError("quantization_config: 8-bit weights with zero points are not supported; symmetric ones are")

    def num_groups(self, columns: int) -> int:
        """Return the number of scales per row."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    @property
    def name(self) -> str:
        """Name in stats: A for activations, W for weights, each with its bits."""
        if self.float8:
            return "a16w8-fp8" + (f"-b{self.row_block}" if self.row_block and self.row_block > 1 else "")
        if self.activation is None:
            words = "rtn-a16w8" if self.bits == 8 and self.group_size is None else f"a16w{self.bits}"
        else:
            words = f"a8w{self.bits}-{'dynamic' if self.activation == 'token' else 'static'}"
        return words + ("-smooth" if self.smooth else "") + (f"-g{self.group_size}" if self.group_size else "")


def run_as_one(schemes: Sequence[LinearScheme | None]) -> bool:
    """Whether linears with the same input, stored in these schemes, run as one matmul.

    They do not if their schemes differ, or if each scales or quantizes its input with its own stored parameters.
    """
    first = schemes[0]
    own_input = first is not None and (first.smooth or first.act_order or first.activation == "tensor")
    return len(schemes) == 1 or (not own_input and all(other == first for other in schemes))


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears with their own storage scheme."""

    targets: tuple[str, ...]
    """Full names, `re:` and a pattern that matches a prefix of the name, or the class `Linear`."""
    linear: LinearScheme

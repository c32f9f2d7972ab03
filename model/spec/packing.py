"""Pack small integers into int32 words in the layout of compressed-tensors, and unpack them."""

from __future__ import annotations

from parallel.lazy_torch import torch


def pack_integers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 [rows, columns] to int32 [rows, ceil(columns * bits / 32)]: value + 2^(bits-1), the first in the lowest bits."""
    rows, columns = values.shape
    per_word, offset = 32 // bits, 1 << (bits - 1)
    padded = torch.full((rows, -(-columns // per_word) * per_word), offset, dtype=torch.uint8)
    padded[:, :columns] = (values.to(torch.int16) + offset).to(torch.uint8)
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    return padded.view(torch.int32)


def unpack_integers(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of `pack_integers`. 8 bits are unpacked in place: `packed` must not be used afterwards."""
    # Flatten first: a single column counts as contiguous whatever its strides, but cannot be viewed as bytes.
    unpacked = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], 4 * packed.shape[1])
    if bits == 4:
        unpacked = torch.stack((unpacked & 15, unpacked >> 4), dim=2).flatten(1)
        unpacked = unpacked.view(torch.int8).sub_(8)
    else:
        # Adding 128 modulo 256 flips the highest bit.
        unpacked = unpacked.bitwise_xor_(128).view(torch.int8)
    return unpacked if unpacked.shape[1] == columns else unpacked[:, :columns].contiguous()

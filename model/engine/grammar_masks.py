"""The masks of a step's grammars on every rank: which tokens each sequence may take next."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from model.engine.grammar import count_mask_bytes
from parallel.collectives import Collectives


def share_masks(masks: Sequence[bytes], num_rows: int, vocab_size: int, collectives: Collectives) -> npt.NDArray[np.bool_]:
    """Send rank 0's masks to every rank; returns [num_rows, vocab_size], True where a token is allowed. `masks` is empty elsewhere."""
    sizes = [count_mask_bytes(vocab_size)] + [0] * (collectives.world_size - 1)
    local = torch.empty((num_rows, sizes[collectives.rank]), dtype=torch.uint8)
    if collectives.rank == 0:
        local = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).view(num_rows, -1)
    bits = collectives.gather_columns(local, sizes).numpy()
    return np.unpackbits(bits, axis=1, count=vocab_size, bitorder="little").view(np.bool_)

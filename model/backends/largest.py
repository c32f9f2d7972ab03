"""The largest values of a row, found on its device in a fixed order."""

import torch

_NOT_NEGATIVE = 0x7FFFFFFF


def find_largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest values of each row of float32 [rows, columns] and their columns, int64: largest first, ties by column.

    NaN counts as the largest value. Every value gets a key of its own, an integer, so the result does not depend on the device's sort.
    """
    # Adding 0 turns -0 into 0, which equals it; the bits of negative floats are in reverse order.
    bits = (logits + 0.0).masked_fill_(logits.isnan(), torch.nan).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _NOT_NEGATIVE, bits)
    keys = ordered.long() * (1 << 32) + (_NOT_NEGATIVE - torch.arange(logits.shape[1], device=logits.device))
    found = keys.amax(dim=1, keepdim=True) if count == 1 else keys.topk(count, dim=1).values
    columns = _NOT_NEGATIVE - (found & _NOT_NEGATIVE)
    return logits.gather(1, columns), columns

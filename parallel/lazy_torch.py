"""PyTorch, imported at the first use of one of its names.

The launcher reads headers, plans and supervises without PyTorch, whose import takes longer than all of that. A module that reads both
headers and tensors takes `torch` from here, so that describing a checkpoint does not import it, and reading its tensors does. Such a
module defers its annotations (`from __future__ import annotations`) and uses no name of PyTorch at its top level.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _LazyTorch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _LazyTorch()

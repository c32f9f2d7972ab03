"""Kernels in Triton for accelerators. Each has a plain counterpart, which `tests/model/backends/` and `self_check.py` compare it with."""

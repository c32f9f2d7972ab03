"""Whether the ranks of this host can gather through shared memory."""

import os


def shared_memory_works() -> bool:
    """Whether the processor guarantees store order (x86-64) and the system supports the shared-memory backend."""
    return os.uname().machine == "x86_64" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")

"""Memory that a model gives back is kept for its next batch.

glibc returns large blocks to the system as soon as they are freed, and a model on a CPU takes the same gigabytes of
activations again with every batch: touching fresh pages then costs as much as the arithmetic. Only the command line
does this, for its own process. What a budget counts as held is without it: :func:`ooc_influence.memory.held_now`.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory, unless the environment sets ``MALLOC_...``; return whether it does."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

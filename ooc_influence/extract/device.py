"""What a device says of itself."""

from __future__ import annotations

import torch


def out_of_memory(error: Exception) -> bool:
    """Return whether an error is the device's, or PyTorch's CPU allocator's, lack of memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

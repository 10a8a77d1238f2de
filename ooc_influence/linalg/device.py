"""Devices: names that torch knows and their memory, without loading torch where no device is asked for."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, MemoryBudgetError, MissingExtraError
from ooc_influence.memory import format_bytes


def parse_device(device: str | None) -> str | None:
    """Return the name of a torch device that is there; None for NumPy.

    Raises
    ------
    InputError
        If torch knows no such device, or it is not there.
    MissingExtraError
        If torch is not installed.
    """
    if device is None:
        return None
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"expected torch for device={device!r}; received none: pip install torch") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"expected a device such as 'cpu' or 'cuda'; received {device!r} ({reason}): choose another"
        ) from error
    return str(device)


def check_room(device: str, needed: int, stage: str) -> None:
    """Check that a device has so many bytes free; what has no memory of its own always has.

    Raises
    ------
    MemoryBudgetError
        If it has not.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryBudgetError(
            f"{stage} needs {format_bytes(needed)} on {device}, which has {format_bytes(free)} free: use fewer "
            "workers or a smaller rank, or fit without a device"
        )


def free_bytes(device: str) -> int | None:
    """Return the free bytes of a device; None for one that uses the process's memory."""
    torch: Any = sys.modules["torch"]
    if torch.device(device).type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def row_squares(rows: Any) -> npt.NDArray[np.float64]:
    """Return ‖x‖² of float32 rows, (b,), summed in float64: of an array, or of a tensor wherever it is."""
    if isinstance(rows, np.ndarray):
        return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    torch: Any = sys.modules["torch"]
    return np.asarray(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square_().cpu().numpy())

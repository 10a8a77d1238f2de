"""Compressed gradients of a batch: what the taps hand over, gathered into the columns of the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ooc_influence.errors import MemoryBudgetError
from ooc_influence.extract.gather import MaskGatherer
from ooc_influence.extract.reducers import make_reducer
from ooc_influence.extract.taps import PerSampleLoss, Taps
from ooc_influence.memory import BLOCK_BYTES, available, format_bytes
from ooc_influence.store import LograReduction, Mask, Reduction

# of a batch's rows at the peak, on the host: themselves, a layer's part, the writer's (measured: 3.3 to 3.5)
_COPIES = 3.5


class RowGatherer:
    """Computes the kept entries of every sample of a batch, or the projected numbers of its layers.

    Parameters
    ----------
    mask : Mask
        The kept entries, k in all.
    device : torch.device
        Where rows are put together; layers may be on others.
    reduction : Reduction, optional
        What rows are multiplied by.
    """

    def __init__(self, mask: Mask, device: torch.device, reduction: Reduction | None = None) -> None:
        self._k, self._device = mask.k, device
        logra = reduction if isinstance(reduction, LograReduction) else None
        self._gather = MaskGatherer(mask, device, logra)
        self._masked = logra is None
        self._reduce = None if reduction is None or logra else make_reducer(reduction, device)

    def __call__(self, taps: Taps, per_sample_loss: PerSampleLoss, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (b,), compressed gradients (b, k) float32 and masked norms (b,) of a batch, on the device.

        Raises
        ------
        InputError, UnsupportedModelError
            See :meth:`Taps.run`.
        MemoryBudgetError
            If the rows do not fit the memory that is free.
        """
        rows = torch.empty(0)

        def receiver(b: int) -> Any:
            nonlocal rows
            _check_room(b, self._k)
            rows = torch.zeros((b, self._k), device=self._device)
            return lambda use, x, delta: self._gather.add(rows, use, x, delta)

        losses = taps.run(per_sample_loss, batch, receiver, (lambda: rows) if self._masked else None)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return losses, rows if self._reduce is None else self._reduce(rows), norms


def _check_room(b: int, k: int) -> None:
    """Refuse a batch whose rows would have the process killed; small ones are not looked at."""
    need = int(_COPIES * 4 * b * k)
    if need <= BLOCK_BYTES or need <= (free := available(need)):
        return
    fits = free * b // need
    smaller = f"batches of at most {fits}, BudgetBatches, whose budget shrinks by itself, or " if fits else ""
    raise MemoryBudgetError(
        f"a batch of {b} samples with {k} entries each needs {format_bytes(need)}, {format_bytes(free)} are free: use "
        f"{smaller}a compressor that keeps fewer entries"
    )

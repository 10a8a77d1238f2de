"""The entries of a mask, gathered from the inputs and output gradients that layers hand over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries import KINDS, Entries
from ooc_influence.extract.entries.logra import LograEntries
from ooc_influence.extract.layers import Use
from ooc_influence.store import LograReduction, Mask, ModuleMask


class MaskGatherer:
    """Adds what one layer's use tells of the kept entries to the rows of a batch.

    Parameters
    ----------
    mask : Mask
        The kept entries, k in all.
    device : torch.device
        Where rows are put together; layers may be on others.
    logra : LograReduction, optional
        Project every layer's gradient instead.
    """

    def __init__(self, mask: Mask, device: torch.device, logra: LograReduction | None = None) -> None:
        self._mask, self._device, self._logra = mask, device, logra
        self._starts = np.cumsum([0, *(len(module.rows) for module in mask.modules)]).tolist()
        self._entries: dict[tuple[int, str, torch.device], tuple[Entries | LograEntries, slice | Tensor]] = {}

    def add(self, rows: Tensor, use: Use, x: Any, delta: Any) -> None:
        """Add the entries that one use of a layer contributes to rows (b, k)."""
        here = next(value.device for value in (delta if isinstance(delta, list) else [delta]) if value is not None)
        key = (use.layer, use.shape.name, here)
        if key not in self._entries:
            self._entries[key] = self._prepare(use, here)
        entries, columns = self._entries[key]
        if not entries.entries:
            return
        found = entries(x, delta).to(self._device)
        if len(found) != len(rows):  # samples folded with windows or frames
            found = found.view(len(rows), -1, found.shape[1]).sum(1)
        if isinstance(columns, slice):
            rows[:, columns] += found
        else:
            rows.index_add_(1, columns, found)

    def _prepare(self, use: Use, device: torch.device) -> tuple[Entries | LograEntries, slice | Tensor]:
        """Return a module's gatherer on a device, and the columns it adds to."""
        kept, first = self._mask.modules[use.layer], self._starts[use.layer]
        if self._logra is not None:
            if use.shape != kept.layer:
                raise UnsupportedModelError(
                    f"expected the weight of {kept.layer.name} in one layer for LoGra; received it in {use.shape.name} "
                    "too: use another compressor, or --modules without it"
                )
            return LograEntries(kept, use.layer, self._logra, device), slice(first, first + len(kept.rows))
        if use.own:
            return use.kind(kept, use.module, device), slice(first, first + len(kept.rows))
        part, at = _shared_part(kept, use)
        return use.kind(part, use.module, device), torch.from_numpy(first + at).to(self._device)


def _shared_part(kept: ModuleMask, use: Use) -> tuple[ModuleMask, Any]:
    """Return a layer's kept entries that another module shares, as that module has them, and which they are."""
    shape, module = use.first
    at, rows, cols = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for parameter, which, positions in KINDS[shape.kind].locate(kept.layer, module, kept.rows, kept.cols):
        if parameter in use.shared and len(which):
            found = use.kind.entries_at(use.shape, use.module, use.shared[parameter], positions)
            for values, new in zip((at, rows, cols), (which, *found), strict=True):
                values.append(new)
    which = np.concatenate(at)
    order = np.argsort(which)
    which = which[order]
    down, across = (np.concatenate(values)[order].astype(np.int32) for values in (rows, cols))
    return ModuleMask(use.shape, down, across, kept.weight[which]), which

"""The entries of a mask, gathered from the inputs and output gradients that layers hand over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries import KINDS, Entries
from ooc_influence.extract.entries.linear import LograEntries
from ooc_influence.extract.layers import Use
from ooc_influence.store import LograReduction, Mask, ModuleMask, Reduction, SjltReduction, StoredReduction


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


_HELD_BYTES = 2**30  # of a generated map
_SPARSE_ROWS, _SPARSE_ENTRY = 2**20, 16  # of a sparse map: rows at a time, bytes of an entry


def make_reducer(reduction: Reduction, device: torch.device) -> Reducer | SparseReducer:
    """Return what multiplies masked rows by a reduction on a device."""
    return (SparseReducer if isinstance(reduction, SjltReduction) else Reducer)(reduction, device)  # type: ignore[arg-type]


class SparseReducer:
    """Multiplies masked rows by a sparse projection: by SciPy on the host, which adds in a fixed order.

    Parameters
    ----------
    reduction : SjltReduction
        The map, (k', r). Held if it is small, else generated again for every batch.
    device : torch.device
        Where.
    """

    def __init__(self, reduction: SjltReduction, device: torch.device) -> None:
        self._reduction, self._device = reduction, device
        self._held: list[tuple[slice, Any]] | None = None
        if _SPARSE_ENTRY * reduction.rows * reduction.nonzeros <= _HELD_BYTES:
            self._held = list(self._blocks())

    def _blocks(self) -> Iterator[tuple[slice, Any]]:
        for start in range(0, self._reduction.rows, _SPARSE_ROWS):
            stop = min(start + _SPARSE_ROWS, self._reduction.rows)
            parts = [self._reduction.entries(first) for first in range(start, stop, 1024)]
            places, signs = (np.concatenate(values) for values in zip(*parts, strict=True))
            if self._device.type == "cpu":
                ends = np.arange(stop - start + 1, dtype=np.int64) * places.shape[1]
                shape = (stop - start, self._reduction.columns)
                block: Any = csr_matrix((signs.ravel(), places.ravel(), ends), shape=shape).T.tocsr()
            else:
                block = torch.from_numpy(places).to(self._device), torch.from_numpy(signs).to(self._device)
            yield slice(start, stop), block

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows (b, k') times the map, (b, r) float32."""
        out = rows.new_zeros((len(rows), self._reduction.columns))
        for part, block in self._blocks() if self._held is None else self._held:
            if self._device.type == "cpu":
                out += torch.from_numpy(np.ascontiguousarray((block @ rows[:, part].T.contiguous().numpy()).T))
                continue
            places, signs = block
            for number in range(places.shape[1]):
                out.index_add_(1, places[:, number], rows[:, part] * signs[:, number])
        return out


class Reducer:
    """Multiplies masked rows by a reduction on a device.

    Parameters
    ----------
    reduction : Reduction
        The map, (k', r). Held on the device as float32 if it is stored or small, else generated again for every batch.
    device : torch.device
        Where.
    """

    def __init__(self, reduction: Reduction, device: torch.device) -> None:
        self._reduction, self._device = reduction, device
        self._held: list[tuple[int, Tensor]] | None = None
        if isinstance(reduction, StoredReduction) or 4 * reduction.rows * reduction.columns <= _HELD_BYTES:
            self._held = list(self._blocks())

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first, block in self._reduction.blocks(self._reduction.rows):
            yield first, torch.from_numpy(np.ascontiguousarray(block)).to(self._device)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows (b, k') times the map, (b, r) float32."""
        out = rows.new_zeros((len(rows), self._reduction.columns))
        for first, block in self._blocks() if self._held is None else self._held:
            out.addmm_(rows[:, first : first + len(block)], block)
        return out

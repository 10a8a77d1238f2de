"""Kept entries, gathered from inputs and output gradients of layers, and the maps of these to fewer numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from typing_extensions import override

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries import KINDS, Entries, RotatedEntries
from ooc_influence.extract.entries.linear import LograEntries
from ooc_influence.extract.layers import Use
from ooc_influence.store import LograReduction, Mask, ModuleMask, Reduction, SjltReduction, StoredReduction

Gathers = Entries | LograEntries | RotatedEntries


class MaskGatherer:
    """Adds the kept entries that one use of a layer contributes to the rows of a batch, on ``device``.

    With ``logra``, they are the layers' projected numbers. Layers may be on other devices.
    """

    def __init__(self, mask: Mask, device: torch.device, logra: LograReduction | None = None) -> None:
        self._mask, self._device, self._logra = mask, device, logra
        self._starts = np.cumsum([0, *(len(module.rows) for module in mask.modules)]).tolist()
        self._entries: dict[
            tuple[int, str, torch.device], tuple[Entries | LograEntries | RotatedEntries, slice | Tensor]
        ] = {}

    def add(self, rows: Tensor, use: Use, x: Any, delta: Any) -> None:
        """Add the entries that one use of a layer contributes to rows (b, k)."""
        device = next(value.device for value in (delta if isinstance(delta, list) else [delta]) if value is not None)
        key = (use.layer, use.shape.name, device)
        if key not in self._entries:
            self._entries[key] = self._prepare(use, device)
        entries, columns = self._entries[key]
        if not entries.entries:
            return
        gathered = entries(x, delta).to(self._device)
        if len(gathered) != len(rows):  # samples folded with windows or frames
            gathered = gathered.view(len(rows), -1, gathered.shape[1]).sum(1)
        if isinstance(columns, slice):
            rows[:, columns] += gathered
        else:
            rows.index_add_(1, columns, gathered)

    def _prepare(self, use: Use, device: torch.device) -> tuple[Gathers, slice | Tensor]:
        """Return a module's gatherer on a device, and the columns it adds to."""
        kept, first = self._mask.modules[use.layer], self._starts[use.layer]
        columns = slice(first, first + len(kept.rows))
        if self._logra is not None:
            if use.shape != kept.layer and len(kept.rows):
                raise UnsupportedModelError(
                    f"expected the weight of {kept.layer.name} in one layer for LoGra; received it in {use.shape.name} "
                    "too: use another compressor, or --modules without it"
                )
            return LograEntries(kept, use.layer, self._logra, device), columns
        if kept.basis is not None and kept.basis.rotates:
            return RotatedEntries(kept, use.kind, use.module, device), columns
        if use.own:
            return use.kind(kept, use.module, device), columns
        part, indices = _shared_part(kept, use)
        return use.kind(part, use.module, device), torch.from_numpy(first + indices).to(self._device)


def _shared_part(kept: ModuleMask, use: Use) -> tuple[ModuleMask, Any]:
    """Return the kept entries of a layer that another module shares, as that module has them, and their indices."""
    shape, module = use.first
    parts = [(np.empty(0, np.int64),) * 3]
    for parameter, indices, positions in KINDS[shape.kind].locate(kept.layer, module, kept.rows, kept.cols):
        if parameter in use.shared and len(indices):
            parts.append((indices, *use.kind.entries_at(use.shape, use.module, use.shared[parameter], positions)))
    indices, rows, cols = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.argsort(indices)
    indices, rows, cols = indices[order], rows[order].astype(np.int32), cols[order].astype(np.int32)
    return ModuleMask(use.shape, rows, cols, kept.weight[indices]), indices


_CACHED_BYTES = 2**30  # of a generated map
_SPARSE_ROWS, _SPARSE_ENTRY = 2**20, 16  # of a sparse map: rows at a time, bytes of an entry


class Reducer(ABC):
    """Multiplies masked rows by a reduction (k', r) on a device.

    The map is cached there if it is stored or small, otherwise it is generated again for every batch.
    """

    def __init__(self, reduction: Reduction, device: torch.device, *, cached: bool) -> None:
        self._reduction, self._device = reduction, device
        self._cached = list(self._blocks()) if cached else None

    @abstractmethod
    def _blocks(self) -> Iterator[tuple[slice, Any]]:
        """Yield ranges of the map's rows, and these rows on the device."""

    @abstractmethod
    def _add_product(self, out: Tensor, rows: Tensor, block: Any) -> None:
        """Add rows (b, some of k') times a block of the map to out (b, r)."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows (b, k') times the map, (b, r) float32."""
        out = rows.new_zeros((len(rows), self._reduction.columns))
        for part, block in self._blocks() if self._cached is None else self._cached:
            self._add_product(out, rows[:, part], block)
        return out


def make_reducer(reduction: Reduction, device: torch.device) -> Reducer:
    """Return the reducer of a reduction."""
    if isinstance(reduction, SjltReduction):
        size = _SPARSE_ENTRY * reduction.rows * reduction.nonzeros
        return _SparseReducer(reduction, device, cached=size <= _CACHED_BYTES)
    size = 4 * reduction.rows * reduction.columns
    return _DenseReducer(reduction, device, cached=isinstance(reduction, StoredReduction) or size <= _CACHED_BYTES)


class _DenseReducer(Reducer):
    @override
    def _blocks(self) -> Iterator[tuple[slice, Any]]:
        for first, block in self._reduction.blocks(self._reduction.rows):
            yield slice(first, first + len(block)), torch.from_numpy(np.ascontiguousarray(block)).to(self._device)

    @override
    def _add_product(self, out: Tensor, rows: Tensor, block: Any) -> None:
        out.addmm_(rows, block)


class _SparseReducer(Reducer):
    """By SciPy on the host, which adds in a fixed order."""

    _reduction: SjltReduction

    @override
    def _blocks(self) -> Iterator[tuple[slice, Any]]:
        for start in range(0, self._reduction.rows, _SPARSE_ROWS):
            stop = min(start + _SPARSE_ROWS, self._reduction.rows)
            parts = [self._reduction.entries(first) for first in range(start, stop, 1024)]
            columns, signs = (np.concatenate(values) for values in zip(*parts, strict=True))
            if self._device.type == "cpu":
                ends = np.arange(stop - start + 1, dtype=np.int64) * columns.shape[1]
                shape = (stop - start, self._reduction.columns)
                block: Any = csr_matrix((signs.ravel(), columns.ravel(), ends), shape=shape).T.tocsr()
            else:
                block = torch.from_numpy(columns).to(self._device), torch.from_numpy(signs).to(self._device)
            yield slice(start, stop), block

    @override
    def _add_product(self, out: Tensor, rows: Tensor, block: Any) -> None:
        if self._device.type == "cpu":
            out += torch.from_numpy(np.ascontiguousarray((block @ rows.T.contiguous().numpy()).T))
            return
        columns, signs = block
        for number in range(columns.shape[1]):
            out.index_add_(1, columns[:, number], rows * signs[:, number])

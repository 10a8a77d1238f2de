"""Compressed gradients of a batch: what the taps hand over, gathered into the columns of the mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from ooc_influence.errors import MemoryBudgetError, UnsupportedModelError
from ooc_influence.extract.entries import Entries
from ooc_influence.extract.entries.logra import LograEntries
from ooc_influence.extract.layers import Use
from ooc_influence.extract.taps import PerSampleLoss, Taps
from ooc_influence.memory import BLOCK_BYTES, available, format_bytes
from ooc_influence.store import LograReduction, Mask, ModuleMask, Reduction, SjltReduction, StoredReduction

# of a batch's rows at the peak, on the host: themselves, a layer's part, the writer's (measured: 3.3 to 3.5)
_COPIES = 3.5
_HELD_BYTES = 2**30  # of a generated map
_SPARSE_ROWS, _SPARSE_ENTRY = 2**20, 16  # of a sparse map: rows at a time, bytes of an entry


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
        self._mask, self._device = mask, device
        self._logra = reduction if isinstance(reduction, LograReduction) else None
        self._reduce = None if reduction is None or self._logra else make_reducer(reduction, device)
        self._starts = np.cumsum([0, *(len(module.rows) for module in mask.modules)]).tolist()
        self._entries: dict[tuple[str, torch.device], tuple[Entries | LograEntries, slice | Tensor]] = {}

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
            _check_room(b, self._mask.k)
            rows = torch.zeros((b, self._mask.k), device=self._device)
            return lambda use, x, delta: self._add(rows, use, x, delta)

        losses = taps.run(per_sample_loss, batch, receiver)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return losses, rows if self._reduce is None else self._reduce(rows), norms

    def _add(self, rows: Tensor, use: Use, x: Any, delta: Any) -> None:
        here = next(value.device for value in (delta if isinstance(delta, list) else [delta]) if value is not None)
        key = (use.shape.name, here)
        if key not in self._entries:
            self._entries[key] = self._prepare(use, here)
        entries, columns = self._entries[key]
        if not entries.entries:
            return
        found = entries(x, delta).to(self._device)
        if isinstance(columns, slice):
            rows[:, columns] += found
        else:
            rows.index_add_(1, columns, found)

    def _prepare(self, use: Use, device: torch.device) -> tuple[Entries | LograEntries, slice | Tensor]:
        """Return a module's gatherer on a device, and the columns it adds to: of a tied one, the weight's only."""
        kept, first = self._mask.modules[use.layer], self._starts[use.layer]
        if self._logra is not None:
            if use.shape != kept.layer:
                raise UnsupportedModelError(
                    f"expected the weight of {kept.layer.name} in one layer for LoGra; received it in {use.shape.name} "
                    "too: use another compressor, or --modules without it"
                )
            return LograEntries(kept, use.layer, self._logra, device), slice(first, first + len(kept.rows))
        if use.shape.name == kept.layer.name:
            return use.kind(kept, use.module, device), slice(first, first + len(kept.rows))
        width = kept.layer.shape[1] - kept.layer.bias
        at = np.flatnonzero(kept.cols < width)
        part = ModuleMask(use.shape, kept.rows[at], kept.cols[at], kept.weight[at])
        return use.kind(part, use.module, device), torch.from_numpy(first + at).to(self._device)


def _check_room(b: int, k: int) -> None:
    """Refuse a batch whose rows would have the process killed; small ones are not looked at."""
    need = int(_COPIES * 4 * b * k)
    if need <= BLOCK_BYTES or need <= (free := available()):
        return
    fits = free * b // need
    smaller = f"batches of at most {fits}, BudgetBatches, whose budget shrinks by itself, or " if fits else ""
    raise MemoryBudgetError(
        f"a batch of {b} samples with {k} entries each needs {format_bytes(need)}, {format_bytes(free)} are free: use "
        f"{smaller}a compressor that keeps fewer entries"
    )


def make_reducer(reduction: Reduction, device: torch.device) -> Reducer | SparseReducer:
    """Return what multiplies masked rows by a reduction on a device."""
    return (SparseReducer if isinstance(reduction, SjltReduction) else Reducer)(reduction, device)  # type: ignore[arg-type]


class SparseReducer:
    """Multiplies masked rows by a sparse projection: by SciPy on the host, which adds in a fixed order.

    Parameters
    ----------
    reduction : SjltReduction
        The map, (k', r). Held if it is small, else generated anew for every batch.
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
        The map, (k', r). Held on the device as float32 if it is stored or small, else generated anew for every batch.
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

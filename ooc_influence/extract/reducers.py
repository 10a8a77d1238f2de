"""Multiplying masked rows by a reduction, on a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from ooc_influence.store import Reduction, SjltReduction, StoredReduction

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

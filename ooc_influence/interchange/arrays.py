"""Rows to import from an array, in memory or on disk, or from blocks that come one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from typing_extensions import override

from ooc_influence.errors import InputError
from ooc_influence.interchange.blocks import KINDS, Floats, ImportedBlock, Source, Values, parse_dtypes, to_rows
from ooc_influence.memory import block_limit


class ArrayRows(Source):
    """Rows of an array (n, k) that can be sliced: NumPy's, mapped or not, Zarr's, Dask's.

    Parameters
    ----------
    array : array
        The rows.
    values : mapping of str to (n,) array
        Their values, by the names of :class:`ImportedBlock`.
    """

    def __init__(self, array: Any, values: Mapping[str, Any]) -> None:
        shape = tuple(array.shape)
        if len(shape) != 2 or not all(isinstance(size, (int, np.integer)) and size > 0 for size in shape):
            raise InputError(f"expected rows as an array (n, k) with at least one; received shape {shape}")
        if np.dtype(array.dtype).kind not in KINDS:
            raise InputError(f"expected rows of numbers; received {array.dtype}")
        self.n, self.k = int(shape[0]), int(shape[1])
        for name, each in values.items():
            if len(each) != self.n:
                shown = {"example_id": "ids"}.get(name, name.removeprefix("columns/"))
                raise InputError(f"expected {shown} for {self.n} rows; received {len(each)}")
        self.dtypes, self._array, self._values = parse_dtypes(values), array, values
        self.has_loss = "loss" in values

    @override
    def blocks(self, start: int) -> Iterator[ImportedBlock]:
        step = block_limit(self.k)
        for first, last in pairwise(self._edges(step)):
            if last <= start:
                continue
            read = to_rows(self._array[first:last], self.k, first)
            for low in range(max(first, start), last, step):
                high = min(last, low + step)
                values = {name: np.asarray(each[low:high]) for name, each in self._values.items()}
                yield ImportedBlock(low, read[low - first : high - first], values)

    def _edges(self, step: int) -> list[int]:
        """Return where reads begin and end: whole chunks, since reading a part of one reads, or makes, all of it."""
        n, chunks = int(self._array.shape[0]), getattr(self._array, "chunks", None)
        if chunks is not None and isinstance(chunks[0], tuple):  # Dask's
            return [0, *np.cumsum(chunks[0]).tolist()]
        size = step if chunks is None else int(chunks[0]) * max(1, step // int(chunks[0]))  # Zarr's, h5py's
        return [*range(0, n, size), n]


class StreamedRows(Source):
    """Rows of an iterable of blocks (b, k), which an interrupted import iterates over again.

    Parameters
    ----------
    blocks : iterable
        The rows.
    values : mapping of str to (n,) array
        Their values, by the names of :class:`ImportedBlock`.
    """

    def __init__(self, blocks: Iterable[Any], values: Mapping[str, Any]) -> None:
        self._blocks, self._values, self.n = iter(blocks), values, None
        self.dtypes, self.has_loss = parse_dtypes(values), "loss" in values
        try:
            self._first: Floats | None = to_rows(next(self._blocks), None, 0)
        except StopIteration:
            raise InputError("expected blocks of rows to import; received none") from None
        self.k = self._first.shape[1]

    @override
    def blocks(self, start: int) -> Iterator[ImportedBlock]:
        step, first = block_limit(self.k), 0
        for rows in self._all():
            stop = first + len(rows)
            for low in range(max(first, start), stop, step):
                high = min(stop, low + step)
                yield ImportedBlock(low, rows[low - first : high - first], self._part(low, high))
            first = stop
        for name, each in self._values.items():
            if len(each) != first:
                raise InputError(f"expected {name} for the {first} rows of the blocks; received {len(each)}")

    def _all(self) -> Iterator[Floats]:
        first, self._first = self._first, None
        assert first is not None, "blocks are taken once"
        yield first
        seen = len(first)
        del first
        for block in self._blocks:
            rows = to_rows(block, self.k, seen)
            seen += len(rows)
            yield rows

    def _part(self, low: int, high: int) -> Values:
        values = {name: np.asarray(each[low:high]) for name, each in self._values.items()}
        for name, each in values.items():
            if len(each) != high - low:
                raise InputError(f"expected {name} for every row; received {len(self._values[name])} for more rows")
        return values

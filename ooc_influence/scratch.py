"""Arrays that are too large for memory: they grow in a file and are mapped from there. Whether texts repeat.

Repeated texts are found by 64-bit digests on disk, 16 bytes a text and none of them in memory. Blocks of digests are
sorted one by one as they come. Then values are examined range by range, each with about as many digests as a block: a
slice of every sorted block. Where digests are equal, the texts themselves are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt


class ArrayFile:
    """A one-dimensional array that grows at its end, in a file. A context that closes the file.

    Parameters
    ----------
    dtype : dtype
        Of its values.
    path : Path, optional
        A file to be made. Default: a temporary one without a name, which is removed when nothing maps it any more.
    """

    def __init__(self, dtype: npt.DTypeLike, path: Path | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._file: Any = tempfile.TemporaryFile() if path is None else path.open("x+b")  # noqa: SIM115 - mapped later
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: npt.ArrayLike) -> None:
        """Add values at the end."""
        block = np.ascontiguousarray(values, self._dtype)
        self._file.write(block.data)
        self._length += len(block)

    def finish(self) -> npt.NDArray[Any]:
        """Return all values, mapped read-only, and close the file."""
        with self._file as file:
            file.flush()
            return _mapped(file, self._dtype, self._length)


def map_array(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the values in a file, mapped read-only: (n,)."""
    size = np.dtype(dtype).itemsize
    with path.open("rb") as file:
        return _mapped(file, np.dtype(dtype), path.stat().st_size // size)


def _mapped(file: Any, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    if not length:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(file, dtype, mode="r", shape=(length,)))


_BLOCK = 2**18  # digests sorted at a time
_COMPARED = 4096  # texts compared at a time, of equal digests

Numbers = npt.NDArray[np.int64]


class Repeats:
    """Texts, in order, of which none may repeat. A context that closes a temporary file."""

    def __init__(self) -> None:
        self._digests = ArrayFile(np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._digests.__exit__(*error)

    def add(self, texts: Sequence[str]) -> None:
        """Add further texts."""
        # Python's own keyed hash: its key differs from process to process, and digests do not leave this one
        self._digests.append(np.fromiter(map(hash, texts), np.int64, len(texts)))

    def find(self, texts_of: Callable[[Numbers], Sequence[str]]) -> tuple[int, int] | None:
        """Return the numbers of two equal texts; None if there are none. Nothing can be added afterwards.

        Parameters
        ----------
        texts_of : callable
            Returns the texts of these numbers, (m,) int64 in rising order.
        """
        digests = self._digests.finish()
        for candidates in _repeated(digests):
            for low in range(0, len(candidates), _COMPARED):
                found = _compare(_numbers_of(digests, candidates[low : low + _COMPARED]), texts_of)
                if found is not None:
                    return found
        return None


def _repeated(digests: Numbers) -> Iterator[Numbers]:
    """Yield digests that are there twice, block by block and then range by range."""
    with ArrayFile(np.int64) as ordered:
        for low in range(0, len(digests), _BLOCK):
            block = np.sort(digests[low : low + _BLOCK])
            yield from _twice(block)
            ordered.append(block)
        sorted_blocks = ordered.finish()
    blocks = [sorted_blocks[low : low + _BLOCK] for low in range(0, len(digests), _BLOCK)]
    if len(blocks) < 2:
        return
    starts = np.zeros(len(blocks), np.int64)
    for part in range(1, len(blocks) + 1):
        edge = -(2**63) + part * 2**64 // len(blocks)
        stops = np.array([len(b) if edge >= 2**63 else np.searchsorted(b, np.int64(edge)) for b in blocks])
        slices = [block[start:stop] for block, start, stop in zip(blocks, starts, stops, strict=True)]
        yield from _twice(np.sort(np.concatenate(slices)))
        starts = stops


def _twice(ordered: Numbers) -> Iterator[Numbers]:
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated):
        yield repeated


def _numbers_of(digests: Numbers, wanted: Numbers) -> Iterator[Numbers]:
    for low in range(0, len(digests), _BLOCK):
        yield low + np.flatnonzero(np.isin(digests[low : low + _BLOCK], wanted))


def _compare(numbers: Iterator[Numbers], texts_of: Callable[[Numbers], Sequence[str]]) -> tuple[int, int] | None:
    seen: dict[str, int] = {}
    for part in numbers:
        for low in range(0, len(part), _COMPARED):
            some = part[low : low + _COMPARED]
            for number, text in zip(some.tolist(), texts_of(some), strict=True):
                if text in seen:
                    return seen[text], number
                seen[text] = number
    return None

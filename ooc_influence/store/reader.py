"""Row blocks out of a store: float32, in a reused buffer, with the next block's pages already on their way.

Blocks lie on a grid that starts at row 0 and does not depend on chunks or workers, so the same rows are always
multiplied together and results do not depend on how the work was divided.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence.store.encoding import FloatRows, decode_into

if TYPE_CHECKING:
    from ooc_influence.store.view import StoreView


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``stop`` of a store.

    Attributes
    ----------
    start, stop : int
        Row numbers.
    gradients : (stop - start, k) float32
        The rows, scale applied. A view into a buffer that the next block overwrites.
    dropped : (stop - start,) bool or None
        Which rows are dropped; None where none is.
    """

    start: int
    stop: int
    gradients: FloatRows
    dropped: npt.NDArray[np.bool_] | None


def prefetch(store: StoreView, start: int, stop: int) -> None:
    """Ask the kernel to read rows ``start`` to ``stop`` into the page cache; returns at once."""
    if not hasattr(os, "posix_fadvise"):  # macOS: the kernel's own read-ahead has to do
        return
    rows = store.layout.chunk_rows
    for chunk in range(start // rows, -(-stop // rows)):
        try:
            handle = os.open(store.path / "gradients" / f"c.{chunk}.0", os.O_RDONLY)
        except OSError:
            continue  # the read itself will report a missing chunk
        try:
            first = max(0, start - chunk * rows) * store.layout.chunk_bytes // rows
            last = min(rows, stop - chunk * rows) * store.layout.chunk_bytes // rows
            os.posix_fadvise(handle, first, last - first, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def read_into(store: StoreView, start: int, stop: int, out: FloatRows) -> None:
    """Write rows ``start`` to ``stop``, as float32 with the scale applied, into ``out`` (stop - start, k)."""
    rows = store.layout.chunk_rows
    at = start
    while at < stop:
        end = min(stop, (at // rows + 1) * rows)
        raw = store.raw_rows(at, end)
        decode_into(raw, store.small("row_scale", at, end), out[at - start : end - start], store.layout.dtype)
        at = end


def read_blocks(store: StoreView, start: int, stop: int, block_rows: int) -> Iterator[Block]:
    """Yield the blocks of rows ``start`` to ``stop``; ``start`` is a multiple of ``block_rows``."""
    buffer: npt.NDArray[Any] = np.empty((min(block_rows, max(0, stop - start)), store.k), np.float32)
    for first in range(start, stop, block_rows):
        last = min(stop, first + block_rows)
        prefetch(store, last, min(stop, last + block_rows))
        out = buffer[: last - first]
        read_into(store, first, last, out)
        dropped = store.small("dropped", first, last) if store.has_dropped else None
        yield Block(first, last, out, dropped if dropped is not None and dropped.any() else None)

"""Row blocks out of a store: float32, in a reused buffer, with the next chunk already on its way.

A thread fetches one chunk ahead: it maps a local chunk and touches its pages, asking the kernel for the chunk after it;
others it reads and decodes. At most two chunks are held. Blocks lie on a grid that starts at row 0 and does not depend
on chunks or workers, so the same rows are always multiplied together and results do not depend on how the work was
divided.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.store.encoding import FloatRows, RawRows
from ooc_influence.store.place import is_local

if TYPE_CHECKING:
    from ooc_influence.store.view import StoreView

_PAGE = 4096


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


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of one chunk: their stored form, scales, and dropped marks if there are any."""

    start: int
    stop: int
    raw: RawRows
    scale: FloatRows
    dropped: npt.NDArray[np.bool_] | None


class ChunkStream:
    """The chunks of rows ``start`` to ``stop``, one after the other, the next one fetched by a thread.

    Use it as a context; iterating yields :class:`Piece`.
    """

    def __init__(self, store: StoreView, start: int, stop: int) -> None:
        self._store, self._start, self._stop = store, start, stop
        self._thread = ThreadPoolExecutor(1, "ooc_influence-reader")
        self._group = -1
        self._scale: FloatRows = np.empty(0, np.float32)
        self._dropped: npt.NDArray[np.bool_] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Piece]:
        size = self._store.layout.chunk_rows
        if self._start >= self._stop:
            return
        chunks = range(self._start // size, -(-self._stop // size))
        coming: Future[Piece] = self._thread.submit(self._fetch, chunks[0])
        for chunk in chunks:
            piece = coming.result()
            if chunk + 1 < chunks.stop:
                coming = self._thread.submit(self._fetch, chunk + 1)
            yield piece

    def _fetch(self, chunk: int) -> Piece:
        store, size = self._store, self._store.layout.chunk_rows
        start, stop = max(self._start, chunk * size), min(self._stop, (chunk + 1) * size)
        mapped = is_local(store.path) and store.layout.codec is None
        if mapped and stop < self._stop:
            ask_for_chunk(store, chunk + 1)
        raw = store.committed_chunk(chunk)[start - chunk * size : stop - chunk * size]
        if mapped and raw.size:  # here, so that the caller does not wait for the disk
            raw.reshape(-1).view(np.uint8)[::_PAGE].max()
        self._read_group(start // store.layout.group_rows)
        first = start - self._group * store.layout.group_rows
        places = slice(first, first + stop - start)
        dropped = None if self._dropped is None else self._dropped[places]
        return Piece(start, stop, raw, self._scale[places], dropped)

    def _read_group(self, group: int) -> None:
        """Hold the scales and dropped marks of a group, which are in one file each."""
        if group == self._group:
            return
        store, size = self._store, self._store.layout.group_rows
        stop = min(store.n, (group + 1) * size)
        self._scale = store.small("row_scale", group * size, stop)
        self._dropped = store.small("dropped", group * size, stop) if store.has_dropped else None
        self._group = group


def ask_for_chunk(store: StoreView, chunk: int) -> None:
    """Ask the kernel to read a chunk into the page cache; returns at once."""
    if not hasattr(os, "posix_fadvise"):  # macOS: the kernel's own read-ahead has to do
        return
    try:
        handle = os.open(f"{store.path}/gradients/c.{chunk}.0", os.O_RDONLY)
    except OSError:
        return  # the read itself will report a missing chunk
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)


def read_into(store: StoreView, start: int, stop: int, out: FloatRows) -> None:
    """Write rows ``start`` to ``stop``, as float32 with the scale applied, into ``out`` (stop - start, k)."""
    if start // store.layout.chunk_rows == (stop - 1) // store.layout.chunk_rows:  # a few rows: no thread
        scale = store.small("row_scale", start, stop)
        store.layout.encoding.decode_into(store.raw_rows(start, stop), scale, out, store.column_scale)
        return
    with ChunkStream(store, start, stop) as stream:
        for piece in stream:
            _decode(store, piece, slice(0, piece.stop - piece.start), out[piece.start - start : piece.stop - start])


def read_blocks(store: StoreView, start: int, stop: int, block_rows: int) -> Iterator[Block]:
    """Yield the blocks of rows ``start`` to ``stop``; ``start`` is a multiple of ``block_rows``."""
    buffer: npt.NDArray[Any] = np.empty((min(block_rows, max(0, stop - start)), store.k), np.float32)
    marks = np.zeros(len(buffer), np.bool_)
    first = start
    with ChunkStream(store, start, stop) as stream:
        for piece in stream:
            at = piece.start
            while at < piece.stop:
                last = min(stop, first + block_rows)
                end = min(piece.stop, last)
                inside = slice(at - piece.start, end - piece.start)
                _decode(store, piece, inside, buffer[at - first : end - first])
                marks[at - first : end - first] = False if piece.dropped is None else piece.dropped[inside]
                at = end
                if end == last:
                    dropped = marks[: last - first]
                    yield Block(first, last, buffer[: last - first], dropped if dropped.any() else None)
                    first = last


def _decode(store: StoreView, piece: Piece, inside: slice, out: FloatRows) -> None:
    store.layout.encoding.decode_into(piece.raw[inside], piece.scale[inside], out, store.column_scale)

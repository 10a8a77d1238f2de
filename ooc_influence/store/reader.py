"""Blocks of a store's rows: float32, in a reused buffer, with the next chunk already being read; and searching ids.

A thread fetches ahead: it maps two local chunks and touches their pages, asking the kernel for the one after them; of
others, which it reads and decodes, one, so at most two are held in memory. Blocks are aligned to a grid that starts at
row 0 and does not depend on chunks or workers, so the same rows are always multiplied together and results do not
depend on how the work was divided. Where chunks are mapped, only the rows and columns asked for are read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store.encoding import FloatRows, RawRows
from ooc_influence.store.layout import column_dtype
from ooc_influence.store.paths import is_local
from ooc_influence.store.view import StoreView

_PAGE = 4096
_ASKED_AHEAD = 64  # chunks of which single rows are asked for: a disk answers many questions at once
RowNumbers = npt.NDArray[np.int64]
Columns = Sequence[tuple[int, int]]  # ranges of columns


@dataclass(frozen=True)
class RowSpan:
    """Rows ``start`` to ``stop`` of a store.

    Attributes
    ----------
    start, stop : int
        Row numbers; where only some rows are read, offsets among these.
    dropped : (stop - start,) bool or None
        Which rows are dropped; None where none is.
    loss : (stop - start,) float32 or None
        Their losses, where they were asked for.
    """

    start: int
    stop: int
    dropped: npt.NDArray[np.bool_] | None
    loss: FloatRows | None


@dataclass(frozen=True)
class Block(RowSpan):
    """Rows as numbers: ``gradients`` (stop - start, k) float32, a view into a buffer that the next block overwrites."""

    gradients: FloatRows


@dataclass(frozen=True)
class RawBlock(RowSpan):
    """Rows as they are stored: ``parts`` are (rows (m, columns), scale (m,)), chunk by chunk, mapped where possible."""

    parts: list[tuple[RawRows, FloatRows]]


@dataclass(frozen=True)
class Piece(RowSpan):
    """Rows of one chunk as they are stored: ``raw`` (stop - start, columns) and their ``scale`` (stop - start,)."""

    raw: RawRows
    scale: FloatRows

    def part(self, start: int, stop: int) -> Piece:
        """Return its rows ``start`` to ``stop``."""
        rows = slice(start - self.start, stop - self.start)
        dropped = None if self.dropped is None else self.dropped[rows]
        loss = None if self.loss is None else self.loss[rows]
        return Piece(start, stop, dropped, loss, self.raw[rows], self.scale[rows])


class ChunkStream:
    """The chunks of rows ``start`` to ``stop``, one after the other, the next ones fetched by a thread.

    Use it as a context; iterating yields :class:`Piece`.

    Parameters
    ----------
    store : StoreView
        The store.
    start, stop : int
        Row numbers, or offsets in ``numbers``.
    numbers : (stop - start,) int64, optional
        The rows, ascending, where they are not all those from ``start`` to ``stop``.
    loss : bool
        Read their losses too.
    columns : sequence of (first, last), optional
        The columns that will be looked at.
    """

    def __init__(
        self,
        store: StoreView,
        start: int,
        stop: int,
        *,
        numbers: RowNumbers | None = None,
        loss: bool = False,
        columns: Columns | None = None,
    ) -> None:
        self._store, self._start, self._stop, self._numbers = store, start, stop, numbers
        whole = columns is None or not store.layout.encoding.separable
        self._columns = [(0, store.layout.encoding.columns)] if columns is None or whole else columns
        self._mapped = is_local(store.path) and store.layout.codec is None
        self._ahead = self._mapped and numbers is None and 2 * sum(b - a for a, b in self._columns) >= store.k
        self._thread = ThreadPoolExecutor(1, "ooc_influence-reader")
        self._group = -1
        self._scale: FloatRows = np.empty(0, np.float32)
        self._loss: FloatRows | None = self._scale if loss else None
        self._dropped: npt.NDArray[np.bool_] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _parts(self) -> list[tuple[int, int]]:
        """Return the row numbers, or offsets in the numbers, that each chunk has."""
        size = self._store.layout.chunk_rows
        if self._start >= self._stop:
            return []
        if self._numbers is None:
            edges = range(self._start // size * size + size, self._stop, size)
            cuts = [self._start, *edges, self._stop]
        else:
            cuts = [0, *(np.flatnonzero(np.diff(self._numbers // size)) + 1).tolist(), len(self._numbers)]
        return list(pairwise(cuts))

    def __iter__(self) -> Iterator[Piece]:
        parts = self._parts()
        if not parts:
            return
        depth = 2 if self._mapped else 1  # what is not mapped is held in memory
        self._ask_for_rows(parts[:_ASKED_AHEAD])
        pending = deque(self._thread.submit(self._fetch, *part) for part in parts[:depth])
        for number, part in enumerate([*parts[depth:], *[None] * min(depth, len(parts))]):
            piece = pending.popleft().result()
            self._ask_for_rows(parts[number + _ASKED_AHEAD : number + _ASKED_AHEAD + 1])
            if part is not None:
                pending.append(self._thread.submit(self._fetch, *part))
            yield piece

    def _ask_for_rows(self, parts: Sequence[tuple[int, int]]) -> None:
        """Ask the kernel to read the rows wanted of some chunks, where they are mapped and not all are wanted."""
        if not self._mapped or self._numbers is None:
            return
        size, row_bytes = self._store.layout.chunk_rows, self._store.layout.encoding.row_bytes
        for low, high in parts:
            chunk = int(self._numbers[low]) // size
            offsets = (self._numbers[low:high] - chunk * size) * row_bytes
            ask_for_bytes(self._store, chunk, [(offset, row_bytes) for offset in offsets.tolist()])

    def _fetch(self, low: int, high: int) -> Piece:
        store, size = self._store, self._store.layout.chunk_rows
        first = low if self._numbers is None else int(self._numbers[low])
        chunk, rows_in_chunk = first // size, slice(first % size, first % size + high - low)
        if self._ahead and high < self._stop:
            ask_for_chunk(store, chunk + 1)
        rows = store.committed_chunk(chunk)
        self._read_group(first // store.layout.group_rows)
        start = first // store.layout.group_rows * store.layout.group_rows
        if self._numbers is None:
            raw, inside, base = rows[rows_in_chunk], slice(first - start, first - start + high - low), 0
            if self._mapped and raw.size:  # here, so that the caller does not wait for the disk
                self._touch(raw)
        else:
            wanted = self._numbers[low:high]
            raw, inside, base = rows[wanted - chunk * size], wanted - start, self._start  # type: ignore[assignment]
        dropped = None if self._dropped is None else self._dropped[inside]
        loss = None if self._loss is None else self._loss[inside]
        return Piece(base + low, base + high, dropped, loss, raw, self._scale[inside])

    def _touch(self, raw: RawRows) -> None:
        """Touch every page of the columns wanted, so that they are in memory."""
        if len(self._columns) == 1 and self._columns[0] == (0, raw.shape[1]):
            raw.reshape(-1).view(np.uint8)[::_PAGE].max()
            return
        for first, last in self._columns:
            raw[:, first:last].view(np.uint8)[:, ::_PAGE].max()

    def _read_group(self, group: int) -> None:
        """Load the scales, tombstones and losses of a group, which are in one file each."""
        if group == self._group:
            return
        store, size = self._store, self._store.layout.group_rows
        stop = min(store.n, (group + 1) * size)
        self._scale = store.small("row_scale", group * size, stop)
        self._dropped = store.small("dropped", group * size, stop) if store.has_dropped else None
        if self._loss is not None:
            self._loss = store.small("loss", group * size, stop)
        self._group = group


def ask_for_chunk(store: StoreView, chunk: int) -> None:
    """Ask the kernel to read a chunk into the page cache; returns at once."""
    ask_for_bytes(store, chunk, [(0, 0)])


def ask_for_bytes(store: StoreView, chunk: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Ask the kernel to read ranges of a chunk, (offset, bytes; 0: to the end), into the page cache."""
    if not hasattr(os, "posix_fadvise"):  # macOS: only the kernel's own read-ahead
        return
    try:
        handle = os.open(f"{store.path}/gradients/c.{chunk}.0", os.O_RDONLY)
    except OSError:
        return  # the read itself will report a missing chunk
    try:
        for offset, length in ranges:
            os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)
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
            rows = out[piece.start - start : piece.stop - start]
            store.layout.encoding.decode_into(piece.raw, piece.scale, rows, store.column_scale)


def read_blocks(
    store: StoreView,
    start: int,
    stop: int,
    block_rows: int,
    *,
    numbers: RowNumbers | None = None,
    loss: bool = False,
    columns: Columns | None = None,
    threads: int = 1,
) -> Iterator[Block]:
    """Yield the blocks of rows ``start`` to ``stop``; ``start`` is a multiple of ``block_rows``.

    Parameters
    ----------
    store : StoreView
        The store.
    start, stop : int
        Row numbers, or offsets in ``numbers``.
    block_rows : int
        Rows of a block; the last one may have fewer.
    numbers : (stop - start,) int64, optional
        The rows, ascending, where they are not all those from ``start`` to ``stop``.
    loss : bool
        Give their losses too.
    columns : sequence of (first, last), optional
        Give only these ranges of columns, one after the other.
    threads : int
        Threads to decode with.
    """
    width = store.k if columns is None else sum(last - first for first, last in columns)
    pieces = _block_pieces(store, start, stop, block_rows, numbers, loss, columns)
    size = min(block_rows, max(0, stop - start))
    yield from _decoded(pieces, (size, width), partial(_decode, store, columns), loss, threads)


def read_stored_blocks(
    store: StoreView,
    start: int,
    stop: int,
    block_rows: int,
    *,
    numbers: RowNumbers | None = None,
    threads: int = 1,
) -> Iterator[Block]:
    """Yield the blocks of rows as :meth:`Encoding.read_stored_into` gives them; see :func:`read_blocks`."""
    form, size = store.layout.encoding, min(block_rows, max(0, stop - start))
    pieces = _block_pieces(store, start, stop, block_rows, numbers, False, None)
    yield from _decoded(pieces, (size, form.stored_columns), form.read_stored_into, False, threads)


Decode = Callable[[RawRows, FloatRows, FloatRows], None]


def _decoded(
    pieces: Iterator[tuple[int, int, Piece]], shape: tuple[int, int], decode: Decode, loss: bool, threads: int
) -> Iterator[Block]:
    """Yield blocks of pieces, decoded into one buffer of a shape."""
    buffer: npt.NDArray[Any] = np.empty(shape, np.float32)
    tombstones, losses = np.zeros(len(buffer), np.bool_), np.empty(len(buffer), np.float32)
    with ThreadPoolExecutor(max(1, threads - 1), "ooc_influence-decoder") as pool:
        for first, last, piece in pieces:
            rows = slice(piece.start - first, piece.stop - first)
            _decode_together(decode, piece, buffer[rows], pool, threads)
            tombstones[rows] = False if piece.dropped is None else piece.dropped
            if piece.loss is not None:
                losses[rows] = piece.loss
            if piece.stop == last:
                size = last - first
                dropped = tombstones[:size] if tombstones[:size].any() else None
                yield Block(first, last, dropped, losses[:size] if loss else None, buffer[:size])


def read_raw_blocks(
    store: StoreView,
    start: int,
    stop: int,
    block_rows: int,
    *,
    numbers: RowNumbers | None = None,
    loss: bool = False,
    columns: Columns | None = None,
) -> Iterator[RawBlock]:
    """Yield the same blocks as :func:`read_blocks`, as they are stored, to be decoded elsewhere.

    Their rows are whole; ``columns`` are those that will be looked at.
    """
    pieces: list[Piece] = []
    for first, last, piece in _block_pieces(store, start, stop, block_rows, numbers, loss, columns):
        pieces.append(piece)
        if piece.stop == last:
            dropped = np.concatenate(
                [np.zeros(p.stop - p.start, bool) if p.dropped is None else p.dropped for p in pieces]
            )
            losses = [p.loss for p in pieces if p.loss is not None]
            yield RawBlock(
                first, last, dropped if dropped.any() else None, np.concatenate(losses) if loss else None,
                [(p.raw, p.scale) for p in pieces],
            )  # fmt: skip
            pieces = []


def _block_pieces(
    store: StoreView,
    start: int,
    stop: int,
    block_rows: int,
    numbers: RowNumbers | None,
    loss: bool,
    columns: Columns | None,
) -> Iterator[tuple[int, int, Piece]]:
    """Yield, for each piece of a chunk within one block, the rows of the block and the piece."""
    first = start
    with ChunkStream(store, start, stop, numbers=numbers, loss=loss, columns=columns) as stream:
        for chunk in stream:
            begin = chunk.start
            while begin < chunk.stop:
                last = min(stop, first + block_rows)
                end = min(chunk.stop, last)
                yield first, last, chunk.part(begin, end)
                begin = end
                if end == last:
                    first = last


def _decode_together(decode: Decode, piece: Piece, out: FloatRows, pool: ThreadPoolExecutor, threads: int) -> None:
    """Decode rows in several threads: NumPy releases the lock while it converts."""
    share = max(1, -(-len(out) // threads))
    cuts = [slice(low, min(len(out), low + share)) for low in range(0, len(out), share)]
    tasks = [pool.submit(decode, piece.raw[cut], piece.scale[cut], out[cut]) for cut in cuts[1:]]
    for cut in cuts[:1]:
        decode(piece.raw[cut], piece.scale[cut], out[cut])
    for task in tasks:
        task.result()


def _decode(store: StoreView, columns: Columns | None, raw: RawRows, scale: FloatRows, out: FloatRows) -> None:
    form, by_column = store.layout.encoding, store.column_scale
    if columns is None:
        form.decode_into(raw, scale, out, by_column)
        return
    if not form.separable:
        step = 64
        whole = np.empty((min(step, len(raw)), store.k), np.float32)
        for start in range(0, len(raw), step):
            part = slice(start, start + step)
            rows = whole[: len(raw[part])]
            form.decode_into(raw[part], scale[part], rows, by_column)
            np.concatenate([rows[:, first:last] for first, last in columns], axis=1, out=out[part])
        return
    at = 0
    for first, last in columns:
        weights = None if by_column is None else by_column[first:last]
        narrow = replace(form, k=last - first)
        narrow.decode_into(raw[:, first:last], scale, out[:, at : at + last - first], weights)
        at += last - first


IDS_AT_ONCE = 2**22  # hashes of ids held at a time: 32 MiB


def find_rows(store: StoreView, ids: Any) -> npt.NDArray[np.int64]:
    """Return the row number of each id, (m,) int64, -1 where none has it; see :meth:`GradientStore.find`."""
    wanted = list(ids)
    kind = store.layout.ids or "int64"
    if wanted and column_dtype(wanted) != kind:
        raise InputError(f"expected ids of type {kind}; received {column_dtype(wanted)}")
    numbers: dict[Any, int] = {}
    if store.layout.ids is None:
        numbers = {number: number for number in wanted if 0 <= number < store.n}
    else:
        looked_for = set(wanted)
        for start in range(0, store.n, store.layout.group_rows):
            stop = min(store.n, start + store.layout.group_rows)
            values = store.small("example_id", start, stop).tolist()
            for at, value in enumerate(values):
                if value in looked_for:
                    if value in numbers:
                        raise InputError(
                            f"expected ids that do not repeat; received {value!r} for rows {numbers[value]} and "
                            f"{start + at} of {store.path}: use row numbers"
                        )
                    numbers[value] = start + at
    return np.array([numbers.get(value, -1) for value in wanted], np.int64)


def repeated_ids(store: StoreView) -> Iterator[str]:
    """Yield a message for each id of several rows: compared by hash, some of the hashes at a time, then exactly."""
    if store.layout.ids is None or store.n < 2:
        return
    passes = -(-store.n // IDS_AT_ONCE)
    for number in range(passes):
        hashes, rows = _hash_ids(store, number, passes)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        for at in same[:1000].tolist():
            pair = rows[order[at : at + 2]]
            first, second = store.ids(pair).tolist()
            if first == second:
                yield f"id {first!r} is that of rows {pair[0]} and {pair[1]}"


def _hash_ids(store: StoreView, number: int, passes: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return 64-bit hashes of the ids whose hash falls into one of the passes, and their rows."""
    hashes, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, store.n, store.layout.group_rows):
        try:
            values = store.small("example_id", start, min(store.n, start + store.layout.group_rows)).tolist()
        except Exception:  # damaged, which the check of its chunks reports
            continue
        hashed = np.array([hash(value) for value in values], np.int64)
        mine = np.flatnonzero(hashed % passes == number)
        hashes.append(hashed[mine])
        rows.append(start + mine)
    return np.concatenate(hashes), np.concatenate(rows)

"""Row blocks out of a store: float32, in a reused buffer, with the next chunk already on its way.

A thread fetches ahead: it maps two local chunks and touches their pages, asking the kernel for the one after them; of
others, which it reads and decodes, one, so at most two are held in memory. Blocks lie on a grid that starts at row 0
and does not depend on chunks or workers, so the same rows are always multiplied together and results do not depend on
how the work was divided. Some rows only, or some columns only, are read as such where chunks are mapped.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store.encoding import FloatRows, RawRows
from ooc_influence.store.layout import column_dtype
from ooc_influence.store.paths import is_local
from ooc_influence.store.view import StoreView

_PAGE = 4096
RowNumbers = npt.NDArray[np.int64]
Columns = Sequence[tuple[int, int]]  # ranges of columns


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``stop`` of a store.

    Attributes
    ----------
    start, stop : int
        Row numbers; of some rows only, their places among these.
    gradients : (stop - start, k) float32
        The rows, scale applied. A view into a buffer that the next block overwrites.
    dropped : (stop - start,) bool or None
        Which rows are dropped; None where none is.
    loss : (stop - start,) float32 or None
        Their losses, where they were asked for.
    """

    start: int
    stop: int
    gradients: FloatRows
    dropped: npt.NDArray[np.bool_] | None
    loss: FloatRows | None = None


@dataclass(frozen=True)
class RawBlock:
    """Rows ``start`` to ``stop`` of a store as they are stored.

    Attributes
    ----------
    start, stop : int
        Row numbers; of some rows only, their places among these.
    parts : list of (rows (m, columns), scale (m,))
        Their stored form, chunk by chunk: memory maps where chunks can be mapped.
    dropped : (stop - start,) bool or None
        Which rows are dropped; None where none is.
    loss : (stop - start,) float32 or None
        Their losses, where they were asked for.
    """

    start: int
    stop: int
    parts: list[tuple[RawRows, FloatRows]]
    dropped: npt.NDArray[np.bool_] | None
    loss: FloatRows | None = None


@dataclass(frozen=True)
class Piece:
    """Rows of one chunk, as :class:`Block` counts them: stored form, scales, dropped marks if any, losses if wanted."""

    start: int
    stop: int
    raw: RawRows
    scale: FloatRows
    dropped: npt.NDArray[np.bool_] | None
    loss: FloatRows | None = None


class ChunkStream:
    """The chunks of rows ``start`` to ``stop``, one after the other, the next ones fetched by a thread.

    Use it as a context; iterating yields :class:`Piece`.

    Parameters
    ----------
    store : StoreView
        The store.
    start, stop : int
        Row numbers, or places among ``numbers``.
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
        whole = columns is None or store.layout.encoding.quantised  # whose columns share scales, and bytes
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
        """Return the row numbers, or places among the numbers, that each chunk has."""
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
        coming = deque(self._thread.submit(self._fetch, *part) for part in parts[:depth])
        for part in [*parts[depth:], *[None] * min(depth, len(parts))]:
            piece = coming.popleft().result()
            if part is not None:
                coming.append(self._thread.submit(self._fetch, *part))
            yield piece

    def _fetch(self, low: int, high: int) -> Piece:
        store, size = self._store, self._store.layout.chunk_rows
        first = low if self._numbers is None else int(self._numbers[low])
        chunk, places = first // size, slice(first % size, first % size + high - low)
        if self._ahead and high < self._stop:
            ask_for_chunk(store, chunk + 1)
        rows = store.committed_chunk(chunk)
        self._read_group(first // store.layout.group_rows)
        start = first // store.layout.group_rows * store.layout.group_rows
        if self._numbers is None:
            raw, inside, base = rows[places], slice(first - start, first - start + high - low), 0
            if self._mapped and raw.size:  # here, so that the caller does not wait for the disk
                self._touch(raw)
        else:
            wanted = self._numbers[low:high]
            raw, inside, base = rows[wanted - chunk * size], wanted - start, self._start  # type: ignore[assignment]
        dropped = None if self._dropped is None else self._dropped[inside]
        loss = None if self._loss is None else self._loss[inside]
        return Piece(base + low, base + high, raw, self._scale[inside], dropped, loss)

    def _touch(self, raw: RawRows) -> None:
        """Look at every page of the columns wanted."""
        for first, last in self._columns:
            raw[:, first:last].view(np.uint8)[:, ::_PAGE].max()

    def _read_group(self, group: int) -> None:
        """Hold the scales, dropped marks and losses of a group, which are in one file each."""
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
        Row numbers, or places among ``numbers``.
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
    buffer: npt.NDArray[Any] = np.empty((min(block_rows, max(0, stop - start)), width), np.float32)
    tombstones, losses = np.zeros(len(buffer), np.bool_), np.empty(len(buffer), np.float32)
    with ThreadPoolExecutor(max(1, threads - 1), "ooc_influence-decoder") as pool:
        for part in _block_parts(store, start, stop, block_rows, numbers, loss, columns):
            rows = slice(part.start - part.first, part.stop - part.first)
            _decode_together(store, part, buffer[rows], columns, pool, threads)
            tombstones[rows] = False if part.dropped is None else part.dropped
            if part.loss is not None:
                losses[rows] = part.loss
            if part.stop == part.last:
                dropped = tombstones[: part.last - part.first]
                yield Block(
                    part.first, part.last, buffer[: len(dropped)], dropped if dropped.any() else None,
                    losses[: len(dropped)] if loss else None,
                )  # fmt: skip


def read_raw_blocks(
    store: StoreView,
    start: int,
    stop: int,
    block_rows: int,
    *,
    numbers: RowNumbers | None = None,
    loss: bool = False,
) -> Iterator[RawBlock]:
    """Yield the same blocks as :func:`read_blocks`, as stored: to be decoded elsewhere."""
    parts: list[_Part] = []
    for part in _block_parts(store, start, stop, block_rows, numbers, loss, None):
        parts.append(part)
        if part.stop == part.last:
            dropped = np.concatenate(
                [np.zeros(p.stop - p.start, bool) if p.dropped is None else p.dropped for p in parts]
            )
            losses = [p.loss for p in parts if p.loss is not None]
            yield RawBlock(
                part.first, part.last, [(p.raw, p.scale) for p in parts], dropped if dropped.any() else None,
                np.concatenate(losses) if loss else None,
            )  # fmt: skip
            parts = []


class _Part(NamedTuple):
    """Rows ``start`` to ``stop`` of the block ``first`` to ``last``: those that lie in one chunk."""

    first: int
    last: int
    start: int
    stop: int
    raw: RawRows
    scale: FloatRows
    dropped: npt.NDArray[np.bool_] | None
    loss: FloatRows | None


def _block_parts(
    store: StoreView,
    start: int,
    stop: int,
    block_rows: int,
    numbers: RowNumbers | None,
    loss: bool,
    columns: Columns | None,
) -> Iterator[_Part]:
    first = start
    with ChunkStream(store, start, stop, numbers=numbers, loss=loss, columns=columns) as stream:
        for piece in stream:
            at = piece.start
            while at < piece.stop:
                last = min(stop, first + block_rows)
                end = min(piece.stop, last)
                inside = slice(at - piece.start, end - piece.start)
                dropped = None if piece.dropped is None else piece.dropped[inside]
                losses = None if piece.loss is None else piece.loss[inside]
                yield _Part(first, last, at, end, piece.raw[inside], piece.scale[inside], dropped, losses)
                at = end
                if end == last:
                    first = last


def _decode_together(
    store: StoreView, part: _Part, out: FloatRows, columns: Columns | None, pool: ThreadPoolExecutor, threads: int
) -> None:
    """Decode rows in several threads: NumPy holds no lock while it converts."""
    share = max(1, -(-len(out) // threads))
    cuts = [slice(low, min(len(out), low + share)) for low in range(0, len(out), share)]
    tasks = [pool.submit(_decode, store, part.raw[cut], part.scale[cut], out[cut], columns) for cut in cuts[1:]]
    for cut in cuts[:1]:
        _decode(store, part.raw[cut], part.scale[cut], out[cut], columns)
    for task in tasks:
        task.result()


def _decode(store: StoreView, raw: RawRows, scale: FloatRows, out: FloatRows, columns: Columns | None) -> None:
    form, by_column = store.layout.encoding, store.column_scale
    if columns is None:
        form.decode_into(raw, scale, out, by_column)
        return
    if form.quantised:  # columns share scales, and bytes
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
    found: dict[Any, int] = {}
    if store.layout.ids is None:
        found = {number: number for number in wanted if 0 <= number < store.n}
    else:
        looked_for = set(wanted)
        for start in range(0, store.n, store.layout.group_rows):
            stop = min(store.n, start + store.layout.group_rows)
            values = store.small("example_id", start, stop).tolist()
            for at, value in enumerate(values):
                if value in looked_for:
                    if value in found:
                        raise InputError(
                            f"expected ids that do not repeat; received {value!r} for rows {found[value]} and "
                            f"{start + at} of {store.path}: use row numbers"
                        )
                    found[value] = start + at
    return np.array([found.get(value, -1) for value in wanted], np.int64)


def repeated_ids(store: StoreView) -> Iterator[str]:
    """Yield what to say of each id that several rows have: by hash, part of the hashes at a time, then by the ids."""
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

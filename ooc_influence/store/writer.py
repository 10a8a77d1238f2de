"""Writing a range of rows: the caller fills chunks, a thread makes them durable and commits them.

A bounded number of chunk buffers circulates between the two, so a caller that is faster than the disk waits and memory
stays flat. An error of the thread is raised in the caller's next call, :meth:`RangeWriter.close` at the latest; what
was not committed is then lost, and written by the next run.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import (
    InputError,
    NonFiniteError,
    OocInfluenceError,
    StoreDamagedError,
    StoreWriteError,
    refused,
)
from ooc_influence.store import commits
from ooc_influence.store.commits import AT_ONCE, Committer, Slot
from ooc_influence.store.encoding import FloatRows, RawRows
from ooc_influence.store.layout import Layout, column_dtype, numpy_dtype
from ooc_influence.store.paths import StorePath, is_local

BUFFERS = 3  # chunks in memory: one being filled, one being written, one to hand over meanwhile
_TEXT_BYTES = 128  # of a string in memory, about

Span = tuple[int, int | None]
Dropped = npt.NDArray[np.bool_] | None  # which of some rows are dropped


def writing_bytes(layout: Layout, path: StorePath | None = None) -> int:
    """Return the bytes that a writer holds: chunks being written, and the small values of a group.

    Of a store on disk, where ``path`` is None.
    """
    value = sum(_TEXT_BYTES if dtype == "str" else np.dtype(dtype).itemsize for dtype in layout.row_arrays.values())
    copies = 0 if layout.codec is None and (path is None or is_local(path)) else AT_ONCE
    return (BUFFERS + copies) * layout.chunk_bytes + 2 * layout.group_rows * value


def missing_spans(records: commits.Records, layout: Layout, start: int, stop: int | None) -> list[Span]:
    """Return the row ranges of ``start`` to ``stop`` that are not committed; the last is open-ended without a stop."""
    rows = commits.rows_in(records)
    size = layout.chunk_rows
    last = -(-stop // size) if stop is not None else (int(np.flatnonzero(rows)[-1]) + 1 if rows.any() else 0)
    spans: list[Span] = []
    for chunk in range(start // size, last):
        have = int(rows[chunk]) if chunk < len(rows) else 0
        begin, end = chunk * size + have, (chunk + 1) * size if stop is None else min(stop, (chunk + 1) * size)
        if begin < end:
            joins = bool(spans) and spans[-1][1] == begin
            spans[-1:] = [(spans[-1][0], end)] if joins else [*spans[-1:], (begin, end)]
    if stop is None:
        joins = bool(spans) and spans[-1][1] == last * size
        spans[-1:] = [(spans[-1][0], None)] if joins else [*spans[-1:], (last * size, None)]
    return spans


class RangeWriter:
    """Writes the missing rows of one range, in order.

    Parameters
    ----------
    committer : Committer
        What makes chunks durable.
    start : int
        First row of the range, a multiple of ``layout.group_rows``.
    stop : int or None
        Row behind the range; None for a store that grows.
    column_scale : (k,) float32 or None
        The store's.

    Attributes
    ----------
    next_row : int
        Number of the next row to be appended: the first that is missing.
    waited : float
        Seconds that appending has waited for the disk.
    has_tombstones : bool
        Whether any row was appended as a dropped one.
    """

    def __init__(
        self, committer: Committer, start: int, stop: int | None, column_scale: FloatRows | None = None
    ) -> None:
        self._committer, self._layout, self._stop = committer, committer.layout, stop
        self._scale = column_scale
        self._spans = deque(missing_spans(committer.records, self._layout, start, stop))
        self.next_row = self._spans[0][0] if self._spans else stop or 0
        self._process = os.getpid()
        self._slot: Slot | None = None
        self._idle: list[Slot] = []
        self._made = 0
        self._waiting: list[Slot] = []
        self._fresh: dict[int, int] = {}
        self.waited, self.has_tombstones = 0.0, False
        self._error: BaseException | None = None
        self._error_raised = False
        self._change = threading.Condition()
        self._thread = ThreadPoolExecutor(1, "ooc_influence-writer")
        self._task: Future[None] | None = None

    @property
    def rows_left(self) -> int | None:
        """Rows that can be appended before the next row jumps or the range ends; None without an end."""
        if not self._spans:
            return 0
        stop = self._spans[0][1]
        return None if stop is None else stop - self.next_row

    def move_to(self, start: int, stop: int) -> None:
        """Continue with another range that the claim includes, of which no row is committed, once this one is full."""
        if self.rows_left:
            raise InputError(f"expected a range that is full; received one with {self.rows_left} rows left")
        self._spans.append((start, stop))
        self.next_row, self._stop = start, stop

    def open_arrays(self) -> None:
        """Commit what was appended, and open the arrays again, which another process has resized."""
        self.flush()
        self._committer.open_arrays()

    def take_fresh(self) -> dict[int, int]:
        """Return the commit records written since the last call, by chunk."""
        with self._change:
            fresh, self._fresh = self._fresh, {}
        return fresh

    def append(self, rows: FloatRows, small: Mapping[str, Any], dropped: Dropped = None) -> None:
        """Add float32 rows (b, k) and, by array name, their values (b,); full chunks are handed to the thread.

        Rows that are ``dropped`` (b,) are never visible as live ones.

        Raises
        ------
        InputError
            For more rows than :attr:`rows_left`.
        StoreWriteError
            If the disk refuses, or refused before.
        """
        self._check_rows_left(len(rows))
        for slot, inside, part in self._slots(len(rows), dropped):
            scale = slot.small["row_scale"][inside]
            self._layout.encoding.encode_into(rows[part], slot.gradients[inside], scale, self._scale)
            for name, values in small.items():
                slot.small[name][inside] = values[part]

    def append_raw(
        self, raw: RawRows, small: Mapping[str, Any], source: Path | None = None, dropped: Dropped = None
    ) -> None:
        """Add rows in their stored form; ``source`` is a file that holds exactly these, a whole chunk."""
        self._check_rows_left(len(raw))
        for slot, inside, part in self._slots(len(raw), dropped):
            slot.gradients[inside] = raw[part]
            for name, values in slot.small.items():
                values[inside] = small[name][part]
            whole = inside == slice(0, self._layout.chunk_rows)
            slot.source = source if whole else None

    def _check_rows_left(self, rows: int) -> None:
        if self.rows_left is not None and rows > self.rows_left:
            raise InputError(f"expected at most {self.rows_left} more rows in this range; received {rows}")
        self._check_usable()

    def _slots(self, rows: int, dropped: Dropped) -> Iterator[tuple[Slot, slice, slice]]:
        """Yield where to put the next ``rows`` rows: a slot, where in it, which of the rows; hands over full slots."""
        done = 0
        while done < rows:
            slot = self._current_slot()
            at = self.next_row - slot.first
            take = min(rows - done, self._layout.chunk_rows - at)
            yield slot, slice(at, at + take), slice(done, done + take)
            slot.rows = at + take
            if dropped is not None:
                self.has_tombstones |= bool(dropped.any())
                slot.dropped += (self.next_row + np.flatnonzero(dropped[done : done + take])).tolist()
            done += take
            self._advance(take)

    def _advance(self, rows: int) -> None:
        """Advance by some rows, to the next chunk or span if this one is full."""
        self.next_row += rows
        full = self.next_row % self._layout.chunk_rows == 0
        if self.rows_left == 0:
            self._spans.popleft()
            full = True
            if self._spans:
                self.next_row = self._spans[0][0]
        if full:
            self._hand_over()

    def _current_slot(self) -> Slot:
        """Return the slot of the chunk being filled, its committed rows loaded."""
        if self._slot is not None:
            return self._slot
        with self._change:
            began = time.perf_counter()
            while not self._idle and self._made == BUFFERS and self._error is None:
                self._change.wait()
            self.waited += time.perf_counter() - began
            self._check_usable()
            if self._idle:
                slot = self._idle.pop()
            else:
                slot, self._made = Slot.empty(self._layout), self._made + 1
        first = self.next_row // self._layout.chunk_rows * self._layout.chunk_rows
        slot.first, slot.rows, slot.source, slot.dropped = first, 0, None, []
        if self.next_row > first:
            self._wait()  # its rows may still be being written
            if not self._committer.load(slot, first, self.next_row - first):
                raise StoreDamagedError(
                    f"expected rows {first}-{self.next_row} of {self._committer.files.root} to match their commit "
                    "record; received other bytes: 'ooc-influence verify --repair' discards them, then run again"
                )
        self._slot = slot
        return slot

    def _hand_over(self) -> None:
        if self._slot is None:
            return
        with self._change:
            self._waiting.append(self._slot)
        self._slot = None
        self._task = self._thread.submit(self._drain)

    def _drain(self) -> None:
        """Commit the waiting slots; runs in the thread."""
        with self._change:
            slots, self._waiting = self._waiting, []
        if not slots or self._error is not None:
            return
        try:
            fresh = self._committer.commit(slots, grows=self._stop is None)
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()
            return
        with self._change:
            self._fresh |= fresh
            self._idle += slots
            self._change.notify_all()

    def _wait(self) -> None:
        if self._task is not None:
            self._task.result()
            self._task = None
        self._check_usable()

    def flush(self) -> None:
        """Commit what was appended: from now on the rows survive a crash."""
        self._check_usable()
        self._hand_over()  # a part-filled chunk is loaded again with its next row
        self._wait()

    def close(self) -> None:
        """Commit what was appended and cut an appended store's arrays to the rows committed.

        Raises
        ------
        StoreWriteError
            If a write failed and no earlier call has said so.
        """
        if os.getpid() != self._process:
            return
        try:
            if self._error is not None and self._error_raised:
                return
            self.flush()
            rows = commits.rows_in(self._committer.records)
            end = 0
            if rows.any():
                last = int(np.flatnonzero(rows)[-1])
                end = last * self._layout.chunk_rows + int(rows[last])
            if self._stop is None:
                try:
                    self._committer.resize(end)
                except OSError as error:
                    self._error = error
                    self._check_usable()
        finally:
            self._thread.shutdown(wait=True)

    def _check_usable(self) -> None:
        where = self._committer.files.root
        if os.getpid() != self._process:
            raise StoreWriteError(
                f"expected the process that opened {where} for writing; received a forked child: open the store again "
                "in the process that writes"
            )
        error = self._error
        if error is None:
            return
        if self._error_raised:
            raise StoreWriteError(
                f"expected a writer of {where} that works; received one whose last write failed: close the store and "
                "open it again; what was committed stays"
            )
        self._error_raised = True
        if isinstance(error, OSError) and not isinstance(error, OocInfluenceError):
            committed = int(commits.rows_in(self._committer.records).sum())
            then = f" and run again; the {committed} rows committed stay readable"
            raise StoreWriteError(refused(f"to write to {where}", error, then)) from error
        raise error


def parse_tombstones(tombstones: npt.ArrayLike, rows: int) -> npt.NDArray[np.bool_]:
    """Return the (rows,) mask of dropped rows."""
    mask = np.asarray(tombstones)
    if mask.dtype != bool or mask.shape != (rows,):
        raise InputError(f"expected dropped of shape ({rows},) and dtype bool; received {mask.shape}, {mask.dtype}")
    return mask


def parse_rows(layout: Layout, gradients: npt.ArrayLike) -> FloatRows:
    """Return rows as float32 (b, k).

    Raises
    ------
    InputError
        For a wrong shape.
    """
    rows = np.ascontiguousarray(gradients, np.float32)
    if rows.ndim != 2 or rows.shape[1] != layout.k:
        raise InputError(f"expected gradients of shape (b, {layout.k}); received {rows.shape}")
    return rows


def parse_small(
    layout: Layout,
    first_row: int,
    norms: npt.NDArray[Any],
    loss: npt.ArrayLike,
    grad_norm: npt.ArrayLike | None,
    metadata: Mapping[str, Any],
) -> dict[str, npt.NDArray[Any]]:
    """Return the small values of rows, (b,), by array path.

    Parameters
    ----------
    layout : Layout
        Of the store they are for.
    first_row : int
        Number the first row will have; errors name rows by number.
    norms : (b,)
        The rows' own norms, which are not finite where a row is not.
    loss, grad_norm
        As for :meth:`GradientStore.append`.
    metadata : mapping of str to (b,)
        Ids and columns by array path.

    Raises
    ------
    InputError
        For a wrong shape or type, or missing or unknown ids or columns.
    NonFiniteError
        For NaN or Inf in a gradient or loss.
    """
    if set(metadata) != set(layout.metadata):
        raise InputError(
            f"expected per-row values for {sorted(layout.metadata) or 'nothing'}; received {sorted(metadata)}: "
            "ids and columns are fixed when a store is created"
        )
    losses = np.asarray(loss, np.float32)
    small: dict[str, npt.NDArray[Any]] = {"loss": losses}
    small["grad_norm"] = np.asarray(norms if grad_norm is None else grad_norm, np.float32)
    if len(norms):
        small |= {name: _parse_column(name, layout.metadata[name], values) for name, values in metadata.items()}
    for name, values in small.items():
        if values.shape != (len(norms),):
            raise InputError(f"expected {name} of shape ({len(norms)},); received {values.shape}")
    ids = small.get("example_id")
    refuse_nonfinite(first_row, norms, losses, ids)
    if ids is not None and len(set(ids.tolist())) < len(ids):
        names = ids.tolist()
        again = next(name for name in names if names.count(name) > 1)
        raise InputError(f"expected ids that do not repeat; received {again!r} for several rows")
    return small


def _parse_column(name: str, dtype: str, values: Any) -> npt.NDArray[Any]:
    received = column_dtype(values)
    if received != dtype and not (dtype == "float64" and received == "int64"):
        raise InputError(f"expected {name} of dtype {dtype}; received {received}")
    if dtype == "str":
        try:
            "".join(map(str, values)).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"expected {name} of text that UTF-8 can hold; received {error.object[error.start]!r}"
            ) from error
    return np.asarray(values, numpy_dtype(dtype))


SUM_COLUMNS = 512  # fewer than a BLAS divides among threads, and few enough to know the error of their sum well
_SAFE = 1e-30, 1e30  # squared norms that float32 sums are good for


def row_products(left: FloatRows, right: FloatRows) -> npt.NDArray[np.float64]:
    """Return the products of rows (b, k), each with one of the other rows, (b,).

    The sum, in float64, of the BLAS's dot products of :data:`SUM_COLUMNS` columns each: the same bits whatever rows are
    beside them, and in any number of threads.
    """
    b, k = left.shape
    pieces = k // SUM_COLUMNS
    whole = pieces * SUM_COLUMNS
    first, second = (part[:, :whole].reshape(b, pieces, SUM_COLUMNS) for part in (left, right))
    total = np.vecdot(first, second).sum(axis=1, dtype=np.float64)
    if whole < k:
        total += np.vecdot(left[:, whole:], right[:, whole:])
    return np.asarray(total)


def row_norms(rows: FloatRows) -> npt.NDArray[np.float64]:
    """Return the norms of rows (b, k), (b,): summed in float64 where float32 squares could under- or overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = row_products(rows, rows)
    again = ~((squares > _SAFE[0]) & (squares < _SAFE[1]))
    if again.any():
        some = rows[again]
        squares[again] = np.einsum("ij,ij->i", some, some, dtype=np.float64)
    return np.asarray(np.sqrt(squares))


def refuse_nonfinite(first_row: int, norms: npt.NDArray[Any], losses: npt.NDArray[Any], ids: Any) -> None:
    """Check the norms and losses (b,) of rows from ``first_row`` on.

    Raises
    ------
    NonFiniteError
        Naming the rows, and their ids if given, with NaN or Inf.
    """
    bad = ~(np.isfinite(norms) & np.isfinite(losses))
    if not bad.any():
        return
    offsets = np.flatnonzero(bad)
    named = ", ".join(f"{first_row + at}" + ("" if ids is None else f" ({ids[at]})") for at in offsets[:10])
    more = f" and {len(offsets) - 10} more" if len(offsets) > 10 else ""
    raise NonFiniteError(
        f"expected finite losses and gradients; received NaN or Inf in rows {named}{more}: correct or leave out these "
        "samples, then run again",
        [first_row + int(at) for at in offsets],
    )

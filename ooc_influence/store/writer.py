"""Writing a range of rows: fill a chunk in a reused buffer, write it, make it durable, commit it.

The order is the promise: data and small arrays (each file synced before its rename), then the folders, then the commit
record, then its folder. A crash between any two leaves the last record true.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ooc_influence.errors import InputError, StoreDamagedError, StoreWriteError
from ooc_influence.store import commits
from ooc_influence.store.arrays import writable_array
from ooc_influence.store.encoding import FloatRows, array_dtype, encode
from ooc_influence.store.layout import Layout, numpy_dtype
from ooc_influence.store.local import LocalArrayStore

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RangeWriter:
    """Appends encoded rows to the chunks of one range.

    Parameters
    ----------
    group : zarr.Group
        The store, opened for writing on ``files``.
    files : LocalArrayStore
        What the group writes to.
    layout : Layout
        The store's geometry.
    start : int
        First row of the range, a multiple of ``layout.group_rows``.
    stop : int or None
        Row behind the range; None for a store that grows.

    Attributes
    ----------
    next_row : int
        Number of the next row to be appended.
    committed_row : int
        Row behind the last committed one.
    fresh : dict of int to int
        Commit records written since somebody emptied it, by chunk.
    """

    def __init__(self, group: Any, files: LocalArrayStore, layout: Layout, start: int, stop: int | None) -> None:
        self._files, self._layout, self._stop = files, layout, stop
        self._per_row = ("gradients", "dropped", *layout.row_arrays)
        self._arrays = {name: writable_array(group, name) for name in (*self._per_row, "commits")}
        records = np.asarray(self._arrays["commits"][...])[start // layout.chunk_rows :]
        if stop is not None:
            records = records[: -(-(stop - start) // layout.chunk_rows)]
        self.committed_row = self.next_row = start + commits.leading_rows(records, layout.chunk_rows)
        self.fresh: dict[int, int] = {}
        self._process = os.getpid()
        self._failed = False
        self._gradients = np.empty((layout.chunk_rows, layout.k), array_dtype(layout.dtype))
        self._small = {
            name: np.empty(layout.chunk_rows, numpy_dtype(dtype)) for name, dtype in layout.row_arrays.items()
        }
        if self.next_row % layout.chunk_rows:
            self._reload_last_chunk()

    def _reload_last_chunk(self) -> None:
        """Read the committed rows of a part-filled chunk back into the buffers, checked against their record."""
        chunk = self.next_row // self._layout.chunk_rows
        first = chunk * self._layout.chunk_rows
        rows = self.next_row - first
        self._gradients[:rows] = self._arrays["gradients"][first : self.next_row]
        for name, buffer in self._small.items():
            buffer[:rows] = self._arrays[name][first : self.next_row]
        record = int(self._arrays["commits"][chunk])
        if commits.crc_of(record) != self._checksum(rows):
            raise StoreDamagedError(
                f"expected rows {first}-{self.next_row} of {self._files.root} to match their commit record; "
                "received other bytes: restore the store from a backup"
            )

    def _checksum(self, rows: int) -> int:
        return commits.checksum([self._gradients[:rows], *(buffer[:rows] for buffer in self._small.values())])

    @property
    def room(self) -> int | None:
        """Rows that still fit the range; None for a store that grows."""
        return None if self._stop is None else self._stop - self.next_row

    def append(self, rows: FloatRows, small: Mapping[str, Any]) -> None:
        """Add float32 rows (b, k) and, by array name, their values (b,); whole chunks are committed on the way.

        Raises
        ------
        InputError
            For more rows than the range has room for.
        StoreWriteError
            If the disk refuses, or refused before.
        """
        if self.room is not None and len(rows) > self.room:
            raise InputError(f"expected at most {self.room} more rows in this range; received {len(rows)}")
        self._check_usable()
        raw, scale = encode(rows, self._layout.dtype)
        values = {"row_scale": scale, **small}
        done = 0
        while done < len(rows):
            at = self.next_row % self._layout.chunk_rows
            take = min(len(rows) - done, self._layout.chunk_rows - at)
            self._gradients[at : at + take] = raw[done : done + take]
            for name, buffer in self._small.items():
                buffer[at : at + take] = values[name][done : done + take]
            self.next_row += take
            done += take
            if at + take == self._layout.chunk_rows:
                self.flush()

    def flush(self) -> None:
        """Commit what is buffered; after this the rows survive a crash."""
        self._check_usable()
        if self.next_row == self.committed_row:
            return
        chunk = (self.next_row - 1) // self._layout.chunk_rows
        first = chunk * self._layout.chunk_rows
        rows = self.next_row - first
        with self._disk_errors():
            self._make_room()
            self._arrays["gradients"][first : self.next_row] = self._gradients[:rows]
            for name, buffer in self._small.items():
                self._arrays[name][first : self.next_row] = buffer[:rows]
            self._files.sync_folders()
            record = commits.pack(rows, self._checksum(rows))
            self._arrays["commits"][chunk] = record
            self._files.sync_folders()
        self.fresh[chunk] = record
        self.committed_row = self.next_row

    def _make_room(self) -> None:
        """Grow the arrays of an appended store to the end of the group being filled.

        A crash may have left some of them short: Zarr clips what is written behind an array's end.
        """
        if self._stop is not None:
            return
        enough = all(self._arrays[name].shape[0] >= self.next_row for name in self._per_row)
        if enough and self._arrays["commits"].shape[0] * self._layout.chunk_rows >= self.next_row:
            return
        groups = -(-self.next_row // self._layout.group_rows)
        self._resize(groups * self._layout.group_rows)

    def _resize(self, rows: int) -> None:
        for name in self._per_row:
            self._arrays[name].resize((rows, *self._arrays[name].shape[1:]))
        self._arrays["commits"].resize((-(-rows // self._layout.chunk_rows),))

    def close(self) -> None:
        """Commit what is buffered and cut an appended store's arrays to the rows committed.

        After a failed write there is nothing more to do: that error was raised where it happened.
        """
        if self._failed or os.getpid() != self._process:
            return
        self.flush()
        uneven = any(self._arrays[name].shape[0] != self.committed_row for name in self._per_row)
        if self._stop is None and uneven:
            with self._disk_errors():
                self._resize(self.committed_row)
                self._files.sync_folders()

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise StoreWriteError(
                f"expected the process that opened {self._files.root} for writing; received a forked child: open the "
                "store again in the process that writes"
            )
        if self._failed:
            raise StoreWriteError(
                f"expected a writer of {self._files.root} that works; received one whose last write failed: close the "
                f"store and open it again; rows up to {self.committed_row} are committed"
            )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed = True
            reason = "no space left" if error.errno in _DISK_FULL else str(error)
            raise StoreWriteError(
                f"expected to write to {self._files.root}; received: {reason}: make room or mend the disk and run "
                f"again; rows up to {self.committed_row} are committed and stay readable"
            ) from error
        except BaseException:
            self._failed = True
            raise

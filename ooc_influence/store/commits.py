"""Commit records, one uint64 per chunk, the only thing that makes rows visible; and tombstones of dropped rows.

``record = rows_in_chunk << 32 | crc32c(those rows in every per-row array)``, zero for "not written". The record is
written after the data it covers is durable, so a reader that trusts records never sees a row that a crash could undo.
Rewriting a part-filled last chunk keeps its first rows, so the old record stays true until it is replaced.
``dropped`` is not covered, because it may change later: its chunks have their own checksums. A dropped row keeps its
number; scores, top lists and curvatures skip it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
from zarr.core.buffer import cpu
from zarr.core.sync import sync

from ooc_influence.errors import StoreDamagedError, writing
from ooc_influence.store.arrays import open_group, writable_array
from ooc_influence.store.claim import Claim, make_claim, wait_for
from ooc_influence.store.layout import TOMBSTONES, Layout, numpy_dtype
from ooc_influence.store.local import LocalArrayStore
from ooc_influence.store.paths import ArrayStore, StorePath, array_store

Records = npt.NDArray[np.uint64]


def checksum(parts: Iterable[npt.NDArray[Any]]) -> int:
    """Return the crc32c over arrays in order; strings count as UTF-8, each behind its length (4 bytes)."""
    value = 0
    for part in parts:
        if part.dtype.kind in "OTU":
            encoded = [str(text).encode() for text in part]
            data = b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
            value = crc32c.crc32c(data, value)
        elif part.size:
            value = crc32c.crc32c(np.ascontiguousarray(part).view(np.uint8).reshape(-1).data, value)
    return value


def pack(rows: int, crc: int) -> int:
    """Return the record of a chunk."""
    return rows << 32 | crc


def rows_in(records: Records) -> npt.NDArray[np.int64]:
    """Return the committed rows of each chunk, (chunks,)."""
    return (records >> np.uint64(32)).astype(np.int64)


def crc_of(record: int) -> int:
    """Return the checksum in a record."""
    return int(record) & 0xFFFFFFFF


def leading_rows(records: Records, chunk_rows: int) -> int:
    """Return how many rows are committed without a gap from row 0: what a reader sees."""
    rows = rows_in(records)
    short = np.flatnonzero(rows < chunk_rows)
    first = int(short[0]) if short.size else len(rows)
    return first * chunk_rows + (int(rows[first]) if first < len(rows) else 0)


AT_ONCE = 4  # files written at the same time
SmallValues = dict[str, npt.NDArray[Any]]


@dataclass
class Slot:
    """Buffers for one chunk.

    Attributes
    ----------
    gradients : (chunk_rows, columns)
        Rows as stored.
    small : dict of str to (chunk_rows,)
        The other per-row values, by array path.
    first : int
        The chunk's first row.
    rows : int
        Rows filled, from the first.
    source : Path or None
        A file that holds exactly this chunk, to be linked instead of written.
    dropped : list of int
        Numbers of rows to be marked as dropped before the chunk is committed.
    """

    gradients: npt.NDArray[Any]
    small: SmallValues
    first: int = 0
    rows: int = 0
    source: Path | None = None
    dropped: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, layout: Layout) -> Slot:
        """Return buffers for chunks of a layout."""
        return cls(
            np.empty((layout.chunk_rows, layout.encoding.columns), layout.encoding.dtype),
            {name: np.empty(layout.chunk_rows, numpy_dtype(dtype)) for name, dtype in layout.row_arrays.items()},
        )

    def checksum(self) -> int:
        """Return the crc32c over the filled rows."""
        return checksum([self.gradients[: self.rows], *(values[: self.rows] for values in self.small.values())])


@dataclass
class Committer:
    """Writes chunks of one range; used by one thread at a time.

    Attributes
    ----------
    files : LocalArrayStore or RemoteArrayStore
        What to write to.
    layout : Layout
        The store's geometry.
    records : (chunks,) uint64
        The commit records of the whole store as they were when the range was claimed.
    claim : Claim
        The right to write; looked at before every record.
    """

    files: ArrayStore
    layout: Layout
    records: Records
    claim: Claim
    _group: int = -1
    _small: SmallValues = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "ooc_influence-files")  # a sync waits for the disk, not the CPU
        self.open_arrays()

    def open_arrays(self) -> None:
        """Open the store's arrays, again after another process has resized them."""
        group = open_group(self.files, "r+")
        self._per_row = ("gradients", "dropped", *self.layout.row_arrays)
        self._arrays = {name: writable_array(group, name) for name in (*self._per_row, "commits")}

    def load(self, slot: Slot, first: int, rows: int) -> bool:
        """Read the committed rows of a part-filled chunk into ``slot``; return whether they match their record."""
        slot.first, slot.rows, slot.source, slot.dropped = first, rows, None, []
        slot.gradients[:rows] = self._arrays["gradients"][first : first + rows]
        for name, values in slot.small.items():
            values[:rows] = self._arrays[name][first : first + rows]
        return slot.checksum() == crc_of(int(self.records[first // self.layout.chunk_rows]))

    def commit(self, slots: Sequence[Slot], *, grows: bool) -> dict[int, int]:
        """Write chunks, make them durable, commit them; return their records by chunk number."""
        fresh: dict[int, int] = {}
        self.claim.check()  # also before any data: chunks are rewritten in place
        for group, members in groupby(slots, key=lambda slot: slot.first // self.layout.group_rows):
            chunks = list(members)
            if grows:
                self.make_room(max(slot.first + slot.rows for slot in chunks), (group + 1) * self.layout.group_rows)
            self._open_group(group)
            writes = [partial(self._write_gradients, slot) for slot in chunks]
            writes += [partial(self._write_small, name, group, chunks) for name in self._small]
            pending = [self._threads.submit(write) for write in writes]
            written = {slot.first // self.layout.chunk_rows: pack(slot.rows, slot.checksum()) for slot in chunks}
            wait(pending)  # for all of them, before an error of one is raised: nothing may be written after that
            for write in pending:
                write.result()
            self.files.sync_folders()
            dropped = [row for slot in chunks for row in slot.dropped]
            if dropped:
                mark_dropped(self.claim.store, self.layout, np.array(dropped))
            self.claim.check()
            self._write_records(group, written)
            self.files.sync_folders()
            fresh |= written
        return fresh

    def _write_gradients(self, slot: Slot) -> None:
        chunk = slot.first // self.layout.chunk_rows
        if slot.source is not None and isinstance(self.files, LocalArrayStore):
            self.files.link(slot.source, f"gradients/c.{chunk}.0")
            return
        slot.gradients[slot.rows :] = self.layout.encoding.fill
        if self.layout.codec is None:  # the chunk is these bytes: Zarr would copy them first
            data = slot.gradients.reshape(-1).view(np.uint8)
            sync(self.files.set(f"gradients/c.{chunk}.0", cpu.Buffer.from_array_like(data)))
            return
        stop = min(slot.first + self.layout.chunk_rows, self._arrays["gradients"].shape[0])
        self._arrays["gradients"][slot.first : stop] = slot.gradients[: stop - slot.first]

    def _open_group(self, group: int) -> None:
        """Load the small values of a group: those of its committed rows are read from the disk."""
        if group == self._group:
            return
        size, first = self.layout.group_rows, group * self.layout.group_rows
        chunk = group * self.layout.group_chunks
        self._small = {}
        for name, dtype in self.layout.row_arrays.items():
            kind: Any = numpy_dtype(dtype)
            blank: Any = "" if kind is object else (np.nan if dtype.startswith("float") else 0)
            self._small[name] = np.full(size, blank, kind)
            if np.any(self.records[chunk : chunk + self.layout.group_chunks]):
                stored = self._arrays[name][first : first + size]
                self._small[name][: len(stored)] = stored
        self._group = group

    def _write_small(self, name: str, group: int, slots: Sequence[Slot]) -> None:
        first, values = group * self.layout.group_rows, self._small[name]
        for slot in slots:
            values[slot.first - first : slot.first - first + slot.rows] = slot.small[name][: slot.rows]
        stop = min(first + self.layout.group_rows, self._arrays[name].shape[0])
        self._arrays[name][first:stop] = values[: stop - first]

    def _write_records(self, group: int, written: dict[int, int]) -> None:
        stop = min((group + 1) * self.layout.group_chunks, self._arrays["commits"].shape[0])
        if len(self.records) < stop:
            self.records = np.concatenate([self.records, np.zeros(stop - len(self.records), np.uint64)])
        self.records[list(written)] = list(written.values())
        self.rewrite_records(group)

    def rewrite_records(self, group: int) -> None:
        """Write a group's file of records as :attr:`records` has them now; the folder is synced by the caller."""
        first = group * self.layout.group_chunks
        stop = min(first + self.layout.group_chunks, self._arrays["commits"].shape[0])
        self._arrays["commits"][first:stop] = self.records[first:stop]

    def make_room(self, rows: int, shape: int) -> None:
        """Grow the arrays to ``shape`` rows if they are shorter than ``rows``.

        A crash may have left some of them short: Zarr clips what is written beyond an array's end.
        """
        if min(self._stored_rows(), self._arrays["commits"].shape[0] * self.layout.chunk_rows) >= rows:
            return
        for group in range(-(-len(self.records) // self.layout.group_chunks), -(-rows // self.layout.group_rows)):
            self._write_blank_records(group)  # first: a group that the arrays' shape tells of has its file
        self.files.sync_folders()
        self.resize(shape)

    def _stored_rows(self) -> int:
        return min(int(self._arrays[name].shape[0]) for name in self._per_row)

    def _write_blank_records(self, group: int) -> None:
        """Write a group's file of zero records, which Zarr cannot do before the array is long enough."""
        blank = np.zeros(self.layout.group_chunks, "<u8")
        crc = checksum([blank]).to_bytes(4, "little")
        sync(self.files.set(f"commits/c.{group}", cpu.Buffer.from_bytes(blank.tobytes() + crc)))

    def resize(self, rows: int) -> None:
        """Resize all arrays to ``rows`` rows, durably."""
        for name in self._per_row:
            if self._arrays[name].shape[0] != rows:
                self._arrays[name].resize((rows, *self._arrays[name].shape[1:]))
        chunks = -(-rows // self.layout.chunk_rows)
        if self._arrays["commits"].shape[0] != chunks:
            self._arrays["commits"].resize((chunks,))
        self.files.sync_folders()


def tombstone_groups(group: Any) -> list[int]:
    """Return the groups that have dropped rows, as listed in an open store."""
    try:
        return [int(number) for number in group[TOMBSTONES].attrs["dropped"]]
    except (KeyError, ValueError, TypeError) as error:
        raise StoreDamagedError(
            f"expected the list of groups with dropped rows in {group.store_path}; received none: {error}: restore "
            f"{TOMBSTONES}/zarr.json from a backup"
        ) from error


def list_tombstone_groups(files: ArrayStore, groups: Iterable[int]) -> None:
    """List the groups that have dropped rows, once their tombstones are written: readers expect the files of these."""
    open_group(files, "r+")[TOMBSTONES].attrs["dropped"] = sorted(groups)
    files.sync_folders()


def mark_dropped(path: StorePath, layout: Layout, numbers: npt.NDArray[Any], *, dropped: bool = True) -> None:
    """Mark rows as dropped, or as live again, durably; waits while another process marks some.

    Raises
    ------
    StoreBusyError
        If another process holds the right to mark rows for minutes.
    StoreWriteError
        If the disk refuses.
    """
    claim = wait_for(lambda: make_claim(path, name="drop"))
    try:
        with writing(f"to mark rows of {path} as dropped", ", then run again"):
            files = array_store(path)
            group = open_group(files, "r+")
            writable_array(group, "dropped").set_orthogonal_selection((numbers,), dropped)
            files.sync_folders()
            list_tombstone_groups(files, set(tombstone_groups(group)) | set((numbers // layout.group_rows).tolist()))
    finally:
        claim.release()

"""Opening a store: its attributes, and its committed rows in their stored form.

Nothing from a store is executed: its attributes and metadata are JSON, checked value by value; no array holds Python
objects other than text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import (
    InputError,
    MismatchError,
    StoreDamagedError,
    StoreFormatError,
    StoreNotFoundError,
    StoreReadError,
    refused,
)
from ooc_influence.memory import ProblemSize
from ooc_influence.store import commits, paths
from ooc_influence.store.arrays import open_group, read_array, read_whole
from ooc_influence.store.encoding import FloatRows
from ooc_influence.store.layout import Layout, read_attributes
from ooc_influence.store.local import MAPPED, METADATA, LocalArrayStore
from ooc_influence.store.mask import Mask
from ooc_influence.store.paths import PathLike, StorePath, array_store, is_local, parse_path
from ooc_influence.store.reduction import Reduction, columns_digest, is_shared, load_reduction
from ooc_influence.store.remote import ChunkCache

if TYPE_CHECKING:
    import torch

Pin = tuple[str, int, int]


def open_store(path: StorePath) -> tuple[dict[str, Any], Layout, Any, dict[str, Any]]:
    """Return a store's attributes, its layout, its Zarr group to read from, and its arrays by name.

    Raises
    ------
    StoreNotFoundError
        If there is none.
    StoreReadError
        If this user may not read it.
    StoreFormatError
        If it is not a store, of a format this version does not read, or its metadata contradict each other.
    """
    _check_there(path)
    attrs = read_attributes(path)
    layout = Layout.from_dict(attrs["layout"], path)
    may_lack = ["dropped"] if attrs["format"] > 1 else ["dropped", "commits"]
    files = array_store(path, read_only=True, chunk_bytes=layout.chunk_sizes, may_lack=may_lack)
    group = open_group(files, "r")
    arrays = {}
    for name in layout.arrays:
        try:
            arrays[name] = group[name]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreFormatError(
                f"expected array {name!r} in {path}; received metadata that cannot be read ({error}): restore its "
                "zarr.json from a backup"
            ) from error
        layout.check_array(name, arrays[name], path)
    paths.remember_opened(path)
    return attrs, layout, group, arrays


def _check_there(path: StorePath) -> None:
    try:
        if paths.is_file(path / METADATA):
            return
        received = "a folder without one" if paths.exists(path) else "no such path"
    except Exception as error:  # whatever an object store's client makes of a bucket, key or permission
        if is_local(path) and isinstance(error, OSError):
            raise StoreReadError(refused(f"to read the store at {path}", error)) from error
        raise StoreNotFoundError(
            f"expected a gradient store at {path}; received {type(error).__name__}: {error}: check the URL, the "
            "credentials and the endpoint"
        ) from error
    raise StoreNotFoundError(
        f"expected a gradient store at {path}; received {received}: make one with extract_gradients or "
        "'ooc-influence extract'"
    )


def check_lengths(array: Callable[[str], Any], layout: Layout, records: commits.Records) -> None:
    """Check that every per-row array is as long as the rows committed in it: Zarr clips reads beyond an end."""
    written = np.flatnonzero(records)
    if not written.size:
        return
    rows = int(written[-1]) * layout.chunk_rows + int(commits.rows_in(records)[written[-1]])
    for name in ("gradients", "dropped", *layout.row_arrays):
        length = array(name).shape[0]
        if length < rows:
            raise StoreDamagedError(
                f"expected {rows} rows in array {array(name).store_path}; received {length}: its zarr.json was edited "
                "or damaged; restore it from a backup"
            )


def read_records(array: Any, layout: Layout, version: int) -> commits.Records:
    """Return the commit records of a store, from their array."""
    records: commits.Records = np.asarray(read_whole(array))
    if version == 1 and layout.planned_rows is None:  # there a missing file reads as zeros
        rows = commits.rows_in(records)
        seen, committed = commits.leading_rows(records, layout.chunk_rows), int(rows.sum())
        if committed > seen:
            raise StoreDamagedError(
                f"expected the commit records {array.store_path} without a gap; received {seen} rows before one "
                f"and {committed} in all: a file of 'commits' is missing or damaged; restore it from a backup"
            )
    return records


def read_damaged_records(array: Any, layout: Layout) -> tuple[commits.Records, list[tuple[tuple[int, int], str]]]:
    """Return the commit records of a store, zero where a file of them cannot be read, and which rows those are."""
    records = np.zeros(array.shape, np.uint64)
    damaged = []
    for start in range(0, len(records), layout.group_chunks):
        stop = min(len(records), start + layout.group_chunks)
        try:
            records[start:stop] = array[start:stop]
        except (ValueError, StoreDamagedError) as error:
            rows = (start * layout.chunk_rows, stop * layout.chunk_rows)
            damaged.append((rows, f"commit records: {error}"))
    return records, damaged


class StoreView:
    """The committed rows of a store, to read; :class:`GradientStore` adds writing.

    Attributes
    ----------
    path : Path or UPath
        The store's folder.
    layout : Layout
        Its fixed geometry.
    cache : ChunkCache or None
        Where chunks from an object store are kept for the next time.
    damaged_records : list
        ``((start, stop), reason)`` of the rows whose commit records cannot be read; only where that was allowed.
    """

    def __init__(
        self, path: PathLike, pin: Pin | None = None, cache: ChunkCache | None = None, *, damaged: bool = False
    ) -> None:
        self.path = parse_path(path)
        self.cache = None if is_local(self.path) else cache
        self._attrs, self.layout, self._group, self._arrays = open_store(self.path)
        self._mask: Mask | None = None
        self._reduction: Reduction | None = None
        self._column_scale: FloatRows | None = None
        self.damaged_records: list[tuple[tuple[int, int], str]] = []
        self._damaged = damaged
        self._look()
        if pin is not None:
            self._unpin(*pin)

    def reload(self) -> None:
        """See rows committed, and rows dropped, since the store was opened."""
        self._group = open_group(self._group.store, "r")
        self._arrays.clear()  # their shapes may have changed
        self._look()

    def _look(self) -> None:
        if self._damaged:  # to be inspected and repaired: read what can be read
            records, self.damaged_records = read_damaged_records(self._array("commits"), self.layout)
        else:
            records = read_records(self._array("commits"), self.layout, self._attrs["format"])
            try:
                check_lengths(self._array, self.layout, records)
            except StoreDamagedError:  # a writer may have grown the arrays after they were opened
                self._arrays.clear()
                check_lengths(self._array, self.layout, records)
        self._see_records(records)
        self._dropped_groups = set() if self._damaged else self.dropped_groups()

    def _see_records(self, records: commits.Records) -> None:
        self._records = records
        self._rows = commits.leading_rows(records, self.layout.chunk_rows)

    def dropped_groups(self) -> set[int]:
        """Return the groups that have dropped rows."""
        names = set(paths.names(self.path / "dropped"))
        if self._attrs["format"] == 1:
            return {int(name.removeprefix("c.")) for name in names if name.startswith("c.")}
        listed = set(commits.tombstone_groups(self._group))
        for group in listed:
            if f"c.{group}" not in names:
                raise StoreDamagedError(
                    f"expected tombstones in {self.path / 'dropped' / f'c.{group}'}; received no file: "
                    "restore it from a backup"
                )
        return listed

    def _see(self, records: Mapping[int, int], *, has_tombstones: bool) -> None:
        """See rows committed by this process, without reading the records of all others again."""
        if records:
            chunks = max(len(self._records), max(records) + 1)
            longer = np.concatenate([self._records, np.zeros(chunks - len(self._records), np.uint64)])
            longer[list(records)] = list(records.values())
            self._see_records(longer)
            self._arrays.clear()  # their shapes may have changed
            self._dropped_groups = self.dropped_groups() if has_tombstones else self._dropped_groups

    def _pin(self) -> Pin:
        """Return what identifies the rows seen: the store, their number, the last chunk's record (which may change)."""
        chunks = -(-self._rows // self.layout.chunk_rows)
        return self.identity, self._rows, int(self._records[chunks - 1]) if chunks else 0

    def _unpin(self, identity: str, rows: int, last_record: int) -> None:
        if identity != self.identity or rows > self._rows:
            raise MismatchError(
                f"expected the store that was at {self.path} with {rows} rows; received another one: open it again"
            )
        self._records = self._records[: -(-rows // self.layout.chunk_rows)].copy()
        if len(self._records):
            self._records[-1] = last_record
        self._rows = rows

    @property
    def n(self) -> int:
        """Committed rows up to the first gap, as of when the store was opened (or last flushed here)."""
        return self._rows

    @property
    def k(self) -> int:
        """Stored numbers a row."""
        return self.layout.k

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``."""
        return (self._rows, self.layout.k)

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """What :meth:`rows` returns; the representation on disk is ``layout.dtype``."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """The number of dimensions, 2."""
        return 2

    def __len__(self) -> int:
        return self._rows

    @property
    def committed(self) -> int:
        """Committed rows in all; more than ``n`` only while there are gaps, left by other writers or a repair."""
        return int(self.committed_rows.sum())

    @property
    def committed_rows(self) -> npt.NDArray[np.int64]:
        """Committed rows of each chunk, (chunks,)."""
        return commits.rows_in(self._records)

    @property
    def stored_rows(self) -> int:
        """Length of the arrays, whether rows are committed or not."""
        return int(self._array("dropped").shape[0])

    @property
    def records(self) -> commits.Records:
        """The commit record of each chunk, (chunks,) uint64 (:mod:`.commits`)."""
        return self._records

    @property
    def has_dropped(self) -> bool:
        """Whether rows are dropped."""
        return bool(self._dropped_groups)

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What was recorded at creation: format, compressor, fingerprints, loss kind, layout, digests."""
        return self._attrs

    @property
    def model_fingerprint(self) -> str | None:
        """What was recorded of the model to recognise it; None where nothing was."""
        model = self._attrs.get("model")
        fingerprint = model.get("fingerprint") if isinstance(model, Mapping) else model
        return None if fingerprint is None else str(fingerprint)

    @property
    def mask_digest(self) -> str:
        """Digest of the mask."""
        return str(self._attrs["mask_digest"])

    @property
    def columns_digest(self) -> str:
        """Digest of what the columns mean, mask and reduction; equal digests mean comparable rows."""
        return columns_digest(self.mask_digest, self._attrs.get("reduction"))

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """The digests that must be equal for rows of two stores to be comparable: of the columns, and of the model."""
        return {"mask and basis": self.columns_digest, "model": self.model_fingerprint}

    @property
    def reduction(self) -> Reduction | None:
        """What masked rows were multiplied by (read on first use); None where rows hold the kept entries themselves."""
        if self.is_reduced and self._reduction is None:
            self._reduction = load_reduction(self._group, self._attrs["reduction"], self.path)
        return self._reduction

    @property
    def basis_path(self) -> str | None:
        """Where a store made like this one finds the basis, if that is too large to be copied; else None."""
        facts = self._attrs.get("reduction") or {}
        return str(facts.get("path") or self.path) if is_shared(facts) else None

    @property
    def is_reduced(self) -> bool:
        """Whether masked rows were multiplied by a reduction; nothing of it is read."""
        return self._attrs.get("reduction") is not None

    @property
    def identity(self) -> str:
        """An id of this store, drawn when it was created."""
        return str(self._attrs["created"]["id"])

    @property
    def mask(self) -> Mask:
        """Which entries the rows hold (read on first use)."""
        if self._mask is None:
            self._mask = Mask.load(self._group, self.mask_digest)
        return self._mask

    @property
    def column_scale(self) -> FloatRows | None:
        """What each column was divided by before it was encoded, (k,) float32; None where there is none."""
        if self._column_scale is None and self.layout.column_scale:
            self._column_scale = read_array(self._group, "column_scale")
        return self._column_scale

    def rows_digest(self) -> str:
        """SHA-256 over the commit records and tombstones of the ``n`` rows: changes when any of them does."""
        digest = hashlib.sha256(str(self._rows).encode())
        digest.update(self._records[: -(-self._rows // self.layout.chunk_rows)].tobytes())
        if self.has_dropped:
            size = self.layout.group_rows
            for start in range(0, self._rows, size):
                digest.update(np.packbits(self.small("dropped", start, min(self._rows, start + size))).tobytes())
        return digest.hexdigest()

    def holds(self, records: commits.Records, chunks: Iterable[int]) -> bool:
        """Return whether the rows that earlier commit records of some chunks cover are unchanged.

        Of a chunk that was part-filled then and has more rows now, the first rows are read and their checksum compared.
        """
        for chunk in chunks:
            then, now = int(records[chunk]), int(self._records[chunk]) if chunk < len(self._records) else 0
            if then == now:
                continue
            start = chunk * self.layout.chunk_rows
            if now >> 32 <= then >> 32 or self._checksum(start, start + (then >> 32)) != commits.crc_of(then):
                return False
        return True

    def _checksum(self, start: int, stop: int) -> int:
        rows = self.read("gradients", slice(start, stop), slice(0, self.layout.encoding.columns))
        return commits.checksum([rows, *(self.read(name, slice(start, stop)) for name in self.layout.row_arrays)])

    def __repr__(self) -> str:
        return (
            f"<GradientStore {str(self.path)!r} n={self.n} k={self.k} of p={self._attrs['p']} "
            f"{self.layout.dtype}, chunks of {self.layout.chunk_rows} rows>"
        )

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._rows:
            raise InputError(f"expected 0 <= start <= stop <= {self._rows} (n); received {start}, {stop}")

    def raw_rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return the stored form of rows ``start`` to ``stop``: a memory map if they are in one chunk."""
        self._check_range(start, stop)
        return self.read("gradients", slice(start, stop), slice(0, self.layout.encoding.columns))

    def tensor(self, start: int, stop: int) -> torch.Tensor:
        """Return the stored form of rows ``start`` to ``stop`` as a tensor, without a copy inside one chunk.

        bfloat16 rows are ``torch.bfloat16``; multiply by ``row_scale`` (and ``column_scale``) for the values of the
        others. Writing to it changes neither the store nor other readers' rows.
        """
        import torch

        tensor = torch.from_numpy(self.raw_rows(start, stop))
        return tensor.view(torch.bfloat16) if self.layout.dtype == "bfloat16" else tensor

    def committed_chunk(self, chunk: int) -> npt.NDArray[Any]:
        """Return the stored form of a chunk's committed rows, from the cache where there is one."""
        start, record = chunk * self.layout.chunk_rows, int(self._records[chunk])
        files = self._group.store
        if isinstance(files, LocalArrayStore) and self.layout.codec is None:
            mapped = files.map_chunk(f"gradients/c.{chunk}.0")
            assert mapped is not None
            shape = (self.layout.chunk_rows, self.layout.encoding.columns)
            return mapped.view(self.layout.encoding.dtype).reshape(shape)[: record >> 32]
        part = slice(start, start + (record >> 32)), slice(0, self.layout.encoding.columns)
        if self.cache is None:
            return self.read("gradients", *part)
        name = f"{self.identity}-{chunk}-{record:016x}"
        return self.cache.get(name, record >> 32, self.layout.encoding, lambda: self.read("gradients", *part))

    @property
    def reading_bytes(self) -> int:
        """Anonymous memory that reading all rows needs: for chunks that cannot be mapped, one of them read ahead."""
        return 0 if is_local(self.path) and self.layout.codec is None else 4 * self.layout.chunk_bytes

    def problem_size(self, workers: int = 1) -> ProblemSize:
        """Return the shapes that memory models of work on all rows are functions of."""
        row_bytes = self.layout.encoding.row_bytes
        return ProblemSize(self.k, self.n, workers, self.reading_bytes, row_bytes, path=str(self.path))

    def small(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return a per-row array by its path (``"loss"``, ``"columns/label"``, ...), (stop - start,)."""
        stop = self._rows if stop is None else stop
        self._check_range(start, stop)
        self._check_name(name)
        return self.read(name, slice(start, stop))

    def _check_name(self, name: str) -> None:
        if name != "dropped" and name not in self.layout.row_arrays:
            names = ", ".join((*self.layout.row_arrays, "dropped"))
            raise InputError(f"expected one of {names}; received {name!r}")

    def read(self, name: str, *selection: slice) -> npt.NDArray[Any]:
        """Return part of an array of the store, mapped if it is in one chunk that can be; nothing is checked."""
        return np.asarray(self._array(name).get_basic_selection(selection, prototype=MAPPED))

    @property
    def loss(self) -> npt.NDArray[np.float32]:
        """Per-sample losses, (n,) float32."""
        return self.small("loss")

    @property
    def grad_norm(self) -> npt.NDArray[np.float32]:
        """Norms of the rows before they were encoded, (n,) float32."""
        return self.small("grad_norm")

    @property
    def dropped(self) -> npt.NDArray[np.bool_]:
        """Which rows are dropped, (n,) bool."""
        return self.small("dropped")

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return ``columns/<name>``, (n,)."""
        return self.small(f"columns/{name}")

    def values(self, name: str, rows: Any) -> npt.NDArray[Any]:
        """Return a per-row array (as for :meth:`small`) at row numbers, an integer array of any shape."""
        numbers = np.asarray(rows, np.int64)
        self._check_name(name)
        if numbers.size == 0:
            return np.empty(numbers.shape, object)
        self._check_range(int(numbers.min()), int(numbers.max()) + 1)
        distinct, indices = np.unique(numbers, return_inverse=True)
        stored: npt.NDArray[Any] = np.asarray(self._array(name).get_orthogonal_selection((distinct,)))
        return stored[indices].reshape(numbers.shape)

    def ids(self, rows: Any = None) -> npt.NDArray[Any]:
        """Return the ids of ``rows`` (any integer array; default all). Without stored ids, row numbers are the ids."""
        if rows is None:
            return self.small("example_id") if self.layout.ids else np.arange(self._rows)
        numbers: npt.NDArray[Any] = np.asarray(rows)
        return self.values("example_id", numbers) if self.layout.ids and numbers.size else numbers

"""Reading a store: what it is, and its committed rows."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence._version import __version__
from ooc_influence.errors import InputError, MismatchError, StoreDamagedError, StoreFormatError, StoreNotFoundError
from ooc_influence.store import commits
from ooc_influence.store.arrays import open_group, read_array
from ooc_influence.store.layout import ATTRIBUTES, FORMAT_VERSION, Layout
from ooc_influence.store.local import MAPPED, LocalArrayStore
from ooc_influence.store.mask import Mask
from ooc_influence.store.reader import read_into

if TYPE_CHECKING:
    import dask.array as da

PathLike = str | os.PathLike[str]


def parse_path(path: PathLike) -> Path:
    """Return a local path.

    Raises
    ------
    InputError
        For a URL.
    """
    text = os.fspath(path)
    if "://" in text:
        raise InputError(f"expected a local path; received {text!r}: object storage is not supported yet")
    return Path(text).absolute()  # tasks may run after the working directory changed


def _read_attributes(group: Any, path: Path) -> dict[str, Any]:
    attrs = dict(group.attrs).get(ATTRIBUTES)
    if not isinstance(attrs, dict) or not {"format", "layout", "mask_digest", "created"} <= set(attrs):
        raise StoreFormatError(
            f"expected a gradient store at {path}; received another Zarr group: give the folder that "
            "extract_gradients wrote"
        )
    if attrs["format"] != FORMAT_VERSION:
        raise StoreFormatError(
            f"expected store format {FORMAT_VERSION} at {path}; received {attrs['format']}: "
            f"upgrade ooc_influence (this is {__version__})"
        )
    return attrs


class StoreView:
    """The committed rows of a store, to read; :class:`GradientStore` adds writing.

    Attributes
    ----------
    path : Path
        The store's folder.
    layout : Layout
        Its fixed geometry.
    """

    def __init__(self, path: PathLike, pin: tuple[str, int, int] | None = None) -> None:
        self.path = parse_path(path)
        if not (self.path / "zarr.json").is_file():
            raise StoreNotFoundError(
                f"expected a gradient store at {self.path}; received "
                f"{'a folder without one' if self.path.exists() else 'no such path'}: "
                "make one with extract_gradients or 'ooc-influence extract'"
            )
        try:
            group = open_group(LocalArrayStore(self.path, read_only=True), "r")
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreFormatError(
                f"expected a gradient store at {self.path}; received a zarr.json that cannot be read ({error}): "
                "restore it from a backup"
            ) from error
        self._attrs = _read_attributes(group, self.path)
        self.layout = Layout.from_dict(self._attrs["layout"], self.path)
        files = LocalArrayStore(self.path, read_only=True, chunk_bytes=self.layout.chunk_sizes)
        self._group = open_group(files, "r")
        self._arrays: dict[str, Any] = {}
        self._mask: Mask | None = None
        self.reload()
        if pin is not None:
            self._unpin(*pin)

    def reload(self) -> None:
        """See rows committed since the store was opened."""
        for _ in range(5):  # a writer may commit while the files of 'commits' are read one after the other
            self._group = open_group(self._group.store, "r")
            self._records: commits.Records = read_array(self._group, "commits")
            self._rows = commits.leading_rows(self._records, self.layout.chunk_rows)
            gap = self.layout.planned_rows is None and self.committed > self._rows
            if not gap:
                break
        self._arrays.clear()
        self.has_dropped = any((self.path / "dropped").glob("c.*"))
        if gap:
            raise StoreDamagedError(
                f"expected the commit records of {self.path} without a gap; received {self._rows} rows before one and "
                f"{self.committed} in all: a file of 'commits' is missing or damaged; restore it from a backup"
            )

    def _see(self, records: Mapping[int, int]) -> None:
        """See rows committed by this process, without reading the records of all others again."""
        if not records:
            return
        chunks = max(len(self._records), max(records) + 1)
        self._records = np.concatenate([self._records, np.zeros(chunks - len(self._records), np.uint64)])
        self._records[list(records)] = list(records.values())
        self._rows = commits.leading_rows(self._records, self.layout.chunk_rows)
        self._arrays.clear()  # their shapes have changed

    def _pin(self) -> tuple[str, int, int]:
        """Return what fixes the rows seen: the store, their number, and the last chunk's record, which may change."""
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
        """Committed rows, without a gap from row 0, when the store was opened (or last flushed here)."""
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
        """2."""
        return 2

    def __len__(self) -> int:
        return self._rows

    @property
    def committed(self) -> int:
        """Committed rows in all; more than ``n`` only while several writers fill a store."""
        return int(commits.rows_in(self._records).sum())

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What was recorded at creation: format, compressor, fingerprints, loss kind, layout, digests."""
        return self._attrs

    @property
    def mask_digest(self) -> str:
        """Digest of the mask; equal digests mean comparable rows."""
        return str(self._attrs["mask_digest"])

    @property
    def identity(self) -> str:
        """An id of this very store, drawn at creation."""
        return str(self._attrs["created"]["id"])

    @property
    def mask(self) -> Mask:
        """Which entries the rows hold (read on first use)."""
        if self._mask is None:
            self._mask = Mask.load(self._group, self.mask_digest)
        return self._mask

    def rows_digest(self) -> str:
        """SHA-256 over the commit records and dropped marks of the ``n`` rows: changes when any of them does."""
        digest = hashlib.sha256(str(self._rows).encode())
        digest.update(self._records[: -(-self._rows // self.layout.chunk_rows)].tobytes())
        if self.has_dropped:
            digest.update(np.packbits(read_array(self._group, "dropped")[: self._rows]).tobytes())
        return digest.hexdigest()

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
        """Return the stored form of rows ``start`` to ``stop``: a memory map where they lie in one chunk."""
        self._check_range(start, stop)
        return self._read("gradients", slice(start, stop), slice(0, self.k))

    def small(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return a per-row array by its path (``"loss"``, ``"columns/label"``, ...), (stop - start,)."""
        stop = self._rows if stop is None else stop
        self._check_range(start, stop)
        if name != "dropped" and name not in self.layout.row_arrays:
            known = ", ".join((*self.layout.row_arrays, "dropped"))
            raise InputError(f"expected one of {known}; received {name!r}")
        return self._read(name, slice(start, stop))

    def _read(self, name: str, *selection: slice) -> npt.NDArray[Any]:
        return np.asarray(self._array(name).get_basic_selection(selection, prototype=MAPPED))

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return ``columns/<name>``, (n,)."""
        return self.small(f"columns/{name}")

    def ids(self, rows: Any = None) -> npt.NDArray[Any]:
        """Return the ids of ``rows`` (any integer array; default all). Without stored ids, row numbers are the ids."""
        if rows is None:
            return self.small("example_id") if self.layout.ids else np.arange(self._rows)
        numbers: npt.NDArray[Any] = np.asarray(rows)
        if not self.layout.ids or numbers.size == 0:
            return numbers
        distinct, places = np.unique(numbers, return_inverse=True)
        found: npt.NDArray[Any] = np.asarray(self._array("example_id").get_orthogonal_selection((distinct,)))
        return found[places].reshape(numbers.shape)

    def rows(self, start: int = 0, stop: int | None = None, *, raw: bool = False) -> npt.NDArray[Any]:
        """Return rows ``start`` to ``stop``.

        Parameters
        ----------
        start, stop : int
            Row numbers; ``stop`` defaults to ``n``.
        raw : bool
            Return the stored form (:mod:`.encoding`) instead, zero-copy inside one chunk.

        Returns
        -------
        (stop - start, k) float32, scale applied
        """
        stop = self._rows if stop is None else stop
        if raw:
            return self.raw_rows(start, stop)
        self._check_range(start, stop)
        out = np.empty((stop - start, self.k), np.float32)
        read_into(self, start, stop, out)
        return out

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(first, slice):
            places = range(self._rows)[first]
            low, high = (min(places), max(places) + 1) if places else (0, 0)
            block = self.rows(low, high)[:: places.step]
            return np.asarray(block[(slice(None), *rest)] if rest else block)
        row = range(self._rows)[operator.index(first)]  # IndexError ends iteration
        return np.asarray(self.rows(row, row + 1)[0][rest])

    def __dask_tokenize__(self) -> tuple[str, str]:
        return self.identity, self.rows_digest()

    def to_dask(self) -> da.Array:
        """Return the rows as a lazy (n, k) float32 Dask array, chunks as on disk; tasks carry the path only."""
        import dask.array as da

        chunks = (self.layout.chunk_rows, self.k)
        rows: da.Array = da.from_array(
            self, chunks=chunks, asarray=False, fancy=False, name=f"gradients-{self.rows_digest()}"
        )
        return rows

    def verify(self) -> list[tuple[int, int, str]]:
        """Check every committed chunk against its commit record.

        Returns
        -------
        list of (start, stop, reason)
            The damaged row ranges; empty where all is well.
        """
        damaged = []
        for chunk in np.flatnonzero(self._records).tolist():
            record = int(self._records[chunk])
            start = chunk * self.layout.chunk_rows
            stop = start + (record >> 32)
            try:
                parts = [self._read("gradients", slice(start, stop), slice(0, self.k))]
                parts += [self._read(name, slice(start, stop)) for name in self.layout.row_arrays]
                if commits.checksum(parts) != commits.crc_of(record):
                    damaged.append((start, stop, "checksum differs"))
            except Exception as error:  # whatever a codec makes of damaged bytes
                damaged.append((start, stop, str(error)))
        return damaged

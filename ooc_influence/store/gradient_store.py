"""The gradient store: create, open, append. One Zarr v3 group; :mod:`.layout` lists its arrays.

Readers see committed rows only, and go on seeing what they opened while a writer adds more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, StoreFormatError
from ooc_influence.store import creation
from ooc_influence.store.cache import ChunkCache
from ooc_influence.store.claim import Claim, check_range, clear_range, make_claim
from ooc_influence.store.commits import Committer
from ooc_influence.store.creation import read_attributes
from ooc_influence.store.encoding import Encoding, parse_representation
from ooc_influence.store.layout import FORMAT_VERSION, Layout, Storage
from ooc_influence.store.mask import Mask
from ooc_influence.store.paths import PathLike, array_store, not_free, parse_path
from ooc_influence.store.reader import find_rows, parse_rows
from ooc_influence.store.reduction import Reduction, columns_digest
from ooc_influence.store.tombstones import mark_dropped, parse_marks, parse_numbers
from ooc_influence.store.verify import Damage, verify_store
from ooc_influence.store.view import Pin, TabularView
from ooc_influence.store.writer import RangeWriter


class GradientStore(TabularView):
    """Per-sample gradients on disk or object storage, (n, k), with what belongs to each row.

    Use :meth:`open` or :meth:`create`; a context manager closes it (and commits what was appended).

    Attributes
    ----------
    path : Path or UPath
        The store's folder.
    layout : Layout
        Its fixed geometry.
    """

    def __init__(
        self,
        path: PathLike,
        mode: Literal["r", "a"] = "r",
        pin: Pin | None = None,
        cache: ChunkCache | None = None,
        *,
        damaged: bool = False,
    ) -> None:
        if mode not in ("r", "a"):
            raise InputError(f"expected mode 'r' or 'a'; received {mode!r}")
        super().__init__(path, pin, cache, damaged=damaged)
        self._writer: RangeWriter | None = None
        self._claim: Claim | None = None
        self._writable = mode == "a"

    @classmethod
    def open(
        cls,
        path: PathLike,
        mode: Literal["r", "a"] = "r",
        *,
        cache: ChunkCache | PathLike | None = None,
        damaged: bool = False,
    ) -> Self:
        """Open a store to read (``"r"``) or to read and append (``"a"``).

        Parameters
        ----------
        path : path or URL
            A local folder, or an fsspec URL (``s3://``, ``gs://``, ``memory://``...); a ``upath.UPath`` carries
            options such as credentials.
        mode : {"r", "a"}
            Read, or read and append.
        cache : ChunkCache or path, optional
            A local folder to keep chunks of a store on object storage in; bounded (:class:`ChunkCache`).
        damaged : bool
            Open it although commit records cannot be read, for :meth:`verify` to list and repair.

        Raises
        ------
        StoreNotFoundError
            If there is none.
        StoreFormatError
            If it is not a store, or of a newer format.
        StoreBusyError
            On the first append, if another process is appending.
        """
        kept = cache if isinstance(cache, ChunkCache) or cache is None else ChunkCache(str(cache))
        return cls(path, mode, cache=kept, damaged=damaged)

    @classmethod
    def create(
        cls,
        path: PathLike,
        mask: Mask,
        *,
        dtype: str = "float16",
        storage: Storage | None = None,
        planned_rows: int | None = None,
        ids: str | None = None,
        columns: Mapping[str, str] | None = None,
        reduction: Reduction | Mapping[str, Any] | None = None,
        column_scale: npt.ArrayLike | None = None,
        attributes: Mapping[str, Any] | None = None,
        exist_ok: bool = False,
    ) -> Self:
        """Create an empty store, whole or not at all, and open it for appending.

        Parameters
        ----------
        path : path
            Where; must not exist (an empty folder may).
        mask : Mask
            Which entries the rows hold.
        dtype : str
            Representation of the rows: float16 (with a scale a row), int8 or int4 (with one for every 16 columns),
            bfloat16 or float32.
        storage : Storage, optional
            Chunking and codec.
        planned_rows : int, optional
            Rows in all, where several writers divide the store.
        ids : str, optional
            Dtype of the rows' ids (``"str"``, ``"int64"``); None for no ids.
        columns : mapping of str to str, optional
            Name to dtype (bool, int64, float64, str) of per-row columns.
        reduction : Reduction or mapping, optional
            What masked rows are multiplied by before they are stored; as a mapping, the facts of one that is kept in
            another store (with its ``path``).
        column_scale : (k,), optional
            Positive numbers that rows are divided by before they are encoded and multiplied by on reading.
        attributes : mapping, optional
            What else to record (compressor, model fingerprint, loss kind); JSON values.
        exist_ok : bool
            Open the store that another process created in the meantime, if it has the same mask, instead of failing.

        Raises
        ------
        InputError
            For planned rows below one, or a column name that is no file name.
        StoreExistsError
            If something is at ``path``.
        StoreWriteError
            If the disk refuses.
        """
        target = parse_path(path)
        representation = parse_representation(dtype)
        storage = storage or Storage()
        facts = reduction.facts if isinstance(reduction, Reduction) else reduction
        k = mask.k if facts is None else int(facts["columns"])
        if facts is not None and int(facts["rows"]) != mask.k:
            raise InputError(f"expected a reduction of {mask.k} masked entries; received one of {facts['rows']}")
        chunk_rows, group_chunks = storage.sizes(k, representation, planned_rows)
        scale = creation.parse_column_scale(column_scale, k)
        layout = Layout(
            k, representation, chunk_rows, group_chunks, planned_rows, ids, dict(columns or {}), storage.codec,
            scale is not None, Encoding.of(representation, k).block,
        )  # fmt: skip
        published = creation.create_store(target, layout, mask, reduction, attributes or {}, scale)
        if not published and not (exist_ok and cls(target).columns_digest == columns_digest(mask.digest, facts)):
            raise not_free(target)
        return cls(target, "a")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, "r", self._pin(), self.cache)

    def _check_writable(self) -> None:
        if not self._writable:
            raise InputError(f"expected {self.path} opened to append; received mode 'r': use open(path, mode='a')")
        if self._attrs["format"] != FORMAT_VERSION:
            raise StoreFormatError(
                f"expected store format {FORMAT_VERSION} to write to {self.path}; received {self._attrs['format']}: "
                f"run 'ooc-influence upgrade {self.path}'"
            )

    def writer(self, start: int = 0, stop: int | None = None) -> RangeWriter:
        """Claim a range for writing and return its writer; without a range, the growing end.

        Parameters
        ----------
        start, stop : int
            Rows of a store with planned rows: whole groups (or up to the last planned row).

        Raises
        ------
        InputError
            If the store was opened to read, or the range is not one of this store's.
        StoreBusyError
            If another process holds the range, or part of it.
        """
        if self._writer is not None:
            return self._writer
        self._check_writable()
        check_range(self.path, self.layout, start, stop)
        self._claim = make_claim(self.path, start, stop)
        try:
            self.reload()  # another writer may have been here since
            clear_range(self.path, self.layout, start, stop)
            committer = Committer(array_store(self.path), self.layout, self._records.copy(), self._claim)
            self._writer = RangeWriter(committer, start, stop, self.column_scale)
        except BaseException:
            self._claim.release()
            self._claim = None
            raise
        return self._writer

    def append(
        self,
        gradients: npt.ArrayLike,
        *,
        loss: npt.ArrayLike,
        grad_norm: npt.ArrayLike | None = None,
        ids: Sequence[Any] | npt.ArrayLike | None = None,
        columns: Mapping[str, Any] | None = None,
        dropped: npt.ArrayLike | None = None,
    ) -> None:
        """Append rows; they are committed chunk by chunk, and all of them by :meth:`flush` or :meth:`close`.

        Parameters
        ----------
        gradients : (b, k) float32
            Compressed per-sample gradients, mask weights applied.
        loss : (b,)
            Per-sample losses.
        grad_norm : (b,), optional
            Norms to record; by default those of ``gradients``.
        ids : (b,), optional
            Required exactly where the store has ids.
        columns : mapping of str to (b,), optional
            A value for each of the store's columns.
        dropped : (b,) bool, optional
            Rows that are dropped from the start: no reader ever sees them as live.

        Raises
        ------
        InputError
            For a wrong shape, or missing or unknown ids or columns.
        NonFiniteError
            For NaN or Inf in a gradient or loss; it names the rows, and none of this call is appended.
        StoreBusyError
            If another process is appending.
        StoreWriteError
            If the disk refuses; what was committed before stays.
        """
        first_row = self._rows if self._writer is None else self._writer.next_row
        metadata = {} if ids is None else {"example_id": ids}
        metadata |= {f"columns/{name}": values for name, values in (columns or {}).items()}
        rows, small = parse_rows(self.layout, first_row, gradients, loss, grad_norm, metadata)
        tombstones = None if dropped is None else parse_marks(dropped, len(rows))
        writer = self.writer()
        writer.append(rows, small, tombstones)
        self._refresh(writer)

    def _refresh(self, writer: RangeWriter) -> None:
        self._see(writer.take_fresh(), marked=writer.marked)

    def drop(self, rows: npt.ArrayLike) -> None:
        """Mark rows as dropped: NaN in scores, absent from top-k and from F; their numbers stay.

        Parameters
        ----------
        rows : (m,) int, or (n,) bool
            Row numbers below ``n``, or a mark for every row.

        Raises
        ------
        InputError
            For other rows, or a store opened to read.
        StoreBusyError
            If another process keeps dropping rows for minutes; a shorter one is waited for.
        """
        self._check_writable()
        self.flush()
        numbers = parse_numbers(rows, self._rows)
        if numbers.size:
            mark_dropped(self.path, self.layout, numbers)
            self.reload()

    def find(self, ids: Sequence[Any] | npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the row number of each id, (m,); -1 for one that no row has.

        Reads the ids through, a group of rows at a time. Without stored ids, row numbers are the ids.

        Raises
        ------
        InputError
            For ids of another type, or one that several rows have.
        """
        return find_rows(self, ids)

    def verify(
        self,
        *,
        repair: bool = False,
        workers: int | None = None,
        memory: int | str | None = None,
        progress: bool | None = None,
    ) -> list[Damage]:
        """Check every committed chunk: files, lengths, checksums, numbers that are not finite, ids that repeat.

        Parameters
        ----------
        repair : bool
            Give up the damaged chunks: their rows are no longer committed, and the next extraction writes just them.
        workers : int, optional
            Row stripes checked at once; by default one a core, or the slots of the ambient Dask cluster.
        memory : int or str, optional
            Budget for the process, such as ``"4GiB"``; by default half of what is free.
        progress : bool, optional
            Show a progress line; silent by default.

        Returns
        -------
        list of Damage
            ``(start, stop, reason)`` of the damaged row ranges; empty where all is well.

        Raises
        ------
        MemoryBudgetError
            If the budget is too small.
        StoreBusyError
            If another process is writing what is to be repaired.
        """
        found = verify_store(self, repair=repair, workers=workers, memory=memory, progress=progress)
        if repair and found:
            self.reload()
        return found

    @property
    def waited(self) -> float:
        """Seconds that appending has waited for the disk."""
        return 0.0 if self._writer is None else self._writer.waited

    def record(self, **attributes: Any) -> None:
        """Write further attributes, JSON values, in place of what has their names."""
        self._check_writable()
        self._attrs = read_attributes(self.path) | attributes
        creation.write_attributes(self.path, self._attrs)

    def grow(self, rows: int) -> None:
        """Give a store with planned rows room for more, ``rows`` in all; readers opened before see what they opened.

        Raises
        ------
        InputError
            If the store has no planned rows, or more of them already.
        StoreBusyError
            If a range of it is being written.
        """
        self._check_writable()
        creation.grow_store(self.path, self.layout, self._records.copy(), rows)
        super().__init__(self.path)

    def plan_rows(self, rows: int | None) -> None:
        """Let several writers divide a store of ``rows`` rows in all; None: a finished one grows by appending again.

        Raises
        ------
        InputError
            For fewer rows than are committed, or None while planned ones are missing.
        StoreBusyError
            If a range of it is being written.
        """
        self._check_writable()
        creation.plan_rows(self.path, self.layout, self._records.copy(), rows)
        super().__init__(self.path)

    def flush(self) -> None:
        """Commit what was appended; it survives a crash from here on."""
        if self._writer is not None:
            self._writer.flush()
            self._refresh(self._writer)

    def close(self) -> None:
        """Commit what was appended and let another process write; reading goes on working."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
                self.reload()
        finally:
            if self._claim is not None:
                self._claim.release()
                self._claim = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

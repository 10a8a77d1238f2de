"""The gradient store: create, open, append. One Zarr v3 group; :mod:`.layout` lists its arrays.

Readers see committed rows only, and keep seeing the rows they opened while a writer adds more.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import operator
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence._version import __version__
from ooc_influence.errors import (
    InputError,
    StoreBusyError,
    StoreFormatError,
    writing,
)
from ooc_influence.options import CreateOptions, takes
from ooc_influence.progress import html_table, optional_library
from ooc_influence.store import commits, paths
from ooc_influence.store.arrays import create_array, open_group
from ooc_influence.store.claim import (
    Claim,
    check_range,
    claimed_rows,
    clear_range,
    make_claim,
    may_write,
    read_claims,
    wait_for,
)
from ooc_influence.store.commits import Committer, mark_dropped
from ooc_influence.store.encoding import Encoding, FloatRows, RawRows, parse_representation
from ooc_influence.store.layout import (
    ATTRIBUTES,
    FORMAT_VERSION,
    Layout,
    Storage,
    attributes_digest,
    read_attributes,
    write_attributes,
)
from ooc_influence.store.local import METADATA
from ooc_influence.store.mask import Mask
from ooc_influence.store.paths import NewFolder, PathLike, StorePath, array_store, is_local, not_free, parse_path
from ooc_influence.store.reader import ChunkStream, find_rows, read_into
from ooc_influence.store.reduction import Reduction, columns_digest
from ooc_influence.store.remote import ChunkCache
from ooc_influence.store.verify import Damage, verify_store
from ooc_influence.store.view import Pin, StoreView
from ooc_influence.store.writer import RangeWriter, parse_rows, parse_small, parse_tombstones, row_norms

if TYPE_CHECKING:
    import dask.array as da


def parse_numbers(rows: npt.ArrayLike, n: int) -> npt.NDArray[Any]:
    """Return distinct row numbers below ``n``, from numbers or an (n,) mask.

    Raises
    ------
    InputError
        For anything else.
    """
    array = np.asarray(rows)
    if array.dtype == bool and array.shape == (n,):
        array = np.flatnonzero(array)
    numbers = np.unique(array)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers[0] < 0 or numbers[-1] >= n):
        raise InputError(
            f"expected row numbers in [0, {n}), or a mask of {n}; received {array.dtype} of shape "
            f"{array.shape} from {numbers[0]} to {numbers[-1]}"
        )
    return numbers


def create_store(
    path: StorePath,
    layout: Layout,
    mask: Mask,
    reduction: Reduction | Mapping[str, Any] | None,
    attributes: Mapping[str, Any],
    column_scale: FloatRows | None,
) -> bool:
    """Write a store without rows; return False where something else is at ``path``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(f"to make a store at {path}", ", or choose another path"))
        if paths.is_file(path / METADATA):
            return False
        if not is_local(path):  # built in place: two that do so at once would mix
            stack.callback(Claim(path, name="create").release, remove=True)
        folder = stack.enter_context(NewFolder(path))
        group = open_group(folder.arrays, "w")
        layout.create_arrays(group)
        if column_scale is not None:
            scale = create_array(
                group, "column_scale", (layout.k,), (layout.k,), "float32", codec="crc32c", dims=("column",)
            )
            scale[...] = column_scale
        mask.save(group)
        if isinstance(reduction, Reduction):
            reduction.save(group)
        group.create_group("curvature")
        attrs = json.loads(json.dumps(dict(attributes) | _fixed(layout, mask, reduction)))  # as they will be read back
        group.attrs[ATTRIBUTES] = attrs | {"digest": attributes_digest(attrs)}
        return folder.publish()


def _fixed(layout: Layout, mask: Mask, reduction: Reduction | Mapping[str, Any] | None) -> dict[str, Any]:
    created = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "id": uuid.uuid4().hex,
    }
    fixed = {"format": FORMAT_VERSION, "version": __version__, "created": created, "p": mask.p}
    facts = reduction.facts if isinstance(reduction, Reduction) else reduction
    return fixed | {"mask_digest": mask.digest, "reduction": facts and dict(facts), "layout": layout.to_dict()}


def parse_column_scale(column_scale: Any, k: int) -> FloatRows | None:
    """Return column scales as (k,) float32."""
    if column_scale is None:
        return None
    scale = np.asarray(column_scale, np.float32)
    if scale.shape != (k,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise InputError(f"expected {k} positive column scales; received shape {scale.shape}, or some that are not")
    return scale


class GradientStore(StoreView):
    """Per-sample gradients on disk or object storage, (n, k), with a loss, a norm and more for each row.

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
    @takes(CreateOptions)
    def create(cls, path: PathLike, mask: Mask, **options: Unpack[CreateOptions]) -> Self:
        """Create an empty store atomically, and open it for appending.

        Parameters
        ----------
        path : path
            Where; must not exist (an empty folder may).
        mask : Mask
            Which entries the rows hold.
        **options : CreateOptions
            See :mod:`ooc_influence.options`.

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
        representation = parse_representation(options["dtype"])
        storage, planned_rows = options["storage"] or Storage(), options["planned_rows"]
        reduction = options["reduction"]
        facts = reduction.facts if isinstance(reduction, Reduction) else reduction
        k = mask.k if facts is None else int(facts["columns"])
        if facts is not None and int(facts["rows"]) != mask.k:
            raise InputError(f"expected a reduction of {mask.k} masked entries; received one of {facts['rows']}")
        chunk_rows, group_chunks = storage.sizes(k, representation, planned_rows)
        scale = parse_column_scale(options["column_scale"], k)
        layout = Layout(
            k, representation, chunk_rows, group_chunks, planned_rows, options["ids"], dict(options["columns"] or {}),
            storage.codec, scale is not None, Encoding.of(representation, k).block,
        )  # fmt: skip
        published = create_store(target, layout, mask, reduction, options["attributes"] or {}, scale)
        if not published:
            same = options["exist_ok"] and cls(target).columns_digest == columns_digest(mask.digest, facts)
            if not same:
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
        rows = parse_rows(self.layout, gradients)
        small = self._parse_small(row_norms(rows), loss, grad_norm, ids, columns)
        tombstones = None if dropped is None else parse_tombstones(dropped, len(rows))
        writer = self.writer()
        writer.append(rows, small, tombstones)
        self._refresh(writer)

    def append_encoded(
        self,
        raw: RawRows,
        scale: FloatRows,
        *,
        loss: FloatRows,
        grad_norm: FloatRows,
        ids: Sequence[Any] | None = None,
        columns: Mapping[str, Any] | None = None,
        dropped: npt.ArrayLike | None = None,
    ) -> None:
        """Append rows in their stored form, as :meth:`append` does others.

        Parameters
        ----------
        raw : (b, columns)
            As :meth:`Encoding.encode_into` of the layout's encoding makes them.
        scale : (b,) float32
            Of each row.
        loss, grad_norm, ids, columns, dropped
            As for :meth:`append`.
        """
        expected = (len(raw), self.layout.encoding.columns)
        if raw.shape != expected or raw.dtype != self.layout.encoding.dtype:
            raise InputError(
                f"expected rows as {self.layout.encoding.dtype} of shape {expected}; received {raw.dtype}, {raw.shape}"
            )
        small = self._parse_small(grad_norm + scale, loss, grad_norm, ids, columns)
        tombstones = None if dropped is None else parse_tombstones(dropped, len(raw))
        writer = self.writer()
        writer.append_raw(raw, small | {"row_scale": scale}, dropped=tombstones)
        self._refresh(writer)

    def _parse_small(
        self, norms: npt.NDArray[Any], loss: npt.ArrayLike, grad_norm: npt.ArrayLike | None, ids: Any,
        columns: Mapping[str, Any] | None,
    ) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
        """Return the small values of the next rows; see :func:`parse_small`."""
        first_row = self._rows if self._writer is None else self._writer.next_row
        metadata = {} if ids is None else {"example_id": ids}
        metadata |= {f"columns/{name}": values for name, values in (columns or {}).items()}
        return parse_small(self.layout, first_row, norms, loss, grad_norm, metadata)

    def _refresh(self, writer: RangeWriter) -> None:
        self._see(writer.take_fresh(), has_tombstones=writer.has_tombstones)

    def drop(self, rows: npt.ArrayLike) -> None:
        """Mark rows as dropped: NaN in scores, absent from top-k and from F; row numbers do not change.

        Parameters
        ----------
        rows : (m,) int, or (n,) bool
            Row numbers below ``n``, or a mask of all rows.

        Raises
        ------
        InputError
            For other rows, or a store opened to read.
        StoreBusyError
            If another process keeps dropping rows for minutes; shorter ones are waited for.
        """
        self._check_writable()
        self.flush()
        numbers = parse_numbers(rows, self._rows)
        if numbers.size:
            mark_dropped(self.path, self.layout, numbers)
            self.reload()

    def find(self, ids: Sequence[Any] | npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the row number of each id, (m,); -1 for one that no row has.

        Reads all ids, one group of rows at a time. Without stored ids, row numbers are the ids.

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
            Discard the damaged chunks: their rows are no longer committed, and the next extraction writes just them.
        workers : int, optional
            Row stripes checked at once; by default one a core, or the slots of the ambient Dask cluster.
        memory : int or str, optional
            Budget for the process, such as ``"4GiB"``; by default half of what is free.
        progress : bool, optional
            Show a progress line; silent by default.

        Returns
        -------
        list of Damage
            ``(start, stop, reason)`` of the damaged row ranges; empty if nothing is damaged.

        Raises
        ------
        MemoryBudgetError
            If the budget is too small.
        StoreBusyError
            If another process is writing what is to be repaired.
        """
        damage = verify_store(self, repair=repair, workers=workers, memory=memory, progress=progress)
        if repair and damage:
            self.reload()
        return damage

    @property
    def waited(self) -> float:
        """Seconds that appending has waited for the disk."""
        return 0.0 if self._writer is None else self._writer.waited

    def record(self, **attributes: Any) -> None:
        """Write further attributes, JSON values, replacing those of the same names."""
        self._check_writable()
        self._attrs = read_attributes(self.path) | attributes
        write_attributes(self.path, self._attrs)

    def grow(self, rows: int) -> None:
        """Extend a store with planned rows to ``rows`` in all; readers that are open keep seeing what they opened.

        Raises
        ------
        InputError
            If the store has no planned rows, or more of them already.
        StoreBusyError
            If a range of it is being written.
        """
        self._check_writable()
        planned = self.layout.planned_rows
        if planned is None or rows < planned:
            received = "one that grows by itself" if planned is None else f"one planned for {planned}"
            raise InputError(f"expected a store planned for at most {rows} rows at {self.path}; received {received}")
        self.plan_rows(rows)

    def plan_rows(self, rows: int | None) -> None:
        """Plan ``rows`` rows, which several writers may divide; None lets a finished store grow by appending again.

        Raises
        ------
        InputError
            For fewer rows than are committed, or None while planned ones are missing.
        StoreBusyError
            If a range of it is being written.
        """
        self._check_writable()
        path, layout, records = self.path, self.layout, self._records.copy()
        committed, planned = commits.leading_rows(records, layout.chunk_rows), layout.planned_rows
        if (rows is None and committed < (planned or 0)) or (rows is not None and rows < committed):
            raise InputError(f"expected {committed} of {planned} rows at {path} to be planned so; received {rows}")
        if rows != planned:
            claim = make_claim(path, name="grow")
            try:
                for name, (generation, owner) in read_claims(path).items():
                    if claimed_rows(name) is not None and may_write(path, name, generation, owner):
                        raise StoreBusyError(
                            f"expected no writer of {path} while it grows; received one ({name}): {owner}: wait for it"
                        )
                layout = Layout.from_dict(layout.to_dict() | {"planned_rows": rows}, path)
                if rows is not None:
                    Committer(array_store(path), layout, records, claim).make_room(rows, rows)
                write_attributes(path, {**read_attributes(path), "layout": layout.to_dict()})
            finally:
                claim.release()
        super().__init__(path)

    def extend(self, rows: int) -> None:
        """Plan ``rows`` rows, whole groups, or more, while other processes may write ranges of those planned before.

        Raises
        ------
        InputError
            If the store has no planned rows, ``rows`` cuts a group, or a range is being written through this object.
        StoreBusyError
            If another process extends the store for minutes; shorter ones are waited for.
        """
        self._check_writable()
        if self.layout.planned_rows is None or rows % self.layout.group_rows or self._writer is not None:
            raise InputError(
                f"expected a store with planned rows at {self.path}, none of them being written here, and whole groups "
                f"of {self.layout.group_rows}; received {self.layout.planned_rows} planned rows and {rows}"
            )
        with self.changing() as claim:
            super().__init__(self.path)  # another process may have extended it
            layout = self.layout
            if (layout.planned_rows or 0) < rows:
                Committer(array_store(self.path), layout, self._records.copy(), claim).make_room(rows, rows)
                longer = Layout.from_dict(layout.to_dict() | {"planned_rows": rows}, self.path)
                write_attributes(self.path, {**read_attributes(self.path), "layout": longer.to_dict()})
                super().__init__(self.path)

    @contextlib.contextmanager
    def changing(self) -> Iterator[Claim]:
        """Be the only process that changes the store's attributes and plan; waits for another that does."""
        claim = wait_for(lambda: make_claim(self.path, name="grow"))
        try:
            yield claim
        finally:
            claim.release()

    def flush(self) -> None:
        """Commit what was appended: from now on it survives a crash."""
        if self._writer is not None:
            self._writer.flush()
            self._refresh(self._writer)

    def close(self) -> None:
        """Commit what was appended and let another process write; reading still works."""
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

    def raw_chunks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield ``(first row, stored form)`` chunk by chunk, the next one read ahead; memory maps where possible."""
        stop = self._rows if stop is None else stop
        self._check_range(start, stop)
        with ChunkStream(self, start, stop) as stream:
            for piece in stream:
                yield piece.start, piece.raw

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(first, slice):
            chosen = range(self._rows)[first]
            low, high = (min(chosen), max(chosen) + 1) if chosen else (0, 0)
            block = self.rows(low, high)[:: chosen.step]
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

    def to_pandas(self) -> Any:
        """Return a DataFrame with one line per row: id, loss, grad_norm, dropped and the store's columns.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        pandas = optional_library("pandas", "tables")
        frame = pandas.DataFrame({"id": self.ids(), **self._values()})
        frame.index.name = "row"
        return frame

    def to_xarray(self) -> Any:
        """Return a Dataset of dimensions (row, column): lazy float32 gradients, and the other values of each row.

        ``xarray.open_zarr(path, consolidated=False)`` opens the arrays as they are stored: scales in an array of
        their own, uncommitted rows included, quantised rows as whole numbers.

        Raises
        ------
        MissingExtraError
            Without xarray.
        """
        xarray = optional_library("xarray", "labelled arrays")
        rows = {name: ("row", values) for name, values in self._values().items()}
        coordinates = {"id": ("row", self.ids())} if self.layout.ids else {}
        return xarray.Dataset(
            {"gradients": (("row", "column"), self.to_dask()), **rows}, coordinates, {"store": str(self.path)}
        )

    def _values(self) -> dict[str, Any]:
        kept = [name for name in self.layout.row_arrays if name not in ("row_scale", "example_id")]
        return {name.removeprefix("columns/"): self.small(name) for name in [*kept, "dropped"]}

    def _repr_html_(self) -> str:
        attrs, layout = self._attrs, self.layout
        dropped = int(self.dropped.sum()) if self.has_dropped else 0
        lines = [
            ("rows", f"{self.n:,}" + (f", {dropped:,} of them dropped" if dropped else "")),
            ("numbers a row", f"{self.k:,} of {attrs['p']:,} gradient entries, {layout.dtype}"),
            ("ids", layout.ids or "row numbers"),
            ("columns", ", ".join(layout.columns) or "none"),
            ("loss", str(attrs.get("loss_kind") or "not said")),
            ("chunks", f"{len(self.records):,} of {layout.chunk_rows:,} rows"),
            ("format", f"{attrs['format']}, written by version {attrs['version']}"),
        ]
        return html_table(f"GradientStore {self.path}", None, lines)


def as_store(store: GradientStore | PathLike) -> GradientStore:
    """Return a store as it is, or opened for reading where its path is given."""
    return store if isinstance(store, GradientStore) else GradientStore.open(store)


def check_second_moments(store: GradientStore) -> None:
    """Check that second moments of a store's rows are worth computing: one bit a number does not carry them.

    Raises
    ------
    InputError
        For rows of signs.
    """
    if store.layout.dtype == "sign":
        basis = ", or score with curvature='kronecker', which needs no fit" if store.mask.has_basis else ""
        raise InputError(
            f"expected rows of numbers to compute second moments from; received {store.path}, whose rows are signs: "
            f"extract some documents as numbers (like= this store, dtype='float16', sample=), and fit those{basis}"
        )


def check_extracted(store: GradientStore) -> None:
    """Check that a store's rows were extracted from a model, which can be run again as it was then.

    Raises
    ------
    InputError
        For imported rows: nobody knows what their gradients were made of.
    """
    if "imported" in store.attrs:
        raise InputError(
            f"expected rows that were extracted from a model, to run it again; received {store.path}, imported from an "
            "array: import other rows with like= it (--like), or extract the gradients here"
        )


def check_finished(store: GradientStore) -> None:
    """Check that a store has rows, and none of them is missing."""
    if not store.n or store.committed > store.n or (store.layout.planned_rows or 0) > store.n:
        raise InputError(f"expected a finished store with rows; received {store.path}: finish or repair it first")


def check_has_rows(store: GradientStore) -> None:
    """Check that a store has rows."""
    if not store.n:
        raise InputError(f"expected a store with committed rows; received {store.path} with none: extract first")

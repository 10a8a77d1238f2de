"""The gradient store: create, open, append. One Zarr v3 group; :mod:`.layout` lists its arrays.

Readers see committed rows only, and go on seeing what they opened while a writer adds more.
"""

from __future__ import annotations

import datetime
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ooc_influence._version import __version__
from ooc_influence.errors import InputError, StoreBusyError, StoreExistsError, StoreWriteError
from ooc_influence.store.arrays import open_group, writable_array
from ooc_influence.store.claim import Claim
from ooc_influence.store.encoding import parse_representation
from ooc_influence.store.layout import ATTRIBUTES, FORMAT_VERSION, Layout, Storage
from ooc_influence.store.local import LocalArrayStore, publish_folder, temporary_folder
from ooc_influence.store.mask import Mask
from ooc_influence.store.rows import parse_rows
from ooc_influence.store.view import PathLike, StoreView, parse_path
from ooc_influence.store.writer import RangeWriter


class GradientStore(StoreView):
    """Per-sample gradients on disk, (n, k), with what belongs to each row.

    Use :meth:`open` or :meth:`create`; a context manager closes it (and commits what was appended).

    Attributes
    ----------
    path : Path
        The store's folder.
    layout : Layout
        Its fixed geometry.
    """

    def __init__(self, path: PathLike, mode: Literal["r", "a"] = "r", pin: tuple[str, int, int] | None = None) -> None:
        if mode not in ("r", "a"):
            raise InputError(f"expected mode 'r' or 'a'; received {mode!r}")
        super().__init__(path, pin)
        self._writer: RangeWriter | None = None
        self._claim: Claim | None = None
        self._writable = mode == "a"

    @classmethod
    def open(cls, path: PathLike, mode: Literal["r", "a"] = "r") -> Self:
        """Open a store to read (``"r"``) or to read and append (``"a"``).

        Raises
        ------
        StoreNotFoundError
            If there is none.
        StoreFormatError
            If it is not a store, or of a newer format.
        StoreBusyError
            On the first append, if another process is appending.
        """
        return cls(path, mode)

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
            Representation of the rows: float16 (with a scale a row), bfloat16 or float32.
        storage : Storage, optional
            Chunking.
        planned_rows : int, optional
            Rows in all, where several writers divide the store.
        ids : str, optional
            Dtype of the rows' ids (``"str"``, ``"int64"``); None for no ids.
        columns : mapping of str to str, optional
            Name to dtype (bool, int64, float64, str) of per-row columns.
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
        layout = Layout(
            mask.k, representation, storage.rows_for(mask.k, representation), storage.group_chunks,
            planned_rows, ids, dict(columns or {}),
        )  # fmt: skip
        temporary = temporary_folder(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_empty(temporary, layout, mask, attributes or {})
            published = publish_folder(temporary, target)
        except OSError as error:
            raise StoreWriteError(
                f"expected to make a store at {target}; received: {error}: choose another path, or make room"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not published and not (exist_ok and cls(target).mask_digest == mask.digest):
            raise StoreExistsError(
                f"expected nothing at {target}; received something: choose another path or remove it"
            )
        return cls(target, "a")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, "r", self._pin())

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
        if not self._writable:
            raise InputError(f"expected {self.path} opened to append; received mode 'r': use open(path, mode='a')")
        self._check_writable_range(start, stop)
        self._claim = self._make_claim(start, stop)
        try:
            files = LocalArrayStore(self.path)
            if stop is None:
                files.remove_partial_files(["gradients", "commits", *self.layout.row_arrays])
            self._writer = RangeWriter(open_group(files, "r+"), files, self.layout, start, stop)
        except BaseException:
            self._claim.release()
            self._claim = None
            raise
        return self._writer

    def _make_claim(self, start: int = 0, stop: int | None = None, *, name: str | None = None) -> Claim:
        try:
            return Claim(self.path, start, stop, name=name)
        except StoreBusyError:
            raise
        except OSError as error:
            raise StoreWriteError(f"expected to write to {self.path}; received: {error}") from error

    def _check_writable_range(self, start: int, stop: int | None) -> None:
        planned, group = self.layout.planned_rows, self.layout.group_rows
        if planned is None:
            fits = start == 0 and stop is None
        else:
            fits = stop is not None and 0 <= start < stop <= planned
            fits = fits and start % group == 0 and (stop == planned or (stop or 0) % group == 0)
        if not fits:
            wanted = "no range: the store grows" if planned is None else f"whole groups of {group} of {planned} rows"
            raise InputError(f"expected a writer of {self.path} to ask for {wanted}; received {start} to {stop}")

    def append(
        self,
        gradients: npt.ArrayLike,
        *,
        loss: npt.ArrayLike,
        grad_norm: npt.ArrayLike | None = None,
        ids: Sequence[Any] | npt.ArrayLike | None = None,
        columns: Mapping[str, Any] | None = None,
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
        writer = self.writer()
        writer.append(rows, small)
        self._refresh(writer)

    def _refresh(self, writer: RangeWriter) -> None:
        self._see(writer.fresh)
        writer.fresh.clear()

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
            If another process is dropping rows.
        """
        if not self._writable:
            raise InputError(f"expected {self.path} opened to append; received mode 'r': use open(path, mode='a')")
        self.flush()
        given = np.asarray(rows)
        if given.dtype == bool and given.shape == (self._rows,):
            given = np.flatnonzero(given)
        numbers = np.unique(given)
        if numbers.size and (numbers.dtype.kind not in "iu" or numbers[0] < 0 or numbers[-1] >= self._rows):
            raise InputError(
                f"expected row numbers in [0, {self._rows}), or {self._rows} marks; received {given.dtype} of shape "
                f"{given.shape} from {numbers[0]} to {numbers[-1]}"
            )
        if not numbers.size:
            return
        claim = self._make_claim(name="drop")
        try:
            files = LocalArrayStore(self.path)
            dropped = writable_array(open_group(files, "r+"), "dropped")
            dropped.set_orthogonal_selection((numbers,), True)
            files.sync_folders()
        finally:
            claim.release()
        self.reload()

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


def _write_empty(folder: Path, layout: Layout, mask: Mask, attributes: Mapping[str, Any]) -> None:
    """Write a store without rows to ``folder``."""
    group = open_group(LocalArrayStore(folder), "w")
    layout.create_arrays(group)
    mask.save(group)
    group.create_group("curvature")
    created = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "id": uuid.uuid4().hex,
    }
    fixed = {"format": FORMAT_VERSION, "version": __version__, "created": created, "p": mask.p}
    fixed |= {"mask_digest": mask.digest, "layout": layout.to_dict()}
    group.attrs[ATTRIBUTES] = dict(attributes) | fixed

"""What is made from a corpus once and used by every process: folders in a cache, each named by a digest of its key.

They are in ``$OOC_INFLUENCE_CACHE``; else in ``ooc_influence`` beside what ``datasets`` keeps (``$HF_DATASETS_CACHE``),
or in ``~/.cache``. All of it can be removed at any time: it is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.corpus.corpus_file import Lines, Source, is_json_list, json_list, opened, parquet_batches
from ooc_influence.corpus.documents import Documents, first_fields
from ooc_influence.errors import InputError, OocInfluenceError, StoreWriteError, refused
from ooc_influence.progress import optional_library
from ooc_influence.scratch import ArrayFile, map_array
from ooc_influence.store import NewFolder

logger = logging.getLogger("ooc_influence")
_FORMAT = 1  # of what is kept, part of every key
_PATIENCE = 1.0  # seconds of waiting for another process before that is said


class KeptFolder:
    """A folder of files that are made once.

    Attributes
    ----------
    path : Path
        Where they are. A folder that is kept for nobody else is removed with this object.
    """

    def __init__(self, path: Path, *, temporary: bool = False) -> None:
        self.path = path
        if temporary:
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)


def cache_root() -> Path:
    """Return the folder that everything kept is in."""
    named = os.environ.get("OOC_INFLUENCE_CACHE")
    if named:
        return Path(named).expanduser()
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        return Path(datasets.config.HF_DATASETS_CACHE) / "ooc_influence"
    return Path("~/.cache/ooc_influence").expanduser()


def kept_folder(kind: str, key: Mapping[str, Any] | None, make: Callable[[Path], None]) -> KeptFolder:
    """Return a folder of files made from what ``key`` says, by another process or before, or now.

    Parameters
    ----------
    kind : str
        What it is, the beginning of its name.
    key : mapping or None
        JSON values that settle what is made. None: make it for this process alone.
    make : callable
        Makes the files, in an empty folder. Of several processes with the same key one does, and the others wait.

    Raises
    ------
    StoreWriteError
        If the disk refuses to write them.
    """
    root = cache_root()
    if key is None or not _writable(root):
        return _alone(kind, make)
    text = json.dumps([_FORMAT, kind, key], sort_keys=True, default=str)
    final = root / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
    if not final.is_dir():
        with _one_at_a_time(final):
            if not final.is_dir():
                _publish(final, make)
    return KeptFolder(final)


def _writable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _alone(kind: str, make: Callable[[Path], None]) -> KeptFolder:
    folder = KeptFolder(Path(tempfile.mkdtemp(prefix=f"ooc-influence-{kind}-")), temporary=True)
    with _writing(folder.path):
        make(folder.path)
    return folder


def _publish(final: Path, make: Callable[[Path], None]) -> None:
    with _writing(final), NewFolder(final) as folder:
        place = Path(str(folder.place))
        place.mkdir(exist_ok=True)
        make(place)
        for file in place.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        folder.publish()  # another process may have been first, where there are no locks


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OocInfluenceError:
        raise
    except OSError as error:
        raise StoreWriteError(
            refused(f"to keep an index of the documents in {folder.parent}", error, ", or set OOC_INFLUENCE_CACHE")
        ) from error


@contextlib.contextmanager
def _one_at_a_time(final: Path) -> Iterator[None]:
    """Hold the lock of a folder, of all processes that see it; without one where the file system has no locks."""
    from filelock import FileLock, Timeout

    lock = FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        logger.info("waiting for another process that indexes the same documents (%s)", final)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


_SMALL = 2**22  # bytes of a file whose index is made each time it is opened, in no time, rather than kept
_FIRST = 1024  # documents whose fields are looked at
_AT_ONCE = 2**16  # begins of documents written together


class _Part(ABC):
    """The documents of one file."""

    column_names: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield these fields of some documents, those that each has."""


class FileDocuments(Documents):
    """Documents of one or more files, numbered through.

    Parameters
    ----------
    name : str
        What messages call them.
    sources : sequence of Source
        The files.
    """

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self._parts = [_open_part(source) for source in sources]
        super().__init__(name, first_fields([dict.fromkeys(part.column_names) for part in self._parts]))
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self.textual = all(source.kind in (".csv", ".tsv", ".txt") for source in sources)
        self.fingerprint = {"files": [source.key() for source in sources]}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @override
    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        wanted = np.asarray(numbers, np.int64)
        found: list[dict[str, Any]] = []
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(wanted)]
        for low, high in pairwise(edges):
            if low < high:
                owner = int(owners[low])
                found += self._parts[owner].read((wanted[low:high] - self._starts[owner]).tolist(), fields)
        return found


def _open_part(source: Source) -> _Part:
    return _ParquetPart(source) if source.kind == ".parquet" else _LinePart(source)


class _LinePart(_Part):
    """A file of lines, read from where a document begins to where the next one does."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._plain, self._kept = _plain(source)
        self._lines = Lines(self._plain)
        with opened(self._plain) as file:
            first = [parse() for _, parse in islice(self._lines.split(file), _FIRST)]
        self.column_names = first_fields([dict.fromkeys(self._lines.header), *first])
        self._begins = self._index()

    def _index(self) -> npt.NDArray[np.int64]:
        """Return where each document begins, (n + 1,): the last is where the file ends."""
        if self._plain.path.stat().st_size <= _SMALL:
            return np.concatenate([*self._positions(), np.empty(0, np.int64)])

        def make(folder: Path) -> None:
            with ArrayFile(np.int64, folder / "begins.i8") as array:
                for some in self._positions():
                    array.append(some)

        self._kept_begins = kept_folder("lines", self._source.key(), make)
        return map_array(self._kept_begins.path / "begins.i8", np.int64)

    def _positions(self) -> Iterator[npt.NDArray[np.int64]]:
        with opened(self._plain) as file:
            positions = (position for position, _ in Lines(self._plain).split(file))
            while some := list(islice(positions, _AT_ONCE)):
                yield np.array(some, np.int64)
            yield np.array([file.tell()], np.int64)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        with opened(self._plain, io.DEFAULT_BUFFER_SIZE) as file:  # for a few documents, here and there
            for number in numbers:
                start, stop = self._begins[number : number + 2].tolist()
                if file.tell() != start:
                    file.seek(start)
                data = file.read(stop - start)
                if len(data) < stop - start:
                    raise InputError(f"expected {self._source.path} as it was; received a shorter file: it has changed")
                record = self._lines.parse(data, f"record {number} of {self._source.path}, from byte {start} on")
                yield {name: record[name] for name in fields if name in record}


def _plain(source: Source) -> tuple[Source, KeptFolder | None]:
    """Return a file that is not packed and has a record a line: the file itself, or a copy that is kept."""
    with opened(source) as file:
        listed = is_json_list(source, file)
    if not listed and not source.packed:
        return source, None
    kind = ".jsonl" if listed else source.kind

    def make(folder: Path) -> None:
        with opened(source) as file, (folder / f"copy{kind}").open("wb") as copy:
            if not listed:
                shutil.copyfileobj(file, copy, 2**20)
                return
            for record in json_list(source.path, file):
                copy.write(json.dumps(record).encode() + b"\n")

    kept = kept_folder("copy", source.key(), make)
    return Source(kept.path / f"copy{kind}", kind), kept


class _ParquetPart(_Part):
    """A Parquet file: the columns that are used, copied to an Arrow file that is mapped."""

    def __init__(self, source: Source) -> None:
        if source.packed:
            raise InputError(f"expected Parquet, which is packed inside; received {source.path}: unpack it")
        self._source = source
        parquet = optional_library("pyarrow.parquet", "Parquet files")
        try:
            with parquet.ParquetFile(source.path) as file:
                self.column_names = list(file.schema_arrow.names)
                self._length = file.metadata.num_rows
        except (OSError, ValueError) as error:
            raise InputError(f"expected {source.path} as Parquet; received {error}") from error
        self._opened: dict[tuple[str, ...], tuple[Any, npt.NDArray[np.int64], KeptFolder]] = {}

    def __len__(self) -> int:
        return int(self._length)

    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        columns = tuple(name for name in self.column_names if name in fields)
        if not columns:
            yield from ({} for _ in numbers)
            return
        reader, starts, _ = self._arrow(columns)
        for number in numbers:
            place = int(np.searchsorted(starts, number, side="right")) - 1
            batch = reader.get_batch(place)
            yield batch.slice(number - int(starts[place]), 1).to_pylist()[0]

    def _arrow(self, columns: tuple[str, ...]) -> tuple[Any, npt.NDArray[np.int64], KeptFolder]:
        if columns not in self._opened:
            arrow = optional_library("pyarrow", "Parquet files")
            kept = kept_folder("arrow", {"columns": columns, **self._source.key()}, lambda to: self._copy(to, columns))
            reader = arrow.ipc.open_file(arrow.memory_map(str(kept.path / "columns.arrow")))
            sizes = [reader.get_batch(place).num_rows for place in range(reader.num_record_batches)]
            self._opened[columns] = reader, np.cumsum([0, *sizes]), kept
        return self._opened[columns]

    def _copy(self, folder: Path, columns: tuple[str, ...]) -> None:
        arrow = optional_library("pyarrow", "Parquet files")
        writer = None
        for batch in parquet_batches(self._source.path, list(columns)):
            plain = _without_dictionaries(arrow, batch)
            if writer is None:
                writer = arrow.ipc.new_file(str(folder / "columns.arrow"), plain.schema)
            writer.write_batch(plain)
        if writer is not None:
            writer.close()


def _without_dictionaries(arrow: Any, batch: Any) -> Any:
    """Return a batch whose values stand for themselves: an Arrow file has one dictionary for all batches."""
    columns = [c.dictionary_decode() if arrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return arrow.RecordBatch.from_arrays(columns, names=batch.schema.names)

"""Documents in files, by number: where each begins is kept on disk, so that memory does not grow with their number."""

from __future__ import annotations

import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus.documents import Documents, first_fields
from ooc_influence.corpus.files import Source, opened
from ooc_influence.corpus.kept import KeptFolder, kept_folder
from ooc_influence.corpus.records import Lines, is_json_list, json_list, parquet_batches
from ooc_influence.errors import InputError
from ooc_influence.notebook import optional_library
from ooc_influence.scratch import ArrayFile, map_array

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

    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        """See :meth:`Documents.read`."""
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

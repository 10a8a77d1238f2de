"""Files of documents: which ones somebody names, of what format, and their records by number.

A record is read from the offset where it begins to the one where the next begins. Offsets are kept in a cache, as are
an uncompressed copy of a compressed file or of a JSON list, and the columns of Parquet that are used.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus.cache import CachedFolder, cached_folder
from ooc_influence.errors import InputError, counted, listed, refused
from ooc_influence.progress import optional_library
from ooc_influence.scratch import ArrayFile, map_array
from ooc_influence.store import expand_home

logger = logging.getLogger("ooc_influence")
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FIRST = 1024  # records whose fields are looked at
_NAMED = 8  # files of a pattern that are named when they are listed


class Source(NamedTuple):
    """A file of documents: its kind, one of ``KINDS``, and its compression, one of ``COMPRESSIONS`` or empty."""

    path: Path
    kind: str
    compression: str = ""

    def key(self) -> dict[str, Any]:
        """Return what tells this file from another and from what it was before it was changed."""
        state = self.path.stat()
        return {"path": str(self.path.absolute()), "bytes": state.st_size, "changed": state.st_mtime_ns}


def local_path(data: str | os.PathLike[str]) -> Path:
    """Return a path, with ``~`` as the home folder where nothing has that very name.

    Raises
    ------
    InputError
        If there is no such user.
    """
    path = Path(data)
    return path if path.exists() else expand_home(data)


_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(data: Any) -> bool:
    """Return whether a name is like that of a data set on the hub, ``org/name``, and like none of a file or folder."""
    if not isinstance(data, str) or not _HUB.fullmatch(data):
        return False
    return not Path(data).exists() and not Path(data).parent.exists() and _kind(Path(data))[0] not in KINDS


def find_sources(path: Path) -> list[Source]:
    """Return the file of this name; of a pattern, such as ``dir/*.jsonl``, all that match, sorted by name."""
    if path.exists() or not glob.has_magic(str(path)):
        if not path.is_file():
            raise InputError(f"expected a file or folder of documents; received {path}, where there is none")
        return [_source(path)]
    matching = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute ones too
    files = [_source(file) for file in matching if file.is_file()]
    if not files:
        raise InputError(f"expected files of documents; received {path}, which none matches")
    names = listed((source.path for source in files), _NAMED)
    logger.info("%s %s: %s", counted(len(files), "file matches", "files match"), path, names)
    return files


def find_in_folder(folder: Path) -> list[Source]:
    """Return all files of documents in a folder and those below it, sorted by name, which must be of one kind.

    Raises
    ------
    InputError
        If there is none, or if they are of several kinds.
    """
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    shown = (folder / path for path in inside if not any(part.startswith((".", "_")) for part in path.parts))
    files = [_source(path) for path in shown if _kind(path)[0] in KINDS]
    kinds = sorted({file.kind for file in files})
    if len(kinds) != 1:
        received = f"files of {', '.join(kinds)}" if kinds else "none"
        raise InputError(
            f"expected a folder written by Dataset.save_to_disk, or with files of documents of one kind; received "
            f"{folder} with {received}: give a pattern, such as '{folder}/*.jsonl'"
        )
    names = listed((source.path for source in files), _NAMED)
    logger.info("%s in %s: %s", counted(len(files), "file"), folder, names)
    return files


def _kind(path: Path) -> tuple[str, str]:
    """Return a file's kind and its compression, by its name; empty where it has none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def _source(path: Path) -> Source:
    kind, compression = _kind(path)
    if kind not in KINDS:
        raise InputError(f"expected documents as {', '.join(KINDS)} (or .gz or .zst of these) or a datasets folder; "
                         f"received {path}")  # fmt: skip
    return Source(path, kind, compression)


@contextlib.contextmanager
def _opened(source: Source, buffer: int = 2**18) -> Iterator[Any]:
    """Open a file to read its uncompressed bytes, ``buffer`` at a time; errors then and later are of the family."""
    try:
        if source.compression == ".zst":
            library = optional_library("pyarrow", "files compressed by zstd")
            raw: Any = library.input_stream(str(source.path), compression="zstd")
        else:
            raw = gzip.GzipFile(source.path, "rb") if source.compression else io.FileIO(source.path)
    except OSError as error:
        raise InputError(refused(f"to read {source.path}", error)) from error
    with raw, io.BufferedReader(_Checked(raw, source), buffer) as file:
        yield file


class _Checked(io.RawIOBase):
    """A file whose errors while it is read are one line of the family."""

    def __init__(self, raw: Any, source: Source) -> None:
        self._raw, self._source = raw, source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._source.compression

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def readinto(self, buffer: Any) -> int:
        path, suffix = self._source.path, self._source.compression
        try:
            data = self._raw.read(len(buffer))
        except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(refused(f"to read {path}", error)) from error
            raise InputError(f"expected {path} as {COMPRESSIONS.get(suffix, 'a file')}; received {error}: compress it "
                             f"again, or leave {suffix} out") from error  # fmt: skip
        buffer[: len(data)] = data
        return len(data)


def open_file(source: Source) -> _LineFile | ParquetFile:
    """Return the records of a file, by number; errors are those of :func:`ooc_influence.corpus.open_documents`.

    ``column_names`` are its fields; of JSON, those of the first 1024 records.
    """
    if source.kind == ".parquet":
        return ParquetFile(source)
    return _CsvFile(source) if source.kind in (".csv", ".tsv") else _LineFile(source)


_JSON_LINES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_SMALL = 2**22  # bytes of a file whose offsets are found each time it is opened, in no time, rather than kept
_OFFSETS_AT_ONCE = 2**16  # written together


class _LineFile:
    """A file with a record a line: JSON or text."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._plain, self._copy = _uncompressed(source)
        self._header = self._read_header()
        self._offsets = self._index()
        first = self.read(range(min(len(self), FIRST)), None)
        self.column_names = field_names([dict.fromkeys(self._header), *first])

    def _read_header(self) -> list[str]:
        return []

    def _index(self) -> npt.NDArray[np.int64]:
        """Return the offset of each record, (n + 1,): the last is where the file ends."""
        if self._plain.path.stat().st_size <= _SMALL:
            return np.concatenate(list(self._offset_arrays()))

        def make(folder: Path) -> None:
            with ArrayFile(np.int64, folder / "begins.i8") as array:
                for offsets in self._offset_arrays():
                    array.append(offsets)

        self._cached_offsets = cached_folder("lines", self._source.key(), make)
        return map_array(self._cached_offsets.path / "begins.i8", np.int64)

    def _offset_arrays(self) -> Iterator[npt.NDArray[np.int64]]:
        with _opened(self._plain) as file:
            offsets = self._find_offsets(file)
            while some := list(islice(offsets, _OFFSETS_AT_ONCE)):
                yield np.array(some, np.int64)
            yield np.array([file.tell()], np.int64)

    def _find_offsets(self, file: Any) -> Iterator[int]:
        offset = 0
        for line in file:
            if self._plain.kind == ".txt" or line.strip():
                yield offset
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, numbers: Sequence[int], fields: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """Yield these fields (None: all) of some records, those that each has."""
        for start, data in self._bytes(numbers):
            yield select(self._parse(data, start), fields)

    def lines(self, numbers: Sequence[int]) -> Iterator[bytes] | None:
        """Yield the lines of some records as they are in the file; None where these are not JSON."""
        if self._plain.kind not in _JSON_LINES:
            return None
        return (data.removeprefix(_BOM).partition(b"\n")[0] + b"\n" for _, data in self._bytes(numbers))

    def _bytes(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield where some records begin, and their bytes up to the next record."""
        with _opened(self._plain, io.DEFAULT_BUFFER_SIZE) as file:  # for a few records, here and there
            for number in numbers:
                start, stop = self._offsets[number : number + 2].tolist()
                if file.tell() != start:
                    file.seek(start)
                data = file.read(stop - start)
                if len(data) < stop - start:
                    raise InputError(f"expected {self._source.path} as it was; received a shorter file: it has changed")
                yield start, data

    def _parse(self, data: bytes, offset: int) -> dict[str, Any]:
        try:
            if self._plain.kind == ".txt":
                return {"text": data.decode("utf-8-sig").rstrip("\r\n")}
            record = json.loads(data)
        except UnicodeDecodeError as error:
            raise InputError(f"expected UTF-8 in {self._line(offset)}; received {error}: save it again") from error
        except ValueError as error:
            raise InputError(f"expected JSON in {self._line(offset)}; received {error}: correct the line") from error
        if not isinstance(record, dict):
            raise InputError(f"expected an object in {self._line(offset)}; received {type(record).__name__}")
        return record

    def _line(self, offset: int) -> str:
        """Return what a message calls the line that begins at an offset."""
        with _opened(self._plain) as file:
            blocks = (file.read(min(2**20, offset - low)) for low in range(0, offset, 2**20))
            number = 1 + sum(block.count(b"\n") for block in blocks)
        return f"line {number} of {self._source.path}"


class _CsvFile(_LineFile):
    """A file of cells, separated by commas or tabs, under a header."""

    def _read_header(self) -> list[str]:
        with _opened(self._plain) as file:
            header = next((cells for _, cells in self._records(file)), [])
        repeated = next((name for name in header if name and header.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"expected columns of different names in {self._source.path}; received {repeated!r} twice")
        return header

    def _find_offsets(self, file: Any) -> Iterator[int]:
        return (offset for offset, _ in islice(self._records(file), 1, None))

    def _records(self, file: Any) -> Iterator[tuple[int, list[str]]]:
        """Yield the offset and the cells of each record, the header among them."""
        offset = 0

        def lines() -> Iterator[str]:
            nonlocal offset
            for line in file:
                text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
                offset += len(line)
                yield text

        reader = self._reader(lines())
        while True:
            start = offset
            with self._checked(start):
                cells = next(reader, None)
            if cells is None:
                return
            if cells:  # not an empty line
                yield start, cells

    def _reader(self, lines: Iterator[str]) -> Any:
        return csv.reader(lines, delimiter="\t" if self._plain.kind == ".tsv" else ",", strict=True)

    def _parse(self, data: bytes, offset: int) -> dict[str, Any]:
        with self._checked(offset):
            cells = next(self._reader(iter([data.decode()])))
        if len(cells) > len(self._header):
            raise InputError(
                f"expected {len(self._header)} columns in {self._line(offset)}; received {len(cells)}: quote the text"
            )
        return dict(zip(self._header, cells, strict=False))  # a short line lacks the last ones

    @contextlib.contextmanager
    def _checked(self, offset: int) -> Iterator[None]:
        """Lift the limit on the length of a cell meanwhile; say in one line what is wrong, and where."""
        try:
            with _limit_lifted:  # the process's, so for one record at a time
                limit = csv.field_size_limit(sys.maxsize)
                try:
                    yield
                finally:
                    csv.field_size_limit(limit)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"expected CSV in UTF-8 from {self._line(offset)} on; received {error}: save it again, texts with "
                "quotes in quotes"
            ) from error


_limit_lifted = threading.Lock()  # of the csv module


def _uncompressed(source: Source) -> tuple[Source, CachedFolder | None]:
    """Return a file that is not compressed and has a record a line: the file itself, or a copy in the cache."""
    with _opened(source) as file:
        listed = source.kind == ".json" and file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if not listed and not source.compression:
        return source, None
    kind = ".jsonl" if listed else source.kind

    def make(folder: Path) -> None:
        with _opened(source) as file, (folder / f"copy{kind}").open("wb") as copy:
            if not listed:
                shutil.copyfileobj(file, copy, 2**20)
                return
            for record in _json_list(source.path, file):
                copy.write(json.dumps(record).encode() + b"\n")

    cached = cached_folder("copy", source.key(), make)
    return Source(cached.path / f"copy{kind}", kind), cached


_READ = 2**20  # characters of a JSON list read at a time
_BETWEEN = re.compile(r"[\s,]*")


def _json_list(path: Path, file: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list, of which only a part is in memory."""
    decoder, number = json.JSONDecoder(), 0
    characters = io.TextIOWrapper(file, "utf-8-sig")

    def more(rest: str) -> str:
        """Return at least twice as much as the rest: what does not fit is not tried again for every piece."""
        try:
            return rest + characters.read(max(_READ, len(rest) + 1))
        except UnicodeDecodeError as error:
            raise InputError(f"expected {path} in UTF-8; received {error}") from error

    text = more("")
    offset = text.index("[") + 1
    while True:
        if between := _BETWEEN.match(text, offset):
            offset = between.end()
        if text.startswith("]", offset):
            return
        try:
            record, offset = decoder.raw_decode(text, offset)
        except ValueError as error:
            rest = text[offset:]
            text, offset = more(rest), 0
            if len(text) == len(rest):
                raise InputError(f"expected a list of objects in {path}; received {error} (object {number})") from error
            continue
        if not isinstance(record, dict):
            raise InputError(f"expected objects in {path}; received {type(record).__name__}, number {number}")
        number += 1
        yield record


_BATCH = 512  # Parquet records read at a time


class ParquetFile:
    """A Parquet file: the columns that are used, copied to an Arrow file that is mapped."""

    def __init__(self, source: Source) -> None:
        if source.compression:
            raise InputError(f"expected Parquet, which is compressed inside; received {source.path}: decompress it")
        self._source = source
        with self._parquet() as file:
            self.column_names = list(file.schema_arrow.names)
            self._length = int(file.metadata.num_rows)
        self._mapped: dict[tuple[str, ...], tuple[Any, npt.NDArray[np.int64], CachedFolder]] = {}

    @contextlib.contextmanager
    def _parquet(self) -> Iterator[Any]:
        library = optional_library("pyarrow.parquet", "Parquet files")
        try:
            with library.ParquetFile(self._source.path) as file:
                yield file
        except (OSError, ValueError) as error:
            raise InputError(f"expected {self._source.path} as Parquet; received {error}") from error

    def _batches(self, columns: tuple[str, ...]) -> Iterator[Any]:
        with self._parquet() as file:
            yield from file.iter_batches(_BATCH, columns=list(columns))

    def __len__(self) -> int:
        return self._length

    def read(self, numbers: Sequence[int], fields: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """Yield these fields (None: all) of some records."""
        columns = tuple(name for name in self.column_names if fields is None or name in fields)
        if not columns:
            yield from ({} for _ in numbers)
            return
        reader, starts, _ = self._map(columns)
        for number in numbers:
            batch = int(np.searchsorted(starts, number, side="right")) - 1
            yield reader.get_batch(batch).slice(number - int(starts[batch]), 1).to_pylist()[0]

    def lines(self, numbers: Sequence[int]) -> Iterator[bytes] | None:
        """Return None: records are not lines."""
        return None

    def batches(self, numbers: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield some records, ascending, as Arrow record batches with all that the file's schema says."""
        first = 0
        for batch in self._batches(tuple(self.column_names)):
            low, high = np.searchsorted(numbers, (first, first + batch.num_rows)).tolist()
            if low < high:
                yield batch.take((numbers[low:high] - first).tolist())
            first += batch.num_rows

    @property
    def schema(self) -> Any:
        """The Arrow schema of the file."""
        with self._parquet() as file:
            return file.schema_arrow

    def _map(self, columns: tuple[str, ...]) -> tuple[Any, npt.NDArray[np.int64], CachedFolder]:
        """Return some columns' Arrow file, the first record of each of its batches, and the folder it is in."""
        if columns not in self._mapped:
            arrow = optional_library("pyarrow", "Parquet files")
            key = {"columns": columns, **self._source.key()}
            cached = cached_folder("arrow", key, lambda folder: self._copy(folder / "columns.arrow", columns))
            reader = arrow.ipc.open_file(arrow.memory_map(str(cached.path / "columns.arrow")))
            sizes = [reader.get_batch(batch).num_rows for batch in range(reader.num_record_batches)]
            self._mapped[columns] = reader, np.cumsum([0, *sizes]), cached
        return self._mapped[columns]

    def _copy(self, path: Path, columns: tuple[str, ...]) -> None:
        arrow = optional_library("pyarrow", "Parquet files")
        writer = None
        for batch in self._batches(columns):  # an Arrow file has one dictionary for all batches
            values = [each.dictionary_decode() if arrow.types.is_dictionary(each.type) else each for each in batch]
            plain = arrow.RecordBatch.from_arrays(values, names=batch.schema.names)
            writer = writer or arrow.ipc.new_file(str(path), plain.schema)
            writer.write_batch(plain)
        if writer is not None:
            writer.close()


_GROUP_BYTES, _GROUP_ROWS = 2**26, 2**20  # of a row group that is written


def write_batches(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Write Arrow record batches to a Parquet file; memory holds a row group."""
    arrow = optional_library("pyarrow", "Parquet files")
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    with parquet.ParquetWriter(str(path), schema) as writer:
        group: list[Any] = []

        def write() -> None:
            if group:
                writer.write_table(arrow.Table.from_batches(group, schema))
                group.clear()

        for batch in batches:
            group.append(batch)
            if sum(b.nbytes for b in group) > _GROUP_BYTES or sum(b.num_rows for b in group) > _GROUP_ROWS:
                write()
        write()


def field_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the fields of some records, in the order of their first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def select(record: Mapping[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """Return those of the fields (None: all) that a record has."""
    return dict(record) if fields is None else {name: record[name] for name in fields if name in record}

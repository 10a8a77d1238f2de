"""Which files hold the documents that somebody names, of what kind, and how their bytes are read."""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import logging
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ooc_influence.errors import InputError, counted, refused
from ooc_influence.progress import optional_library
from ooc_influence.store import expand_home

logger = logging.getLogger("ooc_influence")
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
PACKED = (".gz", ".zst")
_NAMED = 8  # files of a pattern that are named when they are listed


class Source(NamedTuple):
    """A file of documents.

    Attributes
    ----------
    path : Path
        The file.
    kind : str
        One of ``KINDS``, by its name.
    packed : str
        One of ``PACKED``, or empty.
    """

    path: Path
    kind: str
    packed: str = ""

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


def is_pattern(path: Path) -> bool:
    """Return whether a path is a pattern: nothing has that very name, and it has ``*``, ``?`` or ``[``."""
    return not path.exists() and glob.has_magic(str(path))


def find_sources(path: Path) -> list[Source]:
    """Return the file of this name; of a pattern, such as ``dir/*.jsonl``, all that match, sorted by name.

    Raises
    ------
    InputError
        If there is none, or one of another kind.
    """
    if not is_pattern(path):
        if not path.is_file():
            raise InputError(f"expected a file or folder of documents; received {path}, where there is none")
        return [_source(path)]
    matching = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute ones too
    files = [_source(file) for file in matching if file.is_file()]
    if not files:
        raise InputError(f"expected files of documents; received {path}, which none matches")
    names = ", ".join(str(source.path) for source in files[:_NAMED])
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    matched = counted(len(files), "file matches", "files match")
    logger.info("%s %s: %s%s", matched, path, names, more)
    return files


def _source(path: Path) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in KINDS:
        raise InputError(f"expected documents as {', '.join(KINDS)} (or .gz or .zst of these) or a datasets folder; "
                         f"received {path}")  # fmt: skip
    return Source(path, kind, packed)


@contextlib.contextmanager
def opened(source: Source, buffer: int = 2**18) -> Iterator[Any]:
    """Open a file to read its unpacked bytes, ``buffer`` at a time.

    Raises
    ------
    InputError
        If it cannot be read, now or later, or is not packed as its name says.
    MissingExtraError
        For ``.zst``, without ``pyarrow``.
    """
    try:
        if source.packed == ".zst":
            inner: Any = optional_library("pyarrow", "files packed by zstd").input_stream(
                str(source.path), compression="zstd"
            )
        else:
            inner = gzip.GzipFile(source.path, "rb") if source.packed else io.FileIO(source.path)
    except OSError as error:
        raise InputError(refused(f"to read {source.path}", error)) from error
    with inner, io.BufferedReader(_Checked(inner, source), buffer) as file:
        yield file


class _Checked(io.RawIOBase):
    """A file whose errors while it is read are one line of the family."""

    def __init__(self, inner: Any, source: Source) -> None:
        self._inner, self._source = inner, source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._source.packed

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._inner.read(len(buffer))
        except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
            raise InputError(self._message(error)) from error
        buffer[: len(found)] = found
        return len(found)

    def _message(self, error: Exception) -> str:
        path, packed = self._source.path, self._source.packed
        if isinstance(error, OSError) and error.errno is not None:
            return refused(f"to read {path}", error)
        name = {".gz": "gzip", ".zst": "zstd"}.get(packed, "a file")
        return f"expected {path} as {name}; received {error}: compress it again, or leave {packed} out"


Parse = Callable[[], dict[str, Any]]
_limit_lifted = threading.Lock()  # of the csv module
_BATCH = 512  # Parquet records read at a time
_READ = 2**20  # characters of a JSON list read at a time
_BETWEEN = re.compile(r"[\s,]*")


def open_records(path: str | Path, split: str | None = None) -> Iterator[Parse]:
    """Yield a function for each record that parses it.

    Parameters
    ----------
    path : path
        As for :func:`open_documents`. What is packed is read as it is, from start to end.
    split : str, optional
        Which split of a folder that has several.

    Raises
    ------
    InputError
        If there is none, or one of another kind; while reading, for a record that cannot be read.
    MissingExtraError
        If the library that reads it is not installed.
    """
    path = local_path(path)
    if path.is_dir():
        from ooc_influence.corpus.opening import open_documents

        documents = open_documents(path, split)
        return (partial(documents.__getitem__, number) for number in range(len(documents)))
    sources = find_sources(path)
    return (parse for source in sources for parse in _records(source))


def _records(source: Source) -> Iterator[Parse]:
    if source.kind == ".parquet":
        yield from _parquet(source.path)
        return
    with opened(source) as file:
        if is_json_list(source, file):
            for record in json_list(source.path, file):
                yield partial(dict, record)
            return
        for _, parse in Lines(source).split(file):
            yield parse


class Lines:
    """Records of a file of lines: what parses each, and where each begins.

    Parameters
    ----------
    source : Source
        Which file, of any kind but Parquet or a JSON list.
    """

    def __init__(self, source: Source) -> None:
        self._path, self._kind = source.path, source.kind
        self._separated = source.kind in (".csv", ".tsv")
        self._dialect: dict[str, Any] = {"delimiter": "\t" if source.kind == ".tsv" else ",", "strict": True}
        self.header: list[str] = []

    def split(self, file: Any) -> Iterator[tuple[int, Parse]]:
        """Yield for each record the byte it begins at, and what parses it."""
        if self._separated:
            yield from self._split_cells(file)
            return
        position = 0
        for number, line in enumerate(file):
            if self._kind == ".txt":
                yield position, partial(_line, line)
            elif line.strip():
                yield position, partial(parse_json, line, f"line {number + 1} of {self._path}")
            position += len(line)

    def parse(self, data: bytes, where: str) -> dict[str, Any]:
        """Return the record that some bytes are: from where it begins to where the next one does."""
        if self._kind == ".txt":
            return _line(data)
        if not self._separated:
            return parse_json(data, where)
        with self._checked(where):
            return self._named(next(csv.reader([data.decode()], **self._dialect)))

    def _split_cells(self, file: Any) -> Iterator[tuple[int, Parse]]:
        position = 0

        def lines() -> Iterator[str]:
            nonlocal position
            for line in file:
                text = line.decode("utf-8-sig" if position == 0 else "utf-8")
                position += len(line)
                yield text

        reader = csv.reader(lines(), **self._dialect)
        while True:
            start = position
            with self._checked(f"line {reader.line_num + 1} of {self._path}"):
                cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue  # an empty line
            if self.header:
                yield start, partial(self._named, cells)
            else:
                self.header = self._columns(cells)

    @contextlib.contextmanager
    def _checked(self, where: str) -> Iterator[None]:
        """Let a cell be long meanwhile; say in one line what is wrong, and where."""
        try:
            with _limit_lifted:  # the process's, so for one record at a time
                limit = csv.field_size_limit(sys.maxsize)
                try:
                    yield
                finally:
                    csv.field_size_limit(limit)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"expected CSV in UTF-8 from {where} on; received {error}: save it again, texts with quotes in quotes"
            ) from error

    def _columns(self, cells: list[str]) -> list[str]:
        repeated = next((name for name in cells if name and cells.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"expected columns of different names in {self._path}; received {repeated!r} twice")
        return cells

    def _named(self, cells: list[str]) -> dict[str, Any]:
        if len(cells) > len(self.header):
            raise InputError(
                f"expected {len(self.header)} columns in each record of {self._path}; received more near "
                f"{cells[0][:40]!r}: quote the text"
            )
        return dict(zip(self.header, cells, strict=False))  # a short line lacks the last ones


def _line(line: bytes) -> dict[str, Any]:
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise InputError(f"expected text in UTF-8; received {error} in {line[:40]!r}") from error


def parse_json(line: bytes, where: str) -> dict[str, Any]:
    """Return the object that a line of JSON is.

    Raises
    ------
    InputError
        If it is none, naming ``where``.
    """
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"expected JSON in {where}; received {error}: correct the line") from error
    if not isinstance(found, dict):
        raise InputError(f"expected an object in {where}; received {type(found).__name__}")
    return found


def is_json_list(source: Source, file: Any) -> bool:
    """Return whether a file is one list of objects, and not an object a line."""
    return source.kind == ".json" and file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def json_list(path: Path, file: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list, of which only a part is in memory.

    Raises
    ------
    InputError
        If it is not JSON, or has something else than objects.
    """
    decoder, number = json.JSONDecoder(), 0
    pieces = _characters(path, file)
    text = next(pieces, "")
    at = text.index("[") + 1
    while True:
        between = _BETWEEN.match(text, at)
        at = at if between is None else between.end()
        if text.startswith("]", at):
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except ValueError as error:
            held = len(text) - at
            more = "".join(_until(pieces, held))  # twice as much: what does not fit is not tried again for every piece
            if not more:
                raise InputError(f"expected a list of objects in {path}; received {error} (object {number})") from error
            text, at = text[at:] + more, 0
            continue
        if not isinstance(record, dict):
            raise InputError(f"expected objects in {path}; received {type(record).__name__}, number {number}")
        number += 1
        yield record


def _until(pieces: Iterator[str], length: int) -> Iterator[str]:
    taken = 0
    while taken <= length and (piece := next(pieces, None)) is not None:
        taken += len(piece)
        yield piece


def _characters(path: Path, file: Any) -> Iterator[str]:
    decoder, size = codecs.getincrementaldecoder("utf-8-sig")(), _READ
    try:
        while data := file.read(size):
            yield decoder.decode(data)
    except UnicodeDecodeError as error:
        raise InputError(f"expected {path} in UTF-8; received {error}") from error


def _parquet(path: Path) -> Iterator[Parse]:
    for batch in parquet_batches(path, None):
        for place in range(batch.num_rows):
            yield partial(_from_batch, batch, place)


def parquet_batches(path: Path, columns: list[str] | None) -> Iterator[Any]:
    """Yield a Parquet file as Arrow batches, of some columns.

    Raises
    ------
    InputError
        If it cannot be read.
    MissingExtraError
        Without ``pyarrow``.
    """
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(_BATCH, columns=columns)
    except (OSError, ValueError) as error:
        raise InputError(f"expected {path} as Parquet; received {error}") from error


def _from_batch(batch: Any, place: int) -> dict[str, Any]:
    found: dict[str, Any] = batch.slice(place, 1).to_pylist()[0]
    return found

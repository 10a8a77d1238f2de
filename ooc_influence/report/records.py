"""Records of a corpus file, those that are needed copied to a temporary file in one pass, then found by key.

Memory holds a key and a place for each record needed, never the corpus: JSON lines, CSV, Parquet (a batch at a time),
and what ``datasets`` maps: a folder it saved, JSON, lines of text. Nothing needs to be seekable, so a ``.gz`` does.
"""

from __future__ import annotations

import array
import contextlib
import csv
import gzip
import io
import json
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, TypeVar

from ooc_influence.errors import InputError, refused
from ooc_influence.notebook import optional_library

Key = int | str
Parse = Callable[[], dict[str, Any]]
_BATCH = 512  # Parquet records read at a time
_limit_lifted = threading.Lock()  # of the csv module
_Record = TypeVar("_Record")


def open_records(path: Path, split: str | None = None, *, as_extracted: bool = False) -> Iterator[Parse]:
    """Yield a function for each record that parses it: many need not be.

    Parameters
    ----------
    path : Path
        A ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``, ``.json`` or ``.txt`` file (one record a line), a ``.gz`` of
        these, or a folder written by ``Dataset.save_to_disk``.
    split : str, optional
        Which split of such a folder.
    as_extracted : bool
        Read CSV as extraction did, which takes some texts for numbers, if the library for that is there.

    Raises
    ------
    InputError
        If there is none, or one of another kind; while reading, for a line that cannot be read.
    MissingExtraError
        If the library that reads it is not installed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((name for name in reversed(suffixes) if name != ".gz"), "")
    readers: dict[str, Callable[[Path], Iterator[Parse]]] = {
        ".jsonl": _json_lines, ".csv": _separated, ".tsv": _separated, ".parquet": _parquet, ".json": _documents,
        ".txt": _documents,
    }  # fmt: skip
    if path.is_dir():
        return _documents(path, split)
    if not path.is_file():
        raise InputError(f"expected a file of examples; received {path}, where there is none")
    if kind not in readers:
        raise InputError(f"expected examples as {', '.join(readers)} or a datasets folder; received {path}")
    if as_extracted and readers[kind] is _separated and find_spec("datasets") is not None:
        return _documents(path)
    return readers[kind](path)


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"expected {path} as gzip; received {error}: compress it again, or leave .gz out") from error
    except OSError as error:
        raise InputError(refused(f"to read {path}", error)) from error


def _json_lines(path: Path) -> Iterator[Parse]:
    with _lines(path) as file:
        for number, line in enumerate(file):
            if line.strip():
                yield partial(_parse_json, path, number, line)


def _parse_json(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"expected JSON in line {number + 1} of {path}; received {error}: mend the line") from error
    if not isinstance(found, dict):
        raise InputError(f"expected an object in line {number + 1} of {path}; received {type(found).__name__}")
    return found


def _separated(path: Path) -> Iterator[Parse]:
    delimiter = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","
    try:
        with _lines(path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            for record in _long_fields(csv.DictReader(text, delimiter=delimiter)):
                if None in record:
                    raise InputError(
                        f"expected {len(record) - 1} columns in each record of {path}; received more near "
                        f"{str(next(iter(record.values())))[:40]!r}: quote the text"
                    )
                yield record.copy
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"expected {path} as CSV in UTF-8; received {error}") from error


def _long_fields(reader: Iterator[_Record]) -> Iterator[_Record]:
    """Read records whose texts may be long: the limit is the process's, and lifted for one read at a time."""
    while True:
        with _limit_lifted:
            limit = csv.field_size_limit(sys.maxsize)
            try:
                record = next(reader, None)
            finally:
                csv.field_size_limit(limit)
        if record is None:
            return
        yield record


def _parquet(path: Path) -> Iterator[Parse]:
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for place in range(batch.num_rows):
                    yield partial(_from_batch, batch, place)
    except (OSError, ValueError) as error:
        raise InputError(f"expected {path} as Parquet; received {error}") from error


def _from_batch(batch: Any, place: int) -> dict[str, Any]:
    found: dict[str, Any] = batch.slice(place, 1).to_pylist()[0]
    return found


def _documents(path: Path, split: str | None = None) -> Iterator[Parse]:
    from ooc_influence.hf.documents import open_documents

    documents = open_documents(path, split)
    for number in range(len(documents)):
        yield partial(documents.__getitem__, number)


class Spool:
    """Records copied to a temporary file, by key. A context that removes the file.

    Attributes
    ----------
    count : int
        Records read.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the context
        self._places: dict[Key, int] = {}
        self._every = array.array("q")  # places by record number, where all are wanted
        self.count = 0

    @classmethod
    def fill(
        cls, path: Path, wanted: Collection[Key], id_field: str | None, split: str | None = None, *,
        as_extracted: bool = False,
    ) -> Self:  # fmt: skip
        """Copy the records whose number, or whose ``id_field`` as text, is wanted; a range from 0: all numbers.

        Raises
        ------
        InputError
            As for :func:`open_records`; for records without that field, or an id that repeats.
        """
        spool = cls()
        try:
            for number, parse in enumerate(open_records(path, split, as_extracted=as_extracted)):
                spool.count += 1
                if id_field is None and number not in wanted:
                    continue
                if isinstance(wanted, range):
                    spool._every.append(spool._write(parse()))
                    continue
                record = parse()
                key: Key = number
                if id_field is not None:
                    if id_field not in record:
                        raise InputError(
                            f"expected a field {id_field!r} in record {number} of {path}; received {', '.join(record)}"
                        )
                    key = str(record[id_field])
                if key in wanted:
                    spool._add(key, record, path)
        except BaseException:
            spool.close()
            raise
        return spool

    def _add(self, key: Key, record: dict[str, Any], path: Path) -> None:
        if key in self._places:
            raise InputError(f"expected ids that do not repeat in {path}; received {key!r} twice")
        self._places[key] = self._write(record)

    def _write(self, record: dict[str, Any]) -> int:
        place = self._file.tell()
        self._file.write(json.dumps(record, default=str).encode() + b"\n")
        return place

    def __contains__(self, key: Key) -> bool:
        return key in self._places or (isinstance(key, int) and 0 <= key < len(self._every))

    def __getitem__(self, key: Key) -> dict[str, Any]:
        self._file.seek(self._places[key] if key in self._places else self._every[int(key)])
        found: dict[str, Any] = json.loads(self._file.readline())
        return found

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

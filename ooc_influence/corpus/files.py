"""Which files hold the documents that somebody names, of what kind, and how their bytes are read."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ooc_influence.errors import InputError, refused
from ooc_influence.notebook import optional_library
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
    logger.info("%d %s %s: %s%s", len(files), "file matches" if len(files) == 1 else "files match", path, names, more)
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

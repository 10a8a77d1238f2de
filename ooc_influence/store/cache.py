"""Chunks of stores on object storage, kept in a local folder for repeated queries.

A chunk is kept decoded, under the store's identity, its number and its commit record, so a chunk that was rewritten is
another entry and what is found may be mapped as it is. The cache stays below a limit: entries used longest ago go
first. Several processes may share it. Other files in its folder are nobody's business: they are neither counted nor
removed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, refused
from ooc_influence.memory import parse_bytes
from ooc_influence.store import local
from ooc_influence.store.layout import Layout
from ooc_influence.store.local import map_file

DEFAULT_LIMIT = "20GiB"
_KEY = r"[0-9a-f]{32}-\d+-[0-9a-f]{16}"  # of a store drawn by this package: another one's id could be any path
_OWN = re.compile(rf"{_KEY}\.chunk|\.{_KEY}\.chunk\.[0-9a-f]{{32}}{re.escape(local.PARTIAL)}")


class ChunkCache:
    """Decoded chunks in a folder, up to a number of bytes.

    Parameters
    ----------
    folder : path
        Where; made if it is not there.
    limit : int or str
        Bytes of chunks, or a size such as ``"20GiB"``.

    Attributes
    ----------
    hits, misses : int
        Chunks found, and read from the store, by this object.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | str = DEFAULT_LIMIT) -> None:
        self.folder = Path(folder).absolute()
        self.limit = parse_bytes(limit)
        self.hits = self.misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(refused(f"a folder for cached chunks at {folder}", error)) from error

    def get(self, key: str, rows: int, layout: Layout, read: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return chunk ``key``, (rows, columns): mapped from the cache, or read and put there."""
        if not re.fullmatch(_KEY, key):
            return read()
        path = self.folder / f"{key}.chunk"
        with contextlib.suppress(OSError):
            mapped = map_file(path)
            if mapped.size == rows * layout.encoding.row_bytes:
                self.hits += 1
                os.utime(path)
                return mapped.view(layout.encoding.dtype).reshape(rows, layout.encoding.columns)
        found = read()
        self.misses += 1
        with contextlib.suppress(OSError):  # a full or read-only cache costs time, nothing else
            self._make_room(found.nbytes)
            local.write_file(path, np.ascontiguousarray(found).reshape(-1).view(np.uint8))
        return found

    def _make_room(self, wanted: int) -> None:
        entries = []
        with os.scandir(self.folder) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    if _OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat()
                        entries.append((status.st_mtime, status.st_size, entry.path))
        held = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if held + wanted <= self.limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            held -= size

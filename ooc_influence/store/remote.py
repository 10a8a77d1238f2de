"""Object storage: a Zarr store behind an fsspec URL (``s3://``, ``gs://``, ``memory://``...); a local cache of chunks.

A successful PUT is an object's durability point and replaces it whole, so there is nothing to sync. Instead of
renaming a folder, as on a disk, the root's ``zarr.json`` is held back while a store is being built, and put last.

The cache keeps chunks decoded, under the store's identity, their number and their commit record, so that a rewritten
chunk is another entry and a cached file may be mapped as it is. It stays below a limit: the entries that were used
longest ago are removed first. Several processes may share it. Other files in its folder are neither counted nor
removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from upath import UPath
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from ooc_influence.errors import InputError, refused
from ooc_influence.memory import parse_bytes
from ooc_influence.store import local
from ooc_influence.store.encoding import Encoding
from ooc_influence.store.local import METADATA, ExpectedChunks, checked, is_chunk, map_file


class RemoteArrayStore(FsspecStore):
    """A folder of Zarr arrays on an object store; see :class:`LocalArrayStore`.

    Parameters
    ----------
    root : UPath
        The folder.
    read_only : bool
        Refuse writes.
    expected : ExpectedChunks, optional
        What reading checks; by default nothing.
    hold_root : bool
        Keep the root's metadata here instead of writing it, until :meth:`take_root`.
    """

    def __init__(
        self,
        root: UPath,
        *,
        read_only: bool = False,
        expected: ExpectedChunks | None = None,
        hold_root: bool = False,
    ) -> None:
        made = FsspecStore.from_url(str(root), storage_options=dict(root.storage_options), read_only=read_only)
        super().__init__(made.fs, read_only=read_only, path=made.path)
        self.root = root
        self.expected = expected or ExpectedChunks()
        self._hold_root = hold_root
        self._held: Buffer | None = None

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, writable or not."""
        return type(self)(self.root, read_only=read_only, expected=self.expected, hold_root=self._hold_root)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and str(self.root) == str(other.root)

    __hash__ = None  # type: ignore[assignment]

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes under ``key``; None where there is no object, unless there must be one."""
        if self._hold_root and key == METADATA:
            return self._held
        data = await self._read(key, prototype or default_buffer_prototype(), byte_range)
        if is_chunk(key) and (data is None or byte_range is None):
            self.expected.check(key, self.root / key, None if data is None else len(data))
        return checked(data, self.root, key)

    async def _read(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        """Read an object, a whole one in one request: s3fs would ask for its size first, for large objects' sake."""
        if byte_range is not None or "max_concurrency" not in signature(type(self.fs)._cat_file).parameters:
            return await super().get(key, prototype, byte_range)
        try:
            return prototype.buffer.from_bytes(await self.fs._cat_file(f"{self.path}/{key}", max_concurrency=1))
        except self.allowed_exceptions:
            return None

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write ``value`` under ``key``, replacing what is there."""
        if self._hold_root and key == METADATA:
            self._held = value
        else:
            await super().set(key, value)

    async def delete_dir(self, prefix: str) -> None:
        """Remove what is below a folder; while the root is held back, the claims on it stay."""
        if not self._hold_root:
            await super().delete_dir(prefix)
            return
        keys = [key async for key in self.list_prefix(prefix) if "/.claim-" not in f"/{key}"]
        await asyncio.gather(*(self.delete(key) for key in keys))

    def put_all(self, documents: Mapping[str, bytes]) -> None:
        """Write many small values at once."""

        async def put() -> None:
            await asyncio.gather(*(self.set(key, cpu.Buffer.from_bytes(data)) for key, data in documents.items()))

        sync(put())

    def take_root(self) -> bytes:
        """Return the root's metadata as last set."""
        assert self._held is not None
        return bytes(self._held.to_bytes())

    def sync_folders(self) -> None:
        """Do nothing: a successful PUT is durable."""


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

    def get(self, key: str, rows: int, encoding: Encoding, read: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return chunk ``key``, (rows, columns): mapped from the cache, or read and put there."""
        if not re.fullmatch(_KEY, key):
            return read()
        path = self.folder / f"{key}.chunk"
        with contextlib.suppress(OSError):
            mapped = map_file(path)
            if mapped.size == rows * encoding.row_bytes:
                self.hits += 1
                os.utime(path)
                return mapped.view(encoding.dtype).reshape(rows, encoding.columns)
        chunk = read()
        self.misses += 1
        with contextlib.suppress(OSError):  # a full or read-only cache costs time, nothing else
            self._make_room(chunk.nbytes)
            local.write_file(path, np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))
        return chunk

    def _make_room(self, wanted: int) -> None:
        entries = []
        with os.scandir(self.folder) as files:
            for entry in files:
                with contextlib.suppress(FileNotFoundError):
                    if _OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat()
                        entries.append((status.st_mtime, status.st_size, entry.path))
        cached = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if cached + wanted <= self.limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            cached -= size

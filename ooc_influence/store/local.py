"""A local Zarr store whose chunk reads are memory maps and whose writes are durable.

Reads: ``get`` returns a buffer over an ``mmap`` of the chunk file, and :data:`MAPPED` is a buffer prototype whose array
buffer *adopts* a whole-selection assignment instead of copying it, so that reading inside one uncompressed chunk
through Zarr's own interface is zero-copy. Writes: temporary file, ``fsync``, rename; folders that gained an entry are
remembered and synced by :meth:`LocalArrayStore.sync_folders`, which has to run before a commit record is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import LocalStore

from ooc_influence.errors import StoreDamagedError

CREATING = ".creating"  # ending of a folder that is being made
PARTIAL = ".partial"  # ending of a file that is being written; left behind only by a crash


class _AdoptingArray(cpu.NDBuffer):
    """An array buffer that takes over a value assigned to all of it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        data = value._data if isinstance(value, cpu.NDBuffer) else value
        keys = key if isinstance(key, tuple) else (key,)
        whole = len(keys) == len(self.shape) and all(
            isinstance(part, slice) and part.indices(size) == (0, size, 1)
            for part, size in zip(keys, self.shape, strict=True)
        )
        if whole and getattr(data, "shape", None) == self.shape and data.dtype == self.dtype:
            self._data = data
        else:
            super().__setitem__(key, value)


MAPPED = BufferPrototype(buffer=cpu.Buffer, nd_buffer=_AdoptingArray)


def _map_file(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LocalArrayStore(LocalStore):
    """A folder of Zarr arrays: mapped chunk reads, durable writes.

    Parameters
    ----------
    root : str or Path
        The folder.
    read_only : bool
        Refuse writes.
    chunk_bytes : mapping of str to int or None, optional
        Array path to the size of each of its chunk files, None where it varies. For these arrays a missing or short
        file raises :class:`StoreDamagedError` instead of reading as the fill value.
    """

    def __init__(
        self, root: Path | str, *, read_only: bool = False, chunk_bytes: Mapping[str, int | None] | None = None
    ) -> None:
        super().__init__(root, read_only=read_only)
        self.chunk_bytes = dict(chunk_bytes or {})
        self._new_entries: set[Path] = set()
        self._guard = threading.Lock()

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, writable or not."""
        return type(self)(self.root, read_only=read_only, chunk_bytes=self.chunk_bytes)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes under ``key``: a memory map for a whole chunk, ordinary reads otherwise."""
        name = key.rsplit("/", 1)[-1]
        if byte_range is not None or not name.startswith("c"):
            return await super().get(key, prototype, byte_range)
        if not self._is_open:
            await self._open()
        array = key.rpartition("/")[0]
        expected = self.chunk_bytes.get(array)
        try:
            mapped = await asyncio.to_thread(_map_file, self.root / key)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if array not in self.chunk_bytes:
                return None
            raise StoreDamagedError(
                f"expected the committed chunk {self.root / key}; received no file: restore it from a backup"
            ) from None
        if expected is not None and mapped.size != expected:
            raise StoreDamagedError(
                f"expected {expected} bytes in the committed chunk {self.root / key}; received {mapped.size}: "
                "restore it from a backup"
            )
        return (prototype or MAPPED).buffer.from_array_like(mapped)

    async def set(self, key: str, value: Buffer) -> None:
        """Write ``value`` under ``key``: whole and on the disk, or not at all."""
        if not self._is_open:
            await self._open()
        self._check_writable()
        await asyncio.to_thread(self._put, self.root / key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write ``value`` unless ``key`` exists."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def _put(self, path: Path, value: Buffer) -> None:
        self._make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            with temporary.open("wb") as file:
                file.write(value.as_buffer_like())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with self._guard:
            self._new_entries.add(path.parent)

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            with self._guard:
                self._new_entries.add(path.parent)

    def sync_folders(self) -> None:
        """Make the names of all files written so far durable."""
        with self._guard:
            folders, self._new_entries = self._new_entries, set()
        for folder in folders:
            _fsync_folder(folder)

    def remove_partial_files(self, arrays: Iterable[str]) -> None:
        """Delete what interrupted writes left behind in some arrays' folders, which the caller alone may write."""
        for name in arrays:
            for path in (self.root / name).glob(f".*{PARTIAL}"):
                path.unlink(missing_ok=True)


def fsync_tree(root: Path) -> None:
    """Sync every folder below ``root`` and ``root`` itself (files were synced when written)."""
    for folder, _, _ in os.walk(root):
        _fsync_folder(Path(folder))


def temporary_folder(final: Path) -> Path:
    """Return where to build a folder that will be renamed to ``final``; what a crash left a day ago is removed."""
    for path in final.parent.glob(f".{final.name}.*{CREATING}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}{CREATING}")


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name in place of what is there, which is then removed."""
    fsync_tree(temporary)
    replaced = []
    while True:
        old = temporary_folder(final)
        with contextlib.suppress(FileNotFoundError):
            final.rename(old)
            replaced.append(old)
        try:
            temporary.rename(final)
            break
        except OSError as error:  # another one was put there in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _fsync_folder(final.parent)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def publish_folder(temporary: Path, final: Path) -> bool:
    """Rename a finished folder to its final name; return False where another one is already there."""
    fsync_tree(temporary)
    try:
        os.rename(temporary, final)  # noqa: PTH104 - atomic, and fails on a non-empty target, which is the point
    except OSError:
        if final.exists():
            return False
        raise
    _fsync_folder(final.parent)
    return True


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; files that vanish meanwhile (a writer's) do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total

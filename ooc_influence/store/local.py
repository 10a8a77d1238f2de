"""Durable changes of local files, and the Zarr store on a local folder.

A file is written under a temporary name, synced, then renamed; its folder is synced by whoever promises that the name
is there too. Everything goes through ``os``, which the tests that replay crashes record; except that two folders swap
names by ``renameat2`` on Linux, which Python does not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import json
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

from ooc_influence.errors import StoreDamagedError, StoreFormatError, StoreReadError, refused

CREATING = ".creating"  # ending of a folder that is being made
PARTIAL = ".partial"  # ending of a file that is being written; left behind only by a crash
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h
_LEFT_BEHIND = 86400  # seconds after which an unfinished folder counts as left by a crash


def write_file(path: Path, data: Any) -> None:
    """Write ``data`` (a buffer) to ``path``: whole and on the disk, or not at all; its folder is not synced."""
    with _temporary_file(path, data, sync=True) as temporary:
        os.replace(temporary, path)  # noqa: PTH105


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside a file, which takes its place at the end: whole and on the disk, or not at all."""
    temporary = _temporary_name(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)  # noqa: PTH105
        _sync(path.absolute().parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108


def create_file(path: Path, data: bytes) -> bool:
    """Write ``data`` to a new file; return False where one is there. Not synced: it is for claims."""
    with _temporary_file(path, data, sync=False) as temporary:
        try:
            os.link(temporary, path)  # atomic with its content, on network file systems too
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            try:  # a file system without hard links
                _write(path, data, os.O_EXCL)
            except FileExistsError:
                return False
    return True


def link_file(source: Path, path: Path) -> None:
    """Make ``path`` another name of ``source``, or a copy where links are not possible; its folder is not synced."""
    temporary = _temporary_name(path)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        _sync(temporary)
        os.replace(temporary, path)  # noqa: PTH105
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it; return the folders that gained an entry, for syncing."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)  # noqa: PTH102
    return [path.parent for path in missing]


def sync_folders(folders: Iterable[Path]) -> None:
    """Make the names in some folders durable."""
    for folder in folders:
        _sync(folder)


def sync_tree(root: Path) -> None:
    """Sync every folder below ``root`` and ``root`` itself (files were synced when written)."""
    sync_folders(Path(folder) for folder, _, _ in os.walk(root))


def temporary_folder(final: Path) -> Path:
    """Return where to build a folder that will be renamed to ``final``."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}{CREATING}")


def remove_left_behind(final: Path) -> None:
    """Delete folders that were being made for ``final`` when something crashed, a day ago or longer."""
    for name in _names(final.parent):
        path = final.parent / name
        if name.startswith(f".{final.name}.") and name.endswith(CREATING):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                    shutil.rmtree(path, ignore_errors=True)


def remove_partial_files(folder: Path, mine: Callable[[str], bool]) -> None:
    """Delete what interrupted writes of some files, chosen by name, left in a folder."""
    for name in _names(folder):
        if name.startswith(".") and name.endswith(PARTIAL) and mine(name[1:].rsplit(".", 2)[0]):
            (folder / name).unlink(missing_ok=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name in place of what is there, which is then removed.

    Where the system swaps two names at once, there is a finished folder of that name at any moment.
    """
    sync_tree(temporary)
    if _swap(temporary, final):
        _sync(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
    replaced = []
    while True:
        old = temporary_folder(final)
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, old)  # noqa: PTH104
            replaced.append(old)
        try:
            os.rename(temporary, final)  # noqa: PTH104
            break
        except OSError as error:  # another one was put there in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _sync(final.parent)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Swap the names of two folders at once; return False where one is missing, or the file system cannot."""
    call = _renameat2()
    return call is not None and not call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        call: Any = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):  # another system, or an old C library
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call  # type: ignore[no-any-return]


def publish_folder(temporary: Path, final: Path) -> bool:
    """Rename a finished folder to its final name; return False where another one is already there."""
    sync_tree(temporary)
    try:
        os.rename(temporary, final)  # noqa: PTH104 - atomic, and fails on a non-empty target, which is the point
    except OSError:
        if final.exists():
            return False
        raise
    _sync(final.parent)
    return True


def tree_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; files that vanish meanwhile (a writer's) do not count."""
    total, waiting = 0, [os.fspath(folder)]
    while waiting:
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat().st_size
    return total


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")


@contextlib.contextmanager
def _temporary_file(path: Path, data: Any, *, sync: bool) -> Iterator[Path]:
    temporary = _temporary_name(path)
    try:
        _write(temporary, data, os.O_EXCL, sync=sync)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108


def _write(path: Path, data: Any, flags: int, *, sync: bool = False) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(handle, rest) :]
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


METADATA = "zarr.json"  # the name of every document
_SMALL = 2**14  # bytes of documents that are kept
_CODECS = {"bytes", "crc32c", "vlen-utf8", "zstd", "blosc", "gzip"}


def check_document(text: bytes, where: object) -> bytes:
    """Return a document as Zarr may read it: unchanged, or without consolidated metadata."""
    try:
        asked, readable = (_read_document if len(text) <= _SMALL else _read_document.__wrapped__)(text)
    except Exception as error:  # whatever JSON and Zarr make of it
        raise StoreFormatError(
            f"expected Zarr metadata that can be read in {where}; received {type(error).__name__}: {error}: restore it "
            "from a backup"
        ) from error
    if asked:
        raise StoreFormatError(
            f"expected known codecs and data types in {where}; received {', '.join(asked)}: it was edited; restore it "
            "from a backup"
        )
    return readable


@functools.lru_cache(maxsize=512)  # stores are opened often, and most of their documents are the same
def _read_document(text: bytes) -> tuple[list[str], bytes]:
    """Return a document's unknown codecs and data types, and what Zarr may read of it."""
    document: Any = json.loads(text)
    consolidated = document.pop("consolidated_metadata", None)
    is_array = document["node_type"] == "array"
    asked = set()
    if is_array:
        asked = {codec["name"] for codec in document["codecs"]} - _CODECS
        asked |= set() if isinstance(document["data_type"], str) else {json.dumps(document["data_type"])[:40]}
    if not asked:
        (ArrayV3Metadata if is_array else GroupMetadata).from_dict(dict(document))
    return sorted(asked), text if consolidated is None else json.dumps(document).encode()


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


_FEW, _WRITERS = 64, 8  # small files that are written one after the other; threads for more of them
MAPPED = BufferPrototype(buffer=cpu.Buffer, nd_buffer=_AdoptingArray)


def is_chunk(key: str) -> bool:
    """Return whether a key is a chunk's, whatever the metadata say chunks are called: not metadata of Zarr 3 or 2."""
    name = key.rsplit("/", 1)[-1]
    return name != METADATA and not name.startswith(".")


def checked(data: Buffer | None, root: object, key: str) -> Buffer | None:
    """Return what was read under a key, metadata checked (:func:`check_document`)."""
    if data is None or key.rsplit("/", 1)[-1] != METADATA:
        return data
    return cpu.Buffer.from_bytes(check_document(data.to_bytes(), f"{root}/{key}"))


def map_file(path: str | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a file's bytes as a memory map that lives as long as arrays that look at it.

    Copy-on-write: torch takes it without a warning, and writing to it never reaches the file.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(handle).st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_COPY), np.uint8)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class ExpectedChunks:
    """Which chunk files have to exist, and how long they are.

    Attributes
    ----------
    sizes : mapping of str to int or None, optional
        Array path to the bytes of each of its chunk files, None where they vary. Without it, no file has to exist: a
        missing chunk reads as the fill value.
    may_lack : frozenset of str
        Arrays of which files may be missing nevertheless.
    """

    sizes: Mapping[str, int | None] | None = None
    may_lack: frozenset[str] = frozenset()

    def check(self, key: str, path: object, size: int | None) -> None:
        """Check the size of the chunk ``key``, None for a missing one; raise :class:`StoreDamagedError` if wrong."""
        array = key.rpartition("/")[0]
        if self.sizes is None or (size is None and array in self.may_lack):
            return
        verify = "'ooc-influence verify' lists what else is damaged"
        if size is None:
            raise StoreDamagedError(f"expected the committed chunk {path}; received no file: {verify}")
        expected = self.sizes.get(array, size)
        if expected is not None and size != expected:
            raise StoreDamagedError(
                f"expected {expected} bytes in the committed chunk {path}; received {size}: {verify}"
            )


class LocalArrayStore(LocalStore):
    """A folder of Zarr arrays: mapped chunk reads, durable writes.

    Parameters
    ----------
    root : str or Path
        The folder.
    read_only : bool
        Refuse writes.
    expected : ExpectedChunks, optional
        What reading checks; by default nothing.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False, expected: ExpectedChunks | None = None) -> None:
        super().__init__(root, read_only=read_only)
        self.expected = expected or ExpectedChunks()
        self._new_entries: set[Path] = set()
        self._guard = threading.Lock()

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, writable or not."""
        return type(self)(self.root, read_only=read_only, expected=self.expected)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes under ``key``: a memory map for a whole chunk, ordinary reads otherwise."""
        if not self._is_open:
            await self._open()
        try:  # in the event loop: mapping reads nothing, documents are small, and a thread would cost more
            if byte_range is not None:
                return checked(await super().get(key, prototype, byte_range), self.root, key)
            if not is_chunk(key):
                return checked(cpu.Buffer.from_bytes((self.root / key).read_bytes()), self.root, key)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise StoreReadError(refused(f"to read {self.root}/{key}", error)) from error
        mapped = self.map_chunk(key)
        return None if mapped is None else (prototype or MAPPED).buffer.from_array_like(mapped)

    def map_chunk(self, key: str) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the bytes of the chunk under ``key`` as a map; None where it is missing and may be.

        What ``get`` does, without the event loop: for streaming through chunks.
        """
        path = f"{self.root}/{key}"
        try:
            mapped = map_file(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            mapped = None
        except PermissionError as error:
            raise StoreReadError(refused(f"to read {path}", error)) from error
        self.expected.check(key, path, None if mapped is None else mapped.size)
        return mapped

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
        if not path.parent.exists():
            self._gained(make_folders(path.parent))
        write_file(path, value.as_buffer_like())
        self._gained([path.parent])

    def put_all(self, documents: Mapping[str, bytes]) -> None:
        """Write many small values, each whole and on the disk: waiting for the disk once for several of them."""
        paths = {self.root / key: data for key, data in documents.items()}
        folders = sorted({path.parent for path in paths})
        for folder in folders:
            self._gained(make_folders(folder))
        if len(paths) <= _FEW:
            for path, data in paths.items():
                write_file(path, data)
        else:
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(pool.map(write_file, paths.keys(), paths.values()))
        self._gained(folders)

    def link(self, source: Path, key: str) -> None:
        """Put a file that is on the disk already under ``key``, by a link where possible."""
        path = self.root / key
        link_file(source, path)
        self._gained([path.parent])

    def _gained(self, folders: list[Path]) -> None:
        with self._guard:
            self._new_entries.update(folders)

    def sync_folders(self) -> None:
        """Make the names of all files written so far durable."""
        with self._guard:
            folders, self._new_entries = self._new_entries, set()
        sync_folders(folders)

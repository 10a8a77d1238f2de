"""Changing local files so that a power cut cannot undo what was promised.

A file is written under a temporary name, synced, then renamed; its folder is synced by whoever promises that the name
is there too. All of it goes through ``os``, which is what the tests that replay crashes record; but two folders swap
names by ``renameat2`` on Linux, for which Python has no name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

CREATING = ".creating"  # ending of a folder that is being made
PARTIAL = ".partial"  # ending of a file that is being written; left behind only by a crash
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h
_LEFT_BEHIND = 86400  # seconds after which a folder being made is taken for one that a crash left


def write_file(path: Path, data: Any) -> None:
    """Write ``data`` (a buffer) to ``path``: whole and on the disk, or not at all; its folder is not synced."""
    with _temporary_file(path, data, sync=True) as temporary:
        os.replace(temporary, path)  # noqa: PTH105


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
    """Delete what interrupted writes of some files, told by name, left behind in a folder."""
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

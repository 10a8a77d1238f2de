"""Where stores are: a local folder (:class:`pathlib.Path`) or a folder behind an fsspec URL (:class:`upath.UPath`).

Everything the package does to files besides Zarr's own reads and writes goes through here: looking, creating
exclusively, publishing what was built, removing. On a disk a folder is built aside and renamed; on an object store,
which cannot rename, it is built in place and its root's ``zarr.json`` is put last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import fsspec  # type: ignore[import-untyped]
from upath import UPath

from ooc_influence.errors import (
    InputError,
    MissingExtraError,
    StoreExistsError,
    StoreReadError,
    install_extra,
    refused,
)
from ooc_influence.store import local
from ooc_influence.store.local import METADATA, ExpectedChunks, LocalArrayStore
from ooc_influence.store.remote import RemoteArrayStore

StorePath = Path | UPath
PathLike = str | os.PathLike[str] | UPath
ArrayStore = LocalArrayStore | RemoteArrayStore


def parse_path(path: PathLike) -> StorePath:
    """Return a path as the store uses it: an absolute local path, ``~`` as the home folder, or the path behind a URL.

    Raises
    ------
    InputError
        For a URL whose protocol fsspec does not know, or ``~`` of a user who has no home folder.
    MissingExtraError
        For one whose package is not installed.
    """
    if not isinstance(path, (str, os.PathLike, UPath)):
        raise InputError(f"expected a path or a URL; received {type(path).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        return path
    text = os.fspath(path)
    if "://" not in text:
        return expand_home(text).absolute()  # tasks may run after the working directory changed
    protocol = text.partition("://")[0]
    if protocol in ("file", "local"):
        return expand_home(text.partition("://")[2]).absolute()
    try:
        remote = UPath(text)
        _ = remote.fs
    except ImportError as error:
        raise MissingExtraError(
            f"expected the package behind {protocol}://; received none ({error}): "
            f"{install_extra('s3')} for s3://, or fsspec's package for {protocol}"
        ) from error
    except ValueError as error:
        raise InputError(f"expected a local path or an fsspec URL; received {text!r} ({error})") from error
    return remote


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a local path whose leading ``~`` or ``~user`` is that home folder, as a shell has it; ``./~`` is none.

    Raises
    ------
    InputError
        If there is no such user.
    """
    text = os.fspath(path)
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError as error:
        raise InputError(f"expected a path; received {text!r}, whose home folder is unknown") from error


_opened: set[str] = set()  # by their user, in this process


def remember_opened(path: StorePath) -> None:
    """Note that the user has opened this path: other stores may refer to it."""
    _opened.add(str(path))


def parse_reference(path: object, home: StorePath) -> StorePath:
    """Return the path that a store at ``home`` refers to in its attributes, which somebody else may have written.

    It is followed on the file system the store is on (of an object store, in the same bucket), and to where the user
    has opened a store in this process; nowhere else.

    Raises
    ------
    InputError
        For any other path.
    """
    text = path if isinstance(path, str) else repr(path)
    protocol, apart, rest = text.partition("://")
    if not isinstance(path, str) or text in _opened:
        near = isinstance(path, str)
    elif is_local(home):
        near = not apart or protocol in ("file", "local")
    else:
        scheme, _, inside = str(home).partition("://")
        near = bool(apart) and protocol == scheme and _bucket(rest) == _bucket(inside)
    if not near:
        raise InputError(
            f"expected a store that refers to its scheme file system; received {home}, which refers to {text}: if you "
            f"trust it, open that store first: GradientStore.open({text!r}), or --like {text}"
        )
    return parse_path(text)


def _bucket(path: str) -> str:
    return path.partition("/")[0]


def is_local(path: StorePath) -> TypeGuard[Path]:
    """Return whether a path is on a file system whose files can be mapped."""
    return isinstance(path, Path)


def array_store(
    path: StorePath,
    *,
    read_only: bool = False,
    chunk_bytes: Mapping[str, int | None] | None = None,
    may_lack: Collection[str] = (),
) -> ArrayStore:
    """Return the Zarr store on a folder; see :class:`LocalArrayStore` and, of chunks, :class:`ExpectedChunks`."""
    kind: Any = LocalArrayStore if isinstance(path, Path) else RemoteArrayStore
    expected = ExpectedChunks(chunk_bytes, frozenset(may_lack))
    store: ArrayStore = kind(path, read_only=read_only, expected=expected)
    return store


def _system(path: UPath) -> fsspec.AbstractFileSystem:
    """Return the file system of a URL, with nothing remembered of earlier listings: others write there too."""
    path.fs.invalidate_cache()
    return path.fs


@contextlib.contextmanager
def _looking(path: StorePath) -> Iterator[None]:
    """Turn a refusal to read a local file into one of this package's errors; object stores' clients have their own."""
    try:
        yield
    except PermissionError as error:
        if not is_local(path):
            raise
        raise StoreReadError(refused(f"to read {path}", error)) from error


def is_file(path: StorePath) -> bool:
    """Return whether a file is there."""
    with _looking(path):
        return path.is_file() if isinstance(path, Path) else bool(_system(path).isfile(path.path))


def exists(path: StorePath) -> bool:
    """Return whether a file or folder is there."""
    with _looking(path):
        return path.exists() if isinstance(path, Path) else bool(_system(path).exists(path.path))


def is_free(path: StorePath) -> bool:
    """Return whether nothing is at a path, or an empty folder."""
    return not exists(path) or (not is_file(path) and not names(path))


def not_free(path: StorePath, expected: str = "nothing", received: str = "something else") -> StoreExistsError:
    """Return the error for a path where something is that may not be overwritten.

    Parameters
    ----------
    path : StorePath
        Where something was to be made.
    expected : str
        What may be there: what the call would use or replace.
    received : str
        What is there.
    """
    return StoreExistsError(f"expected {expected} at {path}; received {received}: choose another path, or remove it")


def check_free(path: StorePath, expected: str = "nothing", received: str = "something else") -> None:
    """Check that nothing is at a path, or an empty folder; see :func:`not_free`.

    Raises
    ------
    StoreExistsError
        If something is there.
    """
    if not is_free(path):
        raise not_free(path, expected, received)


def check_writable(path: StorePath, *, missing_folders: bool = True) -> None:
    """Check, before long work, that this user may write a file or make a folder at a path; a URL is not checked.

    Parameters
    ----------
    path : StorePath
        Where something is to be written.
    missing_folders : bool
        Whether the folders above it may be missing, since they will be made.

    Raises
    ------
    InputError
        If the folder it would be in is missing or a file, or this user may not write there.
    """
    if not is_local(path):
        return
    nearest = next(existing for existing in (path, *path.absolute().parents) if existing.exists())
    if nearest != path and not nearest.is_dir():
        raise InputError(f"expected a folder to write to above {path}; received {nearest}, which is a file")
    if not missing_folders and nearest not in (path, path.absolute().parent):
        raise InputError(f"expected a folder to write {path} to; received none: make it first")
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        raise InputError(
            f"expected to write {path}; received {nearest}, where this user may not write: change its permissions, or "
            "choose another path"
        )


def names(folder: StorePath) -> list[str]:
    """Return the names directly in a folder, sorted; none where there is no folder."""
    try:
        if isinstance(folder, Path):
            with _looking(folder):
                return sorted(os.listdir(folder))  # noqa: PTH208
        entries = _system(folder).ls(folder.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    root = folder.path.rstrip("/")
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in entries if path.rstrip("/") != root)


def read_bytes(path: StorePath) -> bytes | None:
    """Return a file's content; None where there is none."""
    try:
        with _looking(path):
            return path.read_bytes() if isinstance(path, Path) else bytes(_system(path).cat_file(path.path))
    except FileNotFoundError:
        return None


def write_bytes(path: StorePath, data: bytes) -> None:
    """Write a file whole or not at all, durably."""
    if isinstance(path, Path):
        local.write_file(path, data)
        local.sync_folders([path.parent])
    else:
        path.fs.pipe_file(path.path, data)


def make_folder(folder: StorePath) -> None:
    """Make a folder and what is missing above it, durably; an object store has none."""
    if isinstance(folder, Path):
        local.sync_folders(local.make_folders(folder))


def create_file(path: StorePath, data: bytes) -> bool:
    """Write a file that nobody else may have written; return False where one is there.

    An object store without conditional PUT overwrites or refuses: then two writers at the same moment may go unnoticed.
    """
    if isinstance(path, Path):
        return local.create_file(path, data)
    try:
        path.fs.pipe_file(path.path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        answer = getattr(error.__cause__, "response", None) or {}  # of S3, as s3fs passes it on
        if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):  # conflict, precondition failed
            return False
        raise
    return True


def remove_file(path: StorePath) -> None:
    """Delete a file that may be gone already."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    elif _system(path).exists(path.path):
        path.fs.rm_file(path.path)


def remove_tree(path: StorePath) -> None:
    """Delete a folder and all in it, or a file, as far as it is there."""
    if isinstance(path, Path):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    elif _system(path).exists(path.path):
        path.fs.rm(path.path, recursive=True)


def remove_empty(folder: StorePath) -> None:
    """Delete a folder that has nothing in it; an object store has none."""
    if isinstance(folder, Path):
        with contextlib.suppress(OSError):  # there is something, or another process was first
            folder.rmdir()


def tree_bytes(path: StorePath) -> int:
    """Return the bytes of all files below a folder."""
    return local.tree_bytes(path) if isinstance(path, Path) else int(_system(path).du(path.path))


class NewFolder:
    """A folder of Zarr arrays that appears under its name whole, or not at all.

    Use it as a context: what was not published when it ends is removed.

    Parameters
    ----------
    final : StorePath
        Its name.
    replace : bool
        Replace what is there. On an object store, what is there is not readable from here on.

    Attributes
    ----------
    arrays : LocalArrayStore or RemoteArrayStore
        What to build in.
    path : StorePath
        Where that is.
    """

    def __init__(self, final: StorePath, *, replace: bool = False) -> None:
        self._final, self._replace = final, replace
        self._published = False
        self.path: StorePath = final
        self.arrays: ArrayStore
        if isinstance(final, Path):
            final.parent.mkdir(parents=True, exist_ok=True)
            local.remove_left_behind(final)
            self.path = local.temporary_folder(final)
            self.arrays = LocalArrayStore(self.path)
        else:
            if replace:
                remove_file(final / METADATA)
            self.arrays = RemoteArrayStore(final, hold_root=True)

    def publish(self) -> bool:
        """Give it its name; return False where something else is there and is not to be replaced."""
        if isinstance(self.arrays, RemoteArrayStore):
            self._published = create_file(self._final / METADATA, self.arrays.take_root())
        elif self._replace:
            local.replace_folder(Path(str(self.path)), Path(str(self._final)))
            self._published = True
        else:
            self._published = local.publish_folder(Path(str(self.path)), Path(str(self._final)))
        return self._published

    def __enter__(self) -> NewFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._published and (isinstance(self.path, Path) or not is_file(self._final / METADATA)):
            remove_tree(self.path)

"""What is made from a corpus once and used by every process: folders in a cache, each named by a digest of its key.

They are in ``$OOC_INFLUENCE_CACHE``; else in ``ooc_influence`` beside what ``datasets`` keeps (``$HF_DATASETS_CACHE``),
or in ``~/.cache``. All of it can be removed at any time: it is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ooc_influence.errors import writing
from ooc_influence.store import NewFolder

logger = logging.getLogger("ooc_influence")
_FORMAT = 1  # of what is kept, part of every key
_PATIENCE = 1.0  # seconds of waiting for another process before that is said


class CachedFolder:
    """A folder of files that are made once.

    Attributes
    ----------
    path : Path
        Where they are. A folder that is kept for nobody else is removed with this object.
    """

    def __init__(self, path: Path, *, temporary: bool = False) -> None:
        self.path = path
        if temporary:
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)


def cache_root() -> Path:
    """Return the folder that everything kept is in."""
    named = os.environ.get("OOC_INFLUENCE_CACHE")
    if named:
        return Path(named).expanduser()
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        return Path(datasets.config.HF_DATASETS_CACHE) / "ooc_influence"
    return Path("~/.cache/ooc_influence").expanduser()


def cached_folder(kind: str, key: Mapping[str, Any] | None, make: Callable[[Path], None]) -> CachedFolder:
    """Return a folder of files made from what ``key`` says, by another process or before, or now.

    Parameters
    ----------
    kind : str
        What it is, the beginning of its name.
    key : mapping or None
        JSON values that settle what is made. None: make it for this process alone.
    make : callable
        Makes the files, in an empty folder. Of several processes with the same key one does, and the others wait.

    Raises
    ------
    StoreWriteError
        If the disk refuses to write them.
    """
    root = cache_root()
    if key is None or not _writable(root):
        return _alone(kind, make)
    text = json.dumps([_FORMAT, kind, key], sort_keys=True, default=str)
    final = root / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
    if not final.is_dir():
        with _one_at_a_time(final):
            if not final.is_dir():
                _publish(final, make)
    return CachedFolder(final)


def _writable(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _alone(kind: str, make: Callable[[Path], None]) -> CachedFolder:
    folder = CachedFolder(Path(tempfile.mkdtemp(prefix=f"ooc-influence-{kind}-")), temporary=True)
    with _writing(folder.path):
        make(folder.path)
    return folder


def _publish(final: Path, make: Callable[[Path], None]) -> None:
    with _writing(final), NewFolder(final) as folder:
        path = Path(str(folder.path))
        path.mkdir(exist_ok=True)
        make(path)
        for file in path.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        folder.publish()  # another process may have been first, where there are no locks


def _writing(folder: Path) -> AbstractContextManager[None]:
    return writing(f"to keep an index of the documents in {folder.parent}", ", or set OOC_INFLUENCE_CACHE")


@contextlib.contextmanager
def _one_at_a_time(final: Path) -> Iterator[None]:
    """Hold the lock of a folder, of all processes that see it; without one where the file system has no locks."""
    from filelock import FileLock, Timeout

    lock = FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        logger.info("waiting for another process that indexes the same documents (%s)", final)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()

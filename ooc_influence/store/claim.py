"""One writer a range: a claim file held with ``flock``.

The kernel lets go of the lock when its process dies, however it dies, so a claim is never left behind; the file says
who holds it. Claims lie inside the ``commits`` array's folder, where Zarr does not look for members. Ranges may be cut
differently from run to run, so a new claim is checked against every other under a guard lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ooc_influence.errors import StoreBusyError

_held: weakref.WeakSet[Claim] = weakref.WeakSet()


class Claim:
    """Exclusive right to write one range of a store, until :meth:`release` or the process's end.

    Parameters
    ----------
    folder : Path
        The store.
    start, stop : int
        The rows; ``stop`` None means all there will be.
    name : str, optional
        A claim that is not about a range of rows.

    Raises
    ------
    StoreBusyError
        If another writer holds it, or part of it.
    """

    def __init__(self, folder: Path, start: int = 0, stop: int | None = None, *, name: str | None = None) -> None:
        claims = folder / "commits"
        end = "end" if stop is None else str(stop)
        own = claims / f".claim-{name or f'rows-{start}-{end}'}"
        with _locked(claims / ".claim-guard"):
            for path in claims.glob(".claim-rows-*") if name is None else ():
                if path != own and _overlap(path.name, start, stop):
                    _try_lock(path, folder).close()
            self._file: IO[Any] | None = _try_lock(own, folder)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()
        _held.add(self)

    def release(self) -> None:
        """Give the range back; safe to call twice."""
        if self._file is not None:
            self._file.truncate(0)  # the file stays: removing it would let two writers lock two files of one name
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None

    def forget(self) -> None:
        """Let go of the file in a forked child, where the lock is not ours: it would outlive its owner."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _overlap(name: str, start: int, stop: int | None) -> bool:
    first, last = name.removeprefix(".claim-rows-").split("-")
    return (last == "end" or start < int(last)) and (stop is None or int(first) < stop)


def _try_lock(path: Path, folder: Path) -> IO[Any]:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise StoreBusyError(
            f"expected no other writer of {folder} ({path.name.removeprefix('.claim-')}); received one: {owner}: wait "
            "for it to finish, or stop it, then run again"
        ) from None
    return file


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_all() -> None:
    for claim in list(_held):
        claim.forget()


os.register_at_fork(after_in_child=_forget_all)

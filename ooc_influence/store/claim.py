"""One writer a range: a claim file held with ``flock``.

The kernel lets go of the lock when its process dies, however it dies, so a claim is never left behind; the file says
who holds it. It lies inside the ``commits`` array's folder, where Zarr does not look for members.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from ooc_influence.errors import StoreBusyError


class Claim:
    """Exclusive right to write one range of a store, until :meth:`release` or the process's end.

    Parameters
    ----------
    folder : Path
        The store.
    name : str
        The range: ``"append"``, or ``"rows-START-STOP"``.

    Raises
    ------
    StoreBusyError
        If another writer holds it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / "commits" / f".claim-{name}"
        self._file: IO[Any] | None = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise StoreBusyError(
                f"expected no other writer of {folder} ({name}); received one: {owner}: "
                "wait for it to finish, or stop it, then run again"
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        """Give the range back; safe to call twice."""
        if self._file is not None:
            self._file.truncate(0)  # the file stays: removing it would let two writers lock two files of one name
            self._file.close()
            self._file = None

"""Results of finished stripes, kept in a folder so that an interrupted call goes on from there.

A part is a file of its own, written whole or not at all by the process that made the call. The folder belongs to one
call: a digest of all that the result depends on is written first and checked afterwards. It is removed when the result
is there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import OocInfluenceError, StoreExistsError, StoreWriteError, refused
from ooc_influence.progress import Progress
from ooc_influence.store import (
    PathLike,
    StorePath,
    exists,
    is_local,
    names,
    parse_path,
    read_bytes,
    remove_tree,
    write_bytes,
)
from ooc_influence.stripes import Stripe, cut_stripes, run_stripes

Part = Mapping[str, npt.NDArray[Any]]
_SETTINGS = "settings.json"
_PART_BYTES = 2 * 2**30  # stored rows that one part stands for


class Parts:
    """The finished parts of one call.

    Parameters
    ----------
    folder : path or None
        Where they are kept; None: nowhere, and an interrupted call starts again.
    digest : str
        Of all that the result depends on.

    Raises
    ------
    StoreExistsError
        If something else than parts of this very call is there.
    StoreWriteError
        If nothing can be written there.
    """

    def __init__(self, folder: PathLike | None, digest: str) -> None:
        self._folder = None if folder is None else parse_path(folder)
        if self._folder is None:
            return
        try:
            self._open(self._folder, digest)
        except OSError as error:
            if isinstance(error, OocInfluenceError):
                raise
            raise StoreWriteError(
                refused(f"a folder for partial results at {self._folder}", error, ", or choose another")
            ) from error

    def _open(self, folder: StorePath, digest: str) -> None:
        settings = read_bytes(folder / _SETTINGS)
        if settings is None and exists(folder) and names(folder):
            raise StoreExistsError(
                f"expected the partial results of this call, or nothing, at {folder}; received something else: choose "
                "another folder"
            )
        if settings is not None and json.loads(settings)["digest"] != digest:
            raise StoreExistsError(
                f"expected the partial results of this call at {folder}; received those of another call (other rows, "
                "curvature or settings): choose another folder, or remove it"
            )
        if is_local(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / _SETTINGS, json.dumps({"digest": digest}).encode())

    def stripes(self, n: int, block_rows: int, slots: int, row_bytes: int) -> list[Stripe]:
        """Return the stripes to work on: one a slot, or more where each is to be kept."""
        kept = 1 if self._folder is None else -(-n * row_bytes // _PART_BYTES)
        return cut_stripes(0, n, block_rows, max(slots, kept))

    def run(
        self,
        name: str,
        function: Callable[..., Part],
        stripes: list[Stripe],
        progress: Progress,
        *args: Any,
        slots: int,
        take: Callable[[Stripe, Part], None],
    ) -> None:
        """Run ``function`` for every stripe whose part is not there, and give ``take`` every part, in any order."""
        missing = []
        for stripe in stripes:
            part = self._read(name, stripe)
            if part is None:
                missing.append(stripe)
            else:
                progress.advance(stripe.stop - stripe.start)
                take(stripe, part)

        def done(stripe: Stripe, part: Part) -> None:
            self._write(name, stripe, part)
            take(stripe, part)

        run_stripes(function, missing, progress, *args, slots=slots, each=done, own_threads=True)

    def _read(self, name: str, stripe: Stripe) -> Part | None:
        data = None if self._folder is None else read_bytes(self._folder / _file(name, stripe))
        if data is None:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return dict(found)

    def _write(self, name: str, stripe: Stripe, part: Part) -> None:
        if self._folder is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **part)
        try:
            write_bytes(self._folder / _file(name, stripe), buffer.getvalue())
        except OSError as error:
            raise StoreWriteError(
                refused(f"to keep partial results in {self._folder}", error, ", then run again")
            ) from error

    def remove(self) -> None:
        """Remove the folder: the result is there."""
        if self._folder is not None:
            remove_tree(self._folder)


def _file(name: str, stripe: Stripe) -> str:
    return f"{name}-{stripe.start}-{stripe.stop}.npz"

"""Results of finished stripes, kept in a folder so that an interrupted call goes on from there.

A part is a file of its own, written whole or not at all by the process that made the call; its name says of which
queries and rows it is. The folder belongs to one call: a digest of all that the result depends on is written first and
checked afterwards. What a budget decides is not in it: rows that lack a part are cut as the call at hand would, and the
queries taken at a time stay those of the parts that are there. The folder is removed when the result is there.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import OocInfluenceError, StoreExistsError, StoreWriteError, refused
from ooc_influence.parallel import Stripe, cut_stripes, run_stripes, subtract_ranges
from ooc_influence.progress import Progress
from ooc_influence.store import (
    PathLike,
    StorePath,
    exists,
    is_local,
    names,
    parse_path,
    read_bytes,
    remove_empty,
    remove_tree,
    write_bytes,
)

Part = Mapping[str, npt.NDArray[Any]]
_SETTINGS = "settings.json"
_OWN = re.compile(
    r"\.?(settings\.json|[a-z0-9-]+-\d+-\d+\.npz)(\.[0-9a-f]{32}\.partial)?"
)  # files of a folder of parts
_PART_BYTES = 2 * 2**30  # stored rows that one part stands for


class Cutting(NamedTuple):
    """What stripes are cut by: the rows there are, rows of a block, stored bytes of a row."""

    rows: int
    block_rows: int
    row_bytes: int


class Parts:
    """The finished parts of one call.

    Parameters
    ----------
    folder : path or None
        Where they are kept; None: nowhere, and an interrupted call starts again.
    digest : str
        Of all that the result depends on.

    Attributes
    ----------
    queries : int or None
        Queries at a time in the parts that are there; None where there are none.

    Raises
    ------
    StoreExistsError
        If something else than parts of this very call is there.
    StoreWriteError
        If nothing can be written there.
    """

    def __init__(self, folder: PathLike | None, digest: str) -> None:
        self._folder, self._digest = None if folder is None else parse_path(folder), digest
        self.queries: int | None = None
        if self._folder is None:
            return
        with self._writing(self._folder):
            self._open(self._folder)

    @contextlib.contextmanager
    def _writing(self, folder: StorePath) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, OocInfluenceError):
                raise
            raise StoreWriteError(
                refused(f"a folder for partial results at {folder}", error, ", or choose another")
            ) from error

    def _open(self, folder: StorePath) -> None:
        data = read_bytes(folder / _SETTINGS)
        settings = None if data is None else _settings(data)
        if settings is None and exists(folder) and names(folder):
            raise StoreExistsError(
                f"expected the partial results of this call, or nothing, at {folder}; received something else: choose "
                "another folder"
            )
        if settings is not None and settings["digest"] != self._digest:
            raise StoreExistsError(
                f"expected the partial results of this call at {folder}; received those of another call (other rows, "
                "curvature or settings): choose another folder, or remove it"
            )
        self.queries = None if settings is None else settings.get("queries")

    def begin(self, queries: int | None = None) -> None:
        """Make the folder, for parts of ``queries`` queries at a time.

        Raises
        ------
        StoreWriteError
            If nothing can be written there.
        """
        folder = self._folder
        if folder is None:
            return
        with self._writing(folder):
            if is_local(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / _SETTINGS, json.dumps({"digest": self._digest, "queries": queries}).encode())

    def _cut(self, cutting: Cutting, kept: list[Stripe], slots: int) -> list[Stripe]:
        """Return the stripes still to work on: together one a slot, or more where each is to be kept."""
        gaps = subtract_ranges([(0, cutting.rows)], [(part.start, part.stop) for part in kept])
        left = sum(high - low for low, high in gaps)
        stripes = []
        for low, high in gaps:
            least = 1 if self._folder is None else -(-(high - low) * cutting.row_bytes // _PART_BYTES)
            stripes += cut_stripes(low, high, cutting.block_rows, max(least, round(slots * (high - low) / left)))
        return stripes

    def _kept(self, name: str) -> list[Stripe]:
        """Return the stripes that have a part, none of which overlaps another."""
        files = [] if self._folder is None else names(self._folder)
        found = [re.fullmatch(re.escape(name) + r"-(\d+)-(\d+)\.npz", file) for file in files]
        kept: list[Stripe] = []
        for stripe in sorted((Stripe(int(match[1]), int(match[2])) for match in found if match), key=_first):
            if not kept or kept[-1].stop <= stripe.start:
                kept.append(stripe)
        return kept

    def run(
        self,
        name: str,
        function: Callable[..., Part],
        cutting: Cutting,
        progress: Progress,
        *args: Any,
        slots: int,
        take: Callable[[Stripe, Part], None],
    ) -> None:
        """Run ``function`` for stripes of the rows that have no part, and give ``take`` every part, in any order."""
        kept = self._kept(name)
        for stripe in kept:
            progress.advance(stripe.stop - stripe.start)
            take(stripe, self._read(name, stripe))

        def done(stripe: Stripe, part: Part) -> None:
            self._write(name, stripe, part)
            take(stripe, part)

        run_stripes(
            function, self._cut(cutting, kept, slots), progress, *args, slots=slots, each=done, own_threads=True
        )

    def _read(self, name: str, stripe: Stripe) -> Part:
        assert self._folder is not None
        data = read_bytes(self._folder / _file(name, stripe)) or b""
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
        """Remove the parts, and the folder if nothing else is in it: the result is there."""
        if self._folder is None:
            return
        for name in names(self._folder):
            if _OWN.fullmatch(name):
                remove_tree(self._folder / name)
        remove_empty(self._folder)


def _settings(data: bytes) -> dict[str, Any] | None:
    """Return the settings of partial results; None where a file of this name is something else."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    ours = isinstance(found, dict) and isinstance(found.get("digest"), str) and found.keys() <= {"digest", "queries"}
    return found if ours else None


def _first(stripe: Stripe) -> tuple[int, int]:
    return stripe.start, -stripe.stop


def _file(name: str, stripe: Stripe) -> str:
    return f"{name}-{stripe.start}-{stripe.stop}.npz"

"""The ranges in which a store is written: which are possible, claiming one, and clearing what a crash left in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ooc_influence.errors import InputError, StoreBusyError, StoreWriteError, refused
from ooc_influence.store import disk
from ooc_influence.store.claim import Claim, claim_name
from ooc_influence.store.layout import Layout
from ooc_influence.store.place import StorePath, is_local

PATIENCE = 120.0  # seconds: a dead owner elsewhere is known by a heartbeat that stands still for 60
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 5.0  # seconds between two tries
_Claimed = TypeVar("_Claimed")


def check_range(path: StorePath, layout: Layout, start: int, stop: int | None) -> None:
    """Check that a writer may ask for rows ``start`` to ``stop``.

    Raises
    ------
    InputError
        If a store that grows is asked for a range, or a planned one for anything but whole groups.
    """
    planned, group = layout.planned_rows, layout.group_rows
    if planned is None:
        fits = start == 0 and stop is None
    else:
        fits = stop is not None and 0 <= start < stop <= planned
        fits = fits and start % group == 0 and (stop == planned or (stop or 0) % group == 0)
    if not fits:
        wanted = "no range: the store grows" if planned is None else f"whole groups of {group} of {planned} rows"
        raise InputError(f"expected a writer of {path} to ask for {wanted}; received {start} to {stop}")


def make_claim(path: StorePath, start: int = 0, stop: int | None = None, *, name: str | None = None) -> Claim:
    """Claim rows ``start`` to ``stop``, or something else by name.

    Raises
    ------
    StoreBusyError
        If another writer holds it.
    StoreWriteError
        If the store's folder cannot be written to.
    """
    try:
        return Claim(path, start, stop, name=name)
    except StoreBusyError:
        raise
    except OSError as error:
        raise StoreWriteError(refused(f"to write to {path}", error, ", or choose another path")) from error


def wait_for(claim: Callable[[], _Claimed], patience: float = PATIENCE) -> _Claimed:
    """Return what ``claim`` returns, trying again for ``patience`` seconds while another process holds it.

    Raises
    ------
    StoreBusyError
        If it is held for longer.
    """
    last, pause = time.monotonic() + patience, _FIRST_PAUSE
    while True:
        try:
            return claim()
        except StoreBusyError:
            if time.monotonic() >= last:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)


def clear_range(path: StorePath, layout: Layout, start: int, stop: int | None) -> None:
    """Delete what writes interrupted by a crash left behind in a range that the caller has claimed."""
    if not is_local(path):
        return
    own_claim = f".claim-{claim_name(start, stop)}."
    for name in ("gradients", "commits", "dropped", *layout.row_arrays):
        size = layout.chunk_rows if name == "gradients" else layout.group_rows

        def mine(file: str, size: int = size) -> bool:
            number = file.split(".")[1] if file.startswith("c.") else ""
            inside = number.isdigit() and stop is not None and start <= int(number) * size < stop
            return stop is None or inside or file.startswith(own_claim)

        disk.remove_partial_files(path / name, mine)

"""Finding rows by example id, and ids that several rows have; memory does not grow with the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store.layout import column_dtype

if TYPE_CHECKING:
    from ooc_influence.store.view import StoreView

IDS_AT_ONCE = 2**22  # hashes of ids held at a time: 32 MiB


def find_rows(store: StoreView, ids: Any) -> npt.NDArray[np.int64]:
    """Return the row number of each id, (m,) int64, -1 where none has it; see :meth:`GradientStore.find`."""
    wanted = list(ids)
    kind = store.layout.ids or "int64"
    if wanted and column_dtype(wanted) != kind:
        raise InputError(f"expected ids of type {kind}; received {column_dtype(wanted)}")
    found: dict[Any, int] = {}
    if store.layout.ids is None:
        found = {number: number for number in wanted if 0 <= number < store.n}
    else:
        looked_for = set(wanted)
        for start in range(0, store.n, store.layout.group_rows):
            stop = min(store.n, start + store.layout.group_rows)
            values = store.small("example_id", start, stop).tolist()
            for at, value in enumerate(values):
                if value in looked_for:
                    if value in found:
                        raise InputError(
                            f"expected ids that do not repeat; received {value!r} for rows {found[value]} and "
                            f"{start + at} of {store.path}: use row numbers"
                        )
                    found[value] = start + at
    return np.array([found.get(value, -1) for value in wanted], np.int64)


def repeated_ids(store: StoreView) -> Iterator[str]:
    """Yield what to say of each id that several rows have: by hash, part of the hashes at a time, then by the ids."""
    if store.layout.ids is None or store.n < 2:
        return
    passes = -(-store.n // IDS_AT_ONCE)
    for number in range(passes):
        hashes, rows = _hash_ids(store, number, passes)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        for at in same[:1000].tolist():
            pair = rows[order[at : at + 2]]
            first, second = store.ids(pair).tolist()
            if first == second:
                yield f"id {first!r} is that of rows {pair[0]} and {pair[1]}"


def _hash_ids(store: StoreView, number: int, passes: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return 64-bit hashes of the ids whose hash falls into one of the passes, and their rows."""
    hashes, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, store.n, store.layout.group_rows):
        try:
            values = store.small("example_id", start, min(store.n, start + store.layout.group_rows)).tolist()
        except Exception:  # damaged, which the check of its chunks reports
            continue
        hashed = np.array([hash(value) for value in values], np.int64)
        mine = np.flatnonzero(hashed % passes == number)
        hashes.append(hashed[mine])
        rows.append(start + mine)
    return np.concatenate(hashes), np.concatenate(rows)

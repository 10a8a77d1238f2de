"""Averages of a store's rows by a column: one row for each example that a training has seen several times.

Rows are added up in float64, those of one example in their order, so that an average depends neither on the rows that
are read together nor on chunks. Averages made before can be continued: each counts as many rows as it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, StoreNotFoundError
from ooc_influence.fingerprint import check_same
from ooc_influence.memory import BLOCK_BYTES
from ooc_influence.options import AverageOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store.encoding import parse_representation
from ooc_influence.store.gradient_store import GradientStore, as_store, check_finished
from ooc_influence.store.layout import Storage, numpy_dtype
from ooc_influence.store.paths import PathLike, StorePath, check_free, parse_path
from ooc_influence.store.reader import read_blocks
from ooc_influence.store.rewrite import create_like

COUNT = "rows"  # the column that says how many rows an average holds
_SUM_BYTES = 2 * BLOCK_BYTES  # of float64 sums at a time
_MOST = 2**16  # averages at a time, however narrow they are
Numbers = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[Any]]


@takes(AverageOptions)
def average_rows(
    store: GradientStore | PathLike,
    out: PathLike,
    *,
    by: str = "example",
    start: GradientStore | PathLike | None = None,
    **options: Unpack[AverageOptions],
) -> GradientStore:
    """Write the average of a store's live rows for each value of a column to a new store, or resume.

    The averages' ids are the column's values, in the order of their first rows. A loss is the mean of the rows' losses,
    a norm that of the averaged row as it is stored (of reduced rows, before the reduction it is not known). Column
    ``rows`` says how many rows an average holds; the others are those of its last row.

    Parameters
    ----------
    store : GradientStore or path
        (n, k), finished, of any representation but signs; such as :func:`collect` writes.
    out : path
        The store to make.
    by : str
        A column of whole numbers or strings.
    start : GradientStore or path, optional
        Averages of earlier rows, as this function makes them, to be continued: theirs come first, in their order, and
        stay dropped where they are.
    **options : AverageOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading; a row for each value. Memory holds some numbers for each row, and some 300 MiB of rows.

    Raises
    ------
    InputError
        For a store that is not finished, has no live rows or rows of signs, or without such a column.
    MismatchError
        If ``start`` has rows of something else, or ``out`` is a store of something else.
    StoreExistsError
        If something else is at ``out``.
    """
    source, path = as_store(store), parse_path(out)
    before = None if start is None else as_store(start)
    dtype = parse_representation(options["dtype"] or source.layout.dtype)
    _check(source, before, by, dtype)
    groups = _Groups.of(source, by, before)
    columns = _last_values(source, before, groups, by)
    target = _open(source, before, path, by, {"dtype": dtype, "storage": options["storage"], "rows": len(groups.ids)})
    step = max(1, min(_MOST, _SUM_BYTES // (8 * source.k)))
    with target, Progress("average", len(groups.ids), options["progress"]) as bar:
        first = target.writer(0, target.layout.planned_rows).next_row
        bar.advance(first)
        for low in range(first, len(groups.ids), step):
            high = min(len(groups.ids), low + step)
            _append(source, before, target, groups, columns, (low, high))
            bar.advance(high - low)
    return GradientStore.open(path)


def _check(source: GradientStore, before: GradientStore | None, by: str, dtype: str) -> None:
    check_finished(source)
    if "sign" in (source.layout.dtype, dtype) or (dtype == "int8-linear" != source.layout.dtype):  # scaled by column
        raise InputError(
            f"expected rows and averages of numbers; received {source.path} of {source.layout.dtype}, to be averaged "
            f"as {dtype}: average numbers, such as float16, and rewrite the averages (rewrite_store)"
        )
    columns = source.layout.columns
    if columns.get(by) not in ("int64", "str"):
        known = ", ".join(name for name, kind in columns.items() if kind in ("int64", "str")) or "none"
        raise InputError(f"expected a column of whole numbers or strings of {source.path}: {known}; received {by!r}")
    if COUNT in columns:
        raise InputError(
            f"expected single rows without a column {COUNT!r}; received {source.path}, which has one: averages are "
            "continued as start="
        )
    if before is None:
        return
    if "averaged" not in before.attrs:
        raise InputError(f"expected averages to continue, of average_rows; received {before.path}, whose rows are none")
    check_finished(before)
    expected = {
        "mask and basis": source.columns_digest, "by": by, "ids": columns[by], "columns": _columns(source, by),
        "loss_kind": source.attrs.get("loss_kind"),
    }  # fmt: skip
    received = {
        "mask and basis": before.columns_digest, "by": before.attrs["averaged"].get("by"), "ids": before.layout.ids,
        "columns": before.layout.columns, "loss_kind": before.attrs.get("loss_kind"),
    }  # fmt: skip
    check_same(source.path, expected, received, "continue averages of the same rows", other=before.path)


def _columns(source: GradientStore, by: str) -> dict[str, str]:
    """Return the columns of averages."""
    return {name: kind for name, kind in source.layout.columns.items() if name != by} | {COUNT: "int64"}


@dataclass(frozen=True, eq=False)
class _Groups:
    """Which rows belong to which average.

    Attributes
    ----------
    ids : (G,)
        The averages' ids.
    order : (m,) int64
        Numbers of the live rows, those of an average together and in their order.
    starts : (G + 1,) int64
        Where the rows of each average are in ``order``.
    """

    ids: npt.NDArray[Any]
    order: Numbers
    starts: Numbers

    @classmethod
    def of(cls, source: GradientStore, by: str, before: GradientStore | None) -> Self:
        """Group the live rows of a store."""
        values = source.column(by)
        live = np.flatnonzero(~source.dropped) if source.has_dropped else np.arange(source.n)
        if not len(live):
            raise InputError(f"expected live rows to average; received {source.path}, whose rows are all dropped")
        earlier = values[:0] if before is None else before.ids()
        names, first, codes = np.unique(np.concatenate([earlier, values[live]]), return_index=True, return_inverse=True)
        appearance = np.argsort(first)  # earlier ids first, in their order, as they do not repeat
        index = np.empty(len(names), np.int64)
        index[appearance] = np.arange(len(names))
        groups = index[codes[len(earlier) :]]
        starts = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.bincount(groups, minlength=len(names)), out=starts[1:])
        return cls(names[appearance], live[np.argsort(groups, kind="stable")], starts)

    def rows(self, low: int, high: int) -> tuple[Numbers, Numbers]:
        """Return the rows of some averages in rising order, and which of these averages each belongs to."""
        numbers = self.order[self.starts[low] : self.starts[high]]
        codes = np.repeat(np.arange(high - low), np.diff(self.starts[low : high + 1]))
        rising = np.argsort(numbers)
        return numbers[rising], codes[rising]

    def counts(self, low: int, high: int) -> Numbers:
        """Return how many rows some averages have, (high - low,)."""
        return np.diff(self.starts[low : high + 1])

    def last_rows(self) -> Numbers:
        """Return the number of each average's last row, (G,), -1 where it has none."""
        return np.where(np.diff(self.starts) > 0, self.order[np.maximum(self.starts[1:] - 1, 0)], -1)


def _open(
    source: GradientStore, before: GradientStore | None, path: StorePath, by: str, made: dict[str, Any]
) -> GradientStore:
    """Open the store of an earlier run, or make an empty one."""
    averaged = {
        "by": by, "source": source.identity, "digest": source.rows_digest(),
        "start": None if before is None else [before.identity, before.rows_digest()],
    }  # fmt: skip
    try:
        target = GradientStore.open(path, "a")
    except StoreNotFoundError:
        check_free(path, "a store or nothing")
        return create_like(
            source, path, [str(source.path)], dtype=made["dtype"], planned_rows=made["rows"],
            storage=made["storage"] or Storage(codec=source.layout.codec), ids=source.layout.columns[by],
            columns=_columns(source, by), attributes={"averaged": averaged},
        )  # fmt: skip
    expected = {"averaged": target.attrs.get("averaged"), "dtype": target.layout.dtype}
    received = {"averaged": averaged, "dtype": made["dtype"]}
    check_same(f"the store at {path}", expected, received, "average to another path, or remove the store")
    return target


def _append(
    source: GradientStore, before: GradientStore | None, target: GradientStore, groups: _Groups, columns: Columns,
    part: tuple[int, int],
) -> None:  # fmt: skip
    """Append averages ``part[0]`` to ``part[1]``, with their columns among those of all."""
    low, high = part
    continued = 0 if before is None else max(0, min(high, before.n) - low)  # averages that are continued
    counts, added = np.zeros(high - low, np.int64), groups.counts(low, high)
    sums, losses = np.zeros((high - low, source.k)), np.zeros(high - low)
    dropped = np.zeros(high - low, bool)
    if before is not None and continued:
        earlier = slice(low, low + continued)
        counts[:continued] = before.read(f"columns/{COUNT}", earlier)
        losses[:continued] = counts[:continued] * before.read("loss", earlier).astype(np.float64)
        dropped[:continued] = before.read("dropped", earlier)
        size = max(1, BLOCK_BYTES // (4 * source.k))
        for first, last in pairwise([*range(low, low + continued, size), low + continued]):
            inside = slice(first - low, last - low)
            np.multiply(before.rows(first, last), counts[inside, None], out=sums[inside])
    for codes, rows, values in _blocks(source, *groups.rows(low, high)):
        for code, row in zip(codes.tolist(), rows, strict=True):
            sums[code] += row
        np.add.at(losses, codes, values.astype(np.float64))
    total = counts + added
    sums /= total[:, None]
    values_of = {name: values[low:high] for name, values in columns.items()} | {COUNT: total}
    target.append(sums, loss=losses / total, ids=groups.ids[low:high], columns=values_of, dropped=dropped)


def _blocks(source: GradientStore, numbers: Numbers, codes: Numbers) -> Iterator[tuple[Numbers, Any, Any]]:
    """Yield rows by their numbers, with their losses and the averages that they belong to."""
    size = max(1, BLOCK_BYTES // (4 * source.k))
    for block in read_blocks(source, 0, len(numbers), size, numbers=numbers, loss=True):
        yield codes[block.start : block.stop], block.gradients, block.loss


def _last_values(source: GradientStore, before: GradientStore | None, groups: _Groups, by: str) -> Columns:
    """Return the columns of all averages but their counts, (G,) each: the values of their last rows."""
    last = groups.last_rows()
    new, columns = np.flatnonzero(last >= 0), {}
    for name, kind in _columns(source, by).items():
        if name == COUNT:
            continue
        columns[name] = np.empty(len(last), numpy_dtype(kind))
        if before is not None:
            columns[name][: before.n] = before.column(name)
        columns[name][new] = source.column(name)[last[new]]
    return columns

"""Which rows a curvature is made of, and what has changed in them since: nothing, rows to add or subtract, or too much.

A curvature records the commit records of the chunks its rows are stored in and which of its rows were dropped. Rows
that are still there under their record are the same rows; a chunk that was part-filled and has grown is recognised by
the checksum of its first rows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.eigen import DEFAULT_DAMPING, write_long
from ooc_influence.errors import InputError
from ooc_influence.fingerprint import array_digest
from ooc_influence.linalg import Matrix, Numbers, Range, WeightedRows, parse_weighting
from ooc_influence.options import RowOptions, complete
from ooc_influence.store import GradientStore, parse_numbers


def choose_rows(store: GradientStore, options: RowOptions | None = None) -> WeightedRows:
    """Return the rows a call means; see :func:`fit_fisher`.

    Raises
    ------
    InputError
        For rows that are not there, a sample larger than the live rows, or weights that are none.
    """
    asked = complete(RowOptions, options or {})
    first, count, numbers, selection = _parse_rows(asked["rows"], store.n)
    chosen = WeightedRows(store, first, count, numbers, selection=selection).with_tombstones()
    if asked["sample"] is not None:
        chosen = _draw(chosen, asked["sample"], asked["seed"])
    weights = asked["weights"]
    if weights is None or isinstance(weights, str):
        attributes = dict(store.attrs) | ({"loss_kind": "cross_entropy"} if asked["force_weights"] else {})
        return replace(chosen, weighting=parse_weighting(weights, attributes))
    inside = slice(chosen.first, chosen.first + chosen.count) if chosen.numbers is None else chosen.numbers
    return replace(chosen, weights=_parse_weights(weights, store.n)[inside])


def _parse_rows(rows: Any, n: int) -> tuple[int, int, Numbers | None, dict[str, Any]]:
    if isinstance(rows, tuple) and len(rows) == 2:
        rows = slice(*rows)
    if isinstance(rows, range):
        rows = slice(rows.start, rows.stop) if rows.step == 1 else np.array(rows)
    if rows is None or isinstance(rows, slice):
        return _parse_range(slice(None) if rows is None else rows, n)
    numbers = parse_numbers(rows, n).astype(np.int64)
    if not numbers.size:
        raise InputError("expected rows to fit; received none")
    return 0, len(numbers), numbers, {"kind": "numbers", "digest": array_digest(numbers)}


def _parse_range(rows: slice, n: int) -> tuple[int, int, None, dict[str, Any]]:
    try:
        start = 0 if rows.start is None else operator.index(rows.start)
        stop = n if rows.stop is None else operator.index(rows.stop)
        step = 1 if rows.step is None else operator.index(rows.step)
    except TypeError as error:
        raise InputError(f"expected a range of row numbers; received {rows}") from error
    if not 0 <= start < stop <= n or step != 1:
        raise InputError(f"expected rows A:B with 0 <= A < B <= {n} (n); received {rows.start}:{rows.stop}")
    return start, stop - start, None, {"kind": "range", "start": start, "stop": None if rows.stop is None else stop}


def _draw(chosen: WeightedRows, sample: int, seed: int) -> WeightedRows:
    """Draw live rows at random, without replacement."""
    live = None if chosen.tombstones is None else np.flatnonzero(~chosen.tombstones)
    population = chosen.count if live is None else len(live)
    if isinstance(sample, bool) or not isinstance(sample, (int, np.integer)) or not 2 <= sample <= population:
        raise InputError(f"expected a sample of 2 to {population} rows, the live ones; received {sample!r}")
    drawn = np.sort(np.random.default_rng(seed).choice(population, sample, replace=False, shuffle=False))
    selection = {
        "kind": "sample", "sample": int(sample), "seed": int(seed), "population": population,
        "rows": chosen.store.n, "of": chosen.selection,
    }  # fmt: skip
    return replace(chosen.at(drawn if live is None else live[drawn]), selection=selection)


def _parse_weights(weights: Any, n: int) -> Matrix:
    try:
        values = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected weights 'ggn', 'trak', none or numbers; received {weights!r:.40}") from error
    if values.shape != (n,):
        raise InputError(f"expected a weight for each of the {n} rows; received shape {values.shape}")
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        wrong = values[~(np.isfinite(values) & (values >= 0))]
        received = f"{len(wrong)} others, such as {wrong[0]}" if len(wrong) else "zeros only"
        raise InputError(f"expected weights that are finite, not negative and not all zero; received {received}")
    return values


class Staleness(NamedTuple):
    """How the rows of a fit have changed since.

    Attributes
    ----------
    added : (first, last) or None
        Indices of new rows, behind the old ones.
    removed : (m,) int64
        Indices of rows dropped since.
    refit : str
        Why the old sum is of no use any more; empty where it is.
    """

    added: Range | None = None
    removed: Numbers = np.empty(0, np.int64)
    refit: str = ""

    @property
    def is_fresh(self) -> bool:
        """Whether the rows are the same as at the fit."""
        return self.added is None and not len(self.removed) and not self.refit


@dataclass(frozen=True, eq=False)
class FittedRows:
    """What a curvature records of its rows.

    Attributes
    ----------
    first, count : int
        Row of index 0 where they are a range, and how many they are.
    numbers : (count,) int64 or None
        Their numbers; None for a range.
    selection : mapping
        How they were chosen.
    records : (chunks,) uint64
        The store's commit records at the fit.
    dropped : (count,) bool
        Which of them were dropped.
    column_scale : (k,) float64 or None
        What their columns were divided by.
    """

    first: int
    count: int
    numbers: Numbers | None
    selection: Mapping[str, Any]
    records: npt.NDArray[np.uint64]
    dropped: npt.NDArray[np.bool_]
    column_scale: Matrix | None = None

    @classmethod
    def of(cls, chosen: WeightedRows) -> FittedRows:
        """Return what is to be recorded of rows as they are now."""
        records = chosen.store.records[: -(-chosen.store.n // chosen.store.layout.chunk_rows)].copy()
        scale = None if chosen.whitening is None else chosen.whitening.scale
        return cls(chosen.first, chosen.count, chosen.numbers, chosen.selection, records, chosen.dropped(), scale)

    @classmethod
    def load(cls, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> FittedRows:
        """Return what :meth:`facts` and :meth:`arrays` described."""
        first, count = int(facts["first"]), int(facts["count"])
        dropped = np.unpackbits(arrays["dropped"], count=count).astype(np.bool_)
        return cls(first, count, arrays.get("numbers"), facts["selection"], arrays["records"], dropped)

    def facts(self) -> dict[str, Any]:
        """Return what goes into a curvature's attributes."""
        return {"first": self.first, "count": self.count, "selection": dict(self.selection)}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what goes into a curvature's arrays."""
        arrays = {"numbers": self.numbers, "column_scale": self.column_scale}
        more = {name: values for name, values in arrays.items() if values is not None}
        return {"records": self.records, "dropped": np.packbits(self.dropped), **more}

    def write(self, group: Any) -> None:
        """Write :meth:`arrays` into a curvature's group."""
        for name, values in self.arrays().items():
            write_long(group, name, values)

    @property
    def live(self) -> int:
        """Rows that were not dropped."""
        return self.count - int(self.dropped.sum())

    def staleness(self, store: GradientStore, chosen: WeightedRows | None = None) -> Staleness:
        """Return how the rows have changed in the store they came from.

        ``chosen`` are those of a new fit with the same selection: then the answer is about these, as they were chosen.
        """
        last = self.first + self.count if self.numbers is None else int(self.numbers[-1]) + 1
        n = store.n if chosen is None or chosen.numbers is not None else chosen.first + chosen.count
        if n < last:
            return Staleness(refit="rows are gone")
        then = WeightedRows(store, self.first, self.count, self.numbers)
        if not store.holds(self.records, then.chunks().tolist()):
            return Staleness(refit="rows were written again")
        now = then.dropped_now() if chosen is None else chosen.dropped()[: self.count]
        if (self.dropped & ~now).any():
            return Staleness(refit="rows that were dropped are back")
        removed = np.flatnonzero(now & ~self.dropped)
        drawn_from = self.selection.get("of")
        open_ended = (drawn_from or self.selection).get("stop", 0) is None
        grown = open_ended and n > (last if drawn_from is None else int(self.selection["rows"]))
        if drawn_from is not None and (grown or len(removed)):
            return Staleness(refit="another sample is drawn")
        return Staleness((self.count, n - self.first) if grown else None, removed)


def fit_attributes(chosen: WeightedRows, record: FittedRows, rows: int, trace: float) -> dict[str, Any]:
    """Return what a curvature's attributes say of the rows that it was fitted on, ``rows`` of them live."""
    store, prior = chosen.store, {}
    if chosen.whitening is not None:
        prior = {"prior": dict(chosen.whitening.facts), "damping": chosen.whitening.facts["shrinkage"]}
    return (
        {
            "mask_digest": store.columns_digest,
            "model": store.model_fingerprint,
            "store_id": store.identity,
            "store_rows": store.n,
            "rows_digest": chosen.rows_digest,
            "rows": rows,
            "d": store.k,
            "trace": trace,
            "damping": DEFAULT_DAMPING,
            "weights": chosen.record(),
        }
        | record.facts()
        | prior
    )

"""One fit of a Fisher matrix: what it sums, from scratch or from an old sum on, and what it writes down."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.changes import Change, RowRecord
from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.rows import ChosenRows
from ooc_influence.curvature.saved import write_long
from ooc_influence.curvature.spectral import SummedCurvature
from ooc_influence.curvature.sums import Summing, Sums, sum_rows
from ooc_influence.curvature.target import fit_attributes
from ooc_influence.curvature.unfinished import Unfinished
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.progress import Progress
from ooc_influence.store import StorePath

logger = logging.getLogger("ooc_influence")
_MOST_DROPPED = 0.5  # of the trace: beyond it, differences would lose digits


@dataclass
class Fitting:
    """A fit that is going on.

    Attributes
    ----------
    target : StorePath
        Where the curvature will be.
    chosen : ChosenRows
        The rows.
    how : Summing
        How they are summed.
    slots : int
        Tasks at once.
    progress : bool or None
        Show progress lines.
    kept : Unfinished
        Partial results.
    old : Curvature or None
        An earlier fit of the same kind, whose rows are still there.
    change : Change or None
        What became of them.
    """

    target: StorePath
    chosen: ChosenRows
    how: Summing
    slots: int
    progress: bool | None
    kept: Unfinished
    old: Curvature | None
    change: Change | None

    def __post_init__(self) -> None:
        self.record = RowRecord.of(self.chosen)

    @property
    def base(self) -> SummedCurvature | None:
        """The earlier fit, where it keeps the sums F is made of."""
        return self.old if isinstance(self.old, SummedCurvature) and self.old.keeps_sums else None

    @cached_property
    def gone(self) -> ChosenRows | None:
        """Rows of the earlier sum that are dropped now."""
        if self.base is None or self.change is None or not len(self.change.removed):
            return None
        return replace(self.chosen.at(self.change.removed), dropped_too=True)

    def taken(self, trace: float) -> float | None:
        """Return the trace taken from the earlier sum so far, ``trace`` included; None where that is too much."""
        assert self.base is not None
        total = float(self.base.attrs.get("taken", 0.0)) + trace
        if total <= _MOST_DROPPED * self.base.trace * self.base.rows:
            return total
        logger.warning("rows with more than half of the trace of %s are dropped: fitting again", self.base.path)
        return None

    def sums(self) -> tuple[Sums, float]:
        """Return the undamped sums, and the trace taken from them so far."""
        found = None if self.base is None else self._updated(self.base)
        if found is None:
            with Progress("fisher", self.chosen.count, self.progress) as bar:
                found = sum_rows(self.chosen, self.how, self.slots, bar, [(0, self.chosen.count)], self.kept), 0.0
        return found

    def _updated(self, base: SummedCurvature) -> tuple[Sums, float] | None:
        """Return an old curvature's sums with rows added and subtracted; None where too much is gone."""
        removed, taken = None, float(base.attrs.get("taken", 0.0))
        added = None if self.change is None else self.change.added
        if self.gone is not None:
            plain = replace(self.how, fourth=False, folder=None)
            with Progress("fisher: dropped rows", self.gone.count, self.progress) as bar:
                removed = sum_rows(self.gone, plain, self.slots, bar, [(0, self.gone.count)])
            now = self.taken(removed.trace())
            if now is None:
                return None
            taken = now
        if added is None:
            total = base.sums()
        else:
            with Progress("fisher: new rows", added[1] - added[0], self.progress) as bar:
                total = sum_rows(self.chosen, self.how, self.slots, bar, [added], self.kept)
            base.add_sums_to(total)
        if removed is not None:
            for square, part in zip(total.squares, removed.squares, strict=True):
                square -= part
            total.live, total.clipped = total.live - removed.live, total.clipped - removed.clipped
        return total, taken

    def check(self, live: int, trace: float) -> None:
        """Check that there are live rows and that their sum is finite.

        Raises
        ------
        InputError, NonFiniteError
            If not.
        """
        if not live:
            raise InputError(
                f"expected a store with live rows; received {self.chosen.store.path} whose rows are all dropped"
            )
        if not np.isfinite(trace):
            raise NonFiniteError(
                "expected a finite Fisher matrix; received NaN or Inf: gradients beyond 1e18 overflow, scale the loss",
                [],
            )

    def attributes(self, live: int, clipped: int, trace: float, taken: float) -> dict[str, Any]:
        """Return what is written down about an undamped sum over ``live`` rows, whose trace is ``trace``."""
        self.check(live, trace)
        if clipped:
            logger.info("%d rows have a loss below the floor of their weights", clipped)
        found = fit_attributes(self.chosen, live, trace / live) | self.record.facts()
        return found | {"ranges": [list(part) for part in self.how.blocks], "clipped": clipped, "taken": taken}

    def write_record(self, group: Any) -> None:
        """Write what a curvature remembers of its rows into its group."""
        for name, values in self.record.arrays().items():
            write_long(group, name, values)


def squared_norm(square: npt.NDArray[np.float64]) -> float:
    """Return the squared Frobenius norm of a symmetric matrix: its upper triangle is given, or its diagonal (d,)."""
    if square.ndim == 1:
        return float(np.vdot(square, square))
    upper = np.triu(square)
    return 2 * float(np.vdot(upper, upper)) - float(np.square(np.diagonal(square)).sum())

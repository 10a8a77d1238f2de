"""Reduction in the masked space: a wide mask of k' entries, turned into the top r eigenvectors of its Fisher matrix.

With V (k', r) the top eigenvectors of F = (1/m) Σ w_i g_i g_iᵀ over pilot rows, a masked row g is stored as g V: r
numbers, in which F is nearly diagonal and the part of the spectrum left out is known.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np

from ooc_influence.compress.passes import mean_squares
from ooc_influence.errors import InputError
from ooc_influence.linalg import WeightedRows, parse_weighting, top_spectrum
from ooc_influence.store import GradientStore, StoredReduction

logger = logging.getLogger("ooc_influence")
PILOT_ROWS = 4  # pilot rows for each number kept, by default; more keep more of the other rows
ALL_ROWS, ROWS_FOR_EACH = 131_072, 64  # of a store that is there already, by default: they cost no gradients


@dataclass(frozen=True)
class Eigenbasis:
    """Reduce masked gradients to the top of their eigenbasis.

    Parameters
    ----------
    r : int
        Numbers stored a row.
    pilot : int, optional
        Rows the basis is made from; by default four times ``r``. All rows of the data, where it has fewer.
    weights : {"ggn", "trak"}, optional
        Weights of the pilot rows (:mod:`ooc_influence.linalg.weights`), for one-label cross-entropy.

    Raises
    ------
    InputError
        For an r below 1, fewer pilot rows than r, or an unknown weighting.
    """

    r: int = 1024
    pilot: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("r", "pilot"):
            value = getattr(self, name)
            if name == "pilot" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"expected a whole number {name} >= 1; received {value!r}")
            object.__setattr__(self, name, int(value))
        if self.pilot is not None and self.pilot < self.r:
            raise InputError(f"expected at least r = {self.r} pilot rows; received {self.pilot}")
        if self.weights not in (None, "ggn", "trak"):
            raise InputError(f"expected weights 'ggn', 'trak' or none; received {self.weights!r}")

    @property
    def pilot_rows(self) -> int:
        """Rows the basis is made from."""
        return PILOT_ROWS * self.r if self.pilot is None else self.pilot

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the settings that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described others.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"expected the settings of an eigenbasis; received {values!r}") from error


def fit_eigenbasis(
    store: GradientStore,
    r: int,
    *,
    rows: int | None = None,
    weights: str | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> StoredReduction:
    """Return the top-r eigenbasis of a store's live rows.

    Parameters
    ----------
    store : GradientStore
        Wide rows, (n, k').
    r : int
        Directions to keep.
    rows : int, optional
        Use so many rows, taken evenly over the store; default all.
    weights : {"ggn", "trak"}, optional
        Row weights.
    workers, memory, progress
        As for :func:`fit_fisher`.

    Raises
    ------
    InputError, MemoryBudgetError, NonFiniteError
        See :func:`ooc_influence.linalg.spectrum.top_spectrum`.
    """
    weighting = parse_weighting(weights, store.attrs)
    chosen = WeightedRows(store, even_ranges(store.n, rows), weighting)
    found = top_spectrum(chosen, r, workers=workers, memory=memory, progress=progress)
    mean_square = found.eigenvalues
    if weighting is not None:
        mean_square = mean_squares(
            replace(chosen, weights=None), found.vectors, workers=workers, memory=memory, progress=progress
        )
    left_out = max(0.0, 1 - float(found.eigenvalues.sum()) / found.trace) if found.trace > 0 else 0.0
    facts = {
        "trace": found.trace,
        "left_out": left_out,
        "weights": weights,
        "pilot_rows": found.rows,
        "clipped_losses": chosen.clipped(),
    }
    logger.info(
        "eigenbasis of %d rows: %d of %d directions leave out %.2g of the trace", found.rows, r, store.k, left_out
    )
    return StoredReduction(found.vectors, found.eigenvalues, mean_square, facts)


def even_ranges(n: int, rows: int | None) -> list[tuple[int, int]]:
    """Return row ranges, spread evenly over ``n``, that hold ``rows`` in all (default all).

    About 64 of them, or of 64 rows each: neighbours are read together, but are often alike.
    """
    if rows is None or rows >= n:
        return [(0, n)]
    runs = -(-rows // min(64, max(1, rows // 64)))
    edges = [rows * number // runs for number in range(runs + 1)]
    gaps = [(n - rows) * number // max(1, runs - 1) for number in range(runs)]
    return [(low + gap, high + gap) for (low, high), gap in zip(pairwise(edges), gaps, strict=True)]

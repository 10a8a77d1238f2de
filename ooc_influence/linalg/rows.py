"""Row weights of a curvature: F_w = (1/m) Σ w_i g_i g_iᵀ.

The empirical Fisher matrix counts a row the less the better the model fits it. For cross-entropy over one label,
ℓ = −log p, weights bring it to other matrices, from what is stored:

- ``"ggn"``: w = p/(1−p) = 1/expm1(ℓ): the generalised Gauss-Newton matrix of "this label or another", Σ p(1−p) ∇m ∇mᵀ
  with the margin m = log p/(1−p), since g = −(1−p) ∇m;
- ``"trak"``: w = 1/(1−p)² = 1/expm1(−ℓ)², the Gram matrix of margins (Park et al. 2023, arXiv 2303.14186).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.options import Weighting
from ooc_influence.store import GradientStore, read_into

LOSS_FLOOR = 1e-6  # smaller losses count as this one: their weights would rest on a loss's last bits
ONE_LABEL = "cross_entropy"  # the loss_kind the formulas hold for


def parse_weighting(weights: str | None, attributes: Mapping[str, Any]) -> Weighting | None:
    """Return the weighting, checked against the loss a store's rows were made with.

    Raises
    ------
    InputError
        For an unknown weighting, or a loss it does not hold for.
    """
    if weights is None:
        return None
    if weights not in ("ggn", "trak"):
        raise InputError(f"expected weights 'ggn', 'trak' or none; received {weights!r}")
    check_one_label(attributes, f"weights={weights!r}")
    return weights  # type: ignore[return-value]


def check_one_label(attributes: Mapping[str, Any], asked: str, where: str = "") -> None:
    """Check that rows were made with the loss that the formulas hold for; ``where``: said of what was received.

    Raises
    ------
    InputError
        If they were not.
    """
    kind = attributes.get("loss_kind")
    if kind != ONE_LABEL:
        raise InputError(
            f"expected rows of loss_kind {ONE_LABEL!r} for {asked}; received {kind!r}{where}: give loss_kind when "
            "extracting, if the loss is one-label cross-entropy"
        )


def row_weights(losses: npt.NDArray[Any], weights: Weighting | None) -> npt.NDArray[np.float64]:
    """Return the weight of each row, (m,) float64, from its loss."""
    if weights is None:
        return np.ones(len(losses))
    held = np.maximum(np.asarray(losses, np.float64), LOSS_FLOOR)
    with np.errstate(over="ignore"):  # a loss beyond 700 has weight 0
        return np.asarray(1 / np.expm1(held) if weights == "ggn" else 1 / np.expm1(-held) ** 2)


def row_errors(losses: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return 1 − p of each row's label, (m,) float64, from its cross-entropy."""
    return np.asarray(-np.expm1(-np.maximum(np.asarray(losses, np.float64), LOSS_FLOOR)))


def clipped_rows(losses: npt.NDArray[Any], weights: Weighting | None) -> int:
    """Return how many losses lie below :data:`LOSS_FLOOR`, where that matters."""
    return 0 if weights is None else int((np.asarray(losses) < LOSS_FLOOR).sum())


Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Some rows of a store, numbered from 0, each times √w; zero where dropped.

    Attributes
    ----------
    store : GradientStore
        The store.
    ranges : sequence of (start, stop)
        The rows, ascending.
    weights : {"ggn", "trak"} or None
        Their weights.
    tombstones : (m,) bool or None
        Which of them are dropped: looked at once, so that every pass over them multiplies the same rows.
    """

    store: GradientStore
    ranges: Sequence[tuple[int, int]]
    weights: Weighting | None = None
    tombstones: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.tombstones is None and self.store.has_dropped and self.m:
            found = np.concatenate([self.store.small("dropped", *part) for part in self._pieces()])
            object.__setattr__(self, "tombstones", found)

    @property
    def path(self) -> object:
        """Where the store is: tasks of other processes must be able to see it."""
        return self.store.path

    @property
    def m(self) -> int:
        """Rows, dropped ones included."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def live(self) -> int:
        """Rows that are not dropped."""
        return self.m - (0 if self.tombstones is None else int(self.tombstones.sum()))

    def clipped(self) -> int:
        """Return how many live rows' losses are so small that their weights are clipped."""
        if self.weights is None:
            return 0
        total = first = 0
        for start, stop in self._pieces():
            losses, last = self.store.small("loss", start, stop), first + stop - start
            if self.tombstones is not None:
                losses = losses[~self.tombstones[first:last]]
            total, first = total + clipped_rows(losses, self.weights), last
        return total

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges in pieces whose small values take little memory."""
        size = self.store.layout.group_rows
        for start, stop in self.ranges:
            for low in range(start, stop, size):
                yield low, min(stop, low + size)

    def buffer(self, rows: int) -> Rows:
        """Return room for blocks of at most ``rows`` rows, (rows, k)."""
        return np.empty((min(rows, max(1, self.m)), self.store.k), np.float32)

    def read(self, low: int, high: int, out: Rows) -> Rows:
        """Return rows ``low`` to ``high`` times √w, zero where dropped, as the first rows of ``out``."""
        first, done = 0, 0
        for start, stop in self.ranges:
            a, b = start + max(0, low - first), min(stop, start + high - first)
            first += stop - start
            if a >= b:
                continue
            part = out[done : done + b - a]
            done += b - a
            read_into(self.store, a, b, part)
            if self.weights is not None:
                part *= np.sqrt(row_weights(self.store.small("loss", a, b), self.weights))[:, None].astype(np.float32)
        if self.tombstones is not None:
            out[:done][self.tombstones[low : low + done]] = 0
        return out[:done]

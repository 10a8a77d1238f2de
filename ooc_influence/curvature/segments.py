"""Diagonal curvatures of a training's mean loss, by which later gradients follow the weights; one for each segment.

SOURCE (Bae et al., arXiv 2405.12186) takes a training's curvature as constant within each of a few segments of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store import GradientStore, check_second_moments, read_blocks

_BLOCK_BYTES = 2**25  # of float32 rows at a time

Diagonals = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """The curvature of each segment of a training.

    Attributes
    ----------
    first : (L,) int64
        The step that each begins with, rising.
    diagonals : (L, k) float64
        The derivative of the mean loss's gradient with respect to the weight, entry by entry.
    """

    first: Steps
    diagonals: Diagonals

    def at(self, step: int) -> Diagonals:
        """Return the curvature at a step, (k,)."""
        return self.diagonals[_segment(self.first, np.int64(step))]


def fit_segments(store: GradientStore, steps: Steps, between: str | None, segments: int) -> Segments | None:
    """Return the curvatures that gradients follow the weights by; None where they are held.

    Parameters
    ----------
    store : GradientStore
        Rows (n, k) of a training, with the column ``step``.
    steps : (m,) int64
        The steps of the optimiser, rising.
    between : {"diagonal", "kronecker"}, optional
        Of which kind they are: the mean squares of the entries of a segment's rows, or Λ of the rows' Kronecker basis.
    segments : int
        L; each has as many steps as the others, within one.

    Raises
    ------
    InputError
        For a kind that the store does not have, or a segment without rows.
    """
    if segments < 1 or segments > len(steps):
        raise InputError(f"expected segments from 1 to {len(steps)}, the steps of the optimiser; received {segments}")
    if segments > 1 and between != "diagonal":
        raise InputError(
            f"expected between='diagonal' for segments={segments}, each with the mean squares of its own rows; "
            f"received between={between!r}: rows in a Kronecker basis take 'diagonal' too"
        )
    if between is None:
        return None
    if store.is_reduced:
        raise InputError(
            f"expected rows that are not reduced for between={between!r}; received {store.path}: leave it out"
        )
    if between == "kronecker":
        return Segments(steps[:1], _kronecker(store)[None])
    if between != "diagonal":
        raise InputError(f"expected between 'diagonal', 'kronecker' or None; received {between!r}")
    check_second_moments(store)
    first = steps[[part[0] for part in np.array_split(np.arange(len(steps)), segments)]]
    return Segments(first, _mean_squares(store, first))


def _segment(first: Steps, steps: npt.NDArray[np.int64] | np.int64) -> npt.NDArray[np.intp]:
    """Return the number of the segment that each step is in; what is before the first is in it."""
    return np.maximum(np.searchsorted(first, steps, side="right") - 1, 0)


def _kronecker(store: GradientStore) -> Diagonals:
    if not store.mask.has_basis:
        raise InputError(
            f"expected rows in a Kronecker basis for between='kronecker'; received {store.path}, in the "
            "parameters' own: use between='diagonal'"
        )
    return np.concatenate([each.basis.second_moment for each in store.mask.modules if each.basis is not None])


def _mean_squares(store: GradientStore, first: Steps) -> Diagonals:
    """Return the mean squares of the entries of each segment's live rows, (L, k), in one pass."""
    total, rows = np.zeros((len(first), store.k)), np.zeros(len(first))
    for block in read_blocks(store, 0, store.n, max(1, _BLOCK_BYTES // (8 * store.k))):
        inside = _segment(first, store.small("columns/step", block.start, block.stop))
        if block.dropped is not None:
            inside = np.where(block.dropped, -1, inside)
        for number in np.unique(inside[inside >= 0]):
            part = block.gradients if (inside == number).all() else block.gradients[inside == number]
            total[number] += np.einsum("nk,nk->k", part, part, dtype=np.float64)
            rows[number] += len(part)
    if not rows.all():
        raise InputError(
            f"expected rows in each of {len(first)} segments of {store.path}; received none from step "
            f"{first[int(np.argmin(rows))]} on: take fewer segments, or collect more often (every=)"
        )
    weights = np.concatenate([module.weight for module in store.mask.modules]).astype(np.float64)
    return np.asarray(total / rows[:, None] / np.where(weights > 0, weights, 1) ** 2)

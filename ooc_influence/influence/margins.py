"""Checkpoints combined by margins rather than by losses.

For cross-entropy over one label, g = −(1 − p) ∇m with the margin m = log p/(1 − p): checkpoint c's score is
(1 − p_q)(1 − p_i) s_c(q, i) with s_c = ∇m_qᵀ (F + λI)⁻¹ ∇m_i. A mean of scores lets the models that fail on a query
speak for it, and counts a row by the models that have not seen it, as those that have make next to no error there.

    query-margins   score(q, i) = mean_c(1 − p_q) · mean_c (1 − p_i) s_c(q, i)
    margins         score(q, i) = mean_c(1 − p_q) · mean_c(1 − p_i) · mean_c s_c(q, i)

The first gives every model the same say on a query: it measures margins. The second averages the rows' errors by
themselves, too, as TRAK does (Park et al. 2023, arXiv 2303.14186, section 3.2). mean_c(1 − p_q) only brings scores back
to the unit of the loss; for one checkpoint both are the plain score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.influence.checkpoints import Checkpoint
from ooc_influence.linalg import check_one_label, row_errors
from ooc_influence.store import GradientStore

Combine = Literal["mean", "query-margins", "margins"]
WAYS: tuple[Combine, ...] = get_args(Combine)


def parse_combine(combine: str, checkpoints: Sequence[Checkpoint], normalize: str | None) -> Combine:
    """Return how checkpoints are combined, checked against their losses and the scores' unit.

    Raises
    ------
    InputError
        For another name, a loss that has no margin, or a unit in which errors cancel.
    """
    found = next((way for way in WAYS if way == combine), None)
    if found is None:
        raise InputError(f"expected combine {', '.join(map(repr, WAYS))}; received {combine!r}")
    if found == "mean":
        return found
    if normalize is not None:
        raise InputError(
            f"expected combine={combine!r} without normalize; received {normalize!r}: leave one of them out"
        )
    for store in (store for own in checkpoints for store in (own.query, own.train) if store is not None):
        check_one_label(store.attrs, f"combine={combine!r}", f" in {store.path}")
    return found


def margin_factors(stores: Sequence[GradientStore], start: int, stop: int) -> npt.NDArray[np.float64]:
    """Return what turns each checkpoint's rows ``start`` to ``stop`` to margins, times the mean error, (C, b)."""
    errors = np.stack([row_errors(store.small("loss", start, stop)) for store in stores])
    return np.asarray(errors.mean(0) / errors)

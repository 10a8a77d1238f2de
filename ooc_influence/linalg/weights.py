"""Row weights of a curvature: F_w = (1/m) Σ w_i g_i g_iᵀ.

The empirical Fisher matrix counts a row the less the better the model fits it. For cross-entropy over one label,
ℓ = −log p, weights bring it to other matrices, from what is stored:

- ``"ggn"``: w = p/(1−p) = 1/expm1(ℓ): the generalised Gauss-Newton matrix of "this label or another", Σ p(1−p) ∇m ∇mᵀ
  with the margin m = log p/(1−p), since g = −(1−p) ∇m;
- ``"trak"``: w = 1/(1−p)² = 1/expm1(−ℓ)², the Gram matrix of margins (Park et al. 2023, arXiv 2303.14186).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError

Weighting = Literal["ggn", "trak"]
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

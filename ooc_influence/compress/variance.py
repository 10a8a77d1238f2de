"""How much a random compression moves inner products: the second moments behind the bounds of docs/theory.md.

With S the compression (k × p, E[SᵀS] = I), X any matrix (n, p) with columns x_e and v any vector (p,)::

    dropout      E‖X(SᵀS − I)v‖² ≤ Σ_e ν_e v_e² ‖x_e‖²        E‖X(SᵀS − I)Xᵀ‖_F² ≤ Σ_e ν_e ‖x_e‖⁴
    projections  E‖X(SᵀS − I)v‖² ≤ (‖v‖² ‖X‖_F² + ‖Xv‖²)/k    E‖X(SᵀS − I)Xᵀ‖_F² ≤ (‖X‖_F⁴ + ‖XXᵀ‖_F²)/k

ν_e depends on how entries are drawn. Uniform, k of p without replacement: (p/k − 1) p/(p − 1), exact but for a term
that is not positive. Importance, m draws with chance q_e each: m q_e (1 − q_e)^(m−1)/π_e², π_e = 1 − (1 − q_e)^m, by
the Efron-Stein inequality. Equality holds for Gaussian projections; signs and sparse signs have less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.distribution import EntryDistribution, inclusion
from ooc_influence.compress.dropout import Dropout
from ooc_influence.errors import InputError
from ooc_influence.store import LayerShape, PilotMoments

Floats = npt.NDArray[np.float64]


def variance_factors(dropout: Dropout, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Floats:
    """Return ν_e of every entry, (p,) float64, layer by layer; O(p) time and memory.

    Parameters
    ----------
    dropout : Dropout
        Uniform or importance sampling; a reduction after it is not looked at.
    layers : sequence of LayerShape
        All tapped layers, as a store's mask has them.
    moments : sequence of PilotMoments
        For importance sampling: the pilot's, as a store's mask keeps them.

    Raises
    ------
    InputError
        For sampling on a grid, whose entries are not drawn apart, a k above p, or missing moments.
    """
    p = sum(layer.entries for layer in layers)
    if dropout.k > p or dropout.sampling == "grid" or (dropout.sampling == "importance" and not moments):
        raise InputError(
            f"expected uniform sampling of at most p = {p} entries, or importance sampling with its pilot's moments; "
            f"received sampling={dropout.sampling!r}, k={dropout.k}, {len(moments)} moments"
        )
    if dropout.k == p:
        return np.zeros(p)
    if dropout.sampling == "uniform":
        return np.full(p, (p / dropout.k - 1) * p / max(1, p - 1))
    distribution = EntryDistribution(layers, moments)
    draws = dropout.draws(distribution)
    chances = []
    for number, layer in enumerate(layers):
        rows, cols = np.divmod(np.arange(layer.entries), layer.shape[1])
        chances.append(distribution.probability(number, rows, cols))
    chance = np.concatenate(chances)
    alone = np.exp((draws - 1) * np.log1p(-chance))
    return np.asarray(draws * chance * alone / np.square(inclusion(chance, draws)))

"""Self-influence that is kept beside rows of signs: computed at extraction, while all their numbers are at hand.

Signs say little about a row's norm under a curvature. So a store of sign rows in a Kronecker basis has zᵀ (Λ + λ)⁻¹ z
of every row as columns, ``self_influence_<damping>``, at a few relative dampings: the basis's own, a tenth and ten
times of it, that of lists, and the one that rows are whitened at. Scores at one of them are divided by exact norms; at
others, norms are those of the signs, times what makes them exact at the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg.backend import Matrix
from ooc_influence.linalg.whitening import LayerMoments, basis_settings, kronecker_damping, whitening_damping
from ooc_influence.store import GradientStore, Mask

_NAME = re.compile(r"self_influence_([0-9.e+-]+)")


def kept_dampings(columns: Iterable[str]) -> dict[float, str]:
    """Return which of a store's columns keep self-influence, by damping."""
    found = (_NAME.fullmatch(name) for name in columns)
    return {float(match[1]): match[0] for match in found if match is not None}


def sign_energy(store: GradientStore, start: int, stop: int) -> npt.NDArray[np.float32] | np.float32:
    """Return the squared norms of rows over those of what their signs stand for, (b,), or one for all.

    Exact for whitened rows, from the norms that are kept at the damping they were whitened at; without them, that of
    normal numbers.
    """
    name = kept_dampings(store.layout.columns).get(float(f"{whitening_damping(store.attrs):g}"))
    if name is None:
        return np.float32(store.layout.encoding.energy)
    norms = store.small(f"columns/{name}", start, stop)
    decoded = store.layout.encoding.stored_columns * np.square(np.float64(store.small("row_scale", start, stop)))
    return np.asarray(np.divide(norms, decoded, out=np.zeros_like(norms), where=decoded > 0), np.float32)


@dataclass(frozen=True, eq=False)
class KeptNorms:
    """What is kept.

    Attributes
    ----------
    weights : dict of str to (k,) float32
        1/(Λ + λ), by the column's name.
    """

    weights: Mapping[str, npt.NDArray[np.float32]]

    @classmethod
    def of(cls, dtype: str, mask: Mask, attributes: Mapping[str, Any], *, reduced: bool) -> Self:
        """Return what is kept beside rows, given their store's attributes: of unreduced signs in a basis only."""
        if dtype != "sign" or reduced or not mask.has_basis:
            return cls({})
        own, moments = kronecker_damping(attributes), LayerMoments.of(mask)
        of_lists, whitened = basis_settings(attributes).get("list_damping") or own, whitening_damping(attributes)
        dampings = sorted({float(f"{each:g}") for each in (own / 10, own, 10 * own, whitened, of_lists)})
        return cls({f"self_influence_{each:g}": _inverse(moments.scale(each)) for each in dampings})

    def columns(self, rows: npt.NDArray[np.float32]) -> dict[str, Matrix]:
        """Return the columns' values for rows (b, k), (b,) float64 each."""
        if not self.weights:
            return {}
        squares = np.square(rows)
        return {name: np.asarray(squares @ weights, np.float64) for name, weights in self.weights.items()}


def _inverse(scale: Matrix) -> npt.NDArray[np.float32]:
    return np.asarray(1 / np.square(scale), np.float32)

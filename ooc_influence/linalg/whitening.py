"""Whitening by a Kronecker basis: what stored columns are divided by, from second moments of the kept entries.

In the eigenbasis of A = E[x xᵀ] and S = E[δ δᵀ] a layer's Fisher matrix is nearly diagonal (K-FAC, Martens and Grosse
2015, arXiv 1503.05671); with its diagonal Λ_e = E[G̃_e²] measured in that basis it is EK-FAC's (George et al. 2018,
arXiv 1806.03884). Stored columns are z_e = G̃_e/√π_e, and the products of EK-FAC are estimated without bias over the
entries drawn by Σ_e z_qe z_ie/(Λ_e + λ_l). So rows whose columns are divided by D_e = √(Λ_e + λ_l), with λ_l = damping
· mean of Λ over all entries of layer l (or of the model), are compared by plain dot products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.linalg.backend import Matrix
from ooc_influence.store import GradientStore, Mask, Reduction, StoredReduction

FloatRows = npt.NDArray[np.float32]


class LayerMoments(NamedTuple):
    """Second moments in a Kronecker basis, layer by layer; layers of which nothing is kept are left out.

    Attributes
    ----------
    ranges : tuple of (first, last)
        The stored columns of each layer.
    second_moment : (k,) float64
        Λ of each stored column, without its weight.
    means : (L,) float64
        What damping is relative to: the mean of Λ over all entries of each layer, or of all layers, kept or not.
    """

    ranges: tuple[tuple[int, int], ...]
    second_moment: Matrix
    means: Matrix

    @classmethod
    def of(cls, mask: Mask) -> Self:
        """Return those of a mask.

        Raises
        ------
        InputError
            If its entries are not in a Kronecker basis.
        """
        modules = [module for module in mask.modules if len(module.rows)]
        bases = [module.basis for module in modules if module.basis is not None]
        if not bases or len(bases) < len(modules):
            raise InputError(
                "expected entries in a Kronecker basis; received those of a mask that has none: extract with "
                "basis='kronecker' (--basis kronecker)"
            )
        ends = np.cumsum([len(basis.second_moment) for basis in bases]).tolist()
        moments = np.concatenate([basis.second_moment for basis in bases])
        means = np.array([basis.mean_moment for basis in bases])
        return cls(tuple(zip([0, *ends[:-1]], ends, strict=True)), moments, means)

    def scale(self, damping: float) -> Matrix:
        """Return D = √(Λ + λ), (k,).

        Raises
        ------
        InputError
            If the damping is not a positive number, or every moment is zero.
        """
        if isinstance(damping, bool) or not math.isfinite(damping) or damping <= 0:
            raise InputError(f"expected the damping of a whitening > 0; received {damping!r}")
        if not self.means.any():
            raise InputError("expected second moments that are not all zero; received those of rows without gradient")
        means = np.where(self.means > 0, self.means, self.means.mean())  # nothing is in a layer of zeros: any λ serves
        return np.sqrt(self.second_moment + damping * np.repeat(means, [last - first for first, last in self.ranges]))


def mean_moments(sums: Sequence[float], entries: Sequence[int], scope: str) -> list[float]:
    """Return what each layer's damping is relative to, from layers' sums of Λ and numbers of entries.

    That is the mean of Λ of the layer, or with the scope ``"model"`` of all layers together.
    """
    if scope == "model":
        return [sum(sums) / sum(entries)] * len(sums)
    return [each / count for each, count in zip(sums, entries, strict=True)]


DEFAULT_KRONECKER_DAMPING = 0.03  # of the mean of a layer; within 3 % of the best on two language models


def basis_settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a store's attributes say of how its Kronecker basis was made; empty where they do not."""
    settings = (attributes.get("compressor") or {}).get("basis")
    return dict(settings) if isinstance(settings, dict) else {}


def damping_scope(store: GradientStore) -> str:
    """Return whose mean Λ the damping of a store in a Kronecker basis is relative to."""
    return str(basis_settings(store.attrs).get("damping_scope", "layer"))


def kronecker_dampings(store: GradientStore) -> dict[str, float | None]:
    """Return the relative dampings of a store in a Kronecker basis where a call gives none: those of its basis."""
    settings = basis_settings(store.attrs)
    return {"damping": kronecker_damping(store.attrs), "list_damping": settings.get("list_damping")}


def kronecker_damping(attributes: Mapping[str, Any]) -> float:
    """Return the relative damping of scores of a store in a Kronecker basis where a call gives none."""
    return float(basis_settings(attributes).get("damping", DEFAULT_KRONECKER_DAMPING))


def whitening_damping(attributes: Mapping[str, Any]) -> float:
    """Return the relative damping that rows of signs are whitened at.

    The geometric mean of the two that scores use by default: the basis's, and that of lists.
    """
    own = kronecker_damping(attributes)
    of_lists = basis_settings(attributes).get("list_damping")
    return own if of_lists is None else math.sqrt(own * float(of_lists))


def storage_scale(
    dtype: str, mask: Mask, reduction: Reduction | None, attributes: Mapping[str, Any]
) -> FloatRows | None:  # fmt: skip
    """Return what columns are divided by before they are stored in a representation, (k,); None where by nothing.

    In an eigenbasis columns differ by orders of magnitude, which whole numbers and signs do not bear. In a Kronecker
    basis it is √(Λ + λ), at :func:`whitening_damping`, of forms with one scale a row: entries then matter alike. Other
    masks with drawn entries have weights that do the same.
    """
    if isinstance(reduction, StoredReduction) and dtype in ("int8", "int8-linear", "int4", "sign"):
        return reduction.column_scale()
    if reduction is not None or dtype not in ("int8-linear", "sign") or not mask.has_basis:
        return None
    return np.asarray(LayerMoments.of(mask).scale(whitening_damping(attributes)), np.float32)


@dataclass(frozen=True, eq=False)
class Whitening:
    """What columns of rows are divided by while they are read.

    Attributes
    ----------
    scale : (k,) float64
        D.
    facts : mapping
        Where it comes from: JSON values.
    """

    scale: Matrix
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, store: GradientStore) -> Self | None:
        """Return that by a store's own basis at its damping; None where its columns are not in one, or reduced."""
        if store.is_reduced or not store.mask.has_basis:
            return None
        damping = kronecker_damping(store.attrs)
        return cls(LayerMoments.of(store.mask).scale(damping), {"damping": damping})

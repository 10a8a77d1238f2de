"""The curvature of a Kronecker basis, which is EK-FAC on stored columns: F = diag(Λ), with a λ for each layer.

In the eigenbasis of A = E[x xᵀ] and S = E[δ δᵀ] a layer's Fisher matrix is nearly diagonal (K-FAC, Martens and Grosse
2015, arXiv 1503.05671); with its diagonal Λ_e = E[G̃_e²] measured in that basis it is EK-FAC's (George et al. 2018,
arXiv 1806.03884), which Grosse et al. (2023, arXiv 2308.03296) take for influence in language models. Stored columns
are kept entries times their weights, z_e = G̃_e/√π_e, on the queries' and on the rows' side; so

    score(q, i) = Σ_e z_qe z_ie/(Λ_e + λ_l),      λ_l = damping · mean of Λ over all entries of layer l,

estimates EK-FAC's score without bias over the entries drawn. Λ is that of the entries, without their weights. Where the
basis was made with ``damping_scope="model"``, the mean is that over all layers, and all have the same λ.

A mask in such a basis has the Λ of its pilot: a curvature of no further cost, the *prior*. :func:`fit_kronecker`
measures Λ again, of all rows of a store. A store that was reduced in whitened columns (:mod:`ooc_influence.compress`)
holds rows in which the prior is the identity, at the damping that it was reduced at: their plain dot products.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.curvature.curvature import Curvature
from ooc_influence.errors import InputError
from ooc_influence.linalg import LayerMoments, Matrix, basis_settings, damping_scope, kronecker_dampings
from ooc_influence.options import DampingMode
from ooc_influence.store import GradientStore, StorePath

PRIOR = "kronecker"  # the name it goes by in every store


class KroneckerPrior(Curvature):
    """The curvature that the mask of a store brings along: never stale, since it is of no rows of the store.

    Parameters
    ----------
    store : GradientStore
        A store of entries in a Kronecker basis, or reduced in whitened columns.

    Raises
    ------
    InputError
        If its entries are not in one.
    """

    def __init__(self, store: GradientStore) -> None:
        self._store, self.whitened = store.path, whitened_at(store)
        moments = layer_moments(store) if self.whitened is None else LayerMoments(
            ((0, store.k),), np.ones(store.k), np.ones(1)
        )  # fmt: skip
        self._moments = moments.second_moment
        digest = hashlib.sha256(moments.second_moment.tobytes() + moments.means.tobytes()).hexdigest()
        attributes = {
            "format": 2,
            "kind": "kronecker",
            "fit": digest[:32],
            "d": store.k,
            "ranges": [list(part) for part in moments.ranges],
            "means": moments.means.tolist(),
            "trace": float(moments.second_moment.sum()),
            "rows": int(basis_settings(store.attrs).get("samples") or 0),
            **(kronecker_dampings(store) if self.whitened is None else {"damping": 0.0}),
            "whitened": self.whitened,
            "summed": False,
            "mask_digest": store.columns_digest,
            "model": store.model_fingerprint,
            "store_id": None,
        }
        super().__init__(store.path / "curvature" / PRIOR, attributes)

    @property
    @override
    def takes_damping(self) -> bool:
        return self.whitened is None

    @override
    def _factor(self, damping: float | None, mode: DampingMode) -> float:
        if damping is not None and self.whitened is not None:
            raise InputError(
                f"expected no damping with rows that were whitened before they were reduced; received {damping}: they "
                f"were at {self.whitened:g}"
            )
        return super()._factor(damping, mode)

    @override
    def _read(self, name: str) -> npt.NDArray[Any]:
        return self._moments

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_prior, (self._store,)


def _open_prior(path: StorePath) -> KroneckerPrior:
    return KroneckerPrior(GradientStore.open(path))


def layer_moments(store: GradientStore) -> LayerMoments:
    """Return the moments in the basis of a store.

    Raises
    ------
    InputError
        If its columns are not entries in a Kronecker basis.
    """
    if store.is_reduced or not store.mask.has_basis:
        raise InputError(
            f"expected a store of entries in a Kronecker basis; received {store.path}, "
            f"{'whose columns are reduced' if store.is_reduced else 'which has none'}: extract it with "
            "basis='kronecker' (--basis kronecker)"
        )
    return LayerMoments.of(store.mask)


def whitened_at(store: GradientStore) -> float | None:
    """Return the damping at which a reduced store's rows were whitened; None where they were not."""
    damping = (store.attrs.get("reduction") or {}).get("whitened")
    return None if damping is None else float(damping)


def has_prior(store: GradientStore) -> bool:
    """Return whether the columns of a store bring a curvature along."""
    return store.mask.has_basis and (not store.is_reduced or whitened_at(store) is not None)


def has_sampled_labels(store: GradientStore) -> bool:
    """Return whether a store's rows are of labels drawn from the model, not of the dataset's."""
    return (store.attrs.get("labels") or {}).get("kind") == "sampled"


def column_weights(store: GradientStore) -> Matrix:
    """Return what each kept entry of a store was multiplied by, (k,) float64."""
    return np.concatenate([module.weight for module in store.mask.modules]).astype(np.float64)


def measured_means(store: GradientStore, second_moment: Matrix) -> Matrix:
    """Return what damping is relative to in each layer, (L,), that goes with Λ measured at the kept entries.

    The prior's mean, of the layer or the model, times the factor by which the energy of the stored columns is larger
    than by the prior's Λ: a ratio estimate, since of the entries that are not kept nothing was measured.
    """
    prior, squares = layer_moments(store), np.square(column_weights(store))
    modules = [module for module in store.mask.modules if len(module.rows)]
    starts, sizes = [first for first, _ in prior.ranges], np.array([module.layer.entries for module in modules])
    before = np.add.reduceat(squares * prior.second_moment, starts)
    now = np.add.reduceat(squares * second_moment, starts)
    if damping_scope(store) == "model":
        before, now, sizes = (np.full(len(modules), part.sum()) for part in (before, now, sizes))
    return np.where(before > 0, prior.means * now / np.where(before > 0, before, 1), now / sizes)

"""The curvature of a Kronecker basis, which is EK-FAC on stored columns: F = diag(Λ), with a λ for each layer.

In the eigenbasis of A = E[x xᵀ] and S = E[δ δᵀ] a layer's Fisher matrix is nearly diagonal (K-FAC, Martens and Grosse
2015, arXiv 1503.05671); with its diagonal Λ_e = E[G̃_e²] measured in that basis it is EK-FAC's (George et al. 2018,
arXiv 1806.03884), which Grosse et al. (2023, arXiv 2308.03296) take for influence in language models. Stored columns
are kept entries times their weights, z_e = G̃_e/√π_e, on the queries' and on the rows' side; so

    score(q, i) = Σ_e z_qe z_ie/(Λ_e + λ_l),      λ_l = damping · mean of Λ over all entries of layer l,

estimates EK-FAC's score without bias over the entries drawn. Λ is that of the entries, without their weights.

A mask in such a basis has the Λ of its pilot: a curvature of no further cost, the *prior*. :func:`fit_kronecker`
measures Λ again, of all rows of a store.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.curvature.curvature import Curvature
from ooc_influence.linalg import LayerMoments, Matrix
from ooc_influence.store import GradientStore, StorePath

PRIOR = "kronecker"  # the name it goes by in every store
DEFAULT_KRONECKER_DAMPING = 0.03  # of each layer's mean; within 3 % of the best on two language models


class KroneckerPrior(Curvature):
    """The curvature that the mask of a store brings along: never stale, since it is of no rows of the store.

    Parameters
    ----------
    store : GradientStore
        A store of entries in a Kronecker basis.

    Raises
    ------
    InputError
        If its entries are not in one.
    """

    def __init__(self, store: GradientStore) -> None:
        moments = LayerMoments.of(store)
        self._store, self._moments = store.path, moments.second_moment
        digest = hashlib.sha256(moments.second_moment.tobytes() + moments.means.tobytes()).hexdigest()
        settings = basis_settings(store)
        attributes = {
            "format": 2,
            "kind": "kronecker",
            "fit": digest[:32],
            "d": store.k,
            "ranges": [list(part) for part in moments.ranges],
            "means": moments.means.tolist(),
            "trace": float(moments.second_moment.sum()),
            "rows": int(settings.get("samples") or 0),
            "damping": kronecker_damping(store),
            "summed": False,
            "mask_digest": store.columns_digest,
            "model": store.model_fingerprint,
            "store_id": None,
        }
        super().__init__(store.path / "mask", attributes)

    @override
    def _read(self, name: str) -> npt.NDArray[Any]:
        return self._moments

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_prior, (self._store,)


def _open_prior(path: StorePath) -> KroneckerPrior:
    return KroneckerPrior(GradientStore.open(path))


def basis_settings(store: GradientStore) -> dict[str, Any]:
    """Return what a store records of how its Kronecker basis was made; empty where it does not say."""
    settings = (store.attrs.get("compressor") or {}).get("basis")
    return dict(settings) if isinstance(settings, dict) else {}


def kronecker_damping(store: GradientStore) -> float:
    """Return the relative damping of a Kronecker curvature where a call gives none: that of the store's basis."""
    return float(basis_settings(store).get("damping", DEFAULT_KRONECKER_DAMPING))


def has_sampled_labels(store: GradientStore) -> bool:
    """Return whether a store's rows are of labels drawn from the model, not of the dataset's."""
    return store.attrs.get("labels") == "sampled"


def column_weights(store: GradientStore) -> Matrix:
    """Return what each kept entry of a store was multiplied by, (k,) float64."""
    return np.concatenate([module.weight for module in store.mask.modules]).astype(np.float64)


def measured_means(store: GradientStore, second_moment: Matrix) -> Matrix:
    """Return the mean over all entries of each layer, (L,), that goes with Λ measured at the kept ones.

    The prior's mean times the factor by which the energy of the stored columns is larger than by the prior's Λ: a ratio
    estimate, since of the entries that are not kept nothing was measured.
    """
    prior, squares = LayerMoments.of(store), np.square(column_weights(store))
    means = []
    modules = [module for module in store.mask.modules if len(module.rows)]
    for module, (first, last), mean in zip(modules, prior.ranges, prior.means, strict=True):
        part = slice(first, last)
        before, now = squares[part] @ prior.second_moment[part], squares[part] @ second_moment[part]
        means.append(mean * now / before if before > 0 else now / module.layer.entries)
    return np.array(means)

"""Rows that keep every entry of their layers, turned into the entries of another mask: a change of basis.

All entries of a layer are its whole gradient G, rotated or not: G̃ = Uᵀ G V has G = U G̃ Vᵀ. So rows of one mask have the
entries of any other of the same layers, as if these had been extracted, without the model: in the parameters' own
coordinates, or in the Kronecker basis of a later moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.fingerprint import check_same
from ooc_influence.store import GradientStore, ModuleBasis, ModuleMask

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer's change of basis.

    Attributes
    ----------
    source, target : ModuleMask
        All entries that rows have, and those they get.
    left, right : (rows, R), (columns, C) float32, or None
        What gradients are multiplied by from the left (transposed) and from the right, to have the R rows and C columns
        that the target's entries are in; None where it is nothing.
    rows, cols : (m,)
        Where the target's entries are among these.
    """

    source: ModuleMask
    target: ModuleMask
    left: Floats | None
    right: Floats | None
    rows: Indices
    cols: Indices

    @classmethod
    def of(cls, source: ModuleMask, target: ModuleMask) -> Self:
        left, right = (_factor(source.basis, target.basis, side) for side in ("left", "right"))
        height, width = target.layer.shape
        return cls(source, target, left, right, _among(target.rows, left, height), _among(target.cols, right, width))

    def __call__(self, rows: Floats) -> Floats:
        """Return the target's entries, (n, m), of the source's, (n, layer's entries)."""
        gradients = np.empty((len(rows), *self.source.layer.shape), np.float32)
        gradients[:, self.source.rows, self.source.cols] = rows / self.source.weight
        if self.left is not None:
            gradients = np.matmul(self.left.T, gradients)
        if self.right is not None:
            gradients = np.matmul(gradients, self.right)
        return np.asarray(self.target.weight * gradients[:, self.rows, self.cols])


def _among(kept: Indices, factor: Floats | None, size: int) -> Indices:
    """Return where kept rows, or columns, are among those that a factor makes: all of them, or the distinct ones."""
    return kept if factor is None or factor.shape[1] == size else np.unique(kept, return_inverse=True)[1]


def _factor(source: ModuleBasis | None, target: ModuleBasis | None, side: str) -> Floats | None:
    """Return Uᵀ U', from a layer's eigenvectors on one side to those of another basis; None for the identity."""
    before, after = (None if basis is None else getattr(basis, side) for basis in (source, target))
    if before is None or after is None:
        return after if before is None else np.ascontiguousarray(before.T)
    return np.asarray(before.astype(np.float64).T @ after.astype(np.float64), np.float32)


class ChangeOfBasis:
    """The entries that rows of one mask, which keeps all of them, have under another.

    Parameters
    ----------
    source : GradientStore
        (n, p), with every entry of its layers, in any basis.
    target : GradientStore
        The store with the other mask.

    Raises
    ------
    InputError
        If rows are reduced, or the source's do not have all entries, or some of them times zero.
    MismatchError
        If the stores are of other layers.
    """

    def __init__(self, source: GradientStore, target: GradientStore) -> None:
        for store in (source, target):
            if store.is_reduced:
                raise InputError(f"expected rows of entries; received {store.path}, whose rows are reduced from them")
        check_same(
            target.path, {"layers": _layers(target)}, {"layers": _layers(source)},
            "use a store of the same layers", other=source.path,
        )  # fmt: skip
        if source.mask.k < source.mask.p:
            raise InputError(
                f"expected rows with all {source.mask.p} entries of their layers, since a change of basis needs each "
                f"of them; received {source.path} with {source.mask.k}: make it with Identity()"
            )
        if not all(module.weight.all() for module in source.mask.modules):
            raise InputError(
                f"expected rows with all entries; received {source.path}, whose mask multiplies some by zero: make it "
                "without metric="
            )
        self._layers = [_Layer.of(*pair) for pair in zip(source.mask.modules, target.mask.modules, strict=True)]

    def __call__(self, rows: Floats) -> Floats:
        """Return rows under the other mask.

        Parameters
        ----------
        rows : (n, p) float32
            Under the source's.

        Returns
        -------
        (n, k) float32
        """
        turned, first = [], 0
        for layer in self._layers:
            last = first + layer.source.layer.entries
            turned.append(layer(rows[:, first:last]))
            first = last
        return np.concatenate(turned, 1)


def _layers(store: GradientStore) -> dict[str, str]:
    return {module.layer.name: repr(module.layer) for module in store.mask.modules}

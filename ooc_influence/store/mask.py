"""The mask: which gradient entries a store keeps, and by what each is multiplied.

The entries of a tapped module form a matrix of ``shape``; for a linear layer (out, in) or, with a bias, (out, in + 1):
the bias is the last column, as if the input ended in a one. Kept entry c of the module is
``weight[c] * gradient[rows[c], cols[c]]``. The columns of unreduced rows are the modules' entries one after the other,
in the order of :attr:`Mask.modules`.

In a Kronecker basis (Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884) entries are of
the rotated gradient U_Sᵀ G U_A instead: its rows and columns count eigenvectors of the second moments S = E[δ δᵀ] of a
layer's output gradients and A = E[x xᵀ] of its inputs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import OocInfluenceError, StoreDamagedError
from ooc_influence.store.arrays import read_array, write_groups


@dataclass(frozen=True)
class LayerShape:
    """A tapped module before any entry is chosen.

    Attributes
    ----------
    name : str
        Its name in ``model.named_modules()``.
    kind : str
        The layer kind (``"linear"``).
    shape : (int, int)
        Rows and columns of its entry matrix, the bias column included.
    bias : bool
        Whether the last column is the bias.
    tied : tuple of str
        Other modules that use the same weight; their gradients are added to the same entries.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: bool
    tied: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """Gradient entries of the module."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class ModuleBasis:
    """The Kronecker basis of one module, as far as its entries are kept.

    Attributes
    ----------
    left, right : (rows, R) and (columns, C) float32, or None
        Eigenvectors of S and of A for the distinct rows, and columns, of kept entries, in ascending order; None for a
        side that stays in its own coordinates.
    second_moment : (m,) float64
        Λ, the mean square over samples of each kept entry of the rotated gradient, without its weight.
    mean_moment : float
        What relative damping is relative to: the mean of Λ over all entries of the module, or of all modules, kept or
        not.
    """

    left: npt.NDArray[np.float32] | None
    right: npt.NDArray[np.float32] | None
    second_moment: npt.NDArray[np.float64]
    mean_moment: float

    @property
    def rotates(self) -> bool:
        """Whether a side is rotated at all."""
        return self.left is not None or self.right is not None


@dataclass(frozen=True, eq=False)
class ModuleMask:
    """The kept entries of one module.

    Attributes
    ----------
    layer : LayerShape
        The module.
    rows, cols : (m,) int32
        Where each kept entry is; of a module with a basis, in the rotated gradient.
    weight : (m,) float32
        What it is multiplied by (√(p/k) for a uniform mask).
    basis : ModuleBasis or None
        The basis its entries are in; None for the parameters' own.
    """

    layer: LayerShape
    rows: npt.NDArray[np.int32]
    cols: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]
    basis: ModuleBasis | None = None


@dataclass(frozen=True, eq=False)
class PilotMoments:
    """Second moments of one layer's rows and columns (at one use of its weight), from pilot samples.

    Attributes
    ----------
    layer : int
        Which layer.
    rows : (R,) float64
        E over samples of Σ_t δ_i².
    cols : (C,) float64
        E over tokens of x_j².
    """

    layer: int
    rows: npt.NDArray[np.float64]
    cols: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Mask:
    """All kept entries of a model, (k,) in all.

    Attributes
    ----------
    modules : tuple of ModuleMask
        The kept entries, module by module.
    pilot : tuple of PilotMoments
        What importance sampling drew them from; a record only, no part of the digest.
    """

    modules: tuple[ModuleMask, ...]
    pilot: tuple[PilotMoments, ...] = ()

    @property
    def k(self) -> int:
        """Kept entries."""
        return sum(len(module.rows) for module in self.modules)

    @property
    def empty_modules(self) -> set[int]:
        """Modules, by number, of which nothing is kept."""
        return {number for number, module in enumerate(self.modules) if not len(module.rows)}

    @property
    def p(self) -> int:
        """Gradient entries of the tapped modules, kept or not."""
        return sum(module.layer.entries for module in self.modules)

    @property
    def has_basis(self) -> bool:
        """Whether entries are in a Kronecker basis."""
        return any(module.basis is not None for module in self.modules)

    @property
    def basis_bytes(self) -> int:
        """Bytes of the eigenvectors and second moments of a Kronecker basis."""
        bases = [module.basis for module in self.modules if module.basis is not None]
        arrays = [array for basis in bases for array in (basis.left, basis.right, basis.second_moment)]
        return sum(array.nbytes for array in arrays if array is not None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes, indices, weights and bases: stores are compatible if and only if it is equal."""
        digest = hashlib.sha256()
        for module in self.modules:
            layer = module.layer
            tied = (layer.tied,) if layer.tied else ()
            digest.update(repr((layer.name, layer.kind, layer.shape, layer.bias, len(module.rows), *tied)).encode())
            for array, dtype in ((module.rows, "<i4"), (module.cols, "<i4"), (module.weight, "<f4")):
                digest.update(np.ascontiguousarray(array, dtype).data)
            if module.basis is not None:
                _add_basis(digest, module.basis)
        return digest.hexdigest()

    def save(self, group: Any) -> None:
        """Write the mask below Zarr group ``group``: a group ``mask/<number>`` a module."""
        groups: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for number, module in enumerate(self.modules):
            layer = module.layer
            attributes = {
                "module": layer.name, "kind": layer.kind, "shape": list(layer.shape), "bias": layer.bias,
                "tied": list(layer.tied),
            }  # fmt: skip
            arrays = {name: getattr(module, name) for name in ("rows", "cols", "weight")}
            if module.basis is not None:
                attributes["mean_moment"] = module.basis.mean_moment
                arrays |= {name: np.ravel(array) for name, array in _basis_arrays(module.basis)}
            groups[f"mask/{number:05d}"] = attributes, arrays
        for number, moments in enumerate(self.pilot):
            arrays = {"rows": moments.rows, "cols": moments.cols}
            groups[f"pilot/{number:05d}"] = {"layer": moments.layer}, arrays
        write_groups(group, groups)

    @classmethod
    def load(cls, group: Any, digest: str) -> Mask:
        """Read the mask below ``group`` and check its digest.

        Raises
        ------
        StoreDamagedError
            If what is read is not what was written.
        """
        try:
            count = len(list(group["mask"].group_keys()))
            modules = [_load_module(group[f"mask/{number:05d}"]) for number in range(count)]
            count = len(list(group["pilot"].group_keys())) if "pilot" in group else 0
            pilot = [_load_moments(group[f"pilot/{number:05d}"]) for number in range(count)]
        except OocInfluenceError:
            raise
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise StoreDamagedError(
                f"expected the mask of {group.store_path}; received metadata without some of it ({error!r}): restore "
                "it from a backup"
            ) from error
        mask = cls(tuple(modules), tuple(pilot))
        if mask.digest != digest:
            raise StoreDamagedError(
                f"expected mask digest {digest[:12]}; received {mask.digest[:12]} from {group.store_path}: "
                "the mask was changed or damaged; restore it from a backup"
            )
        return mask


def _load_module(source: Any) -> ModuleMask:
    attrs = source.attrs
    layer = LayerShape(
        str(attrs["module"]), str(attrs["kind"]), (int(attrs["shape"][0]), int(attrs["shape"][1])),
        bool(attrs["bias"]), tuple(map(str, attrs.get("tied", ()))),
    )  # fmt: skip
    basis = None
    if "mean_moment" in attrs:
        left, right = (
            read_array(source, name).reshape(size, -1) if name in source else None
            for name, size in zip(("left", "right"), layer.shape, strict=True)
        )
        basis = ModuleBasis(left, right, read_array(source, "second_moment"), float(attrs["mean_moment"]))
    rows, cols, weight = (read_array(source, name) for name in ("rows", "cols", "weight"))
    return ModuleMask(layer, rows, cols, weight, basis)


def _basis_arrays(basis: ModuleBasis) -> list[tuple[str, npt.NDArray[Any]]]:
    arrays = ("left", basis.left), ("right", basis.right), ("second_moment", basis.second_moment)
    return [(name, array) for name, array in arrays if array is not None]


def _add_basis(digest: Any, basis: ModuleBasis) -> None:
    digest.update(repr(basis.mean_moment).encode())
    for name, array in _basis_arrays(basis):
        digest.update(repr((name, array.shape)).encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


def _load_moments(source: Any) -> PilotMoments:
    rows, cols = (read_array(source, name) for name in ("rows", "cols"))
    return PilotMoments(int(source.attrs["layer"]), rows, cols)

"""Kept entries of a gradient in a Kronecker basis: the outer product of rotated operands, sampled as ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.extract.entries.base import Entries, wide
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.extract.entries.linear import LinearEntries
from ooc_influence.store import ModuleMask


class RotatedEntries:
    """The entries of U_Sᵀ G U_A that a mask keeps, of one use of a layer, gathered as :class:`Entries` gathers G's.

    Only the eigenvectors of kept rows and columns take part: two thin products, and the sampled outer product of what
    they yield.

    Parameters
    ----------
    kept : ModuleMask
        The kept entries, with a basis that rotates a side at least.
    kind : type of Entries
        The kind of the module, whose operands are rotated.
    module : nn.Module
        It.
    device : torch.device
        Where its activations are.
    """

    def __init__(self, kept: ModuleMask, kind: type[Entries], module: nn.Module, device: torch.device) -> None:
        assert kept.basis is not None
        self.entries, self._kind, self._module = len(kept.rows), kind, module
        rows, at_rows = np.unique(kept.rows, return_inverse=True)
        cols, at_cols = np.unique(kept.cols, return_inverse=True)
        self._left, self._right = _Side(rows, kept.basis.left, device), _Side(cols, kept.basis.right, device)
        one_hot = issubclass(kind, EmbeddingEntries)
        local = ModuleMask(
            replace(kept.layer, shape=(kept.layer.shape[0] if one_hot else len(rows), len(cols)), bias=False),
            kept.rows if one_hot else at_rows.astype(np.int32),
            at_cols.astype(np.int32),
            kept.weight,
        )
        self._inner = (EmbeddingEntries if one_hot else LinearEntries)(local, module, device)

    def __call__(self, x: Any, delta: Any) -> Tensor:
        """Return the weighted entries, (b, m) float32."""
        rows, cols = self._kind.operands(self._module, x, delta)
        cols = self._right(cols)
        return self._inner(rows, cols) if rows.dim() == 2 else self._inner(cols, self._left(rows))


class _Side:
    """Maps one operand to the kept coordinates of a side: by eigenvectors (size, m), or by picking them."""

    def __init__(
        self, indices: npt.NDArray[Any], vectors: npt.NDArray[np.float32] | None, device: torch.device
    ) -> None:
        self._indices = torch.from_numpy(indices).long().to(device)
        self._vectors = None if vectors is None else torch.from_numpy(np.ascontiguousarray(vectors)).to(device)

    def __call__(self, operand: Tensor) -> Tensor:
        """Return the coordinates, (b, t, m), of an operand (b, t, size), or (b, t, size - 1) before a bias of ones."""
        size, dtype = operand.shape[-1], wide(operand.dtype)
        if self._vectors is None:
            picked = operand.index_select(2, self._indices.clamp(max=size - 1))
            return picked.masked_fill(self._indices == size, 1.0)
        vectors = self._vectors.to(dtype)
        rotated = operand.to(dtype) @ vectors[:size]
        return rotated if len(vectors) == size else rotated + vectors[size]

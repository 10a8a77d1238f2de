"""The gradient of a linear layer projected from both sides: Σ_t (P_outᵀ δ_t) (P_inᵀ x_t)ᵀ (LoGra, arXiv 2405.13954)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ooc_influence.extract.entries.base import wide
from ooc_influence.store import LograReduction, ModuleMask


class LograEntries:
    """What :class:`~ooc_influence.extract.entries.base.Entries` is for kept entries, for a layer's projected numbers.

    Parameters
    ----------
    kept : ModuleMask
        The layer, and which numbers are stored of it.
    number : int
        Which layer of the mask it is.
    reduction : LograReduction
        Where the projections come from.
    device : torch.device
        Where its activations are.
    """

    def __init__(self, kept: ModuleMask, number: int, reduction: LograReduction, device: torch.device) -> None:
        self.entries, self._layer = len(kept.rows), kept.layer
        self._left, self._right = (
            torch.from_numpy(factor).to(device) for factor in reduction.factors(number, kept.layer, _ranks(kept))
        )

    def __call__(self, x: Any, delta: Any) -> Tensor:
        """Return the numbers, (b, m) float32."""
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        delta = delta.reshape(delta.shape[0], -1, delta.shape[-1])
        inputs = x.shape[-1]
        right = x.to(wide(x.dtype)) @ self._right[:inputs].to(wide(x.dtype))
        if self._layer.bias:
            right = right + self._right[inputs].to(right.dtype)
        left = delta.to(wide(delta.dtype)) @ self._left.to(wide(delta.dtype))
        return torch.einsum("bto,bti->boi", left, right.to(left.dtype)).reshape(len(x), -1).float()


def _ranks(kept: ModuleMask) -> tuple[int, int]:
    """Return the sides of what is stored of a layer."""
    if not len(kept.rows):
        return 0, 0
    return int(kept.rows[-1]) + 1, int(kept.cols[-1]) + 1

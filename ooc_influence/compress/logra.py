"""LoGra: gradients of linear layers projected from both sides before they are built (arXiv 2405.13954).

For an input x_t and an output gradient δ_t, a layer's gradient is Σ_t δ_t x_tᵀ, and what is stored of it

    P_outᵀ (Σ_t δ_t x_tᵀ) P_in = Σ_t (P_outᵀ δ_t) (P_inᵀ x_t)ᵀ ,

out' × in' numbers, where P_out (out, out') and P_in (in, in') have independent entries N(0, 1/out'), N(0, 1/in'), drawn
from a seed. E[P Pᵀ] = I for both and they are independent, so dot products are kept without bias. The cost a sample and
layer is O(t (out out' + in in' + out' in')); the full gradient is never built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ooc_influence.compress.dropout import parse_whole_numbers
from ooc_influence.compress.projection import Whole
from ooc_influence.errors import InputError, warn
from ooc_influence.store import LayerShape, LograReduction, Mask, ModuleMask, PilotMoments

_KINDS = ("linear", "transposed_linear")


@dataclass(frozen=True)
class LoGra(Whole):
    """Project the gradient of every linear layer from both sides; layers of other kinds are left out.

    Parameters
    ----------
    rank_out, rank_in : int
        Rows and columns of what is stored of a layer; a side that has no more than that is kept as it is.
    seed : int
        Seed of the projections.

    Raises
    ------
    InputError
        For a rank below 1 or a negative seed.
    """

    rank_out: int = 16
    rank_in: int = 16
    seed: int = 0

    name: ClassVar[str] = "logra"

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"rank_out": 1, "rank_in": 1, "seed": 0})

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Return a mask that says which projected numbers of each layer are stored, in place of which entries.

        Raises
        ------
        InputError
            If no layer is linear.
        """
        others = [layer for layer in layers if layer.kind not in _KINDS]
        if len(others) == len(layers):
            raise InputError(
                f"expected linear layers for LoGra; received none among {len(layers)} layers: use another compressor"
            )
        if others:
            share = sum(layer.entries for layer in others) / sum(layer.entries for layer in layers)
            names = ", ".join(layer.name for layer in others[:3]) + (", ..." if len(others) > 3 else "")
            warn(f"LoGra leaves out {len(others)} layers that are not linear, {share:.1%} of the entries: {names}")
        return Mask(tuple(self._numbers(layer) for layer in layers))

    def _numbers(self, layer: LayerShape) -> ModuleMask:
        height, width = (min(self.rank_out, layer.shape[0]), min(self.rank_in, layer.shape[1]))
        count = height * width if layer.kind in _KINDS else 0
        rows, cols = np.divmod(np.arange(count, dtype=np.int32), np.int32(width))
        return ModuleMask(layer, rows, cols, np.ones(count, np.float32))

    def generated(self, mask: Mask) -> LograReduction:
        """Return the projections of the layers under ``mask``."""
        return LograReduction(mask.k, mask.k, self.seed)

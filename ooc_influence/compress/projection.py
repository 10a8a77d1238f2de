"""The baselines that dropout is compared with: a mask, mostly of every entry, then a linear map drawn from a seed.

A row of p gradient entries becomes row @ M with E[M Mᵀ] = I, so dot products are estimated without bias. M is generated
in blocks of 1024 entries, each a function of the seed and of its first entry; it is never stored, and held in memory
if it takes less than a gigabyte. Full rows are put together in memory first: 4 p bytes a sample, and 12 p for the mask,
which is refused if it does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from ooc_influence.compress.compressor import Compressor, Eigenbasis, parse_whole_numbers
from ooc_influence.compress.dropout import Dropout
from ooc_influence.errors import InputError, MemoryBudgetError, warn
from ooc_influence.memory import MemoryBudget, MemoryModel, format_bytes
from ooc_influence.store import (
    GaussianReduction,
    GeneratedReduction,
    LayerShape,
    LograReduction,
    Mask,
    ModuleMask,
    PilotMoments,
    RademacherReduction,
    SjltReduction,
)

_MASK_BYTES, _ROW_BYTES = 12, 4  # per entry: of the mask; of a row


@dataclass(frozen=True)
class FullGradient(Compressor):
    """What compressors that keep every entry have in common."""

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Return the mask that keeps every entry, if mask and rows fit half of the free memory."""
        p = sum(layer.entries for layer in layers)
        model = MemoryModel(f"{self.name} of all p = {p} entries", _MASK_BYTES * p, 0, _ROW_BYTES * p, min_rows=2)
        budget = MemoryBudget.of(None)
        if not budget.fits(model):
            raise MemoryBudgetError(
                f"{model.stage} needs {format_bytes(budget.price(model))} for the mask and two rows, budget "
                f"{format_bytes(budget.limit)}: use Dropout or Grass, which keep only some entries, or fewer --modules"
            )
        return Dropout(k=p).draw(layers)


@dataclass(frozen=True)
class Identity(FullGradient):
    """Keep every entry of the gradient: exact, p numbers a row."""

    name: ClassVar[str] = "identity"


@dataclass(frozen=True)
class Pca(FullGradient):
    """Reduce full gradients to their top ``r`` principal directions, those of the Fisher matrix of a pilot's rows.

    For small models: the pilot's rows are p numbers each, on disk, and the basis takes 4 p r bytes. It is
    :class:`Eigenbasis` without a mask before it, which dropout followed by an eigenbasis approximates.

    Parameters
    ----------
    r, pilot, weights
        As for :class:`Eigenbasis`.
    """

    r: int = 1024
    pilot: int | None = None
    weights: str | None = None

    name: ClassVar[str] = "pca"

    def __post_init__(self) -> None:
        self.reduce  # noqa: B018 - it checks the settings

    @property
    @override
    def reduce(self) -> Eigenbasis:
        return Eigenbasis(self.r, self.pilot, self.weights)

    @property
    @override
    def wide(self) -> Identity:
        return Identity()


@dataclass(frozen=True)
class Projection(FullGradient):
    """A projection of full gradients to ``k`` numbers."""

    k: int = 4096
    seed: int = 0

    _map: ClassVar[type[GeneratedReduction]]

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"k": 1, "seed": 0})

    @override
    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        p = sum(layer.entries for layer in layers)
        if self.k > p:
            raise InputError(f"expected k <= p = {p}; received k = {self.k}: use Identity() to keep all entries")
        return super().draw(layers, moments)

    @override
    def generated(self, mask: Mask) -> GeneratedReduction:
        return self._map(mask.k, self.k, self.seed)


@dataclass(frozen=True)
class Gaussian(Projection):
    """Project with a dense matrix of independent N(0, 1/k): O(p k) a sample.

    Johnson and Lindenstrauss (1984); for influence TRAK, arXiv 2303.14186.

    Parameters
    ----------
    k : int
        Numbers stored a row.
    seed : int
        Seed of the matrix.

    Raises
    ------
    InputError
        For a k below 1 or a negative seed.
    """

    name: ClassVar[str] = "gaussian"
    _map = GaussianReduction


@dataclass(frozen=True)
class Rademacher(Projection):
    """Project with a dense matrix of independent signs over √k (Achlioptas 2003): see :class:`Gaussian`.

    It costs what the Gaussian projection costs, except that drawing the matrix takes one random bit per entry.
    """

    name: ClassVar[str] = "rademacher"
    _map = RademacherReduction


@dataclass(frozen=True)
class Sjlt(Projection):
    """Project with a sparse matrix of ``nonzeros`` signs a row, over their root: O(p · nonzeros) a sample, whatever k.

    One non-zero is CountSketch (Charikar, Chen and Farach-Colton 2002). Several non-zeros, one in each of as many
    ranges of the stored numbers, are the block construction of the sparse Johnson-Lindenstrauss transform (Kane and
    Nelson 2014).

    Parameters
    ----------
    k, seed
        As for :class:`Gaussian`.
    nonzeros : int
        Signs per entry; at most k.
    """

    nonzeros: int = 1

    name: ClassVar[str] = "sjlt"
    _map = SjltReduction

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_whole_numbers(self, {"nonzeros": 1})
        if self.nonzeros > self.k:
            raise InputError(f"expected nonzeros <= k = {self.k}; received {self.nonzeros}")

    @override
    def generated(self, mask: Mask) -> SjltReduction:
        return SjltReduction(mask.k, self.k, self.seed, self.nonzeros)


@dataclass(frozen=True)
class Grass(Sjlt):
    """Keep ``kept`` entries drawn uniformly, then project them sparsely to ``k`` numbers (GraSS, arXiv 2505.18976).

    Costs O(kept · nonzeros) per sample more than dropout; the full gradient is never built.

    Parameters
    ----------
    k, seed, nonzeros
        As for :class:`Sjlt`.
    kept : int
        Entries kept before the projection; at least k.
    """

    kept: int = 65536

    name: ClassVar[str] = "grass"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_whole_numbers(self, {"kept": self.k})

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Return the mask of the kept entries."""
        return Dropout(k=self.kept, seed=self.seed).draw(layers)


_KINDS = ("linear", "transposed_linear")


@dataclass(frozen=True)
class LoGra(FullGradient):
    """Project the gradient of every linear layer from both sides; layers of other kinds are left out.

    Parameters
    ----------
    rank_out, rank_in : int
        Rows and columns stored of each layer; a dimension that is no larger is kept as it is.
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

    @property
    @override
    def weighs_entries(self) -> bool:
        return False

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"rank_out": 1, "rank_in": 1, "seed": 0})

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Return a mask that holds the indices of each layer's projected numbers instead of kept entries."""
        others = [layer for layer in layers if layer.kind not in _KINDS]
        if len(others) == len(layers):
            raise InputError(
                f"expected linear layers for LoGra; received none among {len(layers)} layers: use another compressor"
            )
        if others:
            share = sum(layer.entries for layer in others) / sum(layer.entries for layer in layers)
            names = ", ".join(layer.name for layer in others[:3]) + (", ..." if len(others) > 3 else "")
            warn(f"LoGra leaves out {len(others)} layers that are not linear, {share:.1%} of the entries: {names}")
        return Mask(tuple(self._projected(layer) for layer in layers))

    def _projected(self, layer: LayerShape) -> ModuleMask:
        height, width = (min(self.rank_out, layer.shape[0]), min(self.rank_in, layer.shape[1]))
        count = height * width if layer.kind in _KINDS else 0
        rows, cols = np.divmod(np.arange(count, dtype=np.int32), np.int32(width))
        return ModuleMask(layer, rows, cols, np.ones(count, np.float32))

    @override
    def generated(self, mask: Mask) -> LograReduction:
        return LograReduction(mask.k, mask.k, self.seed)

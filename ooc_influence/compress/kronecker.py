"""Entries in the Kronecker basis, drawn by their whitened energy.

In the eigenvectors of A = E[x xᵀ] and S = E[δ δᵀ] of a layer (K-FAC: Martens and Grosse 2015, arXiv 1503.05671) the
Fisher matrix of the rotated gradient U_Sᵀ G U_A is nearly diagonal, Λ (EK-FAC: George et al. 2018, arXiv 1806.03884;
influence functions with it: Grosse et al. 2023, arXiv 2308.03296). Scores divide by Λ + λ, so an entry matters by its
*whitened energy* Λ/(Λ + λ): entries are drawn in proportion to it, mixed with a uniform share, so that an entry the
pilot never saw move keeps a chance. Every inclusion probability π is exact: draws are systematic (Madow 1949), entry
by entry, or by rows and by columns of a grid, where π is the product of both.

Here Λ is K-FAC's product of eigenvalues; it is computed block by block, in O(p) time and the memory of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.compressor import KroneckerBasis
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.linalg import mean_moments
from ooc_influence.store import LayerShape, PilotMoments

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
UNIFORM_SHARE = 0.05
_BLOCK = 2**20  # entries at a time
_BINS, _OCTAVES = 8192, 64  # of the histogram of whitened energies, which are at most 1


class Drawn(NamedTuple):
    """Kept entries of a layer, in row-major order, and their inclusion probabilities, (m,)."""

    rows: Indices
    cols: Indices
    chance: Floats


class WhitenedEnergy:
    """Λ/(Λ + λ) of every entry of some layers; Λ is K-FAC's product, summed over the uses of a tied weight.

    Parameters
    ----------
    layers : sequence of LayerShape
        All tapped layers.
    moments : sequence of PilotMoments
        In the basis: eigenvalues of S and of A, or second moments of a side in its own coordinates.
    basis : KroneckerBasis
        Its damping and the damping's scope.
    """

    def __init__(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments], basis: KroneckerBasis) -> None:
        self.layers = layers
        self._factors: list[list[tuple[Floats, Floats]]] = [[] for _ in layers]
        for each in moments:
            if (len(each.rows), len(each.cols)) != layers[each.layer].shape:
                received = len(each.rows), len(each.cols)
                raise InputError(f"expected pilot moments of {layers[each.layer].shape}; received {received}")
            if not (np.isfinite(each.rows).all() and np.isfinite(each.cols).all()):
                raise NonFiniteError("expected finite pilot gradients; received NaN or Inf: check the pilot data", [])
            self._factors[each.layer].append((np.maximum(each.rows, 0), np.maximum(each.cols, 0)))
        sums = [sum(float(rows.sum() * cols.sum()) for rows, cols in factors) for factors in self._factors]
        self.means = mean_moments(sums, [layer.entries for layer in layers], basis.damping_scope)
        self._lambdas = [basis.damping * mean for mean in self.means]
        self.p = sum(layer.entries for layer in layers)

    def moment(self, layer: int, rows: Indices, cols: Indices) -> Floats:
        """Return Λ of entries of a layer, (m,)."""
        total = np.zeros(len(rows))
        for of_rows, of_cols in self._factors[layer]:
            total += of_rows[rows] * of_cols[cols]
        return total

    def blocks(self, layer: int) -> Iterator[tuple[int, Floats]]:
        """Yield a layer's energies by rows: the first row, and (rows, columns) of them."""
        height, width = self.layers[layer].shape
        step = max(1, _BLOCK // width)
        for first in range(0, height, step):
            moment = np.zeros((min(step, height - first), width))
            for of_rows, of_cols in self._factors[layer]:
                moment += np.outer(of_rows[first : first + step], of_cols)
            if self._lambdas[layer] > 0:
                moment /= moment + self._lambdas[layer]
            yield first, moment

    def sums(self, layer: int) -> tuple[Floats, Floats]:
        """Return the sums of a layer's energies by row and by column."""
        height, width = self.layers[layer].shape
        by_row, by_col = np.empty(height), np.zeros(width)
        for first, block in self.blocks(layer):
            by_row[first : first + len(block)] = block.sum(1)
            by_col += block.sum(0)
        return by_row, by_col


def draw_entries(energy: WhitenedEnergy, k: int, generator: np.random.Generator) -> list[Drawn]:
    """Draw about ``k`` entries, π = min(1, c·v), v the energy's share mixed with the uniform share, of every layer."""
    chance = _chance(energy, k)
    offset, drawn = float(generator.random()), []
    for layer, shape in enumerate(energy.layers):
        parts = []
        for first, block in energy.blocks(layer):
            probabilities = chance(block)
            kept, offset = _systematic(probabilities.ravel(), offset)
            rows, cols = np.divmod(kept, shape.shape[1])
            parts.append((rows + first, cols, probabilities.ravel()[kept]))
        drawn.append(Drawn(*(np.concatenate(values) for values in zip(*parts, strict=True))))
    return drawn


def _chance(energy: WhitenedEnergy, k: int) -> Callable[[Floats], Floats]:
    """Return the inclusion probability as a function of the energy; the probabilities of all entries sum to k."""
    counts, sums = np.zeros(_BINS + 1), np.zeros(_BINS + 1)
    for layer in range(len(energy.layers)):
        for _, block in energy.blocks(layer):
            flat = block.ravel()
            with np.errstate(divide="ignore"):
                octave = np.maximum(np.log2(flat), -_OCTAVES)
            bins = np.minimum(-octave * (_BINS / _OCTAVES), _BINS).astype(np.int64)
            counts += np.bincount(bins, minlength=_BINS + 1)
            sums += np.bincount(bins, flat, minlength=_BINS + 1)
    total, filled = sums.sum(), counts > 0
    share = UNIFORM_SHARE if total > 0 else 1.0
    counts, means = counts[filled], sums[filled] / counts[filled]
    slope, base = (1 - share) / max(total, np.finfo(np.float64).tiny), share / energy.p
    factor = _fill(slope * means + base, counts, k)
    return lambda values: np.minimum(1.0, factor * (slope * values + base))


def _fill(values: Floats, counts: Floats, total: float) -> float:
    """Return c such that Σ counts · min(1, c · values) = total, at most Σ counts; the values are positive."""
    order = np.argsort(-values)
    values, counts = values[order], counts[order]
    full = np.concatenate([[0.0], np.cumsum(counts)[:-1]])  # if the larger values are at their limit of 1
    rest = np.cumsum((counts * values)[::-1])[::-1]
    factors = (total - full) / rest
    enough = np.flatnonzero(factors * values <= 1)
    return float(factors[enough[0]] if len(enough) else 1 / values[-1])


def _systematic(chance: Floats, offset: float) -> tuple[Indices, float]:
    """Return the indices at which cumulative probabilities pass an integer plus ``offset``, and the offset of the next.

    Each is among them with exactly its probability, for an offset that is uniform in [0, 1).
    """
    total = np.cumsum(chance)
    passed = np.floor(total - offset + 1)
    return np.flatnonzero(np.diff(passed, prepend=0.0)), float(offset + passed[-1] - total[-1])


def draw_grids(energy: WhitenedEnergy, k: int, generator: np.random.Generator) -> list[Drawn]:
    """Draw about ``k`` entries on a grid in each layer: rows and columns by their energy, π the product of both."""
    sums = [energy.sums(layer) for layer in range(len(energy.layers))]
    sizes = np.array([layer.entries for layer in energy.layers], np.float64)
    energies = np.array([by_row.sum() for by_row, _ in sums])
    share = UNIFORM_SHARE if energies.sum() > 0 else 1.0
    wanted = (1 - share) * energies / max(energies.sum(), np.finfo(np.float64).tiny) + share * sizes / energy.p
    budgets = np.minimum(sizes, sizes * _fill(wanted / sizes, sizes, k) * wanted / sizes)
    drawn = []
    for layer, (by_row, by_col) in enumerate(sums):
        rows_wanted, cols_wanted = _grid_sides(by_row, by_col, float(budgets[layer]))
        rows, of_rows = _draw_side(by_row, rows_wanted, generator)
        cols, of_cols = _draw_side(by_col, cols_wanted, generator)
        chance = np.outer(of_rows, of_cols).ravel()
        drawn.append(Drawn(np.repeat(rows, len(cols)), np.tile(cols, len(rows)), chance))
    return drawn


def _grid_sides(by_row: Floats, by_col: Floats, budget: float) -> tuple[float, float]:
    """Return how many rows and columns to keep of a layer: in the ratio of their effective numbers."""
    height, width = len(by_row), len(by_col)
    ratio = _effective(by_row) / _effective(by_col)
    rows = min(height, max(1.0, np.sqrt(budget * ratio)))
    cols = min(width, max(1.0, budget / rows))
    return float(min(height, budget / cols)), float(cols)


def _effective(values: Floats) -> float:
    square = float(np.square(values).sum())
    return float(values.sum()) ** 2 / square if square > 0 else float(len(values))


def _draw_side(values: Floats, count: float, generator: np.random.Generator) -> tuple[Indices, Floats]:
    """Draw about ``count`` indices, by value and a uniform share; return them and their probabilities."""
    total = float(values.sum())
    share = UNIFORM_SHARE if total > 0 else 1.0
    mixed = (1 - share) * values / (total or 1.0) + share / len(values)
    chance = np.minimum(1, _fill(mixed, np.ones(len(mixed)), count) * mixed)
    kept, _ = _systematic(chance, float(generator.random()))
    return kept, chance[kept]

"""Gradient dropout: keep a random set of gradient entries, drawn uniformly, on a grid or by their importance.

For importance sampling a pilot estimates second moments of every layer's rows and columns. An entry's root mean square
is estimated by √(E[δ_i²] · E[x_j²]), without any full gradient; entries are drawn with probability proportional to it,
mixed with a uniform share: an entry that the pilot never saw move must keep a chance, or estimates are biased where it
later moves.

Each component of the mixture is the product, of a layer or of one use of a tied weight, of a distribution over rows and
one over columns, so drawing costs O(k) and the memory of rows and columns, never that of all entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.compress.compressor import Compressor, Eigenbasis, KroneckerBasis, parse_whole_numbers
from ooc_influence.compress.kronecker import UNIFORM_SHARE, WhitenedEnergy, draw_entries, draw_grids
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.store import LayerShape, Mask, ModuleMask, PilotMoments

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
SAMPLINGS = ("uniform", "importance", "grid")
PILOT_SAMPLES = 256  # for importance sampling; more samples change the probabilities by a few per cent
_MOST_DRAWS = 16  # per entry asked for: beyond that the distribution has too few entries that matter


@dataclass(frozen=True)
class _Component:
    layer: int
    mass: float
    rows: Floats | None  # None: uniform
    cols: Floats | None


class EntryDistribution:
    """A distribution over the entries of layers, to draw from and to evaluate.

    Layers without moments, which a pilot measures, are drawn uniformly. Moments must fit the layers and be finite.
    """

    def __init__(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments]) -> None:
        self._layers = layers
        self._starts = np.cumsum([0, *(layer.entries for layer in layers)])
        roots = []
        for moment in moments:
            shape = layers[moment.layer].shape
            if (len(moment.rows), len(moment.cols)) != shape:
                raise InputError(f"expected pilot moments of {shape}; received {len(moment.rows)}, {len(moment.cols)}")
            rows, cols = np.sqrt(moment.rows), np.sqrt(moment.cols)
            if not (np.isfinite(rows).all() and np.isfinite(cols).all()):
                raise NonFiniteError("expected finite pilot gradients; received NaN or Inf: check the pilot data", [])
            roots.append((moment.layer, rows, cols, float(rows.sum() * cols.sum())))
        total = sum(mass for *_, mass in roots)
        share = UNIFORM_SHARE if total > 0 else 1.0
        self._components = [
            _Component(number, share * layer.entries / self._starts[-1], None, None)
            for number, layer in enumerate(layers)
        ] + [
            _Component(number, (1 - share) * mass / total, rows / rows.sum(), cols / cols.sum())
            for number, rows, cols, mass in roots
            if mass > 0
        ]

    def draw(self, draws: int, generator: np.random.Generator) -> Indices:
        """Draw ``draws`` entries independently: indices into the layers' entries, concatenated."""
        mass = np.array([component.mass for component in self._components])
        counts = generator.multinomial(draws, mass / mass.sum())
        drawn = []
        for component, count in zip(self._components, counts.tolist(), strict=True):
            if count:
                height, width = self._layers[component.layer].shape
                rows = _draw_axis(component.rows, height, count, generator)
                cols = _draw_axis(component.cols, width, count, generator)
                drawn.append(self._starts[component.layer] + rows * width + cols)
        return np.concatenate(drawn)

    def probability(self, layer: int, rows: Indices, cols: Indices) -> Floats:
        """Return the probability of a single draw for entries of a layer, (m,)."""
        height, width = self._layers[layer].shape
        total = np.zeros(len(rows))
        for component in self._components:
            if component.layer == layer:
                of_rows = 1 / height if component.rows is None else component.rows[rows]
                of_cols = 1 / width if component.cols is None else component.cols[cols]
                total += component.mass * of_rows * of_cols
        return total

    def draws_for(self, k: int, generator: np.random.Generator) -> int:
        """Return how many draws yield about ``k`` distinct entries, from trial draws that are discarded.

        The number is fixed before the draws that count, so inclusion probabilities stay exact.
        """
        trial = np.empty(0, np.int64)
        while True:
            trial = np.concatenate([trial, self.draw(max(k, 64), generator)])
            generator.shuffle(trial[-max(k, 64) :])  # draws come component by component
            first = np.sort(np.unique(trial, return_index=True)[1])
            if len(first) >= k:
                return int(first[k - 1]) + 1
            if len(trial) >= _MOST_DRAWS * k:
                return len(trial)


def _draw_axis(weights: Floats | None, size: int, count: int, generator: np.random.Generator) -> Indices:
    if weights is None:
        return np.asarray(generator.integers(0, size, count), np.int64)
    edges = np.cumsum(weights)
    drawn = np.searchsorted(edges, generator.random(count) * edges[-1], side="right")
    return np.asarray(np.minimum(drawn, np.flatnonzero(weights)[-1]))  # rounding must not reach an entry of weight 0


def inclusion(probability: Floats, draws: int) -> Floats:
    """Return π = 1 − (1 − q)^m, the chance that an entry is among m independent draws, to full precision."""
    return np.asarray(-np.expm1(draws * np.log1p(-probability)))


@dataclass(frozen=True)
class Dropout(Compressor):
    """Keep ``k`` randomly chosen gradient entries.

    Parameters
    ----------
    k : int
        Entries kept of each per-sample gradient, which is the numbers stored per row. Importance and grid sampling keep
        about k; the store records the exact number.
    sampling : {"uniform", "importance", "grid"}
        How they are chosen; by default uniformly or, in a Kronecker basis, on a grid. A grid is of uniformly drawn rows
        and columns of each layer or, in a Kronecker basis, of rows and columns drawn by their importance.
    seed : int
        Seed of the choice.
    pilot : int
        Samples from which importance sampling estimates second moments; a basis has its own number.
    reduce : Eigenbasis, optional
        Reduce the k kept entries to the top of their eigenbasis before they are stored.
    basis : KroneckerBasis or "kronecker", optional
        Keep entries of gradients rotated into the Kronecker basis (:mod:`ooc_influence.compress.kronecker`), not of
        gradients in the parameters' own coordinates.

    Raises
    ------
    InputError
        For a k below 1, an unknown sampling or an unknown basis.
    """

    k: int = 4096
    sampling: Literal["uniform", "importance", "grid"] | None = None
    seed: int = 0
    pilot: int = PILOT_SAMPLES
    reduce: Eigenbasis | None = None
    basis: KroneckerBasis | Literal["kronecker"] | None = None

    name: ClassVar[str] = "dropout"

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"k": 1, "seed": 0, "pilot": 1})
        object.__setattr__(self, "basis", KroneckerBasis.parse(self.basis))
        if self.sampling is None:
            object.__setattr__(self, "sampling", "uniform" if self.basis is None else "grid")
        if self.reduce is not None and self.reduce.r > self.k:
            raise InputError(f"expected reduce to at most k = {self.k} numbers; received r = {self.reduce.r}")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"expected sampling one of {', '.join(SAMPLINGS)}; received {self.sampling!r}")

    @property
    @override
    def pilot_samples(self) -> int:
        if self.kronecker is not None:
            return self.kronecker.samples
        return self.pilot if self.sampling == "importance" else 0

    @property
    @override
    def kronecker(self) -> KroneckerBasis | None:
        assert self.basis != "kronecker"  # parsed
        return self.basis

    @property
    @override
    def weighs_entries(self) -> bool:
        return self.basis is None

    @property
    @override
    def wide(self) -> Dropout:
        return replace(self, reduce=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that matter as JSON-ready values, with the compressor's name under ``"name"``."""
        own_pilot = self.sampling == "importance" and self.basis is None
        unused = {"pilot": not own_pilot, "reduce": self.reduce is None, "basis": self.basis is None}
        return {name: value for name, value in super().to_dict().items() if not unused.get(name)}

    @override
    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        p = sum(layer.entries for layer in layers)
        if self.k > p:
            raise InputError(
                f"expected k <= p = {p}, the gradient entries of the selected layers; received k = {self.k}: "
                f"use k={p} to keep all of them"
            )
        generator = np.random.Generator(np.random.PCG64(self.seed))
        if self.k == p:
            return Mask(tuple(all_entries(layer) for layer in layers), tuple(moments))
        if self.kronecker is not None and self.sampling != "uniform":
            draw = draw_grids if self.sampling == "grid" else draw_entries
            drawn = draw(WhitenedEnergy(layers, moments, self.kronecker), self.k, generator)
            return Mask(
                tuple(
                    _module_mask(layer, rows, cols, (1 / np.sqrt(chance)).astype(np.float32))
                    for layer, (rows, cols, chance) in zip(layers, drawn, strict=True)
                ),
                tuple(moments),
            )
        if self.sampling == "grid":
            return Mask(tuple(_grid(layer, self.k / p, generator) for layer in layers))
        if self.sampling == "uniform":
            kept = np.sort(generator.choice(p, self.k, replace=False, shuffle=False))
            weight = np.float32(np.sqrt(p / self.k))
            parts = _by_layer(layers, kept)
            return Mask(tuple(_module_mask(layer, rows, cols, weight) for layer, rows, cols in parts), tuple(moments))
        if not moments:
            raise InputError("expected pilot moments for importance sampling; received none")
        distribution = EntryDistribution(layers, moments)
        draws = self.draws(distribution)
        kept = np.unique(distribution.draw(draws, generator.spawn(2)[1]))
        modules = []
        for number, (layer, rows, cols) in enumerate(_by_layer(layers, kept)):
            chance = inclusion(distribution.probability(number, rows, cols), draws)
            modules.append(_module_mask(layer, rows, cols, (1 / np.sqrt(chance)).astype(np.float32)))
        return Mask(tuple(modules), tuple(moments))

    def draws(self, distribution: EntryDistribution) -> int:
        """Return how many draws importance sampling makes, from a generator of their own."""
        trial = np.random.Generator(np.random.PCG64(self.seed)).spawn(2)[0]
        return distribution.draws_for(self.k, trial)


def _by_layer(layers: Sequence[LayerShape], kept: Indices) -> Iterator[tuple[LayerShape, Indices, Indices]]:
    """Yield each layer with the rows and columns of its kept entries, given as sorted indices over all layers."""
    first = low = 0
    for layer in layers:
        high = low + int(np.searchsorted(kept[low:], first + layer.entries))
        yield (layer, *np.divmod(kept[low:high] - first, layer.shape[1]))
        first, low = first + layer.entries, high


def _grid(layer: LayerShape, share: float, generator: np.random.Generator) -> ModuleMask:
    """Keep the product of random rows and columns, ``share`` of the entries on average."""
    height, width = layer.shape
    rows, cols = height * np.sqrt(share), width * np.sqrt(share)
    if cols < 1:  # keep one column, of fewer rows: dropping the whole layer would cost more variance
        rows, cols = min(height, height * width * share), max(1.0, width * share)
    elif rows < 1:
        rows, cols = max(1.0, height * share), min(width, height * width * share)
    counts = [int(np.floor(ideal + generator.random())) for ideal in (rows, cols)]
    chosen = [
        np.sort(generator.choice(size, min(size, count), replace=False, shuffle=False))
        for size, count in zip((height, width), counts, strict=True)
    ]
    at_rows, at_cols = np.repeat(chosen[0], len(chosen[1])), np.tile(chosen[1], len(chosen[0]))
    return _module_mask(layer, at_rows, at_cols, np.float32(1 / np.sqrt((rows / height) * (cols / width))))


def all_entries(layer: LayerShape) -> ModuleMask:
    """Return the mask that keeps every entry of a layer."""
    height, width = layer.shape
    rows, cols = np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32)
    return ModuleMask(layer, np.repeat(rows, width), np.tile(cols, height), np.ones(layer.entries, np.float32))


def _module_mask(
    layer: LayerShape, rows: Indices, cols: Indices, weight: np.float32 | npt.NDArray[np.float32]
) -> ModuleMask:
    weights = np.broadcast_to(np.asarray(weight, np.float32), len(rows)).copy()
    return ModuleMask(layer, rows.astype(np.int32), cols.astype(np.int32), weights)


def variance_factors(dropout: Dropout, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Floats:
    """Return ν_e of every entry, (p,) float64, layer by layer; O(p) time and memory.

    Parameters
    ----------
    dropout : Dropout
        Uniform or importance sampling; a reduction that follows is ignored.
    layers : sequence of LayerShape
        All tapped layers, as in a store's mask.
    moments : sequence of PilotMoments
        For importance sampling: the pilot's, as in a store's mask.

    Raises
    ------
    InputError
        For sampling on a grid, or by importance in a Kronecker basis, whose entries are not drawn independently, a k
        above p, or missing moments.
    """
    p = sum(layer.entries for layer in layers)
    drawn = dropout.sampling == "importance" and moments and dropout.basis is None
    if dropout.k > p or not (dropout.sampling == "uniform" or drawn):
        raise InputError(
            f"expected uniform sampling of at most p = {p} entries, or importance sampling of parameters with its "
            f"pilot's moments; received sampling={dropout.sampling!r}, k={dropout.k}, {len(moments)} moments, "
            f"basis={dropout.basis}"
        )
    if dropout.k == p:
        return np.zeros(p)
    if dropout.sampling == "uniform":
        return np.full(p, (p / dropout.k - 1) * p / max(1, p - 1))
    distribution = EntryDistribution(layers, moments)
    draws = dropout.draws(distribution)
    chance = np.concatenate([
        distribution.probability(number, *np.divmod(np.arange(layer.entries), layer.shape[1]))
        for number, layer in enumerate(layers)
    ])  # fmt: skip
    alone = np.exp((draws - 1) * np.log1p(-chance))
    return np.asarray(draws * chance * alone / np.square(inclusion(chance, draws)))

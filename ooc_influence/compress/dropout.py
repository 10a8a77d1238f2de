"""Which entries are worth keeping: a mixture of product distributions over all entries of all layers.

A pilot gives second moments of every layer's rows and columns. An entry's root mean square is estimated by
√(E[δ_i²] · E[x_j²]), without any full gradient; entries are drawn with probability proportional to it, mixed with a
uniform share: an entry that the pilot never saw move must keep a chance, or estimates are biased where it later moves.

Each component of the mixture is a layer's (or, where a weight is tied, one of its uses') product of a distribution over
rows and one over columns, so drawing costs O(k) and the memory of rows and columns, never that of all entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.eigenbasis import Eigenbasis
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.store import LayerShape, Mask, ModuleMask, PilotMoments

Floats = npt.NDArray[np.float64]
UNIFORM_SHARE = 0.05
_MOST_DRAWS = 16  # for each entry asked for: beyond that the distribution has too few entries that matter

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Component:
    layer: int
    mass: float
    rows: Floats | None  # None: uniform
    cols: Floats | None


class EntryDistribution:
    """A distribution over the entries of layers, to draw from and to ask for probabilities.

    Parameters
    ----------
    layers : sequence of LayerShape
        The layers.
    moments : sequence of PilotMoments
        At least one for every layer that is to be drawn more than uniformly.

    Raises
    ------
    InputError
        If moments do not fit the layers.
    NonFiniteError
        If they are not finite.
    """

    def __init__(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments]) -> None:
        self._layers = layers
        self._starts = np.cumsum([0, *(layer.entries for layer in layers)])
        roots = []
        for moment in moments:
            shape = layers[moment.layer].shape
            if (len(moment.rows), len(moment.cols)) != shape:
                raise InputError(f"expected pilot moments of {shape}; received {len(moment.rows)}, {len(moment.cols)}")
            root = (np.sqrt(moment.rows), np.sqrt(moment.cols))
            if not all(np.isfinite(part).all() for part in root):
                raise NonFiniteError("expected finite pilot gradients; received NaN or Inf: check the pilot data", [])
            roots.append((moment.layer, *root, float(root[0].sum() * root[1].sum())))
        total = sum(mass for *_, mass in roots)
        share = UNIFORM_SHARE if total > 0 else 1.0
        entries = self._starts[-1]
        self._components = [
            _Component(n, share * layer.entries / entries, None, None) for n, layer in enumerate(layers)
        ]
        self._components += [
            _Component(number, (1 - share) * mass / total, rows / rows.sum(), cols / cols.sum())
            for number, rows, cols, mass in roots
            if mass > 0
        ]

    @property
    def entries(self) -> int:
        """Entries of all layers, p."""
        return int(self._starts[-1])

    def draw(self, draws: int, generator: np.random.Generator) -> Places:
        """Draw entries independently, ``draws`` of them: places in the layers' entries laid end to end."""
        mass = np.array([component.mass for component in self._components])
        counts = generator.multinomial(draws, mass / mass.sum())
        found = []
        for component, count in zip(self._components, counts.tolist(), strict=True):
            if count:
                height, width = self._layers[component.layer].shape
                rows = _draw_axis(component.rows, height, count, generator)
                cols = _draw_axis(component.cols, width, count, generator)
                found.append(self._starts[component.layer] + rows * width + cols)
        return np.concatenate(found)

    def probability(self, layer: int, rows: Places, cols: Places) -> Floats:
        """Return the probability of a single draw for entries of a layer, (m,)."""
        height, width = self._layers[layer].shape
        found = np.zeros(len(rows))
        for component in self._components:
            if component.layer == layer:
                at_rows = 1 / height if component.rows is None else component.rows[rows]
                at_cols = 1 / width if component.cols is None else component.cols[cols]
                found += component.mass * at_rows * at_cols
        return found

    def draws_for(self, k: int, generator: np.random.Generator) -> int:
        """Return how many draws give about ``k`` distinct entries, from draws that are then thrown away.

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


def _draw_axis(weights: Floats | None, size: int, count: int, generator: np.random.Generator) -> Places:
    if weights is None:
        return np.asarray(generator.integers(0, size, count), np.int64)
    edges = np.cumsum(weights)
    places = np.searchsorted(edges, generator.random(count) * edges[-1], side="right")
    return np.asarray(
        np.minimum(places, int(np.flatnonzero(weights)[-1]))
    )  # rounding must not reach an entry without weight


def inclusion(probability: Floats, draws: int) -> Floats:
    """Return π = 1 − (1 − q)^m, the chance that an entry is among m independent draws, to full precision."""
    return np.asarray(-np.expm1(draws * np.log1p(-probability)))


SAMPLINGS = ("uniform", "importance", "grid")
PILOT_SAMPLES = 256  # for importance sampling; more change the probabilities by a few per cent


def parse_whole_numbers(settings: Any, least: Mapping[str, int]) -> None:
    """Check attributes of a frozen dataclass against their least values, and make them plain integers.

    Raises
    ------
    InputError
        If one is no whole number, or below its least value.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < bound:
            raise InputError(f"expected a whole number {name} >= {bound}; received {value!r}")
        object.__setattr__(settings, name, int(value))


@dataclass(frozen=True)
class Dropout:
    """Keep ``k`` randomly chosen gradient entries.

    Parameters
    ----------
    k : int
        Entries kept of each per-sample gradient; the numbers stored a row. With importance and grid sampling about so
        many: the store says how many there are.
    sampling : {"uniform", "importance", "grid"}
        How they are chosen.
    seed : int
        Seed of the choice.
    pilot : int
        Samples that importance sampling looks at beforehand.
    reduce : Eigenbasis, optional
        Turn the k kept entries into the top of their eigenbasis before they are stored.

    Raises
    ------
    InputError
        For a k below 1 or an unknown sampling.
    """

    k: int = 4096
    sampling: Literal["uniform", "importance", "grid"] = "uniform"
    seed: int = 0
    pilot: int = PILOT_SAMPLES
    reduce: Eigenbasis | None = None

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"k": 1, "seed": 0, "pilot": 1})
        if self.reduce is not None and self.reduce.r > self.k:
            raise InputError(f"expected reduce to at most k = {self.k} numbers; received r = {self.reduce.r}")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"expected sampling one of {', '.join(SAMPLINGS)}; received {self.sampling!r}")

    @property
    def pilot_samples(self) -> int:
        """Samples whose moments :meth:`draw` needs; 0 where it needs none."""
        return self.pilot if self.sampling == "importance" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, with the compressor's name under ``"name"``."""
        found: dict[str, Any] = {"name": "dropout", "k": self.k, "sampling": self.sampling, "seed": self.seed}
        found |= {"pilot": self.pilot} if self.pilot_samples else {}
        return found | ({"reduce": self.reduce.to_dict()} if self.reduce else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the compressor that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described another one.
        """
        settings = dict(values)
        if settings.pop("name", None) != "dropout":
            raise InputError(f"expected the settings of a dropout compressor; received {values!r}")
        reduce = settings.pop("reduce", None)
        try:
            return cls(**settings, reduce=None if reduce is None else Eigenbasis.from_dict(reduce))
        except TypeError as error:
            raise InputError(f"expected the settings of a dropout compressor; received {values!r}") from error

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Draw the mask over all entries of ``layers``.

        Parameters
        ----------
        layers : sequence of LayerShape
            The layers.
        moments : sequence of PilotMoments
            For importance sampling: what the pilot saw.

        Raises
        ------
        InputError
            If k is larger than p, or moments are missing.
        """
        p = sum(layer.entries for layer in layers)
        if self.k > p:
            raise InputError(
                f"expected k <= p = {p}, the gradient entries of the selected layers; received k = {self.k}: "
                f"use k={p} to keep all of them"
            )
        generator = np.random.Generator(np.random.PCG64(self.seed))
        if self.k == p:
            return Mask(tuple(_whole(layer) for layer in layers))
        if self.sampling == "grid":
            return Mask(tuple(_grid(layer, self.k / p, generator) for layer in layers))
        if self.sampling == "uniform":
            kept = np.sort(generator.choice(p, self.k, replace=False, shuffle=False))
            weight = np.float32(np.sqrt(p / self.k))
            return Mask(tuple(_module_mask(layer, rows, cols, weight) for layer, rows, cols in _cut(layers, kept)))
        if not moments:
            raise InputError("expected pilot moments for importance sampling; received none")
        distribution = EntryDistribution(layers, moments)
        draws = self.draws(distribution)
        kept = np.unique(distribution.draw(draws, generator.spawn(2)[1]))
        return Mask(_weigh(distribution, draws, layers, kept), tuple(moments))

    def draws(self, distribution: EntryDistribution) -> int:
        """Return how many draws importance sampling makes, from a generator of their own."""
        trial = np.random.Generator(np.random.PCG64(self.seed)).spawn(2)[0]
        return distribution.draws_for(self.k, trial)


def _weigh(
    distribution: EntryDistribution, draws: int, layers: Sequence[LayerShape], kept: npt.NDArray[np.int64]
) -> tuple[ModuleMask, ...]:
    """Return the kept entries of each layer, weighted by 1/√π."""
    modules = []
    for number, (layer, rows, cols) in enumerate(_cut(layers, kept)):
        share = inclusion(distribution.probability(number, rows, cols), draws)
        modules.append(_module_mask(layer, rows, cols, (1 / np.sqrt(share)).astype(np.float32)))
    return tuple(modules)


def _cut(
    layers: Sequence[LayerShape], kept: npt.NDArray[np.int64]
) -> Iterable[tuple[LayerShape, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield each layer with the rows and columns of its kept entries; ``kept`` counts through all layers, sorted."""
    first = low = 0
    for layer in layers:
        high = low + int(np.searchsorted(kept[low:], first + layer.entries))
        yield (layer, *np.divmod(kept[low:high] - first, layer.shape[1]))
        first, low = first + layer.entries, high


def _grid(layer: LayerShape, share: float, generator: np.random.Generator) -> ModuleMask:
    """Keep the product of random rows and columns, ``share`` of the entries on average."""
    height, width = layer.shape
    rows, cols = height * np.sqrt(share), width * np.sqrt(share)
    if cols < 1:  # keep a column, of fewer rows: a layer dropped whole would cost more variance
        rows, cols = min(height, height * width * share), max(1.0, width * share)
    elif rows < 1:
        rows, cols = max(1.0, height * share), min(width, height * width * share)
    counts = [int(np.floor(ideal + generator.random())) for ideal in (rows, cols)]
    chosen = [
        np.sort(generator.choice(size, min(size, count), replace=False, shuffle=False))
        for size, count in ((height, counts[0]), (width, counts[1]))
    ]
    at_rows, at_cols = np.repeat(chosen[0], len(chosen[1])), np.tile(chosen[1], len(chosen[0]))
    return _module_mask(layer, at_rows, at_cols, np.float32(1 / np.sqrt((rows / height) * (cols / width))))


def _whole(layer: LayerShape) -> ModuleMask:
    rows, cols = np.divmod(np.arange(layer.entries), layer.shape[1])
    return _module_mask(layer, rows, cols, np.float32(1))


def _module_mask(
    layer: LayerShape,
    rows: npt.NDArray[np.int64],
    cols: npt.NDArray[np.int64],
    weight: np.float32 | npt.NDArray[np.float32],
) -> ModuleMask:
    weights = np.broadcast_to(np.asarray(weight, np.float32), len(rows)).copy()
    return ModuleMask(layer, rows.astype(np.int32), cols.astype(np.int32), weights)


def variance_factors(dropout: Dropout, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Floats:
    """Return ν_e of every entry, (p,) float64, layer by layer; O(p) time and memory.

    Parameters
    ----------
    dropout : Dropout
        Uniform or importance sampling; a reduction after it is not looked at.
    layers : sequence of LayerShape
        All tapped layers, as a store's mask has them.
    moments : sequence of PilotMoments
        For importance sampling: the pilot's, as a store's mask keeps them.

    Raises
    ------
    InputError
        For sampling on a grid, whose entries are not drawn apart, a k above p, or missing moments.
    """
    p = sum(layer.entries for layer in layers)
    if dropout.k > p or dropout.sampling == "grid" or (dropout.sampling == "importance" and not moments):
        raise InputError(
            f"expected uniform sampling of at most p = {p} entries, or importance sampling with its pilot's moments; "
            f"received sampling={dropout.sampling!r}, k={dropout.k}, {len(moments)} moments"
        )
    if dropout.k == p:
        return np.zeros(p)
    if dropout.sampling == "uniform":
        return np.full(p, (p / dropout.k - 1) * p / max(1, p - 1))
    distribution = EntryDistribution(layers, moments)
    draws = dropout.draws(distribution)
    chances = []
    for number, layer in enumerate(layers):
        rows, cols = np.divmod(np.arange(layer.entries), layer.shape[1])
        chances.append(distribution.probability(number, rows, cols))
    chance = np.concatenate(chances)
    alone = np.exp((draws - 1) * np.log1p(-chance))
    return np.asarray(draws * chance * alone / np.square(inclusion(chance, draws)))

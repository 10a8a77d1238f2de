"""Dropout compression: keep k of p gradient entries (arXiv 2509.15651).

Entry e is kept with probability π_e and multiplied by 1/√π_e, so for gradients g and h::

    E[Σ_kept g_e h_e / π_e] = Σ_e g_e h_e

stored dot products estimate full ones without bias, whatever the π. Three ways of choosing entries:

- uniform (the paper's): every set of k entries is as probable as any other, over all layers together; π = k/p.
- importance: entries are drawn in proportion to their root mean square as a pilot estimates it
  (:mod:`.distribution`). m draws, fixed beforehand, give π_e = 1 − (1 − q_e)^m; distinct entries are kept, about k.
- grid: of each layer the product of some rows and some columns, whose entries are one small matrix product. Their
  numbers are the ideal ones √(k/p)·size, rounded up or down at random so that π = k/p exactly.

At k = p the mask is the identity with weight 1. Time and memory are O(k) and the layers' sides, never O(p).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.distribution import EntryDistribution, inclusion
from ooc_influence.compress.eigenbasis import Eigenbasis
from ooc_influence.errors import InputError
from ooc_influence.store import LayerShape, Mask, ModuleMask, PilotMoments

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

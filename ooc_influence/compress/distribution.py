"""Which entries are worth keeping: a mixture of product distributions over all entries of all layers.

A pilot gives second moments of every layer's rows and columns. An entry's root mean square is estimated by
√(E[δ_i²] · E[x_j²]), without any full gradient; entries are drawn with probability proportional to it, mixed with a
uniform share: an entry that the pilot never saw move must keep a chance, or estimates are biased where it later moves.

Each component of the mixture is a layer's (or, where a weight is tied, one of its uses') product of a distribution over
rows and one over columns, so drawing costs O(k) and the memory of rows and columns, never that of all entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.store import LayerShape, PilotMoments

UNIFORM_SHARE = 0.05
_MOST_DRAWS = 16  # for each entry asked for: beyond that the distribution has too few entries that matter

Floats = npt.NDArray[np.float64]
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

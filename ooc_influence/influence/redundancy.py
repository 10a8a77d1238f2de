"""Greedy choice of rows that do not repeat each other: the same rows as by one choice after the other, in blocks.

The next row chosen is the one of the largest gain, s_j · (1 - ρ max(0, max_i cos(i, j))), i the rows chosen before and
cos the cosine in the inner product of the scores, gᵢᵀ (F + λI)⁻¹ gⱼ. That is the rule of maximal marginal relevance
(Carbonell and Goldstein, SIGIR 1998), with the similarity as a factor, which needs no common scale, in place of a
difference.

A gain never grows while rows are chosen. So one that was computed before bounds the present one from above, and most
are never computed again (lazy greedy; Minoux 1978). A pool of the rows of the largest bounds is brought up to date with
one product, its Gram matrix is another, and rows are chosen from it as long as no bound outside is larger. Memory holds
the pool, and a few numbers for each candidate; the size of the pool changes nothing but roundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.checkpoints import Checkpoint
from ooc_influence.influence.engine import Floats, HostEngine
from ooc_influence.progress import Progress
from ooc_influence.store import read_blocks

Numbers = npt.NDArray[np.int64]
_NONE = np.float32(-np.inf)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows to choose from.

    Attributes
    ----------
    rows : (c,) int64
        Their numbers in the train store, ascending.
    codes : (c,) int64
        The value of each that quotas count by.
    caps : (V,) int64
        How many rows of each value may be chosen.
    count : int
        How many rows are to be chosen; the caps allow as many.
    """

    rows: Numbers
    codes: Numbers
    caps: Numbers
    count: int

    def best(self, scores: npt.NDArray[np.float32] | npt.NDArray[np.float64]) -> Numbers:
        """Return the indices of those of the largest scores (c,), within the caps: in order, ties by row number."""
        order = np.argsort(-scores, kind="stable")
        codes = self.codes[order]
        by_code = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[by_code], np.arange(len(self.caps)))
        rank = np.empty(len(order), np.int64)
        rank[by_code] = np.arange(len(order)) - starts[codes[by_code]]
        return np.asarray(order[rank < self.caps[codes]][: self.count])


@dataclass(frozen=True, eq=False)
class TurnedRows:
    """Rows of every checkpoint, multiplied by (F + λI)⁻¹ and divided by their norms.

    Attributes
    ----------
    arrays : list of (p, k) float32
        By checkpoint.
    norms : (C, p) float64
        √(gᵀ (F + λI)⁻¹ g).
    """

    arrays: list[Floats]
    norms: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cosines:
    """Cosines of train rows in the inner product of scores, the mean over checkpoints.

    Attributes
    ----------
    checkpoints : tuple of Checkpoint
        With one λ each.
    block_rows : int
        Rows read at a time.
    """

    checkpoints: tuple[Checkpoint, ...]
    block_rows: int

    def turned(self, rows: Numbers) -> TurnedRows:
        """Return some rows, ascending numbers, ready for :meth:`with_rows`."""
        arrays, norms = [], []
        for checkpoint in self.checkpoints:
            store = checkpoint.train
            gradients = np.empty((len(rows), store.k), np.float32)
            for block in read_blocks(store, 0, len(rows), self.block_rows, numbers=rows):
                gradients[block.start : block.stop] = block.gradients
            if checkpoint.curvature is None:
                product = gradients.astype(np.float64)
            else:
                product = checkpoint.curvature.precondition(gradients, checkpoint.lambdas)[0]
            squares = np.einsum("pk,pk->p", gradients, product) * store.layout.encoding.energy
            norm = np.sqrt(np.maximum(squares, 0))
            product /= np.where(norm > 0, norm, 1)[:, None]
            arrays.append(product.astype(np.float32))
            norms.append(norm)
        return TurnedRows(arrays, np.stack(norms))

    def with_rows(self, left: TurnedRows, rows: Numbers, norms: npt.NDArray[np.float64]) -> Floats:
        """Return the cosines of turned rows with rows of any order, whose norms are (C, m): (p, m)."""
        order = np.argsort(rows, kind="stable")
        total = np.zeros((left.norms.shape[1], len(rows)), np.float32)
        inverse = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0) / len(self.checkpoints)
        with HostEngine() as engine:
            for checkpoint, array, scale in zip(self.checkpoints, left.arrays, inverse.astype(np.float32), strict=True):
                store = checkpoint.train
                for block in engine.picked(store, rows[order], self.block_rows, as_stored=False):
                    part = order[block.start : block.stop]
                    products = engine.empty(len(total), len(part))
                    engine.multiply(array, block.gradients, products)
                    total[:, part] += products * scale[part]
        return total


def choose_diverse(
    candidates: Candidates, scores: Floats, redundancy: float, cosines: Cosines, pool: int, progress: Progress
) -> tuple[Numbers, Floats]:
    """Return the indices of the rows chosen one after the other, and the gain of each, (count,).

    Parameters
    ----------
    candidates : Candidates
        Rows to choose from.
    scores : (c,) float32
        Their scores. One that is not positive counts as it is.
    redundancy : float
        ρ, from 0 to 1.
    cosines : Cosines
        Of these rows.
    pool : int
        Rows whose cosines are computed at once.
    progress : Progress
        Advanced by the rows chosen.
    """
    state = _State.new(candidates, scores, redundancy, len(cosines.checkpoints))
    while state.chosen < candidates.count:
        before = state.chosen
        _choose_from_pool(state, cosines, state.largest_bounds(pool))
        progress.advance(state.chosen - before)
    return state.order, state.gains_chosen


@dataclass(eq=False)
class _State:
    """What is known of the candidates.

    Attributes
    ----------
    bounds : (c,) float32
        The gain of each, or what it was when it was last computed.
    cosine : (c,) float32
        Its largest cosine with the first ``known`` (c,) of the rows chosen.
    free : (c,) bool
        Whether it is not chosen.
    room : (V,) int64
        How many of each value may still be chosen.
    order, gains_chosen, norms : (count,), (count,), (C, count)
        The rows chosen, of which there are ``chosen``.
    """

    candidates: Candidates
    scores: Floats
    redundancy: float
    bounds: Floats
    cosine: Floats
    known: npt.NDArray[np.int64]
    free: npt.NDArray[np.bool_]
    room: Numbers
    order: Numbers
    gains_chosen: Floats
    norms: npt.NDArray[np.float64]
    chosen: int = 0

    @classmethod
    def new(cls, candidates: Candidates, scores: Floats, redundancy: float, checkpoints: int) -> _State:
        c, count = len(scores), candidates.count
        return cls(
            candidates, scores, redundancy, scores.copy(), np.zeros(c, np.float32), np.zeros(c, np.int64),
            np.ones(c, bool), candidates.caps.copy(), np.empty(count, np.int64), np.empty(count, np.float32),
            np.empty((checkpoints, count)),
        )  # fmt: skip

    def gains(self, part: Numbers, cosine: Floats) -> Floats:
        """Return the gains of some candidates of these largest cosines."""
        scores = self.scores[part]
        factor = np.float32(1) - np.float32(self.redundancy) * np.clip(cosine, 0, 1)
        return np.asarray(np.where(scores > 0, scores * factor, scores), np.float32)

    def open_bounds(self) -> Floats:
        """Return the bounds of those that may still be chosen, -inf of others."""
        return np.asarray(np.where(self.free & (self.room > 0)[self.candidates.codes], self.bounds, _NONE))

    def largest_bounds(self, pool: int) -> Numbers:
        """Return the ``pool`` candidates of the largest bounds, ascending; ties by row number."""
        bounds = self.open_bounds()
        if pool >= len(bounds):
            return np.flatnonzero(bounds > _NONE)
        least = np.partition(bounds, len(bounds) - pool)[len(bounds) - pool]
        above = np.flatnonzero(bounds > least)
        equal = np.flatnonzero((bounds == least) & (bounds > _NONE))[: pool - len(above)]
        return np.sort(np.concatenate([above, equal]))

    def take(self, index: int, gain: np.float32, norms: npt.NDArray[np.float64]) -> None:
        """Choose a candidate."""
        self.order[self.chosen], self.gains_chosen[self.chosen] = index, gain
        self.norms[:, self.chosen] = norms
        self.free[index] = False
        self.room[self.candidates.codes[index]] -= 1
        self.chosen += 1


def _choose_from_pool(state: _State, cosines: Cosines, pool: Numbers) -> None:
    """Bring the gains of a pool up to date, and choose from it while no bound outside is larger."""
    rows, codes = state.candidates.rows, state.candidates.codes
    left = cosines.turned(rows[pool])
    cosine = state.cosine[pool]
    for low in range(int(state.known[pool].min()), state.chosen, len(pool)):
        part = slice(low, min(state.chosen, low + len(pool)))
        found = cosines.with_rows(left, rows[state.order[part]], state.norms[:, part])
        np.maximum(cosine, found.max(axis=1), out=cosine)
    bounds = state.open_bounds()
    bounds[pool] = _NONE
    rival = int(np.argmax(bounds))  # of equal ones the first
    limit = bounds[rival]
    gains, gram = state.gains(pool, cosine), None
    while state.chosen < state.candidates.count:
        best = int(np.argmax(gains))
        if gains[best] == _NONE or gains[best] < limit or (gains[best] == limit and pool[best] > rival):
            break
        if gram is None:
            gram = cosines.with_rows(left, rows[pool], left.norms)
        state.take(int(pool[best]), gains[best], left.norms[:, best])
        np.maximum(cosine, gram[:, best], out=cosine)
        allowed = state.free[pool] & (state.room[codes[pool]] > 0)
        gains = np.where(allowed, state.gains(pool, cosine), _NONE)
    state.cosine[pool], state.known[pool] = cosine, state.chosen
    state.bounds[pool] = state.gains(pool, cosine)

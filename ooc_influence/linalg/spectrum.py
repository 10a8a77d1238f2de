"""The top of the spectrum of F = (1/m) Σ w_i g_i g_iᵀ over some rows of a store, in bounded memory.

Three ways, by what fits: F itself, factorised, where k is at most m; the Gram matrix K = A Aᵀ (m, m) of the weighted
rows A = diag(√w) G, whose eigenvectors U give V = Aᵀ U / √(eigenvalue), where m is smaller; and, where neither fits,
block subspace iteration Q ← orth(AᵀA Q) with a Rayleigh-Ritz step at the end, whose memory is 2 k (r + 128) numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ooc_influence.errors import InputError, MemoryBudgetError, NonFiniteError
from ooc_influence.linalg.blas import GramAccumulator
from ooc_influence.linalg.eigen import eigen_bytes
from ooc_influence.linalg.weights import Weighting, row_weights
from ooc_influence.memory import Need, block_limit, budget_bytes, format_bytes, plan_block_rows, process_anonymous
from ooc_influence.progress import Progress, tick
from ooc_influence.store import GradientStore
from ooc_influence.stripes import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process

Rows = npt.NDArray[np.float32]
Sum = tuple[npt.NDArray[np.float64], int]
_EXTRA = 128  # columns beyond r in subspace iteration
_PASSES = 4  # of subspace iteration over the rows
_LARGEST_GRAM = 24576  # rows; beyond, its eigenvectors take longer than the iteration


class Spectrum(NamedTuple):
    """The top eigenpairs of F.

    Attributes
    ----------
    eigenvalues : (r,) float64
        Largest first.
    vectors : (k, r) float32
        Eigenvectors as columns.
    trace : float
        tr(F).
    rows : int
        Live rows used, m.
    """

    eigenvalues: npt.NDArray[np.float64]
    vectors: Rows
    trace: float
    rows: int


@dataclass(frozen=True)
class WeightedRows:
    """Some rows of a store, numbered from 0, each times √w.

    Attributes
    ----------
    store : GradientStore
        The store.
    ranges : sequence of (start, stop)
        The rows, ascending.
    weights : {"ggn", "trak"} or None
        Their weights.
    """

    store: GradientStore
    ranges: Sequence[tuple[int, int]]
    weights: Weighting | None = None

    @property
    def path(self) -> object:
        """Where the store is: tasks of other processes must be able to see it."""
        return self.store.path

    @property
    def m(self) -> int:
        """Rows, dropped ones included."""
        return sum(stop - start for start, stop in self.ranges)

    def read(self, low: int, high: int) -> tuple[Rows, int]:
        """Return rows ``low`` to ``high`` times √w, (high - low, k), zero where dropped; and how many are live."""
        parts, first, live = [], 0, 0
        for start, stop in self.ranges:
            a, b = start + max(0, low - first), min(stop, start + high - first)
            first += stop - start
            if a >= b:
                continue
            rows = self.store.rows(a, b)
            if self.weights is not None:
                rows *= np.sqrt(row_weights(self.store.small("loss", a, b), self.weights))[:, None].astype(np.float32)
            dropped = self.store.small("dropped", a, b) if self.store.has_dropped else np.zeros(b - a, bool)
            rows[dropped] = 0
            live += int((~dropped).sum())
            parts.append(rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts), live


def top_spectrum(
    rows: WeightedRows, r: int, *, workers: int | None = None, memory: int | str | None = None, progress: bool | None
) -> Spectrum:
    """Return the ``r`` largest eigenvalues of F and their eigenvectors.

    Raises
    ------
    InputError
        If there are fewer than r rows, or r is larger than k.
    MemoryBudgetError
        If the budget holds none of the three ways.
    NonFiniteError
        If rows are too large for float32 sums.
    """
    k, m = rows.store.k, rows.m
    if not 1 <= r <= min(k, m):
        raise InputError(
            f"expected r between 1 and {min(k, m)}, the smaller of the {k} entries and the {m} pilot rows; received "
            f"{r}: use more rows, a wider mask or a smaller r"
        )
    slots = check_workers(workers)
    shared = slots_per_process(slots)
    room = budget_bytes(memory) - process_anonymous()
    ways = [(_by_iteration, 6 * 4 * k * (r + _EXTRA), 2 * 4 * k * (r + _EXTRA), _PASSES)]
    if m <= _LARGEST_GRAM:
        ways.insert(0, (_by_gram, 28 * m * m + 4 * k * r, 4 * k * r, 2))
    if k <= m:
        ways.insert(0, (_by_fisher, eigen_bytes(k) + 4 * k * r, GramAccumulator.nbytes(k), 1))
    needs = [
        Need(f"an eigenbasis of {r} of {k} entries", *way[1:3], 3 * 4 * k, max_rows=block_limit(k)) for way in ways
    ]
    chosen = next((n for n, need in enumerate(needs) if need.peak(need.min_rows, shared, 0) <= room), None)
    if chosen is None:
        least = min(need.peak(need.min_rows, shared, 0) for need in needs)
        raise MemoryBudgetError(
            f"{needs[0].stage} from {m} rows needs {format_bytes(least)} more than the process holds, budget "
            f"{format_bytes(max(0, room))}: use a smaller r or k, fewer workers, or more memory"
        )
    (function, *_, passes), need = ways[chosen], needs[chosen]
    block_rows = plan_block_rows(need, memory, shared)
    with Progress("eigenbasis", passes * m, progress) as bar:
        found = function(rows, r, block_rows, cut_stripes(0, m, block_rows, slots), slots, bar)
    if not np.isfinite(found.trace):
        raise NonFiniteError("expected finite rows; received sums that overflow: scale the loss", [])
    return found


def _blocks(stripe: Stripe, step: int) -> list[tuple[int, int]]:
    return [(low, min(stripe.stop, low + step)) for low in range(stripe.start, stripe.stop, step)]


def _by_fisher(rows: WeightedRows, r: int, step: int, stripes: list[Stripe], slots: int, bar: Progress) -> Spectrum:
    total, live = run_stripes(_fisher_stripe, stripes, bar, rows, step, slots=slots, reduce=_add_pairs)
    total /= max(1, live)
    trace, k = float(np.trace(total)), len(total)
    values, vectors = scipy.linalg.eigh(
        total.T, overwrite_a=True, check_finite=False, subset_by_index=(k - r, k - 1), driver="evr"
    )
    return Spectrum(np.maximum(values[::-1], 0), vectors[:, ::-1].astype(np.float32), trace, live)


def _fisher_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int) -> Sum:
    accumulator, live = GramAccumulator(rows.store.k), 0
    for low, high in _blocks(stripe, step):
        block, count = rows.read(low, high)
        accumulator.add(block)
        live += count
        tick(key, high - low)
    return accumulator.total(), live


def _add_pairs(left: Sum, right: Sum) -> Sum:
    return left[0] + right[0], left[1] + right[1]


def _by_gram(rows: WeightedRows, r: int, step: int, stripes: list[Stripe], slots: int, bar: Progress) -> Spectrum:
    m = rows.m
    gram = np.zeros((m, m))
    live = 0
    for slabs, count in run_stripes(_gram_stripe, stripes, bar, rows, step, slots=slots):
        live += count
        for low, slab in slabs:
            gram[low : low + len(slab), : slab.shape[1]] = slab
    trace = float(np.trace(gram)) / max(1, live)
    values, vectors = scipy.linalg.eigh(  # reads the lower triangle
        gram, lower=True, overwrite_a=True, check_finite=False, subset_by_index=(m - r, m - 1), driver="evr"
    )
    values = np.maximum(values[::-1], 0)
    inverse = np.where(values > values[0] * 1e-12, 1 / np.sqrt(np.maximum(values, 1e-300)), 0)
    turned = (vectors[:, ::-1] * inverse).astype(np.float32)
    found = run_stripes(_lift_stripe, stripes, bar, rows, step, turned, slots=slots, reduce=np.add)
    return Spectrum(values / max(1, live), found, trace, live)


def _gram_stripe(
    stripe: Stripe, key: str, rows: WeightedRows, step: int
) -> tuple[list[tuple[int, npt.NDArray[np.float32]]], int]:
    """Return the rows of K that belong to a stripe, up to the diagonal, block by block."""
    slabs, live = [], 0
    for low, high in _blocks(stripe, step):
        block, count = rows.read(low, high)
        slab = np.empty((high - low, high), np.float32)
        for a, b in _blocks(Stripe(0, low), step):
            np.matmul(block, rows.read(a, b)[0].T, out=slab[:, a:b])
        np.matmul(block, block.T, out=slab[:, low:high])
        slabs.append((low, slab))
        live += count
        tick(key, high - low)
    return slabs, live


def _lift_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int, turned: Rows) -> Rows:
    """Return Σ Aᵀ U / √e over a stripe, (k, r)."""
    total = np.zeros((rows.store.k, turned.shape[1]), np.float32)
    for low, high in _blocks(stripe, step):
        total += rows.read(low, high)[0].T @ turned[low:high]
        tick(key, high - low)
    return total


def _by_iteration(rows: WeightedRows, r: int, step: int, stripes: list[Stripe], slots: int, bar: Progress) -> Spectrum:
    k = rows.store.k
    columns = min(k, rows.m, r + _EXTRA)
    basis = np.random.default_rng(0).standard_normal((k, columns), np.float32)
    for _ in range(_PASSES):
        basis = scipy.linalg.qr(basis, mode="economic", overwrite_a=True, check_finite=False)[0]
        product, (live, squares) = run_stripes(
            _product_stripe, stripes, bar, rows, step, basis, slots=slots, reduce=_add_products
        )
        last, basis = basis, product
    small = (last.T @ basis).astype(np.float64) / max(1, live)
    values, turn = scipy.linalg.eigh((small + small.T) / 2)
    vectors = last @ turn[:, ::-1][:, :r].astype(np.float32)
    return Spectrum(np.maximum(values[::-1][:r], 0), vectors, squares / max(1, live), live)


def _product_stripe(
    stripe: Stripe, key: str, rows: WeightedRows, step: int, basis: Rows
) -> tuple[Rows, tuple[int, float]]:
    """Return AᵀA Q over a stripe, (k, c), with its live rows and its sum of squares."""
    total, live, squares = np.zeros_like(basis), 0, 0.0
    for low, high in _blocks(stripe, step):
        block, count = rows.read(low, high)
        total += block.T @ (block @ basis)
        live += count
        squares += float(np.vdot(block, block))
        tick(key, high - low)
    return total, (live, squares)


def _add_products(
    left: tuple[Rows, tuple[int, float]], right: tuple[Rows, tuple[int, float]]
) -> tuple[Rows, tuple[int, float]]:
    return left[0] + right[0], (left[1][0] + right[1][0], left[1][1] + right[1][1])

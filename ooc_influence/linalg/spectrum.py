"""Eigendecomposition of symmetric matrices in float64: F = V diag(e) Vᵀ."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ooc_influence.errors import InputError, MemoryBudgetError, NonFiniteError
from ooc_influence.linalg.accumulate import GramAccumulator
from ooc_influence.linalg.backend import add_product
from ooc_influence.linalg.rows import Rows, WeightedRows
from ooc_influence.memory import (
    PRODUCT_ROWS,
    MemoryModel,
    block_limit,
    budget_bytes,
    format_bytes,
    held_now,
    plan_block_rows,
)
from ooc_influence.parallel import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process
from ooc_influence.progress import Progress, tick

Matrix = npt.NDArray[np.float64]


def symmetric_eigen(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Return eigenvalues (d,), largest first, and eigenvectors (d, d) as columns; ``matrix`` is overwritten.

    The matrix is positive semi-definite by construction; eigenvalues that rounding made negative become zero.
    """
    values, vectors = scipy.linalg.eigh(matrix.T, overwrite_a=True, check_finite=False, driver="evd")
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


_EXTRA = 128  # columns beyond r in subspace iteration
_PASSES = 4  # of subspace iteration over the rows
_LARGEST_GRAM = 24576  # rows; beyond, its eigenvectors take longer than the iteration
_TILE = 1024  # rows of the eigenvectors looked at at a time


class Spectrum(NamedTuple):
    """The top eigenpairs of F.

    Attributes
    ----------
    eigenvalues : (r,) float64
        Largest first; vᵀ F v of each vector.
    vectors : (k, r) float32
        Orthonormal columns, the largest entry of each positive.
    trace : float
        tr(F).
    rows : int
        Live rows used, m.
    """

    eigenvalues: Matrix
    vectors: Rows
    trace: float
    rows: int


class Solver(NamedTuple):
    """A way to the top of a spectrum: ``run(rows, r, step, slots, bar) -> (eigenvalues, vectors, trace)``.

    Attributes
    ----------
    name : str
        What it factorises.
    run : callable
        See above.
    need : Need
        What it takes in memory.
    passes : int
        How often it reads the rows.
    flops, factoring : float
        Arithmetic over the rows, and of the factorisation.
    """

    name: str
    run: Callable[..., tuple[Matrix, Rows, float]]
    need: MemoryModel
    passes: int
    flops: float
    factoring: float


def spectrum_solvers(k: int, m: int, r: int, slots: int = 1, reading: int = 0) -> list[Solver]:
    """Return the ways to the top r eigenpairs of m rows of k numbers, the quickest first.

    ``slots`` share a process, each of which holds ``reading`` bytes to read the store.
    """

    def need(fixed: int, per_row: int) -> MemoryModel:
        stage = f"an eigenbasis of {r} of {k} entries"
        return MemoryModel(
            stage, fixed, reading, per_row, max_rows=block_limit(k, least=PRODUCT_ROWS), advice="a smaller r or k"
        )

    several = slots > 1  # a sum of two results is a third one
    c = min(k, m, r + _EXTRA)
    found = []
    if k <= m:
        sums = slots * GramAccumulator.nbytes(k) + several * 8 * k * k
        held = need(max(sums, 8 * k * k + 12 * k * r), 4 * k)
        found.append(Solver("Fisher matrix", _by_fisher, held, 1, float(m) * k * k, 9.0 * k**3))
    if m <= _LARGEST_GRAM:
        lifting = 4 * m * r + (slots + several) * 4 * k * r
        held = need(max(10 * m * m, 8 * m * (m + r), 12 * m * r, lifting, 8 * k * r), 2 * 4 * k)
        found.append(Solver("Gram matrix", _by_gram, held, 2, float(m) * m * k + 2.0 * m * k * r, 9.0 * m**3))
    multiplying = (1 + slots + several) * 4 * k * c
    held = need(max(multiplying, 4 * k * c + 4 * k * r) + 40 * c * c, 4 * k + 4 * c)
    flops, factoring = 4.0 * _PASSES * m * k * c, 4.0 * _PASSES * k * c**2
    found.append(Solver("subspace iteration", _by_iteration, held, _PASSES, flops, factoring))
    return found


def top_spectrum(
    rows: WeightedRows, r: int, *, workers: int | None = None, memory: int | str | None = None, progress: bool | None
) -> Spectrum:
    """Return the ``r`` largest eigenvalues of F and their eigenvectors.

    Raises
    ------
    InputError
        If there are fewer than r live rows, or r is larger than k.
    MemoryBudgetError
        If the budget holds none of the three ways.
    NonFiniteError
        If rows are too large for float32 sums.
    """
    k, m = rows.store.k, rows.m
    if not 1 <= r <= min(k, rows.live):
        raise InputError(
            f"expected r between 1 and {min(k, rows.live)}, the smaller of the {k} entries and the {rows.live} live "
            f"rows; received {r}: use more rows, a wider mask or a smaller r"
        )
    slots = check_workers(workers)
    shared = slots_per_process(slots)
    ways = spectrum_solvers(k, m, r, shared, rows.store.reading_bytes)
    room = budget_bytes(memory) - held_now()
    chosen = next((way for way in ways if way.need.peak(way.need.min_rows, shared, 0) <= room), None)
    if chosen is None:
        least = min(way.need.peak(way.need.min_rows, shared, 0) for way in ways)
        raise MemoryBudgetError(
            f"{ways[0].need.stage} from {m} rows needs {format_bytes(least)} more than the process holds, budget "
            f"{format_bytes(max(0, room))}: use a smaller r or k, fewer workers, or more memory"
        )
    step = plan_block_rows(chosen.need, memory, shared)
    with Progress("eigenbasis", chosen.passes * m, progress) as bar:
        values, vectors, trace = chosen.run(rows, r, step, slots, bar)
    _fix_signs(vectors)
    return Spectrum(np.maximum(values, 0), vectors, trace, rows.live)


def _checked(trace: float) -> float:
    if not np.isfinite(trace):
        raise NonFiniteError("expected finite rows; received sums that overflow: scale the loss", [])
    return trace


def _fix_signs(vectors: Rows) -> None:
    """Make the largest entry of each column positive: the signs that LAPACK returns depend on rounding."""
    largest = np.zeros(vectors.shape[1], np.float32)
    for start in range(0, len(vectors), _TILE):
        part = vectors[start : start + _TILE]
        found = part[np.abs(part).argmax(0), np.arange(len(largest))]
        largest = np.where(np.abs(found) > np.abs(largest), found, largest)
    vectors *= np.where(largest < 0, np.float32(-1), np.float32(1))


def _top_eigen(matrix: Matrix, r: int) -> tuple[Matrix, Matrix]:
    """Return the r largest eigenvalues, in ascending order, and vectors (d, r) of a matrix in Fortran's order.

    Its lower triangle is read, and the matrix overwritten.
    """
    d = len(matrix)
    found: tuple[Matrix, Matrix] = scipy.linalg.eigh(
        matrix, lower=True, overwrite_a=True, check_finite=False, subset_by_index=(d - r, d - 1), driver="evr"
    )
    return found


def _orthonormal(columns: Rows) -> Rows:
    """Return orthonormal columns with the span of ``columns`` (k, c), which are overwritten: in Fortran's order."""
    found: Rows = scipy.linalg.qr(columns, mode="economic", overwrite_a=True, check_finite=False)[0]
    return found


def _blocks(stripe: Stripe, step: int) -> list[tuple[int, int]]:
    return [(low, min(stripe.stop, low + step)) for low in range(stripe.start, stripe.stop, step)]


def _by_fisher(rows: WeightedRows, r: int, step: int, slots: int, bar: Progress) -> tuple[Matrix, Rows, float]:
    stripes = cut_stripes(0, rows.m, step, slots)
    total = run_stripes(_fisher_stripe, stripes, bar, rows, step, slots=slots, reduce=np.add)
    total /= rows.live
    trace = _checked(float(np.trace(total)))
    values, vectors = _top_eigen(total.T, r)
    return values[::-1], np.ascontiguousarray(vectors[:, ::-1], np.float32), trace


def _fisher_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int) -> Matrix:
    accumulator, buffer = GramAccumulator(rows.store.k), rows.buffer(step)
    for low, high in _blocks(stripe, step):
        accumulator.add(rows.read(low, high, buffer))
        tick(key, high - low)
    return accumulator.total()


def _by_gram(rows: WeightedRows, r: int, step: int, slots: int, bar: Progress) -> tuple[Matrix, Rows, float]:
    m = rows.m
    slabs = run_stripes(_gram_stripe, _cut_triangle(m, step, slots), bar, rows, step, slots=slots)
    gram = np.empty((m, m), order="F")
    for part in slabs:
        while part:
            low, slab = part.pop()
            gram[low : low + len(slab), : slab.shape[1]] = slab
    trace = _checked(float(np.trace(gram)) / rows.live)
    values, vectors = _top_eigen(gram, r)
    del gram
    # a direction of eigenvalue zero comes out as zeros, and one near zero inexact: QR makes both orthonormal
    vectors *= np.where(values > values[-1] * 1e-12, 1 / np.sqrt(np.maximum(values, 1e-300)), 0)
    turned = np.ascontiguousarray(vectors[:, ::-1], np.float32)
    del vectors
    stripes = cut_stripes(0, m, step, slots)
    lifted = _orthonormal(run_stripes(_lift_stripe, stripes, bar, rows, step, turned, slots=slots, reduce=np.add))
    return values[::-1] / rows.live, np.ascontiguousarray(lifted), trace


def _cut_triangle(m: int, step: int, count: int) -> list[Stripe]:
    """Cut m rows of a lower triangle into at most ``count`` stripes of whole blocks and about equal areas."""
    blocks = -(-m // step)
    edges = sorted({round(blocks * (number / count) ** 0.5) for number in range(count + 1)})
    return [Stripe(low * step, min(m, high * step)) for low, high in pairwise(edges)]


def _gram_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int) -> list[tuple[int, Rows]]:
    """Return the rows of K that belong to a stripe, up to the diagonal, block by block."""
    slabs, mine, others = [], rows.buffer(step), rows.buffer(step)
    for low, high in _blocks(stripe, step):
        block = rows.read(low, high, mine)
        slab = np.empty((high - low, high), np.float32)
        for a, b in _blocks(Stripe(0, low), step):
            slab[:, a:b] = block @ rows.read(a, b, others).T
        slab[:, low:high] = block @ block.T
        slabs.append((low, slab))
        tick(key, high - low)
    return slabs


def _lift_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int, turned: Rows) -> Rows:
    """Return Σ Aᵀ U / √e over a stripe, (k, r)."""
    total = np.zeros((rows.store.k, turned.shape[1]), np.float32, order="F")
    buffer = rows.buffer(step)
    for low, high in _blocks(stripe, step):
        add_product(total, rows.read(low, high, buffer), turned[low:high])
        tick(key, high - low)
    return total


def _by_iteration(rows: WeightedRows, r: int, step: int, slots: int, bar: Progress) -> tuple[Matrix, Rows, float]:
    k, stripes = rows.store.k, cut_stripes(0, rows.m, step, slots)
    columns = min(k, rows.m, r + _EXTRA)
    basis = np.random.default_rng(0).standard_normal((columns, k), np.float32).T
    basis = _orthonormal(basis)
    for number in range(_PASSES):
        product, squares = run_stripes(
            _product_stripe, stripes, bar, rows, step, basis, slots=slots, reduce=_add_products
        )
        trace = _checked(squares / rows.live)
        if number < _PASSES - 1:
            basis = _orthonormal(product)
            del product
    small = np.asarray(basis.T @ product, np.float64, order="F") / rows.live
    del product
    small += small.T.copy()
    small /= 2
    values, turn = _top_eigen(small, r)
    return values[::-1], basis @ np.ascontiguousarray(turn[:, ::-1], np.float32), trace


def _product_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int, basis: Rows) -> tuple[Rows, float]:
    """Return AᵀA Q over a stripe, (k, c), with its sum of squares."""
    total, squares = np.zeros(basis.shape, np.float32, order="F"), 0.0
    buffer = rows.buffer(step)
    for low, high in _blocks(stripe, step):
        block = rows.read(low, high, buffer)
        add_product(total, block, block @ basis)
        squares += float(np.einsum("ij,ij->i", block, block).sum(dtype=np.float64))
        tick(key, high - low)
    return total, squares


def _add_products(left: tuple[Rows, Any], right: tuple[Rows, Any]) -> tuple[Rows, Any]:
    return left[0] + right[0], left[1] + right[1]

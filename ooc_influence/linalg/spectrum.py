"""Eigenpairs of symmetric matrices in float64, F = V diag(e) Vᵀ: all of them, or the r largest.

The r largest of F are found from F itself, from the Gram matrix, or by block subspace iteration on products F Q:
Q ← orth(F Q) from a seeded random start, with a Rayleigh-Ritz step after every product (Halko, Martinsson and Tropp
2011, arXiv 0909.4061). It ends when the eigenvalues wanted gain hardly more of the trace than a product before. Q is
float32 for the products and orthonormalised in float64; the eigenvectors are orthonormal in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.linalg.accumulate import MatrixAccumulator
from ooc_influence.linalg.backend import Floats, Matrix, Team, add_product, row_squares
from ooc_influence.linalg.rows import RowPartition, WeightedBlock, WeightedRows, partition_rows
from ooc_influence.memory import PRODUCT_ROWS, MemoryBudget, MemoryModel, ProblemSize, block_limit
from ooc_influence.parallel import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process, task_threads
from ooc_influence.process import scipy_linalg
from ooc_influence.progress import Progress, tick

TOLERANCE = 1e-4  # relative growth of the sum of eigenvalues in a pass below which the iteration ends
_SLAB = 1024  # rows turned to float64 at a time
_EXTRA = 128  # columns beyond r in the iteration of :func:`top_spectrum`
_PASSES = 4  # of it over the rows, at most
_LARGEST_GRAM = 24576  # rows; beyond, its eigenvectors take longer than the iteration


def symmetric_eigen(matrix: Matrix, r: int | None = None) -> tuple[Matrix, Matrix]:
    """Return all eigenvalues, or the ``r`` largest, largest first, and eigenvectors (d, r) as columns.

    The upper triangle of ``matrix`` is read, and all of it overwritten. It is positive semi-definite by construction;
    eigenvalues that rounding made negative become zero.
    """
    d = len(matrix)
    part = {"driver": "evd"} if r is None else {"driver": "evr", "subset_by_index": (d - r, d - 1)}
    values, vectors = scipy_linalg().eigh(matrix.T, lower=True, overwrite_a=True, check_finite=False, **part)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


class Eigenpairs(NamedTuple):
    """The largest eigenpairs of a matrix, by subspace iteration.

    Attributes
    ----------
    eigenvalues : (r,) float64
        Largest first: vᵀ F v.
    vectors : (k, r) float32
        Columns, orthonormal to float32's rounding (see :func:`orthonormal_slabs`), the largest entry of each positive.
    residual : float
        The largest ‖F v − e v‖, relative to the largest eigenvalue.
    passes : int
        Products with F.
    converged : bool
        Whether it ended before the passes allowed did.
    """

    eigenvalues: Matrix
    vectors: Floats
    residual: float
    passes: int
    converged: bool


def iteration_bytes(k: int, columns: int) -> int:
    """Return what the iteration holds beside what multiplies, in bytes: the product, two bases, small matrices."""
    return 16 * k * columns + 40 * columns**2 + 8 * _SLAB * 3 * columns


def iteration_memory(size: ProblemSize, columns: int) -> MemoryModel:
    """Return the memory model, still without a stage, of the iteration on products of :func:`multiply_rows`."""
    k, product = size.k, MatrixAccumulator.nbytes(columns, size.k)
    several = 8 * k * columns if size.workers > 1 else 0  # a sum of two results is a third one
    fixed = max(4 * k * columns + several, iteration_bytes(k, columns) - size.workers * product) + size.index_bytes
    per_row, limit = 4 * (k + columns) + size.staging_bytes, block_limit(k, least=PRODUCT_ROWS)
    return MemoryModel("", fixed, product + size.reading_bytes, per_row, size.workers, max_rows=limit)


def start_basis(k: int, columns: int, seed: int) -> Floats:
    """Return a random orthonormal basis, (k, columns), the same for a seed every time."""
    return _orthonormal(np.random.default_rng(seed).standard_normal((columns, k)))


def _orthonormal(product: Matrix) -> Floats:
    """Return orthonormal columns (k, c) with the span of the rows of ``product`` (c, k), which is overwritten."""
    basis = scipy_linalg().qr(product.T, mode="economic", overwrite_a=True, check_finite=False)[0]
    return np.asarray(basis, np.float32, order="F")


def subspace_iteration(
    multiply: Callable[[Floats], Matrix],
    basis: Floats,
    r: int,
    passes: int,
    save: Callable[[int, float, Floats], None] | None = None,
    done: int = 0,
    explained: float = 0.0,
) -> Eigenpairs:
    """Return the ``r`` largest eigenpairs of F.

    Parameters
    ----------
    multiply : callable
        Returns (F Q)ᵀ (c, k) float64 of Q (k, c).
    basis : (k, c) float32
        Where to start: orthonormal, c ≥ r.
    r : int
        Pairs wanted.
    passes : int
        Products at most.
    save : callable, optional
        Is given the passes done, the sum of the eigenvalues, and the basis for the next pass.
    done, explained : int, float
        What it was given when ``basis`` was saved.
    """
    k, columns = basis.shape
    while True:
        product = multiply(basis)
        done += 1
        small = cross(basis, product)
        values, turn = scipy_linalg().eigh((small + small.T) / 2, check_finite=False)
        before, explained = explained, float(values[-r:].sum())
        # any basis of everything spans all there is
        converged = columns == k or (done > 1 and explained - before <= TOLERANCE * explained)
        if converged or done >= passes:
            break
        basis = _orthonormal(product)
        del product
        if save is not None:
            save(done, explained, basis)
    largest, turned = np.maximum(values[::-1][:r], 0.0), np.ascontiguousarray(turn[:, ::-1][:, :r])
    vectors, squares = np.empty((k, r), np.float32), np.zeros(r)
    for rows in _slabs(k):
        part = basis[rows].astype(np.float64) @ turned
        squares += np.square(product[:, rows].T @ turned - part * largest).sum(0)
        vectors[rows] = part
    _fix_signs(vectors)
    residual = float(np.sqrt(squares.max())) / max(float(largest[0]), np.finfo(np.float64).tiny)
    return Eigenpairs(largest, vectors, residual, done, converged)


def _fix_signs(vectors: Floats) -> None:
    """Make the largest entry of each column positive: the signs that LAPACK returns depend on rounding."""
    largest = np.zeros(vectors.shape[1], np.float32)
    for rows in _slabs(len(vectors)):
        part = vectors[rows]
        entries = part[np.abs(part).argmax(0), np.arange(len(largest))]
        largest = np.where(np.abs(entries) > np.abs(largest), entries, largest)
    vectors *= np.where(largest < 0, np.float32(-1), np.float32(1))


def cross(left: Floats, right: Matrix) -> Matrix:
    """Return leftᵀ rightᵀ, (c, d) float64, of ``left`` (k, c) float32 and ``right`` (d, k)."""
    total = np.zeros((left.shape[1], len(right)))
    for rows in _slabs(len(left)):
        total += left[rows].T.astype(np.float64) @ right[:, rows].T
    return total


def orthonormal_slabs(vectors: Floats, step: int = _SLAB) -> Iterator[tuple[slice, Matrix]]:
    """Yield the columns of ``vectors`` (k, r), orthonormal to float32's rounding, so to float64's, slab by slab."""
    small = np.zeros((vectors.shape[1], vectors.shape[1]))
    for rows in _slabs(len(vectors)):
        part = vectors[rows].astype(np.float64)
        small += part.T @ part
    factor = scipy_linalg().cholesky(small, lower=True, overwrite_a=True, check_finite=False)
    for rows in _slabs(len(vectors), step):
        yield rows, scipy_linalg().solve_triangular(factor, vectors[rows].T.astype(np.float64), lower=True).T


def _slabs(k: int, step: int = _SLAB) -> list[slice]:
    return [slice(start, min(k, start + step)) for start in range(0, k, step)]


class RowProduct(NamedTuple):
    """(XᵀX Q)ᵀ over some rows, (c, k) float64, and their moments (see :func:`block_moments`) where asked for."""

    total: Matrix
    moments: Matrix

    def plus(self, other: RowProduct) -> RowProduct:
        """Return the sum of both, leaving both as they are."""
        return RowProduct(self.total + other.total, self.moments + other.moments)


def block_moments(block: WeightedBlock) -> Matrix:
    """Return how many rows of a block are live, how many losses are clipped, Σ‖x‖², Σ‖x‖⁴."""
    squares = row_squares(block.rows)
    return np.array([block.live, block.clipped, squares.sum(), np.square(squares).sum()])


def multiply_rows(
    rows: WeightedRows, basis: Floats, block_rows: int, slots: int, bar: Progress, *, measure: bool, device: str | None
) -> RowProduct:
    """Return the product of all rows with a basis (k, c), in one pass; and their moments, to ``measure`` them."""
    partitions = partition_rows(rows, [(0, rows.count)], block_rows, slots)
    product: RowProduct = run_stripes(
        _multiply_partition, partitions, bar, rows.store, basis, block_rows, measure, device, slots=slots,
        reduce=RowProduct.plus, own_threads=True,
    )  # fmt: skip
    return product


def _multiply_partition(
    partition: RowPartition, key: str, store: object, basis: Floats, block_rows: int, measure: bool, device: str | None
) -> RowProduct:
    """Return the product of a partition of the rows; ``store`` is what workers must be able to see."""
    with Team(task_threads()) as team:
        add, total = _product_adder(team, basis, block_rows, device)
        moments = np.zeros(4)
        for _, rows in partition.parts:
            for block in rows.blocks(0, rows.count, block_rows, threads=team.threads, device=device):
                add(block.rows)
                if measure:
                    moments += block_moments(block)
                tick(key, block.stop - block.start)
        return RowProduct(total.triangle(), moments)


def _product_adder(team: Team, basis: Floats, block_rows: int, device: str | None) -> tuple[Callable[[Any], None], Any]:
    """Return what adds (X Q)ᵀ X of a block X to a sum, where it is, and the sum."""
    if device is not None:
        import torch

        from ooc_influence.linalg.device import DeviceAccumulator, send_array

        device_sum = DeviceAccumulator(basis.shape[1], len(basis), device)
        device_basis = send_array(basis, torch.device(device))
        return lambda rows: device_sum.add(rows @ device_basis, rows), device_sum
    total = MatrixAccumulator(basis.shape[1], len(basis), team=team)
    buffer = np.empty((block_rows, basis.shape[1]), np.float32)

    def add(rows: Floats) -> None:
        turned = buffer[: len(rows)]
        edges = [len(rows) * number // team.threads for number in range(team.threads + 1)]
        parts = [slice(low, high) for low, high in pairwise(edges)]
        team.run(partial(np.matmul, rows[part], basis, turned[part]) for part in parts)
        total.add(turned, rows)

    return add, total


class Spectrum(NamedTuple):
    """The largest eigenpairs of F.

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
    vectors: Floats
    trace: float
    rows: int


class Solver(NamedTuple):
    """What finds the r largest eigenpairs: ``run(rows, r, step, slots, bar) -> (eigenvalues, vectors, trace)``.

    Attributes
    ----------
    name : str
        What it factorises.
    run : callable
        See above.
    model : MemoryModel
        The memory it takes.
    passes : int
        How often it reads the rows.
    flops, factoring : float
        Arithmetic over the rows, and of the factorisation.
    """

    name: str
    run: Callable[..., tuple[Matrix, Floats, float]]
    model: MemoryModel
    passes: int
    flops: float
    factoring: float


_FACTORING = 3.0  # times the seconds of a product that a dense factorisation takes for its multiplications


def spectrum_solvers(size: ProblemSize, r: int) -> list[Solver]:
    """Return what finds the r largest eigenpairs of a store's rows, the quickest first."""
    k, m, slots = size.k, size.rows, size.workers
    stage, advice = f"an eigenbasis of {r} of {k} entries from {m} rows", "a smaller r or k"
    several = slots > 1  # a sum of two results is a third one
    solvers = []

    def add(name: str, run: Callable[..., Any], fixed: int, per_row: int, *cost: float) -> None:
        limit = block_limit(k, least=PRODUCT_ROWS)
        model = MemoryModel(stage, fixed, size.reading_bytes, per_row, slots, max_rows=limit, advice=advice)
        solvers.append(Solver(name, run, model, 1 if run is _by_fisher else 2, *cost))

    if k <= m:
        sums = slots * MatrixAccumulator.nbytes(k) + several * 8 * k * k
        add("Fisher matrix", _by_fisher, max(sums, 8 * k * k + 12 * k * r), 4 * k, float(m) * k * k, 9.0 * k**3)
    if m <= _LARGEST_GRAM:
        lifting = 4 * m * r + (slots + several) * 4 * k * r
        fixed = max(10 * m * m, 8 * m * (m + r), 12 * m * r, lifting, 8 * k * r)
        add("Gram matrix", _by_gram, fixed, 2 * 4 * k, float(m) * m * k + 2.0 * m * k * r, 9.0 * m**3)
    c = min(k, m, r + _EXTRA)
    model = replace(iteration_memory(size, c), stage=stage, advice=advice)
    flops, factoring = 4.0 * _PASSES * m * k * c, 4.0 * _PASSES * k * c**2
    solvers.append(Solver("subspace iteration", _by_iteration, model, _PASSES, flops, factoring))
    return solvers


def choose_solver(size: ProblemSize, r: int, budget: MemoryBudget, *, quickest: bool = False) -> Solver:
    """Return the first solver that fits the budget; where none does, the one that takes least.

    ``quickest``: of those that fit, the one with least arithmetic, which is an iteration where r is much less than the
    rows and columns. It is less exact in the last directions.
    """
    solvers = spectrum_solvers(size, r)
    if quickest:
        solvers.sort(key=lambda solver: solver.flops + _FACTORING * solver.factoring)
    fitting = (solver for solver in solvers if budget.fits(solver.model))
    return next(fitting, min(solvers, key=lambda solver: budget.price(solver.model)))


def top_spectrum(
    rows: WeightedRows,
    r: int,
    *,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None,
    quickest: bool = False,
) -> Spectrum:
    """Return the ``r`` largest eigenvalues of F and their eigenvectors; ``quickest`` as for :func:`choose_solver`.

    Raises
    ------
    InputError
        If there are fewer than r live rows, or r is larger than k.
    MemoryBudgetError
        If the budget holds none of the three solvers.
    NonFiniteError
        If rows are too large for float32 sums.
    """
    k, m = rows.store.k, rows.count
    if not 1 <= r <= min(k, rows.live):
        raise InputError(
            f"expected r between 1 and {min(k, rows.live)}, the smaller of the {k} entries and the {rows.live} live "
            f"rows; received {r}: use more rows, a wider mask or a smaller r"
        )
    slots = check_workers(workers)
    budget, size = MemoryBudget.of(memory), rows.store.problem_size(slots_per_process(slots))
    solver = choose_solver(replace(size, rows=m), r, budget, quickest=quickest)
    step = budget.plan(solver.model)
    with Progress("eigenbasis", solver.passes * m, progress) as bar:
        values, vectors, trace = solver.run(rows, r, step, slots, bar)
    _fix_signs(vectors)
    return Spectrum(np.maximum(values, 0), vectors, trace, rows.live)


def _checked(trace: float) -> float:
    if not np.isfinite(trace):
        raise NonFiniteError("expected finite rows; received sums that overflow: scale the loss", [])
    return trace


def _by_fisher(rows: WeightedRows, r: int, step: int, slots: int, bar: Progress) -> tuple[Matrix, Floats, float]:
    stripes = cut_stripes(0, rows.count, step, slots)
    total = run_stripes(_fisher_stripe, stripes, bar, rows, step, slots=slots, reduce=np.add)
    total /= rows.live
    trace = _checked(float(np.trace(total)))
    values, vectors = symmetric_eigen(total, r)
    return values, np.ascontiguousarray(vectors, np.float32), trace


def _fisher_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int) -> Matrix:
    accumulator = MatrixAccumulator(rows.store.k)
    for block in rows.blocks(stripe.start, stripe.stop, step):
        accumulator.add(block.rows)
        tick(key, block.stop - block.start)
    return accumulator.total()


def _by_gram(rows: WeightedRows, r: int, step: int, slots: int, bar: Progress) -> tuple[Matrix, Floats, float]:
    m = rows.count
    slabs = run_stripes(_gram_stripe, _cut_triangle(m, step, slots), bar, rows, step, slots=slots)
    gram = np.empty((m, m), order="F")
    for part in slabs:
        while part:
            low, slab = part.pop()
            gram[low : low + len(slab), : slab.shape[1]] = slab
    trace = _checked(float(np.trace(gram)) / rows.live)
    values, vectors = symmetric_eigen(gram.T, r)
    del gram
    # a direction of eigenvalue zero comes out as zeros, and one near zero inexact: QR makes both orthonormal
    vectors *= np.where(values > values[0] * 1e-12, 1 / np.sqrt(np.maximum(values, 1e-300)), 0)
    turned = np.ascontiguousarray(vectors, np.float32)
    del vectors
    stripes = cut_stripes(0, m, step, slots)
    lifted = run_stripes(_lift_stripe, stripes, bar, rows, step, turned, slots=slots, reduce=np.add)
    basis = scipy_linalg().qr(lifted, mode="economic", overwrite_a=True, check_finite=False)[0]
    return values / rows.live, np.ascontiguousarray(basis), trace


def _cut_triangle(m: int, step: int, count: int) -> list[Stripe]:
    """Cut m rows of a lower triangle into at most ``count`` stripes of whole blocks and about equal areas."""
    blocks = -(-m // step)
    edges = sorted({round(blocks * (number / count) ** 0.5) for number in range(count + 1)})
    return [Stripe(low * step, min(m, high * step)) for low, high in pairwise(edges)]


def _gram_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int) -> list[tuple[int, Floats]]:
    """Return the rows of K that belong to a stripe, up to the diagonal, block by block."""
    slabs = []
    for low, high, block, *_ in rows.blocks(stripe.start, stripe.stop, step):
        slab = np.empty((high - low, high), np.float32)
        for earlier in rows.blocks(0, low, step):
            slab[:, earlier.start : earlier.stop] = block @ earlier.rows.T
        slab[:, low:high] = block @ block.T
        slabs.append((low, slab))
        tick(key, high - low)
    return slabs


def _lift_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int, turned: Floats) -> Floats:
    """Return Σ Aᵀ U / √e over a stripe, (k, r)."""
    total = np.zeros((rows.store.k, turned.shape[1]), np.float32, order="F")
    for low, high, block, *_ in rows.blocks(stripe.start, stripe.stop, step):
        add_product(total, block, turned[low:high])
        tick(key, high - low)
    return total


def _by_iteration(rows: WeightedRows, r: int, step: int, slots: int, bar: Progress) -> tuple[Matrix, Floats, float]:
    moments: Matrix = np.empty(0)

    def multiply(basis: Floats) -> Matrix:
        nonlocal moments
        product = multiply_rows(rows, basis, step, slots, bar, measure=not len(moments), device=None)
        moments = moments if len(moments) else product.moments
        _checked(moments[2] + float(product.total.sum()))
        total = product.total
        total /= rows.live
        return total

    columns = min(rows.store.k, rows.count, r + _EXTRA)
    pairs = subspace_iteration(multiply, start_basis(rows.store.k, columns, 0), r, _PASSES)
    return pairs.eigenvalues, pairs.vectors, float(moments[2]) / rows.live

"""Memory models of the fits, as pure functions of shapes, and the quickest plan of a low-rank fit that fits a budget.

Where a fit does not fit the budget, the alternatives that its model offers are priced by the models of the other fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from ooc_influence.curvature.eigen import slab_rows
from ooc_influence.errors import InputError
from ooc_influence.linalg import (
    TILE,
    DiagonalAccumulator,
    MatrixAccumulator,
    Range,
    WeightedRows,
    iteration_bytes,
    iteration_memory,
    spectrum_solvers,
    tile_side,
)
from ooc_influence.memory import PRODUCT_ROWS, Alternative, MemoryBudget, MemoryModel, ProblemSize, block_limit
from ooc_influence.store import BUFFERS, CHUNK_TARGET, GradientStore

EXTRA = 64  # columns beyond r in subspace iteration
PASSES = 12  # of subspace iteration, at most
USUAL_PASSES = 5
PANEL = 1024  # columns converted to float64 at a time
KEPT_BYTES = 64 * 2**20  # of a Gram matrix that is kept in memory while it is multiplied; a larger one goes to disk
_EXACT_SIDE = 4096  # up to here factorising all of F takes no longer than iterating
_LARGEST_TILE = 16384  # columns of a tile summed at a time
_LARGEST_RANK = 4096  # that a refusal offers
_OPERATIONS, _DOUBLE, _READING = 200e9, 100e9, 2e9  # FLOP of float32 and float64, and bytes, a second: to compare plans
_GROUP_BYTES = 2**21  # of the small values of rows that are written to a reduced store
_TILE_COPIES = 3  # of a tile while it is written: itself, its transpose, and the checksummed bytes
_FEWER_COLUMNS = "extract with a smaller k"


def module_ranges(train: GradientStore) -> tuple[Range, ...]:
    """Return the columns of each module of a store of kept entries."""
    ends = np.cumsum([len(module.rows) for module in train.mask.modules]).tolist()
    return tuple((first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True) if first < last)


def fit_size(chosen: WeightedRows, workers: int = 1, *, device: bool = False) -> ProblemSize:
    """Return the size of a fit of some rows, multiplied by the host or on a device."""
    train, size = chosen.store, chosen.store.problem_size(workers)
    return replace(
        size,
        rows=chosen.count,
        index_bytes=chosen.small_bytes,
        staging_bytes=4 * size.row_bytes if device else 0,  # two blocks in flight, and copies where the host computes
        modules=() if train.is_reduced else module_ranges(train),
    )


def fisher_memory(size: ProblemSize, *, ranges: Sequence[Range] | None = None, updating: bool = False) -> MemoryModel:
    """Return the memory model of fitting F by :func:`fit_fisher`.

    Two phases share the memory: accumulation (each worker's sums and block), then, alone, the factorisation.

    Parameters
    ----------
    size : ProblemSize
        Of the fit.
    ranges : sequence of (first, last), optional
        Blocks of columns; default one of all.
    updating : bool
        Whether an earlier sum is brought up to date.
    """
    sides = [last - first for first, last in ranges or [(0, size.k)]]
    squares = sum(side**2 for side in sides)
    accumulators = sum(MatrixAccumulator.nbytes(side) for side in sides)
    factorising = 8 * squares + 16 * max(sides) ** 2
    sums_at_once = (size.workers > 1) + updating
    return MemoryModel(
        stage=f"fisher for k={size.k}" + (f" in {len(sides)} blocks" if len(sides) > 1 else ""),
        fixed=max(0, factorising - size.workers * accumulators) + 8 * squares * sums_at_once + size.index_bytes,
        per_worker=accumulators + size.reading_bytes,
        per_row=4 * size.k + size.staging_bytes,
        workers=size.workers,
        max_rows=block_limit(size.k),
        advice=_FEWER_COLUMNS,
        alternatives=partial(_primal_alternatives, size.alone, by_module=len(sides) == 1),
    )


def diagonal_memory(size: ProblemSize) -> MemoryModel:
    """Return the memory model of fitting the diagonal of F; see :func:`fisher_memory`."""
    return MemoryModel(
        stage=f"diagonal of fisher for k={size.k}",
        fixed=64 * size.k + size.index_bytes,  # the sums of all tasks as they meet, and the spectrum
        per_worker=DiagonalAccumulator.nbytes(size.k) + size.reading_bytes,
        per_row=4 * size.k,
        workers=size.workers,
        max_rows=block_limit(size.k),
        advice=_FEWER_COLUMNS,
    )


def kernel_memory(size: ProblemSize) -> MemoryModel:
    """Return the memory model of K = A Aᵀ: each worker's tile, and two blocks of rows."""
    rows, side = size.rows, tile_side(size.rows)
    return MemoryModel(
        stage=f"gram for {rows} rows of k={size.k}",
        fixed=size.index_bytes + (8 * rows**2 if 8 * rows**2 <= KEPT_BYTES else 0),
        per_worker=8 * (_TILE_COPIES + 1) * side**2 + 2 * size.reading_bytes,
        per_row=2 * (4 * size.k + 8 * min(size.k, PANEL) + size.staging_bytes),
        workers=size.workers,
        min_rows=min(16, side),
        max_rows=min(side, block_limit(size.k)),
        advice="fewer rows",
    )


def gram_memory(size: ProblemSize) -> MemoryModel:
    """Return the memory model of :func:`fit_gram`: K by :func:`kernel_memory`, its spectrum, then F's eigenvectors."""
    kernel, rows = kernel_memory(size), size.rows
    width = max(min(size.k, PANEL), slab_rows(size.k, rows))
    lifting = 8 * rows**2 + size.workers * 8 * rows * (2 * width + min(size.k, PANEL) + kernel.max_rows)
    alone = max(24 * rows**2 + 8 * _TILE_COPIES * tile_side(rows) ** 2, lifting)
    fixed = max(kernel.fixed, size.index_bytes + alone - size.workers * kernel.per_worker)
    return replace(kernel, fixed=fixed, alternatives=partial(_dual_alternatives, size.alone))


def choose_method(rows: int, k: int) -> Literal["primal", "dual"]:
    """Return the quicker method: ``"dual"`` where there are fewer rows than columns or hardly more, else ``"primal"``.

    The products with rows are in float32 for F, and in float64 for K and for F's eigenvectors made of its own.
    """
    primal = rows * k**2 / _OPERATIONS + 9 * k**3 / _DOUBLE
    dual = 3 * rows**2 * k / _DOUBLE + 9 * rows**3 / _DOUBLE
    return "dual" if dual < primal else "primal"


class LowRankPlan(NamedTuple):
    """One of the four computations of the largest eigenvalues of F and their eigenvectors.

    Attributes
    ----------
    name : {"whole", "sums", "tiles", "rows"}
        ``whole``: F is summed in memory and factorised. ``sums``: it is summed in memory and multiplied there by
        subspace iteration. ``tiles``: it is summed tile by tile to the disk and multiplied from there. ``rows``: it is
        never formed, the rows are multiplied once a pass. The last two work for any number of columns: they keep only
        the eigenvectors in memory.
    model : MemoryModel
        The memory it takes.
    block_rows : int
        Rows read at a time; 0 until it is chosen.
    read, flops, seconds : float
        Bytes read, arithmetic, and a rough time to compare plans by.
    tile : int
        Columns of a tile summed at a time.
    """

    name: str
    model: MemoryModel
    block_rows: int
    read: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    tile: int = 0


class Preferred(NamedTuple):
    """The plans that can use what an interrupted fit has kept; none where it kept nothing."""

    names: tuple[str, ...] = ()
    tile: int = 0  # columns of the tiles on disk; 0 where there are none


NOTHING_KEPT = Preferred()


def iteration_columns(size: ProblemSize, rank: int) -> int:
    """Return the columns of the subspace iteration for the largest ``rank`` eigenvalues."""
    return min(size.k, max(rank, min(size.rows, rank + EXTRA)))


def check_rank(size: ProblemSize, rank: int) -> None:
    """Check that F can have that many eigenvectors.

    Raises
    ------
    InputError
        If it cannot.
    """
    most = min(size.k, size.rows)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise InputError(
            f"expected rank between 1 and {most}, the smaller of {size.k} columns and {size.rows} rows; received "
            f"{rank!r}"
        )


def sums_memory(size: ProblemSize, rank: int, *, subtracting: bool = False) -> MemoryModel:
    """Return the memory model of summing F in memory, then multiplying it there."""
    k, c = size.k, iteration_columns(size, rank)
    iterating = 8 * k * k + 8 * k * c + iteration_bytes(k, c)
    sums_at_once = (size.workers > 1) + subtracting
    summing = MatrixAccumulator.nbytes(k)
    fixed = max(0, iterating - size.workers * summing) + 8 * k * k * sums_at_once + size.index_bytes
    per_row = 4 * k + size.staging_bytes
    return _of_rank(size, rank, MemoryModel("", fixed, summing + size.reading_bytes, per_row, max_rows=block_limit(k)))


def tiles_memory(size: ProblemSize, rank: int, tile: int) -> MemoryModel:
    """Return the memory model of summing F in tiles of ``tile`` columns, then multiplying it from the disk."""
    k, c, side = size.k, iteration_columns(size, rank), tile_side(size.k)
    summing = MatrixAccumulator.nbytes(tile, tile) + 8 * tile * tile + 3 * 8 * side**2 + size.reading_bytes
    iterating = iteration_bytes(k, c) + 8 * side * (3 * side + 2 * c)
    fixed = max(0, iterating - size.workers * summing) + size.index_bytes
    return _of_rank(size, rank, MemoryModel("", fixed, summing, 2 * 4 * tile, max_rows=block_limit(2 * tile)))


def rows_memory(size: ProblemSize, rank: int) -> MemoryModel:
    """Return the memory model of multiplying the rows once a pass."""
    return _of_rank(size, rank, iteration_memory(size, iteration_columns(size, rank)))


def _of_rank(size: ProblemSize, rank: int, model: MemoryModel) -> MemoryModel:
    """Return a model with the name, the advice and the alternatives of a low-rank fit."""
    alternatives = partial(_primal_alternatives, size.alone)
    stage = f"fisher for k={size.k}, rank={rank}"
    return replace(model, stage=stage, workers=size.workers, advice=_FEWER_COLUMNS, alternatives=alternatives)


def low_rank_plans(
    size: ProblemSize,
    rank: int,
    budget: MemoryBudget,
    *,
    new_rows: int | None = None,
    subtracting: bool = False,
    updating: bool = False,
    tile: int = 0,
) -> list[LowRankPlan]:
    """Return all plans for the largest ``rank`` eigenpairs: those that fit first, the quickest of them before all.

    Parameters
    ----------
    size, rank, budget
        The fit's size, the number of eigenvectors, and the memory.
    new_rows : int, optional
        Rows that a sum of F has to read, where an earlier sum is brought up to date; default all.
    subtracting, updating : bool
        Whether rows are subtracted from an earlier sum, and whether there is one.
    tile : int
        Columns of the tiles that are on disk already and used where they fit; 0: the largest that fit.
    """
    k, m, c = float(size.k), float(size.rows), iteration_columns(size, rank)
    summed = m if new_rows is None else float(new_rows)
    stored, fresh = m * size.row_bytes, summed * size.row_bytes
    summing, multiplying = summed * k * k, USUAL_PASSES * 2 * k * k * c
    plans = []

    def add(name: str, model: MemoryModel, read: float, singles: float, doubles: float, tile: int = 0) -> None:
        seconds = singles / _OPERATIONS + doubles / _DOUBLE + read / _READING
        plans.append(LowRankPlan(name, model, 0, read, singles + doubles, seconds, tile))

    if size.k <= _EXACT_SIDE or 4 * rank >= size.k:
        add("whole", _of_rank(size, rank, fisher_memory(size, updating=updating)), fresh, summing, 9 * k**3)
    add("sums", sums_memory(size, rank, subtracting=subtracting), fresh, summing, multiplying)
    if not size.staging_bytes:  # panels of columns are not sent to a device
        if not tile or not budget.fits(tiles_memory(size, rank, tile)):
            tile = _largest_tile(size, rank, budget)
        panels, from_disk = -(-size.k // tile), USUAL_PASSES * 4 * k * k
        model = tiles_memory(size, rank, tile)
        add("tiles", model, panels * fresh + from_disk, summing * (1 + 1 / panels), multiplying, tile)
    passes = USUAL_PASSES if c < k else 1.0
    add("rows", rows_memory(size, rank), passes * stored, passes * 4 * m * k * c, passes * 4 * k * c * c)
    return sorted(plans, key=lambda plan: (not budget.fits(plan.model), plan.seconds))


def _largest_tile(size: ProblemSize, rank: int, budget: MemoryBudget) -> int:
    """Return the largest tile that fits, in whole tiles of the disk's; the smallest where none does."""
    side = tile_side(size.k)
    tile = min(_LARGEST_TILE // TILE * TILE, -(-size.k // side) * side)
    while tile > side and not budget.fits(tiles_memory(size, rank, tile)):
        tile = max(side, tile // 2 // side * side)
    return tile


def plan_low_rank(
    size: ProblemSize, rank: int, budget: MemoryBudget, preferred: Preferred = NOTHING_KEPT, **update: Any
) -> LowRankPlan:
    """Return the quickest plan that fits, one of the preferred ones if any of them does.

    ``update`` are those of :func:`low_rank_plans`.

    Raises
    ------
    MemoryBudgetError
        If none fits: by the one that takes least.
    """
    plans = low_rank_plans(size, rank, budget, tile=preferred.tile, **update)
    fitting = [plan for plan in plans if budget.fits(plan.model)]
    chosen = fitting[0] if fitting else min(plans, key=lambda plan: budget.price(plan.model))
    chosen = next((plan for plan in fitting if plan.name in preferred.names), chosen)
    return chosen._replace(block_rows=budget.plan(chosen.model))


def least_memory(size: ProblemSize, rank: int) -> MemoryModel:
    """Return the smaller memory model of the two plans that work for any number of columns."""
    models = rows_memory(size, rank), tiles_memory(size, rank, tile_side(size.k))
    return min(models, key=lambda model: model.peak(model.min_rows))


def largest_rank(size: ProblemSize, budget: MemoryBudget) -> int:
    """Return the largest rank, a power of two, that fits the budget; 0 where none does."""
    return budget.largest(partial(least_memory, size), min(_LARGEST_RANK, size.k, size.rows))


def _primal_alternatives(size: ProblemSize, budget: MemoryBudget, *, by_module: bool = False) -> Iterator[Alternative]:
    """Yield what else could be fitted where F does not fit: fewer eigenvectors, fewer columns, blocks, or K."""
    yield from _lower_rank(size, budget)
    yield from reduced_alternatives(size, budget)
    if by_module and len(size.modules) > 1:
        yield Alternative("--blocks module ({})", fisher_memory(size, ranges=size.modules))
    yield Alternative("--method dual ({})", gram_memory(size))


def _dual_alternatives(size: ProblemSize, budget: MemoryBudget) -> Iterator[Alternative]:
    """Yield what else could be fitted where K does not fit: fewer rows, F, or fewer columns."""
    rows = budget.largest(lambda rows: gram_memory(_sampled(size, rows)), size.rows - 1)
    if rows > 1:
        yield Alternative(f"--sample {rows} ({{}})", gram_memory(_sampled(size, rows)))
    yield Alternative("--method primal ({})", fisher_memory(size))
    yield from _lower_rank(size, budget, "--method primal --rank")
    yield from reduced_alternatives(size, budget)


def _sampled(size: ProblemSize, rows: int) -> ProblemSize:
    return replace(size, rows=rows, index_bytes=0)


def _lower_rank(size: ProblemSize, budget: MemoryBudget, option: str = "--rank") -> Iterator[Alternative]:
    rank = largest_rank(size, budget)
    if rank:
        yield Alternative(f"{option} {rank} ({{}})", least_memory(size, rank))


def reduced_alternatives(
    size: ProblemSize, budget: MemoryBudget, then: Callable[[int], MemoryModel] | None = None
) -> Iterator[Alternative]:
    """Yield the widest reduction of the store that fits, with F of it, and what ``then`` follows with r columns."""

    def widest_step(r: int) -> MemoryModel:
        chunk = min(CHUNK_TARGET, 2 * r * max(PRODUCT_ROWS, size.rows // 64))  # of float16, while rows are written
        fixed, per_row = 4 * size.k * r + BUFFERS * chunk + _GROUP_BYTES, 4 * (size.k + 2 * r)
        steps = [
            min((solver.model for solver in spectrum_solvers(size, r)), key=budget.price),
            MemoryModel("", fixed, size.reading_bytes, per_row),
            fisher_memory(replace(size, k=r)),
        ]
        return max([*steps, *([] if then is None else [then(r)])], key=budget.price)

    most = min(size.k - 1, size.rows)
    r = budget.largest(widest_step, most) if size.modules and most > 0 else 0
    if r:
        text = f"reduce to {r} columns ({{}}: ooc-influence reduce {size.path} OUT --dims {r})"
        yield Alternative(text, widest_step(r))

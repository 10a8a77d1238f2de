"""Ways to the top of a spectrum, as pure functions of shapes: what each needs, and the quickest that fits the budget.

``whole``: F is summed in memory and factorised; ``sums``: it is summed in memory and multiplied there by subspace
iteration; ``tiles``: it is summed tile by tile to the disk and multiplied from there; ``rows``: it is never made, rows
are multiplied once a pass. The last two fit any number of columns: they need memory for the eigenvectors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

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
from ooc_influence.memory import (
    PRODUCT_ROWS,
    Alternative,
    MemoryBudget,
    MemoryModel,
    Ways,
    block_limit,
    plan_block_rows,
)
from ooc_influence.store import BUFFERS, CHUNK_TARGET, GradientStore

EXTRA = 64  # columns beyond r in subspace iteration
PASSES = 12  # of subspace iteration, at most
USUAL_PASSES = 5
_EXACT_SIDE = 4096  # up to here factorising all of F takes no longer than finding its top
_LARGEST_TILE = 16384  # columns of a tile summed at a time
_LARGEST_RANK = 4096  # that a refusal offers
_OPERATIONS, _DOUBLE, _READING = 200e9, 100e9, 2e9  # a second: what ways are compared with


class Shapes(NamedTuple):
    """What ways are chosen by.

    Attributes
    ----------
    k, m : int
        Columns and rows.
    changed : int
        Rows that a sum of F has to read: fewer than m where an earlier one is there.
    row_bytes : int
        Of a stored row.
    workers : int
        Tasks that share the memory.
    reading, small : int
        Bytes a task holds to read the store, and bytes kept for each row.
    sent : int
        Bytes held of each row of a block to send it to a device; 0 where rows are multiplied by the BLAS.
    """

    k: int
    m: int
    changed: int
    row_bytes: int
    workers: int
    reading: int
    small: int
    sent: int = 0

    def columns(self, rank: int) -> int:
        """Return the columns of the iteration."""
        return iteration_columns(self.k, self.m, rank)


class Preferred(NamedTuple):
    """The ways that can use what earlier runs of a fit have kept; none where they kept nothing.

    Attributes
    ----------
    names : tuple of str
        Of the ways.
    tile : int
        Columns of the tiles that are there; 0 where there are none.
    """

    names: tuple[str, ...] = ()
    tile: int = 0


class LowRankPlan(NamedTuple):
    """A way to the top of a spectrum.

    Attributes
    ----------
    name : {"whole", "sums", "tiles", "rows"}
        See the module.
    need : Need
        What it takes in memory.
    block_rows : int
        Rows read at a time; 0 where it does not fit.
    read, flops, seconds : float
        Bytes read, arithmetic, and a rough time to compare with.
    tile : int
        Columns of a tile summed at a time.
    """

    name: str
    need: MemoryModel
    block_rows: int
    read: float
    flops: float
    seconds: float
    tile: int = 0


def iteration_columns(k: int, m: int, rank: int) -> int:
    """Return the columns of the iteration for the top ``rank`` of m rows of k numbers."""
    return min(k, max(rank, min(m, rank + EXTRA)))


def check_rank(shapes: Shapes, rank: int) -> None:
    """Check that F can have that many eigenvectors.

    Raises
    ------
    InputError
        If it cannot.
    """
    most = min(shapes.k, shapes.m)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise InputError(
            f"expected rank between 1 and {most}, the smaller of {shapes.k} columns and {shapes.m} rows; received "
            f"{rank!r}"
        )


def sums_need(shapes: Shapes, rank: int, *, update: bool = False) -> MemoryModel:
    """Return what summing F in memory and multiplying it there needs: first the one, then the other."""
    k, c = shapes.k, shapes.columns(rank)
    held = shapes.workers * MatrixAccumulator.nbytes(k)
    after = 8 * k * k + 8 * k * c + iteration_bytes(k, c)
    several = 8 * k * k * ((shapes.workers > 1) + update)
    fixed = max(0, after - held) + several + shapes.small
    return MemoryModel(_stage(k, rank), fixed, MatrixAccumulator.nbytes(k) + shapes.reading, 4 * k + shapes.sent,
                max_rows=block_limit(k))  # fmt: skip


def tiles_need(shapes: Shapes, rank: int, tile: int) -> MemoryModel:
    """Return what summing F in tiles of so many columns and multiplying it from the disk needs."""
    k, c = shapes.k, shapes.columns(rank)
    own = MatrixAccumulator.nbytes(tile, tile) + 8 * tile * tile + 3 * 8 * tile_side(k) ** 2 + shapes.reading
    after = iteration_bytes(k, c) + 8 * tile_side(k) * (3 * tile_side(k) + 2 * c)
    fixed = max(0, after - shapes.workers * own) + shapes.small
    return MemoryModel(_stage(k, rank), fixed, own, 2 * 4 * tile, max_rows=block_limit(2 * tile))


def rows_need(shapes: Shapes, rank: int) -> MemoryModel:
    """Return what multiplying the rows once a pass needs."""
    return iteration_memory(
        _stage(shapes.k, rank), shapes.k, shapes.columns(rank), shapes.workers, reading=shapes.reading,
        sent=shapes.sent, small=shapes.small,
    )  # fmt: skip


def _stage(k: int, rank: int) -> str:
    return f"fisher for k={k}, rank={rank}"


def fitting_rows(need: MemoryModel, workers: int, budget: int, held: int) -> int:
    """Return the rows of the largest block that fits, 0 where none does."""
    rows = need.max_rows
    while rows > need.min_rows and need.peak(rows, workers, held) > budget:
        rows = max(need.min_rows, rows // 2)
    return rows if need.peak(rows, workers, held) <= budget else 0


def low_rank_plans(
    shapes: Shapes, rank: int, square: MemoryModel, budget: int, held: int, *, update: bool = False, tile: int = 0
) -> list[LowRankPlan]:
    """Return all ways to the top ``rank`` eigenpairs, those that fit first, the quickest of them first of all.

    Parameters
    ----------
    shapes : Shapes
        The sizes.
    rank : int
        Eigenvectors wanted.
    square : Need
        What summing F in memory and factorising it needs.
    budget, held : int
        Bytes the process may take, and those it holds.
    update : bool
        Whether rows are subtracted from a sum.
    tile : int
        Columns of a tile that is taken where it fits, because some are there; 0: the largest that fits.
    """
    k, m, workers, c = float(shapes.k), float(shapes.m), shapes.workers, shapes.columns(rank)
    stored, fresh = m * shapes.row_bytes, float(shapes.changed) * shapes.row_bytes
    summing, multiplying = shapes.changed * k * k, USUAL_PASSES * 2 * k * k * c
    found = []

    def add(name: str, need: MemoryModel, read: float, singles: float, doubles: float, side: int = 0) -> None:
        rows = fitting_rows(need, workers, budget, held)
        seconds = singles / _OPERATIONS + doubles / _DOUBLE + read / _READING
        found.append(LowRankPlan(name, need, rows, read, singles + doubles, seconds, side))

    if shapes.k <= _EXACT_SIDE or 4 * rank >= shapes.k:
        add("whole", square, fresh, summing, 9 * k**3)
    add("sums", sums_need(shapes, rank, update=update), fresh, summing, multiplying)
    if not shapes.sent:  # panels of columns are not sent to a device
        if not tile or not fitting_rows(tiles_need(shapes, rank, tile), workers, budget, held):
            tile = _largest_tile(shapes, rank, budget, held)
        panels = -(-shapes.k // tile)
        from_disk = USUAL_PASSES * 4 * k * k
        add(
            "tiles",
            tiles_need(shapes, rank, tile),
            panels * fresh + from_disk,
            summing * (1 + 1 / panels),
            multiplying,
            tile,
        )
    passes = USUAL_PASSES * (1.0 if c < k else 1 / USUAL_PASSES)
    add("rows", rows_need(shapes, rank), passes * stored, passes * 4 * m * k * c, passes * 4 * k * c * c)
    return sorted(found, key=lambda way: (way.block_rows == 0, way.seconds))


def _largest_tile(shapes: Shapes, rank: int, budget: int, held: int) -> int:
    """Return the largest tile that fits, in whole tiles of the disk's; the smallest where none does."""
    side = tile_side(shapes.k)
    tile = min(_LARGEST_TILE // TILE * TILE, -(-shapes.k // side) * side)
    while tile > side and not fitting_rows(tiles_need(shapes, rank, tile), shapes.workers, budget, held):
        tile = max(side, tile // 2 // side * side)
    return tile


def plan_low_rank(
    shapes: Shapes,
    rank: int,
    square: MemoryModel,
    memory: int | str | None,
    outs: Ways,
    *,
    update: bool = False,
    prefer: Preferred | None = None,
) -> LowRankPlan:
    """Return the quickest way that fits, of those preferred if one of them does.

    Raises
    ------
    MemoryBudgetError
        If none does: with what the one that takes least needs, and the ways ``outs``.
    """
    room = MemoryBudget.of(memory)
    prefer = prefer or Preferred()
    found = low_rank_plans(shapes, rank, square, room.budget, room.held, update=update, tile=prefer.tile)
    if not found[0].block_rows:
        need = min((way.need for way in found), key=lambda need: room.price(need, shapes.workers))
        plan_block_rows(
            replace(need, alternatives=outs, advice="extract with a smaller k"), memory, shapes.workers, room.held
        )
    return next((way for way in found if way.block_rows and way.name in prefer.names), found[0])


def least_memory(shapes: Shapes, rank: int) -> MemoryModel:
    """Return what the way that takes least needs, of those that fit any number of columns."""
    needs = [rows_need(shapes, rank), tiles_need(shapes, rank, tile_side(shapes.k))]
    return min(needs, key=lambda need: need.peak(need.min_rows, shapes.workers, 0))


def largest_rank(shapes: Shapes, budget: int, held: int) -> int:
    """Return the largest rank, a power of two, that fits the budget; 0 where none does."""
    rank = 1 << min(_LARGEST_RANK, shapes.k, shapes.m).bit_length() - 1
    while rank:
        if fitting_rows(least_memory(shapes, rank), shapes.workers, budget, held):
            return rank
        rank //= 2
    return 0


PANEL = 1024  # columns brought to float64 at a time
KEPT_BYTES = 64 * 2**20  # of a Gram matrix that is kept in memory while it is multiplied; a larger one goes to disk
_GROUP = 2**21  # of the small values of rows on their way to a reduced store
_TILES = 3  # copies of a tile while it is written: itself, its transpose, and the checksummed bytes


def fisher_memory(
    k: int,
    workers: int,
    reading: int = 0,
    *,
    ranges: Sequence[Range] | None = None,
    rows: int = 0,
    update: bool = False,
) -> MemoryModel:
    """Return what :func:`fit_fisher` needs, in bytes.

    Two phases share the memory: accumulation (each worker's sums and block), then, alone, the factorisation.

    Parameters
    ----------
    k, workers : int
        Columns; workers of this process.
    reading : int
        What a worker holds to read the store.
    ranges : sequence of (first, last), optional
        Blocks of columns; default one of all.
    rows : int
        Bytes kept for each row: numbers and weights.
    update : bool
        Whether rows are subtracted from a sum.
    """
    sides = [last - first for first, last in ranges or [(0, k)]]
    squares = sum(side**2 for side in sides)
    accumulators = workers * sum(MatrixAccumulator.nbytes(side) for side in sides)
    factorising = 8 * squares + 16 * max(sides) ** 2
    return MemoryModel(
        stage=f"fisher for k={k}" + (f" in {len(sides)} blocks" if ranges and len(sides) > 1 else ""),
        fixed=max(0, factorising - accumulators) + 8 * squares * ((workers > 1) + update) + rows,
        per_worker=sum(MatrixAccumulator.nbytes(side) for side in sides) + reading,
        per_row=4 * k,
        max_rows=block_limit(k),
        advice="extract with a smaller k",
    )


def diagonal_need(k: int, reading: int = 0, *, rows: int = 0) -> MemoryModel:
    """Return what fitting the diagonal of F needs; see :func:`fisher_memory`."""
    return MemoryModel(
        stage=f"diagonal of fisher for k={k}",
        fixed=64 * k + rows,  # the sums of all tasks as they meet, and the spectrum
        per_worker=DiagonalAccumulator.nbytes(k) + reading,
        per_row=4 * k,
        max_rows=block_limit(k),
        advice="extract with a smaller k",
    )


def kernel_memory(rows: int, k: int, workers: int = 1, reading: int = 0, small: int = 0) -> MemoryModel:
    """Return what multiplying ``rows`` rows of ``k`` numbers into K needs: each worker's tile, and two blocks of rows.

    Parameters
    ----------
    rows, k, workers : int
        Rows and columns of A; workers of this process.
    reading : int
        What a worker holds to read the store once.
    small : int
        Bytes kept for each row, all together.
    """
    side = tile_side(rows)
    return MemoryModel(
        stage=f"gram for {rows} rows of k={k}",
        fixed=small + (8 * rows**2 if 8 * rows**2 <= KEPT_BYTES else 0),
        per_worker=8 * (_TILES + 1) * side**2 + 2 * reading,
        per_row=2 * (4 * k + 8 * min(k, PANEL)),
        min_rows=min(16, side),
        max_rows=min(side, block_limit(k)),
        advice="fewer rows",
    )


def gram_memory(rows: int, k: int, workers: int = 1, reading: int = 0, small: int = 0) -> MemoryModel:
    """Return what :func:`fit_gram` needs: K as :func:`kernel_memory`, then its factorisation, then F's eigenvectors."""
    need = kernel_memory(rows, k, workers, reading)
    width = max(min(k, PANEL), slab_rows(k, rows))
    lifting = 8 * rows**2 + workers * 8 * rows * (2 * width + min(k, PANEL) + need.max_rows)
    alone = max(24 * rows**2 + 8 * _TILES * tile_side(rows) ** 2, lifting)
    return replace(need, fixed=small + max(need.fixed, alone - workers * need.per_worker))


def module_ranges(train: GradientStore) -> tuple[Range, ...]:
    """Return the columns of each module of a store of kept entries."""
    ends = np.cumsum([len(module.rows) for module in train.mask.modules]).tolist()
    return tuple((first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True) if first < last)


class FitShapes(NamedTuple):
    """What the ways to a curvature are priced by.

    Attributes
    ----------
    k, rows : int
        Columns, and rows of the fit.
    reading, small : int
        Bytes a worker holds to read the store; bytes kept for each row, all together.
    modules : sequence of (first, last)
        Columns of each module; none where they are reduced.
    path : str
        The store, as commands name it.
    """

    k: int
    rows: int
    reading: int = 0
    small: int = 0
    modules: Sequence[Range] = ()
    path: str = "TRAIN"

    @classmethod
    def of(cls, chosen: WeightedRows) -> FitShapes:
        """Return those of a fit of some rows."""
        train = chosen.store
        modules = () if train.is_reduced else module_ranges(train)
        return cls(train.k, chosen.count, train.reading_bytes, chosen.small_bytes, modules, str(train.path))

    @property
    def gram(self) -> MemoryModel:
        """What the Gram side needs, with one worker."""
        return gram_memory(self.rows, self.k, 1, self.reading, self.small)

    def reduced(self, room: MemoryBudget, then: Callable[[int], MemoryModel] | None = None) -> Iterator[Alternative]:
        """Return the widest reduction of the store that fits, with F of it, and what comes ``then`` with r columns."""

        def need(r: int) -> MemoryModel:
            basis = min((way.need for way in spectrum_solvers(self.k, self.rows, r, 1, self.reading)), key=room.price)
            steps = [basis, self._rewriting(r), fisher_memory(r, 1, self.reading, rows=self.small)]
            return max([*steps, *([] if then is None else [then(r)])], key=room.price)

        most = min(self.k - 1, self.rows)
        r = room.largest(need, most) if self.modules and most > 0 else 0
        if r:
            text = f"reduce to {r} columns ({{}}: ooc-influence reduce {self.path} OUT --dims {r})"
            yield Alternative(text, need(r))

    def _rewriting(self, r: int) -> MemoryModel:
        """Return about what writing the rows with r columns needs: the basis, and chunks of float16 on their way."""
        chunk = min(CHUNK_TARGET, 2 * r * max(PRODUCT_ROWS, self.rows // 64))
        return MemoryModel("", 4 * self.k * r + BUFFERS * chunk + _GROUP, self.reading, 4 * (self.k + 2 * r))

    def ranked(self, room: MemoryBudget, text: str = "--rank {}") -> Iterator[Alternative]:
        """Return the largest top of F's spectrum that fits."""
        shapes = Shapes(self.k, self.rows, self.rows, 0, 1, self.reading, self.small)
        rank = largest_rank(shapes, room.budget, room.held)
        if rank:
            yield Alternative(text.format(rank) + " ({})", least_memory(shapes, rank))

    def fisher_alternatives(self, room: MemoryBudget) -> Iterator[Alternative]:
        """Return the ways out where F whole does not fit."""
        yield from self.ranked(room)
        yield from self.reduced(room)
        if len(self.modules) > 1:
            need = fisher_memory(self.k, 1, self.reading, ranges=self.modules, rows=self.small)
            yield Alternative("--blocks module ({})", need)
        yield Alternative("--method dual ({})", self.gram)

    def rank_ways(self, room: MemoryBudget) -> Iterator[Alternative]:
        """Return the ways out where the top of F's spectrum does not fit: less of it, or other columns or rows."""
        yield from self.ranked(room)
        yield from self.reduced(room)
        yield Alternative("--method dual ({})", self.gram)

    def block_ways(self, room: MemoryBudget) -> Iterator[Alternative]:
        """Return the ways out where F by module does not fit."""
        yield from self.ranked(room)
        yield from self.reduced(room)
        yield Alternative("--method dual ({})", self.gram)

    def gram_alternatives(self, room: MemoryBudget) -> Iterator[Alternative]:
        """Return the ways out where K does not fit."""
        yield from self.sampled(room)
        yield Alternative("--method primal ({})", fisher_memory(self.k, 1, self.reading, rows=self.small))
        yield from self.ranked(room, "--method primal --rank {}")
        yield from self.reduced(room)

    def sampled(self, room: MemoryBudget) -> Iterator[Alternative]:
        """Return the largest sample of the rows whose K fits."""
        rows = room.largest(lambda size: gram_memory(size, self.k, 1, self.reading), self.rows - 1)
        if rows > 1:
            yield Alternative(f"--sample {rows} ({{}})", gram_memory(rows, self.k, 1, self.reading))

"""Ways to the top of a spectrum, as pure functions of shapes: what each needs, and the quickest that fits the budget.

``whole``: F is summed in memory and factorised; ``sums``: it is summed in memory and multiplied there by subspace
iteration; ``tiles``: it is summed tile by tile to the disk and multiplied from there; ``rows``: it is never made, rows
are multiplied once a pass. The last two fit any number of columns: they need memory for the eigenvectors only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ooc_influence.errors import InputError
from ooc_influence.linalg import GramAccumulator, ProductAccumulator, iteration_bytes
from ooc_influence.linalg.triangle import TILE, tile_side
from ooc_influence.memory import PRODUCT_ROWS, Need, Room, Ways, block_limit, plan_block_rows

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


class TopWay(NamedTuple):
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
    need: Need
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


def sums_need(shapes: Shapes, rank: int, *, update: bool = False) -> Need:
    """Return what summing F in memory and multiplying it there needs: first the one, then the other."""
    k, c = shapes.k, shapes.columns(rank)
    held = shapes.workers * GramAccumulator.nbytes(k)
    after = 8 * k * k + 8 * k * c + iteration_bytes(k, c)
    several = 8 * k * k * ((shapes.workers > 1) + update)
    fixed = max(0, after - held) + several + shapes.small
    return Need(_stage(k, rank), fixed, GramAccumulator.nbytes(k) + shapes.reading, 4 * k + shapes.sent,
                max_rows=block_limit(k))  # fmt: skip


def tiles_need(shapes: Shapes, rank: int, tile: int) -> Need:
    """Return what summing F in tiles of so many columns and multiplying it from the disk needs."""
    k, c = shapes.k, shapes.columns(rank)
    own = ProductAccumulator.nbytes(tile, tile) + 8 * tile * tile + 3 * 8 * tile_side(k) ** 2 + shapes.reading
    after = iteration_bytes(k, c) + 8 * tile_side(k) * (3 * tile_side(k) + 2 * c)
    fixed = max(0, after - shapes.workers * own) + shapes.small
    return Need(_stage(k, rank), fixed, own, 2 * 4 * tile, max_rows=block_limit(2 * tile))


def rows_need(shapes: Shapes, rank: int) -> Need:
    """Return what multiplying the rows once a pass needs."""
    k, c = shapes.k, shapes.columns(rank)
    own = ProductAccumulator.nbytes(c, k)
    several = 8 * k * c if shapes.workers > 1 else 0
    fixed = max(4 * k * c + several, iteration_bytes(k, c) - shapes.workers * own) + shapes.small
    limit = block_limit(k, least=PRODUCT_ROWS)
    return Need(_stage(k, rank), fixed, own + shapes.reading, 4 * (k + c) + shapes.sent, max_rows=limit)


def _stage(k: int, rank: int) -> str:
    return f"fisher for k={k}, rank={rank}"


def fitting_rows(need: Need, workers: int, budget: int, held: int) -> int:
    """Return the rows of the largest block that fits, 0 where none does."""
    rows = need.max_rows
    while rows > need.min_rows and need.peak(rows, workers, held) > budget:
        rows = max(need.min_rows, rows // 2)
    return rows if need.peak(rows, workers, held) <= budget else 0


def top_ways(
    shapes: Shapes, rank: int, square: Need, budget: int, held: int, *, update: bool = False, tile: int = 0
) -> list[TopWay]:
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

    def add(name: str, need: Need, read: float, singles: float, doubles: float, side: int = 0) -> None:
        rows = fitting_rows(need, workers, budget, held)
        seconds = singles / _OPERATIONS + doubles / _DOUBLE + read / _READING
        found.append(TopWay(name, need, rows, read, singles + doubles, seconds, side))

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


def plan_top(
    shapes: Shapes,
    rank: int,
    square: Need,
    memory: int | str | None,
    outs: Ways,
    *,
    update: bool = False,
    prefer: Preferred | None = None,
) -> TopWay:
    """Return the quickest way that fits, of those preferred if one of them does.

    Raises
    ------
    MemoryBudgetError
        If none does: with what the one that takes least needs, and the ways ``outs``.
    """
    room = Room.of(memory)
    prefer = prefer or Preferred()
    found = top_ways(shapes, rank, square, room.budget, room.held, update=update, tile=prefer.tile)
    if not found[0].block_rows:
        need = min((way.need for way in found), key=lambda need: room.price(need, shapes.workers))
        plan_block_rows(replace(need, ways=outs, advice="extract with a smaller k"), memory, shapes.workers, room.held)
    return next((way for way in found if way.block_rows and way.name in prefer.names), found[0])


def least_need(shapes: Shapes, rank: int) -> Need:
    """Return what the way that takes least needs, of those that fit any number of columns."""
    needs = [rows_need(shapes, rank), tiles_need(shapes, rank, tile_side(shapes.k))]
    return min(needs, key=lambda need: need.peak(need.min_rows, shapes.workers, 0))


def largest_rank(shapes: Shapes, budget: int, held: int) -> int:
    """Return the largest rank, a power of two, that fits the budget; 0 where none does."""
    rank = 1 << min(_LARGEST_RANK, shapes.k, shapes.m).bit_length() - 1
    while rank:
        if fitting_rows(least_need(shapes, rank), shapes.workers, budget, held):
            return rank
        rank //= 2
    return 0

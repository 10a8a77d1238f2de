"""A fit by the Fisher matrix: its sums, from scratch or from those of an earlier fit; F in tiles on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ooc_influence.checkpoint import ResumableOutput, read_facts
from ooc_influence.curvature.costs import Preferred
from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.rows import FittedRows, Staleness, fit_attributes
from ooc_influence.curvature.sums import ROWS, Summing, Sums, choose_engines, sum_name, sum_rows
from ooc_influence.errors import InputError, NonFiniteError, StoreBusyError, writing
from ooc_influence.linalg import (
    Matrix,
    MatrixAccumulator,
    Range,
    RowPartition,
    Team,
    TriangleTiles,
    WeightedRows,
    block_moments,
    partition_rows,
    tile_side,
)
from ooc_influence.parallel import Stripe, run_stripes, subtract_ranges, task_threads
from ooc_influence.progress import Progress, tick
from ooc_influence.store import StorePath

logger = logging.getLogger("ooc_influence")
_MOST_DROPPED = 0.5  # of the trace: beyond it, differences would lose digits


@dataclass
class Fitting:
    """A fit in progress.

    Attributes
    ----------
    target : StorePath
        Where the curvature will be.
    chosen : WeightedRows
        The rows.
    how : Summing
        How they are summed.
    slots : int
        Tasks at once.
    progress : bool or None
        Show progress lines.
    partial : ResumableOutput
        Partial results.
    earlier : Curvature or None
        An earlier fit of the same kind, whose rows are still there.
    staleness : Staleness or None
        How they have changed since.
    """

    target: StorePath
    chosen: WeightedRows
    how: Summing
    slots: int
    progress: bool | None
    partial: ResumableOutput
    earlier: Curvature | None
    staleness: Staleness | None

    def __post_init__(self) -> None:
        self.record = FittedRows.of(self.chosen)

    @property
    def base(self) -> Curvature | None:
        """The earlier fit, where it keeps the sums F is made of."""
        return self.earlier if self.earlier is not None and self.earlier.keeps_sums else None

    @property
    def added(self) -> list[Range]:
        """The rows to be added to the earlier sum."""
        return [] if self.staleness is None or self.staleness.added is None else [self.staleness.added]

    @cached_property
    def removed(self) -> WeightedRows | None:
        """Rows of the earlier sum that are dropped now."""
        if self.base is None or self.staleness is None or not len(self.staleness.removed):
            return None
        return replace(self.chosen.at(self.staleness.removed), dropped_too=True)

    def subtracted(self, trace: float = 0.0) -> float | None:
        """Return the trace subtracted from the earlier sum so far, ``trace`` included; None where that is too much."""
        assert self.base is not None
        total = float(self.base.attrs.get("taken", 0.0)) + trace
        if not trace or total <= _MOST_DROPPED * float(self.base.attrs["trace"]) * self.base.rows:
            return total
        logger.warning("rows with more than half of the trace of %s are dropped: fitting again", self.base.path)
        return None

    def sums(self) -> tuple[Sums, float]:
        """Return the undamped sums, and the trace subtracted from them so far."""
        updated = None if self.base is None else self._updated(self.base)
        if updated is not None:
            return updated
        with Progress("fisher", self.chosen.count, self.progress) as bar:
            return sum_rows(self.chosen, self.how, self.slots, bar, [(0, self.chosen.count)]), 0.0

    def _updated(self, base: Curvature) -> tuple[Sums, float] | None:
        """Return an earlier curvature's sums with rows added and subtracted; None where too much is dropped."""
        dropped = None
        if self.removed is not None:
            plain = replace(self.how, fourth=False, partial=ResumableOutput())
            with Progress("fisher: dropped rows", self.removed.count, self.progress) as bar:
                dropped = sum_rows(self.removed, plain, self.slots, bar, [(0, self.removed.count)])
        subtracted = self.subtracted(0.0 if dropped is None else dropped.trace())
        if subtracted is None:
            return None
        if self.added:
            ((first, last),) = self.added
            with Progress("fisher: new rows", last - first, self.progress) as bar:
                total = sum_rows(self.chosen, self.how, self.slots, bar, self.added)
            base.add_sums_to(total)
        else:
            total = base.sums()
        if dropped is not None:
            for square, part in zip(total.squares, dropped.squares, strict=True):
                square -= part
            total.live, total.clipped = total.live - dropped.live, total.clipped - dropped.clipped
        return total, subtracted

    def check(self, live: int, trace: float) -> None:
        """Check that there are live rows and that their sum is finite.

        Raises
        ------
        InputError, NonFiniteError
            If not.
        """
        if not live:
            raise InputError(
                f"expected a store with live rows; received {self.chosen.store.path} whose rows are all dropped"
            )
        if not np.isfinite(trace):
            raise NonFiniteError(
                "expected a finite Fisher matrix; received NaN or Inf: gradients beyond 1e18 overflow, scale the loss",
                [],
            )

    def attributes(self, live: int, clipped: int, trace: float, subtracted: float) -> dict[str, Any]:
        """Return a curvature's attributes, of an undamped sum over ``live`` rows whose trace is ``trace``."""
        self.check(live, trace)
        if clipped:
            logger.info("%d rows have a loss below the floor of their weights", clipped)
        ranges = [list(part) for part in self.how.blocks]
        more = {"ranges": ranges, "clipped": clipped, "taken": subtracted}
        return fit_attributes(self.chosen, self.record, live, trace / live) | more


def squared_norm(square: Matrix) -> float:
    """Return the squared Frobenius norm of a symmetric matrix: its upper triangle is given, or its diagonal (d,)."""
    if square.ndim == 1:
        return float(np.vdot(square, square))
    upper = np.triu(square)
    return 2 * float(np.vdot(upper, upper)) - float(np.square(np.diagonal(square)).sum())


Region = tuple[slice, slice]
_TILES, _DONE = "tiles", "done"  # of partial results
_F = sum_name(0)


class SummedTiles(NamedTuple):
    """F in tiles on disk, undamped; its live rows and clipped losses; the trace subtracted from it so far."""

    tiles: TriangleTiles
    live: int
    clipped: int
    subtracted: float


@dataclass(frozen=True, eq=False)
class TileSum:
    """How tasks sum tiles.

    Attributes
    ----------
    partial : ResumableOutput
        Partial results: which tiles are finished.
    group : StorePath
        Where the tiles are.
    chosen, ranges : WeightedRows, sequence of (first, last)
        The rows, and which of them are to be added.
    removed : WeightedRows or None
        Rows to be subtracted.
    bases : sequence of StorePath
        The groups of earlier sums, which every tile starts from.
    base_counts : (int, int)
        Live rows and clipped losses in those that earlier runs of this fit kept.
    block_rows, side : int
        Rows read at a time; columns of a tile.
    """

    partial: ResumableOutput
    group: StorePath
    chosen: WeightedRows
    ranges: Sequence[Range]
    removed: WeightedRows | None
    bases: Sequence[StorePath]
    base_counts: tuple[int, int]
    block_rows: int
    side: int

    @property
    def paths(self) -> list[object]:
        """What workers must be able to see."""
        return [self.chosen.store.path, self.group]

    def regions(self) -> list[Region]:
        """Return the tiles of the lower triangle: rows and columns of F."""
        k = self.chosen.store.k
        cuts = [slice(start, min(k, start + self.side)) for start in range(0, k, self.side)]
        return [(rows, columns) for number, rows in enumerate(cuts) for columns in cuts[: number + 1]]

    def rows(self) -> list[tuple[WeightedRows, Range, float]]:
        """Return which rows are summed, by their indices, and the sign with which they count."""
        added = [(self.chosen, part, 1.0) for part in self.ranges]
        return added + ([] if self.removed is None else [(self.removed, (0, self.removed.count), -1.0)])

    def blocks(self, columns: Sequence[Range], threads: int, *, grouped: bool) -> Iterator[tuple[Any, float]]:
        """Yield blocks of those columns, grouped by their scales or as numbers, and the sign with which they count."""
        for rows, (low, high), sign in self.rows():
            if grouped:
                blocks = rows.grouped_blocks(low, high, self.block_rows, columns=columns)
            else:
                blocks = rows.blocks(low, high, self.block_rows, columns=columns, threads=threads)
            yield from ((block, sign) for block in blocks)


def sum_tiles(fit: Fitting, side: int) -> SummedTiles:
    """Return F, undamped, summed to tiles of ``side`` columns beside the target.

    Raises
    ------
    StoreBusyError
        If another process is fitting the same.
    """
    if fit.partial.path is None:
        raise StoreBusyError(
            f"expected to sum F on disk beside {fit.target}; received another process that is fitting it: wait for it, "
            "give another name or out=, or more memory"
        )
    k, base, removed, subtracted = fit.chosen.store.k, fit.base, fit.removed, 0.0
    if base is not None:
        trace = 0.0 if removed is None else float(_moments(fit, removed, side)[2])
        total = fit.subtracted(trace)
        base, removed, subtracted = (None, None, 0.0) if total is None else (base, removed, total)
    ranges: Sequence[Range] = [(0, fit.chosen.count)] if base is None else fit.added
    if not fit.partial.groups(_TILES):
        fit.partial.put_group(_TILES, 0, {}, lambda group: _create_tiles(group, k))
    group = fit.partial.groups(_TILES)[_TILES]
    saved = {path: read_facts(path) for path in fit.partial.groups(ROWS).values()}
    ranges = subtract_ranges(ranges, [tuple(part) for facts in saved.values() for part in facts["ranges"]])
    live, clipped = (sum(int(facts[name]) for facts in saved.values()) for name in ("live", "clipped"))
    bases = [*([] if base is None else [base.path]), *saved]
    how = TileSum(fit.partial, group, fit.chosen, ranges, removed, bases, (live, clipped), fit.how.block_rows, side)
    live, clipped = _run(fit, how)
    if base is not None:
        live, clipped = live + base.rows, clipped + int(base.attrs["clipped"])
        base.check_fit()
    return SummedTiles(TriangleTiles.open(group, _F, k), live, clipped, subtracted)


def _create_tiles(group: Any, k: int) -> None:
    TriangleTiles.create(group, _F, k)


def _run(fit: Fitting, how: TileSum) -> tuple[int, int]:
    """Sum the tiles that are not finished; return the rows and clipped losses that every tile is made of."""
    regions, unit = how.regions(), tile_side(how.chosen.store.k)
    done = _disk_tiles(unit, *(read_facts(path)["region"] for path in fit.partial.groups(_DONE).values()))
    left = [number for number, part in enumerate(regions) if not _disk_tiles(unit, _region(*part)) <= done]
    rows = sum(b - a for a, b in how.ranges) + (0 if how.removed is None else how.removed.count)
    with Progress("fisher tiles", rows * len(regions), fit.progress) as bar:
        bar.advance(rows * (len(regions) - len(left)))
        stripes = [Stripe(number, number + 1) for number in left]
        run_stripes(_sum_tile, stripes, bar, how, slots=fit.slots, own_threads=True)
    facts = read_facts(next(iter(fit.partial.groups(_DONE).values())))
    return int(facts["live"]), int(facts["clipped"])


def usable_plans(results: Mapping[str, StorePath]) -> Preferred:
    """Return the low-rank plans that can use what earlier runs of a fit have kept."""
    tiles = [path for name, path in results.items() if name.startswith(f"{_DONE}-")]
    if tiles:
        return Preferred(("tiles",), int(read_facts(tiles[0])["side"]))
    return Preferred(("whole", "sums", "tiles") if any(name.startswith(f"{ROWS}-") for name in results) else ())


def _region(rows: slice, columns: slice) -> tuple[int, int, int, int]:
    return rows.start, rows.stop, columns.start, columns.stop


def _disk_tiles(unit: int, *regions: Sequence[int]) -> set[tuple[int, int]]:
    """Return the tiles on disk, of ``unit`` rows each, that regions of the lower triangle are made of."""
    return {
        (row, column)
        for low, high, first, last in regions
        for row in range(low // unit, -(-high // unit))
        for column in range(first // unit, min(row + 1, -(-last // unit)))
    }


def _sum_tile(stripe: Stripe, key: str, how: TileSum) -> None:
    """Sum one tile over all rows, write it and record that it is finished."""
    with Team(task_threads()) as team:
        _sum_with(team, stripe.start, key, how)


def _sum_with(team: Team, number: int, key: str, how: TileSum) -> None:
    rows, columns = how.regions()[number]
    k, width = how.chosen.store.k, columns.stop - columns.start
    parts = [source.part(*part) for source, part, _ in how.rows()]
    (engine,), grouped = choose_engines(parts, [width], how.block_rows, team)
    on_diagonal = rows == columns
    total = MatrixAccumulator(rows.stop - rows.start, None if on_diagonal else width, engine, team)
    if how.bases:
        earlier = np.zeros((rows.stop - rows.start, width))
        for base in how.bases:
            TriangleTiles.open(base, _F, k).add_region(rows, columns, earlier)
        total.restore(np.ascontiguousarray(earlier.T) if on_diagonal else earlier, 0)
    panels = [(columns.start, columns.stop)] + ([] if on_diagonal else [(rows.start, rows.stop)])
    live, clipped = how.base_counts
    for block, sign in how.blocks(panels, team.threads, grouped=grouped):
        if on_diagonal:
            total.add(block.rows, sign=sign)
        else:
            total.add(block.rows[:, width:], block.rows[:, :width], sign)
        live, clipped = live + int(sign) * block.live, clipped + int(sign) * block.clipped
        tick(key, block.stop - block.start)
    tile = total.total() if on_diagonal else total.triangle()
    then = " (8 k² bytes are taken while fitting), or give another path with out= (--out)"
    with writing(f"to write tiles of F to {how.group}", then):
        TriangleTiles.open_to_write(how.group, _F, k).write_region(rows, columns, tile)
        region = _region(rows, columns)
        facts = {"live": live, "clipped": clipped, "region": region, "side": how.side}
        how.partial.put_group("-".join(map(str, (_DONE, *region))), 0, facts, lambda group: None)


def _moments(fit: Fitting, rows: WeightedRows, side: int) -> Matrix:
    """Return the moments of rows (:func:`block_moments`), in blocks that take no more memory than tiles of ``side``."""
    block_rows = max(1, fit.how.block_rows * 2 * side // rows.store.k)
    partitions = partition_rows(rows, [(0, rows.count)], block_rows, fit.slots)
    with Progress("fisher: norms of rows", rows.count, fit.progress) as bar:
        moments: Matrix = run_stripes(
            _sum_moments, partitions, bar, rows.store, block_rows, slots=fit.slots, reduce=np.add
        )
    return moments


def sum_fourth(fit: Fitting, side: int) -> float:
    """Return Σ‖x‖⁴ over the rows of a fit, by the memory of tiles of ``side`` columns."""
    return float(_moments(fit, fit.chosen, side)[3])


def _sum_moments(partition: RowPartition, key: str, store: object, block_rows: int) -> Matrix:
    total = np.zeros(4)
    for _, rows in partition.parts:
        for block in rows.blocks(0, rows.count, block_rows, threads=task_threads()):
            total += block_moments(block)
            tick(key, block.stop - block.start)
    return total

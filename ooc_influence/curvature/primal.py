"""One fit of a Fisher matrix: what it sums, from scratch or from an old sum on, and what it writes down."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.checkpoint import ResumableOutput, read_facts
from ooc_influence.curvature.costs import Preferred
from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.rows import FittedRows, Staleness, fit_attributes
from ooc_influence.curvature.sums import ROWS, Summing, Sums, bfloat16_holds, sum_name, sum_rows
from ooc_influence.errors import InputError, NonFiniteError, StoreBusyError, StoreWriteError, refused
from ooc_influence.linalg import (
    MatrixAccumulator,
    Range,
    RowPartition,
    Team,
    TriangleTiles,
    WeightedRows,
    block_moments,
    choose_engine,
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
    """A fit that is going on.

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
    old : Curvature or None
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
    old: Curvature | None
    staleness: Staleness | None

    def __post_init__(self) -> None:
        self.record = FittedRows.of(self.chosen)

    @property
    def base(self) -> Curvature | None:
        """The earlier fit, where it keeps the sums F is made of."""
        return self.old if self.old is not None and self.old.keeps_sums else None

    @cached_property
    def gone(self) -> WeightedRows | None:
        """Rows of the earlier sum that are dropped now."""
        if self.base is None or self.staleness is None or not len(self.staleness.removed):
            return None
        return replace(self.chosen.at(self.staleness.removed), dropped_too=True)

    def taken(self, trace: float) -> float | None:
        """Return the trace taken from the earlier sum so far, ``trace`` included; None where that is too much."""
        assert self.base is not None
        total = float(self.base.attrs.get("taken", 0.0)) + trace
        if total <= _MOST_DROPPED * self.base.trace * self.base.rows:
            return total
        logger.warning("rows with more than half of the trace of %s are dropped: fitting again", self.base.path)
        return None

    def sums(self) -> tuple[Sums, float]:
        """Return the undamped sums, and the trace taken from them so far."""
        found = None if self.base is None else self._updated(self.base)
        if found is None:
            with Progress("fisher", self.chosen.count, self.progress) as bar:
                found = sum_rows(self.chosen, self.how, self.slots, bar, [(0, self.chosen.count)]), 0.0
        return found

    def _updated(self, base: Curvature) -> tuple[Sums, float] | None:
        """Return an old curvature's sums with rows added and subtracted; None where too much is gone."""
        removed, taken = None, float(base.attrs.get("taken", 0.0))
        added = None if self.staleness is None else self.staleness.added
        if self.gone is not None:
            plain = replace(self.how, fourth=False, partial=ResumableOutput())
            with Progress("fisher: dropped rows", self.gone.count, self.progress) as bar:
                removed = sum_rows(self.gone, plain, self.slots, bar, [(0, self.gone.count)])
            now = self.taken(removed.trace())
            if now is None:
                return None
            taken = now
        if added is None:
            total = base.sums()
        else:
            with Progress("fisher: new rows", added[1] - added[0], self.progress) as bar:
                total = sum_rows(self.chosen, self.how, self.slots, bar, [added])
            base.add_sums_to(total)
        if removed is not None:
            for square, part in zip(total.squares, removed.squares, strict=True):
                square -= part
            total.live, total.clipped = total.live - removed.live, total.clipped - removed.clipped
        return total, taken

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

    def attributes(self, live: int, clipped: int, trace: float, taken: float) -> dict[str, Any]:
        """Return what is written down about an undamped sum over ``live`` rows, whose trace is ``trace``."""
        self.check(live, trace)
        if clipped:
            logger.info("%d rows have a loss below the floor of their weights", clipped)
        found = fit_attributes(self.chosen, self.record, live, trace / live)
        return found | {"ranges": [list(part) for part in self.how.blocks], "clipped": clipped, "taken": taken}


def squared_norm(square: npt.NDArray[np.float64]) -> float:
    """Return the squared Frobenius norm of a symmetric matrix: its upper triangle is given, or its diagonal (d,)."""
    if square.ndim == 1:
        return float(np.vdot(square, square))
    upper = np.triu(square)
    return 2 * float(np.vdot(upper, upper)) - float(np.square(np.diagonal(square)).sum())


Region = tuple[slice, slice]
_TILES, _DONE = "tiles", "done"  # of partial results
_F = sum_name(0)


class SummedTiles(NamedTuple):
    """F in tiles, undamped: where it is, its live rows and clipped losses, the trace taken from it so far."""

    tiles: TriangleTiles
    live: int
    clipped: int
    taken: float


@dataclass(frozen=True, eq=False)
class TileSum:
    """How tasks sum tiles.

    Attributes
    ----------
    partial : ResumableOutput
        Partial results: marks of finished tiles.
    group : StorePath
        Where the tiles are.
    chosen, places : WeightedRows, sequence of (first, last)
        The rows, and which of them are to be added.
    gone : WeightedRows or None
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
    places: Sequence[Range]
    gone: WeightedRows | None
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

    def blocks(self, columns: Sequence[Range], threads: int) -> Iterator[tuple[Any, float]]:
        """Yield blocks of those columns, and the sign with which they count."""
        for low, high in self.places:
            for block in self.chosen.blocks(low, high, self.block_rows, columns=columns, threads=threads):
                yield block, 1.0
        if self.gone is not None:
            for block in self.gone.blocks(0, self.gone.count, self.block_rows, columns=columns, threads=threads):
                yield block, -1.0


def sum_tiles(fit: Fitting, side: int) -> SummedTiles:
    """Return F, undamped, summed to tiles of ``side`` columns beside the target.

    Raises
    ------
    StoreBusyError
        If another process is at it.
    """
    if fit.partial.path is None:
        raise StoreBusyError(
            f"expected to sum F on disk beside {fit.target}; received another process that is fitting it: wait for it, "
            "give another name or out=, or more memory"
        )
    k, base, gone, taken = fit.chosen.store.k, fit.base, fit.gone, 0.0
    if base is not None:
        taken = float(base.attrs.get("taken", 0.0))
        if gone is not None:
            now = fit.taken(_moments(fit, gone, side)[2])
            base, gone, taken = (None, None, 0.0) if now is None else (base, gone, now)
    places: Sequence[Range] = [(0, fit.chosen.count)]
    if base is not None:
        places = [] if fit.staleness is None or fit.staleness.added is None else [fit.staleness.added]
    if not fit.partial.groups(_TILES):
        fit.partial.put_group(_TILES, 0, {}, lambda group: _create_tiles(group, k))
    group = fit.partial.groups(_TILES)[_TILES]
    partial = {path: read_facts(path) for path in fit.partial.groups(ROWS).values()}
    places = subtract_ranges(places, [tuple(part) for facts in partial.values() for part in facts["ranges"]])
    counts = tuple(sum(int(facts[name]) for facts in partial.values()) for name in ("live", "clipped"))
    bases = [*([] if base is None else [base.path]), *partial]
    how = TileSum(fit.partial, group, fit.chosen, places, gone, bases, counts, fit.how.block_rows, side)  # type: ignore[arg-type]
    live, clipped = _run(fit, how)
    if base is not None:
        live, clipped = live + base.rows, clipped + int(base.attrs["clipped"])
        base.check_fit()
    return SummedTiles(TriangleTiles.open(group, _F, k), live, clipped, taken)


def _create_tiles(group: Any, k: int) -> None:
    TriangleTiles.create(group, _F, k)


def _run(fit: Fitting, how: TileSum) -> tuple[int, int]:
    """Sum what is not done yet; return the rows and clipped losses that went into every tile."""
    regions, unit = how.regions(), tile_side(how.chosen.store.k)
    done = _units(unit, *(read_facts(path)["region"] for path in fit.partial.groups(_DONE).values()))
    left = [number for number, part in enumerate(regions) if not _units(unit, _region(*part)) <= done]
    rows = sum(b - a for a, b in how.places) + (0 if how.gone is None else how.gone.count)
    with Progress("fisher tiles", rows * len(regions), fit.progress) as bar:
        bar.advance(rows * (len(regions) - len(left)))
        stripes = [Stripe(number, number + 1) for number in left]
        run_stripes(_sum_tile, stripes, bar, how, slots=fit.slots, own_threads=True)
    facts = read_facts(next(iter(fit.partial.groups(_DONE).values())))
    return int(facts["live"]), int(facts["clipped"])


def usable_plans(results: Mapping[str, StorePath]) -> Preferred:
    """Return the ways to the top of a spectrum that can use what earlier runs of a fit have kept."""
    tiles = [path for name, path in results.items() if name.startswith(f"{_DONE}-")]
    if tiles:
        return Preferred(("tiles",), int(read_facts(tiles[0])["side"]))
    return Preferred(("whole", "sums", "tiles") if any(name.startswith(f"{ROWS}-") for name in results) else ())


def _region(rows: slice, columns: slice) -> tuple[int, int, int, int]:
    return rows.start, rows.stop, columns.start, columns.stop


def _units(unit: int, *regions: Sequence[int]) -> set[tuple[int, int]]:
    """Return the tiles of the disk, of the lower triangle, that regions are made of."""
    return {
        (row, column)
        for low, high, first, last in regions
        for row in range(low // unit, -(-high // unit))
        for column in range(first // unit, min(row + 1, -(-last // unit)))
    }


def _sum_tile(stripe: Stripe, key: str, how: TileSum) -> None:
    """Sum one tile over all rows, write it and mark it."""
    with Team(task_threads()) as team:
        _sum_with(team, stripe.start, key, how)


def _sum_with(team: Team, number: int, key: str, how: TileSum) -> None:
    rows, columns = how.regions()[number]
    k, width = how.chosen.store.k, columns.stop - columns.start
    engine = choose_engine(width, bfloat16=bfloat16_holds(how.chosen), team=team)
    on_diagonal = rows == columns
    total = MatrixAccumulator(rows.stop - rows.start, None if on_diagonal else width, engine, team)
    if how.bases:
        earlier = np.zeros((rows.stop - rows.start, width))
        for base in how.bases:
            TriangleTiles.open(base, _F, k).add_region(rows, columns, earlier)
        total.restore(np.ascontiguousarray(earlier.T) if on_diagonal else earlier, 0)
    panels = [(columns.start, columns.stop)] + ([] if on_diagonal else [(rows.start, rows.stop)])
    live, clipped = how.base_counts
    for block, sign in how.blocks(panels, team.threads):
        if on_diagonal:
            total.add(block.rows, sign=sign)
        else:
            total.add(block.rows[:, width:], block.rows[:, :width], sign)
        live, clipped = live + int(sign) * block.live, clipped + int(sign) * block.clipped
        tick(key, block.stop - block.start)
    tile = total.total() if on_diagonal else total.triangle()
    try:
        TriangleTiles.open_to_write(how.group, _F, k).write_region(rows, columns, tile)
        region = _region(rows, columns)
        facts = {"live": live, "clipped": clipped, "region": region, "side": how.side}
        how.partial.put_group("-".join(map(str, (_DONE, *region))), 0, facts, lambda group: None)
    except OSError as error:
        then = " (8 k² bytes are taken while fitting), or give another path with out= (--out)"
        raise StoreWriteError(refused(f"to write tiles of F to {how.group}", error, then)) from error


def _moments(fit: Fitting, chosen: WeightedRows, side: int) -> npt.NDArray[np.float64]:
    rows = max(1, fit.how.block_rows * 2 * side // fit.chosen.store.k)
    with Progress("fisher: norms of rows", chosen.count, fit.progress) as bar:
        return row_moments(chosen, fit.how, rows, fit.slots, bar)


def sum_fourth(fit: Fitting, side: int) -> float:
    """Return Σ‖x‖⁴ over the rows of a fit, in blocks that take no more memory than tiles of ``side`` columns."""
    return float(_moments(fit, fit.chosen, side)[3])


def row_moments(
    chosen: WeightedRows, how: Summing, block_rows: int, slots: int, bar: Progress
) -> npt.NDArray[np.float64]:
    """Return, over some rows: how many are live, how many losses are clipped, Σ‖x‖², Σ‖x‖⁴."""
    shares = partition_rows(chosen, [(0, chosen.count)], block_rows, slots)
    found: npt.NDArray[np.float64] = run_stripes(_sum_moments, shares, bar, how, block_rows, slots=slots, reduce=np.add)
    return found


def _sum_moments(share: RowPartition, key: str, how: Summing, block_rows: int) -> npt.NDArray[np.float64]:
    total = np.zeros(4)
    for _, chosen in share.parts:
        for block in chosen.blocks(0, chosen.count, block_rows, threads=task_threads()):
            total += block_moments(block)
            tick(key, block.stop - block.start)
    return total

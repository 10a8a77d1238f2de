"""Sums Σ w g gᵀ over chosen rows: whole, or a block for each of some ranges of columns; undamped, float64.

Striped over rows: each task reads its blocks, adds XᵀX in place (float32 inside a few thousand rows, float64 across
them) and returns one sum of each kind; the results are added in a tree. A task saves its sums every half minute, and
continues from there if it runs again; what earlier runs saved is added at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ooc_influence.checkpoint import ResumableOutput, read_facts
from ooc_influence.linalg import (
    DiagonalAccumulator,
    Engine,
    Matrix,
    MatrixAccumulator,
    Range,
    RowPartition,
    Team,
    TriangleTiles,
    WeightedRows,
    choose_engine,
    choose_whole_engine,
    partition_rows,
    row_squares,
)
from ooc_influence.parallel import run_stripes, subtract_ranges, task_threads
from ooc_influence.progress import Progress, tick
from ooc_influence.store import GradientStore, StorePath, array_store, create_array, open_group

ROWS = "rows"  # of partial results
_TILE = 64  # rows squared at a time


@dataclass
class Sums:
    """What is summed over rows.

    Attributes
    ----------
    squares : list of (d, d) float64, or one (d,)
        Σ w g gᵀ of each block of columns, of which only the upper triangle is defined; or the diagonal of all.
    live : int
        Rows that are not dropped.
    clipped : int
        Those of them whose weight's loss was raised to its floor.
    fourth : float
        Σ w² ‖g gᵀ‖², where it was asked for: what the error of a sample is estimated from.
    """

    squares: list[Matrix]
    live: int = 0
    clipped: int = 0
    fourth: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Return the sum of both, leaving both as they are."""
        squares = [left + right for left, right in zip(self.squares, other.squares, strict=True)]
        counts = (self.live + other.live, self.clipped + other.clipped, self.fourth + other.fourth)
        return Sums(squares, *counts)

    def trace(self) -> float:
        """Return the sum of all diagonals."""
        return float(sum(square.sum() if square.ndim == 1 else np.trace(square) for square in self.squares))


@dataclass(frozen=True)
class Summing:
    """How tasks sum.

    Attributes
    ----------
    store : GradientStore
        Where rows are read.
    blocks : sequence of (first, last)
        Ranges of columns, each with a square of its own.
    block_rows : int
        Rows read at a time.
    diagonal : bool
        Sum the diagonal only.
    fourth : bool
        Sum fourth powers too.
    partial : ResumableOutput
        Where to save partial results.
    device : str or None
        Where to multiply; None for the BLAS.
    """

    store: GradientStore
    blocks: tuple[Range, ...]
    block_rows: int
    diagonal: bool = False
    fourth: bool = False
    partial: ResumableOutput = field(default_factory=ResumableOutput)
    device: str | None = None

    @property
    def path(self) -> object:
        """What workers must be able to see."""
        return self.store.path


def empty_sums(blocks: Sequence[Range], diagonal: bool) -> Sums:
    """Return sums over no rows of some blocks of columns."""
    return Sums([np.zeros(last - first if diagonal else (last - first, last - first)) for first, last in blocks])


def sum_rows(chosen: WeightedRows, how: Summing, slots: int, bar: Progress, ranges: Sequence[Range]) -> Sums:
    """Return the sums over some ranges of rows, those that earlier runs saved included."""
    saved = {path: read_facts(path) for path in how.partial.groups(ROWS).values()}
    left = subtract_ranges(ranges, [tuple(part) for facts in saved.values() for part in facts["ranges"]])
    bar.advance(sum(b - a for a, b in ranges) - sum(b - a for a, b in left))
    partitions = partition_rows(chosen, left, how.block_rows, slots)
    if partitions:
        total: Sums = run_stripes(_sum_partition, partitions, bar, how, slots=slots, reduce=Sums.plus, own_threads=True)
    else:
        total = empty_sums(how.blocks, how.diagonal)
    for path, facts in saved.items():
        _add_saved(total, path, facts)
    return total


def save_sums(partial: ResumableOutput, total: Sums, ranges: Sequence[Range]) -> None:
    """Save sums over some ranges of rows; later ones that begin with the same row replace these."""
    facts = {"ranges": [list(part) for part in ranges], "live": total.live, "clipped": total.clipped,
             "fourth": total.fourth}  # fmt: skip

    def write(group: Any) -> None:
        for number, square in enumerate(total.squares):
            write_sum(group, number, square)

    partial.put_group(f"{ROWS}-{ranges[0][0]}", sum(b - a for a, b in ranges), facts, write)


def _add_saved(total: Sums, path: StorePath, facts: dict[str, Any]) -> None:
    for number, square in enumerate(total.squares):
        add_written_sum(path, number, square)
    total.live += facts["live"]
    total.clipped += facts["clipped"]
    total.fourth += facts["fourth"]


def sum_name(number: int) -> str:
    """Return the name of the array that holds the sum of a block of columns."""
    return f"sum-{number:05d}"


def write_sum(group: Any, number: int, square: Matrix) -> None:
    """Write the sum of a block of columns into a group: its upper triangle, or its diagonal (d,)."""
    if square.ndim == 1:
        create_array(group, sum_name(number), square.shape, square.shape, "float64", codec="crc32c")[...] = square
    else:
        TriangleTiles.create(group, sum_name(number), len(square)).write_upper(square)


def add_written_sum(path: StorePath, number: int, square: Matrix) -> None:
    """Add to the sum of a block of columns what :func:`write_sum` wrote."""
    if square.ndim == 1:
        diagonal: Any = open_group(array_store(path, read_only=True), "r")[sum_name(number)]
        square += diagonal[...]
    else:
        TriangleTiles.open(path, sum_name(number), len(square)).add_to_upper(square)


def bfloat16_holds(rows: WeightedRows) -> bool:
    """Return whether bfloat16 holds every number of some rows, weights included."""
    plain = rows.store.layout.dtype == "bfloat16" and rows.store.column_scale is None and rows.whitening is None
    return plain and rows.weights is None and rows.weighting is None


def choose_engines(
    rows: Sequence[WeightedRows], sides: Sequence[int], block_rows: int, team: Team, *, grouped: bool = True
) -> tuple[list[Engine], bool]:
    """Return the engine for sums of each number of columns, and whether they take rows grouped by their scales.

    ``grouped``: whether the caller can read them so.
    """
    exact = all(bfloat16_holds(part) for part in rows)
    engines = [choose_engine(side, bfloat16=exact, team=team) for side in sides]
    if not grouped or not rows:
        return engines, False
    shared = min(part.rows_per_scale(block_rows) for part in rows)
    count = sum(part.count for part in rows)
    whole = choose_whole_engine(engines[0], sides, count, shared, team)
    return (engines, False) if whole is None else ([whole] * len(sides), True)


def _fourth_powers(rows: Any, diagonal: bool) -> float:
    """Return Σ‖g gᵀ‖² over rows, of the diagonals of g gᵀ where only those are summed."""
    if not diagonal:
        return float(np.square(row_squares(rows)).sum())
    parts = (np.square(rows[start : start + _TILE]).astype(np.float64) for start in range(0, len(rows), _TILE))
    return float(sum(np.vdot(part, part) for part in parts))


class _RunningSums:
    """The sums of one task, which can be saved whenever they are consistent."""

    def __init__(self, partition: RowPartition, how: Summing, team: Team) -> None:
        self._partition, self._how, self._team = partition, how, team
        self.grouped = False  # whether rows are added grouped by their scales
        self._squares = self._accumulators()
        self._counts = (0, 0, 0.0)
        self._folded = (0, self._counts)  # rows in the float64 sums, and the counts that go with them
        self.done = self._resume()

    def _accumulators(self) -> list[Any]:
        sides = [last - first for first, last in self._how.blocks]
        if self._how.device is not None:
            from ooc_influence.linalg.device import DeviceAccumulator

            return [DeviceAccumulator(side, side, self._how.device) for side in sides]
        if self._how.diagonal:
            return [DiagonalAccumulator(side, self._team) for side in sides]
        rows = [rows for _, rows in self._partition.parts]
        able = not self._how.fourth  # which take the rows as numbers
        engines, self.grouped = choose_engines(rows, sides, self._how.block_rows, self._team, grouped=able)
        return [MatrixAccumulator(side, None, each, self._team) for side, each in zip(sides, engines, strict=True)]

    def _resume(self) -> int:
        """Continue from what this task saved before it was killed; return the rows that it had summed."""
        name = f"{ROWS}-{self._partition.start}"
        path = self._how.partial.groups(name).get(name)
        if path is None:
            return 0
        facts, total = read_facts(path), empty_sums(self._how.blocks, self._how.diagonal)
        _add_saved(total, path, facts)
        rows = int(sum(b - a for a, b in facts["ranges"]))
        for square, values in zip(self._squares, total.squares, strict=True):
            square.restore(values, rows)
        self._counts = (total.live, total.clipped, total.fourth)
        self._folded = (rows, self._counts)
        return rows

    def add(self, rows: Any, live: int, clipped: int) -> None:
        """Add weighted rows."""
        before = self._squares[0].folded
        parts = list(zip(self._squares, self._how.blocks, strict=True))
        if self._how.device is not None:
            for square, (first, last) in parts:
                square.add(rows[:, first:last])
        else:
            self._team.run(piece for square, (first, last) in parts for piece in square.pieces(rows[:, first:last]))
            for square, _ in parts:
                square.added(len(rows))
        fourth = _fourth_powers(rows, self._how.diagonal) if self._how.fourth else 0.0
        self._counts = (self._counts[0] + live, self._counts[1] + clipped, self._counts[2] + fourth)
        if self._squares[0].folded != before:
            self._folded = (self._squares[0].folded, self._counts)

    def save(self) -> None:
        """Save the sums as of the last fold, unless they are being changed."""
        squares = [square.peek() for square in self._squares]
        rows, counts = self._folded
        consistent = all(square.folded == rows for square in self._squares) and all(s is not None for s in squares)
        if self._how.partial.path is None or not rows or not consistent:
            return
        ranges, left = [], rows
        for low, chosen in self._partition.parts:
            if left > 0:
                ranges.append((low, low + min(left, chosen.count)))
                left -= chosen.count
        save_sums(self._how.partial, Sums([square for square in squares if square is not None], *counts), ranges)

    def total(self) -> Sums:
        """Return the sums; the accumulators must not be used any more."""
        squares = []
        while self._squares:
            square = self._squares.pop(0)
            squares.append(square.triangle())
        return Sums(squares, *self._counts)


def _sum_partition(partition: RowPartition, key: str, how: Summing) -> Sums:
    """Return the sums over a partition of the rows."""
    with Team(task_threads()) as team:
        running, clock = _RunningSums(partition, how, team), how.partial.clock()
        skip = running.done
        try:
            for _, rows in partition.parts:
                start, skip = min(skip, rows.count), max(0, skip - rows.count)
                tick(key, start)
                part = (start, rows.count, how.block_rows)
                if running.grouped:
                    blocks = rows.grouped_blocks(*part)
                else:
                    blocks = rows.blocks(*part, threads=team.threads, device=how.device)
                for block in blocks:
                    running.add(block.rows, block.live, block.clipped)
                    if clock.due():
                        clock.run(running.save)
                    tick(key, block.stop - block.start)
        except (KeyboardInterrupt, InterruptedError):
            running.save()
            raise
        return running.total()

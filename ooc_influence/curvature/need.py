"""What fits of a curvature need, as pure functions of shapes, and the other ways that a refusal offers.

F is summed by every worker and then factorised alone; K = A Aᵀ is multiplied tile by tile, factorised alone, and its
eigenvectors are turned into F's panel by panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ooc_influence.curvature.rows import ChosenRows, Range
from ooc_influence.curvature.ways import Shapes, largest_rank, least_need
from ooc_influence.linalg import DiagonalAccumulator, GramAccumulator, spectrum_ways
from ooc_influence.linalg.triangle import tile_side
from ooc_influence.memory import PRODUCT_ROWS, Need, Room, WayOut, block_limit
from ooc_influence.store import CHUNK_TARGET, GradientStore
from ooc_influence.store.writer import BUFFERS

PANEL = 1024  # columns brought to float64 at a time
KEPT_BYTES = 64 * 2**20  # of a Gram matrix that is kept in memory while it is multiplied; a larger one goes to disk
_GROUP = 2**21  # of the small values of rows on their way to a reduced store
_TILES = 3  # copies of a tile while it is written: itself, its transpose, and the checksummed bytes


def fisher_need(
    k: int,
    workers: int,
    reading: int = 0,
    *,
    ranges: Sequence[Range] | None = None,
    rows: int = 0,
    update: bool = False,
) -> Need:
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
    accumulators = workers * sum(GramAccumulator.nbytes(side) for side in sides)
    factorising = 8 * squares + 16 * max(sides) ** 2
    return Need(
        stage=f"fisher for k={k}" + (f" in {len(sides)} blocks" if ranges and len(sides) > 1 else ""),
        fixed=max(0, factorising - accumulators) + 8 * squares * ((workers > 1) + update) + rows,
        per_worker=sum(GramAccumulator.nbytes(side) for side in sides) + reading,
        per_row=4 * k,
        max_rows=block_limit(k),
        advice="extract with a smaller k",
    )


def diagonal_need(k: int, reading: int = 0, *, rows: int = 0) -> Need:
    """Return what fitting the diagonal of F needs; see :func:`fisher_need`."""
    return Need(
        stage=f"diagonal of fisher for k={k}",
        fixed=64 * k + rows,  # the sums of all tasks as they meet, and the spectrum
        per_worker=DiagonalAccumulator.nbytes(k) + reading,
        per_row=4 * k,
        max_rows=block_limit(k),
        advice="extract with a smaller k",
    )


def kernel_need(rows: int, k: int, workers: int = 1, reading: int = 0, small: int = 0) -> Need:
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
    return Need(
        stage=f"gram for {rows} rows of k={k}",
        fixed=small + (8 * rows**2 if 8 * rows**2 <= KEPT_BYTES else 0),
        per_worker=8 * (_TILES + 1) * side**2 + 2 * reading,
        per_row=2 * (4 * k + 8 * min(k, PANEL)),
        min_rows=min(16, side),
        max_rows=min(side, block_limit(k)),
        advice="fewer rows",
    )


def gram_need(rows: int, k: int, workers: int = 1, reading: int = 0, small: int = 0) -> Need:
    """Return what :func:`fit_gram` needs: K as :func:`kernel_need`, then its factorisation, then F's eigenvectors."""
    need = kernel_need(rows, k, workers, reading)
    width = max(min(k, PANEL), slab_rows(k, rows))
    lifting = 8 * rows**2 + workers * 8 * rows * (2 * width + min(k, PANEL) + need.max_rows)
    alone = max(24 * rows**2 + 8 * _TILES * tile_side(rows) ** 2, lifting)
    return replace(need, fixed=small + max(need.fixed, alone - workers * need.per_worker))


def slab_rows(d: int, r: int) -> int:
    """Return the rows of eigenvectors (d, r) in a chunk on disk: what is written, and read, at a time."""
    return max(1, min(d, CHUNK_TARGET // (8 * r)))


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
    def of(cls, chosen: ChosenRows) -> FitShapes:
        """Return those of a fit of some rows."""
        train = chosen.store
        modules = () if train.is_reduced else module_ranges(train)
        return cls(train.k, chosen.count, train.reading_bytes, chosen.small_bytes, modules, str(train.path))

    @property
    def gram(self) -> Need:
        """What the Gram side needs, with one worker."""
        return gram_need(self.rows, self.k, 1, self.reading, self.small)

    def reduced(self, room: Room, then: Callable[[int], Need] | None = None) -> Iterator[WayOut]:
        """Return the widest reduction of the store that fits, with F of it, and what comes ``then`` with r columns."""

        def need(r: int) -> Need:
            basis = min((way.need for way in spectrum_ways(self.k, self.rows, r, 1, self.reading)), key=room.price)
            steps = [basis, self._rewriting(r), fisher_need(r, 1, self.reading, rows=self.small)]
            return max([*steps, *([] if then is None else [then(r)])], key=room.price)

        most = min(self.k - 1, self.rows)
        r = room.largest(need, most) if self.modules and most > 0 else 0
        if r:
            text = f"reduce to {r} columns ({{}}: ooc-influence reduce {self.path} OUT --dims {r})"
            yield WayOut(text, need(r))

    def _rewriting(self, r: int) -> Need:
        """Return about what writing the rows with r columns needs: the basis, and chunks of float16 on their way."""
        chunk = min(CHUNK_TARGET, 2 * r * max(PRODUCT_ROWS, self.rows // 64))
        return Need("", 4 * self.k * r + BUFFERS * chunk + _GROUP, self.reading, 4 * (self.k + 2 * r))

    def ranked(self, room: Room, text: str = "--rank {}") -> Iterator[WayOut]:
        """Return the largest top of F's spectrum that fits."""
        shapes = Shapes(self.k, self.rows, self.rows, 0, 1, self.reading, self.small)
        rank = largest_rank(shapes, room.budget, room.held)
        if rank:
            yield WayOut(text.format(rank) + " ({})", least_need(shapes, rank))

    def fisher_ways(self, room: Room) -> Iterator[WayOut]:
        """Return the ways out where F whole does not fit."""
        yield from self.ranked(room)
        yield from self.reduced(room)
        if len(self.modules) > 1:
            need = fisher_need(self.k, 1, self.reading, ranges=self.modules, rows=self.small)
            yield WayOut("--blocks module ({})", need)
        yield WayOut("--side gram ({})", self.gram)

    def rank_ways(self, room: Room) -> Iterator[WayOut]:
        """Return the ways out where the top of F's spectrum does not fit: less of it, or other columns or rows."""
        yield from self.ranked(room)
        yield from self.reduced(room)
        yield WayOut("--side gram ({})", self.gram)

    def block_ways(self, room: Room) -> Iterator[WayOut]:
        """Return the ways out where F by module does not fit."""
        yield from self.ranked(room)
        yield from self.reduced(room)
        yield WayOut("--side gram ({})", self.gram)

    def gram_ways(self, room: Room) -> Iterator[WayOut]:
        """Return the ways out where K does not fit."""
        yield from self.sampled(room)
        yield WayOut("--side fisher ({})", fisher_need(self.k, 1, self.reading, rows=self.small))
        yield from self.ranked(room, "--side fisher --rank {}")
        yield from self.reduced(room)

    def sampled(self, room: Room) -> Iterator[WayOut]:
        """Return the largest sample of the rows whose K fits."""
        rows = room.largest(lambda size: gram_need(size, self.k, 1, self.reading), self.rows - 1)
        if rows > 1:
            yield WayOut(f"--sample {rows} ({{}})", gram_need(rows, self.k, 1, self.reading))

"""Sums over rows of whole numbers of eight bits times a scale, by exact integer products.

Where rows x = s q have few different scales, Σ x xᵀ = Σ_s s² Σ q qᵀ: the inner sums, each over the rows with one
scale, are products of whole numbers, for which many processors have instructions several times as fast as those for
float32. They are exact in 32 bits; only their sum over scales is rounded, to float32. Rows of ``int8-linear`` have
scales on a grid of eight to a factor of two for this (:mod:`ooc_influence.store.encoding`).
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg.backend import Engine, Floats, Team, timed_square
from ooc_influence.process import limit_openmp

logger = logging.getLogger("ooc_influence")
# scales whose squares, times sums of products of whole numbers, are far from float32's limits
LEAST_SCALE, MOST_SCALE = 2.0**-60, 2.0**40
_MOST_ROWS = 2**16  # of a sum in 32 bits: twice as many rows of -128 would overflow it
_STRIP, _WIDTH = 256, 4096  # rows and columns of a temporary product: 4 MiB at most
_WORTH_TRYING = 2**36  # products of two numbers: a sum of fewer takes about as long as the trial
_WORTH_LOADING = 2**40  # the same, for PyTorch to be loaded: float32 takes seconds
_NARROWEST = 512  # columns
_TRIAL = (2048, 1536)  # rows and columns of the block that is timed
_TRIALS = 5
_CHECKED = 64  # columns of it whose products are compared
_AGREEMENT = 1e-6  # of the largest entry
_GAIN = 1.2  # times as fast as float32's must it be
_lock = threading.Lock()
_chosen: dict[tuple[str, int, int], bool] = {}


def multiply_whole(left: Any, right: Any, out: Any) -> None:
    """Write left @ rightᵀ of int8 tensors (a, k) and (b, k) to ``out`` (a, b) int32, exactly.

    By a function of PyTorch that is not public: nothing but this module calls it, and it is tried before it is used.
    """
    torch: Any = sys.modules["torch"]
    if left.shape[1] == 1:  # of one column, whose strides say nothing, it gives other numbers
        torch.mul(left.int(), right.T.int(), out=out)
    else:
        torch._int_mm(left.contiguous(), right.T, out=out)


def cross_whole(left: Any, right: Any, out: Any) -> None:
    """Write leftᵀ @ right of int8 tensors (m, a) and (m, b) to ``out`` (a, b) int32, exactly; see above."""
    torch: Any = sys.modules["torch"]
    if len(left) == 1:
        torch.mul(left.T.int(), right.int(), out=out)
    elif min(out.shape) == 1:
        torch.mm(left.T.int(), right.int(), out=out)
    else:
        torch._int_mm(left.T, right, out=out)


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """Rows of whole numbers times a scale, those with the same scale next to each other; dropped rows are left out.

    Attributes
    ----------
    codes : (m, c) int8
        The whole numbers.
    groups : sequence of (first, last, square)
        Ranges of them, and the squared scale of each.
    factors : (c,) float32 or None
        What columns are multiplied by.
    count : int
        Rows of the block, dropped ones included.
    """

    codes: npt.NDArray[np.int8]
    groups: Sequence[tuple[int, int, float]]
    factors: Floats | None
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: tuple[slice, slice]) -> Self:
        """Return some columns of all rows: ``rows[:, first:last]``."""
        columns = part[1]
        factors = None if self.factors is None else self.factors[columns]
        return replace(self, codes=self.codes[:, columns], factors=factors)


class RowGrouper:
    """Sorts the stored rows of blocks by their scales, into one buffer.

    Parameters
    ----------
    block_rows : int
        Rows of a block, at most.
    columns : sequence of (first, last)
        The columns wanted, one range after the other.
    factors : (c,) float32 or None
        What these are multiplied by.
    """

    def __init__(self, block_rows: int, columns: Sequence[tuple[int, int]], factors: Floats | None) -> None:
        self._columns, self._factors = columns, factors
        self._buffer = np.empty((block_rows, sum(last - first for first, last in columns)), np.int8)

    def group(
        self, parts: Sequence[tuple[npt.NDArray[Any], Floats]], dropped: npt.NDArray[np.bool_] | None
    ) -> GroupedRows:
        """Return the rows (m, k) int8 of some parts, with their scales (m,); the next block overwrites them."""
        scale = np.concatenate([scale for _, scale in parts])
        live = np.arange(len(scale)) if dropped is None else np.flatnonzero(~dropped)
        order = live[np.argsort(scale[live], kind="stable")]
        place = np.full(len(scale), -1)
        place[order] = np.arange(len(order))
        start = 0
        for raw, _ in parts:
            to = place[start : start + len(raw)]
            start += len(raw)
            kept, at = slice(None) if dropped is None else to >= 0, 0
            for first, last in self._columns:
                self._buffer[to[kept], at : at + last - first] = raw[kept, first:last]
                at += last - first
        codes = self._buffer[: len(order)]
        return GroupedRows(codes, list(_groups(scale[order])), self._factors, len(scale))


def _groups(scale: Floats) -> Any:
    """Yield the ranges of equal numbers in ascending ones, and their square."""
    edges = [0, *(np.flatnonzero(np.diff(scale)) + 1).tolist(), len(scale)]
    for low, high in pairwise(edges):
        for first in range(low, high, _MOST_ROWS):
            yield first, min(high, first + _MOST_ROWS), float(scale[first]) ** 2


class WholeEngine:
    """PyTorch's products of whole numbers, of :class:`GroupedRows`, in the calling thread; see :class:`Engine`."""

    name = "whole numbers"
    own_threads = False

    def add_square(self, total: Floats, block: Any, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        for start in range(0, len(total), _STRIP):
            columns = slice(start, start + _STRIP)
            self.add_product(total[columns, start:], block[:, columns], block[:, start:], sign)

    def add_product(self, total: Floats, left: Any, right: Any, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        torch: Any = sys.modules["torch"]
        shape = min(_STRIP, total.shape[0]), min(_WIDTH, total.shape[1])
        product = torch.empty(shape, dtype=torch.int32).flatten()
        sums = None if left.factors is None else torch.empty(shape).flatten()
        with limit_openmp(1):
            for row in range(0, total.shape[0], _STRIP):
                for column in range(0, total.shape[1], _WIDTH):
                    rows, columns = slice(row, row + _STRIP), slice(column, column + _WIDTH)
                    _add_tile(total[rows, columns], left[:, rows], right[:, columns], sign, (product, sums))


def _add_tile(total: Floats, left: GroupedRows, right: GroupedRows, sign: float, room: tuple[Any, Any]) -> None:
    """Add ``sign`` leftᵀ right to ``total`` (a, c); ``room``: an int32 tensor, and a float32 one for column factors."""
    torch: Any = sys.modules["torch"]
    target = torch.from_numpy(total)
    product = room[0][: total.size].view(total.shape)
    sums = target if room[1] is None else room[1][: total.size].view(total.shape).zero_()
    mine, others = torch.from_numpy(left.codes), torch.from_numpy(right.codes)
    for first, last, square in left.groups:
        cross_whole(mine[first:last], others[first:last], product)
        sums.add_(product, alpha=sign * square)
    if left.factors is not None:
        sums.mul_(torch.from_numpy(left.factors)[:, None]).mul_(torch.from_numpy(right.factors))
        target.add_(sums)


def choose_whole_engine(other: Engine, sides: Sequence[int], rows: int, group: int, team: Team) -> WholeEngine | None:
    """Return the engine of whole numbers where it is the quicker one, tried once for each size of the groups.

    Parameters
    ----------
    other : Engine
        What would multiply the rows as float32.
    sides : sequence of int
        Columns of the sums.
    rows, group : int
        How many rows there are, and how many of a block share a scale, on average; 0 where they cannot be grouped.
    team : Team
        Who will do the work.
    """
    work = rows * sum(side * side for side in sides)
    if not group or min(sides) < _NARROWEST or work < _WORTH_TRYING:
        return None
    if not (work >= _WORTH_LOADING or hasattr(sys.modules.get("torch"), "mm")):
        return None
    key = (other.name, min(_TRIAL[0], 1 << (group.bit_length() - 1)), team.threads)
    with _lock:
        if key not in _chosen:
            _chosen[key] = _quicker(other, key[1], team)
        return WholeEngine() if _chosen[key] else None


def _quicker(other: Engine, group: int, team: Team) -> bool:
    """Return whether whole numbers are accurate, and quicker than another engine's float32."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-127, 128, _TRIAL, np.int8)
    scale = np.exp2(np.arange(_TRIAL[0]) // group / 8 % 20 - 10).astype(np.float32)
    scale.sort()
    block, total = codes * scale[:, None], np.zeros((_TRIAL[1], _TRIAL[1]), np.float32)
    edges = [*range(0, _TRIAL[0], group), _TRIAL[0]]
    groups = [(first, last, float(scale[first]) ** 2) for first, last in pairwise(edges)]
    grouped, engine = GroupedRows(codes, groups, None, len(codes)), WholeEngine()
    try:
        import torch  # noqa: F401 - the engine looks it up

        engine.add_square(total, grouped)
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.info("no products of whole numbers here: %s", str(error).splitlines()[0])
        return False
    exact = np.triu(block[:, :_CHECKED].T.astype(np.float64) @ block)
    if np.abs(np.triu(total[:_CHECKED]) - exact).max() > _AGREEMENT * exact.max():
        logger.info("no products of whole numbers here: they are less accurate than they should be")
        return False
    rounds = [(timed_square(other, total, block, team), timed_square(engine, total, grouped, team))
              for _ in range(_TRIALS)]  # fmt: skip
    theirs, ours = np.min(rounds, axis=0).tolist()
    quicker = bool(_GAIN * ours <= theirs)
    logger.info("products of rows of whole numbers, %d to a scale, by %s (%.1f times as fast as %s)", group,
                engine.name if quicker else other.name, theirs / ours, other.name)  # fmt: skip
    return quicker

"""Sums of outer products over any number of rows: float32 inside a few thousand of them, float64 across.

The float32 sum is added to the float64 one every :data:`FOLD_ROWS` rows, which costs a few per cent and keeps rounding
independent of the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg.blas import Floats
from ooc_influence.linalg.engines import Engine, Team, choose_engine, square_pieces

Matrix = npt.NDArray[np.float64]
FOLD_ROWS = 8192  # rows summed in float32 before they are added to the float64 sum
_FOLD_TILE = 256  # rows of the matrix folded at a time: the tile stays in cache


class GramAccumulator:
    """The sum Σ XᵀX over blocks X (m, k), in float64.

    Parameters
    ----------
    k : int
        Columns. Holds k² float32 and k² float64.
    engine : Engine, optional
        What multiplies; default the fastest at hand.
    team : Team, optional
        Who does the work; default the caller.

    Attributes
    ----------
    folded : int
        Rows in the float64 sum.
    """

    def __init__(self, k: int, engine: Engine | None = None, team: Team | None = None) -> None:
        self._team = team or Team()
        self._engine = choose_engine(k) if engine is None else engine
        self._single = np.zeros((k, k), np.float32)
        self._double = np.zeros((k, k), np.float64)
        self._pending = self.folded = 0
        self._whole = True  # the float64 sum is not being changed

    @staticmethod
    def nbytes(k: int) -> int:
        """Return the bytes an accumulator of ``k`` columns holds."""
        return 12 * k * k

    def add(self, block: Floats, sign: float = 1.0) -> None:
        """Add XᵀX of a float32 block (m, k), or a range of a wider one's columns; ``sign`` -1 takes it away."""
        self._team.run(self.pieces(block, sign))
        self.added(len(block))

    def pieces(self, block: Floats, sign: float = 1.0) -> list[Callable[[], None]]:
        """Return calls that together add a block, which may be made at once; then :meth:`added` has to be told."""
        return square_pieces(self._engine, self._single, block, sign, self._team.threads)

    def added(self, rows: int) -> None:
        """Count rows whose :meth:`pieces` are done."""
        self._pending += rows
        if self._pending >= FOLD_ROWS:
            self._fold()

    def _fold(self) -> None:
        def fold(start: int) -> None:
            rows, columns = slice(start, start + _FOLD_TILE), slice(start, None)
            self._double[rows, columns] += self._single[rows, columns]
            self._single[rows, columns] = 0

        self._whole = False
        self._team.run(partial(fold, start) for start in range(0, len(self._single), _FOLD_TILE))
        self.folded += self._pending
        self._pending = 0
        self._whole = True

    def restore(self, triangle: Matrix, rows: int) -> None:
        """Go on from a sum over ``rows`` rows that :meth:`triangle` returned, which is taken over."""
        self._double, self.folded = triangle, rows

    def triangle(self) -> Matrix:
        """Return the sum, (k, k) float64, its upper triangle; below it, nothing that counts. It goes on living."""
        if self._pending:
            self._fold()
        return self._double

    def peek(self) -> Matrix | None:
        """Return :meth:`triangle` as of the last fold; None in the middle of one."""
        return self._double if self._whole else None

    def total(self) -> Matrix:
        """Return the whole symmetric sum, (k, k) float64; the accumulator is used up."""
        found = self.triangle()
        self._single = np.empty((0, 0), np.float32)
        mirror(found)
        return found


def mirror(matrix: Matrix) -> None:
    """Copy the upper triangle of a square matrix to its lower one, in place."""
    for start in range(0, len(matrix), _FOLD_TILE):
        stop = min(len(matrix), start + _FOLD_TILE)
        square = matrix[start:stop, start:stop]
        square[...] = np.triu(square) + np.triu(square, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T

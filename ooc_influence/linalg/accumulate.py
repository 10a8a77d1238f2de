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
from ooc_influence.linalg.engines import Engine, Team, choose_engine, product_pieces, square_pieces

Matrix = npt.NDArray[np.float64]
FOLD_ROWS = 8192  # rows summed in float32 before they are added to the float64 sum
_FOLD_TILE = 256  # rows of the matrix folded at a time: the tile stays in cache


class _Accumulator:
    """A float32 sum (a, b) that is folded into a float64 one."""

    def __init__(self, a: int, b: int, engine: Engine | None, team: Team | None) -> None:
        self._team = team or Team()
        self._engine = choose_engine(max(a, b)) if engine is None else engine
        self._single = np.zeros((a, b), np.float32)
        self._double = np.zeros((a, b), np.float64)
        self._pending = self.folded = 0
        self._whole = True  # the float64 sum is not being changed

    def added(self, rows: int) -> None:
        """Count rows whose pieces are done."""
        self._pending += rows
        if self._pending >= FOLD_ROWS:
            self._fold()

    def _fold(self) -> None:
        def fold(start: int) -> None:
            rows, columns = slice(start, start + _FOLD_TILE), self._columns(start)
            self._double[rows, columns] += self._single[rows, columns]
            self._single[rows, columns] = 0

        self._whole = False
        self._team.run(partial(fold, start) for start in range(0, len(self._single), _FOLD_TILE))
        self.folded += self._pending
        self._pending = 0
        self._whole = True

    def _columns(self, start: int) -> slice:
        """Return the columns that count from row ``start`` on."""
        return slice(None)

    def restore(self, total: Matrix, rows: int) -> None:
        """Go on from a sum over ``rows`` rows, which is taken over."""
        self._double, self.folded = total, rows

    def peek(self) -> Matrix | None:
        """Return the float64 sum as of the last fold; None in the middle of one."""
        return self._double if self._whole else None

    def _finished(self) -> Matrix:
        if self._pending:
            self._fold()
        return self._double


class ProductAccumulator(_Accumulator):
    """The sum Σ XᵀY over blocks X (m, a) and Y (m, b), in float64.

    Parameters
    ----------
    a, b : int
        Columns. Holds a b float32 and a b float64.
    engine, team
        As for :class:`GramAccumulator`.
    """

    def __init__(self, a: int, b: int, engine: Engine | None = None, team: Team | None = None) -> None:
        super().__init__(a, b, engine, team)

    @staticmethod
    def nbytes(a: int, b: int) -> int:
        """Return the bytes an accumulator of ``a`` and ``b`` columns holds."""
        return 12 * a * b

    def add(self, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """Add leftᵀ right of float32 blocks, or ranges of wider ones' columns; ``sign`` -1 takes it away."""
        self._team.run(product_pieces(self._engine, self._single, left, right, sign, self._team.threads))
        self.added(len(left))

    def triangle(self) -> Matrix:
        """Return the sum, all of it, (a, b) float64; it goes on living."""
        return self._finished()


class GramAccumulator(_Accumulator):
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
        super().__init__(k, k, engine, team)

    @staticmethod
    def nbytes(k: int) -> int:
        """Return the bytes an accumulator of ``k`` columns holds."""
        return ProductAccumulator.nbytes(k, k)

    def _columns(self, start: int) -> slice:
        return slice(start, None)

    def add(self, block: Floats, sign: float = 1.0) -> None:
        """Add XᵀX of a float32 block (m, k), or a range of a wider one's columns; ``sign`` -1 takes it away."""
        self._team.run(self.pieces(block, sign))
        self.added(len(block))

    def pieces(self, block: Floats, sign: float = 1.0) -> list[Callable[[], None]]:
        """Return calls that together add a block, which may be made at once; then :meth:`added` has to be told."""
        return square_pieces(self._engine, self._single, block, sign, self._team.threads)

    def triangle(self) -> Matrix:
        """Return the sum, (k, k) float64, its upper triangle; below it, nothing that counts. It goes on living."""
        return self._finished()

    def total(self) -> Matrix:
        """Return the whole symmetric sum, (k, k) float64; the accumulator is used up."""
        found = self.triangle()
        self._single = np.empty((0, 0), np.float32)
        mirror(found)
        return found


class DiagonalAccumulator:
    """The diagonal of Σ XᵀX over blocks X (m, k), in float64; what a :class:`GramAccumulator` does, for k numbers.

    Parameters
    ----------
    k : int
        Columns.
    team : Team, optional
        Who does the work; default the caller.

    Attributes
    ----------
    folded : int
        Rows in the sum.
    """

    def __init__(self, k: int, team: Team | None = None) -> None:
        self._team = team or Team()
        self._pending, self._sum = np.zeros(k), np.zeros(k)
        self.folded = 0
        self._whole = True

    @staticmethod
    def nbytes(k: int) -> int:
        """Return the bytes an accumulator of ``k`` columns holds."""
        return 16 * k

    def pieces(self, block: Floats, sign: float = 1.0) -> list[Callable[[], None]]:
        """See :meth:`GramAccumulator.pieces`."""

        def piece(columns: slice) -> None:
            for start in range(0, len(block), _FOLD_TILE):
                tile = block[start : start + _FOLD_TILE, columns]
                self._pending[columns] += sign * np.einsum("ij,ij->j", tile, tile)

        size = -(-len(self._sum) // self._team.threads)
        return [partial(piece, slice(start, start + size)) for start in range(0, len(self._sum), size)]

    def added(self, rows: int) -> None:
        """See :meth:`GramAccumulator.added`."""
        self._whole = False
        self._sum += self._pending
        self._pending[...] = 0
        self.folded += rows
        self._whole = True

    def restore(self, total: Matrix, rows: int) -> None:
        """Go on from a sum over ``rows`` rows, which is taken over."""
        self._sum, self.folded = total, rows

    def peek(self) -> Matrix | None:
        """Return the sum; None while it is being changed."""
        return self._sum if self._whole else None

    def triangle(self) -> Matrix:
        """Return the sum, (k,) float64."""
        return self._sum


def mirror(matrix: Matrix) -> None:
    """Copy the upper triangle of a square matrix to its lower one, in place."""
    for start in range(0, len(matrix), _FOLD_TILE):
        stop = min(len(matrix), start + _FOLD_TILE)
        square = matrix[start:stop, start:stop]
        square[...] = np.triu(square) + np.triu(square, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T

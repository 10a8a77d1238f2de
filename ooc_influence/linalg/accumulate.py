"""A symmetric matrix on disk: the square tiles of its lower triangle, float64.

The array has shape (tiles, T, T). Tile I(I+1)/2 + J, J ≤ I, holds rows I·T to (I+1)·T and columns J·T to (J+1)·T, zero
beyond the matrix. Each tile is one chunk with a checksum, so tiles are written, replaced and linked one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg.backend import Engine, Floats, Matrix, Team, choose_engine, product_pieces, square_pieces
from ooc_influence.store import (
    StorePath,
    array_store,
    create_array,
    open_group,
    read_part,
    writable_array,
)

TILE = 1024  # rows and columns of a tile: 8 MiB


class Tile(NamedTuple):
    """One tile of a triangle: its number, its rows and its columns."""

    number: int
    rows: slice
    columns: slice


def tile_side(side: int) -> int:
    """Return the rows of a tile of a matrix of ``side`` rows."""
    return max(1, min(TILE, side))


def list_tiles(side: int) -> list[Tile]:
    """Return the tiles of a matrix's lower triangle in order."""
    size = tile_side(side)
    cuts = [slice(start, min(side, start + size)) for start in range(0, side, size)]
    return [
        Tile(high * (high + 1) // 2 + low, cuts[high], cuts[low])
        for high in range(len(cuts))
        for low in range(high + 1)
    ]


class TriangleTiles:
    """A symmetric matrix in tiles, in an array of a Zarr group.

    Parameters
    ----------
    array : zarr.Array
        (tiles, T, T) float64.
    side : int
        Rows of the matrix.
    """

    def __init__(self, array: Any, side: int) -> None:
        self._array, self.side = array, side

    @classmethod
    def create(cls, group: Any, name: str, side: int) -> TriangleTiles:
        """Make room for a matrix in a group."""
        size = tile_side(side)
        shape = (len(list_tiles(side)), size, size)
        return cls(create_array(group, name, shape, (1, size, size), "float64", check=True), side)

    @classmethod
    def open(cls, path: StorePath, name: str, side: int) -> TriangleTiles:
        """Open the matrix ``name`` of the group at ``path``; a missing tile is damage."""
        return cls(open_group(array_store(path, read_only=True, chunk_bytes={}), "r")[name], side)

    @classmethod
    def open_to_write(cls, path: StorePath, name: str, side: int) -> TriangleTiles:
        """Open the matrix ``name`` of the group at ``path``, to fill its tiles."""
        return cls(writable_array(open_group(array_store(path), "r+"), name), side)

    def write(self, tile: Tile, values: Matrix) -> None:
        """Write one tile."""
        size = self._array.shape[1]
        whole = values
        if values.shape != (size, size):
            whole = np.zeros((size, size))
            whole[: values.shape[0], : values.shape[1]] = values
        self._array[tile.number] = whole

    def read(self, tile: Tile) -> Matrix:
        """Return one tile.

        Raises
        ------
        StoreDamagedError
            If it is missing or fails its checksum.
        """
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        found: Matrix = read_part(self._array, tile.number)[:rows, :columns]
        return found

    def inside(self, rows: slice, columns: slice) -> list[Tile]:
        """Return the tiles inside some rows and columns that begin and end with tiles."""
        return [
            tile
            for tile in list_tiles(self.side)
            if rows.start <= tile.rows.start < rows.stop and columns.start <= tile.columns.start < columns.stop
        ]

    def add_region(self, rows: slice, columns: slice, out: Matrix) -> None:
        """Add what :meth:`inside` lists to ``out`` (rows, columns), in place; nothing above the matrix's diagonal."""
        for tile in self.inside(rows, columns):
            out[_moved(tile.rows, rows.start), _moved(tile.columns, columns.start)] += self.read(tile)

    def write_region(self, rows: slice, columns: slice, values: Matrix) -> None:
        """Write what :meth:`inside` lists out of ``values`` (rows, columns); it is on the disk when this returns."""
        for tile in self.inside(rows, columns):
            self.write(tile, values[_moved(tile.rows, rows.start), _moved(tile.columns, columns.start)])
        self._array.store.sync_folders()

    def copy_from(self, other: TriangleTiles) -> None:
        """Write the tiles of a matrix of the same side."""
        for tile in list_tiles(self.side):
            self.write(tile, other.read(tile))

    def multiply(self, columns: npt.NDArray[np.float32]) -> Matrix:
        """Return the product with ``columns`` (side, c), transposed: (c, side) float64."""
        total = np.zeros((columns.shape[1], self.side))
        for tile in list_tiles(self.side):
            values = self.read(tile)
            total[:, tile.rows] += columns[tile.columns].T.astype(np.float64) @ values.T
            if tile.rows != tile.columns:
                total[:, tile.columns] += columns[tile.rows].T.astype(np.float64) @ values
        return total

    def moments(self) -> tuple[float, float]:
        """Return the trace and the squared Frobenius norm."""
        trace = norm = 0.0
        for tile in list_tiles(self.side):
            values, diagonal = self.read(tile), tile.rows == tile.columns
            trace += float(np.trace(values)) if diagonal else 0.0
            norm += (1 if diagonal else 2) * float(np.vdot(values, values))
        return trace, norm

    def write_upper(self, matrix: Matrix) -> None:
        """Write a matrix of which the upper triangle is given."""
        for tile in list_tiles(self.side):
            self.write(tile, upper_tile(matrix, tile))

    def add_to_upper(self, matrix: Matrix) -> None:
        """Add this one to the upper triangle of ``matrix``, in place."""
        for tile in list_tiles(self.side):
            matrix[tile.columns, tile.rows] += self.read(tile).T


def _moved(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


def upper_tile(matrix: Matrix, tile: Tile) -> Matrix:
    """Return a tile's values out of a matrix of which the upper triangle is given."""
    values = matrix[tile.columns, tile.rows].T
    if tile.rows == tile.columns:
        values = np.tril(values) + np.tril(values, -1).T
    return values


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

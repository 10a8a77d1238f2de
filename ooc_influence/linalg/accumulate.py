"""A symmetric matrix on disk: the square tiles of its lower triangle, float64.

The array has shape (tiles, T, T). Tile I(I+1)/2 + J, J ≤ I, holds rows I·T to (I+1)·T and columns J·T to (J+1)·T, zero
beyond the matrix. Each tile is one chunk with a checksum, so tiles are written, replaced and linked one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.linalg.backend import Engine, Matrix, Rows, Team, choose_engine, product_pieces, square_pieces
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
        """Create the array of a matrix in a group."""
        size = tile_side(side)
        shape = (len(list_tiles(side)), size, size)
        return cls(create_array(group, name, shape, (1, size, size), "float64", codec="crc32c"), side)

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
        return np.asarray(read_part(self._array, tile.number)[:rows, :columns])

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


class Accumulator(ABC):
    """A sum over rows that is folded into a float64 one, of which partial results can be taken.

    Attributes
    ----------
    folded : int
        Rows in the float64 sum.
    """

    _fold_rows = 0  # rows after which it is folded; 0 for FOLD_ROWS

    def __init__(self, double: Any) -> None:
        self._double = double
        self._pending = self.folded = 0
        self._consistent = True  # the float64 sum is not being changed

    def added(self, rows: int) -> None:
        """Count rows whose pieces are done."""
        self._pending += rows
        if self._pending >= (self._fold_rows or FOLD_ROWS):
            self._fold()

    def _fold(self) -> None:
        self._consistent = False
        self._fold_pending()
        self.folded += self._pending
        self._pending = 0
        self._consistent = True

    @abstractmethod
    def _fold_pending(self) -> None:
        """Add what is pending to the float64 sum, and set it to zero."""

    def restore(self, total: Matrix, rows: int) -> None:
        """Continue from a sum over ``rows`` rows, whose memory is used."""
        self._double, self.folded = total, rows

    def peek(self) -> Matrix | None:
        """Return the float64 sum as of the last fold; None in the middle of one."""
        return self._host() if self._consistent else None

    def triangle(self) -> Matrix:
        """Return the sum; of a symmetric one, only the upper triangle is defined. It may be added to."""
        if self._pending:
            self._fold()
        return self._host()

    def _host(self) -> Matrix:
        return np.asarray(self._double)


class HostAccumulator(Accumulator):
    """A sum in memory, added to in pieces by a team of threads."""

    def __init__(self, double: Matrix, team: Team | None) -> None:
        super().__init__(double)
        self._team = team or Team()

    @abstractmethod
    def pieces(self, left: Rows, right: Rows | None = None, sign: float = 1.0) -> list[Callable[[], None]]:
        """Return calls that together add a block, in any order or at once; afterwards, call :meth:`added`."""

    def add(self, left: Rows, right: Rows | None = None, sign: float = 1.0) -> None:
        """Add a block of rows as the engine takes them, or some of its columns; ``sign`` -1 subtracts it."""
        self._team.run(self.pieces(left, right, sign))
        self.added(len(left))


class MatrixAccumulator(HostAccumulator):
    """The sum Σ XᵀY over blocks X (m, a) and Y (m, b), or Σ XᵀX, in float64.

    Parameters
    ----------
    a, b : int
        Columns; without ``b`` the sum is of XᵀX, its upper triangle. Holds a b float32 and a b float64.
    engine : Engine, optional
        What multiplies; default the fastest at hand.
    team : Team, optional
        Threads that do the work; default the caller.
    """

    def __init__(self, a: int, b: int | None = None, engine: Engine | None = None, team: Team | None = None) -> None:
        shape = a, a if b is None else b
        super().__init__(np.zeros(shape), team)
        self._symmetric = b is None
        self._engine = choose_engine(max(shape)) if engine is None else engine
        self._single = np.zeros(shape, np.float32)

    @staticmethod
    def nbytes(a: int, b: int | None = None) -> int:
        """Return the bytes that an accumulator holds."""
        return 12 * a * (a if b is None else b)

    @override
    def pieces(self, left: Rows, right: Rows | None = None, sign: float = 1.0) -> list[Callable[[], None]]:
        if right is None:
            return square_pieces(self._engine, self._single, left, sign, self._team.threads)
        return product_pieces(self._engine, self._single, left, right, sign, self._team.threads)

    @override
    def _fold_pending(self) -> None:
        def fold(start: int) -> None:
            part = slice(start, start + _FOLD_TILE), slice(start if self._symmetric else 0, None)
            self._double[part] += self._single[part]
            self._single[part] = 0

        self._team.run(partial(fold, start) for start in range(0, len(self._single), _FOLD_TILE))

    def total(self) -> Matrix:
        """Return the whole symmetric sum; the accumulator must not be used any more."""
        matrix = self.triangle()
        self._single = np.empty((0, 0), np.float32)
        mirror(matrix)
        return matrix


class DiagonalAccumulator(HostAccumulator):
    """The diagonal of Σ XᵀX over blocks X (m, k), (k,) float64.

    Parameters
    ----------
    k : int
        Columns.
    team : Team, optional
        Threads that do the work; default the caller.
    """

    _fold_rows = 1

    def __init__(self, k: int, team: Team | None = None) -> None:
        super().__init__(np.zeros(k), team)
        self._unfolded = np.zeros(k)

    @staticmethod
    def nbytes(k: int) -> int:
        """Return the bytes that an accumulator holds."""
        return 16 * k

    @override
    def pieces(self, left: Rows, right: Rows | None = None, sign: float = 1.0) -> list[Callable[[], None]]:
        def piece(columns: slice) -> None:
            for start in range(0, len(left), _FOLD_TILE):
                tile = left[start : start + _FOLD_TILE, columns]
                self._unfolded[columns] += sign * np.einsum("ij,ij->j", tile, tile)

        size = -(-len(self._unfolded) // self._team.threads)
        return [partial(piece, slice(start, start + size)) for start in range(0, len(self._unfolded), size)]

    @override
    def _fold_pending(self) -> None:
        self._double += self._unfolded
        self._unfolded[...] = 0


def mirror(matrix: Matrix) -> None:
    """Copy the upper triangle of a square matrix to its lower one, in place."""
    for start in range(0, len(matrix), _FOLD_TILE):
        stop = min(len(matrix), start + _FOLD_TILE)
        square = matrix[start:stop, start:stop]
        square[...] = np.triu(square) + np.triu(square, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T

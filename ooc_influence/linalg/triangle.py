"""A symmetric matrix on disk: the square tiles of its lower triangle, float64.

The array has shape (tiles, T, T). Tile I(I+1)/2 + J, J ≤ I, holds rows I·T to (I+1)·T and columns J·T to (J+1)·T, zero
beyond the matrix. Each tile is one chunk with a checksum, so tiles are written, replaced and linked one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.store import StorePath, array_store, create_array, open_group, read_part, writable_array

Matrix = npt.NDArray[np.float64]
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

"""The Gram matrix K = A Aᵀ (m, m) of chosen rows, A = diag(√w) G, tile by tile.

The tiles of the lower triangle are multiplied by striped tasks in float64: what is left of F beside the largest
eigenvalues is too small for float32. A small K is put together in memory. A larger one is a Zarr array of tiles: each
is written with its transpose, and one that is there is finished, so a killed run goes on with those that are missing.
A dropped row is a row of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence._version import __version__
from ooc_influence.curvature.need import PANEL
from ooc_influence.curvature.rows import ChosenRows, WeighedBlock
from ooc_influence.errors import OocInfluenceError, StoreExistsError, StoreWriteError, refused
from ooc_influence.linalg.blas import Floats
from ooc_influence.linalg.triangle import Tile, list_tiles, tile_side
from ooc_influence.progress import Progress, check_cancelled, tick
from ooc_influence.store import (
    NewFolder,
    StorePath,
    array_store,
    create_array,
    exists,
    is_file,
    is_local,
    names,
    remove_partial_files,
    writable_array,
)
from ooc_influence.stripes import Stripe, cut_stripes, run_stripes

Matrix = npt.NDArray[np.float64]
_ATTRIBUTES = "ooc_influence_gram"


@dataclass(frozen=True, eq=False)
class Multiplying:
    """How tasks multiply rows.

    Attributes
    ----------
    chosen : ChosenRows
        A's rows.
    block_rows : int
        Rows read at a time.
    path : StorePath or None
        Where tiles are written; None: they are returned.
    device : str or None
        Where rows are multiplied; None for NumPy's BLAS.
    """

    chosen: ChosenRows
    block_rows: int
    path: StorePath | None = None
    device: str | None = None

    def read(self, start: int, stop: int) -> Iterator[WeighedBlock]:
        """Yield the blocks of rows at some places, where they are multiplied."""
        if self.device is not None:
            return self.chosen.device_blocks(start, stop, self.block_rows, self.device)
        return self.chosen.blocks(start, stop, self.block_rows)

    @property
    def paths(self) -> list[Any]:
        """What workers must be able to see."""
        return [self.chosen.path] + ([] if self.path is None else [self.path])


@dataclass(frozen=True)
class _Tiles(Stripe):
    """Some tiles of K: ``start`` to ``stop`` of those that are to be made."""

    tiles: tuple[Tile, ...] = ()


def multiply_in_memory(how: Multiplying, slots: int, progress: bool | None) -> Matrix:
    """Return K, (m, m)."""
    m = how.chosen.count
    found = np.empty((m, m))
    stripes = [_Tiles(number, number + 1, (tile,)) for number, tile in enumerate(list_tiles(m))]

    def take(stripe: Stripe, values: Matrix) -> None:
        assert isinstance(stripe, _Tiles)
        (tile,) = stripe.tiles
        found[tile.rows, tile.columns] = values
        found[tile.columns, tile.rows] = values.T

    with Progress("gram", len(stripes), progress, "tile") as bar:
        run_stripes(_one_tile, stripes, bar, how, slots=slots, each=take)
    return found


def multiply_on_disk(
    how: Multiplying, slots: int, progress: bool | None, digest: str, facts: Mapping[str, Any]
) -> zarr.Array[Any]:
    """Write K to an array (m, m) at ``how.path``, or those of its tiles that are missing; return it, to read.

    Parameters
    ----------
    how : Multiplying
        What is multiplied.
    slots : int
        Tasks at once.
    progress : bool or None
        Show a progress line.
    digest : str
        Of all that K depends on, but for the tiles' side.
    facts : mapping
        Further attributes of the array: JSON values.

    Raises
    ------
    StoreExistsError
        If something else is there.
    StoreWriteError
        If it cannot be written.
    """
    path, m = how.path, how.chosen.count
    assert path is not None
    digest += f"-{tile_side(m)}"
    try:
        _make_room(path, m, digest, facts)
        tiles = list_tiles(m)
        missing = _missing(path, tiles, tile_side(m))
        cuts = cut_stripes(0, len(missing), 1, slots) if missing else []
        stripes = [_Tiles(cut.start, cut.stop, tuple(missing[cut.start : cut.stop])) for cut in cuts]
        with Progress("gram", len(tiles), progress, "tile") as bar:
            bar.advance(len(tiles) - len(missing))
            if stripes:
                run_stripes(_some_tiles, stripes, bar, how, slots=slots)
        if is_local(path):
            remove_partial_files(path, lambda name: name.startswith("c."))
        files = array_store(path)
        writable_array(files).attrs["complete"] = True
        files.sync_folders()
    except OSError as error:
        if isinstance(error, OocInfluenceError):
            raise
        raise StoreWriteError(
            refused(f"to write the Gram matrix to {path}", error, ", then run the same call again: it goes on")
        ) from error
    return open_matrix(path)


def open_matrix(path: StorePath) -> zarr.Array[Any]:
    """Return a K on disk, to read; a missing tile is damage."""
    return zarr.open_array(array_store(path, read_only=True, chunk_bytes={}), mode="r")


def _make_room(path: StorePath, m: int, digest: str, facts: Mapping[str, Any]) -> None:
    """Create an empty array, unless the same call began one."""
    if exists(path) and (is_file(path) or names(path)):
        found = _attributes(path)
        if found is None or found["digest"] != digest:
            received = "something" if found is None else "the Gram matrix of another call (other rows or weights)"
            raise StoreExistsError(
                f"expected nothing at {path}, or the Gram matrix begun by the same call; received {received}: choose "
                "another path or remove it"
            )
        return
    with NewFolder(path) as folder:
        array = create_matrix(folder.arrays, None, m)
        marks = {"version": __version__, "complete": False, _ATTRIBUTES: {"digest": digest}}
        array.attrs.update({**facts, **marks})
        if not folder.publish():
            raise StoreExistsError(f"expected nothing at {path}; received something meanwhile: choose another path")


def create_matrix(parent: Any, name: str | None, m: int) -> Any:
    """Create an array for K in a group, or as the root of a store: a chunk is a tile, with a checksum."""
    side = tile_side(m)
    return create_array(parent, name, (m, m), (side, side), "float64", check=True)


def _attributes(path: StorePath) -> dict[str, Any] | None:
    try:
        found = dict(zarr.open_array(array_store(path, read_only=True), mode="r").attrs).get(_ATTRIBUTES)
    except Exception:  # no array, a damaged one, or something else altogether
        return None
    return found if isinstance(found, dict) else None


def _missing(path: StorePath, tiles: Sequence[Tile], side: int) -> list[Tile]:
    """Return the tiles that are not there; the lower one of a pair is written last."""
    there = set(names(path))

    def is_there(rows: slice, columns: slice) -> bool:
        return f"c.{rows.start // side}.{columns.start // side}" in there

    return [tile for tile in tiles if not (is_there(tile.rows, tile.columns) and is_there(tile.columns, tile.rows))]


def _some_tiles(stripe: _Tiles, key: str, how: Multiplying) -> None:
    """Write tiles that are not there: where a worker died, some of them are."""
    assert how.path is not None
    files = array_store(how.path)
    array = writable_array(files)
    left = _missing(how.path, stripe.tiles, array.chunks[0])
    tick(key, len(stripe.tiles) - len(left))
    try:
        for tile in left:
            values = _multiply(tile, how)
            if tile.rows != tile.columns:
                array[tile.columns, tile.rows] = values.T
            array[tile.rows, tile.columns] = values
            tick(key, 1)
    finally:
        files.sync_folders()


def _one_tile(stripe: _Tiles, key: str, how: Multiplying) -> Matrix:
    (tile,) = stripe.tiles
    found = _multiply(tile, how)
    tick(key, 1)
    return found


def _multiply(tile: Tile, how: Multiplying) -> Matrix:
    """Return the products of a tile's rows with those of its columns."""
    found = np.zeros((tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start))
    panels = np.empty((2, how.block_rows, min(PANEL, how.chosen.store.k)))
    products = np.empty((how.block_rows, how.block_rows))
    for left in how.read(tile.rows.start, tile.rows.stop):
        rows = slice(left.start - tile.rows.start, left.stop - tile.rows.start)
        for right in how.read(tile.columns.start, tile.columns.stop):
            columns = slice(right.start - tile.columns.start, right.stop - tile.columns.start)
            if how.device is None:
                _add_product(left.rows, right.rows, found[rows, columns], panels, products)
            else:
                found[rows, columns] = _device_product(left.rows, right.rows)
            check_cancelled()
    return found


def _device_product(left: Any, right: Any) -> Matrix:
    """Return left rightᵀ, (a, b), in float64, of tensors on a device."""
    total = 0.0
    for start in range(0, left.shape[1], PANEL):
        columns = slice(start, start + PANEL)
        total = total + left[:, columns].double() @ right[:, columns].double().T
    return np.asarray(total.cpu().numpy())  # type: ignore[attr-defined]


def device_bytes(chosen: ChosenRows, block_rows: int) -> int:
    """Return what a task holds on a device: two blocks of rows, their stored forms, panels and products."""
    k = chosen.store.k
    row = 2 * chosen.store.layout.encoding.row_bytes + 4 * k + 8 * min(k, PANEL)
    return 2 * block_rows * row + 2 * 8 * block_rows**2


def _add_product(left: Floats, right: Floats, out: Matrix, panels: Matrix, products: Matrix) -> None:
    """Add left rightᵀ, (a, b), in float64 to ``out``; new memory would cost more than the conversion."""
    made = products[: len(left), : len(right)]
    for start in range(0, left.shape[1], PANEL):
        parts = []
        for panel, rows in zip(panels, (left, right), strict=True):
            part = panel[: len(rows), : min(PANEL, left.shape[1] - start)]
            np.copyto(part, rows[:, start : start + PANEL])
            parts.append(part)
        np.matmul(parts[0], parts[1].T, out=made)
        out += made

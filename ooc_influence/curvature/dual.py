"""The Gram matrix K = A Aᵀ (m, m) of chosen rows, A = diag(√w) G, tile by tile.

The tiles of the lower triangle are multiplied by striped tasks in float64: float32 would lose the eigenvalues far below
the largest. A small K is assembled in memory. A larger one is a Zarr array of tiles: each is written with its
transpose, and one that exists is finished, so a killed run resumes with those that are missing. A dropped row is a row
of zeros.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from ooc_influence.checkpoint import ClaimedOutput, ResumableArray
from ooc_influence.curvature.costs import KEPT_BYTES, PANEL
from ooc_influence.curvature.curvature import open_matrix, write_curvature
from ooc_influence.curvature.eigen import slab_rows, write_long, write_vectors
from ooc_influence.curvature.rows import FittedRows, fit_attributes
from ooc_influence.errors import (
    InputError,
    NonFiniteError,
    StoreBusyError,
    writing,
)
from ooc_influence.linalg import (
    Floats,
    Matrix,
    Tile,
    WeightedBlock,
    WeightedRows,
    list_tiles,
    symmetric_eigen,
    tile_side,
)
from ooc_influence.parallel import Stripe, cut_stripes, run_stripes
from ooc_influence.progress import Progress, check_cancelled, tick
from ooc_influence.store import (
    StorePath,
    array_store,
    create_array,
    read_part,
    writable_array,
)

logger = logging.getLogger("ooc_influence")


@dataclass(frozen=True, eq=False)
class Multiplying:
    """How tasks multiply rows with rows.

    Attributes
    ----------
    chosen : WeightedRows
        A's rows.
    block_rows : int
        Rows read at a time.
    path : StorePath or None
        Where tiles are written; None: they are returned.
    device : str or None
        Where rows are multiplied; None for NumPy's BLAS.
    """

    chosen: WeightedRows
    block_rows: int
    path: StorePath | None = None
    device: str | None = None

    def read(self, start: int, stop: int) -> Iterator[WeightedBlock]:
        """Yield the blocks of rows ``start`` to ``stop``, where they are multiplied."""
        return self.chosen.blocks(start, stop, self.block_rows, device=self.device)

    @property
    def paths(self) -> list[Any]:
        """What workers must be able to see."""
        return [self.chosen.path] + ([] if self.path is None else [self.path])


@dataclass(frozen=True)
class _Tiles(Stripe):
    """Some tiles of K: ``start`` to ``stop`` of those to be computed."""

    tiles: tuple[Tile, ...] = ()


def multiply_in_memory(how: Multiplying, slots: int, progress: bool | None) -> Matrix:
    """Return K, (m, m)."""
    m = how.chosen.count
    matrix = np.empty((m, m))
    stripes = [_Tiles(number, number + 1, (tile,)) for number, tile in enumerate(list_tiles(m))]

    def keep(stripe: Stripe, values: Matrix) -> None:
        assert isinstance(stripe, _Tiles)
        (tile,) = stripe.tiles
        matrix[tile.rows, tile.columns] = values
        matrix[tile.columns, tile.rows] = values.T

    with Progress("gram", len(stripes), progress, "tile") as bar:
        run_stripes(_one_tile, stripes, bar, how, slots=slots, on_result=keep)
    return matrix


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
    with writing(f"to write the Gram matrix to {path}", ", then run the same call again: it resumes"):
        output = ResumableArray.find(path, "gram", digest)
        if output is None:
            output = ResumableArray.create(path, "gram", digest, facts, lambda parent: create_matrix(parent, None, m))
        tiles = list_tiles(m)
        missing = _missing(output, tiles)
        cuts = cut_stripes(0, len(missing), 1, slots) if missing else []
        stripes = [_Tiles(cut.start, cut.stop, tuple(missing[cut.start : cut.stop])) for cut in cuts]
        with Progress("gram", len(tiles), progress, "tile") as bar:
            bar.advance(len(tiles) - len(missing))
            if stripes:
                run_stripes(_some_tiles, stripes, bar, how, output, slots=slots)
        output.finish()
    return open_matrix(path)


def create_matrix(parent: Any, name: str | None, m: int) -> Any:
    """Create an array for K in a group, or as the root of a store: a chunk is a tile, with a checksum."""
    side = tile_side(m)
    return create_array(parent, name, (m, m), (side, side), "float64", codec="crc32c")


def _missing(output: ResumableArray, tiles: Sequence[Tile]) -> list[Tile]:
    """Return the tiles that are missing; the lower one of a pair is written last."""
    side, finished = output.chunks[0], output.finished_chunks()

    def index(tile: Tile) -> tuple[int, int]:
        return tile.rows.start // side, tile.columns.start // side

    return [tile for tile in tiles if not {index(tile), index(tile)[::-1]} <= finished]


def _some_tiles(stripe: _Tiles, key: str, how: Multiplying, output: ResumableArray) -> None:
    """Write the tiles that are missing: if another worker died, some of them may exist."""
    files = array_store(output.path)
    array = writable_array(files)
    missing = _missing(output, stripe.tiles)
    tick(key, len(stripe.tiles) - len(missing))
    try:
        for tile in missing:
            values = _multiply(tile, how)
            if tile.rows != tile.columns:
                array[tile.columns, tile.rows] = values.T
            array[tile.rows, tile.columns] = values
            tick(key, 1)
    finally:
        files.sync_folders()


def _one_tile(stripe: _Tiles, key: str, how: Multiplying) -> Matrix:
    (tile,) = stripe.tiles
    product = _multiply(tile, how)
    tick(key, 1)
    return product


def _multiply(tile: Tile, how: Multiplying) -> Matrix:
    """Return the products of a tile's rows with those of its columns."""
    product = np.zeros((tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start))
    panels = np.empty((2, how.block_rows, min(PANEL, how.chosen.store.k)))
    buffer = np.empty((how.block_rows, how.block_rows))
    for left in how.read(tile.rows.start, tile.rows.stop):
        rows = slice(left.start - tile.rows.start, left.stop - tile.rows.start)
        for right in how.read(tile.columns.start, tile.columns.stop):
            columns = slice(right.start - tile.columns.start, right.stop - tile.columns.start)
            if how.device is None:
                _add_product(left.rows, right.rows, product[rows, columns], panels, buffer)
            else:
                product[rows, columns] = _device_product(left.rows, right.rows)
            check_cancelled()
    return product


def _device_product(left: Any, right: Any) -> Matrix:
    """Return left rightᵀ, (a, b), in float64, of tensors on a device."""
    total = 0.0
    for start in range(0, left.shape[1], PANEL):
        columns = slice(start, start + PANEL)
        total = total + left[:, columns].double() @ right[:, columns].double().T
    return np.asarray(total.cpu().numpy())  # type: ignore[attr-defined]


def device_bytes(chosen: WeightedRows, block_rows: int) -> int:
    """Return what a task holds on a device: two blocks of rows, their stored forms, panels and products."""
    k = chosen.store.k
    row = 2 * chosen.store.layout.encoding.row_bytes + 4 * k + 8 * min(k, PANEL)
    return 2 * block_rows * row + 2 * 8 * block_rows**2


def _add_product(left: Floats, right: Floats, out: Matrix, panels: Matrix, buffer: Matrix) -> None:
    """Add left rightᵀ, (a, b), in float64 to ``out``; new memory would cost more than the conversion."""
    product = buffer[: len(left), : len(right)]
    for start in range(0, left.shape[1], PANEL):
        parts = []
        for panel, rows in zip(panels, (left, right), strict=True):
            part = panel[: len(rows), : min(PANEL, left.shape[1] - start)]
            np.copyto(part, rows[:, start : start + PANEL])
            parts.append(part)
        np.matmul(parts[0], parts[1].T, out=product)
        out += product


_FLOOR = 1e-10  # of the largest eigenvalue: K's eigenvalues below it are rounding


@dataclass(frozen=True, eq=False)
class GramFit:
    """A fit by the Gram matrix.

    Attributes
    ----------
    chosen : WeightedRows
        A's rows.
    target : StorePath
        Where the curvature goes.
    slots : int
        Tasks at once.
    block_rows : int
        Rows read at a time.
    free : int
        Bytes that each task may use beyond its minimum.
    progress : bool or None
        Show progress lines.
    device : str or None
        Where rows are multiplied with rows.
    """

    chosen: WeightedRows
    target: StorePath
    slots: int
    block_rows: int
    free: int
    progress: bool | None
    device: str | None = None

    def run(self) -> None:
        """Multiply, factorise, compute F's eigenvectors and write."""
        began = time.monotonic()
        chosen = self.chosen
        record = FittedRows.of(chosen)
        live = record.live
        if not live:
            raise InputError(
                f"expected a store with live rows; received {chosen.store.path} whose rows are all dropped"
            )
        clipped = chosen.clipped()
        if clipped:
            logger.info("%d rows have a loss below the floor of their weights", clipped)

        def save(gram: Any) -> None:
            def write(group: Any) -> Mapping[str, Any]:
                record.write(group)
                facts = self._write_spectrum(group, gram, live)
                return facts | {"seconds": time.monotonic() - began}

            attributes = fit_attributes(chosen, record, live, 0.0)
            write_curvature(self.target, attributes | {"kind": "gram", "clipped": clipped}, write)

        if 8 * chosen.count**2 <= KEPT_BYTES:
            how = Multiplying(chosen, self.block_rows, device=self.device)
            save(multiply_in_memory(how, self.slots, self.progress))
            return
        digest = chosen.digest()
        with ClaimedOutput(self.target, {"gram": digest}) as partial:
            if partial.path is None:
                raise StoreBusyError(
                    f"expected to write the Gram matrix for {self.target}; received a folder that another process is "
                    "writing it to: wait for that fit, or give another path with out="
                )
            how = Multiplying(chosen, self.block_rows, partial.path / "gram-0", self.device)
            save(multiply_on_disk(how, self.slots, self.progress, digest, {}))

    def _write_spectrum(self, group: Any, gram: Any, live: int) -> dict[str, Any]:
        """Write K, given in memory or on disk, its spectrum and F's eigenvectors; return facts for the attributes."""
        m = self.chosen.count
        matrix = gram if isinstance(gram, np.ndarray) else np.empty((m, m))
        array = create_matrix(group, "gram", m)
        for tile in list_tiles(m):
            for part in ((tile.rows, tile.columns), (tile.columns, tile.rows)):
                if matrix is not gram:
                    matrix[part] = read_part(gram, part)
                array[part] = matrix[part]
        diagonal = np.diagonal(matrix).copy()
        trace = float(diagonal.sum()) / live
        if not np.isfinite(trace):
            raise NonFiniteError("expected a finite Gram matrix; received NaN or Inf: scale the loss", [])
        facts: dict[str, Any] = {"trace": trace}
        if self.chosen.selection["kind"] == "sample":
            fourth, norm = float(np.square(diagonal).sum()), float(np.vdot(matrix, matrix))
            facts["sampling_error"] = self.chosen.sampling_error(live, fourth, norm)
        values, turn = symmetric_eigen(matrix)
        del matrix
        r = max(1, int((values > _FLOOR * values[0]).sum()))
        write_long(group, "eigenvalues", values[:r] / live)
        scale = 1 / np.sqrt(np.where(values[:r] > 0, values[:r], np.inf))
        self._write_vectors(group, turn[:, :r], scale)
        return facts

    def _write_vectors(self, group: Any, turn: Matrix, scale: Matrix) -> None:
        """Write V = AᵀU/√(m e), panel by panel."""
        k, r = self.chosen.store.k, turn.shape[1]
        step = slab_rows(k, r)
        width = min(PANEL + self.free // (2 * 8 * r), -(-k // self.slots))
        width = max(1, width // step) * step
        stripes = cut_stripes(0, k, step, -(-k // width))
        write_vectors(group, "eigenvectors", (k, r), [])
        array = group["eigenvectors"]

        def write(stripe: Stripe, panel: Matrix) -> None:
            for start in range(stripe.start, stripe.stop, step):
                stop = min(stripe.stop, start + step)
                array[start:stop] = panel[start - stripe.start : stop - stripe.start] * scale

        with Progress("gram: eigenvectors", len(stripes) * self.chosen.count, self.progress) as bar:
            how = Multiplying(self.chosen, self.block_rows)
            run_stripes(_lift, stripes, bar, how, turn, slots=self.slots, on_result=write)


def _lift(stripe: Stripe, key: str, how: Multiplying, turn: Matrix) -> Matrix:
    """Return rows ``start`` to ``stop`` of AᵀU."""
    panel = np.zeros((stripe.stop - stripe.start, turn.shape[1]))
    buffer = np.empty((min(PANEL, len(panel)), turn.shape[1]))
    for block in how.chosen.blocks(0, how.chosen.count, how.block_rows, columns=[(stripe.start, stripe.stop)]):
        part = np.ascontiguousarray(turn[block.start : block.stop])
        for low in range(0, len(panel), PANEL):
            columns = block.rows[:, low : low + PANEL].astype(np.float64)
            panel[low : low + PANEL] += np.matmul(columns.T, part, out=buffer[: columns.shape[1]])
        tick(key, block.stop - block.start)
    return panel

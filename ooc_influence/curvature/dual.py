"""The Gram matrix K = A Aᵀ (m, m) of chosen rows, A = diag(√w) G, tile by tile.

The tiles of the lower triangle are multiplied by striped tasks in float64: what is left of F beside the largest
eigenvalues is too small for float32. A small K is put together in memory. A larger one is a Zarr array of tiles: each
is written with its transpose, and one that is there is finished, so a killed run goes on with those that are missing.
A dropped row is a row of zeros.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import zarr
from typing_extensions import override

from ooc_influence.checkpoint import ClaimedOutput, ResumableArray
from ooc_influence.curvature.costs import KEPT_BYTES, PANEL, FitShapes, gram_memory, kernel_memory, slab_rows
from ooc_influence.curvature.curvature import Curvature, share_outside
from ooc_influence.curvature.damping import resolved
from ooc_influence.curvature.files import write_curvature, write_long
from ooc_influence.curvature.rows import ChosenRows, WeighedBlock, choose_rows
from ooc_influence.curvature.sink import fit_attributes, fit_target, fitted, reopen, warn_if_unfinished, what_changed
from ooc_influence.curvature.staleness import RowRecord
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    NonFiniteError,
    StoreBusyError,
    writing,
)
from ooc_influence.linalg import symmetric_eigen
from ooc_influence.linalg.accumulate import Tile, list_tiles, tile_side
from ooc_influence.linalg.backend import Floats, check_room, parse_device
from ooc_influence.memory import MemoryBudget, plan_block_rows
from ooc_influence.options import FittingOptions, RowOptions, takes
from ooc_influence.parallel import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process
from ooc_influence.progress import Progress, check_cancelled, tick
from ooc_influence.store import (
    GradientStore,
    PathLike,
    StorePath,
    array_store,
    create_array,
    exists,
    find_array,
    open_group,
    parse_path,
    read_part,
    writable_array,
)

Matrix = npt.NDArray[np.float64]
logger = logging.getLogger("ooc_influence")


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
        run_stripes(_one_tile, stripes, bar, how, slots=slots, on_result=take)
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
    side = tile_side(m)
    digest += f"-{side}"
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


def open_matrix(path: StorePath) -> zarr.Array[Any]:
    """Return a K on disk, to read; a missing tile is damage."""
    return zarr.open_array(array_store(path, read_only=True, chunk_bytes={}), mode="r")


def create_matrix(parent: Any, name: str | None, m: int) -> Any:
    """Create an array for K in a group, or as the root of a store: a chunk is a tile, with a checksum."""
    side = tile_side(m)
    return create_array(parent, name, (m, m), (side, side), "float64", check=True)


def _missing(output: ResumableArray, tiles: Sequence[Tile]) -> list[Tile]:
    """Return the tiles that are not there; the lower one of a pair is written last."""
    side, finished = output.chunks[0], output.finished_chunks()

    def index(tile: Tile) -> tuple[int, int]:
        return tile.rows.start // side, tile.columns.start // side

    return [tile for tile in tiles if not {index(tile), index(tile)[::-1]} <= finished]


def _some_tiles(stripe: _Tiles, key: str, how: Multiplying, output: ResumableArray) -> None:
    """Write tiles that are not there: where a worker died, some of them are."""
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


HELD_BYTES = 256 * 2**20  # of eigenvectors: up to here they are kept in memory
_ROWS = 1024  # rows whose self-influence is found at a time


class GramCurvature(Curvature, kinds=("gram",)):
    """A curvature of fewer rows than columns: eigenvectors are kept where F has an eigenvalue at all."""

    _vectors: Matrix | None = None

    @property
    def gram(self) -> zarr.Array[Any]:
        """K = A Aᵀ, (m, m) float64 on disk, undamped: row i is the i-th of the rows chosen, zero where dropped.

        Raises
        ------
        CurvatureNotFoundError
            If it was fitted before K was kept.
        """
        if not exists(self.path / "gram" / "zarr.json"):
            raise CurvatureNotFoundError(f"expected the Gram matrix in {self.path}; received none: fit with refit=True")
        found = open_matrix(self.path / "gram")
        self.check_fit()
        return found

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, r), one eigenvector a column (read on first use)."""
        if self._vectors is None:
            self._vectors = self._read("eigenvectors")
            self.check_fit()
        return self._vectors

    def _slabs(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield V slab by slab of its rows: all of it at once where it is small."""
        if self._vectors is not None or self._bytes <= HELD_BYTES:
            yield slice(0, self.d), self.eigenvectors
            return
        array = find_array(open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r"), "eigenvectors")
        for start in range(0, self.d, self._slab_rows):
            rows = slice(start, min(self.d, start + self._slab_rows))
            yield rows, read_part(array, rows)
        self.check_fit()

    @property
    def _bytes(self) -> int:
        return 8 * self.d * len(self.eigenvalues)

    @property
    def _slab_rows(self) -> int:
        return slab_rows(self.d, len(self.eigenvalues))

    def fisher(self) -> Matrix:
        """Return F, (d, d), made of its spectrum."""
        return np.asarray((self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T)

    @override
    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        rotated = self._rotate(gradients)
        result = np.empty((len(values), *gradients.shape))
        for rows, vectors in self._slabs():
            for out, value in zip(result, values, strict=True):
                inside = (rotated * (self.eigenvalues / (self.eigenvalues + value))) @ vectors.T
                np.subtract(gradients[:, rows], inside, out=out[:, rows])
                out[:, rows] /= value
        return result

    def _rotate(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Return Vᵀg of some rows, (b, r) float64: most of a norm may lie in the span, and the rest is a difference."""
        rotated = np.zeros((len(gradients), len(self.eigenvalues)))
        for rows, vectors in self._slabs():
            rotated += np.asarray(gradients[:, rows], np.float64) @ vectors
        return rotated

    @override
    def working_bytes(self, queries: int, values: int) -> int:
        return gram_working_bytes(self.d, len(self.eigenvalues), queries, values)

    @override
    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        result = np.empty((len(values), len(gradients)), np.float32)
        for start in range(0, len(gradients), _ROWS):
            part = gradients[start : start + _ROWS]
            squares = np.square(self._rotate(part))
            total = np.einsum("ij,ij->i", part, part, dtype=np.float64)
            for out, value in zip(result, values, strict=True):
                found = (total - squares @ (self.eigenvalues / (self.eigenvalues + value))) / value
                out[start : start + _ROWS] = np.maximum(found, 0)
        return result

    @override
    def self_working_bytes(self, values: int) -> int:
        return gram_self_bytes(self.d, len(self.eigenvalues), values)

    @override
    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        span = resolved(self.eigenvalues)
        inside = np.square(self._rotate(gradients)[:, span]).sum(1)
        return share_outside(inside, np.asarray(gradients, np.float64))


def gram_vectors_bytes(d: int, r: int) -> int:
    """Return what is held of V, (d, r), at a time."""
    whole = 8 * d * r
    return whole if whole <= HELD_BYTES else 2 * 8 * r * slab_rows(d, r)


def gram_working_bytes(d: int, r: int, queries: int, values: int) -> int:
    """Return what preconditioning by ``r`` eigenvectors of ``d`` columns holds."""
    return gram_vectors_bytes(d, r) + 8 * queries * (d * (2 + values) + 3 * r)


def gram_self_bytes(d: int, r: int, values: int) -> int:
    """Return what self-influence by ``r`` eigenvectors of ``d`` columns holds."""
    width = d if 8 * d * r <= HELD_BYTES else slab_rows(d, r)
    return gram_vectors_bytes(d, r) + 8 * _ROWS * (width + 3 * r + math.ceil(d / 2)) + 8 * values * r


_FLOOR = 1e-10  # of the largest eigenvalue: below it K's are rounding


@takes(FittingOptions)
def fit_gram(store: GradientStore | PathLike, **options: Unpack[FittingOptions]) -> Curvature:
    """Compute the curvature of a store by its Gram matrix, and save it there as ``curvature/<name>``.

    The same curvature as :func:`fit_fisher`'s, for less where there are fewer rows than columns; the Gram matrix itself
    is its ``gram``. A large one is written tile by tile, and a fit that was interrupted continues with the tiles that
    are missing. After rows were appended or dropped it is fitted again.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k).
    **options : FittingOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Curvature
        Eigenvalues (r,), r at most the number of rows; ``gram`` (m, m).

    Raises
    ------
    InputError, MemoryBudgetError, StoreExistsError, StoreDamagedError
        As for :func:`fit_fisher`.
    StoreBusyError
        If another process is writing the tiles of this Gram matrix at the moment.
    """
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    warn_if_unfinished(train)
    slots, device = check_workers(options["workers"]), parse_device(options["device"])
    name = options["name"]
    target = fit_target(train, "gram" if name is None else name, options["out"])
    chosen = choose_rows(train, options)
    found = None if options["refit"] else fitted(target, train)
    change = None if found is None else what_changed(found, chosen, "gram")
    if found is not None and change is not None and change.nothing:
        logger.info("%s is up to date", target)
        return found
    shared = slots_per_process(slots)
    need = gram_memory(chosen.count, train.k, shared, train.reading_bytes, chosen.small_bytes)
    need = replace(need, alternatives=FitShapes.of(chosen).gram_alternatives)
    if device is not None:
        check_room(device, shared * device_bytes(chosen, need.max_rows), need.stage)
        need = replace(need, per_row=need.per_row + 2 * 4 * train.layout.encoding.row_bytes)
    room = MemoryBudget.of(options["memory"])
    block_rows = plan_block_rows(need, room.budget, shared, room.held)
    free = room.budget - need.peak(block_rows, shared, room.held)
    _Fit(chosen, target, slots, block_rows, free // shared, options["progress"], device).run()
    return reopen(target)


@takes(RowOptions)
def gram_matrix(store: GradientStore | PathLike, out: PathLike, **options: Unpack[RowOptions]) -> zarr.Array[Any]:
    """Write the Gram matrix K = A Aᵀ of a store's rows, A = diag(√w) G, to a Zarr array of any size.

    The same call, interrupted or killed, continues with the tiles that are missing.

    Parameters
    ----------
    store : GradientStore or path
        (n, k).
    out : path
        Where to write it.
    **options : RowOptions
        See :mod:`ooc_influence.options`; m rows are chosen.

    Returns
    -------
    (m, m) float64
        The array, undamped and not divided by m, in chunks that are square tiles. Rows and columns of dropped rows are
        zero.

    Raises
    ------
    InputError, MemoryBudgetError, StoreDamagedError
        As for :func:`fit_fisher`.
    StoreExistsError
        If something else is at ``out``.
    StoreWriteError
        If it cannot be written.
    """
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    slots = check_workers(options["workers"])
    if not train.n:
        raise InputError(f"expected a store with committed rows; received {train.path} with none: extract first")
    chosen = choose_rows(train, options)
    shared = slots_per_process(slots)
    need = kernel_memory(chosen.count, train.k, shared, train.reading_bytes, chosen.small_bytes)
    how = Multiplying(chosen, plan_block_rows(need, options["memory"], shared), parse_path(out))
    facts = {"store": str(train.path), "weights": chosen.record(), "selection": dict(chosen.selection)}
    return multiply_on_disk(how, slots, options["progress"], chosen.digest(), facts)


@dataclass(frozen=True, eq=False)
class _Fit:
    """A fit to be run.

    Attributes
    ----------
    chosen : ChosenRows
        A's rows.
    target : StorePath
        Where the curvature goes.
    slots : int
        Tasks at once.
    block_rows : int
        Rows read at a time.
    free : int
        Bytes that each task may take beyond the least.
    progress : bool or None
        Show progress lines.
    device : str or None
        Where rows are multiplied with rows.
    """

    chosen: ChosenRows
    target: StorePath
    slots: int
    block_rows: int
    free: int
    progress: bool | None
    device: str | None = None

    def run(self) -> None:
        """Multiply, factorise, turn and write."""
        began = time.monotonic()
        chosen = self.chosen
        record = RowRecord.of(chosen)
        live = record.live
        if not live:
            raise InputError(
                f"expected a store with live rows; received {chosen.store.path} whose rows are all dropped"
            )
        clipped = chosen.clipped(record.dropped)
        if clipped:
            logger.info("%d rows have a loss below the floor of their weights", clipped)

        def save(gram: Any) -> None:
            def write(group: Any) -> Mapping[str, Any]:
                for array, values in record.arrays().items():
                    write_long(group, array, values)
                facts = self._write_spectrum(group, gram, live)
                return facts | {"seconds": time.monotonic() - began}

            attributes = fit_attributes(chosen, live, 0.0) | record.facts()
            write_curvature(self.target, attributes | {"kind": "gram", "clipped": clipped}, write)

        if 8 * chosen.count**2 <= KEPT_BYTES:
            how = Multiplying(chosen, self.block_rows, device=self.device)
            save(multiply_in_memory(how, self.slots, self.progress))
            return
        matter = chosen.digest()
        with ClaimedOutput(self.target, {"gram": matter}) as partial:
            if partial.path is None:
                raise StoreBusyError(
                    f"expected to write the Gram matrix for {self.target}; received a folder that another process is "
                    "writing it to: wait for that fit, or give another place with out="
                )
            how = Multiplying(chosen, self.block_rows, partial.path / "gram-0", self.device)
            save(multiply_on_disk(how, self.slots, self.progress, matter, {}))

    def _write_spectrum(self, group: Any, gram: Any, live: int) -> dict[str, Any]:
        """Write K, which is given in memory or on disk, its spectrum and F's eigenvectors; return what it tells."""
        m = self.chosen.count
        matrix = gram if isinstance(gram, np.ndarray) else np.empty((m, m))
        array = create_matrix(group, "gram", m)
        for tile in list_tiles(m):
            for place in ((tile.rows, tile.columns), (tile.columns, tile.rows)):
                if matrix is not gram:
                    matrix[place] = read_part(gram, place)
                array[place] = matrix[place]
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
        array = create_array(group, "eigenvectors", (k, r), (step, r), "float64", check=True)
        width = min(PANEL + self.free // (2 * 8 * r), -(-k // self.slots))
        width = max(1, width // step) * step
        stripes = cut_stripes(0, k, step, -(-k // width))

        def take(stripe: Stripe, panel: Matrix) -> None:
            for start in range(stripe.start, stripe.stop, step):
                stop = min(stripe.stop, start + step)
                array[start:stop] = panel[start - stripe.start : stop - stripe.start] * scale

        with Progress("gram: eigenvectors", len(stripes) * self.chosen.count, self.progress) as bar:
            how = Multiplying(self.chosen, self.block_rows)
            run_stripes(_lift, stripes, bar, how, turn, slots=self.slots, on_result=take)


def _lift(stripe: Stripe, key: str, how: Multiplying, turn: Matrix) -> Matrix:
    """Return rows ``start`` to ``stop`` of AᵀU."""
    panel = np.zeros((stripe.stop - stripe.start, turn.shape[1]))
    made = np.empty((min(PANEL, len(panel)), turn.shape[1]))
    for block in how.chosen.blocks(0, how.chosen.count, how.block_rows, columns=[(stripe.start, stripe.stop)]):
        part = np.ascontiguousarray(turn[block.start : block.stop])
        for low in range(0, len(panel), PANEL):
            columns = block.rows[:, low : low + PANEL].astype(np.float64)
            panel[low : low + PANEL] += np.matmul(columns.T, part, out=made[: columns.shape[1]])
        tick(key, block.stop - block.start)
    return panel

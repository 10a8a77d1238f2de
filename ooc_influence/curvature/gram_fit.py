"""Fits by the Gram matrix: K tile by tile (:mod:`.kernel`), its spectrum, and F's eigenvectors from it (:mod:`.gram`).

V = AᵀU diag(m e)^(-1/2) is made by panels of its rows, which are columns of A: one pass over the rows for each panel,
as wide as the budget allows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence.curvature.changes import RowRecord
from ooc_influence.curvature.curvature import Curvature, Matrix
from ooc_influence.curvature.kernel import (
    Multiplying,
    create_matrix,
    device_bytes,
    multiply_in_memory,
    multiply_on_disk,
)
from ooc_influence.curvature.need import KEPT_BYTES, PANEL, FitShapes, gram_need, kernel_need, slab_rows
from ooc_influence.curvature.rows import ChosenRows, choose_rows
from ooc_influence.curvature.saved import write_curvature, write_long
from ooc_influence.curvature.target import (
    fit_attributes,
    fit_target,
    fitted,
    reopen,
    warn_if_unfinished,
    what_changed,
)
from ooc_influence.curvature.unfinished import Unfinished
from ooc_influence.errors import InputError, NonFiniteError, StoreBusyError
from ooc_influence.linalg import Weighting, symmetric_eigen
from ooc_influence.linalg.device import check_room, parse_device
from ooc_influence.linalg.triangle import list_tiles
from ooc_influence.memory import Room, plan_block_rows
from ooc_influence.progress import Progress, tick
from ooc_influence.store import GradientStore, PathLike, StorePath, create_array, parse_path, read_part
from ooc_influence.stripes import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process

logger = logging.getLogger("ooc_influence")
_FLOOR = 1e-10  # of the largest eigenvalue: below it K's are rounding


def fit_gram(
    store: GradientStore | PathLike,
    *,
    name: str = "gram",
    out: PathLike | None = None,
    refit: bool = False,
    rows: Any = None,
    sample: int | None = None,
    seed: int = 0,
    weights: Weighting | npt.ArrayLike | None = None,
    force_weights: bool = False,
    device: str | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Curvature:
    """Compute the curvature of a store by its Gram matrix, and save it there as ``curvature/<name>``.

    The same curvature as :func:`fit_fisher`'s, for less where there are fewer rows than columns; the Gram matrix itself
    is its ``gram``. A large one is written tile by tile, and a fit that was interrupted goes on with the tiles that are
    missing. Once rows were appended or dropped it is fitted anew.

    Parameters
    ----------
    store, name, out, refit, rows, sample, seed, weights, force_weights, workers, memory, progress
        As for :func:`fit_fisher`.
    device : str, optional
        Multiply rows with rows there, such as ``"cuda"``, in float64; by default NumPy's BLAS.

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
    slots, device = check_workers(workers), parse_device(device)
    target = fit_target(train, name, out)
    chosen = choose_rows(train, rows, sample, seed, weights, force_weights=force_weights)
    found = None if refit else fitted(target, train)
    change = None if found is None else what_changed(found, chosen, "gram")
    if found is not None and change is not None and change.nothing:
        logger.info("%s is up to date", target)
        return found
    shared = slots_per_process(slots)
    need = gram_need(chosen.count, train.k, shared, train.reading_bytes, chosen.small_bytes)
    need = replace(need, ways=FitShapes.of(chosen).gram_ways)
    if device is not None:
        check_room(device, shared * device_bytes(chosen, need.max_rows), need.stage)
        need = replace(need, per_row=need.per_row + 2 * 4 * train.layout.encoding.row_bytes)
    room = Room.of(memory)
    block_rows = plan_block_rows(need, room.budget, shared, room.held)
    free = room.budget - need.peak(block_rows, shared, room.held)
    _Fit(chosen, target, slots, block_rows, free // shared, progress, device).run()
    return reopen(target)


def gram_matrix(
    store: GradientStore | PathLike,
    out: PathLike,
    *,
    rows: Any = None,
    sample: int | None = None,
    seed: int = 0,
    weights: Weighting | npt.ArrayLike | None = None,
    force_weights: bool = False,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> zarr.Array[Any]:
    """Write the Gram matrix K = A Aᵀ of a store's rows, A = diag(√w) G, to a Zarr array of any size.

    The same call, interrupted or killed, goes on with the tiles that are missing.

    Parameters
    ----------
    store : GradientStore or path
        (n, k).
    out : path
        Where to write it.
    rows, sample, seed, weights, force_weights, workers, memory, progress
        As for :func:`fit_fisher`; m rows are chosen.

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
    slots = check_workers(workers)
    if not train.n:
        raise InputError(f"expected a store with committed rows; received {train.path} with none: extract first")
    chosen = choose_rows(train, rows, sample, seed, weights, force_weights=force_weights)
    shared = slots_per_process(slots)
    need = kernel_need(chosen.count, train.k, shared, train.reading_bytes, chosen.small_bytes)
    how = Multiplying(chosen, plan_block_rows(need, memory, shared), parse_path(out))
    facts = {"store": str(train.path), "weights": chosen.record(), "selection": dict(chosen.selection)}
    return multiply_on_disk(how, slots, progress, chosen.digest(), facts)


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
        with Unfinished(self.target, {"gram": matter}) as kept:
            if not kept.usable:
                raise StoreBusyError(
                    f"expected to write the Gram matrix for {self.target}; received a folder that another process is "
                    "writing it to: wait for that fit, or give another place with out="
                )
            how = Multiplying(chosen, self.block_rows, kept.path / "gram-0", self.device)
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
            run_stripes(_lift, stripes, bar, how, turn, slots=self.slots, each=take)


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

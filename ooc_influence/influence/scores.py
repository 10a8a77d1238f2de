"""Influence scores of every train row on every query: (q, n), lazy or streamed to Zarr.

With the measurement a loss, a positive score marks a proponent (training on the row lowered the query's loss), a
negative one an opponent. (Koh and Liang, arXiv 1703.04730, use the opposite sign.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence._version import __version__
from ooc_influence.curvature import Curvature, DampingMode
from ooc_influence.errors import OocInfluenceError, StoreExistsError, StoreWriteError
from ooc_influence.influence.pair import FloatTile, Pair, precondition, score_tiles
from ooc_influence.progress import Progress
from ooc_influence.store import (
    CHUNK_TARGET,
    GradientStore,
    NewFolder,
    PathLike,
    StorePath,
    array_store,
    create_array,
    exists,
    is_local,
    parse_path,
    remove_tree,
    writable_array,
)
from ooc_influence.stripes import Stripe, check_workers, cores, cut_stripes, run_stripes

if TYPE_CHECKING:
    import dask.array as da


def influence_scores(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    curvature: Curvature | PathLike | None = None,
    damping: float | None = None,
    damping_mode: DampingMode = "relative",
    out: PathLike | None = None,
    *,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> da.Array | zarr.Array[Any]:
    """Return score(q, i) = g_qᵀ (F + λI)⁻¹ g_i for all queries and train rows.

    Parameters
    ----------
    query : GradientStore or path
        (q, k), made with ``like=`` the train store.
    train : GradientStore or path
        (n, k).
    curvature : Curvature, str, path, optional
        An object, a name in the train store, or a path; default the one named ``"default"``.
    damping : float, optional
        Relative (λ = damping · tr(F)/k) or absolute; default the curvature's own, 0.1 relative.
    damping_mode : {"relative", "absolute"}
        What ``damping`` means.
    out : path, optional
        Write the scores to a Zarr array there, in bounded memory, instead of returning a lazy array.
    workers : int, optional
        Row stripes worked on at once (with ``out``); default one with all cores, or the ambient cluster's slots.
    memory : int or str, optional
        Budget for the process, such as ``"4GiB"``; default half of what is free.
    progress : bool, optional
        Show a progress line (with ``out``); silent by default.

    Returns
    -------
    (q, n) float32
        A lazy Dask array, or the Zarr array written. Positive: proponents. Dropped rows are NaN.

    Raises
    ------
    MismatchError
        If masks or models differ.
    CurvatureNotFoundError, StaleCurvatureError
        If there is no curvature of these rows.
    SingularFisherError
        If λ = 0 and F has no inverse.
    StoreExistsError
        If something is at ``out``.
    MemoryBudgetError
        If the budget is too small.
    """
    pair = Pair.open(query, train, curvature, damping, damping_mode)
    slots = check_workers(workers) if out is not None else cores()  # Dask computes a lazy array with all of them
    blocks, block_rows = pair.plan(memory, slots, stage="scores", tile_bytes=8)
    if out is None:
        return _lazy_scores(pair, blocks[0][1], block_rows)
    return _write_scores(pair, parse_path(out), blocks, block_rows, slots, progress)


def _lazy_scores(pair: Pair, query_rows: int, block_rows: int) -> da.Array:
    """Build the graph: preconditioned query blocks times train blocks; tasks carry paths and row numbers."""
    import dask.array as da

    numbers = da.arange(pair.query.n, chunks=query_rows)
    queries = da.map_blocks(
        _precondition_task, numbers, pair.query, pair.curvature, pair.damping,
        new_axis=1, chunks=(numbers.chunks[0], (pair.train.k,)), meta=np.empty((0, 0), np.float32),
    )  # fmt: skip
    rows = da.arange(pair.train.n, chunks=block_rows)
    scores: da.Array = da.blockwise(
        _score_task, "qn", queries, "qk", rows, "n", store=pair.train, concatenate=True,
        meta=np.empty((0, 0), np.float32),
    )  # fmt: skip
    return scores


def _precondition_task(
    numbers: npt.NDArray[np.int64], query: GradientStore, curvature: Curvature, damping: float
) -> FloatTile:
    return precondition(query, curvature, damping, int(numbers[0]), int(numbers[-1]) + 1)


def _score_task(queries: FloatTile, rows: npt.NDArray[np.int64], store: GradientStore) -> FloatTile:
    stripe = Stripe(int(rows[0]), int(rows[-1]) + 1)
    ((_, tile),) = score_tiles(stripe, "", store, len(rows), queries)
    return tile


def _write_scores(
    pair: Pair,
    out: StorePath,
    blocks: list[tuple[int, int]],
    block_rows: int,
    slots: int,
    progress: bool | None,
) -> zarr.Array[Any]:
    """Write all tiles to a Zarr array that appears under its name, or is marked complete, when it is."""
    if exists(out):
        raise StoreExistsError(f"expected nothing at {out}; received something: choose another path or remove it")
    try:
        stripes = cut_stripes(0, pair.train.n, block_rows, slots)
        with (
            _new_output(out, pair, block_rows) as place,
            Progress("scores", len(blocks) * pair.train.n, progress) as bar,
        ):
            for start, stop in blocks:
                run_stripes(
                    _write_stripe, stripes, bar, pair.train, block_rows,
                    pair.precondition(start, stop), place, start, slots=slots,
                )  # fmt: skip
    except OSError as error:
        if isinstance(error, OocInfluenceError):
            raise
        raise StoreWriteError(f"expected to write scores to {out}; received: {error}: make room, run again") from error
    return zarr.open_array(array_store(out, read_only=True), mode="r")


@contextlib.contextmanager
def _new_output(out: StorePath, pair: Pair, block_rows: int) -> Iterator[StorePath]:
    """Create the array, yield where tasks write to it, and finish it."""
    if is_local(out):
        with NewFolder(out) as folder:
            _create_output(folder.arrays, pair, block_rows).attrs["complete"] = True
            yield folder.place
            if not folder.publish():
                raise StoreExistsError(f"expected nothing at {out}; received something meanwhile: choose another path")
        return
    try:  # no renaming there: a mark says when it is whole
        array = _create_output(array_store(out), pair, block_rows)
        yield out
        array.attrs["complete"] = True
    except BaseException:
        remove_tree(out)
        raise


def _create_output(files: Any, pair: Pair, block_rows: int) -> Any:
    """Create the (q, n) array; its chunks are as wide as a train block, so each has one writer."""
    shape = (pair.query.n, pair.train.n)
    width = min(block_rows, shape[1])
    chunks = (max(1, min(shape[0], CHUNK_TARGET // (4 * width))), width)
    array = create_array(files, None, shape, chunks, "float32", fill=float("nan"))
    array.attrs.update(
        {
            "dims": ["query", "train"],
            "query": str(pair.query.path),
            "train": str(pair.train.path),
            "curvature": str(pair.curvature.path),
            "damping": pair.damping,
            "version": __version__,
            "complete": False,
        }
    )
    return array


def _write_stripe(
    stripe: Stripe,
    key: str,
    train: GradientStore,
    block_rows: int,
    queries: FloatTile,
    out: StorePath,
    first_query: int,
) -> None:
    target = writable_array(array_store(out))
    for first, tile in score_tiles(stripe, key, train, block_rows, queries):
        target[first_query : first_query + tile.shape[0], first : first + tile.shape[1]] = tile

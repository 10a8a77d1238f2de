"""Influence scores of every train row on every query: (q, n), lazy or streamed to Zarr.

With the measurement a loss, a positive score marks a proponent (training on the row lowered the query's loss), a
negative one an opponent. (Koh and Liang, arXiv 1703.04730, use the opposite sign.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Unpack, get_args

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence.checkpoint import ResumableArray
from ooc_influence.errors import InputError, MismatchError, writing
from ooc_influence.influence.checkpoints import Marks, Stores
from ooc_influence.influence.costs import TileMemory, written_tiles
from ooc_influence.influence.engine import Floats
from ooc_influence.influence.ranking import TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.tiles import (
    Columns,
    ScoreTask,
    make_engine,
    score_tiles,
)
from ooc_influence.influence.topk import find_top
from ooc_influence.options import PairOptions, ScoreOptions, ScoresDtype, TopOptions, complete, select, takes
from ooc_influence.parallel import (
    Stripe,
    check_workers,
    cores,
    cut_ranges,
    run_stripes,
    sharing_blas,
)
from ooc_influence.progress import Progress
from ooc_influence.store import (
    CHUNK_TARGET,
    GradientStore,
    PathLike,
    StorePath,
    array_store,
    create_array,
    parse_path,
    row_norms,
    writable_array,
)

if TYPE_CHECKING:
    import dask.array as da


@takes(ScoreOptions)
def influence_scores(
    query: Stores,
    train: Stores,
    out: PathLike | None = None,
    **options: Unpack[ScoreOptions],
) -> da.Array | zarr.Array[Any]:
    """Return score(q, i) = g_qᵀ (F + λI)⁻¹ g_i for all queries and train rows.

    Parameters
    ----------
    query : GradientStore or path, or a list of them
        (q, k), made with ``like=`` the train store. A list, with ``train`` a list as long, for several checkpoints:
        their scores are averaged. All must hold the same rows in the same order.
    train : GradientStore or path, or a list of them
        (n, k).
    out : path, optional
        Write the scores to a Zarr array there, in bounded memory, instead of returning a lazy array. The same call,
        interrupted or killed, continues with the chunks that are missing.
    **options : ScoreOptions
        See :mod:`ooc_influence.options`. ``workers`` and ``progress`` count with ``out``.

    Returns
    -------
    (q, n) float32 (or float16, where it is written), or (L, q, n) for a list of dampings
        A lazy Dask array, or the Zarr array written, whose attributes hold λ, the settings and each query's share of
        squared gradient outside the span of the training spectrum. Positive: proponents. Dropped rows are NaN.

    Raises
    ------
    InputError
        For settings that do not go together, or scores beyond float16 where that was asked for.
    MismatchError
        If masks, models or checkpoints' rows differ.
    CurvatureNotFoundError, StaleCurvatureError
        If there is no curvature of these rows.
    SingularFisherError
        If λ = 0 and F has no inverse.
    StoreExistsError
        If something else is at ``out``.
    MemoryBudgetError
        If the budget is too small.
    """
    scoring = ScoreRequest.open(query, train, select(PairOptions, options))
    if out is None:
        if options["scores_dtype"] != "float32":
            raise InputError("expected out= with scores_dtype='float16'; received none: lazy scores are float32")
        return _lazy_scores(scoring, options["memory"])
    return write_scores(scoring, parse_path(out), None, options)


def _lazy_scores(scoring: ScoreRequest, memory: int | str | None) -> da.Array:
    """Build the graph: preconditioned query blocks times train blocks; tasks carry paths and row numbers."""
    import dask.array as da

    tile = TileMemory(per_score=8)
    blocks, block_rows = scoring.plan("scores", memory, cores(), tile)  # Dask computes with all cores
    work = scoring.work(block_rows)
    numbers = da.arange(scoring.q, chunks=blocks[0][1])
    depth = sum(work.widths)
    queries = da.map_blocks(
        _query_task, numbers, scoring, work, new_axis=[0, 2], dtype=np.float32, meta=np.empty((0, 0, 0), np.float32),
        chunks=((scoring.lambdas,), numbers.chunks[0], (depth,)),
    )  # fmt: skip
    rows = da.arange(scoring.n, chunks=block_rows)
    scores: da.Array = da.blockwise(
        _score_task, "lqn", queries, "lqk", rows, "n", work=work, seen=scoring.seen, concatenate=True,
        meta=np.empty((0, 0, 0), np.float32),
    )  # fmt: skip
    squeezed: da.Array = scoring.squeeze(scores)
    return squeezed


def scores_of_rows(scoring: ScoreRequest, rows: npt.NDArray[np.int64], memory: int | str | None = None) -> Floats:
    """Return the scores of some train rows, (q, m) float32 or (L, q, m), in one pass over the blocks that hold them."""
    numbers, index = np.unique(rows, return_inverse=True)
    scores: Floats = _lazy_scores(scoring, memory)[..., numbers].compute()
    return scores[..., index]


def _query_task(numbers: npt.NDArray[np.int64], scoring: ScoreRequest, work: ScoreTask) -> Floats:
    """Return preconditioned queries (L, q, columns), those of several checkpoints side by side."""
    with sharing_blas():
        arrays = work.read_as_rows(scoring.precondition(int(numbers[0]), int(numbers[-1]) + 1).arrays)
    return np.concatenate([array.reshape(scoring.lambdas, len(numbers), -1) for array in arrays], axis=2)


def _score_task(queries: Floats, rows: npt.NDArray[np.int64], work: ScoreTask, seen: Marks | None) -> Floats:
    edges = np.cumsum(work.widths)[:-1]
    parts = [np.ascontiguousarray(part).reshape(-1, part.shape[2]) for part in np.split(queries, edges, axis=2)]
    with sharing_blas(), make_engine(work.device) as engine:
        (tile,) = score_tiles(engine, Stripe(int(rows[0]), int(rows[-1]) + 1), "", work, seen, parts)
        return engine.host(tile.scores)[:, 0]


def write_scores(
    scoring: ScoreRequest,
    out: StorePath,
    columns: Columns | None,
    options: ScoreOptions,
    **facts: Any,
) -> zarr.Array[Any]:
    """Write all tiles to a Zarr array, or those of its chunks that are missing."""
    slots = check_workers(options["workers"])
    modules = 1 if columns is None else len(columns[0])
    dtype = _parse_dtype(options["scores_dtype"], scoring)
    digest = scoring.digest(kind="scores", modules=modules, **({} if dtype == "float32" else {"dtype": dtype}))
    with writing(f"to write scores to {out}", ", then run the same call again: it resumes"):
        output = ResumableArray.find(out, "scores", digest)
        if output is not None and output.complete:
            return output.open()
        width = None if output is None else output.chunks[-1]
        blocks, block_rows = scoring.plan("scores", options["memory"], slots, written_tiles(modules), block_rows=width)
        if output is None:
            leading = ([scoring.lambdas] if scoring.several else []) + ([modules] if columns else [])
            shape = (*leading, scoring.q, scoring.n)
            facts |= _facts(scoring, len(leading))
            if dtype == "float16":
                facts["scale_factor"] = _scale_factor(scoring, blocks)
            output = _create(out, digest, shape, (blocks[0][1], block_rows), facts)
        _check_queries(output, blocks[0][1])
        outside = _fill(scoring, output, blocks, scoring.work(output.chunks[-1], columns), slots, options["progress"])
        output.finish(outside_share=[None if np.isnan(value) else value for value in outside.tolist()])
    scoring.warn_outside(outside)
    return output.open()


def _parse_dtype(dtype: str, scoring: ScoreRequest) -> str:
    """Return the representation of written scores, checked."""
    if dtype not in get_args(ScoresDtype):
        raise InputError(f"expected scores_dtype {', '.join(map(repr, get_args(ScoresDtype)))}; received {dtype!r}")
    if dtype == "float16" and scoring.combine == "margins":
        raise InputError(
            "expected scores_dtype='float32' with combine='margins'; received 'float16': their scores have no known "
            "limit"
        )
    return dtype


_SLACK = 4.0  # of norms that are estimates, such as those of quantised rows
_LARGEST_HALF = float(np.finfo(np.float16).max)


def _scale_factor(scoring: ScoreRequest, blocks: Sequence[tuple[int, int]]) -> float:
    """Return the power of two by which no score is too large for float16: Cauchy-Schwarz bounds them.

    |qᵀ P g| ≤ ‖P q‖ ‖g‖, and in the units of norms, |qᵀ P g| / √(gᵀ P g) ≤ √(qᵀ P q).
    """
    largest = 0.0
    largest_rows = [_largest_norm(checkpoint.train) for checkpoint in scoring.checkpoints]
    for start, stop in blocks:
        queries = scoring.precondition(start, stop)
        limits = [row_norms(array) for array in queries.arrays]
        total = sum(float(np.nanmax(each, initial=0)) * norm for each, norm in zip(limits, largest_rows, strict=True))
        largest = max(largest, total if scoring.normalize is None else float(np.nanmax(queries.norms, initial=0)))
    return float(2.0 ** math.ceil(math.log2(_SLACK * largest / _LARGEST_HALF))) if largest > 0 else 1.0


def _largest_norm(store: GradientStore) -> float:
    """Return the largest norm of a store's rows."""
    step = store.layout.group_rows
    parts = (store.small("grad_norm", start, min(store.n, start + step)) for start in range(0, store.n, step))
    return max(float(np.nanmax(part, initial=0)) for part in parts)


def _create(
    path: StorePath, digest: str, shape: tuple[int, ...], block: tuple[int, int], facts: Mapping[str, Any]
) -> ResumableArray:
    """Create an array for scores (..., q, n), NaN where missing; ``block`` is what is written at once, (queries, rows).

    The leading axes are λ and module, where there are several; a chunk holds one entry of them.
    """
    width = min(block[1], shape[-1])
    height = max(1, min(block[0], 1 << (CHUNK_TARGET // (4 * width)).bit_length() - 1))
    chunks = (1,) * (len(shape) - 2) + (height, width)

    dtype = "float16" if "scale_factor" in facts else "float32"

    def make(parent: Any) -> Any:
        return create_array(parent, None, shape, chunks, dtype, fill=float("nan"), dims=facts["dims"])

    return ResumableArray.create(path, "scores", digest, facts, make)


def _check_queries(output: ResumableArray, queries: int) -> None:
    """Check that blocks of a number of queries are whole chunks; raise MismatchError if not."""
    height = output.chunks[-2]
    if queries % height and queries < output.shape[-2]:
        raise MismatchError(
            f"expected room for {height} queries at a time, with which {output.path} was begun; received a budget for "
            f"{queries}: give as much --memory as then, or remove it"
        )


def _missing(output: ResumableArray, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the row ranges of queries ``start`` to ``stop`` of which a chunk is missing, joined."""
    *leading, _, rows = output.shape
    height, width = output.chunks[-2:]
    first, last = start // height, -(-stop // height)
    finished = np.zeros(-(-rows // width), np.int64)
    for *_, query, row in output.finished_chunks():
        if first <= query < last:
            finished[row] += 1
    lacking = np.concatenate([[False], finished < math.prod(leading) * (last - first), [False]])
    edges = np.flatnonzero(lacking[1:] != lacking[:-1]).reshape(-1, 2) * width
    return [(int(low), min(int(high), rows)) for low, high in edges]


def _facts(scoring: ScoreRequest, leading: int) -> dict[str, Any]:
    first = scoring.checkpoints[0]
    several = len(scoring.checkpoints) > 1
    paths: dict[str, list[Any]] = {
        "query": [str(checkpoint.query.path) for checkpoint in scoring.checkpoints if checkpoint.query is not None],
        "train": [str(checkpoint.train.path) for checkpoint in scoring.checkpoints],
        "curvature": [
            None if checkpoint.curvature is None else str(checkpoint.curvature.path)
            for checkpoint in scoring.checkpoints
        ],
    }
    names = (["damping"] if scoring.several else []) + (["module"] if leading > scoring.several else [])
    return {
        "dims": [*names, "query", "train"],
        **(paths if several else {name: values[0] for name, values in paths.items()}),
        "damping": None if first.curvature is None else scoring.damping,
        "normalize": scoring.normalize,
        "combine": scoring.combine if several else None,
        **({"minus": scoring.settings["minus"]} if scoring.controls else {}),
        "averaged": None if scoring.queries.groups is None else scoring.queries.names.tolist(),
    }


def _fill(
    scoring: ScoreRequest,
    output: ResumableArray,
    blocks: list[tuple[int, int]],
    work: ScoreTask,
    slots: int,
    progress: bool | None,
) -> npt.NDArray[np.float64]:
    """Write the missing chunks; return the queries' shares outside the span, (q,)."""
    outside = np.empty(scoring.q)
    with Progress("scores", len(blocks) * scoring.n, progress) as bar:
        for start, stop in blocks:
            missing = _missing(output, start, stop)
            bar.advance(scoring.n - sum(high - low for low, high in missing))
            if not missing:
                outside[start:stop] = scoring.outside(start, stop)
                continue
            queries = scoring.precondition(start, stop)
            outside[start:stop] = queries.outside
            stripes = cut_ranges(missing, work.block_rows, slots)
            run_stripes(
                _write_stripe, stripes, bar, work, output, (start, stop), scoring.seen,
                *work.read_as_rows(queries.arrays), slots=slots, own_threads=True,
            )  # fmt: skip
    return outside


def _write_stripe(
    stripe: Stripe,
    key: str,
    work: ScoreTask,
    output: ResumableArray,
    query_range: tuple[int, int],
    seen: Marks | None,
    *queries: Floats,
) -> None:
    with make_engine(work.device) as engine:
        # again: where a worker died, part of a stripe is there already
        for low, high in _missing(output, *query_range):
            part = Stripe(max(low, stripe.start), min(high, stripe.stop))
            if part.start >= part.stop:
                continue
            with OutputWriter(output, query_range[0]) as writer:
                for tile in score_tiles(engine, part, key, work, seen, queries, copies=2):
                    writer.write(tile.start, engine.host(tile.scores))


class OutputWriter:
    """Writes tiles of an output in a thread, one while the next is computed. A context.

    Parameters
    ----------
    output : ResumableArray
        The scores (..., q, n).
    first_query : int
        The tiles' first query, at the start of a chunk.
    """

    def __init__(self, output: ResumableArray, first_query: int) -> None:
        self._files = array_store(output.path)
        self._array = writable_array(self._files)
        self._leading, self._first = output.shape[:-2], first_query
        scale: Any = self._array.attrs.get("scale_factor")
        self._inverse = None if scale is None else np.float32(1 / scale)
        self._thread = ThreadPoolExecutor(1, "ooc_influence-scores")
        self._task: Future[None] | None = None

    def write(self, first_row: int, tile: Floats) -> None:
        """Write scores (L, M, q, rows), after the tile before: two may be in use."""
        self.wait()
        queries, rows = tile.shape[-2:]
        region = (slice(self._first, self._first + queries), slice(first_row, first_row + rows))
        whole = tile.reshape(*self._leading, queries, rows)
        self._task = self._thread.submit(self._write, (..., *region), whole)

    def _write(self, region: tuple[Any, ...], tile: Floats) -> None:
        if self._inverse is None:
            self._array[region] = tile
            return
        with np.errstate(over="ignore", under="ignore"):
            halves = np.multiply(tile, self._inverse, out=tile).astype(np.float16)
        if np.isinf(halves).any():
            raise InputError(
                "expected scores within the bound of their norms to write them as float16; received some beyond it: "
                "write them as float32"
            )
        self._array[region] = halves

    def wait(self) -> None:
        """Wait until the last tile is written."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with contextlib.suppress(BaseException) if kind is not None else contextlib.nullcontext():
            self.wait()
        self._thread.shutdown()
        self._files.sync_folders()


@takes(ScoreOptions)
def module_influence(
    query: Stores,
    train: Stores,
    *,
    top: int | None = None,
    out: PathLike | None = None,
    **options: Unpack[ScoreOptions],
) -> Mapping[str, TopInfluential] | zarr.Array[Any]:
    """Return the influence that runs through each module, as top lists or as scores on disk.

    The norms of a unit (``normalize=``) are those of whole rows, so the parts still add up to the score.

    Parameters
    ----------
    query, train : GradientStore or path, or lists of them
        (q, k) and (n, k), not reduced; lists for several checkpoints.
    top : int, optional
        Return this many proponents and opponents of each query by each module.
    out : path, optional
        Write all scores there instead; resumable, as for :func:`influence_scores`.
    **options : ScoreOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    mapping of str to TopInfluential, or (M, q, n) float32
        By module name; or the Zarr array written, its attribute ``modules`` the names in order, (L, M, q, n) for a list
        of dampings.

    Raises
    ------
    InputError
        For reduced stores, or both or neither of ``top`` and ``out``.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, StoreExistsError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    if (top is None) == (out is None):
        raise InputError("expected either top= or out= (--top or --out); received both or neither")
    scoring = ScoreRequest.open(query, train, select(PairOptions, options), lists=top is not None)
    names, columns = module_columns([checkpoint.train for checkpoint in scoring.checkpoints])
    if out is not None:
        return write_scores(scoring, parse_path(out), columns, options, modules=names)
    assert top is not None
    lists = find_top(scoring, top, columns, complete(TopOptions, select(PairOptions, options)))
    return {name: lists.ranked(scoring, number) for number, name in enumerate(names)}


def module_columns(stores: Sequence[GradientStore]) -> tuple[list[str], Columns]:
    """Return the names of the modules that keep entries, the same in every store, and their columns in each."""
    columns: list[dict[str, slice]] = []
    for store in stores:
        if store.is_reduced:
            raise InputError(
                f"expected rows that hold kept entries; received {store.path}, reduced to {store.k} numbers that mix "
                "the modules: extract without a reduction (--dims 0)"
            )
        edges = np.cumsum([0, *(len(module.rows) for module in store.mask.modules)]).tolist()
        columns.append(
            {
                module.layer.name: slice(edges[number], edges[number + 1])
                for number, module in enumerate(store.mask.modules)
                if len(module.rows)
            }
        )
    if any(list(each) != list(columns[0]) for each in columns):
        raise MismatchError(
            "expected the same modules in every checkpoint's store; received stores that differ: extract them with the "
            "same modules="
        )
    return list(columns[0]), tuple(tuple(each.values()) for each in columns)

"""Writing a store's rows, or scores, to a file that other programs read: NumPy, Parquet, FAISS."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Unpack, get_args

import numpy as np
import zarr

from ooc_influence.errors import InputError, StoreNotFoundError
from ooc_influence.interchange.faiss_index import FaissIndex, load_faiss
from ooc_influence.interchange.files import Blocks, new_array, numbers_path, to_half, write_array, write_parquet
from ooc_influence.interchange.rows import ExportedRows
from ooc_influence.memory import format_bytes
from ooc_influence.options import ExportDtype, ExportOptions, IndexKind, takes
from ooc_influence.progress import Progress, optional_library
from ooc_influence.report import check_pairs, write_scores_table
from ooc_influence.store import (
    GradientStore,
    PathLike,
    array_store,
    check_writable,
    expand_home,
    is_local,
    parse_path,
)

logger = logging.getLogger("ooc_influence")
_ROWS, _SCORES = (".npy", ".parquet", ".faiss"), (".npy", ".parquet", ".csv", ".jsonl")


@takes(ExportOptions)
def export_rows(store: GradientStore | PathLike, out: str | Path, **options: Unpack[ExportOptions]) -> dict[str, Any]:
    """Write the live rows of a store to a NumPy array, a Parquet table or a FAISS index.

    Search by inner product is influence where one side carries the curvature: export train rows as they are stored, and
    query rows with ``precondition=`` the train store. The proponents of a query are then its nearest rows, those of
    :func:`top_influential` with the same damping and ``normalize``.

    Parameters
    ----------
    store : GradientStore or path
        (n, k), finished; of train rows, or of queries.
    out : path
        ``.npy``: an array (live rows, k); ``NAME.rows.npy`` beside it has the row number of each line. ``.parquet``: a
        line a row with its number, id, columns, loss and norm, and the row as a list ``gradient``. ``.faiss``: an index
        whose ids are row numbers, which takes n · k · 4 bytes of memory. A file is replaced when the new one is whole.
    **options : ExportOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    dict
        What was written: ``out``, ``rows``, ``columns``, ``dtype``, ``bytes`` and the ``settings``, JSON values.

    Raises
    ------
    InputError
        For another ending, settings that do not go together, or rows that float16 does not hold.
    MissingExtraError
        Without pyarrow or FAISS, where the file needs it.
    MemoryBudgetError
        If the budget is too small, as it is for a FAISS index that does not fit.
    OocInfluenceError
        As for :func:`influence_scores`.
    """
    path = _parse_out(out, _ROWS)
    _check_kinds(path, options)
    exported = ExportedRows.open(store, options)
    source, shape, dtype = exported.store, (exported.count, exported.store.k), options["dtype"]
    facts: dict[str, Any] = {"store": str(source.path), "rows": shape[0], "columns": shape[1], "dtype": dtype}
    facts["settings"] = dict(exported.settings)
    index = _index(path, shape, options)
    plan = exported.plan(options["memory"], 0 if index is None else index.held)
    passes = 1 if index is None else index.passes
    with Progress("export", passes * shape[0], options["progress"]) as bar:
        blocks = partial(_counted, partial(exported.blocks, plan), bar, dtype, index is None)
        if index is not None:
            bar.note(memory=format_bytes(index.nbytes))
            facts["index"] = {"factory": index.factory, "memory": index.nbytes}
            index.write(path, blocks)
        elif path.suffix.lower() == ".parquet":
            write_parquet(path, blocks(), source, facts)
        else:
            write_array(path, blocks(), shape, dtype)
            facts["row_numbers"] = str(numbers_path(path))
    return {"out": str(path), **facts, "bytes": path.stat().st_size}


def _check_kinds(path: Path, options: ExportOptions) -> None:
    """Check the dtype and the index that are asked for."""
    dtype, index = options["dtype"], options["index"]
    if dtype not in get_args(ExportDtype):
        raise InputError(f"expected dtype {', '.join(map(repr, get_args(ExportDtype)))}; received {dtype!r}")
    if index is not None and index not in get_args(IndexKind):
        raise InputError(f"expected index {', '.join(map(repr, get_args(IndexKind)))}; received {index!r}")
    if index is not None and path.suffix.lower() != ".faiss":
        raise InputError(f"expected index (--index) with a .faiss file; received {path}: leave it out")


def _index(path: Path, shape: tuple[int, int], options: ExportOptions) -> FaissIndex | None:
    """Return the index to build, which fits in memory; None for another file."""
    if path.suffix.lower() != ".faiss":
        return None
    load_faiss()
    index = FaissIndex(options["index"] or "flat", *shape, options["dtype"])
    index.check_memory(options["memory"])
    logger.info("the index takes %s of memory, to build and to search it", format_bytes(index.nbytes))
    return index


def _counted(rows: Callable[[], Blocks], bar: Progress, dtype: str, convert: bool) -> Blocks:
    """Yield blocks in a dtype and count them; float16 rows are checked where FAISS converts them, too."""
    for numbers, block in rows():
        halves = to_half(numbers, block) if dtype == "float16" else None
        yield numbers, block if halves is None or not convert else halves
        bar.advance(len(numbers))


def _parse_out(out: str | Path, kinds: tuple[str, ...]) -> Path:
    """Return where to write a file, checked: its ending, and that it is on a disk this user may write to.

    Raises
    ------
    InputError
        If it is not.
    MissingExtraError
        For ``.parquet`` without pyarrow.
    """
    if not is_local(parse_path(str(out))):
        raise InputError(f"expected a local file to export to; received {out}: export it here, then copy it")
    path = expand_home(out)
    if path.suffix.lower() not in kinds:
        raise InputError(f"expected a file to export to as {', '.join(kinds)}; received {path}")
    if path.is_dir():
        raise InputError(f"expected a file to export to; received the folder {path}: choose another path")
    if path.suffix.lower() == ".parquet":
        optional_library("pyarrow.parquet", "Parquet files")
    check_writable(path, missing_folders=False)
    return path


def export_scores(
    scores: zarr.Array[Any] | PathLike, out: str | Path, *, progress: bool | None = None
) -> dict[str, Any]:
    """Write scores that :func:`influence_scores` or :func:`module_influence` wrote, as a NumPy array or a table.

    Parameters
    ----------
    scores : zarr.Array or path
        (q, n), with axes of λ or module in front, finished.
    out : path
        ``.npy``: an array of the same shape, float32, whatever the scores were written as; NaN for dropped rows.
        ``.parquet``, ``.csv``, ``.jsonl``: a line a pair, as ``ooc-influence score -o`` writes them, of (q, n) only.
        A file is replaced when the new one is whole.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    dict
        What was written: ``out``, ``shape`` or ``lines``, and ``bytes``.

    Raises
    ------
    InputError
        For another ending, more than 10⁸ lines, or axes that lines do not have.
    StoreNotFoundError
        If there are no finished scores, or the stores that they are of are not where they were.
    """
    path, array = _parse_out(out, _SCORES), _open_scores(scores)
    facts: dict[str, Any] = {"out": str(path), "scores": str(scores) if not isinstance(scores, zarr.Array) else None}
    if path.suffix.lower() == ".npy":
        with Progress("export", array.shape[-1] * int(np.prod(array.shape[:-1])), progress, "score") as bar:
            _write_scores(path, array, bar)
        return {**facts, "shape": list(array.shape), "bytes": path.stat().st_size}
    if array.ndim != 2:
        dims: Any = array.attrs["dims"]
        raise InputError(
            f"expected scores (queries, rows) to write as lines; received {', '.join(dims)}: export a .npy file"
        )
    stores = [_store_of(array, name) for name in ("query", "train")]
    check_pairs(*array.shape)
    lines = write_scores_table(path, array, stores[0], stores[1])
    return {**facts, "lines": lines, "bytes": path.stat().st_size}


def find_scores(path: PathLike) -> zarr.Array[Any] | None:
    """Return the scores at a path, finished or not; None where there are none."""
    try:
        array = zarr.open_array(array_store(parse_path(path), read_only=True), mode="r")
    except Exception:  # no array, a damaged one, or something else altogether
        return None
    return array if "ooc_influence_scores" in array.attrs else None


def _open_scores(scores: zarr.Array[Any] | PathLike) -> zarr.Array[Any]:
    """Return finished scores, to read."""
    where = "the path of the array given" if isinstance(scores, zarr.Array) else scores
    array = scores if isinstance(scores, zarr.Array) else find_scores(scores)
    if array is None or "ooc_influence_scores" not in array.attrs:
        raise StoreNotFoundError(
            f"expected scores at {where}; received none: influence_scores(out=) or 'ooc-influence score' writes them"
        )
    if not array.attrs["complete"]:
        raise StoreNotFoundError(f"expected finished scores at {where}; received some: run the same score again")
    return array


def _store_of(scores: zarr.Array[Any], name: str) -> GradientStore:
    """Return the store that scores are of, the first of several checkpoints'."""
    recorded: Any = scores.attrs[name]
    return GradientStore.open(str(recorded[0] if isinstance(recorded, (list, tuple)) else recorded))


def _write_scores(path: Path, scores: zarr.Array[Any], bar: Progress) -> None:
    """Write scores as a .npy array, chunk by chunk, each line of a chunk at its place in the file."""
    scale: Any = scores.attrs.get("scale_factor")
    factor = np.float32(1 if scale is None else scale)
    q, n = scores.shape[-2:]
    height, width = scores.chunks[-2:]
    with new_array(path, "float32", scores.shape) as file:
        begin = file.tell()
        for number, leading in enumerate(np.ndindex(*scores.shape[:-2])):
            for query in range(0, q, height):
                for row in range(0, n, width):
                    part = (*leading, slice(query, query + height), slice(row, row + width))
                    block = np.asarray(scores[part], np.float32) * factor
                    for line, values in enumerate(block, start=number * q + query):
                        file.seek(begin + 4 * (line * n + row))
                        file.write(np.ascontiguousarray(values).data)
                    bar.advance(block.size)

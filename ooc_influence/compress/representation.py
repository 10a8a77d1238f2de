"""Writing a store's rows again in another representation: as signs, for example."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from ooc_influence.errors import StoreNotFoundError
from ooc_influence.fingerprint import check_same
from ooc_influence.linalg import KeptNorms, storage_scale
from ooc_influence.options import RewriteOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store import (
    GradientStore,
    PathLike,
    Storage,
    StorePath,
    as_store,
    check_finished,
    check_free,
    check_second_moments,
    copy_tombstones,
    create_like,
    parse_path,
    parse_representation,
)

_BLOCK_BYTES = 2**25  # of float32 rows at a time


@takes(RewriteOptions)
def rewrite_store(store: GradientStore | PathLike, out: PathLike, **options: Unpack[RewriteOptions]) -> GradientStore:
    """Write the rows of a store in another representation to a new store, or resume.

    Losses, norms, ids, columns and tombstones carry over; row numbers stay. Rows of signs in a Kronecker basis are
    divided by its whitening, and have their self-influence beside them, as :func:`extract_gradients` makes them.

    Parameters
    ----------
    store : GradientStore or path
        (n, k), finished, of any representation but signs.
    out : path
        The store to make, (n, k).
    **options : RewriteOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading.

    Raises
    ------
    InputError
        For a store that is not finished, or whose rows are signs.
    MismatchError
        If ``out`` is a store of something else.
    StoreExistsError
        If something else is at ``out``.
    """
    source, path = as_store(store), parse_path(out)
    check_second_moments(source)
    check_finished(source)
    dtype = parse_representation(options["dtype"])
    kept = KeptNorms.of(dtype, source.mask, source.attrs, reduced=source.is_reduced)
    target = _open(source, path, dtype, options["storage"], kept)
    copy_tombstones(source, target)
    step = max(1, _BLOCK_BYTES // (4 * source.k))
    with target, Progress("rewrite", source.n, options["progress"]) as bar:
        start = target.writer(0, target.layout.planned_rows).next_row
        bar.advance(start)
        for low in range(start, source.n, step):
            high = min(source.n, low + step)
            _append(source, target, low, high, kept)
            bar.advance(high - low)
    written = GradientStore.open(path, "a")
    copy_tombstones(source, written)
    if source.layout.planned_rows is None:
        written.plan_rows(None)
    return GradientStore.open(path)


def _open(
    source: GradientStore, path: StorePath, dtype: Any, storage: Storage | None, kept: KeptNorms
) -> GradientStore:  # fmt: skip
    """Open the store of an earlier run, or make an empty one."""
    try:
        target = GradientStore.open(path, "a")
    except StoreNotFoundError:
        check_free(path, "a store or nothing")
        return create_like(
            source, path, [str(source.path)], dtype=dtype,
            storage=storage or Storage(codec=source.layout.codec), planned_rows=source.n,
            column_scale=storage_scale(dtype, source.mask, source.reduction, source.attrs),
            columns=source.layout.columns | dict.fromkeys(kept.weights, "float64"),
            attributes={"rewritten": {"source": source.identity}},
        )  # fmt: skip
    expected = {"source": (target.attrs.get("rewritten") or {}).get("source"), "dtype": target.layout.dtype}
    received = {"source": source.identity, "dtype": dtype}
    check_same(f"the store at {path}", expected, received, "rewrite to another path, or remove the store")
    if target.n < source.n != target.layout.planned_rows:
        target.plan_rows(source.n)
    return target


def _append(source: GradientStore, target: GradientStore, low: int, high: int, kept: KeptNorms) -> None:
    rows = source.rows(low, high)
    columns = {name: source.small(f"columns/{name}", low, high) for name in source.layout.columns}
    target.append(
        rows,
        loss=source.small("loss", low, high),
        grad_norm=source.small("grad_norm", low, high),
        ids=np.asarray(source.small("example_id", low, high)) if source.layout.ids else None,
        columns=columns | kept.columns(rows),
    )

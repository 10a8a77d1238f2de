"""The compressed empirical Fisher matrix F = (1/m) Σ g_i g_iᵀ over the m live rows of a store.

Striped over row ranges: each task reads its blocks, adds XᵀX in place (float32 inside a few thousand rows, float64
across them) and returns one (k, k) sum. Then F is factorised in float64. Memory: 12 k² bytes a worker and a block of
rows; 24 k² for the factorisation; nothing that grows with n.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.curvature import (
    Curvature,
    check_replaceable,
    curvature_path,
    fit_attributes,
    save_curvature,
)
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    OocInfluenceWarning,
    StaleCurvatureError,
    StoreExistsError,
)
from ooc_influence.linalg import GramAccumulator
from ooc_influence.linalg.eigen import eigen_bytes
from ooc_influence.memory import Need, block_limit, plan_block_rows
from ooc_influence.progress import Progress, tick
from ooc_influence.store import GradientStore, PathLike, StorePath, parse_path, read_blocks
from ooc_influence.stripes import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process

logger = logging.getLogger("ooc_influence")
Sum = tuple[npt.NDArray[np.float64], int]


def fisher_need(k: int, workers: int, reading: int = 0) -> Need:
    """Return what :func:`fit_fisher` needs, in bytes; ``reading`` is what a worker holds to read the store.

    Two phases share the memory: accumulation (each worker's sums and block), then, alone, the factorisation.
    """
    accumulators = workers * GramAccumulator.nbytes(k)
    extra = max(0, eigen_bytes(k) - accumulators) + (8 * k * k if workers > 1 else 0)
    return Need(
        stage=f"fisher for k={k}",
        fixed=extra,
        per_worker=GramAccumulator.nbytes(k) + reading,
        per_row=4 * k,
        max_rows=block_limit(k),
        advice="extract with a smaller k",
    )


def fit_fisher(
    store: GradientStore | PathLike,
    *,
    name: str = "default",
    out: PathLike | None = None,
    refit: bool = False,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Curvature:
    """Compute and factorise the Fisher matrix of a store, and save it there as ``curvature/<name>``.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k).
    name : str
        Name of the curvature in the store.
    out : path, optional
        Save it there instead (for a store that cannot be written).
    refit : bool
        Fit again although an up-to-date curvature is there; by default that one is returned.
    workers : int, optional
        Row stripes worked on at once; by default one with all cores, or the slots of the ambient Dask cluster.
    memory : int or str, optional
        Budget for the process, such as ``"4GiB"``; by default half of what is free.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    Curvature
        Undamped F, eigenvalues (k,), eigenvectors (k, k).

    Raises
    ------
    InputError
        For a store without live rows.
    MemoryBudgetError
        If the budget does not hold the matrices.
    StoreExistsError
        If something else than this store's curvature is there.
    StoreDamagedError
        If a committed chunk is missing or short.
    """
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    target = parse_path(out) if out is not None else curvature_path(train, name)
    _warn_if_unfinished(train)
    slots = check_workers(workers)
    shared = slots_per_process(slots)
    block_rows = plan_block_rows(fisher_need(train.k, shared, train.reading_bytes), memory, shared)
    check_replaceable(target)
    if not refit:
        found = _up_to_date(target, train)
        if found is not None:
            return found
    if not train.n:
        raise InputError(f"expected a store with committed rows; received {train.path} with none: extract first")
    stripes = cut_stripes(0, train.n, block_rows, slots)
    digest = train.rows_digest()  # before the sums: what is dropped meanwhile makes the result stale, not wrong
    with Progress("fisher", train.n, progress) as bar:
        total, rows = run_stripes(_sum_stripe, stripes, bar, train, block_rows, slots=slots, reduce=_add_sums)
    if not rows:
        raise InputError(f"expected a store with live rows; received {train.path} whose rows are all dropped")
    total /= rows
    return save_curvature(target, total, fit_attributes(train, digest, rows, float(np.trace(total))))


def _warn_if_unfinished(train: GradientStore) -> None:
    planned = train.layout.planned_rows or train.committed
    if train.n < planned:
        warnings.warn(
            f"{train.path} holds {train.n} of {planned} rows without a gap: the fit covers those",
            OocInfluenceWarning,
            stacklevel=3,
        )


def _up_to_date(target: StorePath, train: GradientStore) -> Curvature | None:
    """Return the curvature at ``target`` if it is one of these very rows."""
    try:
        found = Curvature(target)
        found.check(train)
    except (CurvatureNotFoundError, StaleCurvatureError):
        return None
    if found.attrs["store_id"] != train.identity:
        raise StoreExistsError(
            f"expected a curvature of {train.path} or nothing at {target}; received one of another store: choose "
            "another path, or refit to replace it"
        )
    logger.info("%s is up to date", target)
    return found


def _sum_stripe(stripe: Stripe, key: str, store: GradientStore, block_rows: int) -> Sum:
    """Return Σ g gᵀ over a stripe's live rows, and how many they are."""
    accumulator = GramAccumulator(store.k)
    rows = 0
    for block in read_blocks(store, stripe.start, stripe.stop, block_rows):
        if block.dropped is not None:
            block.gradients[block.dropped] = 0
            rows -= int(block.dropped.sum())
        accumulator.add(block.gradients)
        rows += block.stop - block.start
        tick(key, block.stop - block.start)
    return accumulator.total(), rows


def _add_sums(left: Sum, right: Sum) -> Sum:
    return left[0] + right[0], left[1] + right[1]

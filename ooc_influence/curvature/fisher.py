"""The compressed empirical Fisher matrix F = (1/m) Σ w_i g_i g_iᵀ over m live rows of a store.

Striped over rows (:mod:`.sums`), then factorised in float64 (:mod:`.spectral`). The undamped sum is kept: rows appended
since are added to it, rows dropped since are subtracted, without reading the others. Memory: 12 k² bytes a worker and a
block of rows; 24 k² for the factorisation; nothing that grows with n.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import unfinished
from ooc_influence.curvature.changes import Change, RowRecord
from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.damping import DEFAULT_DAMPING
from ooc_influence.curvature.need import FitShapes, fisher_need, module_ranges
from ooc_influence.curvature.rows import ChosenRows, Range, choose_rows
from ooc_influence.curvature.saved import check_replaceable, curvature_path, write_curvature, write_long
from ooc_influence.curvature.spectral import SpectralCurvature, write_spectra
from ooc_influence.curvature.sums import Summing, Sums, sum_rows
from ooc_influence.curvature.unfinished import Unfinished
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    NonFiniteError,
    OocInfluenceWarning,
    StaleCurvatureError,
    StoreDamagedError,
    StoreExistsError,
)
from ooc_influence.linalg import Weighting
from ooc_influence.memory import plan_block_rows
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike, StorePath, parse_path
from ooc_influence.stripes import check_workers, slots_per_process

logger = logging.getLogger("ooc_influence")
Blocks = Literal["module"]
_EVERY_ROW = {"kind": "range", "start": 0, "stop": None}
_MOST_DROPPED = 0.5  # of the trace: beyond it, differences would lose digits
_NEAR_ROWS, _NEAR_COLUMNS = 0.95, 0.9  # of m or k: a d(λ) beyond that is worth a warning


def fit_fisher(
    store: GradientStore | PathLike,
    *,
    name: str = "default",
    out: PathLike | None = None,
    refit: bool = False,
    rows: Any = None,
    sample: int | None = None,
    seed: int = 0,
    weights: Weighting | npt.ArrayLike | None = None,
    force_weights: bool = False,
    blocks: Blocks | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Curvature:
    """Compute and factorise the Fisher matrix of a store, and save it there as ``curvature/<name>``.

    A fit that was interrupted goes on where it was. One whose rows are still there takes in rows appended since and
    takes out rows dropped since; where those carry more than half of the trace it starts again.

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
    rows : slice, (start, stop), row numbers or (n,) bool, optional
        Use these rows only; by default all, those appended later included.
    sample, seed : int
        Use so many of the live ones, drawn at random without replacement. The error this is expected to make in F, as
        a share of its Frobenius norm, is recorded.
    weights : {"ggn", "trak"} or (n,) array, optional
        w; by default 1. The named ones follow from the rows' losses (:mod:`ooc_influence.linalg.weights`).
    force_weights : bool
        Take named weights although the store does not say that its losses are one-label cross-entropy.
    blocks : "module", optional
        One Fisher matrix for each module's columns, with a spectrum and a λ of its own, in place of the whole.
    workers : int, optional
        Row stripes worked on at once; by default one with all cores, or the slots of the ambient Dask cluster.
    memory : int or str, optional
        Budget for the process, such as ``"4GiB"``; by default half of what is free.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    Curvature
        Undamped F, its eigenvalues (k,) and eigenvectors.

    Raises
    ------
    InputError
        For a store without live rows, or rows, weights or blocks that do not fit it.
    MemoryBudgetError
        If the budget does not hold the matrices.
    StoreExistsError
        If something else than this store's curvature is there.
    StoreDamagedError
        If a committed chunk is missing or short.
    """
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    warn_if_unfinished(train)
    slots = check_workers(workers)
    ranges = _parse_blocks(train, blocks)
    target = fit_target(train, name, out)
    chosen = choose_rows(train, rows, sample, seed, weights, force_weights=force_weights)
    found = None if refit else fitted(target, train)
    change = None if found is None else what_changed(found, chosen, "module" if blocks else "whole")
    shared = slots_per_process(slots)
    need = fisher_need(
        train.k, shared, train.reading_bytes, ranges=ranges, rows=chosen.small_bytes, update=change is not None
    )
    shapes = FitShapes.of(chosen)
    need = replace(need, ways=shapes.block_ways if blocks else shapes.fisher_ways)
    block_rows = plan_block_rows(need, memory, shared)
    if found is not None and change is not None and change.nothing:
        logger.info("%s is up to date", target)
        return found
    settings = {
        "store": train.identity, "rows": train.rows_digest(), "selection": dict(chosen.selection),
        "weights": chosen.record(), "ranges": ranges, "block_rows": block_rows,
        "since": None if change is None or found is None else found.attrs["fit"],
    }  # fmt: skip
    with Unfinished(target, settings) as kept:
        folder = kept.path if kept.usable else None
        how = Summing(train, ranges, block_rows, sample is not None, folder, unfinished.INTERVAL)
        _fit(target, chosen, how, slots, progress, kept, found if change is not None else None, change or Change())
    return reopen(target)


def _fit(
    target: StorePath,
    chosen: ChosenRows,
    how: Summing,
    slots: int,
    progress: bool | None,
    kept: Unfinished,
    old: Curvature | None,
    change: Change,
) -> None:
    """Sum, from scratch or from an old sum on, factorise and write."""
    began = time.monotonic()
    record = RowRecord.of(chosen)  # before the sums: what is dropped meanwhile makes the result stale, not wrong
    digest = chosen.store.rows_digest()
    total, taken = None, 0.0
    if isinstance(old, SpectralCurvature):
        total, taken = _updated(old, chosen, how, slots, progress, kept, change)
    if total is None:
        with Progress("fisher", chosen.count, progress) as bar:
            total = sum_rows(chosen, how, slots, bar, [(0, chosen.count)], kept)
        taken = 0.0
    if not total.live:
        raise InputError(f"expected a store with live rows; received {chosen.store.path} whose rows are all dropped")
    trace = total.trace() / total.live
    if not np.isfinite(trace):
        raise NonFiniteError(
            "expected a finite Fisher matrix; received NaN or Inf: gradients beyond 1e18 overflow, scale the loss", []
        )
    attributes = fit_attributes(chosen, digest, total.live, trace) | record.facts()
    attributes |= {"ranges": [list(part) for part in how.blocks], "clipped": total.clipped, "taken": taken}
    attributes["kind"] = "whole" if how.blocks == ((0, chosen.store.k),) else "module"
    if how.fourth:
        attributes["sampling_error"] = chosen.sampling_error(total.live, total.fourth, _squared_norm(total))
    if total.clipped:
        logger.info("%d rows have a loss below the floor of their weights", total.clipped)

    def write(group: Any) -> Mapping[str, Any]:
        for name, values in record.arrays().items():
            write_long(group, name, values)
        write_spectra(group, attributes["kind"], total)
        return {"seconds": time.monotonic() - began}

    write_curvature(target, attributes, write)


def _updated(
    old: SpectralCurvature,
    chosen: ChosenRows,
    how: Summing,
    slots: int,
    progress: bool | None,
    kept: Unfinished,
    change: Change,
) -> tuple[Sums | None, float]:
    """Return an old curvature's sums with rows added and subtracted, and the trace taken from them so far.

    None where too much is gone.
    """
    removed, taken = None, float(old.attrs.get("taken", 0.0))
    if len(change.removed):
        gone = replace(chosen.at(change.removed), dropped_too=True)
        plain = Summing(how.store, how.blocks, how.block_rows)
        with Progress("fisher: dropped rows", gone.count, progress) as bar:
            removed = sum_rows(gone, plain, slots, bar, [(0, gone.count)])
        taken += removed.trace()
        if taken > _MOST_DROPPED * old.trace * old.rows:
            logger.warning("rows with more than half of the trace of %s are dropped: fitting again", old.path)
            return None, 0.0
    if change.added is None:
        total = old.sums()
    else:
        low, high = change.added
        with Progress("fisher: new rows", high - low, progress) as bar:
            total = sum_rows(chosen, how, slots, bar, [change.added], kept)
        old.add_sums_to(total)
    if removed is not None:
        for square, part in zip(total.squares, removed.squares, strict=True):
            square -= part
        total.live, total.clipped = total.live - removed.live, total.clipped - removed.clipped
    return total, taken


def _squared_norm(total: Sums) -> float:
    """Return the squared Frobenius norm of symmetric matrices of which the upper triangles are given."""
    norm = 0.0
    for square in total.squares:
        upper = np.triu(square)
        norm += 2 * float(np.vdot(upper, upper)) - float(np.square(np.diagonal(square)).sum())
    return norm


def fit_attributes(chosen: ChosenRows, digest: str, rows: int, trace: float) -> dict[str, Any]:
    """Return what a curvature records about the rows it was fitted on."""
    store = chosen.store
    return {
        "mask_digest": store.columns_digest,
        "model": store.attrs.get("model", {}).get("fingerprint"),
        "store_id": store.identity,
        "store_rows": store.n,
        "rows_digest": digest,
        "rows": rows,
        "d": store.k,
        "trace": trace,
        "damping": DEFAULT_DAMPING,
        "weights": chosen.record(),
    }


def _parse_blocks(train: GradientStore, blocks: str | None) -> tuple[Range, ...]:
    if blocks is None:
        return ((0, train.k),)
    if blocks != "module":
        raise InputError(f"expected blocks='module' or none; received {blocks!r}")
    if train.reduction is not None:
        raise InputError(
            f"expected a store of kept entries for blocks='module'; received {train.path}, whose columns are reduced: "
            "fit the whole"
        )
    return module_ranges(train)


def warn_if_unfinished(train: GradientStore) -> None:
    """Warn where rows are still to come."""
    planned = train.layout.planned_rows or train.committed
    if train.n < planned:
        warnings.warn(
            f"{train.path} holds {train.n} of {planned} rows without a gap: the fit covers those",
            OocInfluenceWarning,
            stacklevel=3,
        )


def fit_target(train: GradientStore, name: str, out: PathLike | None) -> StorePath:
    """Return where a store's curvature is to be saved.

    Raises
    ------
    StoreExistsError
        If something else than a curvature is there.
    InputError
        If the store has no rows.
    """
    target = parse_path(out) if out is not None else curvature_path(train, name)
    check_replaceable(target)
    if not train.n:
        raise InputError(f"expected a store with committed rows; received {train.path} with none: extract first")
    return target


def fitted(target: StorePath, train: GradientStore) -> Curvature | None:
    """Return this store's curvature at ``target``, if there is one."""
    try:
        found = Curvature.open(target)
    except (CurvatureNotFoundError, StaleCurvatureError):
        return None
    with contextlib.suppress(StaleCurvatureError):
        found.check(train)
    if found.attrs["store_id"] != train.identity:
        raise StoreExistsError(
            f"expected a curvature of {train.path} or nothing at {target}; received one of another store: choose "
            "another path, or refit to replace it"
        )
    return found


def what_changed(found: Curvature, chosen: ChosenRows, kind: str) -> Change | None:
    """Return what became of a curvature's rows; None where it has to be fitted anew."""
    count = min(chosen.count, int(found.attrs.get("count", chosen.count)))
    same = (
        found.kind == kind
        and found.attrs.get("selection", _EVERY_ROW) == chosen.selection
        and (found.attrs.get("weights") or {}) == chosen.part(0, count).record()
    )
    if not same:
        logger.info("%s was fitted with other rows, weights or blocks: fitting anew", found.path)
        return None
    change = found.change(chosen.store)
    if change.refit:
        logger.info("%s: %s since it was fitted: fitting anew", found.path, change.refit)
        return None
    return change


def reopen(path: StorePath) -> Curvature:
    """Open what was just written, and warn of its effective dimension."""
    for _ in range(10):  # another fit may be replacing this one at this moment: theirs is as good
        with contextlib.suppress(CurvatureNotFoundError, StaleCurvatureError, StoreDamagedError):
            found = Curvature.open(path)
            warn_of_dimension(found)
            return found
    return Curvature.open(path)


def warn_of_dimension(found: Curvature) -> None:
    """Warn where the default damping leaves nearly as many directions as there are rows or columns."""
    if found.trace <= 0:
        return
    dimension = found.effective_dimension(found.damping_value())
    if dimension > _NEAR_ROWS * found.rows:
        near, advice = f"the {found.rows} rows it was fitted on", "more rows, or more damping, would say more"
    elif dimension > _NEAR_COLUMNS * found.d:
        near, advice = f"the {found.d} stored columns", "more columns, or more damping, would say more"
    else:
        return
    warnings.warn(
        f"{found.path} has an effective dimension of {dimension:.1f} at the default damping, close to {near}: {advice}",
        OocInfluenceWarning,
        stacklevel=4,
    )

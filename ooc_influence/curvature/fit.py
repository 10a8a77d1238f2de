"""The compressed empirical Fisher matrix F = (1/m) Σ w_i g_i g_iᵀ over m live rows of a store.

Striped over rows (:mod:`.sums`), then factorised in float64 (:mod:`.spectral`). The undamped sum is kept: rows appended
since are added to it, rows dropped since are subtracted, without reading the others. Memory: 12 k² bytes a worker and a
block of rows; 24 k² for the factorisation; nothing that grows with n. Where that is too much, the top of the spectrum
(:mod:`.top`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Unpack, get_args

from ooc_influence.checkpoint import ClaimedOutput, kept_groups
from ooc_influence.curvature.costs import (
    FitShapes,
    LowRankPlan,
    Shapes,
    check_rank,
    diagonal_need,
    fisher_memory,
    module_ranges,
    plan_low_rank,
)
from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.dual import fit_gram
from ooc_influence.curvature.files import write_curvature
from ooc_influence.curvature.low_rank import fit_top
from ooc_influence.curvature.primal import Fitting, squared_norm, usable_ways
from ooc_influence.curvature.rows import ChosenRows, Range, choose_rows
from ooc_influence.curvature.sink import fit_target, fitted, reopen, warn_if_unfinished, what_changed
from ooc_influence.curvature.spectral import SummedCurvature, write_diagonal, write_spectra
from ooc_influence.curvature.staleness import Change
from ooc_influence.curvature.sums import Summing
from ooc_influence.errors import InputError
from ooc_influence.linalg.backend import check_room, parse_device
from ooc_influence.memory import MemoryBudget, format_bytes, plan_block_rows
from ooc_influence.options import FisherOptions, FittingOptions, definitions, takes
from ooc_influence.parallel import check_workers, slots_per_process
from ooc_influence.store import GradientStore, PathLike, StorePath

logger = logging.getLogger("ooc_influence")


@takes(FisherOptions)
def fit_fisher(store: GradientStore | PathLike, **options: Unpack[FisherOptions]) -> Curvature:
    """Compute and factorise the Fisher matrix of a store, and save it there as ``curvature/<name>``.

    A fit that was interrupted continues where it was. One whose rows are still there adds rows appended since and
    subtracts rows dropped since; where those carry more than half of the trace it starts again.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k).
    **options : FisherOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Curvature
        Undamped F, its eigenvalues (k,) or (rank,) and eigenvectors.

    Raises
    ------
    InputError
        For a store without live rows, or rows, weights, blocks or a rank that do not fit it.
    MemoryBudgetError
        If the budget does not hold the matrices.
    StoreBusyError
        If F does not fit memory and another process is summing it on disk at the moment.
    StoreExistsError
        If something else than this store's curvature is there.
    StoreDamagedError
        If a committed chunk is missing or short.
    """
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    warn_if_unfinished(train)
    slots, device = check_workers(options["workers"]), parse_device(options["device"])
    blocks, rank = options["blocks"], options["rank"]
    if device is not None and blocks == "diagonal":
        raise InputError(f"expected no device with blocks='diagonal'; received {device!r}: reading takes all the time")
    ranges = _parse_blocks(train, blocks, rank)
    name = options["name"]
    target = fit_target(train, "default" if name is None else name, options["out"])
    chosen = choose_rows(train, options)
    found = None if options["refit"] else fitted(target, train)
    kind = "top" if rank is not None else "whole" if blocks == "module" and len(ranges) == 1 else blocks or "whole"
    change = None if found is None else what_changed(found, chosen, kind)
    settings = {
        "rows": chosen.digest(), "ranges": ranges, "kind": kind,
        "since": None if change is None or found is None else found.attrs["fit"],
    }  # fmt: skip
    earlier = found if change is not None else None
    rows = _RowsToSum(chosen, ranges, earlier, change, slots, device)
    way = _choose_way(rows, kind, rank, options["memory"], kept_groups(target, settings))
    if found is not None and change is not None and change.nothing and found.attrs.get("rank") == rank:
        logger.info("%s is up to date", target)
        return found
    with ClaimedOutput(target, settings) as partial:
        sampled = options["sample"] is not None
        how = Summing(train, ranges, way.block_rows, kind == "diagonal", sampled, partial, device)
        fit = Fitting(target, chosen, how, slots, options["progress"], partial, earlier, change)
        if rank is None:
            _fit_square(fit, kind)
        else:
            fit_top(fit, way, rank, options["seed"])
    return reopen(target)


class _RowsToSum(NamedTuple):
    """The rows of a fit, the columns of its blocks, the fit to update and the rows that changed since, and where."""

    chosen: ChosenRows
    ranges: Sequence[Range]
    earlier: Curvature | None
    change: Change | None
    slots: int
    device: str | None


def _choose_way(
    rows: _RowsToSum, kind: str, rank: int | None, memory: int | str | None, results: Mapping[str, StorePath]
) -> LowRankPlan:
    """Return how to fit within the budget; ``results`` are those of earlier runs, which the solver should use."""
    chosen, ranges, earlier, change, slots, device = rows
    train, shared = chosen.store, slots_per_process(slots)
    update = change is not None and bool(len(change.removed))
    need = fisher_memory(
        train.k, shared, train.reading_bytes, ranges=ranges, rows=chosen.small_bytes, update=change is not None
    )
    if kind == "diagonal":
        need = diagonal_need(train.k, train.reading_bytes, rows=chosen.small_bytes)
        return LowRankPlan(kind, need, plan_block_rows(need, memory, shared), 0.0, 0.0, 0.0)
    row_bytes, changed = train.layout.encoding.row_bytes, chosen.count
    sent = 0 if device is None else 4 * row_bytes  # two blocks in flight, and their copies where the device is the host
    need = replace(need, per_row=need.per_row + sent)
    if isinstance(earlier, SummedCurvature) and earlier.keeps_sums and change is not None:
        added = 0 if change.added is None else change.added[1] - change.added[0]
        changed = added + len(change.removed)
    shapes = Shapes(train.k, chosen.count, changed, row_bytes, shared, train.reading_bytes, chosen.small_bytes, sent)
    priced = FitShapes.of(chosen)
    if rank is not None:
        check_rank(shapes, rank)
        way = plan_low_rank(shapes, rank, need, memory, priced.rank_ways, update=update, prefer=usable_ways(results))
    else:
        need = replace(need, alternatives=priced.fisher_alternatives if len(ranges) == 1 else priced.block_ways)
        way = LowRankPlan("whole", need, plan_block_rows(need, memory, shared), 0.0, 0.0, 0.0)
    if device is not None:
        check_room(
            device, shared * way.need.per_worker + way.block_rows * shared * (2 * row_bytes + 4 * train.k), need.stage
        )
    return way


def _fit_square(fit: Fitting, kind: str) -> None:
    """Sum, factorise and write."""
    began = time.monotonic()
    total, taken = fit.sums()
    how = fit.how
    attributes = fit.attributes(total.live, total.clipped, total.trace(), taken)
    attributes["kind"] = kind
    if how.fourth:
        norm = sum(squared_norm(square) for square in total.squares)
        attributes["sampling_error"] = fit.chosen.sampling_error(total.live, total.fourth, norm)

    def write(group: Any) -> Mapping[str, Any]:
        fit.write_record(group)
        if kind == "diagonal":
            write_diagonal(group, total)
        else:
            write_spectra(group, kind, total)
        return {"seconds": time.monotonic() - began}

    write_curvature(fit.target, attributes, write)


def _parse_blocks(train: GradientStore, blocks: str | None, rank: int | None) -> tuple[Range, ...]:
    if blocks is None:
        return ((0, train.k),)
    if rank is not None:
        raise InputError(
            f"expected blocks or rank; received both, blocks={blocks!r} and rank={rank}: a rank is of the whole Fisher "
            "matrix, and blocks are factorised whole"
        )
    if blocks == "diagonal":
        return ((0, train.k),)
    if blocks != "module":
        raise InputError(f"expected blocks 'module', 'diagonal' or none; received {blocks!r}")
    if train.is_reduced:
        raise InputError(
            f"expected a store of kept entries for blocks='module'; received {train.path}, whose columns are reduced: "
            "fit the whole"
        )
    return module_ranges(train)


Method = Literal["auto", "primal", "dual"]
_PRIMAL_ONLY = ("blocks", "rank")


def choose_method(rows: int, k: int) -> Literal["primal", "dual"]:
    """Return the cheaper method: ``"dual"`` for fewer rows than columns, else ``"primal"``."""
    return "dual" if rows < k else "primal"


@takes(FisherOptions)
def fit_curvature(
    store: GradientStore | PathLike, *, method: Method = "auto", **options: Unpack[FisherOptions]
) -> Curvature:
    """Fit the curvature of a store by the cheaper method, and save it there.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k).
    method : {"auto", "primal", "dual"}
        The Fisher matrix (:func:`fit_fisher`), or the rows' Gram matrix (:func:`fit_gram`). By default the smaller one:
        dual where fewer rows are chosen than there are columns; the other where only that fits the budget; and primal
        where ``blocks`` or ``rank`` is given.
    **options : FisherOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Curvature
        As from these.

    Raises
    ------
    InputError
        For another method, or one that does not have an option given.
    MemoryBudgetError, StoreExistsError, StoreDamagedError
        As for these.
    """
    if method not in get_args(Method):
        raise InputError(f"expected method 'auto', 'primal' or 'dual'; received {method!r}")
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    primal = [option for option in _PRIMAL_ONLY if options.get(option) is not None]
    if method == "auto":
        method = "primal" if primal or not train.n else _cheaper_method(train, options)
    if method == "primal":
        return fit_fisher(train, **options)
    if primal:
        raise InputError(f"expected method='primal' for {' and '.join(primal)}; received method='dual'")
    shared: Any = {name: options[name] for name in definitions(FittingOptions)}  # type: ignore[literal-required]
    return fit_gram(train, **shared)


def _cheaper_method(train: GradientStore, options: FisherOptions) -> Literal["primal", "dual"]:
    """Return the method of the smaller matrix, or the other one where only that fits the budget."""
    chosen = choose_rows(train, {"rows": options["rows"], "sample": options["sample"], "seed": options["seed"]})
    cheaper = choose_method(chosen.count, train.k)
    room, shapes = MemoryBudget.of(options["memory"]), FitShapes.of(chosen)
    needs = {"dual": shapes.gram, "primal": fisher_memory(train.k, 1, train.reading_bytes, rows=chosen.small_bytes)}
    other: Literal["primal", "dual"] = "primal" if cheaper == "dual" else "dual"
    if not room.fits(needs[cheaper]) and room.fits(needs[other]):
        logger.info(
            "the %s method needs %s, which the budget does not hold: the %s method is taken",
            cheaper, format_bytes(room.price(needs[cheaper])), other,
        )  # fmt: skip
        return other
    return cheaper

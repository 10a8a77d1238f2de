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
from typing import Any, Literal

import numpy.typing as npt

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
from ooc_influence.linalg import Weighting
from ooc_influence.linalg.backend import check_room, parse_device
from ooc_influence.memory import MemoryBudget, format_bytes, plan_block_rows
from ooc_influence.parallel import check_workers, slots_per_process
from ooc_influence.store import GradientStore, PathLike, StorePath

logger = logging.getLogger("ooc_influence")
Blocks = Literal["module", "diagonal"]


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
    rank: int | None = None,
    device: str | None = None,
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
        a share of its Frobenius norm, is recorded. A subspace iteration starts from the same seed.
    weights : {"ggn", "trak"} or (n,) array, optional
        w; by default 1. The named ones follow from the rows' losses (:mod:`ooc_influence.linalg.rows`).
    force_weights : bool
        Take named weights although the store does not say that its losses are one-label cross-entropy.
    blocks : {"module", "diagonal"}, optional
        In place of the whole, one Fisher matrix for each module's columns, with a spectrum and a λ of its own; or the
        diagonal only, which is all there is to F in a rotated store (:mod:`ooc_influence.curvature.spectral`).
    rank : int, optional
        Find and keep the top ``rank`` eigenpairs only, by the quickest way that fits the budget
        (:mod:`ooc_influence.curvature.costs`): any number of columns fits. The rest of the trace counts as spread
        evenly over the other directions.
    device : str, optional
        Multiply rows there, such as ``"cuda"``, with copies beside; by default NumPy's or SciPy's BLAS.
    workers : int, optional
        Row stripes worked on at once; by default one with all cores, or the slots of the ambient Dask cluster.
    memory : int or str, optional
        Budget for the process, such as ``"4GiB"``; by default half of what is free.
    progress : bool, optional
        Show a progress line; silent by default.

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
    slots, device = check_workers(workers), parse_device(device)
    if device is not None and blocks == "diagonal":
        raise InputError(f"expected no device with blocks='diagonal'; received {device!r}: reading takes all the time")
    ranges = _parse_blocks(train, blocks, rank)
    target = fit_target(train, name, out)
    chosen = choose_rows(train, rows, sample, seed, weights, force_weights=force_weights)
    found = None if refit else fitted(target, train)
    kind = "top" if rank is not None else "whole" if blocks == "module" and len(ranges) == 1 else blocks or "whole"
    change = None if found is None else what_changed(found, chosen, kind)
    settings = {
        "rows": chosen.digest(), "ranges": ranges, "kind": kind,
        "since": None if change is None or found is None else found.attrs["fit"],
    }  # fmt: skip
    earlier = found if change is not None else None
    way = _choose_way(chosen, kind, ranges, rank, earlier, change, slots, memory, device, kept_groups(target, settings))
    if found is not None and change is not None and change.nothing and found.attrs.get("rank") == rank:
        logger.info("%s is up to date", target)
        return found
    with ClaimedOutput(target, settings) as partial:
        how = Summing(train, ranges, way.block_rows, kind == "diagonal", sample is not None, partial, device)
        fit = Fitting(target, chosen, how, slots, progress, partial, earlier, change)
        if rank is None:
            _fit_square(fit, kind)
        else:
            fit_top(fit, way, rank, seed)
    return reopen(target)


def _choose_way(
    chosen: ChosenRows,
    kind: str,
    ranges: Sequence[Range],
    rank: int | None,
    old: Curvature | None,
    change: Change | None,
    slots: int,
    memory: int | str | None,
    device: str | None,
    results: Mapping[str, StorePath],
) -> LowRankPlan:
    """Return how to fit within the budget; ``results`` are those of earlier runs, which the way should use."""
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
    if isinstance(old, SummedCurvature) and old.keeps_sums and change is not None:
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


Side = Literal["auto", "fisher", "gram"]
_OF_FISHER = ("blocks", "rank")  # options that only F has


def choose_side(rows: int, k: int) -> Literal["fisher", "gram"]:
    """Return which side is cheaper: ``"gram"`` for fewer rows than columns, else ``"fisher"``."""
    return "gram" if rows < k else "fisher"


def fit_curvature(store: GradientStore | PathLike, *, side: Side = "auto", **options: Any) -> Curvature:
    """Fit the curvature of a store by the cheaper side, and save it there.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k).
    side : {"auto", "fisher", "gram"}
        By :func:`fit_fisher` or :func:`fit_gram`. By default the smaller matrix: the Gram side where fewer rows are
        chosen than there are columns; the other one where only that fits the budget; and Fisher where an option is
        given that only it has, such as ``blocks``.
    **options
        Those of :func:`fit_fisher` and :func:`fit_gram`: ``rows``, ``sample``, ``weights``, ``memory``, ... The name
        in the store is by default ``"default"``, or ``"gram"``; scores find either.

    Returns
    -------
    Curvature
        As from these.

    Raises
    ------
    InputError
        For another side, or one that does not have an option given.
    MemoryBudgetError, StoreExistsError, StoreDamagedError
        As for these.
    """
    if side not in ("auto", "fisher", "gram"):
        raise InputError(f"expected side 'auto', 'fisher' or 'gram'; received {side!r}")
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    asked = [option for option in _OF_FISHER if options.get(option) is not None]
    if side == "auto":
        side = "fisher" if asked or not train.n else _cheaper_side(train, options)
    given = {option: value for option, value in options.items() if value is not None or option not in _OF_FISHER}
    if given.get("name", "") is None:
        del given["name"]
    if side == "fisher":
        return fit_fisher(train, **given)
    if asked:
        raise InputError(f"expected side='fisher' for {', '.join(asked)}; received side='gram': F only has that")
    return fit_gram(train, **given)


def _cheaper_side(train: GradientStore, options: dict[str, Any]) -> Literal["fisher", "gram"]:
    """Return the side of the smaller matrix, or the other one where only that fits the budget."""
    chosen = choose_rows(train, options.get("rows"), options.get("sample"), options.get("seed", 0))
    cheaper = choose_side(chosen.count, train.k)
    room, shapes = MemoryBudget.of(options.get("memory")), FitShapes.of(chosen)
    needs = {"gram": shapes.gram, "fisher": fisher_memory(train.k, 1, train.reading_bytes, rows=chosen.small_bytes)}
    other: Literal["fisher", "gram"] = "fisher" if cheaper == "gram" else "gram"
    if not room.fits(needs[cheaper]) and room.fits(needs[other]):
        logger.info(
            "the %s side needs %s, which the budget does not hold: the %s side is taken",
            cheaper, format_bytes(room.price(needs[cheaper])), other,
        )  # fmt: skip
        return other
    return cheaper

"""Fits of the curvature F = (1/m) Σ w_i g_i g_iᵀ over m live rows of a store: by F itself or by the Gram matrix.

The primal method sums F, (k, k), striped over rows (:mod:`.sums`), then factorises it in float64. The undamped sum is
kept: rows appended since are added to it, rows dropped since are subtracted, without reading the others. Memory: 12 k²
bytes a worker and a block of rows; 24 k² for the factorisation; nothing that grows with n. Where that is too much, the
r largest eigenpairs (:mod:`.low_rank`). The dual method factorises the Gram matrix, (m, m) (:mod:`.dual`). In a
Kronecker basis (:mod:`.kronecker`) squares are enough.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Unpack, cast, get_args

import numpy as np
import zarr

from ooc_influence.checkpoint import ClaimedOutput, kept_groups
from ooc_influence.curvature.costs import (
    LowRankPlan,
    check_rank,
    choose_method,
    diagonal_memory,
    fisher_memory,
    fit_size,
    gram_memory,
    kernel_memory,
    largest_rank,
    module_ranges,
    plan_low_rank,
)
from ooc_influence.curvature.curvature import (
    DIAGONAL,
    Curvature,
    check_replaceable,
    curvature_path,
    write_curvature,
)
from ooc_influence.curvature.dual import GramFit, Multiplying, device_bytes, multiply_on_disk
from ooc_influence.curvature.eigen import row_slabs, vectors_name, write_long, write_vectors
from ooc_influence.curvature.kronecker import (
    PRIOR,
    KroneckerPrior,
    column_weights,
    has_prior,
    has_sampled_labels,
    layer_moments,
    measured_means,
)
from ooc_influence.curvature.low_rank import fit_low_rank
from ooc_influence.curvature.primal import Fitting, squared_norm, usable_plans
from ooc_influence.curvature.prior import parse_prior
from ooc_influence.curvature.rows import Staleness, choose_rows
from ooc_influence.curvature.sums import Summing, Sums, write_sum
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    StaleCurvatureError,
    StoreDamagedError,
    StoreExistsError,
    warn,
)
from ooc_influence.linalg import (
    Matrix,
    Range,
    WeightedRows,
    check_device_memory,
    kronecker_dampings,
    mirror,
    parse_device,
    symmetric_eigen,
)
from ooc_influence.memory import MemoryBudget, ProblemSize, format_bytes
from ooc_influence.options import FisherOptions, FittingOptions, KeptOptions, RowOptions, select, takes
from ooc_influence.parallel import check_workers, slots_per_process
from ooc_influence.store import (
    GradientStore,
    PathLike,
    StorePath,
    as_store,
    check_has_rows,
    check_second_moments,
    parse_path,
)

logger = logging.getLogger("ooc_influence")
Method = Literal["auto", "primal", "dual", "kronecker"]
_PRIMAL_ONLY = ("blocks", "rank")
_EVERY_ROW = {"kind": "range", "start": 0, "stop": None}
_NEAR = 0.9  # of what rows and columns can span: a d(λ) beyond that is worth a warning


class _Call(NamedTuple):
    """A checked call of a fit.

    Attributes
    ----------
    target : StorePath
        Where the curvature is to be saved.
    chosen : WeightedRows
        The rows.
    slots : int
        Tasks at once.
    device : str or None
        Where rows are multiplied.
    earlier : Curvature or None
        The store's curvature that is there.
    staleness : Staleness or None
        How its rows have changed; None where it is of no use.
    """

    target: StorePath
    chosen: WeightedRows
    slots: int
    device: str | None
    earlier: Curvature | None
    staleness: Staleness | None

    @classmethod
    def open(cls, train: GradientStore, options: KeptOptions | FittingOptions, name: str, kind: str) -> _Call:
        """Check a call's arguments; ``name`` is the curvature's where they give none."""
        planned = train.layout.planned_rows or train.committed
        if train.n < planned:
            warn(f"{train.path} holds {train.n} of {planned} rows without a gap: the fit covers those")
        slots, out = check_workers(options["workers"]), options["out"]
        device = parse_device(cast("str | None", options.get("device")))
        named = name if options["name"] is None else options["name"]
        if out is None and named == PRIOR and has_prior(train):
            raise InputError(f"expected another name than {PRIOR!r}, which is that of the basis itself; received it")
        target = parse_path(out) if out is not None else curvature_path(train, named)
        check_replaceable(target)
        check_has_rows(train)
        check_second_moments(train)
        chosen = replace(choose_rows(train, options), whitening=parse_prior(train, cast(FittingOptions, options)))
        earlier = None if options["refit"] else _fitted(target, train)
        staleness = None if earlier is None else fit_staleness(earlier, chosen, kind)
        return cls(target, chosen, slots, device, earlier, staleness)

    @property
    def size(self) -> ProblemSize:
        """The size of the fit."""
        return fit_size(self.chosen, slots_per_process(self.slots), device=self.device is not None)

    @property
    def is_current(self) -> bool:
        """Whether the earlier curvature is of the same rows as they are."""
        return self.staleness is not None and self.staleness.is_fresh


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
    train = as_store(store)
    if options["prior"] is None or options["blocks"] is not None or options["rank"] is not None:
        return _fit_primal(train, options)
    method, options = _by_price(train, options)
    return _fit_dual(train, options, "default") if method == "dual" else _fit_primal(train, options)


def _fit_primal(train: GradientStore, options: FisherOptions) -> Curvature:
    """Fit by the sums over rows."""
    blocks, rank = options["blocks"], options["rank"]
    if options["device"] is not None and blocks == "diagonal":
        raise InputError(
            f"expected no device with blocks='diagonal'; received {options['device']!r}: reading takes all the time"
        )
    ranges = _parse_blocks(train, blocks, rank)
    kind = "top" if rank is not None else "whole" if blocks == "module" and len(ranges) == 1 else blocks or "whole"
    return _fit_sums(train, options, kind, ranges, rank, options["seed"])


def _fit_sums(
    train: GradientStore, options: KeptOptions, kind: str, ranges: tuple[Range, ...], rank: int | None, seed: int
) -> Curvature:
    """Fit what is made of sums over rows, from those of an earlier fit where there is one."""
    call = _Call.open(train, options, "default", kind)
    target, memory = call.target, options["memory"]
    since = None if call.staleness is None or call.earlier is None else call.earlier.attrs["fit"]
    settings = {"rows": call.chosen.digest(), "ranges": ranges, "kind": kind, "since": since}
    plan = _choose_plan(call, kind, ranges, rank, memory, kept_groups(target, settings))
    if call.earlier is not None and call.is_current and call.earlier.attrs.get("rank") == rank:
        logger.info("%s is up to date", target)
        return call.earlier
    earlier = None if call.staleness is None else call.earlier
    with ClaimedOutput(target, settings) as partial:
        sampled = options["sample"] is not None
        how = Summing(train, ranges, plan.block_rows, kind in DIAGONAL, sampled, partial, call.device)
        fit = Fitting(target, call.chosen, how, call.slots, options["progress"], partial, earlier, call.staleness)
        if rank is None:
            _fit_square(fit, kind)
        else:
            fit_low_rank(fit, plan, rank, seed)
    return _reopened(target)


@takes(KeptOptions)
def fit_kronecker(store: GradientStore | PathLike, **options: Unpack[KeptOptions]) -> Curvature:
    """Measure Λ of a store in a Kronecker basis from all its rows, and save it there as ``curvature/<name>``.

    Such a store has a curvature of Λ from its pilot, ``curvature="kronecker"``, which needs no fit; this one is of as
    many rows as the store has: Λ_e = (1/m) Σ w z_e² π_e, in one pass at the speed of reading, with k numbers in memory.
    It can be made of a store of sampled labels and used for another one with the same mask. Interrupted, and with rows
    appended or dropped since, it continues as :func:`fit_fisher` does. λ is relative to the mean Λ of each layer, or of
    the model, as the basis says.

    Parameters
    ----------
    store : GradientStore or path
        (n, k), whose entries are in a Kronecker basis, not reduced.
    **options : KeptOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Curvature
        Of kind ``kronecker``; eigenvalues Λ (k,) in columns' order.

    Raises
    ------
    InputError
        For a store of another basis, without live rows, or rows or weights that do not fit it.
    MemoryBudgetError, StoreExistsError, StoreDamagedError
        As for :func:`fit_fisher`.
    """
    train = as_store(store)
    return _fit_sums(train, options, "kronecker", layer_moments(train).ranges, None, options["seed"])


def _choose_plan(
    call: _Call, kind: str, ranges: Sequence[Range], rank: int | None, memory: int | str | None,
    results: Mapping[str, StorePath],
) -> LowRankPlan:  # fmt: skip
    """Return how to fit within the budget, preferably by a plan that can use the ``results`` of earlier runs."""
    staleness, budget, size = call.staleness, MemoryBudget.of(memory), call.size
    if kind in DIAGONAL:
        model = diagonal_memory(size)
        return LowRankPlan(kind, model, budget.plan(model))
    if rank is not None:
        check_rank(size, rank)
        new_rows = None
        if call.earlier is not None and call.earlier.keeps_sums and staleness is not None:
            added = 0 if staleness.added is None else staleness.added[1] - staleness.added[0]
            new_rows = added + len(staleness.removed)
        plan = plan_low_rank(
            size, rank, budget, usable_plans(results), new_rows=new_rows, updating=staleness is not None,
            subtracting=staleness is not None and bool(len(staleness.removed)),
        )  # fmt: skip
    else:
        model = fisher_memory(size, ranges=ranges, updating=staleness is not None)
        plan = LowRankPlan("whole", model, budget.plan(model))
    if call.device is not None:
        block_bytes = plan.block_rows * (2 * size.row_bytes + 4 * size.k)
        check_device_memory(call.device, size.workers * (plan.model.per_worker + block_bytes), plan.model.stage)
    return plan


def _fit_square(fit: Fitting, kind: str) -> None:
    """Sum, factorise and write."""
    began = time.monotonic()
    total, subtracted = fit.sums()
    attributes = fit.attributes(total.live, total.clipped, total.trace(), subtracted)
    attributes["kind"] = kind
    if fit.how.fourth:
        norm = sum(squared_norm(square) for square in total.squares)
        attributes["sampling_error"] = fit.chosen.sampling_error(total.live, total.fourth, norm)
    if kind == "kronecker":
        attributes |= kronecker_dampings(fit.chosen.store)

    def write(group: Any) -> Mapping[str, Any]:
        fit.record.write(group)
        spectra = _write_spectra(group, kind, total)
        facts = {"seconds": time.monotonic() - began}
        if kind == "kronecker":
            spectra = spectra / np.square(column_weights(fit.chosen.store))
            facts["means"] = measured_means(fit.chosen.store, spectra).tolist()
        write_long(group, "eigenvalues", spectra)
        return facts

    write_curvature(fit.target, attributes, write)


def _write_spectra(group: Any, kind: str, total: Sums) -> Matrix:
    """Write sums and their eigenvectors into a group, return their spectra; the sums, upper triangles, are used up."""
    spectra = []
    for number in range(len(total.squares)):
        square = total.squares[number]
        total.squares[number] = np.empty((0, 0))
        write_sum(group, number, square)
        square /= total.live
        if kind in DIAGONAL:
            spectra.append(square)
            continue
        mirror(square)
        values, vectors = symmetric_eigen(square)
        spectra.append(values)
        write_vectors(group, vectors_name(kind, number), vectors.shape, row_slabs(vectors))
    return np.concatenate(spectra)


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
    return _fit_dual(as_store(store), options, "gram")


def _fit_dual(train: GradientStore, options: FittingOptions, name: str) -> Curvature:
    """Fit by the Gram matrix of the rows."""
    call = _Call.open(train, options, name, "gram")
    if call.earlier is not None and call.is_current:
        logger.info("%s is up to date", call.target)
        return call.earlier
    chosen, workers, budget = call.chosen, call.size.workers, MemoryBudget.of(options["memory"])
    model = gram_memory(call.size)
    if call.device is not None:
        check_device_memory(call.device, workers * device_bytes(chosen, model.max_rows), model.stage)
    block_rows = budget.plan(model)
    free = budget.limit - model.peak(block_rows, budget.reserved)
    GramFit(chosen, call.target, call.slots, block_rows, free // workers, options["progress"], call.device).run()
    return _reopened(call.target)


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
    train, slots = as_store(store), check_workers(options["workers"])
    check_has_rows(train)
    check_second_moments(train)
    chosen = choose_rows(train, options)
    model = kernel_memory(fit_size(chosen, slots_per_process(slots)))
    how = Multiplying(chosen, MemoryBudget.of(options["memory"]).plan(model), parse_path(out))
    facts = {"store": str(train.path), "weights": chosen.record(), "selection": dict(chosen.selection)}
    return multiply_on_disk(how, slots, options["progress"], chosen.digest(), facts)


@takes(FisherOptions)
def fit_curvature(
    store: GradientStore | PathLike, *, method: Method = "auto", **options: Unpack[FisherOptions]
) -> Curvature:
    """Fit the curvature of a store by the method that suits it and costs least, and save it there.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k), or one of rows with sampled labels.
    method : {"auto", "primal", "dual", "kronecker"}
        The Fisher matrix (:func:`fit_fisher`), the rows' Gram matrix (:func:`fit_gram`), or Λ in a Kronecker basis
        (:func:`fit_kronecker`). By default, of a store in a Kronecker basis, the last (where its columns are reduced
        in whitened ones, the identity, which needs no fit); where its rows are of sampled labels, the rows above that
        prior. Otherwise, and where ``blocks``, ``rank`` or ``prior`` is given, by memory
        and time: of primal and dual the quicker one that fits the budget; where neither does, as many of the largest
        eigenvalues as fit.
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
        raise InputError(f"expected method 'auto', 'primal', 'dual' or 'kronecker'; received {method!r}")
    train = as_store(store)
    chosen: str = method
    if method == "auto":
        chosen, options = _choose_method(train, options)
        if chosen == "kronecker" and train.is_reduced:
            return KroneckerPrior(train)
    if chosen == "primal":
        return _fit_primal(train, options)
    beyond = _PRIMAL_ONLY if chosen == "dual" else (*_PRIMAL_ONLY, "prior", "prior_damping", "shrinkage", "device")
    refused = [option for option in beyond if options.get(option) is not None]
    if refused:
        raise InputError(
            f"expected method='primal' for {' and '.join(refused)}; received method={chosen!r}: leave one of them out"
        )
    if chosen == "kronecker":
        return fit_kronecker(train, **select(KeptOptions, options))
    return _fit_dual(train, options, "gram" if method == "dual" and options["prior"] is None else "default")


def _choose_method(train: GradientStore, options: FisherOptions) -> tuple[str, FisherOptions]:
    """Return the method that suits a store and costs least, and the options with what that implies."""
    asked = any(options.get(option) is not None for option in (*_PRIMAL_ONLY, "prior"))
    if not asked and has_prior(train):
        if not has_sampled_labels(train):
            what = "it is the identity of whitened columns" if train.is_reduced else "measuring it again of all rows"
            logger.info("%s is in a Kronecker basis, whose curvature %r needs no fit: %s", train.path, PRIOR, what)
            return "kronecker", options
        logger.info("fitting the sampled-label rows of %s above the prior of their Kronecker basis", train.path)
        options = {**options, "prior": PRIOR}
    return _by_price(train, options)


def _by_price(train: GradientStore, options: FisherOptions) -> tuple[Literal["primal", "dual"], FisherOptions]:
    """Return the quicker method that fits the budget; where none does, low rank with as many eigenvalues as do."""
    if not train.n or any(options.get(option) is not None for option in _PRIMAL_ONLY):
        return "primal", options
    chosen = choose_rows(train, {**select(RowOptions, options), "weights": None})
    budget, size = MemoryBudget.of(options["memory"]), fit_size(chosen)
    models = {"dual": gram_memory(size), "primal": fisher_memory(size)}
    cheaper = choose_method(chosen.count, train.k)
    fitting = [method for method in (cheaper, *models) if budget.fits(models[method])]
    rank = 0 if fitting else largest_rank(size, budget)
    if not fitting and not rank:
        return cheaper, options
    method: Literal["primal", "dual"] = "dual" if fitting[:1] == ["dual"] else "primal"
    if method != cheaper or rank:
        logger.info(
            "the %s method needs %s, which exceeds the budget: fitting by the %s method%s",
            cheaper, format_bytes(budget.price(models[cheaper])), method, f" with rank {rank}" if rank else "",
        )  # fmt: skip
    return method, {**options, "rank": rank} if rank else options


def _fitted(target: StorePath, train: GradientStore) -> Curvature | None:
    """Return this store's curvature at ``target``, if there is one."""
    try:
        curvature = Curvature.open(target)
    except (CurvatureNotFoundError, StaleCurvatureError):
        return None
    with contextlib.suppress(StaleCurvatureError):
        curvature.check(train)
    if curvature.attrs["store_id"] != train.identity:
        raise StoreExistsError(
            f"expected a curvature of {train.path} or nothing at {target}; received one of another store: choose "
            "another path, or refit to replace it"
        )
    return curvature


def fit_staleness(earlier: Curvature, chosen: WeightedRows, kind: str) -> Staleness | None:
    """Return how the rows of an earlier fit have changed; None where a new fit cannot start from it."""
    count = min(chosen.count, int(earlier.attrs.get("count", chosen.count)))
    same = (
        earlier.kind == kind
        and earlier.attrs.get("selection", _EVERY_ROW) == chosen.selection
        and (earlier.attrs.get("weights") or {}) == chosen.part(0, count).record()
        and earlier.attrs.get("prior") == (None if chosen.whitening is None else chosen.whitening.facts)
    )
    if not same:
        logger.info("%s was fitted with other rows, weights, blocks, rank or prior: fitting again", earlier.path)
        return None
    staleness = earlier.staleness(chosen.store, chosen)
    if staleness.refit:
        logger.info("%s: %s since it was fitted: fitting again", earlier.path, staleness.refit)
        return None
    return staleness


def _reopened(path: StorePath) -> Curvature:
    """Open what was just written, and warn of its effective dimension."""
    for _ in range(10):  # another fit may be replacing this one at this moment: theirs is as good
        with contextlib.suppress(CurvatureNotFoundError, StaleCurvatureError, StoreDamagedError, FileNotFoundError):
            curvature = Curvature.open(path)
            _warn_of_dimension(curvature)
            return curvature
        time.sleep(0.01)
    return Curvature.open(path)


def _warn_of_dimension(curvature: Curvature) -> None:
    """Warn where the default damping leaves nearly as many directions as there are rows or columns."""
    if curvature.trace <= 0 or curvature.kind in DIAGONAL or curvature.has_prior:  # of full rank however few the rows
        return
    dimension = curvature.least_dimension(curvature.lambdas()[0])
    if dimension <= _NEAR * sum(block.dimension for block in curvature.blocks):
        return
    near, more = f"the {curvature.d} stored columns", "columns"
    if curvature.rows < curvature.d:
        near, more = f"the {curvature.rows} rows it was fitted on", "rows"
    warn(
        f"{curvature.path} has an effective dimension of {dimension:.1f} at the default damping, close to what {near} "
        f"can span: use more {more} or more damping"
    )

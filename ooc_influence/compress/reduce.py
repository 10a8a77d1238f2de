"""Reduction as a second pass: the rows of a wide store times M, in a new store.

M (k', r) is the eigenbasis of the wide rows' Fisher matrix (of whitened rows, in a Kronecker basis), as
:class:`Eigenbasis` makes it at extraction; or, for a query store, that of its train store. An already reduced store can
be *rotated* into the eigenbasis R of the F of all its own rows: its basis V becomes V R, its rows z become z R, and
what is outside the span of V stays outside. How much that is follows from tr(F) of the masked rows, the mean of their
squared norms, which every store has.

The new store is made, with its basis, before its rows: a pass that was killed resumes with the same basis.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.compressor import Eigenbasis
from ooc_influence.compress.eigenbasis import (
    ALL_ROWS,
    ROWS_FOR_EACH,
    RetainedEnergy,
    basis_weights,
    even_ranges,
    fill,
    fill_memory,
    fit_eigenbasis,
)
from ooc_influence.compress.residuals import RESIDUALS
from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError
from ooc_influence.fingerprint import check_same, check_same_rows
from ooc_influence.linalg import Floats, LayerMoments, WeightedRows, parse_weighting, row_weights, storage_scale
from ooc_influence.memory import PRODUCT_ROWS, MemoryBudget, MemoryModel
from ooc_influence.options import ReduceOptions, Striped, Weighting, select, takes
from ooc_influence.parallel import check_workers, slots_per_process
from ooc_influence.store import (
    GradientStore,
    PathLike,
    Representation,
    Storage,
    StoredReduction,
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

logger = logging.getLogger("ooc_influence")
_TURNED = 4096  # rows of bases multiplied in float64 at a time


@takes(ReduceOptions)
def reduce_store(
    wide: GradientStore | PathLike,
    out: PathLike,
    r: int | None = None,
    **options: Unpack[ReduceOptions],
) -> GradientStore:
    """Write the rows of a wide store in the largest directions of their eigenbasis to a new store, or resume.

    Losses, norms (of the wide rows), ids, columns and tombstones carry over; row numbers stay. Query stores can be
    extracted with ``like=`` the new store, or reduced with it. When rows were appended to the wide store since, the
    same call adds them in the same basis.

    Parameters
    ----------
    wide : GradientStore or path
        (n, k'), finished.
    out : path
        The store to make, (n, r).
    r : int, optional
        Numbers stored a row; default 1024, or fewer where there are fewer rows or entries. With ``rotate`` as many as
        there are, with ``like`` as it has.
    **options : ReduceOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading; (n, r). ``attrs["reduction"]["left_out"]`` is the share of the trace beyond r among the rows
        the basis is made from, ``attrs["measured"]["left_out"]`` among those reduced.

    Raises
    ------
    InputError
        For a store that is empty, not finished or reduced already, or more numbers than rows or entries.
    MismatchError
        If masks or models differ, or ``out`` is a store of something else.
    StoreExistsError
        If something else is at ``out``.
    MemoryBudgetError
        If the budget is too small.
    NonFiniteError
        If rows are too large for float32 sums.
    """
    return write_reduced(Job.parse(wide, r, options), out, options)


def write_reduced(job: Job, out: PathLike, options: ReduceOptions) -> GradientStore:
    """Write what a job asks for, or resume; see :func:`reduce_store`. ``options`` are complete."""
    path = parse_path(out)
    if path in (job.source.path, job.like and job.like.path):
        raise InputError(f"expected a path that is not one of the stores; received {out}: choose another path")
    means: dict[str, Any] = {**select(Striped, options)}
    dtype, storage = options["dtype"], options["storage"]
    target = _open_earlier(path, job, dtype, storage)
    if target is None:
        target = _create(path, job, dtype, storage, means)
    copy_tombstones(job.source, target)  # before the rows: none of them is ever seen as live
    retained = RetainedEnergy()
    if target.n < job.source.n:
        weighting = basis_weights(target.attrs, target.attrs["reduction"])
        retained = fill(job.source, target, turn(job.source, target), weighting, **means)
    _finish(path, job, retained)
    return GradientStore.open(path)


@dataclass(frozen=True)
class Job:
    """What is asked for, checked.

    Attributes
    ----------
    source : GradientStore
        What is reduced.
    like : GradientStore or None
        Whose basis to use.
    r, rows : int or None
        As asked.
    weights : {"ggn", "trak"} or None
        Of the rows that the basis is made from.
    rotate : bool
        Whether the source is reduced already, and its own basis is to be turned.
    sketch : bool
        Whether the new rows only find candidates for the source's: then a basis of some rows is enough.
    """

    source: GradientStore
    like: GradientStore | None
    r: int | None
    rows: int | None
    weights: Weighting | None
    rotate: bool
    sketch: bool = False

    @classmethod
    def parse(cls, wide: GradientStore | PathLike, r: int | None, options: ReduceOptions) -> Job:
        """Open what is a path and check that all of it belongs together."""
        like, rows, weights, rotate = options["like"], options["rows"], options["weights"], options["rotate"]
        source = as_store(wide)
        train = None if like is None else as_store(like)
        if train is not None and (r is not None or rows is not None or weights is not None or rotate):
            raise InputError("expected like= without r, rows, weights and rotate; received both: like fixes the basis")
        if rotate and rows is not None:
            raise InputError("expected rotate without rows; received both: it is the basis of the F of all rows")
        Eigenbasis(1 if r is None else r, rows, weights)  # the same checks
        check_finished(source)
        check_second_moments(source)
        job = cls(source, train, r, rows, parse_weighting(weights, source.attrs), rotate)
        if train is not None:
            job._check_like(train)
        reduction = (source.attrs.get("reduction") or {"name": "none"})["name"]
        if train is None and reduction != ("eigenbasis" if rotate else "none"):
            raise InputError(
                f"expected {'a store reduced to an eigenbasis' if rotate else 'a wide store'}; received {source.path}, "
                f"whose reduction is {reduction}: "
                + ("reduce it first" if reduction == "none" else "rotate=True (--rotate) turns an eigenbasis further")
            )
        return job

    def _check_like(self, train: GradientStore) -> None:
        source, facts = self.source, train.attrs.get("reduction") or {}
        if facts.get("name") != "eigenbasis":
            raise InputError(f"expected like= a store reduced to an eigenbasis; received {train.path}: reduce it first")
        if source.columns_digest == train.columns_digest:
            raise InputError(f"expected rows that differ from those of {train.path}; received some of the same basis")
        reduction = source.attrs.get("reduction")
        turned = reduction is not None and reduction["digest"] in facts.get("rotated_from", [])
        if source.mask_digest != train.mask_digest or not (reduction is None or turned):
            raise MismatchError(
                f"expected rows with the mask of {train.path}, wide or of the basis it was rotated from; received "
                f"{source.path}, which has another: extract it with like= (--like) the wide train store"
            )
        check_same(
            train.path, {"model": train.model_fingerprint}, {"model": source.model_fingerprint},
            "extract it with that model", other=source.path,
        )  # fmt: skip

    @property
    def record(self) -> dict[str, Any]:
        """What the new store records about its source, for the next run to check."""
        return {
            "source": self.source.identity,
            "rotate": self.rotate,
            "weights": self.weights,
            "like": None if self.like is None else self.like.columns_digest,
            "rows": self.rows,
            **({"residuals": True} if self.sketch else {}),
        }


def _open_earlier(path: StorePath, job: Job, dtype: str | None, storage: Storage | None) -> GradientStore | None:
    """Open the store of an earlier run to resume it, or refuse another one; None where nothing is there."""
    try:
        target = GradientStore.open(path, "a")
    except StoreNotFoundError:
        check_free(path, "a store or nothing")
        return None
    layout = target.layout
    made_with = target.attrs.get("reduced") or {}
    expected = {name: made_with.get(name) for name in ("source", "rotate", "weights", "like")}
    expected |= {"rows of the basis": made_with.get("rows"), "r": target.k, "dtype": layout.dtype, **layout.storage}
    received = {name: job.record[name] for name in ("source", "rotate", "weights", "like")}
    received |= {"rows of the basis": job.rows or made_with.get("rows"), "r": job.r or target.k}
    received |= {"dtype": dtype or layout.dtype, **(storage or Storage()).over(layout)}
    check_same(f"the store at {path}", expected, received, "reduce to another path, or remove the store")
    _check_same_rows(job.source, target)
    if target.n < job.source.n != target.layout.planned_rows:
        target.plan_rows(job.source.n)
    return target


def _check_same_rows(source: GradientStore, target: GradientStore) -> None:
    """Check that finished rows have the losses of the source: that it is still the same data."""
    step = target.layout.group_rows
    for start in range(0, target.n, step):
        stop = min(target.n, start + step)
        received = source.small("loss", min(start, source.n), min(stop, source.n))
        check_same_rows(
            target.path, start, {"losses": target.small("loss", start, stop)}, {"losses": received},
            f"the rows of {source.path} changed since; reduce to another path",
        )  # fmt: skip


def _create(
    path: StorePath, job: Job, dtype: str | None, storage: Storage | None, means: dict[str, Any]
) -> GradientStore:
    """Make the basis, and the empty store that has it."""
    source, basis_path, reduction = job.source, None, None
    representation = parse_representation(dtype or (source.layout.dtype if source.is_reduced else "float16"))
    if job.like is not None:
        _check_memory(job, job.like.k, means)
        like = GradientStore.open(job.like.path)  # opened again: an open store keeps what it reads in memory
        reduction, basis_path = like.reduction, like.basis_path
        attributes = {name: like.attrs.get(name) for name in ("compressor", "covered")}
    else:
        reduction, attributes = _make_basis(job, means)
    assert isinstance(reduction, StoredReduction)
    return create_like(
        source,
        path,
        [str(source.path)],
        dtype=representation,
        storage=_chunking(storage or Storage(), reduction.columns, representation, source.n),
        planned_rows=source.n,
        columns=source.layout.columns | ({RESIDUALS: "int64"} if job.sketch else {}),
        reduction=reduction if basis_path is None else {**reduction.facts, "path": basis_path},
        column_scale=storage_scale(representation, source.mask, reduction, attributes),
        attributes=attributes | {"reduced": job.record},
    )


def _chunking(storage: Storage, r: int, dtype: Representation, n: int) -> Storage:
    """Return how to lay out the new store: groups for many tasks, but each with enough rows to multiply at once."""
    rows = storage.chunk_rows or max(storage.sizes(r, dtype, n)[0], min(storage.sizes(r, dtype)[0], PRODUCT_ROWS))
    return replace(storage, chunk_rows=rows)


def _make_basis(job: Job, means: dict[str, Any]) -> tuple[StoredReduction, dict[str, Any]]:
    """Return the basis that the source's rows are to be written in, and what is recorded of it."""
    source = job.source
    most = source.k if job.rotate else Eigenbasis.r
    every = job.rotate and not job.sketch
    rows = None if every else job.rows or max(ALL_ROWS, ROWS_FOR_EACH * (job.r or most))
    live = WeightedRows.of(source, even_ranges(source.n, rows)).live
    r = job.r or min(most, source.k, max(1, live))
    _check_memory(job, r, means)
    basis = fit_eigenbasis(source, r, rows=rows, weights=job.weights, quickest=job.sketch, **means)
    settings = dict(source.attrs.get("compressor") or {})
    if job.rotate:
        basis = _compose(source, basis)
        settings["reduce"] = {**settings.get("reduce", {}), "r": r, "weights": job.weights}
    else:
        settings["reduce"] = Eigenbasis(r, job.rows, job.weights).to_dict()
    return basis, {"compressor": settings}


def _check_memory(job: Job, r: int, means: dict[str, Any]) -> None:
    """Check, before the basis is made, that there will be memory to use it."""
    source = job.source
    budget = MemoryBudget.of(means["memory"])
    size = source.problem_size(slots_per_process(check_workers(means["workers"])))
    budget.plan(fill_memory(size, r, fixed=4 * size.k * r, measured=job.sketch))
    reduction = source.attrs.get("reduction")
    if reduction is not None:
        entries = reduction["rows"]
        budget.plan(MemoryModel(f"rotating a basis of {entries} entries", 4 * entries * (size.k + r), 0, 0))


def _vectors(store: GradientStore) -> Floats:
    """Return a store's basis, without keeping it in the store."""
    reduction = GradientStore.open(store.path).reduction
    assert isinstance(reduction, StoredReduction)
    return reduction.vectors


def orthonormal(store: GradientStore) -> Floats:
    """Return a store's basis before whitening, V of M = D⁻¹V."""
    damping, vectors = store.attrs["reduction"].get("whitened"), _vectors(store)
    if damping is None:
        return vectors
    return np.asarray(vectors * LayerMoments.of(store.mask).scale(damping)[:, None], np.float32)


def _compose(source: GradientStore, turn: StoredReduction) -> StoredReduction:
    """Return the basis V R of masked rows, V the source's, with facts of all rows."""
    old = source.attrs["reduction"]
    whole = max(_trace(source, turn.facts["weights"]), turn.facts["trace"])
    facts = turn.facts | {
        "trace": whole,
        "left_out": max(0.0, 1 - float(turn.eigenvalues.sum()) / whole) if whole > 0 else 0.0,
        "span_rows": old.get("span_rows", old.get("pilot_rows")),
        "rotated_from": [*old.get("rotated_from", []), old["digest"]],
    }
    if "whitened" in old:
        facts["whitened"] = old["whitened"]
    kept = {name: value for name, value in facts.items() if name not in ("name", "rows", "columns", "digest")}
    return StoredReduction(_vectors(source) @ turn.vectors, turn.eigenvalues, turn.mean_square, kept)


def _trace(store: GradientStore, weights: Weighting | None) -> float:
    """Return tr(F) of the masked rows that a store's live rows are reductions of: from their norms."""
    total, rows = 0.0, 0
    for start in range(0, store.n, store.layout.group_rows):
        part = (start, min(store.n, start + store.layout.group_rows))
        live = ~store.small("dropped", *part) if store.has_dropped else np.ones(part[1] - start, np.bool_)
        norms = store.small("grad_norm", *part)[live].astype(np.float64)
        total += float(row_weights(store.small("loss", *part)[live], weights) @ np.square(norms))
        rows += int(live.sum())
    return total / max(1, rows)


def turn(source: GradientStore, target: GradientStore) -> Floats:
    """Return what source rows are multiplied by: the new basis, or its coordinates in the source's basis."""
    if not source.is_reduced:
        return _vectors(target)
    old, new = orthonormal(source), orthonormal(target)
    total: npt.NDArray[np.float64] = np.zeros((old.shape[1], new.shape[1]))
    for first in range(0, len(old), _TURNED):  # in float64: what is found again is the same but for its last bit
        total += old[first : first + _TURNED].T.astype(np.float64) @ new[first : first + _TURNED].astype(np.float64)
    return total.astype(np.float32)


def _finish(path: StorePath, job: Job, retained: RetainedEnergy) -> None:
    """Copy later tombstones, record what was measured, and let the store grow if its source does."""
    target = GradientStore.open(path, "a")
    copy_tombstones(job.source, target)
    share = retained.record(target)
    if retained.rows:
        logger.info("%s: %.2g of the trace of %d rows is left out", path, share.left_out, share.rows)
        if not job.sketch:
            share.warn(path)
    if job.source.layout.planned_rows is None:
        target.plan_rows(None)

"""Fits of the r largest eigenpairs of F: F ≈ V diag(e) Vᵀ + t (I − V Vᵀ), t the mean of the eigenvalues not kept.

The trace is known, and with it t = (tr F − Σ e)/(k − r).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ooc_influence.checkpoint import read_facts
from ooc_influence.curvature.costs import PASSES, LowRankPlan, fit_size, iteration_columns
from ooc_influence.curvature.curvature import write_curvature
from ooc_influence.curvature.eigen import row_slabs, slab_rows, write_long, write_vectors
from ooc_influence.curvature.primal import Fitting, squared_norm, sum_fourth, sum_tiles
from ooc_influence.curvature.sums import sum_name
from ooc_influence.errors import warn
from ooc_influence.linalg import (
    TOLERANCE,
    Eigenpairs,
    Floats,
    Matrix,
    TriangleTiles,
    mirror,
    multiply_rows,
    orthonormal_slabs,
    start_basis,
    subspace_iteration,
    symmetric_eigen,
)
from ooc_influence.progress import Progress
from ooc_influence.store import CHUNK_TARGET, array_store, create_array, open_group, read_part

logger = logging.getLogger("ooc_influence")
_BASIS = "basis"  # of partial results
_F = sum_name(0)


class _Solution(NamedTuple):
    """What is known of the sum that F is made of, and its largest eigenpairs.

    Attributes
    ----------
    live, clipped : int
        Rows that count, and those whose loss was clipped.
    trace, subtracted : float
        Of the undamped sum; what was subtracted from an earlier one.
    fourth, norm : float
        Σ‖x‖⁴, and the squared Frobenius norm of the undamped sum; NaN where not known.
    write : callable
        Writes the sum, where there is one, and the eigenvectors into a group; returns the eigenvalues and facts.
    """

    live: int
    clipped: int
    trace: float
    subtracted: float
    fourth: float
    norm: float
    write: Callable[[Any], tuple[Matrix, dict[str, Any]]]


def fit_low_rank(fit: Fitting, plan: LowRankPlan, rank: int, seed: int) -> None:
    """Compute the ``rank`` largest eigenpairs of F and write them to the target."""
    began = time.monotonic()
    if plan.name in ("whole", "sums"):
        solution = _by_sums(fit, rank, seed, exact=plan.name == "whole")
    else:
        solution = _by_tiles(fit, plan.tile, rank, seed) if plan.name == "tiles" else _by_rows(fit, rank, seed)
    live = solution.live
    attributes = fit.attributes(live, solution.clipped, solution.trace, solution.subtracted)
    trace, others = solution.trace / live, fit.chosen.store.k - rank
    attributes |= {"kind": "top", "rank": rank, "way": plan.name, "summed": plan.name != "rows"}

    def write(group: Any) -> Mapping[str, Any]:
        fit.record.write(group)
        values, facts = solution.write(group)
        write_long(group, "eigenvalues", values)
        tail = max(0.0, trace - float(values.sum())) if others else 0.0
        facts |= {"left_out": tail / trace if trace > 0 else 0.0, "rest": tail / others if others else 0.0}
        if fit.how.fourth:
            norm = solution.norm
            if np.isnan(norm):
                norm = (float(np.square(values).sum()) + (tail**2 / others if others else 0.0)) * live**2
            facts["sampling_error"] = fit.chosen.sampling_error(live, solution.fourth, norm)
        return facts | {"seconds": time.monotonic() - began}

    write_curvature(fit.target, attributes, write)


def _by_sums(fit: Fitting, rank: int, seed: int, *, exact: bool) -> _Solution:
    """Sum F in memory, then factorise it or multiply it there."""
    total, subtracted = fit.sums()
    (square,) = total.squares
    trace = total.trace()
    fit.check(total.live, trace)
    norm = squared_norm(square) if fit.how.fourth else float("nan")
    mirror(square)
    pairs = None if exact else _iterate(fit, rank, seed, lambda basis: _multiply_square(square, basis, total.live))

    def write(group: Any) -> tuple[Matrix, dict[str, Any]]:
        TriangleTiles.create(group, _F, len(square)).write_upper(square)
        if pairs is not None:
            return _write_pairs(group, pairs)
        np.divide(square, total.live, out=square)
        values, vectors = symmetric_eigen(square)
        write_vectors(group, "eigenvectors", (len(vectors), rank), row_slabs(vectors[:, :rank]))
        return values[:rank], {"passes": 0, "residual": 0.0, "converged": True}

    return _Solution(total.live, total.clipped, trace, subtracted, total.fourth, norm, write)


def _multiply_square(square: Matrix, basis: Floats, live: int) -> Matrix:
    """Return (F Q)ᵀ, (c, k), of an undamped sum."""
    product: Matrix = basis.T.astype(np.float64) @ square
    product /= live
    return product


def _by_tiles(fit: Fitting, side: int, rank: int, seed: int) -> _Solution:
    """Sum F to tiles on disk, then multiply it from there."""
    tiles, live, clipped, subtracted = sum_tiles(fit, side)
    trace, norm = tiles.moments()
    fit.check(live, trace)
    fourth = sum_fourth(fit, side) if fit.how.fourth else 0.0

    def multiply(basis: Floats) -> Matrix:
        product = tiles.multiply(basis)
        product /= live
        return product

    pairs = _iterate(fit, rank, seed, multiply)

    def write(group: Any) -> tuple[Matrix, dict[str, Any]]:
        TriangleTiles.create(group, _F, tiles.side).copy_from(tiles)
        return _write_pairs(group, pairs)

    return _Solution(live, clipped, trace, subtracted, fourth, norm, write)


def _by_rows(fit: Fitting, rank: int, seed: int) -> _Solution:
    """Multiply by the rows, once a pass; F is never formed."""
    if fit.earlier is not None:
        logger.info("%s is computed from all rows again: it keeps no sum of F to add rows to", fit.target)
    moments: Matrix = np.empty(0)
    how = fit.how

    def multiply(basis: Floats) -> Matrix:
        nonlocal moments
        with Progress("spectrum: rows", fit.chosen.count, fit.progress) as bar:
            product = multiply_rows(
                fit.chosen, basis, how.block_rows, fit.slots, bar, measure=not len(moments), device=how.device
            )
        moments = moments if len(moments) else product.moments
        fit.check(int(moments[0]), moments[2] + float(product.total.sum()))
        total = product.total
        total /= moments[0]
        return total

    pairs = _iterate(fit, rank, seed, multiply)
    live, clipped = int(moments[0]), int(moments[1])
    trace, fourth = float(moments[2]), float(moments[3])
    return _Solution(live, clipped, trace, 0.0, fourth, float("nan"), lambda group: _write_pairs(group, pairs))


def _iterate(fit: Fitting, rank: int, seed: int, multiply: Callable[[Floats], Matrix]) -> Eigenpairs:
    """Run the subspace iteration, from the pass that an earlier run saved."""
    k, passes, explained = fit.chosen.store.k, 0, 0.0
    name = f"{_BASIS}-{rank}-{seed}"
    saved = fit.partial.groups(_BASIS).get(name)
    if saved is None:
        basis = start_basis(k, iteration_columns(fit_size(fit.chosen), rank), seed)
    else:
        facts = read_facts(saved)
        passes, explained = int(facts["passes"]), float(facts["held"])
        array: Any = open_group(array_store(saved, read_only=True), "r")[_BASIS]
        basis = np.asarray(read_part(array, ...), np.float32, order="F")
    clock = fit.partial.clock()

    def save(passes: int, explained: float, basis: Floats) -> None:
        if clock.due():
            facts = {"passes": passes, "held": explained}
            clock.run(lambda: fit.partial.put_group(name, passes, facts, lambda group: _write_basis(group, basis)))

    pairs = subspace_iteration(multiply, basis, rank, PASSES, save, passes, explained)
    if not pairs.converged:
        warn(
            f"the {rank} largest eigenvalues of {fit.target} still grew by more than {TOLERANCE:.0e} of their sum in "
            f"pass {pairs.passes}, the last: they are lower bounds; a larger rank converges sooner"
        )
    return pairs


def _write_pairs(group: Any, pairs: Eigenpairs) -> tuple[Matrix, dict[str, Any]]:
    (k, rank), slabs = pairs.vectors.shape, orthonormal_slabs(pairs.vectors, slab_rows(*pairs.vectors.shape))
    write_vectors(group, "eigenvectors", (k, rank), slabs)
    return pairs.eigenvalues, {"passes": pairs.passes, "residual": pairs.residual, "converged": pairs.converged}


def _write_basis(group: Any, basis: Floats) -> None:
    """Write the basis of the next pass in chunks of whole rows."""
    k, columns = basis.shape
    step = max(1, min(k, CHUNK_TARGET // (4 * columns)))
    array = create_array(group, _BASIS, basis.shape, (step, columns), basis.dtype, codec="crc32c")
    for start in range(0, k, step):
        array[start : start + step] = basis[start : start + step]

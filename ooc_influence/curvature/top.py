"""Fits of the top of F's spectrum, by the ways of :mod:`.ways`.

What is known beside the eigenpairs is written down with them: the trace, the share of it that is left out, the passes,
whether the iteration converged, the largest residual ‖F v − e v‖/e₁.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import unfinished
from ooc_influence.curvature.fitting import Fitting, squared_norm
from ooc_influence.curvature.leading import VECTORS, slab_rows
from ooc_influence.curvature.rows import Share, cut_shares
from ooc_influence.curvature.saved import write_curvature, write_long
from ooc_influence.curvature.sums import Summing, sum_name
from ooc_influence.curvature.tiled import block_moments, sum_fourth, sum_tiles
from ooc_influence.curvature.unfinished import SavingClock, read_facts, save_result, write_slabs
from ooc_influence.curvature.ways import PASSES, TopWay, iteration_columns
from ooc_influence.errors import warn
from ooc_influence.linalg import (
    ProductAccumulator,
    Team,
    Top,
    TriangleTiles,
    find_top,
    orthonormal_slabs,
    start_basis,
    symmetric_eigen,
)
from ooc_influence.linalg.accumulate import mirror
from ooc_influence.linalg.subspace import TOLERANCE
from ooc_influence.progress import Progress, tick
from ooc_influence.store import array_store, create_array, open_group, read_part
from ooc_influence.stripes import run_stripes, task_threads

logger = logging.getLogger("ooc_influence")
Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
_BASIS = "basis"  # of partial results
_F = sum_name(0)


class Found(NamedTuple):
    """What a way found.

    Attributes
    ----------
    live, clipped : int
        Rows that count, and those whose loss was clipped.
    trace, taken : float
        Of the undamped sum; what was taken from an earlier one.
    fourth, norm : float
        Σ‖x‖⁴, and the squared Frobenius norm of the undamped sum; NaN where not known.
    write : callable
        Writes the sum, where there is one, and the eigenvectors into a group; returns the eigenvalues and facts.
    """

    live: int
    clipped: int
    trace: float
    taken: float
    fourth: float
    norm: float
    write: Callable[[Any], tuple[Matrix, dict[str, Any]]]


def fit_top(fit: Fitting, way: TopWay, rank: int, seed: int) -> None:
    """Find the top ``rank`` eigenpairs of F and write them to the target."""
    began = time.monotonic()
    if way.name in ("whole", "sums"):
        found = _by_sums(fit, rank, seed, exact=way.name == "whole")
    else:
        found = _by_tiles(fit, way.tile, rank, seed) if way.name == "tiles" else _by_rows(fit, rank, seed)
    attributes = fit.attributes(found.live, found.clipped, found.trace, found.taken)
    trace, others = found.trace / found.live, fit.chosen.store.k - rank
    attributes |= {"kind": "top", "rank": rank, "way": way.name, "summed": way.name != "rows"}

    def write(group: Any) -> Mapping[str, Any]:
        fit.write_record(group)
        values, facts = found.write(group)
        write_long(group, "eigenvalues", values)
        tail = max(0.0, trace - float(values.sum())) if others else 0.0
        facts |= {"left_out": tail / trace if trace > 0 else 0.0, "rest": tail / others if others else 0.0}
        if fit.how.fourth:
            norm = found.norm
            if np.isnan(norm):
                norm = (float(np.square(values).sum()) + (tail**2 / others if others else 0.0)) * found.live**2
            facts["sampling_error"] = fit.chosen.sampling_error(found.live, found.fourth, norm)
        return facts | {"seconds": time.monotonic() - began}

    write_curvature(fit.target, attributes, write)


def _by_sums(fit: Fitting, rank: int, seed: int, *, exact: bool) -> Found:
    """Sum F in memory, then factorise it or multiply it there."""
    total, taken = fit.sums()
    (square,) = total.squares
    trace = total.trace()
    fit.check(total.live, trace)
    norm = squared_norm(square) if fit.how.fourth else float("nan")
    mirror(square)
    top = None if exact else _iterate(fit, rank, seed, lambda basis: _multiply_square(square, basis, total.live))

    def write(group: Any) -> tuple[Matrix, dict[str, Any]]:
        TriangleTiles.create(group, _F, len(square)).write_upper(square)
        if top is not None:
            return _write_top(group, top)
        np.divide(square, total.live, out=square)
        values, vectors = symmetric_eigen(square)
        step = slab_rows(rank)
        parts = (slice(start, min(len(vectors), start + step)) for start in range(0, len(vectors), step))
        _write_vectors(group, (len(vectors), rank), ((rows, vectors[rows, :rank]) for rows in parts))
        return values[:rank], {"passes": 0, "residual": 0.0, "converged": True}

    return Found(total.live, total.clipped, trace, taken, total.fourth, norm, write)


def _multiply_square(square: Matrix, basis: Floats, live: int) -> Matrix:
    """Return (F Q)ᵀ, (c, k), of an undamped sum."""
    product: Matrix = basis.T.astype(np.float64) @ square
    product /= live
    return product


def _by_tiles(fit: Fitting, side: int, rank: int, seed: int) -> Found:
    """Sum F to tiles on disk, then multiply it from there."""
    tiles, live, clipped, taken = sum_tiles(fit, side)
    trace, norm = tiles.moments()
    fit.check(live, trace)
    fourth = sum_fourth(fit, side) if fit.how.fourth else 0.0

    def multiply(basis: Floats) -> Matrix:
        product = tiles.multiply(basis)
        product /= live
        return product

    top = _iterate(fit, rank, seed, multiply)

    def write(group: Any) -> tuple[Matrix, dict[str, Any]]:
        TriangleTiles.create(group, _F, tiles.side).copy_from(tiles)
        return _write_top(group, top)

    return Found(live, clipped, trace, taken, fourth, norm, write)


def _by_rows(fit: Fitting, rank: int, seed: int) -> Found:
    """Multiply the rows, once a pass."""
    if fit.old is not None:
        logger.info("%s is found from all rows again: it keeps no sum of F to add rows to", fit.target)
    moments: Matrix = np.empty(0)
    shares = cut_shares(fit.chosen, [(0, fit.chosen.count)], fit.how.block_rows, fit.slots)

    def multiply(basis: Floats) -> Matrix:
        nonlocal moments
        with Progress("spectrum: rows", fit.chosen.count, fit.progress) as bar:
            found: Product = run_stripes(
                _multiply_share, shares, bar, fit.how, basis, not len(moments), slots=fit.slots, reduce=Product.plus,
                own_threads=True,
            )  # fmt: skip
        moments = found.moments if not len(moments) else moments
        fit.check(int(moments[0]), moments[2] + float(found.total.sum()))
        product = found.total
        product /= moments[0]
        return product

    top = _iterate(fit, rank, seed, multiply)
    live, clipped = int(moments[0]), int(moments[1])
    return Found(
        live, clipped, float(moments[2]), 0.0, float(moments[3]), float("nan"), lambda group: _write_top(group, top)
    )


class Product(NamedTuple):
    """(XᵀX Q)ᵀ over some rows, (c, k) float64, and their moments where they were asked for."""

    total: Matrix
    moments: Matrix

    def plus(self, other: Product) -> Product:
        """Return the sum of both, leaving both as they are."""
        return Product(self.total + other.total, self.moments + other.moments)


def _multiply_share(share: Share, key: str, how: Summing, basis: Floats, measure: bool) -> Product:
    """Return the product of a share of the rows."""
    with Team(task_threads()) as team:
        return _multiply_with(team, share, key, how, basis, measure)


def _multiply_with(team: Team, share: Share, key: str, how: Summing, basis: Floats, measure: bool) -> Product:
    total, moments = _Products(team, how, basis), np.zeros(4)
    for _, chosen in share.parts:
        for block in how.read(chosen, 0, team.threads):
            total.add(block.rows)
            if measure:
                moments += block_moments(block)
            tick(key, block.stop - block.start)
    return Product(total.sum.triangle(), moments)


class _Products:
    """The sum of (X Q)ᵀ X over blocks, where they are."""

    def __init__(self, team: Team, how: Summing, basis: Floats) -> None:
        self._team, self._device = team, how.device
        self.sum: Any
        self._basis: Any = basis
        if how.device is None:
            self.sum = ProductAccumulator(basis.shape[1], len(basis), team=team)
            self._turned = np.empty((how.block_rows, basis.shape[1]), np.float32)
        else:
            import torch

            from ooc_influence.linalg.torch_rows import DeviceSum, send_array

            self.sum = DeviceSum(basis.shape[1], len(basis), how.device)
            self._basis = send_array(basis, torch.device(how.device))

    def add(self, rows: Any) -> None:
        """Add a block."""
        if self._device is not None:
            self.sum.add(rows @ self._basis, rows)
            return
        threads, turned = self._team.threads, self._turned[: len(rows)]
        edges = [len(rows) * number // threads for number in range(threads + 1)]
        parts = [slice(low, high) for low, high in pairwise(edges)]
        self._team.run(partial(np.matmul, rows[part], self._basis, turned[part]) for part in parts)
        self.sum.add(turned, rows)


def _iterate(fit: Fitting, rank: int, seed: int, multiply: Callable[[Floats], Matrix]) -> Top:
    """Run the subspace iteration, from the pass that an earlier run saved."""
    k, done, held = fit.chosen.store.k, 0, 0.0
    name = f"{_BASIS}-{rank}-{seed}"
    found = fit.kept.results(_BASIS).get(name)
    if found is None:
        basis = start_basis(k, iteration_columns(k, fit.chosen.count, rank), seed)
    else:
        facts = read_facts(found)
        done, held = int(facts["passes"]), float(facts["held"])
        array: Any = open_group(array_store(found, read_only=True), "r")[_BASIS]
        basis = np.asarray(read_part(array, ...), np.float32, order="F")
    clock = SavingClock(unfinished.INTERVAL)

    def save(passes: int, held: float, basis: Floats) -> None:
        if fit.kept.usable and clock.due():
            facts = {"passes": passes, "held": held}
            clock.run(
                lambda: save_result(fit.kept.path, name, passes, facts, lambda group: write_slabs(group, _BASIS, basis))
            )

    top = find_top(multiply, basis, rank, PASSES, save, done, held)
    if not top.converged:
        warn(
            f"the top {rank} eigenvalues of {fit.target} still grew by more than {TOLERANCE:.0e} of their sum in pass "
            f"{top.passes}, the last: they are lower bounds; a larger rank converges sooner"
        )
    return top


def _write_top(group: Any, top: Top) -> tuple[Matrix, dict[str, Any]]:
    shape = top.vectors.shape
    _write_vectors(group, shape, orthonormal_slabs(top.vectors, slab_rows(shape[1])))
    return top.eigenvalues, {"passes": top.passes, "residual": top.residual, "converged": top.converged}


def _write_vectors(group: Any, shape: tuple[int, ...], parts: Iterable[tuple[slice, Matrix]]) -> None:
    array = create_array(group, VECTORS, shape, (min(shape[0], slab_rows(shape[1])), shape[1]), "float64", check=True)
    for rows, values in parts:
        array[rows] = values

"""F by the top r of its spectrum: F ≈ V diag(e) Vᵀ + ē (I − V Vᵀ), ē the mean of the eigenvalues that are not known.

The trace is known, and with it ē = (tr F − Σ e)/(k − r). With z = Vᵀg, (F + λI)⁻¹ g = V z/(e + λ) + (g − V z)/(ē + λ)
for any λ. The group holds ``eigenvalues`` (r,) and ``eigenvectors`` (k, r) in float64 and, where F itself was summed,
the undamped sum as tiles of a triangle (``sum-00000``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.checkpoint import read_facts
from ooc_influence.curvature.costs import PASSES, LowRankPlan, iteration_columns
from ooc_influence.curvature.curvature import dimension, share_outside
from ooc_influence.curvature.files import write_curvature, write_long
from ooc_influence.curvature.primal import Fitting, block_moments, squared_norm, sum_fourth, sum_tiles
from ooc_influence.curvature.rows import RowPartition, partition_rows
from ooc_influence.curvature.spectral import SummedCurvature, self_rows
from ooc_influence.curvature.sums import Summing, sum_name
from ooc_influence.errors import InputError, warn
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
from ooc_influence.parallel import run_stripes, task_threads
from ooc_influence.progress import Progress, tick
from ooc_influence.store import CHUNK_TARGET, array_store, create_array, find_array, open_group, read_part

logger = logging.getLogger("ooc_influence")
Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
_PANEL = 256  # rows brought to float64 at a time by each thread of self-influence
_LEAST_ROWS = 1024  # that all of them hold at a time, counted whatever their number
_reading = threading.Lock()  # threads that find norms read V once
VECTORS = "eigenvectors"


class LowRankCurvature(SummedCurvature, kinds=("top",)):
    """A curvature of which the leading eigenvectors are kept.

    Attributes
    ----------
    rest : float
        ē, what stands for each eigenvalue that is not known.
    """

    _vectors: Matrix | None = None

    def _load(self) -> None:
        super()._load()
        self.rest = float(self._attrs["rest"])

    @property
    @override
    def keeps_sums(self) -> bool:
        """Not where the spectrum was found from the rows."""
        return bool(self._attrs["summed"])

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, r), one eigenvector a column (read on first use, then held)."""
        with _reading:
            if self._vectors is None:
                held = np.empty((self.d, len(self.eigenvalues)))
                for rows, values in self._slabs():
                    held[rows] = values
                self.check_fit()
                self._vectors = held
        return self._vectors

    def _slabs(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield V by rows: as it is held, or read and not kept."""
        step = slab_rows(len(self.eigenvalues))
        array: Any = None
        if self._vectors is None:
            array = find_array(open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r"), VECTORS)
            step = int(array.chunks[0])
        for start in range(0, self.d, step):
            rows = slice(start, min(self.d, start + step))
            yield rows, read_part(array, rows) if self._vectors is None else self._vectors[rows]

    def fisher(self) -> Matrix:
        """Return F, (d, d), read from disk.

        Raises
        ------
        InputError
            If it was never summed.
        """
        if not self.keeps_sums:
            raise InputError(
                f"expected a curvature that keeps F; received {self.path}, whose spectrum was found from the rows: fit "
                "without rank, or with more memory"
            )
        return super().fisher()

    def effective_dimension(self, value: float) -> float:
        """Return d(λ), at most: the eigenvalues that are not known give most where they are all the same."""
        others = min(self.d, self.rows) - len(self.eigenvalues)
        tail = self.rest * (self.d - len(self.eigenvalues))
        return dimension(self.eigenvalues, value) + (tail / (tail / others + value) if others > 0 and tail > 0 else 0)

    @override
    def least_dimension(self, value: float) -> float:
        """Assume the unknown eigenvalues as large as they can be, where they contribute least."""
        tail = self.rest * (self.d - len(self.eigenvalues))
        return dimension(self.eigenvalues, value) + (tail / (float(self.eigenvalues[-1]) + value) if tail > 0 else 0)

    def _rotate(self, whole: Matrix) -> Matrix:
        """Return z = gradients @ V, (q, r)."""
        found = np.zeros((len(whole), len(self.eigenvalues)))
        for rows, values in self._slabs():
            found += whole[:, rows] @ values
        return found

    @property
    def _is_whole(self) -> bool:
        return len(self.eigenvalues) == self.d

    @override
    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """V is read twice, a slab at a time, for all λ."""
        whole = np.asarray(gradients, np.float64)
        rotated = self._rotate(whole)
        result = np.empty((len(values), *whole.shape))
        for rows, vectors in self._slabs():
            outside = 0.0 if self._is_whole else whole[:, rows] - rotated @ vectors.T
            for out, value in zip(result, values, strict=True):
                np.matmul(rotated / (self.eigenvalues + value), vectors.T, out=out[:, rows])
                if not self._is_whole:
                    out[:, rows] += outside / (self.rest + value)
        self.check_fit()
        return result

    @override
    def working_bytes(self, queries: int, values: int) -> int:
        r = len(self.eigenvalues)
        held = 8 * self.d * r if self._vectors is not None else 0
        return held + top_working_bytes(self.d, r, queries, values)

    @override
    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        result = np.empty((len(values), len(gradients)), np.float32)
        for start in range(0, len(gradients), _PANEL):  # float64: most of a norm may lie in the span
            part = gradients[start : start + _PANEL].astype(np.float64)
            squares = np.square(part @ self.eigenvectors)
            outside = np.zeros(len(part)) if self._is_whole else np.square(part).sum(1) - squares.sum(1)
            for out, value in zip(result, values, strict=True):
                rest = 0.0 if self._is_whole else np.maximum(outside, 0) / (self.rest + value)
                out[start : start + _PANEL] = squares @ (1 / (self.eigenvalues + value)) + rest
        return result

    @override
    def self_working_bytes(self, values: int) -> int:
        return top_self_bytes(self.d, len(self.eigenvalues), values)

    @override
    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Outside what is known of the spectrum."""
        whole = np.asarray(gradients, np.float64)
        return share_outside(np.square(self._rotate(whole)).sum(1), whole)

    @override
    def facts(self) -> dict[str, Any]:
        """Add what is known of the rest of the spectrum."""
        least = self.least_dimension(self.damping_value()) if self.trace > 0 else 0.0
        named = ("rank", "left_out", "rest", "passes", "residual", "converged", "way")
        found = super().facts() | {name: self._attrs[name] for name in named}
        return found | {"effective_dimension_at_least": least}


def top_working_bytes(d: int, r: int, queries: int, values: int) -> int:
    """Return what preconditioning by the top r of a spectrum of ``d`` columns holds."""
    step = min(d, slab_rows(r))
    return 3 * 8 * step * r + 8 * queries * (d * (1 + values) + 2 * r + 2 * step)


def top_self_bytes(d: int, r: int, values: int) -> int:
    """Return what self-influence by the top r of a spectrum of ``d`` columns holds."""
    rows = max(_LEAST_ROWS, self_rows(d))
    return 8 * d * r + 8 * rows * (2 * d + 2 * r + values + 2) + 8 * values * r + 3 * CHUNK_TARGET


def slab_rows(r: int) -> int:
    """Return the rows of a chunk of (k, r) eigenvectors."""
    return max(1, CHUNK_TARGET // (8 * max(1, r)))


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


def fit_top(fit: Fitting, way: LowRankPlan, rank: int, seed: int) -> None:
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
    shares = partition_rows(fit.chosen, [(0, fit.chosen.count)], fit.how.block_rows, fit.slots)

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


def _multiply_share(share: RowPartition, key: str, how: Summing, basis: Floats, measure: bool) -> Product:
    """Return the product of a share of the rows."""
    with Team(task_threads()) as team:
        return _multiply_with(team, share, key, how, basis, measure)


def _multiply_with(team: Team, share: RowPartition, key: str, how: Summing, basis: Floats, measure: bool) -> Product:
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

            from ooc_influence.linalg.device import DeviceSum, send_array

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
    found = fit.partial.groups(_BASIS).get(name)
    if found is None:
        basis = start_basis(k, iteration_columns(k, fit.chosen.count, rank), seed)
    else:
        facts = read_facts(found)
        done, held = int(facts["passes"]), float(facts["held"])
        array: Any = open_group(array_store(found, read_only=True), "r")[_BASIS]
        basis = np.asarray(read_part(array, ...), np.float32, order="F")
    clock = fit.partial.clock()

    def save(passes: int, held: float, basis: Floats) -> None:
        if clock.due():
            facts = {"passes": passes, "held": held}
            clock.run(
                lambda: fit.partial.put_group(name, passes, facts, lambda group: write_slabs(group, _BASIS, basis))
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


def write_slabs(group: Any, name: str, matrix: npt.NDArray[Any]) -> None:
    """Write a matrix in chunks of whole rows, with checksums."""
    rows, columns = matrix.shape
    step = max(1, min(rows, CHUNK_TARGET // max(1, columns * matrix.itemsize)))
    array = create_array(group, name, matrix.shape, (step, columns), matrix.dtype, check=True)
    for start in range(0, rows, step):
        array[start : start + step] = matrix[start : start + step]

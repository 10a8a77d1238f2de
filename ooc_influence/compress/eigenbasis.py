"""The eigenbasis of a store's rows, rows multiplied by it, and the share of their energy that it retains.

That share, 1 − Σ w (‖g‖² − ‖g M‖²) / Σ w ‖g‖², is measured of the rows that a reduction is applied to. The share
recorded with the basis is of the rows it was fitted to, which it was chosen to keep: other rows lose more, several
times as much if the pilot was small.

Of rows in a Kronecker basis the eigenbasis is that of whitened rows, g' = D⁻¹g with D = √(Λ + λ)
(:mod:`ooc_influence.linalg.whitening`): M = D⁻¹V, energies and norms are those of g', and plain dot products of reduced
rows are scores with the basis's curvature at that λ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.residuals import RESIDUALS, Residuals, coordinates
from ooc_influence.linalg import (
    ONE_LABEL,
    Floats,
    LayerMoments,
    Matrix,
    WeightedRows,
    Whitening,
    parse_weighting,
    row_weights,
    top_spectrum,
)
from ooc_influence.memory import PRODUCT_ROWS, MemoryBudget, MemoryModel, ProblemSize, block_limit
from ooc_influence.options import Weighting
from ooc_influence.parallel import Stripe, check_workers, cut_stripes, in_worker, run_stripes, slots_per_process
from ooc_influence.progress import Progress, tick
from ooc_influence.store import (
    GradientStore,
    RangeWriter,
    StoredReduction,
    StorePath,
    missing_spans,
    read_blocks,
    wait_for,
    writing_bytes,
)

logger = logging.getLogger("ooc_influence")
_MOST_LEFT_OUT = 0.1  # share of the rows' energy that a reduction leaves out without a warning


class RetainedEnergy(NamedTuple):
    """How much of some live rows was kept: weighted sums of their squared norms."""

    kept: float = 0.0  # of reduced rows
    whole: float = 0.0  # of masked rows
    rows: int = 0  # rows summed

    @classmethod
    def of(
        cls, reduced: npt.NDArray[Any], norms: npt.NDArray[Any], losses: npt.NDArray[Any],
        live: npt.NDArray[np.bool_], weights: Weighting | None,
    ) -> RetainedEnergy:  # fmt: skip
        """Return the energy of reduced rows (b, r) whose masked, or whitened, rows had ``norms`` (b,)."""
        weight = np.where(live, row_weights(losses, weights), 0)
        kept = np.einsum("ij,ij->i", reduced, reduced).astype(np.float64)
        whole = np.where(live, norms, 0).astype(np.float64)
        return cls(float(weight @ kept), float(weight @ np.square(whole)), int(live.sum()))

    def plus(self, other: RetainedEnergy) -> RetainedEnergy:
        """Return the energy of both sets of rows together."""
        return RetainedEnergy(self.kept + other.kept, self.whole + other.whole, self.rows + other.rows)

    @property
    def left_out(self) -> float:
        """The share of the trace that was left out."""
        return max(0.0, 1 - self.kept / self.whole) if self.whole > 0 else 0.0

    def warn(self, path: StorePath) -> None:
        """Log a warning where more than a tenth of the energy was left out, and what can be done."""
        if self.left_out > _MOST_LEFT_OUT:
            logger.warning(
                "%s: the reduction leaves out %.0f %% of the energy of %d rows, and scores with it: extract train rows "
                "and queries without one (--dims 0), or with a larger --dims or --pilot", path, 100 * self.left_out,
                self.rows,
            )  # fmt: skip

    def record(self, store: GradientStore) -> RetainedEnergy:
        """Add this to a store's attribute ``measured``, of the rows written before; return the sum."""
        recorded = store.attrs.get("measured") or {}
        total = self.plus(RetainedEnergy(*(recorded.get(name, 0) for name in RetainedEnergy._fields)))
        if self.rows:
            store.record(measured=total._asdict() | {"left_out": total.left_out})
        return total


def basis_weights(attributes: Any, facts: Any) -> Weighting | None:
    """Return the row weighting of a basis, if the rows have a loss that it is valid for."""
    weighting: Weighting | None = (facts or {}).get("weights")
    return weighting if attributes.get("loss_kind") == ONE_LABEL else None


def fill_memory(
    size: ProblemSize, r: int, writing: int = 0, fixed: int = 0, *, measured: bool = False
) -> MemoryModel:  # fmt: skip
    """Return the memory model of :func:`fill`.

    ``writing`` bytes are held by a task to write, and ``fixed`` by the matrix (k, r) where it is not in memory yet.
    ``measured`` says whether the rows of a sketch are measured (:class:`Residuals`).
    """
    return MemoryModel(
        f"reducing {size.k} numbers to {r}",
        fixed,
        size.reading_bytes + writing,
        # a block, its product, and a copy of that while it is encoded
        4 * (size.k + 2 * r) + (8 * size.k + 32 * r if measured else 0),
        size.workers,
        max_rows=block_limit(size.k, least=PRODUCT_ROWS),
        advice="reduce to fewer dims",
    )


def fill(
    source: GradientStore,
    target: GradientStore,
    basis: Floats,
    weights: Weighting | None,
    *,
    workers: int | None,
    memory: int | str | None,
    progress: bool | None,
) -> RetainedEnergy:
    """Write source rows times ``basis`` (k, r), with metadata, to missing rows of ``target``; return their energy.

    Of a sketch (:func:`ooc_influence.compress.sketch.write_sketch`), rows are measured as well: the column
    :data:`RESIDUALS`.
    """
    damping = None if source.is_reduced else target.attrs["reduction"].get("whitened")
    scale = None if damping is None else LayerMoments.of(source.mask).scale(damping)
    measure = Residuals(target.layout.encoding, target.column_scale, scale) if has_residuals(target) else None
    slots, size = check_workers(workers), target.layout.group_rows
    source_size = source.problem_size(slots_per_process(slots))
    writing = writing_bytes(target.layout, target.path)
    step = MemoryBudget.of(memory).plan(fill_memory(source_size, target.k, writing, measured=measure is not None))
    filling = _Filling(source, target.path, basis, step, weights, scale, measure)
    spans = [(start, stop or source.n) for start, stop in missing_spans(target.records, target.layout, 0, source.n)]
    groups = sorted({group for start, stop in spans for group in range(start // size, -(-stop // size))})
    stripes = [
        Stripe(groups[part.start] * size, min(source.n, (groups[part.stop - 1] + 1) * size))
        for part in cut_stripes(0, len(groups), 1, slots)
        if groups
    ]
    with Progress("reduce", source.n, progress) as bar:
        bar.advance(source.n - sum(stop - start for start, stop in spans))
        parts = run_stripes(_fill_stripe, stripes, bar, filling, slots=slots)
    return reduce(RetainedEnergy.plus, parts, RetainedEnergy())


def has_residuals(store: GradientStore) -> bool:
    """Whether a store is a sketch that has the norms of what it leaves out of each row."""
    return RESIDUALS in store.layout.columns and bool((store.attrs.get("reduced") or {}).get("residuals"))


class _Filling(NamedTuple):
    """What tasks of :func:`fill` need."""

    source: GradientStore
    out: StorePath
    basis: Floats
    step: int  # rows at a time
    weights: Weighting | None
    scale: Matrix | None  # D of whitened rows
    measure: Residuals | None


def _fill_stripe(stripe: Stripe, key: str, filling: _Filling) -> RetainedEnergy:
    """Write what is missing of a stripe's groups."""
    source, basis, step, scale, measure = filling.source, filling.basis, filling.step, filling.scale, filling.measure
    energy, product = RetainedEnergy(), np.empty((step, basis.shape[1]), np.float32)
    with GradientStore.open(filling.out, "a") as target:
        writer = _claim(target, stripe)
        while writer.rows_left:  # a gap at a time
            first = writer.next_row
            for low, high, start in _grid(first, first + writer.rows_left, target.layout.group_rows, step):
                metadata = {name: np.array(source.small(name, low, high)) for name in _carried(source)}
                for block in read_blocks(source, start, high, step):
                    room, begin = product[: block.stop - block.start], max(low, block.start)
                    part = {name: values[begin - low : block.stop - low] for name, values in metadata.items()}
                    if measure is None:
                        rows = np.matmul(block.gradients, basis, out=room)
                    else:
                        rows, fresh = coordinates(block.gradients, basis, room), slice(begin - block.start, None)
                        measured = measure.of_rows(block.gradients[fresh], basis, rows[fresh])
                        part[f"columns/{RESIDUALS}"] = measured
                    if scale is not None:
                        part["grad_norm"] = _whitened_norms(block.gradients[begin - block.start :], scale)
                    energy = energy.plus(_append(target, rows[begin - block.start :], part, filling.weights))
                    tick(key, block.stop - begin)
    return energy


def _whitened_norms(rows: Floats, scale: Matrix) -> Matrix:
    """Return the norms of rows (b, k) divided by D, without a copy of them."""
    return np.asarray(np.sqrt(np.einsum("ij,ij,j->i", rows, rows, 1 / np.square(scale))))


def _carried(source: GradientStore) -> list[str]:
    """Return the array paths of per-row values that a reduction does not change; they are read a group at a time."""
    return ["loss", "grad_norm", *source.layout.metadata, *(["dropped"] if source.has_dropped else [])]


def _claim(target: GradientStore, stripe: Stripe) -> RangeWriter:
    """Claim a stripe's rows; on a cluster, wait until the claim of a worker that died elsewhere can be taken over."""
    claim = partial(target.writer, stripe.start, stripe.stop)
    return wait_for(claim) if in_worker() else claim()


def _grid(first: int, stop: int, group: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Cut rows ``first`` to ``stop`` at groups: yield ``(low, high, start)``, start being that of low's block."""
    while first < stop:
        high = min(stop, (first // group + 1) * group)
        yield first, high, first - first % group % step
        first = high


def _append(
    target: GradientStore, rows: Floats, metadata: dict[str, npt.NDArray[Any]], weights: Weighting | None
) -> RetainedEnergy:
    """Append reduced rows with their metadata; return the energy of the live ones."""
    live = ~metadata.pop("dropped") if "dropped" in metadata else np.ones(len(rows), np.bool_)
    loss, norm, ids = metadata.pop("loss"), metadata.pop("grad_norm"), metadata.pop("example_id", None)
    columns = {name.removeprefix("columns/"): values for name, values in metadata.items()}
    target.append(rows, loss=loss, grad_norm=norm, ids=ids, columns=columns, dropped=~live)
    return RetainedEnergy.of(rows, norm, loss, live, weights)


def mean_squares(
    rows: WeightedRows, vectors: Floats, *, workers: int | None, memory: int | str | None, progress: bool | None
) -> npt.NDArray[np.float64]:
    """Return the mean square over live rows of each column of rows @ vectors, (r,) float64."""
    slots = check_workers(workers)
    size = rows.store.problem_size(slots_per_process(slots))
    step = MemoryBudget.of(memory).plan(fill_memory(size, vectors.shape[1]))
    stripes = cut_stripes(0, rows.count, step, slots)
    with Progress("mean squares", rows.count, progress) as bar:
        total = run_stripes(_square_stripe, stripes, bar, rows, step, vectors, slots=slots, reduce=np.add)
    return np.asarray(total / rows.live)


def _square_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int, vectors: Floats) -> npt.NDArray[np.float64]:
    total = np.zeros(vectors.shape[1])
    for block in rows.blocks(stripe.start, stripe.stop, step):
        reduced = block.rows @ vectors
        total += np.square(reduced, out=reduced).sum(0, dtype=np.float64)
        tick(key, block.stop - block.start)
    return total


ALL_ROWS, ROWS_FOR_EACH = 131_072, 64  # rows of an existing store to fit to, by default: they cost no gradients


def fit_eigenbasis(
    store: GradientStore,
    r: int,
    *,
    rows: int | None = None,
    weights: str | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
    quickest: bool = False,
) -> StoredReduction:
    """Return the top-r eigenbasis of a store's live rows: of whitened ones, where they are in a Kronecker basis.

    Parameters
    ----------
    store : GradientStore
        Wide rows, (n, k').
    r : int
        Directions to keep.
    rows : int, optional
        How many rows to fit to, spread evenly over the store; default all.
    weights : {"ggn", "trak"}, optional
        Row weights.
    workers, memory, progress
        As for :func:`fit_fisher`.
    quickest : bool
        Whether the last directions may be inexact (:func:`ooc_influence.linalg.spectrum.choose_solver`).

    Raises
    ------
    InputError, MemoryBudgetError, NonFiniteError
        See :func:`ooc_influence.linalg.spectrum.top_spectrum`.
    """
    weighting = parse_weighting(weights, store.attrs)
    whitening = Whitening.of(store)
    chosen = replace(WeightedRows.of(store, even_ranges(store.n, rows), weighting), whitening=whitening)
    means: Any = {"workers": workers, "memory": memory, "progress": progress}
    spectrum = top_spectrum(chosen, r, quickest=quickest, **means)
    mean_square = spectrum.eigenvalues
    if weighting is not None:
        mean_square = mean_squares(replace(chosen, weighting=None), spectrum.vectors, **means)
    left_out = max(0.0, 1 - float(spectrum.eigenvalues.sum()) / spectrum.trace) if spectrum.trace > 0 else 0.0
    facts = {
        "trace": spectrum.trace, "left_out": left_out, "weights": weights, "pilot_rows": spectrum.rows,
        "clipped_losses": chosen.clipped(),
    }  # fmt: skip
    logger.info(
        "eigenbasis of %d rows: %d of %d directions leave out %.2g of the trace", spectrum.rows, r, store.k, left_out
    )
    vectors = spectrum.vectors
    if whitening is not None:
        vectors = (vectors / whitening.scale[:, None]).astype(np.float32)
        facts["whitened"] = whitening.facts["damping"]
    return StoredReduction(vectors, spectrum.eigenvalues, mean_square, facts)


def even_ranges(n: int, rows: int | None) -> list[tuple[int, int]]:
    """Return ranges, spread evenly over ``n`` rows, of ``rows`` in all (default all).

    They are about 64, or of 64 rows each: neighbouring rows are read together, but are often alike.
    """
    if rows is None or rows >= n:
        return [(0, n)]
    runs = -(-rows // min(64, max(1, rows // 64)))
    edges = [rows * number // runs for number in range(runs + 1)]
    gaps = [(n - rows) * number // max(1, runs - 1) for number in range(runs)]
    return [(low + gap, high + gap) for (low, high), gap in zip(pairwise(edges), gaps, strict=True)]

"""What a reduction leaves out of the rows it is applied to: Σ w (‖g‖² − ‖g M‖²) / Σ w ‖g‖², measured as they pass.

The share that a basis knows is that of the rows it was made from, which it was chosen to keep: other rows lose more,
several times as much where the pilot was small.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.linalg import ONE_LABEL, Floats, WeightedRows, parse_weighting, row_weights, top_spectrum
from ooc_influence.memory import PRODUCT_ROWS, MemoryModel, block_limit, plan_block_rows
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


class RetainedEnergy(NamedTuple):
    """How much of some live rows was kept: sums of their squared norms, weighted.

    Attributes
    ----------
    kept, whole : float
        Of reduced rows, and of masked ones.
    rows : int
        Floats summed.
    """

    kept: float = 0.0
    whole: float = 0.0
    rows: int = 0

    @classmethod
    def of(
        cls, reduced: npt.NDArray[Any], norms: npt.NDArray[Any], losses: npt.NDArray[Any],
        live: npt.NDArray[np.bool_], weights: Weighting | None,
    ) -> RetainedEnergy:  # fmt: skip
        """Return the share of reduced rows (b, r) whose masked rows had ``norms`` (b,)."""
        weight = np.where(live, row_weights(losses, weights), 0)
        kept = np.einsum("ij,ij->i", reduced, reduced).astype(np.float64)
        whole = np.where(live, norms, 0).astype(np.float64)
        return cls(float(weight @ kept), float(weight @ np.square(whole)), int(live.sum()))

    def plus(self, other: RetainedEnergy) -> RetainedEnergy:
        """Return the share of both sets of rows together."""
        return RetainedEnergy(self.kept + other.kept, self.whole + other.whole, self.rows + other.rows)

    @property
    def left_out(self) -> float:
        """The share of the trace that was left out."""
        return max(0.0, 1 - self.kept / self.whole) if self.whole > 0 else 0.0

    def record(self, store: GradientStore) -> RetainedEnergy:
        """Add this to what a store's attribute ``measured`` says of the rows written before; return the sum."""
        held = store.attrs.get("measured") or {}
        total = self.plus(RetainedEnergy(*(held.get(name, 0) for name in RetainedEnergy._fields)))
        if self.rows:
            store.record(measured=total._asdict() | {"left_out": total.left_out})
        return total


def basis_weights(attributes: Any, facts: Any) -> Weighting | None:
    """Return the weights of a basis, for rows whose recorded loss they hold for; else none."""
    found: Weighting | None = (facts or {}).get("weights")
    return found if attributes.get("loss_kind") == ONE_LABEL else None


def fill_memory(source: GradientStore, r: int, writing: int, held: int = 0) -> MemoryModel:
    """Return what :func:`fill` needs: ``writing`` bytes a task holds to write; ``held``: of M, if not yet in memory."""
    return MemoryModel(
        f"reducing {source.k} numbers to {r}",
        held,
        source.reading_bytes + writing,
        4 * (source.k + 2 * r),  # a block, its product, and what is made of that while it is encoded
        max_rows=block_limit(source.k, least=PRODUCT_ROWS),
        advice="reduce to fewer dims",
    )


def fill(
    source: GradientStore,
    target: GradientStore,
    turn: Floats,
    weights: Weighting | None,
    *,
    workers: int | None,
    memory: int | str | None,
    progress: bool | None,
) -> RetainedEnergy:
    """Write source rows times ``turn`` (k, r), and what belongs to them, to the rows of ``target`` that are missing.

    Returns
    -------
    Share
        What was kept of the rows written.

    Raises
    ------
    MemoryBudgetError
        If the budget does not hold a block.
    NonFiniteError
        If a product is not finite.
    StoreBusyError, StoreWriteError
        See :meth:`GradientStore.append`.
    """
    slots, size = check_workers(workers), target.layout.group_rows
    need = fill_memory(source, target.k, writing_bytes(target.layout, target.path))
    step = plan_block_rows(need, memory, slots_per_process(slots))
    spans = [(start, stop or source.n) for start, stop in missing_spans(target.records, target.layout, 0, source.n)]
    groups = sorted({group for start, stop in spans for group in range(start // size, -(-stop // size))})
    stripes = [
        Stripe(groups[part.start] * size, min(source.n, (groups[part.stop - 1] + 1) * size))
        for part in cut_stripes(0, len(groups), 1, slots)
        if groups
    ]
    with Progress("reduce", source.n, progress) as bar:
        bar.advance(source.n - sum(stop - start for start, stop in spans))
        parts = run_stripes(_fill_stripe, stripes, bar, source, target.path, turn, step, weights, slots=slots)
    return reduce(RetainedEnergy.plus, parts, RetainedEnergy())


def _fill_stripe(
    stripe: Stripe, key: str, source: GradientStore, out: StorePath, turn: Floats, step: int, weights: Weighting | None
) -> RetainedEnergy:
    """Write what is missing of a stripe's groups."""
    share, product = RetainedEnergy(), np.empty((step, turn.shape[1]), np.float32)
    with GradientStore.open(out, "a") as target:
        writer = _claim(target, stripe)
        while writer.rows_left:  # a gap at a time
            first = writer.next_row
            for low, high, start in _grid(first, first + writer.rows_left, target.layout.group_rows, step):
                small = {name: source.small(name, low, high) for name in _carried(source)}
                for block in read_blocks(source, start, high, step):
                    rows = np.matmul(block.gradients, turn, out=product[: block.stop - block.start])
                    begin = max(low, block.start)
                    part = {name: values[begin - low : block.stop - low] for name, values in small.items()}
                    share = share.plus(_append(target, rows[begin - block.start :], part, weights))
                    tick(key, block.stop - begin)
    return share


def _carried(source: GradientStore) -> list[str]:
    """Return what belongs to a row and is not changed by a reduction, by array path; read a group at a time."""
    return ["loss", "grad_norm", *source.layout.metadata, *(["dropped"] if source.has_dropped else [])]


def _claim(target: GradientStore, stripe: Stripe) -> RangeWriter:
    """Claim a stripe's rows; on a cluster, wait until the claim of a worker that died elsewhere can be taken over."""
    claim = partial(target.writer, stripe.start, stripe.stop)
    return wait_for(claim) if in_worker() else claim()


def _grid(first: int, stop: int, group: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Cut rows ``first`` to ``stop`` at groups: yield ``(low, high, start)``, start being low's block on the grid."""
    while first < stop:
        high = min(stop, (first // group + 1) * group)
        yield first, high, first - first % group % step
        first = high


def _append(
    target: GradientStore, rows: Floats, small: dict[str, npt.NDArray[Any]], weights: Weighting | None
) -> RetainedEnergy:
    """Append reduced rows with what belongs to them; return what was kept of the live ones."""
    live = ~small.pop("dropped") if "dropped" in small else np.ones(len(rows), np.bool_)
    loss, norm, ids = small.pop("loss"), small.pop("grad_norm"), small.pop("example_id", None)
    columns = {name.removeprefix("columns/"): values for name, values in small.items()}
    target.append(rows, loss=loss, grad_norm=norm, ids=ids, columns=columns, dropped=~live)
    return RetainedEnergy.of(rows, norm, loss, live, weights)


def mean_squares(
    rows: WeightedRows, vectors: Floats, *, workers: int | None, memory: int | str | None, progress: bool | None
) -> npt.NDArray[np.float64]:
    """Return the mean square over live rows of each column of rows @ vectors, (r,) float64.

    Raises
    ------
    MemoryBudgetError
        If the budget does not hold a block.
    """
    slots = check_workers(workers)
    step = plan_block_rows(fill_memory(rows.store, vectors.shape[1], 0), memory, slots_per_process(slots))
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


PILOT_ROWS = 4  # pilot rows for each number kept, by default; more keep more of the other rows
ALL_ROWS, ROWS_FOR_EACH = 131_072, 64  # of a store that is there already, by default: they cost no gradients


@dataclass(frozen=True)
class Eigenbasis:
    """Reduce masked gradients to the top of their eigenbasis.

    Parameters
    ----------
    r : int
        Numbers stored a row.
    pilot : int, optional
        Floats the basis is made from; by default four times ``r``. All rows of the data, where it has fewer.
    weights : {"ggn", "trak"}, optional
        Weights of the pilot rows (:mod:`ooc_influence.linalg.rows`), for one-label cross-entropy.

    Raises
    ------
    InputError
        For an r below 1, fewer pilot rows than r, or an unknown weighting.
    """

    r: int = 1024
    pilot: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("r", "pilot"):
            value = getattr(self, name)
            if name == "pilot" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"expected a whole number {name} >= 1; received {value!r}")
            object.__setattr__(self, name, int(value))
        if self.pilot is not None and self.pilot < self.r:
            raise InputError(f"expected at least r = {self.r} pilot rows; received {self.pilot}")
        if self.weights not in (None, "ggn", "trak"):
            raise InputError(f"expected weights 'ggn', 'trak' or none; received {self.weights!r}")

    @property
    def pilot_rows(self) -> int:
        """Floats the basis is made from."""
        return PILOT_ROWS * self.r if self.pilot is None else self.pilot

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the settings that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described others.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"expected the settings of an eigenbasis; received {values!r}") from error


def fit_eigenbasis(
    store: GradientStore,
    r: int,
    *,
    rows: int | None = None,
    weights: str | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> StoredReduction:
    """Return the top-r eigenbasis of a store's live rows.

    Parameters
    ----------
    store : GradientStore
        Wide rows, (n, k').
    r : int
        Directions to keep.
    rows : int, optional
        Use so many rows, taken evenly over the store; default all.
    weights : {"ggn", "trak"}, optional
        Row weights.
    workers, memory, progress
        As for :func:`fit_fisher`.

    Raises
    ------
    InputError, MemoryBudgetError, NonFiniteError
        See :func:`ooc_influence.linalg.spectrum.top_spectrum`.
    """
    weighting = parse_weighting(weights, store.attrs)
    chosen = WeightedRows.of(store, even_ranges(store.n, rows), weighting)
    found = top_spectrum(chosen, r, workers=workers, memory=memory, progress=progress)
    mean_square = found.eigenvalues
    if weighting is not None:
        mean_square = mean_squares(
            replace(chosen, weighting=None), found.vectors, workers=workers, memory=memory, progress=progress
        )
    left_out = max(0.0, 1 - float(found.eigenvalues.sum()) / found.trace) if found.trace > 0 else 0.0
    facts = {
        "trace": found.trace,
        "left_out": left_out,
        "weights": weights,
        "pilot_rows": found.rows,
        "clipped_losses": chosen.clipped(),
    }
    logger.info(
        "eigenbasis of %d rows: %d of %d directions leave out %.2g of the trace", found.rows, r, store.k, left_out
    )
    return StoredReduction(found.vectors, found.eigenvalues, mean_square, facts)


def even_ranges(n: int, rows: int | None) -> list[tuple[int, int]]:
    """Return row ranges, spread evenly over ``n``, that hold ``rows`` in all (default all).

    About 64 of them, or of 64 rows each: neighbours are read together, but are often alike.
    """
    if rows is None or rows >= n:
        return [(0, n)]
    runs = -(-rows // min(64, max(1, rows // 64)))
    edges = [rows * number // runs for number in range(runs + 1)]
    gaps = [(n - rows) * number // max(1, runs - 1) for number in range(runs)]
    return [(low + gap, high + gap) for (low, high), gap in zip(pairwise(edges), gaps, strict=True)]

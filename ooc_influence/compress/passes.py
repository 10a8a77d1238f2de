"""Striped passes over wide rows with a basis in hand: rows @ M written to another store, or their mean squares.

A task owns whole groups of rows of the store it writes, so nothing is shared between tasks and a pass that was killed
goes on where it was. Blocks lie on a grid that starts anew with every group: a row's rounding depends neither on the
number of workers nor on where a killed pass stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.compress.share import Share
from ooc_influence.linalg import Rows, WeightedRows, Weighting
from ooc_influence.memory import PRODUCT_ROWS, Need, block_limit, plan_block_rows
from ooc_influence.progress import Progress, tick
from ooc_influence.store import (
    GradientStore,
    RangeWriter,
    StorePath,
    missing_spans,
    read_blocks,
    wait_for,
    writing_bytes,
)
from ooc_influence.stripes import Stripe, check_workers, cut_stripes, in_worker, run_stripes, slots_per_process


def fill_need(source: GradientStore, r: int, writing: int, held: int = 0) -> Need:
    """Return what :func:`fill` needs: ``writing`` bytes a task holds to write; ``held``: of M, if not yet in memory."""
    return Need(
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
    turn: Rows,
    weights: Weighting | None,
    *,
    workers: int | None,
    memory: int | str | None,
    progress: bool | None,
) -> Share:
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
    need = fill_need(source, target.k, writing_bytes(target.layout, target.path))
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
    return reduce(Share.plus, parts, Share())


def _fill_stripe(
    stripe: Stripe, key: str, source: GradientStore, out: StorePath, turn: Rows, step: int, weights: Weighting | None
) -> Share:
    """Write what is missing of a stripe's groups."""
    share, product = Share(), np.empty((step, turn.shape[1]), np.float32)
    with GradientStore.open(out, "a") as target:
        writer = _claim(target, stripe)
        while writer.room:  # a gap at a time
            first = writer.next_row
            for low, high, start in _grid(first, first + writer.room, target.layout.group_rows, step):
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


def _append(target: GradientStore, rows: Rows, small: dict[str, npt.NDArray[Any]], weights: Weighting | None) -> Share:
    """Append reduced rows with what belongs to them; return what was kept of the live ones."""
    live = ~small.pop("dropped") if "dropped" in small else np.ones(len(rows), np.bool_)
    loss, norm, ids = small.pop("loss"), small.pop("grad_norm"), small.pop("example_id", None)
    columns = {name.removeprefix("columns/"): values for name, values in small.items()}
    target.append(rows, loss=loss, grad_norm=norm, ids=ids, columns=columns, dropped=~live)
    return Share.of(rows, norm, loss, live, weights)


def mean_squares(
    rows: WeightedRows, vectors: Rows, *, workers: int | None, memory: int | str | None, progress: bool | None
) -> npt.NDArray[np.float64]:
    """Return the mean square over live rows of each column of rows @ vectors, (r,) float64.

    Raises
    ------
    MemoryBudgetError
        If the budget does not hold a block.
    """
    slots = check_workers(workers)
    step = plan_block_rows(fill_need(rows.store, vectors.shape[1], 0), memory, slots_per_process(slots))
    stripes = cut_stripes(0, rows.m, step, slots)
    with Progress("mean squares", rows.m, progress) as bar:
        total = run_stripes(_square_stripe, stripes, bar, rows, step, vectors, slots=slots, reduce=np.add)
    return np.asarray(total / rows.live)


def _square_stripe(stripe: Stripe, key: str, rows: WeightedRows, step: int, vectors: Rows) -> npt.NDArray[np.float64]:
    total, buffer = np.zeros(vectors.shape[1]), rows.buffer(step)
    for low in range(stripe.start, stripe.stop, step):
        high = min(stripe.stop, low + step)
        reduced = rows.read(low, high, buffer) @ vectors
        total += np.square(reduced, out=reduced).sum(0, dtype=np.float64)
        tick(key, high - low)
    return total

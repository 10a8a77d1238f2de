"""The best lists of a stripe of train rows.

Where rows are mapped, a quick product finds what can be in a list, and those few pairs are scored again, exactly: the
lists do not depend on the product (:mod:`ooc_influence.influence.products`). Elsewhere, rows are decoded and the scores
of the one float32 product are those of the lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.checkpoints import Marks
from ooc_influence.influence.engine import Floats, HostEngine
from ooc_influence.influence.exact import exact_scores
from ooc_influence.influence.heap import NO_ROW, Bounds, Numbers, TopKHeap
from ooc_influence.influence.products import Product
from ooc_influence.influence.tiles import (
    Part,
    ScoreTask,
    absent_rows,
    make_engine,
    row_shares,
    row_weights,
    score_tiles,
)
from ooc_influence.influence.trial import choose_product, make_product
from ooc_influence.options import ProductName
from ooc_influence.parallel import Stripe
from ooc_influence.progress import tick
from ooc_influence.store import RawBlock, read_raw_blocks

SIDES = ("proponents", "opponents")


def best_of_stripe(stripe: Stripe, key: str, work: ScoreTask, top: int, seen: Marks | None, *queries: Floats) -> Part:
    """Return the best lists of a stripe: largest scores, and largest negated scores.

    Scores and rows of lists (L · M · q, top) by side, with the name of the product, and how many scores were
    found exactly.
    """
    with make_engine(work.device) as engine:
        if work.bounded and isinstance(engine, HostEngine):
            return _Search(engine, stripe, work, top, seen, queries).run(key)
        lists = [TopKHeap(len(queries[0]) * work.modules, top, stripe.stop - stripe.start) for _ in SIDES]
        for tile in score_tiles(engine, stripe, key, work, seen, queries):
            scores = tile.scores.reshape(-1, tile.stop - tile.start)
            for heap, sign in zip(lists, (1, -1), strict=True):
                heap.add(scores, tile.start, engine, sign)
    return _part([heap.best() for heap in lists], "float32", 0)


def _part(lists: Sequence[tuple[Floats, Numbers]], product: ProductName, exact: int) -> Part:
    part: dict[str, npt.NDArray[Any]] = {"product": np.array(product), "exact": np.array(exact)}
    for name, (scores, rows) in zip(SIDES, lists, strict=True):
        part[f"{name}_scores"], part[f"{name}_rows"] = scores, rows
    return part


class BoundedTile(NamedTuple):
    """Scores of train rows ``start`` to ``stop``, (M · L · q, rows), and bounds; the next tile overwrites them."""

    start: int
    stop: int
    scores: Floats
    bounds: Bounds


class _Search:
    """The lists of a stripe, found by products with bounds. Lists are in the order (M, L, q) here."""

    def __init__(
        self,
        engine: HostEngine,
        stripe: Stripe,
        work: ScoreTask,
        top: int,
        seen: Marks | None,
        queries: Sequence[Floats],
    ) -> None:
        self._engine, self._stripe, self._work, self._seen = engine, stripe, work, seen
        self._units = query_units(queries)
        self._queries = [array / self._units[:, None] for array in queries]
        self._q = len(queries[0])
        self._exact = 0
        rows, lists = stripe.stop - stripe.start, self._q * work.modules
        self._lists = [TopKHeap(lists, top, rows, partial(self._rescore, sign)) for sign in (1, -1)]
        self._products = self._make_products()
        errors = [product.query_errors.reshape(lists, -1) for product in self._products]
        self._list_errors = np.concatenate(errors, axis=1)

    def _make_products(self) -> list[Product]:
        work, products = self._work, []
        for number, (store, queries) in enumerate(zip(work.stores, self._queries, strict=True)):
            form, as_stored = store.layout.encoding, work.as_stored(number)
            name: Any = work.product
            if name == "auto":
                rows = self._stripe.stop - self._stripe.start
                name = choose_product(form, queries.shape[1], self._q, rows, self._engine, as_stored=as_stored)
            scale = None if as_stored else store.column_scale
            alone = len(work.stores) == 1
            options = {"as_stored": as_stored, "alone": alone, "norm_weights": work.norm_weights(number)}
            products.append(make_product(name, form, scale, queries, work.columns[number], self._engine, **options))
        return products

    def run(self, key: str) -> Part:
        """Return the lists; see :func:`best_of_stripe`."""
        for tile in self._tiles(key):
            for heap, sign in zip(self._lists, (1, -1), strict=True):
                heap.add(tile.scores, tile.start, self._engine, sign, tile.bounds)
        entries = [heap.entries() for heap in self._lists]
        lists, rows = (np.concatenate(part) for part in zip(*entries, strict=True))
        scores = self._scores(lists, rows)
        self._lists[0].replace(None, scores[: len(entries[0][0])])
        self._lists[1].replace(None, -scores[len(entries[0][0]) :])
        return _part([self._best(heap) for heap in self._lists], self._products[0].name, self._exact)

    def _best(self, heap: TopKHeap) -> tuple[Floats, Numbers]:
        """Return a side's lists in the order (L, M, q), in the units of the queries."""
        scores, rows = heap.best()
        shape = (self._work.modules, self._work.lambdas, -1, scores.shape[1])
        with np.errstate(over="ignore"):
            scores = np.where(rows == NO_ROW, -np.inf, scores * np.tile(self._units, self._work.modules)[:, None])

        def ordered(part: Any) -> Any:
            return part.reshape(shape).swapaxes(0, 1).reshape(part.shape)

        return ordered(scores.astype(np.float32)), ordered(rows)

    def _rescore(self, sign: int, lists: Numbers, rows: Numbers) -> Floats:
        return np.float32(sign) * self._scores(lists, rows)

    def _scores(self, lists: Numbers, rows: Numbers) -> Floats:
        self._exact += len(rows)
        args = (self._engine, self._work, self._seen, self._queries, lists, rows)
        return exact_scores(*args, batch=max(1, self._work.block_rows // 4))  # fewer rows at a time are no slower

    def _tiles(self, key: str) -> Iterator[BoundedTile]:
        """Yield the tiles of the stripe."""
        work, stripe, rows = self._work, self._stripe, self._work.block_rows
        shape = (work.modules, self._q)
        size = work.modules * self._q * min(rows, stripe.stop - stripe.start)
        buffers = [np.empty(size, np.float32) for _ in work.stores[:2]]
        streams = [read_raw_blocks(store, stripe.start, stripe.stop, rows) for store in work.stores]
        for blocks in zip(*streams, strict=True):
            start, stop = blocks[0].start, blocks[0].stop
            total, further = (
                buffer[: work.modules * self._q * (stop - start)].reshape(*shape, stop - start)
                for buffer in (buffers[0], buffers[-1])
            )
            shares, errors = row_shares(work, self._seen, start, stop), []
            for number, block in enumerate(blocks):
                errors.append(self._add(number, block, shares, further if number else total))
                if number:
                    total += further
            absent = absent_rows(blocks, self._seen)
            levels = max(map(len, errors))
            factors = np.concatenate([np.broadcast_to(each, (levels, *each.shape[1:])) for each in errors], axis=2)
            if absent is not None:
                total[..., absent] = np.nan
                factors[:, absent] = 0
            groups = np.arange(self._q) * len(factors) // self._q
            relative = self._products[0].relative + self._products[0].square_error
            bounds = Bounds.make(self._list_errors, np.tile(groups, work.modules), factors, relative)
            yield BoundedTile(start, stop, total.reshape(-1, stop - start), bounds)
            tick(key, stop - start)

    def _add(self, number: int, block: RawBlock, shares: Floats | None, out: Floats) -> npt.NDArray[np.float64]:
        """Write a checkpoint's scores to ``out`` (M, L · q, rows); return their rows' F, (L or 1, rows, t)."""
        product, parts, at = self._products[number], [], 0
        for raw, scale in block.parts:
            parts.append(product.multiply(raw, scale, out[:, :, at : at + len(raw)]))
            at += len(raw)
        factors = (1 + product.square_error) * np.concatenate([part.errors for part in parts])[None]
        found = [part.squares for part in parts if part.squares is not None]
        squares = np.concatenate(found, axis=1) if found else None
        weights = row_weights(self._engine, self._work, shares, number, block, squares)
        if weights is None:
            return factors
        levels = out.reshape(len(out), self._work.lambdas, -1, out.shape[2])
        levels *= weights[:, None]
        with np.errstate(invalid="ignore"):
            weighted = factors * np.abs(weights)[:, :, None]
        weighted[np.isnan(weighted)] = 0  # a weight of zero
        return np.asarray(weighted)


def query_units(queries: Sequence[Floats]) -> Floats:
    """Return the powers of two that bring the largest number of each query into [1, 2), (L · q,) float32."""
    largest = np.max([np.abs(array).max(axis=1, initial=0) for array in queries], axis=0)
    exponents = np.frexp(np.where(np.isfinite(largest), largest, 0))[1] - 1
    return np.where(largest > 0, np.ldexp(np.float32(1), np.clip(exponents, -126, 126)), 1).astype(np.float32)

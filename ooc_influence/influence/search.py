"""The best lists of a stripe of train rows.

Where rows are mapped, a quick product finds what can be in a list, and those few pairs are scored again, exactly: the
lists do not depend on the product (:mod:`ooc_influence.influence.products`). Elsewhere, rows are decoded and the scores
of the one float32 product are those of the lists.

Of a sketch, there are lists by upper bounds of the wide rows' scores as well (:mod:`ooc_influence.influence.upper`):
what is not in a list by scores is at most as good as the first in the list by bounds that the former lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.checkpoints import Marks
from ooc_influence.influence.engine import BEYOND, Engine, Entries, Floats, HostEngine
from ooc_influence.influence.exact import exact_scores, pair_weights
from ooc_influence.influence.heap import NO_ROW, Bounds, Numbers, TopKHeap, lowered
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
from ooc_influence.influence.upper import ROUNDING, UpperBounds, residual_norms, residuals_of
from ooc_influence.options import ProductName
from ooc_influence.parallel import Stripe
from ooc_influence.progress import tick
from ooc_influence.store import RawBlock, RowSpan, read_raw_blocks

SIDES = ("proponents", "opponents")
BOUND_SIDES = tuple(f"{side}_bounds" for side in SIDES)
_SIGNS = (1, -1)


def best_of_stripe(
    stripe: Stripe, key: str, work: ScoreTask, top: int, seen: Marks | None, bounds: UpperBounds | None,
    *queries: Floats,
) -> Part:  # fmt: skip
    """Return the best lists of a stripe: largest scores, and largest negated scores.

    Scores and rows of lists (L · M · q, top) by side, with the name of the product, and how many scores were
    found exactly. With ``bounds``, also the lists of the largest upper bounds, of scores and of negated ones.
    """
    with make_engine(work.device) as engine:
        if work.bounded and isinstance(engine, HostEngine):
            return _Search(engine, stripe, work, top, seen, queries, bounds).run(key)
        count = 0 if bounds is None else len(SIDES)
        lists = [
            TopKHeap(len(queries[0]) * work.modules, top, stripe.stop - stripe.start)
            for _ in range(len(SIDES) + count)
        ]  # fmt: skip
        room: Any = None  # the first tile is the largest
        for tile in score_tiles(engine, stripe, key, work, seen, queries):
            scores = tile.scores.reshape(-1, tile.stop - tile.start)
            for heap, sign in zip(lists[: len(SIDES)], _SIGNS, strict=True):
                heap.add(scores, tile.start, engine, sign)
            if bounds is not None:
                factors = bounds.tile(*_row_factors(engine, work, seen, bounds, tile.start, tile.stop))
                room = engine.empty(*scores.shape).reshape(-1) if room is None else room
                for heap, sign in zip(lists[len(SIDES) :], _SIGNS, strict=True):
                    heap.add(engine.raised(scores, sign, factors, room), tile.start, engine)
    found = [heap.best() for heap in lists]
    found[len(SIDES) :] = [
        (_unknown(np.nextafter(most, np.float32(np.inf))), rows) for most, rows in found[len(SIDES) :]
    ]
    return _part(found, "float32", 0)


def reaching_rows(
    stripe: Stripe, key: str, work: ScoreTask, limits: Floats, most: int, seen: Marks | None, bounds: UpperBounds,
    *queries: Floats,
) -> Part:  # fmt: skip
    """Return the pairs of a list and a row of a stripe whose upper bounds are above limits, (2, L · q), by side.

    ``lists`` are indices of limits, ``counts`` how many pairs each has; more than ``most`` are not returned.
    """
    with make_engine(work.device) as engine:
        least: Floats = np.where(limits == np.inf, limits, np.nextafter(limits, np.float32(-np.inf)))
        if work.bounded and isinstance(engine, HostEngine):
            search = _Search(engine, stripe, work, 1, seen, queries, bounds)
            reached = _Reached(engine, least / search.units, most)
            for tile in search.tiles(key):
                reached.add(tile.start, search.raised(tile))
        else:
            reached = _Reached(engine, least, most)
            for each in score_tiles(engine, stripe, key, work, seen, queries):
                scores = each.scores.reshape(-1, each.stop - each.start)
                factors = bounds.tile(*_row_factors(engine, work, seen, bounds, each.start, each.stop))
                room = engine.empty(*scores.shape).reshape(-1)
                reached.add(each.start, ((engine.raised(scores, sign, factors, room), None) for sign in _SIGNS))
    return reached.part()


class _Reached:
    """Pairs above limits, tile by tile; none of lists that have more than ``most``."""

    def __init__(self, engine: Engine, limits: Floats, most: int) -> None:
        known = np.nextafter(np.float32(BEYOND), np.float32(0))  # a bound that says nothing is above every limit
        self._limits: Floats = np.where(limits == np.inf, limits, np.minimum(limits, known)).reshape(-1)
        self._engine, self._most = engine, most
        self._counts = np.zeros(len(self._limits), np.int64)
        self._pairs: list[tuple[Numbers, Numbers]] = [(self._counts[:0], self._counts[:0])]

    def add(self, start: int, sides: Iterable[tuple[Any, Bounds | None]]) -> None:
        """Take in a tile's upper bounds, for each side, from row ``start`` on."""
        for number, (tile, bounds) in enumerate(sides):
            lists = slice(number * len(tile), (number + 1) * len(tile))
            limits = self._limits[lists]
            least = limits if bounds is None else lowered(limits, bounds)
            found = self._engine.above(tile, least, max(self._most, len(tile)), 1)
            parts = [found] if found is not None else [
                each for each in (self._of_list(tile, least, lists, at) for at in range(len(tile))) if each is not None
            ]  # fmt: skip
            for part in parts:
                if bounds is not None and len(part.rows):
                    part = part.where(part.values + bounds.of(part) > limits[part.rows])
                self._counts[lists] += np.bincount(part.rows, minlength=len(tile))
                self._pairs.append((lists.start + part.rows, start + part.columns))
        self._limits[self._counts > self._most] = np.inf

    def _of_list(self, tile: Any, least: Floats, lists: slice, at: int) -> Entries | None:
        """Return a list's entries; None for too many."""
        room = self._most - int(self._counts[lists.start + at])
        found = self._engine.above(tile[at : at + 1], least[at : at + 1], max(0, room), 1)
        if found is None:
            self._counts[lists.start + at] = self._most + 1
            return None
        return found._replace(rows=found.rows + at)

    def part(self) -> Part:
        """Return what :func:`reaching_rows` does."""
        lists, rows = (np.concatenate(values) for values in zip(*self._pairs, strict=True))
        kept = self._counts[lists] <= self._most
        return {"lists": lists[kept], "rows": rows[kept], "counts": self._counts}


def _row_factors(
    engine: Engine, work: ScoreTask, seen: Marks | None, bounds: UpperBounds, start: int, stop: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return :meth:`UpperBounds.rows` of the rows of a tile."""
    weights = row_weights(engine, work, row_shares(work, seen, start, stop), 0, RowSpan(start, stop, None, None))
    return bounds.rows(residual_norms(work.stores[0], start, stop), weights)


def _unknown(most: Floats) -> Floats:
    """Return upper bounds, infinite where they say nothing."""
    return np.asarray(np.where(most >= np.float32(BEYOND), np.float32(np.inf), most))


def _part(lists: Sequence[tuple[Floats, Numbers]], product: ProductName, exact: int) -> Part:
    part: dict[str, npt.NDArray[Any]] = {"product": np.array(product), "exact": np.array(exact)}
    for name, (scores, rows) in zip((*SIDES, *BOUND_SIDES), lists, strict=False):
        part[f"{name}_scores"], part[f"{name}_rows"] = scores, rows
    return part


class BoundedTile(NamedTuple):
    """Scores of train rows ``start`` to ``stop``, (M · L · q, rows), and what the scores may be off by.

    The next tile overwrites them.
    """

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
        upper: UpperBounds | None,
    ) -> None:
        self._engine, self._stripe, self._work, self._seen = engine, stripe, work, seen
        self.units = query_units(queries)
        self._queries = [array / self.units[:, None] for array in queries]
        self._upper = None if upper is None else upper.divided(self.units)
        self._q = len(queries[0])
        self._exact = 0
        rows, lists = stripe.stop - stripe.start, self._q * work.modules
        self._lists = [TopKHeap(lists, top, rows, partial(self._rescore, sign)) for sign in _SIGNS]
        self._room: Floats | None = None
        self._bounds = [] if upper is None else [
            TopKHeap(lists, top, rows, partial(self._most, sign)) for sign in _SIGNS
        ]  # fmt: skip
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
        for tile in self.tiles(key):
            for heap, sign in zip(self._lists, _SIGNS, strict=True):
                heap.add(tile.scores, tile.start, self._engine, sign, tile.bounds)
            if self._bounds:
                for heap, (most, bounds) in zip(self._bounds, self.raised(tile), strict=True):
                    heap.add(most, tile.start, self._engine, 1, bounds)
        for heap, sign in zip(self._bounds, _SIGNS, strict=False):
            heap.replace(None, self._most(sign, *heap.entries()))
        entries = [heap.entries() for heap in self._lists]
        lists, rows = (np.concatenate(part) for part in zip(*entries, strict=True))
        scores = self._scores(lists, rows)
        self._lists[0].replace(None, scores[: len(entries[0][0])])
        self._lists[1].replace(None, -scores[len(entries[0][0]) :])
        found = [self._best(heap.best()) for heap in self._lists]
        for heap in self._bounds:
            most, numbers = heap.best()
            most, numbers = self._best((_unknown(most), numbers))
            found.append((np.nextafter(most, np.float32(np.inf)), numbers))
        return _part(found, self._products[0].name, self._exact)

    def raised(self, tile: BoundedTile) -> Iterator[tuple[Floats, Bounds]]:
        """Yield upper bounds of a tile's scores, and of their negatives, and what these may be off by.

        The next ones overwrite them.
        """
        assert self._upper is not None
        factors, unknown = _row_factors(self._engine, self._work, self._seen, self._upper, tile.start, tile.stop)
        bounds, relative = tile.bounds, tile.bounds.relative
        levels = max(len(bounds.rows), len(factors))
        rows = [np.broadcast_to(each, (levels, *each.shape[1:])) for each in (bounds.rows, factors)]
        own = (ROUNDING + 2 * relative) * np.where(self._upper.beyond[:, None], 0, self._upper.factors)
        groups = np.arange(len(own)) * levels // len(own)
        lists = np.concatenate([bounds.lists, own], axis=1)
        found = Bounds.make(lists, groups, np.concatenate(rows, axis=2), relative)
        if self._room is None:  # the first tile is the largest
            self._room = np.empty(tile.scores.size, np.float32)
        products = self._upper.tile(factors, unknown)
        for sign in _SIGNS:
            yield self._engine.raised(tile.scores, sign, products, self._room), found

    def _most(self, sign: int, lists: Numbers, rows: Numbers) -> Floats:
        """Return upper bounds of ``sign`` · scores of pairs, (c,)."""
        assert self._upper is not None
        unique, indices = np.unique(rows, return_inverse=True)
        if not len(unique):
            return np.empty(0, np.float32)
        weights = pair_weights(self._engine, self._work, self._seen, 0, unique)
        factors, unknown = self._upper.rows(residuals_of(self._work.stores[0], unique), weights)
        return self._upper.above(self._rescore(sign, lists, rows), lists, factors[:, indices], unknown[:, indices])

    def _best(self, found: tuple[Floats, Numbers]) -> tuple[Floats, Numbers]:
        """Return a side's lists in the order (L, M, q), in the units of the queries."""
        scores, rows = found
        shape = (self._work.modules, self._work.lambdas, -1, scores.shape[1])
        with np.errstate(over="ignore"):
            scores = np.where(rows == NO_ROW, -np.inf, scores * np.tile(self.units, self._work.modules)[:, None])

        def ordered(part: Any) -> Any:
            return part.reshape(shape).swapaxes(0, 1).reshape(part.shape)

        return ordered(scores.astype(np.float32)), ordered(rows)

    def _rescore(self, sign: int, lists: Numbers, rows: Numbers) -> Floats:
        return np.float32(sign) * self._scores(lists, rows)

    def _scores(self, lists: Numbers, rows: Numbers) -> Floats:
        self._exact += len(rows)
        args = (self._engine, self._work, self._seen, self._queries, lists, rows)
        return exact_scores(*args, batch=max(1, self._work.block_rows // 4))  # fewer rows at a time are no slower

    def tiles(self, key: str) -> Iterator[BoundedTile]:
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

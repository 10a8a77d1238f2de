"""The best lists of a stripe of train rows.

Where rows are mapped, a quick product finds what can be in a list, and those few pairs are scored again, exactly: the
lists do not depend on the product (:mod:`ooc_influence.influence.products`). Elsewhere, rows are decoded and the scores
of the one float32 product are those of the lists.

Of a sketch, there are lists by upper bounds of the wide rows' scores as well (:mod:`ooc_influence.influence.upper`):
what is not in a list by scores is at most as good as the first in the list by bounds that the former lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
_FEW_ENTRIES, _FEW_OF = 1024, 128  # entries of a tile whose bounds are looked at one by one, at most: this part of it


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
        left = None if bounds is None else bounds.lists.astype(np.float32)
        for tile in score_tiles(engine, stripe, key, work, seen, queries):
            scores = tile.scores.reshape(-1, tile.stop - tile.start)
            for heap, sign in zip(lists[: len(SIDES)], _SIGNS, strict=True):
                heap.add(scores, tile.start, engine, sign)
            if bounds is not None and left is not None:
                factors = left, _row_factors(engine, work, seen, bounds, tile.start, tile.stop)
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
                upper = search.upper(tile)
                for side, sign in enumerate(_SIGNS):
                    found = upper.some(sign, reached.limits(side))
                    if found is not None:
                        reached.append(side, tile.start, found, upper.bounds)
                    else:
                        reached.add(side, tile.start, upper.whole(sign), upper.bounds)
        else:
            reached, left = _Reached(engine, least, most), bounds.lists.astype(np.float32)
            for each in score_tiles(engine, stripe, key, work, seen, queries):
                scores = each.scores.reshape(-1, each.stop - each.start)
                factors = left, _row_factors(engine, work, seen, bounds, each.start, each.stop)
                room = engine.empty(*scores.shape).reshape(-1)
                for side, sign in enumerate(_SIGNS):
                    reached.add(side, each.start, engine.raised(scores, sign, factors, room))
    return reached.part()


class _Reached:
    """Pairs above limits, tile by tile; none of lists that have more than ``most``."""

    def __init__(self, engine: Engine, limits: Floats, most: int) -> None:
        known = np.nextafter(np.float32(BEYOND), np.float32(0))  # a bound that says nothing is above every limit
        self._limits: Floats = np.where(limits == np.inf, limits, np.minimum(limits, known)).reshape(-1)
        self._engine, self._most = engine, most
        self._counts = np.zeros(len(self._limits), np.int64)
        self._pairs: list[tuple[Numbers, Numbers]] = [(self._counts[:0], self._counts[:0])]

    def _side(self, side: int) -> slice:
        half = len(self._limits) // len(SIDES)
        return slice(side * half, (side + 1) * half)

    def limits(self, side: int) -> Floats:
        """Return a side's limits, (L · q,); infinite for lists that have too many."""
        return self._limits[self._side(side)]

    def add(self, side: int, start: int, tile: Any, bounds: Bounds | None = None) -> None:
        """Take in a tile's upper bounds of a side, from row ``start`` on."""
        limits, counts = self.limits(side), self._counts[self._side(side)]
        least = limits if bounds is None else lowered(limits, bounds)
        found = self._engine.above(tile, least, max(self._most, len(tile)), 1)
        if found is not None:
            self.append(side, start, found, bounds)
            return
        for at in range(len(tile)):
            of_list = self._engine.above(tile[at : at + 1], least[at : at + 1], max(0, self._most - int(counts[at])), 1)
            if of_list is None:
                counts[at], limits[at] = self._most + 1, np.inf
            else:
                self.append(side, start, of_list._replace(rows=of_list.rows + at), bounds)

    def append(self, side: int, start: int, found: Entries, bounds: Bounds | None) -> None:
        """Take in some entries of such a tile."""
        limits, counts = self.limits(side), self._counts[self._side(side)]
        if bounds is not None and len(found.rows):
            found = found.where(found.values + bounds.of(found) > limits[found.rows])
        counts += np.bincount(found.rows, minlength=len(counts))
        self._pairs.append((self._side(side).start + found.rows, start + found.columns))
        limits[counts > self._most] = np.inf

    def part(self) -> Part:
        """Return what :func:`reaching_rows` does."""
        lists, rows = (np.concatenate(values) for values in zip(*self._pairs, strict=True))
        kept = self._counts[lists] <= self._most
        return {"lists": lists[kept], "rows": rows[kept], "counts": self._counts}


def _row_factors(
    engine: Engine, work: ScoreTask, seen: Marks | None, bounds: UpperBounds, start: int, stop: int
) -> Floats:
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


class _UpperTile:
    """Upper bounds of the scores of a tile, and of their negatives: of all, or of those that can be above limits."""

    def __init__(
        self, engine: HostEngine, tile: BoundedTile, upper: UpperBounds, factors: Floats, room: Floats
    ) -> None:  # fmt: skip
        self._engine, self._tile, self._upper, self._factors, self._room = engine, tile, upper, factors, room
        left, bounds = upper.lists, tile.bounds
        most = factors.max(axis=2, initial=0).astype(np.float64)
        most = most[np.arange(len(left)) * len(factors) // len(left)]
        self._slack = np.einsum("mt,mt->m", left, most)
        # of the arithmetic with bounds in float32, but for those that say nothing
        own = (ROUNDING + 2 * bounds.relative) * np.einsum("mt,mt->m", left[:, :-2], most[:, :-2])
        rows = np.concatenate([bounds.rows, np.ones((*bounds.rows.shape[:2], 1))], axis=2)
        ends = np.concatenate([bounds.most, np.ones((len(bounds.most), 1))], axis=1)
        lists = np.concatenate([bounds.lists, own[:, None]], axis=1)
        self.bounds = bounds._replace(lists=lists, rows=rows, most=ends)
        self._left = left.astype(np.float32)

    def whole(self, sign: int) -> Floats:
        """Return the upper bounds of ``sign`` · scores; the next ones overwrite them."""
        return self._engine.raised(self._tile.scores, sign, (self._left, self._factors), self._room)  # type: ignore[no-any-return]

    def some(self, sign: int, limits: Floats) -> Entries | None:
        """Return those that can be above limits, (m,); None where they are too many to look at one by one."""
        tile = self._tile.scores
        least = lowered(limits - self._slack, self.bounds)
        found = self._engine.above(tile, least, max(_FEW_ENTRIES, tile.size // _FEW_OF), sign)
        if found is None or not len(found.rows):
            return found
        slack = self._upper.slack(found.rows, found.columns, self._factors)
        return found._replace(values=np.minimum(found.values + slack, BEYOND).astype(np.float32))

    def add_to(self, heap: TopKHeap, sign: int) -> None:
        """Take the bounds of ``sign`` · scores in to lists."""
        limits = heap.limits
        found = None if limits is None else self.some(sign, limits)
        if found is None or not heap.append(found, self._tile.start, self.bounds):
            heap.add(self.whole(sign), self._tile.start, self._engine, 1, self.bounds)


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
                upper = self.upper(tile)
                for heap, sign in zip(self._bounds, _SIGNS, strict=True):
                    upper.add_to(heap, sign)
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

    def upper(self, tile: BoundedTile) -> _UpperTile:
        """Return the upper bounds of a tile's scores."""
        assert self._upper is not None
        if self._room is None:  # the first tile is the largest
            self._room = np.empty(tile.scores.size, np.float32)
        factors = _row_factors(self._engine, self._work, self._seen, self._upper, tile.start, tile.stop)
        return _UpperTile(self._engine, tile, self._upper, factors, self._room)

    def _most(self, sign: int, lists: Numbers, rows: Numbers) -> Floats:
        """Return upper bounds of ``sign`` · scores of pairs, (c,)."""
        assert self._upper is not None
        unique, indices = np.unique(rows, return_inverse=True)
        if not len(unique):
            return np.empty(0, np.float32)
        weights = pair_weights(self._engine, self._work, self._seen, 0, unique)
        factors = self._upper.rows(residuals_of(self._work.stores[0], unique), weights)
        return self._upper.above(self._rescore(sign, lists, rows), lists, indices, factors)

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

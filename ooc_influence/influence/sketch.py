"""Lists by way of a sketch: a small store of the same rows names candidates, and those are scored exactly.

The product of a sketch's row and a turned query (:func:`ooc_influence.compress.query_turn`) is the score without what
the sketch leaves out. So lists by the sketch hold the best rows with a *recall* below one, which grows with their
length. How long they must be is measured: some queries are compared with all rows once, for each setting that scores
depend on, and the ranks that their best rows have in the sketch are kept beside it (:mod:`.recall`). The scores of
lists are those of the wide rows, by the same arithmetic as without a sketch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack, cast

import numpy as np
import numpy.typing as npt

from ooc_influence.compress import (
    SKETCH_DIMS,
    check_sketch,
    has_residuals,
    query_turn,
    residual_factors,
    write_sketch,
)
from ooc_influence.errors import CurvatureNotFoundError, InputError, StaleCurvatureError, StoreWriteError, warn
from ooc_influence.fingerprint import json_digest
from ooc_influence.influence.checkpoints import Checkpoint, Marks
from ooc_influence.influence.costs import TileMemory
from ooc_influence.influence.engine import Floats, HostEngine
from ooc_influence.influence.exact import PAIR_BYTES, exact_scores
from ooc_influence.influence.heap import ENTRY_BYTES, NO_ROW, Numbers
from ooc_influence.influence.lists import ListPass, Lists, check_rows, top_tiles
from ooc_influence.influence.norms import RowNorms
from ooc_influence.influence.proof import Proof, Read, chosen, highest_outside, list_ends
from ooc_influence.influence.recall import Recall, keep_norms, keep_recall, kept_norms, kept_recall, list_ranks
from ooc_influence.influence.request import PreconditionedQueries, Queries, ScoreRequest
from ooc_influence.influence.search import SIDES, query_units, reaching_rows
from ooc_influence.influence.self_scores import self_scores
from ooc_influence.influence.tiles import Part, ScoreParts, ScoreTask
from ooc_influence.influence.upper import UpperBounds
from ooc_influence.options import (
    ReduceOptions,
    SelfInfluenceOptions,
    SketchOptions,
    Striped,
    TopOptions,
    complete,
    select,
    takes,
)
from ooc_influence.parallel import Stripe, check_workers
from ooc_influence.progress import Progress, tick
from ooc_influence.store import GradientStore, PathLike, StorePath, as_store, parse_path

logger = logging.getLogger("ooc_influence")
_MEASURED = 32  # queries that recall is measured with
_MEASURED_TOP = 100  # their best rows that are looked for, at least
_LONGEST = 64  # candidates of a measured list at most, for each of those rows, or a thousandth of all
_MOST_CANDIDATES = 2**15
_FIRST, _FIRST_TIMES = 256, 8  # candidates of a list that is to be proven, at least, and for each of its rows
# further rows of such a list that are scored one by one: this part of all at most; more, and all rows are searched
_LEAST_REACHED, _REACHED_OF = 1024, 20


@takes(SketchOptions)
def sketch_store(
    train: GradientStore | PathLike,
    out: PathLike | None = None,
    r: int | None = None,
    **options: Unpack[SketchOptions],
) -> GradientStore:
    """Make a small store of a train store's rows that finds candidates for lists, or resume, or add appended rows.

    Rows are written in the largest directions of their eigenbasis, as :func:`reduce_store` does, in whole numbers.
    Then the candidates that lists need are measured at the default settings, where a curvature is there.

    Parameters
    ----------
    train : GradientStore or path
        (n, k), finished: kept entries, or an eigenbasis.
    out : path, optional
        Where to make it; default beside the train store, ``train.sketch.zarr`` for ``train.zarr``.
    r : int, optional
        Numbers stored a row; default 256, or k where that is less.
    **options : SketchOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading; (n, r). It is what ``sketch=`` of :func:`top_influential` takes.

    Raises
    ------
    InputError, MismatchError, StoreExistsError, MemoryBudgetError, NonFiniteError
        As for :func:`reduce_store`.

    Examples
    --------
    >>> sketch = ooc.sketch_store("train.zarr")  # doctest: +SKIP
    >>> top = ooc.top_influential("query.zarr", "train.zarr", sketch=sketch)  # doctest: +SKIP
    """
    source, striped = as_store(train), select(Striped, options)
    path = sketch_path(source.path) if out is None else parse_path(out)
    asked: Any = {**striped, **{name: options[name] for name in ("rows", "dtype", "storage")}}
    r = min(SKETCH_DIMS, source.k) if r is None else r
    sketch = write_sketch(source, path, r, complete(ReduceOptions, asked))
    try:
        scoring = ScoreRequest.open(options["query"], source, {}, lists=True)
    except (CurvatureNotFoundError, StaleCurvatureError):
        what = "%s has no curvature of its rows yet: the first lists by %s measure how many candidates they need"
        logger.info(what, source.path, path)
        return sketch
    SketchSearch.of(scoring, sketch, complete(TopOptions, cast("TopOptions", striped))).recall(_MEASURED_TOP)
    return sketch


def sketch_path(train: StorePath) -> StorePath:
    """Return where a train store's sketch is by default."""
    name = train.name
    stem = name.removesuffix(".zarr")
    return train.parent / f"{stem}.sketch{name[len(stem) :]}"


def sketched_lists(scoring: ScoreRequest, top: int, options: TopOptions) -> Lists:
    """Return every query's best lists, of the candidates that ``options["sketch"]`` names; for every λ."""
    if len(scoring.checkpoints) > 1:
        raise InputError("expected one train store to find candidates for by a sketch; received several: leave it out")
    if not 0 < options["recall"] <= 1:
        raise InputError(f"expected 0 < recall <= 1; received {options['recall']}")
    sketch = options["sketch"]
    assert sketch is not None
    return SketchSearch.of(scoring, as_store(sketch), options).run(top)


@dataclass(frozen=True, eq=False)
class SketchSearch:
    """A search for the lists of one request.

    Attributes
    ----------
    scoring : ScoreRequest
        The request.
    sketch : GradientStore
        (n, r).
    options : TopOptions
        All of them.
    """

    scoring: ScoreRequest
    sketch: GradientStore
    options: TopOptions

    @classmethod
    def of(cls, scoring: ScoreRequest, sketch: GradientStore, options: TopOptions) -> SketchSearch:
        """Return the search, checked."""
        check_sketch(sketch, scoring.checkpoints[0].train)
        return cls(scoring, sketch, options)

    @property
    def _checkpoint(self) -> Checkpoint:
        return self.scoring.checkpoints[0]

    @cached_property
    def _turn(self) -> Floats:
        return query_turn(self.sketch, self._checkpoint.train)

    @cached_property
    def _seen(self) -> Marks | None:
        """Rows that may be in lists: without those that were dropped since the sketch was made."""
        train, seen = self._checkpoint.train, self.scoring.seen
        if not train.has_dropped:
            return seen
        live = ~train.small("dropped", 0, train.n)[None]
        return live if seen is None else seen & live

    @cached_property
    def _names(self) -> tuple[StorePath, StorePath, str]:
        """Where norms and ranks at these settings are kept, and the digest of all that they depend on."""
        checkpoint, scoring = self._checkpoint, self.scoring
        curvature = None if checkpoint.curvature is None else checkpoint.curvature.__dask_tokenize__()
        facts = {"curvature": curvature, "damping": checkpoint.lambdas.tolist(), "normalize": scoring.normalize}
        if scoring.combine != "mean":
            facts["combine"] = scoring.combine
        rows = [[store.identity, store.rows_digest()] for store in (checkpoint.train, self.sketch)]
        folder, name = self.sketch.path / "candidates", json_digest(facts)[:16]
        return folder / f"{name}-norms", folder / f"{name}-ranks", json_digest({**facts, "rows": rows})

    @cached_property
    def norms(self) -> RowNorms | None:
        """Where the train rows' norms are kept, computed where they are not; None where they are not needed."""
        if self.scoring.normalize is None or self._checkpoint.norms is not None:
            return self._checkpoint.norms if self.scoring.normalize else None
        path, _, digest = self._names
        kept = kept_norms(path, digest)
        if kept is None:
            asked = complete(SelfInfluenceOptions, cast("SelfInfluenceOptions", select(Striped, self.options)))
            everyone = replace(self.scoring, seen=None, several=True)
            kept = keep_norms(path, digest, self_scores(everyone, asked))
        return kept

    def recall(self, top: int) -> Recall:
        """Return what was measured for lists of ``top``, or measure it."""
        _, path, digest = self._names
        kept = kept_recall(path, digest)
        if kept is not None and kept.ranks.shape[-1] >= min(top, self.scoring.n):
            return kept
        found = self._measure(max(top, _MEASURED_TOP))
        try:
            keep_recall(path, digest, found)
        except StoreWriteError as error:  # a sketch of somebody else's: measured again by the next search
            logger.warning("%s", error)
        return found

    def run(self, top: int) -> Lists:
        """Return the lists of all queries."""
        asked, top = self.options, min(top, self.scoring.n)
        complete = asked["recall"] == 1
        proving = complete or asked["prove"]
        if proving and not has_residuals(self.sketch):
            raise InputError(
                f"expected a sketch with the norms of what it leaves out of rows, to prove lists complete; received "
                f"{self.sketch.path}, which has none: remove it and run 'ooc-influence sketch' again, or give a recall "
                "below 1 (--recall) without prove (--prove)"
            )
        if complete:
            count, found = min(self.scoring.n, max(_FIRST, _FIRST_TIMES * top)), {"recall": 1.0, "measured": None}
        else:
            count, found = self._measured_count(top)
        facts: dict[str, Any] = {"sketch": str(self.sketch.path), "candidates": count, **found}
        of_parts = {"top": top, "candidates": count, "sketch": self.sketch.identity, "proving": proving}
        parts = ScoreParts(asked["resume"], self.scoring.digest(kind="sketched", **of_parts))
        with parts.claimed():
            first = self._candidates(self.scoring, self.scoring.precondition, count, parts, proving=proving)
            lists = self._exact(first, top, parts)
            if first.bounds is not None:
                outside = highest_outside(first.bounds, first.rows)[:, :, 0]
                proof = Proof.of(lists.scores[:, :, 0], lists.rows[:, :, 0], outside)
                facts |= proof.facts
                lists = lists._replace(proven=proof.queries)
                if complete:
                    lists, more = self._complete(lists, proof, first.rows, parts)
                    facts |= more
        self.scoring.warn_outside(lists.outside)
        return lists._replace(search={**lists.search, **facts})

    def _measured_count(self, top: int) -> tuple[int, dict[str, Any]]:
        """Return how many candidates lists take, by what was measured, and what :attr:`Lists.search` says of it."""
        asked, recall = self.options, self.recall(top)
        count = min(self.scoring.n, recall.candidates(top, asked["recall"]))
        expected = recall.of(count, top)
        if expected < asked["recall"]:
            warn(
                f"{self.sketch.path} finds {expected:.1%} of the best {top} rows of a query among {count} candidates, "
                f"measured on {recall.measured}, and not {asked['recall']:.1%}: make a sketch of more numbers a row "
                "(--dims), or search without"
            )
        return count, {"recall": expected, "measured": recall.measured}

    def _slots(self) -> int:
        return check_workers(self.options["workers"])

    def _sketched(self, sized: ScoreRequest) -> tuple[ScoreRequest, ScoreTask]:
        """Return the request and the task of the sketch's rows, for as many queries as ``sized`` has."""
        request = replace(sized, checkpoints=(replace(self._checkpoint, train=self.sketch),))
        task = replace(
            request.work(1, normalized=False, product=self.options["product"]),
            curvatures=None if self.norms is None else (None,), norms=(self.norms,),
        )  # fmt: skip
        check_rows(task)
        return request, task

    def _turned(self, read: Read, *, proving: bool) -> Read:
        """Return what reads queries of the sketch; ``proving`` asks for :attr:`PreconditionedQueries.bounds`."""
        train = self._checkpoint.train
        weights = self._wide(1).norm_weights(0) if proving else None
        units = 8 if weights is None else train.k + 16  # of norms, or of the sums that both are

        def turned(start: int, stop: int) -> PreconditionedQueries:
            queries, bounds = read(start, stop), None
            if proving:
                factors = residual_factors(self.sketch, train, self._turn, queries.arrays[0], units)
                bounds = UpperBounds.of(factors, weights)
            return replace(queries, arrays=[array @ self._turn for array in queries.arrays], bounds=bounds)

        return turned

    def _candidates(
        self, sized: ScoreRequest, read: Read, count: int, parts: ScoreParts, *, proving: bool = False
    ) -> Lists:  # fmt: skip
        """Return the lists of ``count`` by the sketch, for as many queries as ``sized`` has."""
        asked, slots, k = self.options, self._slots(), self._checkpoint.train.k
        request, task = self._sketched(sized)
        tile = top_tiles(count, sized.lambdas * sized.q, sized.n, bounded=task.bounded, upper=proving)
        tile = tile._replace(per_query=tile.per_query + 32 * k)  # the query in the columns of the train rows
        blocks, rows = request.plan("candidates", asked["memory"], slots, tile, queries=parts.queries)
        found = ListPass(replace(task, block_rows=rows), self._seen, blocks, parts, slots)
        with Progress("candidates", len(blocks) * sized.n, asked["progress"]) as bar:
            return found.run(self._turned(read, proving=proving), count, bar)

    def _wide(self, block_rows: int) -> ScoreTask:
        """Return the task of the train rows, with kept norms where they cannot be found of single rows."""
        task = self.scoring.work(block_rows)
        return task if not task.computes_norms(0) or task.diagonal else replace(task, norms=(self.norms,))

    def _exact(self, first: Lists, top: int, parts: ScoreParts) -> Lists:
        """Return the lists of the best candidates by their exact scores."""
        scoring = self.scoring
        lambdas, q, count = scoring.lambdas, scoring.q, first.rows.shape[-1]
        blocks, block_rows = self._plan_pairs(scoring, count)
        work = self._wide(block_rows)
        scores = np.full(first.rows.shape, -np.inf, np.float32)
        with Progress("exact scores", len(blocks) * scoring.n, self.options["progress"]) as bar:
            for start, stop in blocks:
                queries = work.read_as_rows(scoring.precondition(start, stop).arrays)
                block = first.rows[..., start:stop, :].reshape(len(SIDES), lambdas * (stop - start), count)
                where = np.nonzero(block != NO_ROW)
                where = tuple(part[np.argsort(block[where], kind="stable")] for part in where)
                pairs = where[1], block[where]
                exact = self._score(work, queries, pairs, parts, f"{start}-{stop}-pairs", bar)
                of_block = np.full(block.shape, -np.inf, np.float32)
                of_block[where] = _signed(exact, where[0])
                scores[..., start:stop, :] = of_block.reshape(*scores.shape[:3], stop - start, count)
        scores, rows = _best(scores, first.rows, top)
        pairs_scored = int((first.rows != NO_ROW).sum())
        search = {**first.search, "rescored": pairs_scored / (lambdas * q * scoring.n)}
        return Lists(scores, rows, first.outside, search)

    def _plan_pairs(self, sized: ScoreRequest, count: int) -> tuple[list[tuple[int, int]], int]:
        """Return blocks of queries and of rows to score ``count`` rows of each list with."""
        per_query = len(SIDES) * count * (3 * PAIR_BYTES + ENTRY_BYTES)
        tile = TileMemory(per_score=0, per_query=per_query, fixed=per_query * sized.lambdas * sized.q)
        return sized.plan("exact scores", self.options["memory"], self._slots(), tile)

    def _score(
        self, work: ScoreTask, queries: list[Floats], pairs: tuple[Numbers, Numbers], parts: ScoreParts, name: str,
        bar: Progress,
    ) -> Floats:  # fmt: skip
        """Return the exact scores of pairs of a list and a row, ascending by row, (c,)."""
        lists, rows = pairs
        exact = np.empty(len(rows), np.float32)

        def put(stripe: Stripe, part: Part) -> None:
            exact[_within(stripe, rows)] = part["scores"]

        parts.run(
            name, _score_pairs, work, bar, self._seen, lists, rows, *queries, slots=self._slots(), on_result=put
        )  # fmt: skip
        return exact

    def _complete(
        self, lists: Lists, proof: Proof, candidates: Numbers, parts: ScoreParts
    ) -> tuple[Lists, dict[str, Any]]:  # fmt: skip
        """Return lists that are proven complete, and facts of the search.

        Of lists that the first candidates do not prove, every row whose upper bound reaches the last entry is scored as
        well. Where these are too many, all rows are.
        """
        scoring, asked = self.scoring, self.options
        numbers = np.flatnonzero(~proof.lists.all((0, 1)) & proof.live)
        most = max(_LEAST_REACHED, min(_MOST_CANDIDATES, scoring.n // _REACHED_OF))
        limits = np.where(proof.lists, np.inf, list_ends(lists.scores[:, :, 0], lists.rows[:, :, 0])).astype("f4")
        sized, read = self._some(numbers), chosen(scoring.precondition, numbers)
        turned, pairs, scanned = self._turned(read, proving=True), 0, [numbers[:0]]
        scores, rows = lists.scores.copy(), lists.rows.copy()
        blocks, block_rows = self._plan_pairs(sized, most) if len(numbers) else ([], 1)
        work = self._wide(block_rows)
        with Progress("proof", 2 * len(blocks) * scoring.n, asked["progress"]) as bar:
            for start, stop in blocks:
                some = numbers[start:stop]
                reached, over = self._reach(
                    turned(start, stop), limits[:, :, some], most, parts, f"{start}-{stop}", bar
                )
                reached = _without_candidates(reached, candidates[:, :, 0, some])
                scanned.append(some[over])
                queries = work.read_as_rows(read(start, stop).arrays)
                per_side = scoring.lambdas * len(some)
                sides, of_side = np.divmod(reached[0], per_side)
                exact = self._score(work, queries, (of_side, reached[1]), parts, f"more-{start}-{stop}", bar)
                own = np.ascontiguousarray(scores[:, :, 0, some]), np.ascontiguousarray(rows[:, :, 0, some])
                _add_pairs(*own, reached, _signed(exact, sides))
                scores[:, :, 0, some], rows[:, :, 0, some] = own
                pairs += len(exact)
        whole = np.concatenate(scanned)
        if len(whole):
            found = self._scan(whole, rows.shape[-1], parts)
            scores[:, :, :, whole], rows[:, :, :, whole] = found.scores, found.rows
        share = pairs / (scoring.lambdas * scoring.q * scoring.n)
        logger.info(
            "%s: %d of %d queries were not proven by the first candidates; %.2g of all scores were computed for them, "
            "and %d were compared with all rows", self.sketch.path, len(numbers), proof.live.sum(), share, len(whole),
        )  # fmt: skip
        proven = np.broadcast_to(proof.live, proof.queries.shape)
        search = {**lists.search, "rescored": lists.search["rescored"] + share}
        facts = {"proven_queries": int(proof.live.sum()), "proven_share": 1.0, "scanned_queries": len(whole)}
        return lists._replace(scores=scores, rows=rows, search=search, proven=proven), facts

    def _some(self, numbers: Numbers) -> ScoreRequest:
        """Return a request of as many queries."""
        return replace(self.scoring, queries=Queries(np.empty(len(numbers)), None))

    def _reach(
        self, queries: PreconditionedQueries, limits: Floats, most: int, parts: ScoreParts, name: str, bar: Progress
    ) -> tuple[tuple[Numbers, Numbers], npt.NDArray[np.bool_]]:
        """Return pairs whose upper bounds reach limits (2, L, m), ascending by row, and which queries have too many.

        Of a query with a list of more than ``most``, none are returned.
        """
        count = limits.shape[-1]
        sized, slots = self._some(np.empty(count, np.int64)), self._slots()
        request, task = self._sketched(sized)
        tile = top_tiles(1, sized.lambdas * count, sized.n, bounded=task.bounded, upper=True)
        _, rows = request.plan("proof", self.options["memory"], slots, tile, queries=count)
        work, counts = replace(task, block_rows=rows), np.zeros(limits.size, np.int64)
        found: list[Part] = []

        def add(stripe: Stripe, part: Part) -> None:
            counts[:] += part["counts"]
            found.append({each: part[each][counts[part["lists"]] <= most] for each in ("lists", "rows")})

        parts.run(
            f"reached-{name}", reaching_rows, work, bar, limits.reshape(len(SIDES), -1), most, self._seen,
            queries.bounds, *work.read_as_rows(queries.arrays), slots=slots, on_result=add,
        )  # fmt: skip
        many = counts.reshape(limits.shape) > most
        over = np.asarray(many.any(axis=(0, 1)), np.bool_)
        lists, numbers = (np.concatenate([part[each] for part in found]) for each in ("lists", "rows"))
        kept = ~over[lists % count]
        order = np.argsort(numbers[kept], kind="stable")
        return (lists[kept][order], numbers[kept][order]), over

    def _scan(self, numbers: Numbers, top: int, parts: ScoreParts) -> Lists:
        """Return the lists of some queries among all train rows."""
        sized, task, asked, slots = self._some(numbers), self._wide(1), self.options, self._slots()
        tile = top_tiles(top, sized.lambdas * sized.q, sized.n, bounded=task.bounded)
        blocks, rows = sized.plan("top", asked["memory"], slots, tile)
        whole = ListPass(replace(task, block_rows=rows), self._seen, blocks, parts, slots, "all-")
        with Progress("top", len(blocks) * sized.n, asked["progress"]) as bar:
            return whole.run(chosen(self.scoring.precondition, numbers), top, bar)

    def _measure(self, top: int) -> Recall:
        """Find the best rows of some queries among all train rows, and their ranks in the sketch."""
        numbers, own, read, measured = self._sample()
        asked, slots = self.options, self._slots()
        sized = self._some(numbers)
        top = min(top + 1, sized.n)  # a train row's own best is itself
        longest = min(sized.n, max(1024, _LONGEST * top, min(_MOST_CANDIDATES, sized.n // 1000)))
        parts = ScoreParts(None, "")

        some = chosen(read, numbers)
        task = self._wide(1)
        tile = top_tiles(top, sized.lambdas * sized.q, sized.n, bounded=task.bounded)
        blocks, rows = sized.plan("recall", asked["memory"], slots, tile)
        with Progress("recall", len(blocks) * sized.n, asked["progress"]) as bar:
            whole = ListPass(replace(task, block_rows=rows), self._seen, blocks, parts, slots).run(some, top, bar)
        candidates = self._candidates(sized, some, longest, parts)
        pairs = zip(_flat(whole.rows), _flat(candidates.rows), strict=True)
        own = np.tile(own, len(_flat(whole.rows)) // len(numbers))
        ranks = [list_ranks(_without(best, row), found) for (best, found), row in zip(pairs, own, strict=True)]
        shape = len(SIDES), sized.lambdas, len(numbers), -1
        return Recall(np.reshape(ranks, shape), longest, measured)

    def _sample(self) -> tuple[Numbers, Numbers, Read, str]:
        """Return queries to measure with: numbers, their own train rows or -1, how to read one, and a description."""
        if self.scoring.q >= _MEASURED:
            numbers = np.linspace(0, self.scoring.q - 1, _MEASURED).astype(np.int64)
            query = self._checkpoint.query
            assert query is not None
            return (
                numbers,
                np.full(len(numbers), -1),
                self.scoring.precondition,
                f"{len(numbers)} queries of {query.path}",
            )
        train = self._checkpoint.train
        numbers = np.unique(np.linspace(0, train.n - 1, _MEASURED).astype(np.int64))
        live = np.array([self._seen is None or bool(self._seen[0, number]) for number in numbers])
        numbers = numbers[live]
        rows = Queries(np.broadcast_to(np.int64(0), train.n), None)
        as_queries = (replace(self._checkpoint, query=train),)
        request = replace(self.scoring, checkpoints=as_queries, queries=rows, controls=())
        return numbers, numbers, request.precondition, f"{len(numbers)} train rows"


def _within(stripe: Stripe, rows: Numbers) -> slice:
    """Return where the rows of a stripe are among some rows, ascending."""
    low, high = np.searchsorted(rows, (stripe.start, stripe.stop)).tolist()
    return slice(low, high)


def _score_pairs(
    stripe: Stripe, key: str, work: ScoreTask, seen: Marks | None, lists: Numbers, rows: Numbers, *queries: Floats
) -> Part:
    """Return the exact scores of the pairs of a list and a row of a stripe."""
    inside = _within(stripe, rows)
    units = query_units(queries)
    scaled = [array / units[:, None] for array in queries]
    with HostEngine() as engine:
        scores = exact_scores(engine, work, seen, scaled, lists[inside], rows[inside], work.block_rows)
    tick(key, stripe.stop - stripe.start)
    with np.errstate(over="ignore"):
        return {"scores": scores * units[lists[inside]]}


def _signed(scores: Floats, sides: Numbers) -> Floats:
    """Return scores, negated of the second side; -inf for NaN."""
    signed = np.where(sides == 0, np.float32(1), np.float32(-1)) * scores
    return np.asarray(np.where(np.isnan(signed), np.float32(-np.inf), signed), np.float32)


def _best(scores: Floats, rows: Numbers, top: int) -> tuple[Floats, Numbers]:
    """Return the best of lists (..., c), in order."""
    rows = np.where(scores == -np.inf, NO_ROW, rows)
    order = np.lexsort((rows, -scores))[..., :top]
    return np.take_along_axis(scores, order, -1), np.take_along_axis(rows, order, -1)


def _without_candidates(pairs: tuple[Numbers, Numbers], candidates: Numbers) -> tuple[Numbers, Numbers]:
    """Return the pairs of a list and a row that are not among the candidates of lists (2, L, m, c)."""
    lists, rows = pairs
    fresh = np.ones(len(rows), np.bool_)
    flat = _flat(candidates)
    for number, mine in _by_list(lists):
        fresh[mine] = ~np.isin(rows[mine], flat[number])
    return lists[fresh], rows[fresh]


def _by_list(lists: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Yield each list that there are pairs of, and their indices."""
    order = np.argsort(lists, kind="stable")
    numbers, starts = np.unique(lists[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, starts[1:]) if len(numbers) else [], strict=True)


def _add_pairs(list_scores: Floats, list_rows: Numbers, pairs: tuple[Numbers, Numbers], scores: Floats) -> None:
    """Put pairs of a list and a row with these scores into lists (2, L, m, top), in place, where they are better."""
    top = list_rows.shape[-1]
    best_scores, best_rows = list_scores.reshape(-1, top), list_rows.reshape(-1, top)
    for number, mine in _by_list(pairs[0]):
        all_scores = np.concatenate([best_scores[number], scores[mine]])
        all_rows = np.concatenate([best_rows[number], pairs[1][mine]])
        best_scores[number], best_rows[number] = _best(all_scores, all_rows, top)


def _flat(rows: Numbers) -> Numbers:
    return rows.reshape(-1, rows.shape[-1])


def _without(rows: Numbers, own: npt.NDArray[np.int64]) -> Numbers:
    """Return a list's rows without a query's own, one fewer."""
    return np.asarray(rows[rows != own][: len(rows) - 1])

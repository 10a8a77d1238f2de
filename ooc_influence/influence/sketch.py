"""Lists by way of a sketch: a small store of the same rows names candidates, and those are scored exactly.

The product of a sketch's row and a turned query (:func:`ooc_influence.compress.query_turn`) is the score without what
the sketch leaves out. So lists by the sketch hold the best rows with a *recall* below one, which grows with their
length. How long they must be is measured: some queries are compared with all rows once, for each setting that scores
depend on, and the ranks that their best rows have in the sketch are kept beside it (:mod:`.recall`). The scores of
lists are those of the wide rows, by the same arithmetic as without a sketch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack, cast

import numpy as np
import numpy.typing as npt

from ooc_influence.compress import SKETCH_DIMS, check_sketch, query_turn, write_sketch
from ooc_influence.errors import CurvatureNotFoundError, InputError, StaleCurvatureError, StoreWriteError, warn
from ooc_influence.fingerprint import json_digest
from ooc_influence.influence.checkpoints import Checkpoint, Marks
from ooc_influence.influence.costs import TileMemory
from ooc_influence.influence.engine import Floats, HostEngine
from ooc_influence.influence.exact import PAIR_BYTES, exact_scores
from ooc_influence.influence.heap import ENTRY_BYTES, NO_ROW, Numbers
from ooc_influence.influence.lists import ListPass, Lists, check_rows, top_tiles
from ooc_influence.influence.norms import RowNorms
from ooc_influence.influence.recall import Recall, keep_norms, keep_recall, kept_norms, kept_recall, list_ranks
from ooc_influence.influence.request import PreconditionedQueries, Queries, ScoreRequest
from ooc_influence.influence.search import SIDES, query_units
from ooc_influence.influence.self_scores import self_scores
from ooc_influence.influence.tiles import Part, ScoreParts, ScoreTask
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
Read = Callable[[int, int], PreconditionedQueries]


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
        recall = self.recall(top)
        count = min(self.scoring.n, recall.candidates(top, asked["recall"]))
        expected = recall.of(count, top)
        if expected < asked["recall"]:
            warn(
                f"{self.sketch.path} finds {expected:.1%} of the best {top} rows of a query among {count} candidates, "
                f"measured on {recall.measured}, and not {asked['recall']:.1%}: make a sketch of more numbers a row "
                "(--dims), or search without"
            )
        facts = {"top": top, "candidates": count, "sketch": self.sketch.identity}
        parts = ScoreParts(asked["resume"], self.scoring.digest(kind="sketched", **facts))
        with parts.claimed():
            first = self._candidates(self.scoring, self.scoring.precondition, count, parts)
            lists = self._exact(first, top, parts)
        self.scoring.warn_outside(lists.outside)
        return lists._replace(search={
            **lists.search, "sketch": str(self.sketch.path), "candidates": count, "recall": expected,
            "measured": recall.measured,
        })  # fmt: skip

    def _slots(self) -> int:
        return check_workers(self.options["workers"])

    def _candidates(self, sized: ScoreRequest, read: Read, count: int, parts: ScoreParts) -> Lists:
        """Return the lists of ``count`` by the sketch, for as many queries as ``sized`` has."""
        asked, slots, k = self.options, self._slots(), self._checkpoint.train.k
        request = replace(sized, checkpoints=(replace(self._checkpoint, train=self.sketch),))
        task = replace(
            request.work(1, normalized=False, product=asked["product"]),
            curvatures=None if self.norms is None else (None,), norms=(self.norms,),
        )  # fmt: skip
        check_rows(task)
        tile = top_tiles(count, sized.lambdas * sized.q, sized.n, bounded=task.bounded)
        tile = tile._replace(per_query=tile.per_query + 32 * k)  # the query in the columns of the train rows
        blocks, rows = request.plan("candidates", asked["memory"], slots, tile, queries=parts.queries)

        def turned(start: int, stop: int) -> PreconditionedQueries:
            queries = read(start, stop)
            return replace(queries, arrays=[array @ self._turn for array in queries.arrays])

        found = ListPass(replace(task, block_rows=rows), self._seen, blocks, parts, slots)
        with Progress("candidates", len(blocks) * sized.n, asked["progress"]) as bar:
            return found.run(turned, count, bar)

    def _wide(self, block_rows: int) -> ScoreTask:
        """Return the task of the train rows, with kept norms where they cannot be found of single rows."""
        task = self.scoring.work(block_rows)
        return task if not task.computes_norms(0) or task.diagonal else replace(task, norms=(self.norms,))

    def _exact(self, first: Lists, top: int, parts: ScoreParts) -> Lists:
        """Return the lists of the best candidates by their exact scores."""
        scoring, slots = self.scoring, self._slots()
        lambdas, q, count = scoring.lambdas, scoring.q, first.rows.shape[-1]
        per_query = len(SIDES) * count * (3 * PAIR_BYTES + ENTRY_BYTES)
        tile = TileMemory(per_score=0, per_query=per_query, fixed=per_query * lambdas * q)
        blocks, block_rows = scoring.plan("exact scores", self.options["memory"], slots, tile)
        work = self._wide(block_rows)
        scores = np.full(first.rows.shape, -np.inf, np.float32)
        with Progress("exact scores", len(blocks) * scoring.n, self.options["progress"]) as bar:
            for start, stop in blocks:
                queries = work.read_as_rows(scoring.precondition(start, stop).arrays)
                block = first.rows[..., start:stop, :].reshape(len(SIDES), lambdas * (stop - start), count)
                where = np.nonzero(block != NO_ROW)
                where = tuple(part[np.argsort(block[where], kind="stable")] for part in where)
                lists, rows = where[1], block[where]
                exact = np.empty(len(rows), np.float32)

                def put(stripe: Stripe, part: Part, rows: Numbers = rows, exact: Floats = exact) -> None:
                    exact[_within(stripe, rows)] = part["scores"]

                parts.run(
                    f"{start}-{stop}-pairs", _score_pairs, work, bar, self._seen, lists, rows, *queries,
                    slots=slots, on_result=put,
                )  # fmt: skip
                of_block = np.full(block.shape, -np.inf, np.float32)
                sign = np.where(where[0] == 0, np.float32(1), np.float32(-1))
                of_block[where] = np.where(np.isnan(exact), -np.inf, sign * exact)
                scores[..., start:stop, :] = of_block.reshape(*scores.shape[:3], stop - start, count)
        rows = np.where(scores == -np.inf, NO_ROW, first.rows)
        order = np.lexsort((rows, -scores))[..., :top]
        scores, rows = np.take_along_axis(scores, order, -1), np.take_along_axis(rows, order, -1)
        pairs = int((first.rows != NO_ROW).sum())
        search = {**first.search, "rescored": pairs / (lambdas * q * scoring.n)}
        return Lists(scores, rows, first.outside, search)

    def _measure(self, top: int) -> Recall:
        """Find the best rows of some queries among all train rows, and their ranks in the sketch."""
        numbers, own, read, measured = self._sample()
        asked, slots = self.options, self._slots()
        sized = replace(self.scoring, queries=Queries(np.empty(len(numbers)), None))
        top = min(top + 1, sized.n)  # a train row's own best is itself
        longest = min(sized.n, max(1024, _LONGEST * top, min(_MOST_CANDIDATES, sized.n // 1000)))
        parts = ScoreParts(None, "")

        def some(start: int, stop: int) -> PreconditionedQueries:
            return _joined([read(number, number + 1) for number in numbers[start:stop].tolist()])

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
        request = replace(self.scoring, checkpoints=(replace(self._checkpoint, query=train),), queries=rows)
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


def _joined(queries: list[PreconditionedQueries]) -> PreconditionedQueries:
    """Return single queries as one set, λ by λ."""
    arrays = np.stack([query.arrays[0] for query in queries], axis=1)
    rest = {
        name: np.concatenate([getattr(query, name) for query in queries]) for name in ("outside", "dropped", "norms")
    }
    return PreconditionedQueries([arrays.reshape(-1, arrays.shape[-1])], **rest)


def _flat(rows: Numbers) -> Numbers:
    return rows.reshape(-1, rows.shape[-1])


def _without(rows: Numbers, own: npt.NDArray[np.int64]) -> Numbers:
    """Return a list's rows without a query's own, one fewer."""
    return np.asarray(rows[rows != own][: len(rows) - 1])

"""Choice of train rows for target tasks: the best by influence, without rows that repeat others, within quotas.

A row's score is its highest over the tasks, on the mean gradient of each task's queries, as in LESS (Xia et al. 2024,
arXiv 2402.04333), which has cosines of gradients scaled by Adam's state. The scores of all rows take one pass, in which
memory holds one number a row; rows are then chosen from those numbers, or greedily (:mod:`.redundancy`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Unpack, cast, get_args

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, listed
from ooc_influence.influence.checkpoints import Marks, Stores
from ooc_influence.influence.costs import ScoringMemory, TileMemory
from ooc_influence.influence.engine import Floats, Grouping, parse_groups
from ooc_influence.influence.redundancy import Candidates, Cosines, choose_diverse
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.tiles import Part, ScoreParts, ScoreTask, make_engine, score_tiles
from ooc_influence.memory import MemoryBudget, MemoryModel, block_limit
from ooc_influence.options import Normalize, PairOptions, ScoringOptions, SelectOptions, select, takes
from ooc_influence.parallel import Stripe, check_workers
from ooc_influence.progress import Progress, html_table, optional_library
from ooc_influence.store import GradientStore

Numbers = npt.NDArray[np.int64]
_POOL = 2048  # rows whose Gram matrix is computed at once, at most: more hardly save passes
_SHOWN = 20  # rows in a notebook's table


@dataclass(frozen=True, eq=False)
class Selection:
    """Result of :func:`select_rows`: m rows chosen of c candidates.

    Attributes
    ----------
    rows : (m,) int64
        Row numbers in the train store, in the order they were chosen; of units, the row that gave the unit its score.
    ids : (m,)
        Their ids.
    scores : (m,) float32
        Their scores.
    gains : (m,) float32
        What each added when it was chosen: its score, less what rows chosen before had of it.
    tasks : (m,)
        The task that gave each its score.
    row_scores : (n,) float32
        The scores of all rows; NaN where a row has none.
    candidates : Candidates
        The c rows that could be chosen, and the quotas.
    units : (n,) int64, or None
        The unit of each row; None where rows are chosen by themselves.
    settings : mapping
        What was asked for or taken by default, as JSON values.
    """

    rows: Numbers
    ids: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    gains: npt.NDArray[np.float32]
    tasks: npt.NDArray[Any]
    row_scores: npt.NDArray[np.float32]
    candidates: Candidates
    units: Numbers | None
    settings: Mapping[str, Any]

    def alike(self, scores: npt.NDArray[np.float64]) -> Numbers:
        """Return the rows of as large a choice, under the same quotas, by other scores of the candidates, (c,)."""
        return np.asarray(self.candidates.rows[self.candidates.best(scores)])

    @cached_property
    def kept(self) -> npt.NDArray[np.bool_]:
        """The train rows that are chosen, (n,): with ``unit=``, all rows of the units."""
        return self.with_units(self.rows)

    def with_units(self, rows: Numbers) -> npt.NDArray[np.bool_]:
        """Return which train rows are some rows, or have a score and are of the same unit as one of them, (n,)."""
        kept = np.zeros(len(self.row_scores), bool)
        kept[rows] = True
        if self.units is not None:
            kept = np.isin(self.units, self.units[rows]) & ~np.isnan(self.row_scores)
        return kept

    def to_dict(self) -> Mapping[str, Any]:
        """Return the result as JSON-ready values."""
        columns = (self.rows, self.ids, self.scores, self.gains, self.tasks)
        lines = zip(*(column.tolist() for column in columns), strict=True)
        names = ("row", "id", "score", "gain", "task")
        return {
            "rows": [dict(zip(names, line, strict=True)) for line in lines],
            "kept_rows": int(self.kept.sum()), "candidates": len(self.candidates.rows), "settings": self.settings,
        }  # fmt: skip

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line a row chosen: row, id, score, gain, task.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        pandas = optional_library("pandas", "tables")
        return pandas.DataFrame(
            {"row": self.rows, "id": self.ids, "score": self.scores, "gain": self.gains, "task": self.tasks}
        )

    def __repr__(self) -> str:
        unit = self.settings["unit"]
        rows = f"{len(self.rows)} of {len(self.candidates.rows)} {'rows' if unit is None else f'values of {unit}'}"
        return f"<Selection {rows}, {len(np.unique(self.tasks))} tasks, redundancy={self.settings['redundancy']}>"

    def _repr_html_(self) -> str:
        columns = (self.ids, self.scores, self.gains, self.tasks)
        lines = list(zip(*(column[:_SHOWN].tolist() for column in columns), strict=True))
        return html_table(repr(self), ("id", "score", "gain", "task"), lines)


@takes(SelectOptions)
def select_rows(
    query: Stores,
    train: Stores,
    keep: float | str,
    **options: Unpack[SelectOptions],
) -> Selection:
    """Return the train rows to keep for some target queries: those of the highest influence on a task.

    Parameters
    ----------
    query, train : GradientStore or path, or lists of them
        The targets (q, k), and (n, k); lists for several checkpoints. The targets should be of a validation set.
    keep : int, float or str
        How many rows (or units): a number of them, or a share of those that have a score, 0.1 or ``"10%"``.
    **options : SelectOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Selection
        The rows in the order they were chosen, ties by row number. Memory holds some 80 bytes for every train row.

    Raises
    ------
    InputError
        If ``keep``, ``redundancy`` or the quotas are none, or the quotas do not allow as many rows; for no such column,
        several dampings, or no query that is live.
    StoreExistsError, StoreBusyError
        As for :func:`top_influential`.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.

    Examples
    --------
    >>> chosen = ooc.select_rows("valid.zarr", "train.zarr", "10%", redundancy=1.0)  # doctest: +SKIP
    """
    _check(options)
    scoring = _request(query, train, options)
    store = scoring.checkpoints[0].train
    scores, tasks = _task_scores(scoring, options)
    units = None if options["unit"] is None else parse_groups(options["unit"], store)
    rows = _candidates(scores, units, lowest=options["drop"])
    count = parse_keep(keep, len(rows))
    quotas = _Quotas.of(options["quotas"], store, rows)
    candidates = Candidates(rows, quotas.codes, quotas.caps(count), count)
    order, gains = _choose(scoring, candidates, scores[rows], options)
    chosen = rows[order]
    names = scoring.queries.names
    settings = {**scoring.settings, "keep": keep, "tasks": options["tasks"], "redundancy": options["redundancy"],
                "quotas": options["quotas"], "unit": options["unit"], "drop": options["drop"]}  # fmt: skip
    codes = None if units is None else units.codes
    return Selection(
        chosen, store.ids(chosen), scores[chosen], gains, names[tasks[chosen]], scores, candidates, codes, settings
    )


def _check(options: SelectOptions) -> None:
    if not 0 <= options["redundancy"] <= 1:
        raise InputError(f"expected 0 <= redundancy <= 1; received {options['redundancy']}")
    if options["damping"] is not None and np.ndim(options["damping"]):
        raise InputError("expected one damping to select rows with; received several: give one")
    if options["normalize"] not in get_args(Normalize):
        raise InputError(
            f"expected normalize {', '.join(map(repr, get_args(Normalize)))}; received {options['normalize']!r}"
        )


def parse_keep(keep: float | str, candidates: int) -> int:
    """Return how many of some candidates a number, a share or a percentage is.

    Raises
    ------
    InputError
        If it is none of these, or more than there are.
    """
    if isinstance(keep, str) and not keep.strip().endswith("%") and keep.strip().isdigit():
        keep = int(keep)
    if isinstance(keep, (int, np.integer)) and not isinstance(keep, bool):
        count = int(keep)
    else:
        count = max(1, round(parse_share(keep, "a number of rows to keep") * candidates))
    if not 1 <= count <= candidates:
        raise InputError(f"expected 1 to {candidates} rows to keep, of those that have a score; received {keep!r}")
    return count


def parse_share(value: Any, other: str) -> float:
    """Return a share, (0, 1], of a number or a percentage; ``other`` is what else it could have been, for a refusal."""
    try:
        text = str(value).strip()
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if isinstance(value, bool) or not 0 < share <= 1:
        raise InputError(f"expected {other}, or a share such as 0.3 or '30%'; received {value!r}")
    return share


def _request(query: Stores, train: Stores, options: SelectOptions) -> ScoreRequest:
    """Return the request of one query a task."""
    asked: Any = dict(select(ScoringOptions, options))
    asked |= {"normalize": options["normalize"], "average_queries": options["tasks"] or True}
    return ScoreRequest.open(query, train, cast(PairOptions, asked), lists=True)


def _task_scores(scoring: ScoreRequest, options: SelectOptions) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Return every row's highest score over the tasks (with ``drop``, its lowest), and which task that is of, (n,)."""
    slots, lowest = check_workers(options["workers"]), options["drop"]
    parts = ScoreParts(options["resume"], scoring.digest(kind="select", lowest=lowest))
    tile = TileMemory(per_score=4 + 8 + 1, per_row=24, fixed=80 * scoring.n)
    blocks, block_rows = scoring.plan("selection", options["memory"], slots, tile, queries=parts.queries)
    work, sign = scoring.work(block_rows), np.float32(-1 if lowest else 1)
    scores, tasks = np.full(scoring.n, np.nan, np.float32), np.zeros(scoring.n, np.int32)
    outside, live = np.empty(scoring.q), 0
    with parts.claimed(), Progress("scores", len(blocks) * scoring.n, options["progress"]) as bar:
        for start, stop in blocks:
            queries = scoring.precondition(start, stop)
            outside[start:stop] = queries.outside
            live += int((~queries.dropped).sum())

            def put(stripe: Stripe, part: Part, first: int = start) -> None:
                own, task = scores[stripe.start : stripe.stop], tasks[stripe.start : stripe.stop]
                better = np.isnan(own) | (sign * part["scores"] > sign * own)
                own[better], task[better] = part["scores"][better], first + part["tasks"][better]

            parts.run(
                f"{start}-{stop}", _best_of_tasks, work, bar, scoring.seen, sign,
                *work.read_as_rows(queries.arrays), slots=slots, on_result=put,
            )  # fmt: skip
    if not live:
        raise InputError("expected queries to select rows for; received only dropped ones: extract others")
    scoring.warn_outside(outside)
    return scores, tasks


def _best_of_tasks(
    stripe: Stripe, key: str, work: ScoreTask, seen: Marks | None, sign: np.float32, *queries: Floats
) -> Part:
    """Return each row's largest score over the queries (``sign`` 1) or least (-1), NaN without any, and which it is."""
    scores = np.empty(stripe.stop - stripe.start, np.float32)
    tasks = np.empty(len(scores), np.int32)
    with make_engine(work.device) as engine:
        for tile in score_tiles(engine, stripe, key, work, seen, queries):
            part = slice(tile.start - stripe.start, tile.stop - stripe.start)
            values = engine.host(tile.scores)[0, 0]
            ranked = np.where(np.isnan(values), -np.inf, sign * values).astype(np.float32)  # a dropped query is NaN
            tasks[part] = best = ranked.argmax(axis=0)
            found = ranked[best, np.arange(len(best))]
            scores[part] = np.where(np.isinf(found), np.nan, sign * found)
    return {"scores": scores, "tasks": tasks}


def _candidates(scores: Floats, units: Grouping | None, *, lowest: bool) -> Numbers:
    """Return the rows that can be chosen, ascending: those with a score, or of each unit the row of its score."""
    live = np.flatnonzero(~np.isnan(scores))
    if not len(live):
        raise InputError("expected train rows with a score; received none: all are dropped, or were not trained on")
    if units is None:
        return live
    order = live[np.argsort(scores[live] if lowest else -scores[live], kind="stable")]
    _, first = np.unique(units.codes[order], return_index=True)
    return np.sort(order[first])


_QUOTA = "a mapping of values to quotas, 'proportional'"


@dataclass(frozen=True, eq=False)
class _Quotas:
    """The values that quotas count by, (c,) codes of (V,) names, and what they may have."""

    names: npt.NDArray[Any]
    codes: Numbers
    shares: Any

    @classmethod
    def of(cls, quotas: Mapping[str, Any] | None, store: GradientStore, rows: Numbers) -> _Quotas:
        if quotas is None:
            return cls(np.array(["all"]), np.zeros(len(rows), np.int64), {})
        if not isinstance(quotas, Mapping) or len(quotas) != 1:
            raise InputError(f"expected quotas by one column, such as {{'source': '30%'}}; received {quotas!r}")
        ((column, shares),) = quotas.items()
        groups = parse_groups(column, store)
        return cls(groups.names, groups.codes[rows], shares)

    def caps(self, count: int) -> Numbers:
        """Return how many of ``count`` rows each value may have, (V,)."""
        present = np.bincount(self.codes, minlength=len(self.names))
        if self.shares == "proportional":
            return _apportion(present, count)
        caps = np.full(len(self.names), count)
        if isinstance(self.shares, Mapping):
            index = {str(name): number for number, name in enumerate(self.names.tolist())}
            for name, share in self.shares.items():
                if str(name) not in index:
                    raise InputError(f"expected quotas of {listed(index, 8)}; received one of {name!r}")
                caps[index[str(name)]] = _part(parse_share(share, _QUOTA), count)
        else:
            caps[:] = _part(parse_share(self.shares, _QUOTA), count)
        allowed = int(np.minimum(caps, present).sum())
        if allowed < count:
            raise InputError(
                f"expected quotas that allow the {count} to keep; received ones that allow {allowed}: keep fewer, or "
                "raise the quotas"
            )
        return caps


def _part(share: float, count: int) -> int:
    """Return a share of a number, rounded down but for errors of the floats."""
    return math.floor(share * count + 1e-9)


def _apportion(present: Numbers, count: int) -> Numbers:
    """Return ``count`` divided in proportion to numbers, (V,): rounded down, the rest by largest remainders."""
    exact = count * present
    caps, rest = exact // present.sum(), exact % present.sum()
    more = np.argsort(-rest, kind="stable")[: count - int(caps.sum())]
    caps[more] += 1
    return np.asarray(caps)


def _choose(
    scoring: ScoreRequest, candidates: Candidates, scores: Floats, options: SelectOptions
) -> tuple[Numbers, Floats]:
    """Return the indices of the candidates chosen, in order, and their gains."""
    if not options["redundancy"]:
        order = candidates.best(scores)
        return order, scores[order]
    budget = MemoryBudget.of(options["memory"])
    model = partial(_pool_memory, scoring.memory(1), scoring.n, candidates.count)
    pool = budget.largest(model, min(_POOL, len(candidates.rows))) or 1
    cosines = Cosines(scoring.checkpoints, budget.plan(model(pool)))
    with Progress("choice", candidates.count, options["progress"]) as bar:
        return choose_diverse(candidates, scores, options["redundancy"], cosines, pool, bar)


def _pool_memory(memory: ScoringMemory, n: int, count: int, pool: int) -> MemoryModel:
    """Return what the choice from pools of a size holds; its blocks are the rows that a pool is compared with."""
    columns = [checkpoint.size.k for checkpoint in memory.checkpoints]
    turning = max(
        checkpoint.preconditioning(pool, 1) + (4 + 8) * pool * checkpoint.size.k for checkpoint in memory.checkpoints
    )
    rows = 120 * n + (16 + 8 * len(columns)) * count
    return MemoryModel(
        f"selection without redundancy for k={max(columns)}",
        fixed=rows + turning + 4 * pool * sum(columns) + 3 * 4 * pool**2,
        per_worker=max(checkpoint.size.reading_bytes for checkpoint in memory.checkpoints),
        per_row=4 * max(columns) + 2 * 4 * pool,
        max_rows=block_limit(max(columns)),
        advice="extract with a smaller k",
    )

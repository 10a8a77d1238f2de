"""A causal test of scores: models trained without a query's strongest rows, against models trained without random ones.

If scores are right, a query's loss rises more where its strongest proponents are left out of training than where as
many random rows are, or another query's proponents. Compared runs have the same seed. Influence functions also say by
how much: leaving out the rows R of n changes the loss of query q by about Σ_{i in R} score(q, i)/n (Koh and Liang 2017,
arXiv 1703.04730).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from ooc_influence.errors import InputError, counted, listed
from ooc_influence.evaluate.contrast import Contrast
from ooc_influence.evaluate.removal import Removals
from ooc_influence.evaluate.retrain import Runs, finished_runs, retrain
from ooc_influence.evaluate.training import Numbers, Trains
from ooc_influence.extract import even_numbers
from ooc_influence.influence import ScoreRequest, find_top, scores_of_rows
from ooc_influence.options import PairOptions, TopOptions, VerifyOptions, complete, takes
from ooc_influence.progress import LONG, announce, duration
from ooc_influence.store import GradientStore, PathLike, as_store

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RemovalTest:
    """Losses of some queries after training without their strongest rows, and without random ones.

    Removals are in the order of the queries, each without that query's strongest rows; then those of random rows, which
    differ from seed to seed and are in none of these lists.

    Attributes
    ----------
    query_ids, query_rows : (q,)
        The queries' ids, and their rows in the query store.
    removed : (s, q + c, k) int64
        Train rows that were left out: for each seed, and each removal.
    losses : (s, q + c, q) float64
        Every query's loss after every run.
    predictions : (s, q + c, q) float64
        What the scores of the removed rows predict of it: their sum, over n.
    seconds : (s, q + c) float64
        What each run took.
    settings : mapping
        What lists were made with, as :attr:`TopInfluential.settings`.
    """

    query_ids: npt.NDArray[Any]
    query_rows: Numbers
    removed: Numbers
    losses: Floats
    predictions: Floats
    seconds: Floats
    settings: Mapping[str, Any]

    @property
    def against_random(self) -> Contrast:
        """By how much each query's loss is higher without its strongest rows than without random ones."""
        return self._against_random(self.losses)

    @property
    def against_others(self) -> Contrast | None:
        """The same against the strongest rows of the other queries, means over seeds; None for a single query."""
        q = len(self.query_ids)
        if q < 2:
            return None
        others = self.losses[:, :q].mean(0).T[~np.eye(q, dtype=bool)].reshape(q, q - 1)
        return Contrast((_own(self.losses).mean(0)[:, None] - others).T, shared=False)

    @property
    def predicted(self) -> Floats:
        """What the scores predict of each query's difference to random rows, (q,): mean over seeds."""
        return self._against_random(self.predictions).means

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of predicted and measured losses, without those rows less without random ones.

        Over all pairs of a query's list and a query, means over seeds; NaN for a single query.
        """
        q = len(self.query_ids)
        if q < 2:
            return float("nan")
        pairs = [(each[:, :q] - each[:, q:].mean(1, keepdims=True)).mean(0) for each in (self.predictions, self.losses)]
        if any(np.ptp(each) == 0 for each in pairs):
            return float("nan")
        return float(spearmanr(*(each.ravel() for each in pairs)).statistic)

    def _against_random(self, values: Floats) -> Contrast:
        q = len(self.query_ids)
        return Contrast((_own(values)[:, None] - values[:, q:]).reshape(-1, q), shared=True)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values: None for what is not known."""
        (seeds, _, k), q = self.removed.shape, len(self.query_ids)
        random, others = self.against_random, self.against_others
        columns = {
            "query": self.query_rows, "id": self.query_ids, "loss_without_strongest": _own(self.losses).mean(0),
            "loss_without_random": self.losses[:, q:].mean((0, 1)), "difference": random.means,
            "interval": random.intervals, "predicted": self.predicted, "removed": self.removed[0, :q],
        }  # fmt: skip
        lines = zip(*(values.tolist() for values in columns.values()), strict=True)
        queries = [dict(zip(columns, line, strict=True)) for line in lines]
        queries = [each | {"interval": _json(each["interval"])} for each in queries]
        return {
            "remove": k, "seeds": seeds, "controls": self.removed.shape[1] - q, "runs": int(self.seconds.size),
            "seconds": float(self.seconds.sum()), "against_random": _facts(random),
            "against_others": None if others is None else _facts(others), "predicted": float(self.predicted.mean()),
            "correlation": _json([self.correlation])[0], "queries": queries, "settings": dict(self.settings),
        }  # fmt: skip

    def __str__(self) -> str:
        k, random = self.removed.shape[2], self.against_random
        facts = self.to_dict()["queries"]
        header = ("query", f"loss without its {k}", f"without {k} random", "difference", "95 % interval", "predicted")
        lines = [
            (str(each["id"]), f"{each['loss_without_strongest']:.4f}", f"{each['loss_without_random']:.4f}",
             f"{each['difference']:+.3g}", _interval(each["interval"]), f"{each['predicted']:+.3g}")
            for each in facts
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in (header, *lines)]  # fmt: skip
        said = [_sentence(random, k, f"removing {counted(k, 'random row')}")]
        if (others := self.against_others) is not None:
            said.append(_sentence(others, k, f"removing those of another of these {len(facts)} queries"))
        said.append(f"Predicted by the scores, at a minimum of the loss: {self.predicted.mean():+.3g}.")
        if not np.isnan(self.correlation):
            said[-1] += (
                f" Rank correlation of predicted and measured losses: {self.correlation:.2f}, over "
                f"{len(facts) ** 2} pairs of a list and a query."
            )
        return "\n".join([*table, "", *said])


def _own(values: Floats) -> Floats:
    """Return each query's value without its own strongest rows, (s, q), of (s, q + c, q)."""
    return np.asarray(np.diagonal(values[:, : values.shape[2]], axis1=1, axis2=2))


def _facts(contrast: Contrast) -> dict[str, Any]:
    return {
        "mean": contrast.mean, "interval": _json(contrast.interval), "higher": contrast.higher,
        "comparisons": contrast.comparisons,
    }  # fmt: skip


def _json(values: Sequence[float]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _interval(ends: Sequence[float | None]) -> str:
    low, high = ends
    return "none" if low is None or high is None else f"[{low:+.3g}, {high:+.3g}]"


def _sentence(contrast: Contrast, k: int, other: str) -> str:
    """Return in words by how much more losses rise without the strongest rows."""
    removing = f"Removing the {'strongest row' if k == 1 else f'{k} strongest rows'} of a query"
    low, high = contrast.interval
    interval = "(too few runs for an interval)" if np.isnan(low) else f"[{low:.3g}, {high:.3g}]"
    value = f"{contrast.mean:.3g} {interval}"
    end = f"it is higher in {contrast.higher} of {counted(contrast.comparisons, 'comparison')}"
    end += ": the interval contains 0, so no effect is shown." if low <= 0 <= high else "."
    if contrast.mean > 0:
        return f"{removing} raises its loss by {value} more than {other}; {end}"
    return f"{removing} raises its loss no more than {other}, the difference is {value}; {end}"


@takes(VerifyOptions)
def verify_influence(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    training: Trains,
    folder: str | Path,
    *,
    confirm: Callable[[str], bool] | None = None,
    **options: Unpack[VerifyOptions],
) -> RemovalTest:
    """Train again without the strongest rows of some queries and without random rows, and compare the queries' losses.

    For each seed there is a run for every query, and one for every random choice, all with the rows that are not
    dropped: seeds · (queries + controls) runs. Random rows are drawn from those in none of the lists. The same call
    continues an interrupted one, and more seeds continue a finished one.

    Parameters
    ----------
    query, train : GradientStore or path
        (q, k) and (n, k).
    training : Training
        How to train and to measure: :class:`Training`, :func:`load_training`, or
        :func:`ooc_influence.hf.lora_training`.
    folder : path
        A local folder, made if it is not there, in which finished runs are kept.
    confirm : callable str -> bool, optional
        Asked after the first run before more than ten minutes of others; False ends the call.
    **options : VerifyOptions
        See :mod:`ooc_influence.options`. Lists have the curvature, damping and unit of :func:`top_influential`;
        predictions the same curvature and damping, without a unit.

    Returns
    -------
    RemovalTest
        Differences with intervals, and what the scores predict of them.

    Raises
    ------
    InputError
        For queries that are not there or have fewer proponents, fewer rows than are to be removed, several dampings, or
        runs that were not confirmed.
    MismatchError
        If the folder holds runs of other lists or settings.
    RunFailedError, StoreWriteError
        As for :func:`retrain`.
    OocInfluenceError
        As for :func:`top_influential`.
    """
    for name in ("remove", "seeds", "controls", "processes"):
        value: Any = dict(options)[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"expected {name} >= 1; received {value!r}")
    design = _Design.of(as_store(query), as_store(train), options)
    runs = _run(design, training, folder, confirm, options)
    return design.result(runs)


@dataclass(frozen=True, eq=False)
class _Design:
    """Which rows are left out of which run, and what scores predict of it."""

    names: npt.NDArray[Any]
    rows: Numbers
    live: npt.NDArray[np.bool_]
    lists: Numbers
    random: Numbers
    predictions: Floats
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, query: GradientStore, train: GradientStore, options: VerifyOptions) -> _Design:
        asked: Any = {name: dict(options)[name] for name in ("curvature", "damping", "damping_mode", "device")}
        if np.ndim(asked["damping"]):
            raise InputError(f"expected one damping to test; received {len(asked['damping'])}")
        rows = _choose_queries(query, options["queries"])
        scoring = ScoreRequest.open(query, train, _with(asked, options["normalize"]), lists=True).only(rows)
        more: Any = {name: dict(options)[name] for name in ("workers", "memory", "progress")}
        live = ~train.dropped
        k = options["remove"]
        top = find_top(scoring, k, None, complete(TopOptions, more)).ranked(scoring, 0).proponents
        for name, found, scores in zip(scoring.queries.names.tolist(), top.rows, top.scores, strict=True):
            count = int(((found >= 0) & (scores > 0)).sum())
            if count < k:
                raise InputError(
                    f"expected {k} rows with positive scores for every query; received {count} for query {name}: "
                    "remove fewer (--remove), or name other queries (--query)"
                )
        random = _draw(live, top.rows, options["seeds"], options["controls"], k)
        removed = np.concatenate([top.rows.ravel(), random.ravel()])
        plain = ScoreRequest.open(query, train, _with(asked, "none"), lists=True).only(rows)
        scores = scores_of_rows(plain, removed, options["memory"]).astype(np.float64) / live.sum()
        q, c = len(rows), options["controls"]
        of_lists = scores[:, : q * k].reshape(q, q, k).sum(2).T
        of_random = scores[:, q * k :].reshape(q, options["seeds"], c, k).sum(3)
        predictions = np.concatenate(
            [np.broadcast_to(of_lists, (options["seeds"], q, q)), of_random.transpose(1, 2, 0)], axis=1
        )
        return cls(scoring.queries.names, rows, live, top.rows, random, predictions, scoring.settings)

    @property
    def removed(self) -> Numbers:
        """Rows left out, (s, q + c, k)."""
        seeds = len(self.random)
        return np.concatenate([np.broadcast_to(self.lists, (seeds, *self.lists.shape)), self.random], axis=1)

    def result(self, runs: Runs) -> RemovalTest:
        """Return what the runs say."""
        shape = self.removed.shape[:2]
        losses = -runs.outcomes.reshape(*shape, -1)
        seconds = runs.seconds.reshape(shape)
        return RemovalTest(self.names, self.rows, self.removed, losses, self.predictions, seconds, dict(self.settings))


def _with(asked: Mapping[str, Any], normalize: str | None) -> PairOptions:
    return complete(PairOptions, {**asked, "normalize": normalize})


def _choose_queries(query: GradientStore, asked: int | Sequence[Any]) -> Numbers:
    """Return the rows of some queries: those of ids, or a number of them spread over those that are not dropped."""
    dropped = query.dropped
    if isinstance(asked, int) and not isinstance(asked, bool):
        live = np.flatnonzero(~dropped)
        if asked < 1 or not len(live):
            raise InputError(f"expected some of {len(live)} queries to test; received {asked}")
        return np.asarray(live[even_numbers(len(live), asked)])
    ids = [] if isinstance(asked, (bool, str)) or not isinstance(asked, Sequence) else list(asked)
    if not ids or len({*map(str, ids)}) < len(ids):
        raise InputError(f"expected a number of queries, or distinct ids of some; received {asked!r}")
    rows = query.find(ids)
    wrong = [name for name, row in zip(ids, rows, strict=True) if row < 0 or dropped[row]]
    if wrong:
        raise InputError(
            f"expected ids of queries in {query.path} that are not dropped; received {listed(wrong, 5)}: "
            "'ooc-influence ids' looks them up"
        )
    return rows


def _draw(live: npt.NDArray[np.bool_], lists: Numbers, seeds: int, controls: int, k: int) -> Numbers:
    """Return random rows that are in no list, (seeds, controls, k): those of a seed depend on nothing but the seed."""
    free = live.copy()
    free[lists.ravel()] = False
    pool = np.flatnonzero(free)
    if len(pool) < k:
        raise InputError(
            f"expected at least {k} rows in none of the lists to draw from; received {len(pool)}: remove fewer "
            "(--remove), or test fewer queries (--queries)"
        )
    drawn = np.empty((seeds, controls, k), np.int64)
    for seed in range(seeds):
        for control in range(controls):
            generator = np.random.Generator(np.random.PCG64([seed, control]))
            drawn[seed, control] = np.sort(generator.choice(pool, k, replace=False))
    return drawn


@dataclass(frozen=True)
class _Train:
    training: Trains

    def __call__(self, indices: Numbers) -> Any:
        return self.training.train(indices)


@dataclass(frozen=True, eq=False)
class _Measure:
    training: Trains
    queries: Numbers

    def __call__(self, model: Any) -> Floats:
        losses = np.asarray(self.training.loss(model, self.queries), np.float64)
        if losses.shape != self.queries.shape:
            raise InputError(f"expected a loss of each of {len(self.queries)} queries; received {losses.shape}")
        return -losses


def _run(
    design: _Design, training: Trains, folder: str | Path, confirm: Callable[[str], bool] | None, options: VerifyOptions
) -> Runs:
    """Train and measure: a first run shows how long all will take."""
    seeds, removals, k = design.removed.shape
    removed = design.removed.reshape(-1, k)
    numbers = [seed for seed in range(seeds) for _ in range(removals)]
    settings = {
        "queries": design.rows.tolist(), "remove": k, "controls": options["controls"],
        "normalize": design.settings["normalize"], "damping": design.settings["damping"],
        "training": dict(training.settings),
    }  # fmt: skip
    q, show = len(design.rows), options["progress"]
    announce(
        f"{counted(len(removed), 'run')}: without the {counted(k, 'strongest row')} of each of "
        f"{counted(q, 'query', 'queries')}, and without as many random rows, {counted(seeds, 'seed')} each",
        show,
    )
    train, measure = _Train(training), _Measure(training, design.rows)
    retrain(train, measure, Removals(design.live, removed[:1]), folder, seeds=numbers[:1], settings=settings)
    subsets = Removals(design.live, removed)
    seconds = finished_runs(subsets, folder, seeds=numbers, settings=settings).seconds
    left, each = int(np.isnan(seconds).sum()), float(np.nanmean(seconds))
    if left:
        total = each * left / min(options["processes"], left)
        announce(f"a run takes {duration(each)}: about {duration(total)} for the {left} that are left", show)
        if confirm is not None and total > LONG and not confirm(f"about {duration(total)}"):
            raise InputError(
                f"expected a yes to {duration(total)} of training; received no: confirm it (--yes), or do fewer runs "
                "(--queries, --seeds)"
            )
    how: Any = {"seeds": numbers, "settings": settings, "workers": options["processes"], "progress": show}
    return retrain(train, measure, subsets, folder, **how)

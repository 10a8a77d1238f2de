"""Scores summed over groups of train rows (a label, a source, a document), without the (q, n) matrix.

A score is linear in the train row, so a block's rows are added up by group first, each with its weight, and only the
sums are multiplied: Σ_{i in group} score(q, i) = x_qᵀ Σ_i w_i g_i. With few groups that costs one reading of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.fingerprint import array_digest
from ooc_influence.influence.checkpoints import Marks, Stores
from ooc_influence.influence.costs import TileMemory
from ooc_influence.influence.engine import Codes, Floats, parse_groups
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.tiles import (
    Part,
    ScoreParts,
    ScoreTask,
    absent_rows,
    make_engine,
    row_blocks,
    row_shares,
    row_weights,
)
from ooc_influence.options import ListOptions, takes
from ooc_influence.parallel import Stripe, check_workers
from ooc_influence.progress import Progress, html_table, optional_library, tick

_SHOWN = 20  # queries and groups in a notebook's table


@dataclass(frozen=True, eq=False)
class GroupInfluence:
    """Result of :func:`group_influence`.

    Attributes
    ----------
    names : (G,)
        The groups, in order.
    sums : (q, G) float64, or (L, q, G) for a list of dampings
        Sum of the scores of each group's rows; NaN for a query that is dropped.
    counts : (G,) int64
        Rows with a score in each group.
    query_ids, damping, outside_share, settings
        As in :class:`TopInfluential`.
    """

    names: npt.NDArray[Any]
    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    query_ids: npt.NDArray[Any]
    damping: Any
    outside_share: npt.NDArray[np.float64]
    settings: Mapping[str, Any]

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """Mean score of each group's rows, shaped as ``sums``; NaN for a group without any."""
        return np.where(self.counts > 0, self.sums / np.maximum(self.counts, 1), np.nan)

    def to_dict(self) -> Mapping[str, Any]:
        """Return the result as JSON-ready values."""
        return {
            "damping": self.damping,
            "settings": self.settings,
            "groups": self.names.tolist(),
            "counts": self.counts.tolist(),
            "queries": self.query_ids.tolist(),
            "outside_share": [None if np.isnan(share) else share for share in self.outside_share.tolist()],
            "sums": np.where(np.isnan(self.sums), np.array(None), self.sums).tolist(),
        }

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line a query and group: query, query_id, group, rows, sum, mean, and damping.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        pandas = optional_library("pandas", "tables")
        q, size = self.sums.shape[-2:]
        several = self.sums.ndim == 3
        levels = [(self.damping, self.sums, self.means)]
        if several:
            levels = list(zip(self.damping, self.sums, self.means, strict=True))
        frames = [
            pandas.DataFrame(
                {
                    "query": np.repeat(np.arange(q), size), "query_id": np.repeat(self.query_ids, size),
                    "group": np.tile(self.names, q), "rows": np.tile(self.counts, q), "sum": sums.ravel(),
                    "mean": means.ravel(), "damping": str(damping) if np.ndim(damping) else damping,
                }
            )
            for damping, sums, means in levels
        ]  # fmt: skip
        return pandas.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        q, size = self.sums.shape[-2:]
        return f"<GroupInfluence {q} queries, {size} groups of {int(self.counts.sum())} rows, damping={self.damping}>"

    def _repr_html_(self) -> str:
        sums = self.sums[0] if self.sums.ndim == 3 else self.sums
        shown = np.argsort(-np.nan_to_num(np.abs(sums)).sum(0), kind="stable")[:_SHOWN]
        lines = [
            (name, *(float(value) for value in line[shown]))
            for name, line in zip(self.query_ids[:_SHOWN].tolist(), sums, strict=False)
        ]
        return html_table(repr(self), ("query", *map(str, self.names[shown].tolist())), lines)


@takes(ListOptions)
def group_influence(
    query: Stores,
    train: Stores,
    by: str | npt.ArrayLike,
    **options: Unpack[ListOptions],
) -> GroupInfluence:
    """Return each query's scores summed over groups of train rows.

    Parameters
    ----------
    query, train : GradientStore or path, or lists of them
        (q, k) and (n, k); lists for several checkpoints.
    by : str or (n,)
        A column of the train store (``"label"``), ``"id"`` for its ids, or a value for each row. Memory holds a group's
        number for every row, and q · G sums.
    **options : ListOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GroupInfluence
        Names, sums, means and numbers of rows.

    Raises
    ------
    InputError
        If there is no such column, or ``by`` has another length.
    StoreExistsError, StoreBusyError
        As for :func:`top_influential`.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    scoring = ScoreRequest.open(query, train, options)
    groups = parse_groups(by, scoring.checkpoints[0].train)
    size, slots = len(groups.names), check_workers(options["workers"])
    made = array_digest(groups.codes)
    parts = ScoreParts(options["resume"], scoring.digest(kind="groups", groups=made))
    widest = max(checkpoint.train.k for checkpoint in scoring.checkpoints)
    tile = group_tiles(size, scoring.q, scoring.lambdas, scoring.n, widest)
    blocks, block_rows = scoring.plan("group sums", options["memory"], slots, tile, queries=parts.queries)
    work = scoring.work(block_rows)
    sums = np.zeros((scoring.lambdas, scoring.q, size))
    counts = np.zeros(size, np.int64)
    outside = np.empty(scoring.q)
    with parts.claimed(), Progress("group sums", len(blocks) * scoring.n, options["progress"]) as bar:
        for start, stop in blocks:
            queries = scoring.precondition(start, stop)
            outside[start:stop] = queries.outside
            counts[:] = 0

            def add(stripe: Stripe, part: Part, inside: slice = slice(start, stop)) -> None:
                sums[:, inside] += part["sums"]
                counts[:] += part["counts"]

            parts.run(
                f"{start}-{stop}", _stripe, work, bar, size, groups.codes, scoring.seen, *queries.arrays,
                slots=slots, on_result=add,
            )  # fmt: skip
            sums[:, start:stop][:, queries.dropped] = np.nan  # of groups without a row in any block, too
    scoring.warn_outside(outside)
    return GroupInfluence(
        groups.names, scoring.squeeze(sums), counts, scoring.queries.names, scoring.damping, outside, scoring.settings
    )


def group_tiles(groups: int, queries: int, dampings: int, n: int, k: int) -> TileMemory:
    """Return what a pass for sums over ``groups`` groups of ``n`` rows holds."""
    return TileMemory(
        per_score=4 + 4 + 8,  # products with a block's groups, and added to the sums
        per_query=2 * 8 * groups,  # a stripe's sums, and those received
        per_row=(1 + dampings) * 4 * k + 40,  # sums of a block's rows for each λ, and the weights that make them
        fixed=8 * groups * queries * dampings + 3 * 8 * n,
    )


def _stripe(
    stripe: Stripe, key: str, work: ScoreTask, size: int, codes: Codes, seen: Marks | None, *queries: Floats
) -> Part:
    q = len(queries[0]) // work.lambdas
    sums = np.zeros((work.lambdas, q, size))
    counts = np.zeros(size, np.int64)
    with make_engine(work.device) as engine:
        factors = [engine.array(array) for array in queries]
        for blocks in row_blocks(engine, stripe, work):
            start, stop = blocks[0].start, blocks[0].stop
            absent = absent_rows(blocks, seen)
            live = np.ones(stop - start, bool) if absent is None else ~absent
            block_codes = codes[start:stop]
            counts += np.bincount(block_codes[live], minlength=size)
            shares = row_shares(work, seen, start, stop)
            for number, (left, block) in enumerate(zip(factors, blocks, strict=True)):
                weights = row_weights(engine, work, shares, number, block)
                rows = live[None].astype(np.float32) if weights is None else np.where(live, weights, np.float32(0))
                added = [
                    engine.sums(block.gradients, block_codes, weight) for weight in rows
                ]  # once for all λ, or for each
                for level in range(work.lambdas):
                    present, total = added[level % len(added)]
                    tile = engine.empty(q, len(present))
                    engine.multiply(left[level * q : (level + 1) * q], total, tile)
                    sums[level][:, present] += engine.host(tile)
            tick(key, stop - start)
    return {"sums": sums, "counts": counts}

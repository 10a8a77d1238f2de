"""Which rows are exported: as they are stored, divided by their norms, or queries times the inverse of the curvature.

An inner product of a preconditioned query, (F + λI)⁻¹ g_q, and a train row g_i is the influence score of the pair, so
a search for the largest inner products finds the query's proponents. The queries carry the curvature: train rows are
exported once, and serve any damping. In a unit of norms train rows are divided by theirs, √(gᵀ (F + λI)⁻¹ g), which
depends on λ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.influence import ScoreRequest, TileMemory, rows_in_unit
from ooc_influence.options import ExportOptions
from ooc_influence.store import GradientStore, PathLike, as_store, check_finished

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class BlockPlan(NamedTuple):
    """Blocks of an export.

    Attributes
    ----------
    queries : list of (int, int)
        The ranges of queries that are preconditioned at once.
    block_rows : int
        Train rows read at once.
    """

    queries: list[tuple[int, int]]
    block_rows: int


@dataclass(frozen=True, eq=False)
class ExportedRows:
    """Rows to write, the live ones of a store.

    Attributes
    ----------
    store : GradientStore
        Whose rows they are.
    scoring : ScoreRequest
        What they are multiplied or divided by; of queries with their train store.
    count : int
        How many are live.
    """

    store: GradientStore
    scoring: ScoreRequest
    count: int

    @classmethod
    def open(cls, store: GradientStore | PathLike, options: ExportOptions) -> ExportedRows:
        """Open and check what is asked for.

        Raises
        ------
        InputError
            For settings that do not go together, several dampings, or a store that is not finished or has no live row.
        OocInfluenceError
            As for :func:`influence_scores`.
        """
        source, train, unit = as_store(store), options["precondition"], options["normalize"]
        check_finished(source)
        given: Mapping[str, Any] = options
        for name in ("curvature", "damping"):
            if isinstance(given[name], (list, tuple, np.ndarray)):
                raise InputError(f"expected one {name} to export rows with; received several: export them one by one")
        asked: dict[str, Any] = {name: given[name] for name in ("curvature", "damping", "damping_mode")}
        if train is None and unit == "none":
            if options["curvature"] not in (None, False) or options["damping"] is not None:
                raise InputError(
                    "expected a curvature or damping with precondition or normalize (--precondition, --normalize); "
                    "received neither of them: rows as they are stored have none"
                )
            asked["curvature"] = False
        request: Any = {**asked, "normalize": unit}
        scoring = (
            ScoreRequest.open(None, source, request, lists=True)
            if train is None
            else ScoreRequest.open(source, train, request, lists=True)
        )
        if train is not None and scoring.checkpoints[0].has_effects:
            raise InputError(
                "expected a curvature to multiply queries by (--precondition); received the effects of a training's "
                f"rows: export the queries as they are, and the effects in {scoring.checkpoints[0].train.path}"
            )
        count = source.n - _dropped(source)
        if not count:
            raise InputError(f"expected rows to export; received {source.path}, all of whose rows are dropped")
        return cls(source, scoring, count)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was done to the rows: the store they are queries for, curvature, damping and unit; JSON values."""
        queries = self.scoring.checkpoints[0].query is not None
        train = str(self.scoring.checkpoints[0].train.path) if queries else None
        facts = {"preconditioned_for": train, **self.scoring.settings}
        return facts if facts["curvature"] is not None else {**facts, "damping": None, "damping_mode": None}

    def plan(self, memory: int | str | None, held: int = 0) -> BlockPlan:
        """Return the blocks that fit a budget.

        Parameters
        ----------
        memory : int or str, optional
            Budget of the process.
        held : int
            Bytes that the caller will hold beside blocks.

        Raises
        ------
        MemoryBudgetError
            If the budget is too small.
        """
        tile = TileMemory(per_score=0, per_row=12 * self.store.k, fixed=held)  # copies: live ones, encoded ones
        return BlockPlan(*self.scoring.plan("an export", memory, 1, tile))

    def blocks(self, plan: BlockPlan) -> Iterator[tuple[Numbers, Floats]]:
        """Return an iterator over the numbers (b,) of live rows and what is written of them, (b, k)."""
        if self.scoring.checkpoints[0].query is not None:
            return self._preconditioned(plan.queries)
        return self._stored(plan.block_rows)

    def _preconditioned(self, blocks: list[tuple[int, int]]) -> Iterator[tuple[Numbers, Floats]]:
        for start, stop in blocks:
            queries = self.scoring.precondition(start, stop)
            live = np.flatnonzero(~queries.dropped)
            if len(live):
                yield start + live, queries.arrays[0] if len(live) == stop - start else queries.arrays[0][live]

    def _stored(self, block_rows: int) -> Iterator[tuple[Numbers, Floats]]:
        for block in rows_in_unit(self.scoring, block_rows):
            live = slice(None) if block.dropped is None else np.flatnonzero(~block.dropped)
            numbers = np.arange(block.start, block.stop)[live]
            if len(numbers):
                yield numbers, block.gradients[live]


def _dropped(store: GradientStore) -> int:
    """Return how many rows are dropped."""
    if not store.has_dropped:
        return 0
    step = store.layout.group_rows
    return sum(
        int(store.small("dropped", start, min(store.n, start + step)).sum()) for start in range(0, store.n, step)
    )

"""A query store, a train store and a curvature that belong together, and the blocks they are multiplied in.

score(q, i) = g_qᵀ (F + λI)⁻¹ g_i. Queries are preconditioned once, a block at a time; then only dot products with train
rows remain. Train blocks lie on one grid, so results do not depend on chunks or workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import Curvature, DampingMode, resolve_curvature
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError
from ooc_influence.memory import Need, block_limit, plan_block_rows
from ooc_influence.progress import tick
from ooc_influence.store import GradientStore, PathLike, read_blocks
from ooc_influence.stripes import Stripe, slots_per_process

_QUERY_BLOCK = 1024
FloatTile = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """Checked stores, their curvature and λ.

    Attributes
    ----------
    query, train : GradientStore
        (q, k) and (n, k), under one mask and of one model.
    curvature : Curvature
        F's spectrum.
    damping : float
        λ itself.
    """

    query: GradientStore
    train: GradientStore
    curvature: Curvature
    damping: float

    @classmethod
    def open(
        cls,
        query: GradientStore | PathLike,
        train: GradientStore | PathLike,
        curvature: Curvature | PathLike | None,
        damping: float | None,
        mode: DampingMode,
    ) -> Pair:
        """Open what is a path and check that all of it belongs together.

        Raises
        ------
        MismatchError
            If masks or models differ.
        InputError
            If a store has no rows.
        CurvatureNotFoundError, StaleCurvatureError, SingularFisherError
            See :func:`resolve_curvature` and :meth:`Curvature.damping_value`.
        """
        queries, rows = open_store(query), open_store(train)
        if queries.columns_digest != rows.columns_digest:
            raise MismatchError(
                f"expected a query store with the mask (and basis) of {rows.path}; received {queries.path}, which has "
                "another: "
                "extract the queries with like= (--like) the train store"
            )
        models = [store.attrs.get("model", {}).get("fingerprint") for store in (queries, rows)]
        if models[0] != models[1]:
            raise MismatchError(
                f"expected query and train gradients of one model; received {queries.path} and {rows.path}, made with "
                "two: extract the queries with the model of the train store"
            )
        found = resolve_curvature(rows, curvature)
        return cls(queries, rows, found, found.damping_value(damping, mode))

    def plan(
        self, memory: int | str | None, workers: int, *, stage: str, tile_bytes: int = 4, fixed: int = 0, lists: int = 0
    ) -> tuple[list[tuple[int, int]], int]:
        """Return the query blocks and the rows of a train block that fit the budget.

        Parameters
        ----------
        stage : str
            Its name, for a refusal.
        tile_bytes : int
            What a worker holds for each score of a (query block, train block) tile.
        fixed, lists : int
            Further bytes: once, and for each query a worker has before it.
        """
        k = self.train.k

        def need(queries: int) -> Need:
            return Need(
                stage=f"{stage} for k={k}",
                # the eigenvectors and the rotated queries in float64, the preconditioned ones in float32
                fixed=fixed + 8 * k * k + queries * k * (8 + 8 + 8 + 4 + 4),
                per_worker=lists * queries + self.train.reading_bytes,
                per_row=4 * k + tile_bytes * queries,
                max_rows=block_limit(k),
                advice="extract with a smaller k",
            )

        shared = slots_per_process(workers)
        queries = min(self.query.n, _QUERY_BLOCK)
        while True:  # fewer queries at a time cost another pass over the train rows, a refusal costs the answer
            try:
                block_rows = plan_block_rows(need(queries), memory, shared)
                break
            except MemoryBudgetError:
                if queries == 1:
                    raise
                queries = -(-queries // 2)
        return [(start, min(self.query.n, start + queries)) for start in range(0, self.query.n, queries)], block_rows

    def precondition(self, start: int, stop: int) -> FloatTile:
        """Return (F + λI)⁻¹ g for query rows ``start`` to ``stop``, (stop - start, k) float32."""
        return precondition(self.query, self.curvature, self.damping, start, stop)


def precondition(query: GradientStore, curvature: Curvature, damping: float, start: int, stop: int) -> FloatTile:
    """Return (F + λI)⁻¹ g for query rows ``start`` to ``stop``, computed in float64; NaN where a row is dropped."""
    result: FloatTile = curvature.precondition(query.rows(start, stop), [damping])[0].astype(np.float32)
    if query.has_dropped:
        result[query.small("dropped", start, stop)] = np.nan
    return result


def open_store(store: GradientStore | PathLike) -> GradientStore:
    """Return an open store with at least one row.

    Raises
    ------
    InputError
        If it has none.
    """
    opened = store if isinstance(store, GradientStore) else GradientStore.open(store)
    if not opened.n:
        raise InputError(f"expected a store with committed rows; received {opened.path} with none: extract first")
    return opened


def score_tiles(
    stripe: Stripe, key: str, store: GradientStore, block_rows: int, queries: FloatTile
) -> Iterator[tuple[int, FloatTile]]:
    """Yield ``(first train row, scores (q, rows))`` for the blocks of a stripe; dropped rows are NaN columns.

    The tile is a buffer that the next one overwrites.
    """
    buffer: npt.NDArray[Any] = np.empty(len(queries) * min(block_rows, stripe.stop - stripe.start), np.float32)
    for block in read_blocks(store, stripe.start, stripe.stop, block_rows):
        rows = block.stop - block.start
        tile = buffer[: len(queries) * rows].reshape(len(queries), rows)
        np.matmul(queries, block.gradients.T, out=tile)
        if block.dropped is not None:
            tile[:, block.dropped] = np.nan
        yield block.start, tile
        tick(key, rows)

"""Memory models of scoring and self-influence, as pure functions of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from ooc_influence.curvature import (
    BlockShape,
    gram_memory,
    precondition_bytes,
    reduced_alternatives,
    self_influence_bytes,
)
from ooc_influence.memory import BLOCK_ROWS, Alternative, MemoryBudget, MemoryModel, ProblemSize, block_limit

_MOST_ROWS = 2**18  # of a tile, however narrow they are
QUERY_ROWS = 2048  # preconditioned queries a pass: more cost memory, fewer another pass over the train rows


class CheckpointMemory(NamedTuple):
    """What a checkpoint contributes to the memory of a pass.

    Attributes
    ----------
    size : ProblemSize
        Its train rows, with the queries, λs and workers of the pass.
    blocks : tuple of BlockShape
        Of its curvature; none without one.
    fit_size : callable
        Returns the size of a fit on all train rows, to price alternatives.
    query_reading : int
        Bytes held to read its queries.
    scaled : bool
        Whether its curvature divides columns by a scale.
    """

    size: ProblemSize
    blocks: tuple[BlockShape, ...]
    fit_size: Callable[[], ProblemSize]
    query_reading: int = 0
    scaled: bool = False

    def preconditioning(self, queries: int, dampings: int) -> int:
        """Return the bytes that preconditioning some queries takes."""
        return precondition_bytes(self.blocks, queries, dampings, scaled=self.scaled) if self.blocks else 0

    def resized(self, **changes: Any) -> Self:
        """Return it with some shapes of :attr:`size` changed."""
        return self._replace(size=replace(self.size, **changes))

    def alternatives(self, model: Callable[[Self], MemoryModel], budget: MemoryBudget) -> Iterator[Alternative]:
        """Yield what else would give such scores: fewer columns, or another curvature; ``model`` prices the pass."""
        size = self.fit_size()

        def reduced(r: int) -> MemoryModel:
            return model(self.resized(k=r)._replace(blocks=(BlockShape(r, r),) if self.blocks else ()))

        yield from reduced_alternatives(size, budget, reduced)
        if self.blocks != (BlockShape(size.k, size.k),):  # not the whole spectrum of F
            return
        if len(size.modules) > 1:
            modules = tuple(BlockShape(last - first, last - first) for first, last in size.modules)
            text = f"a curvature by module ({{}}: ooc-influence fisher {size.path} --blocks module)"
            yield Alternative(text, model(self._replace(blocks=modules)))
        if size.rows < size.k:
            text = f"a curvature by the dual method ({{}}: ooc-influence fisher {size.path} --method dual)"
            scoring = model(self._replace(blocks=(BlockShape(size.k, size.rows, keeps=False),)))
            yield Alternative(text, max(gram_memory(size), scoring, key=budget.price))


class TileMemory(NamedTuple):
    """Bytes that a pass holds beside queries and train rows.

    Attributes
    ----------
    per_score : int
        For each score of a tile.
    per_query : int
        For each preconditioned query and module, by each worker.
    per_row : int
        For each train row of a block.
    fixed : int
        Once.
    modules : int
        Scores of a query and a row.
    per_number : int
        For each number of a block's rows.
    most_scores : int or None
        Scores of a tile at most; None for as many as there are of a block of usual size.
    """

    per_score: int = 4
    per_query: int = 0
    per_row: int = 0
    fixed: int = 0
    modules: int = 1
    per_number: int = 4
    most_scores: int | None = None


def written_tiles(modules: int = 1) -> TileMemory:
    """Return what a pass holds that writes its scores: two tiles, and the chunks of one while they are written."""
    return TileMemory(per_score=12, modules=modules)


@dataclass(frozen=True)
class ScoringMemory:
    """The memory models of a request.

    Attributes
    ----------
    checkpoints : tuple of CheckpointMemory
        One, or several to average over.
    seen_bytes : int
        Of the marks of the rows that each checkpoint was trained on.
    normalized, on_device, margins : bool
        Whether train rows are divided by their norm, multiplied on a device, and weighted by margins.
    """

    checkpoints: tuple[CheckpointMemory, ...]
    seen_bytes: int = 0
    normalized: bool = False
    on_device: bool = False
    margins: bool = False

    @property
    def size(self) -> ProblemSize:
        """The size of the first checkpoint, which has the rows, queries, λs and workers of all."""
        return self.checkpoints[0].size

    @property
    def diagonal(self) -> bool:
        """Whether norms are weighted sums of squares: by diagonal curvatures, or none."""
        return all(shape.rank is None for checkpoint in self.checkpoints for shape in checkpoint.blocks)

    @property
    def _columns(self) -> int:
        return sum(checkpoint.size.k for checkpoint in self.checkpoints)

    def scores(self, stage: str, queries: int, tile: TileMemory) -> MemoryModel:
        """Return the memory model of a pass over the train rows for some of the queries."""
        return self._with_alternatives(lambda memory: memory._scores(stage, queries, tile))

    def self_influence(self) -> MemoryModel:
        """Return the memory model of every row's self-influence."""
        return self._with_alternatives(ScoringMemory._self_influence)

    def plan_queries(
        self,
        budget: MemoryBudget,
        stage: str,
        tile: TileMemory,
        *,
        queries: int | None = None,
        block_rows: int | None = None,
    ) -> tuple[int, MemoryModel]:
        """Return how many queries to precondition at a time, and the model of such a pass.

        Fewer queries cost another pass over the train rows, a refusal costs the answer: halved until they fit, or one.
        ``queries`` or ``block_rows`` are those of an interrupted call, and fixed.
        """
        total, limit = self.size.queries, max(1, QUERY_ROWS // (self.size.dampings * tile.modules))
        count = queries or (total if total <= limit else 1 << limit.bit_length() - 1)
        while True:
            model = self.scores(stage, count, tile)
            if block_rows is not None:
                model = replace(model, min_rows=block_rows, max_rows=block_rows)
            if queries is not None or count == 1 or budget.fits(model):
                return count, model
            count = 1 << (count - 1).bit_length() - 1  # the next smaller power of two

    def _scores(self, stage: str, queries: int, tile: TileMemory) -> MemoryModel:
        dampings, sizes = self.size.dampings, [checkpoint.size for checkpoint in self.checkpoints]
        preparing = max(
            checkpoint.preconditioning(queries, dampings)
            + 8 * queries * checkpoint.size.k * (2 + dampings)
            + checkpoint.query_reading
            for checkpoint in self.checkpoints
        )
        tile_rows = dampings * queries * tile.modules
        next_tile = 4 if len(sizes) > 1 else 0  # of the next checkpoint
        return self._model(
            stage,
            fixed=tile.fixed + preparing + 4 * dampings * queries * self._columns
            + (self._norms() if self.normalized else 0),
            per_worker=tile.per_query * tile_rows,
            per_row=(tile.per_score + next_tile) * tile_rows + tile.per_row
            + (24 * len(sizes) if self.margins else 0)
            + (2 * sum(size.row_bytes for size in sizes) if self.on_device else 0),
            per_number=tile.per_number,
            most=BLOCK_ROWS if tile.most_scores is None else max(64, min(_MOST_ROWS, tile.most_scores // tile_rows)),
        )  # fmt: skip

    def _self_influence(self) -> MemoryModel:
        results = 8 * self.size.dampings * self.size.rows  # and those of the stripes
        return self._model("self-influence", fixed=results, per_worker=self._norms(), per_row=0)

    def _model(
        self, stage: str, fixed: int, per_worker: int, per_row: int, *, per_number: int = 4, most: int = BLOCK_ROWS
    ) -> MemoryModel:
        k = max(checkpoint.size.k for checkpoint in self.checkpoints)
        return MemoryModel(
            f"{stage} for k={k}",
            fixed + self.seen_bytes,
            per_worker + sum(checkpoint.size.reading_bytes for checkpoint in self.checkpoints),
            per_row + per_number * self._columns + 16 * self.size.dampings,
            self.size.workers,
            max_rows=block_limit(k, most=most),
            advice="extract with a smaller k",
        )

    def _norms(self) -> int:
        """Return the bytes that a process holds to find the norms of train rows."""
        total = 0
        for checkpoint in self.checkpoints:
            size, blocks = checkpoint.size, checkpoint.blocks
            if self.on_device and any(shape.rank is not None for shape in blocks):
                total += checkpoint.preconditioning(size.k, 1) + (32 + 4 * size.dampings) * size.k**2
            elif self.on_device:
                total += 12 * size.dampings * size.k
            else:
                total += self_influence_bytes(blocks, size.dampings)
        return total

    def _with_alternatives(self, model: Callable[[ScoringMemory], MemoryModel]) -> MemoryModel:
        def alternatives(budget: MemoryBudget) -> Iterator[Alternative]:
            alone = [checkpoint.resized(workers=1) for checkpoint in self.checkpoints]
            if self.size.dampings > 1:
                one = tuple(checkpoint.resized(dampings=1) for checkpoint in alone)
                yield Alternative("one --damping at a time ({})", model(replace(self, checkpoints=one)))
            if len(alone) == 1:
                yield from alone[0].alternatives(lambda other: model(replace(self, checkpoints=(other,))), budget)

        return replace(model(self), alternatives=alternatives)

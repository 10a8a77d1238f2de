"""Other ways to the same scores where a budget does not hold them: fewer columns, or another form of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import (
    BlockShape,
    Curvature,
    FitShapes,
    choose_rows,
    module_ranges,
    precondition_bytes,
    self_influence_bytes,
)
from ooc_influence.errors import InputError, MemoryBudgetError, warn
from ooc_influence.fingerprint import array_digest, json_digest
from ooc_influence.influence.checkpoints import (
    Checkpoint,
    Marks,
    Stores,
    margin_factors,
    open_checkpoints,
    parse_combine,
    parse_marks,
)
from ooc_influence.influence.engine import Floats, Grouping, parse_groups, weighted_sums
from ooc_influence.influence.tiles import Columns, ScoreTask, TileMemory, pass_need, whole_rows
from ooc_influence.linalg import parse_device
from ooc_influence.memory import Alternative, MemoryBudget, MemoryModel, block_limit, plan_block_rows
from ooc_influence.options import Combine, Normalize, PairOptions, ScoringOptions, complete
from ooc_influence.parallel import slots_per_process, worker_memory
from ooc_influence.store import GradientStore, read_blocks


class Form(NamedTuple):
    """What rows and a curvature hold.

    Attributes
    ----------
    columns : int
        Stored numbers a row.
    blocks : sequence of BlockShape
        The curvature's; none without one.
    """

    columns: int
    blocks: Sequence[BlockShape] = ()

    @classmethod
    def of(cls, columns: int, curvature: Curvature | None) -> Form:
        """Return the form of a curvature, or of none."""
        return cls(columns, () if curvature is None else tuple(block.shape for block in curvature.blocks))

    def working(self, queries: int, values: int) -> int:
        """Return the bytes to precondition a number of queries by a number of λ."""
        return precondition_bytes(self.blocks, queries, values) if self.blocks else 0

    def norms(self, values: int) -> int:
        """Return the bytes for self-influence by a number of λ."""
        return self_influence_bytes(self.blocks, values)


def form_ways(checkpoint: Checkpoint, need: Callable[[Form], MemoryModel], room: MemoryBudget) -> Iterator[Alternative]:
    """Return the ways by other forms of a checkpoint's rows and curvature, given what a form would need."""
    train, found = checkpoint.train, checkpoint.curvature
    shapes = FitShapes.of(choose_rows(train))

    def of_reduced(r: int) -> MemoryModel:
        return need(Form(r, [] if found is None else [BlockShape(r, r)]))

    yield from shapes.reduced(room, of_reduced)
    if found is None or found.kind != "whole":
        return
    if len(shapes.modules) > 1:
        blocks = [BlockShape(last - first, last - first) for first, last in module_ranges(train)]
        text = f"a curvature by module ({{}}: ooc-influence fisher {train.path} --blocks module)"
        yield Alternative(text, need(Form(train.k, blocks)))
    if found.rows < train.k and room.fits(shapes.gram):
        text = f"the Gram side ({{}}: ooc-influence fisher {train.path} --method dual)"
        form = Form(train.k, [BlockShape(train.k, found.rows, keeps=False)])
        yield Alternative(text, max(shapes.gram, need(form), key=room.price))


Factors = Callable[[int, int], npt.NDArray[np.float64]]
_BLOCK_ROWS = 1024  # rows read at a time where they are averaged


@dataclass(frozen=True, eq=False)
class Queries:
    """Rows of query stores, or their means.

    Attributes
    ----------
    names : (q,)
        Ids of the rows, or the names of the groups they are averaged in.
    groups : Grouping or None
        Those groups; None for every row by itself.
    """

    names: npt.NDArray[Any]
    groups: Grouping | None

    @classmethod
    def of(cls, store: GradientStore, average: bool | str) -> Queries:
        """Return every row of ``store``, the mean of all (True), or a mean for each value of a column (its name).

        Raises
        ------
        InputError
            If there is no such column.
        """
        if average is False:
            return cls(store.ids(), None)
        if average is True:
            return cls(np.array(["mean"]), Grouping(np.array(["mean"]), np.zeros(store.n, np.int64)))
        if not isinstance(average, str):
            raise InputError(f"expected average_queries True, False or a column's name; received {average!r}")
        groups = parse_groups(average, store)
        return cls(groups.names, groups)

    @classmethod
    def none(cls) -> Queries:
        """Return no queries."""
        return cls(np.empty(0), None)

    def __len__(self) -> int:
        return len(self.names)

    def reading_bytes(self, store: GradientStore) -> int:
        """Return what :meth:`read` holds beside what it returns and its double."""
        if self.groups is None:
            return store.reading_bytes
        return store.reading_bytes + 2 * 4 * store.k * min(_BLOCK_ROWS, block_limit(store.k), store.n)

    def read(
        self, store: GradientStore, start: int, stop: int, factors: Factors | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return gradients ``start`` to ``stop``, (stop - start, k), and which of them are of dropped rows only.

        ``factors`` gives what rows of the store are multiplied by, before they are averaged.
        """
        if self.groups is None:
            dropped = store.small("dropped", start, stop) if store.has_dropped else np.zeros(stop - start, bool)
            rows = store.rows(start, stop)
            return rows if factors is None else rows * factors(start, stop)[:, None], dropped
        sums, counts = np.zeros((stop - start, store.k)), np.zeros(stop - start)
        for block in read_blocks(store, 0, store.n, min(_BLOCK_ROWS, block_limit(store.k))):
            codes = self.groups.codes[block.start : block.stop] - start
            inside = (codes >= 0) & (codes < stop - start)
            if block.dropped is not None:
                inside &= ~block.dropped
            weights = np.where(inside, 1 if factors is None else factors(block.start, block.stop), 0)
            present, part = weighted_sums(block.gradients, codes, weights.astype(np.float32))
            sums[present] += part
            counts += np.bincount(codes[inside], minlength=stop - start)
        return sums / np.maximum(counts, 1)[:, None], counts == 0


LEFT_ROWS = 2048  # preconditioned queries a pass: more cost memory, fewer another pass over the train rows
OUTSIDE_WARNING = 0.9  # share of a query's squared gradient outside the curvature's span, above which we say so


@dataclass(frozen=True)
class PreconditionedQueries:
    """Preconditioned queries ``start`` to ``stop``.

    Attributes
    ----------
    start, stop : int
        Query numbers.
    arrays : list of (L · q, k) float32
        For each checkpoint, λ by λ; NaN where a query is dropped.
    outside : (q,) float64
        Share of each query's squared gradient outside the span of the training spectrum; NaN without a curvature.
    dropped : (q,) bool
        Queries that are dropped.
    """

    start: int
    stop: int
    arrays: list[Floats]
    outside: npt.NDArray[np.float64]
    dropped: Marks


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """A call's checked input.

    Attributes
    ----------
    checkpoints : tuple of Checkpoint
        One, or several to average over.
    queries : Queries
        The left-hand rows.
    seen : (C, n) bool or None
        Which rows each checkpoint was trained on; None for all.
    normalize : {"cosine", "train"} or None
        The unit of the scores.
    device : str or None
        Where blocks are multiplied; None for NumPy.
    several : bool
        Whether dampings came as a list: results have an axis of λ.
    combine : {"mean", "query-margins", "margins"}
        How checkpoints are combined.
    """

    checkpoints: tuple[Checkpoint, ...]
    queries: Queries
    seen: Marks | None
    normalize: Normalize | None
    device: str | None
    several: bool
    combine: Combine = "mean"

    @classmethod
    def open(cls, query: Stores | None, train: Stores, options: ScoringOptions) -> ScoreRequest:
        """Open and check everything; see :func:`influence_scores`. Without queries, rows are scored on themselves."""
        asked = complete(PairOptions, options)
        normalize = asked["normalize"]
        if normalize not in (None, "cosine", "train"):
            raise InputError(f"expected normalize 'cosine', 'train' or none; received {normalize!r}")
        damping = asked["damping"]
        checkpoints = open_checkpoints(query, train, asked["curvature"], damping, asked["damping_mode"])
        first = checkpoints[0]
        queries = Queries.none() if first.query is None else Queries.of(first.query, asked["average_queries"])
        seen = parse_marks(asked["rows"], isinstance(train, (list, tuple)), len(checkpoints), first.train.n)
        several = damping is not None and np.ndim(damping) == 1
        combine = parse_combine(asked["combine"], checkpoints, normalize)
        return cls(checkpoints, queries, seen, normalize, parse_device(asked["device"]), several, combine)

    @property
    def q(self) -> int:
        """Queries."""
        return len(self.queries)

    @property
    def n(self) -> int:
        """Train rows."""
        return self.checkpoints[0].train.n

    @property
    def columns(self) -> int:
        """Columns of the widest checkpoint's rows."""
        return max(checkpoint.train.k for checkpoint in self.checkpoints)

    @property
    def lambdas(self) -> int:
        """Dampings, L."""
        return len(self.checkpoints[0].values)

    @property
    def damping(self) -> Any:
        """λ itself: a number; (L,) for a list of dampings; one of these for each checkpoint where there are several."""
        values = [list(checkpoint.values) if self.several else checkpoint.values[0] for checkpoint in self.checkpoints]
        return values[0] if len(values) == 1 else values

    def squeeze(self, values: Any) -> Any:
        """Drop the axis of λ, the first, where one damping was given."""
        return values if self.several else values[0]

    def digest(self, **more: Any) -> str:
        """Return a digest of all that the scores depend on: another one means other numbers."""
        groups = self.queries.groups
        facts = {
            "checkpoints": [checkpoint.identity for checkpoint in self.checkpoints],
            "average": None if groups is None else array_digest(groups.codes),
            "seen": None if self.seen is None else array_digest(np.packbits(self.seen)),
            "normalize": self.normalize,
            **({} if self.combine == "mean" else {"combine": self.combine}),
            **more,
        }
        return json_digest(facts)

    def precondition(self, start: int, stop: int) -> PreconditionedQueries:
        """Return queries ``start`` to ``stop``, preconditioned."""
        arrays, shares, dropped = [], [], np.zeros(stop - start, bool)
        for number, checkpoint in enumerate(self.checkpoints):
            assert checkpoint.query is not None
            rows, row_dropped = self.queries.read(checkpoint.query, start, stop, self._query_factors(number))
            if checkpoint.curvature is None:
                product = np.asarray(rows, np.float64)[None].copy()
            else:
                product = checkpoint.curvature.precondition(rows, checkpoint.lambdas)
            shares.append(_outside(checkpoint.curvature, rows, row_dropped))
            if self.normalize == "cosine":
                norms = np.sqrt(np.maximum(np.einsum("qk,lqk->lq", rows, product), 0))
                product /= np.where(norms > 0, norms, 1)[:, :, None]
            if self.seen is None:
                product /= len(self.checkpoints)  # with marks, each train row has its own number of checkpoints
            product[:, row_dropped] = np.nan
            dropped |= row_dropped
            arrays.append(product.reshape(-1, product.shape[-1]).astype(np.float32))
        return PreconditionedQueries(start, stop, arrays, np.mean(shares, axis=0), dropped)

    def _query_factors(self, number: int) -> Factors | None:
        """Return what gives factors of a checkpoint's query rows, where it has any."""
        if self.combine == "mean":
            return None
        stores = [checkpoint.query for checkpoint in self.checkpoints if checkpoint.query is not None]
        return lambda start, stop: margin_factors(stores, start, stop)[number]

    def outside(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return the share of queries ``start`` to ``stop`` outside the span, (q,)."""
        shares = []
        for number, checkpoint in enumerate(self.checkpoints):
            assert checkpoint.query is not None
            rows, row_dropped = self.queries.read(checkpoint.query, start, stop, self._query_factors(number))
            shares.append(_outside(checkpoint.curvature, rows, row_dropped))
        return np.asarray(np.mean(shares, axis=0))

    def form_norm_bytes(self, form: Form) -> int:
        """Return what a process holds to find the norms of train rows by a curvature of some form."""
        if self.device is None or not form.blocks:
            return form.norms(self.lambdas)
        return form.working(form.columns, 1) + (32 + 4 * self.lambdas) * form.columns**2

    def work(self, block_rows: int, columns: Columns | None = None, *, normalized: bool | None = None) -> ScoreTask:
        """Return what tasks need to multiply train rows; ``columns`` are those of each module, for each checkpoint."""
        normalized = self.normalize is not None if normalized is None else normalized
        return ScoreTask(
            tuple(checkpoint.train for checkpoint in self.checkpoints),
            tuple(checkpoint.curvature for checkpoint in self.checkpoints) if normalized else None,
            tuple(checkpoint.lambdas for checkpoint in self.checkpoints),
            columns or whole_rows(len(self.checkpoints)),
            block_rows,
            self.device,
            self.combine == "margins",
        )

    def need(self, stage: str, queries: int, costs: TileMemory) -> MemoryModel:
        """Return what a pass over the train rows for ``queries`` queries needs."""
        forms = [Form.of(checkpoint.train.k, checkpoint.curvature) for checkpoint in self.checkpoints]
        need = self._need(stage, queries, costs, self.lambdas, forms)
        return replace(need, alternatives=partial(self._ways, stage, queries, costs))

    def _ways(self, stage: str, queries: int, costs: TileMemory, room: MemoryBudget) -> Iterator[Alternative]:
        """Return other ways to the scores."""
        forms = [Form.of(checkpoint.train.k, checkpoint.curvature) for checkpoint in self.checkpoints]
        if self.lambdas > 1:
            yield Alternative("one --damping at a time ({})", self._need(stage, queries, costs, 1, forms))
        if len(forms) == 1:
            yield from form_ways(
                self.checkpoints[0], lambda form: self._need(stage, queries, costs, self.lambdas, [form]), room
            )

    def _need(self, stage: str, queries: int, costs: TileMemory, lambdas: int, forms: list[Form]) -> MemoryModel:
        stores = [checkpoint.train for checkpoint in self.checkpoints]
        preparing = max(
            form.working(queries, lambdas)
            + 8 * queries * form.columns * (2 + lambdas)
            + (0 if checkpoint.query is None else self.queries.reading_bytes(checkpoint.query))
            for checkpoint, form in zip(self.checkpoints, forms, strict=True)
        )
        norms = sum(self.form_norm_bytes(form) for form in forms) if self.normalize else 0
        seen = 0 if self.seen is None else self.seen.nbytes
        shares = 24 * len(forms) if self.combine == "margins" else 0
        return pass_need(
            f"{stage} for k={self.columns}",
            [form.columns for form in forms],
            lambdas * queries,
            costs._replace(fixed=costs.fixed + seen + norms + preparing, row=costs.row + 16 * lambdas + shares),
            reading=sum(store.reading_bytes for store in stores),
            raw=[store.layout.encoding.row_bytes for store in stores] if self.device else [],
        )

    def plan(
        self,
        stage: str,
        memory: int | str | None,
        workers: int,
        costs: TileMemory,
        *,
        block_rows: int | None = None,
        queries: int | None = None,
    ) -> tuple[list[tuple[int, int]], int]:
        """Return the query blocks and the rows of a train block that fit the budget.

        Parameters
        ----------
        stage : str
            Its name, for a refusal.
        memory : int, str or None
            The budget.
        workers : int
            Row stripes at once.
        costs : Costs
            What the stage holds beside queries and rows.
        block_rows : int, optional
            Rows of a block, where they are fixed already.
        queries : int, optional
            Queries of a block, where they are.

        Raises
        ------
        MemoryBudgetError
            If not even one query at a time fits, or not those that are fixed.
        """
        shared, budget = slots_per_process(workers), worker_memory(memory)
        limit = max(1, LEFT_ROWS // (self.lambdas * costs.modules))
        fixed, largest = queries is not None, self.q if self.q <= limit else 1 << limit.bit_length() - 1
        queries = queries or largest
        while True:  # fewer queries at a time cost another pass over the train rows, a refusal costs the answer
            need = self.need(stage, queries, costs)
            if block_rows is not None:
                need = need.of_rows(block_rows)
            try:
                rows = plan_block_rows(need, budget, shared)
                break
            except MemoryBudgetError:
                if queries == 1 or fixed:
                    raise
                queries = 1 << (queries - 1).bit_length() - 1  # the next smaller power of two
        return [(start, min(self.q, start + queries)) for start in range(0, self.q, queries)], rows

    def warn_outside(self, outside: npt.NDArray[np.float64]) -> None:
        """Warn where much of a query's gradient is outside the span of the rows of the fit."""
        beyond = outside > OUTSIDE_WARNING
        if beyond.any():
            advice = "no row of the fit can account for that part; fit on more rows, or use a wider curvature"
            if any(
                checkpoint.curvature is not None and checkpoint.curvature.kind == "top"
                for checkpoint in self.checkpoints
            ):
                advice = "that part counts by the mean of the eigenvalues that are not kept; fit with a larger rank"
            warn(
                f"{beyond.sum()} of {self.q} queries have more than {OUTSIDE_WARNING:.0%} of their squared gradient "
                f"outside the span of the training spectrum (up to {np.nanmax(outside):.0%}): {advice}"
            )


def _outside(curvature: Curvature | None, rows: Any, row_dropped: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    if curvature is None:
        return np.full(len(rows), np.nan)
    return np.where(row_dropped, np.nan, curvature.outside_share(rows))

"""Requests for scores: checked input, preconditioned queries, and the blocks that fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import choose_rows, fit_size
from ooc_influence.errors import InputError, warn
from ooc_influence.fingerprint import array_digest, json_digest
from ooc_influence.influence.checkpoints import (
    Checkpoint,
    Marks,
    Stores,
    margin_factors,
    open_checkpoints,
    open_controls,
    parse_combine,
    parse_marks,
)
from ooc_influence.influence.costs import CheckpointMemory, ScoringMemory, TileMemory
from ooc_influence.influence.engine import Floats, Grouping, parse_groups, weighted_sums
from ooc_influence.influence.tiles import Columns, ScoreTask, whole_rows
from ooc_influence.influence.upper import UpperBounds
from ooc_influence.linalg import is_token_loss, parse_device
from ooc_influence.memory import MemoryBudget, ProblemSize, block_limit
from ooc_influence.options import Combine, Normalize, PairOptions, Product, ScoringOptions, complete
from ooc_influence.parallel import slots_per_process, worker_memory
from ooc_influence.store import GradientStore, read_blocks

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
        """Return every row of ``store``, the mean of all (True), or a mean for each value of a column (its name)."""
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

    def only(self, rows: npt.NDArray[np.int64]) -> Queries:
        """Return some of the rows, in this order, where every row is one by itself."""
        codes = np.full(len(self.names), -1, np.int64)
        codes[rows] = np.arange(len(rows))
        return Queries(self.names[rows], Grouping(self.names[rows], codes))

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


def _control_means(minus: Stores | None, checkpoints: Sequence[Checkpoint], combine: Combine) -> tuple[Floats, ...]:
    """Return the mean row of each checkpoint's store of controls, (k,) float32; none without such stores."""
    if minus is None:
        return ()
    if combine != "mean":
        raise InputError(
            f"expected minus (--minus) with combine='mean'; received {combine!r}: a mean of controls has no margin"
        )
    means = []
    for store in open_controls(minus, checkpoints):
        (row,), (empty,) = Queries.of(store, True).read(store, 0, 1)
        if empty:
            raise InputError(f"expected rows of controls that are not dropped in {store.path}; received none (--minus)")
        means.append(row.astype(np.float32))
    return tuple(means)


def _settings(checkpoints: Sequence[Checkpoint], asked: PairOptions, lists: bool) -> dict[str, Any]:
    """Return curvature and damping, of one checkpoint or a list with those of each, as JSON values."""
    curves = [each.curvature for each in checkpoints]
    curvatures = [each.curvature_name for each in checkpoints]
    defaults = [None if each is None else each.list_damping if lists else each.damping for each in curves]
    one = len(checkpoints) == 1
    default = defaults[0] if one else defaults
    return {
        "curvature": curvatures[0] if one else curvatures,
        "damping": default if asked["damping"] is None else np.asarray(asked["damping"], np.float64).tolist(),
        "damping_mode": asked["damping_mode"],
    }


OUTSIDE_WARNING = 0.9  # share of a query's squared gradient outside the curvature's span, above which we say so


@dataclass(frozen=True)
class PreconditionedQueries:
    """Some queries, preconditioned.

    Attributes
    ----------
    arrays : list of (L · q, k) float32
        For each checkpoint, λ by λ; NaN where a query is dropped.
    outside : (q,) float64
        Share of each query's squared gradient outside the span of the training spectrum; NaN without a curvature.
    dropped : (q,) bool
        Queries that are dropped.
    norms : (q,) float64
        √(qᵀ (F + λI)⁻¹ q) in the unit of the queries, the largest of all λ and checkpoints; NaN where dropped.
    bounds : UpperBounds or None
        Of queries of a sketch: what the scores of the wide rows can be at most.
    """

    arrays: list[Floats]
    outside: npt.NDArray[np.float64]
    dropped: Marks
    norms: npt.NDArray[np.float64]
    bounds: UpperBounds | None = None


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """A call's checked input.

    Attributes
    ----------
    checkpoints : tuple of Checkpoint
        One, or several to average over.
    queries : Queries
        Rows of the query stores, or means of them.
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
    settings : mapping
        What was asked for or taken by default: curvature, damping and its mode, and the unit.
    controls : tuple of (k,) float32
        For each checkpoint, what is subtracted from its queries; empty where nothing is.
    """

    checkpoints: tuple[Checkpoint, ...]
    queries: Queries
    seen: Marks | None
    normalize: Normalize | None
    device: str | None
    several: bool
    combine: Combine
    settings: Mapping[str, Any]
    controls: tuple[Floats, ...] = ()

    @classmethod
    def open(cls, query: Stores | None, train: Stores, options: ScoringOptions, *, lists: bool = False) -> ScoreRequest:
        """Open and check everything; see :func:`influence_scores`. Without queries, rows are scored on themselves.

        ``lists`` says that rows will be ranked for each query, which decides the default damping and unit.
        """
        asked = complete(PairOptions, options)
        unit = asked["normalize"]
        if unit not in (None, *get_args(Normalize)):
            raise InputError(f"expected normalize {', '.join(map(repr, get_args(Normalize)))}; received {unit!r}")
        damping = asked["damping"]
        checkpoints = open_checkpoints(query, train, asked["curvature"], damping, asked["damping_mode"], lists)
        first = checkpoints[0]
        queries = Queries.none() if first.query is None else Queries.of(first.query, asked["average_queries"])
        seen = parse_marks(asked["rows"], isinstance(train, (list, tuple)), len(checkpoints), first.train.n)
        several = damping is not None and np.ndim(damping) == 1
        combine = parse_combine(asked["combine"], checkpoints, None if unit == "none" else unit)
        if unit is None:
            tokens = is_token_loss(first.train.attrs.get("loss_kind"))
            effects = any(each.has_effects for each in checkpoints)
            unit = "train" if lists and tokens and combine == "mean" and not effects else "none"
        if unit != "none" and any(each.has_effects for each in checkpoints):
            raise InputError(
                f"expected scores with curvature='trajectory' as they are; received normalize={unit!r}: what a row did "
                "to its own loss may have either sign, so that it is no unit; leave it out"
            )
        settings = _settings(checkpoints, asked, lists) | {"normalize": unit}
        controls = _control_means(asked["minus"], checkpoints, combine)
        if asked["minus"] is not None:
            settings["minus"] = _paths(asked["minus"])
        normalize = None if unit == "none" else unit
        device = parse_device(asked["device"])
        return cls(checkpoints, queries, seen, normalize, device, several, combine, settings, controls)

    def only(self, rows: npt.NDArray[np.int64]) -> ScoreRequest:
        """Return the request for some rows of the query store, which are not averaged."""
        return replace(self, queries=self.queries.only(rows))

    @property
    def q(self) -> int:
        """Queries."""
        return len(self.queries)

    @property
    def n(self) -> int:
        """Train rows."""
        return self.checkpoints[0].train.n

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
            **({"minus": [array_digest(row) for row in self.controls]} if self.controls else {}),
            **more,
        }
        return json_digest(facts)

    def precondition(self, start: int, stop: int) -> PreconditionedQueries:
        """Return queries ``start`` to ``stop``, preconditioned."""
        arrays, shares, dropped, largest = [], [], np.zeros(stop - start, bool), np.zeros(stop - start)
        for number, checkpoint in enumerate(self.checkpoints):
            rows, row_dropped = self._read_queries(number, start, stop)
            share = np.full(len(rows), np.nan)
            if checkpoint.curvature is None:
                product = np.asarray(rows, np.float64)[None].copy()
            else:
                product = checkpoint.curvature.precondition(rows, checkpoint.lambdas, share)
                share[row_dropped] = np.nan
            assert checkpoint.query is not None
            squares = np.einsum("qk,lqk->lq", rows, product) * checkpoint.query.layout.encoding.energy
            norms = np.sqrt(np.maximum(squares, 0))
            if self.normalize == "cosine":
                product /= np.where(norms > 0, norms, 1)[:, :, None]
                norms = np.ones_like(norms)
            largest = np.maximum(largest, norms.max(axis=0))
            if self.seen is None:
                product /= len(self.checkpoints)  # otherwise each train row has its own number of checkpoints
            product[:, row_dropped] = np.nan
            dropped |= row_dropped
            shares.append(share)
            arrays.append(product.reshape(-1, product.shape[-1]).astype(np.float32))
        return PreconditionedQueries(arrays, np.mean(shares, axis=0), dropped, np.where(dropped, np.nan, largest))

    def outside(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return the share of queries ``start`` to ``stop`` outside the span, (q,)."""
        shares = []
        for number, checkpoint in enumerate(self.checkpoints):
            rows, dropped = self._read_queries(number, start, stop)
            curvature = checkpoint.curvature
            share = np.full(len(rows), np.nan) if curvature is None else curvature.outside_share(rows)
            shares.append(np.where(dropped, np.nan, share))
        return np.asarray(np.mean(shares, axis=0))

    def _read_queries(self, number: int, start: int, stop: int) -> tuple[npt.NDArray[Any], Marks]:
        """Return a checkpoint's queries (q, k), and which of them are dropped (q,)."""
        checkpoint, factors = self.checkpoints[number], None
        assert checkpoint.query is not None
        if self.combine != "mean":
            stores = [each.query for each in self.checkpoints if each.query is not None]

            def factors(first: int, last: int) -> npt.NDArray[np.float64]:
                return np.asarray(margin_factors(stores, first, last)[number])

        rows, dropped = self.queries.read(checkpoint.query, start, stop, factors)
        return rows - self.controls[number] if self.controls else rows, dropped

    def work(
        self,
        block_rows: int,
        columns: Columns | None = None,
        *,
        normalized: bool | None = None,
        product: Product = "auto",
    ) -> ScoreTask:
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
            product,
            tuple(checkpoint.norms if normalized else None for checkpoint in self.checkpoints),
        )

    def memory(self, workers: int) -> ScoringMemory:
        """Return the memory models of this request, with ``workers`` tasks that share a process."""
        checkpoints = tuple(
            CheckpointMemory(
                replace(checkpoint.train.problem_size(workers), queries=self.q, dampings=self.lambdas),
                () if checkpoint.curvature is None else tuple(block.shape for block in checkpoint.curvature.blocks),
                partial(_fit_size, checkpoint.train),
                0 if checkpoint.query is None else self.queries.reading_bytes(checkpoint.query),
                checkpoint.curvature is not None and checkpoint.curvature.column_scale is not None,
            )
            for checkpoint in self.checkpoints
        )
        seen_bytes = 0 if self.seen is None else self.seen.nbytes
        normalized, margins = self.normalize is not None, self.combine == "margins"
        return ScoringMemory(checkpoints, seen_bytes, normalized, self.device is not None, margins)

    def plan(
        self,
        stage: str,
        memory: int | str | None,
        workers: int,
        tile: TileMemory,
        *,
        block_rows: int | None = None,
        queries: int | None = None,
    ) -> tuple[list[tuple[int, int]], int]:
        """Return the query blocks and the rows of a train block that fit the budget; refuse if not even one query does.

        ``block_rows`` and ``queries`` are those of a block, where an interrupted call has fixed them.
        """
        budget = MemoryBudget.of(worker_memory(memory))
        count, model = self.memory(slots_per_process(workers)).plan_queries(
            budget, stage, tile, queries=queries, block_rows=block_rows
        )
        rows = budget.plan(model)
        return [(start, min(self.q, start + count)) for start in range(0, self.q, max(1, count))], rows

    def warn_outside(self, outside: npt.NDArray[np.float64]) -> None:
        """Warn where much of a query's gradient is outside the span of the rows of the fit."""
        beyond = outside > OUTSIDE_WARNING
        if beyond.any():
            advice = "no row of the fit can account for that part; fit on more rows, or use a wider curvature"
            curvatures = [checkpoint.curvature for checkpoint in self.checkpoints]
            if any(curvature is not None and curvature.kind == "top" for curvature in curvatures):
                advice = "that part counts by the mean of the eigenvalues that are not kept; fit with a larger rank"
            warn(
                f"{beyond.sum()} of {self.q} queries have more than {OUTSIDE_WARNING:.0%} of their squared gradient "
                f"outside the span of the training spectrum (up to {np.nanmax(outside):.0%}): {advice}"
            )


def _paths(stores: Stores) -> str | list[str]:
    """Return the path of a store, or those of several."""
    if isinstance(stores, (list, tuple)):
        return [str(_paths(store)) for store in stores]
    return str(stores.path if isinstance(stores, GradientStore) else stores)


def _fit_size(train: GradientStore) -> ProblemSize:
    return fit_size(choose_rows(train))

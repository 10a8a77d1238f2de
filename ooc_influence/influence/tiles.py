"""Blocks of scores: preconditioned queries times train rows, block by block of a stripe.

Train blocks are on one grid, so results do not depend on chunks or workers. A tile holds, for every λ, module and
query, the scores of a block's rows: the mean over checkpoints, in the unit asked for, NaN where a row is dropped or no
checkpoint saw it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.checkpoint import ResumableOutput
from ooc_influence.curvature import Curvature
from ooc_influence.influence.checkpoints import Marks, margin_factors
from ooc_influence.influence.engine import Engine, Floats, HostEngine
from ooc_influence.influence.norms import RowNorms
from ooc_influence.linalg import sign_energy
from ooc_influence.options import Product
from ooc_influence.parallel import Stripe, cut_ranges, run_stripes, subtract_ranges
from ooc_influence.progress import Progress, tick
from ooc_influence.store import Block, GradientStore, PathLike, RowSpan, StorePath, is_local, parse_path


def make_engine(device: str | None) -> Engine:
    """Return what computes on a device; None: NumPy."""
    if device is None:
        return HostEngine()
    from ooc_influence.influence.device import DeviceEngine

    return DeviceEngine(device)


Columns = tuple[tuple[slice, ...], ...]


def whole_rows(checkpoints: int) -> Columns:
    """Return the columns of one module that is all of them, for each checkpoint."""
    return ((slice(None),),) * checkpoints


@dataclass(frozen=True, eq=False)
class ScoreTask:
    """What a task needs to multiply train rows, beside the queries.

    Attributes
    ----------
    stores : tuple of GradientStore
        Each checkpoint's train rows.
    curvatures : tuple of Curvature or None, or None
        Each checkpoint's, where train rows are divided by their norms; None: they are not.
    values : tuple of (L, B) float64
        Each checkpoint's λ, for each block of its curvature.
    columns : tuple of tuple of slice
        Columns of each module, for each checkpoint.
    block_rows : int
        Rows multiplied at a time.
    device : str or None
        Where they are multiplied; None for NumPy.
    margins : bool
        Whether rows are weighted to margins (:func:`margin_factors`).
    product : {"auto", "float32", "bfloat16", "int8"}
        What lists are found with (:mod:`ooc_influence.influence.products`).
    norms : tuple of RowNorms or None
        Where each checkpoint's squared norms of rows are kept, for every λ; None: they are computed.
    """

    stores: tuple[GradientStore, ...]
    curvatures: tuple[Curvature | None, ...] | None
    values: tuple[npt.NDArray[np.float64], ...]
    columns: Columns
    block_rows: int
    device: str | None
    margins: bool
    product: Product
    norms: tuple[RowNorms | None, ...]

    def as_stored(self, number: int) -> bool:
        """Whether a checkpoint's rows are multiplied as they are stored, by queries in the same coordinates."""
        form = self.stores[number].layout.encoding
        whole = len(self.columns[number]) == 1 or form.separable
        return form.as_stored and whole and not self.computes_norms(number)

    def computes_norms(self, number: int) -> bool:
        """Whether a checkpoint's rows are divided by norms that have to be found from the rows."""
        return self.curvatures is not None and self.norms[number] is None

    @property
    def widths(self) -> list[int]:
        """Columns of each checkpoint's rows, as they are read."""
        return [
            store.layout.encoding.stored_columns if self.as_stored(number) else store.k
            for number, store in enumerate(self.stores)
        ]

    def read_as_rows(self, queries: list[Floats]) -> list[Floats]:
        """Return each checkpoint's queries in the coordinates that its rows are read in, taking the place of them."""
        for number, store in enumerate(self.stores):
            if self.as_stored(number):
                queries[number] = store.layout.encoding.queries_as_stored(queries[number], store.column_scale)
        return queries

    @property
    def bounded(self) -> bool:
        """Whether lists are found with bounds: of rows that are mapped, whose norms are at hand or simple to find."""
        stores = self.stores
        mapped = all(is_local(store.path) and store.layout.codec is None for store in stores)
        simple = len(stores) == 1 and self.diagonal
        return self.device is None and mapped and (simple or not any(map(self.computes_norms, range(len(stores)))))

    @property
    def diagonal(self) -> bool:
        """Whether norms are weighted sums of squares, for every checkpoint."""
        if self.curvatures is None or any(store.layout.dtype == "sign" for store in self.stores):
            return False
        return all(each is None or each.is_diagonal for each in self.curvatures)

    def norm_weights(self, number: int) -> Floats | None:
        """Return what a checkpoint's squares are summed with to give norms, (L, k), where :attr:`diagonal`.

        None where norms are not computed.
        """
        if self.curvatures is None or not self.computes_norms(number):
            return None
        curvature, k = self.curvatures[number], self.stores[number].k
        if curvature is None:
            return np.ones((1, k), np.float32)
        return np.asarray(curvature.precondition(np.ones((1, k)), self.values[number])[:, 0], np.float32)

    @property
    def paths(self) -> list[StorePath]:
        """What workers must be able to see."""
        return [store.path for store in self.stores]

    @property
    def rows(self) -> int:
        """Train rows, n."""
        return self.stores[0].n

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a row, of all checkpoints."""
        return sum(store.layout.encoding.row_bytes for store in self.stores)

    @property
    def lambdas(self) -> int:
        """Dampings, L."""
        return len(self.values[0])

    @property
    def modules(self) -> int:
        """Modules, M; 1 where rows are taken whole."""
        return len(self.columns[0])


class Tile(NamedTuple):
    """Scores of train rows ``start`` to ``stop``: (L, M, q, rows) on the engine; the next tile overwrites them."""

    start: int
    stop: int
    scores: Any


def score_tiles(
    engine: Engine,
    stripe: Stripe,
    key: str,
    work: ScoreTask,
    seen: Marks | None,
    queries: Sequence[Floats],
    copies: int = 1,
) -> Iterator[Tile]:
    """Yield the tiles of a stripe; ``copies`` of them are valid at a time.

    ``queries`` are in the coordinates of the rows as they are read (:meth:`ScoreTask.read_as_rows`).
    """
    factors = [engine.array(array) for array in queries]
    q = len(queries[0]) // work.lambdas
    size = min(work.block_rows, stripe.stop - stripe.start)
    shape = (work.lambdas, work.modules, q)
    scores = work.lambdas * work.modules * q
    buffers = [engine.empty(scores * size) for _ in range(copies)]
    further: Any = engine.empty(scores * size) if len(queries) > 1 else None
    for turn, blocks in enumerate(row_blocks(engine, stripe, work, as_stored=True)):
        start, stop = blocks[0].start, blocks[0].stop
        total = buffers[turn % copies][: scores * (stop - start)].reshape(*shape, stop - start)
        shares = row_shares(work, seen, start, stop)
        for number, (left, block) in enumerate(zip(factors, blocks, strict=True)):
            tile = total
            if number:
                tile = further[: scores * (stop - start)].reshape(*shape, stop - start)
            _multiply(engine, left, block.gradients, work.columns[number], tile)
            weights = row_weights(engine, work, shares, number, block)
            if weights is not None:
                tile *= engine.array(weights)[:, None, None]
            if number:
                total += tile
        absent = absent_rows(blocks, seen)
        if absent is not None:
            total[..., engine.array(absent)] = np.nan
        yield Tile(start, stop, total)
        tick(key, stop - start)


def row_blocks(
    engine: Engine, stripe: Stripe, work: ScoreTask, *, as_stored: bool = False
) -> Iterator[tuple[Block, ...]]:  # fmt: skip
    """Yield the same rows of every checkpoint's train store, block by block.

    ``as_stored`` allows the numbers that are stored, where a checkpoint's can be multiplied so.
    """
    streams = [
        engine.blocks(store, stripe.start, stripe.stop, work.block_rows, as_stored=as_stored and work.as_stored(number))
        for number, store in enumerate(work.stores)
    ]
    yield from zip(*streams, strict=True)


def _multiply(engine: Engine, left: Any, rows: Any, columns: Sequence[slice], out: Any) -> None:
    """Write scores of a block into ``out`` (L, M, q, b)."""
    lambdas, _, q, b = out.shape
    if len(columns) == 1:
        engine.multiply(left, rows, out.reshape(lambdas * q, b))
        return
    for number in range(lambdas):
        queries = left[number * q : (number + 1) * q]
        for module, part in enumerate(columns):
            engine.multiply(queries[:, part], rows[:, part], out[number, module])


def row_weights(
    engine: Engine,
    work: ScoreTask,
    shares: Floats | None,
    number: int,
    block: RowSpan,
    squares: npt.NDArray[Any] | None = None,
) -> Floats | None:
    """Return what a checkpoint's scores of each row are multiplied by, (L or 1, b); None for one.

    A weight is the row's share, over the row's norm √(gᵀ (F + λI)⁻¹ g) where asked for; a row without gradient scores
    zero. ``squares`` are their squared norms, (L or 1, b); otherwise ``block`` must have the rows themselves where
    :meth:`ScoreTask.computes_norms`.
    """
    weights = None
    if work.curvatures is not None:
        squares = squared_norms(engine, work, number, block) if squares is None else squares
        positive = squares > 0
        weights = np.where(positive, 1 / np.sqrt(np.where(positive, squares, 1)), 0).astype(np.float32)
    if shares is None:
        return weights
    weighted: Floats = shares[number][None] if weights is None else weights * shares[number]
    return weighted


def squared_norms(engine: Engine, work: ScoreTask, number: int, block: RowSpan) -> npt.NDArray[Any]:
    """Return gᵀ (F + λI)⁻¹ g of a checkpoint's rows for each λ, (L, b); ‖g‖², (1, b), without a curvature."""
    assert work.curvatures is not None
    store, norms = work.stores[number], work.norms[number]
    if norms is not None:
        return norms.squares(store, block.start, block.stop)
    assert isinstance(block, Block)
    squares = engine.quadratic(work.curvatures[number], work.values[number], block.gradients)
    return squares * sign_energy(store, block.start, block.stop) if store.layout.dtype == "sign" else squares


def row_shares(work: ScoreTask, seen: Marks | None, start: int, stop: int) -> Floats | None:
    """Return each checkpoint's share of the scores of rows ``start`` to ``stop``, (C, b); None where all are alike.

    One over the checkpoints that saw a row, 0 for those that did not; times what makes margins of them.
    """
    if seen is None and not work.margins:
        return None
    shares = np.ones((len(work.stores), stop - start))
    if seen is not None:
        shares = seen[:, start:stop] / np.maximum(seen[:, start:stop].sum(0), 1)
    if work.margins:
        shares = shares * margin_factors(work.stores, start, stop)
    return np.asarray(shares, np.float32)


def absent_rows(blocks: Sequence[RowSpan], seen: Marks | None) -> Marks | None:
    """Return which rows of a block have no score, (b,): dropped, or seen by no checkpoint; None where all have."""
    start, stop = blocks[0].start, blocks[0].stop
    absent = np.zeros(stop - start, bool)
    for block in blocks:
        if block.dropped is not None:
            absent |= block.dropped
    if seen is not None:
        absent |= ~seen[:, start:stop].any(0)
    return absent if absent.any() else None


Part = Mapping[str, npt.NDArray[Any]]
_PART_BYTES = 2 * 2**30  # stored rows that one part stands for
_QUERIES = re.compile(r"(\d+)-(\d+)-\d+-\d+")  # names of parts of a block of queries


class ScoreParts(ResumableOutput):
    """Results of finished stripes of one call, written by the process that made it.

    The name of a part says of which queries and rows it is. What a budget decides is not in the settings: rows that
    lack a part are cut as the call at hand would, and the queries taken at a time stay those of the parts that exist.

    Parameters
    ----------
    folder : path or None
        Where they are kept; None: nowhere, and an interrupted call starts again.
    digest : str
        Of all that the result depends on.
    """

    def __init__(self, folder: PathLike | None, digest: str) -> None:
        super().__init__(None if folder is None else parse_path(folder), {"digest": digest})
        self.check()

    @property
    def queries(self) -> int | None:
        """Queries at a time in the parts that exist; None where there are none."""
        matches = [_QUERIES.fullmatch(name) for name in self.part_names()]
        return max((int(match[2]) - int(match[1]) for match in matches if match), default=None)

    def run(
        self,
        name: str,
        function: Callable[..., Part],
        work: ScoreTask,
        progress: Progress,
        *args: Any,
        slots: int,
        on_result: Callable[[Stripe, Part], None],
    ) -> None:
        """Run ``function`` for stripes of the rows that have no part; ``on_result`` gets every part, in any order."""
        finished: list[Stripe] = []
        for stripe in self._stripes(name):
            part = self.get(_part_name(name, stripe)) if not finished or finished[-1].stop <= stripe.start else None
            if part is not None:
                finished.append(stripe)
                progress.advance(stripe.stop - stripe.start)
                on_result(stripe, part)

        def finish(stripe: Stripe, part: Part) -> None:
            self.put(_part_name(name, stripe), part)
            on_result(stripe, part)

        gaps = subtract_ranges([(0, work.rows)], [(part.start, part.stop) for part in finished])
        most = None if self.path is None else max(1, _PART_BYTES // work.row_bytes)
        stripes = cut_ranges(gaps, work.block_rows, slots, most)
        run_stripes(function, stripes, progress, work, *args, slots=slots, on_result=finish, own_threads=True)

    def _stripes(self, name: str) -> list[Stripe]:
        """Return the stripes that have a part, in order; of those that start at a row, the longest first."""
        matches = [re.fullmatch(re.escape(name) + r"-(\d+)-(\d+)", part) for part in self.part_names()]
        return sorted(
            (Stripe(int(match[1]), int(match[2])) for match in matches if match),
            key=lambda stripe: (stripe.start, -stripe.stop),
        )


def _part_name(name: str, stripe: Stripe) -> str:
    return f"{name}-{stripe.start}-{stripe.stop}"

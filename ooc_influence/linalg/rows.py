"""Rows of a store, times the square roots of their weights: F_w = (1/m) Σ w_i g_i g_iᵀ.

The empirical Fisher matrix counts a row the less the better the model fits it. For cross-entropy over one label,
ℓ = −log p, weights bring it to other matrices, from what is stored:

- ``"ggn"``: w = p/(1−p) = 1/expm1(ℓ): the generalised Gauss-Newton matrix of "this label or another", Σ p(1−p) ∇m ∇mᵀ
  with the margin m = log p/(1−p), since g = −(1−p) ∇m;
- ``"trak"``: w = 1/(1−p)² = 1/expm1(−ℓ)², the Gram matrix of margins (Park et al. 2023, arXiv 2303.14186).

Weighted rows have an *index* from 0: of all rows, or of a range of them, it is a row number less the first one; of rows
picked by number or drawn at random, it is an index into the ascending list of them. Blocks lie on a grid of indices, so
results do not depend on how the work was divided. Which rows are dropped is looked up once, when they are chosen: a row
dropped later counts until the next fit, in whatever order rows are read.

Rows can be *whitened*: divided by a scale of the columns while they are read. A fit of whitened rows is one of
D⁻¹ F D⁻¹, and needs nothing else to be so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.fingerprint import array_digest
from ooc_influence.linalg.whitening import Whitening
from ooc_influence.linalg.whole import LEAST_SCALE, MOST_SCALE, RowGrouper
from ooc_influence.options import Weighting
from ooc_influence.parallel import Stripe
from ooc_influence.store import Block, GradientStore, RawBlock, read_blocks, read_raw_blocks

Numbers = npt.NDArray[np.int64]
Range = tuple[int, int]  # of rows or columns: the first, and the one after the last
LOSS_FLOOR = 1e-6  # smaller losses count as this one: their weights would rest on a loss's last bits
ONE_LABEL = "cross_entropy"  # the loss_kind the formulas hold for
_FEWEST_PER_SCALE = 16  # rows: of fewer, products of whole numbers are slower than float32's
_TOKENS = "token_cross_entropy"  # how the loss_kind of language models begins


def parse_weighting(weights: str | None, attributes: Mapping[str, Any]) -> Weighting | None:
    """Return the weighting, checked against the loss a store's rows were made with.

    Raises
    ------
    InputError
        For an unknown weighting, or a loss it does not hold for.
    """
    if weights is None:
        return None
    if weights not in ("ggn", "trak"):
        raise InputError(f"expected weights 'ggn', 'trak' or none; received {weights!r}")
    check_one_label(attributes, f"weights={weights!r}")
    return weights  # type: ignore[return-value]


def check_one_label(attributes: Mapping[str, Any], asked: str, where: str = "") -> None:
    """Check that rows were made with the loss that the formulas hold for; ``where``: said of what was received.

    Raises
    ------
    InputError
        If they were not.
    """
    kind = attributes.get("loss_kind")
    if kind != ONE_LABEL:
        raise InputError(
            f"expected rows of loss_kind {ONE_LABEL!r} for {asked}; received {kind!r}{where}: give loss_kind when "
            "extracting, if the loss is one-label cross-entropy"
        )
    if (attributes.get("collected") or {}).get("losses") is False:
        raise InputError(
            f"expected rows with their losses for {asked}; received rows that were collected without{where}: record "
            "the samples' losses in every step (Step.record)"
        )


def is_token_loss(loss_kind: Any) -> bool:
    """Return whether rows are of a language model's loss, over the tokens of a sequence."""
    return isinstance(loss_kind, str) and loss_kind.startswith(_TOKENS)


def row_weights(losses: npt.NDArray[Any], weights: Weighting | None) -> npt.NDArray[np.float64]:
    """Return the weight of each row, (m,) float64, from its loss."""
    if weights is None:
        return np.ones(len(losses))
    clipped = np.maximum(np.asarray(losses, np.float64), LOSS_FLOOR)
    with np.errstate(over="ignore"):  # a loss beyond 700 has weight 0
        return np.asarray(1 / np.expm1(clipped) if weights == "ggn" else 1 / np.expm1(-clipped) ** 2)


def row_errors(losses: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return 1 − p of each row's label, (m,) float64, from its cross-entropy."""
    return np.asarray(-np.expm1(-np.maximum(np.asarray(losses, np.float64), LOSS_FLOOR)))


class WeightedBlock(NamedTuple):
    """Rows ``start`` to ``stop`` of :class:`WeightedRows`, times √w; how many are live, and have a clipped loss.

    Their values are those of an array, a tensor on a device, or :class:`.GroupedRows`, that the next block overwrites.
    """

    start: int
    stop: int
    rows: Any
    live: int
    clipped: int


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Some rows of a store, each times √w; zero where dropped.

    Attributes
    ----------
    store : GradientStore
        The store.
    first, count : int
        Row of index 0 where they are a range, and how many they are, dropped ones included.
    numbers : (count,) int64 or None
        Their row numbers, ascending; None for a range.
    weighting : {"ggn", "trak"} or None
        Weights by their losses.
    weights : (count,) float64 or None
        Weights as numbers.
    selection : mapping
        How they were chosen: JSON values. ``{"stop": None}`` takes in what is appended later.
    dropped_too : bool
        Dropped rows count as if they were not.
    tombstones : (count,) bool or None
        Which of them were dropped when they were chosen; None where none was.
    rows_digest : str
        The store's digest of its rows, taken before the tombstones.
    whitening : Whitening or None
        What columns are divided by; None for rows as they are stored.
    """

    store: GradientStore
    first: int
    count: int
    numbers: Numbers | None = None
    weighting: Weighting | None = None
    weights: npt.NDArray[np.float64] | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    dropped_too: bool = False
    tombstones: npt.NDArray[np.bool_] | None = None
    rows_digest: str = ""
    whitening: Whitening | None = None

    @classmethod
    def of(cls, store: GradientStore, ranges: Sequence[Range], weighting: Weighting | None = None) -> Self:
        """Return the rows of some ranges, ascending, as they are at this moment."""
        if len(ranges) == 1:
            ((start, stop),) = ranges
            return cls(store, start, stop - start, None, weighting).with_tombstones()
        numbers = np.concatenate([np.arange(*part) for part in ranges])
        return cls(store, 0, len(numbers), numbers, weighting).with_tombstones()

    def with_tombstones(self) -> Self:
        """Return the same rows, and which of them are dropped at this moment."""
        digest = self.store.rows_digest()  # first: whatever is dropped in between makes it stale
        dropped = self.dropped_now()
        return replace(self, tombstones=dropped if dropped.any() else None, rows_digest=digest)

    @property
    def path(self) -> object:
        """Where the store is: tasks of other processes must be able to see it."""
        return self.store.path

    @property
    def live(self) -> int:
        """Rows that were not dropped when they were chosen."""
        return self.count - int(self.dropped().sum())

    @property
    def small_bytes(self) -> int:
        """Return the bytes of what is kept for each row."""
        scale = None if self.whitening is None else self.whitening.scale
        arrays = (self.numbers, self.weights, self.tombstones, scale)
        return sum(array.nbytes for array in arrays if array is not None)

    def part(self, start: int, stop: int) -> Self:
        """Return rows ``start`` to ``stop`` of these, with indices from 0."""
        numbers = None if self.numbers is None else self.numbers[start:stop]
        return self._sliced(slice(start, stop), self.first + start, stop - start, numbers)

    def at(self, indices: Numbers) -> Self:
        """Return the rows at some indices."""
        numbers = indices + self.first if self.numbers is None else self.numbers[indices]
        return self._sliced(indices, 0, len(indices), numbers)

    def _sliced(self, indices: slice | Numbers, first: int, count: int, numbers: Numbers | None) -> Self:
        weights = None if self.weights is None else self.weights[indices]
        tombstones = None if self.tombstones is None else self.tombstones[indices]
        return replace(self, first=first, count=count, numbers=numbers, weights=weights, tombstones=tombstones)

    def chunks(self) -> Numbers:
        """Return the chunks they are stored in."""
        size = self.store.layout.chunk_rows
        if self.numbers is not None:
            return np.unique(self.numbers // size)
        return np.arange(self.first // size, -(-(self.first + self.count) // size))

    def dropped_now(self) -> npt.NDArray[np.bool_]:
        """Return which of them are dropped at this moment, (count,)."""
        if not self.store.has_dropped or not self.count:
            return np.zeros(self.count, np.bool_)
        if self.numbers is None:
            return np.array(self.store.small("dropped", self.first, self.first + self.count))
        return np.asarray(self.store.dropped[self.numbers])

    def dropped(self) -> npt.NDArray[np.bool_]:
        """Return which of them were dropped when they were chosen, (count,)."""
        return np.zeros(self.count, np.bool_) if self.tombstones is None else self.tombstones

    def clipped(self) -> int:
        """Return how many of them, but the dropped ones, have a loss below the floor of their weights."""
        if self.weighting is None:
            return 0
        if self.numbers is None:
            losses = self.store.small("loss", self.first, self.first + self.count)
        else:
            losses = np.asarray(self.store.loss[self.numbers])
        return int(((losses < LOSS_FLOOR) & ~self.dropped()).sum())

    def sampling_error(self, live: int, fourth: float, norm: float) -> float:
        """Return the expected relative error of F from a sample: √((1 − s/N) (Σ‖x‖⁴/s − ‖F‖²) / (s − 1)) / ‖F‖.

        ``fourth`` is Σ‖x‖⁴ and ``norm`` the squared Frobenius norm of the undamped sum of ``live`` rows.
        """
        s, norm = live, norm / live**2
        spread = max(0.0, fourth / s - norm) / (s - 1)
        return float(np.sqrt((1 - s / int(self.selection["population"])) * spread / norm)) if norm > 0 else 0.0

    def rows_per_scale(self, block_rows: int) -> int:
        """Return how many rows of a block share a scale, on average; 0 unless they are whole numbers times few scales.

        Such rows can be read grouped by their scales (:meth:`grouped_blocks`).
        """
        if not self.store.layout.encoding.linear or self.weights is not None or self.weighting is not None:
            return 0
        dropped, rows, groups = self.dropped(), 0, 0
        for start in range(0, self.count, block_rows):
            stop = min(self.count, start + block_rows)
            kept = self._scales(start, stop)[slice(None) if self.dropped_too else ~dropped[start:stop]]
            distinct = np.unique(kept)
            rows, groups = rows + len(kept), groups + len(distinct)
            far = len(distinct) and not (distinct[0] >= LEAST_SCALE and distinct[-1] <= MOST_SCALE)
            if far or rows < _FEWEST_PER_SCALE * groups:
                return 0
        return rows // max(1, groups)

    def _scales(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        if self.numbers is None:
            return self.store.small("row_scale", self.first + start, self.first + stop)
        first = int(self.numbers[start])
        scales = self.store.small("row_scale", first, int(self.numbers[stop - 1]) + 1)
        return np.asarray(scales[self.numbers[start:stop] - first])

    def grouped_blocks(
        self, start: int, stop: int, block_rows: int, *, columns: Sequence[Range] | None = None
    ) -> Iterator[WeightedBlock]:
        """Yield the blocks that :meth:`blocks` yields as :class:`.GroupedRows`: unweighted whole numbers and scales."""
        numbers = None if self.numbers is None else self.numbers[start:stop]
        base = self.first if numbers is None else 0
        wanted = [(0, self.store.k)] if columns is None else columns
        grouper = RowGrouper(max(1, min(block_rows, stop - start)), wanted, self._column_factors(wanted))
        part = (self.store, base + start, base + stop, block_rows)
        for block in read_raw_blocks(*part, numbers=numbers, columns=columns):
            weighted, _, dropped = self._weighted(block, None, base)
            yield weighted._replace(rows=grouper.group(block.parts, dropped))

    def _column_factors(self, columns: Sequence[Range]) -> npt.NDArray[np.float32] | None:
        """Return what some ranges of columns are multiplied by, beside the rows' scales; None for nothing."""
        inverse, scale = self._inverse(columns), self.store.column_scale
        if scale is None:
            return inverse
        scale = np.concatenate([scale[first:last] for first, last in columns])
        return np.asarray(scale if inverse is None else scale * inverse)

    def record(self) -> dict[str, Any]:
        """Return what is written in a curvature's attributes about their weights."""
        if self.weights is not None:
            return {"name": "array", "digest": array_digest(self.weights)}
        return {"name": self.weighting, "loss_floor": LOSS_FLOOR} if self.weighting else {}

    def digest(self) -> str:
        """Return a digest of all that sums over them depend on: which rows, their commits, tombstones and weights."""
        facts = [self.store.identity, self.first, self.count, dict(self.selection), self.record()]
        if self.whitening is not None:
            facts.append(array_digest(self.whitening.scale))
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(self.store.records[self.chunks()].tobytes())
        digest.update(np.packbits(self.dropped()).tobytes())
        return digest.hexdigest()

    def blocks(
        self,
        start: int,
        stop: int,
        block_rows: int,
        *,
        threads: int = 1,
        columns: Sequence[Range] | None = None,
        device: str | None = None,
    ) -> Iterator[WeightedBlock]:
        """Yield rows ``start`` to ``stop`` block by block, times √w, whitened, zero where dropped.

        ``columns`` are ranges of columns, one after the other, by default all; on a ``device`` they are all read.
        """
        numbers = None if self.numbers is None else self.numbers[start:stop]
        base = self.first if numbers is None else 0  # what the reader counts from
        part, loss = (self.store, base + start, base + stop, block_rows), self.weighting is not None
        if device is not None:
            yield from self._device_blocks(base, device, max(1, min(block_rows, stop - start)),
                                           read_raw_blocks(*part, numbers=numbers, loss=loss))  # fmt: skip
            return
        inverse = self._inverse(columns)
        for block in read_blocks(*part, numbers=numbers, loss=loss, columns=columns, threads=threads):
            weighted, factors, dropped = self._weighted(block, block.gradients, base)
            if inverse is not None:
                np.multiply(block.gradients, inverse, out=block.gradients)
            if factors is not None:
                np.multiply(block.gradients, factors[:, None], out=block.gradients)
            if dropped is not None:
                block.gradients[dropped] = 0
            yield weighted

    def _inverse(self, columns: Sequence[Range] | None) -> npt.NDArray[np.float32] | None:
        """Return 1/D of some ranges of columns, one after the other; None where rows are as they are stored."""
        if self.whitening is None:
            return None
        ranges = [(0, self.store.k)] if columns is None else columns
        return np.concatenate([1 / self.whitening.scale[first:last] for first, last in ranges]).astype(np.float32)

    def _device_blocks(
        self, base: int, device: str, block_rows: int, raw: Iterator[RawBlock]
    ) -> Iterator[WeightedBlock]:
        import torch

        from ooc_influence.linalg.device import DeviceRows

        sender = DeviceRows(self.store, torch.device(device), block_rows, self._inverse(None))
        for block, rows in sender.read(raw):
            weighted, factors, dropped = self._weighted(block, rows, base)
            if factors is not None:
                sender.multiply(rows, factors)
            if dropped is not None:
                sender.clear(rows, dropped)
            yield weighted

    def _weighted(
        self, block: Block | RawBlock, rows: Any, base: int
    ) -> tuple[WeightedBlock, npt.NDArray[np.float32] | None, npt.NDArray[np.bool_] | None]:
        """Return a block of ``rows`` still to be multiplied by factors √w (b,), and cleared where dropped (b,)."""
        part, weights, clipped = slice(block.start - base, block.stop - base), None, 0
        dropped = None if self.dropped_too or self.tombstones is None else self.tombstones[part]
        if self.weights is not None:
            weights = self.weights[part]
        elif self.weighting is not None and block.loss is not None:
            weights = row_weights(block.loss, self.weighting)
            low = block.loss < LOSS_FLOOR
            clipped = int((low if dropped is None else low & ~dropped).sum())
        live = part.stop - part.start - (0 if dropped is None else int(dropped.sum()))
        factors = None if weights is None else np.sqrt(weights).astype(np.float32)
        return WeightedBlock(part.start, part.stop, rows, live, clipped), factors, dropped


@dataclass(frozen=True, eq=False)
class RowPartition(Stripe):
    """What one task sums: the rows of some ranges of indices, each range by itself."""

    parts: tuple[tuple[int, WeightedRows], ...] = ()  # the first index, and the rows from there on


def partition_rows(rows: WeightedRows, ranges: Sequence[Range], block_rows: int, count: int) -> list[RowPartition]:
    """Divide ranges of indices among at most ``count`` tasks, in whole blocks."""
    blocks = [(low, min(stop, low + block_rows)) for start, stop in ranges for low in range(start, stop, block_rows)]
    count = max(1, min(count, len(blocks)))
    partitions = []
    for number in range(count):
        joined: list[list[int]] = []
        for low, high in blocks[len(blocks) * number // count : len(blocks) * (number + 1) // count]:
            if joined and joined[-1][1] == low:
                joined[-1][1] = high
            else:
                joined.append([low, high])
        if joined:
            parts = tuple((low, rows.part(low, high)) for low, high in joined)
            partitions.append(RowPartition(joined[0][0], joined[-1][1], parts))
    return partitions

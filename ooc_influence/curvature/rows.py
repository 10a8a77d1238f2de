"""Which rows a curvature is made of, at which weights, and what has become of them since.

Chosen rows have *places* from 0: of all rows, or of a range of them, a place is a row number less the first one; of
some rows, picked by number or drawn at random, it is a place in the ascending list of them. Blocks lie on a grid of
places, so results do not depend on how the work was divided. Which of them are dropped is looked at once, when they are
chosen: a row dropped later counts until the next fit, in whatever order rows are read.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.linalg import parse_weighting, row_weights
from ooc_influence.linalg.rows import LOSS_FLOOR
from ooc_influence.options import RowOptions, Weighting, complete
from ooc_influence.parallel import Stripe
from ooc_influence.store import Block, GradientStore, RawBlock, parse_numbers, read_blocks, read_raw_blocks

Numbers = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Some rows of a store, each times √w.

    Attributes
    ----------
    store : GradientStore
        The store.
    first, count : int
        Row of place 0 where they are a range, and how many they are, dropped ones included.
    numbers : (count,) int64 or None
        Their row numbers, ascending; None for a range.
    weighting : {"ggn", "trak"} or None
        Weights by their losses.
    weights : (count,) float64 or None
        Weights as given.
    selection : mapping
        How they were chosen: JSON values. ``{"stop": None}`` takes in what is appended later.
    dropped_too : bool
        Dropped rows count as if they were not.
    tombstones : (count,) bool or None
        Which of them were dropped when they were chosen; None where none was.
    rows_digest : str
        The store's digest of its rows, taken before the tombstones.
    """

    store: GradientStore
    first: int
    count: int
    numbers: Numbers | None
    weighting: Weighting | None
    weights: Weights | None
    selection: Mapping[str, Any]
    dropped_too: bool = False
    tombstones: npt.NDArray[np.bool_] | None = None
    rows_digest: str = ""

    @property
    def path(self) -> object:
        """Where the store is: tasks of other processes must be able to see it."""
        return self.store.path

    @property
    def small_bytes(self) -> int:
        """Return the bytes of what is kept for each row."""
        return sum(array.nbytes for array in (self.numbers, self.weights, self.tombstones) if array is not None)

    def part(self, start: int, stop: int) -> ChosenRows:
        """Return places ``start`` to ``stop`` of these rows, as places from 0."""
        numbers = None if self.numbers is None else self.numbers[start:stop]
        weights = None if self.weights is None else self.weights[start:stop]
        tombstones = None if self.tombstones is None else self.tombstones[start:stop]
        return replace(
            self, first=self.first + start, count=stop - start, numbers=numbers, weights=weights, tombstones=tombstones
        )

    def chunks(self) -> Numbers:
        """Return the chunks they lie in."""
        size = self.store.layout.chunk_rows
        if self.numbers is not None:
            return np.unique(self.numbers // size)
        return np.arange(self.first // size, -(-(self.first + self.count) // size))

    def with_tombstones(self) -> ChosenRows:
        """Return the same rows, and which of them are dropped at this moment."""
        digest = self.store.rows_digest()  # first: whatever is dropped in between makes it stale
        found = self.dropped_now()
        return replace(self, tombstones=found if found.any() else None, rows_digest=digest)

    def dropped_now(self) -> npt.NDArray[np.bool_]:
        """Return which of them are dropped at this moment, (count,)."""
        if not self.store.has_dropped:
            return np.zeros(self.count, np.bool_)
        if self.numbers is None:
            return np.array(self.store.small("dropped", self.first, self.first + self.count))
        return np.asarray(self.store.dropped[self.numbers])

    def dropped(self) -> npt.NDArray[np.bool_]:
        """Return which of them were dropped when they were chosen, (count,)."""
        return np.zeros(self.count, np.bool_) if self.tombstones is None else self.tombstones

    def clipped(self, dropped: npt.NDArray[np.bool_]) -> int:
        """Return how many of them, but the dropped ones (count,), have a loss below the floor of their weights."""
        if self.weighting is None:
            return 0
        if self.numbers is None:
            losses = self.store.small("loss", self.first, self.first + self.count)
        else:
            losses = np.asarray(self.store.loss[self.numbers])
        return int(((losses < LOSS_FLOOR) & ~dropped).sum())

    def at(self, places: Numbers) -> ChosenRows:
        """Return the rows at some places."""
        numbers = places + self.first if self.numbers is None else self.numbers[places]
        weights = None if self.weights is None else self.weights[places]
        tombstones = None if self.tombstones is None else self.tombstones[places]
        return replace(self, first=0, count=len(places), numbers=numbers, weights=weights, tombstones=tombstones)

    def sampling_error(self, live: int, fourth: float, norm: float) -> float:
        """Return the expected relative error of F from a sample: √((1 − s/N) (Σ‖x‖⁴/s − ‖F‖²) / (s − 1)) / ‖F‖.

        ``fourth`` is Σ‖x‖⁴ and ``norm`` the squared Frobenius norm of the undamped sum of ``live`` rows.
        """
        s, norm = live, norm / live**2
        spread = max(0.0, fourth / s - norm) / (s - 1)
        return float(np.sqrt((1 - s / int(self.selection["population"])) * spread / norm)) if norm > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """Return what is written in a curvature's attributes about their weights."""
        if self.weights is not None:
            return {"name": "array", "digest": _digest(self.weights)}
        return {"name": self.weighting, "loss_floor": LOSS_FLOOR} if self.weighting else {}

    def digest(self) -> str:
        """Return a digest of all that sums over them depend on: which rows, their commits, tombstones and weights."""
        facts = [self.store.identity, self.first, self.count, dict(self.selection), self.record()]
        found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        found.update(self.store.records[self.chunks()].tobytes())
        found.update(np.packbits(self.dropped()).tobytes())
        return found.hexdigest()

    def blocks(
        self, start: int, stop: int, block_rows: int, *, threads: int = 1, columns: Sequence[Range] | None = None
    ) -> Iterator[WeighedBlock]:
        """Yield places ``start`` to ``stop`` block by block, times √w, zero where dropped.

        ``columns`` are ranges of columns, given one after the other; by default all.
        """
        base, options = self._reading(start, stop)
        for block in read_blocks(
            self.store, base + start, base + stop, block_rows, columns=columns, threads=threads, **options
        ):
            found, factors, dropped = self._weighed(block, block.gradients, base)
            if factors is not None:
                np.multiply(block.gradients, factors[:, None], out=block.gradients)
            if dropped is not None:
                block.gradients[dropped] = 0
            yield found

    def device_blocks(self, start: int, stop: int, block_rows: int, device: str) -> Iterator[WeighedBlock]:
        """Yield what :meth:`blocks` does, as tensors on a device."""
        import torch

        from ooc_influence.linalg.device import DeviceRows

        base, options = self._reading(start, stop)
        sender = DeviceRows(self.store, torch.device(device), max(1, min(block_rows, stop - start)))
        for block, rows in sender.read(read_raw_blocks(self.store, base + start, base + stop, block_rows, **options)):
            found, factors, dropped = self._weighed(block, rows, base)
            if factors is not None:
                sender.multiply(rows, factors)
            if dropped is not None:
                sender.clear(rows, dropped)
            yield found

    def _reading(self, start: int, stop: int) -> tuple[int, dict[str, Any]]:
        """Return what to add to a place to get what the reader counts, and how to read."""
        numbers = None if self.numbers is None else self.numbers[start:stop]
        return self.first if numbers is None else 0, {"numbers": numbers, "loss": self.weighting is not None}

    def _weighed(
        self, block: Block | RawBlock, rows: Any, base: int
    ) -> tuple[WeighedBlock, npt.NDArray[np.float32] | None, npt.NDArray[np.bool_] | None]:
        """Return a block of ``rows`` still to be multiplied by factors √w (b,), and cleared where dropped (b,)."""
        places, clipped = slice(block.start - base, block.stop - base), 0
        dropped = None if self.dropped_too or self.tombstones is None else self.tombstones[places]
        if self.weights is not None:
            weights = self.weights[places]
        elif self.weighting is not None and block.loss is not None:
            weights = row_weights(block.loss, self.weighting)
            low = block.loss < LOSS_FLOOR
            clipped = int((low if dropped is None else low & ~dropped).sum())
        else:
            weights = None
        live = places.stop - places.start - (0 if dropped is None else int(dropped.sum()))
        factors = None if weights is None else np.sqrt(weights).astype(np.float32)
        return WeighedBlock(places.start, places.stop, rows, live, clipped), factors, dropped


class WeighedBlock(NamedTuple):
    """Rows at places ``start`` to ``stop``, times √w; how many are live; how many losses were clipped."""

    start: int
    stop: int
    rows: Any
    live: int
    clipped: int


@dataclass(frozen=True, eq=False)
class RowPartition(Stripe):
    """What one task sums: the rows at some ranges of places, each range by itself."""

    parts: tuple[tuple[int, ChosenRows], ...] = ()  # the first place, and the rows from there on


def partition_rows(chosen: ChosenRows, ranges: Sequence[Range], block_rows: int, count: int) -> list[RowPartition]:
    """Divide ranges of places among at most ``count`` tasks, in whole blocks."""
    blocks = [(low, min(stop, low + block_rows)) for start, stop in ranges for low in range(start, stop, block_rows)]
    count = max(1, min(count, len(blocks)))
    shares = []
    for number in range(count):
        own = blocks[len(blocks) * number // count : len(blocks) * (number + 1) // count]
        joined: list[list[int]] = []
        for low, high in own:
            if joined and joined[-1][1] == low:
                joined[-1][1] = high
            else:
                joined.append([low, high])
        if joined:
            parts = tuple((low, chosen.part(low, high)) for low, high in joined)
            shares.append(RowPartition(joined[0][0], joined[-1][1], parts))
    return shares


def choose_rows(store: GradientStore, options: RowOptions | None = None) -> ChosenRows:
    """Return the rows a call means; see :func:`fit_fisher`.

    Raises
    ------
    InputError
        For rows that are not there, a sample larger than the live rows, or weights that are none.
    """
    asked = complete(RowOptions, options or {})
    first, count, numbers, selection = _parse_rows(asked["rows"], store.n)
    chosen = ChosenRows(store, first, count, numbers, None, None, selection).with_tombstones()
    if asked["sample"] is not None:
        chosen = _draw(chosen, asked["sample"], asked["seed"])
    weights = asked["weights"]
    if weights is None or isinstance(weights, str):
        attributes = dict(store.attrs) | ({"loss_kind": "cross_entropy"} if asked["force_weights"] else {})
        return replace(chosen, weighting=parse_weighting(weights, attributes))
    given = _parse_weights(weights, store.n)
    inside = slice(chosen.first, chosen.first + chosen.count) if chosen.numbers is None else chosen.numbers
    return replace(chosen, weights=given[inside])


def _parse_rows(rows: Any, n: int) -> tuple[int, int, Numbers | None, dict[str, Any]]:
    if isinstance(rows, tuple) and len(rows) == 2:
        rows = slice(*rows)
    if isinstance(rows, range):
        rows = slice(rows.start, rows.stop) if rows.step == 1 else np.array(rows)
    if rows is None or isinstance(rows, slice):
        return _parse_range(slice(None) if rows is None else rows, n)
    numbers = parse_numbers(rows, n).astype(np.int64)
    if not numbers.size:
        raise InputError("expected rows to fit; received none")
    return 0, len(numbers), numbers, {"kind": "numbers", "digest": _digest(numbers)}


def _parse_range(rows: slice, n: int) -> tuple[int, int, None, dict[str, Any]]:
    try:
        start = 0 if rows.start is None else operator.index(rows.start)
        stop = n if rows.stop is None else operator.index(rows.stop)
        step = 1 if rows.step is None else operator.index(rows.step)
    except TypeError as error:
        raise InputError(f"expected a range of row numbers; received {rows}") from error
    if not 0 <= start < stop <= n or step != 1:
        raise InputError(f"expected rows A:B with 0 <= A < B <= {n} (n); received {rows.start}:{rows.stop}")
    return start, stop - start, None, {"kind": "range", "start": start, "stop": None if rows.stop is None else stop}


def _draw(chosen: ChosenRows, sample: int, seed: int) -> ChosenRows:
    """Draw live rows at random, without replacement."""
    live = None if chosen.tombstones is None else np.flatnonzero(~chosen.tombstones)
    population = chosen.count if live is None else len(live)
    if isinstance(sample, bool) or not isinstance(sample, (int, np.integer)) or not 2 <= sample <= population:
        raise InputError(f"expected a sample of 2 to {population} rows, the live ones; received {sample!r}")
    drawn = np.sort(np.random.default_rng(seed).choice(population, sample, replace=False, shuffle=False))
    selection = {
        "kind": "sample", "sample": int(sample), "seed": int(seed), "population": population,
        "rows": chosen.store.n, "of": chosen.selection,
    }  # fmt: skip
    return replace(chosen.at(drawn if live is None else live[drawn]), selection=selection)


def _parse_weights(weights: Any, n: int) -> Weights:
    try:
        given = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected weights 'ggn', 'trak', none or numbers; received {weights!r:.40}") from error
    if given.shape != (n,):
        raise InputError(f"expected a weight for each of the {n} rows; received shape {given.shape}")
    if not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
        wrong = given[~(np.isfinite(given) & (given >= 0))]
        received = f"{len(wrong)} others, such as {wrong[0]}" if len(wrong) else "zeros only"
        raise InputError(f"expected weights that are finite, not negative and not all zero; received {received}")
    return given


def _digest(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()

"""Sums of rows by group, one block at a time: a sparse matrix of weights times the block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.curvature import Curvature
from ooc_influence.errors import InputError
from ooc_influence.parallel import cores, task_threads
from ooc_influence.store import GradientStore, read_blocks

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


class Grouping(NamedTuple):
    """Which group each row belongs to.

    Attributes
    ----------
    names : (G,)
        What the groups are called, in order.
    codes : (n,) int64
        Each row's place in ``names``.
    """

    names: npt.NDArray[Any]
    codes: Codes


def parse_groups(by: str | npt.ArrayLike, store: GradientStore) -> Grouping:
    """Return the groups that a column of ``store``, its ids (``"id"``) or an array with a value for each row make.

    Raises
    ------
    InputError
        If there is no such column, or the array has another length.
    """
    if isinstance(by, str):
        if by != "id" and by not in store.layout.columns:
            known = ", ".join(["id", *store.layout.columns])
            raise InputError(f"expected one of {known} to group {store.path} by; received {by!r}")
        values = store.ids() if by == "id" else store.column(by)
    else:
        values = np.asarray(by)
        if values.shape != (store.n,):
            raise InputError(f"expected a group for each of {store.n} rows; received values of shape {values.shape}")
    names, codes = np.unique(values, return_inverse=True)
    return Grouping(names, codes.astype(np.int64))


def weighted_sums(rows: Any, codes: Codes, weights: npt.NDArray[np.float32]) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Return the groups with rows of weight above zero, (d,), and Σ weight · row of each, (d, k) float32.

    Parameters
    ----------
    rows : (b, k) float32
        A block.
    codes, weights : (b,)
        Each row's group and weight.
    """
    from scipy.sparse import csr_array

    held = np.flatnonzero(weights)
    groups, places = np.unique(codes[held], return_inverse=True)
    order = np.argsort(places, kind="stable")
    ends = np.searchsorted(places[order], np.arange(len(groups) + 1))
    shape = (len(groups), len(rows))
    return groups, csr_array((weights[held][order], held[order], ends), shape=shape) @ rows


_Result = TypeVar("_Result")
_FEW = 256  # rows of the left factor up to which the product of the swapped factors, turned round, is quicker
_PIECE = 512  # train rows multiplied at once, at least: fewer are slow
_ROWS_AT_ONCE = 4096  # rows that all cores together multiply at once
_ROTATED_BYTES = 32 * 2**20  # of rotated rows that all threads hold while they find norms


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` where they are multiplied; valid until the next block.

    Attributes
    ----------
    start, stop : int
        Row numbers.
    values : (stop - start, k) float32
        The rows: an array of the engine.
    dropped : (stop - start,) bool or None
        Which are dropped; None where none is.
    """

    start: int
    stop: int
    values: Any
    dropped: npt.NDArray[np.bool_] | None


class Found(NamedTuple):
    """Numbers of a tile (m, b): their places, row by row and ascending within a row, and values."""

    numbers: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: Floats


class Engine(ABC):
    """What score tiles are made with."""

    @abstractmethod
    def blocks(self, store: GradientStore, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        """Yield the blocks of rows ``start`` to ``stop``; see :func:`read_blocks`."""

    @abstractmethod
    def array(self, values: npt.NDArray[Any]) -> Any:
        """Return a NumPy array as one of this engine."""

    @abstractmethod
    def empty(self, *shape: int) -> Any:
        """Return an uninitialised float32 array of this engine."""

    @abstractmethod
    def multiply(self, left: Any, rows: Any, out: Any) -> None:
        """Write left @ rowsᵀ, (m, k) and (b, k), into ``out`` (m, b)."""

    @abstractmethod
    def sums(self, rows: Any, codes: Codes, weights: Floats) -> tuple[Codes, Any]:
        """Return the sums of rows by group; see :func:`weighted_sums`."""

    @abstractmethod
    def quadratic(self, curvature: Curvature | None, values: Sequence[float], rows: Any) -> Floats:
        """Return gᵀ (F + λI)⁻¹ g for each λ and row, (L, b); ‖g‖², (1, b), without a curvature."""

    @abstractmethod
    def above(self, tile: Any, limits: Floats, most: int, sign: int) -> Found | None:
        """Return what of ``sign`` · tile (m, b) exceeds its row's limit, (m,); None where more than ``most`` do."""

    @abstractmethod
    def host(self, tile: Any) -> Floats:
        """Return an array of the engine as a NumPy one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what it holds."""


class HostEngine(Engine):
    """NumPy and the BLAS behind it, called by as many threads as a task may use, each with its own part of a block.

    The BLAS's own threads do less well where one factor has few rows. A context.
    """

    def __init__(self) -> None:
        self._threads = task_threads()
        self._pool = ThreadPoolExecutor(self._threads, "ooc_influence-engine")

    @override
    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def _each(self, work: Callable[[slice], _Result], count: int, step: int) -> list[_Result]:
        """Do ``work`` on slices of ``count`` things, at most ``step`` of them each."""
        parts = [slice(start, min(count, start + step)) for start in range(0, count, step)]
        if len(parts) == 1:
            return [work(parts[0])]
        return list(self._pool.map(work, parts))

    def _share(self, count: int) -> int:
        """Return a thread's share of so many things."""
        return max(1, -(-count // self._threads))

    @override
    def blocks(self, store: GradientStore, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        for block in read_blocks(store, start, stop, block_rows, threads=self._threads):
            yield Rows(block.start, block.stop, block.gradients, block.dropped)

    @override
    def array(self, values: npt.NDArray[Any]) -> Any:
        return values

    @override
    def empty(self, *shape: int) -> Any:
        return np.empty(shape, np.float32)

    @override
    def multiply(self, left: Any, rows: Any, out: Any) -> None:

        def work(part: slice) -> None:
            if len(left) <= _FEW:
                out[:, part] = np.matmul(rows[part], left.T).T
            else:
                np.matmul(left, rows[part].T, out=out[:, part])

        # by the machine's cores, whatever the threads: they must not change roundings
        self._each(work, len(rows), max(_PIECE, _ROWS_AT_ONCE // cores()))

    @override
    def sums(self, rows: Any, codes: Codes, weights: Floats) -> tuple[Codes, Any]:
        return weighted_sums(rows, codes, weights)

    @override
    def quadratic(self, curvature: Curvature | None, values: Sequence[float], rows: Any) -> Floats:

        def work(part: slice) -> Floats:
            if curvature is None:
                squares: Floats = np.einsum("ij,ij->i", rows[part], rows[part])
                return squares[None]
            return curvature.self_influence(rows[part], values)

        step = max(64, _ROTATED_BYTES // (4 * rows.shape[1] * self._threads))
        return np.concatenate(self._each(work, len(rows), min(step, self._share(len(rows)))), axis=1)

    @override
    def above(self, tile: Any, limits: Floats, most: int, sign: int) -> Found | None:

        def work(part: slice) -> Found | None:
            own, limit = tile[part], limits[part, None]
            exceeding = own > limit if sign > 0 else own < -limit
            if np.count_nonzero(exceeding) > most:
                return None
            numbers, columns = np.divmod(np.flatnonzero(exceeding), tile.shape[1])
            values = own[numbers, columns]
            return Found(part.start + numbers, columns, values if sign > 0 else -values)

        parts = self._each(work, len(tile), self._share(len(tile)))
        if any(part is None for part in parts) or sum(len(part.numbers) for part in parts if part) > most:
            return None
        return Found(*(np.concatenate(values) for values in zip(*(part for part in parts if part), strict=True)))

    @override
    def host(self, tile: Any) -> Floats:
        return np.asarray(tile)

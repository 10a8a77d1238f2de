"""The arithmetic of score tiles: products, norms, sums by group and the largest scores, by NumPy or by torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.curvature import Curvature
from ooc_influence.errors import InputError
from ooc_influence.linalg import Matrix, row_squares
from ooc_influence.parallel import cores, task_threads
from ooc_influence.store import Block, GradientStore, read_blocks, read_stored_blocks

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


class Grouping(NamedTuple):
    """Which group each row belongs to.

    Attributes
    ----------
    names : (G,)
        What the groups are called, in order.
    codes : (n,) int64
        Each row's index in ``names``.
    """

    names: npt.NDArray[Any]
    codes: Codes


def parse_groups(by: str | npt.ArrayLike, store: GradientStore) -> Grouping:
    """Return the groups that a column of ``store``, its ids (``"id"``) or an array with a value for each row make."""
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

    weighted = np.flatnonzero(weights)
    groups, indices = np.unique(codes[weighted], return_inverse=True)
    order = np.argsort(indices, kind="stable")
    ends = np.searchsorted(indices[order], np.arange(len(groups) + 1))
    shape = (len(groups), len(rows))
    return groups, csr_array((weights[weighted][order], weighted[order], ends), shape=shape) @ rows


BEYOND = 2.0**100  # an upper bound that says nothing: of queries whose largest number is in [1, 2), scores are smaller
_Result = TypeVar("_Result")
_FEW = 256  # rows of the left factor up to which the product of the swapped factors, transposed, is quicker
_PIECE = 512  # train rows multiplied at once, at least: fewer are slow
_ROWS_AT_ONCE = 4096  # rows that all cores together multiply at once
_ROTATED_BYTES = 32 * 2**20  # of rotated rows that all threads hold while they find norms


class Entries(NamedTuple):
    """Some entries of a tile (m, b), row by row and ascending within a row."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: Floats

    def where(self, chosen: npt.NDArray[np.bool_]) -> Entries:
        """Return some of them."""
        return Entries(self.rows[chosen], self.columns[chosen], self.values[chosen])


class Engine(ABC):
    """The arrays that score tiles are computed with, and their arithmetic. A context."""

    @abstractmethod
    def blocks(
        self, store: GradientStore, start: int, stop: int, block_rows: int, *, as_stored: bool
    ) -> Iterator[Block]:  # fmt: skip
        """Yield the blocks of rows ``start`` to ``stop``, arrays of this engine; see :func:`read_blocks`.

        ``as_stored`` asks for the numbers that are stored, as :func:`read_stored_blocks` reads them.
        """

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
    def quadratic(self, curvature: Curvature | None, lambdas: Matrix, rows: Any) -> npt.NDArray[Any]:
        """Return gᵀ (F + λI)⁻¹ g for each λ and row, (L, b); ‖g‖², (1, b), without a curvature."""

    @abstractmethod
    def above(self, tile: Any, limits: Floats, most: int, sign: int) -> Entries | None:
        """Return the entries of ``sign`` · tile (m, b) above their row's limit, (m,); None for more than ``most``."""

    @abstractmethod
    def raised(self, tile: Any, sign: int, factors: tuple[Floats, Floats], out: Any) -> Any:
        """Return ``sign`` · tile (m, b) plus products of lists and columns, at most :data:`BEYOND`, in ``out``.

        ``factors`` are (m, t), and (G, t, b) of each of G groups of lists, one after the other.
        """

    @abstractmethod
    def nth_largest(self, tile: Any, n: int, sign: int) -> Floats:
        """Return the n-th largest of ``sign`` · tile (m, b) of each row, (m,); NaN counts as least."""

    @abstractmethod
    def host(self, tile: Any) -> Floats:
        """Return an array of the engine as a NumPy one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:  # noqa: B027 - most hold nothing
        """Release what it holds."""


_LOST = 1e-30  # sums of squares below have lost bits in float32


def _sums_of_squares(rows: Floats) -> npt.NDArray[np.float64]:
    """Return ‖g‖² of rows (b, k), (b,)."""
    squares: npt.NDArray[np.float64] = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    lost = np.flatnonzero(squares < _LOST)
    if len(lost):
        squares[lost] = row_squares(rows[lost])
    return squares


class HostEngine(Engine):
    """NumPy and the BLAS behind it, called by as many threads as a task may use, each with its own part of a block.

    The BLAS's own threads are slower where one factor has few rows.

    Attributes
    ----------
    threads : int
        How many.
    """

    def __init__(self) -> None:
        self.threads = task_threads()
        self._pool = ThreadPoolExecutor(self.threads, "ooc_influence-engine")

    @override
    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def divide(self, work: Callable[[slice], _Result], count: int, step: int) -> list[_Result]:
        """Do ``work`` on slices of ``count`` items, of at most ``step`` items each, in several threads."""
        parts = [slice(start, min(count, start + step)) for start in range(0, count, step)]
        if len(parts) == 1:
            return [work(parts[0])]
        return list(self._pool.map(work, parts))

    def _share(self, count: int) -> int:
        """Return a thread's share of some items."""
        return max(1, -(-count // self.threads))

    @override
    def blocks(
        self, store: GradientStore, start: int, stop: int, block_rows: int, *, as_stored: bool
    ) -> Iterator[Block]:  # fmt: skip
        read = read_stored_blocks if as_stored else read_blocks
        return read(store, start, stop, block_rows, threads=self.threads)

    def picked(
        self, store: GradientStore, numbers: npt.NDArray[np.int64], block_rows: int, *, as_stored: bool
    ) -> Iterator[Block]:  # fmt: skip
        """Yield the blocks of rows by number, ascending: ``start`` and ``stop`` are indices in ``numbers``."""
        read = read_stored_blocks if as_stored else read_blocks
        return read(store, 0, len(numbers), block_rows, numbers=numbers, threads=self.threads)

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
        self.divide(work, len(rows), max(_PIECE, _ROWS_AT_ONCE // cores()))

    @override
    def sums(self, rows: Any, codes: Codes, weights: Floats) -> tuple[Codes, Any]:
        return weighted_sums(rows, codes, weights)

    @override
    def quadratic(self, curvature: Curvature | None, lambdas: Matrix, rows: Any) -> npt.NDArray[Any]:

        def work(part: slice) -> npt.NDArray[Any]:
            if curvature is None:
                return _sums_of_squares(rows[part])[None]
            return curvature.self_influence(rows[part], lambdas)

        step = max(64, _ROTATED_BYTES // (4 * rows.shape[1] * self.threads))
        return np.concatenate(self.divide(work, len(rows), min(step, self._share(len(rows)))), axis=1)

    @override
    def above(self, tile: Any, limits: Floats, most: int, sign: int) -> Entries | None:

        def work(part: slice) -> Entries | None:
            scores, limit = tile[part], limits[part, None]
            exceeding = scores > limit if sign > 0 else scores < -limit
            if np.count_nonzero(exceeding) > most:
                return None
            numbers, columns = np.divmod(np.flatnonzero(exceeding), tile.shape[1])
            values = scores[numbers, columns]
            return Entries(part.start + numbers, columns, values if sign > 0 else -values)

        parts = self.divide(work, len(tile), self._share(len(tile)))
        if any(part is None for part in parts) or sum(len(part.rows) for part in parts if part) > most:
            return None
        return Entries(*(np.concatenate(values) for values in zip(*(part for part in parts if part), strict=True)))

    @override
    def raised(self, tile: Any, sign: int, factors: tuple[Floats, Floats], out: Any) -> Any:
        (left, right), target = factors, out[: tile.size].reshape(tile.shape)
        group = len(tile) // len(right)

        def work(part: slice) -> None:
            with np.errstate(over="ignore", invalid="ignore"):
                for row in range(part.start, part.stop):  # one at a time: they stay in cache
                    some = target[row]
                    np.matmul(left[row], right[row // group], out=some)
                    np.add(some, tile[row], out=some) if sign > 0 else np.subtract(some, tile[row], out=some)
                    np.minimum(some, np.float32(BEYOND), out=some)

        self.divide(work, len(tile), self._share(len(tile)))
        return target

    @override
    def nth_largest(self, tile: Any, n: int, sign: int) -> Floats:

        def work(part: slice) -> Floats:
            values = -sign * tile[part]  # ascending
            values[np.isnan(values)] = np.inf
            values.partition(n - 1, axis=1)
            return np.asarray(-values[:, n - 1], np.float32)

        return np.concatenate(self.divide(work, len(tile), min(64, self._share(len(tile)))))

    @override
    def host(self, tile: Any) -> Floats:
        return np.asarray(tile)

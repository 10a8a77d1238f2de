"""Products of queries with stored rows that are quicker than float32's, and what each score may be off by.

A processor multiplies bfloat16 numbers, or whole numbers of eight bits, several times as fast as float32 where it has
instructions for them. Scores s̃ of such a product find the rows that can be in a list; those few are scored again in
float32 (:mod:`ooc_influence.influence.exact`), so lists do not depend on which product was used. That needs a
bound: for query q and row g,

    |s̃ − s| ≤ Σ_t E[q, t] F[g, t] + ρ |s̃|,

with factors E of queries and F of rows, and ρ of the product. Cauchy-Schwarz gives them: rounding a query to q + δq
and a row to g + δg changes a product by at most ‖δq‖ ‖g‖ + ‖q + δq‖ ‖δg‖, and sums of m float32 numbers in any order
are off by at most m 2⁻²⁴ Σ|q_j g_j| (Higham 2002, chapter 4). s itself is the float32 score of
:func:`~ooc_influence.influence.exact.exact_scores`, whose own rounding is in the bound.

Queries come divided by a power of two, so that their largest number is in [1, 2).
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.linalg import multiply_whole
from ooc_influence.options import ProductName
from ooc_influence.process import limit_openmp
from ooc_influence.store import Encoding

Floats = npt.NDArray[np.float32]

_UNIT = 2.0**-24  # half a step of float32, relative
_HALF_STEP = 2.0**-8  # of bfloat16
_ROUNDING = _HALF_STEP / (1 - _HALF_STEP)  # of a bfloat16 number, relative to what it was rounded to
_SUM_UNITS = 512.0 + 128.0  # roundings of an exact score: its sums, a row's scale and weight, and those of sums here
_LEAST = 2.0**-62  # of a number whose square is not lost
_LEAST_SQUARES = 2.0**-90  # of a sum of squares that has hardly lost any
_UNDERFLOW = 2.0**-120  # what numbers too small for float32 take from a product, for each column
_SAFETY = 1.001  # for the rounding of the bound itself
_FEW, _WIDE = 128, 1024  # queries, or parts of them, and columns: of fewer and more, products are rows times queries
_UNSHIFTED = 2**31 // (127 * 128 * 257)  # columns: the products of both parts of a query add up to 32 bits
_PRODUCTS_AT_ONCE = 2**20  # whole numbers of 32 bits: they stay in cache
_UNPACKED_AT_ONCE, _LEAST_UNPACKED = 2**21, 2**11  # bits, and columns of them
_PIECE_ROWS = 512  # multiplied at once: fewer are slow
_PIECES = 4  # of each thread, where there are rows for them: one that has to wait for its core holds up little
_TILE_BYTES = 2**19  # float32 bytes converted at a time: they stay in cache
_LEVELS = 32_639  # whole numbers of 16 bits, x = 256 h + l with both parts of 8: |x| at most 127 · 256 + 127


class Pool(Protocol):
    """What divides rows among threads (:class:`ooc_influence.influence.engine.HostEngine`)."""

    threads: int

    def divide(self, work: Callable[[slice], Any], count: int, step: int) -> list[Any]:
        """Do ``work`` on slices of ``count`` items, of at most ``step`` items each, in several threads."""


class Found(NamedTuple):
    """What is known of some rows beside their scores.

    Attributes
    ----------
    errors : (b, t) float64
        F; infinite where s̃ says nothing.
    squares : (L, b) float64 or None
        Sums of squares by the norm weights, off by at most :attr:`Product.square_error` of themselves.
    """

    errors: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64] | None = None


class Product(ABC):
    """Scores of stored rows with a set of queries, and their bounds.

    Parameters
    ----------
    form : Encoding
        How rows are stored.
    column_scale : (k,) float32 or None
        What decoded rows are multiplied by, where they are not taken as they are stored.
    queries : (q, width) float32
        In the coordinates of the rows.
    columns : sequence of slice
        Columns of each module, M of them.
    pool : Pool
        Threads to work with.
    as_stored : bool
        Whether rows are taken as :meth:`Encoding.read_stored_into` gives them.
    alone : bool
        Whether its scores are all; otherwise they are added to others, and ρ must be 0.
    norm_weights : (L, width) float32, optional
        What the squares of rows are summed with.

    Attributes
    ----------
    query_errors : (M, q, t) float64
        E. NaN for a query that is NaN.
    relative : float
        ρ.
    square_error : float
        See :class:`Found`; 0 where no norms are summed.
    """

    name: ProductName
    piece: int  # columns summed in one product
    relative = 0.0

    def __init__(
        self,
        form: Encoding,
        column_scale: Floats | None,
        queries: Floats,
        columns: Sequence[slice],
        pool: Pool,
        *,
        as_stored: bool,
        alone: bool = True,
        norm_weights: Floats | None = None,
    ) -> None:
        self._form, self._column_scale, self._pool, self._as_stored = form, column_scale, pool, as_stored
        self._alone = alone
        # the largest weight is one: a square that float32 loses counts for nothing then
        self._norm_scale = np.ones(1) if norm_weights is None else norm_weights.max(axis=1).astype(np.float64)
        self._norm_weights = None if norm_weights is None else norm_weights / self._norm_scale[:, None].astype("f4")
        self._queries = queries
        self.square_error = 0.0 if norm_weights is None else 2 * (queries.shape[1] + 8) * _UNIT
        self._modules = [self._cut(part) for part in columns]
        self._room = threading.local()
        with np.errstate(over="ignore", invalid="ignore"):
            self.query_errors = _SAFETY * np.stack([self._errors(part) for part in columns])

    def _cut(self, part: slice) -> list[slice]:
        """Return pieces of some columns."""
        first, last, _ = part.indices(self._queries.shape[1])
        return [slice(start, min(last, start + self.piece)) for start in range(first, last, self.piece)]

    def _buffer(self, name: str, rows: int, columns: int, dtype: Any) -> npt.NDArray[Any]:
        """Return room for an array, one for each name and thread: fresh memory would cost more than the conversion."""
        held = getattr(self._room, name, None)
        if held is None or held.size < rows * columns:
            held = np.empty(rows * columns, dtype)
            setattr(self._room, name, held)
        whole: npt.NDArray[Any] = held[: rows * columns].reshape(rows, columns)
        return whole

    def _divide(self, work: Callable[[slice], object], count: int) -> None:
        """Do ``work`` on pieces of ``count`` rows, in threads of our own, in each of which PyTorch has one.

        PyTorch's own threads wait for each other after each of many short steps, spinning: where the reader or another
        process has a core meanwhile, all of them stand still.
        """

        def alone(part: slice) -> None:
            with limit_openmp(1), np.errstate(over="ignore", invalid="ignore"):  # a thread has its own
                work(part)

        share = -(-count // self._pool.threads)
        step = max(min(_PIECE_ROWS, share), -(-share // _PIECES))
        self._pool.divide(alone, count, max(1, min(step, max(_PIECE_ROWS, _PRODUCTS_AT_ONCE // len(self._queries)))))

    @abstractmethod
    def _errors(self, part: slice) -> npt.NDArray[np.float64]:
        """Return E of some columns, (q, t)."""

    def bounds(self, factors: npt.NDArray[np.float64], scores: Floats) -> npt.NDArray[np.float64]:
        """Return what scores (M, q, b) may be off by, given the rows' F (b, t)."""
        return np.asarray(self.query_errors @ factors.T + self.relative * np.abs(scores))

    @abstractmethod
    def multiply(self, raw: npt.NDArray[Any], scale: Floats, out: Floats) -> Found:
        """Write scores of stored rows (b, ·) into ``out`` (M, q, b), which may have any strides."""

    def _settle(self, found: Found, raw: npt.NDArray[Any], scale: Floats) -> None:
        """Tell rows of zeros from rows whose squares are beyond float32, of which nothing is known then."""
        if found.squares is None:
            return
        known = (found.squares >= _LEAST_SQUARES) & np.isfinite(found.squares)
        doubtful = np.flatnonzero(~known.all(axis=0))
        zero = ~raw[doubtful, : self._form.number_columns].any(axis=1) | (scale[doubtful] == 0)
        found.errors[doubtful] = np.where(zero, 0, np.inf)[:, None]
        found.squares[:, doubtful] = np.where(zero, 0, 1)
        found.squares[...] *= self._norm_scale[:, None]

    def _sum_error(self, columns: int) -> float:
        """Return the error of a score that is a sum of float32 products, and of the exact one, over ‖q‖ ‖g‖."""
        units = (min(columns, self.piece) + -(-columns // self.piece) + _SUM_UNITS) * _UNIT
        return units / (1 - units)

    def _read(self, raw: npt.NDArray[Any], scale: Floats, tile: Floats) -> None:
        """Write float32 rows (b, width)."""
        if self._as_stored:
            self._form.read_stored_into(raw, scale, tile)
        else:
            self._form.decode_into(raw, scale, tile, self._column_scale)


def _norms(tile: Floats) -> npt.NDArray[np.float64]:
    """Return bounds of the norms of rows (b, k), from above, (b,)."""
    k = tile.shape[1]
    with np.errstate(over="ignore"):  # a thread has its own
        squares = np.vecdot(tile, tile).astype(np.float64)
    return np.asarray(np.sqrt(squares * (1 + 2 * k * _UNIT)) + np.sqrt(k) * _LEAST)


class Float32Product(Product):
    """NumPy's BLAS: the reference, which every processor has."""

    name = "float32"
    piece = 2**12  # the sum of more would be known less well

    @override
    def _errors(self, part: slice) -> npt.NDArray[np.float64]:
        queries = self._queries[:, part]
        norms = _norms(queries)
        return np.stack([norms * self._sum_error(queries.shape[1]), queries.shape[1] * np.minimum(norms, 1)], axis=1)

    @override
    def multiply(self, raw: npt.NDArray[Any], scale: Floats, out: Floats) -> Found:
        factors, weights = np.empty((len(raw), 2)), self._norm_weights
        factors[:, 1] = _UNDERFLOW
        squares = None if weights is None else np.empty((len(weights), len(raw)))

        def work(part: slice) -> None:
            rows = self._buffer("rows", part.stop - part.start, self._queries.shape[1], np.float32)
            step = _tile_rows(rows.shape[1])
            for start in range(0, len(rows), step):
                cut = slice(part.start + start, min(part.stop, part.start + start + step))
                tile = rows[start : start + step]
                self._read(raw[cut], scale[cut], tile)
                factors[cut, 0] = _norms(tile)
                if squares is not None and weights is not None:
                    with np.errstate(over="ignore", invalid="ignore"):
                        squares[:, cut] = weights @ np.square(tile).T
            for module, pieces in enumerate(self._modules):
                for number, piece in enumerate(pieces):
                    product = np.matmul(rows[:, piece], self._queries[:, piece].T).T
                    target = out[module, :, part]
                    np.copyto(target, product) if number == 0 else np.add(target, product, out=target)

        with np.errstate(over="ignore", invalid="ignore"):
            self._pool.divide(work, len(raw), min(_PIECE_ROWS, -(-len(raw) // self._pool.threads)))
        found = Found(factors, squares)
        self._settle(found, raw, scale)
        _clear(found, out)
        return found


def _clear(found: Found, out: Floats) -> None:
    """Make F infinite where a number overflowed, and scores zero."""
    bad = ~np.isfinite(found.errors).all(axis=1)
    if bad.any():
        found.errors[bad] = np.inf
        out[..., bad] = 0


def _tile_rows(columns: int) -> int:
    return max(1, _TILE_BYTES // (4 * max(1, columns)))


_CONVERTED = ("float32", "float16", "bfloat16", "int8-linear")
_CONVERTED_AT_ONCE = 2**18  # numbers: they stay in cache


class BFloat16Product(Product):
    """PyTorch's product of bfloat16 numbers, summed in float32 and rounded to bfloat16."""

    name = "bfloat16"
    piece = 2**14

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self._rounded_once:
            self.relative = _ROUNDING
        torch: Any = sys.modules["torch"]
        self._rounded = torch.from_numpy(self._queries).to(torch.bfloat16)
        # rows whose numbers PyTorch converts: scores are multiplied by a row's scale afterwards
        self._converted = self._form.name in _CONVERTED and (self._as_stored or self._column_scale is None)
        self._exact = self._as_stored or self._form.name == "bfloat16"
        self._scaled = self._as_stored or self._converted

    @property
    def _rounded_once(self) -> bool:
        """Whether a score is one rounded number, not a sum of several."""
        return self._alone and all(len(pieces) == 1 for pieces in self._modules)

    @override
    def _errors(self, part: slice) -> npt.NDArray[np.float64]:
        torch: Any = sys.modules["torch"]
        queries = self._queries[:, part]
        rounded = torch.from_numpy(queries).to(torch.bfloat16).float().numpy()
        norms, after, lost = (_norms(each) for each in (queries, rounded, queries - rounded))
        k = queries.shape[1]
        sums = (
            (self._sum_error(k) + (0.0 if self._rounded_once else _ROUNDING))
            * np.maximum(norms, after)
            * (1 + _HALF_STEP)
        )
        return np.stack([lost + sums, after, k * np.minimum(norms, 1)], axis=1)

    @override
    def multiply(self, raw: npt.NDArray[Any], scale: Floats, out: Floats) -> Found:
        torch: Any = sys.modules["torch"]
        norms, lost = np.empty((2, len(raw)))
        squares = None if self._norm_weights is None else np.empty((len(self._norm_weights), len(raw)))

        def work(part: slice) -> None:
            some = None if squares is None else squares[:, part]
            rows = self._rounded_rows(raw[part], scale[part], norms[part], lost[part], some)
            for module, pieces in enumerate(self._modules):
                target = torch.from_numpy(out[module][:, part])
                for number, piece in enumerate(pieces):
                    product = self._products(rows, piece)
                    target.copy_(product) if number == 0 else target.add_(product)
                if self._scaled:
                    target.mul_(torch.from_numpy(np.ascontiguousarray(scale[part])))

        self._divide(work, len(raw))
        with np.errstate(over="ignore", invalid="ignore"):
            least = np.sqrt(self._queries.shape[1]) * _LEAST
            norms += least
            lost += 0 if self._exact else least
            found = Found(np.stack([norms, lost, np.full(len(raw), _UNDERFLOW)], axis=1), squares)
            self._settle(found, raw, scale)
            if self._scaled:
                found.errors[:, :2] *= scale[:, None]
                if squares is not None:
                    squares *= np.square(scale, dtype=np.float64)
            if self._as_stored:  # rows of zeros: another has a norm of one or more before it is scaled
                found.errors[norms < 1] = 0
            _clear(found, out)
            return found

    def _products(self, rows: Any, piece: slice) -> Any:
        """Return the products with rounded rows (b, width), (q, b) bfloat16."""
        torch: Any = sys.modules["torch"]
        queries, few = self._rounded[:, piece], len(self._rounded) <= _FEW
        shape = (len(rows), len(queries)) if few else (len(queries), len(rows))
        product = torch.from_numpy(self._buffer("product", *shape, np.int16)).view(torch.bfloat16)
        if few:  # quicker this way round
            return torch.mm(rows[:, piece], queries.T, out=product).T
        return torch.mm(queries, rows[:, piece].T, out=product)

    def _rounded_rows(
        self,
        raw: npt.NDArray[Any],
        scale: Floats,
        norms: npt.NDArray[np.float64],
        lost: npt.NDArray[np.float64],
        squares: npt.NDArray[np.float64] | None,
    ) -> Any:
        """Return rounded rows (b, width); write squares, and bounds of the norms of rows and of what they lost."""
        torch: Any = sys.modules["torch"]
        width = self._queries.shape[1]
        if self._converted:
            numbers = torch.from_numpy(raw.view(np.int16) if self._form.name == "bfloat16" else raw)
            numbers = numbers.view(torch.bfloat16) if self._form.name == "bfloat16" else numbers
        else:
            numbers = torch.from_numpy(self._decoded(raw, scale))
        rounded = torch.from_numpy(self._buffer("rounded", len(raw), width, np.int16)).view(torch.bfloat16)
        step = max(1, _CONVERTED_AT_ONCE // width)
        tile = torch.from_numpy(self._buffer("tile", step, width, np.float32))
        measured = len(self._queries) > _FEW and not self._exact
        for start in range(0, len(raw), step):
            part = slice(start, start + step)
            values = tile[: len(numbers[part])].copy_(numbers[part])
            rounded[part].copy_(values)
            norms[part] = torch.linalg.vector_norm(values, dim=1).numpy()
            if measured:
                lost[part] = torch.linalg.vector_norm(values - rounded[part], dim=1).numpy()
            if squares is not None:
                squares[:, part] = torch.mm(torch.from_numpy(self._norm_weights), values.square_().T).numpy()
        more = 1 + 2 * width * _UNIT
        norms *= more
        lost[:] = more * lost if measured else (0 if self._exact else _HALF_STEP) * norms
        return rounded

    def _decoded(self, raw: npt.NDArray[Any], scale: Floats) -> Floats:
        """Return rows as numbers, (b, width): of signs and whole numbers as they are stored, before their scale."""
        rows = self._buffer("rows", len(raw), self._queries.shape[1], np.float32)
        step = _tile_rows(rows.shape[1])
        for start in range(0, len(raw), step):
            part = slice(start, start + step)
            if self._as_stored:
                self._form.read_codes_into(raw[part], rows[part])
            else:
                self._read(raw[part], scale[part], rows[part])
        return rows


class Int8Product(Product):
    """PyTorch's product of whole numbers of eight bits, exact: of stored codes and queries of two such parts."""

    name = "int8"
    piece = 2**16  # the sum of twice as many would overflow

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        torch: Any = sys.modules["torch"]
        q, width = self._queries.shape
        pieces = [piece for pieces in self._modules for piece in pieces]
        parts, steps, sums = np.empty((2, q, width), np.int8), np.empty(q, np.float32), np.empty((len(pieces), q), "f4")
        for some in self._some_queries():
            steps[some], whole = _whole_queries(self._queries[some])
            high = (whole + 128) // 256
            parts[0, some], parts[1, some] = high, whole - 256 * high
            for number, piece in enumerate(pieces):
                sums[number, some] = whole[:, piece].sum(1)
        self._steps = torch.from_numpy(steps)[:, None]
        self._parts = torch.from_numpy(parts.reshape(2 * q, width))
        self._sums = torch.from_numpy(sums)[:, :, None]

    def _some_queries(self) -> Iterator[slice]:
        """Yield slices of queries whose whole numbers take little memory."""
        step = max(1, _TILE_BYTES // (8 * self._queries.shape[1]))
        return (slice(start, start + step) for start in range(0, len(self._queries), step))

    @override
    def _errors(self, part: slice) -> npt.NDArray[np.float64]:
        k, errors = len(range(*part.indices(self._queries.shape[1]))), np.empty((len(self._queries), 1))
        largest = 1 if self._form.name == "sign" else self._form.top
        units = (_SUM_UNITS + 8 + 2 * len(self._cut(part))) * _UNIT
        for some in self._some_queries():
            steps, whole = _whole_queries(self._queries[some])
            queries = self._queries[some, part].astype(np.float64)
            lost = np.abs(queries - steps[:, None] * whole[:, part]).sum(1)
            sums = np.abs(queries).sum(1) + steps * 256 * k  # of both parts
            errors[some, 0] = largest * (lost + units * sums)
        return errors

    @override
    def multiply(self, raw: npt.NDArray[Any], scale: Floats, out: Floats) -> Found:
        torch: Any = sys.modules["torch"]
        scales = torch.from_numpy(np.ascontiguousarray(scale))

        def work(part: slice) -> None:
            self._multiply(raw[part], scales[part], torch.from_numpy(out[:, :, part]))

        self._divide(work, len(raw))
        factors = scale.astype(np.float64)
        factors += np.where(factors < 2.0**-90, self._queries.shape[1] * 2.0**-100, 0)
        if self._form.name == "sign":
            factors[scale == 0] = 0
        else:
            ones = np.flatnonzero(scale == 1)  # of rows of zeros, among others
            factors[ones[~raw[ones].any(axis=1)]] = 0
        return Found(factors[:, None])

    def _multiply(self, raw: npt.NDArray[Any], scales: Any, out: Any) -> None:
        """Write scores of some stored rows (b, ·) into ``out`` (M, q, b)."""
        torch: Any = sys.modules["torch"]
        q, signs, sums = len(self._queries), self._form.name == "sign", iter(self._sums)
        for target, pieces in zip(out, self._modules, strict=True):
            for number, piece in enumerate(pieces):
                high, low = self._whole_products(raw, piece).split(q)
                part = torch.from_numpy(self._buffer("part", q, len(raw), np.float32))
                if piece.stop - piece.start <= _UNSHIFTED:  # the sum fits 32 bits
                    part.copy_(low.add_(high, alpha=256))
                else:
                    part.copy_(high).mul_(256).add_(low)
                total = next(sums)
                if signs:  # they are 2 b − 1 of bits b
                    part.mul_(2).sub_(total)
                target.copy_(part) if number == 0 else target.add_(part)
            target.mul_(self._steps).mul_(scales)

    def _whole_products(self, raw: npt.NDArray[Any], piece: slice) -> Any:
        """Return the products of both parts of the queries with rows, (2 q, b) int32."""
        torch: Any = sys.modules["torch"]
        count, few = len(self._parts), len(self._parts) <= _FEW and self._queries.shape[1] >= _WIDE
        shape = (len(raw), count) if few else (count, len(raw))
        total = torch.from_numpy(self._buffer("product", *shape, dtype=np.int32))
        for codes, columns in self._codes(raw, piece):
            first = columns.start == piece.start
            product = total if first else torch.from_numpy(self._buffer("further", *shape, dtype=np.int32))
            parts = self._parts[:, columns]
            if few:  # quicker this way round
                multiply_whole(codes, parts, product)
            else:
                multiply_whole(parts, codes, product)
            if not first:
                total.add_(product)
        return total.T if few else total

    def _codes(self, raw: npt.NDArray[Any], piece: slice) -> Iterator[tuple[Any, slice]]:
        """Yield some columns of rows as whole numbers, and which: of signs, as many as stay in cache while they are."""
        torch: Any = sys.modules["torch"]
        if self._form.name != "sign":
            yield torch.from_numpy(np.ascontiguousarray(raw))[:, piece], piece
            return
        step = max(_LEAST_UNPACKED, _UNPACKED_AT_ONCE // len(raw)) // 8 * 8
        for start in range(piece.start, piece.stop, step):
            columns = slice(start, min(piece.stop, start + step))
            before = start % 8
            packed = raw[:, start // 8 : -(-columns.stop // 8)]
            bits = np.unpackbits(packed, axis=1, count=before + columns.stop - start)
            yield torch.from_numpy(bits.view(np.int8))[:, before:], columns


def _whole_queries(queries: Floats) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return steps (q,), NaN for a query that is NaN, and whole numbers (q, width): a query is nearly their product."""
    largest = np.abs(queries).max(axis=1, initial=0).astype(np.float64)
    steps = np.where(largest == 0, 1 / _LEVELS, largest / _LEVELS)
    with np.errstate(invalid="ignore"):
        whole = np.rint(queries / steps[:, None])
    return steps, np.nan_to_num(whole).astype(np.int64)

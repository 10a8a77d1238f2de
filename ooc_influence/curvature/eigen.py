"""One formula for every curvature: F = D (⊕_b V_b diag(e_b) V_bᵀ + t_b (I − V_b V_bᵀ)) D, and damping.

D scales the columns (I unless a prior says otherwise), blocks b are ranges of columns, V_b has orthonormal columns and
t_b stands for every eigenvalue that is not kept. On scaled columns g' = D⁻¹g, with z = V_bᵀg', the damped inverse is

    D⁻¹ (V_b z/(e_b + λ_b) + (g' − V_b z)/(t_b + λ_b)),

for any λ at no further cost. Whole: one block, V square; by module: a block each; diagonal: V = I, without any matrix
product; low rank: t is the mean of the eigenvalues that are not kept; Gram matrix: t = 0.

λ_b = damping · tr(F_b)/d_b (relative) or λ = damping (absolute) is an argument of every product and never stored: what
is stored is the undamped spectrum. Each block says what its λ is relative to: its trace, and its dimension d_b. That is
the number of directions its rows can span, min(columns, rows), where the rank of F is bounded by the rows that it was
fitted on; the number of columns where it is not (a diagonal has full rank however few the rows).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, SingularFisherError
from ooc_influence.linalg import Floats, Matrix
from ooc_influence.options import DampingMode
from ooc_influence.parallel import cores
from ooc_influence.process import limit_blas
from ooc_influence.store import CHUNK_TARGET, create_array, find_array, map_chunk, read_array, read_part

DEFAULT_DAMPING = 0.1  # relative; near the best in the evaluation that accompanied the design
HELD_BYTES = 256 * 2**20  # of a block's eigenvectors: up to here they are kept in memory once they were read
_ROTATED_BYTES = 32 * 2**20  # of rotated rows held at a time by self-influence in float32
_PANEL = 256  # rows rotated in float64 at a time by each thread of self-influence
_FEW_ROWS = 16  # that are multiplied by slabs of V in one thread
_PART = 2**20  # numbers in a chunk of a long array
_CACHED_BYTES = 2**20  # of squared rows at a time where V = I: they stay in cache


def check_damping(damping: float, mode: DampingMode) -> None:
    """Check a damping.

    Raises
    ------
    InputError
        For a negative or non-finite one, or an unknown mode.
    """
    if mode not in ("relative", "absolute"):
        raise InputError(f"expected damping_mode 'relative' or 'absolute'; received {mode!r}")
    if not math.isfinite(damping) or damping < 0:
        raise InputError(f"expected damping >= 0; received {damping}")


def spectrum_floor(eigenvalues: Matrix) -> float:
    """Return the eigenvalue below which one is zero but for the rounding of sums in float32: ε₃₂ times their sum.

    F is summed with errors of about ε₃₂ √(F_ii F_jj), so no eigenvalue is off by much more than ε₃₂ tr(F); measured:
    0.17 of that, at most, for matrices with and without full rank, and spectra flat to falling as j⁻⁴.
    """
    return float(np.maximum(eigenvalues, 0).sum() * np.finfo(np.float32).eps)


def resolved(eigenvalues: Matrix) -> npt.NDArray[np.bool_]:
    """Return which eigenvalues are above :func:`spectrum_floor`."""
    return np.asarray(eigenvalues > spectrum_floor(eigenvalues))


class EigenVectors:
    """V of a block, (w, r) float64, on disk: kept in memory once it was read where it is small, else mapped in slabs.

    A slab is compared with its checksum when it is first read; from object storage it is read each time.

    Parameters
    ----------
    shape : (int, int)
        w columns of F, r eigenvectors.
    group, name : callable, str
        Returns the Zarr group; the array's name there. Its chunks are of whole rows.
    check : callable
        Called after every reading, to raise where the array was replaced meanwhile.
    """

    def __init__(self, shape: tuple[int, int], group: Callable[[], Any], name: str, check: Callable[[], None]) -> None:
        self.shape, self._group, self._name, self._check = shape, group, name, check
        self._whole: Matrix | None = None
        self._single: Floats | None = None
        self._checked: set[int] = set()  # chunks
        self._lock = threading.Lock()  # threads read it once

    @property
    def in_memory(self) -> bool:
        """Whether it is kept in memory at the moment."""
        return self._whole is not None

    def whole(self) -> Matrix:
        """Return all of it, which is kept."""
        with self._lock:
            if self._whole is None:
                self._whole = read_array(self._group(), self._name)
                self._check()
        return self._whole

    def single(self, scale: Matrix | None = None) -> Floats:
        """Return all of it in float32, rows divided by ``scale`` (w,), which is kept; it is read a slab at a time."""
        with self._lock:
            if self._single is None:
                single = np.empty(self.shape, np.float32)
                for rows, values in self._read():
                    single[rows] = values if scale is None else values / scale[rows, None]
                self._single = single
        return self._single

    @property
    def in_slabs(self) -> bool:
        """Whether it is too large to be kept, and not in memory."""
        return self._whole is None and 8 * self.shape[0] * self.shape[1] > HELD_BYTES

    def slabs(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield it by rows; at once where it is small or in memory already."""
        if self.in_slabs:
            yield from self._read()
        else:
            yield slice(0, self.shape[0]), self.whole()

    def _read(self) -> Iterator[tuple[slice, Matrix]]:
        array = find_array(self._group(), self._name)
        step = array.chunks[0]
        for number in range(-(-self.shape[0] // step)):
            rows = slice(number * step, min(self.shape[0], (number + 1) * step))
            mapped = map_chunk(array, number, check=number not in self._checked)
            if mapped is None:
                yield rows, read_part(array, rows)
            else:
                self._checked.add(number)
                yield rows, mapped[: rows.stop - rows.start]
        self._check()


def vectors_name(kind: str, number: int) -> str:
    """Return the name of the array that holds the eigenvectors of a block."""
    return f"eigenvectors-{number:05d}" if kind == "module" else "eigenvectors"


def write_long(group: Any, name: str, values: Any) -> None:
    """Write a long array of numbers, (n,), with checksums."""
    array = create_array(group, name, values.shape, (min(max(1, len(values)), _PART),), values.dtype, codec="crc32c")
    for start in range(0, len(values), _PART):
        array[start : start + _PART] = values[start : start + _PART]


def row_slabs(vectors: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """Yield eigenvectors (w, r) by the rows of a chunk on disk: copies into its order are of a chunk."""
    step = slab_rows(len(vectors), vectors.shape[1])
    for start in range(0, len(vectors), step):
        rows = slice(start, min(len(vectors), start + step))
        yield rows, vectors[rows]


def write_vectors(group: Any, name: str, shape: tuple[int, ...], slabs: Iterable[tuple[slice, Matrix]]) -> None:
    """Write eigenvectors (w, r), given by rows, in chunks of whole rows."""
    array = create_array(group, name, shape, (slab_rows(shape[0], shape[1]), shape[1]), "float64", codec="crc32c")
    for rows, values in slabs:
        array[rows] = values


class BlockShape(NamedTuple):
    """Sizes of a block, from which follows what its products hold in memory.

    Attributes
    ----------
    columns : int
        Columns of F, w.
    rank : int or None
        Eigenvectors, r; None where they are the columns themselves.
    keeps : bool
        Whether self-influence keeps V in memory however large it is.
    """

    columns: int
    rank: int | None
    keeps: bool = True

    @property
    def complete(self) -> bool:
        """Whether all eigenvectors are kept."""
        return self.rank is None or self.rank == self.columns

    def vectors_bytes(self, *, keep: bool = False) -> int:
        """Return the bytes of V in float64: of all of it, or of the slabs in which it is read."""
        whole = 8 * self.columns * (self.rank or 0)
        return whole if keep or whole <= HELD_BYTES else 3 * 8 * slab_rows(*self[:2]) * (self.rank or 0)


def slab_rows(columns: int, rank: int | None) -> int:
    """Return the rows of eigenvectors (w, r) in a chunk on disk: what is written, and read, at a time."""
    return max(1, min(columns, CHUNK_TARGET // (8 * max(1, rank or 0))))


def precondition_bytes(shapes: Sequence[BlockShape], queries: int, values: int, *, scaled: bool = False) -> int:
    """Return what :meth:`BlockSpectrum.precondition` holds for a number of rows and of λ, its result included."""
    d = sum(shape.columns for shape in shapes)
    vectors = sum(shape.vectors_bytes() for shape in shapes)
    turning = max(
        2 * shape.columns + queries * shape.columns * scaled if shape.rank is None
        else queries * (shape.columns * (1 + scaled) + 2 * shape.rank)
        for shape in shapes
    )  # fmt: skip
    return vectors + 8 * (d * queries * values + turning)


def self_influence_bytes(shapes: Sequence[BlockShape], values: int) -> int:
    """Return what :meth:`BlockSpectrum.self_influence` holds for a number of λ whatever the rows, its result apart."""
    kept, turning = 0, 0
    for shape in shapes:
        w, r = shape.columns, shape.rank or 0
        if shape.rank is None:
            turning = max(turning, 4 * w * (_cached_rows(w) + 3 * values))
        elif shape.complete:
            kept += 4 * w * r
            turning = max(turning, 4 * w * (_rotated_rows(w) + values) + 2 * CHUNK_TARGET)
        else:
            kept += shape.vectors_bytes(keep=shape.keeps)
            rows = min(_PANEL * cores(), _rotated_rows(w))
            turning = max(turning, 8 * rows * (2 * w + 2 * r + values + 2) + 8 * values * r + 3 * CHUNK_TARGET)
    return kept + turning


def _rotated_rows(columns: int) -> int:
    return max(64, _ROTATED_BYTES // (4 * max(1, columns)))


def _cached_rows(columns: int) -> int:
    return max(1, _CACHED_BYTES // (4 * max(1, columns)))


class EigenBlock:
    """V diag(e) Vᵀ + t (I − V Vᵀ), on some columns of F.

    Attributes
    ----------
    columns : slice
        Which.
    eigenvalues : (r,) float64
        e, as far as they are known.
    vectors : EigenVectors or None
        V; None where it is I.
    rest : float
        t, what stands for each eigenvalue that is not kept.
    unknown : int
        Eigenvalues that are not kept and may be positive.
    trace : float
        Of the block; by default the sum of its eigenvalues, those that are not kept included.
    dimension : int
        d_b, by which the trace is divided for a relative λ; by default the columns.
    shape : BlockShape
        The sizes.
    """

    def __init__(
        self,
        columns: slice,
        eigenvalues: Matrix,
        vectors: EigenVectors | None,
        rest: float = 0.0,
        unknown: int = 0,
        *,
        trace: float | None = None,
        dimension: int | None = None,
        keeps: bool = True,
    ) -> None:
        self.columns, self.eigenvalues, self.vectors = columns, eigenvalues, vectors
        self.rest, self.unknown = rest, unknown
        rank = None if vectors is None else len(eigenvalues)
        self.shape = BlockShape(columns.stop - columns.start, rank, keeps)
        width = self.shape.columns
        self.trace = float(eigenvalues.sum() + rest * (width - len(eigenvalues))) if trace is None else trace
        self.dimension = width if dimension is None else dimension

    def check_invertible(self) -> None:
        """Check that the block has an inverse without damping.

        Raises
        ------
        SingularFisherError
            If not.
        """
        width = self.shape.columns
        # far above rounding, which an inverse magnifies
        safe = float(self.eigenvalues.max(initial=0.0) * width * np.finfo(np.float32).eps)
        rank = int((self.eigenvalues > safe).sum())
        if rank < width:
            raise SingularFisherError(
                f"expected damping > 0 for a Fisher matrix of numerical rank {rank} < {width}; received 0: "
                f"use the default, {DEFAULT_DAMPING}"
            )

    def dimensions(self, value: float) -> tuple[float, float]:
        """Return a lower and an upper bound of Σ e/(e + λ).

        Eigenvalues that are not known contribute least if they are as large as possible, and most if they are equal.
        """
        positive = self.eigenvalues[self.eigenvalues > 0]
        exact = float((positive / (positive + value)).sum())
        tail = self.rest * (self.shape.columns - len(self.eigenvalues))
        if tail <= 0:
            return exact, exact
        most = tail / (tail / self.unknown + value) if self.unknown > 0 else 0.0
        return exact + tail / (float(self.eigenvalues[-1]) + value), exact + most

    def precondition(
        self, gradients: npt.NDArray[Any], lambdas: Matrix, out: Matrix, inside: Matrix | None = None
    ) -> None:
        """Write (· + λI)⁻¹ g of rows (q, w) for each λ, (L,), into ``out`` (L, q, w).

        What :meth:`inside` returns of the rows is added to ``inside`` (q,).
        """
        if self.vectors is None:
            if inside is not None:
                inside += self.inside(gradients)
            for part, value in zip(out, lambdas, strict=True):
                np.divide(gradients, self.eigenvalues + value, out=part)
            return
        gradients = np.asarray(gradients, np.float64)
        with self._few_threads(len(gradients)):
            rotated = self._rotate(gradients)
            scaled = np.empty_like(rotated)
            if inside is not None:
                inside += self._squares_inside(gradients, rotated, scaled)
            for rows, vectors in self.vectors.slabs():
                for all_columns, value in zip(out, lambdas, strict=True):
                    part, damped = all_columns[:, rows], self.eigenvalues + value
                    if rows.start == 0 or len(lambdas) > 1:
                        kept = 1 if self.shape.complete else self.eigenvalues - self.rest
                        np.multiply(rotated, kept / damped, out=scaled)
                    np.matmul(scaled, vectors.T, out=part)
                    if not self.shape.complete:
                        np.subtract(gradients[:, rows], part, out=part)
                        part /= self.rest + value

    def _few_threads(self, rows: int) -> AbstractContextManager[None]:
        """Return a context for products of ``rows`` rows with V: few wait for memory, and threads for each other."""
        assert self.vectors is not None
        return limit_blas(1) if rows <= _FEW_ROWS and self.vectors.in_slabs else nullcontext()

    def _rotate(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Return Vᵀg of some rows, (b, r) float64: most of a norm may be within the span, and the rest a difference."""
        assert self.vectors is not None
        rotated: Matrix | None = None
        for rows, vectors in self.vectors.slabs():
            product = np.asarray(gradients[:, rows], np.float64) @ vectors
            rotated = product if rotated is None else np.add(rotated, product, out=rotated)
        assert rotated is not None  # a block has columns
        return rotated

    def add_norms(self, gradients: Floats, lambdas: Matrix, scale: Matrix | None, out: Floats) -> None:
        """Add gᵀ (· + λI)⁻¹ g of rows (b, w), divided by ``scale`` (w,), to ``out`` (L, b)."""
        weights = 1 / (self.eigenvalues[:, None] + lambdas)
        if self.vectors is None:
            weights = weights if scale is None else weights / np.square(scale)[:, None]
            self._add_squares(gradients, None, weights, _cached_rows(self.shape.columns), out)
        elif self.shape.complete:
            vectors = self.vectors.single(scale)
            self._add_squares(gradients, vectors, weights, _rotated_rows(self.shape.columns), out)
        else:
            self._add_low_rank_norms(gradients, weights, lambdas, scale, out)

    @staticmethod
    def _add_squares(gradients: Floats, vectors: Floats | None, weights: Matrix, step: int, out: Floats) -> None:
        """Add z² @ weights of rows, z = gradients @ vectors, in float32; without vectors, z = gradients."""
        weights, step = weights.astype(np.float32), max(1, min(step, len(gradients)))
        buffer = np.empty((step, len(weights)), np.float32)
        for start in range(0, len(gradients), step):
            part = gradients[start : start + step]
            squares = buffer[: len(part)]
            np.square(part if vectors is None else np.matmul(part, vectors, out=squares), out=squares)
            out[:, start : start + step] += (squares @ weights).T

    def _add_low_rank_norms(
        self, gradients: Floats, weights: Matrix, lambdas: Matrix, scale: Matrix | None, out: Floats
    ) -> None:
        assert self.vectors is not None
        if self.shape.keeps:
            self.vectors.whole()
        for start in range(0, len(gradients), _PANEL):
            part = gradients[start : start + _PANEL].astype(np.float64)
            if scale is not None:
                part /= scale
            squares = np.square(self._rotate(part))
            outside = np.maximum(np.einsum("ij,ij->i", part, part) - squares.sum(1), 0)
            out[:, start : start + _PANEL] += ((squares @ weights).T + outside / (self.rest + lambdas[:, None])).astype(
                np.float32
            )

    def inside(self, gradients: Matrix) -> Matrix:
        """Return the squared norm of rows (b, w) within the span of eigenvectors above rounding, (b,)."""
        if self.vectors is None:  # sums of squares: however small, no rounding of others
            return _squares(gradients, self.eigenvalues > 0)
        if self.shape.complete and resolved(self.eigenvalues).all():
            return _squares(gradients)
        gradients = np.asarray(gradients, np.float64)
        with self._few_threads(len(gradients)):
            rotated = self._rotate(gradients)
        return self._squares_inside(gradients, rotated, rotated)

    def _squares_inside(self, gradients: Matrix, rotated: Matrix, out: Matrix) -> Matrix:
        """Return :meth:`inside` of rows whose rotation is known, whose squares are written into ``out``."""
        span = resolved(self.eigenvalues)
        if self.shape.complete and span.all():
            return _squares(gradients)
        return np.asarray(np.square(rotated, out=out).sum(1, where=span))

    def matrix(self) -> Matrix:
        """Return the block itself, (w, w)."""
        if self.vectors is None:
            return np.diag(self.eigenvalues)
        vectors = self.vectors.whole()
        square = (vectors * (self.eigenvalues - self.rest)) @ vectors.T
        square[np.diag_indices_from(square)] += self.rest
        return square


def _squares(rows: npt.NDArray[Any], columns: npt.NDArray[np.bool_] | None = None) -> Matrix:
    """Return the squared norm of rows (b, w), or that of some columns, (b,), without a matrix of squares."""
    rows = np.asarray(rows, np.float64)
    if columns is None:
        return np.asarray(np.einsum("bw,bw->b", rows, rows))
    return np.asarray(np.einsum("bw,bw,w->b", rows, rows, columns.astype(np.float64)))


def _share_outside(inside: Matrix, total: Matrix) -> Matrix:
    return np.where(total > 0, np.clip(1 - inside / np.where(total > 0, total, 1), 0, 1), 0.0)


class BlockSpectrum:
    """F by the module's formula: products with its damped inverse.

    Parameters
    ----------
    blocks : sequence of EigenBlock
        They cover the columns, in order.
    column_scale : (d,) float64, optional
        D; by default 1.

    Attributes
    ----------
    blocks, column_scale
        As given.
    eigenvalues : (r,) float64
        Those of all blocks, one block after the other.
    d : int
        Side of F: the stored numbers a row.
    """

    def __init__(self, blocks: Sequence[EigenBlock], column_scale: Matrix | None = None) -> None:
        self.blocks, self.column_scale = tuple(blocks), column_scale
        self.eigenvalues: Matrix = np.concatenate([block.eigenvalues for block in self.blocks])
        self.d = self.blocks[-1].columns.stop

    @property
    def is_diagonal(self) -> bool:
        """Whether F is: V = I in every block."""
        return all(block.vectors is None for block in self.blocks)

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, r), one eigenvector a column in the order of ``eigenvalues`` (read on first use)."""
        if len(self.blocks) == 1 and self.blocks[0].vectors is not None:
            return self.blocks[0].vectors.whole()
        matrix, first = np.zeros((self.d, len(self.eigenvalues))), 0
        for block in self.blocks:
            columns = slice(first, first + len(block.eigenvalues))
            vectors = np.eye(block.shape.columns) if block.vectors is None else block.vectors.whole()
            matrix[block.columns, columns] = vectors
            first = columns.stop
        return matrix

    @property
    def is_everywhere(self) -> bool:
        """Whether F has a part in every direction, whatever the rows that it was fitted on."""
        return False

    def precondition(self, gradients: npt.NDArray[Any], lambdas: npt.ArrayLike, shares: Matrix | None = None) -> Matrix:
        """Return the damped inverse of F times each row.

        Parameters
        ----------
        gradients : (q, d)
            Rows.
        lambdas : (L,) or (L, B)
            λ for all blocks, or for each of them: what :meth:`Curvature.lambdas` returns.
        shares : (q,) float64, optional
            Where to write :meth:`outside_share` of the rows, which takes no further pass over the eigenvectors here.

        Returns
        -------
        (L, q, d) float64
            (F + λI)⁻¹ g; where columns are scaled, D⁻¹(D⁻¹FD⁻¹ + λI)⁻¹D⁻¹ g.
        """
        values = self._of_blocks(lambdas)
        result = np.empty((len(values), *gradients.shape))
        inside, total = None if shares is None else np.zeros(len(gradients)), np.zeros(len(gradients))
        for block, block_lambdas in zip(self.blocks, values.T, strict=True):
            part, out = self._scaled(gradients, block), result[:, :, block.columns]
            block.precondition(part, block_lambdas, out, inside)
            if self.column_scale is not None:
                out /= self.column_scale[block.columns]
            if shares is not None:
                total += _squares(part)
        if shares is not None and inside is not None:
            shares[...] = 0 if self.is_everywhere else _share_outside(inside, total)
        return result

    def block_lambdas(self, damping: float, mode: DampingMode = "relative") -> Matrix:
        """Return λ of each block, (B,): damping · tr(F_b)/d_b, or ``damping`` itself where the mode is absolute.

        Raises
        ------
        InputError
            For a negative or non-finite damping or an unknown mode.
        SingularFisherError
            If F is zero, or λ is zero and F has no inverse.
        """
        check_damping(damping, mode)
        traces = np.array([block.trace for block in self.blocks])
        if not traces.any():
            raise SingularFisherError(
                "expected a Fisher matrix that is not zero; received one of rows without any gradient: check the loss "
                "and the tapped layers"
            )
        values = np.full(len(self.blocks), float(damping))
        if mode == "relative":
            means = traces / [block.dimension for block in self.blocks]
            values *= np.where(means > 0, means, means.mean())  # no row has anything in a block of zeros: any λ serves
        for block in self.blocks if damping == 0 else ():
            block.check_invertible()
        return values

    def mean_lambda(self, lambdas: Matrix) -> float:
        """Return the mean over columns of λ, given for each block (B,): one number that stands for all."""
        widths = np.array([block.shape.columns for block in self.blocks])
        return float(lambdas[0]) if np.ptp(lambdas) == 0 else float(lambdas @ widths / widths.sum())

    def working_bytes(self, queries: int, values: int) -> int:
        """Return what :meth:`precondition` holds for a number of rows and of λ, its result included, in bytes."""
        shapes = [block.shape for block in self.blocks]
        return precondition_bytes(shapes, queries, values, scaled=self.column_scale is not None)

    def self_influence(self, gradients: Floats, lambdas: npt.ArrayLike) -> Floats:
        """Return gᵀ times :meth:`precondition` of each row g, (L, b) float32: one matrix product a block for all λ."""
        values = self._of_blocks(lambdas)
        result = np.zeros((len(values), len(gradients)), np.float32)
        for block, block_lambdas in zip(self.blocks, values.T, strict=True):
            scale = None if self.column_scale is None else self.column_scale[block.columns]
            block.add_norms(gradients[:, block.columns], block_lambdas, scale, result)
        return result

    def self_working_bytes(self, values: int) -> int:
        """Return what :meth:`self_influence` holds for a number of λ whatever the rows, its result apart, in bytes."""
        return self_influence_bytes([block.shape for block in self.blocks], values)

    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Return the share of each row's squared norm outside the span of F's eigenvectors, (q,); 0 for a zero row."""
        if self.is_everywhere:
            return np.zeros(len(gradients))
        inside, total = np.zeros(len(gradients)), np.zeros(len(gradients))
        for block in self.blocks:  # in the same order of sums as precondition()
            part = self._scaled(gradients, block)
            inside += block.inside(part)
            total += _squares(part)
        return _share_outside(inside, total)

    def _scaled(self, gradients: npt.NDArray[Any], block: EigenBlock) -> npt.NDArray[Any]:
        """Return a block's columns of rows, divided by its part of :attr:`column_scale`."""
        part = gradients[:, block.columns]
        return part if self.column_scale is None else part / self.column_scale[block.columns]

    def effective_dimension(self, value: float | Matrix) -> float:
        """Return d(λ) = Σ e/(e + λ), the number of directions the damping leaves, at λ or the λ of each block, (B,).

        Where eigenvalues are not known, this is an upper bound.
        """
        return sum(block.dimensions(damping)[1] for block, damping in self._with_lambda(value))

    def least_dimension(self, value: float | Matrix) -> float:
        """Return a lower bound of d(λ): itself, where all eigenvalues are known."""
        return sum(block.dimensions(damping)[0] for block, damping in self._with_lambda(value))

    def _with_lambda(self, value: float | Matrix) -> Iterator[tuple[EigenBlock, float]]:
        return zip(self.blocks, np.broadcast_to(value, len(self.blocks)).tolist(), strict=True)

    def _of_blocks(self, lambdas: npt.ArrayLike) -> Matrix:
        """Return λ for each value and block, (L, B)."""
        values = np.asarray(lambdas, np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] not in (1, len(self.blocks)):
            raise InputError(
                f"expected λ as (L,) or (L, {len(self.blocks)}) numbers; received an array of shape {values.shape}"
            )
        return np.broadcast_to(values, (len(values), len(self.blocks)))

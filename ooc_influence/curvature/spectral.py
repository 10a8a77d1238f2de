"""F = V diag(e) Vᵀ by its eigendecomposition: whole, or a block for each module with a spectrum and a λ of its own.

In F's eigenbasis everything is a scaled dot product: with z = Vᵀg, a score is Σ_j z_qj z_ij / (e_j + λ), for any λ
at no further cost. The group holds, all float64, the undamped sums Σ w g gᵀ as tiles of triangles (``sum-00000``, …),
their spectra one after the other (``eigenvalues``) and the eigenvectors of each block as columns (``eigenvectors``, or
``eigenvectors-00000``, … by module). Format 1 kept F itself (``fisher``) instead of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.curvature.curvature import Curvature, Matrix, dimension, share_outside
from ooc_influence.curvature.damping import damping_value, resolved
from ooc_influence.curvature.rows import Range
from ooc_influence.curvature.sums import Sums, add_written_sum, empty_sums, write_sum
from ooc_influence.linalg import symmetric_eigen
from ooc_influence.linalg.accumulate import mirror
from ooc_influence.options import DampingMode
from ooc_influence.store import (
    CHUNK_TARGET,
    array_store,
    create_array,
    find_array,
    open_group,
    read_part,
    square_chunks,
)

_SELF_BYTES = 32 * 2**20  # of rotated rows held at a time by self-influence
_SLAB_BYTES = 2 * CHUNK_TARGET  # a chunk of the eigenvectors and its copy


class BlockDamping(float):
    """A relative λ that is another one in each block: damping · tr(F_b)/d_b. As a number, that of the whole.

    Attributes
    ----------
    blocks : tuple of float
        λ of each block.
    """

    blocks: tuple[float, ...]

    def __new__(cls, value: float, blocks: Sequence[float]) -> BlockDamping:
        """Make one of the whole's λ and the blocks'."""
        found = super().__new__(cls, value)
        found.blocks = tuple(blocks)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockDamping, (float(self), self.blocks)


class SummedCurvature(Curvature):
    """A curvature that keeps the undamped sums F is made of.

    Attributes
    ----------
    blocks : tuple of (first, last)
        Ranges of columns, each with a square of F of its own.
    """

    blocks: tuple[Range, ...]

    @property
    def keeps_sums(self) -> bool:
        """Whether they are there."""
        return True

    def _load(self) -> None:
        super()._load()
        self.blocks = tuple((int(a), int(b)) for a, b in self._attrs.get("ranges") or [(0, self.d)])

    def sums(self) -> Sums:
        """Return the undamped sums that F is made of, read from disk."""
        total = empty_sums(self.blocks, self.kind == "diagonal")
        self.add_sums_to(total)
        return total

    def add_sums_to(self, total: Sums) -> None:
        """Add :meth:`sums` to others, in place."""
        for number, square in enumerate(total.squares):
            add_written_sum(self.path, number, square)
        total.live += self.rows
        total.clipped += int(self._attrs["clipped"])
        self.check_fit()

    def fisher(self) -> Matrix:
        """Return F, (d, d), read from disk; zero outside its blocks."""
        if self._attrs["format"] == 1:
            found: Matrix = self._read("fisher")
            self.check_fit()
            return found
        whole = np.zeros((self.d, self.d))
        for (first, last), square in zip(self.blocks, self.sums().squares, strict=True):
            mirror(square)
            whole[first:last, first:last] = square
        whole /= self.rows
        return whole


class SpectralCurvature(SummedCurvature, kinds=("whole", "module")):
    """A curvature of which all eigenvectors are kept."""

    def _load(self) -> None:
        super()._load()
        self._vectors: dict[int, Matrix] = {}
        self._rotations: dict[int, npt.NDArray[np.float32]] = {}

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, d), one eigenvector a column in the order of ``eigenvalues`` (read on first use)."""
        if len(self.blocks) == 1:
            return self._block_vectors(0)
        whole = np.zeros((self.d, self.d))
        for number, (first, last) in enumerate(self.blocks):
            whole[first:last, first:last] = self._block_vectors(number)
        return whole

    def _block_vectors(self, number: int) -> Matrix:
        if number not in self._vectors:
            self._vectors[number] = self._read(vectors_name(self.kind, number))
            self.check_fit()
        return self._vectors[number]

    def _rotation(self, number: int) -> npt.NDArray[np.float32]:
        """Return V of a block in float32, read a slab at a time."""
        if number not in self._rotations:
            group = open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r")
            array = find_array(group, vectors_name(self.kind, number))
            found = np.empty(array.shape, np.float32)
            for start in range(0, len(found), array.chunks[0]):
                rows = slice(start, start + array.chunks[0])
                found[rows] = read_part(array, rows)
            self._rotations[number] = found
            self.check_fit()
        return self._rotations[number]

    def damping_value(self, damping: float | None = None, mode: DampingMode = "relative") -> float:
        """Return λ for a damping, with that of each block where it is relative and there are several."""
        value = super().damping_value(damping, mode)
        if len(self.blocks) == 1 or mode == "absolute" or value == 0:
            return value
        factor, values = self._factor(damping, mode), []
        for first, last in self.blocks:
            spectrum = self.eigenvalues[first:last]
            trace = float(spectrum.sum())
            # no row has anything in a block of zeros: any λ serves
            values.append(damping_value(spectrum, last - first, trace, factor, mode) if trace > 0 else value)
        return BlockDamping(value, values)

    def effective_dimension(self, value: float) -> float:
        """Return d(λ) = Σ e/(e + λ), over all blocks."""
        lambdas = self.lambdas(value)
        return sum(dimension(self.eigenvalues[a:b], own) for (a, b), own in zip(self.blocks, lambdas, strict=True))

    @override
    def lambdas(self, value: float) -> tuple[float, ...]:
        return value.blocks if isinstance(value, BlockDamping) else (float(value),) * len(self.blocks)

    def _damped(self, values: Sequence[float], number: int) -> Matrix:
        """Return e + λ of a block for each λ, (L, k_b)."""
        first, last = self.blocks[number]
        own = np.array([self.lambdas(value)[number] for value in values])
        return np.asarray(self.eigenvalues[first:last] + own[:, None])

    @override
    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """One rotation for all λ."""
        result = np.empty((len(values), *gradients.shape))
        for number, (first, last) in enumerate(self.blocks):
            vectors = self._block_vectors(number)
            rotated = np.asarray(gradients[:, first:last], np.float64) @ vectors
            damped = np.empty_like(rotated)
            for at, scale in enumerate(self._damped(values, number)):
                np.divide(rotated, scale, out=damped)
                np.matmul(damped, vectors.T, out=result[at][:, first:last])
        return result

    @override
    def working_bytes(self, queries: int, values: int) -> int:
        return working_bytes(self.d, queries, values, squares=self._squares)

    @override
    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """One GEMM for all λ."""
        result = np.zeros((len(values), len(gradients)), np.float32)
        step = self_rows(self.d)
        for number, (first, last) in enumerate(self.blocks):
            weights = (1 / self._damped(values, number).T).astype(np.float32)
            turned = np.empty((min(step, len(gradients)), last - first), np.float32)
            for start in range(0, len(gradients), step):
                part = gradients[start : start + step, first:last]
                squares = np.matmul(part, self._rotation(number), out=turned[: len(part)])
                np.square(squares, out=squares)
                result[:, start : start + step] += (squares @ weights).T
        return result

    @property
    def _squares(self) -> int:
        return sum((last - first) ** 2 for first, last in self.blocks)

    @override
    def self_working_bytes(self, values: int) -> int:
        return self_bytes(self.d, values, squares=self._squares)

    @override
    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        whole = np.asarray(gradients, np.float64)
        inside = np.zeros(len(whole))
        for number, (first, last) in enumerate(self.blocks):
            span = resolved(self.eigenvalues[first:last])
            if span.all():  # then nothing is outside
                inside += np.square(whole[:, first:last]).sum(1)
                continue
            inside += np.square(whole[:, first:last] @ self._block_vectors(number)[:, span]).sum(1)
        return share_outside(inside, whole)


def working_bytes(d: int, queries: int, values: int, *, squares: int | None = None) -> int:
    """Return what preconditioning by a spectrum of ``d`` columns holds; ``squares`` is Σ d_b², default d²."""
    return 8 * (d * d if squares is None else squares) + 8 * d * queries * (3 + values)


def self_bytes(d: int, values: int, *, squares: int | None = None) -> int:
    """Return what self-influence by a spectrum of ``d`` columns holds, as :func:`working_bytes` does."""
    return 4 * (d * d if squares is None else squares) + 4 * (self_rows(d) + values) * d + _SLAB_BYTES


def self_rows(d: int) -> int:
    """Return the rotated rows that self-influence holds at a time."""
    return max(64, _SELF_BYTES // (4 * max(1, d)))


def vectors_name(kind: str, number: int) -> str:
    """Return the name of the array that holds the eigenvectors of a block."""
    return "eigenvectors" if kind == "whole" else f"eigenvectors-{number:05d}"


def write_spectra(group: Any, kind: str, total: Sums) -> None:
    """Write sums and their spectra into a group; the sums, upper triangles, are used up."""
    spectra = []
    for number in range(len(total.squares)):
        square = total.squares[number]
        total.squares[number] = np.empty((0, 0))
        write_sum(group, number, square)
        mirror(square)
        square /= total.live
        values, vectors = symmetric_eigen(square)
        spectra.append(values)
        _write_square(group, vectors_name(kind, number), vectors)
    whole = np.concatenate(spectra)
    create_array(group, "eigenvalues", whole.shape, whole.shape, "float64", check=True)[...] = whole


def _write_square(group: Any, name: str, matrix: Matrix) -> None:
    chunks = square_chunks(len(matrix), 8)
    target = create_array(group, name, matrix.shape, chunks, "float64", check=True)
    for start in range(0, len(matrix), chunks[0]):
        target[start : start + chunks[0]] = matrix[start : start + chunks[0]]


_TILE_BYTES = 2**20  # of squared rows at a time: they stay in cache


class DiagonalCurvature(SummedCurvature, kinds=("diagonal",)):
    """A curvature of columns that have nothing to do with each other; its eigenvectors are the columns."""

    def fisher(self) -> Matrix:
        """Return F, (d, d)."""
        return np.diag(self.eigenvalues)

    @override
    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        result = np.empty((len(values), *gradients.shape))
        for out, value in zip(result, values, strict=True):
            np.divide(gradients, self.eigenvalues + value, out=out)
        return result

    @override
    def working_bytes(self, queries: int, values: int) -> int:
        return 8 * self.d * (queries * values + 2)

    @override
    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        weights = (1 / (self.eigenvalues[:, None] + np.asarray(values))).astype(np.float32)
        result = np.empty((len(values), len(gradients)), np.float32)
        step = _rows(self.d)
        squares = np.empty((min(step, len(gradients)), self.d), np.float32)
        for start in range(0, len(gradients), step):
            part = gradients[start : start + step]
            np.square(part, out=squares[: len(part)])
            result[:, start : start + step] = (squares[: len(part)] @ weights).T
        return result

    @override
    def self_working_bytes(self, values: int) -> int:
        return 4 * self.d * (_rows(self.d) + 3 * values)

    @override
    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        whole = np.asarray(gradients, np.float64)
        span = resolved(self.eigenvalues)
        return share_outside(np.square(whole[:, span]).sum(1), whole)


def _rows(d: int) -> int:
    return max(1, _TILE_BYTES // (4 * max(1, d)))


def write_diagonal(group: Any, total: Sums) -> None:
    """Write sums and their spectrum into a group."""
    (square,) = total.squares
    write_sum(group, 0, square)
    create_array(group, "eigenvalues", square.shape, square.shape, "float64", check=True)[...] = square / total.live

"""What a sketch leaves out of each row, in numbers that bound the row's scores.

A sketch holds numbers z of a row g: nearly Mᵀg, of a basis M (k, r) such that V = D M has orthonormal columns; D is the
whitening of a Kronecker basis, or one. For a query q let c be the numbers that z is multiplied by, nearly Vᵀ D q, and
p = D q − V c what they leave out of it. Then

    qᵀg − cᵀz = pᵀ (D⁻¹g − V z) + (Vᵀp)ᵀ z + cᵀ (Vᵀ D⁻¹g − z)

whatever z and c are, so Cauchy-Schwarz gives |qᵀg − cᵀz| ≤ Σ_t E[q, t] F[g, t]. One F is 1, for what underflows; the
others are kept of each row:

- the residual ‖D⁻¹g − V z‖,
- the rounding ‖S⁻¹ (Mᵀg − z)‖, S being the sketch's column scales,
- the size, the larger of ‖D⁻¹g‖ and ‖z‖, by which roundings of sums are counted.

Each is rounded up to 13 bits of fraction; the three share a whole number of 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg import Floats, Matrix
from ooc_influence.store import Encoding, row_norms

RESIDUALS = "residual_norms"  # a sketch's column
_UNIT = 2.0**-24  # half a step of float32, relative
_SCORE_UNITS = 2 * 640  # roundings of an exact score, twice over (influence/products.py)
_SPARE_UNITS = 16  # of a basis that is turned or scaled again, of columns that are divided
_SUMMED = 512  # columns that the coordinates of a sketch are summed over at a time: their error is known well then
_COLUMNS = 2048  # taken at a time
_SAFETY = 1.0001  # for norms that are summed in float32
_UNDERFLOW = 2.0**-110  # what numbers too small for float32 take from a sum, for each column
_LEAST = 2.0**-120  # the same, where queries are not scaled
_DROPPED_BITS = 10  # of a float32's fraction
_BITS = 31 - _DROPPED_BITS


def pack_norms(norms: Matrix) -> npt.NDArray[np.int64]:
    """Return three numbers a row, (b, 3), none negative, as one, (b,): each rounded up."""
    with np.errstate(over="ignore"):
        single = norms.astype(np.float32)
    single = np.where(single < norms, np.nextafter(single, np.float32(np.inf)), single)
    single[np.isnan(norms)] = np.inf
    bits = (single.view(np.uint32).astype(np.int64) + (1 << _DROPPED_BITS) - 1) >> _DROPPED_BITS
    return np.asarray((bits[:, 0] << 2 * _BITS) | (bits[:, 1] << _BITS) | bits[:, 2])


def unpack_norms(packed: npt.NDArray[np.int64]) -> Floats:
    """Return what :func:`pack_norms` packed, (3, b) float32."""
    bits = np.empty((3, len(packed)), np.uint32)
    for row, shift in zip(bits, (2 * _BITS, _BITS, 0), strict=True):
        np.copyto(row, (packed >> shift) & ((1 << _BITS) - 1), casting="unsafe")
    return np.asarray(np.left_shift(bits, _DROPPED_BITS, out=bits).view(np.float32))


def coordinates(rows: Floats, basis: Floats, out: Floats) -> Floats:
    """Write rows (b, k) times a basis (k, r) to ``out`` (b, r), :data:`_SUMMED` columns at a time."""
    np.matmul(rows[:, :_SUMMED], basis[:_SUMMED], out=out)
    for first in range(_SUMMED, rows.shape[1], _SUMMED):
        out += rows[:, first : first + _SUMMED] @ basis[first : first + _SUMMED]
    return out


@dataclass(frozen=True, eq=False)
class Residuals:
    """Measures rows while they are written.

    Attributes
    ----------
    encoding : Encoding
        Of the sketch.
    column_scale : (r,) float32 or None
        Of the sketch.
    whitening : (k,) float64 or None
        D; None for ones.
    """

    encoding: Encoding
    column_scale: Floats | None
    whitening: Matrix | None

    def of_rows(self, rows: Floats, basis: Floats, found: Floats) -> npt.NDArray[np.int64]:
        """Return the norms of rows (b, k), packed, whose :func:`coordinates` in M = ``basis`` were ``found`` (b, r)."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            stored = self._stored(found)
            k, r = basis.shape
            left, whole = np.zeros(len(rows)), np.zeros(len(rows))
            for first in range(0, k, _COLUMNS):
                part = slice(first, first + _COLUMNS)
                columns, kept = rows[:, part], stored @ basis[part].T
                if self.whitening is not None:
                    scale = self.whitening[part].astype(np.float32)
                    columns = columns / scale
                    kept *= scale
                whole += np.square(row_norms(columns))
                left += np.square(row_norms(np.subtract(columns, kept, out=kept)))
            size = _norms(stored)
            rounding = found.astype(np.float64) - stored
            if self.column_scale is not None:
                rounding /= self.column_scale
            largest = 1.0 if self.whitening is None else 1 + float(self.whitening.max())
            lost = np.where(whole > 0, _UNDERFLOW * np.sqrt(k) * largest, 0)
            sums = (r + _SPARE_UNITS) * _UNIT * np.sqrt(r)
            norms = [np.sqrt(left) + sums * size, _norms(rounding), np.maximum(np.sqrt(whole), size)]
            return pack_norms(_SAFETY * np.stack(norms, axis=1) + lost[:, None])

    def _stored(self, found: Floats) -> Floats:
        """Return what is read of coordinates once they are stored."""
        raw, scale = np.empty((len(found), self.encoding.columns), self.encoding.dtype), np.empty(len(found), "f4")
        self.encoding.encode_into(found, raw, scale, self.column_scale)
        stored = np.empty_like(found)
        self.encoding.decode_into(raw, scale, stored, self.column_scale)
        return stored


def query_factors(
    queries: Floats,
    turned: Floats,
    turn: Floats,
    whitening: Matrix | None,
    column_scale: Floats | None,
    norm_units: float,
) -> Matrix:
    """Return E of queries, (q, 4) float64; infinite where nothing is known.

    Parameters
    ----------
    queries : (q, k) float32
        As the wide rows are multiplied by.
    turned : (q, r) float32
        c, as the sketch's are.
    turn : (k, r) float32
        D V.
    whitening, column_scale
        As for :class:`Residuals`.
    norm_units : float
        Roundings by which the weights of the wide rows and those of the sketch differ.
    """
    k, r = turn.shape
    held = turned.astype(np.float64)
    left, whole, back = np.zeros(len(queries)), np.zeros(len(queries)), np.zeros((len(queries), r))
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, k, _COLUMNS):
            part = slice(first, first + _COLUMNS)
            vectors, wide = turn[part].astype(np.float64), queries[:, part].astype(np.float64)
            if whitening is not None:
                vectors /= whitening[part, None]
                wide *= whitening[part]
            whole += np.square(wide).sum(1)
            wide -= held @ vectors.T
            left += np.square(wide).sum(1)
            back += wide @ vectors
        size = _norms(held)
        scaled = size if column_scale is None else _norms(held * column_scale)
        summed = (_SUMMED + k / _SUMMED + _SPARE_UNITS) * np.sqrt(r) + r + _SPARE_UNITS
        sums = (_SCORE_UNITS + norm_units) * _UNIT * np.sqrt(whole) + (summed + _SCORE_UNITS) * _UNIT * size
        least = k * (_UNDERFLOW * np.abs(queries).max(axis=1, initial=0).astype(np.float64) + _LEAST)
        factors = _SAFETY * np.stack([np.sqrt(left), scaled, _norms(back) + sums, least], axis=1)
    dropped = np.isnan(queries).any(axis=1)
    factors[~np.isfinite(factors).all(axis=1)] = np.inf
    factors[dropped] = 0
    return np.asarray(factors)


def _norms(rows: npt.NDArray[np.floating]) -> Matrix:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)))

"""Rows of signs: one bit for each number of a rotated row, and a scale a row.

    x̂ = Rᵀ (s · sign(R x)),        s = |x|² / |R x|₁,        so that <x̂, x> = |x|²

R is a random rotation, fixed for rows of k numbers: random signs, then Hadamard transforms of ``size`` entries that are
as far apart as they can be, so that every transform mixes entries of all layers. After it, a row's numbers are nearly
normal, and their signs tell its direction: for any query, <q, x̂> estimates <q, x> without bias over rotations, with an
error of about √(π/2 − 1) |q| |x| / √k (RaBitQ: Gao and Long 2024, arXiv 2405.12497). ``size`` 1, of rows of few
numbers, is no rotation. Whitening alone is not enough: it makes entries matter alike on average, but an adapter's
gradient still has a few large ones. Scores of its plain signs correlate by .70 with exact ones, those of rotated signs
by .97.

Sums and differences of the transform are made in a fixed order, number by number, so the bits of a row do not depend on
the rows beside it.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_LARGEST = 1024  # entries of a transform; more cost time, and gain nothing that was measured
_LEAST_APART = 8
_IN_CACHE = 2**17  # numbers transformed at a time
_SMALLEST = 1e-30  # smaller sums of squares have lost bits in float32
ENERGY = 2 / np.pi  # |x|² over |x̂|², for normal numbers


def transform_size(k: int) -> int:
    """Return the entries of a transform, a power of two, of rows of ``k`` numbers."""
    size = 1
    while 2 * size <= min(_LARGEST, k // _LEAST_APART):
        size *= 2
    return size


def bit_count(k: int, size: int) -> int:
    """Return the number of bits of a row of ``k`` numbers: k, rounded up to whole transforms."""
    return -(-k // size) * size


@functools.lru_cache(maxsize=4)
def sign_flips(k: int, size: int) -> Floats:
    """Return the signs that numbers are multiplied by before the transform, over √size, (k,); ones where there is none.

    The highest bit of SplitMix64's output for the number's index.
    """
    if size == 1:
        return np.ones(k, np.float32)
    with np.errstate(over="ignore"):
        value = (np.arange(1, k + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    flips = np.where(value >> np.uint64(63), np.float32(-1), np.float32(1)) / np.sqrt(np.float32(size))
    flips.setflags(write=False)
    return np.asarray(flips, np.float32)


def rotate(rows: Floats, size: int, out: Floats) -> Floats:
    """Return R of rows (b, k), (b, bits) float32: in ``out``, of that shape, or the rows where there is no rotation."""
    if size == 1:
        return rows
    k = rows.shape[1]
    np.multiply(rows, sign_flips(k, size), out=out[:, :k])
    out[:, k:] = 0
    _transform(out, size)
    return out


def rotate_back(rotated: Floats, size: int, k: int) -> Floats:
    """Return Rᵀ of (b, bits), (b, k), in place."""
    if size == 1:
        return rotated
    _transform(rotated, size)
    numbers = rotated[:, :k]
    return np.multiply(numbers, sign_flips(k, size), out=numbers)


def _transform(rows: Floats, size: int) -> None:
    """Replace rows by their Hadamard transforms, each of the numbers at i, i + count, i + 2 count, ...

    A few transforms of a few rows at a time, which stay in cache.
    """
    count = rows.shape[1] // size
    width = min(count, max(1, _IN_CACHE // size))
    step = max(1, _IN_CACHE // (size * width))
    numbers = rows.reshape(len(rows), size, count)
    room = np.empty((2, min(step, len(rows)) * size * width), np.float32)
    for row in range(0, len(rows), step):
        for column in range(0, count, width):
            part = numbers[row : row + step, :, column : column + width]
            here, there = (each[: part.size].reshape(part.shape) for each in room)
            np.copyto(here, part)
            np.copyto(part, _butterflies(here, there))


def _butterflies(here: Floats, there: Floats) -> Floats:
    """Return the transforms of (b, size, width) along the middle axis, in one of two arrays."""
    b, size, width = here.shape
    half = 1
    while half < size:
        pairs, target = (each.reshape(b, size // (2 * half), 2, half * width) for each in (here, there))
        np.add(pairs[:, :, 0], pairs[:, :, 1], out=target[:, :, 0])
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=target[:, :, 1])
        here, there, half = there, here, 2 * half
    return here


def encode(tile: Floats, size: int, packed: Bytes, out: Floats) -> Floats:
    """Write the signs of rows (b, k) to ``packed`` (b, ⌈bits/8⌉); return their scales (b,).

    ``out`` is (b, bits) float32, room to work in. A row of zeros has the scale zero.
    """
    rotated = rotate(tile, size, out)
    packed[:] = np.packbits(rotated >= 0, axis=1)
    squares = np.einsum("ij,ij->i", tile, tile).astype(np.float64)
    sums = np.abs(rotated, out=out).sum(axis=1, dtype=np.float64)
    for row in np.flatnonzero((sums > 0) & ~((squares > _SMALLEST) & (squares < np.inf))):
        squares[row] = np.square(tile[row], dtype=np.float64).sum()
    return np.asarray(np.divide(squares, sums, out=np.zeros_like(sums), where=sums > 0), np.float32)


def signs(packed: Bytes, out: Floats) -> None:
    """Write the signs of (b, ⌈bits/8⌉) bytes to ``out`` (b, bits), as ±1."""
    bits = np.unpackbits(packed, axis=1, count=out.shape[1])
    np.copyto(out, bits)
    np.multiply(out, np.float32(2), out=out)
    np.subtract(out, np.float32(1), out=out)


def rotate_queries(queries: Floats, size: int) -> Floats:
    """Return R of a few queries (q, k), (q, bits), to be multiplied by signs that are not rotated back."""
    return rotate(queries, size, np.empty((len(queries), bit_count(queries.shape[1], size)), np.float32))


def decode(packed: Bytes, scale: Floats, size: int, tile: Floats, out: Floats) -> None:
    """Write x̂ of rows into ``tile`` (b, k); ``out`` is (b, bits), room to work in."""
    signs(packed, out)
    np.multiply(out, scale[:, None], out=out)
    np.copyto(tile, rotate_back(out, size, tile.shape[1]))

"""Rows of whole numbers, eight or four bits each: steps that grow with the number, a scale for every 16 columns.

    number = q · (|q| + t) · row scale · 2^(-e/8)        q in -t..t; t = 127 (int8) or 7 (int4); e in 0..255

Masked gradients have few large entries and many small ones, and the large ones lie together: a layer's columns are
ordered by its outputs, and an entry is δ_i x_j. Equal steps would leave small entries too few levels, and one scale a
row would make every entry as coarse as the largest. So the step at the top is three times the one at zero, and every
block of 16 columns has a code e, which brings its largest entry to within 9 % of the top. The codes follow the numbers
in each row, a byte each. (On masked gradients of the digits, blocks of 32 made a quarter more of the ranking's error.)

Formats 1 and 2 had neither: number = q · |q| · row scale.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

BLOCK = 16
_STEPS = 8  # codes to a factor of two
FACTORS = np.exp2(-np.arange(256) / _STEPS).astype(np.float32)  # of the codes
_SMALLEST = np.float32(np.finfo(np.float32).tiny)  # a smaller scale would lose its own bits


def block_count(k: int, block: int | None) -> int:
    """Return the codes behind a row of ``k`` numbers."""
    return 0 if block is None else -(-k // block)


def quantise(
    tile: Floats, whole: npt.NDArray[np.int8], top: int, block: int | None, buffer: Floats
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Round a few rows (b, k) to ``whole`` (b, k).

    Parameters
    ----------
    tile, whole : (b, k)
        From, to.
    top : int
        The largest whole number, t.
    block : int or None
        Columns of a block; None for rows of format 2.
    buffer : (b, k rounded up to whole blocks) float32
        Room to work in.

    Returns
    -------
    (b,) float32, (b, blocks) uint8
        Scales of the rows, codes of their blocks.
    """
    rows, k = tile.shape
    np.abs(tile, out=buffer[:, :k])
    buffer[:, k:] = 0
    offset = np.float32(0 if block is None else top)
    largest = _block_maxima(buffer, block)
    most = largest.max(axis=1)
    scale = np.where(most > 0, np.maximum(most / (top * (top + offset)), _SMALLEST), np.float32(1)).astype(np.float32)
    codes = np.zeros((rows, block_count(k, block)), np.uint8)
    if block is not None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # blocks of zeros, or nearly
            below = np.floor(_STEPS * np.log2(most[:, None] / largest))
        np.copyto(codes, np.minimum(np.nan_to_num(below, posinf=255), 255), casting="unsafe")
    sizes = buffer.reshape(rows, -1, block or k)
    np.divide(sizes, _steps(scale, codes, block)[:, :, None], out=sizes)
    np.add(buffer, offset * offset / 4, out=buffer)  # q² + c q = v, solved for q
    np.subtract(np.sqrt(buffer, out=buffer), offset / 2, out=buffer)
    np.minimum(np.rint(buffer, out=buffer), np.float32(top), out=buffer)
    np.copyto(whole, buffer[:, :k], casting="unsafe")
    negative = -(tile < 0).view(np.int8)
    np.subtract(np.bitwise_xor(whole, negative, out=whole), negative, out=whole)
    return scale, codes


def _block_maxima(sizes: Floats, block: int | None) -> Floats:
    """Return the largest of each block, (b, blocks): pairwise, several times as fast as NumPy's own on a short axis."""
    if block != BLOCK:
        return np.asarray(sizes.reshape(len(sizes), -1, block or sizes.shape[1]).max(axis=2))
    found = sizes.reshape(-1)
    while found.size > sizes.size // BLOCK:
        found = np.maximum(found[::2], found[1::2])
    maxima: Floats = found.reshape(len(sizes), -1)
    return maxima


def restore(
    tile: Floats, scale: Floats, codes: npt.NDArray[np.uint8], top: int, block: int | None, buffer: Floats
) -> None:
    """Turn whole numbers, as float32 in ``tile`` (b, k), into what they stand for, in place; ``buffer`` is (b, k)."""
    np.add(np.abs(tile, out=buffer), np.float32(0 if block is None else top), out=buffer)
    np.multiply(tile, buffer, out=tile)
    steps = _steps(scale, codes, block)
    size = block or tile.shape[1]
    inside = tile.shape[1] // size * size
    blocks = tile[:, :inside].reshape(len(tile), -1, size)  # a view: splitting an axis moves nothing
    np.multiply(blocks, steps[:, : inside // size, None], out=blocks)
    if inside < tile.shape[1]:
        np.multiply(tile[:, inside:], steps[:, -1:], out=tile[:, inside:])


def _steps(scale: Floats, codes: npt.NDArray[np.uint8], block: int | None) -> Floats:
    """Return the scale of each block, (b, blocks)."""
    if block is None:
        return scale[:, None]
    return np.asarray(np.maximum(scale[:, None] * FACTORS[codes], _SMALLEST))


def pack(whole: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Return (b, ⌈k/2⌉) bytes of (b, k) numbers in -7..7."""
    half = -(-whole.shape[1] // 2)
    bits = whole.view(np.uint8)
    packed = bits[:, :half] & np.uint8(15)
    packed[:, : whole.shape[1] - half] |= bits[:, half:] << np.uint8(4)
    return packed


def unpack(packed: npt.NDArray[np.uint8], tile: Floats) -> None:
    """Write the (b, k) numbers of (b, ⌈k/2⌉) bytes into ``tile``."""
    half = packed.shape[1]
    signed = packed.view(np.int8)
    np.copyto(tile[:, :half], (signed << 4) >> 4)
    np.copyto(tile[:, half:], (signed >> 4)[:, : tile.shape[1] - half])

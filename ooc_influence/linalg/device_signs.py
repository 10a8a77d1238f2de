"""Rows of signs on a torch device: the arithmetic of :mod:`ooc_influence.store.signs`, to the same bits."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ooc_influence.store import Encoding, sign_flips


def unpack(bits: int, packed: Tensor) -> Tensor:
    """Return the signs (b, bits) of ``packed`` (b, ⌈bits/8⌉), as ±1."""
    places = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return (packed[:, :, None] >> places & 1).flatten(1)[:, :bits].float().mul_(2).sub_(1)


def rotate_back(k: int, size: int, rotated: Tensor) -> Tensor:
    """Return the rows (b, k) of rotated ones (b, bits)."""
    return rotated if size == 1 else _transform(rotated, size)[:, :k] * _flips(k, size, rotated.device)


def encode(rows: Tensor, encoding: Encoding, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the signs of rows (b, k) float32, packed (b, ⌈bits/8⌉) uint8, and their scales (b,) float32.

    ``column_scale`` (k,) is what columns are divided by. The bits are those of the host; the scales, to rounding. Holds
    a few copies of the rows.
    """
    rows = rows if column_scale is None else rows / column_scale
    size, bits = encoding.block or 1, encoding.stored_columns
    rotated = rows
    if size > 1:
        rotated = rows.new_zeros((len(rows), bits))
        torch.mul(rows, _flips(encoding.k, size, rows.device), out=rotated[:, : encoding.k])
        rotated = _transform(rotated, size)
    positive = torch.zeros((len(rows), 8 * encoding.columns), dtype=torch.uint8, device=rows.device)
    positive[:, :bits] = rotated >= 0
    places = 2 ** torch.arange(7, -1, -1, device=rows.device, dtype=torch.uint8)
    packed = (positive.view(len(rows), -1, 8) * places).sum(2, dtype=torch.uint8)
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    sums = torch.linalg.vector_norm(rotated, 1, dim=1, dtype=torch.float64)
    return packed, torch.where(sums > 0, squares / sums, 0).float()


def _transform(rows: Tensor, size: int) -> Tensor:
    """Return the Hadamard transforms of rows, sum by sum in the host's order."""
    count, half, shape = rows.shape[1] // size, 1, rows.shape
    while half < size:
        pairs = rows.view(len(rows), size // (2 * half), 2, half * count)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return rows.view(shape)


@functools.lru_cache(maxsize=4)
def _flips(k: int, size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(sign_flips(k, size))).to(device)

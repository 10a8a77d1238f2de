"""How rows are represented on disk.

=========  ==============  ==================================================================================
name       array dtype     value
=========  ==============  ==================================================================================
float32    float32         the number itself
float16    float16         number / row scale; the scale is a power of two that brings the row's largest entry into
                           [2^14, 2^15), so scaling loses no bits and gradients down to 2^-38 of it stay above zero
bfloat16   uint16          the upper half of the float32, rounded to nearest even (Zarr has no bfloat16)
=========  ==============  ==================================================================================

Every store has a ``row_scale`` (n,) float32; it is 1 where the representation has none.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError

Representation = Literal["float32", "float16", "bfloat16"]
FloatRows = npt.NDArray[np.float32]
RawRows = npt.NDArray[Any]

_ARRAY_DTYPE: dict[str, str] = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
_TILE = 512  # rows converted at a time: the tile stays in cache


def parse_representation(name: str) -> Representation:
    """Return ``name`` if it is a known representation.

    Raises
    ------
    InputError
        If it is not.
    """
    if name not in _ARRAY_DTYPE:
        raise InputError(f"expected dtype one of {', '.join(_ARRAY_DTYPE)}; received {name!r}")
    return name  # type: ignore[return-value]


def array_dtype(name: Representation) -> np.dtype[Any]:
    """Return the dtype of the Zarr array that holds representation ``name``."""
    return np.dtype(_ARRAY_DTYPE[name])


def fill_value(name: Representation) -> float | int:
    """Return what rows never written read as for plain Zarr users: NaN in every representation."""
    return 0x7FC0 if name == "bfloat16" else float("nan")


def encode(rows: FloatRows, name: Representation) -> tuple[RawRows, FloatRows]:
    """Return the stored form of float32 ``rows`` (b, k) and their scale (b,)."""
    scale = np.ones(len(rows), np.float32)
    if name == "float32":
        return rows, scale
    if name == "bfloat16":
        bits = rows.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), scale
    if rows.size:
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        exponent = np.clip(np.frexp(largest)[1] - 15, -126, 127)
        scale = np.where(largest > 0, np.ldexp(np.float32(1), exponent), np.float32(1)).astype(np.float32)
    return np.multiply(rows, (1 / scale)[:, None]).astype(np.float16), scale


def decode_into(raw: RawRows, scale: FloatRows, out: FloatRows, name: Representation) -> None:
    """Write the float32 values of ``raw`` (m, k) with its ``scale`` (m,) into ``out`` (m, k)."""
    for start in range(0, len(raw), _TILE):
        part = slice(start, start + _TILE)
        if name == "bfloat16":
            bits = out[part].view(np.uint32)
            np.copyto(bits, raw[part])
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(out[part], raw[part])
            if name == "float16":
                np.multiply(out[part], scale[part, None], out=out[part])

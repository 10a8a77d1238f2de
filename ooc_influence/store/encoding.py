"""How rows are represented on disk.

=========  ==============  ==================================================================================
name       array           value
=========  ==============  ==================================================================================
float32    (n, k) float32  the number itself
float16    (n, k) float16  number / row scale; the scale is a power of two that brings the row's largest entry into
                           [2^14, 2^15), so scaling loses no bits and gradients down to 2^-38 of it stay above zero
bfloat16   (n, k) uint16   the upper half of the float32, rounded to nearest even (Zarr has no bfloat16)
int8       (n, k) int8     q in -127..127 with number = q·|q| · row scale; the scale is the row's largest entry / 127².
                           Gradients have few large entries: equal steps would leave the many small ones too few levels
int4       (n, ⌈k/2⌉)      the same with -7..7; byte j holds column j in its lower four bits and column j + ⌈k/2⌉ in its
           uint8           upper ones, in two's complement
=========  ==============  ==================================================================================

Every store has a ``row_scale`` (n,) float32; it is 1 where the representation has none. A store may have a
``column_scale`` (k,) float32 too: rows are divided by it before they are encoded and multiplied by it on reading.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError

Representation = Literal["float32", "float16", "bfloat16", "int8", "int4"]
FloatRows = npt.NDArray[np.float32]
RawRows = npt.NDArray[Any]

_TILE_BYTES = 2**19  # float32 bytes converted at a time: the tile stays in cache
_HALF_BITS = np.int32(0x8FFFE000 - 2**32)  # sign, five bits of exponent and ten of fraction, in a float32's places
_HALF_BIAS = np.float32(2.0**112)  # between the two exponents
_SMALLEST = np.float32(np.finfo(np.float32).tiny)  # a smaller scale would lose its own bits


@dataclass(frozen=True)
class _Form:
    dtype: str  # of the Zarr array
    fill: float | int  # what rows never written read as: a value no row has
    top: int = 0  # largest whole number of a quantised form


_FORMS: dict[str, _Form] = {
    "float32": _Form("float32", float("nan")),
    "float16": _Form("float16", float("nan")),
    "bfloat16": _Form("uint16", 0x7FC0),
    "int8": _Form("int8", -128, 127),
    "int4": _Form("uint8", 0x88, 7),
}
REPRESENTATIONS = tuple(_FORMS)


def parse_representation(name: str) -> Representation:
    """Return ``name`` if it is a known representation.

    Raises
    ------
    InputError
        If it is not.
    """
    if name not in _FORMS:
        raise InputError(f"expected dtype one of {', '.join(_FORMS)}; received {name!r}")
    return name  # type: ignore[return-value]


def array_dtype(name: Representation) -> np.dtype[Any]:
    """Return the dtype of the Zarr array that holds representation ``name``."""
    return np.dtype(_FORMS[name].dtype)


def array_columns(name: Representation, k: int) -> int:
    """Return the columns of the Zarr array that holds ``k`` numbers a row."""
    return -(-k // 2) if name == "int4" else k


def fill_value(name: Representation) -> float | int:
    """Return what rows never written read as for plain Zarr users: NaN, or a whole number that no row has."""
    return _FORMS[name].fill


def encode(rows: FloatRows, name: Representation, column_scale: FloatRows | None = None) -> tuple[RawRows, FloatRows]:
    """Return the stored form of float32 ``rows`` (b, k) and their scale (b,)."""
    raw = np.empty((len(rows), array_columns(name, rows.shape[1])), array_dtype(name))
    scale = np.empty(len(rows), np.float32)
    encode_into(rows, raw, scale, name, column_scale)
    return raw, scale


def encode_into(
    rows: FloatRows, raw: RawRows, scale: FloatRows, name: Representation, column_scale: FloatRows | None = None
) -> None:
    """Write the stored form of float32 ``rows`` (b, k) to ``raw`` (b, columns), their scale to ``scale`` (b,)."""
    step = max(1, _TILE_BYTES // max(1, 4 * rows.shape[1]))
    buffer = np.empty((min(step, len(rows)), rows.shape[1]), np.float32)  # fresh memory for every tile would cost more
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        tile = rows[part]
        if column_scale is not None:
            tile = np.divide(tile, column_scale, out=buffer[: len(tile)])
        scale[part] = _encode_tile(tile, raw[part], name, buffer[: len(tile)])


def _encode_tile(tile: FloatRows, raw: RawRows, name: Representation, buffer: FloatRows) -> FloatRows | float:
    """Write the stored form of a few rows, by way of ``buffer`` (which may be the tile); return their scale."""
    if name == "float32":
        raw[...] = tile
        return 1.0
    if name == "bfloat16":
        bits = np.ascontiguousarray(tile).view(np.uint32)
        np.copyto(raw, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, casting="unsafe")
        return 1.0
    largest = np.maximum(tile.max(axis=1), -tile.min(axis=1))
    if name == "float16":
        exponent = np.clip(np.frexp(largest)[1] - 15, -126, 127)
        scale = np.where(largest > 0, np.ldexp(np.float32(1), exponent), np.float32(1)).astype(np.float32)
        _to_half(np.multiply(tile, (1 / scale)[:, None], out=buffer), raw)
        return scale
    top = np.float32(_FORMS[name].top)
    scale = np.where(largest > 0, np.maximum(largest / top**2, _SMALLEST), np.float32(1)).astype(np.float32)
    negative = np.signbit(tile)
    np.sqrt(np.abs(np.divide(tile, scale[:, None], out=buffer), out=buffer), out=buffer)
    whole = np.minimum(np.rint(buffer, out=buffer), top, out=buffer).astype(np.int8)
    np.negative(whole, out=whole, where=negative)
    raw[...] = _pack(whole) if name == "int4" else whole
    return scale


def _to_half(tile: FloatRows, raw: RawRows) -> None:
    """Round to float16, to nearest even: by PyTorch where it is loaded anyway, ten times as fast as NumPy."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "from_numpy"):
        torch.from_numpy(raw).copy_(torch.from_numpy(tile))
    else:
        np.copyto(raw, tile, casting="same_kind")


def _pack(whole: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Return (b, ⌈k/2⌉) bytes of (b, k) numbers in -7..7."""
    half = -(-whole.shape[1] // 2)
    bits = whole.view(np.uint8)
    packed = bits[:, :half] & np.uint8(15)
    packed[:, : whole.shape[1] - half] |= bits[:, half:] << np.uint8(4)
    return packed


def decode_into(
    raw: RawRows, scale: FloatRows, out: FloatRows, name: Representation, column_scale: FloatRows | None = None
) -> None:
    """Write the float32 values of ``raw`` (m, columns) with its ``scale`` (m,) into ``out`` (m, k)."""
    rows = max(1, _TILE_BYTES // max(1, 4 * out.shape[1]))
    buffer = np.empty((min(rows, len(raw)), out.shape[1]) if _FORMS[name].top else 0, np.float32)
    for start in range(0, len(raw), rows):
        part = slice(start, start + rows)
        tile = out[part]
        _convert(raw[part], tile, name)
        if _FORMS[name].top:
            np.multiply(tile, np.abs(tile, out=buffer[: len(tile)]), out=tile)
        if name not in ("float32", "bfloat16"):
            np.multiply(tile, scale[part, None], out=tile)
        if column_scale is not None:
            np.multiply(tile, column_scale, out=tile)


def _convert(raw: RawRows, tile: FloatRows, name: Representation) -> None:
    if name == "bfloat16":
        bits = tile.view(np.uint32)
        np.copyto(bits, raw)
        np.left_shift(bits, 16, out=bits)
    elif name == "float16":  # the bits, moved: several times as fast as NumPy's conversion; rows are finite
        whole = tile.view(np.int32)
        np.copyto(whole, raw.view(np.int16))
        np.left_shift(whole, 13, out=whole)
        np.bitwise_and(whole, _HALF_BITS, out=whole)
        np.multiply(tile, _HALF_BIAS, out=tile)
    elif name == "int4":
        half = raw.shape[1]
        packed = raw.view(np.int8)
        np.copyto(tile[:, :half], (packed << 4) >> 4)
        np.copyto(tile[:, half:], (packed >> 4)[:, : tile.shape[1] - half])
    else:
        np.copyto(tile, raw)


def nonfinite_rows(raw: RawRows, name: Representation) -> npt.NDArray[np.bool_]:
    """Return which rows of ``raw`` (m, columns) hold a value no row may have: NaN, Inf, or the fill value, (m,)."""
    if name in ("int8", "int4"):
        lowest = raw == -128 if name == "int8" else ((raw & 15) == 8) | ((raw >> 4) == 8)
        return np.asarray(lowest.any(axis=1))
    whole: Any = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}[name]
    exponent = whole({"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[name])
    found = np.zeros(len(raw), np.bool_)
    bits = raw.view(whole)
    rows = max(1, _TILE_BYTES // max(1, 2 * raw.shape[1] * raw.itemsize))
    tile = np.empty((min(rows, len(raw)), raw.shape[1]), whole)
    for start in range(0, len(raw), rows):
        part = bits[start : start + rows]
        masked = np.bitwise_and(part, exponent, out=tile[: len(part)])
        if masked.max(initial=0) == exponent:
            found[start : start + rows] = masked.max(axis=1) == exponent
    return found

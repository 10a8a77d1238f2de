"""BLAS functions that add to what is there: C += XᵀX and C += XᵀY in float32, without temporaries.

``ssyrk`` with beta = 1 computes one triangle in place: half the arithmetic of a GEMM. SciPy's Python wrappers hold the
interpreter lock; the same functions, taken from ``scipy.linalg.cython_blas`` and called through ctypes, do not, so
reading and progress go on beside them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_LARGEST = 2**31 - 1  # BLAS counts in 32 bits


@cache
def _blas(name: str, arguments: int) -> Any:
    from scipy.linalg import cython_blas

    capsule = cython_blas.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)


def _stride(matrix: Floats) -> Any:
    """Return how many numbers lie between two rows, as BLAS wants it; rows themselves have to lie together."""
    if matrix.dtype != np.float32 or matrix.ndim != 2 or (matrix.shape[1] > 1 and matrix.strides[1] != 4):
        raise TypeError(f"expected float32 rows, each in one piece; received {matrix.dtype}, strides {matrix.strides}")
    step = matrix.strides[0] // 4 if len(matrix) > 1 else matrix.shape[1]
    if step < matrix.shape[1] or step > _LARGEST:
        raise TypeError(f"expected rows that follow each other in memory; received strides {matrix.strides}")
    return ctypes.byref(ctypes.c_int(max(1, step)))


def add_square(total: Floats, block: Floats, sign: float = 1.0) -> None:
    """Add ``sign`` XᵀX to the upper triangle of ``total`` (k, k), in place; X = ``block`` (m, k).

    Either may be a range of columns of a larger matrix; all float32.
    """
    factor, one = ctypes.c_float(sign), ctypes.c_float(1.0)
    k, m = ctypes.c_int(len(total)), ctypes.c_int(len(block))
    # Fortran sees X as Xᵀ (k, m); its lower triangle is our upper one
    _blas("ssyrk", 10)(
        ctypes.c_char_p(b"L"), ctypes.c_char_p(b"N"), ctypes.byref(k), ctypes.byref(m), ctypes.byref(factor),
        block.ctypes.data, _stride(block), ctypes.byref(one), total.ctypes.data, _stride(total),
    )  # fmt: skip


def add_product(total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
    """Add ``sign`` leftᵀ right to ``total`` (k, c) in place; ``left`` (m, k), ``right`` (m, c).

    ``total`` is in C's or Fortran's order; all float32.
    """
    if total.flags.f_contiguous and not total.flags.c_contiguous:
        total, left, right = total.T, right, left
    factor, one = ctypes.c_float(sign), ctypes.c_float(1.0)
    k, c, m = (ctypes.c_int(size) for size in (*total.shape, len(left)))
    # Fortran sees every matrix transposed: totalᵀ (c, k) += rightᵀ left
    _blas("sgemm", 13)(
        ctypes.c_char_p(b"N"), ctypes.c_char_p(b"T"), ctypes.byref(c), ctypes.byref(k), ctypes.byref(m),
        ctypes.byref(factor), right.ctypes.data, _stride(right), left.ctypes.data, _stride(left), ctypes.byref(one),
        total.ctypes.data, _stride(total),
    )  # fmt: skip

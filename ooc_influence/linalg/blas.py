"""Sums of products, C += XᵀX and C += XᵀY, at the BLAS's rate and without temporaries.

``ssyrk`` with beta = 1 computes one triangle in place: half the arithmetic of a GEMM and no temporary. It accumulates
in float32 over :data:`FOLD_ROWS` rows, then its triangle is added to a float64 sum, which costs a few per cent and
keeps rounding independent of the number of rows. SciPy's Python wrappers hold the interpreter lock; the same functions,
taken from ``scipy.linalg.cython_blas`` and called through ctypes, do not, so reading and progress go on beside them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

FOLD_ROWS = 8192  # rows summed in float32 before they are added to the float64 sum
_FOLD_TILE = 256  # rows of the matrix folded at a time: the tile stays in cache


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


def add_product(total: npt.NDArray[np.float32], left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> None:
    """Add leftᵀ right to ``total`` (k, c), in Fortran's order, in place; ``left`` (m, k) and ``right`` (m, c) in C's.

    All float32.
    """
    if not (total.flags.f_contiguous and left.flags.c_contiguous and right.flags.c_contiguous):
        raise TypeError("expected total in Fortran's order, left and right in C's")
    if {total.dtype, left.dtype, right.dtype} != {np.dtype(np.float32)}:
        raise TypeError("expected float32")
    one, k, c, m = ctypes.c_float(1.0), *(ctypes.c_int(size) for size in (*total.shape, len(left)))
    # Fortran sees left as leftᵀ (k, m) and right as rightᵀ (c, m)
    _blas("sgemm", 13)(
        ctypes.c_char_p(b"N"), ctypes.c_char_p(b"T"), ctypes.byref(k), ctypes.byref(c), ctypes.byref(m),
        ctypes.byref(one), left.ctypes.data, ctypes.byref(k), right.ctypes.data, ctypes.byref(c), ctypes.byref(one),
        total.ctypes.data, ctypes.byref(k),
    )  # fmt: skip


class GramAccumulator:
    """The sum Σ XᵀX over blocks X (m, k), in float64.

    Parameters
    ----------
    k : int
        Columns. Holds k² float32 and k² float64.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._single = np.zeros((k, k), np.float32)
        self._double = np.zeros((k, k), np.float64)
        self._pending = 0

    @staticmethod
    def nbytes(k: int) -> int:
        """Return the bytes an accumulator of ``k`` columns holds."""
        return 12 * k * k

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Add XᵀX of a C-contiguous float32 block (m, k)."""
        if not block.flags.c_contiguous or block.dtype != np.float32:
            raise TypeError("expected a C-contiguous float32 block")
        one, k, m = ctypes.c_float(1.0), ctypes.c_int(self._k), ctypes.c_int(len(block))
        # Fortran sees X as Xᵀ (k, m); its lower triangle is our upper one
        _blas("ssyrk", 10)(
            ctypes.c_char_p(b"L"), ctypes.c_char_p(b"N"), ctypes.byref(k), ctypes.byref(m), ctypes.byref(one),
            block.ctypes.data, ctypes.byref(k), ctypes.byref(one), self._single.ctypes.data, ctypes.byref(k),
        )  # fmt: skip
        self._pending += len(block)
        if self._pending >= FOLD_ROWS:
            self._fold()

    def _fold(self) -> None:
        for start in range(0, self._k, _FOLD_TILE):
            rows = slice(start, start + _FOLD_TILE)
            self._double[rows, start:] += self._single[rows, start:]
            self._single[rows, start:] = 0
        self._pending = 0

    def total(self) -> npt.NDArray[np.float64]:
        """Return the whole symmetric sum, (k, k) float64; the accumulator is used up."""
        self._fold()
        self._single = np.empty((0, 0), np.float32)
        for start in range(0, self._k, _FOLD_TILE):
            stop = min(self._k, start + _FOLD_TILE)
            square = self._double[start:stop, start:stop]
            square[...] = np.triu(square) + np.triu(square, 1).T
            self._double[stop:, start:stop] = self._double[start:stop, stop:].T
        return self._double

"""Which BLAS multiplies: the engines at hand, timed once a process, the fastest taken for C += XᵀX.

SciPy's ssyrk is there always. NumPy has a BLAS of its own, and PyTorch another, which counts only where it is loaded
already: its matrix product of column tiles does little more than half of the arithmetic, as ssyrk does. PyTorch may
also multiply in bfloat16 with sums in float32; that is taken only for rows that bfloat16 holds exactly, and only if a
product of such rows agrees with ssyrk's.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np

from ooc_influence.linalg import blas
from ooc_influence.linalg.blas import Floats

logger = logging.getLogger("ooc_influence")
_TILE = 512  # columns of a tile where only a general product is there
_TRIAL = (768, 1536)  # rows and columns of the block that engines are timed on
_TRIALS = 3
_HEAD_START = 0.9  # of the first engine, which needs no temporaries: others' times may be luck
_WORTH_TIMING = 512  # columns; for narrower sums any engine does
_AGREEMENT = 1e-6  # of the largest entry
_lock = threading.Lock()
_chosen: dict[bool, Engine] = {}


class Engine(Protocol):
    """What adds products of float32 rows to a float32 sum, in place.

    Attributes
    ----------
    name : str
        For the log.
    """

    name: str

    def add_square(self, total: Floats, block: Floats, sign: float = 1.0) -> None:
        """Add ``sign`` XᵀX to the upper triangle of ``total`` (k, k)."""

    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """Add ``sign`` leftᵀ right to ``total`` (k, c)."""


class ScipyEngine:
    """SciPy's BLAS (:mod:`.blas`)."""

    name = "SciPy ssyrk"
    add_square = staticmethod(blas.add_square)
    add_product = staticmethod(blas.add_product)


class _Tiled(ABC):
    """A general product makes a triangle tile by tile."""

    def add_square(self, total: Floats, block: Floats, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        for start in range(0, len(total), _TILE):
            columns = slice(start, start + _TILE)
            self.add_product(total[columns, start:], block[:, columns], block[:, start:], sign)

    @abstractmethod
    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """See :class:`Engine`."""


class NumpyEngine(_Tiled):
    """NumPy's BLAS, by way of a temporary tile."""

    name = "NumPy matmul"

    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        for start in range(0, len(total), _TILE):
            product = left[:, start : start + _TILE].T @ right
            if sign != 1.0:
                product *= np.float32(sign)
            total[start : start + _TILE] += product


class TorchEngine(_Tiled):
    """PyTorch's BLAS.

    Parameters
    ----------
    precision : {"highest", "medium"}
        ``medium`` lets it round factors to bfloat16.
    """

    def __init__(self, precision: str = "highest") -> None:
        self._precision = precision
        self.name = "PyTorch addmm" + (" in bfloat16" if precision == "medium" else "")

    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        torch: Any = sys.modules["torch"]
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(self._precision)
            out = torch.from_numpy(total)
            torch.addmm(out, torch.from_numpy(left).T, torch.from_numpy(right), alpha=sign, out=out)
        finally:
            torch.set_float32_matmul_precision(before)


def choose_engine(columns: int, *, bfloat16: bool = False) -> Engine:
    """Return the fastest engine at hand for sums of so many columns.

    Parameters
    ----------
    columns : int
        Of the rows.
    bfloat16 : bool
        Whether bfloat16 holds every number of them exactly.
    """
    if columns < _WORTH_TIMING:
        return ScipyEngine()
    with _lock:
        if bfloat16 not in _chosen:
            _chosen[bfloat16] = _fastest(bfloat16)
        return _chosen[bfloat16]


def _fastest(bfloat16: bool) -> Engine:
    candidates: list[Engine] = [ScipyEngine(), NumpyEngine()]
    if hasattr(sys.modules.get("torch"), "addmm"):
        candidates += [TorchEngine()] + ([TorchEngine("medium")] if bfloat16 else [])
    block = np.random.default_rng(0).standard_normal(_TRIAL, np.float32)
    block.view(np.uint32)[...] &= 0xFFFF0000  # what bfloat16 holds
    total = np.zeros((_TRIAL[1], _TRIAL[1]), np.float32)
    first, expected, agreeing = candidates[0], None, []
    for engine in candidates:
        total[...] = 0
        engine.add_square(total, block)
        found = np.triu(total)
        expected = found if expected is None else expected
        if np.abs(found - expected).max() <= _AGREEMENT * expected.max():
            agreeing.append(engine)
    rounds = [[_timed(engine, total, block) for engine in agreeing] for _ in range(_TRIALS)]
    seconds = dict(zip(agreeing, np.min(rounds, axis=0).tolist(), strict=True))
    best = min(seconds, key=lambda engine: seconds[engine] * (_HEAD_START if engine is first else 1))
    work = _TRIAL[0] * _TRIAL[1] ** 2 / 1e9
    logger.info(
        "products by %s (%s)",
        best.name, ", ".join(f"{engine.name} {work / took:.0f} GFLOP/s" for engine, took in seconds.items()),
    )  # fmt: skip
    return best


def _timed(engine: Engine, total: Floats, block: Floats) -> float:
    began = time.perf_counter()
    engine.add_square(total, block)
    return time.perf_counter() - began

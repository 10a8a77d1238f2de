"""Which BLAS multiplies C += XᵀX: SciPy's, or another one at hand that is much faster where they are timed.

Two BLAS round differently, so a stopwatch that chose between equals would make the last bits of F vary from run to run.
Timed once a process, another engine is taken only where it gains more than a busy machine can feign: a build without a
good ssyrk, or units for bfloat16. SciPy's ssyrk is there always. NumPy has a BLAS of its own, and PyTorch another,
which counts only where it is loaded already: its matrix product of column tiles does little more than half of the
arithmetic, as ssyrk does. PyTorch may also multiply in bfloat16 with sums in float32; that is taken only for rows that
bfloat16 holds exactly, and only if a product of such rows agrees with ssyrk's.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np

from ooc_influence.linalg import blas
from ooc_influence.linalg.blas import Floats
from ooc_influence.process import MATMUL_PRECISION

logger = logging.getLogger("ooc_influence")
_TILE = 512  # columns of a tile where only a general product is there
_WIDTH = 1024  # of a temporary tile: 2 MiB, whatever k
_TRIAL = (768, 1536)  # rows and columns of the block that engines are timed on
_TRIALS = 7
_GAIN = 1.5  # times as fast as SciPy's must another engine be: equals are within a quarter, units for bfloat16 beyond 2
_WORTH_TIMING = 512  # columns; for narrower sums any engine does
_AGREEMENT = 1e-6  # of the largest entry
_BAND = 256  # columns of which a thread's part has at least so many
_lock = threading.Lock()
_chosen: dict[tuple[bool, int], Engine] = {}


class Team:
    """Threads that share work, each with a BLAS of one thread; with one, the caller does it. A context.

    A BLAS's own threads spin for a while after each call, where reading would need the cores.

    Parameters
    ----------
    threads : int
        How many.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "ooc_influence-team") if threads > 1 else None

    def run(self, calls: Iterable[Callable[[], object]]) -> None:
        """Make all calls, and wait for them; an error of one of them is raised then."""
        if self._pool is None:
            for call in calls:
                call()
            return
        tasks = [self._pool.submit(call) for call in calls]
        wait(tasks)
        for task in tasks:
            task.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Engine(Protocol):
    """What adds products of float32 rows to a float32 sum, in place.

    Attributes
    ----------
    name : str
        For the log.
    own_threads : bool
        Whether it multiplies in threads of its own, whatever the BLAS is told.
    """

    name: str
    own_threads: bool

    def add_square(self, total: Floats, block: Floats, sign: float = 1.0) -> None:
        """Add ``sign`` XᵀX to the upper triangle of ``total`` (k, k)."""

    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """Add ``sign`` leftᵀ right to ``total`` (k, c)."""


class ScipyEngine:
    """SciPy's BLAS (:mod:`.blas`)."""

    name = "SciPy ssyrk"
    own_threads = False
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
    own_threads = False

    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        for row in range(0, len(total), _TILE):
            for column in range(0, total.shape[1], _WIDTH):
                product = left[:, row : row + _TILE].T @ right[:, column : column + _WIDTH]
                if sign != 1.0:
                    product *= np.float32(sign)
                total[row : row + _TILE, column : column + _WIDTH] += product


class TorchEngine(_Tiled):
    """PyTorch's BLAS.

    Parameters
    ----------
    precision : {"highest", "medium"}
        ``medium`` lets it round factors to bfloat16.
    """

    own_threads = True

    def __init__(self, precision: str = "highest") -> None:
        self._precision = precision
        self.name = "PyTorch addmm" + (" in bfloat16" if precision == "medium" else "")

    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        """See :class:`Engine`."""
        torch: Any = sys.modules["torch"]
        out = torch.from_numpy(total)
        with MATMUL_PRECISION.held(self._precision):
            torch.addmm(out, torch.from_numpy(left).T, torch.from_numpy(right), alpha=sign, out=out)


def square_pieces(engine: Engine, total: Floats, block: Floats, sign: float, threads: int) -> list[Callable[[], None]]:
    """Return calls that together do ``engine.add_square``, as much work for each of so many threads, largest first.

    The triangle is cut into as many bands as threads: rectangles beside the diagonal, twice the work of the triangles
    on it.
    """
    bands = 1 if engine.own_threads else max(1, min(threads, len(total) // _BAND))
    edges = [len(total) * number // bands for number in range(bands + 1)]
    cuts = [slice(first, last) for first, last in pairwise(edges)]
    beside = [(rows, columns) for number, rows in enumerate(cuts) for columns in cuts[number + 1 :]]
    return [
        *(partial(engine.add_product, total[rows, columns], block[:, rows], block[:, columns], sign)
          for rows, columns in beside),
        *(partial(engine.add_square, total[part, part], block[:, part], sign) for part in cuts),
    ]  # fmt: skip


def product_pieces(
    engine: Engine, total: Floats, left: Floats, right: Floats, sign: float, threads: int
) -> list[Callable[[], None]]:
    """Return calls that together do ``engine.add_product``, as much work for each of so many threads."""
    bands = 1 if engine.own_threads else max(1, min(threads, len(total)))
    edges = [len(total) * number // bands for number in range(bands + 1)]
    cuts = [slice(first, last) for first, last in pairwise(edges)]
    return [partial(engine.add_product, total[part], left[:, part], right, sign) for part in cuts]


def choose_engine(columns: int, *, bfloat16: bool = False, team: Team | None = None) -> Engine:
    """Return the engine for sums of a number of columns: SciPy's, where no other is much faster.

    Parameters
    ----------
    columns : int
        Of the rows.
    bfloat16 : bool
        Whether bfloat16 holds every number of them exactly.
    team : Team, optional
        Who will do the work; default the caller.
    """
    if columns < _WORTH_TIMING:
        return ScipyEngine()
    team = team or Team()
    kind = (bfloat16, team.threads)
    with _lock:
        if kind not in _chosen:
            _chosen[kind] = _fastest(bfloat16, team)
        return _chosen[kind]


def _fastest(bfloat16: bool, team: Team) -> Engine:
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
    rounds = [[_timed(engine, total, block, team) for engine in agreeing] for _ in range(_TRIALS)]
    seconds = dict(zip(agreeing, np.min(rounds, axis=0).tolist(), strict=True))
    best = min(agreeing, key=lambda engine: seconds[engine])
    if _GAIN * seconds[best] > seconds[first]:
        best = first
    work = _TRIAL[0] * _TRIAL[1] ** 2 / 1e9
    logger.info(
        "products by %s (%s)",
        best.name, ", ".join(f"{engine.name} {work / took:.0f} GFLOP/s" for engine, took in seconds.items()),
    )  # fmt: skip
    return best


def _timed(engine: Engine, total: Floats, block: Floats, team: Team) -> float:
    began = time.perf_counter()
    team.run(square_pieces(engine, total, block, 1.0, team.threads))
    return time.perf_counter() - began

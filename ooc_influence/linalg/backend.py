"""BLAS functions that add to what is there: C += XᵀX and C += XᵀY in float32, without temporaries.

``ssyrk`` with beta = 1 computes one triangle in place: half the arithmetic of a GEMM. SciPy's Python wrappers hold the
interpreter lock; the same functions of ``scipy.linalg.cython_blas``, called through ctypes, do not, so that reading and
progress continue meanwhile.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.errors import InputError, MemoryBudgetError, MissingExtraError
from ooc_influence.memory import format_bytes
from ooc_influence.process import MATMUL_PRECISION, scipy_linalg

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
Rows = Any  # float32, or those of ooc_influence.linalg.whole for its engine
logger = logging.getLogger("ooc_influence")
_LARGEST = 2**31 - 1  # BLAS counts in 32 bits


@cache
def _blas(name: str, arguments: int) -> Any:
    scipy_linalg()
    from scipy.linalg import cython_blas

    capsule = cython_blas.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)


def _stride(matrix: Floats) -> Any:
    """Return the numbers from one row to the next, as BLAS wants it; each row must be contiguous."""
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


_TILE = 512  # columns of a tile where only a general product is there
_WIDTH = 1024  # of a temporary tile: 2 MiB, whatever k
_TRIAL = (768, 1536)  # rows and columns of the block that engines are timed on
_TRIALS = 7
_GAIN = 1.5  # times as fast as SciPy's must another engine be: equals are within a quarter, units for bfloat16 beyond 2
_WORTH_TIMING = 512  # columns; for narrower sums any engine does
_AGREEMENT = 1e-6  # of the largest entry
_BAND = 256  # the fewest columns of a thread's part
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
    """What adds products of rows to a float32 sum, in place.

    Attributes
    ----------
    name : str
        For the log.
    own_threads : bool
        Whether it multiplies in threads of its own, regardless of the setting of the BLAS.
    """

    name: str
    own_threads: bool

    def add_square(self, total: Floats, block: Rows, sign: float = 1.0) -> None:
        """Add ``sign`` XᵀX to the upper triangle of ``total`` (k, k)."""

    def add_product(self, total: Floats, left: Rows, right: Rows, sign: float = 1.0) -> None:
        """Add ``sign`` leftᵀ right to ``total`` (k, c)."""


class ScipyEngine:
    """SciPy's BLAS (:mod:`.blas`)."""

    name = "SciPy ssyrk"
    own_threads = False
    add_square = staticmethod(add_square)
    add_product = staticmethod(add_product)


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

    @override
    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
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

    @override
    def add_product(self, total: Floats, left: Floats, right: Floats, sign: float = 1.0) -> None:
        torch: Any = sys.modules["torch"]
        out = torch.from_numpy(total)
        with MATMUL_PRECISION.held(self._precision):
            torch.addmm(out, torch.from_numpy(left).T, torch.from_numpy(right), alpha=sign, out=out)


def square_pieces(engine: Engine, total: Floats, block: Rows, sign: float, threads: int) -> list[Callable[[], None]]:
    """Return calls that together do ``engine.add_square``, the work divided evenly among ``threads``, largest first.

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
    engine: Engine, total: Floats, left: Rows, right: Rows, sign: float, threads: int
) -> list[Callable[[], None]]:
    """Return calls that together do ``engine.add_product``, the work divided evenly among ``threads``."""
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
        upper = np.triu(total)
        expected = upper if expected is None else expected
        if np.abs(upper - expected).max() <= _AGREEMENT * expected.max():
            agreeing.append(engine)
    rounds = [[timed_square(engine, total, block, team) for engine in agreeing] for _ in range(_TRIALS)]
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


def timed_square(engine: Engine, total: Floats, block: Rows, team: Team) -> float:
    """Return the seconds in which a team adds the square of a block."""
    began = time.perf_counter()
    team.run(square_pieces(engine, total, block, 1.0, team.threads))
    return time.perf_counter() - began


def parse_device(device: str | None) -> str | None:
    """Return the name of a torch device that is there; None for NumPy.

    Raises
    ------
    InputError
        If torch knows no such device, or it is not there.
    MissingExtraError
        If torch is not installed.
    """
    if device is None:
        return None
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"expected torch for device={device!r}; received none: pip install torch") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"expected a device such as 'cpu' or 'cuda'; received {device!r} ({reason}): choose another"
        ) from error
    return str(device)


def check_device_memory(device: str, needed: int, stage: str) -> None:
    """Check that a device has ``needed`` bytes free; one that uses the memory of the process is not checked.

    Raises
    ------
    MemoryBudgetError
        If it has too few.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryBudgetError(
            f"{stage} needs {format_bytes(needed)} on {device}, which has {format_bytes(free)} free: use fewer "
            "workers or a smaller rank, or fit without a device"
        )


def free_bytes(device: str) -> int | None:
    """Return the free bytes of a device; None for one that uses the process's memory."""
    torch: Any = sys.modules["torch"]
    if torch.device(device).type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def row_squares(rows: Any) -> npt.NDArray[np.float64]:
    """Return ‖x‖² of float32 rows, (b,), summed in float64: of an array, or of a tensor wherever it is."""
    if isinstance(rows, np.ndarray):
        return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    torch: Any = sys.modules["torch"]
    return np.asarray(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square_().cpu().numpy())

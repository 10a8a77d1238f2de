"""How fast this machine is: a calibration of about two seconds."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ooc_influence.errors import InputError
from ooc_influence.linalg import symmetric_eigen
from ooc_influence.linalg.engines import choose_engine
from ooc_influence.memory import format_bytes
from ooc_influence.store.encoding import Encoding
from ooc_influence.store.local import map_file
from ooc_influence.stripes import blas_threads

_SIDE = 1024  # of the matrices multiplied
_EIGEN_SIDE = 448
_FILE = 128 * 2**20
_STEP = 8 * 2**20
_SECONDS = 0.3  # for each rate


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second, with all cores.

    Attributes
    ----------
    gemm, syrk, double : float
        FLOP of float32 products, of float32 sums XᵀX (m k² each, one triangle) and of float64 products.
    eigen : float
        FLOP of a float64 eigendecomposition, counted as 9 d³.
    read, write : float
        Bytes from and to the disk.
    convert : float
        Bytes of float32 rows made of mapped float16 ones.
    """

    gemm: float
    syrk: float
    double: float
    eigen: float
    read: float
    write: float
    convert: float

    @classmethod
    def measure(cls, folder: str | Path = ".", *, gflops: float | None = None, read: float | None = None) -> Rates:
        """Measure what is not given.

        Parameters
        ----------
        folder : path
            Where the stores will be: a file is written there, read and removed.
        gflops : float, optional
            10⁹ FLOP of float32 products in a second.
        read : float, optional
            Bytes read in a second.

        Raises
        ------
        InputError
            For rates that are not positive.
        """
        for name, value in (("gflops", gflops), ("read rate", read)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"expected a {name} above 0; received {value}")
        with blas_threads(1):
            products = _products() if gflops is None else [gflops * 1e9 * part for part in (1, 1, 0.5, 0.15)]
        gemm, syrk, double, eigen = products
        found, write, convert = _disk(Path(folder))
        return cls(gemm, syrk, double, eigen, found if read is None else read, write, convert)

    def __str__(self) -> str:
        flops = ", ".join(
            f"{name} {value / 1e9:.3g} GFLOP/s"
            for name, value in (("sgemm", self.gemm), ("ssyrk", self.syrk), ("eigh", self.eigen))
        )
        return f"{flops}, read {format_bytes(self.read)}/s, convert {format_bytes(self.convert)}/s"


def _repeated(work: Callable[[], object]) -> float:
    """Return the median seconds of ``work``, repeated for a while after once to warm up."""
    work()
    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not taken or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def _products() -> list[float]:
    generator = np.random.default_rng(0)
    left = generator.standard_normal((_SIDE, _SIDE), np.float32)
    out, wide = np.empty_like(left), left.astype(np.float64)
    wide_out, small = np.empty_like(wide), wide[:_EIGEN_SIDE, :_EIGEN_SIDE]
    engine = choose_engine(_SIDE)
    square = small @ small.T
    timed: list[tuple[int, Callable[[], object]]] = [
        (2 * _SIDE**3, lambda: np.matmul(left, left.T, out=out)),
        (_SIDE**3, lambda: engine.add_square(out, left)),
        (2 * _SIDE**3, lambda: np.matmul(wide, wide, out=wide_out)),
        (9 * _EIGEN_SIDE**3, lambda: symmetric_eigen(square.copy())),
    ]
    return [work / _repeated(call) for work, call in timed]


def _disk(folder: Path) -> tuple[float, float, float]:
    """Return the bytes read, written and converted in a second, by a file in ``folder``, or beside other files."""
    place = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    data = np.random.default_rng(0).standard_normal(_STEP // 4, np.float32).astype(np.float16)
    raw = np.concatenate([data, data]).view(np.uint8)
    with tempfile.NamedTemporaryFile(prefix=".ooc_influence-", dir=place, buffering=0) as file:
        began, size = time.perf_counter(), 0
        while size < _FILE and (size < 2 * _STEP or time.perf_counter() < began + _SECONDS):
            size += file.write(raw[:_STEP].data)
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - began)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(_STEP)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        read = size / (time.perf_counter() - began)
        half = map_file(file.name).view(np.float16).reshape(-1, 1024)
        rows, scale = np.empty(half.shape, np.float32), np.ones(len(half), np.float32)
        convert = rows.nbytes / _repeated(lambda: Encoding("float16", 1024).decode_into(half, scale, rows))
    return read, write, convert

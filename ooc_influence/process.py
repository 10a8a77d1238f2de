"""Settings of the whole process that several threads need at once: the first one sets, the last one restores.

If each thread saved and restored for itself, one would leave behind what another had set: of two that overlap, the
later one saves the setting of the earlier.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

import threadpoolctl


class ProcessSetting:
    """A setting of the whole process.

    Parameters
    ----------
    read : callable
        Returns what is set, for ``write`` to restore.
    write : callable
        Sets a value.
    exclusive : bool
        Who needs another value waits until no thread holds one; otherwise the value requested last is set.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object], *, exclusive: bool = False) -> None:
        self._read, self._write, self._exclusive = read, write, exclusive
        self._change = threading.Condition()
        self._holders: list[Any] = []
        self._before: Any = None

    @contextlib.contextmanager
    def held(self, value: Any) -> Iterator[None]:
        """Set ``value`` while the context is open."""
        with self._change:
            self._change.wait_for(lambda: not self._exclusive or not self._holders or self._holders[-1] == value)
            if not self._holders:
                self._before = self._read()
            if not self._holders or self._holders[-1] != value:
                self._write(value)
            self._holders.append(value)
        try:
            yield
        finally:
            with self._change:
                current = self._holders[-1]
                self._holders.remove(value)
                if not self._holders:
                    self._write(self._before)
                    self._before = None
                    self._change.notify_all()
                elif self._holders[-1] != current:
                    self._write(self._holders[-1])

    def include_new(self) -> None:
        """Set what is held of parts that came later, too, and restore theirs at the end; values are dicts by part."""
        with self._change:
            if self._holders:
                self._before = self._read() | self._before
                self._write(self._holders[-1])


def _torch() -> Any:
    return sys.modules["torch"]


class _ObjectInfo(ctypes.Structure):
    """``dl_phdr_info`` of <link.h>, whose last two members count the libraries loaded and unloaded so far."""

    _fields_ = (
        ("address", ctypes.c_void_p), ("name", ctypes.c_char_p), ("headers", ctypes.c_void_p),
        ("number", ctypes.c_uint16), ("loaded", ctypes.c_ulonglong), ("unloaded", ctypes.c_ulonglong),
    )  # fmt: skip


_Visit = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_ObjectInfo), ctypes.c_size_t, ctypes.c_void_p)


@cache
def _visit_libraries() -> Any:
    return getattr(ctypes.CDLL(None), "dl_iterate_phdr", None) if sys.platform == "linux" else None


def _loads() -> tuple[int, int] | None:
    """Return how many libraries were loaded and unloaded so far; None where the system does not say."""
    counts: list[tuple[int, int]] = []

    def visit(info: Any, size: int, _: Any) -> int:
        if size >= ctypes.sizeof(_ObjectInfo):
            counts.append((info.contents.loaded, info.contents.unloaded))
        return 1  # every library has the same counts

    iterate = _visit_libraries()
    if iterate is not None:
        iterate(_Visit(visit), None)
    return counts[0] if counts else None


@lru_cache(maxsize=1)
def _blas_libraries(loads: tuple[int, int] | None) -> list[Any]:
    """Return the BLAS libraries there are after ``loads``: looking for them reads the names of all that are loaded."""
    return list(threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers)


def _libraries(*, of_threads: bool) -> list[Any]:
    """Return the BLAS libraries that are loaded: those with a limit for each thread, or for the process."""
    loads = _loads()
    libraries = _blas_libraries.__wrapped__(None) if loads is None else _blas_libraries(loads)
    return [
        library
        for library in libraries
        if of_threads == (library.internal_api == "openblas" and library.threading_layer == "openmp")
    ]


def _limit_process(limits: int | dict[str, int]) -> None:
    for library in _libraries(of_threads=False):
        limit = limits.get(library.filepath) if isinstance(limits, dict) else limits
        if limit is not None:
            library.set_num_threads(limit)
    # from threadpoolctl 3.8 on the first thread that sets one is the only one that may, until it releases that right
    release = getattr(getattr(threadpoolctl, "OpenBLASController", None), "clear_controlling_thread", None)
    if release is not None:
        release()


_BLAS_THREADS = ProcessSetting(
    lambda: {library.filepath: library.num_threads for library in _libraries(of_threads=False)}, _limit_process
)


def blas_limit() -> int | None:
    """Return how many threads a BLAS call may use; None where no BLAS says."""
    return min((library.num_threads for kind in (False, True) for library in _libraries(of_threads=kind)), default=None)


@contextlib.contextmanager
def limit_blas(threads: int) -> Iterator[None]:
    """Let BLAS calls use a number of threads while the context is open."""
    before = [(library, library.num_threads) for library in _libraries(of_threads=True)]
    for library, _ in before:
        library.set_num_threads(threads)
    try:
        with _BLAS_THREADS.held(threads):
            yield
    finally:
        for library, own_threads in before:
            library.set_num_threads(own_threads)


@contextlib.contextmanager
def limit_openmp(threads: int) -> Iterator[None]:
    """Let PyTorch, called by this thread, use a number of threads while the context is open.

    ``torch.set_num_threads`` would set it for threads that others start meanwhile, too. Of a PyTorch without OpenMP,
    nothing is limited.
    """
    _torch().get_num_threads()  # PyTorch sets OpenMP's number when a thread first asks for it: not after us
    before = [(library, library.num_threads) for library in _openmp_libraries()]
    try:
        for library, _ in before:
            library.set_num_threads(threads)
        yield
    finally:
        for library, own_threads in before:
            library.set_num_threads(own_threads)


@cache
def _openmp_libraries() -> list[Any]:
    return list(threadpoolctl.ThreadpoolController().select(user_api="openmp").lib_controllers)


@cache
def scipy_linalg() -> Any:
    """Return ``scipy.linalg``, whose BLAS has the limit that is held at the moment, as if it had been loaded before.

    It is loaded on first use: with what it imports, it takes longer to load than a query of a small store to answer.
    (SciPy's packages have a BLAS of their own where its threads are limited for the process; an OpenBLAS with a limit
    for each thread is NumPy's too, so loaded already.)
    """
    import scipy.linalg

    _BLAS_THREADS.include_new()
    return scipy.linalg


# what a product of float32 tensors may round its factors to: another thread's must not round ours
MATMUL_PRECISION = ProcessSetting(
    lambda: _torch().get_float32_matmul_precision(),
    lambda value: _torch().set_float32_matmul_precision(value),
    exclusive=True,
)
# PyTorch's fused encoder layer does not call the layers inside it
FUSED_ATTENTION = ProcessSetting(
    lambda: _torch().backends.mha.get_fastpath_enabled(),
    lambda value: _torch().backends.mha.set_fastpath_enabled(value),
)

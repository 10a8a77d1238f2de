"""Settings of the whole process that threads hold at the same time: the first one sets, the last one restores.

Each thread saving and restoring for itself leaves behind what another one had set: of two that overlap, the later one
saves the setting of the earlier.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
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
        Whoever wants another value waits until nobody holds one; otherwise the value asked for last is set.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object], *, exclusive: bool = False) -> None:
        self._read, self._write, self._exclusive = read, write, exclusive
        self._change = threading.Condition()
        self._held: list[Any] = []
        self._before: Any = None

    @contextlib.contextmanager
    def held(self, value: Any) -> Iterator[None]:
        """Set ``value`` while the context is open."""
        with self._change:
            self._change.wait_for(lambda: not self._exclusive or not self._held or self._held[-1] == value)
            if not self._held:
                self._before = self._read()
            if not self._held or self._held[-1] != value:
                self._write(value)
            self._held.append(value)
        try:
            yield
        finally:
            with self._change:
                current = self._held[-1]
                self._held.remove(value)
                if not self._held:
                    self._write(self._before)
                    self._before = None
                    self._change.notify_all()
                elif self._held[-1] != current:
                    self._write(self._held[-1])


def _torch() -> Any:
    return sys.modules["torch"]


def _libraries(*, of_threads: bool) -> list[Any]:
    """Return the BLAS libraries that are loaded: those with a limit for each thread, or for the process."""
    found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    return [
        library
        for library in found
        if of_threads == (library.internal_api == "openblas" and library.threading_layer == "openmp")
    ]


def _limit_process(limits: int | dict[str, int]) -> None:
    for library in _libraries(of_threads=False):
        limit = limits.get(library.filepath) if isinstance(limits, dict) else limits
        if limit is not None:
            library.set_num_threads(limit)
    # from threadpoolctl 3.8 on the first thread that sets one is the only one that may, until it says so
    release = getattr(getattr(threadpoolctl, "OpenBLASController", None), "clear_controlling_thread", None)
    if release is not None:
        release()


_BLAS_THREADS = ProcessSetting(
    lambda: {library.filepath: library.num_threads for library in _libraries(of_threads=False)}, _limit_process
)


def blas_limit() -> int | None:
    """Return how many threads a BLAS call may use; None without a BLAS that tells."""
    return min((library.num_threads for kind in (False, True) for library in _libraries(of_threads=kind)), default=None)


@contextlib.contextmanager
def limit_blas(threads: int) -> Iterator[None]:
    """Let BLAS calls use a number of threads while the context is open."""
    own = [(library, library.num_threads) for library in _libraries(of_threads=True)]
    for library, _ in own:
        library.set_num_threads(threads)
    try:
        with _BLAS_THREADS.held(threads):
            yield
    finally:
        for library, before in own:
            library.set_num_threads(before)


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

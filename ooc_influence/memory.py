"""The memory budget: what a stage will need, as a pure function of shapes, refused before it starts.

A stage's projected peak is::

    reserved + WORKING + fixed + workers * (per_worker + block_rows * bytes_per_row)

``reserved`` is what the process already holds, ``fixed`` what exists once (outputs, the curvature), ``per_worker`` what
each worker slot holds whatever its block (accumulators), ``bytes_per_row`` what one row of a block costs (inputs and
their copies, its share of the output). None of them depends on the number of rows in the store. When the budget is
tight, blocks shrink; when even the smallest block does not fit, the call refuses and says what would.
"""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import psutil

from ooc_influence.errors import InputError, MemoryBudgetError

WORKING = 96 * 2**20  # BLAS work buffers, Zarr's chunks in flight, Dask: what every stage needs besides its own
BLOCK_BYTES = 64 * 2**20  # a block's float32 rows: larger ones gain nothing
PRODUCT_ROWS = 1024  # but where it is multiplied by a large matrix: reading that is shared by so many rows
DEFAULT_SHARE = 0.5  # of what is free, when no budget is given: the page cache and the user need the rest
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes from ``4294967296``, ``"4GiB"``, ``"500 MB"``.

    Raises
    ------
    InputError
        If the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
    if match is None or float(match[1]) <= 0 or match[2] == "I":
        raise InputError(f"expected a memory size such as '4GiB' or a number of bytes; received {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(number: float) -> str:
    """Return bytes as text with a binary unit, three digits (``"9.40 GiB"``)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def process_anonymous() -> int:
    """Return this process's anonymous resident bytes: what mmapped files do not count towards."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.M)
        if match is not None:
            return int(match[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def available() -> int:
    """Return the bytes this process may still take: free memory, or less where a cgroup limits it."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError, TypeError):
        text = limit.read_text().strip()
        cached = re.search(r"^inactive_file (\d+)", used.with_name("memory.stat").read_text(), re.M)
        if text != "max":
            free = min(free, int(text) - int(used.read_text()) + int(cached[1] if cached else 0))
    return max(free, 0)


@dataclass(frozen=True)
class Need:
    """What a stage needs, in bytes; see the module's formula.

    Attributes
    ----------
    stage : str
        Its name in messages, with the sizes that matter (``"fisher, k=4096"``).
    fixed, per_worker, per_row : int
        Bytes held once, by each worker, and for each row of a worker's block.
    min_rows, max_rows : int
        The smallest block worth running and the largest that gains anything.
    advice : str
        What else the user could do, for the refusal.
    """

    stage: str
    fixed: int
    per_worker: int
    per_row: int
    min_rows: int = 16
    max_rows: int = 4096
    advice: str = ""

    def peak(self, block_rows: int, workers: int, reserved: int) -> int:
        """Return the projected peak in bytes."""
        return reserved + WORKING + self.fixed + workers * (self.per_worker + block_rows * self.per_row)

    def of_rows(self, rows: int) -> Need:
        """Return the same need for blocks of exactly ``rows``."""
        return replace(self, min_rows=rows, max_rows=rows)


def budget_bytes(memory: int | str | None) -> int:
    """Return the budget in bytes: as given, or a share of what is free plus what the process holds."""
    if memory is not None:
        return parse_bytes(memory)
    return process_anonymous() + int(available() * DEFAULT_SHARE)


def plan_block_rows(need: Need, memory: int | str | None, workers: int = 1, reserved: int | None = None) -> int:
    """Return how many rows a block may have so that ``need`` fits the budget: a power of two.

    Powers of two keep the grid of blocks, and with it every rounding, the same over a range of budgets.

    Raises
    ------
    MemoryBudgetError
        If the smallest block does not fit; the message names the two numbers and the ways out.
    """
    budget = budget_bytes(memory)
    held = process_anonymous() if reserved is None else reserved
    rows = need.max_rows
    while rows > need.min_rows and need.peak(rows, workers, held) > budget:
        rows = max(need.min_rows, rows // 2)
    smallest = need.peak(rows, workers, held)
    if smallest > budget:
        ways = [f"--memory {format_bytes(smallest * 1.05).replace(' ', '')}"]
        if workers > 1 and need.peak(need.min_rows, 1, held) <= budget:
            ways.insert(0, "--workers 1")
        if need.advice:
            ways.append(need.advice)
        raise MemoryBudgetError(
            f"{need.stage} needs {format_bytes(smallest)} with {workers} worker{'s' if workers > 1 else ''}, "
            f"budget {format_bytes(budget)}: use {', or '.join(ways)}"
        )
    return rows


def block_limit(k: int, *, least: int = 64) -> int:
    """Return the largest block of rows of ``k`` float32 that gains anything, a power of two; at least ``least``."""
    rows = max(least, BLOCK_BYTES // (4 * k))
    return 1 << min(13, rows.bit_length() - 1)


class PeakMemory:
    """Peak anonymous memory of this process while the context is open, sampled every few milliseconds.

    Attributes
    ----------
    peak, start : int
        Bytes: the largest sample, and the first.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.start = self.peak = process_anonymous()
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, process_anonymous())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, process_anonymous())

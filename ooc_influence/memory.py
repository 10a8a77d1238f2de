"""Bounded memory: what this process may take, and models of what a stage takes, as functions of shapes.

A container, a systemd slice or a job of SLURM is a control group that limits memory and the share of the cores, and the
limits of every group above it apply too. The process's groups are named in ``/proc/self/cgroup``, and
``/proc/self/mountinfo`` says where their files are mounted: both versions of the interface may be there at once, each
controller in one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import psutil

from ooc_influence.errors import InputError, MemoryBudgetError, counted

_ROOT = Path("/")
_UNLIMITED = 2**62  # version 1 reports no limit as a number of this size


def memory_left(root: Path = _ROOT) -> int | None:
    """Return the bytes that the tightest group around this process has left; None where no group limits them.

    File pages that the system would give up first (inactive ones) count as free.

    Parameters
    ----------
    root : Path
        Of the file system.
    """
    left = []
    for folder, version in _groups("memory", root):
        stat = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.M))
        if version == 2:
            limits = [_text(folder / "memory.max"), _text(folder / "memory.high")]
            used, inactive = _text(folder / "memory.current"), stat.get("inactive_file", 0)
        else:  # the statistics include the limits of groups above, whose files may not be mounted
            limits = [_text(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit", "")]
            used, inactive = _text(folder / "memory.usage_in_bytes"), stat.get("total_inactive_file", 0)
        bounds = [int(limit) for limit in limits if limit.isdigit() and int(limit) < _UNLIMITED]  # nor "max"
        if bounds and used.isdigit():
            left.append(min(bounds) - int(used) + int(inactive))
    return max(0, min(left)) if left else None


def cpu_share(root: Path = _ROOT) -> float | None:
    """Return how many cores' time the tightest group around this process may use; None where no group limits it.

    Parameters
    ----------
    root : Path
        Of the file system.
    """
    shares = []
    for folder, version in _groups("cpu", root):
        if version == 2:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # not "max", nor -1
            shares.append(int(quota) / int(period))
    return min(shares) if shares else None


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folder and version of every group that may limit this process, from its own outwards."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        version = 1 if names else 2
        if names and controller not in names.split(","):
            continue
        for top, seen in _mounts(version, controller, root):
            folder = seen / _below(group, top)
            while True:
                yield folder, version
                if folder == seen:
                    break
                folder = folder.parent


def _mounts(version: int, controller: str, root: Path) -> Iterator[tuple[PurePosixPath, Path]]:
    """Yield which part of a hierarchy is mounted, and where."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, dash, source = line.partition(" - ")
        fields, (kind, *_, options) = mount.split(" "), source.split(" ") if dash else ("", "")
        if kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split(","):
            top, seen = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
            yield PurePosixPath(top), root / seen.lstrip("/")


def _below(group: str, top: PurePosixPath) -> PurePosixPath:
    """Return a group's path below the mounted one; an empty path for a group elsewhere, as a container sees it."""
    path = PurePosixPath(group)
    return path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace").strip()
    return ""


WORKING = 96 * 2**20  # of every stage, beside its model: BLAS buffers, Zarr's chunks in flight, Dask
BLOCK_ROWS = 2**13  # of a block, however narrow they are, unless said otherwise
BLOCK_BYTES = 64 * 2**20  # a block's float32 rows: larger ones gain nothing
# copies of a batch's float32 rows on the host at the peak: themselves, a layer's part, those being stored (measured:
# 3.3 to 3.5)
BATCH_COPIES = 3.5
PRODUCT_ROWS = 1024  # but blocks that are multiplied by a large matrix: reading it is shared by this many rows
DEFAULT_SHARE = 0.5  # of the free memory, where no budget is given: the page cache and the user need the rest
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


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
    """Return this process's anonymous resident bytes, to which mapped files do not count."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.M)
        if match is not None:
            return int(match[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def release_freed() -> None:
    """Return freed memory that the C library has kept to the system: it would count as resident."""
    if _malloc_trim is not None:
        _malloc_trim(ctypes.c_size_t(0))


def available(wanted: int = 0) -> int:
    """Return the bytes this process may still take: free memory, or less where a control group limits it.

    Parameters
    ----------
    wanted : int
        Where less than this is free, memory that the C library has kept is released first.
    """
    free = _free()
    if free < wanted:
        release_freed()
        free = _free()
    return free


def _free() -> int:
    free, left = int(psutil.virtual_memory().available), memory_left()
    return max(0, free if left is None else min(free, left))


@dataclass(frozen=True)
class ProblemSize:
    """The shapes that memory models are functions of: of a store's rows, and of what is asked of them.

    Attributes
    ----------
    k : int
        Numbers in a stored row.
    rows : int
        Rows of the store, or those that a fit uses.
    workers : int
        Tasks that share the memory of a process.
    reading_bytes : int
        Held by a worker to read the store.
    row_bytes : int
        Of a row as it is stored.
    index_bytes : int
        Of what is kept in memory for the rows of a fit, all together: numbers, weights and tombstones.
    staging_bytes : int
        Held for each row of a block to copy it to a device; 0 where blocks are multiplied on the host.
    queries, dampings : int
        Query rows, and λs at once.
    modules : tuple of (first, last)
        Columns of each module; empty where rows are reduced.
    path : str
        The store, as commands name it.
    """

    k: int
    rows: int
    workers: int = 1
    reading_bytes: int = 0
    row_bytes: int = 0
    index_bytes: int = 0
    staging_bytes: int = 0
    queries: int = 0
    dampings: int = 1
    modules: tuple[tuple[int, int], ...] = ()
    path: str = "TRAIN"

    @property
    def alone(self) -> Self:
        """The same size with one worker, as alternatives are priced."""
        return replace(self, workers=1)


@dataclass(frozen=True)
class MemoryModel:
    """The memory that a stage takes, in bytes, as a linear function of workers and the rows of their blocks.

    Functions of a :class:`ProblemSize` make one; a call sizes its blocks, refuses, and is planned by the same model.

    Attributes
    ----------
    stage : str
        Its name in messages, with the sizes that matter (``"fisher for k=4096"``).
    fixed, per_worker, per_row : int
        Bytes held once, by each worker, and for each row of a worker's block.
    workers : int
        Tasks that share the memory.
    min_rows, max_rows : int
        The smallest block worth running and the largest that gains anything.
    advice : str
        What else the user could do, for the refusal.
    alternatives : callable or None
        Given the budget, returns other computations of the result; a refusal lists those that fit, with their prices.
    """

    stage: str
    fixed: int
    per_worker: int
    per_row: int
    workers: int = 1
    min_rows: int = 16
    max_rows: int = 4096
    advice: str = ""
    alternatives: Alternatives | None = field(default=None, compare=False)

    def peak(self, block_rows: int, reserved: int = 0) -> int:
        """Return the projected peak in bytes, beside the bytes that the process has ``reserved`` already."""
        return reserved + WORKING + self.fixed + self.workers * (self.per_worker + block_rows * self.per_row)


class Alternative(NamedTuple):
    """Another computation of a result: how to ask for it, and its memory. The first ``{}`` becomes the price."""

    text: str
    model: MemoryModel


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a process may take.

    Attributes
    ----------
    limit, reserved : int
        Bytes in all, and those the process holds already.
    """

    limit: int
    reserved: int

    @classmethod
    def of(cls, memory: int | str | None) -> Self:
        """Return the budget of this process: ``memory``, or by default what it holds and half of what is free.

        Freed memory is released first. That takes milliseconds for every 10 MB: a loop that takes the same memory
        again and again calls :func:`process_anonymous` instead.
        """
        release_freed()
        reserved = process_anonymous()
        return cls(reserved + int(available() * DEFAULT_SHARE) if memory is None else parse_bytes(memory), reserved)

    def price(self, model: MemoryModel) -> int:
        """Return the projected peak of a model with its smallest blocks."""
        return model.peak(model.min_rows, self.reserved)

    def fits(self, model: MemoryModel) -> bool:
        """Return whether a model fits, with its smallest blocks."""
        return self.price(model) <= self.limit

    def block_rows(self, model: MemoryModel) -> int:
        """Return the rows of the largest blocks with which a model fits, or those of its smallest blocks.

        Halving from ``max_rows`` keeps the grid of blocks, and with it every rounding, the same over a range of
        budgets.
        """
        rows = model.max_rows
        while rows > model.min_rows and model.peak(rows, self.reserved) > self.limit:
            rows = max(model.min_rows, rows // 2)
        return rows

    def plan(self, model: MemoryModel) -> int:
        """Return the rows of a block, as :meth:`block_rows`.

        Raises
        ------
        MemoryBudgetError
            If the smallest blocks do not fit: with what the stage needs, the budget, and every alternative that fits.
        """
        if not self.fits(model):
            raise MemoryBudgetError(self._refusal(model))
        return self.block_rows(model)

    def largest(self, make: Callable[[int], MemoryModel], most: int) -> int:
        """Return the largest power of two, at most ``most``, whose model fits; 0 where none does."""
        size = 1 << max(1, most).bit_length() - 1
        while size and not self.fits(make(size)):
            size //= 2
        return size

    def _refusal(self, model: MemoryModel) -> str:
        price, alone = self.price(model), replace(model, workers=1)
        advice = [f"--memory {format_bytes(price * 1.05).replace(' ', '')}"]
        if model.workers > 1 and self.fits(alone):
            advice.insert(0, f"--workers 1 ({format_bytes(self.price(alone))})")
        for text, other in model.alternatives(self) if model.alternatives is not None else ():
            if self.fits(other):
                advice.append(text.replace("{}", format_bytes(self.price(other)), 1))
        if model.advice:
            advice.append(model.advice)
        return (
            f"{model.stage} needs {format_bytes(price)} with {counted(model.workers, 'worker')}, "
            f"budget {format_bytes(self.limit)}: use {', or '.join(advice)}"
        )


Alternatives = Callable[[MemoryBudget], Iterable[Alternative]]


def block_limit(k: int, *, least: int = 64, most: int = BLOCK_ROWS) -> int:
    """Return the largest useful block of float32 rows (·, k), in rows: a power of two, at least about ``least``."""
    rows = max(least, BLOCK_BYTES // (4 * k))
    return min(most, 1 << rows.bit_length() - 1)


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

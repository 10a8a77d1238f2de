"""Limits that the system sets this process's control group: its memory and its share of the cores.

A container, a systemd slice or a job of SLURM is a control group, and the limits of every group above it hold too. The
process's own groups are named in ``/proc/self/cgroup``, and ``/proc/self/mountinfo`` says where their files are seen:
both versions of the interface may be there at once, with a controller in one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import psutil

from ooc_influence.errors import InputError, MemoryBudgetError

_ROOT = Path("/")
_UNLIMITED = 2**62  # version 1 says "none" by a number of this size


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
        else:  # what its statistics name is the tightest limit of groups above, too, whose files may be out of sight
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
    """Yield what part of a hierarchy is mounted, and where."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        place, dash, source = line.partition(" - ")
        fields, (kind, *_, options) = place.split(" "), source.split(" ") if dash else ("", "")
        if kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split(","):
            top, seen = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
            yield PurePosixPath(top), root / seen.lstrip("/")


def _below(group: str, top: PurePosixPath) -> PurePosixPath:
    """Return a group's path below what is mounted; of a group elsewhere (a container's view), nothing."""
    path = PurePosixPath(group)
    return path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace").strip()
    return ""


WORKING = 96 * 2**20  # BLAS work buffers, Zarr's chunks in flight, Dask: what every stage needs besides its own
BLOCK_BYTES = 64 * 2**20  # a block's float32 rows: larger ones gain nothing
PRODUCT_ROWS = 1024  # but where it is multiplied by a large matrix: reading that is shared by so many rows
DEFAULT_SHARE = 0.5  # of what is free, when no budget is given: the page cache and the user need the rest
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's
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


def release_freed() -> None:
    """Hand memory that was freed to the system, where the C library has kept it: it would count as held."""
    if _malloc_trim is not None:
        _malloc_trim(ctypes.c_size_t(0))


def held_now() -> int:
    """Return the anonymous bytes that this process holds, without what was freed.

    Microseconds, or milliseconds for every 10 MB that are released. A loop that takes the same memory again and again
    calls :func:`process_anonymous`: releasing it there would cost what keeping it saves.
    """
    release_freed()
    return process_anonymous()


def available(need: int = 0) -> int:
    """Return the bytes this process may still take: free memory, or less where a control group limits it.

    Parameters
    ----------
    need : int
        Where less than this is free, memory that was freed but kept is released first.
    """
    free = _free()
    if free < need:
        release_freed()
        free = _free()
    return free


def _free() -> int:
    free, left = int(psutil.virtual_memory().available), memory_left()
    return max(0, free if left is None else min(free, left))


@dataclass(frozen=True)
class MemoryModel:
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
    ways : callable or None
        Given the room there is, returns other ways to the result; the refusal names those that fit, with their prices.
    """

    stage: str
    fixed: int
    per_worker: int
    per_row: int
    min_rows: int = 16
    max_rows: int = 4096
    advice: str = ""
    alternatives: Ways | None = None

    def peak(self, block_rows: int, workers: int, reserved: int) -> int:
        """Return the projected peak in bytes."""
        return reserved + WORKING + self.fixed + workers * (self.per_worker + block_rows * self.per_row)

    def of_rows(self, rows: int) -> MemoryModel:
        """Return the same need for blocks of exactly ``rows``."""
        return replace(self, min_rows=rows, max_rows=rows)


class Alternative(NamedTuple):
    """Another way to a result: what to say, and what it needs. The first ``{}`` becomes the price in bytes."""

    text: str
    need: MemoryModel


@dataclass(frozen=True)
class MemoryBudget:
    """What a process may take.

    Attributes
    ----------
    budget, held : int
        Bytes in all, and those it holds already.
    """

    budget: int
    held: int

    @classmethod
    def of(cls, memory: int | str | None, held: int | None = None) -> MemoryBudget:
        """Return the room in a budget; by default for this process as it is."""
        return cls(budget_bytes(memory), held_now() if held is None else held)

    def price(self, need: MemoryModel, workers: int = 1) -> int:
        """Return the least projected peak of a need."""
        return need.peak(need.min_rows, workers, self.held)

    def fits(self, need: MemoryModel, workers: int = 1) -> bool:
        """Return whether a need fits, with the smallest blocks."""
        return self.price(need, workers) <= self.budget

    def largest(self, make: Callable[[int], MemoryModel], most: int) -> int:
        """Return the largest power of two, at most ``most``, whose need fits; 0 where none does."""
        size = 1 << max(1, most).bit_length() - 1
        while size and not self.fits(make(size)):
            size //= 2
        return size


Ways = Callable[[MemoryBudget], Iterable[Alternative]]


def budget_bytes(memory: int | str | None) -> int:
    """Return the budget in bytes: as given, or a share of what is free plus what the process holds."""
    if memory is not None:
        return parse_bytes(memory)
    return held_now() + int(available() * DEFAULT_SHARE)


def plan_block_rows(need: MemoryModel, memory: int | str | None, workers: int = 1, reserved: int | None = None) -> int:
    """Return how many rows a block may have so that ``need`` fits the budget: a power of two.

    Powers of two keep the grid of blocks, and with it every rounding, the same over a range of budgets.

    Raises
    ------
    MemoryBudgetError
        If the smallest block does not fit; the message names the two numbers and the ways out.
    """
    room = MemoryBudget.of(memory, reserved)
    rows = need.max_rows
    while rows > need.min_rows and need.peak(rows, workers, room.held) > room.budget:
        rows = max(need.min_rows, rows // 2)
    if need.peak(rows, workers, room.held) > room.budget:
        raise MemoryBudgetError(_refusal(need, room, workers))
    return rows


def _refusal(need: MemoryModel, room: MemoryBudget, workers: int) -> str:
    """Return what a stage needs, the budget, and every way out with what it would need."""
    smallest = room.price(need, workers)
    alternatives = [f"--memory {format_bytes(smallest * 1.05).replace(' ', '')}"]
    if workers > 1 and room.fits(need):
        alternatives.insert(0, f"--workers 1 ({format_bytes(room.price(need))})")
    for way in need.alternatives(room) if need.alternatives is not None else ():
        if room.fits(way.need):
            alternatives.append(way.text.replace("{}", format_bytes(room.price(way.need)), 1))
    if need.advice:
        alternatives.append(need.advice)
    return (
        f"{need.stage} needs {format_bytes(smallest)} with {workers} worker{'s' if workers > 1 else ''}, "
        f"budget {format_bytes(room.budget)}: use {', or '.join(alternatives)}"
    )


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

"""Limits that the system sets this process's control group: its memory and its share of the cores.

A container, a systemd slice or a job of SLURM is a control group, and the limits of every group above it hold too. The
process's own groups are named in ``/proc/self/cgroup``, and ``/proc/self/mountinfo`` says where their files are seen:
both versions of the interface may be there at once, with a controller in one of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

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

"""One writer per range: a claim, kept alive by a heartbeat, that another process takes over once its owner is dead.

A claim is a small file ``commits/.claim-<name>.<generation>`` (inside an array's folder, where Zarr does not look for
members) that says who holds it. It is created exclusively (a hard link, or a conditional PUT), so only one of two
processes gets it. Whoever takes over creates the next generation; an owner that finds a later one than its own has
lost the claim and must not write: it checks before every commit, before the data and before the record. Whether an
owner is dead is decided by its process if that certainly ran on this machine: since the same boot, in the same process
namespace. Otherwise its heartbeat decides: two machines may have the same name.

Ranges may differ from run to run, so a new claim is checked against all others once it is made; of two overlapping
claims made at the same moment, one or both are refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ooc_influence.errors import InputError, StoreBusyError, writing
from ooc_influence.store import local, paths
from ooc_influence.store.layout import Layout
from ooc_influence.store.paths import StorePath, is_local

HEARTBEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without a heartbeat after which an owner that may be on another machine counts as dead
_CLAIM = re.compile(r"\.claim-([A-Za-z0-9-]+)\.(\d+)")


@cache
def _machine() -> dict[str, str]:
    """Return what distinguishes machines, their boots and their containers."""
    machine = {"host": socket.gethostname(), "boot": _apple_boot(), "space": ""}
    with contextlib.suppress(OSError):
        machine["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine["space"] = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    return machine


def _apple_boot() -> str:
    """Return the id that macOS gives to this boot; empty on other systems."""
    text, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    with contextlib.suppress(OSError, TypeError, AttributeError):
        if ctypes.CDLL(None).sysctlbyname(b"kern.bootsessionuuid", text, ctypes.byref(size), None, 0) == 0:
            return text.value.decode(errors="replace")
    return ""


def _started(pid: int) -> float | None:
    """Return when a process started, in units that are this machine's own; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else float(fields[19])  # ticks since boot: setting the clock changes nothing
    except (OSError, IndexError):
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, as written in its file."""

    record: dict[str, Any]

    @property
    def released(self) -> bool:
        """Whether it was released."""
        return bool(self.record.get("released", False))

    @property
    def local(self) -> bool:
        """Whether its process is certainly one that this process can inspect."""
        here = _machine()
        return bool(here["boot"]) and all(self.record.get(name) == here[name] for name in ("boot", "space"))

    def alive(self) -> bool:
        """Return whether the owner may still write; where only its heartbeat decides, by the clock."""
        record = self.record
        if self.released:
            return False
        if self.local:
            started = _started(int(record.get("pid", -1)))
            return started is not None and abs(started - float(record.get("started") or 0)) < 1
        return time.time() - float(record.get("heartbeat", 0)) < STALE

    def __str__(self) -> str:
        seconds = time.time() - float(self.record.get("heartbeat", 0))
        return f"process {self.record.get('pid')} on {self.record.get('host')}, last heard of {seconds:.0f} s ago"


def read_claims(store: StorePath) -> dict[str, tuple[int, Owner]]:
    """Return every claim of a store by name: its latest generation and that one's owner."""
    latest: dict[str, int] = {}
    for name in paths.names(store / "commits"):
        match = _CLAIM.fullmatch(name)
        if match:
            latest[match[1]] = max(latest.get(match[1], 0), int(match[2]))
    return {name: (generation, _read(store, name, generation)) for name, generation in latest.items()}


def may_write(store: StorePath, name: str, generation: int, owner: Owner) -> bool:
    """Return whether the owner of a claim is alive; if it seems dead, watch it for a while, as clocks may differ."""
    if owner.alive():
        return True
    if owner.released or owner.local:
        return False
    time.sleep(1.5 * HEARTBEAT)
    return _read(store, name, generation).record != owner.record


def claim_name(start: int, stop: int | None) -> str:
    """Return the name of the claim on a range of rows."""
    return f"rows-{start}-{'end' if stop is None else stop}"


def turns_name(index: int, count: int) -> str:
    """Return the name of the claim on every ``count``-th group of rows from group ``index`` on."""
    return f"turns-{index}-of-{count}"


def claimed_rows(name: str) -> tuple[int, int | None] | None:
    """Return the first row and the end of a claim on rows, the end None if it is open; None for other claims."""
    if re.fullmatch(r"turns-\d+-of-\d+", name):
        return 0, None  # among all rows there will be
    match = re.fullmatch(r"rows-(\d+)-(\d+|end)", name)
    return None if match is None else (int(match[1]), None if match[2] == "end" else int(match[2]))


class Claim:
    """Exclusive right to write one range of a store, until :meth:`release` or its process's end.

    Parameters
    ----------
    store : StorePath
        The store.
    start, stop : int
        The rows; ``stop`` None means all there will be.
    name : str, optional
        A claim that is not about a range of rows.

    Raises
    ------
    StoreBusyError
        If another writer holds it, or part of it.
    """

    def __init__(self, store: StorePath, start: int = 0, stop: int | None = None, *, name: str | None = None) -> None:
        self._store = store
        self._name = name or claim_name(start, stop)
        self._pid = os.getpid()
        self._released, self._beating = threading.Event(), threading.Lock()
        self._heard = time.monotonic()
        self._generation = self._acquire()
        self._finalizer = weakref.finalize(
            self, _release, self._path(self._generation), self._pid, self._released, self._beating
        )
        threading.Thread(target=_keep_alive, args=(weakref.ref(self), self._released), daemon=True).start()
        if name is None:
            self._check_overlap(start, stop)

    @property
    def store(self) -> StorePath:
        """The store it is about."""
        return self._store

    def _acquire(self) -> int:
        for _ in range(20):  # another process may be first; then the owner of its claim is checked
            generation, owner = read_claims(self._store).get(self._name, (0, None))
            if owner is not None and may_write(self._store, self._name, generation, owner):
                raise StoreBusyError(self._busy(self._name, owner))
            if paths.create_file(self._path(generation + 1), _record(self._pid)):
                for old in range(max(1, generation - 3), generation + 1):
                    paths.remove_file(self._path(old))
                return generation + 1
        raise StoreBusyError(
            f"expected to claim {self._name} of {self._store}; received too many other processes: run again"
        )

    def _check_overlap(self, start: int, stop: int | None) -> None:
        for name, (generation, owner) in read_claims(self._store).items():
            rows = claimed_rows(name)
            if rows is None or name == self._name:
                continue
            overlaps = (rows[1] is None or start < rows[1]) and (stop is None or rows[0] < stop)
            if overlaps and may_write(self._store, name, generation, owner):
                self.release()
                raise StoreBusyError(self._busy(name, owner))

    def _busy(self, name: str, owner: Owner) -> str:
        return (
            f"expected no other writer of {self._store} ({name}); received one: {owner}: wait for it to finish, or "
            f"stop it, then run again (a writer that died elsewhere is taken over after {STALE:.0f} s)"
        )

    def _path(self, generation: int) -> StorePath:
        return _claim_path(self._store, self._name, generation)

    def check(self) -> None:
        """Check that the claim is still held: to be called before anything it protects becomes visible.

        Raises
        ------
        StoreBusyError
            If another process took it over, having seen no heartbeat of this one.
        """
        if paths.is_local(self._store):
            lost = self._path(self._generation + 1).exists() or not self._path(self._generation).exists()
        elif time.monotonic() - self._heard < STALE / 2:
            lost = False  # nobody takes over with so recent a heartbeat
        else:
            lost = self._beat()
        if lost:
            raise StoreBusyError(
                f"expected to hold the claim {self._name} of {self._store}; received a later one: another process "
                "took over while this one was suspended; what it committed stays, run again to resume"
            )

    def _beat(self) -> bool:
        """Renew the heartbeat; return whether another process took over."""
        with self._beating:  # a released claim must not come to life again
            if self._released.is_set():
                return True
            if read_claims(self._store).get(self._name, (0, None))[0] != self._generation:
                return True
            paths.write_bytes(self._path(self._generation), _record(self._pid))
            self._heard = time.monotonic()
            return False

    def release(self, *, remove: bool = False) -> None:
        """Release the range; safe to call twice, and in a forked child, where it does nothing.

        With ``remove`` the claim leaves no file, because its folder will be removed too.
        """
        detached = self._finalizer.detach()
        if detached is not None:
            _release(*detached[2], remove=remove)


def _claim_path(store: StorePath, name: str, generation: int) -> StorePath:
    return store / "commits" / f".claim-{name}.{generation}"


def _record(pid: int, *, released: bool = False) -> bytes:
    process = {"pid": pid, "started": _started(pid), "heartbeat": time.time(), "released": released}
    return json.dumps(_machine() | process).encode()


def _release(
    path: StorePath, pid: int, released: threading.Event, beating: threading.Lock, *, remove: bool = False
) -> None:
    if os.getpid() != pid:
        return
    released.set()
    with beating, contextlib.suppress(OSError):
        try:
            if remove:
                paths.remove_file(path)
            elif paths.exists(path):
                paths.write_bytes(path, _record(pid, released=True))
        except OSError:  # a full disk: removing needs no space
            paths.remove_file(path)


def _keep_alive(claim: weakref.ref[Claim], released: threading.Event) -> None:
    while not released.wait(HEARTBEAT):
        alive = claim()
        if alive is None:
            return
        with contextlib.suppress(OSError):  # the next beat may succeed; check() finds out if none does
            if alive._beat():
                return
        del alive


def _read(store: StorePath, name: str, generation: int) -> Owner:
    data = paths.read_bytes(_claim_path(store, name, generation))
    if data is None:
        return Owner({"released": True})
    try:
        record = json.loads(data)
    except ValueError:
        record = None
    return Owner(record if isinstance(record, dict) else {"released": False})


PATIENCE = 120.0  # seconds: a dead owner on another machine is recognised by a heartbeat 60 s old
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 5.0  # seconds between two tries
_Claimed = TypeVar("_Claimed")


def check_range(path: StorePath, layout: Layout, start: int, stop: int | None) -> None:
    """Check that a writer may ask for rows ``start`` to ``stop``."""
    planned, group = layout.planned_rows, layout.group_rows
    if planned is None:
        fits = start == 0 and stop is None
    else:
        fits = stop is not None and 0 <= start < stop <= planned
        fits = fits and start % group == 0 and (stop == planned or (stop or 0) % group == 0)
    if not fits:
        wanted = "no range: the store grows" if planned is None else f"whole groups of {group} of {planned} rows"
        raise InputError(f"expected a writer of {path} to ask for {wanted}; received {start} to {stop}")


def make_claim(path: StorePath, start: int = 0, stop: int | None = None, *, name: str | None = None) -> Claim:
    """Claim rows ``start`` to ``stop``, or something else by name.

    Raises
    ------
    StoreBusyError
        If another writer holds it.
    StoreWriteError
        If the store's folder cannot be written to.
    """
    with writing(f"to write to {path}", ", or choose another path"):
        return Claim(path, start, stop, name=name)


def wait_for(claim: Callable[[], _Claimed], patience: float = PATIENCE) -> _Claimed:
    """Return what ``claim`` returns, retrying for ``patience`` seconds while another process holds it.

    Raises
    ------
    StoreBusyError
        If another process holds it for longer.
    """
    last, pause = time.monotonic() + patience, _FIRST_PAUSE
    while True:
        try:
            return claim()
        except StoreBusyError:
            if time.monotonic() >= last:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)


def clear_range(path: StorePath, layout: Layout, start: int, stop: int | None) -> None:
    """Delete what interrupted writes left in a range that the caller has claimed."""
    inside = None if stop is None else lambda row: start <= row < stop
    _clear(path, layout, claim_name(start, stop), inside)


def clear_turns(path: StorePath, layout: Layout, index: int, count: int) -> None:
    """Delete what interrupted writes left in every ``count``-th group, which the caller has claimed."""
    _clear(path, layout, turns_name(index, count), lambda row: row // layout.group_rows % count == index)


def _clear(path: StorePath, layout: Layout, claim: str, inside: Callable[[int], bool] | None) -> None:
    """Delete interrupted writes of rows that are ``inside`` what was claimed, None for all, and of the claim itself."""
    if not is_local(path):
        return
    for name in ("gradients", "commits", "dropped", *layout.row_arrays):
        size = layout.chunk_rows if name == "gradients" else layout.group_rows

        def mine(file: str, size: int = size) -> bool:
            if inside is None:
                return True
            number = file.split(".")[1] if file.startswith("c.") else ""
            return (number.isdigit() and inside(int(number) * size)) or file.startswith(f".claim-{claim}.")

        local.remove_partial_files(path / name, mine)

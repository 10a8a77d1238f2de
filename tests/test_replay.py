"""A power cut at any moment: every prefix of the writes, syncs and renames, with what was not synced lost.

SIGKILL leaves the page cache alive, so it cannot show a missing fsync. Here everything that the package's ``disk``
module asks of the operating system is recorded, and replayed into a model of a file system in which files have durable
contents and folders durable names, each only what the last sync of that very file or folder saw.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rows, whole_mask
from numpy.testing import assert_array_equal

from ooc_influence import GradientStore, Storage, merge_stores
from ooc_influence.store import local

ROWS = random_rows(30, 4)


class Recorder:
    """Stands for ``os`` in the module under test: does what is asked, and notes it."""

    def __init__(self, root):
        self.root, self.events, self.paths, self.lock = root, [], {}, threading.RLock()

    def note(self, *event):
        self.events.append(event)

    def name(self, path):
        return Path(path).relative_to(self.root).as_posix()

    def open(self, path, flags, mode=0o777):
        if not Path(path).is_relative_to(self.root):  # reading what an earlier, unrecorded call wrote
            return os.open(path, flags, mode)
        with self.lock:
            handle = os.open(path, flags, mode)
            if not Path(path).is_relative_to(self.root):  # what is only read, elsewhere
                return handle
            self.paths[handle] = self.name(path)
            if flags & os.O_CREAT:
                self.note("create", self.name(path))
            return handle

    def write(self, handle, data):
        with self.lock:
            self.note("write", self.paths[handle], bytes(data))
            return os.write(handle, data)

    def fsync(self, handle):
        with self.lock:
            self.note("fsync", self.paths[handle])

    def _two(self, what, function, source, target):
        with self.lock:
            function(source, target)
            self.note(what, self.name(source), self.name(target))

    def replace(self, source, target):
        self._two("rename", os.replace, source, target)

    def rename(self, source, target):
        self._two("rename", os.rename, source, target)

    def link(self, source, target):
        self._two("link", os.link, source, target)

    def mkdir(self, path):
        with self.lock:
            os.mkdir(path)  # noqa: PTH102
            self.note("mkdir", self.name(path))

    def unlink(self, path):
        with self.lock:
            os.unlink(path)  # noqa: PTH108
            self.note("unlink", self.name(path))

    def __getattr__(self, name):
        return getattr(os, name)


@dataclass(eq=False)
class File:
    now: bytes = b""
    durable: bytes = b""


@dataclass(eq=False)
class Folder:
    now: dict = field(default_factory=dict)
    durable: dict = field(default_factory=dict)


class Disk:
    """What a file system holds, and what of it survives."""

    def __init__(self):
        self.root = Folder()

    def find(self, path):
        place = self.root
        for part in Path(path).parts:
            place = place.now[part]
        return place

    def parent(self, path):
        return self.find(Path(path).parent), Path(path).name

    def apply(self, what, path, *rest):
        if what == "fsync":
            place = self.find(path)
            place.durable = dict(place.now) if isinstance(place, Folder) else place.now
            return
        folder, name = self.parent(path)
        if what == "create":
            folder.now[name] = File()
        elif what == "write":
            folder.now[name].now += rest[0]
        elif what == "mkdir":
            folder.now[name] = Folder()
        elif what == "unlink":
            del folder.now[name]
        else:
            target, new = self.parent(rest[0])
            target.now[new] = folder.now[name]
            if what == "rename":
                del folder.now[name]

    def survive(self, choose, place=None, path="."):
        """Return what a crash leaves, by path, None for a folder; ``choose`` tells, of a file or folder, whether what
        was not synced is there."""
        place = self.root if place is None else place
        found = {path: None}
        for name, child in (place.now if choose(place) else place.durable).items():
            if isinstance(child, Folder):
                found |= self.survive(choose, child, f"{path}/{name}")
            elif not name.startswith(".claim"):  # their owner, this process, would still be alive
                found[f"{path}/{name}"] = child.now if choose(child) else child.durable
        return found


def chooser(model, number):
    """Return which of what was not synced is there after a crash: nothing, the names in folders, or some of it."""
    generator = random.Random(number)
    return {
        "lost": lambda place: False,
        "names": lambda place: isinstance(place, Folder),
        "some": lambda place: generator.random() < 0.5,
    }[model]


def lay_out(left, out):
    """Write what a crash left to a folder."""
    for path, data in left.items():  # a folder comes before what is in it
        (out / path).mkdir() if data is None else (out / path).write_bytes(data)


def scenario(path, returned):
    """Append, flushing at odd places; drop; reopen. ``returned`` is told what was promised."""
    GradientStore.create(path, whole_mask(4), dtype="float32", storage=Storage(3, 2)).close()
    returned(0, ())
    fill(path, 17, returned, ())
    with GradientStore.open(path, "a") as store:
        store.drop([2, 14])
    returned(17, (2, 14))
    fill(path, 30, returned, (2, 14))


def fill(path, stop, returned, dropped):
    with GradientStore.open(path, "a") as store:
        while store.writer().next_row < stop:
            start = store.writer().next_row
            end = min(stop, start + 4)
            store.append(ROWS[start:end], loss=np.zeros(end - start))
            if start % 3:
                store.flush()
                returned(end, dropped)
    returned(stop, dropped)


def contents(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file != path / "zarr.json" and ".claim" not in file.name
    }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    root = tmp_path / "recorded"
    root.mkdir()
    recorder = Recorder(root)
    monkeypatch.setattr(local, "os", recorder)
    scenario(root / "s", lambda rows, dropped: recorder.note("returned", rows, dropped))
    monkeypatch.setattr(local, "os", os)
    assert {event[0] for event in recorder.events} >= {"create", "write", "fsync", "rename", "mkdir", "returned"}
    return recorder.events, contents(root / "s")


def check(path, promised):
    rows, dropped = promised
    if rows is None and not path.exists():
        return
    store = GradientStore.open(path)
    assert store.n >= (rows or 0)
    assert_array_equal(store.rows(), ROWS[: store.n])
    assert set(dropped) <= set(np.flatnonzero(store.dropped).tolist()) <= {2, 14}
    assert store.verify(workers=1) == []


def replay(events, folder, model, expected=None):
    """Crash after every event that matters to the model; return how many crashes left different things behind."""
    held, promised, seen = Disk(), (None, ()), set()
    matters = {"lost": ("fsync", "returned"), "names": ("rename", "fsync"), "some": ("fsync", "rename", "returned")}[
        model
    ]
    for number, event in enumerate(events):
        if event[0] == "returned":
            promised = event[1:]
        else:
            held.apply(*event)
        if event[0] not in matters or (model == "some" and number % 3):
            continue
        left = held.survive(chooser(model, number))
        crash = hash((promised, frozenset(left.items())))
        if crash in seen:
            continue
        seen.add(crash)
        out = folder / f"{model}-{number}"
        lay_out(left, out)
        check(out / "s", promised)
        if expected is not None and len(seen) % 8 == 0 and (out / "s").exists():
            with GradientStore.open(out / "s", "a") as store:
                store.drop([row for row in (2, 14) if row < store.n])
            fill(out / "s", 30, lambda rows, dropped: None, ())
            with GradientStore.open(out / "s", "a") as store:
                store.drop([2, 14])
            found = {name: data for name, data in contents(out / "s").items() if not name.endswith(".partial")}
            assert found == expected, number
    return len(seen)


@pytest.mark.parametrize("model", ["lost", "names", "some"])
def test_what_was_promised_survives_a_power_cut(recorded, tmp_path, model):
    events, expected = recorded
    assert replay(events, tmp_path, model, expected) > 60


@pytest.mark.parametrize("model", ["lost", "some"])
def test_a_merged_store_is_whole_before_its_sources_may_go(tmp_path, monkeypatch, model):
    """Its chunks are links to theirs, or written anew; a power cut after merging must not need the sources."""
    root = tmp_path / "recorded"
    root.mkdir()
    recorder = Recorder(root)
    monkeypatch.setattr(local, "os", recorder)
    for name, part in (("a", slice(0, 13)), ("b", slice(13, 30))):
        with GradientStore.create(root / name, whole_mask(4), dtype="float32", storage=Storage(3, 2)) as store:
            store.append(ROWS[part], loss=np.zeros(len(ROWS[part])))
    merge_stores([root / "a", root / "b"], root / "s")
    recorder.note("returned", 30, ())
    monkeypatch.setattr(local, "os", os)
    assert sum(event[0] == "link" and "gradients" in event[2] for event in recorder.events) == 4
    assert replay(recorder.events, tmp_path, model) > 20


def losing(events, kind):
    """The events without the syncs of files, or of folders: what a careless program would have done."""
    folders = {event[1] for event in events if event[0] == "mkdir"} | {".", "s"}
    is_folder = [event[0] == "fsync" and (event[1] in folders or "creating" in Path(event[1]).name) for event in events]
    for event, folder in zip(events, is_folder, strict=True):
        if event[0] != "fsync" or folder != (kind == "folders"):
            yield event


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_a_missing_sync_would_be_found(recorded, tmp_path, kind):
    events = list(losing(recorded[0], kind))
    assert len(events) < len(recorded[0])
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever a lost file leads to
        replay(events, tmp_path, "names" if kind == "files" else "lost")

"""Who owns a claim, and whether it is dead: a name of a machine proves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time

import numpy as np
import pytest
from conftest import random_rows, whole_mask, write_store

from ooc_influence import GradientStore, Storage
from ooc_influence.errors import StoreBusyError
from ooc_influence.store import claim


@pytest.fixture
def path(tmp_path):
    return write_store(tmp_path / "s.zarr", random_rows(20, 6)).path


def claimed(path, **facts):
    """Write a claim on all of a store's rows as another process would, and return its file."""
    own = claim._machine() | {
        "pid": os.getpid(), "started": claim._started(os.getpid()), "heartbeat": time.time(), "released": False,
    }  # fmt: skip
    file = path / "commits" / f".claim-{claim.claim_name(0, None)}.1000"
    file.write_text(json.dumps(own | facts))
    return file


@contextlib.contextmanager
def beating(file):
    """Let the owner of a claim give signs of life, by a clock that is an hour behind."""
    done = threading.Event()

    def beat():
        while not done.wait(0.05):
            record = json.loads(file.read_text())
            fresh = file.with_name("fresh")
            fresh.write_text(json.dumps(record | {"heartbeat": record["heartbeat"] + 0.05}))
            fresh.replace(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def append(path):
    with GradientStore.open(path, "a") as store:
        store.append(random_rows(3, 6), loss=np.zeros(3))


ELSEWHERE = {"boot": "of another machine", "pid": 1, "started": 1.0}
UNKNOWN = {"boot": "", "space": "", "pid": 2**22 + 1, "started": None}
OTHER_CONTAINER = {"space": "pid:[1]", "pid": 2**22 + 1}


@pytest.mark.parametrize("facts", [ELSEWHERE, UNKNOWN, OTHER_CONTAINER], ids=["elsewhere", "unknown", "container"])
def test_an_owner_of_the_same_name_that_beats_is_alive(path, facts):
    claimed(path, **facts)
    with pytest.raises(StoreBusyError, match="expected no other writer"):
        append(path)
    assert GradientStore.open(path).n == 20


@pytest.mark.parametrize("facts", [ELSEWHERE, UNKNOWN, OTHER_CONTAINER], ids=["elsewhere", "unknown", "container"])
def test_an_owner_of_the_same_name_whose_clock_is_behind_is_alive_while_it_beats(path, monkeypatch, facts):
    monkeypatch.setattr(claim, "HEARTBEAT", 0.2)
    file = claimed(path, **facts, heartbeat=time.time() - 3600)
    with beating(file), pytest.raises(StoreBusyError):
        append(path)
    append(path)  # it stands still now
    assert GradientStore.open(path).n == 23


def test_a_process_of_this_machine_is_looked_at(path):
    """Its heartbeat may be old: a laptop that slept."""
    claimed(path, heartbeat=time.time() - 3600)
    with pytest.raises(StoreBusyError):
        append(path)
    claimed(path, pid=2**22 + 1)
    append(path)
    claimed(path, started=1.0)  # another process has its number now
    append(path)
    assert GradientStore.open(path).n == 26


def test_ranges_that_overlap_are_watched_too(tmp_path, monkeypatch):
    """A claim of rows that are cut differently, by an owner whose clock is behind."""
    monkeypatch.setattr(claim, "HEARTBEAT", 0.2)
    store = GradientStore.create(tmp_path / "s.zarr", whole_mask(6), planned_rows=400, storage=Storage(64, 3))
    file = claimed(store.path, **ELSEWHERE, heartbeat=time.time() - 3600)
    file = file.rename(file.with_name(".claim-rows-0-192.1"))
    with beating(file), pytest.raises(StoreBusyError):
        GradientStore.open(store.path, "a").writer(0, 400)
    GradientStore.open(store.path, "a").writer(0, 400)

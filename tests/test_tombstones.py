"""Rows that are dropped from the start are never live to anybody; droppers wait for each other."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from conftest import random_rows, write_store
from models import Mlp, batches, data, loss, make

from ooc_influence import GradientStore, extract_gradients
from ooc_influence.compress import Dropout
from ooc_influence.errors import InputError, StoreBusyError
from ooc_influence.extract.sink import _SKIPPED, Sink
from ooc_influence.store import make_claim, merge_stores, wait_for
from ooc_influence.store.commits import Committer


@pytest.fixture
def live_skipped(monkeypatch):
    """Look at the store after every commit, as another process does; the rows without a gradient that it sees live."""
    found, plain = [], Committer._write_records

    def write_records(committer, group, written):
        plain(committer, group, written)
        seen = GradientStore.open(committer.claim.store)
        found.append(np.flatnonzero((seen.grad_norm == _SKIPPED) & ~seen.dropped).tolist())

    monkeypatch.setattr(Committer, "_write_records", write_records)
    return found


def test_a_sample_that_is_skipped_is_never_live(tmp_path, monkeypatch, live_skipped):
    x, y = data(Mlp, 40)
    x = x.clone()
    x[[3, 17, 39]] = float("nan")
    store = extract_gradients(
        make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr", compressor=Dropout(k=100), on_nonfinite="skip"
    )
    assert live_skipped
    assert not any(live_skipped)
    assert np.flatnonzero(store.dropped).tolist() == [3, 17, 39]
    assert not store.verify()


def test_a_killed_run_leaves_no_skipped_row_live(tmp_path, monkeypatch):
    x, y = data(Mlp, 40)
    x = x.clone()
    x[[3, 30]] = float("nan")
    options = {"compressor": Dropout(k=100), "on_nonfinite": "skip"}
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "_drop_skipped", lambda self: 1 / 0)  # what a killed run does not come to
        with pytest.raises(ZeroDivisionError):
            extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr", **options)
    store = GradientStore.open(tmp_path / "s.zarr")
    assert store.n == 40
    assert np.flatnonzero(store.dropped).tolist() == [3, 30]


@pytest.mark.parametrize("corrected", [False, True])
def test_a_sample_skipped_by_a_run_killed_before_the_commit_is_decided_again(tmp_path, monkeypatch, corrected):
    x, y = data(Mlp, 40)
    bad = x.clone()
    bad[30] = float("nan")
    options = {"compressor": Dropout(k=100)}
    path = extract_gradients(make(Mlp), loss, batches(x[:24], y[:24], 8), tmp_path / "s.zarr", **options).path
    with monkeypatch.context() as patch:
        patch.setattr(Committer, "_write_records", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_gradients(make(Mlp), loss, batches(bad, y, 8), path, on_nonfinite="skip", **options)
    assert GradientStore.open(path).n == 24
    with GradientStore.open(path, "a") as store:
        store.drop([20])  # by its user
    given, mode = (x, "raise") if corrected else (bad, "skip")
    store = extract_gradients(make(Mlp), loss, batches(given, y, 8), path, on_nonfinite=mode, **options)
    assert store.n == 40
    assert np.flatnonzero(store.dropped).tolist() == ([20] if corrected else [20, 30])


def test_appended_rows_are_dropped_from_the_start(tmp_path):
    rows, marks = random_rows(300, 6), np.zeros(300, bool)
    marks[[0, 63, 64, 200, 299]] = True
    store = write_store(tmp_path / "s.zarr", rows[:0])
    with GradientStore.open(store.path, "a") as writer:
        writer.append(rows[:100], loss=np.zeros(100), dropped=marks[:100])
        writer.append(rows[100:], loss=np.zeros(200), dropped=marks[100:])
        writer.flush()
        assert writer.has_dropped
        np.testing.assert_array_equal(writer.dropped, marks)
        with pytest.raises(InputError, match=r"dropped of shape \(2,\)"):
            writer.append(rows[:2], loss=np.zeros(2), dropped=[1, 0])
    np.testing.assert_array_equal(GradientStore.open(store.path).dropped, marks)


def test_merged_rows_that_are_dropped_are_never_live(tmp_path, monkeypatch):
    first = write_store(tmp_path / "a.zarr", random_rows(200, 6)).path
    second = write_store(tmp_path / "b.zarr", random_rows(100, 6)).path
    with GradientStore.open(first, "a") as store:
        store.drop([5, 150])
    plain, seen = Committer._write_records, []

    def write_records(committer, group, written):
        plain(committer, group, written)
        store = GradientStore.open(committer.claim.store)
        seen.append(store.dropped[[row for row in (5, 150) if row < store.n]].all())

    monkeypatch.setattr(Committer, "_write_records", write_records)
    merged = merge_stores([first, second], tmp_path / "m.zarr")
    assert seen
    assert all(seen)
    assert np.flatnonzero(merged.dropped).tolist() == [5, 150]


def test_a_second_dropper_waits(tmp_path):
    path = write_store(tmp_path / "s.zarr", random_rows(100, 6)).path
    other = make_claim(path, name="drop")  # as a process that is marking rows at this moment
    threading.Timer(0.5, other.release).start()
    with GradientStore.open(path, "a") as store:
        store.drop([4, 50])
        assert np.flatnonzero(store.dropped).tolist() == [4, 50]


def test_many_droppers_at_once(tmp_path):
    path = write_store(tmp_path / "s.zarr", random_rows(100, 6)).path
    gate, failed = threading.Barrier(6), []

    def drop(number):
        with GradientStore.open(path, "a") as store:
            gate.wait()
            try:
                store.drop([number, 50 + number])
            except Exception as error:
                failed.append(error)

    droppers = [threading.Thread(target=drop, args=(number,)) for number in range(6)]
    for dropper in droppers:
        dropper.start()
    for dropper in droppers:
        dropper.join()
    assert failed == []
    assert np.flatnonzero(GradientStore.open(path).dropped).tolist() == [*range(6), *range(50, 56)]


def test_a_run_that_skips_waits_for_another_that_marks(tmp_path):
    """Two shards that skip at the same moment lost one of them, all its work done."""
    x, y = data(Mlp, 40)
    x = x.clone()
    x[30] = float("nan")
    options = {"compressor": Dropout(k=100), "on_nonfinite": "skip"}
    path = extract_gradients(make(Mlp), loss, batches(x[:24], y[:24], 8), tmp_path / "s.zarr", **options).path
    other = make_claim(path, name="drop")
    threading.Timer(1.0, other.release).start()
    store = extract_gradients(make(Mlp), loss, batches(x, y, 8), path, **options)
    assert np.flatnonzero(store.dropped).tolist() == [30]


def test_a_right_that_is_held_for_long_is_refused(tmp_path):
    path = write_store(tmp_path / "s.zarr", random_rows(10, 6)).path
    taken = make_claim(path, name="drop")
    with pytest.raises(StoreBusyError, match="expected no other writer"):
        wait_for(lambda: make_claim(path, name="drop"), patience=0.1)
    taken.release()

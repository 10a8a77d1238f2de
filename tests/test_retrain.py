"""Retraining: every run kept, killed runs gone on with, the same numbers whatever happened; removals."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from training import N, Q, calls, dying, failing, measure, train

from ooc_influence.errors import InputError, MismatchError, RunFailedError, StoreFormatError, StoreWriteError
from ooc_influence.evaluate import finished_runs, leave_one_out, random_subsets, removal_curve, retrain
from ooc_influence.evaluate.retrain import seeded


def test_random_subsets():
    subsets = random_subsets(101, 30, 0.3, seed=5)
    assert subsets.shape == (30, 101)
    assert_array_equal(subsets.sum(1), 30)
    assert len({row.tobytes() for row in subsets}) == 30
    assert_array_equal(random_subsets(101, 40, 0.3, seed=5)[:30], subsets)
    assert not np.array_equal(random_subsets(101, 30, 0.3, seed=6), subsets)
    counts = random_subsets(50, 2000).sum(0)
    assert abs(counts - 1000).max() < 5 * np.sqrt(500)
    for arguments in ((10, 0), (10, 5, 0.0), (10, 5, 1.0), (1, 5), (10, 5, 0.01)):
        with pytest.raises(InputError, match="some of n rows"):
            random_subsets(*arguments)


def test_every_run_is_kept_and_none_is_done_twice(tmp_path):
    log = tmp_path / "log"
    subsets = random_subsets(N, 6)
    first = retrain(functools.partial(train, log=log), measure, subsets, tmp_path / "runs", settings={"lr": 0.1})
    assert first.outcomes.shape == (6, Q)
    assert first.missing == []
    assert calls(log) == 6
    assert (first.seconds > 0).all()
    again = retrain(functools.partial(train, log=log), measure, subsets, tmp_path / "runs", settings={"lr": 0.1})
    assert calls(log) == 6
    assert_array_equal(again.outcomes, first.outcomes)
    more = retrain(
        functools.partial(train, log=log), measure, random_subsets(N, 8), tmp_path / "runs", settings={"lr": 0.1}
    )
    assert calls(log) == 8
    assert_array_equal(more.outcomes[:6], first.outcomes)


def test_the_same_numbers_in_any_order_and_in_processes(tmp_path):
    subsets = random_subsets(N, 5)
    whole = retrain(train, measure, subsets, tmp_path / "a")
    retrain(train, measure, subsets[:2], tmp_path / "b")
    apart = retrain(train, measure, subsets, tmp_path / "b", workers=2)
    assert_array_equal(apart.outcomes, whole.outcomes)
    shifted = retrain(train, measure, subsets, tmp_path / "c", seeds=[7] * 5)
    assert not np.isclose(shifted.outcomes, whole.outcomes).any()


def test_generators_are_seeded_and_left_as_they_were(tmp_path):
    def draw(indices=None):
        return [random.random(), np.random.random(), torch.rand(()).item(), torch.nn.Linear(1, 1).weight.item()]

    with seeded(3):
        expected = draw()
    with seeded(3):
        subsets = random_subsets(N, 3)
        whole = retrain(draw, lambda model: model, subsets, tmp_path / "runs", seeds=[5, 6, 5])
        assert draw() == expected
    assert_array_equal(whole.outcomes[0], whole.outcomes[2])
    assert not np.isclose(whole.outcomes[0], whole.outcomes[1]).any()


def test_what_is_missing_is_named(tmp_path):
    subsets = random_subsets(N, 9)
    nothing = finished_runs(subsets, tmp_path / "runs")
    assert nothing.outcomes.shape == (9, 0)
    assert nothing.table() == [("missing", 9, "0-8")]
    retrain(train, measure, subsets, tmp_path / "runs")
    for run in (2, 5, 6, 7):
        (tmp_path / "runs" / f"run-0000{run}.npz").unlink()
    left = finished_runs(subsets, tmp_path / "runs")
    assert left.missing == [2, 5, 6, 7]
    assert left.table() == [("finished", 5, "0-1, 3-4, 8"), ("missing", 4, "2, 5-7")]
    assert np.isnan(left.outcomes[left.missing]).all()
    assert "4 missing: 2, 5-7" in repr(left)


def test_a_damaged_run_is_done_again(tmp_path, caplog):
    subsets = random_subsets(N, 3)
    whole = retrain(train, measure, subsets, tmp_path / "runs")
    place = tmp_path / "runs" / "run-00001.npz"
    content = place.read_bytes()
    for damaged in (content[:50], b"", content[:70] + bytes([content[70] ^ 255]) + content[71:]):
        place.write_bytes(damaged)
        assert finished_runs(subsets, tmp_path / "runs").missing == [1]
        assert "run-00001.npz cannot be read" in caplog.text
        assert_array_equal(retrain(train, measure, subsets, tmp_path / "runs").outcomes, whole.outcomes)


def test_other_settings_are_refused(tmp_path):
    subsets = random_subsets(N, 3)
    retrain(train, measure, subsets, tmp_path / "runs", settings={"lr": 0.1, "epochs": 3})
    for arguments, options, match in (
        ((subsets,), {"settings": {"lr": 0.2, "epochs": 3}}, "expected the settings .*0.1.*; received .*0.2"),
        ((subsets,), {}, "expected the settings"),
        ((random_subsets(N + 1, 3),), {"settings": {"lr": 0.1, "epochs": 3}}, "expected the rows .* 40; received 41"),
        ((random_subsets(N, 3, seed=1),), {"settings": {"lr": 0.1, "epochs": 3}}, "the rows and seed of run 0 "),
        ((subsets,), {"settings": {"lr": 0.1, "epochs": 3}, "seeds": [0, 1, 3]}, "the rows and seed of run 2 "),
    ):
        with pytest.raises(MismatchError, match=match):
            retrain(train, measure, *arguments, tmp_path / "runs", **options)
    with pytest.raises(MismatchError, match="as many outcomes of every run"):
        retrain(
            train,
            lambda model: [model],
            random_subsets(N, 4),
            tmp_path / "runs",
            settings={"lr": 0.1, "epochs": 3},
        )
    (tmp_path / "runs" / "settings.json").write_text("[1]")
    with pytest.raises(StoreFormatError, match="settings of runs"):
        finished_runs(subsets, tmp_path / "runs")


def test_refusals(tmp_path):
    subsets = random_subsets(N, 3)
    empty = subsets.copy()
    empty[1] = False
    ragged = [np.ones(3, bool), np.ones(4, bool)]
    for value, options, match in (
        (empty, {}, "as subset 1"),
        (subsets.astype(int), {}, "bool"),
        (ragged, {}, r"lengths \[3, 4\]"),
        (subsets[:0], {}, "lengths"),
        (subsets, {"seeds": [1, 2]}, "3 seeds"),
        (subsets, {"seeds": [1, 2, -1]}, "3 seeds"),
        (subsets, {"workers": 0}, "workers >= 1"),
        (subsets, {"settings": {"a": object()}}, "JSON values"),
    ):
        with pytest.raises(InputError, match=match):
            retrain(train, measure, value, tmp_path / "refused", **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="received a file"):
        retrain(train, measure, subsets, tmp_path / "file")
    with pytest.raises(InputError, match="functions of a module"):
        retrain(lambda indices: 0.0, measure, subsets, tmp_path / "lambda", workers=2)


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    subsets = random_subsets(N, 4)
    with pytest.raises(RunFailedError, match=r"run 2 to train and measure; received ValueError: diverged") as caught:
        retrain(functools.partial(failing, log=log), measure, subsets, tmp_path / "runs")
    assert isinstance(caught.value.__cause__, ValueError)
    assert finished_runs(subsets, tmp_path / "runs").missing == [2, 3]
    with pytest.raises(RunFailedError, match="ValueError: diverged"):
        retrain(functools.partial(failing, log=log), measure, subsets, tmp_path / "runs", workers=2)
    for bad in (lambda model: [1.0, np.nan], lambda model: np.ones((2, 2)), lambda model: []):
        with pytest.raises(RunFailedError, match="finite numbers"):
            retrain(train, bad, subsets, tmp_path / "bad")


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    from ooc_influence import checkpoint

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    with pytest.raises(StoreWriteError, match=r"no space left.*make room"):
        retrain(train, measure, random_subsets(N, 2), tmp_path / "runs")


def test_a_worker_that_dies_is_replaced_as_long_as_runs_finish(tmp_path):
    subsets = random_subsets(N, 5)
    whole = retrain(train, measure, subsets, tmp_path / "whole")
    once = functools.partial(dying, log=tmp_path / "log", runs=[3])  # one has finished by then
    assert_array_equal(retrain(once, measure, subsets, tmp_path / "a", workers=2).outcomes, whole.outcomes)
    always = functools.partial(dying, log=tmp_path / "log2", runs=range(100))
    with pytest.raises(RunFailedError, match="runs 0-4 to finish; received a worker process that ended"):
        retrain(always, measure, subsets, tmp_path / "b", workers=2)


KILLED = """
import functools, sys
from training import N, measure, train
from ooc_influence.evaluate import random_subsets, retrain
if __name__ == "__main__":
    folder, workers = sys.argv[1], int(sys.argv[2])
    slow = functools.partial(train, log=folder + ".log", last=6)
    retrain(slow, measure, random_subsets(N, 12), folder, settings={"lr": 1}, workers=workers)
"""


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_resumes_after_a_kill(tmp_path, workers):
    subsets, folder = random_subsets(N, 12), tmp_path / "runs"
    (tmp_path / "killed.py").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen([sys.executable, "killed.py", str(folder), str(workers)], cwd=tmp_path, env=environment)
    while len(list(folder.glob("run-*.npz"))) < 3:
        assert child.poll() is None
        time.sleep(0.02)
    workers_of_it = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not psutil.wait_procs(workers_of_it, timeout=60)[1]  # no process trains on
    left = finished_runs(subsets, folder, settings={"lr": 1})
    assert 3 <= 12 - len(left.missing) < 12
    before = calls(f"{folder}.log")
    with pytest.raises(MismatchError, match="expected the settings"):
        retrain(train, measure, subsets, folder, settings={"lr": 2})
    resumed = retrain(functools.partial(train, log=f"{folder}.log"), measure, subsets, folder, settings={"lr": 1})
    assert calls(f"{folder}.log") == before + len(left.missing)
    assert_array_equal(resumed.outcomes, retrain(train, measure, subsets, tmp_path / "whole").outcomes)
    assert json.loads((folder / "settings.json").read_text())["settings"] == {"lr": 1}


def values_of(indices):
    """A linear "model": its outcome for target q is the sum of its rows' values, and common noise."""
    return VALUES[:, indices].sum(1) + np.random.random()


VALUES = np.random.default_rng(0).standard_normal((Q, N))


def itself(model):
    return model


def test_leave_one_out_is_laid_out_as_scores(tmp_path):
    found = leave_one_out(values_of, itself, N, tmp_path / "runs", rows=[3, 30], repeats=2)
    assert found.effects.shape == (Q, 2)
    assert_allclose(found.effects, VALUES[:, [3, 30]], atol=1e-12)  # the noise of a seed is the same with and without
    assert_allclose(found.standard_errors, 0, atol=1e-12)
    assert not np.isclose(found.base[0], found.base[1]).any()
    whole = leave_one_out(values_of, itself, N, tmp_path / "all")
    assert_allclose(whole.effects, VALUES, atol=1e-12)
    assert np.isnan(whole.standard_errors).all()
    for rows in ([], [N], [-1], [[1]]):
        with pytest.raises(InputError, match="rows \\(r,\\)"):
            leave_one_out(values_of, itself, N, tmp_path / "bad", rows=rows)


def test_a_removal_curve_takes_out_each_targets_own_rows(tmp_path):
    ranking, targets = np.argsort(-VALUES[[4, 1]], axis=1), [4, 1]
    found = removal_curve(values_of, itself, N, ranking, [1, 5, 12], tmp_path / "runs", targets=targets, repeats=2)
    assert found.effects.shape == (2, 3)
    expected = [[np.sort(VALUES[target])[::-1][:count].sum() for count in (1, 5, 12)] for target in targets]
    assert_allclose(found.effects, expected, atol=1e-12)
    assert_allclose(found.mean, np.mean(expected, 0))
    assert_allclose(found.standard_error, np.std(expected, axis=0, ddof=1) / np.sqrt(2))
    assert (np.diff(found.mean) > 0).all()
    base = found.base.mean(0)
    assert_array_equal(found.flipped(min(base) - 4), (found.outcomes.mean(0) < min(base) - 4).mean(0))
    assert found.flipped(min(base) - 4)[-1] == 1
    assert np.isnan(found.flipped(max(base) + 1)).all()
    assert len(list((tmp_path / "runs").glob("run-*"))) == 2 * (1 + 2 * 3)  # the base is shared
    upwards = removal_curve(values_of, itself, N, ranking[:, ::-1], [5], tmp_path / "up", targets=targets)
    assert upwards.mean < 0


def test_removal_refusals(tmp_path):
    ranking = np.tile(np.arange(10), (2, 1))
    for order, counts, options, match in (
        (ranking, [], {}, "counts"),
        (ranking, [0], {}, "counts"),
        (ranking, [3, 3], {}, "counts"),
        (ranking, [N], {}, "counts"),
        (ranking, [11], {}, "at least 11"),
        (ranking - 1, [3], {}, "dropped queries"),
        (ranking * 0, [3], {}, "distinct"),
        (ranking, [3], {"targets": [0]}, "each of 2 targets"),
        (ranking, [3], {"targets": [0, Q]}, "targets below 5"),
        (ranking, [3], {"repeats": 0}, "repeats"),
    ):
        with pytest.raises(InputError, match=match):
            removal_curve(values_of, itself, N, order, counts, tmp_path / "runs", **options)

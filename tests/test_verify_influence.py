"""Removal tests: against exact retraining of a convex model, with wrong scores, resumed, and of a LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import least_squares
import numpy as np
import oracle
import pytest
from conftest import write_store
from least_squares import YQ, N, P, Q
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr
from scipy.stats import t as student
from test_cli import run  # noqa: F401 - a fixture

import ooc_influence as ooc
from ooc_influence.errors import InputError, MismatchError, RunFailedError
from ooc_influence.evaluate import Contrast, RemovalTest, Training, load_training, removal_test, verify_influence

TRAINING = Training(least_squares.train, least_squares.loss)
K = 4


@pytest.fixture
def pair(tmp_path):
    """A query store and a train store with a curvature, of the gradients of the convex model."""
    return make_pair(tmp_path, np.arange(N))


def make_pair(tmp_path, order, **options):
    tmp_path.mkdir(exist_ok=True)
    rows, queries = least_squares.gradients()
    ids = [f"q{number}" for number in range(Q)]
    train = write_store(tmp_path / "train.zarr", rows[order].astype(np.float32), **options)
    with ooc.GradientStore.create(tmp_path / "query.zarr", train.mask, dtype="float32", ids="str") as store:
        store.append(queries.astype(np.float32), loss=np.zeros(Q), ids=ids)
    ooc.fit_curvature(train)
    return ooc.GradientStore.open(tmp_path / "query.zarr"), train


def losses_without(removed):
    """The dense oracle: all queries' losses after exact training without some rows."""
    kept = np.delete(np.arange(N), removed)
    x, y = least_squares.X[kept], least_squares.Y[kept]
    model = np.linalg.inv(x.T @ x + N * least_squares.RIDGE * np.eye(P)) @ (x.T @ y)
    return (least_squares.XQ @ model - YQ) ** 2 / 2


def test_the_effect_of_true_proponents_is_that_of_exact_retraining(pair, tmp_path):
    found = verify_influence(*pair, TRAINING, tmp_path / "runs", remove=K, seeds=3, controls=2)
    rows = [0, 3, 6, 8, 11]  # five of twelve, spread evenly
    assert_array_equal(found.query_rows, rows)
    assert found.query_ids.tolist() == [f"q{row}" for row in rows]
    train, queries = least_squares.gradients()
    scores = oracle.scores(queries, train, oracle.damping(oracle.fisher(train)))[rows]
    assert_array_equal(found.removed[:, :5], np.tile(np.argsort(-scores, 1)[:, :K], (3, 1, 1)))
    for seed in range(3):
        for number, removed in enumerate(found.removed[seed]):
            assert_allclose(found.losses[seed, number], losses_without(removed)[rows], rtol=1e-9)
            assert_allclose(found.predictions[seed, number], scores[:, removed].sum(1) / N, rtol=1e-4, atol=1e-6)
    own = np.array([losses_without(found.removed[0, q])[row] for q, row in enumerate(rows)])
    random = np.array([losses_without(removed)[rows] for removed in found.removed[:, 5:].reshape(6, K)])
    contrast = found.against_random
    assert_allclose(contrast.differences, own - random, rtol=1e-9)
    assert contrast.interval[0] > 0
    assert contrast.higher == contrast.comparisons == 30
    others = np.array([[losses_without(found.removed[0, p])[row] for row in rows] for p in range(5)])
    for q in range(5):
        assert_allclose(found.against_others.differences[:, q], own[q] - np.delete(others[:, q], q), rtol=1e-9)
    assert found.against_others.mean > 0
    assert_allclose(found.predicted, own_predictions(scores, found) - random_predictions(scores, found), rtol=1e-4)
    measured = others - random.mean(0)
    expected = np.array([scores[:, removed].sum(1) / N for removed in found.removed[0, :5]])
    expected -= random_predictions(scores, found)
    assert found.correlation == pytest.approx(spearmanr(expected.ravel(), measured.ravel()).statistic, abs=1e-6)
    assert found.correlation > 0.8


def own_predictions(scores, found):
    return np.array([scores[q, removed].sum() / N for q, removed in enumerate(found.removed[0, :5])])


def random_predictions(scores, found):
    return np.mean([scores[:, removed].sum(1) / N for removed in found.removed[:, 5:].reshape(-1, K)], 0)


@pytest.mark.parametrize("seed", range(4))
def test_lists_of_wrong_scores_show_no_effect(tmp_path, seed):
    """Each row has the gradient of another one: lists are random choices."""
    order = np.random.default_rng(seed).permutation(N)
    found = verify_influence(*make_pair(tmp_path, order), TRAINING, tmp_path / "runs", remove=K, seeds=3, controls=2)
    low, high = found.against_random.interval
    assert low < 0 < high
    assert "the interval contains 0, so no effect is shown" in str(found)
    low, high = found.against_others.interval
    assert low < 0 < high


def test_random_rows_are_in_no_list_and_not_dropped(tmp_path):
    query, train = make_pair(tmp_path, np.arange(N))
    strongest = ooc.top_influential(query, train, 2).proponents.rows
    train, query = (ooc.GradientStore.open(each.path, "a") for each in (train, query))
    train.drop([*strongest[:, 0].tolist(), 20, 21])
    query.drop([0, 5])
    ooc.fit_curvature(train)
    seen = []

    def note(indices):
        seen.append(indices)
        return least_squares.train(indices)

    found = verify_influence(
        query, train, Training(note, least_squares.loss), tmp_path / "runs", queries=3, remove=K, seeds=4, controls=3
    )
    assert_array_equal(found.query_rows, [1, 6, 11])
    live = np.flatnonzero(~train.small("dropped"))
    assert all(np.isin(indices, live).all() and len(indices) == len(live) - K for indices in seen)
    assert np.isin(found.removed, live).all()
    assert not np.isin(found.removed[:, 3:], found.removed[:, :3]).any()
    assert len({tuple(rows) for rows in found.removed[:, 3:].reshape(-1, K)}) == 12
    assert_allclose(found.predictions[0, 0].sum(), scores_of(query, train, found.removed[0, 0]).sum() / len(live), 1e-4)


def scores_of(query, train, rows):
    return ooc.influence_scores(query, train).compute()[np.ix_([1, 6, 11], rows)]


def test_named_queries_and_lists_in_another_unit(pair, tmp_path):
    found = verify_influence(
        *pair, TRAINING, tmp_path / "runs", queries=["q7", "q2"], remove=K, seeds=1, normalize="cosine", damping=1.0
    )
    assert found.query_ids.tolist() == ["q7", "q2"]
    lists = ooc.top_influential(*pair, K, normalize="cosine", damping=1.0).proponents.rows
    assert_array_equal(found.removed[0, :2], lists[[7, 2]])
    sums = ooc.influence_scores(*pair, damping=1.0).compute()[[7, 2]]
    expected = [[sums[q, removed].sum() / N for q in range(2)] for removed in found.removed[0]]
    assert_allclose(found.predictions[0], expected, rtol=1e-5)
    alone = verify_influence(*pair, TRAINING, tmp_path / "alone", queries=["q7"], remove=1, seeds=1, controls=1)
    assert alone.against_others is None
    assert np.isnan(alone.correlation)
    facts = alone.to_dict()
    assert facts["against_random"]["interval"] == facts["queries"][0]["interval"] == [None, None]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert "(too few runs for an interval) more than removing 1 random row;" in str(alone)


def counted_training(log):
    def train(indices):
        log.append(len(indices))
        return least_squares.train(indices) + np.random.random()

    return Training(train, least_squares.loss, {"epochs": 3})


def test_more_seeds_continue_and_other_settings_are_refused(pair, tmp_path):
    log = []
    few = verify_influence(*pair, counted_training(log), tmp_path / "runs", seeds=2, remove=K)
    assert len(log) == 2 * (5 + 2)
    more = verify_influence(*pair, counted_training(log), tmp_path / "runs", seeds=3, remove=K)
    assert len(log) == 3 * (5 + 2)
    assert_array_equal(more.losses[:2], few.losses)
    assert_array_equal(more.removed[:2], few.removed)
    noise = more.losses[1] - more.losses[0]
    assert_allclose(noise[0], noise[1], rtol=0.5)  # all runs of a seed have the same random numbers
    for options in ({"remove": K + 1}, {"controls": 1}, {"queries": 4}, {"damping": 5.0}, {"normalize": "cosine"}):
        with pytest.raises(MismatchError, match="settings"):
            verify_influence(*pair, counted_training(log), tmp_path / "runs", **{"seeds": 2, "remove": K} | options)
    other = Training(least_squares.train, least_squares.loss, {"epochs": 4})
    with pytest.raises(MismatchError, match="epochs"):
        verify_influence(*pair, other, tmp_path / "runs", seeds=2, remove=K)
    assert len(log) == 3 * (5 + 2)


def test_processes_make_no_difference(pair, tmp_path):
    whole = verify_influence(*pair, TRAINING, tmp_path / "one", seeds=1, remove=K)
    named = load_training(f"{Path(__file__).parent / 'least_squares.py'}:training")
    apart = verify_influence(*pair, named, tmp_path / "two", seeds=1, remove=K, processes=2)
    assert_array_equal(apart.losses, whole.losses)


def test_it_resumes_after_a_kill(pair, tmp_path, run):  # noqa: F811
    """The process is killed in its fifth training; the same command gives what an uninterrupted one does."""
    source = Path(__file__).parent / "least_squares.py"
    line = f"verify-influence query.zarr train.zarr --train {source}:training --remove {K} --json --out"
    environment = os.environ | {
        "TRAINED": str(tmp_path / "log"), "KILLED_AT": "5",
        "PYTHONPATH": os.pathsep.join([str(Path(ooc.__file__).parents[1]), *sys.path]),
    }  # fmt: skip
    command = [sys.executable, "-m", "ooc_influence", *line.split(), "runs"]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9
    assert len(list((tmp_path / "runs").glob("run-*.npz"))) == 4
    code, resumed, error = run(f"{line} runs")
    assert code == 0, error
    assert "21 runs: without the 4 strongest rows of each of 5 queries" in error
    assert "for the 17 that are left" in error
    code, whole, error = run(f"{line} whole")
    assert code == 0, error
    first, second = (json.loads(text) for text in (resumed, whole))
    assert first.pop("seconds") != second.pop("seconds")
    assert first == second
    code, shown, _ = run(f"{line.replace(' --json', '')} runs")
    assert code == 0
    assert "Removing the 4 strongest rows of a query raises its loss by " in shown
    assert "scores: curvature" in shown
    changed = tmp_path / "changed.py"
    changed.write_text(source.read_text())
    run(f"{line.replace(str(source), str(changed))} other --seeds 1")
    changed.write_text(source.read_text().replace("RIDGE = 60, 5, 12, 0.1", "RIDGE = 60, 5, 12, 0.2"))
    code, _, error = run(f"{line.replace(str(source), str(changed))} other --seeds 1")
    assert code == 2
    assert "code" in error


def test_long_work_is_confirmed(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(removal_test, "LONG", -1.0)
    asked, log = [], []
    with pytest.raises(InputError, match="received no: confirm it"):
        verify_influence(
            *pair, counted_training(log), tmp_path / "runs", confirm=lambda work: asked.append(work) is not None
        )
    assert asked == ["about 0 s"]
    assert len(log) == 1
    verify_influence(*pair, counted_training(log), tmp_path / "runs", confirm=lambda work: True)
    assert len(log) == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": 40}, "expected 40 rows with positive scores for every query; received"),
        ({"remove": 0}, "expected remove >= 1"),
        ({"seeds": True}, "expected seeds >= 1"),
        ({"queries": 0}, "expected some of 12 queries"),
        ({"queries": []}, "a number of queries, or distinct ids"),
        ({"queries": "q1"}, "a number of queries, or distinct ids"),
        ({"queries": ["q1", "q1"]}, "a number of queries, or distinct ids"),
        ({"queries": ["q1", "other"]}, "received other: 'ooc-influence ids'"),
        ({"queries": 12, "remove": 20}, "at least 20 rows in none of the lists"),
        ({"damping": [0.1, 1.0]}, "expected one damping to test; received 2"),
    ],
)
def test_refusals(pair, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        verify_influence(*pair, TRAINING, tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_training_that_fails_or_measures_something_else(pair, tmp_path):
    for measured, message in (
        (lambda model, queries: np.zeros(3), r"expected a loss of each of 5 queries; received \(3,\)"),
        (lambda model, queries: np.full(5, np.nan), "finite numbers"),
        (lambda model, queries: 1 / 0, "ZeroDivisionError"),
    ):
        with pytest.raises(RunFailedError, match=message):
            verify_influence(*pair, Training(least_squares.train, measured), tmp_path / "runs")


FUNCTIONS = """
def nothing(): return 3
def pair(): return 1, 2
def failing(): return 1 / 0
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train functions.py:nothing", "to return (train, loss), two functions, or a Training; received int"),
        ("--train functions.py:pair", "two functions, or a Training; received Training"),
        ("--train functions.py:failing", "to run; received ZeroDivisionError"),
        ("--train functions.py:other", "expected a function 'other'"),
        ("--train none.py:other", "expected a Python file"),
        ("--train functions.py", "expected --train path.py:function"),
        ("--train functions.py:pair --rank 3", "expected --rank for a LoRA; received it with --train"),
        ("--train functions.py:pair --target a", "expected --target for a LoRA"),
        ("--queries 2 --query q1", "expected --queries or --query; received both"),
        ("--dot --curvature default", "expected --dot or --curvature"),
        ("--seeds 0", "0 is not in the range x>=1"),
    ],
)
def test_wrong_commands(pair, tmp_path, run, arguments, message):  # noqa: F811
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    code, out, error = run(f"verify-influence query.zarr train.zarr --out runs {arguments}")
    assert (code, out) == (2, "")
    assert message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith(("error:", "Error:"))]) == 1


def test_what_is_said():
    def found(own, random):
        losses = np.array([[[own, 2.0], [2.0, own], [random, random], [random, random - 0.125]]])
        rows = np.arange(8).reshape(1, 4, 2)
        names = np.array(["a", "b"])
        return RemovalTest(names, np.arange(2), rows, losses, losses * 0, np.ones((1, 4)), {})

    raised, lowered = str(found(3.0, 1.0)).splitlines(), str(found(1.0, 3.0)).splitlines()
    assert raised[0].split("  ")[:2] == ["query", "loss without its 2"]
    assert raised[1].split()[:4] == ["a", "3.0000", "1.0000", "+2"]
    assert raised[4].startswith("Removing the 2 strongest rows of a query raises its loss by 2.03 [")
    assert raised[4].endswith("] more than removing 2 random rows; it is higher in 4 of 4 comparisons.")
    assert lowered[4].startswith(
        "Removing the 2 strongest rows of a query raises its loss no more than removing 2 random rows, the difference "
        "is -1.97 ["
    )
    assert lowered[4].endswith("it is higher in 0 of 4 comparisons.")
    assert raised[5] == (
        "Removing the 2 strongest rows of a query raises its loss by 1 (too few runs for an interval) more than "
        "removing those of another of these 2 queries; it is higher in 2 of 2 comparisons."
    )


def test_dot_products_can_be_tested(pair, tmp_path, run):  # noqa: F811
    source = Path(__file__).parent / "least_squares.py"
    code, out, error = run(
        f"verify-influence query.zarr train.zarr --out runs --train {source}:training --dot --query q3 --seeds 1 --json"
    )
    assert code == 0, error
    lists = ooc.top_influential(*pair, 10, curvature=False).proponents.rows
    assert json.loads(out)["queries"][0]["removed"] == lists[3].tolist()


def test_intervals_are_those_of_the_formulas():
    random = np.random.default_rng(5)
    own, other = random.normal(size=3), random.normal(size=(4, 3)) * [1, 2, 3]
    values = own - other
    m, q = values.shape
    deviation = values.std(0, ddof=1)
    half = student.ppf(0.975, m - 1) * deviation * np.sqrt(1 + 1 / m)
    for shared in (True, False):
        contrast = Contrast(values, shared)
        assert_allclose(contrast.intervals, np.stack([values.mean(0) - half, values.mean(0) + half], 1))
        common = values.mean(1).var(ddof=1) / m if shared else (deviation**2).sum() / q**2 / m
        variance = (deviation**2).sum() / q**2 + common
        low, high = contrast.interval
        assert (low + high) / 2 == pytest.approx(values.mean())
        assert (high - low) / 2 >= student.ppf(0.975, (m - 1) * q) * np.sqrt(variance) * (1 - 1e-12)
        assert (high - low) / 2 <= student.ppf(0.975, m - 1) * np.sqrt(variance) * (1 + 1e-12)
    single = Contrast(values[:, :1], True)
    assert_allclose(single.interval, single.intervals[0])
    assert np.isnan(Contrast(values[:1], True).interval).all()
    assert np.isnan(Contrast(values[:1], True).intervals).all()
    assert_allclose(Contrast(np.ones((3, 2)), True).interval, [1, 1])


@pytest.mark.parametrize(("m", "q", "correlated"), [(3, 5, True), (6, 5, True), (6, 3, False), (3, 1, True)])
def test_a_removal_without_a_reason_is_found_in_19_of_20_intervals(m, q, correlated):
    random = np.random.default_rng(1)
    mixing = random.normal(size=(q, 2)) @ random.normal(size=(2, q)) if correlated else 0
    mixing = mixing + np.diag(np.exp(random.normal(size=q)))
    inside = np.zeros(2)
    for _ in range(500):
        own = np.diagonal(random.normal(size=(q, q)) @ mixing)  # a choice of rows for each query
        contrast = Contrast(own - random.normal(size=(m, q)) @ mixing, True)
        low, high = contrast.interval
        inside += [low <= 0 <= high, contrast.intervals[0, 0] <= 0 <= contrast.intervals[0, 1]]
    assert (inside / 500 > 0.92).all()

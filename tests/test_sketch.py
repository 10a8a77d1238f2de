"""Lists by way of a sketch: the same rows and scores as without, but for the recall that was asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_rows, write_store
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import (
    Dropout,
    GradientStore,
    KroneckerBasis,
    extract_gradients,
    fit_fisher,
    reduce_store,
    rewrite_store,
    sketch_store,
    top_influential,
)
from ooc_influence.cli.main import cli
from ooc_influence.errors import InputError, MismatchError, OocInfluenceWarning
from ooc_influence.influence import sketch as sketch_module
from ooc_influence.influence.heap import NO_ROW
from ooc_influence.influence.recall import Recall, list_ranks

K, N, Q, R = 60, 3000, 40, 16


def steep(n, seed):
    """Rows whose directions differ in size, as gradients' do."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((K, K)))[0]
    return (random_rows(n, K, seed) * np.arange(1, K + 1) ** -1.5 @ turn).astype(np.float32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide rows, and queries: fewer than are measured with, and as many."""
    folder = tmp_path_factory.mktemp("wide")
    train = write_store(folder / "train.zarr", steep(N, 1), dtype="float16")
    fit_fisher(train)
    few, many = (write_store(folder / f"q{q}.zarr", steep(q, 2), dtype="float16") for q in (5, Q))
    return train, few, many


def shares(found, expected):
    """Return which share of each query's expected rows was found."""
    pairs = zip(found.reshape(-1, found.shape[-1]), expected.reshape(-1, expected.shape[-1]), strict=True)
    return np.array([np.isin(other, rows).mean() for rows, other in pairs])


def same_scores(found, expected):
    """Check that rows that are in both lists have the same scores, in the same order."""
    for side in ("proponents", "opponents"):
        ours, theirs = getattr(found, side), getattr(expected, side)
        lists = (part.reshape(-1, part.shape[-1]) for part in (ours.rows, theirs.rows, ours.scores, theirs.scores))
        for rows, others, scores, truth in zip(*lists, strict=True):
            both = np.isin(rows, others), np.isin(others, rows)
            assert_array_equal(rows[both[0]], others[both[1]])
            assert_allclose(scores[both[0]], truth[both[1]], rtol=1e-5)
            assert both[0].any()


@pytest.mark.parametrize("unit", ["none", "train", "cosine"])
@pytest.mark.parametrize("dtype", ["int8-linear", "int4", "float16"])
def test_lists_are_those_without_a_sketch(tmp_path, wide, unit, dtype):
    """By one damping or several, of many queries, which are measured with, and of few, for which train rows are."""
    train, few, many = wide
    sketch = sketch_store(train, tmp_path / "s.zarr", R, dtype=dtype)
    assert (sketch.n, sketch.k, sketch.layout.dtype) == (N, R, dtype)
    for damping in (None, [0.3, 30.0]):
        for query in (many, few):
            options = {"damping": damping, "normalize": unit, "top": 10}
            expected = top_influential(query, train, **options)
            found = top_influential(query, train, sketch=sketch.path, recall=0.9, **options)
            same_scores(found, expected)
            assert found.proponents.scores.shape == expected.proponents.scores.shape
            assert found.search["rescored"] < 0.5
            share = shares(np.stack([found.proponents.rows, found.opponents.rows]),
                           np.stack([expected.proponents.rows, expected.opponents.rows])).mean()  # fmt: skip
            assert share > 0.8
            assert found.settings == expected.settings


def test_recall_is_what_was_measured(tmp_path, wide):
    """Of the queries that it was measured with; one is reached by enough candidates, and scores are bit-identical."""
    train, _, many = wide
    queries = write_store(tmp_path / "q.zarr", steep(32, 7))  # as many as are measured with: all of them
    sketch = sketch_store(train, tmp_path / "s.zarr", R, query=queries)
    expected = top_influential(queries, train, top=10)
    for asked in (0.5, 0.8, 0.999):
        found = top_influential(queries, train, top=10, sketch=sketch, recall=asked)
        both = (np.stack([lists.proponents.rows, lists.opponents.rows]) for lists in (found, expected))
        share = shares(*both).mean()
        assert share == pytest.approx(found.search["recall"], abs=1e-9)
        assert found.search["measured"] == f"32 queries of {queries.path}"
        assert share >= asked
    assert_array_equal(found.proponents.rows, expected.proponents.rows)
    assert_array_equal(found.opponents.scores, expected.opponents.scores)
    assert found.search["candidates"] < N / 2
    counts = [top_influential(many, train, sketch=sketch, recall=asked).search["candidates"] for asked in (0.5, 0.99)]
    assert counts[0] < counts[1]


def test_what_was_measured_is_kept(tmp_path, wide, monkeypatch):
    """For each setting, until rows change."""
    train, few, _ = wide
    sketch, calls = sketch_store(train, tmp_path / "s.zarr", R), []
    original = sketch_module.SketchSearch._measure

    def measure(self, top):
        calls.append(top)
        return original(self, top)

    monkeypatch.setattr(sketch_module.SketchSearch, "_measure", measure)
    top_influential(few, train, sketch=sketch)  # measured when it was made
    assert calls == []
    for _ in range(2):
        top_influential(few, train, sketch=sketch, damping=3.0, normalize="train")
        assert calls == [100]
    top_influential(few, train, sketch=sketch, damping=3.0, normalize="train", top=120)
    assert calls == [100, 120]
    top_influential(few, train, sketch=sketch, damping=3.0, normalize="train", top=110)
    assert calls == [100, 120]
    kept = {path.name for path in (sketch.path / "candidates").iterdir()}
    assert len(kept) == 3  # ranks at two settings, norms at one
    assert not GradientStore.open(sketch.path).verify()


def test_rows_appended_and_dropped_later(tmp_path):
    rows, query = steep(900, 1), write_store(tmp_path / "q.zarr", steep(6, 2))
    train = write_store(tmp_path / "train.zarr", rows[:700])
    fit_fisher(train)
    sketch = sketch_store(train, r=R)
    assert sketch.path == tmp_path / "train.sketch.zarr"
    with GradientStore.open(train.path, "a") as store:
        store.append(rows[700:], loss=np.ones(200))
    train = GradientStore.open(train.path)
    fit_fisher(train)
    with pytest.raises(MismatchError, match="of 700: run 'ooc-influence sketch"):
        top_influential(query, train, sketch=sketch)
    sketch = sketch_store(train, r=R)
    assert sketch.n == 900
    best = top_influential(query, train, recall=1.0, sketch=sketch).proponents.rows
    assert shares(best, top_influential(query, train).proponents.rows).mean() > 0.95
    assert (best >= 700).any()
    with GradientStore.open(train.path, "a") as store:
        store.drop(np.unique(best[:, :3]))
    train = GradientStore.open(train.path)
    for refit in (False, True):
        options = {"curvature": False} if not refit else {}
        if refit:
            fit_fisher(train)
        found, expected = (
            top_influential(query, train, normalize="none", **options, **more)
            for more in ({"sketch": sketch, "recall": 1.0}, {})
        )
        assert not np.isin(found.proponents.rows, best[:, :3]).any()
        assert shares(found.proponents.rows, expected.proponents.rows).mean() > 0.95
    again = sketch_store(train, r=R)
    assert_array_equal(again.dropped, train.dropped)


def test_rows_that_only_some_checkpoints_saw(wide, tmp_path):
    train, few, _ = wide
    sketch, seen = sketch_store(train, tmp_path / "s.zarr", R), np.arange(0, N, 3)
    found, expected = (
        top_influential(few, train, rows=seen, **more) for more in ({"sketch": sketch, "recall": 1.0}, {})
    )
    assert_array_equal(found.proponents.rows, expected.proponents.rows)
    assert not (found.proponents.rows % 3).any()


def test_sketches_of_reduced_rows(wide, tmp_path):
    """And of rows that are turned further: the sketch's basis is one of the wide entries."""
    train, few, many = wide
    reduced = reduce_store(train, tmp_path / "r.zarr", 40)
    fit_fisher(reduced)
    queries = [reduce_store(query, tmp_path / f"rq{query.n}.zarr", like=reduced) for query in (few, many)]
    sketch = sketch_store(reduced, tmp_path / "s.zarr", R)
    assert_allclose(sketch.reduction.vectors.T @ sketch.reduction.vectors, np.eye(R), atol=1e-5)
    for query in queries:
        same_scores(*(top_influential(query, reduced, **more) for more in ({"sketch": sketch}, {})))
    with pytest.raises(MismatchError, match="made of another store"):
        top_influential(few, train, sketch=sketch)


@pytest.mark.parametrize("dtype", ["float16", "sign"])
@pytest.mark.parametrize("unit", ["train", "none"])
def test_sketches_of_rows_in_a_kronecker_basis(tmp_path, dtype, unit):
    """Whitened, of numbers and of signs, whose norms are kept at some dampings and computed at others."""
    x, y = data(Mlp, 600)
    how = {"compressor": Dropout(k=90, basis=KroneckerBasis(64)), "dtype": "float16"}
    train = extract_gradients(make(Mlp), loss, batches(x, y, 50), tmp_path / "t", **how)
    query = extract_gradients(make(Mlp), loss, batches(x[:8], y[:8], 8), tmp_path / "q", like=train)
    if dtype == "sign":
        train = rewrite_store(train, tmp_path / "signs")
    sketch = sketch_store(train, tmp_path / "s", 24)
    assert sketch.attrs["reduction"]["whitened"] > 0
    for damping in (None, 0.037):
        options = {"curvature": "kronecker", "damping": damping, "normalize": unit, "top": 8}
        found = top_influential(query, train, sketch=sketch, **options)
        expected = top_influential(query, train, **options)
        same_scores(found, expected)
        assert shares(found.proponents.rows, expected.proponents.rows).mean() > 0.9


def test_an_interrupted_search_resumes(tmp_path, wide, monkeypatch):
    """Between the candidates and their scores, and among these: nothing is done twice."""
    train, few, _ = wide
    sketch = sketch_store(train, tmp_path / "s.zarr", R)
    expected = top_influential(few, train, sketch=sketch, workers=1)
    original, calls = sketch_module._score_pairs, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("interrupted")
        return original(*args)

    monkeypatch.setattr(sketch_module, "_score_pairs", failing)
    resume = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="interrupted"):
        top_influential(few, train, sketch=sketch, resume=resume, workers=1)
    monkeypatch.setattr("ooc_influence.influence.search._Search.run", None)  # the candidates are there
    found = top_influential(few, train, sketch=sketch, resume=resume, workers=1)
    assert_array_equal(found.proponents.rows, expected.proponents.rows)
    assert not resume.exists()


def test_a_sketch_that_finds_too_little_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sketch_module, "_LONGEST", 1)
    train = write_store(tmp_path / "t.zarr", random_rows(4000, K))
    query = write_store(tmp_path / "q.zarr", random_rows(3, K, seed=1))
    fit_fisher(train)
    sketch = sketch_store(train, tmp_path / "s.zarr", 2)
    with pytest.warns(OocInfluenceWarning, match=r"finds .*% of the best 10 rows of a query among 1024 candidates"):
        top_influential(query, train, sketch=sketch)


def test_refusals(tmp_path, wide):
    train, few, _ = wide
    sketch = sketch_store(train, tmp_path / "s.zarr", R)
    for recall in (0, 1.5):
        with pytest.raises(InputError, match="expected 0 < recall <= 1"):
            top_influential(few, train, sketch=sketch, recall=recall)
    with pytest.raises(InputError, match="received several: leave it out"):
        top_influential([few, few], [train, train], sketch=sketch)
    for r in (0, K + 1):
        with pytest.raises(InputError, match=f"expected 1 <= r <= {K}"):
            sketch_store(train, tmp_path / "other.zarr", r)
    with pytest.raises(MismatchError, match="reduce to another path"):
        sketch_store(train, sketch.path, R - 1)


def test_ranks_and_candidates():
    assert_array_equal(list_ranks(np.array([5, 3, 9, NO_ROW]), np.array([9, 1, 3])), [3, 2, 0, -1])
    ranks = np.array([[[[0, 2, 9]], [[0, 1, 2]]], [[[1, 0, -1]], [[2, 1, 0]]]])
    recall = Recall(ranks, 9, "")  # the second damping's lists are all found early
    assert [recall.of(count, 3) for count in (1, 2, 3, 9)] == [1 / 3, 0.6, 0.8, 0.8]
    assert recall.of(3, 2) == 1
    assert [recall.candidates(2, share) for share in (0.5, 0.75, 1.0)] == [3, 3, 4]
    assert recall.candidates(3, 1.0) == 9


def test_the_commands(tmp_path, wide):
    train, few, many = wide
    asked = ["sketch", str(train.path), str(tmp_path / "s.zarr"), "--dims", str(R), "--query", str(many.path), "--json"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    asked = ["top", str(few.path), str(train.path), "--sketch", str(tmp_path / "s.zarr"), "--recall", "0.9"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    assert "measured on 32 queries of" in result.output
    result = CliRunner().invoke(cli, [*asked, "--json"])
    found = json.loads(result.stdout)
    expected = top_influential(few, train, sketch=tmp_path / "s.zarr", recall=0.9)
    assert [entry["row"] for entry in found["queries"][0]["proponents"]] == expected.proponents.rows[0].tolist()
    assert found["search"]["candidates"] == expected.search["candidates"]

"""Lists by a sketch that are proven complete: bounds hold for every row, and with ``recall=1`` nothing is missing."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_store
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_array_equal

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
from ooc_influence.compress.residuals import RESIDUALS, pack_norms, unpack_norms
from ooc_influence.errors import InputError
from ooc_influence.influence import sketch as sketch_module
from ooc_influence.influence.proof import Proof, highest_outside
from ooc_influence.influence.recall import Recall
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.sketch import SketchSearch
from ooc_influence.influence.upper import residual_norms
from ooc_influence.options import TopOptions, complete
from ooc_influence.report import describe_search

K, N, Q, R = 60, 3000, 6, 12
SIDES = ("proponents", "opponents")


def low_rank(n, seed, noise=0.02):
    """Rows in eight directions, and some noise in all."""
    directions = np.random.default_rng(0).standard_normal((8, K))
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((n, 8)) @ directions + noise * generator.standard_normal((n, K))
    return rows.astype(np.float32)


def pair(folder, rows, queries, **options):
    """Return a query and a train store, and a sketch of this."""
    train, query = write_store(folder / "t.zarr", rows), write_store(folder / "q.zarr", queries)
    fit_fisher(train)
    return query, train, sketch_store(train, folder / "s.zarr", R, **options)


def check_same(found, expected):
    """Check that lists are the same to the bit."""
    for side in SIDES:
        for name in ("rows", "scores"):
            assert_array_equal(getattr(getattr(found, side), name), getattr(getattr(expected, side), name))


def check_sound(found, expected):
    """Check that what is said to be proven is the truth."""
    complete_lists = [
        (np.sort(getattr(found, side).rows) == np.sort(getattr(expected, side).rows)).all(-1) for side in SIDES
    ]
    assert (np.logical_and(*complete_lists) | ~found.proven).all()


def check_bounds(query, train, sketch, damping, rate):
    """Check the bound of every pair against float64 products; return the mean bound over ‖q‖ ‖g‖."""
    options = {"curvature": None if damping else False, "damping": damping, "normalize": "none"}
    scoring = ScoreRequest.open(query, train, options, lists=True)
    search = SketchSearch.of(scoring, sketch, complete(TopOptions, {"sketch": sketch, **options}))
    wide = scoring.precondition(0, scoring.q)
    turned = search._turned(scoring.precondition, proving=True)(0, scoring.q)
    factors = turned.bounds.rows(residual_norms(sketch, 0, sketch.n), None)[0].astype(np.float64)
    assert not factors[-2].any()
    rows, queries = train.rows().astype(np.float64), wide.arrays[0].astype(np.float64)
    error = np.abs(queries @ rows.T - turned.arrays[0].astype(np.float64) @ sketch.rows().astype(np.float64).T)
    bounds = turned.bounds.lists @ factors
    assert (error <= bounds).all()
    sizes = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    assert np.median(bounds / np.maximum(sizes, 1e-300)) < rate


@pytest.mark.parametrize("dtype", ["int8-linear", "int8", "int4", "float16", "float32", "bfloat16"])
def test_bounds_hold_for_every_row(tmp_path, dtype):
    rows = low_rank(700, 1)
    rows[:3], rows[3], rows[450], rows[451] = 0, 1e-20 * rows[3], 1e18 * rows[450], 1e-20 * rows[451]
    queries = low_rank(Q, 2)
    basis = np.linalg.svd(rows[10:300], full_matrices=False)[2][:R]
    queries[0] = 50 * (rows[10] - basis.T @ (basis @ rows[10]))  # what is left out of a row: the bound is tight
    query, train, sketch = pair(tmp_path, rows[:400], queries, dtype=dtype)
    with GradientStore.open(train.path, "a") as store:
        store.append(rows[400:], loss=np.ones(300))
    train = GradientStore.open(train.path)
    sketch = sketch_store(train, sketch.path, R, dtype=dtype)
    check_bounds(query, train, sketch, None, {"int4": 0.5, "float32": 0.02, "float16": 0.02}.get(dtype, 0.1))


@pytest.mark.parametrize("dtype", ["float16", "sign"])
def test_bounds_hold_in_a_kronecker_basis(tmp_path, dtype):
    """Whitened: the residual is measured where directions matter alike."""
    x, y = data(Mlp, 600)
    how = {"compressor": Dropout(k=90, basis=KroneckerBasis(64)), "dtype": "float16"}
    train = extract_gradients(make(Mlp), loss, batches(x, y, 50), tmp_path / "t", **how)
    query = extract_gradients(make(Mlp), loss, batches(x[:8], y[:8], 8), tmp_path / "q", like=train)
    if dtype == "sign":
        train = rewrite_store(train, tmp_path / "signs")
    sketch = sketch_store(train, tmp_path / "s", 40)
    check_bounds(query, train, sketch, 0.03, 1)
    for unit in ("none", "train", "cosine"):
        options = {"curvature": "kronecker", "damping": [0.03, 1.0], "normalize": unit, "top": 5}
        expected = top_influential(query, train, **options)
        found = top_influential(query, train, sketch=sketch, recall=1, **options)
        if dtype == "float16" or unit == "none":
            check_same(found, expected)
        else:  # norms of signs are kept at some dampings only: one float32 product gives the scores of all rows
            assert_array_equal(found.proponents.rows, expected.proponents.rows)
        check_sound(top_influential(query, train, sketch=sketch, recall=0.8, prove=True, **options), expected)


def test_bounds_hold_for_reduced_rows(tmp_path):
    train = write_store(tmp_path / "t.zarr", low_rank(N, 1))
    reduced = reduce_store(train, tmp_path / "r.zarr", 40)
    fit_fisher(reduced)
    query = reduce_store(write_store(tmp_path / "q.zarr", low_rank(Q, 2)), tmp_path / "rq.zarr", like=reduced)
    sketch = sketch_store(reduced, tmp_path / "s.zarr", R)
    check_bounds(query, reduced, sketch, None, 0.1)
    check_same(top_influential(query, reduced, sketch=sketch, recall=1), top_influential(query, reduced))


def test_norms_are_rounded_up():
    norms = np.array([[0, 1, 1.0000001], [1e-20, 3e38, 1e39], [np.inf, np.nan, 1e-46]])
    found = unpack_norms(pack_norms(norms)).T
    assert (found >= np.nan_to_num(norms, nan=np.inf, posinf=np.inf)).all()
    assert (found[0] == [0, 1, np.float32(1 + 2**-13)]).all()
    assert found[1, 0] < 1.001e-20
    assert np.isinf([found[1, 2], found[2, 0], found[2, 1]]).all()


@pytest.mark.parametrize("unit", ["none", "train"])
def test_lists_of_recall_one_are_those_of_all_rows(tmp_path, unit):
    """To the bit; what is proven with fewer candidates is true."""
    query, train, sketch = pair(tmp_path, low_rank(N, 1, noise=0.3), low_rank(Q, 2, noise=0.3))
    options = {"curvature": False, "normalize": unit}
    expected = top_influential(query, train, **options)
    for recall in (0.3, 0.9, 1):
        found = top_influential(query, train, sketch=sketch, recall=recall, prove=True, **options)
        check_sound(found, expected)
        assert found.search["proven_queries"] == found.proven.sum()
    check_same(found, expected)
    assert found.proven.all()
    assert found.search["measured"] is None
    assert found.to_dict()["queries"][0]["proven"] is True


def test_low_rank_rows_are_proven_without_measuring(tmp_path, monkeypatch):
    query, train, sketch = pair(tmp_path, low_rank(N, 1), low_rank(Q, 2))
    found = top_influential(query, train, sketch=sketch, damping=1.0, prove=True)
    assert found.search["proven_share"] > 0.8
    assert "recall is proven for" in describe_search(found.search)
    monkeypatch.setattr(SketchSearch, "_measure", None)
    found = top_influential(query, train, sketch=sketch, damping=10.0, recall=1)
    assert found.search["rescored"] == pytest.approx(2 * 256 / N)
    assert found.search["scanned_queries"] == 0
    assert found.search["candidates"] == 256
    assert "all lists are proven complete" in describe_search(found.search)


def hidden(folder, scale=3.0, others=0.02):
    """Return stores with a row that a query likes best, orthogonal to nearly all that the sketch holds."""
    rows, queries = low_rank(N, 1, noise=others), low_rank(Q, 2, noise=0)
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((8, K)).T)[0]
    away = np.random.default_rng(5).standard_normal(K)
    away -= directions @ (directions.T @ away)
    away /= np.linalg.norm(away)
    rows[777] = scale * away
    queries[2] = (0.01 * queries[2] + 5 * away).astype(np.float32)
    return pair(folder, rows, queries)


def test_a_row_hidden_from_the_sketch_is_found(tmp_path, monkeypatch):
    """It is the best of a query; without it, that query's list is not said to be complete."""
    monkeypatch.setattr(sketch_module, "SKETCH_DIMS", 8)
    folder = tmp_path
    query, train, sketch = hidden(folder)
    sketch = sketch_store(train, folder / "eight.zarr", 8, rows=500)  # of these, row 777 is none
    options = {"curvature": False, "top": 3}
    expected = top_influential(query, train, **options)
    assert expected.proponents.rows[2, 0] == 777
    monkeypatch.setattr(Recall, "candidates", lambda self, top, wanted: 5)
    found = top_influential(query, train, sketch=sketch, recall=0.9, prove=True, **options)
    assert 777 not in found.proponents.rows[2]
    assert not found.proven[2]
    check_sound(found, expected)
    assert found.proven.any()
    monkeypatch.setattr(sketch_module, "_FIRST", 3)
    monkeypatch.setattr(sketch_module, "_FIRST_TIMES", 1)
    found = top_influential(query, train, sketch=sketch, recall=1, **options)
    check_same(found, expected)
    assert found.search["candidates"] == 3
    assert found.search["rescored"] > 3 / N
    # where too many rows would be scored one by one, all are searched
    monkeypatch.setattr(sketch_module, "_LEAST_REACHED", 1)
    monkeypatch.setattr(sketch_module, "_REACHED_OF", 10 * N)
    found = top_influential(query, train, sketch=sketch, recall=1, **options)
    check_same(found, expected)
    assert found.search["scanned_queries"] > 0


def test_zero_rows_ties_and_a_huge_range(tmp_path):
    rows = low_rank(N, 1)
    rows[:200] = 0
    rows[200:400] = rows[400]
    rows[400:1000] *= np.geomspace(1e-20, 1e15, 600, dtype=np.float32)[:, None]
    queries = low_rank(Q, 2)
    queries[0], queries[1], queries[2] = 0, 1e-15 * queries[1], rows[400] / np.abs(rows[400]).max()
    query, train, sketch = pair(tmp_path, rows, queries)
    for unit in ("none", "train"):
        options = {"curvature": False, "normalize": unit, "top": 20}
        expected = top_influential(query, train, **options)
        check_same(top_influential(query, train, sketch=sketch, recall=1, **options), expected)
        check_sound(top_influential(query, train, sketch=sketch, recall=0.5, prove=True, **options), expected)


def test_appended_and_dropped_rows(tmp_path):
    rows = low_rank(N, 1, noise=0.2)
    query, train, sketch = pair(tmp_path, rows[:2000], low_rank(Q, 2))
    with GradientStore.open(train.path, "a") as store:
        store.append(rows[2000:], loss=np.ones(N - 2000))
    train = GradientStore.open(train.path)
    fit_fisher(train)
    sketch = sketch_store(train, sketch.path, R)
    best = top_influential(query, train)
    check_same(top_influential(query, train, sketch=sketch, recall=1), best)
    with GradientStore.open(train.path, "a") as store:
        store.drop(np.unique(best.proponents.rows[:, :3]))
    train = GradientStore.open(train.path)
    options = {"curvature": False, "rows": np.arange(0, N, 2)}
    for more in ({}, options):
        if not more:
            fit_fisher(train)
        expected = top_influential(query, train, **more)
        check_same(top_influential(query, train, sketch=sketch, recall=1, **more), expected)
        check_sound(top_influential(query, train, sketch=sketch, recall=0.9, prove=True, **more), expected)


def test_few_rows_are_all_candidates(tmp_path):
    query, train, sketch = pair(tmp_path, low_rank(100, 1, noise=1), low_rank(Q, 2))
    with GradientStore.open(query.path, "a") as store:
        store.drop([1])
    found = top_influential(GradientStore.open(query.path), train, sketch=sketch, recall=1, top=200)
    check_same(found, top_influential(GradientStore.open(query.path), train, top=200))
    assert_array_equal(found.proven, np.arange(Q) != 1)
    assert found.search["queries"] == Q - 1


def test_what_is_proven_does_not_depend_on_the_product(tmp_path):
    query, train, sketch = pair(tmp_path, low_rank(N, 1, noise=0.3), low_rank(Q, 2, noise=0.3))
    facts = []
    for product in ("float32", "bfloat16", "int8"):
        rows = {"product": "auto" if product == "int8" else product}
        for workers in (1, 2):
            found = top_influential(
                query, train, sketch=sketch, recall=0.9, prove=True, damping=3.0, workers=workers, **rows
            )
            facts.append((found.proven.tolist(), found.search["proven_share"]))
    assert all(each == facts[0] for each in facts)
    assert 0 < facts[0][1] < 1


def test_on_a_device(tmp_path):
    query, train, sketch = pair(tmp_path, low_rank(N, 1, noise=0.1), low_rank(Q, 2))
    options = {"curvature": False, "sketch": sketch, "prove": True}
    expected = top_influential(query, train, curvature=False)
    for recall in (0.9, 1):
        found = top_influential(query, train, device="cpu", recall=recall, **options)
        check_sound(found, expected)
        there, here = found.search["proven_share"], top_influential(query, train, recall=recall, **options).search
        assert there == pytest.approx(here["proven_share"], abs=0.02)
    check_same(found, expected)


def test_sketches_without_norms_prove_nothing(tmp_path):
    """Any reduced store of the rows finds candidates, and so do sketches of earlier versions."""
    query, train, sketch = pair(tmp_path, low_rank(N, 1), low_rank(Q, 2))
    older = reduce_store(train, tmp_path / "older.zarr", R, dtype="int8-linear")
    found = top_influential(query, train, sketch=older)
    assert found.proven is None
    assert "proven_queries" not in found.search
    assert "measured on" in describe_search(found.search)
    assert "proven" not in found.to_dict()["queries"][0]
    assert top_influential(query, train, sketch=sketch).proven is None  # nor where it is not asked for
    for asked in ({"recall": 1}, {"prove": True}):
        with pytest.raises(InputError, match=r"expected a sketch with the norms .* run 'ooc-influence sketch' again"):
            top_influential(query, train, sketch=older, **asked)
    # a store made of a sketch's rows inherits the column, of other rows
    again = reduce_store(sketch, tmp_path / "again.zarr", R, rotate=True)
    assert RESIDUALS in again.layout.columns
    narrow = write_store(tmp_path / "n.zarr", low_rank(Q, 2))
    rows = reduce_store(narrow, tmp_path / "nr.zarr", like=sketch)
    assert top_influential(rows, sketch, sketch=again, curvature=False).proven is None


def test_an_interrupted_proof_resumes(tmp_path, monkeypatch):
    query, train, sketch = pair(tmp_path, low_rank(N, 1, noise=0.3), low_rank(Q, 2, noise=0.3))
    monkeypatch.setattr(sketch_module, "_FIRST", 12)
    monkeypatch.setattr(sketch_module, "_FIRST_TIMES", 1)
    monkeypatch.setattr(sketch_module, "_REACHED_OF", 1)
    options = {"sketch": sketch, "recall": 1, "curvature": False, "workers": 1}
    expected = top_influential(query, train, curvature=False)
    original, calls = sketch_module._score_pairs, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("interrupted")
        return original(*args)

    monkeypatch.setattr(sketch_module, "_score_pairs", failing)
    with pytest.raises(RuntimeError, match="interrupted"):
        top_influential(query, train, resume=tmp_path / "parts", **options)
    monkeypatch.setattr("ooc_influence.influence.search._Search.tiles", None)  # candidates and further rows are there
    monkeypatch.setattr(sketch_module, "_score_pairs", original)
    check_same(top_influential(query, train, resume=tmp_path / "parts", **options), expected)


def test_highest_bounds_and_proofs():
    bounds = np.array([[9.0, 8, 7], [9, 8, 7], [9, -np.inf, -np.inf]], np.float32)
    rows = np.array([[4, 5, 6], [4, 5, 6], [4, sketch_module.NO_ROW, sketch_module.NO_ROW]])
    candidates = np.array([[4, 1, 2], [6, 5, 4], [4, sketch_module.NO_ROW, sketch_module.NO_ROW]])
    outside = highest_outside((bounds, rows), candidates)
    assert_array_equal(outside, [8, 7, -np.inf])
    scores = np.array([[9.0, 8.0], [9.0, 7.5], [1.0, -np.inf]], np.float32)[None, None]
    listed = np.array([[4, 1], [6, 5], [4, sketch_module.NO_ROW]])[None, None]
    proof = Proof.of(scores, listed, outside[None, None])
    assert_array_equal(proof.lists[0, 0], [False, True, True])
    assert_array_equal(proof.entries[0, 0], [[True, False], [True, True], [True, False]])
    assert proof.facts == {"queries": 3, "proven_queries": 2, "proven_share": 4 / 5}

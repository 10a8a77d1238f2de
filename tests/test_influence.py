"""Fisher, scores, top-k and self-influence against the dense float64 oracle on the same stored rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import oracle
import pytest
import zarr
from conftest import random_rows, roomy, whole_mask, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr

import ooc_influence.curvature.fit as fisher_room
from ooc_influence import (
    Curvature,
    GradientStore,
    fit_fisher,
    influence_scores,
    self_influence,
    top_influential,
)
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    MemoryBudgetError,
    MismatchError,
    SingularFisherError,
    StaleCurvatureError,
    StoreDamagedError,
    StoreExistsError,
)
from ooc_influence.influence.costs import TileMemory
from ooc_influence.influence.engine import HostEngine
from ooc_influence.influence.heap import TopKHeap, merge
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.memory import WORKING


def assert_close(found, expected, tolerance=1e-5):
    """Equal to ``tolerance`` of the largest entry."""
    assert np.isfinite(expected).any()
    assert_allclose(found, expected, rtol=0, atol=tolerance * np.nanmax(np.abs(expected)))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """p = k = 2000 columns, 3000 rows, float16; the stored rows are the oracle's input."""
    folder = tmp_path_factory.mktemp("large")
    train = write_store(folder / "train.zarr", random_rows(3000, 2000), dtype="float16", chunk_rows=500)
    query = write_store(folder / "query.zarr", random_rows(20, 2000, seed=1), dtype="float16")
    fit_fisher(train, memory=roomy())
    return query, train


def test_all_of_it_against_the_oracle(large):
    query, train = large
    g, q = train.rows().astype(np.float64), query.rows().astype(np.float64)
    matrix = oracle.fisher(g)
    value = oracle.damping(matrix)
    curvature = Curvature.open(train.path / "curvature" / "default")
    assert_close(curvature.fisher(), matrix, 1e-6)
    assert_allclose(curvature.damping_value(), value, rtol=1e-6)
    assert curvature.rows == 3000
    expected = oracle.scores(q, g, value, matrix)
    assert_close(influence_scores(query, train).compute(), expected)
    assert_close(self_influence(train), np.einsum("ij,ij->i", g, np.linalg.solve(matrix + value * np.eye(2000), g.T).T))
    order = np.argsort(-expected, axis=1)
    top = top_influential(query, train, top=5)
    assert_array_equal(top.proponents.rows, order[:, :5])
    assert_array_equal(top.opponents.rows, order[:, ::-1][:, :5])
    assert_close(top.opponents.scores, np.take_along_axis(expected, order[:, ::-1][:, :5], 1))


@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_any_damping_from_one_fit(pair, factor, mode):
    query, train = pair
    fit_fisher(train)
    g = train.rows()
    value = oracle.damping(oracle.fisher(g), factor) if mode == "relative" else factor
    assert_close(influence_scores(query, train, damping=factor, damping_mode=mode).compute(),
          oracle.scores(query.rows(), g, value))  # fmt: skip
    assert_close(self_influence(train, damping=factor, damping_mode=mode), oracle.self_influence(g, value))


def test_effective_dimension(pair):
    curvature = fit_fisher(pair[1])
    e = np.linalg.eigvalsh(oracle.fisher(pair[1].rows()))
    assert_allclose(curvature.effective_dimension(0.01), (e / (e + 0.01)).sum(), rtol=1e-5)
    assert_allclose(curvature.eigenvalues, e[::-1], atol=1e-6 * e[-1])
    assert_allclose(curvature.trace, e.sum(), rtol=1e-6)


def test_fewer_rows_than_columns(tmp_path):
    rows = random_rows(12, 40)
    train = write_store(tmp_path / "t.zarr", rows)
    query = write_store(tmp_path / "q.zarr", random_rows(3, 40, 1))
    fit_fisher(train)
    value = oracle.damping(oracle.fisher(rows), rows=12)
    assert_close(influence_scores(query, train).compute(), oracle.scores(query.rows(), rows, value))
    with pytest.raises(SingularFisherError, match=r"rank 12 < 40.*received 0"):
        influence_scores(query, train, damping=0.0)


def test_no_damping_where_f_has_an_inverse(pair):
    query, train = pair
    fit_fisher(train)
    assert_close(influence_scores(query, train, damping=0.0).compute(), oracle.scores(query.rows(), train.rows(), 0.0))


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 500, 1000])
def test_chunks_change_nothing(tmp_path, pair, chunk_rows):
    query, train = pair
    fit_fisher(train)
    other = write_store(tmp_path / "other.zarr", train.rows(), chunk_rows=chunk_rows)
    fit_fisher(other)
    assert_array_equal(influence_scores(query, other).compute(), influence_scores(query, train).compute())
    assert_array_equal(self_influence(other), self_influence(train))


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_change_nothing(large, workers, tmp_path, monkeypatch):
    """To rounding: BLAS sums in another order with another number of threads, by how much depends on the CPU."""
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**20)  # 128 rows: enough blocks to divide
    query, train = large
    one = Curvature.open(train.path / "curvature" / "default")
    many = fit_fisher(train, out=tmp_path / "f.zarr", workers=workers, memory=roomy())
    assert_close(many.fisher(), one.fisher(), 1e-6)
    options = {"curvature": one, "memory": "4GiB"}
    assert_close(self_influence(train, workers=workers, **options), self_influence(train, **options), 1e-6)
    several, single = (top_influential(query, train, top=50, workers=count, **options) for count in (workers, 1))
    for side in ("proponents", "opponents"):
        assert_array_equal(getattr(several, side).rows, getattr(single, side).rows)
        assert_close(getattr(several, side).scores, getattr(single, side).scores, 3e-6)
    written = influence_scores(query, train, out=tmp_path / "scores.zarr", workers=workers, **options)
    assert_close(written[...], influence_scores(query, train, **options).compute(), 3e-6)


def test_order_of_rows_changes_nothing(tmp_path, pair):
    query, train = pair
    fit_fisher(train)
    order = np.random.default_rng(0).permutation(train.n)
    shuffled = write_store(tmp_path / "shuffled.zarr", train.rows()[order])
    fit_fisher(shuffled)
    expected = influence_scores(query, train).compute()[:, order]
    assert_close(influence_scores(query, shuffled).compute(), expected, 1e-6)


def test_float16_scores_rank_like_float32(tmp_path, pair):
    query, train = pair
    fit_fisher(train)
    small_train = write_store(tmp_path / "t16.zarr", train.rows(), dtype="float16")
    small_query = write_store(tmp_path / "q16.zarr", query.rows(), dtype="float16")
    fit_fisher(small_train)
    exact = influence_scores(query, train).compute()
    stored = influence_scores(small_query, small_train).compute()
    for row, other in zip(exact, stored, strict=True):
        assert spearmanr(row, other).statistic > 0.9999


def test_dropped_rows(tmp_path, pair):
    query, train = pair
    gone = [0, 77, 499]
    with GradientStore.open(train.path, "a") as store:
        store.drop(gone)
    train = GradientStore.open(train.path)
    curvature = fit_fisher(train)
    assert curvature.rows == 497
    live = np.delete(train.rows(), gone, axis=0)
    matrix = oracle.fisher(live)
    assert_close(curvature.fisher(), matrix, 1e-6)
    scores = influence_scores(query, train).compute()
    assert np.isnan(scores[:, gone]).all()
    assert_close(np.delete(scores, gone, axis=1), oracle.scores(query.rows(), live, oracle.damping(matrix)))
    own = self_influence(train)
    assert np.flatnonzero(np.isnan(own)).tolist() == gone
    top = top_influential(query, train, top=1000)
    assert top.proponents.rows.shape == (7, 497)
    assert not np.isin(gone, top.proponents.rows).any()
    assert not np.isin(gone, top.opponents.rows).any()


def test_scores_on_disk(tmp_path, pair):
    query, train = pair
    fit_fisher(train)
    out = influence_scores(query, train, out=tmp_path / "deep" / "scores.zarr")
    assert isinstance(out, zarr.Array)
    assert_array_equal(zarr.open_array(str(tmp_path / "deep" / "scores.zarr"))[...],
                       influence_scores(query, train).compute())  # fmt: skip
    assert out.attrs["train"] == str(train.path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.zarr"]
    written = (tmp_path / "deep" / "scores.zarr" / "c.0.0").stat().st_mtime_ns
    assert influence_scores(query, train, out=tmp_path / "deep" / "scores.zarr").attrs["complete"]  # nothing to do
    assert (tmp_path / "deep" / "scores.zarr" / "c.0.0").stat().st_mtime_ns == written
    for other in ({"damping": 0.5}, {"normalize": "train"}, {"rows": [1, 2]}, {"average_queries": True}):
        with pytest.raises(StoreExistsError, match="by the same call"):
            influence_scores(query, train, out=tmp_path / "deep" / "scores.zarr", **other)
    for taken in (train.path, train.path / "zarr.json"):
        with pytest.raises(StoreExistsError, match="expected nothing at"):
            influence_scores(query, train, out=taken)


def test_a_lost_chunk_stops_the_scores_and_they_go_on_when_it_is_back(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**13)  # blocks of 64 rows
    query, train = pair
    fit_fisher(train)
    expected = influence_scores(query, train).compute()
    chunk = train.path / "gradients" / "c.3.0"
    data = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(StoreDamagedError, match=r"c\.3\.0"):
        influence_scores(query, train, out=tmp_path / "scores.zarr")
    begun = zarr.open_array(str(tmp_path / "scores.zarr"))
    assert not begun.attrs["complete"]
    assert_array_equal(begun[:, :128], expected[:, :128])
    assert np.isnan(begun[:, 192:]).all()
    chunk.write_bytes(data)
    written = (tmp_path / "scores.zarr" / "c.0.1").stat().st_mtime_ns
    again = influence_scores(query, train, out=tmp_path / "scores.zarr")
    assert_array_equal(again[...], expected)
    assert (tmp_path / "scores.zarr" / "c.0.1").stat().st_mtime_ns == written


def test_more_queries_than_a_block(tmp_path):
    rows = random_rows(2500, 6)
    train = write_store(tmp_path / "t.zarr", rows[:50])
    query = write_store(tmp_path / "q.zarr", rows, chunk_rows=999)
    fit_fisher(train)
    expected = oracle.scores(rows, rows[:50], oracle.damping(oracle.fisher(rows[:50])))
    assert_close(influence_scores(query, train).compute(), expected)
    assert_close(influence_scores(query, train, out=tmp_path / "s.zarr")[...], expected)
    assert_array_equal(top_influential(query, train, top=3).proponents.rows, np.argsort(-expected, axis=1)[:, :3])


def test_ids_travel_with_the_rows(tmp_path):
    rows = random_rows(30, 6)
    train = GradientStore.create(tmp_path / "t.zarr", whole_mask(6), ids="str")
    with train:
        train.append(rows, loss=np.zeros(30), ids=[f"doc-{number}" for number in range(30)])
    query = write_store(tmp_path / "q.zarr", rows[:2])
    fit_fisher(train)
    top = top_influential(query, train, top=2)
    assert top.proponents.ids[0, 0] == f"doc-{top.proponents.rows[0, 0]}"
    listed = top.to_dict()["queries"][1]["opponents"][0]
    assert listed["id"] == f"doc-{listed['row']}"


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, np.nan]), min_size=1, max_size=60),
    top=st.integers(1, 8),
    cuts=st.lists(st.integers(1, 59), max_size=5),
    split=st.integers(0, 59),
)
def test_best_list_is_a_stable_sort(values, top, cuts, split):
    """However the row of scores is cut into tiles and stripes; ties go to the smaller row number."""
    scores = np.array([values], np.float32)
    halves = []
    for low, high in ((0, min(split, len(values))), (min(split, len(values)), len(values))):
        best = TopKHeap(1, top, high - low)
        edges = sorted({low, high, *(cut for cut in cuts if low < cut < high)})
        for first, last in pairwise(edges):
            best.add(scores[:, first:last], first, HostEngine())
        halves.append(best)
    found = merge(halves[1].best(), halves[0].best())[1]
    live = [number for number, value in enumerate(values) if not np.isnan(value)]
    expected = sorted(live, key=lambda number: (-values[number], number))[:top]
    assert [row for row in found[0] if row < len(values)] == expected


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "level"])
def test_best_lists_of_many_scores(order):
    """Lists that fill, overflow and are split, against a sort."""
    generator = np.random.default_rng(3)
    scores = generator.standard_normal((40, 3000)).astype(np.float32)
    if order != "random":
        scores.sort(axis=1)
    scores = {"descending": scores[:, ::-1], "level": np.round(scores)}.get(order, scores)
    best = TopKHeap(40, 70, 3000)
    for first in range(0, 3000, 700):
        best.add(np.ascontiguousarray(scores[:, first : first + 700]), first, HostEngine())
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :70]
    assert_array_equal(best.best()[1], expected)
    assert_array_equal(best.best()[0], np.take_along_axis(scores, expected, 1))


def test_a_curvature_is_kept_refused_and_refitted(tmp_path, pair):
    query, train = pair
    with pytest.raises(CurvatureNotFoundError, match="run fit_curvature"):
        influence_scores(query, train)
    first = fit_fisher(train)
    again = fit_fisher(train)
    assert (again.path / "zarr.json").stat().st_mtime_ns == (first.path / "zarr.json").stat().st_mtime_ns
    with GradientStore.open(train.path, "a") as store:
        store.append(random_rows(10, 40, 5), loss=np.zeros(10))
    grown = GradientStore.open(train.path)
    for stale in (None, first, "default"):
        with pytest.raises(StaleCurvatureError, match="510 rows"):
            influence_scores(query, grown, curvature=stale)
    assert fit_fisher(grown).rows == 510
    assert_close(influence_scores(query, grown).compute(),
          oracle.scores(query.rows(), grown.rows(), oracle.damping(oracle.fisher(grown.rows()))))  # fmt: skip


def test_curvatures_by_name_path_and_from_another_store(tmp_path, pair):
    query, train = pair
    fit_fisher(train, name="second")
    path = fit_fisher(train, out=tmp_path / "apart.zarr").path
    with pytest.raises(CurvatureNotFoundError):
        self_influence(train)
    assert_array_equal(self_influence(train, curvature="second"), self_influence(train, curvature=path))
    other = write_store(tmp_path / "other.zarr", random_rows(200, 40, 8))
    foreign = fit_fisher(other)
    expected = oracle.scores(query.rows(), train.rows(), oracle.damping(oracle.fisher(other.rows())),
                             oracle.fisher(other.rows()))  # fmt: skip
    assert_close(influence_scores(query, train, curvature=foreign).compute(), expected)
    for name in ("../x", "", ".hidden"):
        with pytest.raises(InputError, match="curvature name"):
            fit_fisher(train, name=name)


def test_an_unfinished_curvature_does_not_count(pair):
    _, train = pair
    fit_fisher(train)
    group = zarr.open_group(str(train.path / "curvature" / "default"), mode="r+")
    attrs = dict(group.attrs["ooc_influence_curvature"])
    group.attrs["ooc_influence_curvature"] = attrs | {"complete": False}
    with pytest.raises(CurvatureNotFoundError):
        self_influence(train)
    fit_fisher(train)
    assert len(self_influence(train)) == 500


def test_bad_input(tmp_path, pair):
    query, train = pair
    fit_fisher(train)
    other = write_store(tmp_path / "other.zarr", random_rows(5, 41))
    with pytest.raises(MismatchError, match=r"mask.*like="):
        influence_scores(other, train)
    with pytest.raises(MismatchError, match="mask"):
        self_influence(other, curvature=train.path / "curvature" / "default")
    with pytest.raises(InputError, match="top >= 1"):
        top_influential(query, train, top=0)
    with pytest.raises(InputError, match="damping >= 0"):
        self_influence(train, damping=-1.0)
    with pytest.raises(InputError, match="damping_mode"):
        self_influence(train, damping_mode="other")
    with pytest.raises(MemoryBudgetError, match=r"fisher for k=40 needs .* budget 1 MiB"):
        fit_fisher(train, memory="1MiB", refit=True)
    with pytest.raises(InputError, match="with none"):
        fit_fisher(GradientStore.create(tmp_path / "empty.zarr", whole_mask(3)))
    model = write_store(tmp_path / "m.zarr", query.rows(), attributes={"model": {"fingerprint": "x"}})
    with pytest.raises(MismatchError, match="the model of"):
        influence_scores(model, train)


def test_fewer_queries_at_a_time_before_a_refusal(large, monkeypatch):
    query, train = large
    monkeypatch.setattr("ooc_influence.memory.process_anonymous", lambda: 0)
    scoring = ScoreRequest.open(query, train, {})

    def budget(queries):
        working = scoring.checkpoints[0].curvature.working_bytes(queries, 1) + queries * 2000 * (8 * 3 + 4)
        return WORKING + working + 16 * (4 * 2000 + 16 + 8 * queries)

    blocks, rows = scoring.plan("scores", budget(8), 1, TileMemory(per_score=8))
    assert (blocks, rows) == ([(0, 8), (8, 16), (16, 20)], 16)
    assert len(scoring.plan("scores", budget(1), 1, TileMemory(per_score=8))[0]) == 20
    with pytest.raises(MemoryBudgetError, match="scores for k=2000 needs"):
        scoring.plan("scores", budget(1) - 1, 1, TileMemory(per_score=8))


def test_a_curvature_of_another_model_is_refused(tmp_path):
    rows = random_rows(30, 6)
    stores = [
        write_store(tmp_path / f"{name}.zarr", rows, attributes={"model": {"fingerprint": name}}) for name in "ab"
    ]
    with pytest.raises(MismatchError, match=r"the model of .*, a; received b of"):
        self_influence(stores[0], curvature=fit_fisher(stores[1]))


def test_rows_dropped_during_a_fit_make_it_stale(pair, monkeypatch):
    _, train = pair
    original = fisher_room.write_curvature

    def drop_first(path, attributes, write):
        with GradientStore.open(train.path, "a") as store:
            store.drop([5])
        return original(path, attributes, write)

    monkeypatch.setattr(fisher_room, "write_curvature", drop_first)
    fit_fisher(train)
    with pytest.raises(StaleCurvatureError):
        self_influence(GradientStore.open(train.path))


def test_a_zero_fisher_matrix_says_so(tmp_path):
    train = write_store(tmp_path / "t.zarr", np.zeros((10, 4), np.float32))
    assert "trace=0" in repr(fit_fisher(train))
    with pytest.raises(SingularFisherError, match="not zero"):
        self_influence(train)


def test_a_store_replaced_at_its_path_is_noticed(tmp_path):
    import pickle
    import shutil

    store = write_store(tmp_path / "s.zarr", random_rows(30, 6))
    data = pickle.dumps(store)
    shutil.rmtree(store.path)
    write_store(tmp_path / "s.zarr", random_rows(30, 6))
    with pytest.raises(MismatchError, match="received another one"):
        pickle.loads(data)

"""Selections of rows against brute force on dense float64 rows, and by invariance to pools, blocks and workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from conftest import random_rows, roomy, whole_mask, write_store
from numpy.testing import assert_allclose, assert_array_equal

import ooc_influence as ooc
from ooc_influence import GradientStore, Storage, fit_fisher, influence_scores, select_rows
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError
from ooc_influence.influence import redundancy, select
from ooc_influence.influence.select import parse_keep

TASKS = np.array(["qa", "code", "qa", "math", "code", "qa", "math"])
SOURCES = np.array(["web", "book", "wiki", "code"])


def sources(n):
    return SOURCES[np.random.default_rng(5).choice(4, n, p=[0.5, 0.3, 0.15, 0.05])]


def write(path, rows, columns, *, ids=None, chunk_rows=64, dtype="float32"):
    kinds = {name: "str" if values.dtype.kind == "U" else "int64" for name, values in columns.items()}
    options = {"columns": kinds, "ids": None if ids is None else "str", "dtype": dtype}
    storage = Storage(chunk_rows=chunk_rows, group_chunks=3)
    with GradientStore.create(path, whole_mask(rows.shape[1]), storage=storage, **options) as store:
        store.append(rows, loss=np.arange(len(rows)), ids=ids, columns=columns)
    return GradientStore.open(path)


@pytest.fixture
def stores(tmp_path):
    """Targets of three tasks, and train rows of which many nearly repeat others."""
    rows = random_rows(300, 24)
    rows[200:] = rows[np.random.default_rng(2).choice(200, 100)] * 1.5 + random_rows(100, 24, seed=3) * 0.05
    columns = {"source": sources(300), "document": np.arange(300) // 3}
    train = write(tmp_path / "train.zarr", rows, columns, ids=[f"r{row}" for row in range(300)])
    query = write(tmp_path / "query.zarr", random_rows(7, 24, seed=1), {"task": TASKS})
    fit_fisher(train)
    return query, train


def dense(query, train, curvature=True):
    """Cosines of the tasks' mean gradients and of rows with rows, in float64: (3, n) and (n, n)."""
    rows, queries = (store.rows().astype(np.float64) for store in (train, query))
    names = np.unique(TASKS)
    means = np.stack([queries[name == TASKS].mean(0) for name in names])
    metric = np.eye(rows.shape[1])
    if curvature:
        fisher = rows.T @ rows / len(rows)
        metric = np.linalg.inv(fisher + 0.1 * np.trace(fisher) / len(fisher) * metric)

    def cosines(left, right):
        norms = [np.sqrt(np.einsum("ij,jk,ik->i", each, metric, each)) for each in (left, right)]
        return left @ metric @ right.T / norms[0][:, None] / norms[1]

    return cosines(means, rows), cosines(rows, rows)


def greedy(scores, cosines, count, strength, codes=None, caps=None):
    """The rule, one choice after the other, with every gain computed again."""
    chosen, gains, used = [], [], Counter()
    while len(chosen) < count:
        nearest = cosines[chosen].max(0) if chosen else np.zeros(len(scores))
        gain = np.where(scores > 0, scores * (1 - strength * np.maximum(nearest, 0)), scores)
        gain[chosen] = -np.inf
        if codes is not None:
            gain[[used[code] >= caps[code] for code in codes]] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        gains.append(gain[best])
        if codes is not None:
            used[codes[best]] += 1
    return chosen, gains


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_rows_are_those_of_brute_force(stores, strength, curvature):
    scores, cosines = dense(*stores, curvature)
    options = {} if curvature else {"curvature": False}
    found = select_rows(*stores, 90, tasks="task", redundancy=strength, **options)
    rows, gains = greedy(scores.max(0), cosines, 90, strength)
    assert found.rows.tolist() == rows
    assert_allclose(found.gains, gains, atol=1e-5)
    assert_allclose(found.row_scores, scores.max(0), atol=1e-5)
    assert_array_equal(found.tasks, np.unique(TASKS)[scores.argmax(0)[rows]])
    assert_array_equal(np.flatnonzero(found.kept), np.sort(rows))
    assert found.ids.tolist() == [f"r{row}" for row in rows]


def test_repeats_are_left_out(stores):
    _, cosines = dense(*stores)
    plain, diverse = (select_rows(*stores, 60, redundancy=strength).rows for strength in (0, 1))

    def closest(rows):
        return np.triu(cosines[np.ix_(rows, rows)], 1).max(0)

    assert (closest(plain) > 0.9).sum() > 10
    assert (closest(diverse) > 0.9).sum() == 0


@pytest.mark.parametrize("pool", [1, 3, 16, 2048])
def test_pools_do_not_change_the_choice(stores, pool, monkeypatch):
    expected = select_rows(*stores, 40, redundancy=0.7, quotas={"source": "40%"})
    monkeypatch.setattr(select, "_POOL", pool)
    found = select_rows(*stores, 40, redundancy=0.7, quotas={"source": "40%"})
    assert_array_equal(found.rows, expected.rows)
    assert_allclose(found.gains, expected.gains, atol=1e-6)


def test_few_gains_are_computed_again(stores, monkeypatch):
    """Lazily: a choice of few rows looks at few of the others."""
    turned = []
    original = redundancy.Cosines.turned
    monkeypatch.setattr(
        redundancy.Cosines, "turned", lambda self, rows: turned.append(len(rows)) or original(self, rows)
    )
    monkeypatch.setattr(select, "_POOL", 8)
    select_rows(*stores, 5, redundancy=0.1)
    assert 0 < sum(turned) < 100


def test_workers_and_blocks_do_not_change_the_choice(stores, tmp_path):
    query, train = stores
    options = {"tasks": "task", "redundancy": 1.0, "unit": "document"}
    expected = select_rows(query, train, "20%", **options)
    columns = {"source": sources(300), "document": train.column("document")}
    other = write(tmp_path / "t2.zarr", train.rows(), columns, ids=train.ids().tolist(), chunk_rows=17)
    fit_fisher(other)
    for found in (
        select_rows(query, train, "20%", workers=2, memory=roomy(), **options),
        select_rows(query, other, "20%", workers=3, resume=tmp_path / "parts", **options),
    ):
        assert_array_equal(found.rows, expected.rows)
        assert_allclose(found.gains, expected.gains, atol=1e-6)
    assert not (tmp_path / "parts").exists()


def test_several_checkpoints_count_by_their_mean(stores, tmp_path):
    query, train = stores
    rows, queries = random_rows(300, 24, seed=11), random_rows(7, 24, seed=12)
    second = write(tmp_path / "t2.zarr", rows, {"document": np.arange(300)}, ids=train.ids().tolist())
    asked = write(tmp_path / "q2.zarr", queries, {"task": TASKS})
    fit_fisher(second)
    pairs = [dense(query, train), dense(asked, second)]
    scores, cosines = (sum(part) / 2 for part in zip(*pairs, strict=True))
    found = select_rows([query, asked], [train, second], 50, tasks="task", redundancy=0.8)
    assert found.rows.tolist() == greedy(scores.max(0), cosines, 50, 0.8)[0]


def test_quotas(stores):
    query, train = stores
    scores, cosines = dense(query, train)
    names, codes = np.unique(train.column("source"), return_inverse=True)
    caps = dict(enumerate([27, 27, 27, 27]))
    for strength in (0, 0.5):
        found = select_rows(query, train, 90, tasks="task", redundancy=strength, quotas={"source": 0.3})
        assert found.rows.tolist() == greedy(scores.max(0), cosines, 90, strength, codes, caps)[0]
    own = select_rows(query, train, 0.5, quotas={"source": "proportional"})
    for name in names.tolist():
        present, chosen = ((part == name).sum() for part in (train.column("source"), train.column("source")[own.rows]))
        assert abs(chosen - present / 2) < 1
    one = select_rows(query, train, 60, redundancy=1, quotas={"source": {"web": "10%", "book": 0.2}})
    counts = Counter(train.column("source")[one.rows].tolist())
    assert (counts["web"], counts["book"]) == (6, 12)
    again = one.alike(np.random.default_rng(0).random(300))
    assert Counter(train.column("source")[again].tolist())["web"] <= 6
    assert len(set(again.tolist())) == 60


def test_units_are_chosen_by_their_best_row(stores):
    query, train = stores
    scores = dense(query, train)[0].max(0).reshape(100, 3)
    found = select_rows(query, train, "10%", tasks="task", unit="document")
    best = np.argsort(-scores.max(1), kind="stable")[:10]
    assert_array_equal(found.rows // 3, best)
    assert_array_equal(found.rows % 3, scores.argmax(1)[best])
    assert_array_equal(np.flatnonzero(found.kept), np.sort(np.concatenate([3 * best + part for part in range(3)])))


def test_what_harms_a_task_most_is_removed(stores):
    query, train = stores
    scores = dense(query, train)[0]
    found = select_rows(query, train, "90%", tasks="task", drop=True)
    assert_array_equal(np.flatnonzero(~found.kept), np.sort(np.argsort(scores.min(0))[:30]))
    assert not np.array_equal(found.kept, select_rows(query, train, "90%", tasks="task").kept)
    units = select_rows(query, train, "90%", tasks="task", drop=True, unit="document")
    worst = np.argsort(scores.min(0).reshape(100, 3).min(1))[:10]
    assert_array_equal(np.unique(train.column("document")[~units.kept]), np.sort(worst))


def test_dropped_rows_and_queries(stores):
    query, train = stores
    with ooc.GradientStore.open(train.path, "a") as opened:
        opened.drop([4, 17, 299])
    with ooc.GradientStore.open(query.path, "a") as opened:
        opened.drop(np.flatnonzero(TASKS == "qa"))
    query, train = (ooc.GradientStore.open(store.path) for store in (query, train))
    fit_fisher(train, refit=True)
    found = select_rows(query, train, "100%", tasks="task", redundancy=0.5)
    assert len(found.rows) == len(found.candidates.rows) == 297
    assert np.isnan(found.row_scores[[4, 17, 299]]).all()
    assert set(found.tasks.tolist()) == {"code", "math"}
    expected = influence_scores(query, train, average_queries="task", normalize="cosine").compute()
    assert_allclose(found.row_scores, np.fmax.reduce(expected), atol=1e-6)
    assert np.isnan(expected[2]).all()
    with ooc.GradientStore.open(query.path, "a") as opened:
        opened.drop(np.arange(7))
    with pytest.raises(InputError, match="received only dropped ones"):
        select_rows(query.path, train, 3)


def test_rows_of_one_checkpoint(stores):
    found = select_rows(*stores, 10, rows=np.arange(100, 150), redundancy=1)
    assert ((found.rows >= 100) & (found.rows < 150)).all()
    assert len(found.candidates.rows) == 50


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 0.02), ("int8-linear", 0.02)])
def test_other_representations(stores, tmp_path, dtype, tolerance):
    query, train = stores
    store = write_store(tmp_path / "other.zarr", train.rows(), dtype=dtype)
    fit_fisher(store)
    asked = write(tmp_path / "asked.zarr", query.rows(), {"task": TASKS})
    scores, cosines = dense(asked, store)
    found = select_rows(asked, store, 40, tasks="task", redundancy=0.9)
    rows, gains = greedy(scores.max(0), cosines, 40, 0.9)
    assert_allclose(found.gains, gains, atol=1e-5)
    assert found.rows.tolist() == rows
    assert_allclose(found.row_scores, dense(query, train)[0].max(0), atol=tolerance)


def test_results_as_tables(stores):
    pytest.importorskip("pandas")
    found = select_rows(*stores, 5)
    frame, facts = found.to_pandas(), found.to_dict()
    assert frame["row"].tolist() == [line["row"] for line in facts["rows"]] == found.rows.tolist()
    assert facts["kept_rows"] == 5
    assert facts["settings"]["normalize"] == "cosine"
    assert "5 of 300 rows" in repr(found)
    assert found._repr_html_().count("<tr") == 6


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        (0, {}, "expected 1 to 300 rows to keep, of those that have a score; received 0"),
        (301, {}, "received 301"),
        ("ten", {}, "a number of rows to keep, or a share such as 0.3 or '30%'; received 'ten'"),
        ("110%", {}, "received '110%'"),
        (-0.1, {}, "received -0.1"),
        (True, {}, "received True"),
        (5, {"redundancy": 1.5}, "0 <= redundancy <= 1; received 1.5"),
        (5, {"damping": [0.1, 1.0]}, "one damping"),
        (5, {"normalize": "half"}, "normalize 'none', 'cosine', 'train'; received 'half'"),
        (5, {"tasks": "label"}, "to group"),
        (5, {"unit": "label"}, "to group"),
        (5, {"quotas": {"label": 0.5}}, "to group"),
        (5, {"quotas": {}}, "quotas by one column"),
        (5, {"quotas": {"source": "most"}}, "'proportional', or a share such as 0.3 or '30%'; received 'most'"),
        (5, {"quotas": {"source": {"press": 0.5}}}, "quotas of book, code, web, wiki; received one of 'press'"),
        (200, {"quotas": {"source": 0.3}}, "allow the 200 to keep; received ones that allow"),
    ],
)
def test_refusals(stores, keep, options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        select_rows(*stores, keep, **options)


def test_other_masks_and_small_budgets_are_refused(stores, tmp_path):
    other = write_store(tmp_path / "wide.zarr", random_rows(3, 30))
    with pytest.raises(MismatchError):
        select_rows(other, stores[1], 5)
    with pytest.raises(MemoryBudgetError, match="selection"):
        select_rows(*stores, 5, memory=1000)


def test_shares_and_numbers():
    found = {keep: parse_keep(keep, 200) for keep in (7, "8", 0.5, "40%", "0.25", 1, "100%", 1e-9)}
    assert found == {7: 7, "8": 8, 0.5: 100, "40%": 80, "0.25": 50, 1: 1, "100%": 200, 1e-9: 1}
    assert parse_keep(1.0, 200) == 200

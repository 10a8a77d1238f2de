"""BM25 beside lists: against scikit-learn's counts and the formula, on ties and blocks, in commands and pages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.feature_extraction.text import CountVectorizer
from test_cli import run  # noqa: F401 - a fixture
from test_report import data_of

from ooc_influence import GradientStore, top_influential
from ooc_influence.corpus import Bm25, bm25
from ooc_influence.report import Corpus, ranks_of_lists, write_report

WORDS = ["oak", "ash", "elm", "fir", "Yew", "naïve", "x1", "_b"]


def texts(n, seed=0, most=12):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, most))) + "." for _ in range(n)]


def dense(queries, documents):
    """Okapi BM25 by the formula, from dense counts of all words."""
    words = CountVectorizer(token_pattern=r"\w+").fit([*documents, *queries])
    counts = words.transform(documents).toarray().astype(float)
    holding = (counts > 0).sum(0)
    rare = np.where(holding, np.log1p((len(documents) - holding + 0.5) / (holding + 0.5)), 0)
    length = counts.sum(1, keepdims=True)
    weight = rare * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * length / length.mean()))
    return (words.transform(queries).toarray() > 0) @ weight.T


def test_scores_are_those_of_the_formula():
    documents, queries = texts(1300), [*texts(6, 1), "nothing here", "", "OAK oak unheard"]
    assert_allclose(bm25(queries, documents), dense(queries, documents), rtol=1e-12, atol=1e-12)
    assert (bm25(queries, documents)[6:8] == 0).all()
    assert bm25(["a"], []).shape == (1, 0)


def test_ranks_are_those_of_all_scores_with_the_best_of_equal_ones():
    documents, queries = texts(1300), texts(5, 1, 4)
    scores = dense(queries, documents)
    chosen = [np.arange(0, 1300, 7 + query) for query in range(5)]
    found = Bm25(queries)
    found.count(iter(documents))
    ranks = found.ranks(iter(documents), [scores[query, own] for query, own in enumerate(chosen)])
    for query, own in enumerate(chosen):
        wanted = [1 + (scores[query] > score + 1e-12).sum() for score in scores[query, own]]
        assert_array_equal(ranks[query], wanted)


@pytest.fixture
def stores(tmp_path, run):  # noqa: F811 - the fixture
    """A train store and a query store, and files of their texts."""
    for name, split, extra in (("t", "train", "--k 300"), ("q", "test", "--like t.zarr")):
        code, _, err = run(f"extract --recipe my_recipe.py:recipe --split {split} --store {name}.zarr {extra}")
        assert code == 0, err
    assert run("fisher t.zarr")[0] == 0
    held = {name: GradientStore.open(tmp_path / f"{name}.zarr") for name in ("t", "q")}
    written = {name: texts(store.n, 3 + store.n, 5) for name, store in held.items()}
    for name, lines in written.items():
        records = [{"text": line, "id": str(row_id)} for line, row_id in zip(lines, held[name].ids(), strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return held, written


def expected(written, number, row):
    scores = dense(written["q"], written["t"])[number]
    return int(1 + (scores > scores[row] + 1e-12).sum()) if scores[row] > 0 else None


def test_top_shows_the_ranks(run, stores):  # noqa: F811 - the fixture
    _, written = stores
    code, out, err = run("top q.zarr t.zarr --data t.jsonl --query-data q.jsonl --top 4 --json")
    assert code == 0, err
    for number, query in enumerate(json.loads(out)["queries"]):
        for entry in (*query["proponents"], *query["opponents"]):
            assert entry["bm25_rank"] == expected(written, number, entry["row"])
    code, out, _ = run("top q.zarr t.zarr --data t.jsonl --query-data q.jsonl --top 4 --damping 0.1 --damping 1")
    assert code == 0
    assert "BM25" in out
    for line, message in {
        "--data t.jsonl": "expected --query-data",
        "--data t.jsonl --query-data q.jsonl --average-queries": "single queries",
        "--data nowhere.jsonl --query-data q.jsonl": "nowhere.jsonl",
    }.items():
        code, _, err = run(f"top q.zarr t.zarr {line}")
        assert (code, message in err) == (2, True), err


def test_pages_have_the_ranks(tmp_path, stores):
    held, written = stores
    data = Corpus(tmp_path / "t.jsonl"), Corpus(tmp_path / "q.jsonl")
    folder = write_report(held["t"], tmp_path / "out", held["q"], data=data[0], query_data=data[1], top=3)
    queries = data_of(folder, "queries-0")["queries"]
    for number, query in enumerate(queries):
        for row, _ in (*query["proponents"], *query["opponents"]):
            assert query["bm25"][str(row)] == expected(written, number, row)
    without = write_report(
        held["t"], tmp_path / "without", held["q"], data=data[0], query_data=data[1], top=3, bm25=False
    )
    assert data_of(without, "queries-0")["queries"][0]["bm25"] is None
    no_texts = write_report(held["t"], tmp_path / "plain", held["q"], top=3)
    assert data_of(no_texts, "queries-0")["queries"][0]["bm25"] is None


def test_lists_of_several_dampings(tmp_path, stores):
    held, written = stores
    top = top_influential(held["q"], held["t"], top=3, damping=[0.01, 10])
    ranks = ranks_of_lists(top, held["q"], held["t"], Corpus(tmp_path / "q.jsonl"), Corpus(tmp_path / "t.jsonl"))
    for number, own in enumerate(ranks):
        assert own == {row: expected(written, number, row) for row in own}
        assert set(np.unique(top.proponents.rows[:, number])) <= set(own)

"""Results as tables, whatever the file: the numbers of the calls, ids, columns and texts; `drop` takes them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rows
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from test_select import write as write_store
from test_select_files import documents, lines_of, made  # noqa: F401 - a fixture
from tiny_hf import MARKS

import ooc_influence as ooc
from ooc_influence import GradientStore, fit_fisher, report
from ooc_influence.corpus import open_documents
from ooc_influence.errors import InputError, MissingExtraError, StoreWriteError
from ooc_influence.report import tables

pytestmark = MARKS
PAIR = ("q.zarr", "t.zarr")


@pytest.fixture
def pair(tmp_path, run):  # noqa: F811 - which changes to the folder
    """Stores with ids that spreadsheets and JSON dislike, columns of two kinds and a dropped row."""
    ids = [f'r{row}, "é"\n' if row == 5 else f"r{row}" for row in range(60)]
    columns = {"source": np.array(["web", "=1+1", ""])[np.arange(60) % 3], "year": np.arange(60), "rank": np.arange(60)}
    train = write_store(Path("t.zarr"), random_rows(60, 12), columns, ids=ids)
    write_store(Path("q.zarr"), random_rows(4, 12, seed=1), {"task": np.array(["a", "b", "a", "b"])})
    with GradientStore.open(train.path, "a") as opened:
        opened.drop([7])
    fit_fisher("t.zarr")
    return GradientStore.open("q.zarr"), GradientStore.open("t.zarr")


def read(path):
    """The lines of a table, values as they are in the file."""
    if str(path).endswith(".csv"):
        with Path(path).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if str(path).endswith(".jsonl"):
        return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


def column(lines, name, kind=float):
    return [kind(line[name]) for line in lines]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists(pair, run, kind):  # noqa: F811 - the fixture
    code, _, err = run(f"top q.zarr t.zarr --top 7 -o top.{kind}")
    assert (code, err) == (0, "")
    lines, lists = read(f"top.{kind}"), ooc.top_influential(*PAIR, top=7)
    assert len(lines) == 2 * 4 * 7
    for side in ("proponents", "opponents"):
        own, ranking = [line for line in lines if line["side"] == side], getattr(lists, side)
        assert column(own, "row", int) == ranking.rows.ravel().tolist()
        assert column(own, "rank", int) == list(range(1, 8)) * 4
        assert column(own, "query", int) == np.repeat(range(4), 7).tolist()
        assert_allclose(column(own, "score"), ranking.scores.ravel(), rtol=1e-6)
    rows = np.array(column(lines, "row", int))
    assert [line["id"] for line in lines] == pair[1].ids(rows).tolist()
    assert [line["source"] for line in lines] == pair[1].values("columns/source", rows).tolist()
    assert column(lines, "column_rank", int) == rows.tolist()
    assert_allclose(column(lines, "loss"), rows)
    assert "text" not in lines[0]


def test_types_of_parquet(pair, run):  # noqa: F811 - the fixture
    pa = pytest.importorskip("pyarrow")
    run("self-influence t.zarr --top 100 -o self.parquet")
    schema = pytest.importorskip("pyarrow.parquet").read_schema("self.parquet")
    kinds = {"row": pa.int64(), "id": pa.string(), "self_influence": pa.float32(), "year": pa.int64()}
    assert {name: schema.field(name).type for name in kinds} == kinds


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_self_influence_in_blocks(pair, run, kind, monkeypatch):  # noqa: F811 - the fixture
    monkeypatch.setattr(tables, "_BLOCK", 13)
    code, _, err = run(f"self-influence t.zarr --top 100 --damping 0.1 --damping 1 -o self.{kind}")
    assert (code, err) == (0, "")
    lines, values = read(f"self.{kind}"), ooc.self_influence("t.zarr", damping=[0.1, 1.0])
    assert len(lines) == 2 * 59
    for level, damping in enumerate((0.1, 1.0)):
        own = lines[level * 59 :][:59]
        assert set(column(own, "damping")) == {damping}
        order = np.argsort(-np.nan_to_num(values[level], nan=-1), kind="stable")[:59]
        assert column(own, "row", int) == order.tolist()
        assert_allclose(column(own, "self_influence"), values[level][order], rtol=1e-6)


def test_groups_and_scores(pair, run, monkeypatch):  # noqa: F811 - the fixture
    monkeypatch.setattr(tables, "_PAIRS_AT_ONCE", 50)
    assert run("groups q.zarr t.zarr --by source -o groups.jsonl")[0] == 0
    lines, groups = read("groups.jsonl"), ooc.group_influence(*PAIR, "source")
    assert [line["group"] for line in lines] == groups.names.tolist() * 4
    assert_allclose([line["sum"] for line in lines], groups.sums.ravel())
    assert_allclose([line["mean"] for line in lines], groups.means.ravel())
    assert [line["rows"] for line in lines] == groups.counts.tolist() * 4

    for number, line in enumerate(("", "--average-by task", "--average-queries --scores-dtype float16")):
        assert run(f"score q.zarr t.zarr --out s{number}.zarr -o pairs{number}.csv {line}")[0] == 0
        average = {"": False, "--average-by task": "task"}.get(line, True)
        scores = ooc.influence_scores(*PAIR, average_queries=average).compute()
        pairs = read(f"pairs{number}.csv")
        assert len(pairs) == scores.shape[0] * 59
        queries, rows = (np.array(column(pairs, name, int)) for name in ("query", "row"))
        assert_allclose(column(pairs, "score"), scores[queries, rows], rtol=2e-3, atol=1e-4)
        assert len(set(zip(queries.tolist(), rows.tolist(), strict=True))) == len(pairs)
        assert [pair["id"] for pair in pairs] == GradientStore.open("t.zarr").ids(rows).tolist()
        names = np.array(["a", "b"]) if average == "task" else np.array(["mean"]) if average else np.arange(4)
        assert [pair["query_id"] for pair in pairs] == names[queries].astype(str).tolist()

    monkeypatch.setattr(tables, "PAIRS", 100)
    code, _, err = run("score q.zarr t.zarr --out s9.zarr -o pairs.csv")
    assert (code, "at most 100 scores to write as lines of a table; received 4 x 60" in err) == (2, True)
    assert not Path("s9.zarr").exists()
    assert run("score q.zarr t.zarr --out s9.zarr -o pairs.csv --damping 1 --damping 2")[0] == 2


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_drop_takes_tables(pair, run, kind):  # noqa: F811 - the fixture
    run(f"self-influence t.zarr --top 6 -o worst.{kind}")
    worst = sorted(column(read(f"worst.{kind}"), "row", int))
    code, out, _ = run(f"drop t.zarr --from worst.{kind} --json")
    assert (code, json.loads(out)["newly_dropped"]) == (0, 6)
    assert_array_equal(np.flatnonzero(GradientStore.open("t.zarr").dropped), sorted([7, *worst]))


def test_drop_takes_ids_and_others(pair, run):  # noqa: F811 - the fixture
    Path("ids.txt").write_text("r3\nr44\nr3\n")
    assert run("drop t.zarr --from ids.txt")[0] == 0
    assert_array_equal(np.flatnonzero(GradientStore.open("t.zarr").dropped), [3, 7, 44])
    Path("numbers.txt").write_text("1\n3\n")
    assert run("drop q.zarr --from numbers.txt --others")[0] == 0  # a store without ids
    assert_array_equal(np.flatnonzero(GradientStore.open("q.zarr").dropped), [0, 2])
    fit_fisher("t.zarr", refit=True)
    assert run("select t.zarr --queries q.zarr --keep 20 --out kept.txt -o kept.csv")[0] == 0
    kept = read("kept.csv")
    assert sorted(line["id"] for line in kept) == sorted(Path("kept.txt").read_text().split("\n")[:-1])
    chosen = ooc.select_rows("q.zarr", "t.zarr", 20)
    assert [line["id"] for line in kept] == chosen.ids.tolist()
    assert_allclose(column(kept, "gain"), chosen.gains, rtol=1e-6)
    assert run("drop t.zarr --from kept.csv --others")[0] == 0
    assert_array_equal(np.flatnonzero(~GradientStore.open("t.zarr").dropped), np.sort(chosen.rows))


def test_texts(made, run):  # noqa: F811 - the fixtures
    code, _, err = run(f"top {made}/q.zarr {made}/t.zarr --dot --top 5 -o top.jsonl")
    assert (code, err) == (0, "")
    lines, train = read("top.jsonl"), GradientStore.open(made / "t.zarr")
    records = documents()
    for line in lines:
        start, stop = (train.column(f"char_{end}")[line["row"]] for end in ("start", "stop"))
        assert line["text"] == records[line["document"]]["text"][start:stop]
    assert run(f"self-influence {made}/t.zarr --dot -o self.csv")[0] == 0
    assert read("self.csv")[0]["text"]
    run(f"select {made}/t.zarr --queries {made}/q.zarr --dot --keep 3 --out kept.jsonl -o kept.parquet")
    texts = [line["text"] for line in read("kept.parquet")]
    whole = [json.loads(line)["text"] for line in lines_of(Path("kept.jsonl"))]
    assert len(texts) == 3
    assert all(any(text in document for document in whole) for text in texts)


def test_a_table_is_whole_or_not_there(tmp_path):
    def blocks():
        yield {"row": np.arange(3)}
        raise RuntimeError("stopped")

    for kind in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"t{kind}"
        path.write_text("as it was")
        with pytest.raises(RuntimeError, match="stopped"):
            tables.write_table(path, blocks())
        assert path.read_text() == "as it was"
        assert tables.write_table(path, [{"row": np.empty(0, np.int64), "id": np.empty(0, object)}]) == 0
        assert read(path) == []
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(StoreWriteError, match="to write the table"):
        tables.write_table(tmp_path / "none" / "t.csv", [{"row": np.arange(3)}])


def test_refusals(pair, run, monkeypatch):  # noqa: F811 - the fixture
    Path("no.csv").write_text("name\nx\n")
    Path("word.csv").write_text("row\nx\n")
    Path("beyond.csv").write_text("row\n60\n")
    Path("other.jsonl").write_text('{"row": 3, "id": "r4"}\n')
    Path("unknown.txt").write_text("r3\nr99\n")
    Path("empty.txt").write_text("")
    Path("ids.csv").write_text("id\nx\n")
    for line, match in (
        ("top q.zarr t.zarr -o top.xlsx", "a table to write as .parquet, .csv, .jsonl; received top.xlsx"),
        ("groups q.zarr t.zarr --by source -o none/g.csv", "make it first"),
        ("drop t.zarr --from no.csv", "a column 'row' or 'id' in no.csv; received name"),
        ("drop t.zarr --from word.csv", "row numbers in the column 'row' of word.csv"),
        ("drop t.zarr --from beyond.csv", "expected rows from 0 to 59"),
        ("drop t.zarr --from other.jsonl", "t.zarr to be 'r4', as in other.jsonl; received 'r3'"),
        ("drop t.zarr --from unknown.txt", "received ['r99'], which no row has"),
        ("drop q.zarr --from ids.csv", "ids that are whole numbers in ids.csv"),
        ("drop t.zarr --from word.csv --relabelled", "received word.csv, which relabels nothing"),
        ("drop t.zarr 77 --others", "that stay, with --others; received [77]"),
    ):
        code, _, err = run(line)
        assert (code, err.count("\n")) == (2, 1), err
        assert match in err
    assert run("drop t.zarr --from empty.txt")[0] == 2
    assert GradientStore.open("t.zarr").dropped.sum() == 1
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError):
        report.check_table("t.parquet")


def test_documents_of_a_table_are_read_again(pair, run):  # noqa: F811 - the fixture
    """A table is documents too: `open_documents` reads what was written."""
    run("self-influence t.zarr --top 4 -o self.jsonl")
    assert len(open_documents("self.jsonl")) == 4
    with pytest.raises(InputError):
        open_documents("none.jsonl")

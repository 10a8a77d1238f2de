"""Rows and scores for other programs: what is exported, and that searches find what the lists have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import random_rows, whole_mask
from models import Mlp, batches, data, make
from models import loss as model_loss
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore, KroneckerBasis, Storage, fit_fisher
from ooc_influence.errors import (
    InputError,
    MemoryBudgetError,
    MissingExtraError,
    StoreNotFoundError,
    StoreWriteError,
)
from ooc_influence.interchange import faiss_index
from ooc_influence.memory import PeakMemory, process_anonymous

N, Q, K = 400, 6, 40
DROPPED = [7, 150, 399]


def write(path, rows, **more):
    """A store with ids, and columns of which one is called as a column of the table is."""
    columns, count = {"label": "int64", "gradient": "str"}, len(rows)
    settings = {"dtype": "float32", "storage": Storage(chunk_rows=64, group_chunks=2), "ids": "str"} | more
    with GradientStore.create(path, whole_mask(rows.shape[1]), columns=columns, **settings) as store:
        store.append(
            rows, loss=np.arange(count) / 8, ids=[f"r{row}" for row in range(count)],
            columns={"label": np.arange(count) % 3, "gradient": [f"é{row}" for row in range(count)]},
        )  # fmt: skip
    return GradientStore.open(path)


def drop(store, rows):
    with GradientStore.open(store.path, "a") as opened:
        opened.drop(rows)
    return GradientStore.open(store.path)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """A query store and a train store with ids, columns and dropped rows, and its curvature; in the current folder."""
    monkeypatch.chdir(tmp_path)
    train = drop(write(tmp_path / "train.zarr", random_rows(N, K)), DROPPED)
    query = drop(write(tmp_path / "query.zarr", random_rows(Q, K, seed=1)), [2])
    fit_fisher(train)
    return query, train


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


def live(n, dropped):
    return np.setdiff1d(np.arange(n), dropped)


def dense(query, train, damping=0.1):
    """Scores, and the norms of both sides, in float64; F and λ as the curvature defines them."""
    rows, queries = train.rows().astype(np.float64), query.rows().astype(np.float64)
    kept = rows[live(len(rows), DROPPED)]
    fisher = kept.T @ kept / len(kept)
    inverse = np.linalg.inv(fisher + damping * np.trace(fisher) / K * np.eye(K))
    return queries @ inverse @ rows.T, *(np.sqrt(np.einsum("ij,jk,ik->i", x, inverse, x)) for x in (queries, rows))


def test_an_array_holds_the_live_rows_and_their_numbers(stores, tmp_path):
    _, train = stores
    facts = ooc.export_rows(train, tmp_path / "rows.npy")
    rows, numbers = np.load("rows.npy"), np.load("rows.rows.npy")
    assert_array_equal(numbers, live(N, DROPPED))
    assert_array_equal(rows, train.rows()[numbers])
    assert rows.dtype == np.float32
    assert (facts["rows"], facts["columns"], facts["dtype"], facts["bytes"]) == (397, K, "float32", 397 * K * 4 + 128)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["query.zarr", "rows.npy", "rows.rows.npy", "train.zarr"]


@pytest.mark.parametrize("unit", ["none", "cosine", "train"])
def test_inner_products_are_scores(stores, unit):
    query, train = stores
    ooc.export_rows(train, "train.npy", normalize=unit)
    facts = ooc.export_rows(query, "query.npy", precondition=train, normalize=unit)
    products = np.load("query.npy").astype(np.float64) @ np.load("train.npy").T
    scores, of_queries, of_rows = dense(query, train)
    expected = scores / (1 if unit == "none" else of_rows) / (of_queries[:, None] if unit == "cosine" else 1)
    expected = expected[np.ix_(live(Q, [2]), live(N, DROPPED))]
    assert_allclose(products, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert_array_equal(np.load("query.rows.npy"), live(Q, [2]))
    assert facts["settings"]["preconditioned_for"] == str(train.path)
    assert facts["settings"]["normalize"] == unit


def test_plain_dot_products_and_cosines_take_no_curvature(stores):
    query, train = stores
    ooc.export_rows(query, "query.npy", precondition=train, curvature=False)
    assert_array_equal(np.load("query.npy"), query.rows()[live(Q, [2])])
    ooc.export_rows(train, "train.npy", curvature=False, normalize="cosine")
    assert_allclose(np.linalg.norm(np.load("train.npy"), axis=1), 1, rtol=1e-6)


def test_a_row_without_gradient_stays_zero(tmp_path):
    rows = random_rows(30, 8)
    rows[4] = 0
    fit_fisher(write(tmp_path / "train.zarr", rows))
    ooc.export_rows(tmp_path / "train.zarr", tmp_path / "t.npy", normalize="train")
    assert_array_equal(np.load(tmp_path / "t.npy")[4], np.zeros(8))


@pytest.mark.parametrize("unit", ["none", "cosine", "train"])
@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_a_faiss_search_finds_the_lists(stores, faiss, unit, index):
    query, train = stores
    ooc.export_rows(train, "train.faiss", normalize=unit, index=index)
    ooc.export_rows(query, "query.npy", precondition=train, normalize=unit)
    read = faiss.read_index("train.faiss")
    assert read.ntotal == 397
    if index == "ivf":
        assert (read.nlist, read.nprobe) == (9, 1)
        read.nprobe = read.nlist
    scores, rows = read.search(np.load("query.npy"), 10)
    lists = ooc.top_influential(query, train, 10, normalize=unit).proponents
    assert_array_equal(rows, lists.rows[live(Q, [2])])
    assert_allclose(scores, lists.scores[live(Q, [2])], rtol=1e-4)


def test_numbers_in_float16(stores, faiss):
    query, train = stores
    exact = train.rows()[live(N, DROPPED)]
    for kind in ("npy", "parquet", "faiss"):
        facts = ooc.export_rows(train, f"half.{kind}", dtype="float16")
    assert_array_equal(np.load("half.npy"), exact.astype(np.float16))
    assert facts["index"] == {"factory": "IDMap,SQfp16", "memory": 397 * (2 * K + 8)}
    ooc.export_rows(query, "query.npy", precondition=train)
    queries = np.load("query.npy")
    scores, rows = faiss.read_index("half.faiss").search(queries, 5)
    found = np.searchsorted(live(N, DROPPED), rows)
    halves = exact.astype(np.float16).astype(np.float32)
    assert_allclose(scores, np.einsum("qk,qrk->qr", queries, halves[found]), rtol=1e-3)
    tiny = write(Path("tiny.zarr"), exact * 1e-7)
    for kind in ("npy", "parquet", "faiss"):
        with pytest.raises(InputError, match="float16 holds to three digits; received row 0 of norm"):
            ooc.export_rows(tiny, f"tiny.{kind}", dtype="float16")
        assert not Path(f"tiny.{kind}").exists()
    with pytest.raises(InputError, match="too large"):
        ooc.export_rows(write(Path("huge.zarr"), exact * 1e6), "huge.npy", dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_parquet_table_has_ids_columns_and_lists(stores, dtype):
    parquet = pytest.importorskip("pyarrow.parquet")
    _, train = stores
    ooc.export_rows(train, "train.parquet", dtype=dtype)
    table = parquet.read_table("train.parquet")
    numbers = live(N, DROPPED)
    assert table.column_names == ["row", "id", "gradient", "grad_norm", "loss", "label", "column_gradient"]
    name = {"float32": "float", "float16": "halffloat"}[dtype]
    assert str(table.schema.field("gradient").type) == f"fixed_size_list<element: {name}>[40]"
    rows = np.stack(table["gradient"].to_numpy())
    assert_array_equal(rows, train.rows()[numbers].astype(dtype))
    assert table["row"].to_pylist() == numbers.tolist()
    assert table["id"].to_pylist() == train.ids(numbers).tolist()
    assert table["column_gradient"].to_pylist() == train.values("columns/gradient", numbers).tolist()
    assert_array_equal(table["grad_norm"].to_numpy(), train.grad_norm[numbers])
    assert_array_equal(table["loss"].to_numpy(), train.loss[numbers])
    facts = json.loads(parquet.read_schema("train.parquet").metadata[b"ooc_influence"])
    assert (facts["store"], facts["rows"], facts["settings"]["normalize"]) == (str(train.path), 397, "none")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int8-linear", "int4", "sign"])
def test_rows_of_every_representation_are_those_that_scores_use(stores, tmp_path, dtype):
    query, wide = stores
    train = drop(write(tmp_path / "t.zarr", wide.rows(), dtype=dtype), DROPPED)
    fit_curvature = dtype != "sign"
    curvature = None if fit_curvature else wide.path / "curvature" / "default"
    if fit_curvature:
        fit_fisher(train)
    ooc.export_rows(train, "t.npy", normalize="train", curvature=curvature)
    ooc.export_rows(query, "q.npy", precondition=train, normalize="train", curvature=curvature)
    scores = ooc.influence_scores(query, train, normalize="train", curvature=curvature, damping=0.1).compute()
    expected = scores[np.ix_(live(Q, [2]), live(N, DROPPED))]
    assert_allclose(np.load("q.npy") @ np.load("t.npy").T, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float16", "sign"])
def test_rows_in_a_kronecker_basis(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    x, y = data(Mlp, 60)
    kept = Dropout(200, "grid", basis=KroneckerBasis())
    settings = {"compressor": kept, "dtype": dtype}
    train = ooc.extract_gradients(make(Mlp), model_loss, batches(x[:50], y[:50], 8), "t.zarr", **settings)
    query = ooc.extract_gradients(make(Mlp), model_loss, batches(x[50:], y[50:], 8), "q.zarr", like=train)
    options = {"curvature": "kronecker", "damping": 0.3, "normalize": "train"}
    ooc.export_rows(train, "t.npy", **options)
    ooc.export_rows(query, "q.npy", precondition=train, **options)
    scores = ooc.influence_scores(query, train, **options).compute()
    assert_allclose(np.load("q.npy") @ np.load("t.npy").T, scores, rtol=1e-3, atol=1e-5 * np.abs(scores).max())


def test_exports_do_not_depend_on_chunks_or_memory(stores, tmp_path):
    _, train = stores
    ooc.export_rows(train, "one.npy", normalize="cosine")
    other = drop(write(tmp_path / "other.zarr", train.rows(), storage=Storage(chunk_rows=17)), DROPPED)
    fit_fisher(other)
    budget = process_anonymous() + 180 * 2**20
    ooc.export_rows(other, "two.npy", normalize="cosine", memory=budget)
    assert_allclose(np.load("one.npy"), np.load("two.npy"), rtol=1e-5, atol=1e-7)
    with pytest.raises(MemoryBudgetError, match="an export for k=40 needs"):
        ooc.export_rows(train, "three.npy", memory="1MiB")


def test_memory_does_not_grow_with_the_rows(tmp_path, faiss):
    pytest.importorskip("pyarrow")
    with GradientStore.create(tmp_path / "t.zarr", whole_mask(1024), dtype="float32") as store:
        block = random_rows(4096, 1024)
        for _ in range(12):
            store.append(block, loss=np.zeros(len(block)))
    size = 12 * block.nbytes
    ooc.export_rows(tmp_path / "t.zarr", tmp_path / "warm.parquet")
    for kind in ("npy", "parquet", "faiss"):
        with PeakMemory() as memory:
            facts = ooc.export_rows(tmp_path / "t.zarr", tmp_path / f"t.{kind}")
        taken = memory.peak - memory.start
        if kind == "faiss":
            assert facts["index"]["memory"] == size + 8 * 12 * 4096
            # what the index takes is planned once, though it is there when blocks are read
            budget = process_anonymous() + size + (96 + 60) * 2**20
            ooc.export_rows(tmp_path / "t.zarr", tmp_path / "tight.faiss", memory=budget)
            assert taken < size + 0.7 * size
        else:
            assert taken < 0.8 * size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_memory_of_cells_is_planned(tmp_path, faiss, dtype):
    block = random_rows(4000, 256)
    index = faiss_index.FaissIndex("ivf", 24_000, 256, dtype)

    def blocks():
        yield from ((np.arange(start, start + 4000), block) for start in range(0, 24_000, 4000))

    index.write(tmp_path / "warm.faiss", blocks)
    with PeakMemory() as memory:
        index.write(tmp_path / "t.faiss", blocks)
    assert memory.peak - memory.start < index.held + 8 * 2**20
    assert faiss.read_index(str(tmp_path / "t.faiss")).nprobe == index.cells // 8


def test_rows_of_a_store_on_object_storage(tmp_path):
    rows = random_rows(60, 8)
    store = drop(write("memory://exported/t.zarr", rows), [5])
    ooc.export_rows(store, tmp_path / "t.npy")
    assert_array_equal(np.load(tmp_path / "t.npy"), rows[live(60, [5])])
    imported = ooc.import_rows(tmp_path / "t.npy", "memory://exported/u.zarr")
    assert_array_equal(imported.rows(), rows[live(60, [5])])


def test_rows_that_several_writers_wrote(tmp_path):
    rows = random_rows(60, 8)
    settings = {"planned_rows": 60, "dtype": "float32", "storage": Storage(chunk_rows=10, group_chunks=1)}
    GradientStore.create(tmp_path / "t.zarr", whole_mask(8), **settings).close()
    for start in (30, 0):
        with GradientStore.open(tmp_path / "t.zarr", "a") as store:
            store.writer(start, start + 30)
            store.append(rows[start : start + 30], loss=np.zeros(30))
    ooc.export_rows(tmp_path / "t.zarr", tmp_path / "t.npy")
    assert_array_equal(np.load(tmp_path / "t.npy"), rows)


def test_an_index_that_does_not_fit_is_refused_before_anything(stores, faiss, monkeypatch):
    _, train = stores
    read = []
    monkeypatch.setattr(ooc.interchange.rows.ExportedRows, "blocks", lambda *_: read.append(1))
    sizes = {"float32": 2 << 40, "float16": 1 << 40}
    monkeypatch.setattr(faiss_index.FaissIndex, "nbytes", property(lambda self: sizes[self.dtype]))
    message = r"FAISS index of 397 rows of 40 numbers.* needs 2(\.\d+)? TiB with 1 worker.*\.npy or \.parquet file"
    with pytest.raises(MemoryBudgetError, match=message):
        ooc.export_rows(train, "t.faiss")
    with pytest.raises(MemoryBudgetError, match=r"--dtype float16 \(1 TiB\)"):
        ooc.export_rows(train, "t.faiss", memory="1.5TiB")
    assert not read


def test_a_killed_export_leaves_the_file_that_was_there(stores, faiss, monkeypatch):
    pytest.importorskip("pyarrow")
    _, train = stores
    for kind in ("npy", "parquet", "faiss"):
        ooc.export_rows(train, f"t.{kind}")
        before = Path(f"t.{kind}").read_bytes()
        blocks = ooc.interchange.rows.ExportedRows.blocks

        def failing(self, *args, blocks=blocks):
            yield next(iter(blocks(self, *args)))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ooc.interchange.rows.ExportedRows, "blocks", failing)
            with pytest.raises(KeyboardInterrupt):
                ooc.export_rows(train, f"t.{kind}", normalize="train")
        assert Path(f"t.{kind}").read_bytes() == before
    assert {path.name for path in Path().iterdir()} == {
        "t.npy", "t.rows.npy", "t.parquet", "t.faiss", "train.zarr", "query.zarr"
    }  # fmt: skip


def test_a_folder_that_refuses_is_said_in_a_line(stores, faiss, monkeypatch):
    _, train = stores

    def refusing(index, path):
        raise RuntimeError("Error in write_index: could not open")

    monkeypatch.setattr(faiss, "write_index", refusing)
    with pytest.raises(StoreWriteError, match=r"expected to write t\.faiss; received Error in write_index"):
        ooc.export_rows(train, "t.faiss")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("t.csv", {}, "expected a file to export to as .npy, .parquet, .faiss; received t.csv"),
        ("train.npy/x.npy", {}, "expected a folder to write train.npy/x.npy to; received none"),
        ("s3://bucket/t.npy", {}, "expected a local file to export to; received s3://bucket/t.npy"),
        ("folder.npy", {}, "received the folder folder.npy"),
        ("t.npy", {"index": "ivf"}, "expected index .* with a .faiss file; received t.npy"),
        ("t.npy", {"damping": 0.1}, "expected a curvature or damping with precondition or normalize"),
        ("t.npy", {"normalize": "train", "damping": [0.1, 1]}, "expected one damping to export rows with"),
        ("t.npy", {"normalize": "rows"}, "expected normalize 'none', 'cosine', 'train'; received 'rows'"),
        ("t.npy", {"dtype": "int8"}, "expected dtype 'float32', 'float16'; received 'int8'"),
        ("t.faiss", {"index": "hnsw"}, "expected index 'flat', 'ivf'; received 'hnsw'"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(stores, out, options, message):
    pytest.importorskip("faiss")
    Path("folder.npy").mkdir()
    with pytest.raises(InputError, match=message):
        ooc.export_rows(stores[1], out, **options)


def test_without_faiss_its_extra_is_named(stores, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtraError, match="install the extra 'faiss'"):
        ooc.export_rows(stores[1], "t.faiss")


def test_a_store_without_live_rows_or_with_missing_ones(tmp_path):
    store = drop(write(tmp_path / "t.zarr", random_rows(4, 8)), range(4))
    with pytest.raises(InputError, match="all of whose rows are dropped"):
        ooc.export_rows(store, tmp_path / "t.npy")
    GradientStore.create(tmp_path / "u.zarr", whole_mask(8), planned_rows=9).close()
    with pytest.raises(InputError, match="expected a finished store"):
        ooc.export_rows(tmp_path / "u.zarr", tmp_path / "t.npy")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_as_an_array(stores, dtype):
    query, train = stores
    options = {"damping": [0.1, 1.0], "scores_dtype": dtype}
    scores = ooc.influence_scores(query, train, out="scores.zarr", **options)
    facts = ooc.export_scores("scores.zarr", "scores.npy")
    found = np.load("scores.npy")
    expected = np.asarray(scores[...], np.float32) * np.float32(scores.attrs.get("scale_factor") or 1)
    assert (found.dtype, facts["shape"]) == (np.float32, [2, Q, N])
    assert_array_equal(found, expected)
    assert np.isnan(found[:, :, 7]).all()
    with pytest.raises(InputError, match=r"received damping, query, train: export a \.npy file"):
        ooc.export_scores(scores, "scores.jsonl")


def test_scores_in_many_chunks(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 7, 100)).astype(np.float16)
    array = zarr.create_array(str(tmp_path / "s"), shape=values.shape, chunks=(1, 3, 32), dtype="float16")
    array[...] = values
    array.attrs.update({"ooc_influence_scores": {}, "complete": True, "scale_factor": 4.0})
    ooc.export_scores(array, tmp_path / "scores.npy")
    assert_array_equal(np.load(tmp_path / "scores.npy"), values.astype(np.float32) * 4)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_scores_as_lines_are_those_of_the_command(stores, run, kind):  # noqa: F811
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    query, train = map(str, (stores[0].path, stores[1].path))
    assert run(f"score {query} {train} --out scores.zarr -o one.{kind}")[0] == 0
    code, out, err = run(f"export scores.zarr -o two.{kind}")
    assert (code, err) == (0, "")
    assert "1985 lines, scores of scores.zarr" in out
    if kind == "parquet":
        read = pytest.importorskip("pyarrow.parquet").read_table
        assert read("one.parquet").equals(read("two.parquet"))
    else:
        assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()


def test_scores_that_are_none_or_not_finished(stores, run):  # noqa: F811
    query, train = stores
    with pytest.raises(StoreNotFoundError, match="expected scores at nothing; received none"):
        ooc.export_scores("nothing", "s.npy")
    code, _, err = run("export nothing.zarr -o s.npy")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected a gradient store at" in err
    ooc.influence_scores(query, train, out="scores.zarr")
    zarr.open_array("scores.zarr", mode="r+").attrs["complete"] = False
    with pytest.raises(StoreNotFoundError, match="expected finished scores"):
        ooc.export_scores("scores.zarr", "s.npy")


def test_the_command_says_what_inner_products_are(stores, run):  # noqa: F811
    pytest.importorskip("faiss")
    query, train = (str(store.path) for store in stores)
    code, out, err = run(f"export {train} -o t.faiss --normalize train")
    assert (code, err) == (0, "")
    assert "t.faiss: 397 rows of 40 float32 numbers" in out
    assert "FAISS IDMap,Flat, by inner product; ids are row numbers; takes 65.1 KiB of memory" in out
    assert "train rows divided by their norms at damping 0.1, in the unit train: export queries alike" in out
    code, out, _ = run(f"export {query} -o q.npy --precondition {train} --damping 0.3 --normalize train")
    assert code == 0
    assert "are scores at damping 0.3, in the unit train" in out
    assert "q.rows.npy: the row number of each line" in out
    facts = json.loads(run(f"export {train} -o t.npy --json")[1])
    assert (facts["rows"], facts["settings"]["curvature"]) == (397, None)
    run(f"score {query} {train} --out s.zarr")
    code, _, err = run("export s.zarr -o s.npy --normalize train")
    assert (code, "expected --normalize with a gradient store; received scores" in err) == (2, True)

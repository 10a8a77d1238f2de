"""Rows of other programs as stores: from arrays, blocks and Parquet, resumed, described, and what works with them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import random_rows, whole_mask
from models import Mlp, batches, data, make
from models import loss as model_loss
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from test_interchange import drop, live, write

import ooc_influence as ooc
from ooc_influence import Dropout, Eigenbasis, GradientStore, KroneckerBasis, Storage
from ooc_influence.errors import (
    InputError,
    MismatchError,
    NonFiniteError,
    OocInfluenceWarning,
    StoreExistsError,
)
from ooc_influence.interchange import arrays, describe_mask
from ooc_influence.memory import PeakMemory
from ooc_influence.store import mark_dropped

N, K = 300, 24
ROWS = random_rows(N, K)
KRONECKER = Dropout(200, "grid", basis=KroneckerBasis())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 rows."""
    monkeypatch.setattr(arrays, "block_limit", lambda k: 32)


@contextmanager
def interrupted(monkeypatch, call):
    """Interrupt an import at a call that appends rows."""
    append, left = GradientStore.append, [call]

    def failing(self, *args, **more):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return append(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GradientStore, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            yield


def of_kind(kind):
    """The rows as each thing that they may come as."""
    if kind in ("npy", "fortran"):
        np.save(f"{kind}.npy", ROWS if kind == "npy" else np.asfortranarray(ROWS))
        return f"{kind}.npy" if kind == "npy" else np.load(f"{kind}.npy", mmap_mode="r")
    if kind == "zarr":
        array = zarr.create_array("rows.zarr", shape=ROWS.shape, chunks=(70, 7), dtype="float32")
        array[...] = ROWS
        return array
    if kind == "dask":
        return da.from_array(ROWS, chunks=((100, 1, 199), (10, 14)))
    if kind == "torch":
        return __import__("torch").from_numpy(ROWS)
    return {"array": ROWS, "float64": ROWS.astype(np.float64), "blocks": iter(np.split(ROWS, [1, 90, 90, 250]))}[kind]


@pytest.mark.parametrize("kind", ["array", "float64", "npy", "fortran", "zarr", "dask", "torch", "blocks"])
def test_rows_are_stored_as_they_are(small_blocks, kind):
    ids, labels, losses = [f"r{row}" for row in range(N)], np.arange(N) % 3, np.linspace(0, 2, N)
    store = ooc.import_rows(of_kind(kind), "s.zarr", ids=ids, columns={"label": labels}, loss=losses)
    assert_array_equal(store.rows(), ROWS)
    assert store.ids().tolist() == ids
    assert_array_equal(store.column("label"), labels)
    assert_array_equal(store.loss, losses.astype(np.float32))
    assert_allclose(store.grad_norm, np.linalg.norm(ROWS, axis=1), rtol=1e-6)
    assert (store.n, store.k, store.layout.dtype, store.layout.planned_rows) == (N, K, "float32", None)
    assert not store.verify()


def test_scores_of_imported_rows_are_those_of_dense_algebra(run):  # noqa: F811
    train = ooc.import_rows(ROWS, "t.zarr")
    query = ooc.import_rows(random_rows(5, K, seed=1), "q.zarr", like=train)
    fitted = ooc.fit_curvature(train)
    rows, queries = ROWS.astype(np.float64), query.rows().astype(np.float64)
    fisher = rows.T @ rows / N
    assert_allclose(fitted.fisher(), fisher, rtol=1e-5, atol=1e-7)
    inverse = np.linalg.inv(fisher + 0.1 * np.trace(fisher) / K * np.eye(K))
    expected = queries @ inverse @ rows.T
    assert_allclose(ooc.influence_scores(query, train).compute(), expected, rtol=1e-3, atol=1e-5)
    lists = ooc.top_influential(query, train, 4).proponents
    assert_array_equal(lists.rows, np.argsort(-expected, axis=1)[:, :4])
    assert_allclose(ooc.self_influence(train), np.einsum("ij,jk,ik->i", rows, inverse, rows), rtol=1e-4)
    code, out, _ = run("info t.zarr")
    assert (code, "unknown" in out) == (0, True)


def test_an_export_comes_back_as_it_was(small_blocks):
    pytest.importorskip("pyarrow")
    first = drop(write(Path("one.zarr"), ROWS), [3, 299])
    numbers = live(N, [3, 299])
    ooc.export_rows(first, "rows.parquet")
    ooc.export_rows(first, "rows.npy")
    second = ooc.import_rows("rows.parquet", "two.zarr", like=first)
    assert_array_equal(second.rows(), first.rows()[numbers])
    assert second.ids().tolist() == first.ids(numbers).tolist()
    for name in ("loss", "grad_norm", "columns/label"):
        assert_array_equal(second.small(name), first.small(name)[numbers])
    assert second.layout.columns == {"label": "int64", "column_gradient": "str"}
    assert second.fingerprints == first.fingerprints
    assert_array_equal(ooc.import_rows("rows.npy", "three.zarr").rows(), second.rows())
    ooc.export_rows(second, "again.npy")
    assert Path("again.npy").read_bytes() == Path("rows.npy").read_bytes()


def test_columns_of_parquet_of_other_programs():
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({
        "embedding": arrow.array(ROWS.tolist(), arrow.list_(arrow.float64())), "name": [f"n{row}" for row in range(N)],
        "split": arrow.array(["a", "b"] * (N // 2)).dictionary_encode(), "step": np.arange(N, dtype=np.uint16),
        "good": np.arange(N) % 2 == 0, "when": arrow.array([0] * N, arrow.timestamp("s")),
    })  # fmt: skip
    parquet.write_table(table, "t.parquet", row_group_size=77)
    with pytest.warns(OocInfluenceWarning, match=r"columns when of t\.parquet are left out"):
        store = ooc.import_rows("t.parquet", "s.zarr", ids="name")
    assert_array_equal(store.rows(), ROWS)
    assert store.layout.columns == {"split": "str", "step": "int64", "good": "bool"}
    assert (store.ids()[5], store.column("split")[5], store.column("step")[5]) == ("n5", "b", 5)
    assert not store.loss.any()
    some = ooc.import_rows("t.parquet", "u.zarr", ids="name", columns=["step"], loss="step", column="embedding")
    assert (some.layout.columns, some.loss[9]) == ({"step": "int64"}, 9)


@pytest.mark.parametrize("kind", ["npy", "blocks", "parquet"])
def test_an_interrupted_import_continues(small_blocks, monkeypatch, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        ooc.export_rows(write(Path("one.zarr"), ROWS), "rows.parquet")
        monkeypatch.setattr(ooc.interchange.parquet, "block_limit", lambda k: 32)
    settings = {"storage": Storage(chunk_rows=16, group_chunks=2), "dtype": "int8"}

    def rows():
        return "rows.parquet" if kind == "parquet" else of_kind(kind)

    append = GradientStore.append
    with interrupted(monkeypatch, 4):
        ooc.import_rows(rows(), "s.zarr", **settings)
    begun = GradientStore.open("s.zarr").n
    assert 0 < begun < N
    if kind != "blocks":  # whose number is not known
        with pytest.raises(InputError, match="expected a finished store"):
            ooc.export_rows("s.zarr", "x.npy")
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            GradientStore, "append", lambda self, new, **more: seen.append(len(new)) or append(self, new, **more)
        )
        store = ooc.import_rows(rows(), "s.zarr", **settings)
    assert sum(seen) == N - begun
    assert_array_equal(store.rows(), ooc.import_rows(rows(), "other.zarr", **settings).rows())
    assert not store.verify()
    assert ooc.import_rows(rows(), "s.zarr", **settings).n == N  # nothing left to do


def test_a_killed_import_continues(tmp_path):
    np.save("rows.npy", np.tile(ROWS, (400, 4)))
    script = """
        import time, numpy as np, ooc_influence as ooc
        from ooc_influence import GradientStore, Storage
        append = GradientStore.append
        def slow(self, *args, **more):
            append(self, *args, **more)
            self.flush()
            print(self.n, flush=True)
            time.sleep(0.2)
        GradientStore.append = slow
        from ooc_influence.interchange import arrays
        arrays.block_limit = lambda k: 4096
        ooc.import_rows("rows.npy", "s.zarr", storage=Storage(chunk_rows=512))
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as process:
        while int(process.stdout.readline()) < 12288:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 12288 <= GradientStore.open("s.zarr").n < 120000
    store = ooc.import_rows("rows.npy", "s.zarr", storage=Storage(chunk_rows=512))
    assert_array_equal(store.rows(119000), np.load("rows.npy", mmap_mode="r")[119000:])
    assert store.n == 120000
    assert not store.verify()


def test_more_rows_are_added_and_others_refused(small_blocks):
    np.save("rows.npy", ROWS[:200])
    ooc.import_rows("rows.npy", "s.zarr", loss=np.arange(200))
    store = ooc.import_rows(ROWS, "s.zarr", loss=np.arange(N))
    assert_array_equal(store.rows(), ROWS)
    assert_array_equal(store.loss, np.arange(N))
    with pytest.raises(MismatchError, match=r"expected the 300 rows of .*, or more; received 200"):
        ooc.import_rows("rows.npy", "s.zarr", loss=np.arange(200))
    with pytest.raises(MismatchError, match=r"expected the 300 rows of .*, or more; received 200"):
        ooc.import_rows(iter([ROWS[:200]]), "s.zarr", loss=np.arange(200))
    other = ROWS.copy()
    other[299, 3] += 1
    with pytest.raises(
        MismatchError, match=r"to have the numbers stored in .*; received others: the rows or their order"
    ):
        ooc.import_rows(other, "s.zarr", loss=np.arange(N))
    with pytest.raises(MismatchError, match="losses stored"):
        ooc.import_rows(ROWS, "s.zarr", loss=np.arange(N) + 1)
    for more, message in (
        ({"dtype": "float16"}, "dtype"), ({"ids": range(N)}, "ids"), ({"columns": {"x": range(N)}}, "columns"),
        ({"mask": whole_mask(K)}, "mask"), ({"loss_kind": "cross_entropy"}, "loss_kind"), ({"loss": None}, "losses"),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match=message):
            ooc.import_rows(ROWS, "s.zarr", **({"loss": np.arange(N)} | more))
    with pytest.raises(MismatchError, match="numbers a row"):
        ooc.import_rows(ROWS[:, :5], "s.zarr", loss=np.arange(N))
    write(Path("extracted.zarr"), ROWS)
    with pytest.raises(MismatchError, match="expected a store of imported rows"):
        ooc.import_rows(ROWS, "extracted.zarr")
    Path("file").write_text("x")
    with pytest.raises(StoreExistsError):
        ooc.import_rows(ROWS, "file")


def test_fewer_rows_than_an_interrupted_import_had(small_blocks, monkeypatch):
    storage = Storage(chunk_rows=16, group_chunks=2)
    with interrupted(monkeypatch, 4):
        ooc.import_rows(ROWS, "s.zarr", storage=storage)
    assert GradientStore.open("s.zarr").n == 96
    for rows in (ROWS[:100], ROWS):
        store = ooc.import_rows(rows, "s.zarr", storage=storage)
        assert_array_equal(store.rows(), rows)
        assert not store.verify()


def test_row_weights_need_losses_of_a_known_kind():
    plain = ooc.import_rows(ROWS, "plain.zarr")
    with pytest.raises(InputError, match="one-label cross-entropy"):
        ooc.fit_fisher(plain, weights="ggn")
    losses = np.linspace(0.1, 3, N)
    store = ooc.import_rows(ROWS, "s.zarr", loss=losses, loss_kind="cross_entropy")
    weights = 1 / np.expm1(losses)
    expected = (ROWS.T.astype(np.float64) * weights) @ ROWS / N
    assert_allclose(ooc.fit_fisher(store, weights="ggn").fisher(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["row", "loss"])
def test_rows_that_are_not_finite(small_blocks, of):
    rows, loss = ROWS.copy(), np.ones(N)
    if of == "row":
        rows[70, 3], rows[71, 0] = np.nan, np.inf
    else:
        loss[[70, 71]] = np.nan, np.inf
    with pytest.raises(NonFiniteError, match="rows 70, 71") as error:
        ooc.import_rows(rows, "s.zarr", loss=loss)
    assert error.value.rows == [70, 71]
    assert GradientStore.open("s.zarr").n == 64  # those before stay
    store = ooc.import_rows(rows, "s.zarr", loss=loss, on_nonfinite="skip")
    assert np.flatnonzero(store.dropped).tolist() == [70, 71]
    kept = live(N, [70, 71])
    assert_array_equal(store.rows()[kept], ROWS[kept])
    ooc.fit_fisher(store)
    assert np.isnan(ooc.self_influence(store)[[70, 71]]).all()
    assert ooc.import_rows(rows, "s.zarr", loss=loss, on_nonfinite="skip").n == N
    beyond = ROWS.astype(np.float64)
    beyond[5, 5] = 1e300
    with pytest.raises(NonFiniteError, match="rows 5"):
        ooc.import_rows(beyond, "t.zarr")


def test_rows_corrected_after_a_kill_are_not_dropped(small_blocks, monkeypatch):
    bad = ROWS.copy()
    bad[200] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "block_limit", lambda k: 64)
        with pytest.raises(NonFiniteError):
            ooc.import_rows(bad, "s.zarr", storage=Storage(chunk_rows=64, group_chunks=1))
    begun = GradientStore.open("s.zarr")
    assert begun.n == 192
    mark_dropped(begun.path, begun.layout, np.array([200]))  # as a writer does before it commits the row
    store = ooc.import_rows(ROWS, "s.zarr", storage=Storage(chunk_rows=64, group_chunks=1))
    assert not store.dropped.any()


def test_a_described_mask_names_the_modules(run):  # noqa: F811
    modules = [
        {"name": "fc1", "shape": [4, 10], "indices": [0, 9, 11, 39], "weights": 2.0, "bias": True},
        {"name": "fc2", "shape": [4, 5]},
    ]
    Path("mask.json").write_text(json.dumps({"modules": modules}))
    np.save("rows.npy", ROWS)
    np.save("q.npy", ROWS[:3])
    code, _, err = run("import rows.npy --store t.zarr --mask mask.json --loss-kind cross_entropy")
    assert (code, err) == (0, "")
    train = GradientStore.open("t.zarr")
    first, second = train.mask.modules
    assert (first.layer.name, first.layer.shape, first.layer.bias, train.mask.p) == ("fc1", (4, 10), True, 60)
    assert (first.rows.tolist(), first.cols.tolist()) == ([0, 0, 1, 3], [0, 9, 1, 9])
    assert (first.weight.tolist(), len(second.rows), second.weight[0]) == ([2.0] * 4, 20, 1.0)
    assert run("import q.npy --store q.zarr --like t.zarr")[0] == 0
    ooc.fit_fisher(train)
    by_module = ooc.module_influence("q.zarr", train, out="m.zarr")
    assert by_module.attrs["modules"] == ["fc1", "fc2"]
    assert_allclose(
        np.asarray(by_module[...]).sum(0), ooc.influence_scores("q.zarr", train).compute(), rtol=1e-3, atol=1e-4
    )
    same = ooc.import_rows(ROWS, "same.zarr", mask=modules)
    assert same.mask_digest == train.mask_digest
    assert ooc.import_rows(ROWS, "mask.zarr", mask=train.mask).mask_digest == train.mask_digest


def test_rows_of_unknown_numbers_are_compared_with_those_like_them_only():
    train, other = ooc.import_rows(ROWS, "a.zarr"), ooc.import_rows(ROWS[:5], "b.zarr")
    ooc.fit_fisher(train)
    with pytest.raises(MismatchError, match="mask and basis"):
        ooc.influence_scores(other, train)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([], "expected the mask as a list of modules"),
        ("absent.json", "expected a JSON file that describes the mask; received absent.json"),
        ([{"name": "a"}], "expected the shape of module 'a' as two positive whole numbers; received None"),
        ([{"shape": [1, 24]}], r"expected a module of the mask with name, shape and of .*; received \['shape'\]"),
        ([{"name": "a", "shape": [1, 24], "index": []}], "expected a module of the mask"),
        ([{"name": "a", "shape": [1, 23]}], "expected a mask of 24 entries, the numbers of a row; received one of 23"),
        ([{"name": "a", "shape": [1, 12]}] * 2, "expected each module once in the mask; received 'a' again"),
        ([{"name": "a", "shape": [2, 2], "indices": [0, 4]}], r"expected indices of module 'a' in \[0, 4\)"),
        ([{"name": "a", "shape": [2, 2], "indices": [1, 1]}], "expected each index of module 'a' once"),
        ([{"name": "a", "shape": [2, 2], "indices": [0.5]}], "expected flat indices of module 'a'"),
        ([{"name": "a", "shape": [1, 24], "weights": [1, 2]}], "expected a weight for all or each of 24 entries"),
        ([{"name": "a", "shape": [1, 24], "weights": float("nan")}], "expected finite weights of module 'a'"),
    ],
)
def test_masks_that_are_none(mask, message):
    with pytest.raises(InputError, match=message):
        ooc.import_rows(ROWS, "s.zarr", mask=mask)
    assert not Path("s.zarr").exists()


def test_describing_a_mask_by_itself():
    assert describe_mask([{"name": "fc", "shape": [1, K]}], K).digest == whole_mask(K).digest


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[0], {}, r"expected rows as an array \(n, k\) with at least one; received shape \(24,\)"),
        (ROWS[:0], {}, "with at least one"),
        (ROWS.astype(str), {}, "expected rows of numbers; received"),
        (3, {}, "expected rows as an array .* received int"),
        ([], {}, "expected blocks of rows to import; received none"),
        ([ROWS[:4], ROWS[:4, :3]], {}, r"expected rows of numbers \(b, 24\) from row 4 on; received float32 of shape"),
        ("absent.npy", {}, "expected an array of rows in absent.npy"),
        (
            "s3://bucket/rows.npy",
            {},
            "expected a local file of rows; received s3://bucket/rows.npy: copy it here first",
        ),
        ("rows.csv", {}, "expected rows in a .npy or .parquet file; received rows.csv"),
        (ROWS, {"ids": range(4)}, "expected ids for 300 rows; received 4"),
        (ROWS, {"ids": np.ones(N)}, "expected ids that are whole numbers or strings; received float64"),
        (ROWS, {"ids": [0] * N}, "expected ids that do not repeat"),
        (ROWS, {"ids": "name"}, "expected ids as an array with a value a row; received 'name'"),
        (ROWS, {"loss": np.ones((N, 2))}, "expected loss of one value a row"),
        (ROWS, {"columns": ["a"]}, "expected columns as a mapping of names to arrays"),
        (ROWS, {"columns": {"a/b": range(N)}}, "expected a column name"),
        (ROWS, {"column": "x"}, "expected a Parquet file with column"),
        (ROWS, {"dtype": "float8"}, "expected dtype one of"),
        (ROWS, {"on_nonfinite": "zero"}, "expected on_nonfinite 'raise' or 'skip'"),
        (iter([ROWS]), {"loss": np.ones(N + 1)}, "expected loss for the 300 rows of the blocks; received 301"),
        (iter([ROWS]), {"loss": np.ones(N - 1)}, "expected loss for every row; received 299 for more rows"),
    ],
)
def test_what_is_no_array_of_rows_is_said_in_a_line(rows, options, message):
    with pytest.raises(InputError, match=message):
        ooc.import_rows(rows, "s.zarr", **options)


def test_parquet_files_that_hold_no_rows():
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lists = arrow.array([[1.0, 2.0], [3.0, 4.0]])

    def refused(table, message, **options):
        parquet.write_table(arrow.table(table), "t.parquet")
        with pytest.raises(InputError, match=message):
            ooc.import_rows("t.parquet", "s.zarr", **options)

    refused({"a": [1, 2]}, r"whose lists are rows \(column=, --column\), one of none there; received none given")
    refused({"a": lists, "b": lists}, "one of a, b; received none given")
    refused({"a": lists}, "one of a; received 'b'", column="b")
    refused({"a": lists}, "expected ids as the name of a column of .*; received 'b'", ids="b")
    refused({"a": lists}, "expected loss as the name of a column of .*; received an array", loss=[1, 2])
    refused({"a": lists}, "expected columns as names of columns", columns=["b"])
    refused({"a": lists, "t": arrow.array([0, 0], arrow.date32())}, "in column 't' .*; received date32", columns=["t"])
    refused({"a": [[1.0, 2.0], [3.0]]}, "expected lists of 2 numbers in column 'a' .*; received others")
    refused({"a": [[1.0, 2.0], None]}, "expected lists of 2 numbers")
    refused({"a": [[1.0, 2.0], [1.0, None]]}, "expected lists of 2 numbers")
    refused(
        {"a": lists, "b": [1, None]}, "expected a value in every row of column 'b' .*; received none in 1 row of 0-2"
    )
    refused({"a": arrow.array([], arrow.list_(arrow.float32()))}, "expected rows to import")
    Path("t.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match="expected a Parquet file of rows"):
        ooc.import_rows("t.parquet", "s.zarr")


@pytest.mark.parametrize("compressor", [Dropout(200), KRONECKER, Dropout(200, reduce=Eigenbasis(20))])
def test_rows_like_those_of_an_extracted_store_are_compared_with_them(compressor):
    x, y = data(Mlp, 60)
    train = ooc.extract_gradients(make(Mlp), model_loss, batches(x[:50], y[:50], 8), "t.zarr", compressor=compressor)
    query = ooc.extract_gradients(make(Mlp), model_loss, batches(x[50:], y[50:], 8), "q.zarr", like=train)
    imported = ooc.import_rows(query.rows(), "i.zarr", like="t.zarr", loss=query.loss, dtype="float16")
    assert imported.fingerprints == train.fingerprints
    ooc.fit_curvature(train)
    assert_allclose(
        ooc.influence_scores(imported, train).compute(),
        ooc.influence_scores(query, train).compute(),
        rtol=2e-2,
        atol=1e-3,
    )
    with pytest.raises(InputError, match=r"expected rows of \d+ numbers, as in .*t\.zarr; received 24"):
        ooc.import_rows(ROWS, "x.zarr", like=train)
    with pytest.raises(InputError, match="expected mask or like"):
        ooc.import_rows(query.rows(), "x.zarr", like=train, mask=train.mask)
    with pytest.raises(InputError, match="apart from the one it is like"):
        ooc.import_rows(query.rows(), "t.zarr", like=train)


def test_what_runs_the_model_again_is_refused(run):  # noqa: F811
    from ooc_influence.evaluate import check

    x, y = data(Mlp, 60)
    model, split = make(Mlp), batches(x[:50], y[:50], 8)
    extracted = ooc.extract_gradients(model, model_loss, split, "t.zarr", compressor=KRONECKER)
    imported = ooc.import_rows(extracted.rows(), "i.zarr", like=extracted, loss=extracted.loss)
    message = r"expected rows that were extracted from a model, to run it again; received .*i\.zarr, imported"
    with pytest.raises(InputError, match=message):
        ooc.extract_gradients(model, model_loss, split, "q.zarr", like=imported)
    with pytest.raises(InputError, match=message):
        ooc.extract_gradients(model, model_loss, split, "i.zarr", compressor=KRONECKER)
    with pytest.raises(InputError, match=message):
        ooc.rerank(imported, imported, model, model_loss, (split, split), 5, 2)
    with pytest.raises(InputError, match=message):
        ooc.token_influence(
            imported, imported, model, lambda model, batch: model_loss(model, batch)[:, None], (split,) * 2
        )
    with pytest.raises(InputError, match=message):
        check(imported, model, model_loss, split)


def test_stores_made_from_imported_ones():
    train = ooc.import_rows(ROWS, "t.zarr", ids=[f"r{row}" for row in range(N)])
    assert ooc.rewrite_store(train, "int8.zarr", dtype="int8").n == N
    assert ooc.reduce_store(train, "r.zarr", 8).k == 8
    assert ooc.sketch_store(train).n == N
    ooc.fit_curvature(train)
    query = ooc.import_rows(ROWS[:3], "q.zarr", like=train)
    assert len(ooc.select_rows(query, train, 5).rows) == 5
    assert ooc.group_influence(query, train, by=np.arange(N) % 4).sums.shape == (3, 4)
    if __import__("importlib").util.find_spec("jinja2"):
        ooc.report.write_report(train, "pages", query)
    assert ooc.compact_store(drop(train, [4]), "c.zarr").n == N - 1
    assert ooc.merge_stores(["c.zarr"], "m.zarr").attrs["imported"] == train.attrs["imported"]


def test_memory_does_not_grow_with_the_rows():
    block = random_rows(4096, 512)
    array = np.lib.format.open_memmap("rows.npy", "w+", np.float32, (20 * 4096, 512))
    for start in range(0, len(array), 4096):
        array[start : start + 4096] = block
    array.flush()
    del array
    ooc.import_rows(block, "warm.zarr")
    with PeakMemory() as memory:
        store = ooc.import_rows("rows.npy", "s.zarr")
    assert store.n == 20 * 4096
    assert memory.peak - memory.start < 0.8 * 20 * block.nbytes


def test_the_command_takes_ids_losses_and_columns(run):  # noqa: F811
    np.save("rows.npy", ROWS)
    np.save("loss.npy", np.arange(N))
    Path("ids.txt").write_text("".join(f"doc {row}\n" for row in range(N)), "utf-8")
    Path("c.jsonl").write_text("".join(json.dumps({"label": row % 3, "src": f"s{row}"}) + "\n" for row in range(N)))
    command = (
        "import rows.npy --store s.zarr --ids ids.txt --loss loss.npy --columns c.jsonl --dtype float16 --codec zstd"
    )
    code, out, err = run(command)
    assert (code, err) == (0, "")
    assert "s.zarr" in out
    store = GradientStore.open("s.zarr")
    assert (store.ids()[7], store.column("src")[8], store.column("label")[8], store.loss[9]) == ("doc 7", "s8", 2, 9)
    assert (store.layout.dtype, store.layout.codec) == ("float16", "zstd")
    assert_allclose(store.rows(), ROWS, rtol=1e-3, atol=1e-5)
    for option, message in (
        ("--ids ids.csv", "expected --ids in a file .npy or .txt; received ids.csv"),
        ("--loss ids.txt", "expected --loss in a file .npy; received ids.txt"),
        ("--loss none.npy", "expected a value for each row in none.npy (--loss)"),
        ("--column x", "expected a Parquet file with column (--column)"),
    ):
        code, _, err = run(f"import rows.npy --store t.zarr {option}")
        assert (code, err.count("\n"), message in err) == (2, 1, True), err
    pytest.importorskip("pyarrow")
    assert run("export s.zarr -o s.parquet")[0] == 0
    facts = json.loads(run("import s.parquet --store u.zarr --columns label,src --json")[1])
    assert (facts["rows"], facts["columns"]) == (N, {"label": "int64", "src": "str"})


def test_an_interrupted_command_says_that_it_continues(monkeypatch, run):  # noqa: F811
    np.save("rows.npy", ROWS)

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(GradientStore, "append", interrupted)
    code, _, err = run("import rows.npy --store s.zarr")
    assert code == 130
    assert "run the same command again, it continues where it was" in err

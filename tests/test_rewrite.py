"""Merging, compacting, growing, looking up; representations and codecs; the writer's queue."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from conftest import random_rows, whole_mask, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import Mlp, batches, data, make
from models import loss as model_loss
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr

from ooc_influence import (
    Dropout,
    GradientStore,
    KroneckerBasis,
    Storage,
    compact_store,
    extract_gradients,
    fit_fisher,
    influence_scores,
    merge_stores,
    rewrite_store,
    self_influence,
)
from ooc_influence.errors import (
    InputError,
    MismatchError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreWriteError,
)
from ooc_influence.linalg import LayerMoments
from ooc_influence.store import LayerShape, Mask, ModuleMask
from ooc_influence.store.encoding import BLOCK, REPRESENTATIONS, Encoding
from ooc_influence.store.local import LocalArrayStore

ROWS = random_rows(60, 8)


def part(path, start, stop, prefix="r", **options):
    """Rows start to stop of ROWS with ids and a column, in chunks of 4."""
    names = [f"{prefix}{row}" for row in range(start, stop)]
    options = {"dtype": "float16", "storage": Storage(4, 2)} | options
    with GradientStore.create(path, whole_mask(8), ids="str", columns={"n": "int64"}, **options) as store:
        store.append(ROWS[start:stop], loss=np.arange(start, stop), ids=names, columns={"n": range(start, stop)})
    return GradientStore.open(path)


def test_merged_stores_equal_one_written_at_once(tmp_path):
    whole = part(tmp_path / "whole", 0, 60)
    sources = [part(tmp_path / name, *rows) for name, rows in (("a", (0, 24)), ("b", (24, 41)), ("c", (41, 60)))]
    with GradientStore.open(sources[1].path, "a") as store:
        store.drop([3, 16])
    before = [sorted((path, path.stat().st_mtime_ns) for path in store.path.rglob("c.*")) for store in sources]
    merged = merge_stores([sources[0], str(sources[1].path), sources[2].path], tmp_path / "m")
    assert (merged.n, merged.verify()) == (60, [])
    assert_array_equal(merged.records, whole.records)
    assert merged.ids().tolist() == whole.ids().tolist()
    assert np.flatnonzero(merged.dropped).tolist() == [27, 40]
    for name in ("gradients/c.0.0", "gradients/c.14.0", "loss/c.3", "columns/n/c.2"):
        assert (merged.path / name).read_bytes() == (whole.path / name).read_bytes()
    linked = [(merged.path / "gradients" / f"c.{chunk}.0").stat().st_nlink for chunk in range(15)]
    assert linked == [2] * 10 + [1] * 5  # 24 + 17 rows: whole chunks up to row 40, then none falls on another
    after = [sorted((path, path.stat().st_mtime_ns) for path in store.path.rglob("c.*")) for store in sources]
    assert before == after
    assert fit_fisher(merged).rows == 58


def test_a_merged_store_changes_without_its_sources(tmp_path):
    source = part(tmp_path / "a", 0, 8)
    merged = merge_stores([source], tmp_path / "m")
    with GradientStore.open(merged.path, "a") as store:
        store.append(ROWS[8:9], loss=[8.0], ids=["r8"], columns={"n": [8]})
        store.drop([0])
    again = GradientStore.open(source.path)
    assert (again.n, again.has_dropped, again.verify()) == (8, False, [])


def test_move_removes_the_sources(tmp_path):
    sources = [part(tmp_path / "a", 0, 9), part(tmp_path / "b", 9, 20)]
    assert merge_stores(sources, tmp_path / "m", move=True).n == 20
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_stores_that_do_not_go_together(tmp_path):
    first = part(tmp_path / "a", 0, 9)
    for name, options, error, match in (
        (
            "dtype",
            {"dtype": "int8"},
            MismatchError,
            "the dtype and block of .*, float16 and none; received int8 and 16 of",
        ),
        ("model", {"attributes": {"model": {"fingerprint": "x"}}}, MismatchError, "the model of"),
        ("scale", {"column_scale": np.arange(1, 9)}, MismatchError, "the column_scale of"),
        ("ids", {"prefix": "r"}, InputError, "id 'r[0-8]' is that of rows"),
    ):
        other = part(tmp_path / name, 0, 9, **({"prefix": "x"} | options))
        with pytest.raises(error, match=match):
            merge_stores([first, other], tmp_path / "m")
        assert not (tmp_path / "m").exists()
    entries = np.arange(8, dtype=np.int32)
    mask = Mask((ModuleMask(LayerShape("fc", "linear", (1, 9), False), entries * 0, entries, np.ones(8, "f4")),))
    GradientStore.create(tmp_path / "mask", mask, dtype="float16", ids="str", columns={"n": "int64"}).close()
    with pytest.raises(MismatchError, match="the mask and basis of"):
        merge_stores([first, tmp_path / "mask"], tmp_path / "m")
    with pytest.raises(InputError, match="twice"):
        merge_stores([first, first], tmp_path / "m")
    with pytest.raises(InputError, match="received none"):
        merge_stores([], tmp_path / "m")
    with pytest.raises(StoreExistsError):
        merge_stores([first], tmp_path / "scale")
    planned = GradientStore.create(tmp_path / "p", whole_mask(8), planned_rows=20)
    with pytest.raises(InputError, match="finished stores"):
        merge_stores([planned], tmp_path / "m")
    data = bytearray((first.path / "gradients" / "c.1.0").read_bytes())
    data[5] ^= 1
    (first.path / "gradients" / "c.1.0").write_bytes(data)
    with pytest.raises(StoreDamagedError, match="rows 4-8"):
        merge_stores([first], tmp_path / "m")


@pytest.mark.parametrize("ids", [True, False])
def test_compact_leaves_the_dropped_rows_out(tmp_path, ids):
    if ids:
        source = part(tmp_path / "a", 0, 30, dtype="int8")
    else:
        source = write_store(tmp_path / "a", ROWS[:30], dtype="int8", chunk_rows=4)
    gone = [0, 4, 5, 6, 7, 29]
    with GradientStore.open(source.path, "a") as store:
        store.drop(gone)
    made = compact_store(source.path, tmp_path / "c")
    live = np.delete(np.arange(30), gone)
    assert_array_equal(made.rows(), source.rows()[live])
    assert made.ids().tolist() == ([f"r{row}" for row in live] if ids else live.tolist())
    assert (made.has_dropped, made.verify(), made.attrs["made_from"]) == (False, [], [str(source.path)])
    assert made.find(["r8"] if ids else [8]).tolist() == [3]


def test_find(tmp_path):
    store = part(tmp_path / "a", 0, 30)
    assert store.find(["r7", "nobody", "r29"]).tolist() == [7, -1, 29]
    assert store.find([]).tolist() == []
    with pytest.raises(InputError, match="ids of type str"):
        store.find([7])
    plain = write_store(tmp_path / "b", ROWS[:9])
    assert plain.find([3, 9, 0]).tolist() == [3, -1, 0]
    with GradientStore.open(store.path, "a") as again:
        again.append(ROWS[:1], loss=[0.0], ids=["r7"], columns={"n": [0]})
        with pytest.raises(InputError, match="'x' for several rows"):
            again.append(ROWS[:2], loss=[0.0, 0.0], ids=["x", "x"], columns={"n": [0, 1]})
    with pytest.raises(InputError, match="rows 7 and 30"):
        GradientStore.open(store.path).find(["r7"])


@settings(max_examples=60, deadline=None)
@given(
    rows=arrays(np.float32, st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 8, 9, 13])),
                elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    name=st.sampled_from([name for name in REPRESENTATIONS if name != "sign"]),
    scaled=st.booleans(),
    block=st.sampled_from([None, 1, 4, BLOCK]),
)  # fmt: skip
def test_what_is_decoded_is_near_what_was_encoded(rows, name, scaled, block):
    n, k = rows.shape
    columns = np.geomspace(0.01, 100, k).astype(np.float32) if scaled else None
    form = Encoding.of(name, k)
    if form.quantised:
        form = Encoding(name, k, block)
    raw, scale, out = np.empty((n, form.columns), form.dtype), np.empty(n, np.float32), np.empty_like(rows)
    form.encode_into(rows, raw, scale, columns)
    form.decode_into(raw, scale, out, columns)
    assert not form.nonfinite_rows(raw).any()
    sizes = np.abs(rows if columns is None else rows / columns)
    largest = sizes.max(axis=1, keepdims=True)
    if form.block is not None:  # an error is at most that of the largest in the entry's own block
        parts = [sizes[:, at : at + form.block] for at in range(0, k, form.block)]
        largest = np.hstack([np.broadcast_to(part.max(axis=1, keepdims=True), part.shape) for part in parts])
    step = {"float32": 2e-7, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1.003 / 127,
            "int8-linear": 0.501 * 2**0.125 / 127, "int4": 1.04 / 7}[name]  # fmt: skip
    error = np.abs(out - rows) if columns is None else np.abs(out - rows) / columns
    below = 2.0**-30 * sizes.max(axis=1, keepdims=True)  # the smallest scale that a block can have
    assert (error <= step * np.maximum(largest, below) + 1e-33).all()


@pytest.mark.parametrize("k", [1, 15, 16, 17, 64, 4100])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantised_rows_as_the_format_says(k, name):
    """Decoded by the document's formula, in float64; every block uses its whole range."""
    rows = random_rows(70, 50, seed=k)[:, np.arange(k) % 50] * np.geomspace(1e-6, 1e6, k)[
        np.random.default_rng(k).permutation(k)
    ].astype("f4")
    rows[3], rows[4, : min(k, 40)] = 0, 0
    form, top = Encoding.of(name, k), {"int8": 127, "int4": 7}[name]
    raw, scale, out = np.empty((70, form.columns), form.dtype), np.empty(70, np.float32), np.empty_like(rows)
    form.encode_into(rows, raw, scale)
    form.decode_into(raw, scale, out)
    numbers = raw[:, : k if name == "int8" else -(-k // 2)]
    codes = raw[:, numbers.shape[1] :].view(np.uint8).astype(int)
    assert codes.shape[1] == -(-k // 16)
    if name == "int4":
        numbers = np.hstack([numbers & 15, numbers >> 4])[:, :k].astype(np.int8)
        numbers[numbers > 7] -= 16
    q = numbers.astype(np.float64)
    expected = q * (np.abs(q) + top) * scale[:, None] * 2.0 ** (-np.repeat(codes, 16, axis=1)[:, :k] / 8.0)
    assert_allclose(out, expected, rtol=1e-6)
    assert np.abs(q).max() == top
    for block in range(codes.shape[1]):
        part = slice(16 * block, 16 * block + 16)
        tops = np.abs(q[:, part]).max(axis=1)
        live = (np.abs(rows[:, part]).max(axis=1) > 0) & (codes[:, block] < 255)
        assert (tops[live] >= np.floor(0.93 * top)).all()
    assert (out[3] == 0).all()


@pytest.mark.parametrize(
    ("name", "codec"),
    [(name, None) for name in REPRESENTATIONS]
    + list(zip(REPRESENTATIONS, ["zstd", "blosc", "lz4", "gzip", "zstd", "blosc", "lz4"], strict=True)),
)
def test_every_representation_and_codec(tmp_path, name, codec):
    k = 7
    rows = random_rows(50, k)
    columns = np.abs(rows).mean(axis=0)
    path = tmp_path / "s"
    storage = Storage(chunk_rows=8, group_chunks=2, codec=codec)
    with GradientStore.create(path, whole_mask(k), dtype=name, storage=storage, column_scale=columns) as store:
        store.append(rows[:13], loss=np.zeros(13))
        store.flush()
        store.append(rows[13:], loss=np.zeros(37))
    store = GradientStore.open(path)
    assert (store.verify(), store.layout.codec, store.shape) == ([], codec, (50, k))
    worst = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 0.01, "int8": 0.01, "int8-linear": 0.0044, "int4": 0.15,
             "sign": 1}[name]  # fmt: skip
    assert np.abs((store.rows() - rows) / columns).max() < worst * np.abs(rows / columns).max()
    assert_array_equal(store.rows(5, 30), store.rows()[5:30])
    assert_array_equal(store.to_dask().compute(), store.rows())
    if name != "sign":
        fit_fisher(store)
    assert np.isfinite(self_influence(store, curvature=False if name == "sign" else None)).all()
    assert store.reading_bytes == (0 if codec is None else 4 * store.layout.chunk_bytes)


def test_int8_scores_rank_as_float32_ones(tmp_path):
    rows, queries = random_rows(800, 300), random_rows(20, 300, seed=1)
    scores = {}
    for name in ("float32", "int8", "int8-linear", "int4"):
        train = write_store(tmp_path / f"{name}-t", rows, dtype=name)
        query = write_store(tmp_path / f"{name}-q", queries, dtype=name)
        fit_fisher(train)
        scores[name] = influence_scores(query, train).compute()
    ranks = {name: spearmanr(found.ravel(), scores["float32"].ravel()).statistic for name, found in scores.items()}
    assert ranks["int8"] >= 0.9999
    assert ranks["int8-linear"] >= 0.999
    assert ranks["int4"] > 0.97


def test_linear_rows_of_a_kronecker_basis_are_whitened(tmp_path):
    x, y = data(Mlp, 24)
    basis = KroneckerBasis(24, damping=0.1, list_damping=10)
    numbers, linear = (
        extract_gradients(make(Mlp), model_loss, batches(x, y, 8), tmp_path / dtype, dtype=dtype,
                          compressor=Dropout(k=80, basis=basis))
        for dtype in ("float32", "int8-linear")
    )  # fmt: skip
    assert_allclose(linear.column_scale, LayerMoments.of(linear.mask).scale(1.0), rtol=1e-6)
    steps = linear.small("row_scale")
    share = steps / (np.abs(numbers.rows() / linear.column_scale).max(axis=1) / 127)
    assert 1 - 1e-5 < share.min() <= share.max() < 2**0.125 + 1e-5
    error = np.abs(linear.rows() - numbers.rows()) / linear.column_scale / steps[:, None]
    assert 0.25 < error.max() < 0.51
    rewritten = rewrite_store(numbers, tmp_path / "again", dtype="int8-linear")
    assert_array_equal(rewritten.raw_rows(0, 24), linear.raw_rows(0, 24))


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_torch_takes_the_rows_without_a_copy(tmp_path, name):
    import torch

    store = write_store(tmp_path / "s", ROWS, dtype=name)
    tensor = store.tensor(0, 40)
    kinds = {"int8-linear": torch.int8, "int4": torch.uint8, "sign": torch.uint8}
    assert tensor.dtype == kinds.get(name, getattr(torch, name, None))
    if name == "bfloat16":
        assert_allclose(tensor.float().numpy(), store.rows(0, 40))
    tensor.zero_()  # a private copy of the page: nobody else sees it
    assert np.abs(store.rows(0, 40)).max() > 0


def test_a_caller_faster_than_the_disk_waits(tmp_path, monkeypatch):
    """Back-pressure: no more chunks in memory than the writer has buffers for."""
    from ooc_influence.store import commits, writer

    gate, alive, most = threading.Event(), [0], [0]
    put, empty = LocalArrayStore._put, commits.Slot.empty

    def slow(self, path, value):
        gate.wait(10)
        put(self, path, value)

    def counted(layout):
        alive[0] += 1
        most[0] = max(most)
        return empty(layout)

    with GradientStore.create(tmp_path / "s", whole_mask(8), dtype="float32", storage=Storage(2, 4)) as store:
        monkeypatch.setattr(LocalArrayStore, "_put", slow)
        monkeypatch.setattr(writer.Slot, "empty", counted)
        done = []
        thread = threading.Thread(target=lambda: done.append(store.append(ROWS, loss=np.zeros(60))))
        thread.start()
        thread.join(0.5)
        assert not done  # it waits for a buffer
        assert alive[0] == writer.BUFFERS
        assert store.writer().next_row <= 2 * writer.BUFFERS
        gate.set()
        thread.join()
        assert alive[0] == writer.BUFFERS
    assert_array_equal(GradientStore.open(tmp_path / "s").rows(), ROWS)


@pytest.mark.parametrize("where", ["append", "flush", "close"])
def test_an_error_of_the_writing_thread_is_raised_once_in_the_caller(tmp_path, monkeypatch, where):
    def fail(self, path, value):
        raise OSError(28, "No space left on device")

    store = GradientStore.create(tmp_path / "s", whole_mask(8), dtype="float32", storage=Storage(2, 4))
    monkeypatch.setattr(LocalArrayStore, "_put", fail)

    def act():
        for _ in range(100 if where == "append" else 1):
            store.append(ROWS[:2], loss=np.zeros(2))
        if where != "append":
            getattr(store, where)()

    with pytest.raises(StoreWriteError, match="no space left"):
        act()
    store.close()
    assert GradientStore.open(store.path).n == 0


def test_a_planned_store_grows_and_old_readers_keep_what_they_saw(tmp_path):
    path = tmp_path / "s"
    GradientStore.create(path, whole_mask(8), dtype="float32", storage=Storage(4, 2), planned_rows=22).close()
    for start, stop in ((0, 16), (16, 22)):
        with GradientStore.open(path, "a") as store:
            store.writer(start, stop)
            store.append(ROWS[start:stop], loss=np.zeros(stop - start))
    reader = GradientStore.open(path)
    with GradientStore.open(path, "a") as store:
        store.grow(53)
        store.grow(53)
        assert store.layout.planned_rows == 53
        with pytest.raises(InputError, match="at most 30 rows"):
            store.grow(30)
    assert GradientStore.open(path).n == 22
    for start, stop, first in ((32, 53, 32), (0, 16, 16), (16, 32, 22)):
        with GradientStore.open(path, "a") as store:
            writer = store.writer(start, stop)
            assert writer.next_row == first
            store.append(ROWS[first:stop], loss=np.zeros(stop - first))
    assert_array_equal(reader.rows(), ROWS[:22])
    grown = GradientStore.open(path)
    assert_array_equal(grown.rows(), ROWS[:53])
    assert grown.verify() == []
    other = GradientStore.open(write_store(tmp_path / "t", ROWS).path, "a")
    with pytest.raises(InputError, match="grows by itself"):
        other.grow(100)


def test_a_store_that_grows_can_be_divided_and_grow_again(tmp_path):
    path = write_store(tmp_path / "s", ROWS[:10], chunk_rows=4, group_chunks=2).path
    with GradientStore.open(path, "a") as store:
        with pytest.raises(InputError, match="planned so"):
            store.plan_rows(9)
        store.plan_rows(31)
        with pytest.raises(InputError, match="planned so"):
            store.plan_rows(None)
    for start, stop, first in ((16, 31, 16), (0, 16, 10)):
        with GradientStore.open(path, "a") as store:
            assert store.writer(start, stop).next_row == first
            if start:
                with pytest.raises(StoreBusyError, match="while it grows"):
                    GradientStore.open(path, "a").plan_rows(40)
            store.append(ROWS[first:stop], loss=np.arange(first, stop))
    with GradientStore.open(path, "a") as store:
        store.plan_rows(None)
        assert store.layout.planned_rows is None
        store.append(ROWS[31:50], loss=np.arange(31, 50))
    found = GradientStore.open(path)
    assert_array_equal(found.rows(), ROWS[:50])
    assert (found.layout.planned_rows, found.verify()) == (None, [])

"""``reduce_store``: a wide store written again in its eigenbasis, against the dense oracle and by invariance."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import random_rows, roomy, whole_mask
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr

from ooc_influence import (
    Dropout,
    Eigenbasis,
    GradientStore,
    Storage,
    extract_gradients,
    fit_fisher,
    influence_scores,
    reduce_store,
    self_influence,
)
from ooc_influence.compress import eigenbasis
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError, StoreBusyError, StoreExistsError
from ooc_influence.linalg import row_weights, spectrum

N, K, R = 300, 40, 12
APPEND = eigenbasis._append
ROWS = random_rows(N, K)
LOSS = np.linspace(0.1, 3, N).astype(np.float32)
FACTS = {
    "loss_kind": "cross_entropy", "model": {"fingerprint": "m"}, "covered": 0.5,
    "compressor": {"name": "dropout", "k": K, "sampling": "uniform", "seed": 0},
}  # fmt: skip


def make_wide(path, rows=ROWS, losses=LOSS, *, first=0, chunk_rows=32, planned_rows=None, **options):
    options = {"dtype": "float32", "attributes": FACTS, "ids": "str", "columns": {"n": "int64"}} | options
    with GradientStore.create(
        path, whole_mask(rows.shape[1]), storage=Storage(chunk_rows, 2), planned_rows=planned_rows, **options
    ) as store:
        add(store, rows, losses, first)
    return GradientStore.open(path)


def add(store, rows, losses, first):
    numbers = np.arange(first, first + len(rows))
    if store.layout.planned_rows:
        store.writer(0, store.layout.planned_rows)
    store.append(rows, loss=losses, ids=[f"r{n}" for n in numbers], columns={"n": numbers})


@pytest.fixture
def wide(tmp_path):
    return make_wide(tmp_path / "wide.zarr")


def small_blocks(monkeypatch, rows=16):
    for module in (eigenbasis, spectrum):
        monkeypatch.setattr(module, "block_limit", lambda k, **least: rows)


def oracle(rows, weights=None):
    """The eigenvalues of the rows' F, largest first, and its eigenvectors."""
    doubles = np.asarray(rows, np.float64) * np.sqrt(1 if weights is None else weights)[..., None]
    values, vectors = np.linalg.eigh(doubles.T @ doubles / len(rows))
    return values[::-1], vectors[:, ::-1]


def test_rows_are_wide_rows_in_their_eigenbasis(tmp_path, wide):
    store = reduce_store(wide, tmp_path / "s.zarr", R, dtype="float32")
    values, vectors = oracle(ROWS)
    basis = store.reduction
    assert_allclose(basis.eigenvalues, values[:R], rtol=1e-5)
    assert_allclose(np.abs((basis.vectors * vectors[:, :R]).sum(0)), 1, atol=1e-4)
    assert_allclose(store.rows(), ROWS @ basis.vectors, atol=1e-6)
    assert store.attrs["reduction"]["left_out"] == pytest.approx(values[R:].sum() / values.sum(), rel=1e-4)
    assert store.attrs["measured"]["left_out"] == pytest.approx(values[R:].sum() / values.sum(), rel=1e-4)
    assert store.attrs["measured"]["rows"] == N
    assert_array_equal(store.loss, LOSS)
    assert_array_equal(store.grad_norm, wide.grad_norm)
    assert_array_equal(store.column("n"), np.arange(N))
    assert store.ids().tolist() == wide.ids().tolist()
    assert (store.mask_digest, store.columns_digest) != (wide.columns_digest, wide.columns_digest)
    assert {name: store.attrs[name] for name in ("loss_kind", "model", "covered")} == {
        name: FACTS[name] for name in ("loss_kind", "model", "covered")
    }
    assert Dropout.from_dict(store.attrs["compressor"]) == Dropout(K, reduce=Eigenbasis(R))
    assert store.attrs["made_from"] == [str(wide.path)]
    assert store.layout.planned_rows is None
    assert store.verify() == []
    with GradientStore.open(store.path, "a") as again:  # it grows, as its source does
        add(again, np.zeros((3, R), np.float32), np.zeros(3), N)
    assert GradientStore.open(store.path).n == N + 3


def test_it_is_what_extraction_would_have_stored(tmp_path):
    def extract(name, n=60, **options):
        options = {"dtype": "float16", "loss_kind": "cross_entropy"} | options
        return extract_gradients(make(Mlp), loss, batches(*data(Mlp, n), 8), tmp_path / name, **options)

    compressor = Dropout(k=80, sampling="importance", reduce=Eigenbasis(r=20, pilot=60))
    direct = extract("direct", compressor=compressor, dtype="float32")
    wide = extract("wide", compressor=Dropout(k=80, sampling="importance"))
    second = reduce_store(wide, tmp_path / "second", 20, rows=60, dtype="float32")
    assert second.attrs["compressor"] == direct.attrs["compressor"]
    assert_allclose(second.reduction.eigenvalues, direct.reduction.eigenvalues, rtol=1e-4)
    for name in ("left_out", "trace", "pilot_rows"):
        assert second.attrs["reduction"][name] == pytest.approx(direct.attrs["reduction"][name], rel=1e-4)
    assert_allclose(second.rows(), direct.rows(), atol=2e-3 * np.abs(direct.rows()).max())  # wide rows are float16
    assert_allclose(second.grad_norm, direct.grad_norm, rtol=1e-4)
    query = extract("query", 10, like=second, dtype="float32")
    assert_allclose(query.rows(), second.rows(0, 10), atol=2e-3 * np.abs(direct.rows()).max())
    wide_query = extract("wide_query", 10, like=wide)
    reduced = reduce_store(wide_query, tmp_path / "reduced_query", like=second, dtype="float32")
    assert reduced.attrs["compressor"] == second.attrs["compressor"]
    assert_allclose(reduced.rows(), second.rows(0, 10), atol=1e-6)
    more = extract("second", 80, compressor=compressor, dtype="float32")  # and extraction goes on with it
    assert more.n == 80
    assert_array_equal(more.reduction.vectors, second.reduction.vectors)


@pytest.mark.parametrize("weights", [None, "ggn", "trak"])
def test_a_weighted_basis_of_live_rows(tmp_path, wide, weights):
    with GradientStore.open(wide.path, "a") as store:
        store.drop([0, 40, 299])
    store = reduce_store(wide.path, tmp_path / "s.zarr", R, weights=weights, dtype="float32")
    live = np.delete(np.arange(N), [0, 40, 299])
    w = row_weights(LOSS[live], weights)
    values, _ = oracle(ROWS[live], w)
    assert_allclose(store.reduction.eigenvalues, values[:R], rtol=1e-5)
    assert_allclose(store.reduction.mean_square, np.square(store.rows()[live]).mean(0), rtol=1e-5)
    assert np.flatnonzero(store.dropped).tolist() == [0, 40, 299]
    assert_allclose(store.rows(), ROWS @ store.reduction.vectors, atol=1e-6)
    for facts in (store.attrs["reduction"], store.attrs["measured"]):
        assert facts["left_out"] == pytest.approx(1 - values[:R].sum() / values.sum(), rel=1e-3)
    assert store.attrs["measured"]["rows"] == store.attrs["reduction"]["pilot_rows"] == N - 3
    if weights:
        with pytest.raises(InputError, match="loss_kind"):
            reduce_store(make_wide(tmp_path / "w", attributes={}), tmp_path / "t", R, weights=weights)


def test_marks_are_there_before_the_rows(tmp_path, wide, monkeypatch):
    """Nobody ever sees a dropped row as live; those dropped meanwhile are marked at the end."""
    with GradientStore.open(wide.path, "a") as store:
        store.drop([3, 200])
    seen = []

    def look(target, *rest, real=APPEND):
        if target.n:
            seen.append(np.flatnonzero(GradientStore.open(target.path).dropped).tolist())
        else:
            with GradientStore.open(wide.path, "a") as store:
                store.drop([100])
        return real(target, *rest)

    small_blocks(monkeypatch)
    monkeypatch.setattr(eigenbasis, "_append", look)
    store = reduce_store(wide.path, tmp_path / "s.zarr", R, storage=Storage(16, 2))
    assert seen[0] == [3]
    assert np.flatnonzero(store.dropped).tolist() == [3, 100, 200]


def test_workers_chunks_blocks_and_memory_do_not_matter(tmp_path, wide, monkeypatch):
    expected = reduce_store(wide, tmp_path / "a", R, dtype="float32")
    small_blocks(monkeypatch)
    other = make_wide(tmp_path / "other", chunk_rows=7, planned_rows=N)
    for number, (source, options) in enumerate((
        (wide, {"workers": 3}), (other, {}), (other, {"workers": 4, "storage": Storage(10, 3)}),
        (wide, {"memory": roomy()}), (wide, {"storage": Storage(codec="zstd")}),
    )):  # fmt: skip
        found = reduce_store(source, tmp_path / f"{number}", R, dtype="float32", **options)
        assert_allclose(found.rows(), expected.rows(), atol=1e-5)
        assert found.verify() == []
        assert found.layout.planned_rows == source.layout.planned_rows
    bits = [
        reduce_store(other, tmp_path / f"q{workers}", like=expected, dtype="float32", workers=workers).rows()
        for workers in (1, 2, 5)
    ]
    assert_array_equal(bits[1], bits[0])  # the basis given, to the last bit
    assert_array_equal(bits[2], bits[0])


class Stopping:
    """Raise, or die, at the n-th block written."""

    def __init__(self, after, how=None):
        self.left, self.how, self.rows, self.lock = after, how, 0, threading.Lock()

    def __call__(self, target, rows, *rest):
        with self.lock:  # blocks are written by several threads
            if self.left == 0:
                if self.how:
                    os.kill(os.getpid(), self.how)
                raise KeyboardInterrupt
            self.left -= 1
            self.rows += len(rows)
        return APPEND(target, rows, *rest)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupted_run_goes_on_with_the_same_basis(tmp_path, wide, monkeypatch, workers):
    """Bit for bit what an uninterrupted one has, although the block at which it stopped was half done."""
    small_blocks(monkeypatch)
    options = {"dtype": "float32", "storage": Storage(24, 1)}  # 24 is no multiple of 16: blocks start anew in a group
    whole = reduce_store(wide, tmp_path / "whole", R, **options)
    first = Stopping(7)
    monkeypatch.setattr(eigenbasis, "_append", first)
    with pytest.raises((KeyboardInterrupt, InterruptedError)):
        reduce_store(wide, tmp_path / "s", R, workers=workers, **options)
    held = GradientStore.open(tmp_path / "s")
    assert 0 < held.committed < N
    assert held.attrs["reduced"]["source"] == wide.identity
    basis = held.reduction.vectors
    fits = []
    monkeypatch.setattr("ooc_influence.compress.reduce.fit_eigenbasis", lambda *a, **b: fits.append(1))
    second = Stopping(-1)
    monkeypatch.setattr(eigenbasis, "_append", second)
    found = reduce_store(wide, tmp_path / "s", R, workers=workers, **options)
    assert not fits
    assert second.rows == N - held.committed
    assert_array_equal(found.reduction.vectors, basis)
    if workers == 1:
        assert_array_equal(basis, whole.reduction.vectors)
        assert_array_equal(found.rows(), whole.rows())
        assert_array_equal(found.records, whole.records)
    assert_allclose(found.rows(), ROWS @ basis, atol=1e-6)
    assert found.verify() == []
    assert found.layout.planned_rows is None
    monkeypatch.setattr(eigenbasis, "_append", None)  # a finished one does nothing
    again = reduce_store(wide, tmp_path / "s")
    assert again.attrs == found.attrs


def test_a_run_that_stops_when_all_rows_are_there(tmp_path, wide, monkeypatch):
    """The next one marks what was dropped meanwhile, and lets the store grow."""
    with monkeypatch.context() as patch:
        patch.setattr("ooc_influence.compress.reduce._finish", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reduce_store(wide, tmp_path / "s", R)
    assert GradientStore.open(tmp_path / "s").layout.planned_rows == N
    with GradientStore.open(wide.path, "a") as store:
        store.drop([5])
    found = reduce_store(wide.path, tmp_path / "s", R)
    assert (found.layout.planned_rows, np.flatnonzero(found.dropped).tolist()) == (None, [5])


def test_a_killed_run_goes_on(tmp_path, wide):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import signal
import ooc_influence.compress.eigenbasis as passes, ooc_influence.linalg.spectrum as spectrum
from test_second_pass import Stopping
from ooc_influence import Storage, reduce_store
passes.block_limit = spectrum.block_limit = lambda k, least: 16
passes._append = Stopping(int(sys.argv[4]), signal.SIGKILL)
reduce_store(sys.argv[2], sys.argv[3], 12, dtype="float32", storage=Storage(8, 2))
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(wide.path), str(tmp_path / "s")]
    killed = subprocess.run([*command, "10"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    held = GradientStore.open(tmp_path / "s")
    assert 0 < held.n < N
    basis = held.reduction.vectors
    found = reduce_store(wide, tmp_path / "s", R, dtype="float32")
    assert_array_equal(found.reduction.vectors, basis)
    assert_allclose(found.rows(), ROWS @ basis, atol=1e-6)
    assert (found.n, found.verify(), found.layout.planned_rows) == (N, [], None)


def test_another_writer_is_waited_for_on_a_cluster_only(tmp_path, wide, monkeypatch):
    """There it may be a worker that died, whose claim can be taken over when its heartbeat has stood still."""
    train = reduce_store(wide, tmp_path / "t", R, storage=Storage(32, 1))
    held = []

    def claimed(store, stripe, real=eigenbasis._claim):
        if not held:
            held.append(GradientStore.open(store.path, "a"))
            held[0].writer(0, 64)
        return real(store, stripe)

    monkeypatch.setattr(eigenbasis, "_claim", claimed)
    with pytest.raises(StoreBusyError):
        reduce_store(wide, tmp_path / "s", like=train, storage=Storage(32, 1))
    monkeypatch.setattr(eigenbasis, "in_worker", lambda: True)
    monkeypatch.setattr(
        "ooc_influence.store.claim.time", SimpleNamespace(**vars(time) | {"sleep": lambda _: held[0].close()})
    )
    found = reduce_store(wide, tmp_path / "s", like=train)
    assert_array_equal(found.rows(), train.rows())


def test_rows_appended_to_the_wide_store_are_added(tmp_path):
    wide = make_wide(tmp_path / "wide", ROWS[:200], LOSS[:200])
    first = reduce_store(wide.path, tmp_path / "s", R, dtype="float32", storage=Storage(24, 2))
    with GradientStore.open(wide.path, "a") as store:
        add(store, ROWS[200:], LOSS[200:], 200)
    found = reduce_store(wide.path, tmp_path / "s", R, dtype="float32", workers=2)
    assert_array_equal(found.reduction.vectors, first.reduction.vectors)
    assert_allclose(found.rows(), ROWS @ found.reduction.vectors, atol=1e-6)
    assert found.ids().tolist() == [f"r{n}" for n in range(N)]
    assert (found.attrs["measured"]["rows"], found.layout.planned_rows, found.verify()) == (N, None, [])
    assert found.attrs["measured"]["left_out"] > found.attrs["reduction"]["left_out"]  # the basis is of the old rows


def test_a_store_that_several_writers_filled(tmp_path):
    wide = make_wide(tmp_path / "wide", planned_rows=N)
    store = reduce_store(wide, tmp_path / "s", R)
    assert store.layout.planned_rows == N
    with GradientStore.open(wide.path, "a") as again:
        again.grow(N + 40)
    with pytest.raises(InputError, match="finished store"):
        reduce_store(wide.path, tmp_path / "s", R)
    with GradientStore.open(wide.path, "a") as again:
        again.writer(N // 64 * 64, N + 40)
        again.append(ROWS[:40], loss=LOSS[:40], ids=[f"x{n}" for n in range(40)], columns={"n": range(40)})
    found = reduce_store(wide.path, tmp_path / "s", R)
    assert (found.n, found.layout.planned_rows, found.verify()) == (N + 40, N + 40, [])


def test_what_is_at_the_target_has_to_be_the_same_run(tmp_path, wide, monkeypatch):
    fits = []
    reduce_store(wide, tmp_path / "s", R, rows=200)
    monkeypatch.setattr("ooc_influence.compress.reduce.fit_eigenbasis", lambda *a, **b: fits.append(1))
    reduce_store(wide, tmp_path / "s", R, rows=200)
    for options, what in (
        ({"r": R + 1}, "the r of .*, 12;"), ({"rows": 100}, "rows of the basis of .*, 200;"),
        ({"weights": "ggn"}, "weights of .*, none;"),
        ({"dtype": "int8"}, "dtype of .*, float16;"), ({"storage": Storage(chunk_rows=3)}, "chunk_rows"),
        ({"storage": Storage(codec="zstd")}, "codec"),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match=what):
            reduce_store(wide, tmp_path / "s", **options)
    other = make_wide(tmp_path / "other")
    with pytest.raises(MismatchError, match="source"):
        reduce_store(other, tmp_path / "s", R, rows=200)
    with pytest.raises(MismatchError, match=r"source.* of .*, none"):
        reduce_store(wide, other.path, R)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for name in ("folder", "folder/file"):
        with pytest.raises(StoreExistsError):
            reduce_store(wide, tmp_path / name, R)
    with pytest.raises(InputError, match="another path"):
        reduce_store(wide, wide.path, R)
    assert not fits


def test_asking_for_what_is_not_there(tmp_path, wide):
    out = tmp_path / "s"
    for options, what in (
        ({"r": K + 1}, "between 1 and 40"), ({"r": 0}, "r >= 1"), ({"r": 9, "rows": 8}, "at least r = 9 pilot rows"),
        ({"rows": 0}, "pilot >= 1"), ({"weights": "x"}, "'ggn', 'trak'"), ({"rotate": True}, "reduce it first"),
        ({"like": wide}, "reduced to an eigenbasis"), ({"dtype": "x"}, "dtype one of"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what):
            reduce_store(wide, out, **options)
    with pytest.raises(MemoryBudgetError, match="--memory"):
        reduce_store(wide, out, R, memory="1MiB")
    empty = make_wide(tmp_path / "empty", ROWS[:0], LOSS[:0])
    with pytest.raises(InputError, match="finished store with rows"):
        reduce_store(empty, out)
    with GradientStore.open(wide.path, "a") as store:
        store.drop(np.arange(N - 5))
    with pytest.raises(InputError, match="the 5 live rows; received 6"):
        reduce_store(wide.path, out, 6)
    assert not out.exists()
    assert reduce_store(wide.path, out).k == 5  # what there is, where no number is asked for
    with pytest.raises(InputError, match="--rotate"):
        reduce_store(out, tmp_path / "t", 3)


def test_queries_of_a_wide_store(tmp_path, wide, monkeypatch):
    train = reduce_store(wide, tmp_path / "t", R, dtype="int4")
    query = make_wide(tmp_path / "q", random_rows(9, K, 1), LOSS[:9])
    found = reduce_store(query, tmp_path / "qr", like=train, dtype="float32")
    assert found.columns_digest == train.columns_digest
    assert_allclose(found.rows(), query.rows() @ train.reduction.vectors, atol=1e-6)
    whole = float(np.square(query.rows()).sum())
    assert found.attrs["measured"]["left_out"] == pytest.approx(1 - np.square(found.rows()).sum() / whole, rel=1e-3)
    fit_fisher(train)
    assert influence_scores(found, train).compute().shape == (9, N)
    coded = reduce_store(query, tmp_path / "q4", like=train, dtype="int4")
    assert_array_equal(coded.column_scale, train.column_scale)
    monkeypatch.setattr("ooc_influence.store.reduction.COPIED_BYTES", 100)
    linked = reduce_store(query, tmp_path / "ql", like=train.path, dtype="float32")
    assert not (linked.path / "basis").exists()
    assert_array_equal(linked.rows(), found.rows())
    with pytest.raises(MismatchError, match="mask"):
        reduce_store(make_wide(tmp_path / "o", ROWS[:, :20]), tmp_path / "x", like=train)
    with pytest.raises(MismatchError, match="model"):
        reduce_store(make_wide(tmp_path / "m", attributes={"model": {"fingerprint": "x"}}), tmp_path / "x", like=train)
    with pytest.raises(InputError, match="same basis"):
        reduce_store(found, tmp_path / "x", like=train)
    with pytest.raises(InputError, match="like fixes"):
        reduce_store(query, tmp_path / "x", 5, like=train)


@pytest.mark.parametrize("weights", [None, "ggn"])
def test_rotated_rows_have_a_diagonal_fisher_matrix(tmp_path, wide, weights):
    with GradientStore.open(wide.path, "a") as store:
        store.drop([7])
    old = reduce_store(wide.path, tmp_path / "old", 20, rows=40, dtype="float32")  # a basis of a few rows
    new = reduce_store(old, tmp_path / "new", rotate=True, weights=weights)
    assert new.layout.dtype == "float32"
    live = np.delete(np.arange(N), 7)
    w = row_weights(LOSS[live], weights)

    def fisher(store):
        rows = store.rows()[live].astype(np.float64) * np.sqrt(w)[:, None]
        return rows.T @ rows / len(live)

    F = fisher(new)
    assert np.abs(fisher(old) - np.diag(np.diag(fisher(old)))).max() > 1e-2 * F[0, 0]
    assert np.abs(F - np.diag(np.diag(F))).max() < 1e-6 * F[0, 0]
    assert_allclose(new.reduction.eigenvalues, np.diag(F), rtol=1e-4)
    assert_allclose(new.reduction.eigenvalues, np.linalg.eigvalsh(fisher(old))[::-1], rtol=1e-4)
    assert_allclose(new.reduction.mean_square, np.square(new.rows()[live]).mean(0), rtol=1e-4)
    assert_allclose(new.rows(), ROWS @ new.reduction.vectors, atol=1e-5)  # composed: it still maps masked rows
    masked = float((w * np.square(ROWS[live].astype(np.float64)).sum(1)).mean())
    facts = new.attrs["reduction"]
    assert facts["trace"] == pytest.approx(masked, rel=1e-5)
    assert facts["left_out"] == pytest.approx(1 - np.trace(F) / masked, rel=1e-4)
    assert facts["left_out"] == pytest.approx(new.attrs["measured"]["left_out"], rel=1e-4)
    assert facts["left_out"] > (1.2 if weights is None else 0) * old.attrs["reduction"]["left_out"]  # of 40 rows
    assert (facts["pilot_rows"], facts["span_rows"]) == (N - 1, old.attrs["reduction"]["pilot_rows"])
    assert new.attrs["compressor"]["reduce"] == {"r": 20, "pilot": 40, "weights": weights}
    assert new.dropped[7]
    assert_array_equal(new.grad_norm, old.grad_norm)
    assert new.verify() == []


def test_scores_do_not_change_by_rotation(tmp_path, wide):
    old = reduce_store(wide, tmp_path / "old", 20, rows=60, dtype="float32")
    new = reduce_store(old, tmp_path / "new", rotate=True)
    wide_query = make_wide(tmp_path / "q", random_rows(9, K, 1), LOSS[:9])
    queries = {"old": reduce_store(wide_query, tmp_path / "qo", like=old, dtype="float32")}
    queries["new"] = reduce_store(wide_query, tmp_path / "qn", like=new, dtype="float32")
    turned = reduce_store(queries["old"], tmp_path / "qt", like=new)  # the queries there are already
    assert turned.columns_digest == new.columns_digest
    assert_allclose(turned.rows(), queries["new"].rows(), atol=1e-5)
    scores = {}
    for name, store in (("old", old), ("new", new)):
        fit_fisher(store)
        scores[name] = influence_scores(queries[name], store).compute()
    assert_allclose(scores["new"], scores["old"], atol=1e-4 * np.abs(scores["old"]).max())
    curvature = fit_fisher(new)
    value = curvature.damping_value()
    diagonal = (np.square(new.rows()) / (new.reduction.eigenvalues + value)).sum(1)  # no rotation of rows needed
    assert_allclose(self_influence(new), diagonal, rtol=1e-4)
    fit_fisher(new, blocks="diagonal", refit=True)
    assert_allclose(self_influence(new), diagonal, rtol=1e-4)
    found = influence_scores(queries["new"], new).compute()
    assert_allclose(found, scores["old"], atol=1e-4 * np.abs(scores["old"]).max())


def test_rotating_to_fewer_and_once_more(tmp_path, wide):
    old = reduce_store(wide, tmp_path / "a", 20, dtype="float32")
    fewer = reduce_store(old, tmp_path / "b", 8, rotate=True, weights="ggn", dtype="float32")
    values, _ = oracle(old.rows(), row_weights(LOSS, "ggn"))
    assert fewer.shape == (N, 8)
    assert_allclose(fewer.reduction.eigenvalues, values[:8], rtol=1e-4)
    once_more = reduce_store(fewer, tmp_path / "c", rotate=True)
    assert_allclose(once_more.rows(), ROWS @ once_more.reduction.vectors, atol=1e-5)
    assert once_more.attrs["reduction"]["rotated_from"] == [old.reduction.digest, fewer.reduction.digest]
    query = make_wide(tmp_path / "q", random_rows(9, K, 1), LOSS[:9])
    oldest = reduce_store(query, tmp_path / "qa", like=old, dtype="float32")
    turned = reduce_store(oldest, tmp_path / "qc", like=once_more)
    assert_allclose(turned.rows(), query.rows() @ once_more.reduction.vectors, atol=1e-5)
    with pytest.raises(MismatchError, match="rotated from"):
        reduce_store(turned, tmp_path / "x", like=old)
    for options, what in (({"rows": 50}, "without rows"), ({"r": 21}, "between 1 and 20")):
        with pytest.raises(InputError, match=what):
            reduce_store(old, tmp_path / "x", rotate=True, **options)


def test_an_interrupted_rotation_goes_on(tmp_path, wide, monkeypatch):
    small_blocks(monkeypatch)
    old = reduce_store(wide, tmp_path / "old", 20, rows=60, dtype="float32")
    whole = reduce_store(old, tmp_path / "whole", rotate=True, storage=Storage(24, 1))
    with monkeypatch.context() as patch:
        patch.setattr(eigenbasis, "_append", Stopping(7))
        with pytest.raises(KeyboardInterrupt):
            reduce_store(old, tmp_path / "s", rotate=True, storage=Storage(24, 1))
    found = reduce_store(old, tmp_path / "s", rotate=True)
    assert_array_equal(found.rows(), whole.rows())
    with pytest.raises(MismatchError, match="source"):
        reduce_store(wide, tmp_path / "s")


def test_few_bits_cost_little_in_an_eigenbasis(tmp_path):
    """int8 ranks as float32 does, and int4 nearly, where columns are divided by what the basis says."""
    rows, queries = (random_rows(n, 300, seed) * 30 / (30 + np.arange(300)) for n, seed in ((800, 0), (20, 1)))
    train, query = (make_wide(tmp_path / f"{len(x)}", x.astype(np.float32), np.ones(len(x))) for x in (rows, queries))
    scores = {}
    for dtype in ("float32", "float16", "int8", "int4"):
        reduced = reduce_store(train, tmp_path / f"t-{dtype}", 100, dtype=dtype)
        fit_fisher(reduced)
        asked = reduce_store(query, tmp_path / f"q-{dtype}", like=reduced, dtype=dtype)
        scores[dtype] = influence_scores(asked, reduced).compute()
    found = {name: spearmanr(x.ravel(), scores["float32"].ravel()).statistic for name, x in scores.items()}
    assert found["float16"] > 0.99999
    assert found["int8"] > 0.999
    assert found["int4"] > 0.98


def test_a_damaged_basis_is_found(tmp_path, wide):
    store = reduce_store(wide, tmp_path / "s", R)
    file = store.path / "basis" / "vectors" / "c.0.0"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    (damage,) = GradientStore.open(store.path).verify()
    assert (damage.start, damage.reason.split(":")[0]) == (None, "basis")

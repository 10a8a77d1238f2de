"""The reduction: an eigenbasis from a pilot, inherited by queries; the wide store where nothing is left out."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from conftest import random_rows, roomy, whole_mask, write_store
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from test_budget import Tokens, collate, sentences, token_loss

from ooc_influence import (
    BudgetBatches,
    Dropout,
    Eigenbasis,
    Gaussian,
    GradientStore,
    Storage,
    extract_gradients,
    fit_fisher,
    influence_scores,
    init_store,
)
from ooc_influence.compress import fit_eigenbasis
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError, NonFiniteError
from ooc_influence.extract import pilot as pilot_module
from ooc_influence.linalg import WeightedRows, spectrum, top_spectrum
from ooc_influence.store import StoredReduction

N, K = 60, 80
WHOLE = Dropout(k=K, sampling="importance", reduce=Eigenbasis(r=60, pilot=N))


def extract(path, n=N, *, compressor=None, **options):
    if "like" not in options:
        options["compressor"] = compressor or Dropout(k=K, sampling="importance", reduce=Eigenbasis(r=20, pilot=N))
    options = {"dtype": "float32", "loss_kind": "cross_entropy"} | options
    return extract_gradients(make(Mlp), loss, batches(*data(Mlp, n), 8), path, **options)


@pytest.fixture
def wide(tmp_path):
    return extract(tmp_path / "wide.zarr", compressor=Dropout(k=K, sampling="importance"))


def test_rows_are_wide_rows_in_their_eigenbasis(tmp_path, wide):
    store = extract(tmp_path / "s.zarr")
    assert store.mask_digest == wide.mask_digest
    assert store.columns_digest != wide.columns_digest
    assert store.shape == (N, 20)
    rows = wide.rows().astype(np.float64)
    values, vectors = np.linalg.eigh(rows.T @ rows / N)
    values, vectors = values[::-1], vectors[:, ::-1]
    reduction = store.reduction
    assert_allclose(reduction.eigenvalues, values[:20], rtol=1e-3)  # the pilot's rows are float16
    assert_allclose(np.abs((reduction.vectors * vectors[:, :20]).sum(0))[:8], 1, atol=1e-3)
    assert_allclose(store.rows(), rows @ reduction.vectors, atol=1e-5 * np.abs(rows).max())
    assert reduction.facts["left_out"] == pytest.approx(values[20:].sum() / values.sum(), rel=1e-2)
    assert_allclose(store.grad_norm, np.linalg.norm(rows, axis=1), rtol=1e-5)
    assert store.attrs["compressor"]["reduce"]["r"] == 20
    assert not (tmp_path / "s.zarr.pilot").exists()
    assert len(store.mask.pilot) == 3


def test_nothing_is_lost_where_all_directions_are_kept(tmp_path, wide):
    """r = rank: reduced and wide scores agree at equal absolute λ."""
    whole = extract(
        tmp_path / "s.zarr", compressor=Dropout(k=K, sampling="importance", reduce=Eigenbasis(r=60, pilot=N))
    )
    scores = []
    for train, name in ((whole, "a.zarr"), (wide, "b.zarr")):
        fit_fisher(train)
        query = extract(tmp_path / name, 10, like=train)
        scores.append(influence_scores(query, train, damping=0.05, damping_mode="absolute").compute())
    assert_allclose(scores[0], scores[1], rtol=0, atol=1e-3 * np.abs(scores[1]).max())


def test_queries_inherit_mask_and_basis(tmp_path, monkeypatch):
    train = extract(tmp_path / "t.zarr")
    query = extract(tmp_path / "q.zarr", 10, like=train)
    assert query.columns_digest == train.columns_digest
    assert_array_equal(query.reduction.vectors, train.reduction.vectors)
    assert_allclose(query.rows(), train.rows(0, 10), atol=1e-6)
    monkeypatch.setattr("ooc_influence.store.reduction.COPIED_BYTES", 100)
    linked = extract(tmp_path / "l.zarr", 10, like=train)
    assert not (tmp_path / "l.zarr" / "basis").exists()
    assert_array_equal(linked.reduction.vectors, train.reduction.vectors)
    assert_allclose(linked.rows(), query.rows(), atol=1e-6)
    wide = extract(tmp_path / "w.zarr", compressor=Dropout(k=K, sampling="importance"))
    fit_fisher(train)
    with pytest.raises(MismatchError, match="basis"):
        influence_scores(wide, train)


def test_another_run_goes_on_with_the_basis(tmp_path, monkeypatch):
    """A killed run resumes with what its store holds; a killed pilot with the pilot's rows."""

    def stopping(after):
        for number, batch in enumerate(batches(*data(Mlp, N), 8)):
            if number == after:
                raise KeyboardInterrupt
            yield batch

    whole = extract(tmp_path / "a.zarr", storage=Storage(chunk_rows=8, group_chunks=1))
    compressor = Dropout(k=K, sampling="importance", reduce=Eigenbasis(r=20, pilot=N))
    calls = {"n": 0}

    def batches_once(first):
        calls["n"] += 1
        return stopping(5) if calls["n"] == 3 else batches(*data(Mlp, N), 8)[first // 8 :]

    options = {"compressor": compressor, "dtype": "float32", "loss_kind": "cross_entropy"}
    options["storage"] = Storage(chunk_rows=8, group_chunks=1)
    with pytest.raises(KeyboardInterrupt):
        extract_gradients(make(Mlp), loss, batches_once, tmp_path / "b.zarr", **options)
    assert GradientStore.open(tmp_path / "b.zarr").n == 40
    monkeypatch.setattr(pilot_module.Pilot, "moments", None)  # must not be needed again
    found = extract_gradients(make(Mlp), loss, batches_once, tmp_path / "b.zarr", **options)
    assert_array_equal(found.rows(), whole.rows())


def test_a_weighted_basis(tmp_path, wide):
    store = extract(tmp_path / "s.zarr", compressor=Dropout(k=K, sampling="importance",
                                                           reduce=Eigenbasis(10, N, "ggn")))  # fmt: skip
    rows = wide.rows().astype(np.float64) / np.sqrt(np.expm1(wide.loss.astype(np.float64)))[:, None]
    assert_allclose(store.reduction.eigenvalues, np.linalg.eigvalsh(rows.T @ rows / N)[::-1][:10], rtol=2e-3)
    assert store.reduction.facts["weights"] == "ggn"
    with pytest.raises(InputError, match="loss_kind"):
        extract(tmp_path / "t.zarr", compressor=Dropout(k=K, reduce=Eigenbasis(r=10, weights="trak")), loss_kind=None)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_columns_have_the_scale_of_the_basis(tmp_path, dtype):
    exact = extract(tmp_path / "a.zarr")
    coded = extract(tmp_path / "b.zarr", dtype=dtype)
    assert_allclose(coded.column_scale, exact.reduction.column_scale(), rtol=1e-6)
    largest = np.abs(exact.rows() / coded.column_scale).max(axis=1)
    error = np.abs(coded.rows() - exact.rows()) / (largest[:, None] * coded.column_scale)
    assert error.max() < (0.02 if dtype == "int8" else 0.2)


def only(monkeypatch, way):
    """Let one way to the spectrum fit, in blocks of 16 rows."""
    ways = spectrum.spectrum_solvers
    monkeypatch.setattr(spectrum, "spectrum_solvers", lambda *sizes: [x for x in ways(*sizes) if x.run.__name__ == way])
    monkeypatch.setattr(spectrum, "block_limit", lambda k, **least: 16)


@pytest.mark.parametrize("way", ["_by_fisher", "_by_gram", "_by_iteration"])
@pytest.mark.parametrize("weights", [None, "ggn"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_three_ways_agree_with_the_oracle(tmp_path, monkeypatch, way, weights, workers):
    rows = random_rows(150, 40)
    losses = np.linspace(0.1, 3, 150)
    store = GradientStore.create(
        tmp_path / "s.zarr", whole_mask(40), dtype="float32", attributes={"loss_kind": "cross_entropy"}
    )
    with store:
        store.append(rows, loss=losses)
        store.drop([3, 77])
    chosen = WeightedRows.of(store, [(0, 5), (6, 70), (80, 150)], weights)
    w = np.ones(150) if weights is None else 1 / np.expm1(losses)
    live = np.setdiff1d(np.r_[0:5, 6:70, 80:150], [3])
    kept = rows[live].astype(np.float64) * np.sqrt(w[live])[:, None]
    F = kept.T @ kept / len(live)
    values, vectors = np.linalg.eigh(F)
    monkeypatch.setattr(spectrum, "_EXTRA", 20)
    only(monkeypatch, way)
    found = top_spectrum(chosen, 5, workers=workers, memory=roomy(), progress=None)
    assert found.rows == len(live)
    assert_allclose(found.trace, np.trace(F), rtol=1e-5)
    assert_allclose(found.eigenvalues, values[::-1][:5], rtol=1e-3)
    overlap = np.abs(np.diag(found.vectors.T @ vectors[:, ::-1][:, :5]))
    assert_allclose(overlap, 1, atol=2e-2)
    assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-6)
    assert_allclose(np.diag(found.vectors.T @ F @ found.vectors), found.eigenvalues, rtol=1e-5)
    assert (found.vectors.max(0) == np.abs(found.vectors).max(0)).all()  # signs do not depend on rounding


@pytest.mark.parametrize("way", ["_by_gram", "_by_iteration"])
def test_rows_that_span_less_than_the_basis(tmp_path, monkeypatch, way):
    """Every row is there twice: half of the directions are empty, and orthonormal all the same."""
    rows = np.repeat(random_rows(15, 80), 2, axis=0)
    only(monkeypatch, way)
    found = top_spectrum(
        WeightedRows.of(write_store(tmp_path / "s.zarr", rows), [(0, 30)]), 25, workers=2, progress=None
    )
    values = np.linalg.eigvalsh(rows.T.astype(np.float64) @ rows / 30)[::-1]
    assert_allclose(found.eigenvalues, values[:25], atol=1e-6 * values[0])
    assert_allclose(found.vectors.T @ found.vectors, np.eye(25), atol=1e-6)


@pytest.mark.parametrize("way", ["_by_fisher", "_by_gram", "_by_iteration"])
def test_sums_that_overflow_are_said(tmp_path, monkeypatch, way):
    only(monkeypatch, way)
    store = write_store(tmp_path / "s.zarr", np.full((50, 20), 1e25, np.float32))
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match="scale the loss"):
        top_spectrum(WeightedRows.of(store, [(0, 50)]), 5, progress=None)


def test_weights_of_dropped_rows_do_not_count(tmp_path):
    """mean_square and clipped losses are of live rows: skipped samples have a loss of 0."""
    rows, losses = random_rows(100, 20), np.linspace(0.1, 3, 100)
    losses[[4, 50]] = 0
    attributes = {"loss_kind": "cross_entropy"}
    with GradientStore.create(tmp_path / "s.zarr", whole_mask(20), dtype="float32", attributes=attributes) as store:
        store.append(rows, loss=losses)
        store.drop([50])
    found = fit_eigenbasis(store, 5, weights="ggn")
    live = np.delete(np.arange(100), 50)
    assert (found.facts["pilot_rows"], found.facts["clipped_losses"]) == (99, 1)
    assert_allclose(found.mean_square, np.square(rows[live] @ found.vectors).mean(0), rtol=1e-5)
    plain = fit_eigenbasis(store, 5)
    assert_allclose(plain.mean_square, np.square(rows[live] @ plain.vectors).mean(0), rtol=1e-5)
    with GradientStore.open(store.path, "a") as again:
        again.drop(np.arange(97))
    with pytest.raises(InputError, match="the 3 live rows; received 5"):
        fit_eigenbasis(GradientStore.open(store.path), 5)


def test_a_basis_of_some_rows_only(tmp_path):
    store = write_store(tmp_path / "s.zarr", random_rows(1000, 40))
    found = fit_eigenbasis(store, 5, rows=300)
    assert found.facts["pilot_rows"] == 300
    whole = fit_eigenbasis(store, 5)
    assert_allclose(found.eigenvalues, whole.eigenvalues, rtol=0.3)
    with pytest.raises(InputError, match="between 1 and 40"):
        fit_eigenbasis(store, 41)
    with pytest.raises(MemoryBudgetError):
        fit_eigenbasis(store, 5, memory="1MiB")


def test_a_budget_for_the_basis_at_extraction(tmp_path):
    with pytest.raises(MemoryBudgetError, match="--memory"):
        extract(tmp_path / "s.zarr", memory="1MiB")
    with pytest.raises(InputError, match="a memory size such as"):
        extract(tmp_path / "t.zarr", memory="much")
    store = extract(tmp_path / "s.zarr", memory=roomy())  # goes on from the pilot's rows
    assert_array_equal(store.rows(), extract(tmp_path / "u.zarr").rows())


def test_init_makes_mask_and_basis_once(tmp_path, wide):
    compressor = Dropout(k=K, sampling="importance", reduce=Eigenbasis(r=20, pilot=N))
    whole = extract(tmp_path / "a.zarr")
    with pytest.raises(InputError, match="pilot"):
        init_store(make(Mlp), tmp_path / "s.zarr", N, compressor=compressor)
    with pytest.raises(InputError, match="pilot"):
        extract(tmp_path / "s.zarr", shard=(0, 2))
    init_store(make(Mlp), tmp_path / "s.zarr", N, compressor=compressor, per_sample_loss=loss, dtype="float32",
               pilot=batches(*data(Mlp, N), 8), loss_kind="cross_entropy")  # fmt: skip
    for part in (1, 0):
        store = extract(tmp_path / "s.zarr", shard=(part, 2))
    assert_allclose(store.rows(), whole.rows(), atol=1e-5)


def test_the_pilot_is_streamed(tmp_path):
    """Its batches are never in memory together."""
    alive, most = weakref.WeakSet(), [0]

    class Samples:
        def __iter__(self):
            for batch in batches(*data(Mlp, N), 4):
                inputs = batch[0].clone()
                alive.add(inputs)
                most[0] = max(most[0], len(alive))
                yield inputs, batch[1]

    compressor = Dropout(k=K, reduce=Eigenbasis(r=20, pilot=N))
    store = extract_gradients(make(Mlp), loss, Samples(), tmp_path / "s.zarr", compressor=compressor)
    assert (store.n, store.attrs["reduction"]["pilot_rows"]) == (N, N)
    assert most[0] <= 3


@pytest.mark.parametrize("weights", [None, "ggn"])
def test_what_is_left_out_of_all_rows_is_measured(tmp_path, wide, weights):
    """The pilot's own share is that of the rows it was chosen for; skipped samples do not count."""
    compressor = Dropout(k=K, sampling="importance", reduce=Eigenbasis(12, 16, weights))
    x, y = data(Mlp, N)
    x[7] = np.nan
    options = {"compressor": compressor, "dtype": "float32", "loss_kind": "cross_entropy", "on_nonfinite": "skip"}
    store = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr", **options)
    live = np.delete(np.arange(N), 7)
    w = np.ones(N - 1) if weights is None else 1 / np.expm1(store.loss[live].astype(np.float64))
    whole, kept = (w @ np.square(part.astype(np.float64)) for part in (
        store.grad_norm[live], np.linalg.norm(store.rows()[live], axis=1)))  # fmt: skip
    measured = store.attrs["measured"]
    assert measured["rows"] == N - 1
    assert measured["left_out"] == pytest.approx(1 - kept / whole, rel=1e-4)
    assert measured["left_out"] > store.attrs["reduction"]["left_out"]
    assert "measured" not in wide.attrs
    again = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr", **options)
    assert again.attrs == store.attrs


def test_a_pilot_without_a_finite_batch(tmp_path):
    x, y = data(Mlp, N)
    x[::8] = np.inf
    with pytest.raises(NonFiniteError, match="in every batch"):
        extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr",
                          compressor=Dropout(k=K, sampling="importance"), on_nonfinite="skip")  # fmt: skip


def test_a_pilot_has_the_rows_asked_for():
    for n, size, samples in ((60, 8, 16), (60, 8, 60), (60, 7, 1), (61, 60, 10), (60, 8, 999)):
        taken = [len(y) for _, (_, y) in pilot_module.take_evenly(batches(*data(Mlp, n), size), samples)]
        assert min(samples, n) <= sum(taken) < samples + size + 1


def test_fewer_samples_than_dims_are_said_before_the_model_runs(tmp_path):
    def failing(model, batch):
        raise AssertionError

    for source in (batches(*data(Mlp, N), 8), BudgetBatches(range(N), list, batch_size=8)):
        compressor = Dropout(k=K, sampling="importance", reduce=Eigenbasis(r=N + 1))
        with pytest.raises(InputError, match=f"at least r = {N + 1} samples .* received {N}"):
            extract_gradients(make(Mlp), failing, source, tmp_path / "s.zarr", compressor=compressor)
    assert not list(tmp_path.iterdir())


def test_a_pilot_that_does_not_fit_the_device_halves_the_budget(tmp_path):
    found = {}
    for limit in (None, 90):
        samples, model = sentences(60), Tokens(limit)
        source = BudgetBatches(samples, collate, lengths=[len(sample) for sample in samples], tokens=600)
        compressor = Dropout(k=100, reduce=Eigenbasis(r=10, pilot=40))
        found[limit] = extract_gradients(model, token_loss, source, tmp_path / f"{limit}", compressor=compressor)
    assert_allclose(found[90].reduction.eigenvalues, found[None].reduction.eigenvalues, rtol=1e-3)
    assert found[90].attrs["reduction"]["pilot_rows"] == 40


def test_one_shot_batches_cannot_be_a_pilot(tmp_path):
    compressor = Dropout(k=K, sampling="importance")
    with pytest.raises(InputError, match="read twice"):
        extract_gradients(make(Mlp), loss, iter(batches(*data(Mlp, N), 8)), tmp_path / "s.zarr", compressor=compressor)
    store = extract_gradients(make(Mlp), loss, iter(batches(*data(Mlp, N), 8)), tmp_path / "s.zarr",
                              compressor=compressor, pilot=batches(*data(Mlp, N), 8))  # fmt: skip
    assert store.n == N


def test_a_damaged_basis_is_found(tmp_path):
    store = extract(tmp_path / "s.zarr")
    assert isinstance(store.reduction, StoredReduction)
    file = next((tmp_path / "s.zarr" / "basis" / "vectors").glob("c*"))
    while file.is_dir():
        file = next(file.iterdir())
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Exception, match=r"(?i)damaged|checksum|digest"):
        GradientStore.open(tmp_path / "s.zarr").reduction  # noqa: B018


@pytest.mark.parametrize("bad", [{"r": 0}, {"r": 10, "pilot": 9}, {"weights": "other"}, {"r": 2.5}])
def test_bad_settings(bad):
    with pytest.raises(InputError):
        Eigenbasis(**bad)
    with pytest.raises(InputError, match="at most k"):
        Dropout(k=10, reduce=Eigenbasis(r=11))


def test_settings_round_trip():
    compressor = Dropout(k=99, sampling="importance", reduce=Eigenbasis(r=7, weights="trak"))
    assert Dropout.from_dict(compressor.to_dict()) == compressor
    assert Gaussian.from_dict(Gaussian(5, 6).to_dict()) == Gaussian(5, 6)

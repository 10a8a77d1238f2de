"""Batches by a budget: little padding, the caller's order, a budget that shrinks, samples that are skipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from ooc_influence import (
    BudgetBatches,
    Dropout,
    GradientStore,
    Identity,
    Storage,
    extract_gradients,
    fit_fisher,
    init_store,
    token_cross_entropy,
)
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError, NonFiniteError

N = 150


class Tokens(nn.Module):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")

    def __init__(self, limit=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.head = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 9)
        self.limit, self.calls = limit, []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        if self.limit is not None and x.numel() > self.limit:
            raise self.error
        return self.head(torch.tanh(self.up(self.embed(x))).cumsum(1))


def token_loss(model, batch):
    return token_cross_entropy(model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:])


def sentences(n=N):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 9, length) for length in generator.integers(2, 40, n)]


def collate(samples):
    longest = max(map(len, samples))
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = labels[row, : len(sample)] = torch.as_tensor(sample)
    return {"input_ids": ids, "labels": labels}


def source(tokens=200, n=N, **options):
    samples = sentences(n)
    return BudgetBatches(samples, collate, lengths=[len(sample) for sample in samples], tokens=tokens, **options)


def extract(path, batches, model=None, **options):
    options = {"compressor": Dropout(k=200), "dtype": "float32"} | options
    return extract_gradients(model or Tokens(), token_loss, batches, path, **options)


@pytest.fixture
def expected(tmp_path):
    """One sample at a time, in the caller's order."""
    return extract(tmp_path / "alone.zarr", [collate([sample]) for sample in sentences()]).rows()


@pytest.mark.parametrize("options", [{"tokens": 200}, {"tokens": 64}, {"tokens": None, "batch_size": 7},
                                     {"tokens": 300, "batch_size": 5}, {"tokens": 1}])  # fmt: skip
def test_rows_are_in_the_callers_order(tmp_path, expected, options):
    model = Tokens()
    store = extract(tmp_path / "s.zarr", source(**options), model, ids=[f"s{n}" for n in range(N)])
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert store.ids()[17] == "s17"
    longest = max(map(len, sentences()))
    for samples, tokens in model.calls:
        assert samples == 1 or samples * tokens <= (options.get("tokens") or 10**9)
        assert samples <= options.get("batch_size", N)
        assert tokens <= longest


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 2000), st.integers(1, 40))
def test_every_sample_is_in_one_batch_within_the_budget(lengths, tokens, batch_size):
    found = BudgetBatches(lengths, list, lengths=lengths, tokens=tokens, batch_size=batch_size)
    parts = found.cut(np.arange(len(lengths)))
    assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(lengths)))
    for part in parts:
        assert len(part) == 1 or found.padded(part)[1] <= tokens
        assert len(part) <= batch_size


def test_padding_is_small():
    found = source(tokens=800, n=2000)
    used, padded = np.sum([found.padded(part) for part in found.cut(np.arange(2000))], axis=0)
    assert (padded - used) / padded < 0.1


@pytest.mark.parametrize("error", [Tokens.error, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")])
def test_out_of_memory_halves_the_budget(tmp_path, expected, monkeypatch, error):
    monkeypatch.setattr(Tokens, "error", error)
    model = Tokens(limit=90)
    store = extract(tmp_path / "s.zarr", source(tokens=600), model)
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    recorded = GradientStore.open(tmp_path / "s.zarr").attrs["batching"]
    assert recorded["halved"] == 3
    assert recorded["tokens"] <= 90
    with pytest.raises(InputError, match="fit the device"):
        extract(tmp_path / "t.zarr", source(tokens=600), Tokens(limit=20))
    with pytest.raises(InputError, match="smaller batches"):
        extract(tmp_path / "u.zarr", [collate(sentences()[:10])], Tokens(limit=20))


def test_rows_that_do_not_fit_the_host_are_refused_before_they_are_made(tmp_path, expected, monkeypatch):
    monkeypatch.setattr("ooc_influence.extract.passes.BLOCK_BYTES", 0)
    monkeypatch.setattr("ooc_influence.extract.passes.available", lambda need: 7 * 200 * 14)
    with pytest.raises(MemoryBudgetError, match=r"a batch of 10 samples with 200 entries .* batches of at most 7,"):
        extract(tmp_path / "u.zarr", [collate(sentences()[:10])])
    assert extract(tmp_path / "v.zarr", [collate(sentences()[:7])]).n == 7
    store = extract(tmp_path / "s.zarr", source(tokens=600))
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert store.attrs["batching"]["halved"] > 0
    monkeypatch.setattr("ooc_influence.extract.passes.available", lambda need: 1000)
    with pytest.raises(MemoryBudgetError, match="free: use a compressor that keeps fewer"):
        extract(tmp_path / "w.zarr", [collate(sentences()[:1])], compressor=Identity())


def test_blocks_of_wide_rows_are_bounded(monkeypatch):
    found = source()
    assert next(found.blocks(800, 0)) == (0, N)
    assert next(found.blocks(2**24, 0)) == (0, 64)
    assert [next(found.blocks(size, 0)) for size in (2**27, 2**31)] == [(0, 8), (0, 1)]


def test_other_errors_of_the_model_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokens, "error", RuntimeError("shapes do not match"))
    for samples in (source(tokens=600), [collate(sentences()[:10])]):
        with pytest.raises(RuntimeError, match="shapes"):
            extract(tmp_path / "s.zarr", samples, Tokens(limit=20))


def test_a_stopped_run_goes_on_without_the_finished_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("ooc_influence.extract.data._BLOCK_ROWS", 64)
    storage = Storage(chunk_rows=10, group_chunks=2)
    whole = extract(tmp_path / "a.zarr", source(), storage=storage)

    class Stopping(Tokens):
        def forward(self, x):
            if len(self.calls) == 12:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "b.zarr", source(), Stopping(), storage=storage)
    done = GradientStore.open(tmp_path / "b.zarr").n
    assert done == 64
    model = Tokens()
    found = extract(tmp_path / "b.zarr", source(), model, storage=storage)
    assert_array_equal(found.rows(), whole.rows())
    assert sum(samples for samples, _ in model.calls[2:]) < N - 30  # one look at the data, one to learn sizes
    with pytest.raises(MismatchError, match="losses"):
        extract(tmp_path / "b.zarr", shifted(), storage=storage)


def shifted():
    samples = sentences()[::-1]
    return BudgetBatches([*samples, samples[0]], collate, lengths=[len(s) for s in [*samples, samples[0]]], tokens=200)


def test_shards_and_appended_rows(tmp_path, expected):
    init_store(Tokens(), tmp_path / "s.zarr", N, compressor=Dropout(k=200), dtype="float32",
               storage=Storage(chunk_rows=10, group_chunks=2))  # fmt: skip
    for part in (2, 0, 1):
        store = extract(tmp_path / "s.zarr", source(), shard=(part, 3), storage=Storage(chunk_rows=10, group_chunks=2))
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_budget_can_be_its_own_pilot(tmp_path):
    store = extract(tmp_path / "s.zarr", source(), compressor=Dropout(k=100, sampling="importance"))
    assert store.n == N
    assert len(store.mask.pilot) == 3


@pytest.mark.parametrize("bad", [{"tokens": None}, {"tokens": 0}, {"tokens": 10, "batch_size": -1}, {"lengths": [1]}])
def test_bad_budgets(bad):
    with pytest.raises(InputError):
        BudgetBatches(sentences(5), collate, **{"lengths": [1] * 5} | bad)


@pytest.mark.parametrize("form", ["batches", "budget"])
def test_samples_that_are_not_finite_are_dropped(tmp_path, form):
    x, y = data(Mlp, 40)
    x = x.clone()
    x[[3, 17, 39]] = torch.tensor([[float("nan")], [float("inf")], [float("nan")]])

    def run(path, mode):
        samples = list(zip(x, y, strict=True))
        given = batches(x, y, 8) if form == "batches" else BudgetBatches(samples, join, batch_size=8)
        return extract_gradients(make(Mlp), loss, given, path, compressor=Dropout(k=100), on_nonfinite=mode)

    with pytest.raises(NonFiniteError, match=r"rows 3\b"):
        run(tmp_path / "r.zarr", "raise")
    store = run(tmp_path / "s.zarr", "skip")
    assert store.n == 40
    assert np.flatnonzero(store.dropped).tolist() == [3, 17, 39]
    assert fit_fisher(store).rows == 37
    assert not store.verify()
    with pytest.raises(InputError, match="on_nonfinite"):
        run(tmp_path / "t.zarr", "other")


def test_rows_that_were_not_finite_are_dropped_by_the_next_run(tmp_path, monkeypatch):
    """By a version that marked them at the end, killed between their commit and their marks."""
    x, y = data(Mlp, 40)
    x = x.clone()
    x[5] = float("nan")
    options = {"compressor": Dropout(k=100), "on_nonfinite": "skip"}
    with monkeypatch.context() as patch:
        patch.setattr("ooc_influence.extract.sink.Sink._drop_skipped", lambda self: None)
        patch.setattr("ooc_influence.store.commits.mark_dropped", lambda *given: None)
        store = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr", **options)
    assert not store.has_dropped
    store = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s.zarr", **options)
    assert np.flatnonzero(store.dropped).tolist() == [5]


def join(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

"""Choosing among a batch's samples in training: scores are of the rows stored, weights are those asked for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Mlp, data, loss
from numpy.testing import assert_allclose, assert_array_equal
from oracle import damping, fisher
from test_collect import B, expected_rows, training
from torch import nn

import ooc_influence as ooc
from ooc_influence import Dropout, Eigenbasis, GradientStore
from ooc_influence.errors import InputError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:gradients cover")
QUERIES = 5


def query_store(path, model, **options):
    x, y = data(Mlp, QUERIES, seed=3)
    options = {"dtype": "float32"} | options
    return ooc.extract_gradients(copy.deepcopy(model).eval(), loss, [(x, y)], path, **options)


def train(model, optimizer, batches, collector=None, weights=None, scale=1.0):
    """Train with the weights that the collector chooses, or that are given; return the models before each step."""
    seen = []
    torch.manual_seed(7)
    for number, (ids, x, y) in enumerate(batches):
        seen.append((copy.deepcopy(model), torch.get_rng_state()))
        optimizer.zero_grad()
        if collector is None:
            losses = F.cross_entropy(model(x), y, reduction="none")
            (weights[number] * losses).mean().backward()
        else:
            with collector.step(ids, scale=scale) as step:
                losses = F.cross_entropy(model(x), y, reduction="none")
                (scale * (step.select(losses) * losses).mean()).backward()
            for parameter in model.parameters():
                parameter.grad /= scale
        optimizer.step()
    return seen


def exponential(scores):
    return np.exp(np.clip(scores.mean(axis=0), -2, 2))


@pytest.mark.parametrize("weigh", [exponential, lambda scores: scores.mean(axis=0) > 0, lambda s: np.zeros(s.shape[1])])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_training_is_that_with_the_weights(tmp_path, weigh, scale):
    model, optimizer, batches = training(Mlp)
    queries = query_store(tmp_path / "q", model, compressor=Dropout(k=70))
    selection = ooc.online_selection(queries, weigh)
    with ooc.collect(model, tmp_path / "s", select=selection, dtype="float32") as collector:
        seen = train(model, optimizer, batches, collector, scale=scale)
    store = GradientStore.open(tmp_path / "s")
    assert store.mask_digest == queries.mask_digest
    assert_allclose(store.rows(), expected_rows(store.mask, seen, batches), rtol=1e-4, atol=1e-6)
    scores = queries.rows() @ store.rows().T
    assert_allclose(store.column("score"), scores.mean(axis=0), rtol=1e-4, atol=1e-5)
    weights = torch.tensor(store.column("chosen"), dtype=torch.float32)
    assert_allclose(weights, np.concatenate([weigh(scores[:, i : i + B]) for i in range(0, store.n, B)]), rtol=1e-4)
    assert store.attrs["verification"]["checked"] is True
    plain, optimizer, batches = training(Mlp)
    train(plain, optimizer, batches, weights=weights.split(B))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_allclose(mine.detach(), theirs.detach(), rtol=0, atol=0 if scale == 1 else 1e-6)


@pytest.mark.parametrize("compressor", [Dropout(k=60), Dropout(k=90, reduce=Eigenbasis(20, pilot=24))])
def test_scores_have_the_train_stores_curvature(tmp_path, compressor):
    model, optimizer, batches = training(Mlp)
    x, y = data(Mlp, 24)
    reference = copy.deepcopy(model).eval()
    ooc.extract_gradients(reference, loss, [(x, y)], tmp_path / "t", dtype="float32", compressor=compressor)
    ooc.fit_fisher(tmp_path / "t")
    queries = query_store(tmp_path / "q", model, like=tmp_path / "t")
    selection = ooc.online_selection(queries, train=tmp_path / "t", damping=0.2)
    with ooc.collect(model, tmp_path / "s", select=selection, dtype="float32") as collector:
        train(model, optimizer, batches, collector)
    rows, whole = GradientStore.open(tmp_path / "t").rows(), GradientStore.open(tmp_path / "s")
    matrix = fisher(rows)
    damped = matrix + damping(matrix, 0.2, len(rows)) * np.eye(len(matrix))
    expected = (queries.rows().astype(np.float64) @ np.linalg.solve(damped, whole.rows().T.astype(np.float64))).mean(0)
    assert_allclose(whole.column("score"), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_wrong_labels_are_left_out(tmp_path):
    """Queries with right labels tell samples with wrong ones."""
    model, optimizer, batches = training(Mlp)
    model.eval()  # no dropout
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, batches[0][1].shape[1], generator=generator)
    right = (inputs @ torch.randn(inputs.shape[1], 2, generator=generator)).argmax(1)
    for part in (slice(0, 100), slice(100, 200)) * 30:  # a start, on right labels
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[part]), right[part]).backward()
        optimizer.step()
    reference = copy.deepcopy(model).eval()
    known = [(inputs[:100], right[:100])]
    queries = ooc.extract_gradients(reference, loss, known, tmp_path / "q", compressor=Dropout(k=300))
    labels = right.clone()
    labels[200:250] = 1 - labels[200:250]
    with ooc.collect(model, tmp_path / "s", select=ooc.online_selection(queries)) as collector:
        for ids in torch.arange(200, 400).split(50):
            optimizer.zero_grad()
            with collector.step(ids) as step:
                losses = F.cross_entropy(model(inputs[ids]), labels[ids], reduction="none")
                (step.select(losses) * losses).mean().backward()
            optimizer.step()
    store = GradientStore.open(tmp_path / "s")
    weights, wrong = store.column("chosen"), store.column("example") < 250
    assert weights[wrong].mean() < 0.5
    assert weights[~wrong].mean() > 0.75


def test_steps_that_are_not_collected_or_not_trained(tmp_path):
    model, optimizer, batches = training(Mlp)
    selection = ooc.online_selection(query_store(tmp_path / "q", model, compressor=Dropout(k=40)), exponential)
    with ooc.collect(model, tmp_path / "s", select=selection, every=2) as collector:
        for number, (ids, x, y) in enumerate(batches[:4]):
            optimizer.zero_grad()
            with collector.step(ids) as step:
                losses = F.cross_entropy(model(x), y, reduction="none")
                weights = step.select(losses)
                assert bool((weights == 1).all()) == bool(number % 2)
                if number:  # all were left out of the first
                    (weights * losses).mean().backward()
            optimizer.step()
    store = GradientStore.open(tmp_path / "s")
    assert_array_equal(store.column("step"), np.repeat([0, 2], B))
    assert store.attrs["verification"]["checked"] is True  # by the first step that trains


def test_queries_are_refreshed(tmp_path):
    """Scores are of the queries at hand; those of another mask are refused."""
    model, optimizer, batches = training(Mlp)
    first = query_store(tmp_path / "q", model, compressor=Dropout(k=40))
    selection = ooc.online_selection(first, exponential)
    with ooc.collect(model, tmp_path / "s", select=selection, dtype="float32") as collector:
        train(model, optimizer, batches[:4], collector)
        second = query_store(tmp_path / "r", model, compressor=Dropout(k=40))
        selection.refresh(second)
        train(model, optimizer, batches[4:], collector)
    rows, column = GradientStore.open(tmp_path / "s").rows(), GradientStore.open(tmp_path / "s").column("score")
    for queries, part in ((first, slice(0, 4 * B)), (second, slice(4 * B, None))):
        assert_allclose(column[part], (queries.rows() @ rows[part].T).mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(MismatchError, match="same compressor"):
        selection.refresh(query_store(tmp_path / "u", model, compressor=Dropout(k=40, seed=1)))


def test_checkpointed_layers(tmp_path):
    """A layer that is computed again in each backward pass has its rows once."""

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    stores = []
    for number, wrap in enumerate([lambda model: model, Checkpointed]):
        model, optimizer, batches = training(Mlp)
        model = nn.Sequential(wrap(model))
        x, y = data(Mlp, QUERIES, seed=3)
        queries = ooc.extract_gradients(
            copy.deepcopy(model).eval(), loss, [(x, y)], tmp_path / f"q{number}", compressor=Dropout(k=50)
        )
        with ooc.collect(
            model, tmp_path / f"s{number}", select=ooc.online_selection(queries), dtype="float32"
        ) as collector:
            train(model, optimizer, batches, collector)
        stores.append(GradientStore.open(tmp_path / f"s{number}"))
    assert_allclose(stores[1].rows(), stores[0].rows(), rtol=1e-5, atol=1e-7)


def test_refusals(tmp_path):
    model, _, batches = training(Mlp)
    ids, x, y = batches[0]
    queries = query_store(tmp_path / "q", model, compressor=Dropout(k=40))
    with pytest.raises(InputError, match="expected train="):
        ooc.online_selection(queries, damping=0.1)
    with pytest.raises(InputError, match="either like= or compressor="):
        ooc.collect(model, tmp_path / "a", select=ooc.online_selection(queries), compressor=Dropout(k=9))
    losses = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    with (
        ooc.collect(model, tmp_path / "b", select=ooc.online_selection(queries)) as collector,
        pytest.raises(InputError, match=r"expected Step.select in every step"),
        collector.step(ids),
    ):
        losses().mean().backward()
    with (
        ooc.collect(model, tmp_path / "c", compressor=Dropout(k=40)) as collector,
        pytest.raises(InputError, match="expected select="),
        collector.step(ids) as step,
    ):
        step.select(losses())
    bad = ooc.online_selection(queries, lambda scores: scores.mean(0) - 100)
    with (
        ooc.collect(model, tmp_path / "d", select=bad) as collector,
        pytest.raises(InputError, match="a weight of at least 0"),
        collector.step(ids) as step,
    ):
        step.select(losses())


def test_row_weights_need_losses(tmp_path):
    """Rows of steps without recorded losses are not weighted as if these were zero."""
    model, _, batches = training(Mlp)

    def collect(name, recorded):
        with ooc.collect(model, tmp_path / name, compressor=Dropout(k=40), loss_kind="cross_entropy") as collector:
            for (ids, x, y), there in zip(batches, recorded, strict=False):
                with collector.step(ids) as step:
                    losses = F.cross_entropy(model(x), y, reduction="none")
                    if there:
                        step.record(losses)
                    losses.mean().backward()

    collect("none", [False, False])
    with pytest.raises(InputError, match="expected rows with their losses"):
        ooc.fit_fisher(tmp_path / "none", weights="ggn")
    collect("all", [True, True])
    ooc.fit_fisher(tmp_path / "all", weights="ggn")
    with pytest.raises(InputError, match="expected losses of this step"):
        collect("all", [False])
    with pytest.raises(InputError, match="expected no losses of this step"):
        collect("none", [True])


def test_effects_of_chosen_samples(tmp_path):
    """With the optimiser recorded, a row's weight in the training is the loop's times the chosen one."""
    model, optimizer, batches = training(Mlp)
    queries = query_store(tmp_path / "q", model, compressor=Dropout(k=70))
    selection = ooc.online_selection(queries)
    with ooc.collect(model, tmp_path / "s", select=selection, optimizer=optimizer) as collector:
        train(model, optimizer, batches, collector)
    store = GradientStore.open(tmp_path / "s")
    chosen = store.column("chosen")
    assert_allclose(store.column("weight"), chosen / B, rtol=1e-6)
    effects = np.abs(ooc.fit_trajectory(store).rows()).sum(axis=1)
    assert 0 < (chosen == 0).sum() < store.n
    assert_array_equal(effects > 0, chosen > 0)

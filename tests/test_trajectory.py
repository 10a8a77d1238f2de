"""Effects of a training's rows on its final weights: the derivative of the training itself, step by step."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

import ooc_influence as ooc
from ooc_influence import GradientStore, Identity

N, B, STEPS = 12, 4, 9
pytestmark = pytest.mark.filterwarnings("ignore:gradients cover")

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}),
    "adam": (torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": 0.3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
}


def make_linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()


def make_optimizer(name, model):
    """Different settings for weights and for biases."""
    kind, settings = OPTIMIZERS[name]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.03, "weight_decay": 0.05},
    ]
    return kind(groups, **settings)


def linear_losses(model, batch):
    """Losses whose gradients are constant: each layer's outputs at inputs of its own, times given factors."""
    x, first, h, last = batch
    return (model[0](x) * first).sum(1) + (model[1](h) * last).sum(1)


def parabola(model):
    """What makes the Hessian 0.6 at every weight of the first layer."""
    return 0.3 * sum((p**2).sum() for p in model[0].parameters())


def linear_data(n=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (5, 4, 4, 3)]


def parts(data, rows):
    return [each[rows] for each in data]


def batches():
    return torch.randperm(N, generator=torch.Generator().manual_seed(2)).repeat(3).split(B)[:STEPS]


def train(name, bend=False, collector=None, change=(None, None, 0.0), model=None):
    """Train, with the weight of a sample in one step changed; return the model."""
    model = make_linear() if model is None else model
    optimizer = make_optimizer(name, model) if collector is None else collector._options["optimizer"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))
    for step, rows in enumerate(batches()):
        optimizer.zero_grad()
        weights = torch.full((B,), 1 / B, dtype=torch.float64)
        if step == change[0]:
            weights[change[1]] *= 1 + change[2]
        with contextlib.nullcontext() if collector is None else collector.step(rows):
            loss = (linear_losses(model, parts(linear_data(), rows)) * weights).sum()
            (loss + bend * parabola(model)).backward()
        optimizer.step()
        schedule.step()
    return model


def collected(path, name, bend=False, **options):
    model = make_linear()
    optimizer = make_optimizer(name, model)
    options = {"compressor": Identity(), "dtype": "float32", "check_gradients": not bend} | options
    with ooc.collect(model, path, optimizer=optimizer, **options) as collector:
        train(name, bend, collector, model=model)
    return model


def queries(model, store, path):
    batch = linear_data(3, seed=5)
    ooc.extract_gradients(model, linear_losses, [batch], path, like=store, dtype="float32")
    return batch


def finite_differences(name, batch, bend=False, size=1e-4):
    """By how much the queries' losses fall for each sample of each step, (q, n)."""
    columns = []
    for step, sample in itertools.product(range(STEPS), range(B)):
        up, down = (
            linear_losses(train(name, bend, change=(step, sample, sign * size)), batch).detach() for sign in (1, -1)
        )
        columns.append((down - up) / (2 * size))
    return torch.stack(columns, 1).numpy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_the_derivative_of_the_training(tmp_path, name):
    """Exactly, where losses are linear in the weights: with momentum, decay, groups and a schedule."""
    model = collected(tmp_path / "s", name)
    plain = train(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    batch = queries(model, tmp_path / "s", tmp_path / "q")
    effects = ooc.fit_trajectory(tmp_path / "s", dtype="float32")
    assert effects.n == STEPS * B
    scores = ooc.influence_scores(tmp_path / "q", tmp_path / "s", curvature="trajectory").compute()
    expected = finite_differences(name, batch)
    assert_allclose(scores, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_gradients_that_follow_the_weights(tmp_path, name, monkeypatch):
    """With the Hessian that the losses have, scores are the derivative again; without, they are not."""
    from ooc_influence.curvature import trajectory

    model = collected(tmp_path / "s", name, bend=True)
    batch = queries(model, tmp_path / "s", tmp_path / "q")
    store = GradientStore.open(tmp_path / "s")
    hessian = np.concatenate([np.full(len(m.rows), 0.6 * (m.layer.name == "0")) for m in store.mask.modules])
    expected = finite_differences(name, batch, bend=True)
    monkeypatch.setattr(trajectory, "_curvature_between", lambda _, between: None if between is None else hessian)
    errors = []
    for between in (None, "diagonal"):
        ooc.fit_trajectory(store, dtype="float32", between=between)
        scores = ooc.influence_scores(tmp_path / "q", store, curvature="trajectory").compute()
        errors.append(np.abs(scores - expected).max() / np.abs(expected).max())
    assert errors[1] < 2e-3 < 0.03 < errors[0]

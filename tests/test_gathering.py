"""The sums that the experiment on trainings is made of are those of single rows' gradients, weighted as stated."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "experiments"))

from dense import Scored
from gathering import Along, Basis, Layers, each_row, factors, summed, with_squares

N, BATCH, EPOCHS = 12, 4, 3


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def problem(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))
    return model, (torch.randn(N, 5), torch.randint(0, 3, (N,))), Layers.of(model, ["0", "2"])


def by_autograd(model, rows):
    """Gradients of single samples, (n, p), a layer's bias behind its weight's columns."""
    found = []
    for x, y in zip(*rows, strict=True):
        model.zero_grad()
        loss(model, (x[None], y[None])).sum().backward()
        parts = []
        for layer in (model[0], model[2]):
            bias = [] if layer.bias is None else [layer.bias.grad[:, None]]
            parts.append(torch.cat([layer.weight.grad, *bias], 1).flatten())
        found.append(torch.cat(parts))
    return torch.stack(found).double()


def credit():
    return torch.randint(0, 2, (6, N), generator=torch.Generator().manual_seed(3)).float() - 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_sums_at_a_snapshot(bias):
    model, rows, layers = problem(bias)
    batches = list(zip(*(part.split(5) for part in rows), strict=True))
    expected = by_autograd(model, rows)
    assert_allclose(summed(model, loss, batches, layers, credit()), credit().double() @ expected, atol=1e-6)
    parts = each_row(model, loss, batches, layers)
    assert_allclose(torch.cat([part.flatten(1) for part in parts], 1), expected, atol=1e-6)


def test_scores_in_a_basis_are_those_of_the_whole_matrix():
    model, rows, layers = problem(bias=True)
    batches = list(zip(*(part.split(5) for part in rows), strict=True))
    basis = Basis.of(factors(model, loss, batches, layers))
    found = with_squares([basis], model, loss, batches, layers)[0]
    gradients = layers.split(by_autograd(model, rows))
    plain = each_row(model, loss, batches, layers)
    expected = 0
    for part, u, v, values in zip(gradients, basis.left, basis.right, found, strict=True):
        turned = part.flatten(1) @ torch.kron(u, v).double()
        assert_allclose(values.flatten(), turned.square().mean(0), rtol=1e-3, atol=1e-9)
        expected = expected + Scored.of(turned, turned, 1 / (values + 0.1 * values.mean()).flatten().double()).scores
    scores = Basis(basis.left, basis.right, found).scores(plain, plain, [0.1])[0]
    assert_allclose(scores, expected.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["adam", "sgd"])
def test_sums_along_a_training(which, tmp_path):
    model, rows, layers = problem(bias=which == "sgd")
    schedule = torch.linspace(0.05, 0.01, EPOCHS * N // BATCH).tolist()
    if which == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5, eps=1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.8)
    along, steps = Along(layers, credit(), (0, 2), tmp_path), []
    for t, chosen in enumerate(torch.randperm(N).repeat(EPOCHS).split(BATCH)):
        optimizer.param_groups[0]["lr"] = schedule[t]
        own = by_autograd(copy.deepcopy(model), tuple(part[chosen] for part in rows))
        with along(model, optimizer, chosen, t * BATCH // N):
            optimizer.zero_grad()
            loss(model, tuple(part[chosen] for part in rows)).mean().backward()
            optimizer.step()
        roots = None
        if which == "adam":
            roots = torch.cat([(optimizer.state[layer.weight]["exp_avg_sq"] / (1 - 0.999 ** (t + 1))).sqrt().flatten()
                               for layer in (model[0], model[2])]).double() + 1e-3  # fmt: skip
        steps.append((credit()[:, chosen].double() @ own, schedule[t], roots))

    def held(name):
        return np.load(tmp_path / f"{name}.npy")

    split = N // BATCH
    for number, part in enumerate((steps[:split], steps[split:])):
        assert_allclose(held(f"plain {number}"), sum(own for own, _, _ in part), rtol=1e-4, atol=1e-6)
        assert_allclose(held(f"lr {number}"), sum(lr * own for own, lr, _ in part), rtol=1e-4, atol=1e-7)
    for name, count in (("first", split), ("all", len(steps))):
        if which == "adam":
            expected = sum(lr * own / roots for own, lr, roots in steps[:count])
            assert_allclose(held(f"adam {name}"), expected, rtol=1e-4, atol=1e-6)
        assert_allclose(held(f"carried {name}"), carried(steps, count), rtol=1e-4, atol=1e-6)
    assert len(along.weights) == 2
    assert torch.equal(along.weights[1]["0.weight"], model[0].weight)


def carried(steps, count):
    """Σ_t A_t b_t from the formulas of the coefficients, which go backwards in time."""
    decays, later = 1.0, 0.0
    found = torch.zeros_like(steps[0][0])
    for t in reversed(range(len(steps))):
        own, lr, roots = steps[t]
        if roots is None:
            later = lr + 0.8 * later
            weight = later
        else:
            later = lr * decays / ((1 - 0.9 ** (t + 1)) * roots) + 0.9 * later
            weight, decays = 0.1 * later, decays * (1 - lr * 0.5)
        if t < count:
            found += weight * own
    return found


def test_a_perturbed_training_ends_where_carried_sums_say(tmp_path):
    """With gradients that do not depend on the weights, SGD with momentum is linear: the effect is exact."""
    layers = Layers(("0",), ((1, 5),))
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(N)

    def train(weights, along=None):
        model = nn.Sequential(nn.Linear(5, 1, bias=False))
        nn.init.zeros_(model[0].weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(2):
            for chosen in torch.arange(N).split(BATCH):
                optimizer.zero_grad()
                if along is None:
                    ((model(x[chosen])[:, 0] * weights[chosen]).sum() / BATCH).backward()
                    optimizer.step()
                else:
                    with along(model, optimizer, chosen, epoch):
                        ((model(x[chosen])[:, 0] * weights[chosen]).sum() / BATCH).backward()
                        optimizer.step()
        return model[0].weight.detach()

    before = train(weights, Along(layers, torch.eye(N), (0, 1), tmp_path))
    effect = np.load(tmp_path / "carried all.npy")
    for row in (0, 5, N - 1):
        changed = weights.clone()
        changed[row] = 0
        assert_allclose((train(changed) - before)[0], effect[row] / BATCH, rtol=1e-4, atol=1e-6)

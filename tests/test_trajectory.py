"""Effects of a training's rows on its final weights: the derivative of the training itself, step by step."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from torch import nn

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore, Identity
from ooc_influence.curvature.segments import Segments, fit_segments
from ooc_influence.errors import InputError, MismatchError, OocInfluenceError, StaleCurvatureError, StoreDamagedError
from ooc_influence.report.facts import curvature_states
from ooc_influence.store import StepLog

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
    segments = Segments(np.zeros(1, np.int64), hessian[None])
    monkeypatch.setattr(trajectory, "fit_segments", lambda _, __, between, ___: between and segments)
    errors = []
    for between in (None, "diagonal"):
        ooc.fit_trajectory(store, dtype="float32", between=between)
        scores = ooc.influence_scores(tmp_path / "q", store, curvature="trajectory").compute()
        errors.append(np.abs(scores - expected).max() / np.abs(expected).max())
    assert errors[1] < 2e-3 < 0.03 < errors[0]


def make_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def network_losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network_data(n, seed=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    noise = 0.5 * torch.randn(n, generator=generator)
    return x, (x[:, 0] + x[:, 1] * x[:, 2] + noise > 0).long() + 2 * (x[:, 3] > 0).long()


def train_network(model, optimizer, steps=40, collector=None, change=None, first=0):
    x, y = network_data(64)
    order = torch.Generator().manual_seed(9)
    for step in range(steps):
        rows = torch.randperm(64, generator=order)[:8]
        if step < first:
            continue
        weights = torch.full((8,), 1 / 8, dtype=x.dtype)
        if change is not None and step == change[0]:
            weights[change[1]] *= 1 + change[2]
        optimizer.zero_grad()
        with contextlib.nullcontext() if collector is None else collector.step(rows):
            x = x.to(next(model.parameters()).dtype)
            (network_losses(model, (x[rows], y[rows])) * weights).sum().backward()
        optimizer.step()
    return model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)


@pytest.fixture(scope="module")
def differences():
    """By how much the queries' losses fall for each sample of three late steps, (3, 8, q)."""
    x, y = network_data(6, seed=8)
    early = make_network().double()
    optimizer = adamw(early)
    train_network(early, optimizer, 36)

    def losses_after(step, sample, size):
        model = copy.deepcopy(early)
        after = adamw(model)
        after.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # whose tensors it would share
        train_network(model, after, first=36, change=(step, sample, size))
        return network_losses(model, (x.double(), y)).detach().numpy()

    return np.array([
        [(losses_after(step, sample, -1e-4) - losses_after(step, sample, 1e-4)) / 2e-4 for sample in range(8)]
        for step in (39, 38, 36)
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["all", "some"])
def test_a_real_training(tmp_path, kind, differences):
    """Of a network, scores of the last steps predict how a query's loss changes with a sample's weight in a step."""
    compressor = Identity() if kind == "all" else Dropout(k=100)
    model = make_network()
    optimizer = adamw(model)
    with ooc.collect(model, tmp_path / "s", compressor=compressor, dtype="float32", optimizer=optimizer) as collector:
        train_network(model, optimizer, collector=collector)
    batch = network_data(6, seed=8)
    ooc.extract_gradients(model, network_losses, [batch], tmp_path / "q", like=tmp_path / "s", dtype="float32")
    ooc.fit_trajectory(tmp_path / "s")
    scores = ooc.influence_scores(tmp_path / "q", tmp_path / "s", curvature="trajectory").compute()
    found = np.array([scores[:, step * 8 : step * 8 + 8].T for step in (39, 38, 36)])
    by_step = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(found, differences, strict=True)]
    if kind == "all":
        assert by_step[0] > 0.9999
        assert min(by_step) > 0.99
        assert_allclose(found[0], differences[0], atol=2e-3 * np.abs(differences).max())
    else:
        assert min(by_step) > 0.7


def test_clipping_accumulation_and_the_scale_of_the_loss(tmp_path):
    """The optimiser's gradient is the rows' sum, times weights, times the factor that is recorded."""
    torch.manual_seed(0)
    model, (x, y) = make_network(), network_data(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with ooc.collect(
        model, tmp_path / "s", compressor=Identity(), dtype="float32", optimizer=optimizer
    ) as collector:  # fmt: skip
        for step in range(3):
            optimizer.zero_grad()
            for part in (slice(0, 8), slice(8, 16)):
                with collector.step(range(16)[part], step=step, scale=128.0):
                    (128 * network_losses(model, (x[part], y[part])).mean()).backward()
            for p in model.parameters():
                p.grad /= 256  # what an unscaled mean over two batches takes
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.3))
            expected.append(min(1.0, 0.3 / norm) / 256)
            optimizer.step()
            seen = torch.cat([p.grad.reshape(len(p), -1) for p in (model[0].weight, model[0].bias)], 1)
    log = StepLog(tmp_path / "s")
    assert min(expected) * 256 < 0.9
    assert_allclose([log.record(number).factor for number in range(3)], expected, rtol=1e-4)
    store = GradientStore.open(tmp_path / "s")
    assert_allclose(store.column("weight"), 16.0)
    last = store.column("step") == 2
    total = (store.rows()[last] * store.column("weight")[last, None] * expected[-1]).sum(0)
    kept = store.mask.modules[0]
    assert_allclose(total[: len(kept.rows)], seen.numpy()[kept.rows, kept.cols] * kept.weight, rtol=1e-3, atol=1e-6)
    effects = ooc.fit_trajectory(store, dtype="float32").rows()
    assert_allclose(effects[last], store.rows()[last] * 0.1 * 16 * expected[-1], rtol=1e-3, atol=1e-9)


def test_gradients_that_are_no_multiple(tmp_path):
    model = make_network()
    optimizer = adamw(model)
    x, y = network_data(8)
    with ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=optimizer) as collector:
        with collector.step(range(8)):
            network_losses(model, (x, y)).mean().backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        with pytest.raises(InputError, match="multiple"):
            optimizer.step()


def test_a_step_without_the_collectors(tmp_path):
    model = make_network()
    optimizer = adamw(model)
    x, y = network_data(8)
    with ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=optimizer) as collector:
        with pytest.raises(InputError, match="before any"):
            optimizer.step()
        with collector.step(range(8)):
            network_losses(model, (x, y)).mean().backward()
            with pytest.raises(InputError, match="inside"):
                optimizer.step()
        with pytest.raises(InputError, match="closure"):
            optimizer.step(lambda: 0.0)
        optimizer.step()
        with pytest.raises(InputError, match="received step 0 again"):
            optimizer.step()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()  # the hooks are gone
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (torch.optim.RMSprop, {}, "received RMSprop"),
        (torch.optim.Adagrad, {}, "received Adagrad"),
        (torch.optim.Adam, {"amsgrad": True}, "without amsgrad"),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, "without maximize"),
    ],
)
def test_optimizers_that_are_refused(tmp_path, kind, settings, message):
    model = make_network()
    with pytest.raises(InputError, match=message):
        ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=kind(model.parameters(), **settings))


def test_other_wrong_optimizers(tmp_path):
    model = make_network()
    with pytest.raises(InputError, match="Trainer"):
        ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=True)
    with pytest.raises(MismatchError, match="none of their parameters"):
        ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=adamw(make_network()))
    with pytest.raises(InputError, match="optimizer_every >= 1"):
        ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=adamw(model), optimizer_every=0)
    with pytest.raises(InputError, match="optimizer_metric='layer'"):
        ooc.collect(model, tmp_path / "s", compressor=ooc.Gaussian(20), optimizer=adamw(model))
    with pytest.raises(InputError, match="beside example, step, weight"):
        ooc.collect(
            model, tmp_path / "s", compressor=Identity(), optimizer=adamw(model), columns=["weight"]
        ).__enter__()  # fmt: skip


def test_rows_of_a_basis_and_of_projections(tmp_path):
    """SGD moves every direction alike: rows times one number a step, whatever they are; else it is refused."""
    data = network_data(64)
    for name, compressor in (
        ("basis", Dropout(k=60, basis="kronecker")), ("projected", ooc.Gaussian(20)),
    ):  # fmt: skip
        model = make_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)
        with ooc.collect(
            model, tmp_path / name, network_losses, compressor=compressor, dtype="float32", optimizer=optimizer,
            pilot=[data],
        ) as collector:  # fmt: skip
            train_network(model, optimizer, 3, collector)
        rows = GradientStore.open(tmp_path / name).rows()
        effects = ooc.fit_trajectory(tmp_path / name, dtype="float32").rows()
        decay = 1 - 0.05 * 0.1
        # of θ: the last step moves by lr, the one before by lr·0.5 more, and shrinks what was there
        after = [0.05 * (1 + 0.5), 0.05]
        assert_allclose(effects[16:], rows[16:] * 0.05 / 8, rtol=1e-5)
        assert_allclose(effects[8:16], rows[8:16] * (after[0] - 0.05 * (1 - decay)) / 8, rtol=1e-4)
        if name == "basis":
            ooc.fit_trajectory(tmp_path / name, between="kronecker", refit=True)
            damped = ooc.fit_trajectory(tmp_path / name, between="kronecker", dtype="float32").rows()
            assert (np.abs(damped[:8]) <= np.abs(effects[:8]) + 1e-9).all()
            assert np.abs(damped[:8]).sum() < 0.99 * np.abs(effects[:8]).sum()
        else:
            with pytest.raises(InputError, match="not reduced"):
                ooc.fit_trajectory(tmp_path / name, between="diagonal")
            with pytest.raises(InputError, match="not reduced"):
                ooc.fit_trajectory(tmp_path / name, between="kronecker")
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    with (
        ooc.collect(model, tmp_path / "two", compressor=ooc.Gaussian(20), optimizer=optimizer) as collector,
        pytest.raises(InputError, match="one learning rate"),
    ):
        train_network(model, optimizer, 1, collector)


def test_adam_at_one_rate_for_a_layer(tmp_path):
    """In a basis: SGD with momentum β₁, at the rate that fits the layer's second moments best."""
    data = network_data(64)
    model = make_network()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": d} for n, d in ((2, 0.1), (1, 0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, eps=1e-4)
    with ooc.collect(
        model, tmp_path / "s", network_losses, compressor=Dropout(k=60, basis="kronecker"), dtype="float32",
        optimizer=optimizer, optimizer_metric="layer", pilot=[data],
    ) as collector:  # fmt: skip
        train_network(model, optimizer, 5, collector)
    store, log = GradientStore.open(tmp_path / "s"), StepLog(tmp_path / "s")
    assert log.record(4).vectors is None
    rows, effects = store.rows(), ooc.fit_trajectory(store, dtype="float32").rows()
    first = 0
    for module, layer in zip(store.mask.modules, (model[0], model[2]), strict=True):
        v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in (layer.weight, layer.bias)]).double()
        v = v / (1 - 0.999**5)
        rate = float((v / (v.sqrt() + 1e-4)).sum() / v.sum())
        columns = slice(first, first + len(module.rows))
        expected = 5e-3 * rate * (1 - 0.9) / (1 - 0.9**5) / 8
        assert_allclose(effects[32:, columns], rows[32:, columns] * expected, rtol=1e-4, atol=1e-9)
        first += len(module.rows)
    damped = ooc.fit_trajectory(store, dtype="float32", between="kronecker").rows()
    assert 0 < np.abs(damped[:8]).sum() < np.abs(effects[:8]).sum()
    with pytest.raises(InputError, match="optimizer_metric 'entries' or 'layer'"):
        ooc.collect(model, tmp_path / "t", compressor=Identity(), optimizer=optimizer, optimizer_metric="model")


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_the_diagonal_is_that_of_the_rows(tmp_path, segments):
    """Of each segment's live rows, whatever blocks they are read in."""
    collected(tmp_path / "s", "adamw", compressor=Dropout(k=20), every=1)
    store = GradientStore.open(tmp_path / "s", "a")
    store.drop([3])
    weights = np.concatenate([module.weight for module in store.mask.modules])
    assert weights.min() > 1  # √(p/k)
    live, steps = np.delete(store.rows().astype(np.float64), 3, 0) / weights, np.delete(store.column("step"), 3)
    found = fit_segments(store, np.arange(STEPS), "diagonal", segments)
    parts_of = np.array_split(np.arange(STEPS), segments)
    assert found.first.tolist() == [part[0] for part in parts_of]
    for part in parts_of:
        expected = np.square(live[np.isin(steps, part)]).mean(0)
        assert all(np.allclose(found.at(step), expected, rtol=1e-5) for step in part)


def test_curvatures_that_there_are_not(tmp_path):
    collected(tmp_path / "s", "adamw", compressor=Dropout(k=20), every=4)  # rows of steps 0, 4 and 8
    store = GradientStore.open(tmp_path / "s")
    before = ooc.fit_trajectory(store).identity
    with pytest.raises(InputError, match="between 'diagonal'"):
        ooc.fit_trajectory(store, between="full")
    with pytest.raises(InputError, match="Kronecker basis"):
        ooc.fit_trajectory(store, between="kronecker")
    for between in (None, "kronecker"):
        with pytest.raises(InputError, match="between='diagonal' for segments=2"):
            ooc.fit_trajectory(store, between=between, segments=2)
    for segments in (0, STEPS + 1):
        with pytest.raises(InputError, match="segments from 1 to 9"):
            ooc.fit_trajectory(store, between="diagonal", segments=segments)
    with pytest.raises(InputError, match="received none from step 1 on"):
        ooc.fit_trajectory(store, between="diagonal", segments=STEPS)
    assert ooc.fit_trajectory(store).identity == before  # what is refused replaces nothing
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(OocInfluenceError, match="notes"):
        ooc.fit_trajectory(store, out=tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_segments_are_damped_apart(tmp_path):
    """SGD with a curvature h of each segment: rows of a step times η Π (1 - η h) over the steps after it."""
    rate, b, data = 0.05, 8, network_data(64)
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with ooc.collect(
        model, tmp_path / "s", network_losses, compressor=Dropout(k=60, basis="kronecker"), dtype="float32",
        optimizer=optimizer, pilot=[data],
    ) as collector:  # fmt: skip
        train_network(model, optimizer, 6, collector)
    store = GradientStore.open(tmp_path / "s")
    rows = store.rows().astype(np.float64)
    weights = np.concatenate([module.weight for module in store.mask.modules])
    h = [np.square(rows[part] / weights).mean(0) for part in (slice(24), slice(24, 48))]
    expected, after = np.empty_like(rows), np.ones(store.k)
    for step in reversed(range(6)):
        expected[step * b : step * b + b] = rows[step * b : step * b + b] * rate / b * after
        after *= 1 - np.minimum(rate * h[step // 3], 1)
    effects = ooc.fit_trajectory(store, between="diagonal", segments=2, dtype="float32").rows()
    assert_allclose(effects, expected, rtol=1e-4, atol=1e-9)
    together = ooc.fit_trajectory(store, between="diagonal", dtype="float32").rows()
    assert np.abs(together - expected).max() > 1e-3 * np.abs(expected).max()


def test_moments_of_every_few_steps(tmp_path):
    """Moments of the last recorded step stand for those after it: close where they change slowly, and much smaller."""
    found = []
    for every in (1, 4):
        model = make_network()
        optimizer = adamw(model)
        path = tmp_path / str(every)
        with ooc.collect(
            model, path, compressor=Identity(), dtype="float32", optimizer=optimizer, optimizer_every=every
        ) as collector:
            train_network(model, optimizer, 60, collector)
        log = StepLog(path)
        assert [log.record(n).vectors is not None for n in range(60)] == [n % every == 0 for n in range(60)]
        found.append(ooc.fit_trajectory(path, dtype="float32").rows()[160:])
    assert not np.array_equal(*found)
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.97


def test_entries_without_a_gradient(tmp_path):
    """Of an input that is always zero, and of a layer that a step does not use: no effect, and the count stays."""
    model = make_network()
    optimizer = adamw(model)
    x, y = network_data(64)
    x[:, 5] = 0
    with ooc.collect(model, tmp_path / "s", compressor=Identity(), dtype="float32", optimizer=optimizer) as collector:
        for step in range(4):
            optimizer.zero_grad()
            with collector.step(range(8)):
                model[2].requires_grad_(step != 1)
                network_losses(model, (x[:8], y[:8])).mean().backward()
            optimizer.step()
    store, log = GradientStore.open(tmp_path / "s"), StepLog(tmp_path / "s")
    counts = [log.record(number).scalars[:, 6].tolist() for number in range(4)]
    assert counts[1][2:] == [0, 0]
    assert counts[3] == [4, 4, 3, 3]
    effects = ooc.fit_trajectory(store, dtype="float32").rows()
    assert np.isfinite(effects).all()
    first, _ = store.mask.modules
    assert not effects[:, : len(first.rows)][:, first.cols == 5].any()
    assert not effects[8:16, len(first.rows) :].any()
    assert effects[:8, len(first.rows) :].any()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A store with its effects, queries, and the scores that they must have."""
    folder = tmp_path_factory.mktemp("trajectory")
    model = collected(folder / "s", "adamw")
    queries(model, folder / "s", folder / "q")
    effects = ooc.fit_trajectory(folder / "s", dtype="float32").rows().astype(np.float64)
    return folder, GradientStore.open(folder / "q").rows().astype(np.float64) @ effects.T


def test_lists_groups_and_self_influence(fitted):
    folder, scores = fitted
    both = folder / "q", folder / "s"
    lists = ooc.top_influential(*both, top=5, curvature="trajectory")
    assert_array_equal(lists.proponents.rows, np.argsort(-scores, 1)[:, :5])
    assert_allclose(lists.proponents.scores, -np.sort(-scores, 1)[:, :5], rtol=1e-4)
    assert lists.settings["curvature"].endswith("trajectory")
    again = ooc.top_influential(*both, top=5, curvature=lists.settings["curvature"])
    assert_array_equal(again.proponents.rows, lists.proponents.rows)
    samples = GradientStore.open(folder / "s").column("example")
    sums = ooc.group_influence(*both, by="example", curvature="trajectory")
    expected = np.stack([scores[:, samples == name].sum(1) for name in sums.names], 1)
    assert_allclose(sums.sums, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    rows, effects = (GradientStore.open(folder / p).rows() for p in ("s", "s/trajectory"))
    assert_allclose(
        ooc.self_influence(folder / "s", curvature="trajectory"), (rows * effects).sum(1), rtol=1e-4, atol=1e-9
    )
    of_effects = ooc.influence_scores(folder / "q", folder / "s/trajectory").compute()
    assert_allclose(of_effects, scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max())


def test_what_effects_are_not_for(fitted, tmp_path):
    folder, _ = fitted
    both = folder / "q", folder / "s"
    with pytest.raises(InputError, match="no damping with curvature='trajectory'"):
        ooc.influence_scores(*both, curvature="trajectory", damping=0.1)
    with pytest.raises(InputError, match="normalize='cosine'"):
        ooc.influence_scores(*both, curvature="trajectory", normalize="cosine")
    with pytest.raises(InputError, match="effects"):
        ooc.influence_scores(folder / "q", folder / "s/trajectory", curvature="default")
    with pytest.raises(InputError, match="multiply queries by"):
        ooc.export_rows(folder / "q", tmp_path / "x.npy", precondition=folder / "s", curvature="trajectory")
    with pytest.raises(InputError, match="dtype float16"):
        ooc.fit_trajectory(folder / "s", dtype="int8")
    plain = make_network()
    with ooc.collect(plain, tmp_path / "p", compressor=Identity()) as collector:
        train_network(plain, adamw(plain), 2, collector)
    with pytest.raises(InputError, match="optimizer=the optimiser"):
        ooc.fit_trajectory(tmp_path / "p")
    with pytest.raises(InputError, match="run fit_trajectory"):
        ooc.influence_scores(tmp_path / "p", tmp_path / "p", curvature="trajectory")


def test_rows_that_changed_and_fits_that_replace(tmp_path):
    collected(tmp_path / "s", "adamw")
    store = GradientStore.open(tmp_path / "s", "a")
    first = ooc.fit_trajectory(store)
    assert (tmp_path / "s" / "trajectory" / "zarr.json").exists()
    assert ooc.fit_trajectory(store).identity == first.identity
    assert ooc.fit_trajectory(store, refit=True).identity != first.identity
    assert ooc.fit_trajectory(store, between="diagonal").attrs["trajectory"]["between"] == "diagonal"
    assert curvature_states(store) == {"trajectory": "up to date"}
    store.drop([2])
    store.close()
    assert "run fit_trajectory again" in curvature_states(store)["trajectory"]
    with pytest.raises(StaleCurvatureError, match="fit_trajectory again"):
        ooc.influence_scores(tmp_path / "s", tmp_path / "s", curvature="trajectory")
    elsewhere = ooc.fit_trajectory(store, out=tmp_path / "e")
    assert_array_equal(np.flatnonzero(elsewhere.dropped), [2])
    scores = ooc.influence_scores(tmp_path / "s", tmp_path / "s", curvature=tmp_path / "e").compute()
    assert np.isnan(scores[:, 2]).all()
    assert np.isfinite(np.delete(scores, 2, 1)[0]).all()
    collected(tmp_path / "other", "sgd")
    with pytest.raises(MismatchError, match="the store at"):
        ooc.fit_trajectory(store, out=tmp_path / "other")
    with pytest.raises(MismatchError, match="the store at"):  # effects of another training's rows
        ooc.fit_trajectory(tmp_path / "other", out=tmp_path / "e")
    assert GradientStore.open(tmp_path / "e").identity == elsewhere.identity


def test_an_interrupted_fit_resumes(tmp_path, monkeypatch):
    from ooc_influence.curvature import trajectory

    collected(tmp_path / "s", "adamw", storage=ooc.Storage(chunk_rows=4))
    whole = ooc.fit_trajectory(
        tmp_path / "s", out=tmp_path / "whole", dtype="float32", storage=ooc.Storage(chunk_rows=4)
    )
    monkeypatch.setattr(trajectory, "_BLOCK_BYTES", 8 * whole.k * 5)  # five rows at a time
    real, calls = trajectory._effects, []

    def effects(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(trajectory, "_effects", effects)
    with pytest.raises(KeyboardInterrupt):
        ooc.fit_trajectory(tmp_path / "s", dtype="float32", storage=ooc.Storage(chunk_rows=4))
    with pytest.raises(StaleCurvatureError, match="not finished"):
        ooc.influence_scores(tmp_path / "s", tmp_path / "s", curvature="trajectory")
    resumed = ooc.fit_trajectory(tmp_path / "s", dtype="float32", storage=ooc.Storage(chunk_rows=4))
    assert len(calls) < 4 + -(-STEPS * B // 5)
    assert_array_equal(resumed.rows(), whole.rows())
    assert_array_equal(resumed.column("own_effect"), whole.column("own_effect"))


def test_it_continues_from_a_checkpoint(tmp_path):
    """Steps after the checkpoint are forgotten; effects are those of a training without an interruption."""

    def continued(path, model, optimizer, first, last, state=None):
        with ooc.collect(model, path, compressor=Identity(), dtype="float32", optimizer=optimizer) as collector:
            if state is not None:
                collector.load_state_dict(state)
            for step, rows in list(enumerate(batches()))[first:last]:
                optimizer.zero_grad()
                with collector.step(rows):
                    linear_losses(model, parts(linear_data(), rows)).mean().backward()
                optimizer.step()
                if step == 3:
                    state = collector.state_dict()
                    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), state))
        return saved if first == 0 else None

    model = make_linear()
    continued(tmp_path / "whole", model, make_optimizer("adamw", model), 0, STEPS)
    model = make_linear()
    saved = continued(tmp_path / "s", model, make_optimizer("adamw", model), 0, 7)
    model = make_linear()
    optimizer = make_optimizer("adamw", model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert saved[2]["records"] == 4
    continued(tmp_path / "s", model, optimizer, 4, STEPS, saved[2])
    found, wanted = (ooc.fit_trajectory(tmp_path / name, dtype="float32") for name in ("s", "whole"))
    assert_array_equal(found.rows()[~found.dropped], wanted.rows())
    with (
        ooc.collect(model, tmp_path / "s", compressor=Identity(), dtype="float32", optimizer=optimizer) as collector,
        pytest.raises(StoreDamagedError, match="expected 6 steps"),
    ):
        collector.load_state_dict({"rows": 8, "step": 5, "records": 6})
    with (
        ooc.collect(model, tmp_path / "s", compressor=Identity(), dtype="float32", optimizer=optimizer) as collector,
        pytest.raises(MismatchError, match="without"),
    ):
        collector.load_state_dict({"rows": 8, "step": 5})


def test_records_that_are_missing_or_damaged(tmp_path):
    model = make_linear()
    optimizer = make_optimizer("adamw", model)
    with ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=optimizer) as collector:
        train("adamw", collector=collector, model=model)
        with collector.step(batches()[0]):  # a step that the optimiser did not make
            linear_losses(model, parts(linear_data(), batches()[0])).mean().backward()
    with pytest.raises(InputError, match="up to step 9; received records up to 8"):
        ooc.fit_trajectory(tmp_path / "s")
    with GradientStore.open(tmp_path / "s", "a") as store:
        store.drop(np.arange(STEPS * B, store.n))
    ooc.fit_trajectory(tmp_path / "s")
    assert GradientStore.open(tmp_path / "s").verify() == []
    (file,) = (tmp_path / "s" / "optimizer").glob("0*.npz")
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1  # in the vectors
    file.write_bytes(data)
    (damage,) = GradientStore.open(tmp_path / "s").verify()
    assert damage.reason.startswith("optimizer: ")
    with pytest.raises(StoreDamagedError, match="damaged"):
        ooc.fit_trajectory(tmp_path / "s", refit=True)
    file.rename(file.with_name("000000000003.npz"))
    with pytest.raises(StoreDamagedError, match="without a gap"):
        ooc.fit_trajectory(tmp_path / "s", refit=True)


def test_many_steps_in_several_files(tmp_path, monkeypatch):
    from ooc_influence.store import step_log

    one = collected(tmp_path / "one", "adamw")
    monkeypatch.setattr(step_log, "_SEGMENT_BYTES", 700)
    several = collected(tmp_path / "several", "adamw")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))
    assert len(list((tmp_path / "several" / "optimizer").glob("0*.npz"))) > 3
    found, wanted = (ooc.fit_trajectory(tmp_path / name) for name in ("several", "one"))
    assert_array_equal(found.rows(), wanted.rows())


def test_every_few_steps(tmp_path):
    """Rows of some steps only: the optimiser's steps in between are carried as well."""
    collected(tmp_path / "all", "momentum")
    collected(tmp_path / "some", "momentum", every=2)
    found, wanted = (ooc.fit_trajectory(tmp_path / name, dtype="float32") for name in ("some", "all"))
    assert_allclose(found.rows(), wanted.rows()[wanted.column("step") % 2 == 0], rtol=1e-6)


def test_sparse_gradients_are_refused(tmp_path):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(OocInfluenceError, match="sparse"),
        ooc.collect(model, tmp_path / "s", compressor=Identity(), optimizer=optimizer) as collector,
        collector.step(range(5)),
    ):
        F.cross_entropy(model(torch.randint(0, 10, (5, 3))), torch.zeros(5, dtype=torch.long)).backward()


CHILD = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_trajectory as t
import ooc_influence as ooc
folder, kill = sys.argv[2], int(sys.argv[3])
model = t.make_linear()
optimizer = t.make_optimizer("adamw", model)
with ooc.collect(model, folder + "/s", compressor=t.Identity(), dtype="float32", optimizer=optimizer) as collector:
    first = 0
    if os.path.exists(folder + "/checkpoint"):
        saved = torch.load(folder + "/checkpoint")
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        collector.load_state_dict(saved["collector"])
        first = saved["first"]
    for number, rows in list(enumerate(t.batches()))[first:]:
        optimizer.zero_grad()
        with collector.step(rows):
            t.linear_losses(model, t.parts(t.linear_data(), rows)).mean().backward()
        optimizer.step()
        if number == kill:
            collector._flush_optimizer()  # as if a file of records had been full
            os.kill(os.getpid(), t.signal.SIGKILL)
        if number % 3 == 2:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "first": number + 1}
            torch.save(state | {"collector": collector.state_dict()}, folder + "/partial")
            os.replace(folder + "/partial", folder + "/checkpoint")
"""


@pytest.mark.slow
def test_a_killed_training_has_each_step_once(tmp_path):
    found = []
    for name, kills in (("whole", [-1]), ("killed", [4, -1])):
        (tmp_path / name).mkdir()
        for kill in kills:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / name), str(kill)]
            )
            assert done.returncode == (0 if kill < 0 else -signal.SIGKILL)
        assert_array_equal(StepLog(tmp_path / name / "s").steps, np.arange(STEPS))
        effects = ooc.fit_trajectory(tmp_path / name / "s", dtype="float32")
        found.append(effects.rows()[~effects.dropped])
    assert_array_equal(*found)


def test_the_commands(tmp_path, run):  # noqa: F811
    """Effects and sums by them, and averages: those of the library."""
    model = collected(tmp_path / "s.zarr", "adamw")
    queries(model, tmp_path / "s.zarr", tmp_path / "q.zarr")
    assert run("trajectory s.zarr --dtype float32")[0] == 0
    code, out, error = run("groups q.zarr s.zarr --by example --curvature trajectory --json")
    assert code == 0, error
    expected = ooc.group_influence(tmp_path / "q.zarr", tmp_path / "s.zarr", by="example", curvature="trajectory")
    assert_allclose(json.loads(out)["sums"], expected.sums, rtol=1e-5)
    code, out, error = run("average s.zarr a.zarr --by example --dtype float32 --json")
    assert code == 0, error
    wanted = ooc.average_rows(tmp_path / "s.zarr", tmp_path / "wanted", dtype="float32")
    assert json.loads(out)["rows"] == wanted.n
    assert_array_equal(GradientStore.open(tmp_path / "a.zarr").rows(), wanted.rows())
    code, _, error = run("trajectory a.zarr")
    assert code == 2
    assert "optimizer=the optimiser" in error

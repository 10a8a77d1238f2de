"""Rows collected in training: it stays as it was, rows are autograd's, and resuming loses and repeats none."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Encoder, Mlp, Twice, data, make
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore
from ooc_influence.errors import InputError, MismatchError, UnsupportedModelError

N, B, STEPS = 24, 6, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:gradients cover"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


def training(kind, seed=0, **optimizer):
    """A model in training mode, its optimiser, and its batches: ids, x, y."""
    model = make(kind, seed).train()
    x, y = data(kind, N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1)).repeat(2)
    batches = [(part, x[part], y[part]) for part in order.split(B)][:STEPS]
    return model, torch.optim.AdamW(model.parameters(), **({"lr": 1e-2} | optimizer)), batches


def train(model, optimizer, batches, collector=None, *, loss="mean", first=0):
    """Train; return the parameters before each step."""
    seen = []
    torch.manual_seed(7 + first)
    for number, (ids, x, y) in enumerate(batches[first:], start=first):
        seen.append((copy.deepcopy(model), torch.get_rng_state()))
        optimizer.zero_grad()
        if collector is None:
            F.cross_entropy(model(x), y, reduction=loss).backward()
        else:
            with collector.step(ids, epoch=number // 4):
                F.cross_entropy(model(x), y, reduction=loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return seen


def expected_rows(mask, seen, batches):
    """Return the masked gradients of single samples, with the dropout that their batch drew."""
    rows = []
    names = [f"{module.layer.name}.weight" for module in mask.modules]
    for (model, state), (_, x, y) in zip(seen, batches, strict=True):
        torch.set_rng_state(state)
        losses = F.cross_entropy(model(x), y, reduction="none")
        for each in losses:
            flat = []
            for name, module in zip(names, mask.modules, strict=True):
                weight = model.get_parameter(name)
                bias = [model.get_parameter(name.replace("weight", "bias"))] if module.layer.bias else []
                grads = torch.autograd.grad(each, [weight, *bias], retain_graph=True)
                whole = torch.cat([grads[0].reshape(len(weight), -1), *(g[:, None] for g in grads[1:])], 1)
                flat.append(whole[module.rows.astype(int), module.cols.astype(int)].numpy() * module.weight)
            rows.append(np.concatenate(flat))
    return np.array(rows)


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("kind", [Mlp, Twice])
def test_rows_are_autograds_and_the_training_is_the_same(tmp_path, kind, loss):
    plain = training(kind)
    seen = train(*plain, loss=loss)
    model, optimizer, batches = training(kind)
    with ooc.collect(
        model, tmp_path / "s", compressor=Dropout(k=70), dtype="float32", columns=["epoch"], loss=loss
    ) as collector:
        train(model, optimizer, batches, collector, loss=loss)
    for mine, theirs in zip(model.parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    store = GradientStore.open(tmp_path / "s")
    assert_allclose(store.rows(), expected_rows(store.mask, seen, batches), rtol=1e-4, atol=1e-6)
    assert_array_equal(store.column("example"), torch.cat([ids for ids, _, _ in batches]).numpy())
    assert_array_equal(store.column("step"), np.repeat(np.arange(STEPS), B))
    assert_array_equal(store.column("epoch"), np.repeat(np.arange(STEPS) // 4, B))
    assert store.attrs["verification"]["checked"]
    assert store.attrs["verification"]["share"] == 1.0


def test_two_hundred_steps_of_a_transformer_are_the_same_to_the_bit(tmp_path):
    plain = training(Encoder)
    train(*plain[:2], plain[2] * 25)
    model, optimizer, batches = training(Encoder)
    with ooc.collect(model, tmp_path / "s", compressor=Dropout(k=300), columns=["epoch"]) as collector:
        train(model, optimizer, batches * 25, collector)
    for mine, theirs in zip(model.parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert GradientStore.open(tmp_path / "s").n == 25 * STEPS * B


def test_weights_scale_and_accumulation(tmp_path):
    """Rows are single samples' gradients, however samples are weighted in a batch's loss and whatever its factor."""
    model = make(Mlp).eval()  # without dropout, so that batches can be compared
    x, y = data(Mlp, 8)
    weights = torch.linspace(0.05, 0.4, 8)
    found = []
    for number, (share, scale) in enumerate([(None, 1.0), (weights, 1.0), (weights, 1024.0), (weights, 0.25)]):
        with ooc.collect(model, tmp_path / f"{number}", compressor=Dropout(k=100), dtype="float32") as collector:
            for part in (slice(0, 4), slice(4, 8)):
                with collector.step(
                    range(8)[part], step=0, weights=None if share is None else share[part], scale=scale
                ):
                    losses = F.cross_entropy(model(x[part]), y[part], reduction="none")
                    (scale * (losses.mean() if share is None else (losses * share[part]).sum())).backward()
        store = GradientStore.open(tmp_path / f"{number}")
        assert_array_equal(store.column("step"), np.zeros(8))
        found.append(store.rows())
    for each in found[1:]:
        assert_allclose(each, found[0], rtol=1e-4, atol=1e-6)


def test_samples_of_several_sequences(tmp_path):
    """A sample's row is the sum over its sequences."""
    model, (x, y) = make(Mlp).eval(), data(Mlp, 8)
    owners = [0, 1, 2, 3, 2, 0, 1, 3]
    with (
        ooc.collect(model, tmp_path / "s", compressor=Dropout(k=70), dtype="float32", loss="sum") as collector,
        collector.step(range(4), sequences=owners) as step,
    ):
        losses = F.cross_entropy(model(x), y, reduction="none")
        step.record(losses.new_zeros(4).index_add(0, torch.tensor(owners), losses))
        losses.sum().backward()
    with ooc.collect(model, tmp_path / "e", compressor=Dropout(k=70), dtype="float32", loss="sum") as collector:  # noqa: SIM117
        with collector.step(range(8)):
            F.cross_entropy(model(x), y, reduction="sum").backward()
    single, found = GradientStore.open(tmp_path / "e").rows(), GradientStore.open(tmp_path / "s")
    wanted = [single[np.array(owners) == sample].sum(0) for sample in range(4)]
    assert_allclose(found.rows(), wanted, rtol=1e-5, atol=1e-6)
    assert_array_equal(found.column("example"), np.arange(4))
    with (
        pytest.raises(InputError, match="index of each sequence's sample"),
        ooc.collect(model, tmp_path / "w", compressor=Dropout(k=70)) as collector,
        collector.step(range(4), sequences=[0, 1, 2]),
    ):
        pass


def test_every_few_steps(tmp_path):
    model, optimizer, batches = training(Mlp)
    whole, some = tmp_path / "whole", tmp_path / "some"
    with ooc.collect(model, whole, compressor=Dropout(k=50), dtype="float32", columns=["epoch"]) as collector:
        train(model, optimizer, batches, collector)
    model, optimizer, batches = training(Mlp)
    with ooc.collect(model, some, compressor=Dropout(k=50), dtype="float32", columns=["epoch"], every=3) as collector:
        train(model, optimizer, batches, collector)
    steps = GradientStore.open(whole).column("step")
    assert_array_equal(GradientStore.open(some).rows(), GradientStore.open(whole).rows()[steps % 3 == 0])


def test_losses_are_recorded_and_mixed_samples_refused(tmp_path):
    model, x, y = make(Mlp).eval(), *data(Mlp, 8)
    with ooc.collect(model, tmp_path / "s", compressor=Dropout(k=50)) as collector, collector.step(range(8)) as step:
        losses = F.cross_entropy(model(x), y, reduction="none")
        step.record(losses)
        losses.mean().backward()
    assert_allclose(GradientStore.open(tmp_path / "s").loss, losses.detach(), rtol=1e-6)
    centred = nn.Sequential(nn.Linear(12, 6), _Centring(), nn.Linear(6, 5))
    with (
        pytest.raises(UnsupportedModelError, match="depend on that sample alone"),
        ooc.collect(centred, tmp_path / "m", compressor=Dropout(k=50)) as collector,
        collector.step(range(8)) as step,
    ):
        step.record(F.cross_entropy(centred(x), y, reduction="none"))
    with (
        pytest.raises(InputError, match="a loss for each of 8"),
        collector_of(model, tmp_path / "w") as collector,
        collector.step(range(8)) as step,
    ):
        step.record(F.cross_entropy(model(x), y))


class _Centring(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def collector_of(model, path):
    return ooc.collect(model, path, compressor=Dropout(k=50))


class _Untapped(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x):
        return self.last(x) + x @ self.first.weight.T + 0 * self.first(x)


def test_entries_that_are_not_the_gradient_are_refused(tmp_path):
    model, (x, y) = _Untapped(), data(Mlp, 8)
    with (
        pytest.raises(UnsupportedModelError, match="first"),
        collector_of(model, tmp_path / "s") as collector,
        collector.step(range(8)),
    ):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(ooc.OocInfluenceError):
        GradientStore.open(tmp_path / "s")  # nothing was stored


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, m, x, y: c.step(range(8), weights=[1.0]).__enter__(), "positive weights of 8"),
        (lambda c, m, x, y: c.step(range(8), epoch=1).__enter__(), "no further columns; received epoch"),
        (lambda c, m, x, y: _forward_alone(c, m, x), "forward and the backward pass"),
    ],
)
def test_wrong_steps(tmp_path, call, message):
    model, (x, y) = make(Mlp), data(Mlp, 8)
    with pytest.raises(InputError, match=message), collector_of(model, tmp_path / "s") as collector:
        call(collector, model, x, y)


def _forward_alone(collector, model, x):
    with collector.step(range(8)):
        model(x).sum().backward()
    with collector.step(range(8)):
        model(x)


def test_a_backward_pass_outside_its_step(tmp_path):
    model, (x, y) = make(Mlp), data(Mlp, 8)
    with collector_of(model, tmp_path / "s") as collector:
        with collector.step(range(8)):
            F.cross_entropy(model(x), y).backward()
        with pytest.raises(InputError, match="forward and the backward"), collector.step(range(8)):
            loss = F.cross_entropy(model(x), y)
        with pytest.raises(UnsupportedModelError, match="backward pass inside its step"):
            loss.backward()


def test_models_that_cannot_be_collected_from(tmp_path):
    normed = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5))
    with pytest.raises(UnsupportedModelError, match="batch norms"):
        collector_of(normed, tmp_path / "s")
    normed[1].eval()
    collector_of(normed, tmp_path / "s")
    with pytest.raises(InputError, match="every >= 1"):
        ooc.collect(make(Mlp), tmp_path / "s", every=0)


def test_queries_of_the_trained_model_fit(tmp_path):
    """The store's model is the one that training ended with; a pilot draws nothing of the training's random numbers."""
    model, optimizer, batches = training(Mlp)
    compressor = Dropout(k=80, sampling="importance")
    pilot = [(x, y) for _, x, y in batches]
    with ooc.collect(
        model, tmp_path / "s", lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        compressor=compressor, pilot=pilot, columns=["epoch"],
    ) as collector:  # fmt: skip
        train(model, optimizer, batches, collector)
    plain = training(Mlp)
    train(*plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain[0].parameters(), strict=True))
    x, y = data(Mlp, 4)
    model.eval()
    ooc.extract_gradients(model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"), [(x, y)],
                          tmp_path / "q", like=tmp_path / "s")  # fmt: skip
    ooc.fit_fisher(tmp_path / "s")
    assert np.isfinite(ooc.influence_scores(tmp_path / "q", tmp_path / "s")).all()


def test_it_continues_from_a_checkpoint(tmp_path):
    """Rows past the checkpoint are dropped; with those before, and those collected again, each step is there once."""
    whole = training(Mlp)
    options = {"compressor": Dropout(k=60), "dtype": "float32", "columns": ["epoch"]}
    with ooc.collect(whole[0], tmp_path / "whole", **options) as collector:
        train_twice(*whole, collector)
    model, optimizer, batches = training(Mlp)
    with ooc.collect(model, tmp_path / "s", **options) as collector:
        train(model, optimizer, batches[:4], collector)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), collector.state_dict()))
        train(model, optimizer, batches[:6], collector, first=4)  # is lost
    model, optimizer, batches = training(Mlp, seed=3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with ooc.collect(model, tmp_path / "s", **options) as collector:
        collector.load_state_dict(saved[2])
        train(model, optimizer, batches, collector, first=4)
    found, wanted = GradientStore.open(tmp_path / "s"), GradientStore.open(tmp_path / "whole")
    live = ~found.dropped
    assert_array_equal(found.rows()[live], wanted.rows())
    assert_array_equal(found.column("step")[live], wanted.column("step"))
    with (
        ooc.collect(model, tmp_path / "s", **options) as collector,
        pytest.raises(MismatchError, match="at least 1000"),
    ):
        collector.load_state_dict({"rows": 1000, "step": 3})


def train_twice(model, optimizer, batches, collector):
    train(model, optimizer, batches[:4], collector)
    train(model, optimizer, batches, collector, first=4)


CHILD = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_collect as t
import ooc_influence as ooc
folder, kill = sys.argv[2], int(sys.argv[3])
model, optimizer, batches = t.training(t.Mlp)
with ooc.collect(model, folder + "/s", compressor=t.Dropout(k=60), dtype="float32", columns=["epoch"]) as collector:
    first = 0
    if t.Path(folder + "/checkpoint").exists():
        saved = torch.load(folder + "/checkpoint")
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        collector.load_state_dict(saved["collector"])
        first = saved["first"]
    for number in range(first, t.STEPS):
        t.train(model, optimizer, batches[: number + 1], collector, first=number)
        if number == kill:
            os.kill(os.getpid(), t.signal.SIGKILL)
        if number % 3 == 2:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "first": number + 1}
            torch.save(state | {"collector": collector.state_dict()}, folder + "/partial")
            os.replace(folder + "/partial", folder + "/checkpoint")
"""


def test_a_killed_training_has_each_step_once(tmp_path):
    def run(folder, kill):
        return subprocess.run(
            [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), str(kill)]
        ).returncode

    (tmp_path / "killed").mkdir()
    model, optimizer, batches = training(Mlp)
    options = {"compressor": Dropout(k=60), "dtype": "float32", "columns": ["epoch"]}
    with ooc.collect(model, tmp_path / "whole" / "s", **options) as collector:
        for number in range(STEPS):
            train(model, optimizer, batches[: number + 1], collector, first=number)
    assert [run(tmp_path / "killed", kill) for kill in (4, -1)] == [-signal.SIGKILL, 0]
    found, wanted = (GradientStore.open(tmp_path / name / "s") for name in ("killed", "whole"))
    live = ~found.dropped
    assert_array_equal(found.rows()[live], wanted.rows())
    assert_array_equal(found.column("step")[live], wanted.column("step"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("form", ["function", "method", "regions", "called before"])
def test_compiled_models(tmp_path, form):
    """Rows are those of the model as it is, whether it has been compiled before or is compiled meanwhile."""
    rows = []
    for compiled in (False, True):
        model = make(Mlp).eval()
        x, y = data(Mlp, 8)
        run = _compiled(model, form) if compiled else model
        if form == "called before":
            F.cross_entropy(run(x), y).backward()
            model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        with ooc.collect(run, tmp_path / f"{compiled}", compressor=Dropout(k=100), dtype="float32") as collector:
            for _ in range(3):
                with collector.step(range(8)):
                    F.cross_entropy(run(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        rows.append(GradientStore.open(tmp_path / f"{compiled}"))
        run(x)  # without hooks
    assert rows[1].attrs["verification"]["share"] == 1.0
    assert rows[1].mask.digest == rows[0].mask.digest
    assert_allclose(rows[1].rows(), rows[0].rows(), rtol=1e-4, atol=1e-6)


def _compiled(model, form):
    if form == "method":
        model.compile(backend="aot_eager")
    elif form == "regions":
        for each in model.children():
            each.compile(backend="aot_eager")
    else:
        return torch.compile(model, backend="aot_eager")
    return model


def test_mixed_precision(tmp_path):
    """Autocast and a scaled loss: rows are those of the same model in float32, to the precision of bfloat16."""
    x, y = data(Mlp, 8)
    rows = []
    for name, mixed in (("plain", False), ("mixed", True)):
        model = make(Mlp).eval()
        with ooc.collect(model, tmp_path / name, compressor=Dropout(k=200), dtype="float32") as collector:
            scale = 256.0 if mixed else 1.0
            with collector.step(range(8), scale=scale), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                (scale * F.cross_entropy(model(x), y)).backward()
        rows.append(GradientStore.open(tmp_path / name).rows())
    assert_allclose(rows[1], rows[0], atol=0.05 * np.abs(rows[0]).max())
    assert np.abs(rows[1] - rows[0]).max() > 0  # it was mixed


def test_a_language_model_with_checkpointing_and_an_adapter(tmp_path):
    """Rows are those that extraction computes of each checkpoint, and training is the same to the bit."""
    peft = pytest.importorskip("peft")
    tiny_hf = pytest.importorskip("tiny_hf")
    from ooc_influence import hf

    tiny_hf.make_model(tmp_path / "model")
    tokens = torch.randint(5, 45, (8, 12), generator=torch.Generator().manual_seed(0))

    def adapted():
        torch.manual_seed(0)
        loaded = hf.load(str(tmp_path / "model"))
        config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        model = peft.get_peft_model(loaded.model, config).train()
        for each in model.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0  # extraction has none
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    models = adapted(), adapted()
    losses = hf.CausalLoss()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        if model is models[0]:
            with ooc.collect(model, tmp_path / "s", compressor=Dropout(k=60), dtype="float32") as collector:
                for _ in range(3):
                    with collector.step(range(8)):
                        model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            for number in range(3):
                if number == 2:
                    ooc.extract_gradients(model, losses, [batch], tmp_path / "e", compressor=Dropout(k=60),
                                          dtype="float32")  # fmt: skip
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    found, wanted = GradientStore.open(tmp_path / "s"), GradientStore.open(tmp_path / "e")
    assert found.mask.digest == wanted.mask.digest
    assert_allclose(found.rows()[16:], wanted.rows(), rtol=1e-3, atol=1e-6)

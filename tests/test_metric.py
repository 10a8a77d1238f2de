"""Adam's metric: rows whose dot products are gᵀ diag(1/(√v̂ + ε)) h."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import AdamMetric, Dropout, Eigenbasis, OocInfluenceWarning, extract_gradients
from ooc_influence.errors import InputError, MismatchError

P = 12 * 20 + 20 + 20 * 20 + 20 * 5 + 5


def trained(*, groups=False, steps=3, kind=torch.optim.AdamW, **options):
    """A model, and the optimiser that trained it; the first layer's bias was frozen."""
    model = make(Mlp)
    if groups:
        decay = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        rest = [p for name, p in model.named_parameters() if name.endswith("bias")]
        given = [{"params": decay, "eps": 1e-6}, {"params": rest, "weight_decay": 0.0}]
    else:
        given = list(model.parameters())
    optimiser = kind(given, lr=1e-3, **options)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model, data(Mlp, 50)).mean().backward()
        optimiser.step()
    return model.eval(), optimiser


def rows(path, model, metric=None, k=P, **options):
    options.setdefault("compressor", Dropout(k=k))
    return extract_gradients(model, loss, batches(*data(Mlp, 20), 8), path, dtype="float32", metric=metric, **options)


def expected_scale(model, optimiser):
    """(√v̂ + ε)^-½ of all entries, in the order of the columns, float64."""
    found = {}
    for group in optimiser.param_groups:
        for p in group["params"]:
            state = optimiser.state[p]
            v = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            found[p] = torch.where(v > 0, (v.sqrt() + group["eps"]) ** -0.5, 0)
    parts = []
    for layer in (model.first, model.second, model.last):
        columns = [found[layer.weight]] + ([found[layer.bias][:, None]] if layer.bias is not None else [])
        parts.append(torch.cat(columns, 1).flatten())
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("form", ["optimiser", "state", "file", "folder", "names"])
def test_entries_are_scaled(tmp_path, form, groups):
    model, optimiser = trained(groups=groups)
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
    source, options = {
        "optimiser": (optimiser, {}),
        "state": (optimiser.state_dict(), {}),
        "file": (str(tmp_path / "optimizer.pt"), {}),
        "folder": (tmp_path, {}),
        "names": (optimiser.state_dict(), {"names": order}),
    }[form]
    plain = rows(tmp_path / "a.zarr", model).rows()
    scale = expected_scale(model, optimiser)
    with pytest.warns(OocInfluenceWarning, match="never updated") if (scale == 0).any() else nothing():
        store = rows(tmp_path / "b.zarr", model, AdamMetric(source, **options))
    assert_allclose(store.rows(), plain * scale, rtol=1e-4, atol=1e-6 * np.abs(plain * scale).max())
    assert store.attrs["metric"]["never_updated"] == int((scale == 0).sum())
    query = rows(tmp_path / "q.zarr", model, like=store, compressor=None)
    assert_array_equal(query.rows(), store.rows())
    assert query.attrs["metric"] == store.attrs["metric"]


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_entries_never_updated_weigh_nothing(tmp_path):
    model, optimiser = trained()
    state = optimiser.state_dict()
    state["state"][0]["exp_avg_sq"][0] = 0
    with pytest.warns(OocInfluenceWarning, match=r"of 765 kept entries were never updated"):
        store = rows(tmp_path / "s.zarr", model, AdamMetric(state))
    assert (store.rows()[:, :12] == 0).all()
    assert store.attrs["metric"]["never_updated"] >= 12


@pytest.mark.filterwarnings("ignore:.*never updated")
def test_with_masks_and_a_basis(tmp_path):
    """The kept entries carry the metric before the basis is made, and a run goes on with it."""
    model, optimiser = trained(amsgrad=True)
    compressor = Dropout(k=100, sampling="importance", reduce=Eigenbasis(r=10, pilot=20))
    store = rows(tmp_path / "s.zarr", model, AdamMetric(optimiser), compressor=compressor)
    wide = rows(tmp_path / "w.zarr", model, AdamMetric(optimiser), compressor=Dropout(k=100, sampling="importance"))
    assert_allclose(store.rows(), wide.rows() @ store.reduction.vectors, atol=1e-4 * np.abs(wide.rows()).max())
    again = rows(tmp_path / "s.zarr", model, AdamMetric(optimiser), compressor=compressor)
    assert again.n == 20
    with pytest.raises(MismatchError, match="metric="):
        rows(tmp_path / "s.zarr", model, compressor=compressor)


def test_what_is_no_state_of_the_model(tmp_path):
    model, optimiser = trained()
    other = torch.nn.Linear(3, 3)
    stranger = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    stranger.step()
    for source in (stranger, stranger.state_dict()):
        with pytest.raises(MismatchError, match="names="):
            rows(tmp_path / "s.zarr", model, AdamMetric(source))
    sgd = trained(kind=torch.optim.SGD, momentum=0.9)[1]
    for bad, match in (
        (sgd, "exp_avg_sq"),
        ({}, "state_dict"),
        (tmp_path / "none.pt", "no such file"),
        ({"state": 1}, "state_dict"),
    ):
        with pytest.raises(InputError, match=match):
            AdamMetric(bad)
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(InputError, match=r"torch\.save"):
        AdamMetric(tmp_path / "bad.pt")
    with pytest.raises(InputError, match="like fixes the mask"):
        rows(tmp_path / "q.zarr", model, AdamMetric(optimiser), like=rows(tmp_path / "t.zarr", model), compressor=None)


def test_the_trainer_s_order(tmp_path):
    """Parameters grouped as Hugging Face's Trainer does: with decay, then biases and norms."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=12, max_position_embeddings=16)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config)
    decay = set(transformers.Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    optimiser = torch.optim.AdamW([
        {"params": [p for name, p in named if name in decay]},
        {"params": [p for name, p in named if name not in decay], "weight_decay": 0.0},
    ])  # fmt: skip
    ids = torch.randint(0, 19, (4, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    found = AdamMetric(optimiser.state_dict()).moments(model)
    assert set(found) == {name for name, p in named if p.grad is not None}
    for name, p in named:
        if name in found:
            assert_array_equal(found[name].value.numpy(), optimiser.state[p]["exp_avg_sq"].flatten().numpy())

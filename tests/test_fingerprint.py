"""The fingerprint of a model: every byte counts; device, wrapper and memory layout do not; older stores keep theirs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import Mlp, batches, data, loss, make
from torch import nn

from ooc_influence import Dropout, GradientStore, extract_gradients, fit_fisher, influence_scores
from ooc_influence.errors import MismatchError, OocInfluenceWarning
from ooc_influence.extract.fingerprint import fingerprint_as, model_fingerprint


def sampled(model):
    """What stores of earlier versions hold, by the algorithm of those versions."""
    import hashlib

    digest = hashlib.sha256()
    generator = np.random.Generator(np.random.PCG64(0))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        chosen = torch.from_numpy(generator.integers(0, tensor.numel(), 64))
        digest.update(tensor.reshape(-1)[chosen].double().numpy().tobytes())
    return digest.hexdigest()


def big():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(700, 3100), nn.Linear(3100, 5))  # of more than one piece that threads share


def test_one_changed_entry_changes_it():
    """Whichever entry; also through .data, which leaves no trace in autograd's counters, and by one bit."""
    model = big()
    first = model_fingerprint(model)
    assert first.startswith("2:")
    weight = model[0].weight
    generator = np.random.default_rng(0)
    places = [0, weight.numel() - 1, *generator.integers(0, weight.numel(), 20).tolist()]
    seen = {first}
    for place in places:
        bits = weight.data.view(torch.int32).flatten()
        bits[place] ^= 1
        seen.add(model_fingerprint(model))
        bits[place] ^= 1
    assert len(seen) == 1 + len(set(places))
    assert model_fingerprint(model) == first
    with torch.no_grad():
        weight[3, 4], weight[3, 5] = -weight[3, 4].clone(), -weight[3, 5].clone()
    assert model_fingerprint(model) != first


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "buffer", "order"])
def test_what_else_changes_it(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other = copy.deepcopy(model)
    if change == "name":
        other = nn.Sequential(*[nn.Identity(), *other])
    elif change == "shape":
        other[0].weight = nn.Parameter(other[0].weight.reshape(2, 8))
    elif change == "dtype":
        other[0].bias.data.zero_()
        model[0].bias.data.zero_()
        other[0].bias = nn.Parameter(other[0].bias.half())
    elif change == "buffer":
        other[1].running_mean[2] += 1
    else:
        other[0].weight = nn.Parameter(other[0].weight.T.contiguous())
    assert model_fingerprint(other) != model_fingerprint(model)


def test_what_does_not_change_it():
    model = big()
    first = model_fingerprint(model)
    other = copy.deepcopy(model)
    other[0].weight = nn.Parameter(other[0].weight.T.contiguous().T)  # stored by columns
    other[1].weight.requires_grad_(False)
    assert model_fingerprint(other) == first
    assert model_fingerprint(nn.DataParallel(model)) == first
    assert model_fingerprint(torch.compile(model, backend="eager")) == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_do_not_change_it():
    model = big()
    assert model_fingerprint(copy.deepcopy(model).cuda()) == model_fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_kinds_of_tensors(dtype):
    model = nn.Module()
    model.register_buffer("one", torch.arange(12).remainder(3).to(dtype).reshape(3, 4))
    model.register_buffer("empty", torch.empty(0, dtype=dtype))
    model.register_buffer("scalar", torch.ones((), dtype=dtype))
    first = model_fingerprint(model)
    model.one[1, 2] = model.one[1, 3]
    assert model_fingerprint(model) != first


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights_count():
    module = nn.Module()
    values = torch.linspace(-1, 1, 600).reshape(20, 30)
    prints = []
    for change, scale in ((0, 0.01), (0.5, 0.01), (0, 0.02)):
        values[7, 9] += change
        module.register_buffer("w", torch.quantize_per_tensor(values, scale, 0, torch.qint8))
        prints.append(model_fingerprint(module))
    assert len(set(prints)) == 3


def old_store(path, model):
    """A train store as an earlier version recorded it."""
    source = batches(*data(Mlp, 30), 8)
    store = extract_gradients(model, loss, source, path, compressor=Dropout(k=50), dtype="float32")
    with GradientStore.open(path, mode="a") as opened:
        opened.record(model={"fingerprint": sampled(model), "class": "Mlp"})
    return store


def test_stores_of_earlier_versions(tmp_path):
    """They take further rows and queries of their model, which then compare; and no other's."""
    model = make(Mlp)
    old = sampled(model)
    assert fingerprint_as(model, old) == old
    assert fingerprint_as(model, None) == fingerprint_as(model, "0" * 64) == model_fingerprint(model)
    train = old_store(tmp_path / "t.zarr", model).path
    source = batches(*data(Mlp, 50), 8)
    grown = extract_gradients(model, loss, source, train, compressor=Dropout(k=50), dtype="float32")
    assert (grown.n, grown.model_fingerprint) == (50, old)
    query = extract_gradients(model, loss, batches(*data(Mlp, 4), 4), tmp_path / "q.zarr", like=train)
    assert query.model_fingerprint == old
    fit_fisher(train)
    assert influence_scores(query, train).compute().shape == (4, 50)
    other = make(Mlp, seed=1)
    with pytest.raises(MismatchError, match=f"model of .*, {old[:12]}; received [0-9a-f]{{12}}: "):
        extract_gradients(other, loss, batches(*data(Mlp, 4), 4), tmp_path / "x.zarr", like=train)
    with pytest.raises(MismatchError, match="the model of"):
        extract_gradients(other, loss, source, train, compressor=Dropout(k=50), dtype="float32")


def test_a_sparse_change_is_another_model(tmp_path):
    """Twenty of one changed entry each: what a sample of the entries mostly missed."""
    model = big()
    for seed in range(20):
        other = copy.deepcopy(model)
        place = int(np.random.default_rng(seed).integers(other[0].weight.numel()))
        other[0].weight.data.view(-1)[place] += 1
        assert fingerprint_as(other, model_fingerprint(model)) != model_fingerprint(model)


def test_a_model_recorded_otherwise(tmp_path):
    """``attributes={"model": None}``, or a name, of a store that was filled by hand: compared as it is."""
    from conftest import random_rows, write_store

    rows = random_rows(30, 8)
    stores = {
        value: write_store(tmp_path / f"{value}.zarr", rows, attributes={"model": value}) for value in (None, "a", "b")
    }
    assert [store.model_fingerprint for store in stores.values()] == [None, "a", "b"]
    for store in stores.values():
        fit_fisher(store)
        assert influence_scores(store, store).compute().shape == (30, 30)
    with pytest.raises(MismatchError, match=r"the model of .*, b; received a of"):
        influence_scores(stores["a"], stores["b"])
    plain = write_store(tmp_path / "plain.zarr", rows)
    assert influence_scores(plain, stores[None]).compute().shape == (30, 30)


def test_another_model_for_a_store_without_one(tmp_path):
    model = make(Mlp)
    store = old_store(tmp_path / "t.zarr", model).path
    with GradientStore.open(store, mode="a") as opened:
        opened.record(model=None)
    source = batches(*data(Mlp, 4), 4)
    with pytest.raises(MismatchError, match=r"the model of .*, none; received"):
        extract_gradients(model, loss, source, tmp_path / "q.zarr", like=store)
    with pytest.warns(OocInfluenceWarning, match="--other-model"):
        query = extract_gradients(model, loss, source, tmp_path / "q.zarr", like=store, check_model=False)
    assert query.attrs["model"]["other"] == [model_fingerprint(model)]

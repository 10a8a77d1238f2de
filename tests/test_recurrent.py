"""LSTM, GRU and RNN, and bags of embeddings, against float64 autograd one sample at a time."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ooc_influence import Dropout, OocInfluenceWarning, cross_entropy, extract_gradients
from ooc_influence.extract.selection import select_layers

N, T, WIDTH = 8, 5, 4  # in batches of 5, 1 and 2: as many samples as steps, one, fewer


class Sequences(nn.Module):
    """A recurrent layer in one of the forms that people use it in."""

    def __init__(self, kind, form, **options):
        super().__init__()
        self.form, self.first = form, options.get("batch_first", False)
        self.before, self.layer = nn.Linear(WIDTH, WIDTH), kind(WIDTH, 6, **options)
        directions = 1 + self.layer.bidirectional
        out = options.get("proj_size", 0) or 6
        if "states" in form:
            self.start = nn.Linear(WIDTH, out * directions * self.layer.num_layers)
        if "states" in form and kind is nn.LSTM:
            self.cell = nn.Linear(WIDTH, 6 * directions * self.layer.num_layers)
        self.head = nn.Linear(out * directions, 3)

    def forward(self, x, lengths):
        h = self.before(x)
        states = self._states(x)
        if "packed" in self.form:
            packed = pack_padded_sequence(h if self.first else h.transpose(0, 1), lengths, self.first, False)
            out, last = self.layer(packed, states) if states is not None else self.layer(packed)
            out, _ = pad_packed_sequence(out, self.first)
        else:
            h = h if self.first else h.transpose(0, 1)
            out, last = self.layer(h) if states is None else self.layer(h, states)
        last = last[0] if isinstance(last, tuple) else last
        if "last" in self.form:
            count = 2 if self.layer.bidirectional else 1
            return self.head(last[-count:].transpose(0, 1).flatten(1))
        return self.head(torch.tanh(out).sum(0 if not self.first else 1))

    def _states(self, x):
        if "states" not in self.form:
            return None
        mean = x.mean(1)
        layers = self.layer.num_layers * (1 + self.layer.bidirectional)
        made = [self.start, self.cell] if isinstance(self.layer, nn.LSTM) else [self.start]
        states = tuple(f(mean).view(len(x), layers, -1).transpose(0, 1).contiguous() for f in made)
        return states if len(states) == 2 else states[0]


FORMS = {
    "lstm": (nn.LSTM, "all", {"batch_first": True}),
    "lstm time-major": (nn.LSTM, "all", {}),
    "lstm last": (nn.LSTM, "last", {}),
    "lstm states": (nn.LSTM, "all states", {"batch_first": True, "num_layers": 2, "bidirectional": True}),
    "lstm projected": (nn.LSTM, "last states", {"proj_size": 3, "num_layers": 2, "dropout": 0.5}),
    "lstm packed": (nn.LSTM, "packed", {"batch_first": True, "bidirectional": True}),
    "lstm packed last states": (nn.LSTM, "packed last states", {"num_layers": 2}),
    "gru last": (nn.GRU, "last", {"batch_first": True, "bidirectional": True, "bias": False}),
    "gru packed states": (nn.GRU, "packed states", {}),
    "rnn": (nn.RNN, "all states", {"nonlinearity": "relu"}),
    "rnn packed last": (nn.RNN, "packed last", {"batch_first": True}),
}  # fmt: skip


def loss(model, batch):
    *inputs, y = batch
    return cross_entropy(model(*inputs), y)


def split(data, sizes):
    return list(zip(*(part.split(sizes) for part in data), strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("k", [None, 40])
@pytest.mark.parametrize("name", FORMS)
def test_recurrent_layers(tmp_path, name, k):
    torch.manual_seed(0)
    kind, form, options = FORMS[name]
    model = Sequences(kind, form, **options)
    lengths = torch.tensor([2, 5, 1, 4, 3, 5, 3, 4])
    x = torch.randn(N, T, WIDTH)
    x[torch.arange(T) >= lengths[:, None]] = 0
    data = (x, lengths, torch.arange(N) % 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = select_layers(model, None).layers
    assert "recurrent" in {layer.kind for layer in layers}
    store = extract_gradients(model, loss, split(data, [5, 1, 2]), tmp_path / "s.zarr", dtype="float32",
                              compressor=Dropout(k=k or sum(layer.entries for layer in layers)),
                              modules="layer" if k else None)  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, split(data, [1] * N))


def test_the_model_is_left_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = Sequences(nn.LSTM, "last", num_layers=2, dropout=0.5).eval()
    data = torch.randn(N, T, WIDTH), torch.full((N,), T), torch.arange(N) % 3
    extract_gradients(model, loss, [data], tmp_path / "s.zarr", compressor=Dropout(k=20))
    assert model.layer.dropout == 0.5
    assert not any(module.training for module in model.modules())


def test_a_batch_on_the_other_axis_is_left_out(tmp_path):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(WIDTH, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0].sum(1))

    data = torch.randn(5, 3, WIDTH), torch.arange(5) % 3  # five samples, taken for five steps
    with pytest.warns(OocInfluenceWarning, match=r"layer \(it cannot be run one sample at a time, 91.1%\)"):
        store = extract_gradients(Wrong(), loss, [data], tmp_path / "s.zarr", compressor=Dropout(k=20))
    assert [module.layer.name for module in store.mask.modules] == ["head"]


class Bags(nn.Module):
    """Bags of words in one of the forms that the layer takes."""

    def __init__(self, form, **options):
        super().__init__()
        self.form, self.last = form, options.get("include_last_offset", False)
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)

    def forward(self, ids, lengths, weights):
        own = {"per_sample_weights": weights.to(self.bag.weight.dtype)} if "weights" in self.form else {}
        if "offsets" not in self.form:
            return self.head(torch.tanh(self.bag(ids, **own)))
        there = torch.arange(ids.shape[1]) < lengths[:, None]
        offsets = lengths.cumsum(0) - lengths
        if self.last:
            offsets = torch.cat([offsets, lengths.sum()[None]])
        own = {name: value[there] for name, value in own.items()}
        return self.head(torch.tanh(self.bag(ids[there], offsets, **own)))


BAGS = {
    "rows": ("rows", {"mode": "sum"}),
    "mean": ("rows", {"mode": "mean", "padding_idx": 2}),
    "weights": ("rows weights", {"mode": "sum"}),
    "offsets": ("offsets", {}),
    "offsets, last": ("offsets", {"mode": "sum", "include_last_offset": True, "padding_idx": 2}),
    "offsets, weights": ("offsets weights", {"mode": "sum", "include_last_offset": True}),
    "maximum": ("rows", {"mode": "max"}),
}  # fmt: skip


@pytest.mark.parametrize("sampling", [None, "uniform", "importance"])
@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings(tmp_path, name, sampling):
    torch.manual_seed(0)
    form, options = BAGS[name]
    model, fallback = Bags(form, **options), name == "maximum"
    lengths = torch.tensor([2, 5, 1, 0, 3, 5, 3, 4])
    data = (torch.randint(0, 9, (N, T)), lengths, torch.rand(N, T), torch.arange(N) % 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = select_layers(model, None, fallback=fallback).layers
    assert {layer.kind for layer in layers} == {"linear", "func" if fallback else "embedding_bag"}
    compressor = Dropout(k=20, sampling=sampling) if sampling else Dropout(k=sum(layer.entries for layer in layers))
    store = extract_gradients(model, loss, split(data, [5, 1, 2]), tmp_path / "s.zarr", dtype="float32",
                              compressor=compressor, fallback=fallback)  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, split(data, [1] * N))

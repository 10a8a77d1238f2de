"""Every layer kind: at k = p, the rows are torch.func's per-sample gradients."""

from __future__ import annotations

import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose
from torch import nn
from torch.nn.utils import parametrizations

from ooc_influence import Dropout, OocInfluenceWarning, cross_entropy, extract_gradients, token_cross_entropy
from ooc_influence.errors import MismatchError, UnsupportedModelError
from ooc_influence.extract.selection import select_layers

B = 7


def check(path, model, batches, loss, sample_loss, samples, *, modules=None, fallback=False, kinds=None, k=None):
    """Extract with all entries (or ``k`` of them) and compare with the oracle; return the store."""
    layers = select_layers(model, modules, fallback=fallback).layers
    k = k or sum(layer.entries for layer in layers)
    store = extract_gradients(
        model, loss, batches, path, compressor=Dropout(k=k), modules=modules, fallback=fallback, dtype="float32"
    )
    expected = oracle.keep(oracle.per_sample_gradients(model, sample_loss, samples, layers), store.mask)
    assert np.abs(expected).max() > 0
    for module, first in zip(
        store.mask.modules, np.cumsum([0, *(len(m.rows) for m in store.mask.modules)]), strict=False
    ):
        part = slice(first, first + len(module.rows))
        if len(module.rows):
            scale = np.abs(expected[:, part]).max()
            assert_allclose(
                store.rows()[:, part], expected[:, part], rtol=0, atol=1e-5 * scale, err_msg=module.layer.name
            )
    if kinds is not None:
        assert {layer.kind for layer in layers} == kinds
    return store


def classify(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def classify_one(model, sample):
    x, y = sample
    return F.cross_entropy(model(x[None].double() if x.is_floating_point() else x[None]), y[None])


class Net(nn.Module):
    """A layer between a linear one and a head, on inputs of a shape."""

    def __init__(self, layer, shape):
        super().__init__()
        self.before, self.layer, self.shape = nn.Linear(int(np.prod(shape)), int(np.prod(shape))), layer, shape
        with torch.no_grad():
            size = layer.eval()(torch.zeros(1, *shape)).numel()
        self.head = nn.Linear(size, 5)

    def forward(self, x):
        h = self.before(x).view(len(x), *self.shape)
        return self.head(torch.tanh(self.layer(h)).flatten(1))


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6), "conv"),
    "conv2d-strided": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), padding=(1, 0), dilation=(1, 2)), (4, 7, 6), "conv"),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 6), "conv"),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), (4, 5, 6), "conv"),
    "conv2d-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 6), "conv"),
    "conv1d": (lambda: nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2), (4, 13), "conv"),
    "conv1d-same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (4, 13), "conv"),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 3), "conv"),
    "layer_norm": (lambda: nn.LayerNorm(6), (3, 6), "layer_norm"),
    "layer_norm-axes": (lambda: nn.LayerNorm((3, 6), bias=False), (2, 3, 6), "layer_norm"),
    "rms_norm": (lambda: nn.RMSNorm(6, eps=1e-3), (3, 6), "rms_norm"),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 2), "group_norm"),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), (6, 4), "batch_norm"),
    "batch_norm2d": (lambda: nn.BatchNorm2d(6), (6, 3, 2), "batch_norm"),
}  # fmt: skip


@pytest.mark.parametrize("k", [None, 40])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_kinds(tmp_path, name, k):
    make, shape, kind = LAYERS[name]
    torch.manual_seed(0)
    model = Net(make(), shape)
    for tensor in [*model.layer.parameters(), *model.layer.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if tensor.dim() < 2 else nn.init.normal_(tensor)
    x, y = torch.randn(B, int(np.prod(shape))), torch.arange(B) % 5
    source = list(zip(x.split(3), y.split(3), strict=True))
    check(tmp_path / "s.zarr", model, source, classify, classify_one, list(zip(x, y, strict=True)),
          kinds={"linear", kind}, k=k)  # fmt: skip


class Conv1D(nn.Module):
    """Hugging Face's form of a linear layer."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class OtherRMSNorm(nn.Module):
    """Gemma's form: the weight is added to one."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width)), 1e-4

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class NotRMSNorm(OtherRMSNorm):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.weight


class Quantised(nn.Module):
    """A linear layer with whole numbers for weights."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("weight", torch.randint(-7, 8, (outputs, inputs), dtype=torch.int8))
        self.bias = None

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 8).T


class Decoder(nn.Module):
    """Tokens, positions in one of two forms, a tied head, a layer that is called twice."""

    def __init__(self, positions="row", *, quantised=False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(12, 8)
        self.norm, self.up, self.down = OtherRMSNorm(8), Conv1D(10, 8), nn.Linear(10, 8)
        self.again = Quantised(8, 8) if quantised else nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.positions = positions

    def forward(self, x):
        at = torch.arange(x.shape[1])
        h = self.tokens(x) + self.places(at if self.positions == "row" else at[None])
        h = self.again(h + self.down(torch.tanh(self.up(self.norm(h)))))
        return self.head(self.again(torch.tanh(h)).cumsum(1))


LENGTHS = [10, 3, 7, 2, 5, 10, 1]


def sentences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 11, (B, 10), generator=generator)
    y = torch.randint(0, 11, (B, 10), generator=generator)
    for row, length in enumerate(LENGTHS):
        x[row, length:], y[row, length:] = 0, -100
    return x, y


def predict(model, batch):
    return token_cross_entropy(model(batch[0]), batch[1])


def predict_one(model, sample):
    """Without the padding."""
    x, y = sample
    length = int((y != -100).sum())
    return F.cross_entropy(model(x[None, :length])[0], y[:length])


@pytest.mark.parametrize("k", [None, 100])
@pytest.mark.parametrize("positions", ["row", "batch of one"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_decoder_with_tied_and_repeated_layers(tmp_path, positions, quantised, k):
    torch.manual_seed(0)
    model = Decoder(positions, quantised=quantised)
    x, y = sentences()
    source = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]
    kinds = {"embedding", "rms_norm", "transposed_linear", "linear"}
    names = ["tokens", "places", "norm", "up", "down"] if quantised else None
    store = check(tmp_path / "s.zarr", model, source, predict, predict_one, list(zip(x, y, strict=True)),
                  kinds=kinds, k=k, modules=names and [*names, "head"])  # fmt: skip
    assert store.mask.modules[0].layer.tied == ("head",)
    model.head.weight = nn.Parameter(model.tokens.weight.detach().clone())
    with pytest.raises(MismatchError, match="share the weight"):
        extract_gradients(model, predict, source, tmp_path / "q.zarr", like=store, check_model=False)


def test_a_quantised_layer_is_tapped(tmp_path):
    """Its kept entries are those of a float layer with the same weight."""
    torch.manual_seed(0)
    coded = nn.Sequential(nn.Linear(6, 8), Quantised(8, 5))
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=False))
    with torch.no_grad():
        plain[0].load_state_dict(coded[0].state_dict())
        plain[1].weight.copy_(coded[1].weight / 8)
    source = [(torch.randn(B, 6), torch.arange(B) % 5)]
    rows = [
        extract_gradients(
            model, classify, source, tmp_path / name, compressor=Dropout(k=96), dtype="float32", modules="*"
        ).rows()
        for model, name in ((coded, "coded.zarr"), (plain, "plain.zarr"))
    ]
    assert_allclose(rows[0], rows[1], atol=1e-6)


class Adapter(nn.Module):
    """A frozen layer with a trained low-rank one beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_of_a_partly_frozen_model_the_trained_layers_are_tapped(tmp_path):
    torch.manual_seed(0)
    model = Adapter()
    x, y = torch.randn(B, 6), torch.arange(B) % 5
    store = check(tmp_path / "s.zarr", model, [(x, y)], classify, classify_one, list(zip(x, y, strict=True)))
    assert [module.layer.name for module in store.mask.modules] == ["down", "up"]
    assert store.attrs["covered"] == 1
    assert [layer.name for layer in select_layers(model, "*").layers] == ["base", "down", "up"]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("!2.*", "0 1 3"),
        (["!2.*", "!1"], "0 3"),
        (["!1", "?"], "0 3"),
        (["?", "!1"], "0 3"),
        (["2.*", "0", "!2.0"], "0 2.1"),
        (["!none"], "0 1 2.0 2.1 3"),
        (["[!1]"], "0 3"),
    ],
)
def test_a_pattern_that_begins_with_an_exclamation_mark_leaves_layers_out(modules, expected):
    def make(*inner):
        return nn.Sequential(*inner)

    model = make(nn.Linear(3, 3), nn.Linear(3, 3), make(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
    assert " ".join(layer.name for layer in select_layers(model, modules).layers) == expected


def test_what_is_left_out_of_a_partly_frozen_model_adds_no_frozen_layer():
    assert [layer.name for layer in select_layers(Adapter(), "!up").layers] == ["down"]
    assert [layer.name for layer in select_layers(Adapter(), ["*", "!up"]).layers] == ["base", "down"]
    with pytest.raises(UnsupportedModelError, match="widen the selection"):
        select_layers(Adapter(), "!*")


class Scaled(nn.Module):
    """Parameters of its own in an unknown layer, at the top of the model too."""

    def __init__(self, layer):
        super().__init__()
        self.shift, self.layer, self.head = nn.Parameter(torch.randn(6)), layer, nn.Linear(6, 5)

    def forward(self, x):
        h = (x + self.shift).view(len(x), 1, 6).repeat(1, 3, 1)
        h = self.layer(h, h, h)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(h)
        return self.head(torch.tanh(h)).mean(1)


@pytest.mark.parametrize("layer", ["attention", "not a norm", "weight norm", "prelu"])
def test_the_fallback_covers_what_is_left(tmp_path, layer):
    torch.manual_seed(0)
    made = {
        "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        "not a norm": lambda: NotRMSNorm(6),
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        "prelu": nn.PReLU,
    }[layer]()
    model = Scaled(made)
    x, y = torch.randn(B, 6), torch.arange(B) % 5
    samples = list(zip(x, y, strict=True))
    with pytest.warns(OocInfluenceWarning, match=r"not covered: .*the model\) \(Scaled, [0-9.]+%\)"):
        select_layers(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = check(tmp_path / "s.zarr", model, [(x[:4], y[:4]), (x[4:], y[4:])], classify, classify_one, samples,
                      fallback=True, kinds={"func", "linear"})  # fmt: skip
    assert store.attrs["covered"] == 1


def test_the_fallback_needs_layers_that_take_single_samples(tmp_path):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 5)

        def forward(self, x):
            if len(x) < B:
                raise ValueError("a whole batch, please")
            return self.head(x * self.weight)

    source = [(torch.ones(B, 6), torch.arange(B) % 5)]
    with pytest.warns(OocInfluenceWarning, match=r"the model\) \(it cannot be run one sample at a time, 14.6%\)"):
        store = extract_gradients(
            Whole(), classify, source, tmp_path / "s.zarr", compressor=Dropout(k=35), fallback=True
        )
    assert [module.layer.name for module in store.mask.modules] == ["head"]

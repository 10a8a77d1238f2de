"""The self-check: what layers hand over is compared with autograd, and only what agrees is stored."""

from __future__ import annotations

import types
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose
from torch import nn

from ooc_influence import Dropout, Identity, OocInfluenceWarning, cross_entropy, extract_gradients, token_cross_entropy
from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.check import LayersDisagreeError, _factors
from ooc_influence.extract.selection import select_layers

B, T, D, CLASSES = 6, 5, 8, 5
IGNORED = ("ignore:gradients cover", "ignore:no gradient reached")
pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED]


def classify(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def images(n=B):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def tokens(n=B, t=T):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 11, (n, t), generator=generator)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def ones(batches):
    """The same samples, each a batch of its own."""
    return [tuple(part[row : row + 1] for part in batch) for batch in batches for row in range(len(batch[0]))]


def agree(path, model, batches, loss=classify, **options):
    """Extract everything and compare with autograd; return the store."""
    options = {"compressor": Identity(), "dtype": "float32"} | options
    store = extract_gradients(model, loss, batches, path, **options)
    expected = oracle.located_gradients(model, loss, [_double(part) for part in ones(batches)], store.mask)
    assert np.abs(expected).max() > 0
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return store


def _double(batch):
    return tuple(part.double() if part.is_floating_point() else part for part in batch)


class BatchNormAct(nn.BatchNorm2d):
    """An activation inside, as in timm's EfficientNet, MobileNetV3 and DenseNet."""

    def forward(self, x):
        return F.silu(super().forward(x))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class InnerConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):  # noqa: A002 - torch's name
        return super()._conv_forward(input, weight.tanh(), bias)


class GatedRMSNorm(nn.Module):
    """Mamba 2's: correct as an RMSNorm where it is called without a gate."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-5

    def forward(self, x, gate=None):
        x = x if gate is None else x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class BitLinear(nn.Linear):
    """The weight is rounded in the forward pass; its gradient passes the rounding."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).tanh() * scale
        return F.linear(x, rounded, self.bias)


class IdScaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * (1 + ids.unsqueeze(-1) / 3)


class Hashed(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids % self.num_embeddings)


class Vision(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, D, 3), layer, nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)).mean((2, 3)))


class Text(nn.Module):
    def __init__(self, layer=None, embedding=None, gated=False):
        super().__init__()
        self.embed = embedding or nn.Embedding(11, D)
        self.layer, self.head, self.gated = layer or nn.Identity(), nn.Linear(D, CLASSES), gated

    def forward(self, ids):
        h = self.embed(ids)
        return self.head((self.layer(h, h.roll(1, -1)) if self.gated else self.layer(h)).mean(1))


LOOK_ALIKES = {
    "batch norm with activation": (lambda: Vision(BatchNormAct(D)), images, "layer"),
    "standardised convolution": (lambda: Vision(StandardisedConv(D, D, 3)), images, "layer"),
    "convolution by another function": (lambda: Vision(InnerConv(D, D, 3)), images, "layer"),
    "gated norm": (lambda: Text(GatedRMSNorm(D), gated=True), tokens, "layer"),
    "rounded weights": (lambda: Text(BitLinear(D, D)), tokens, "layer"),
    "scaled by id": (lambda: Text(embedding=IdScaled(11, D)), tokens, "embed"),
    "hashed ids": (lambda: Text(embedding=Hashed(4, D)), tokens, "embed"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_class_that_looks_like_a_known_kind(tmp_path, name):
    """It is no such layer: left out and named, or through the fallback with the right values."""
    make, data, layer = LOOK_ALIKES[name]
    torch.manual_seed(0)
    model, (x, y) = make().eval(), data()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    source = [(x[:4], y[:4]), (x[4:], y[4:])]
    if name == "hashed ids":  # known ids go through unchanged, so only the check can see it
        with pytest.raises(LayersDisagreeError, match=r"embed \(Hashed\).*ids below 4"):
            agree(tmp_path / "s.zarr", model, source)
    else:
        store = agree(tmp_path / "s.zarr", model, source)
        left = store.attrs["verification"]["left_out"]
        assert list(left) == [layer]
        own = sum(p.numel() for p in getattr(model, layer).parameters()) / sum(p.numel() for p in model.parameters())
        assert left[layer]["share"] == pytest.approx(own)
        assert store.attrs["verification"]["share"] == pytest.approx(1 - own)
    store = agree(tmp_path / "f.zarr", model, source, fallback=True)
    assert store.attrs["verification"]["share"] == 1
    assert {module.layer.kind for module in store.mask.modules if module.layer.name == layer} == {"func"}


def patched(model):
    """The forward of one object is another than its class's: no class tells."""
    model.layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight.tanh(), self.bias), model.layer)
    return model


def test_only_the_check_sees_a_replaced_forward(tmp_path):
    torch.manual_seed(0)
    model, (x, y) = patched(Text(nn.Linear(D, D))), tokens()
    with pytest.raises(LayersDisagreeError, match=r"layer \(Linear\): a difference of .*--modules '!layer'") as caught:
        extract_gradients(model, classify, [(x, y)], tmp_path / "s.zarr", compressor=Dropout(k=60))
    assert [each.name for each in caught.value.layers] == ["layer"]
    assert not (tmp_path / "s.zarr").exists()
    store = agree(tmp_path / "f.zarr", model, [(x, y)], fallback=True)
    assert store.attrs["adjusted"] == {"without": {}, "fallback": ["layer"]}
    query = extract_gradients(model, classify, [(x, y)], tmp_path / "q.zarr", like=store, dtype="float32")
    assert_allclose(query.rows(), store.rows())
    again = extract_gradients(
        model, classify, [(x, y)], tmp_path / "f.zarr", compressor=Identity(), dtype="float32", fallback=True
    )
    assert again.n == B
    wrong = extract_gradients(
        model, classify, [(x, y)], tmp_path / "w.zarr", compressor=Identity(), dtype="float32", check_gradients=False
    )
    assert wrong.attrs["verification"]["checked"] is False
    with pytest.raises(LayersDisagreeError, match="layer"):  # a query store is checked too
        extract_gradients(model, classify, [(x, y)], tmp_path / "r.zarr", like=wrong)
    with pytest.raises(LayersDisagreeError, match="layer"):  # and a run that resumes
        extract_gradients(
            model, classify, [(x, y), (x, y)], tmp_path / "w.zarr", compressor=Identity(), dtype="float32"
        )


@pytest.mark.parametrize("sampling", ["importance", "grid", "uniform"])
def test_the_check_comes_before_the_pilot(tmp_path, sampling):
    torch.manual_seed(0)
    model, (x, y) = patched(Text(nn.Linear(D, D))), tokens(12)
    compressor = Dropout(k=60, sampling=sampling)
    with pytest.raises(LayersDisagreeError, match=r"layer \(Linear\)"):
        extract_gradients(model, classify, [(x, y)], tmp_path / "s.zarr", compressor=compressor)
    agree(tmp_path / "f.zarr", model, [(x, y)], compressor=compressor, fallback=True)


class Unseen(nn.Module):
    """Weights used without calling their layer."""

    def __init__(self, form):
        super().__init__()
        self.embed, self.places = nn.Embedding(11, D), nn.Embedding(9, D)
        self.up, self.form = nn.Linear(D, D), form
        self.register_buffer("mix", torch.randn(D, 11))

    def forward(self, ids):
        h = self.embed(ids)
        if self.form == "positions":
            h = h + self.places.weight[: ids.shape[1]]
        h = torch.tanh(self.up(h))
        return F.linear(h, self.embed.weight) if self.form == "unembedding" else h @ self.mix


def language(model, batch):
    return token_cross_entropy(model(batch[0])[:, :-1], batch[0][:, 1:])


def decayed(model, batch):
    return language(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


def test_a_weight_that_is_used_without_calling_its_layer(tmp_path):
    torch.manual_seed(0)
    source = [tokens()]
    with pytest.raises(LayersDisagreeError, match=r"embed \(Embedding\): a difference of"):
        agree(tmp_path / "a.zarr", Unseen("unembedding"), source, language)
    with pytest.warns(OocInfluenceWarning, match=r"not covered: places \(its weight is used without calling"):
        store = agree(tmp_path / "b.zarr", Unseen("positions"), source, language)
    assert "places" in store.attrs["verification"]["left_out"]
    with pytest.raises(LayersDisagreeError, match=r"embed .*up|up .*embed"):
        agree(tmp_path / "c.zarr", Unseen(""), source, decayed)


class Positions(nn.Module):
    """One table for all samples, brought to them in several ways."""

    def __init__(self, form):
        super().__init__()
        self.embed, self.places, self.form = nn.Embedding(11, D), nn.Embedding(9, D), form
        self.head = nn.Linear(D, 11)

    def forward(self, ids):
        b, t = ids.shape
        at = self.places(torch.arange(t))
        brought = {
            "plain": lambda: at,
            "none": lambda: at[None],
            "expand": lambda: at.expand(b, t, D),
            "repeat": lambda: at.repeat(b, 1, 1),
            "stack": lambda: torch.stack([at] * b),
        }[self.form]()
        return self.head(torch.tanh(self.embed(ids) + brought).cumsum(1))


@pytest.mark.parametrize("form", ["plain", "none", "expand", "repeat", "stack"])
@pytest.mark.parametrize("first", [T, 3])
def test_positions_looked_up_once(tmp_path, form, first):
    """Also where the first batch has as many samples as tokens: right, or left out by name; never wrong."""
    torch.manual_seed(0)
    model, (x, y) = Positions(form), tokens(8)
    store = agree(tmp_path / "s.zarr", model, [(x[:first], y[:first]), (x[first:], y[first:])], language)
    left = store.attrs["verification"]["left_out"]
    assert not left or list(left) == ["places"]
    assert (form == "plain") <= (not left)
    one_by_one = agree(tmp_path / "t.zarr", model, ones([(x, y)]), language)
    assert one_by_one.attrs["verification"]["share"] == 1


class Relative(nn.Module):
    """A table of relative positions, as T5's: (t, t) ids for all samples."""

    def __init__(self):
        super().__init__()
        self.embed, self.bias, self.value, self.head = (
            nn.Embedding(11, D), nn.Embedding(2 * T, 1), nn.Linear(D, D), nn.Linear(D, 11),
        )  # fmt: skip

    def forward(self, ids):
        at = torch.arange(ids.shape[1])
        scores = self.bias(at[None] - at[:, None] + T).squeeze(-1)
        return self.head(scores.softmax(-1) @ torch.tanh(self.value(self.embed(ids))))


@pytest.mark.parametrize("b", [T, 2, 4])
def test_a_table_of_relative_positions_is_left_out_by_itself(tmp_path, b):
    torch.manual_seed(0)
    model, (x, y) = Relative(), tokens(2 * b)
    with pytest.warns(OocInfluenceWarning, match=r"not covered: bias \(its input has no axis of samples"):
        store = agree(tmp_path / "s.zarr", model, [(x[:b], y[:b]), (x[b:], y[b:])], language)
    assert list(store.attrs["verification"]["left_out"]) == ["bias"]
    agree(tmp_path / "t.zarr", model, ones([(x, y)]), language)


class Windows(nn.Module):
    """Layers that see (b · windows, t, f) and (b · windows, c, h, w)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, D, 2), nn.BatchNorm2d(D)
        self.inner, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x):
        b = len(x)
        windows = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 3, 3)
        h = self.norm(self.conv(windows)).flatten(2).transpose(1, 2)
        h = torch.tanh(self.inner(h))
        return self.head(h.reshape(b, -1, D).mean(1))


@pytest.mark.parametrize("sizes", [(4, 2), (1, 5)])
def test_windows(tmp_path, sizes):
    torch.manual_seed(0)
    x, y = images()
    source = list(zip(x.split(sizes), y.split(sizes), strict=True))
    store = agree(tmp_path / "s.zarr", Windows().eval(), source)
    assert store.attrs["verification"]["share"] == 1


class Chosen(nn.Module):
    """A layer that sees the tokens that are not zero, of all samples one after the other."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, D), nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, ids):
        h, chosen = self.embed(ids), ids != 0
        out = torch.zeros_like(h)
        out[chosen] = torch.tanh(self.inner(h[chosen]))
        return self.head(out.sum(1))


def test_chosen_tokens_are_checked_in_every_batch(tmp_path):
    """2 + 2 tokens, then 3 + 1: as many rows, of other samples."""
    even = torch.tensor([[1, 2, 0, 0], [3, 4, 0, 0]]), torch.tensor([0, 1])
    odd = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]]), torch.tensor([2, 3])
    torch.manual_seed(0)
    model = Chosen()
    with pytest.raises(UnsupportedModelError, match="inner"):
        extract_gradients(model, classify, [even, odd], tmp_path / "s.zarr", compressor=Dropout(k=60))
    agree(tmp_path / "t.zarr", model, ones([even, odd]))


class Noisy(nn.Module):
    """Draws random numbers: a sample alone has another loss, the whole batch with the same state has the same."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)) * torch.rand(len(x), D))


def test_a_model_that_draws_random_numbers(tmp_path):
    torch.manual_seed(0)
    model, x, y = Noisy(), torch.randn(B, D), torch.arange(B) % CLASSES
    store = extract_gradients(model, classify, [(x, y)], tmp_path / "s.zarr", compressor=Dropout(k=60))
    assert store.attrs["verification"]["share"] == 1


@pytest.mark.parametrize("form", ["object", "shared mask as long as the batch"])
def test_batches_that_cannot_be_cut(tmp_path, form):
    """The check then runs the whole batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, CLASSES))
    x, y, weights = torch.randn(B, D), torch.arange(B) % CLASSES, torch.rand(B)

    class Held:
        def __init__(self):
            self.x, self.y = x, y

    def loss(model, batch):
        if form == "object":
            return cross_entropy(model(batch.x), batch.y)
        return cross_entropy(model(batch[0]) * batch[2].sum(), batch[1])

    source = [Held() if form == "object" else (x, y, weights)]
    store = extract_gradients(model, loss, source, tmp_path / "s.zarr", compressor=Identity(), dtype="float32")
    assert store.attrs["verification"]["share"] == 1
    assert store.attrs["verification"]["worst_error"] < 1e-5


def test_what_is_recorded(tmp_path):
    torch.manual_seed(0)
    model, (x, y) = Text(BitLinear(D, D)), tokens()
    model.embed.weight.grad = torch.ones(11, D)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.warns(OocInfluenceWarning, match=r"cover 6[0-9.]+%"):
        store = extract_gradients(model, classify, [(x, y)], tmp_path / "s.zarr", compressor=Dropout(k=20))
    facts = store.attrs["verification"]
    assert facts["checked"]
    assert 0 < facts["share"] < 1
    assert facts["worst_error"] < facts["tolerance"] == 1e-3
    assert facts["worst_layer"] in ("embed", "head")
    assert facts["left_out"]["layer"]["reason"] == "BitLinear"
    assert (model.embed.weight.grad == 1).all()
    assert model.head.weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("losses", [[1.0, 1.0], [3.0, 1e-9], [0.01, 40.0], [0.0, 2.0], [2.0, -2.1]])
def test_factors_do_not_round(losses):
    """Through a deep model in bfloat16, gradients times 0.7 would be rounded otherwise than those times one."""
    found = _factors(torch.tensor(losses))
    assert list(found) == [0, 1]
    assert found[0] != found[1]
    assert all(abs(np.frexp(value)[0]) == 0.5 for value in found.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tolerances_are_of_the_model_s_dtype(tmp_path, dtype):
    torch.manual_seed(0)
    model, (x, y) = Text(nn.Linear(D, D)).to(dtype), tokens()
    store = extract_gradients(model, classify, [(x, y)], tmp_path / "s.zarr", compressor=Dropout(k=20))
    facts = store.attrs["verification"]
    assert facts["share"] == 1
    assert facts["worst_error"] <= facts["tolerance"] / 10


class BitFit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.up, self.group = (
            nn.Conv2d(3, D, 3), nn.LayerNorm(D), nn.Linear(D, D), nn.GroupNorm(2, D),
        )  # fmt: skip
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x):
        h = self.group(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.up(self.norm(h))).mean(1))


@pytest.mark.parametrize("trained", ["bias", "weight"])
def test_of_a_layer_that_is_partly_frozen_the_trained_entries_are_kept(tmp_path, trained):
    torch.manual_seed(0)
    model, source = BitFit(), [images()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for number, compressor in enumerate((Identity(), Dropout(k=30, sampling="importance"))):
        store = agree(tmp_path / f"{number}.zarr", model, source, compressor=compressor)
        assert store.mask.p == count
        assert store.attrs["verification"]["share"] == store.attrs["covered"] == 1
    model.requires_grad_(True)
    query = extract_gradients(model, classify, source, tmp_path / "q.zarr", like=store, dtype="float32")
    assert_allclose(query.rows(), store.rows(), rtol=1e-6, atol=1e-7)


class Decoder(nn.Module):
    """A masked language model's head: its weight the embedding's, its bias registered by the head above it."""

    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.decoder, self.bias = nn.Linear(D, 11), nn.Parameter(torch.randn(11))
            self.decoder.weight, self.decoder.bias = weight, self.bias

        def forward(self, h):
            return self.decoder(h)

    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(11, D), nn.Linear(D, D)
        self.head = self.Head(self.embed.weight)

    def forward(self, ids):
        return self.head(torch.tanh(self.up(self.embed(ids)).cumsum(1)))


def test_a_tied_decoder_with_a_bias_of_its_own(tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = agree(tmp_path / "s.zarr", Decoder(), [tokens()], language)
    assert store.attrs["verification"]["share"] == 1
    assert [(m.layer.name, m.layer.kind, m.layer.tied) for m in store.mask.modules] == [
        ("embed", "embedding", ("head.decoder",)), ("up", "linear", ()), ("head.decoder", "bias", ()),
    ]  # fmt: skip
    agree(tmp_path / "t.zarr", Decoder(), [tokens(12)], language, compressor=Dropout(k=40, sampling="importance"))


def shared_pair(kind):
    one, other = {
        "both": lambda: (nn.Linear(D, D), nn.Linear(D, D)),
        "weight": lambda: (nn.Linear(D, D), nn.Linear(D, D)),
        "bias": lambda: (nn.Linear(D, D), nn.Linear(D, D)),
        "norm": lambda: (nn.LayerNorm(D), nn.LayerNorm(D)),
        "norm weight": lambda: (nn.LayerNorm(D), nn.RMSNorm(D)),
    }[kind]()
    if kind != "bias":
        other.weight = one.weight
    if kind in ("both", "bias", "norm"):
        other.bias = one.bias
    return one, other


class Twins(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, (self.one, self.other), self.head = nn.Embedding(11, D), shared_pair(kind), nn.Linear(D, CLASSES)

    def forward(self, ids):
        return self.head(torch.tanh(self.other(torch.tanh(self.one(self.embed(ids))))).mean(1))


@pytest.mark.parametrize("kind", ["both", "weight", "bias", "norm", "norm weight"])
def test_layers_that_share_parameters(tmp_path, kind):
    torch.manual_seed(0)
    model = Twins(kind)
    nn.init.uniform_(model.one.bias, 0.5, 1)
    store = agree(tmp_path / "s.zarr", model, [tokens()])
    assert store.attrs["verification"]["share"] == 1
    assert store.mask.p == sum(p.numel() for p in model.parameters())


class TwinConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, D, 1), nn.Conv2d(D, D, 3), nn.Conv2d(D, D, 3, padding=1)
        self.other.weight, self.head = self.one.weight, nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.head(self.other(torch.tanh(self.one(self.stem(x)))).mean((2, 3)))


def test_convolutions_that_share_a_weight(tmp_path):
    torch.manual_seed(0)
    model = TwinConvs()
    store = agree(tmp_path / "s.zarr", model, [images()])
    assert store.mask.p == sum(p.numel() for p in model.parameters())


class Foreign(nn.Module):
    """Uses a weight in its own way."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, h):
        return h @ self.weight.tanh()


def test_a_weight_that_an_unknown_layer_shares_is_left_out_altogether(tmp_path):
    torch.manual_seed(0)
    linear = nn.Linear(D, D)
    model = Text(nn.Sequential(linear, Foreign(linear.weight)))
    store = agree(tmp_path / "s.zarr", model, [tokens()])
    assert "layer.0" in store.attrs["verification"]["left_out"]
    total = sum(p.numel() for p in model.parameters())
    assert store.attrs["verification"]["share"] == pytest.approx(1 - D * D / total)
    store = agree(tmp_path / "f.zarr", model, [tokens()], fallback=True)
    assert store.attrs["verification"]["share"] == 1
    assert select_layers(model, None, fallback=True).share == 1


class Folded(nn.Module):
    """Layers see (b · t, f): another t is another way of folding."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, D), nn.Linear(D, D), nn.Linear(D, 11)

    def forward(self, ids):
        h = torch.tanh(self.inner(self.embed(ids).flatten(0, 1)))
        return self.head(h.view(*ids.shape, D).cumsum(1))


@pytest.mark.parametrize("first", [1, 3])
def test_layers_that_fold_tokens_with_few_entries_kept(tmp_path, first):
    """Where nothing is kept of a layer, it is not tapped after the first batch, and no later check misses it."""
    torch.manual_seed(0)
    model, (x, y), (longer, more) = Folded(), tokens(), tokens(4, 9)
    source = [(x[:first], y[:first]), (x[first:], y[first:]), (longer, more)]
    for k in (1, 3):
        store = agree(tmp_path / f"{k}.zarr", model, source, language, compressor=Dropout(k=k, seed=3))
        assert any(not len(module.rows) for module in store.mask.modules)
        assert store.attrs["verification"]["share"] == 1


class OwnLinear(nn.Linear):
    """Falcon's: another forward of the same function."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_linear_layer_written_otherwise(tmp_path):
    torch.manual_seed(0)
    store = agree(tmp_path / "s.zarr", Text(OwnLinear(D, D)), [tokens()])
    assert store.attrs["verification"]["share"] == 1


def test_a_head_that_registers_its_decoder_s_bias_needs_no_fallback(tmp_path):
    torch.manual_seed(0)
    store = agree(tmp_path / "s.zarr", Decoder(), [tokens()], language, fallback=True)
    assert store.attrs["verification"]["share"] == 1
    assert "func" not in {module.layer.kind for module in store.mask.modules}


class Keys(nn.Module):
    """The bias of attention's keys has a gradient of zero, but for rounding."""

    def __init__(self):
        super().__init__()
        self.embed, self.query, self.key = nn.Embedding(11, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 11)

    def forward(self, ids):
        h = self.embed(ids)
        scores = self.query(h) @ self.key(h).transpose(1, 2)
        return self.head(scores.softmax(-1) @ h)


@pytest.mark.parametrize("seed", range(5))
def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference(tmp_path, seed):
    torch.manual_seed(seed)
    store = extract_gradients(Keys(), language, [tokens(8, 40)], tmp_path / "s.zarr", compressor=Dropout(k=200))
    assert store.attrs["verification"]["share"] == 1


class Caching(nn.Module):
    """LeViT's attention: what it makes of a parameter is computed once in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.kept = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D)), None

    def train(self, mode=True):
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.kept is None or self.training:
            self.kept = self.bias.tanh()
        return x @ self.weight + self.kept


def test_what_a_layer_keeps_in_evaluation_mode_does_not_hide_a_gradient(tmp_path):
    torch.manual_seed(0)
    model = Text(Caching()).eval()
    store = extract_gradients(model, classify, [tokens()], tmp_path / "s.zarr", compressor=Dropout(k=20))
    assert list(store.attrs["verification"]["left_out"]) == ["layer"]
    with pytest.raises(LayersDisagreeError, match=r"layer \(Caching\)"):
        extract_gradients(model, classify, [tokens()], tmp_path / "f.zarr", compressor=Dropout(k=20), fallback=True)


class OfTwo(nn.Module):
    """Two samples by themselves have the same losses as in a batch, and other gradients."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x):
        h = self.layer(x)
        return self.head(torch.tanh(h + (h - h.detach()) * (0.1 if len(x) == 2 else 0.0)))


def test_what_is_recorded_is_of_the_comparison_that_decided(tmp_path):
    torch.manual_seed(0)
    source = [(torch.randn(B, D), torch.arange(B) % CLASSES)]
    store = extract_gradients(OfTwo(), classify, source, tmp_path / "s.zarr", compressor=Dropout(k=60))
    assert store.attrs["verification"]["share"] == 1
    assert store.attrs["verification"]["worst_error"] < 1e-5

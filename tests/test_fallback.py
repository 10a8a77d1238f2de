"""Layers that are run again sample by sample, against float64 autograd one sample at a time."""

from __future__ import annotations

import math
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from ooc_influence import Dropout, OocInfluenceWarning, cross_entropy, extract_gradients, token_cross_entropy
from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries.func import FuncEntries, rows_of
from ooc_influence.extract.selection import select_layers

B = T = 6  # as many samples as tokens: what is only as long as the batch is not taken for it
WIDTH = 4


def loss(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


class Net(nn.Module):
    """A layer of a class of its own between two others, on (b, t, features)."""

    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.head = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 3)
        self.register_buffer("table", torch.randn(T, 1))
        self.register_buffer("mask", torch.randn(T, T).masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf))

    def forward(self, x):
        return self.head(torch.tanh(self.layer(self, self.before(x))).mean(1))


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))


class Table(Weighted):
    """Positions, which all samples share, as an argument."""

    def forward(self, x, table):
        return torch.tanh(x @ self.scale * table) + self.shift * table


class Masked(Weighted):
    """Attention with a mask that all samples share."""

    def forward(self, x, mask=None, *, lengths=None):
        weights = (x @ self.scale @ x.transpose(1, 2) + mask).softmax(-1)
        return weights @ x + self.shift * lengths[:, None, None]


class TimeMajor(Weighted):
    """Tokens on axis 0, samples on axis 1, in and out."""

    def forward(self, x):
        return (x @ self.scale).cumsum(0) * self.shift, x.mean(0)


class Folded(Weighted):
    """Samples and tokens in one axis."""

    def forward(self, x):
        return torch.relu(x @ self.scale) * self.shift


class InPlace(Weighted):
    """Its output is changed in place afterwards."""

    def forward(self, x):
        return F.linear(x, self.scale, self.shift) * 2


class Apart(nn.Module):
    """Parameters in containers, which are never called."""

    def __init__(self):
        super().__init__()
        self.many = nn.ParameterDict({"a": nn.Parameter(torch.randn(WIDTH, WIDTH)), "b": torch.randn(WIDTH)})
        self.listed = nn.ParameterList([torch.randn(WIDTH, 2), torch.randn(2, WIDTH)])

    def forward(self, x):
        return (x @ self.many["a"] + self.many["b"]) * torch.tanh(x @ self.listed[0] @ self.listed[1])


class Call(nn.Module):
    """Calls a layer as a test says."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, net, x):
        return self.how(self.inner, net, x)


LAYERS = {
    "table": (Table, lambda layer, net, x: layer(x, net.table)),
    "mask": (Masked, lambda layer, net, x: layer(x, mask=net.mask, lengths=x.detach().abs().mean((1, 2)))),
    "time-major": (TimeMajor, lambda layer, net, x: layer(x.transpose(0, 1))[0].transpose(0, 1)),
    "time-major, both": (TimeMajor, lambda layer, net, x: sum(
        v.transpose(0, 1) if v.dim() == 3 else v[:, None] for v in layer(x.transpose(0, 1)))),
    "attention": (lambda: nn.MultiheadAttention(WIDTH, 2), lambda layer, net, x: layer(
        *[x.transpose(0, 1)] * 3, attn_mask=net.mask, key_padding_mask=torch.zeros(x.shape[:2], dtype=x.dtype)
    )[0].transpose(0, 1)),
    "folded": (Folded, lambda layer, net, x: layer(x.flatten(0, 1)).view_as(x)),
    "in place": (InPlace, lambda layer, net, x: layer(x).add_(x).mul_(0.5)),
    "containers": (Apart, lambda layer, net, x: layer(x)),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    kind, how = LAYERS[name]
    return Net(Call(kind(), how))


def samples(n=3 * B + 1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, T, WIDTH, generator=generator), torch.arange(n) % 3


@pytest.mark.parametrize("k", [None, 12])
@pytest.mark.parametrize("name", LAYERS)
def test_a_samples_part_is_found(tmp_path, name, k):
    """Batches as long as the tokens are many, longer ones, and of one sample."""
    model, (x, y) = make(name), samples()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = select_layers(model, None, fallback=True).layers
    assert {layer.kind for layer in layers} == {"linear", "func"}
    sizes = [B, 2 * B, 1]
    source = list(zip(x.split(sizes), y.split(sizes), strict=True))
    store = extract_gradients(model, loss, source, tmp_path / "s.zarr", fallback=True, dtype="float32",
                              modules="layer*" if k else None,
                              compressor=Dropout(k=k or sum(layer.entries for layer in layers)))  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, list(zip(x.split(1), y.split(1), strict=True)))


class Everywhere(Weighted):
    """Alike on every axis: from a square batch nothing tells samples and tokens apart."""

    def forward(self, x):
        return torch.tanh(x @ self.scale) * self.shift


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("first", [2, 5, B])
def test_a_square_batch_is_read_by_the_probe_or_as_the_batches_before(tmp_path, first, axis):
    torch.manual_seed(0)
    model = Net(Call(Everywhere(), lambda layer, net, x: layer(x.transpose(0, axis)).transpose(0, axis)))
    x, y = samples(first + 2 * B)
    sizes = [first, B, 3, 3]
    source = list(zip(x.split(sizes), y.split(sizes), strict=True))
    store = extract_gradients(model, loss, source, tmp_path / "s.zarr", fallback=True, dtype="float32",
                              compressor=Dropout(k=20))  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, list(zip(x.split(1), y.split(1), strict=True)))


def test_autocast_holds_when_a_layer_is_run_again(tmp_path):
    def cast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch).float()

    model, (x, y) = make("in place"), samples()
    store = extract_gradients(model, cast, [(x, y)], tmp_path / "s.zarr", fallback=True, dtype="float32",
                              modules="layer*", compressor=Dropout(k=20))  # fmt: skip
    oracle.assert_rows_are_located(
        store, model, loss, list(zip(x.split(1), y.split(1), strict=True)), tolerance=0.05
    )  # fmt: skip


def test_importance_of_a_fallback_layer(tmp_path):
    model, (x, y) = make("table"), samples()
    store = extract_gradients(model, loss, [(x, y)], tmp_path / "s.zarr", fallback=True, dtype="float32",
                              compressor=Dropout(k=30, sampling="importance"))  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, list(zip(x.split(1), y.split(1), strict=True)))


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_that_mix_samples_are_refused(tmp_path, axis):
    class Mixing(Weighted):
        def forward(self, x):
            return (x - x.mean(axis, keepdim=True)) @ self.scale * self.shift

    how = {0: lambda layer, net, x: layer(x), 1: lambda layer, net, x: layer(x.transpose(0, 1)).transpose(0, 1)}[axis]
    x, y = samples(B)
    with pytest.raises(UnsupportedModelError, match=r"that sample alone|'layer.inner' to run for one sample at a time"):
        extract_gradients(Net(Call(Mixing(), how)), loss, [(x, y)], tmp_path / "s.zarr", fallback=True,
                          compressor=Dropout(k=20))  # fmt: skip


def test_a_samples_gradient_at_a_time_major_layer_is_its_own(tmp_path):
    """Samples mixed behind a layer with the batch on axis 1 are found there."""

    def mixed(layer, net, x):
        h = layer(x.transpose(0, 1))[0].transpose(0, 1)
        return h + h.flip(0)

    torch.manual_seed(0)
    x, y = samples(B)
    with pytest.raises(UnsupportedModelError, match="depend on that sample alone"):
        extract_gradients(Net(Call(TimeMajor(), mixed)), loss, [(x, y)], tmp_path / "s.zarr", fallback=True,
                          modules="layer.inner", compressor=Dropout(k=20))  # fmt: skip


def test_arguments_changed_after_the_call_are_noticed(tmp_path):
    def changed(layer, net, x):
        h = x * 1
        out = layer(h)
        h.add_(1)
        return out

    x, y = samples(B)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        extract_gradients(Net(Call(Folded(), changed)), loss, [(x, y)], tmp_path / "s.zarr", fallback=True,
                          compressor=Dropout(k=20))  # fmt: skip


def test_layers_of_more_than_32_bits_of_parameters():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Parameter(torch.empty(3, 2**30)), nn.Parameter(torch.empty(8))

        def forward(self, x):
            return x * self.table[0, 0]

    with torch.device("meta"):
        layer = Large()
    shape = FuncEntries.describe("layer", layer)
    assert shape.entries == 3 * 2**30 + 8
    assert shape.shape[0] > 1
    assert max(shape.shape) < 2**31
    rows, cols = (np.array([size - 1], np.int32) for size in shape.shape)
    (located,) = [each for each in FuncEntries.locate(shape, layer, rows, cols) if len(each.entries)]
    assert (located.parameter, located.positions.tolist()) == ("last", [7])
    assert rows_of(2**31 - 1) == 1  # as stores have always had it
    assert rows_of(2**31 + 11) == 0  # a prime number


def test_a_layer_that_no_matrix_holds_is_left_out_with_the_reason():
    class Prime(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.empty(2**31 + 11))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Prime())
    with pytest.warns(OocInfluenceWarning, match="2147483659 parameters no matrix with 32-bit rows and columns holds"):
        assert [layer.name for layer in select_layers(model, None, fallback=True).layers] == ["0"]


MIXERS = {
    "mamba": ("MambaConfig", {"state_size": 4, "time_step_rank": 3}),
    "mamba2": ("Mamba2Config", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}),
    "qwen3-next": ("Qwen3NextConfig", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2,
    }),
}  # fmt: skip


def mixer(name):
    transformers = pytest.importorskip("transformers")
    kind, options = MIXERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if name == "qwen3-next":
        model.set_experts_implementation("eager")  # the default one takes no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "norm.weight")):
                parameter.normal_(std=0.3)
    return model


def tokens_loss(model, ids):
    return token_cross_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("name", MIXERS)
def test_what_a_mixer_uses_without_calling(tmp_path, name):
    """Convolution and step projection of state space layers; the caches that their calls fill are not seen again."""
    model = mixer(name)
    with pytest.warns(OocInfluenceWarning, match=r"conv1d \(used inside \w+ without being called, [0-9.]+%\)"):
        assert not any("conv1d" in layer.name or "dt_proj" in layer.name for layer in select_layers(model, None).layers)
    ids = torch.randint(0, 13, (4, 7), generator=torch.Generator().manual_seed(1))
    modules = ["*.mixer", "*.linear_attn", "*.in_proj*", "*.out_proj", "*.x_proj"]
    layers = select_layers(model, modules, fallback=True).layers
    store = extract_gradients(model, tokens_loss, list(ids.split([3, 1])), tmp_path / "s.zarr", dtype="float32",
                              modules=modules, fallback=True,
                              compressor=Dropout(k=sum(layer.entries for layer in layers)))  # fmt: skip
    (own,) = [layer for layer in layers if layer.kind == "func"]
    covered = FuncEntries.parameters(dict(model.named_modules())[own.name])
    assert {"conv1d.weight", "A_log"} < set(covered)
    tolerance = 1e-4 if name == "qwen3-next" else 2e-5  # its delta rule computes in float32, also for the oracle
    oracle.assert_rows_are_located(store, model, tokens_loss, list(ids.split(1)), tolerance=tolerance)

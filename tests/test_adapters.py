"""Adapters of PEFT, against float64 autograd one sample at a time."""

from __future__ import annotations

import warnings

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from ooc_influence import Dropout, extract_gradients, token_cross_entropy
from ooc_influence.extract.selection import select_layers

peft = pytest.importorskip("peft")
VOCAB, WIDTH, B, T = 11, 8, 5, 6


class Lm(nn.Module):
    """A model of tokens with layers that adapters take: an embedding, linear layers, a convolution."""

    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.conv, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(WIDTH, VOCAB)

    def forward(self, x):
        h = self.tokens(x)
        h = h + self.down(torch.tanh(self.up(h)))
        return self.head(h + self.conv(h[:, None])[:, 0]).cumsum(1)


def loss(model, batch):
    return token_cross_entropy(model(batch), batch)


METHODS = {
    "lora": (lambda: peft.LoraConfig(r=2, target_modules=["up", "down", "tokens"]), {"linear", "adapter"}),
    "dora": (lambda: peft.LoraConfig(r=2, target_modules=["up", "down"], use_dora=True), {"adapter"}),
    "ia3": (lambda: peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]), {"adapter"}),
    "vera": (lambda: peft.VeraConfig(r=4, target_modules=["up", "down"]), {"adapter"}),
    "loha": (lambda: peft.LoHaConfig(r=2, target_modules=["up", "conv"]), {"adapter"}),
    "lokr": (lambda: peft.LoKrConfig(r=2, target_modules=["up", "down"], decompose_both=True), {"adapter"}),
    "adalora": (lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["up"]), {"adapter"}),
    "fourier": (lambda: peft.FourierFTConfig(n_frequency=5, target_modules=["up", "down"]), {"adapter"}),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["up"]), {"adapter"}),
    "oft": (lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["up"]), {"adapter"}),
    "tokens": (lambda: peft.TrainableTokensConfig(token_indices=[1, 4], target_modules=["tokens"]), {"adapter"}),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = peft.get_peft_model(Lm(), METHODS[name][0]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # half of them start at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens():
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning:peft")
@pytest.mark.parametrize("name", METHODS)
def test_trained_adapters_are_covered_by_default(tmp_path, name):
    model = make(name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = select_layers(model, None)
    assert {layer.kind for layer in found.layers} == METHODS[name][1]
    assert found.share == 1
    assert sum(layer.entries for layer in found.layers) == trained
    store = extract_gradients(model, loss, list(tokens().split([3, 2])), tmp_path / "s.zarr", dtype="float32",
                              compressor=Dropout(k=trained))  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, tokens().split(1))


def test_a_model_loaded_for_inference_has_the_same_entries(tmp_path):
    model = make("ia3")
    layers = select_layers(model, None).layers
    train = extract_gradients(model, loss, [tokens()], tmp_path / "s.zarr", dtype="float32",
                              compressor=Dropout(k=sum(layer.entries for layer in layers)))  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    query = extract_gradients(model, loss, [tokens()], tmp_path / "q.zarr", dtype="float32", like=train)
    np.testing.assert_array_equal(query.rows(), train.rows())


def test_of_several_adapters_the_active_one_is_covered(tmp_path):
    model = make("ia3")
    model.add_adapter("other", METHODS["ia3"][0]())
    one = [(layer.name, layer.shape) for layer in select_layers(model, None).layers]
    model.set_adapter("other")
    assert [(layer.name, layer.shape) for layer in select_layers(model, None).layers] == one
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    store = extract_gradients(model, loss, [tokens()], tmp_path / "s.zarr", dtype="float32", compressor=Dropout(k=24))
    oracle.assert_rows_are_located(store, model, loss, tokens().split(1))

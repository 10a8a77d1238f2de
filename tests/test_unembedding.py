"""Losses without whole logits: the same losses, gradients and rows; other models keep their logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_hf import MARKS, make_model, texts, transformers, write

import ooc_influence as ooc
from ooc_influence import hf
from ooc_influence.hf import unembedding
from ooc_influence.hf.losses import CausalLoss, SignedLoss

pytestmark = MARKS


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**{"vocab_size": 45, "tie_word_embeddings": True, **sizes, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def batch(lengths=(9, 4, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 45, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.bool(), tokens, -100)
    labels[:, :3] = -100
    signs = torch.where(torch.rand(tokens.shape, generator=generator) < 0.5, -1.0, 1.0)
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels, "signs": signs}


@pytest.fixture
def always(monkeypatch):
    """Without logits, a few positions at a time."""
    monkeypatch.setattr(unembedding, "LARGEST", 0)
    monkeypatch.setattr(unembedding, "_AT_ONCE", 2 * 3 * 45 * 4)


@pytest.mark.parametrize("loss", [CausalLoss(), CausalLoss("sum"), SignedLoss(), SignedLoss("ggn", mean=False)])
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, loss):
    model, values = llama(), batch()
    parameters = list(model.parameters())

    def both():
        losses = loss(model, values)
        weights = torch.linspace(1, 2, len(losses))
        return losses.detach(), torch.autograd.grad((losses * weights).sum(), parameters)

    expected, wanted = both()
    monkeypatch.setattr(unembedding, "LARGEST", 0)
    monkeypatch.setattr(unembedding, "_AT_ONCE", 2 * 3 * 45 * 4)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    found, gradients = both()
    handle.remove()
    assert max(calls) == 2  # positions
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    if isinstance(loss, CausalLoss):
        torch.testing.assert_close(loss.of_tokens(model, values).sum(1), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("basis", ["parameters", "kronecker"])
def test_rows_and_token_shares_are_the_same(tmp_path, monkeypatch, basis):
    """The unembedding's own entries too: it is the embedding, and called for each stretch."""
    name = make_model(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in texts(12)])
    kept = ooc.Dropout(k=300, basis="kronecker" if basis == "kronecker" else None)
    stores = []
    for number, largest in enumerate((2**40, 0)):
        monkeypatch.setattr(unembedding, "LARGEST", largest)
        monkeypatch.setattr(unembedding, "_AT_ONCE", 4 * 12 * 45 * 4)
        stores.append(hf.extract(name, data, tmp_path / f"s{number}", compressor=kept, dtype="float32"))
    whole, cut = stores
    assert_allclose(cut.rows(), whole.rows(), rtol=1e-3, atol=1e-4 * np.abs(whole.rows()).max())
    assert cut.attrs["verification"]["checked"]
    curvature = "kronecker" if basis == "kronecker" else False
    found = ooc.token_influence(cut, cut, hf.load(name), top=3, queries=[0], curvature=curvature, normalize="none")[0]
    assert_allclose([values.sum() for values in found.tokens], found.scores, rtol=1e-3, atol=1e-4 * found.scores.max())


def test_sampled_labels_are_drawn_from_whole_logits(tmp_path, monkeypatch):
    name = make_model(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in texts(12)])
    stores = []
    for number, largest in enumerate((2**40, 0)):
        monkeypatch.setattr(unembedding, "LARGEST", largest)
        how = {"compressor": ooc.Dropout(k=100), "labels": "sampled", "dtype": "float32"}
        stores.append(hf.extract(name, data, tmp_path / f"s{number}", **how))
    assert_allclose(stores[1].rows(), stores[0].rows())


def test_logits_that_are_something_else(always):
    """Capped ones: the model keeps its own, and is not asked again."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=45, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5,
    )  # fmt: skip
    model, values = transformers.Gemma2ForCausalLM(config).eval(), batch()
    logits = model(input_ids=values["input_ids"], attention_mask=values["attention_mask"]).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.mT, values["labels"][:, 1:], reduction="sum")
    found = CausalLoss("sum")(model, values).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert model in unembedding._others
    assert unembedding._parts(model) is None
    assert unembedding._parts(torch.nn.Linear(2, 2)) is None


MEMORY = """
import torch
from test_unembedding import llama
from ooc_influence.hf.losses import CausalLoss
from ooc_influence.memory import PeakMemory, release_freed
for vocabulary in (1_000, 60_000):
    model = llama(vocab_size=vocabulary, num_hidden_layers=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    tokens = torch.randint(1, 1000, (8, 256))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    for _ in range(2):
        release_freed()
        with PeakMemory(0.002) as watch:
            torch.autograd.grad(CausalLoss()(model, batch).sum(), model.model.norm.weight)
    print(watch.peak - watch.start)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_vocabulary():
    """In a process of its own: other tests may have told the C library to keep what is freed."""
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 0.6 * 8 * 256 * 60_000 * 4  # of the logits

"""Fused mixture-of-experts weights of Hugging Face models, against float64 autograd one sample at a time."""

from __future__ import annotations

import warnings

import numpy as np
import oracle
import pytest
import torch
from numpy.testing import assert_allclose

from ooc_influence import Dropout, OocInfluenceWarning, extract_gradients, token_cross_entropy
from ooc_influence.extract.entries import KINDS
from ooc_influence.extract.pilot import MomentSums
from ooc_influence.extract.selection import select_layers
from ooc_influence.extract.taps import tapped

transformers = pytest.importorskip("transformers")

B, T, VOCAB = 5, 6, 23
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, intermediate_size=12, moe_intermediate_size=10, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, decoder_sparse_step=1,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **{**COMMON, "head_dim": 4}, intermediate_size=12, moe_intermediate_size=10, n_routed_experts=6,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=4, q_lora_rank=6,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_shared_experts=1,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **COMMON, intermediate_size=12, intermediate_size_mlp=12, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip


def make(name, implementation="eager"):
    torch.manual_seed(0)
    config = MODELS[name]()
    config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if name != "llama4":
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and routers start at zero
            if parameter.dim() > 1 or float(parameter.abs().max()) == 0:
                parameter.normal_(std=0.3)
    return model


def loss(model, batch):
    ids = batch["ids"]
    return token_cross_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:])


def sentences(n=B):
    ids = torch.randint(0, VOCAB, (n, T), generator=torch.Generator().manual_seed(1))
    ids[0] = 3  # one token again and again: most experts see nothing of this sample
    return ids


def extract(path, model, ids, sizes=(3, 1, 1), **options):
    source = [{"ids": part} for part in ids.split(list(sizes))]
    return extract_gradients(model, loss, source, path, dtype="float32", **options)


@pytest.mark.parametrize("name", MODELS)
def test_all_entries_of_expert_models(tmp_path, name):
    model, fallback = make(name), name == "gpt-oss"  # whose attention has weights of its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = select_layers(model, None, fallback=fallback).layers
    k = sum(layer.entries for layer in layers)
    store = extract(tmp_path / "s.zarr", model, sentences(), compressor=Dropout(k=k), fallback=fallback)
    kinds = [layer.kind for layer in layers]
    assert kinds.count("experts") == (2 if name == "deepseek-v3" else 4)  # experts and router of every block
    assert store.attrs["covered"] == 1
    oracle.assert_rows_are_located(store, model, loss, [{"ids": row[None]} for row in sentences()])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_chosen_implementation_changes_nothing(tmp_path, implementation):
    model = make("mixtral", implementation)
    store = extract(tmp_path / "s.zarr", model, sentences(), compressor=Dropout(k=500), modules="*.mlp.experts")
    assert model.config._experts_implementation == implementation
    oracle.assert_rows_are_located(store, make("mixtral"), loss, [{"ids": row[None]} for row in sentences()])


def test_an_expert_without_tokens_has_zeros(tmp_path):
    model = make("mixtral")
    ids = sentences()
    store = extract(tmp_path / "s.zarr", model, ids, compressor=Dropout(k=6912 // 2), modules="*.0.mlp.experts")
    expected = oracle.located_gradients(model, loss, [{"ids": ids[:1]}], store.mask)[0]
    (kept,) = store.mask.modules
    flat = kept.rows.astype(np.int64) * kept.layer.shape[1] + kept.cols
    expert = np.where(flat < 2304, flat // 384, (flat - 2304) // 192)  # gate and up (6, 24, 16), down (6, 16, 12)
    silent = [number for number in range(6) if not expected[expert == number].any()]
    assert silent
    assert not store.rows()[0, np.isin(expert, silent)].any()


def test_importance_sampling_looks_at_experts(tmp_path):
    """The pilot's moments follow the measured ones, and the sampled dot products the full ones."""
    model, ids = make("qwen3-moe"), sentences(24)
    layers = [layer for layer in select_layers(model, None).layers if layer.kind == "experts"]
    sums = MomentSums(layers)
    with tapped(model, layers, torch.device("cpu"), probe=True) as taps:
        taps.run(loss, {"ids": ids}, sums.receiver)
    assert sums.finish_batch(len(ids))
    whole = extract(tmp_path / "whole.zarr", model, ids, sizes=(24,), modules="*.mlp.*",
                    compressor=Dropout(k=sum(layer.entries for layer in layers)))  # fmt: skip
    measured, first = np.square(whole.rows()).mean(0), 0
    for moments, layer in zip(sums.result(), layers, strict=True):
        estimate = np.outer(moments.rows, moments.cols).ravel()
        own = measured[first : first + layer.entries]
        first += layer.entries
        moved = own > 0
        assert np.corrcoef(np.log(estimate[moved]), np.log(own[moved]))[0, 1] > 0.5, layer.name
        assert not own[estimate == 0].any()
    store = extract(tmp_path / "s.zarr", model, ids, sizes=(24,), modules="*.mlp.*",
                    compressor=Dropout(k=1500, sampling="importance"))  # fmt: skip
    oracle.assert_rows_are_located(store, model, loss, [{"ids": row[None]} for row in ids])
    full = whole.rows().astype(np.float64)
    kept = store.rows().astype(np.float64)
    assert_allclose((kept**2).sum(1).mean(), (full**2).sum(1).mean(), rtol=0.3)


def test_wide_experts_are_cut_into_runs():
    """DeepSeek-V3's 11 · 10⁹ entries of one layer: numbers of rows and columns stay below 2³¹."""
    config = transformers.DeepseekV3Config()
    with torch.device("meta"):
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

        experts = DeepseekV3Experts(config)
    shape = KINDS["experts"].describe("experts", experts)
    assert shape.entries == 256 * 3 * 2048 * 7168
    assert max(shape.shape) < 2**24
    last = (np.array([shape.shape[0] - 1], np.int32), np.array([shape.shape[1] - 1], np.int32))
    located = [each for each in KINDS["experts"].locate(shape, experts, *last) if len(each.entries)]
    assert [(each.parameter, each.positions.tolist()) for each in located] == [("down_proj", [256 * 2048 * 7168 - 1])]


def test_experts_that_see_sorted_tokens_are_left_out():
    config = transformers.JetMoeConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        intermediate_size=12, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.warns(OocInfluenceWarning, match="JetMoeParallelExperts"):
        assert "experts" not in {layer.kind for layer in select_layers(model, None).layers}

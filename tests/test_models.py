"""Real model families, wrappers, devices: what the taps have to live with."""

from __future__ import annotations

import copy
import os
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose
from torch import nn

from ooc_influence import Dropout, extract_gradients, token_cross_entropy
from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.fingerprint import model_fingerprint
from ooc_influence.extract.layers import named_layers
from ooc_influence.extract.selection import select_layers

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 32, "num_key_value_heads": 1}  # fmt: skip


def family(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    else:
        config = {
            "gpt_neox": transformers.GPTNeoXConfig,
            "llama": transformers.LlamaConfig,
            "gemma": transformers.GemmaConfig,
            "opt": transformers.OPTConfig,
        }[name](**{**SIZES, **({"ffn_dim": 24, "word_embed_proj_dim": 16} if name == "opt" else {})})
    if name == "gemma":
        config.head_dim = 8
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


def lm_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_cross_entropy(logits[:, :-1], batch["labels"][:, 1:])


def lm_batches(sizes=(3, 1, 3)):
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(1, 31, (7, 12), generator=generator)}
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"] = torch.ones(7, 12, dtype=torch.long)
    for row, length in enumerate([12, 4, 9, 7, 12, 5, 8]):
        batch["labels"][row, length:], batch["attention_mask"][row, length:] = -100, 0
    cut = {name: values.split(sizes) for name, values in batch.items()}
    return [{name: parts[number] for name, parts in cut.items()} for number in range(len(sizes))], batch


@pytest.mark.filterwarnings("ignore:gradients cover")
@pytest.mark.filterwarnings("ignore:the model is in training mode")
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma", "opt"])
def test_hugging_face_families(tmp_path, name):
    """k = p, unequal lengths, padding: the rows are torch.func's, of each sequence without its padding."""
    model = family(name)
    layers, share, _ = select_layers(model, None)
    assert share > (0.8 if name == "opt" else 0.999)  # OPT's positions are a class of their own
    source, batch = lm_batches()
    k = sum(layer.entries for layer in layers)
    store = extract_gradients(model, lm_loss, source, tmp_path / "s.zarr", compressor=Dropout(k=k), dtype="float32")

    def one(call, sample):
        ids, labels = sample
        length = int((labels != -100).sum())
        return F.cross_entropy(call(ids[None, :length]).logits[0, :-1], labels[1:length])

    samples = list(zip(batch["input_ids"], batch["labels"], strict=True))
    expected = oracle.keep(oracle.per_sample_gradients(model, one, samples, layers), store.mask)
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()  # checkpointing works in training mode only; extraction switches to evaluation
    again = extract_gradients(model, lm_loss, source, tmp_path / "c.zarr", compressor=Dropout(k=k), dtype="float32")
    assert_allclose(again.rows(), store.rows(), rtol=0, atol=1e-6 * np.abs(expected).max())


def test_an_adapter(tmp_path):
    """Of a PEFT model, the adapters are tapped; their rows are those of the parameters themselves."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(family("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    layers, share, _ = select_layers(model, None)
    assert share == 1
    assert len(layers) == 8
    assert all("lora_" in layer.name for layer in layers)
    source, batch = lm_batches()
    k = sum(layer.entries for layer in layers)
    store = extract_gradients(model, lm_loss, source, tmp_path / "s.zarr", compressor=Dropout(k=k), dtype="float32")
    model.eval()
    for row in range(3):
        model.zero_grad()
        lm_loss(model, {name: values[row : row + 1] for name, values in batch.items()}).sum().backward()
        expected = torch.cat([model.get_submodule(layer.name).weight.grad.flatten() for layer in layers]).numpy()
        assert_allclose(store.rows(row, row + 1)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def mlp_rows(path, model, k=100):
    source = batches(*data(Mlp, 20), 6)
    return extract_gradients(model, loss, source, path, compressor=Dropout(k=k), dtype="float32").rows()


@pytest.mark.parametrize("form", ["function", "method"])
def test_a_compiled_model(tmp_path, form):
    """It runs uncompiled; its layers, its mask and its fingerprint are those of the model inside."""
    plain = make(Mlp)
    expected = mlp_rows(tmp_path / "a.zarr", plain)
    model = copy.deepcopy(plain)
    if form == "method":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    model(data(Mlp, 2)[0])  # compiled before the hooks come
    assert_allclose(mlp_rows(tmp_path / "b.zarr", model), expected, rtol=0, atol=0)
    assert model_fingerprint(model) == model_fingerprint(plain)
    assert set(named_layers(model)) == set(named_layers(plain))


def parallel(rank, world, folder, kind):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/rendezvous", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        warnings.simplefilter("ignore")
        model = make(Mlp)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif kind == "fsdp":
            from torch.distributed.fsdp import FullyShardedDataParallel

            wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world,))
            for layer in (model.first, model.second, model.last):
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        if kind == "fsdp":
            with pytest.raises(UnsupportedModelError, match="fully_shard"):
                mlp_rows(f"{folder}/{rank}.zarr", wrapped)
            return
        rows = mlp_rows(f"{folder}/{rank}.zarr", wrapped)
        np.save(f"{folder}/{rank}.npy", rows)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["fsdp2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "fsdp"))])
def test_wrapped_for_several_processes(tmp_path, kind):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.multiprocessing.spawn(parallel, (2, str(tmp_path), kind), nprocs=2)
    if kind == "fsdp":
        return
    expected = mlp_rows(tmp_path / "alone.zarr", make(Mlp))
    for rank in range(2):
        assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

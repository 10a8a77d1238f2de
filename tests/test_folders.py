"""Folders of models and adapters: loaded whole, or refused in one line that says what is missing."""

from __future__ import annotations

import json

import pytest
import torch
from test_classifiers import make, make_tokenizer, texts
from tiny_hf import MARKS, datasets

from ooc_influence import Dropout, hf
from ooc_influence.errors import InputError

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = MARKS
TARGETS = {"bert": "query", "roberta": "query", "distilbert": "q_lin", "llama": "q_proj", "gpt2": "c_attn"}


def save(model, folder, *, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def adapt(tmp_path, kind, *, classes=5, head=None):
    """An adapter with a head of its own on a base without one, or with one for ``head`` classes; and what it gives."""
    base = make(kind, classes=head or 2)
    save(base if head else base.base_model, tmp_path / "base")
    model = type(base).from_pretrained(
        tmp_path / "base", num_labels=classes, ignore_mismatched_sizes=True, pad_token_id=base.config.pad_token_id
    )
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=[TARGETS[kind]], **options)
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[10, 11, 12, 13]])
    with torch.no_grad():
        return ids, adapted(input_ids=ids).logits


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("head", [None, 3, 5])
def test_an_adapter_of_a_classifier(tmp_path, kind, head):
    """Task and number of classes are the adapter's, by its folder or as adapter=."""
    ids, expected = adapt(tmp_path, kind, head=head)
    for loaded in (hf.load(tmp_path / "adapter"), hf.load(tmp_path / "base", adapter=tmp_path / "adapter")):
        assert loaded.task == "classification"
        assert loaded.model.config.num_labels == 5
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)


def test_rows_of_an_adapter_of_a_classifier(tmp_path):
    adapt(tmp_path, "bert")
    data = datasets.Dataset.from_dict({"text": texts(5), "y": [0, 4, 2, 1, 3]})
    store = hf.extract(
        tmp_path / "adapter", data, tmp_path / "s.zarr", text="text", label="y", compressor=Dropout(k=40)
    )
    assert (store.n, store.attrs["loss_kind"]) == (5, "cross_entropy")
    assert any("lora_" in module.layer.name for module in store.mask.modules)
    with pytest.raises(InputError, match=r"5 labels .* document 1; received 5"):
        hf.prepare(tmp_path / "adapter", data.select([0]).add_item({"text": "w1", "y": 5}), text="text", label="y")


def test_adapters_that_do_not_fit(tmp_path):
    adapt(tmp_path, "bert")
    with pytest.raises(InputError, match=r"an adapter for causal-lm; received .*adapter, which is for classification"):
        hf.load(tmp_path / "adapter", task="causal-lm")
    save(make("roberta"), tmp_path / "other")
    with pytest.raises(InputError, match=r"expected (a PEFT adapter for|all weights of) Roberta"):
        hf.load(tmp_path / "other", adapter=tmp_path / "adapter")
    with pytest.raises(InputError, match=r"expected a PEFT adapter for Roberta.* at .*nothing"):
        hf.load(tmp_path / "other", adapter=tmp_path / "nothing")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = safetensors.load_file(file)
    safetensors.save_file({name: w for name, w in weights.items() if "lora_B" not in name}, file)
    with pytest.raises(InputError, match=r"expected a PEFT adapter for .*missing adapter keys"):
        hf.load(tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"weights in .*adapter_model.safetensors; received a cut or damaged file"):
        hf.load(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[1")
    with pytest.raises(InputError, match=r"a PEFT adapter's configuration in .*adapter_config.json; received"):
        hf.load(tmp_path / "adapter")


def test_an_adapter_whose_base_is_gone(tmp_path):
    adapt(tmp_path, "bert")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"the base model .*base that the adapter .*adapter names; .*--adapter\)$"):
        hf.load(tmp_path / "adapter")
    assert hf.load(tmp_path / "moved", adapter=tmp_path / "adapter").model.config.num_labels == 5


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "distilbert", "xlnet", "bart"])
def test_a_checkpoint_without_a_tokenizer(tmp_path, kind):
    """Where transformers would make one without words, for which every text is the same."""
    folder = save(make(kind), tmp_path / "model", tokenizer=False)
    with pytest.raises(InputError, match=r"expected a tokenizer at .*model; received none.*\(--tokenizer\)$"):
        hf.load(folder)
    make_tokenizer().save_pretrained(tmp_path / "words")
    assert len(hf.load(folder, tokenizer=tmp_path / "words").tokenizer) == len(make_tokenizer())


def test_a_tokenizer_beside_an_adapter(tmp_path):
    adapt(tmp_path, "bert")
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="expected a tokenizer at"):
        hf.load(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    assert len(hf.load(tmp_path / "adapter").tokenizer) == len(make_tokenizer())


@pytest.mark.parametrize("left", [-100, 100, 4, 0])
def test_cut_weights(tmp_path, left, capsys):
    from ooc_influence.cli.main import main

    folder = save(make(), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InputError, match=r"weights in .*model.safetensors; received a cut or damaged file"):
        hf.load(folder)
    (tmp_path / "d.jsonl").write_text('{"text": "w1", "y": 0}\n')
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(f"extract --model {folder} --data {tmp_path}/d.jsonl --label y --store {tmp_path}/s.zarr".split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert (stop.value.code, len(lines)) == (2, 1), lines


def test_weights_that_are_not_there(tmp_path):
    """They would be random, and other ones in every run."""
    folder = save(make(), tmp_path / "model")
    file = folder / "model.safetensors"
    weights = safetensors.load_file(file)
    inner = "bert.encoder.layer.0.output.dense.weight"
    safetensors.save_file({n: w for n, w in weights.items() if n != inner}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"received none for {inner}, which would be random"):
        hf.load(folder)
    plain = save(make().base_model, tmp_path / "plain")
    with pytest.raises(InputError, match=r"received none for classifier.bias, classifier.weight, which"):
        hf.load(plain, task="classification")
    safetensors.save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    bias = r"bert.encoder.layer.0.intermediate.dense.bias \(32,\); received \(24,\)"
    with pytest.raises(InputError, match=f"shapes in the configuration of .*, {bias}"):
        hf.load(folder)

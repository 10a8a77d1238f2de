"""Training a LoRA again: as a plain loop does it, by the adapter's own settings, resumed, and refused."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from tiny_hf import MARKS, WORDS, make_model, transformers, write

import ooc_influence as ooc
from ooc_influence import hf
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.evaluate import verify_influence
from ooc_influence.evaluate.retrain import seeded

peft = pytest.importorskip("peft")
pytestmark = MARKS
N, Q = 20, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, an adapter of it, documents and the stores of both sides; queries repeat train rows."""
    folder = tmp_path_factory.mktemp("lora")
    base = make_model(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    without = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # which draws by the form of a batch
    (folder / "base" / "config.json").write_text(json.dumps(config | without))
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(WORDS, 8)), "name": f"d{number}"} for number in range(N)]
    train, query = write(folder / "train.jsonl", rows), write(folder / "query.jsonl", rows[:Q])
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    hf.extract(str(folder / "adapter"), str(train), folder / "train.zarr", id="name")
    hf.extract(str(folder / "adapter"), str(query), folder / "query.zarr", id="name", like=folder / "train.zarr")
    return folder


def training(made, **options):
    how = {"epochs": 2, "learning_rate": 0.05, "batch_size": 6} | options
    return hf.lora_training(made / "query.zarr", made / "train.zarr", **how)


def plain_loop(made, rows, seed, *, epochs=2, rate=0.05, size=6):
    """The same training by transformers' own loss, one document at a time."""
    texts = [json.loads(line)["text"] for line in (made / "train.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "base")
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(made / "base").eval(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0)
        orders = [torch.randperm(N, generator=torch.Generator().manual_seed(number))
                  for number in torch.randint(2**62, (epochs,)).tolist()]  # fmt: skip
        steps = [step for order in orders for step in order.split(size)]
        model.train()
        for number, step in enumerate(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / len(steps))
            chosen = [row for row in step.tolist() if row in rows]
            optimizer.zero_grad()
            for row in chosen:
                ids = torch.tensor([tokenizer(texts[row])["input_ids"]])
                (model(input_ids=ids, labels=ids).loss / len(chosen)).backward()
            if chosen:
                optimizer.step()
    return model.eval(), [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts[:Q]]


@pytest.mark.parametrize("rows", [range(N), [*range(3), *range(9, N)]])
def test_it_trains_as_a_plain_loop_does(made, rows):
    lora = training(made, epochs=8)
    with seeded(3):
        found = lora.loss(lora.train(np.array(rows)), np.array([2, 0]))
    with seeded(3):
        assert_array_equal(found, lora.loss(lora.train(np.array(rows)), np.array([2, 0])))
    model, queries = plain_loop(made, set(rows), 3, epochs=8)
    with torch.no_grad():
        expected = [float(model(input_ids=queries[row], labels=queries[row]).loss) for row in (2, 0)]
        base = transformers.AutoModelForCausalLM.from_pretrained(made / "base").eval()
        before = [float(base(input_ids=queries[row], labels=queries[row]).loss) for row in (2, 0)]
    assert_allclose(found, expected, rtol=1e-4)
    assert np.abs(np.array(before) - expected).max() > 0.03


def test_rows_of_a_step_are_taken_in_parts(made, monkeypatch):
    whole = training(made)
    with seeded(0):
        expected = whole.loss(whole.train(np.arange(N)), np.arange(Q))
    apart = training(made)
    job_of = hf.lora.job_of

    def small(*arguments):
        job = job_of(*arguments)
        job.batches.tokens = 17  # two documents
        return job

    monkeypatch.setattr(hf.lora, "job_of", small)
    with seeded(0):
        assert_allclose(apart.loss(apart.train(np.arange(N)), np.arange(Q)), expected, rtol=1e-4)


def test_the_adapters_settings_are_taken_and_changed(made):
    found = training(made).settings
    assert found["lora"]["lora_alpha"] == 6
    assert found["lora"]["r"] == 4
    assert found["lora"]["target_modules"] == ["c_attn", "c_fc"]
    assert found["base"] == str((made / "base").resolve())
    changed = training(made, rank=2, alpha=3.0, targets=["c_proj"]).settings["lora"]
    assert (changed["r"], changed["lora_alpha"], changed["target_modules"]) == (2, 3.0, ["c_proj"])
    plain = training(made, model=str(made / "base")).settings["lora"]
    assert (plain["r"], plain["lora_alpha"], plain["target_modules"]) == (16, 32, "all-linear")
    lora = training(made, model=str(made / "base"), rank=3)
    before = copy.deepcopy(lora.settings)
    model = lora.train(np.arange(4)).model
    assert lora.settings == before
    trained = [name for name, values in model.named_parameters() if values.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert {values.shape[0] for name, values in model.named_parameters() if "lora_A" in name} == {3}


def test_dropped_rows_leave_no_holes_in_steps(made, tmp_path):
    """Training without rows that are dropped is that on a store which never had them."""
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    kept = [0, 1, 2, 5, 6, 7, 8, 11, 12, 13]
    data = write(tmp_path / "few.jsonl", [rows[row] for row in kept])
    few = hf.extract(str(made / "adapter"), str(data), tmp_path / "few.zarr", like=made / "train.zarr")
    whole = hf.extract(str(made / "adapter"), str(made / "train.jsonl"), tmp_path / "a.zarr", like=made / "train.zarr")
    with ooc.GradientStore.open(whole.path, "a") as store:
        store.drop(np.setdiff1d(np.arange(N), kept))
    losses = []
    for store, numbers in ((few, np.arange(10)), (ooc.GradientStore.open(whole.path), np.array(kept))):
        lora = hf.lora_training(made / "query.zarr", store, epochs=2, learning_rate=0.05, batch_size=4)
        with seeded(1):
            losses.append(lora.loss(lora.train(numbers), np.arange(Q)))
    assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_removal_test_of_a_lora(made, tmp_path):
    lora = training(made, epochs=6)
    stores = (made / "query.zarr", made / "train.zarr")
    found = verify_influence(*stores, lora, tmp_path / "runs", remove=1, seeds=1, controls=1)
    assert found.removed[0, :Q, 0].tolist() == [0, 1, 2]  # each query's own document
    assert (found.against_random.means > 0).all()
    assert found.against_others.mean > 0
    again = verify_influence(*stores, training(made, epochs=6), tmp_path / "again", remove=1, seeds=1, controls=1)
    assert_array_equal(again.losses, found.losses)
    with pytest.raises(MismatchError, match="epochs"):
        verify_influence(*stores, training(made, epochs=5), tmp_path / "runs", remove=1, seeds=1, controls=1)


def test_the_command_resumes(made, tmp_path, run, monkeypatch):  # noqa: F811
    how = "--remove 1 --seeds 1 --controls 2 --epochs 1 --json"
    line = f"verify-influence {made}/query.zarr {made}/train.zarr {how} --out"
    calls, train = [], hf.LoraTraining.train

    def stopped(self, indices):
        calls.append(len(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, indices)

    monkeypatch.setattr(hf.LoraTraining, "train", stopped)
    code, _, error = run(f"{line} runs")
    assert code == 130
    assert "interrupted: finished runs stay; run the same command again, it continues with those that are" in error
    code, resumed, error = run(f"{line} runs")
    assert code == 0, error
    assert "5 runs: without the 1 strongest row of each of 3 queries" in error
    assert calls == [N - 1] * 6
    facts = json.loads(resumed)
    assert (facts["runs"], facts["queries"][0]["id"]) == (5, "d0")
    whole = json.loads(run(f"{line} whole")[1])
    assert {**whole, "seconds": 0} == {**facts, "seconds": 0}
    assert run(f"{line} runs")[1] == resumed
    assert len(calls) == 6 + 5
    code, _, error = run(f"{line} runs --rank 2")
    assert code == 2
    assert "expected the settings" in error


def test_refusals(made, tmp_path, run):  # noqa: F811
    ia3 = tmp_path / "ia3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(made / "base"),
            peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], task_type="CAUSAL_LM"),
        ).save_pretrained(ia3)
    whole = hf.extract(str(made / "base"), str(made / "train.jsonl"), tmp_path / "whole.zarr", id="name")
    few = write(tmp_path / "few.jsonl", [{"text": "w1 w2", "name": "a"}])
    other = write(tmp_path / "other.jsonl", [{"text": "w1 w2 w3 w4 w5 w6 w7 w8", "name": str(i)} for i in range(N)])
    for options, message in (
        ({"model": str(ia3)}, "expected a LoRA; received .*IA3"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"rank": 0}, "rank >= 1"),
        ({"device": "nowhere"}, "device"),
    ):
        with pytest.raises(InputError, match=message):
            training(made, **options)
    with pytest.raises(InputError, match=r"expected the base model \(--model\) to train a LoRA from"):
        hf.lora_training(made / "query.zarr", whole)
    with pytest.warns(ooc.OocInfluenceWarning, match="name the model that its training began with"):
        hf.lora_training(made / "query.zarr", whole, str(made / "base"))
    for arguments, message in (
        ("--target nothing", "expected a LoRA's settings that fit"),
        (f"--data {few}", f"expected documents that make the {N} rows"),
        (f"--data {other}", "to have the text_digest stored in"),
        (f"--query-data {tmp_path}/none.jsonl", "none.jsonl"),
        (f"--model {tmp_path}/none", "expected a model at"),
    ):
        line = f"verify-influence {made}/query.zarr {made}/train.zarr --remove 1 --out {tmp_path}/refused --epochs 1"
        code, out, error = run(f"{line} {arguments}")
        assert (code, out) == (2, ""), error
        assert message in error
        assert len([each for each in error.splitlines() if each.startswith("error: ")]) == 1
        for path in (tmp_path / "refused").glob("*"):
            path.unlink()


def test_stores_that_record_no_documents(made, tmp_path):
    with pytest.raises(InputError, match="expected a store made from documents"):
        hf.lora_training(made / "query.zarr", _bare(made, tmp_path))


def _bare(made, tmp_path):
    """The same rows in a store that was written by hand."""
    train = ooc.GradientStore.open(made / "train.zarr")
    with ooc.GradientStore.create(tmp_path / "bare.zarr", train.mask) as store:
        store.append(train.rows(), loss=np.zeros(N))
    return ooc.GradientStore.open(tmp_path / "bare.zarr")

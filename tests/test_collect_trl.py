"""Rows of TRL trainers: of each sample's own loss, as extraction computes it, whatever the trainer makes of a batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_hf import MARKS, make_model, make_tokenizer

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore, hf
from ooc_influence.errors import InputError

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*left out"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
HEAD = ["!transformer.wte", "!lm_head"]  # whose weight TRL's fused head uses by itself
KEPT = {"compressor": Dropout(k=100), "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("trl") / "model")


def load(folder, seed=0):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for each in model.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.05 * torch.randn(each.shape, generator=drawn))
    return model


def options(out, **more):
    return {
        "output_dir": str(out), "per_device_train_batch_size": 3, "max_steps": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 0.05, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, "bf16": False, **more,
    }  # fmt: skip


def tokens(size, drawn):
    return torch.randint(5, 45, (size,), generator=drawn).tolist()


def collect(trainer, path):
    trainer.add_callback(hf.collect_callback(trainer, path, **KEPT))
    trainer.train()
    store = GradientStore.open(path)
    assert store.attrs["verification"]["checked"]
    return store


def passing_ids_on(kind):
    class Collator(kind):
        def torch_call(self, examples):
            return super().torch_call(examples) | {"example_id": [each["example_id"] for each in examples]}

    return Collator


def assert_same(model, plain):
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def supervised(folder, out, **more):
    drawn = torch.Generator().manual_seed(3)
    rows = []
    for number in range(12):
        ids = tokens((9, 5, 12, 7)[number % 4], drawn)
        labels = [-100] * (number % 3) + ids[number % 3 :]  # prompts are no targets
        rows.append({"input_ids": ids, "labels": labels, "example_id": f"d{number}"})
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    trainer = trl.SFTTrainer(
        load(folder), trl.SFTConfig(**options(out, **more)), train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(), data_collator=passing_ids_on(DataCollatorForLanguageModeling)(0),
    )  # fmt: skip
    return trainer, {row["example_id"]: row for row in rows}


def test_sft(folder, tmp_path):
    trainer, rows = supervised(folder, tmp_path / "out")
    store = collect(trainer, tmp_path / "s")
    plain, _ = supervised(folder, tmp_path / "plain")
    plain.train()
    assert_same(trainer.model, plain.model)
    assert store.n == 12
    first = store.column("step") == 0
    batches = []
    for name in store.column("example")[first]:
        ids, labels = (torch.tensor([rows[name][key]]) for key in ("input_ids", "labels"))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    wanted = ooc.extract_gradients(load(folder), hf.CausalLoss(), batches, tmp_path / "e", modules=HEAD, **KEPT)
    assert_allclose(store.rows()[first], wanted.rows(), rtol=1e-3, atol=1e-6)


def preferences(folder, out, **more):
    drawn = torch.Generator().manual_seed(3)
    rows = [
        {
            "prompt_ids": tokens(3 + number % 2, drawn), "chosen_ids": tokens(2 + number % 5, drawn),
            "rejected_ids": tokens(6 - number % 4, drawn), "example_id": 100 + number,
        }
        for number in range(12)
    ]  # fmt: skip
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    words = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]
    trainer = trl.DPOTrainer(
        load(folder), ref_model=load(folder, seed=1), args=trl.DPOConfig(**options(out, beta=0.5, **more)),
        train_dataset=datasets.Dataset.from_list(words), processing_class=make_tokenizer(),
        data_collator=passing_ids_on(DataCollatorForPreference)(0),
    )  # fmt: skip
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    return trainer, {row["example_id"]: row for row in rows}


def test_dpo(folder, tmp_path):
    """A pair is a row: of its loss, whose entries are sums over its two sequences."""
    trainer, rows = preferences(folder, tmp_path / "out")
    store = collect(trainer, tmp_path / "s")
    plain, _ = preferences(folder, tmp_path / "plain")
    plain.train()
    assert_same(trainer.model, plain.model)
    assert store.n == 12
    first = store.column("step") == 0
    collate, batches = hf.PairCollator(0), []
    for name in store.column("example")[first]:
        row = rows[name]
        both = [row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")]
        prompt = len(row["prompt_ids"])
        batches.append(collate([{"input_ids": both, "labels": [[-100] * prompt + each[prompt:] for each in both]}]))
    loss = hf.PreferenceLoss(0.5, load(folder, seed=1))
    wanted = ooc.extract_gradients(load(folder), loss, batches, tmp_path / "e", modules=HEAD, **KEPT)
    assert_allclose(store.rows()[first], wanted.rows(), rtol=1e-3, atol=1e-6)


def completions(folder, out, **more):
    drawn = np.random.default_rng(0)
    rows = [
        {"prompt": " ".join(f"w{n}" for n in drawn.integers(0, 40, 2 + number % 3)), "example_id": f"p{number}"}
        for number in range(12)
    ]

    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    torch.manual_seed(0)
    settings = options(
        out, num_generations=2, max_completion_length=6, per_device_train_batch_size=4, temperature=1.0, **more
    )
    return trl.GRPOTrainer(
        load(folder), reward_funcs=reward, args=trl.GRPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=make_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "luspo"])
def test_grpo(folder, tmp_path, loss_type):
    """A completion is a row, with its prompt's id: of its mean over its tokens, however the trainer weights it."""
    trainer = completions(folder, tmp_path / "out", loss_type=loss_type)
    seen, compute = [], trainer._compute_loss

    def noting(model, inputs):
        if not trainer.state.global_step:
            seen.append(copy.deepcopy(inputs))
        return compute(model, inputs)

    trainer._compute_loss = noting
    store = collect(trainer, tmp_path / "s")
    plain = completions(folder, tmp_path / "plain", loss_type=loss_type)
    plain.train()
    assert_same(trainer.model, plain.model)
    assert store.n == 16
    batches, prompts = [], []
    for each in seen:
        for sample in range(4):
            ids = torch.cat([each["prompt_ids"][sample], each["completion_ids"][sample]])[None]
            mask = torch.cat([each["prompt_mask"][sample], each["completion_mask"][sample]])[None]
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, : each["prompt_ids"].shape[1]] = -100
            advantage = each["advantages"][sample][None]
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "advantage": advantage})
            prompts.append(each["prompt_ids"][sample][each["prompt_mask"][sample].bool()].tolist())
    loss = hf.PolicyGradientLoss()
    wanted = ooc.extract_gradients(load(folder), loss, batches, tmp_path / "e", modules=HEAD, **KEPT)
    first = store.column("step") == 0
    assert_allclose(store.rows()[first], wanted.rows(), rtol=1e-3, atol=1e-6)
    assert np.abs(store.rows()[first]).max() > 1e-3
    texts = {row["example_id"]: row["prompt"] for row in trainer.train_dataset}
    tokenizer = make_tokenizer()
    assert [tokenizer(texts[name])["input_ids"] for name in store.column("example")[first]] == prompts


def test_what_is_refused(folder, tmp_path):
    trainer, _ = preferences(folder, tmp_path / "out", loss_type=["aot"])
    with pytest.raises(InputError, match="mean over pairs; received aot"):
        collect(trainer, tmp_path / "s")
    trainer = completions(folder, tmp_path / "out", entropy_coef=0.1)
    with pytest.raises(InputError, match="entropy bonus"):
        collect(trainer, tmp_path / "s")
    trainer, _ = supervised(folder, tmp_path / "out")
    inner = trainer.data_collator
    inner.padding_free = True
    with pytest.raises(InputError, match="without packing and padding_free"):
        collect(trainer, tmp_path / "s")

    class Rewards(trl.RewardTrainer):
        def __init__(self):
            pass

    with pytest.raises(InputError, match="SFTTrainer, DPOTrainer, GRPOTrainer of TRL"):
        hf.trainers.reader_of(Rewards(), "example_id")

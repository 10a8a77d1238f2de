"""Rows of a Trainer's own training: those that extraction computes, the same training, continued from checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiny_hf import MARKS, make_model

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore, hf
from ooc_influence.errors import InputError, MismatchError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:gradients cover"),
]
N, LENGTHS = 14, (9, 5, 12, 7)


def documents():
    drawn = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(5, 45, (LENGTHS[number % 4],), generator=drawn), "example_id": 100 + number}
        for number in range(N)
    ]


def collate(samples):
    """Pad; the ids of the samples are passed on."""
    longest = max(len(each["input_ids"]) for each in samples)
    ids = torch.zeros((len(samples), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(samples):
        ids[row, : len(each["input_ids"])], mask[row, : len(each["input_ids"])] = each["input_ids"], 1
    labels = torch.where(mask.bool(), ids, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch | ({"example_id": torch.tensor([each["example_id"] for each in samples])})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("trainer") / "model")


def trainer(folder, out, **options):
    torch.manual_seed(0)
    model = hf.load(str(folder)).model
    for each in model.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0  # extraction has none
    arguments = transformers.TrainingArguments(
        str(out), per_device_train_batch_size=3, learning_rate=0.05, report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
        **({"gradient_accumulation_steps": 2, "save_strategy": "no", "num_train_epochs": 2} | options),
    )  # fmt: skip

    class Own(transformers.Trainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "example_id"})

    return Own(model, arguments, data_collator=collate, train_dataset=documents())


def collecting(made, store, **options):
    how = {"compressor": Dropout(k=120), "dtype": "float32"} | options
    made.add_callback(hf.collect_callback(made, store, **how))
    return made


def stopping(made, step):
    """Stop a training before its end, as if it were killed."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                raise KeyboardInterrupt

    made.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        made.train()


def test_rows_are_those_of_extraction_and_training_is_the_same(folder, tmp_path):
    plain = trainer(folder, tmp_path / "plain")
    plain.train()
    made = collecting(trainer(folder, tmp_path / "out"), tmp_path / "s")
    made.train()
    for mine, theirs in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    store = GradientStore.open(tmp_path / "s")
    assert store.n == 2 * N
    assert sorted(store.column("example").tolist()) == sorted([*range(100, 100 + N)] * 2)
    assert_array_equal(np.unique(store.column("step")), np.arange(6))
    assert store.column("lr")[0] > store.column("lr")[-1] > 0
    first = store.column("step") == 0  # rows of the first step are of the model as it was loaded
    base, numbers = hf.load(str(folder)), store.column("example")[first] - 100
    batches = [collate([documents()[number]]) for number in numbers]
    ooc.extract_gradients(
        base.model, hf.CausalLoss(), batches, tmp_path / "e", compressor=Dropout(k=120), dtype="float32",
    )  # fmt: skip
    assert_allclose(store.rows()[first], GradientStore.open(tmp_path / "e").rows(), rtol=2e-3, atol=1e-6)


def test_it_continues_from_a_checkpoint(folder, tmp_path):
    whole = collecting(trainer(folder, tmp_path / "whole"), tmp_path / "w")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = collecting(trainer(folder, tmp_path / "out", **saving), tmp_path / "s")
    stopping(first, 3)
    del first
    again = collecting(trainer(folder, tmp_path / "out", **saving), tmp_path / "s")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found, wanted = GradientStore.open(tmp_path / "s"), GradientStore.open(tmp_path / "w")
    assert_array_equal(found.column("example")[~found.dropped], wanted.column("example"))
    assert_allclose(found.rows()[~found.dropped], wanted.rows(), rtol=1e-5, atol=1e-7)
    with pytest.raises(MismatchError, match="both from one checkpoint"):
        collecting(trainer(folder, tmp_path / "out"), tmp_path / "s").train()


def test_what_is_refused(folder, tmp_path):
    made = collecting(trainer(folder, tmp_path / "out"), tmp_path / "s")
    made.data_collator = lambda samples: {
        name: value for name, value in collate(samples).items() if name != "example_id"
    }
    with pytest.raises(InputError, match="ids of samples as 'example_id'"):
        made.train()


def test_averages_in_a_basis_of_the_first_epochs_end(folder, tmp_path):
    """A training of three epochs, of which the last two are averaged; killed twice, and continued."""
    how = {"compressor": Dropout(k=90, basis="kronecker"), "start_epoch": 1}
    plain = trainer(folder, tmp_path / "plain", num_train_epochs=3)
    plain.train()
    single = collecting(trainer(folder, tmp_path / "single", num_train_epochs=3), tmp_path / "s", **how)
    single.train()
    made = collecting(trainer(folder, tmp_path / "out", num_train_epochs=3), tmp_path / "a", average=True, **how)
    made.train()
    for each in (single, made):
        for mine, theirs in zip(each.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    rows, averages = GradientStore.open(tmp_path / "s"), GradientStore.open(tmp_path / "a")
    assert_array_equal(np.unique(rows.column("step")), np.arange(3, 9))
    assert sorted(averages.ids().tolist()) == [*range(100, 100 + N)]
    assert_array_equal(averages.column("rows"), np.full(N, 2))
    wanted = [rows.rows()[rows.column("example") == each].mean(0) for each in averages.ids()]
    assert_allclose(averages.rows(), wanted, rtol=1e-5, atol=1e-7)
    assert averages.mask.has_basis

    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    for step, checkpoint in ((3, 2), (5, 4), (7, 6)):  # before collection, in its first epoch, after a fold
        made = collecting(trainer(folder, tmp_path / "o", **saving), tmp_path / f"a{step}", average=True, **how)
        stopping(made, step)
        del made
        again = collecting(trainer(folder, tmp_path / "o", **saving), tmp_path / f"a{step}", average=True, **how)
        again.train(resume_from_checkpoint=str(tmp_path / "o" / f"checkpoint-{checkpoint}"))
        found = GradientStore.open(tmp_path / f"a{step}")
        assert_array_equal(found.ids(), averages.ids())
        assert_allclose(found.rows(), averages.rows(), rtol=1e-4, atol=1e-6)
        assert_array_equal(found.column("step"), averages.column("step"))
    assert not [each.name for each in tmp_path.iterdir() if each.name.startswith(".")]  # the last step was saved

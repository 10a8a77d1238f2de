"""Rows of a Trainer's own training: those that extraction computes, the same training, continued from checkpoints."""

from __future__ import annotations

import os
import socket
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tiny_hf import MARKS, make_model

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore, hf
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.store import StepLog

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


def trainer(folder, out, *, n=N, **options):
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

    return Own(model, arguments, data_collator=collate, train_dataset=documents()[:n])


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
    made.pop_callback(Stop)


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
    assert_allclose(
        store.rows()[first], extracted(folder, store.column("example")[first], tmp_path), rtol=2e-3, atol=1e-6
    )


def extracted(folder, examples, path):
    """Return the rows of examples, of the model as it was before training."""
    batches = [collate([documents()[number]]) for number in examples - 100]
    return ooc.extract_gradients(
        hf.load(str(folder)).model, hf.CausalLoss(), batches, path / "e", compressor=Dropout(k=120), dtype="float32"
    ).rows()


def test_it_continues_from_a_checkpoint(folder, tmp_path):
    whole = collecting(trainer(folder, tmp_path / "whole"), tmp_path / "w")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = collecting(trainer(folder, tmp_path / "out", **saving), tmp_path / "s")
    stopping(first, 3)
    again = trainer(folder, tmp_path / "out", **saving)
    first.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))  # by the same Trainer
    again = collecting(again, tmp_path / "s")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found, wanted = GradientStore.open(tmp_path / "s"), GradientStore.open(tmp_path / "w")
    assert_array_equal(found.column("example")[~found.dropped], wanted.column("example"))
    assert_allclose(found.rows()[~found.dropped], wanted.rows(), rtol=1e-5, atol=1e-7)
    with pytest.raises(MismatchError, match="both from one checkpoint"):
        collecting(trainer(folder, tmp_path / "out"), tmp_path / "s").train()


def test_effects_on_the_final_weights(folder, tmp_path):
    """Those of the last step, of rows that accumulation and clipping scaled, by the derivative of AdamW's step."""
    made = trainer(folder, tmp_path / "out", max_grad_norm=0.5)
    callback = hf.collect_callback(
        made, tmp_path / "s", compressor=Dropout(k=120), dtype="float32", optimizer=True
    )  # fmt: skip
    made.add_callback(callback)
    made.train()
    plain = trainer(folder, tmp_path / "plain", max_grad_norm=0.5)
    plain.train()
    for mine, theirs in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    store, log = GradientStore.open(tmp_path / "s"), StepLog(tmp_path / "s")
    assert_array_equal(log.steps, np.arange(6))
    effects = ooc.fit_trajectory(store, dtype="float32")
    last, record = store.column("step") == 5, log.record(5)
    assert 0 < record.factor < 1
    rows = store.rows()[last].astype(np.float64)
    weights = np.concatenate([module.weight for module in store.mask.modules])
    m, v, g = record.vectors.astype(np.float64)
    seen = (rows * store.column("weight")[last, None]).sum(0) / weights * record.factor
    assert_allclose(seen, g, rtol=2e-3, atol=1e-4 * np.abs(g).max())  # every sample's weight and the factor
    lr, _, _, beta1, beta2, eps, count = record.scalars[log.columns.owner].T
    root = np.sqrt(np.maximum(v, 1e-30) / (1 - beta2**count))  # tokens that were never seen have none
    share = (1 - beta1) / (1 - beta1**count) / (root + eps)
    share -= (1 - beta2) * g * m / (1 - beta1**count) / (1 - beta2**count) / (root * (root + eps) ** 2)
    expected = rows * store.column("weight")[last, None] * record.factor * lr * share
    assert_allclose(effects.rows()[last], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_what_is_refused(folder, tmp_path):
    made = collecting(trainer(folder, tmp_path / "out"), tmp_path / "s")
    made.data_collator = lambda samples: {
        name: value for name, value in collate(samples).items() if name != "example_id"
    }
    with pytest.raises(InputError, match="ids of samples as 'example_id'"):
        made.train()


def test_the_scale_of_fp16_is_undone(folder, tmp_path):
    """Rows are those of an unscaled loss; those of a step that overflows are dropped, and training is the same."""

    def scaled(out):
        made = trainer(folder, out, fp16=True, max_steps=4, max_grad_norm=0.0)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)  # which overflows at first
        return made

    plain, made = scaled(tmp_path / "plain"), collecting(scaled(tmp_path / "out"), tmp_path / "s")
    plain.train()
    made.train()
    for mine, theirs in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert 1 < made.accelerator.scaler.get_scale() < 2.0**126
    store = GradientStore.open(tmp_path / "s")
    steps, dropped = store.column("step"), store.dropped
    assert dropped[steps == 0].any()
    taken = steps == min(set(steps.tolist()) - set(steps[dropped].tolist()))  # no step was before
    assert store.attrs["verification"]["share"] > 0
    assert_allclose(
        store.rows()[taken], extracted(folder, store.column("example")[taken], tmp_path), rtol=2e-3, atol=1e-6
    )


WORLD = 2


def in_parallel(rank, folder, out):
    port = (out / "port").read_text()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_PORT": port}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    saving = {"save_strategy": "steps", "save_steps": 1, "n": 12, "ddp_backend": "gloo"}
    try:
        collecting(trainer(folder, out / "out", **saving), out / "s").train()
        again = collecting(trainer(folder, out / "out", **saving), out / "s")
        again.train(resume_from_checkpoint=str(out / "out" / "checkpoint-1"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_several_processes(folder, tmp_path):
    """Rows of two processes, of a training that was continued too, are those of one that accumulates their batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(in_parallel, (folder, tmp_path), nprocs=WORLD)
    collecting(trainer(folder, tmp_path / "whole", n=12, gradient_accumulation_steps=4), tmp_path / "w").train()
    found, wanted = (by_step_and_example(tmp_path / name) for name in "sw")
    assert set(found) == set(wanted)
    assert len(found) == 2 * 12
    for key, row in wanted.items():
        assert_allclose(found[key], row, rtol=2e-3, atol=1e-5)


def by_step_and_example(path):
    store = GradientStore.open(path)
    keys = zip(store.column("step").tolist(), store.column("example").tolist(), strict=True)
    return {key: row for key, row, dropped in zip(keys, store.rows(), store.dropped, strict=True) if not dropped}


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

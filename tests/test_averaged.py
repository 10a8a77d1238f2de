"""Rows averaged over checkpoints: against the mean of each one's rows, from every kind of file, resumed and refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import (
    BudgetBatches,
    Dropout,
    Eigenbasis,
    GradientStore,
    Storage,
    extract_gradients,
    influence_scores,
    init_store,
    merge_stores,
)
from ooc_influence.errors import InputError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:the model is not the one")
N = 40


def training(count=3):
    """A model and its earlier states."""
    models = [make(Mlp, seed) for seed in range(count)]
    for model in models[1:]:
        model.first.load_state_dict(models[0].first.state_dict())  # what training left as it was
    return models[-1], models[:-1]


def extract(model, path, **options):
    return extract_gradients(model, loss, batches(*data(Mlp, N), 16), path, **{"dtype": "float32"} | options)


MASKS = {
    "uniform": {"compressor": Dropout(k=200)},
    "importance, reduced": {"compressor": Dropout(k=200, sampling="importance", reduce=Eigenbasis(20))},
    "kronecker": {"compressor": Dropout(k=200, sampling="grid", basis="kronecker")},
}


@pytest.mark.parametrize("how", MASKS.values(), ids=MASKS)
def test_rows_are_the_mean_of_those_of_the_checkpoints(tmp_path, how):
    model, earlier = training()
    averaged = extract(model, tmp_path / "mean", checkpoints=earlier, **how)
    last = extract(model, tmp_path / "last", **how)
    assert averaged.mask_digest == last.mask_digest
    others = [extract(each, tmp_path / f"{i}", like=last, check_model=False) for i, each in enumerate(earlier)]
    wanted = np.mean([each.rows() for each in [last, *others]], axis=0)
    assert_allclose(averaged.rows(), wanted, rtol=1e-5, atol=1e-6 * abs(wanted).max())
    assert_array_equal(averaged.loss, last.loss)
    assert [each["path"] for each in averaged.attrs["checkpoints"]] == [None, None]


def test_the_model_is_left_as_it_was(tmp_path):
    model, earlier = training()
    before, held = copy.deepcopy(model.state_dict()), {name: each.data_ptr() for name, each in model.named_parameters()}
    extract(model, tmp_path / "mean", checkpoints=earlier, compressor=Dropout(k=100))

    def failing(model, batch):
        if not torch.equal(model.last.weight, before["last.weight"]):
            raise KeyboardInterrupt
        return loss(model, batch)

    how = {"checkpoints": earlier, "compressor": Dropout(k=100)}
    with pytest.raises(KeyboardInterrupt):
        extract_gradients(model, failing, batches(*data(Mlp, N), 16), tmp_path / "other", **how)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert held == {name: each.data_ptr() for name, each in model.named_parameters()}


def test_a_budget_of_tokens_and_signs(tmp_path):
    model, earlier = training()
    x, y = data(Mlp, N)
    source = BudgetBatches(
        list(zip(x, y, strict=True)), lambda part: tuple(map(torch.stack, zip(*part, strict=True))),
        lengths=np.ones(N, int), batch_size=7,
    )  # fmt: skip
    how = {"compressor": MASKS["kronecker"]["compressor"], "checkpoints": earlier, "pilot": batches(x, y, 16)}
    plain = extract(model, tmp_path / "plain", **how)
    budget = extract_gradients(model, loss, source, tmp_path / "budget", dtype="float32", **how)
    assert_allclose(budget.rows(), plain.rows(), rtol=1e-4, atol=1e-6)
    signs = extract(model, tmp_path / "signs", **how | {"dtype": "sign"})
    raw, scale = np.zeros_like(signs.raw_rows(0, N)), np.zeros(N, np.float32)
    signs.layout.encoding.encode_into(plain.rows(), raw, scale, signs.column_scale)
    assert np.unpackbits(raw ^ signs.raw_rows(0, N)).mean() < 1e-3  # of numbers next to zero
    assert_allclose(signs.small("row_scale"), scale, rtol=1e-4)
    wanted = influence_scores(plain, plain, curvature="kronecker").compute().diagonal()
    assert_allclose(signs.small("columns/self_influence_0.03", 0, N), wanted, rtol=1e-4)


def saved(model, path):
    torch.save(model.state_dict(), path)
    return path


def pretrained(model, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir(parents=True)
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def wrapped(model, path):
    torch.save({"epoch": 3, "model_state_dict": {f"module.{n}": v for n, v in model.state_dict().items()}}, path)
    return path


def test_every_kind_of_source(tmp_path):
    model, earlier = training()
    kept = {"compressor": Dropout(k=200)}
    wanted = extract(model, tmp_path / "wanted", checkpoints=earlier, **kept).rows()
    run, plain = tmp_path / "run", tmp_path / "plain"
    for name, each in (("checkpoint-9", earlier[0]), ("checkpoint-10", earlier[1]), ("checkpoint-200", model)):
        pretrained(each, run / name)
    pretrained(model, tmp_path / "root")
    (tmp_path / "root" / "model.safetensors").rename(run / "model.safetensors")
    plain.mkdir()
    for number, each in enumerate(earlier):
        saved(each, plain / f"epoch{number}.pt")
    sources = {
        "state dicts": [each.state_dict() for each in earlier],
        "files": [saved(earlier[0], tmp_path / "a.pt"), str(saved(earlier[1], tmp_path / "b.bin"))],
        "a trainer's folder": run,
        "a folder of files": [plain],
        "folders": [run / "checkpoint-9", run / "checkpoint-10"],
        "the model among them": [*earlier, model],
    }
    for name, source in sources.items():
        store = extract(model, tmp_path / f"store {name}", checkpoints=source, **kept)
        assert_allclose(store.rows(), wanted, rtol=1e-6, err_msg=name)
        recorded = [each["fingerprint"] for each in store.attrs["checkpoints"]]
        assert len(set(recorded)) == 2, name
    store = extract(model, tmp_path / "again", checkpoints=run, **kept)
    assert [each["path"].rpartition("-")[2] for each in store.attrs["checkpoints"]] == ["9", "10"]


def test_names_of_wrappers_and_training_scripts(tmp_path):
    model, (first, _) = training()
    parallel = torch.nn.DataParallel(model)
    store = extract(parallel, tmp_path / "s", checkpoints=wrapped(first, tmp_path / "a.pt"), compressor=Dropout(k=100))
    plain = extract(model, tmp_path / "p", checkpoints=first, compressor=Dropout(k=100))
    assert_allclose(store.rows(), plain.rows(), rtol=1e-6)


def test_tied_weights_are_one(tmp_path):
    def tied(seed):
        model = make(Mlp, seed)
        model.second.weight = torch.nn.Parameter(torch.randn(20, 20))
        model.again = torch.nn.Linear(20, 20, bias=False)
        model.again.weight = model.second.weight
        return model

    model, earlier = tied(1), tied(0)
    state = earlier.state_dict()
    del state["second.weight"]
    full = extract(
        model, tmp_path / "full", checkpoints=[earlier], compressor=Dropout(k=100), modules=["first", "last"]
    )
    part = extract(model, tmp_path / "part", checkpoints=[state], compressor=Dropout(k=100), modules=["first", "last"])
    assert_array_equal(full.rows(), part.rows())


def test_queries_are_averaged_as_their_train_rows(tmp_path):
    model, earlier = training()
    paths = [saved(each, tmp_path / f"{number}.pt") for number, each in enumerate(earlier)]
    train = extract(model, tmp_path / "t", checkpoints=paths, compressor=Dropout(k=200))
    given = extract(model, tmp_path / "q1", like=train, checkpoints=earlier)
    found = extract(model, tmp_path / "q2", like=train)
    alone = extract(model, tmp_path / "q3", like=train, checkpoints=())
    assert_array_equal(given.rows(), train.rows())
    assert_array_equal(found.rows(), train.rows())
    assert_array_equal(alone.rows(), extract(model, tmp_path / "l", compressor=Dropout(k=200)).rows())
    sampled = extract(model, tmp_path / "q4", like=train, labels="sampled")
    assert "checkpoints" not in sampled.attrs
    with pytest.raises(MismatchError, match="expected the checkpoints of"):
        extract(model, tmp_path / "q5", like=train, checkpoints=earlier[:1])
    paths[0].unlink()
    with pytest.raises(InputError, match="nothing there"):
        extract(model, tmp_path / "q6", like=train)
    with pytest.raises(InputError, match="expected checkpoints= for rows like those"):
        extract(
            model, tmp_path / "q7", like=extract(model, tmp_path / "m", checkpoints=earlier, compressor=Dropout(k=9))
        )
    with pytest.raises(InputError, match="sampled labels"):
        extract(model, tmp_path / "q8", like=train, labels="sampled", checkpoints=earlier)


def test_a_killed_run_is_resumed_within_a_batch(tmp_path):
    model, earlier = training()
    whole = extract(model, tmp_path / "whole", checkpoints=earlier, compressor=Dropout(k=200), storage=Storage(4, 2))
    calls = []

    def counted(model, batch):
        calls.append(len(batch[0]))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return loss(model, batch)

    def run():
        how = {"checkpoints": earlier, "compressor": Dropout(k=200), "storage": Storage(4, 2), "dtype": "float32"}
        return extract_gradients(
            model, counted, batches(*data(Mlp, N), 8), tmp_path / "s", check_gradients=False, **how
        )

    stop = 11  # in the fourth batch, of three runs each
    with pytest.raises(KeyboardInterrupt):
        run()
    committed, stop = GradientStore.open(tmp_path / "s").n, 0
    calls.clear()
    store = run()
    assert committed >= 16
    assert len(calls) <= 1 + 3 * (N - committed) / 8  # the losses of the first batch, and what is missing
    assert_allclose(store.rows(), whole.rows(), rtol=1e-5, atol=1e-7)
    with pytest.raises(MismatchError, match="checkpoints"):
        extract(model, tmp_path / "s", checkpoints=earlier[:1], compressor=Dropout(k=200), storage=Storage(4, 2))


def test_shards_and_merged_stores(tmp_path):
    model, earlier = training()
    how = {"checkpoints": earlier, "compressor": Dropout(k=200)}
    whole = extract(model, tmp_path / "whole", **how)
    init_store(model, tmp_path / "s", N, dtype="float32", storage=Storage(4, 1), **how)
    for shard in ((0, 2), (1, 2)):
        extract(model, tmp_path / "s", shard=shard, storage=Storage(4, 1), **how)
    assert_allclose(GradientStore.open(tmp_path / "s").rows(), whole.rows(), rtol=1e-5, atol=1e-7)
    other = extract(model, tmp_path / "other", compressor=Dropout(k=200))
    with pytest.raises(MismatchError, match="checkpoints"):
        merge_stores([whole, other], tmp_path / "merged")


def test_what_is_no_checkpoint_of_the_model_is_refused(tmp_path):
    model, (first, _) = training()
    state, x = first.state_dict(), {"compressor": Dropout(k=50)}
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    refused = {
        "without last.bias": {name: value for name, value in state.items() if name != "last.bias"},
        "with extra.weight": state | {"extra.weight": torch.zeros(2)},
        r"last.bias as \(5,\) float32": state | {"last.bias": torch.zeros(4)},
        "last.weight as": state | {"last.weight": torch.zeros(5, 20, dtype=torch.int8)},
        "nothing there": tmp_path / "none.pt",
        "a folder without any": tmp_path / "empty",
        "a file of tensors at .*broken": tmp_path / "broken.pt",
        "a file of tensors at .*list": tmp_path / "list.pt",
        "received int": [3],
    }
    for message, source in refused.items():
        with pytest.raises((InputError, MismatchError), match=message):
            extract(model, tmp_path / "s", checkpoints=source, **x)

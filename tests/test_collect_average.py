"""Averages of rows collected in training: the mean of each sample's rows, whenever the training is killed."""

from __future__ import annotations

import copy
import functools
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Mlp, data, make
from numpy.testing import assert_allclose, assert_array_equal
from test_collect import B, N, train, training

import ooc_influence as ooc
from ooc_influence import Dropout, Eigenbasis, GradientStore, KroneckerBasis, Storage, average_rows
from ooc_influence.errors import InputError, MismatchError, StoreBusyError, StoreExistsError
from ooc_influence.store import average

pytestmark = [
    pytest.mark.filterwarnings("ignore:gradients cover"),
    pytest.mark.filterwarnings("ignore:the model is not the one"),
]
EPOCH = N // B  # steps
HOW = {"compressor": Dropout(k=60), "dtype": "float32", "columns": ["epoch"]}


def longer(epochs=3, seed=0):
    """A training of some epochs, each in an order of its own; the last batch of each has fewer samples."""
    model, optimizer, _ = training(Mlp, seed)
    x, y = data(Mlp, N)
    drawn = torch.Generator().manual_seed(5)
    parts = [part for _ in range(epochs) for part in torch.randperm(N, generator=drawn)[: N - 2].split(B)]
    return model, optimizer, [(part, x[part], y[part]) for part in parts]


def run(collector, model, optimizer, batches, first=0, fold=True):
    """Train; fold after every epoch."""
    for number in range(first, len(batches)):
        train(model, optimizer, batches[: number + 1], collector, first=number)
        if fold and number % EPOCH == EPOCH - 1:
            collector.fold()


def collected(path, *, average, batches=None, fold=True, **options):
    model, optimizer, made = longer()
    with ooc.collect(model, path, average=average, **HOW | options) as collector:
        run(collector, model, optimizer, batches or made, fold=fold and average)
    return GradientStore.open(path), model


def means(store, values=None):
    """The mean of a plain store's live rows by example, in float64, by their first appearance: ids, means, counts."""
    live = ~store.dropped
    examples = store.column("example")[live]
    rows = (store.rows() if values is None else values)[live].astype(np.float64)
    ids = list(dict.fromkeys(examples.tolist()))
    return ids, np.array([rows[examples == each].mean(0) for each in ids]), [np.sum(examples == each) for each in ids]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("plain") / "s", average=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("whole") / "s", average=True)[0]


def test_averages_are_the_means_of_single_rows(tmp_path, plain):
    averages, model = collected(tmp_path / "a", average=True)
    ids, rows, counts = means(plain[0])
    assert averages.ids().tolist() == ids
    assert_allclose(averages.rows(), rows, rtol=1e-6, atol=1e-8)
    assert_array_equal(averages.column("rows"), counts)
    assert len(set(counts)) > 1  # some samples were left out of an epoch
    assert_allclose(averages.grad_norm, np.linalg.norm(rows, axis=1), rtol=1e-6)
    last = dict(zip(*(plain[0].column(name) for name in ("example", "step")), strict=True))
    assert averages.column("step").tolist() == [last[each] for each in ids]
    assert averages.column("epoch").max() == plain[0].column("epoch").max()
    assert all(torch.equal(*each) for each in zip(model.parameters(), plain[1].parameters(), strict=True))
    assert [each.name for each in tmp_path.iterdir()] == ["a"]  # nothing is left beside it
    assert averages.verify() == []
    assert averages.model_fingerprint == plain[0].model_fingerprint


def test_losses_are_the_means(tmp_path):
    stores = []
    for average_them in (False, True):
        model, (x, y) = make(Mlp).eval(), data(Mlp, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / f"{average_them}"
        with ooc.collect(model, path, compressor=Dropout(k=50), average=average_them) as collector:
            for _ in range(3):
                with collector.step([f"sample {number}" for number in range(8)]) as step:
                    losses = F.cross_entropy(model(x), y, reduction="none")
                    step.record(losses)
                    losses.mean().backward()
                optimizer.step()
                if average_them:
                    collector.fold()
        stores.append(GradientStore.open(path))
    ids, losses, _ = means(stores[0], stores[0].loss)
    assert_allclose(stores[1].loss, losses, rtol=1e-6)
    assert stores[1].ids().tolist() == ids == [f"sample {number}" for number in range(8)]


def test_rows_that_are_reduced_or_not_finite(tmp_path):
    """Averages are of the reduced rows; a row with NaN does not count, nor does a sample that has no other."""

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    stores = []
    for average_them in (False, True):
        model, optimizer, batches = longer()
        pilot = [(x, y) for _, x, y in batches[:EPOCH]]
        with ooc.collect(
            model, tmp_path / f"{average_them}", losses, pilot=pilot, compressor=Dropout(k=60, reduce=Eigenbasis(8)),
            dtype="float32", on_nonfinite="skip", average=average_them, check_gradients=False,
        ) as collector:  # fmt: skip
            for number, (ids, x, y) in enumerate(batches):
                bad = (ids == batches[0][0][0]) | (number < EPOCH) & (ids == batches[0][0][1])
                with collector.step(ids):
                    F.cross_entropy(model(torch.where(bad[:, None], torch.nan, x)), y).backward()
                optimizer.zero_grad()
                if average_them and number == EPOCH:
                    collector.fold()
        stores.append(GradientStore.open(tmp_path / f"{average_them}"))
    ids, rows, counts = means(stores[0])
    assert 0 < stores[0].dropped.sum() < stores[0].n
    assert batches[0][0][0].item() not in ids
    assert stores[1].ids().tolist() == ids
    assert_allclose(stores[1].rows(), rows, rtol=1e-5, atol=1e-6 * np.abs(rows).max())
    assert_array_equal(stores[1].column("rows"), counts)
    assert stores[1].is_reduced
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_other_representations(tmp_path, plain, dtype):
    averages, _ = collected(tmp_path / "a", average=True, dtype=dtype)
    ids, rows, _ = means(plain[0])
    assert (averages.layout.dtype, averages.ids().tolist()) == (dtype, ids)
    assert np.linalg.norm(averages.rows() - rows) < 0.02 * np.linalg.norm(rows)


def test_chunks_blocks_and_folds_make_no_difference(tmp_path, plain, monkeypatch):
    once, _ = collected(tmp_path / "once", average=True, fold=False)
    monkeypatch.setattr(average, "_SUM_BYTES", 8 * 60 * 3)  # three averages at a time
    monkeypatch.setattr(average, "BLOCK_BYTES", 4 * 60 * 2)
    small, _ = collected(tmp_path / "small", average=True, fold=False, storage=Storage(chunk_rows=3, group_chunks=2))
    assert_array_equal(small.rows(), once.rows())
    assert_array_equal(small.loss, once.loss)
    folded, _ = collected(tmp_path / "folded", average=True, storage=Storage(chunk_rows=4))
    assert_allclose(folded.rows(), once.rows(), rtol=1e-6, atol=1e-8)  # of float32 between epochs
    for name in ("rows", "step", "epoch"):
        assert_array_equal(folded.column(name), once.column(name))
    made = average_rows(plain[0], tmp_path / "second pass")
    assert_array_equal(made.rows(), once.rows())


def test_continued_averages_of_a_store(tmp_path, plain):
    """Averages of two halves are those of the whole; dropped rows do not count, and dropped averages stay dropped."""
    source, half = plain[0], plain[0].n // 2
    parts = []
    for number, rows in enumerate((slice(0, half), slice(half, source.n))):
        path = tmp_path / f"{number}"
        with ooc.store.rewrite.create_like(source, path, []) as store:
            names = source.layout.columns
            store.append(
                source.rows()[rows], loss=source.loss[rows], columns={n: source.column(n)[rows] for n in names}
            )
            store.drop([1])
        parts.append(GradientStore.open(path))
    first = average_rows(parts[0], tmp_path / "first")
    assert first.n == len(set(np.delete(parts[0].column("example"), 1).tolist()))
    with GradientStore.open(first.path, "a") as store:
        store.drop([2])
    both = average_rows(parts[1], tmp_path / "both", start=tmp_path / "first")
    examples = np.concatenate([each.column("example")[~each.dropped] for each in parts])
    rows = np.concatenate([each.rows()[~each.dropped] for each in parts]).astype(np.float64)
    assert both.ids()[: first.n].tolist() == first.ids().tolist()
    assert both.n == len(set(examples.tolist()))
    assert_allclose(both.rows(), [rows[examples == each].mean(0) for each in both.ids()], rtol=1e-5, atol=1e-7)
    assert np.flatnonzero(both.dropped).tolist() == [2]
    with pytest.raises(MismatchError, match="average to another path"):
        average_rows(source, tmp_path / "both")


def test_it_resumes(tmp_path, plain, monkeypatch):
    wanted = average_rows(plain[0], tmp_path / "wanted", storage=Storage(chunk_rows=4))
    monkeypatch.setattr(average, "_SUM_BYTES", 8 * 60 * 5)
    append, calls = average._append, []

    def failing(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(average, "_append", failing)
    with pytest.raises(KeyboardInterrupt):
        average_rows(plain[0], tmp_path / "a", storage=Storage(chunk_rows=4))
    found = average_rows(plain[0], tmp_path / "a", storage=Storage(chunk_rows=4))
    assert calls[3][0] == 10  # what was committed is not computed again
    assert_array_equal(found.rows(), wanted.rows())
    assert_array_equal(found.column("step"), wanted.column("step"))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s, t: average_rows(s, t / "a", by="nothing"), "a column of whole numbers or strings of"),
        (lambda s, t: average_rows(s, t / "a", dtype="sign"), "rewrite the averages"),
        (lambda s, t: average_rows(s, t / "a", dtype="int8-linear"), "rewrite the averages"),
        (lambda s, t: average_rows(s, t / "a", start=s), "averages to continue"),
        (lambda s, t: average_rows(average_rows(s, t / "a"), t / "b", by="step"), "single rows without a column"),
    ],
)
def test_what_cannot_be_averaged(tmp_path, plain, call, match):
    with pytest.raises(InputError, match=match):
        call(plain[0], tmp_path)


def test_what_cannot_be_collected(tmp_path, plain):
    model = make(Mlp)
    with pytest.raises(InputError, match="averages of numbers"):
        ooc.collect(model, tmp_path / "a", average=True, dtype="sign")
    with pytest.raises(InputError, match="a local folder"):
        ooc.collect(model, "memory://averages/a", average=True)
    with pytest.raises(StoreExistsError, match="a store of other rows"):
        ooc.collect(model, plain[0].path, average=True)
    with pytest.raises(InputError, match="columns beside example, step, rows"):
        ooc.collect(model, tmp_path / "a", average=True, **HOW | {"columns": ["rows"]}).__enter__()
    with ooc.collect(model, tmp_path / "b", **HOW) as collector, pytest.raises(InputError, match="average=True"):
        collector.fold()
    with (
        ooc.collect(model, tmp_path / "d", average=True, **HOW) as collector,
        pytest.raises(InputError, match="ids that are whole numbers or strings"),
    ):
        collector.step([0.5, 1.5], epoch=0).__enter__()
    averages, _ = collected(tmp_path / "averages", average=True)
    with pytest.raises(MismatchError, match="average=True"):
        ooc.collect(model, averages.path, **HOW)
    with (
        pytest.raises(MismatchError, match="compressor"),
        ooc.collect(model, averages.path, average=True, **HOW | {"compressor": Dropout(k=50)}),
    ):
        pass
    with (
        ooc.collect(model, tmp_path / "c", average=True, **HOW),
        pytest.raises(StoreBusyError),
        ooc.collect(model, tmp_path / "c", average=True, **HOW),
    ):
        pass


def test_signs_and_scores_in_a_kronecker_basis(tmp_path):
    """The basis is one of the second epoch; averages have its curvature, and make sign rows with exact norms."""

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    how = {"compressor": Dropout(k=120, basis=KroneckerBasis()), "columns": ["epoch"]}
    trained = []
    for average_them in (None, False, True):
        model, optimizer, batches = longer()
        pilot = [(x, y) for _, x, y in batches[:EPOCH]]
        for number in range(EPOCH):  # the first epoch is trained alone
            train(model, optimizer, batches[: number + 1], first=number)
        model.last.weight.grad = torch.ones_like(model.last.weight)  # a half-finished accumulation, say
        if average_them is None:
            for number in range(EPOCH, len(batches)):
                train(model, optimizer, batches[: number + 1], first=number)
        else:
            state = torch.get_rng_state()
            made = ooc.collect(model, tmp_path / f"{average_them}", losses, pilot=pilot, average=average_them, **how)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
            assert model.training
            with made as collector:
                run(collector, model, optimizer, batches, EPOCH, fold=average_them)
        trained.append(model)
    for model in trained[1:]:
        assert all(torch.equal(*each) for each in zip(model.parameters(), trained[0].parameters(), strict=True))
    averages = GradientStore.open(tmp_path / "True")
    wanted = means(GradientStore.open(tmp_path / "False"))
    assert averages.mask.has_basis
    assert averages.ids().tolist() == wanted[0]
    assert_allclose(averages.rows(), wanted[1], atol=2e-3 * np.abs(wanted[1]).max())
    x, y = data(Mlp, 5)
    model.eval()
    ooc.extract_gradients(model, losses, [(x, y)], tmp_path / "q", like=averages, dtype="float32")
    earlier = trained[1].state_dict() | {"last.weight": 0.5 * model.last.weight.detach()}
    own = GradientStore.open(tmp_path / "q").rows()
    ooc.extract_gradients(model, losses, [(x, y)], tmp_path / "both", like=averages, dtype="float32",
                          checkpoints=[earlier])  # fmt: skip
    model.load_state_dict(earlier)
    other = ooc.extract_gradients(model, losses, [(x, y)], tmp_path / "other", like=averages, dtype="float32",
                                  check_model=False).rows()  # fmt: skip
    assert_allclose(GradientStore.open(tmp_path / "both").rows(), (own + other) / 2, rtol=1e-5, atol=1e-6)
    scores = ooc.influence_scores(tmp_path / "q", averages, curvature="kronecker").compute()
    summed = ooc.group_influence(tmp_path / "q", tmp_path / "False", by="example", curvature="kronecker")
    order = np.argsort(averages.ids())
    assert_allclose(scores[:, order], summed.means, rtol=0.02, atol=2e-3 * np.abs(scores).max())
    signs = ooc.rewrite_store(averages, tmp_path / "signs")
    assert signs.ids().tolist() == averages.ids().tolist()
    assert_array_equal(signs.column("rows"), averages.column("rows"))
    found = ooc.influence_scores(tmp_path / "q", signs, curvature="kronecker").compute()
    assert np.corrcoef(found.ravel(), scores.ravel())[0, 1] > 0.8  # of 120 bits
    own = ooc.influence_scores(averages, averages, curvature="kronecker").compute().diagonal()
    assert_allclose(signs.column("self_influence_0.03"), own, rtol=1e-3)
    ooc.fit_fisher(averages)
    top = ooc.top_influential(tmp_path / "q", averages, top=3)
    assert top.proponents.ids.shape == (5, 3)


@contextmanager
def interrupted(made):
    """A collector's context that ends with an exception."""
    with suppress(KeyboardInterrupt), made as collector:
        yield collector
        raise KeyboardInterrupt


def saved(collector, model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), collector.state_dict()))


def restored(state, seed=3):
    model, optimizer, batches = longer(seed=seed)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    return model, optimizer, batches


def test_it_continues_from_the_last_two_checkpoints(tmp_path, whole):
    model, optimizer, batches = longer()
    states = []
    with interrupted(ooc.collect(model, tmp_path / "a", average=True, **HOW)) as collector:
        for number in range(10):
            train(model, optimizer, batches[: number + 1], collector, first=number)
            if number % EPOCH == EPOCH - 1:
                collector.fold()
            if number in (1, 5, 6):
                states.append(saved(collector, model, optimizer))
    assert not (tmp_path / "a").exists()
    shutil.copytree(tmp_path, tmp_path / "copies")
    for number, folder in ((1, "copies"), (2, ".")):
        model, optimizer, batches = restored(states[number])
        with ooc.collect(model, tmp_path / folder / "a", average=True, **HOW) as collector:
            with pytest.raises(MismatchError, match="last two checkpoints"):
                collector.load_state_dict(states[0][2])
            collector.load_state_dict(states[number][2])
            run(collector, model, optimizer, batches, 6 if number == 1 else 7)
        found = GradientStore.open(tmp_path / folder / "a")
        assert_array_equal(found.ids(), whole.ids())
        assert_array_equal(found.rows(), whole.rows())
        assert_array_equal(found.column("step"), whole.column("step"))


def test_a_finished_training_keeps_what_its_last_checkpoint_needs(tmp_path, whole):
    """It can be continued from there, or further from its end; without a later row, nothing is kept."""
    model, optimizer, batches = longer()
    with ooc.collect(model, tmp_path / "a", average=True, **HOW) as collector:
        run(collector, model, optimizer, batches[:7])
        state = saved(collector, model, optimizer)
        run(collector, model, optimizer, batches, 7)
    assert_array_equal(GradientStore.open(tmp_path / "a").rows(), whole.rows())
    assert len(list(tmp_path.iterdir())) == 2
    model, optimizer, batches = restored(state)
    with ooc.collect(model, tmp_path / "a", average=True, **HOW) as collector:
        collector.load_state_dict(state[2])
        run(collector, model, optimizer, batches, 7)
        state = saved(collector, model, optimizer)
    assert_array_equal(GradientStore.open(tmp_path / "a").rows(), whole.rows())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a"]
    with ooc.collect(model, tmp_path / "a", average=True, **HOW) as collector:
        collector.load_state_dict(state[2])
    assert_array_equal(GradientStore.open(tmp_path / "a").rows(), whole.rows())
    with ooc.collect(model, tmp_path / "a", average=True, **HOW) as collector:
        train(model, optimizer, batches, collector, first=11)
    assert GradientStore.open(tmp_path / "a").column("rows").sum() == whole.column("rows").sum() + len(batches[11][0])


def test_rows_of_an_interrupted_training_are_not_counted_twice(tmp_path):
    model, optimizer, batches = longer()
    with interrupted(ooc.collect(model, tmp_path / "a", average=True, **HOW)) as collector:
        run(collector, model, optimizer, batches[:6])
    with (
        ooc.collect(model, tmp_path / "a", average=True, **HOW) as collector,
        pytest.raises(MismatchError, match="checkpoint that an interrupted training continues from"),
    ):
        run(collector, model, optimizer, batches[:1])
    assert GradientStore.open(tmp_path / "a").column("rows").sum() == 6 * B - 2  # finished as they were


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_collect_average as t
from ooc_influence.extract import averages

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def prepare(kill):
    if kill == "fold":  # the second one, after some of its rows are committed
        t.average._SUM_BYTES = 8 * 60 * 5
        append, made = t.average._append, []
        def failing(source, before, target, *rest):
            made.append(before is not None)
            if sum(made) == 3:
                target.flush()
                die()
            append(source, before, target, *rest)
        t.average._append = failing
    elif kill == "recorded":  # the second fold is finished, which is not recorded yet
        record = averages.Averages._record
        def recording(store, **facts):
            die() if facts["generation"] == 2 else record(store, **facts)
        averages.Averages._record = staticmethod(recording)
    elif kill == "publish":
        published = averages.publish_folder
        averages.publish_folder = lambda *both: (published(*both), die())

def run(folder, kill):
    prepare(kill)
    model, optimizer, batches = t.longer()
    with t.ooc.collect(model, folder + "/a", average=True, storage=t.Storage(chunk_rows=4), **t.HOW) as collector:
        first = 0
        if t.Path(folder + "/checkpoint").exists():
            saved = torch.load(folder + "/checkpoint")
            model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
            collector.load_state_dict(saved["collector"])
            first = saved["first"]
        for number in range(first, len(batches)):
            t.train(model, optimizer, batches[: number + 1], collector, first=number)
            if number % t.EPOCH == t.EPOCH - 1:
                collector.fold()
            if kill == f"step {number}":
                die()
            if number % 3 == 1:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "first": number + 1}
                state["collector"] = collector.state_dict()
                if kill == f"state {number}":
                    die()
                torch.save(state, folder + "/partial")
                os.replace(folder + "/partial", folder + "/checkpoint")

for number, kill in enumerate(sys.argv[3:]):
    folder = f"{sys.argv[2]}/{number}"
    os.makedirs(folder, exist_ok=True)
    for each in (kill, "never"):
        process = os.fork()  # before this one has any thread of its own
        if not process:
            run(folder, each)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
KILLS = ["fold", "state 7"]
MORE_KILLS = ["step 6", "step 7", "recorded", "state 10", "step 11", "publish"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return a training that was killed, in a folder of its own, and continued; and how its processes ended."""

    @functools.cache
    def run(*kills):
        folder = tmp_path_factory.mktemp("killed")
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), *kills], stdout=subprocess.PIPE,
            text=True, check=True,
        )  # fmt: skip
        codes = [int(line) for line in done.stdout.split()]
        return {kill: (folder / f"{number}", codes[2 * number : 2 * number + 2]) for number, kill in enumerate(kills)}

    return lambda kill: run(*(KILLS if kill in KILLS else MORE_KILLS))[kill]


@pytest.mark.parametrize("kill", [*KILLS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_KILLS)])
def test_a_killed_training_equals_one_that_was_not(killed, whole, kill):
    """In the journal, after a fold, in one, before it is recorded, between a state and its checkpoint, at the end."""
    folder, codes = killed(kill)
    assert codes == [-signal.SIGKILL, 0]
    found = GradientStore.open(folder / "a")
    assert_array_equal(found.ids(), whole.ids())
    assert_array_equal(found.rows(), whole.rows())
    for name in ("rows", "step", "epoch"):
        assert_array_equal(found.column(name), whole.column(name))
    assert found.verify() == []

"""Rows collected by several processes: one store of all their rows, autograd's whatever they average, crash-safe."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Mlp, data, make
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import ooc_influence as ooc
from ooc_influence import Dropout, GradientStore, Storage
from ooc_influence.errors import InputError, MismatchError, StoreBusyError, UnsupportedModelError
from ooc_influence.extract import ranks
from ooc_influence.store import LayerShape, Mask, ModuleMask

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

N, STEPS, WORLD = 48, 10, 2
SIZES = {"ddp": (5, 1), "fsdp2": (3, 3)}  # of the processes' batches: rows of one end long before the other's
SMALL = Storage(chunk_rows=4, group_chunks=2)  # blocks of 8 rows: several of each process
OPTIONS = {"compressor": Dropout(k=70), "dtype": "float32", "columns": ["rank"], "storage": SMALL}


def batches_of(rank, kind):
    x, y = data(Mlp, N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1)).repeat(2)
    parts = order.split(sum(SIZES[kind]))[:STEPS]
    return [(part.split(SIZES[kind])[rank], x, y) for part in parts]


def wrap(model, kind):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model.first, model.second, model.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def made(kind):
    model = make(Mlp)
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    model = wrap(model.train(), kind) if kind else model.train()
    return model, torch.optim.SGD(model.parameters(), lr=0.3)


def train(model, optimizer, rank, kind, collector, steps=range(STEPS)):
    for number in steps:
        ids, x, y = batches_of(rank, kind)[number]
        with collector.step(ids, step=number, rank=rank) if collector is not None else warnings.catch_warnings():
            F.cross_entropy(model(x[ids]), y[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def alone(path, kind):
    """The same training in one process: rows of every rank's batches, of the average of the ranks' losses."""
    model, optimizer = made(None)
    with ooc.collect(model, path, **OPTIONS) as collector:
        for number in range(STEPS):
            for rank in range(WORLD):
                ids, x, y = batches_of(rank, kind)[number]
                with collector.step(ids, step=number, rank=rank, scale=1 / WORLD):
                    (F.cross_entropy(model(x[ids]), y[ids]) / WORLD).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def live_rows(path):
    """The live rows by (rank, step, example)."""
    store = GradientStore.open(path)
    assert store.layout.planned_rows in (None, store.n)
    columns = zip(store.column("rank"), store.column("step"), store.column("example"), strict=True)
    keys = [tuple(int(value) for value in key) for key in columns]
    return {key: row for key, row, dropped in zip(keys, store.rows(), store.dropped, strict=True) if not dropped}


def assert_same_rows(found, wanted):
    found, wanted = live_rows(found), live_rows(wanted)
    assert set(found) == set(wanted)
    assert len(found) == STEPS * 6
    for key, row in wanted.items():
        assert_allclose(found[key], row, rtol=1e-4, atol=1e-6)


def spawn(function, folder, *args):
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(started, (function, str(folder), args), nprocs=WORLD)


def started(rank, function, folder, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks._AHEAD = 2  # blocks: the plan is extended several times
    store = torch.distributed.FileStore(f"{folder}/rendezvous", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        function(rank, folder, *args)
    finally:
        torch.distributed.destroy_process_group()


def collecting(rank, folder, kind):
    model, optimizer = made(kind)
    with ooc.collect(model, f"{folder}/s", **OPTIONS) as collector:
        train(model, optimizer, rank, kind, collector)
    plain, optimizer = made(kind)
    train(plain, optimizer, rank, kind, None)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(values(model), values(plain), strict=True))
    store = GradientStore.open(f"{folder}/s")  # finished, as each process sees it
    assert store.n == store.committed == store.layout.planned_rows
    assert store.attrs["verification"]["share"] == 1.0
    torch.save(values(model), f"{folder}/values-{rank}")


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_one_store_has_the_rows_of_all_processes(tmp_path, kind):
    spawn(collecting, tmp_path, kind)
    model = alone(tmp_path / "alone", kind)
    for mine, theirs in zip(torch.load(tmp_path / "values-0"), values(model), strict=True):
        assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert_same_rows(tmp_path / "s", tmp_path / "alone")
    store = GradientStore.open(tmp_path / "s")
    assert store.n <= WORLD * 8 * -(-STEPS * max(SIZES[kind]) // 8)
    assert not store.verify()
    ooc.compact_store(store, tmp_path / "compact")
    assert_same_rows(tmp_path / "compact", tmp_path / "alone")
    assert GradientStore.open(tmp_path / "compact").n == STEPS * 6
    assert store.attrs["model"]["fingerprint"].startswith("2:")


def killed(rank, folder, kill):
    """Checkpoints after every third step; killed in one, it continues from the last."""
    model, optimizer = made("ddp")
    with ooc.collect(model, f"{folder}/s", **OPTIONS) as collector:
        first = 0
        if Path(f"{folder}/checkpoint").exists():
            saved = torch.load(f"{folder}/checkpoint")
            model.load_state_dict(saved["model"])
            collector.load_state_dict(saved["collector"])
            first = saved["first"]
        for number in range(first, STEPS):
            train(model, optimizer, rank, "ddp", collector, [number])
            if number == kill:
                if rank == 0:  # has committed rows past the checkpoint, which are collected again
                    collector._output.sink.store.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            if number % 3 == 2:
                state = {"model": model.state_dict(), "collector": collector.state_dict(), "first": number + 1}
                if rank == 0:
                    torch.save(state, f"{folder}/partial")
                    Path(f"{folder}/partial").replace(f"{folder}/checkpoint")


@pytest.mark.slow
def test_killed_processes_have_each_step_once(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        spawn(killed, tmp_path, 7)
    spawn(killed, tmp_path, None)
    alone(tmp_path / "alone", "ddp")
    assert_same_rows(tmp_path / "s", tmp_path / "alone")
    store = GradientStore.open(tmp_path / "s")
    collected_again = store.dropped & (store.column("step") >= 0)
    assert collected_again.any()
    assert (store.column("step")[collected_again] >= 6).all()
    with pytest.raises(MismatchError, match="training in 2 processes"):
        ooc.collect(made(None)[0], tmp_path / "s", **OPTIONS).__enter__()


def wrong(rank, folder):
    model, _ = made("ddp")
    with pytest.raises(InputError, match="one store for all 2 processes"):
        ooc.collect(model, f"{folder}/{rank}", **OPTIONS).__enter__()
    sharded, _ = made("fsdp2")
    pilot = {"pilot": [torch.zeros(2, 12)], "compressor": Dropout(k=10, sampling="importance")}
    with pytest.raises(UnsupportedModelError, match="run a pilot in one of them"):
        ooc.collect(sharded, f"{folder}/s", lambda m, x: m(x).sum(1), **pilot)
    with pytest.raises(UnsupportedModelError, match="used without calling the layer"):
        uncalled(sharded, f"{folder}/u", rank)
    collector = ooc.collect(model, f"{folder}/s", **OPTIONS)
    with collector, pytest.raises(MismatchError, match="in 2 processes; received 3 rows"):
        collector.load_state_dict({"rows": 3, "step": 1})
    x, y = data(Mlp, N)
    losses = {"per_sample_loss": lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none")}
    batches = [(x[rank * 8 : rank * 8 + 8], y[rank * 8 : rank * 8 + 8])]  # each process has others
    own = {"compressor": Dropout(k=50, sampling="importance"), "pilot": batches, "columns": ["rank"]}
    with ooc.collect(model, f"{folder}/p", **losses, **own) as collector:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), rank, "ddp", collector, range(2))
    assert GradientStore.open(f"{folder}/p").mask.digest == collector._output.plan.mask.digest


def uncalled(model, path, rank):
    """A training that uses the weight of a sharded layer by itself."""
    ids, x, y = batches_of(rank, "fsdp2")[0]
    with ooc.collect(model, path, **OPTIONS) as collector, collector.step(ids, rank=rank):
        hidden = model.second(model.first(x[ids]))
        F.cross_entropy(hidden @ model.last.weight.full_tensor().T, y[ids]).backward()


def test_what_is_refused_and_a_pilot_in_the_first_process(tmp_path):
    spawn(wrong, tmp_path)


def test_a_store_is_extended_while_another_process_writes(tmp_path):
    mask = Mask((ModuleMask(LayerShape("a", "linear", (2, 2), False), *ENTRIES),))
    storage = Storage(chunk_rows=2, group_chunks=1)
    GradientStore.create(tmp_path / "s", mask, storage=storage, planned_rows=4, dtype="float32").close()
    first, second = (GradientStore.open(tmp_path / "s", "a") for _ in range(2))
    first.turns_writer(0, 2, 0)
    second.extend(8)
    second.turns_writer(1, 2, 2)
    rows = np.arange(8, dtype=np.float32)[:, None] + np.ones(4, np.float32)
    first.append(rows[:2], loss=np.zeros(2))
    with pytest.raises(StoreBusyError, match="turns-1-of-2"):
        GradientStore.open(tmp_path / "s", "a").turns_writer(1, 2, 2)
    with pytest.raises(StoreBusyError):
        GradientStore.open(tmp_path / "s", "a").plan_rows(12)
    with pytest.raises(InputError, match="every 2th from group 1"):
        GradientStore.open(tmp_path / "s", "a").turns_writer(1, 2, 4)
    first.extend(8)  # has been done
    first.writer().move_to(4, 6)
    second.append(rows[2:4], loss=np.zeros(2))
    second.writer().move_to(6, 8)
    for number, each in ((6, second), (4, first)):
        each.append(rows[number : number + 1], loss=np.zeros(1))
        with pytest.raises(InputError, match="1 rows left"):
            each.writer().move_to(8, 10)
        each.append(rows[number + 1 : number + 2], loss=np.zeros(1))
        each.close()
    assert_array_equal(GradientStore.open(tmp_path / "s").rows(), rows)
    assert not GradientStore.open(tmp_path / "s").verify()
    with pytest.raises(InputError, match="whole groups of 2"):
        first.extend(9)


ENTRIES = (np.array([0, 0, 1, 1], np.int32), np.array([0, 1, 0, 1], np.int32), np.ones(4, np.float32))

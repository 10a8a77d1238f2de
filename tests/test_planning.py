"""Plans against what stages then take: bytes on disk, peak memory in fresh processes; rates, refusals, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_rows, roomy, whole_mask, write_store
from test_cli import run  # noqa: F401 - a fixture
from test_memory_measured import write

import ooc_influence as ooc
from ooc_influence import (
    GradientStore,
    fit_fisher,
    fit_gram,
    influence_scores,
    planning,
    self_influence,
    top_influential,
)
from ooc_influence.compress.eigenbasis import fit_eigenbasis
from ooc_influence.curvature import BlockShape, precondition_bytes, self_influence_bytes
from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.memory import MemoryBudget
from ooc_influence.planning import Rates
from ooc_influence.store import tree_bytes

GIVEN = {"gflops": 100.0, "read_rate": 1e9}
CHILD = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    + """
import json, sys
import ooc_influence as ooc
import ooc_influence.curvature.fit, ooc_influence.influence
from ooc_influence.memory import PeakMemory
stage, query, train, values = sys.argv[1], *sys.argv[2:4], int(sys.argv[4])
store = ooc.GradientStore.open(train)
planned = ooc.plan(
    store.n, store.k, queries=ooc.GradientStore.open(query).n, dampings=values, memory="3GiB", top=10, gflops=100,
    read_rate=1e9, folder=sys.argv[5],
)[stage].peak
options = {"memory": "3GiB", "workers": 1}
damping = [0.1 * (1 + number) for number in range(values)]
with PeakMemory(interval=0.0005) as watch:
    if stage == "fisher":
        ooc.fit_fisher(train, refit=True, **options)
    elif stage == "self-influence":
        ooc.self_influence(train, damping=damping, **options)
    elif stage == "scores":
        ooc.influence_scores(query, train, out=sys.argv[5] + "/scores", damping=damping, **options)
    elif stage == "verify":
        store.verify(**options)
    else:
        ooc.top_influential(query, train, top=10, damping=damping, **options)
print(json.dumps({"peak": watch.peak, "planned": planned}))
"""
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    train = write(folder / "train.zarr", 12_000, 512)
    fit_fisher(train)
    return write(folder / "query.zarr", 300, 512), train


@pytest.mark.parametrize(
    ("stage", "values"),
    [("fisher", 1), ("self-influence", 1), ("self-influence", 8), ("scores", 1), ("scores", 4), ("top 10", 4),
     ("verify", 1)],
)  # fmt: skip
def test_peak_memory_is_what_was_planned(tmp_path, stores, stage, values):
    command = [sys.executable, "-c", CHILD, stage, *map(str, stores), str(values), str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["peak"] <= found["planned"] <= found["peak"] + 200 * 2**20, {  # buffers of BLAS: more or fewer
        name: f"{value / 2**20:.0f} MiB" for name, value in found.items()
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "int4"])
def test_bytes_on_disk_are_what_was_planned(tmp_path, dtype):
    with GradientStore.create(tmp_path / "t.zarr", whole_mask(500), dtype=dtype) as store:
        for _ in range(3):
            store.append(random_rows(9000, 500), loss=[0.0] * 9000)
    found = ooc.plan(27_000, 500, dtype=dtype, **GIVEN, folder=tmp_path)
    actual = tree_bytes(store.path)
    assert 0.98 * actual < found["extract train"].disk < 1.02 * actual
    fitted = fit_fisher(store, memory=roomy())
    assert 0.98 * tree_bytes(fitted.path) < found["fisher"].disk < 1.02 * tree_bytes(fitted.path)


def test_a_whole_curvature_is_planned_as_it_says(tmp_path):
    fitted = fit_fisher(write_store(tmp_path / "t.zarr", random_rows(300, 30)))
    for queries, values in ((1, 1), (70, 1), (5, 8)):
        assert precondition_bytes([BlockShape(30, 30)], queries, values) == fitted.working_bytes(queries, values)
        assert self_influence_bytes([BlockShape(30, 30)], values) == fitted.self_working_bytes(values)


def test_a_top_of_the_spectrum_is_planned_where_the_whole_does_not_fit(tmp_path):
    found = ooc.plan(10**6, 100_000, memory="24GiB", **GIVEN, folder=tmp_path)
    assert found["fisher"].refusal
    part = next(stage for stage in found.stages if stage.name.startswith("fisher, rank"))
    assert part.refusal is None
    assert part.peak <= found.budget
    assert "instead of fisher, --rank" in part.note
    assert found["top 100"].refusal is None  # by that part
    assert not found.fits
    fitted = fit_fisher(write_store(tmp_path / "t.zarr", random_rows(300, 30)), rank=7)
    for queries, values in ((1, 1), (70, 1), (5, 8)):
        assert precondition_bytes([BlockShape(30, 7)], queries, values) == fitted.working_bytes(queries, values)
        assert self_influence_bytes([BlockShape(30, 7)], values) == fitted.self_working_bytes(values)


def test_every_stage_and_how_it_grows(tmp_path):
    small, large = (ooc.plan(n, 4096, queries=64, memory="4GiB", **GIVEN, folder=tmp_path) for n in (10**6, 4 * 10**6))
    names = [stage.name for stage in small.stages]
    assert names == ["extract train", "extract queries", "fisher", "scores", "top 100", "self-influence", "verify"]
    assert small.fits
    for stage, other in zip(small.stages, large.stages, strict=True):
        if stage.peak is not None and stage.name != "self-influence":  # whose result grows
            assert abs(other.peak - stage.peak) < 2**20
    read = 10**6 * 4096 * 2 / 1e9
    assert small["verify"].seconds == pytest.approx(read, rel=0.02)
    assert small["self-influence"].seconds > 2 * 10**6 * 4096**2 / 100e9
    assert large["fisher"].seconds > 3 * small["fisher"].seconds
    many = ooc.plan(10**6, 4096, queries=5000, memory="4GiB", **GIVEN, folder=tmp_path)
    assert "3 passes over the rows, 2048 queries at a time" in many["scores"].note
    assert many["scores"].disk == 4 * 5000 * 10**6
    wide = ooc.plan(10**6, 65_536, reduce=4096, memory="16GiB", **GIVEN, folder=tmp_path)
    assert wide["eigenbasis"].refusal is None
    assert wide["fisher"].peak == pytest.approx(small["fisher"].peak, rel=0.01)
    few = ooc.plan(1000, 65_536, memory="4GiB", **GIVEN, folder=tmp_path)
    assert few["fisher"].refusal is not None
    assert few["Gram side"].refusal is None


def test_what_does_not_fit_is_said(tmp_path):
    found = ooc.plan(10**6, 32_768, memory="4GiB", workers=2, **GIVEN, folder=tmp_path)
    assert not found.fits
    refusal = found["fisher"].refusal
    assert all(word in refusal for word in ("fisher for k=32768 needs", "with 2 workers, budget 4 GiB", "--memory"))
    assert found["verify"].refusal is None


def test_a_machine_is_measured_in_seconds(tmp_path):
    rates = Rates.measure(tmp_path)
    assert min(vars(rates).values()) > 1e6
    assert not list(tmp_path.iterdir())
    given = Rates.measure(tmp_path, gflops=7, read=3e8)
    assert (given.gemm, given.syrk, given.read) == (7e9, 7e9, 3e8)


def test_a_disk_is_read_where_stores_are(tmp_path, monkeypatch):
    """Some of their chunks, not a file that was just written; of small stores there is too little to read."""
    train = write_store(tmp_path / "train.zarr", random_rows(200, 16), chunk_rows=10)
    read, rate = [], planning._read_rate
    monkeypatch.setattr(planning, "_read_rate", lambda files: (read.append(set(files)), rate(files))[1])
    Rates.measure(tmp_path, gflops=7)
    chunks = set((train.path / "gradients").glob("c.*"))
    assert not read[0] & chunks
    monkeypatch.setattr(planning, "_FILE", 1000)
    for folder in (tmp_path, train.path):
        assert Rates.measure(folder, gflops=7).read > 1e4
    assert read[1:] == [chunks, chunks]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "rows >= 1"), ({"k": -1}, "k >= 1"), ({"reduce": 600}, "reduce between 1 and 500"),
        ({"gflops": 0.0}, "gflops above 0"), ({"dtype": "float8"}, "expected dtype"), ({"workers": 0}, "workers >= 1"),
    ],
)  # fmt: skip
def test_mistakes(wrong, message):
    with pytest.raises(InputError, match=message):
        ooc.plan(**{"rows": 1000, "k": 500, **GIVEN, **wrong})


def test_the_command(run):  # noqa: F811
    line = "plan --rows 1000000 --k 4096 --queries 64 --memory 4GiB --workers 2 --gflops 100 --read-rate 1GiB"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    for word in ("fisher", "top 100", "self-influence", "peak memory", "7.7", "budget 4 GiB a process", "GFLOP/s"):
        assert word in out
    code, out, _ = run(line + " --json")
    found = json.loads(out)
    assert (code, found["fits"], found["budget"]) == (0, True, 4 * 2**30)
    assert {"name", "disk", "peak", "read", "flops", "seconds"} <= found["stages"][0].keys()
    code, out, _ = run("plan --rows 1000000 --k 65536 --memory 4GiB --gflops 100 --read-rate 1GiB")
    assert code == 1
    assert "fisher: fisher for k=65536 needs" in out
    code, _, err = run("plan --rows 0 --k 5")
    assert (code, "rows >= 1" in err) == (2, True)


@pytest.mark.parametrize(
    "stage", ["eigenbasis", "fisher", "fisher, rank", "Gram side", "scores", "top 10", "self-influence", "verify"]
)
def test_a_plan_is_what_the_call_itself_projects(tmp_path, stage, monkeypatch):
    """Each stage's peak or refusal is that of the memory model which the call plans its blocks by."""
    monkeypatch.setattr("ooc_influence.memory.process_anonymous", lambda: 0)
    n, k, r = 300, 700, 20
    train, query = (GradientStore.open(write(tmp_path / f"{rows}.zarr", rows, k)) for rows in (n, 5))

    def out(options):
        return tmp_path / f"{options['memory']}.out"

    scored = {"curvature": fit_fisher(train), "damping": [0.1, 1.0]}
    calls = {
        "eigenbasis": lambda **o: fit_eigenbasis(train, r, rows=4 * r, **o),
        "fisher": lambda **o: fit_fisher(train, out=out(o), **o),
        "Gram side": lambda **o: fit_gram(train, out=out(o), **o),
        "scores": lambda **o: influence_scores(query, train, out=out(o), **scored, **o),
        "top 10": lambda **o: top_influential(query, train, top=10, **scored, **o),
        "self-influence": lambda **o: self_influence(train, **scored, **o),
        "verify": lambda **o: train.verify(**o),
    }
    budgets = [2**30, 2**20]
    if stage == "fisher, rank":  # is planned where F does not fit
        budgets = [ooc.plan(n, k, **GIVEN)["fisher"].memory.peak(16) - 1]
        stage = next(each.name for each in ooc.plan(n, k, memory=budgets[0], **GIVEN).stages if "rank" in each.name)
        rank = int(stage.split()[-1])
        calls[stage] = lambda **o: fit_fisher(train, rank=rank, out=tmp_path / "rank.zarr", **o)
    plain, used = MemoryBudget.plan, []
    monkeypatch.setattr(MemoryBudget, "plan", lambda budget, model: used.append(model) or plain(budget, model))
    reduce = r if stage == "eigenbasis" else None
    for memory in budgets:
        found = ooc.plan(n, k, queries=5, dampings=2, top=10, memory=memory, reduce=reduce, folder=tmp_path, **GIVEN)
        used.clear()
        refusal = None
        try:
            calls[stage](memory=memory, workers=1)
        except MemoryBudgetError as error:
            refusal = str(error)
        assert used[-1] == found[stage].memory
        peak = used[-1].peak(MemoryBudget(memory, 0).block_rows(used[-1]))
        assert found[stage].peak == peak
        assert (refusal is None) == (found[stage].refusal is None) == (peak <= memory)
        if refusal is not None:
            assert refusal.replace(str(train.path), "TRAIN") == found[stage].refusal


def test_signs_are_planned_with_the_curvature_of_their_basis():
    signs = ooc.plan(10**6, 4 * 10**6, dtype="sign", memory="8GiB", **GIVEN)
    names = [stage.name for stage in signs.stages]
    assert names == ["extract train", "extract queries", "scores", "top 100", "self-influence", "verify"]
    assert signs.fits
    assert 10**6 * 4 * 10**6 / 8 < signs["extract train"].disk < 1.01 * 10**6 * 4 * 10**6 / 8
    assert 2 * 4 * 10**6 <= signs["extract queries"].disk / 100 < 2.02 * 4 * 10**6  # float16
    assert "53.4 MiB for each sample of a batch" in signs["extract train"].note
    assert ooc.plan(10**6, 2**17, dtype="int8", memory="8GiB", **GIVEN).stages[2].name == "fisher"

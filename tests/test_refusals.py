"""Refusals: what does not fit a budget offers alternatives that do, with their prices; a chunk lost during a run."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
from conftest import random_rows, write_store

from ooc_influence import (
    GradientStore,
    Storage,
    fit_curvature,
    fit_fisher,
    fit_gram,
    gram_matrix,
    group_influence,
    influence_scores,
    reduce_store,
    self_influence,
    top_influential,
)
from ooc_influence.curvature import dual, sums
from ooc_influence.curvature.costs import fisher_memory, gram_memory
from ooc_influence.errors import MemoryBudgetError, StoreDamagedError
from ooc_influence.influence import request, search
from ooc_influence.influence.costs import TileMemory
from ooc_influence.linalg import accumulate
from ooc_influence.memory import Alternative, MemoryBudget, MemoryModel, ProblemSize, format_bytes, parse_bytes
from ooc_influence.store import LayerShape, Mask, ModuleMask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*effective dimension"),
    pytest.mark.filterwarnings("ignore:.*outside the span"),
]
K, N, MODULES = 1200, 100, 4


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """Budgets of so many bytes, whatever the tests before left in this process."""
    monkeypatch.setattr("ooc_influence.memory.process_anonymous", lambda: 0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A query and a train store of four modules."""
    folder, side = tmp_path_factory.mktemp("refused"), K // MODULES
    entries = np.arange(side, dtype=np.int32)
    parts = [
        ModuleMask(LayerShape(f"fc{n}", "linear", (1, side), False), 0 * entries, entries, np.ones(side, np.float32))
        for n in range(MODULES)
    ]
    found = []
    for name, n, seed in (("query", 3, 1), ("train", N, 0)):
        rows = np.random.default_rng(seed).normal(size=(n, K)).astype(np.float32)
        with GradientStore.create(folder / f"{name}.zarr", Mask(tuple(parts)), dtype="float32") as store:
            store.append(rows, loss=np.zeros(n))
        found.append(GradientStore.open(folder / f"{name}.zarr"))
    return tuple(found)


@pytest.fixture(scope="module")
def fitted(stores):
    fit_fisher(stores[1])
    return stores


def refuse(call, model):
    """Call with one byte too few; return the budget and the message."""
    budget = MemoryBudget(0, 0).price(model) - 1
    with pytest.raises(MemoryBudgetError) as caught:
        call(budget)
    message = str(caught.value)
    assert "\n" not in message
    numbers = re.search(r"needs (\S+ \S+) with \d+ workers?, budget (\S+ \S+): use", message)
    assert numbers[2] == format_bytes(budget)
    return budget, message


def offered(message):
    """The prices of the alternatives, by their words."""
    ways = message.partition(": use ")[2].split(", or ")
    priced = [re.fullmatch(r"(.*?) \(([\d.]+ \w+)(?:: (.*))?\)", way) for way in ways]
    return {found[1]: (parse_bytes(found[2]), found[3]) for found in priced if found}


def test_every_alternative_of_a_fisher_fit_works(tmp_path, stores):
    train = stores[1]
    budget, message = refuse(
        lambda memory: fit_fisher(train, memory=memory, refit=True), fisher_memory(ProblemSize(K, N))
    )
    assert message.startswith("fisher for k=1200 needs ")
    ways = offered(message)
    r = max(int(re.match(r"reduce to (\d+)", way)[1]) for way in ways if way.startswith("reduce"))
    rank = max(int(way.partition("--rank ")[2]) for way in ways if way.startswith("--rank"))
    assert set(ways) == {f"--rank {rank}", f"reduce to {r} columns", "--blocks module", "--method dual"}
    assert all(price <= budget * 1.005 for price, _ in ways.values())  # three digits are printed
    assert ways[f"reduce to {r} columns"][1] == f"ooc-influence reduce {train.path} OUT --dims {r}"
    more = parse_bytes(re.search(r"--memory (\S+?),", message)[1])
    assert fit_fisher(train, memory=more, out=tmp_path / "whole.zarr").kind == "whole"
    assert fit_fisher(train, memory=budget, rank=rank, out=tmp_path / "top.zarr").kind == "top"
    assert fit_fisher(train, memory=budget, blocks="module", out=tmp_path / "module.zarr").kind == "module"
    assert fit_gram(train, memory=budget, out=tmp_path / "gram.zarr").kind == "gram"
    assert fit_curvature(train, memory=budget, out=tmp_path / "auto.zarr").kind == "gram"
    reduced = reduce_store(train, tmp_path / "reduced.zarr", r, memory=budget)
    assert fit_fisher(reduced, memory=budget).d == r


def test_alternatives_that_do_not_apply_are_not_offered(tmp_path, stores):
    train = stores[1]
    reduced = reduce_store(train, tmp_path / "r.zarr", 64, dtype="float32", storage=Storage(16, 2))
    with pytest.raises(MemoryBudgetError, match=r"--memory \S+, or extract with a smaller k$"):
        fit_fisher(reduced, memory=100)
    sides = [(300 * n, 300 * n + 300) for n in range(4)]
    model = fisher_memory(ProblemSize(K, N), ranges=sides)
    _, message = refuse(lambda memory: fit_fisher(train, blocks="module", memory=memory), model)
    assert "blocks" not in message.partition(": use ")[2]
    one = write_store(tmp_path / "one.zarr", random_rows(50, 400))
    _, message = refuse(lambda memory: fit_fisher(one, memory=memory), fisher_memory(ProblemSize(400, 50)))
    assert "blocks" not in message
    assert "--method dual (" in message
    long = write_store(tmp_path / "long.zarr", random_rows(1100, 300))
    _, message = refuse(lambda memory: fit_fisher(long, memory=memory), fisher_memory(ProblemSize(300, 1100)))
    assert "--method dual" not in message  # it would need more


def test_workers_are_priced(stores):
    model = fisher_memory(ProblemSize(K, N, workers=3))
    _, message = refuse(lambda memory: fit_fisher(stores[1], workers=3, memory=memory, refit=True), model)
    assert offered(message)["--workers 1"][0] < MemoryBudget(0, 0).price(model)
    assert "with 3 workers" in message


def test_the_gram_side_offers_a_sample_and_fisher(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(1100, 300))
    budget, message = refuse(lambda memory: fit_gram(train, memory=memory), gram_memory(ProblemSize(300, 1100)))
    ways = offered(message)
    assert set(ways) == {"--sample 1024", "--method primal", "--method primal --rank 256", "reduce to 256 columns"}
    assert fit_gram(train, memory=budget, sample=1024).rows == 1024
    assert fit_curvature(train, memory=budget).kind == "whole"
    with pytest.raises(MemoryBudgetError, match=r"--memory \S+, or fewer rows$"):
        gram_matrix(train, tmp_path / "k.zarr", memory=100)


def test_every_alternative_of_scoring_works(tmp_path, fitted):
    query, train = fitted
    opened = request.ScoreRequest.open(query, train, {"damping": [0.1, 1.0]})
    model = opened.memory(1).scores("scores", 1, TileMemory(per_score=12))
    budget, message = refuse(
        lambda memory: influence_scores(query, train, damping=[0.1, 1.0], memory=memory, out=tmp_path / "s.zarr"), model
    )
    ways = offered(message)
    r = max(int(re.match(r"reduce to (\d+)", way)[1]) for way in ways if way.startswith("reduce"))
    assert set(ways) == {
        "one --damping at a time", f"reduce to {r} columns", "a curvature by module", "a curvature by the dual method",
    }  # fmt: skip
    assert ways["a curvature by the dual method"][1] == f"ooc-influence fisher {train.path} --method dual"
    assert ways["a curvature by module"][1] == f"ooc-influence fisher {train.path} --blocks module"
    options = {"memory": budget, "out": tmp_path / "s.zarr"}
    both = {**options, "damping": [0.1, 1.0]}
    influence_scores(query, train, damping=0.1, **options | {"out": tmp_path / "one.zarr"})
    for number, other in enumerate(({"method": "dual"}, {"blocks": "module"})):
        curvature = fit_curvature(train, memory=budget, out=tmp_path / f"c{number}.zarr", **other)
        found = influence_scores(query, train, curvature=curvature, **both | {"out": tmp_path / f"{number}.zarr"})
        assert found.shape == (2, 3, N)
    reduced = reduce_store(train, tmp_path / "r.zarr", r, memory=budget)
    fit_fisher(reduced, memory=budget)
    asked = reduce_store(query, tmp_path / "q.zarr", like=reduced, memory=budget)
    assert influence_scores(asked, reduced, **both).shape == (2, 3, N)


@pytest.mark.parametrize("what", ["self", "top", "groups"])
def test_other_scores_price_their_alternatives_too(fitted, what):
    query, train = fitted
    if what == "self":
        opened = request.ScoreRequest.open(None, train, {})
        model = opened.memory(1).self_influence()
    else:
        opened = request.ScoreRequest.open(query, train, {"normalize": "cosine"})
        model = opened.memory(1).scores(what, 1, TileMemory())
    calls = {
        "self": lambda memory: self_influence(train, memory=memory),
        "top": lambda memory: top_influential(query, train, normalize="cosine", memory=memory),
        "groups": lambda memory: group_influence(query, train, np.zeros(N), normalize="cosine", memory=memory),
    }
    _, message = refuse(calls[what], model)
    assert {"a curvature by module", "a curvature by the dual method"} <= set(offered(message))


def test_plain_dot_products_offer_no_curvature(fitted):
    query, train = fitted
    opened = request.ScoreRequest.open(query, train, {"curvature": False})
    model = opened.memory(1).scores("scores", 1, TileMemory())
    ways = list(model.alternatives(MemoryBudget(MemoryBudget(0, 0).price(model) - 1, 0)))
    assert {way.text.split()[0] for way in ways} <= {"reduce"}


def test_only_what_fits_is_offered():
    small, large = MemoryModel("small", 1, 0, 0), MemoryModel("large", 10**9, 0, 0)
    model = MemoryModel(
        "it",
        10**10,
        0,
        0,
        alternatives=lambda room: [Alternative("this ({}: {x}{}", small), Alternative("that ({})", large)],
    )
    with pytest.raises(MemoryBudgetError, match=r"use --memory [^,]*, or this \(96 MiB: {x}{}$"):
        MemoryBudget(100 * 2**20, 0).plan(model)
    budget = MemoryBudget(MemoryBudget(0, 0).price(MemoryModel("x", 700, 0, 0)), 0)
    assert [budget.largest(lambda size: MemoryModel("x", size, 0, 0), most) for most in (2000, 300, 1)] == [512, 256, 1]
    assert MemoryBudget(0, 0).largest(lambda size: small, 100) == 0
    model = fisher_memory(ProblemSize(64, 10, modules=((0, 64),)))
    assert [way.text.split()[0] for way in model.alternatives(MemoryBudget(2**40, 0))] == [
        "--rank",
        "reduce",
        "--method",
    ]


def losing(train, monkeypatch, room):
    """Lose a chunk of a store once a run has read its first block."""
    real, chunk = room.tick, train.path / "gradients" / "c.6.0"

    def lose(key, rows):
        chunk.unlink(missing_ok=True)
        return real(key, rows)

    monkeypatch.setattr(room, "tick", lose)


@pytest.mark.parametrize("what", ["fisher", "gram", "self", "top"])
def test_a_chunk_lost_during_a_run(tmp_path, monkeypatch, what):
    self_room = importlib.import_module("ooc_influence.influence.self_scores")
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**14)
    monkeypatch.setattr(accumulate, "TILE", 64)
    monkeypatch.setattr(dual, "KEPT_BYTES", 0)
    train = write_store(tmp_path / "t.zarr", random_rows(450, 40))
    query = write_store(tmp_path / "q.zarr", random_rows(3, 40, 1))
    fit_fisher(train, out=tmp_path / "whole.zarr")
    data = (train.path / "gradients" / "c.6.0").read_bytes()
    calls = {
        "fisher": (sums, lambda: fit_fisher(train).eigenvalues),
        "gram": (dual, lambda: fit_gram(train).eigenvalues),
        "self": (self_room, lambda: self_influence(train, curvature=tmp_path / "whole.zarr")),
        "top": (search, lambda: top_influential(query, train, 3, curvature=tmp_path / "whole.zarr").proponents.scores),
    }
    room, call = calls[what]
    with pytest.MonkeyPatch.context() as patch:
        losing(train, patch, room)
        with pytest.raises(StoreDamagedError, match=r"c\.6\.0"):
            call()
    assert not (train.path / "curvature" / "default").exists()
    (train.path / "gradients" / "c.6.0").write_bytes(data)
    assert np.isfinite(call()).all()

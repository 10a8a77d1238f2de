"""The Gram side agrees with the Fisher side, for fewer rows than columns and for more."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import oracle
import pytest
import zarr
from conftest import random_rows, roomy, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import (
    GradientStore,
    fit_curvature,
    fit_fisher,
    gram_matrix,
    influence_scores,
    plan,
    self_influence,
)
from ooc_influence.cli.main import main
from ooc_influence.curvature import Curvature, choose_method, dual, eigen, fit, fit_gram
from ooc_influence.curvature.costs import fisher_memory, gram_memory, kernel_memory
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    MemoryBudgetError,
    SingularFisherError,
    StaleCurvatureError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
)
from ooc_influence.linalg import accumulate
from ooc_influence.linalg.rows import LOSS_FLOOR
from ooc_influence.memory import MemoryBudget, ProblemSize

pytestmark = pytest.mark.filterwarnings("ignore:.*effective dimension")
ONE_LABEL = {"loss_kind": "cross_entropy"}


def assert_near(found, expected, share=1e-5):
    assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.fixture
def on_disk(monkeypatch):
    """Small tiles, and none of them kept in memory."""
    monkeypatch.setattr(accumulate, "TILE", 32)
    monkeypatch.setattr(dual, "KEPT_BYTES", 0)


def slowly_decaying(n, k, seed=0):
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32) / np.sqrt(1 + np.arange(k, dtype="f4"))


@pytest.mark.parametrize(("n", "k"), [(60, 700), (300, 40), (2, 7)])
@pytest.mark.parametrize("held", [True, False])
def test_both_sides_agree(tmp_path, n, k, held, monkeypatch):
    if not held:  # eigenvectors stay on disk, and are read in slabs of a few rows
        monkeypatch.setattr(eigen, "HELD_BYTES", 0)
        monkeypatch.setattr("ooc_influence.curvature.eigen.CHUNK_TARGET", 8 * 60 * 23)
    rng = np.random.default_rng(0)
    train = write_store(tmp_path / "t.zarr", slowly_decaying(n, k))
    gone = [4, 20] if n > 20 else []
    with GradientStore.open(train.path, "a") as store:
        store.drop(gone)
    train = GradientStore.open(train.path)
    weights = rng.uniform(0, 2, n)
    found, fisher = fit_gram(train, weights=weights), fit_fisher(train, weights=weights)
    assert found.rows == fisher.rows == n - len(gone)
    assert_allclose(found.trace, fisher.trace, rtol=1e-6)
    value = found.damping_value()
    assert_allclose(value, fisher.damping_value(), rtol=1e-6)
    queries = rng.normal(size=(5, k)) @ np.diag(np.linspace(0.1, 1, k))
    values = [value, 10 * value]
    assert_near(found.precondition(queries, values), fisher.precondition(queries, values))
    single = queries.astype(np.float32)
    assert_near(found.self_influence(single, values), fisher.self_influence(single, values))
    assert_allclose(found.outside_share(queries), fisher.outside_share(queries), atol=1e-4)
    assert_allclose(found.effective_dimension(value), fisher.effective_dimension(value), rtol=1e-4)  # float32's tail
    live = np.setdiff1d(np.arange(n), gone)
    assert_near(self_influence(train, curvature="gram")[live], self_influence(train, curvature="default")[live])
    again = pickle.loads(pickle.dumps(found))
    assert_array_equal(again.precondition(queries, values), found.precondition(queries, values))
    assert found.blocks[0].vectors.in_memory is held


@pytest.mark.parametrize(
    ("dtype", "n", "k"), [("float16", 1000, 2048), ("bfloat16", 200, 300), ("int8", 200, 300), ("int4", 200, 300)]
)
def test_scores_of_both_sides_agree(tmp_path, dtype, n, k):
    train = write_store(tmp_path / "t.zarr", slowly_decaying(n, k), dtype=dtype)
    query = write_store(tmp_path / "q.zarr", slowly_decaying(5, k, 1), dtype=dtype)
    sides = [fit_gram(train, memory=roomy()), fit_fisher(train, memory=roomy())]
    found, expected = (influence_scores(query, train, curvature=side, memory=roomy()).compute() for side in sides)
    assert_near(found, expected)
    g = train.rows().astype(np.float64)
    assert_near(found, oracle.scores(query.rows(), g, sides[0].damping_value()))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_matrix_itself(tmp_path, on_disk, workers):
    train = write_store(tmp_path / "t.zarr", random_rows(170, 90), attributes=ONE_LABEL)
    with GradientStore.open(train.path, "a") as store:
        store.drop([4, 60, 169])
    train = GradientStore.open(train.path)
    chosen = np.arange(3, 150)
    weights = 1 / np.expm1(np.maximum(train.loss[chosen].astype(np.float64), LOSS_FLOOR))
    g = train.rows()[chosen].astype(np.float64) * np.sqrt(weights)[:, None]
    g[np.isin(chosen, [4, 60])] = 0
    found = gram_matrix(train, tmp_path / "k.zarr", rows=(3, 150), weights="ggn", workers=workers)
    assert (found.shape, found.chunks, found.dtype) == ((147, 147), (32, 32), np.float64)
    assert_near(found[...], g @ g.T, 1e-6)
    assert found.attrs["complete"]
    assert_array_equal(zarr.open_array(tmp_path / "k.zarr", mode="r")[5:9, 40:], found[5:9, 40:])
    curvature = fit_gram(train, rows=(3, 150), weights="ggn", workers=workers)
    assert_array_equal(curvature.gram[...], found[...])
    assert_allclose(curvature.eigenvalues.sum(), np.trace(g @ g.T) / curvature.rows, rtol=1e-6)
    assert (curvature.rows, curvature.attrs["clipped"]) == (145, 0)
    numbers = gram_matrix(train, tmp_path / "n.zarr", rows=[160, 9, 5], weights=np.arange(170.0))
    g = train.rows()[[5, 9, 160]].astype(np.float64) * np.sqrt([5, 9, 160])[:, None]
    assert_near(numbers[...], g @ g.T, 1e-6)


def test_kept_in_memory_or_on_disk(tmp_path, monkeypatch):
    train = write_store(tmp_path / "t.zarr", random_rows(170, 200))
    small = fit_gram(train, out=tmp_path / "small.zarr")
    monkeypatch.setattr(accumulate, "TILE", 32)
    monkeypatch.setattr(dual, "KEPT_BYTES", 0)
    made = []
    original = dual._multiply
    monkeypatch.setattr(dual, "_multiply", lambda tile, how: made.append(tile) or original(tile, how))
    tiled = fit_gram(train, out=tmp_path / "tiled.zarr", workers=2)
    assert len(made) == 21  # 6 strips
    assert_near(tiled.gram[...], small.gram[...], 1e-12)
    assert_near(tiled.eigenvalues, small.eigenvalues, 1e-12)
    value = small.damping_value()
    queries = random_rows(4, 200, 3)
    assert_near(tiled.precondition(queries, [value]), small.precondition(queries, [value]), 1e-10)


def test_panels_of_eigenvectors(tmp_path, monkeypatch):
    """However wide they are made, and by however many tasks."""
    train = write_store(tmp_path / "t.zarr", random_rows(50, 300))
    whole = fit_gram(train, out=tmp_path / "whole.zarr")
    monkeypatch.setattr(dual, "PANEL", 7)
    monkeypatch.setattr("ooc_influence.curvature.eigen.CHUNK_TARGET", 8 * 50 * 3)
    stripes = []
    original = dual._lift
    monkeypatch.setattr(dual, "_lift", lambda stripe, *rest: stripes.append(stripe) or original(stripe, *rest))
    monkeypatch.setattr(fit, "GramFit", lambda *given: dual.GramFit(*given[:4], 0, given[5]))
    cut = fit_gram(train, out=tmp_path / "cut.zarr", workers=2)
    assert len(stripes) == 50  # of 6 columns, whole chunks of 3
    assert_near(np.abs(cut.eigenvectors), np.abs(whole.eigenvectors), 1e-9)


def stopping(monkeypatch, count):
    """Interrupt what multiplies after so many tiles, whose numbers are returned."""
    original, made = dual._multiply, []

    def multiply(tile, how):
        if len(made) == count:
            raise KeyboardInterrupt
        made.append(tile.number)
        return original(tile, how)

    monkeypatch.setattr(dual, "_multiply", multiply)
    return original, made


def test_an_interrupted_fit_goes_on(tmp_path, on_disk, monkeypatch):
    train = write_store(tmp_path / "t.zarr", random_rows(170, 200))
    original, made = stopping(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        fit_gram(train)
    with pytest.raises(KeyboardInterrupt):
        gram_matrix(train, tmp_path / "k.zarr")
    partial = train.path / "curvature" / ".gram.partial"
    assert partial.exists()
    monkeypatch.setattr(dual, "_multiply", lambda tile, how: made.append(tile.number) or original(tile, how))
    found = fit_gram(train)
    assert sorted(made) == list(range(21))
    assert not partial.exists()
    g = train.rows().astype(np.float64)
    assert_near(found.gram[...], g @ g.T, 1e-9)
    assert_array_equal(gram_matrix(train, tmp_path / "k.zarr")[...], found.gram[...])
    assert len(made) == 42
    with pytest.raises(StoreExistsError, match="of another call"):
        gram_matrix(train, tmp_path / "k.zarr", rows=(0, 20))
    with pytest.raises(StoreExistsError, match="received something"):
        gram_matrix(train, train.path)


def test_other_rows_do_not_go_on(tmp_path, on_disk, monkeypatch):
    train = write_store(tmp_path / "t.zarr", random_rows(100, 200))
    stopping(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        fit_gram(train)
    monkeypatch.undo()
    with GradientStore.open(train.path, "a") as store:
        store.drop([3])
    now = GradientStore.open(train.path)
    g = now.rows().astype(np.float64)
    g[3] = 0
    assert_near(fit_gram(now).gram[...], g @ g.T, 1e-9)


def test_on_object_storage(tmp_path, on_disk):
    train = write_store("memory://gram/t.zarr", random_rows(70, 100))
    g = train.rows().astype(np.float64)
    assert_near(gram_matrix(train, "memory://gram/k.zarr")[...], g @ g.T, 1e-9)
    found = fit_curvature(train, workers=2)
    assert_near(found.gram[...], g @ g.T, 1e-9)
    assert_near(Curvature.open("memory://gram/t.zarr/curvature/default").fisher(), g.T @ g / 70, 1e-9)


def test_one_process_at_a_time_writes_tiles(tmp_path, on_disk, monkeypatch):
    train = write_store(tmp_path / "t.zarr", random_rows(40, 60))
    other = []

    def meanwhile(tile, how):
        if not other:
            with pytest.raises(StoreBusyError, match="another process"):
                other.append(True) or fit_gram(train)
        return original(tile, how)

    original = dual._multiply
    monkeypatch.setattr(dual, "_multiply", meanwhile)
    assert fit_gram(train).rows == 40
    assert other


def test_a_lost_tile_is_damage(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(20, 60))
    found = fit_gram(train)
    (found.path / "gram" / "c.0.0").unlink()
    with pytest.raises(StoreDamagedError):
        found.gram[...]
    (found.path / "gram" / "zarr.json").unlink()
    with pytest.raises(CurvatureNotFoundError, match="refit=True"):
        _ = found.gram
    assert np.isfinite(self_influence(train)).all()


def test_a_sample_and_its_error(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(200, 60))
    found, fisher = (fit(train, sample=50, seed=2) for fit in (fit_gram, fit_fisher))
    assert_allclose(found.facts()["sampling_error"], fisher.facts()["sampling_error"], rtol=1e-5)


def test_clipped_losses_are_counted(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(30, 60), attributes=ONE_LABEL)
    with GradientStore.open(train.path, "a") as store:
        store.append(random_rows(3, 60, 1), loss=np.zeros(3))
        store.flush()
        store.drop([31])
    train = GradientStore.open(train.path)  # the losses of row 0 and the last three are below the floor
    for rows, expected in ((None, 3), (np.arange(30), 1)):
        assert fit_gram(train, weights="ggn", rows=rows).attrs["clipped"] == expected
        assert fit_fisher(train, weights="ggn", rows=rows).attrs["clipped"] == expected


def test_it_serves_where_nothing_else_is_fitted(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(20, 60))
    with pytest.raises(CurvatureNotFoundError, match="run fit_curvature"):
        self_influence(train)
    found = fit_gram(train)
    assert np.isfinite(self_influence(train)).all()
    assert fit_gram(train).attrs["fit"] == found.attrs["fit"]
    with pytest.raises(SingularFisherError):
        self_influence(train, damping=0)
    with GradientStore.open(train.path, "a") as store:
        store.drop([3])
    now = GradientStore.open(train.path)
    with pytest.raises(StaleCurvatureError, match="run fit_curvature again"):
        self_influence(now)
    again = fit_gram(now)
    expected = np.delete(now.rows(), 3, axis=0).astype(np.float64)
    assert_near(Curvature.open(again.path).fisher(), expected.T @ expected / 19, 1e-6)


def used(query, train):
    return influence_scores(query, train, out=train.path.parent / f"s{np.random.randint(10**9)}.zarr").attrs[
        "curvature"
    ]


def test_which_curvature_scores_take(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(20, 60))
    query = write_store(tmp_path / "q.zarr", random_rows(3, 60, 1))
    places = {name: str(train.path / "curvature" / name) for name in ("default", "gram")}
    fit_fisher(train)
    assert used(query, train) == places["default"]
    fit_gram(train, rows=(0, 19))
    assert used(query, train) == places["default"]  # of other rows: not the same numbers
    fit_gram(train)
    assert used(query, train) == places["gram"]  # the same F, in 20 eigenvectors
    fit_fisher(train, weights=np.arange(20.0))
    assert used(query, train) == places["default"]
    with GradientStore.open(train.path, "a") as store:
        store.drop([3])
    train = GradientStore.open(train.path)
    with pytest.raises(StaleCurvatureError, match="default"):
        used(query, train)
    fit_gram(train)
    assert used(query, train) == places["gram"]  # the other one is stale


def test_more_rows_than_columns_are_scored_by_fisher(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(90, 30))
    fit_gram(train)
    fit_fisher(train)
    query = write_store(tmp_path / "q.zarr", random_rows(3, 30, 1))
    found = used(query, train)
    assert found == str(train.path / "curvature" / "default")


def test_which_method(tmp_path):
    assert (choose_method(10, 20), choose_method(20, 10), choose_method(10, 10)) == ("dual", "primal", "primal")
    few = write_store(tmp_path / "few.zarr", random_rows(20, 50))
    many = write_store(tmp_path / "many.zarr", random_rows(80, 50), attributes=ONE_LABEL)
    kinds = [
        (few, {}, "gram"),
        (many, {}, "whole"),
        (many, {"rows": (0, 30)}, "gram"),
        (many, {"rows": (0, 60)}, "whole"),
        (many, {"rows": np.arange(80) % 4 == 0}, "gram"),
        (many, {"sample": 30, "seed": 1}, "gram"),
        (many, {"sample": 30, "weights": "ggn"}, "gram"),
        (many, {"rows": (0, 60), "sample": 40}, "gram"),
        (few, {"method": "primal"}, "whole"),
        (few, {"blocks": "module"}, "whole"),
        (many, {"method": "dual", "name": "other", "blocks": None}, "gram"),
    ]
    for train, options, kind in kinds:
        found = fit_curvature(train, **options)
        assert found.kind == kind, options
        assert found.path.name == options.get("name", "default")
        assert (found.attrs["weights"] or {}).get("name") == options.get("weights")
    assert found.rows == 80
    with pytest.raises(InputError, match="method='primal' for blocks"):
        fit_curvature(few, method="dual", blocks="module")
    with pytest.raises(InputError, match="method 'auto'"):
        fit_curvature(few, method="left")
    with pytest.raises(TypeError):
        fit_curvature(few, colour="red")


def test_the_method_that_fits_is_taken(tmp_path, caplog):
    caplog.set_level("INFO", "ooc_influence")
    train = write_store(tmp_path / "t.zarr", random_rows(80, 50))
    size, budget = ProblemSize(3000, 2500), MemoryBudget.of(roomy())
    assert budget.price(gram_memory(size)) < budget.price(fisher_memory(size))  # the smaller matrix takes less

    def side(**options):
        return fit_curvature(train, memory=budget.limit, **options).kind

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ooc_influence.curvature.fit.gram_memory", lambda size: gram_memory(ProblemSize(50, 10**5)))
        assert side(rows=(0, 30)) == "whole"
    assert "the dual method needs 2" in caplog.text
    assert side(rows=(0, 30)) == "gram"


def test_needs_are_sums_of_their_parts():
    kept = 8 * 2003**2
    size = ProblemSize(5003, 2003, 3, reading_bytes=7, index_bytes=11)
    model = kernel_memory(size)
    assert (model.fixed, model.per_worker) == (11 + kept, 32 * 1024**2 + 2 * 7)
    assert model.per_row == 2 * (4 * 5003 + 8 * 1024)
    assert kernel_memory(replace(size, staging_bytes=13)).per_row == model.per_row + 2 * 13
    assert kernel_memory(ProblemSize(5003, 20011)).fixed == 0  # on disk
    model = gram_memory(replace(size, rows=20011))
    assert model.fixed == 11 + 24 * 20011**2 + 24 * 1024**2 - 3 * (32 * 1024**2 + 2 * 7)
    panels = [gram_memory(ProblemSize(k, 31, 2)).fixed for k in (1009, 100_003)]
    assert panels[0] < panels[1]  # of eigenvectors


def test_a_small_budget_is_refused(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(200, 60))
    with pytest.raises(MemoryBudgetError, match="gram for 200 rows of k=60 needs"):
        fit_gram(train, memory="10MiB")
    with pytest.raises(MemoryBudgetError, match="gram for 200 rows of k=60 needs"):
        gram_matrix(train, tmp_path / "k.zarr", memory="10MiB")
    with GradientStore.open(train.path, "a") as store:
        store.drop(range(200))
    with pytest.raises(InputError, match="all dropped"):
        fit_gram(GradientStore.open(train.path))


def test_its_stage_in_a_plan():
    found = plan(3000, 8192, memory="64GiB", gflops=50, read_rate=1)["Gram side"]
    assert found.refusal is None
    assert found.disk == 8 * 3000 * (3000 + 8192)
    assert plan(30_000, 65536, memory="4GiB", gflops=50, read_rate=1)["Gram side"].refusal.count("--sample") == 1


def test_the_command(tmp_path, capsys):
    train = write_store(tmp_path / "t.zarr", random_rows(20, 60))

    def run(*options):
        with pytest.raises(SystemExit) as stopped:
            main(["fisher", str(train.path), "--json", *options])
        return stopped.value.code, *capsys.readouterr()

    code, out, _ = run("--method", "auto", "--workers", "2")
    assert (code, json.loads(out)["kind"]) == (0, "gram")
    code, _, err = run("--method", "dual", "--blocks", "module")
    assert code == 2
    assert "expected method='primal' for blocks" in err

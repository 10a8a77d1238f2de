"""The top of F's spectrum by every way agrees with the dense oracle; updated, resumed, in its budget, refused."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import numpy as np
import oracle
import pytest
from conftest import random_rows, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import GradientStore, checkpoint, fit_fisher, influence_scores, self_influence
from ooc_influence.cli.main import main
from ooc_influence.curvature import costs, low_rank, primal
from ooc_influence.curvature.costs import fisher_memory
from ooc_influence.errors import InputError, MemoryBudgetError, OocInfluenceWarning, SingularFisherError, StoreBusyError
from ooc_influence.linalg import accumulate, backend, spectrum
from ooc_influence.linalg import rows as rows_room
from ooc_influence.memory import WORKING, ProblemSize, process_anonymous

pytestmark = pytest.mark.filterwarnings("ignore:.*effective dimension")
K, N = 120, 500
WAYS = ["whole", "sums", "tiles", "rows"]


def force(patch, name, *, patient=True):
    """Take one way only, with small tiles; iterate until nothing more is gained."""
    plain = costs.low_rank_plans
    patch.setattr(costs, "low_rank_plans", lambda *a, **o: [way for way in plain(*a, **o) if way.name == name])
    patch.setattr(accumulate, "TILE", 32)
    patch.setattr(costs, "TILE", 32)
    patch.setattr(costs, "_LARGEST_TILE", 64)
    patch.setattr(costs, "EXTRA", 16)
    if patient:
        patch.setattr(spectrum, "TOLERANCE", 1e-12)
        patch.setattr(low_rank, "PASSES", 100)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    force(monkeypatch, request.param)
    return request.param


@pytest.fixture
def train(tmp_path):
    return write_store(tmp_path / "train.zarr", random_rows(N, K))


def fall(matrix, rank):
    """F with what is beyond its first ``rank`` eigenvalues replaced by their mean."""
    values, vectors = np.linalg.eigh(matrix)
    if rank < len(values):
        values[:-rank] = values[:-rank].mean()
    return vectors * values @ vectors.T


def assert_near(found, expected, share=1e-5):
    assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


def check(found, matrix, rank, share):
    """What a curvature answers, against a dense matrix whose spectrum is cut.

    An iteration ends where float32's rounding hides what the eigenvalues gain, 10⁻⁸ of them or so; their vectors have
    an error of that one's root, over the gaps between them.
    """
    exact = np.linalg.eigvalsh(matrix)[::-1]
    assert found.kind == "top"
    assert_near(found.eigenvalues, exact[:rank], share)
    assert_allclose(found.trace, exact.sum(), rtol=1e-6)
    assert_allclose(found.attrs["left_out"], 1 - exact[:rank].sum() / exact.sum(), atol=share)
    assert_allclose(found.eigenvectors.T @ found.eigenvectors, np.eye(rank), atol=1e-10)
    queries, cut = random_rows(9, len(matrix), seed=4), fall(matrix, rank)
    values = [found.damping_value(damping) for damping in (0.01, 0.1, 3.0)]
    for value, answer, own in zip(
        values, found.precondition(queries, values), found.self_influence(queries, values), strict=True
    ):
        expected = np.linalg.solve(cut + value * np.eye(len(matrix)), queries.T.astype(np.float64)).T
        assert_near(answer, expected, 50 * share)
        assert_near(own, (queries * expected).sum(1), 50 * share)
        assert found.least_dimension(value) - 1e-6 <= (exact / (exact + value)).sum()
        assert (exact / (exact + value)).sum() <= found.effective_dimension(value) + 1e-6
    inside = np.square(queries @ np.linalg.eigh(matrix)[1][:, -rank:]).sum(1) / np.square(queries).sum(1)
    assert_allclose(found.outside_share(queries), 1 - inside, atol=10 * share)


def test_every_way_agrees_with_the_oracle(tmp_path, way):
    train = write_store(tmp_path / "train.zarr", random_rows(N, K), dtype="float16")
    found = fit_fisher(train, rank=20)
    assert found.attrs["way"] == way
    check(found, oracle.fisher(train.rows()), 20, 1e-5)
    if way == "rows":
        with pytest.raises(InputError, match="keeps F"):
            found.fisher()
    else:
        assert_near(found.fisher(), oracle.fisher(train.rows()), 1e-6)
    again = pickle.loads(pickle.dumps(found))
    value = [found.damping_value()]
    assert_near(again.precondition(random_rows(2, K), value), found.precondition(random_rows(2, K), value), 1e-12)
    assert fit_fisher(train, rank=20).attrs["fit"] == found.attrs["fit"]
    other = fit_fisher(train, rank=10)
    assert_near(other.eigenvalues, found.eigenvalues[:10], 1e-5)


def test_all_of_the_spectrum_is_the_whole_fit(train, way):
    whole, found = fit_fisher(train), fit_fisher(train, rank=K, name="top")
    assert found.attrs["left_out"] == found.blocks[0].rest == 0
    queries = random_rows(5, K, seed=3)
    values = [whole.damping_value(damping) for damping in (0.01, 0.1)]
    assert_allclose([found.damping_value(damping) for damping in (0.01, 0.1)], values, rtol=1e-6)
    assert_near(found.precondition(queries, values), whole.precondition(queries, values))
    assert_near(found.self_influence(queries, values), whole.self_influence(queries, values))
    assert_allclose(found.effective_dimension(values[0]), whole.effective_dimension(values[0]), rtol=1e-5)


def test_scores(tmp_path, train, way):
    query = write_store(tmp_path / "query.zarr", random_rows(7, K, seed=1))
    found = fit_fisher(train, rank=20)
    matrix = oracle.fisher(train.rows())
    cut, value = fall(matrix, 20), found.damping_value()
    assert_allclose(value, oracle.damping(matrix), rtol=1e-6)
    scores = influence_scores(query, train)
    assert_near(scores, oracle.scores(query.rows(), train.rows(), value, cut), 5e-4)
    assert_near(self_influence(train), oracle.self_influence(train.rows(), value, cut), 5e-4)


def test_queries_outside_what_is_kept_are_told_to_take_more(tmp_path, train):
    found = fit_fisher(train, rank=3)
    query = write_store(tmp_path / "query.zarr", np.eye(K, dtype=np.float32)[:2])
    assert (found.outside_share(query.rows()) > 0.9).any()
    with pytest.warns(OocInfluenceWarning, match="not kept; fit with a larger rank"):
        influence_scores(query, train, out=tmp_path / "scores.zarr")


def test_workers_and_blocks_do_not_matter(tmp_path, train, way, monkeypatch):
    options = {"rank": 12, "weights": np.linspace(0.1, 2, N), "rows": (10, 480)}
    one = fit_fisher(train, **options)
    several = fit_fisher(train, workers=3, out=tmp_path / "three.zarr", **options)
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**14)
    small = fit_fisher(train, workers=2, out=tmp_path / "small.zarr", **options)
    rows = train.rows()[10:480].astype(np.float64) * np.sqrt(options["weights"][10:480, None])
    for found in (one, several, small):
        check(found, rows.T @ rows / 470, 12, 1e-5)
        assert_near(found.precondition(rows[:3], [0.01]), one.precondition(rows[:3], [0.01]), 1e-4)


@pytest.mark.parametrize("weights", [None, "array"])
def test_updates(tmp_path, train, way, weights, monkeypatch, caplog):
    given = None if weights is None else np.linspace(0.5, 2, N + 60)
    fit_fisher(train, rank=12, weights=None if given is None else given[:N])
    with GradientStore.open(train.path, "a") as store:
        store.append(random_rows(60, K, 3), loss=np.zeros(60))
        store.drop([3, 50, N + 10])
    train = GradientStore.open(train.path)
    read, plain = [], rows_room.read_blocks

    def counted(*args, **options):
        for block in plain(*args, **options):
            read.append(block.stop - block.start)
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(rows_room, "read_blocks", counted)
        caplog.set_level("INFO", "ooc_influence")
        found = fit_fisher(train, rank=12, weights=given)
    live = np.setdiff1d(np.arange(N + 60), [3, 50, N + 10])
    rows = train.rows()[live].astype(np.float64) * (1 if given is None else np.sqrt(given[live, None]))
    assert found.rows == len(live)
    check(found, rows.T @ rows / len(live), 12, 1e-5)
    if way == "rows":
        assert "keeps no sum of F" in caplog.text
        assert sum(read) > N
    else:
        assert set(np.unique(read)) <= {60, 2}  # rows added; rows dropped of the earlier ones
        assert found.attrs["taken"] > 0


def test_another_rank_reads_rows_only_where_no_sum_is_kept(train, way, monkeypatch):
    first = fit_fisher(train, rank=12)
    read = []
    plain = rows_room.read_blocks
    monkeypatch.setattr(rows_room, "read_blocks", lambda *a, **o: (read.append(a[1:3]), plain(*a, **o))[1])
    found = fit_fisher(train, rank=20)
    assert bool(read) == (way == "rows")
    assert (found.rows, len(found.eigenvalues)) == (N, 20)
    assert_near(found.eigenvalues[:12], first.eigenvalues, 1e-5)


def test_most_of_the_trace_dropped_is_a_fit_from_scratch(train, way, caplog):
    fit_fisher(train, rank=12)
    with GradientStore.open(train.path, "a") as store:
        store.drop(np.arange(300))
    train = GradientStore.open(train.path)
    found = fit_fisher(train, rank=12)
    assert way == "rows" or "more than half of the trace" in caplog.text
    assert (found.rows, found.attrs["taken"]) == (200, 0)
    check(found, oracle.fisher(train.rows()[300:]), 12, 1e-5)


def test_a_sample_has_an_error(train, way):
    found = fit_fisher(train, rank=30, sample=200)
    whole = fit_fisher(train, sample=200, name="whole")
    assert_allclose(found.attrs["sampling_error"], whole.attrs["sampling_error"], rtol=0.01)


def test_the_stated_tolerance(train, monkeypatch):
    """What is lost by stopping where a pass gains no more than 10⁻⁴ of the trace."""
    force(monkeypatch, "rows", patient=False)
    found = fit_fisher(train, rank=20)
    exact = np.linalg.eigvalsh(oracle.fisher(train.rows()))[::-1]
    assert found.attrs["converged"]
    assert 1 < found.attrs["passes"] < 8
    lost = exact[:20].sum() - found.eigenvalues.sum()
    assert 0 < lost < 1e-3 * exact.sum()


def test_the_seed_decides(train, monkeypatch):
    force(monkeypatch, "rows")
    monkeypatch.setattr(low_rank, "PASSES", 2)
    with pytest.warns(OocInfluenceWarning, match="the last: they are lower bounds"):
        one, same, other = (
            fit_fisher(train, rank=20, seed=seed, name=name) for seed, name in ((1, "a"), (1, "b"), (2, "c"))
        )
    assert_array_equal(one.eigenvalues, same.eigenvalues)
    assert_array_equal(one.eigenvectors, same.eigenvectors)
    assert not one.attrs["converged"]
    assert np.abs(one.eigenvalues - other.eigenvalues).max() > 1e-6


@pytest.mark.parametrize("way", ["tiles", "rows"], indirect=True)
def test_tiles_and_passes_are_gone_on_from(train, monkeypatch, way, caplog):
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    expected = fit_fisher(train, rank=5, name="expected")
    module, name = (primal, "_sum_tile") if way == "tiles" else (spectrum, "_multiply_partition")
    plain, left, calls = getattr(module, name), [2], []

    def stopping(*arguments):
        calls.append(1)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_fisher(train, rank=5)
    assert "run it again to resume" in caplog.text
    left[0], stopped = 1000, len(calls)
    found = fit_fisher(train, rank=5)
    assert_near(found.eigenvalues, expected.eigenvalues, 1e-6)
    resumed = len(calls) - stopped
    calls.clear()
    fit_fisher(train, rank=5, refit=True)
    assert resumed == len(calls) - 2 > 0
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        fit_fisher(train, rank=5, refit=True)
    left[0] = 1000
    assert_near(fit_fisher(train, rank=9, refit=True).eigenvalues[:5], expected.eigenvalues, 1e-6)  # another's basis
    assert not (train.path / "curvature" / ".default.partial").exists()


def test_two_processes_do_not_sum_the_same_tiles(train, monkeypatch):
    force(monkeypatch, "tiles")
    with (
        checkpoint.ClaimedOutput(train.path / "curvature" / "default", {}),
        pytest.raises(StoreBusyError, match="wait"),
    ):
        fit_fisher(train, rank=5)


def test_what_fits_decides(tmp_path, monkeypatch):
    """Sizes at which each of the ways is the only one that fits, or the quickest."""
    monkeypatch.setattr("ooc_influence.memory.process_anonymous", lambda: 0)
    train = write_store(tmp_path / "t.zarr", random_rows(300, 700))
    size = train.problem_size()
    whole = fisher_memory(size)
    budget = whole.peak(whole.min_rows)
    assert fit_fisher(train, memory=budget).kind == "whole"
    with pytest.raises(MemoryBudgetError, match=r"fisher for k=700 needs .* --rank 128 \(") as refused:
        fit_fisher(train, memory=budget - 1, refit=True)
    assert "extract with a smaller k" in str(refused.value)
    found = fit_fisher(train, memory=budget - 1, rank=128)
    assert found.attrs["way"] != "whole"
    models = [costs.sums_memory(size, 10), costs.tiles_memory(size, 10, 700), costs.rows_memory(size, 10)]
    least = min(model.peak(model.min_rows) for model in models)
    assert fit_fisher(train, memory=least, rank=10, refit=True).attrs["way"] == "rows"
    with pytest.raises(MemoryBudgetError, match=r"fisher for k=700, rank=10 needs .*--rank 8 \([^)]* MiB\)"):
        fit_fisher(train, memory=least - 1, rank=10, refit=True)


def test_needs_count_everything_once():
    """Sizes are primes, so that a missing or doubled term shows."""
    k = 10007
    size = ProblemSize(k, 997, 3, reading_bytes=7, index_bytes=11)
    c = 5 + costs.EXTRA
    assert costs.iteration_columns(size, 5) == c
    rows = costs.rows_memory(size, 5)
    assert (rows.per_worker, rows.per_row) == (12 * k * c + 7, 4 * (k + c))
    assert rows.fixed == (4 + 8) * k * c + 11
    sums = costs.sums_memory(size, 5)
    assert (sums.per_worker, sums.per_row, sums.fixed) == (12 * k**2 + 7, 4 * k, 8 * k**2 + 11)
    tiles = costs.tiles_memory(size, 5, 31)
    assert (tiles.per_worker, tiles.per_row) == (20 * 31**2 + 24 * 1024**2 + 7, 248)
    after = 16 * k * c + 40 * c**2 + 24 * 1024 * c + 8 * 1024 * (3 * 1024 + 2 * c)
    assert costs.tiles_memory(size.alone, 5, 31).fixed == after - tiles.per_worker + 7 + 11 - 7


@pytest.mark.parametrize("way", ["sums", "tiles", "rows"])
def test_memory_stays_below_the_projection(tmp_path, way, monkeypatch):
    k, rank = 1200, 60
    force(monkeypatch, way, patient=False)
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_fastest", lambda *args: backend.ScipyEngine())  # others have a temporary tile
    monkeypatch.setattr(accumulate, "TILE", 256)
    monkeypatch.setattr(costs, "TILE", 256)
    monkeypatch.setattr(costs, "_LARGEST_TILE", 512)
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(600, k)) / np.sqrt(1 + np.arange(k))).astype(np.float32)
    train = write_store(tmp_path / "t.zarr", rows, dtype="float16")
    fit_fisher(train, rank=rank)  # what is imported and allocated once
    size = train.problem_size()
    model = {"sums": costs.sums_memory(size, rank), "tiles": costs.tiles_memory(size, rank, 512),
             "rows": costs.rows_memory(size, rank)}[way]  # fmt: skip
    tracemalloc.start()
    try:
        found = fit_fisher(train, rank=rank, refit=True, memory=process_anonymous() + 2**30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.attrs["way"] == way
    projected = model.peak(600) - WORKING + 2**21  # Zarr's part
    assert 0.5 * projected < peak < projected


def test_the_command(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fisher", str(train.path), "--rank", "10", "--json"])
    assert stopped.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["rank"]) == ("top", 10)
    assert 0 < facts["left_out"] < 1
    assert facts["effective_dimension_at_least"] < facts["effective_dimension"]
    with pytest.raises(SystemExit):
        main(["fisher", str(train.path), "--rank", "10", "--method", "dual"])
    assert "expected method='primal' for rank" in capsys.readouterr().err
    assert "rank=10 left out=" in repr(fit_fisher(train, rank=10))


@pytest.mark.parametrize("rank", [0, K + 1, 2.5, True])
def test_a_rank_that_is_not_possible(train, rank):
    with pytest.raises(InputError, match=f"rank between 1 and {K}"):
        fit_fisher(train, rank=rank)


def test_nothing_is_fitted_to_dropped_rows(train, way):
    with GradientStore.open(train.path, "a") as store:
        store.drop(np.arange(N))
    with pytest.raises(InputError, match="all dropped"):
        fit_fisher(GradientStore.open(train.path), rank=3)


def test_refusals(train):
    with pytest.raises(InputError, match="received both"):
        fit_fisher(train, rank=3, blocks="module")
    found = fit_fisher(train, rank=5)
    with pytest.raises(SingularFisherError, match="rank 5"):
        found.damping_value(0)

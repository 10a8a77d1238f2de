"""The LDS against a slow float64 form with SciPy's spearmanr, by invariance, and on data where it is known."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import random_rows, roomy, write_store
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import ConstantInputWarning, spearmanr

from ooc_influence import GradientStore, fit_fisher, influence_scores
from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.evaluate import lds, random_subsets


def slow_lds(scores, subsets, outcomes):
    """Query by query, subset by subset, row by row."""
    found = []
    for query, row in enumerate(np.asarray(scores, np.float64)):
        sums = []
        for subset in subsets:
            total = 0.0
            for i in np.flatnonzero(subset):
                total += 0.0 if np.isnan(row[i]) else row[i]
            sums.append(total)
        found.append(np.nan if np.isnan(row).all() else spearmanr(sums, outcomes[:, query]).statistic)
    return np.array(found)


def linear_datamodel(n=200, m=60, q=9, noise=0.0, seed=0):
    """Scores, subsets, and outcomes that are the subsets' summed scores and noise."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((q, n)).astype(np.float32)
    subsets = random_subsets(n, m, seed=seed)
    outcomes = subsets.astype(float) @ scores.T.astype(float)
    return scores, subsets, outcomes + noise * outcomes.std() * generator.standard_normal((m, q))


def test_it_equals_the_slow_form():
    scores, subsets, outcomes = linear_datamodel(noise=1.0)
    found = lds(scores, subsets, outcomes)
    assert_allclose(found.per_query, slow_lds(scores, subsets, outcomes), atol=1e-12)
    assert found.mean == pytest.approx(np.mean(found.per_query))
    assert found.standard_error == pytest.approx(np.std(found.per_query, ddof=1) / 3)
    assert 0.4 < found.mean < 0.9
    assert (found.dropped_queries, found.dropped_rows, found.constant_queries) == (0, 0, 0)
    assert repr(found).startswith(f"<LDS {found.mean:.4f}")


def test_ties_share_their_rank():
    generator = np.random.default_rng(1)
    scores = generator.integers(-1, 2, (5, 40)).astype(np.float32)
    subsets, outcomes = random_subsets(40, 30), generator.integers(0, 4, (30, 5))
    sums = subsets.astype(int) @ scores.T.astype(int)
    assert all(len(set(column)) < 15 for column in sums.T)
    assert_allclose(lds(scores, subsets, outcomes).per_query, slow_lds(scores, subsets, outcomes), atol=1e-12)


def test_sums_that_differ_by_rounding_only_are_ties():
    half = np.array([True, False] * 8)
    subsets = np.stack([half, ~half, np.roll(half, 8) & (np.arange(16) > 0), half])
    scores = np.full((1, 16), 0.1, np.float32)
    outcomes = np.array([[1.0], [2.0], [3.0], [1.5]])
    assert_array_equal(subsets.sum(1), [8, 8, 7, 8])
    assert_allclose(lds(scores, subsets, outcomes).per_query, [spearmanr([8, 8, 7, 8], outcomes[:, 0]).statistic])


def test_dropped_rows_contribute_nothing_and_dropped_queries_are_left_out():
    scores, subsets, outcomes = linear_datamodel(noise=0.5)
    scores[:, [3, 17, 150]] = np.nan
    scores[[2, 5]] = np.nan
    outcomes[4, 2] = np.nan  # of a dropped query
    found = lds(scores, subsets, outcomes)
    assert (found.dropped_queries, found.dropped_rows, found.constant_queries) == (2, 3, 0)
    assert_array_equal(np.flatnonzero(np.isnan(found.per_query)), [2, 5])
    assert_allclose(found.per_query, slow_lds(scores, subsets, outcomes), atol=1e-12)
    assert found.mean == pytest.approx(np.nanmean(found.per_query))


def test_nothing_but_dropped():
    scores, subsets, outcomes = linear_datamodel(q=2)
    found = lds(np.full_like(scores, np.nan), subsets, outcomes)
    assert np.isnan(found.mean)
    assert np.isnan(found.standard_error)
    assert np.isnan(found.subset_error())
    assert (found.dropped_queries, found.dropped_rows) == (2, 0)


def test_constant_queries_are_counted():
    scores, subsets, outcomes = linear_datamodel(noise=0.5)
    outcomes[:, 1] = 7.0
    scores[4] = 0.3  # equal for all rows, and subsets are of one size
    scores[6] = 0.0
    found = lds(scores, subsets, outcomes)
    assert found.constant_queries == 3
    with pytest.warns(ConstantInputWarning):
        expected = slow_lds(scores, subsets, outcomes)
    expected[4] = np.nan  # its sums differ in their last bits there
    assert_allclose(found.per_query, expected, atol=1e-12)


def test_a_linear_datamodel_scores_one_and_random_scores_nothing():
    scores, subsets, outcomes = linear_datamodel(n=400, m=100, q=50)
    assert lds(scores, subsets, outcomes).mean > 0.999
    assert lds(-scores, subsets, outcomes).mean < -0.999
    other = np.random.default_rng(7).standard_normal(scores.shape)
    found = lds(other, subsets, outcomes)
    assert abs(found.mean) < 4 * found.standard_error < 0.1


@pytest.mark.filterwarnings("ignore:.*effective dimension")
def test_minus_the_loss_is_the_outcome_scores_are_positive_for(tmp_path):
    """Least squares by rows: the influence function's scores predict ridge models fitted on halves."""
    generator = np.random.default_rng(0)
    n, k, q = 300, 6, 20
    x, truth = generator.standard_normal((n + q, k)), generator.standard_normal(k)
    y = x @ truth + generator.standard_normal(n + q)
    weights = np.linalg.lstsq(x[:n], y[:n], rcond=None)[0]
    rows = ((x @ weights - y)[:, None] * x).astype(np.float32)
    write_store(tmp_path / "train.zarr", rows[:n])
    write_store(tmp_path / "query.zarr", rows[n:])
    fit_fisher(tmp_path / "train.zarr")
    scores = influence_scores(tmp_path / "query.zarr", tmp_path / "train.zarr", damping=1e-3)
    subsets = random_subsets(n, 80)
    models = [np.linalg.lstsq(x[:n][s], y[:n][s], rcond=None)[0] for s in subsets]
    outcomes = -np.square(np.stack([x[n:] @ model - y[n:] for model in models]))
    assert lds(scores, subsets, outcomes).mean > 0.5


@pytest.fixture
def larger():
    generator = np.random.default_rng(3)
    scores = generator.standard_normal((1030, 2500)).astype(np.float32)  # more than a block and a tile
    scores[:, [0, 1024, 2499]] = np.nan
    scores[[1, 1029]] = np.nan
    subsets = random_subsets(2500, 12)
    return scores, subsets, generator.standard_normal((12, 1030))


def test_the_same_numbers_however_it_is_read(larger, tmp_path):
    scores, subsets, outcomes = larger
    whole = lds(scores, subsets, outcomes, memory=roomy())
    assert (whole.dropped_queries, whole.dropped_rows) == (2, 3)
    assert_allclose(whole.per_query[:3], slow_lds(scores[:3], subsets, outcomes[:, :3]), atol=1e-12)
    array = zarr.create_array(tmp_path / "scores", data=scores, chunks=(100, 333))
    lazy = da.from_array(scores, chunks=(400, 700))
    ways = [lds(array, subsets, outcomes), lds(lazy, subsets, outcomes)]
    with dask.config.set(scheduler="synchronous"):
        ways.append(lds(da.from_array(array), subsets, outcomes))
    for found in ways:
        assert_allclose(found.per_query, whole.per_query, atol=1e-12)
        assert (found.dropped_queries, found.dropped_rows) == (2, 3)


def test_memory_does_not_grow_with_n(tmp_path):
    from ooc_influence.memory import PeakMemory, process_anonymous

    array = zarr.create_array(
        tmp_path / "scores", shape=(64, 400_000), chunks=(64, 8192), dtype="float32", fill_value=1.0
    )
    subsets = np.zeros((3, 400_000), bool)
    subsets[:, ::2] = True
    subsets[1, 5000:] = False
    subsets[2, 7] = True
    outcomes = np.arange(3.0)[:, None] * np.ones(64)
    lds(array[:, :8192], subsets[:, :8192], outcomes)  # what a first call allocates
    budget = process_anonymous() + 2**27
    with PeakMemory() as peak:
        found = lds(array, subsets, outcomes, memory=budget)
    assert found.constant_queries == 0
    assert peak.peak < budget
    assert peak.peak - peak.start < array.size * 4 / 4
    with pytest.raises(MemoryBudgetError, match="lds of 64 queries and 3 subsets"):
        lds(array, subsets, outcomes, memory=2**20)


def test_scores_of_stores_with_dropped_rows(tmp_path):
    write_store(tmp_path / "train.zarr", random_rows(300, 20))
    write_store(tmp_path / "query.zarr", random_rows(8, 20, seed=1))
    for name, rows in (("train", [5, 6, 299]), ("query", [3])):
        with GradientStore.open(tmp_path / f"{name}.zarr", "a") as store:
            store.drop(rows)
    fit_fisher(tmp_path / "train.zarr")
    scores = influence_scores(tmp_path / "query.zarr", tmp_path / "train.zarr")
    subsets = random_subsets(300, 20)
    outcomes = np.random.default_rng(0).standard_normal((20, 8))
    found = lds(scores, subsets, outcomes)
    assert (found.dropped_queries, found.dropped_rows) == (1, 3)
    assert_allclose(found.per_query, slow_lds(scores.compute(), subsets, outcomes), atol=1e-10)


def test_the_jackknife_equals_doing_it_again_without_each_subset():
    scores, subsets, outcomes = linear_datamodel(m=20, noise=1.0)
    outcomes = np.round(outcomes)  # with ties
    again = [lds(scores, np.delete(subsets, j, 0), np.delete(outcomes, j, 0)).mean for j in range(20)]
    expected = np.sqrt(19 / 20 * np.square(again - np.mean(again)).sum())
    assert lds(scores, subsets, outcomes).subset_error() == pytest.approx(expected)


def test_the_jackknife_tells_the_spread_over_subsets():
    scores, subsets, outcomes = linear_datamodel(n=100, m=600, q=6, noise=1.5)
    parts = [lds(scores, subsets[a : a + 60], outcomes[a : a + 60]) for a in range(0, 600, 60)]
    spread = np.std([part.mean for part in parts], ddof=1)
    assert 0.4 < np.mean([part.subset_error() for part in parts]) / spread < 2.5


def test_refusals():
    scores, subsets, outcomes = linear_datamodel(m=6)
    for args, match in (
        ((scores, subsets[:, :-1], outcomes), "as wide as the scores"),
        ((scores, subsets.astype(int), outcomes), "bool"),
        ((scores, subsets, outcomes.T), "outcomes \\(m, q\\)"),
        ((scores[0], subsets, outcomes), "scores \\(q, n\\)"),
        ((scores, subsets[:1], outcomes[:1]), "at least two subsets"),
    ):
        with pytest.raises(InputError, match=match):
            lds(*args)
    for place in (2, 4):
        outcomes[place] = np.nan
    with pytest.raises(InputError, match="runs 2, 4"):
        lds(scores, subsets, outcomes)
    bad = scores.copy()
    bad[1, 5] = np.nan
    with pytest.raises(InputError, match="for queries 1"):
        lds(bad, subsets, outcomes)
    bad[1, 5] = np.inf
    with pytest.raises(InputError, match="finite scores"):
        lds(da.from_array(bad), subsets, outcomes)

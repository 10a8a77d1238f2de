"""Fits of F's diagonal: against the dense oracle, whatever the division of the work; what they hold and refuse."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_rows, roomy, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import fit_fisher, group_influence, influence_scores, self_influence, top_influential
from ooc_influence.curvature import Curvature
from ooc_influence.errors import InputError, MemoryBudgetError, SingularFisherError
from ooc_influence.linalg import DiagonalAccumulator, Team
from ooc_influence.memory import process_anonymous

N, K, Q = 500, 24, 5


@pytest.fixture
def stores(tmp_path):
    sizes = np.geomspace(2, 0.1, K, dtype=np.float32)
    train = write_store(tmp_path / "train.zarr", random_rows(N, K) * sizes, chunk_rows=64)
    query = write_store(tmp_path / "query.zarr", random_rows(Q, K, 1) * sizes, chunk_rows=64)
    return query, train


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_accumulator(threads):
    rows = random_rows(1000, K)
    with Team(threads) as team:
        found = DiagonalAccumulator(K, team)
        for start in range(0, 1000, 300):
            part = rows[start : start + 300]
            team.run(found.pieces(part))
            found.added(len(part))
    assert found.folded == 1000
    assert_allclose(found.triangle(), np.square(rows.astype(np.float64)).sum(0), rtol=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("damping", "mode"), [(0.1, "relative"), (0.03, "absolute")])
def test_against_the_oracle(stores, workers, damping, mode):
    query, train = stores
    curvature = fit_fisher(train, blocks="diagonal", workers=workers, memory=roomy())
    assert curvature.kind == "diagonal"
    rows, queries = train.rows().astype(np.float64), query.rows().astype(np.float64)
    diagonal = np.square(rows).mean(0)
    assert_allclose(curvature.eigenvalues, diagonal, rtol=1e-6)
    assert_array_equal(curvature.fisher(), np.diag(curvature.eigenvalues))
    value = damping * (diagonal.mean() if mode == "relative" else 1)
    assert curvature.damping_value(damping, mode) == pytest.approx(value)
    assert curvature.effective_dimension(value) == pytest.approx((diagonal / (diagonal + value)).sum())
    expected = (queries / (diagonal + value)) @ rows.T
    options = {"damping": damping, "damping_mode": mode, "workers": workers, "memory": roomy()}
    scores = influence_scores(query, train, **options).compute()
    assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())
    assert_allclose(self_influence(train, **options), (np.square(rows) / (diagonal + value)).sum(1), rtol=1e-5)
    best = top_influential(query, train, top=7, **options)
    assert_array_equal(best.proponents.rows, np.argsort(-scores, axis=1, kind="stable")[:, :7])
    labels = np.arange(N) % 3
    sums = group_influence(query, train, labels, **options).sums
    assert_allclose(sums, [[row[labels == label].sum() for label in range(3)] for row in expected], rtol=1e-4)


def test_many_lambdas_and_rows_outside(tmp_path):
    rows = random_rows(90, 6)
    rows[:, 4] = 0
    train = write_store(tmp_path / "t.zarr", rows)
    query = write_store(tmp_path / "q.zarr", np.eye(6, dtype=np.float32))
    curvature = fit_fisher(train, blocks="diagonal")
    assert_allclose(curvature.outside_share(np.eye(6)), [0, 0, 0, 0, 1, 0])
    values = [curvature.damping_value(factor) for factor in (0.1, 2.0)]
    found = curvature.self_influence(rows, values)
    assert_allclose(found, [(np.square(rows) / (curvature.eigenvalues + value)).sum(1) for value in values], rtol=1e-5)
    with pytest.raises(SingularFisherError):
        influence_scores(query, train, damping=0.0)
    with pytest.warns(UserWarning, match="outside"):
        influence_scores(query, train, out=tmp_path / "scores.zarr")


def test_it_fits_where_the_whole_does_not(tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 6000), np.float32)  # random_rows takes a minute at this k
    train, budget = write_store(tmp_path / "t.zarr", rows), process_anonymous() + 400 * 2**20
    with pytest.raises(MemoryBudgetError):
        fit_fisher(train, memory=budget)
    found = fit_fisher(train, blocks="diagonal", memory=budget)
    assert found.kind == Curvature.open(found.path).kind == "diagonal"


def test_refusals(stores):
    with pytest.raises(InputError, match="received both"):
        fit_fisher(stores[1], blocks="diagonal", rank=3)
    with pytest.raises(InputError, match="no device"):
        fit_fisher(stores[1], blocks="diagonal", device="cpu")
    with pytest.raises(InputError, match="'module', 'diagonal' or none; received 'tile'"):
        fit_fisher(stores[1], blocks="tile")

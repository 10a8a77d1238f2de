"""The same calls on a Dask cluster of two real worker processes; skipped where distributed is not installed."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_rows, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import fit_fisher, influence_scores, self_influence, top_influential
from ooc_influence.errors import InputError
from ooc_influence.stripes import check_workers

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def long_pair(tmp_path):
    """Several blocks of rows: k is small, so that a block is 8192 of them."""
    train = write_store(tmp_path / "train.zarr", random_rows(30_000, 24), chunk_rows=1000)
    return write_store(tmp_path / "query.zarr", random_rows(6, 24, 1)), train


def test_two_workers_same_numbers(tmp_path, long_pair, client):
    query, train = long_pair
    with client.as_current():
        assert check_workers(None) == 2
        curvature = fit_fisher(train, progress=True)
        own = self_influence(train)
        top = top_influential(query, train, top=20)
        written = influence_scores(query, train, out=tmp_path / "scores.zarr")[...]
        lazy = influence_scores(query, train).compute()
    local = fit_fisher(train, out=tmp_path / "local.zarr", workers=1)
    assert_allclose(curvature.fisher(), local.fisher(), atol=1e-7 * local.fisher().max())
    assert_allclose(own, self_influence(train), rtol=1e-5)
    expected = influence_scores(query, train).compute(scheduler="synchronous")
    scale = np.abs(expected).max()
    assert_allclose(written, expected, atol=1e-6 * scale)
    assert_allclose(lazy, expected, atol=1e-6 * scale)
    assert_array_equal(top.proponents.rows, np.argsort(-expected, axis=1)[:, :20])


def test_a_cluster_without_workers_is_refused(tmp_path, long_pair):
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.as_current(),
        pytest.raises(InputError, match="without: start a worker"),
    ):
        fit_fisher(long_pair[1])

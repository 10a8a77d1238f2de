"""The same calls on a Dask cluster of two real worker processes; skipped where distributed is not installed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rows, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import Storage, fit_fisher, influence_scores, reduce_store, self_influence, top_influential
from ooc_influence.errors import InputError
from ooc_influence.store.claim import read_claims
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


def test_a_second_pass_by_two_workers(tmp_path, long_pair, client):
    query, train = long_pair
    storage = Storage(chunk_rows=1000, group_chunks=2)
    with client.as_current():
        reduced = reduce_store(train, tmp_path / "r", 8, rows=20_000, dtype="float32", storage=storage, progress=True)
        rotated = reduce_store(reduced, tmp_path / "t", rotate=True, storage=storage)
        asked = reduce_store(query, tmp_path / "q", like=rotated, dtype="float32")
    local = reduce_store(train, tmp_path / "l", 8, rows=20_000, dtype="float32", storage=storage, workers=1)
    assert_allclose(reduced.reduction.eigenvalues, local.reduction.eigenvalues, rtol=1e-5)
    assert_allclose(reduced.rows(), local.rows(), atol=1e-4 * np.abs(local.rows()).max())
    for found, source in ((reduced, train), (rotated, train), (asked, query)):
        expected = source.rows() @ found.reduction.vectors
        assert_allclose(found.rows(), expected, atol=1e-5 * np.abs(expected).max())
        assert (found.verify(), found.layout.planned_rows) == ([], None)
    F = rotated.rows().T.astype(np.float64) @ rotated.rows() / train.n
    assert np.abs(F - np.diag(np.diag(F))).max() < 1e-6 * F[0, 0]
    assert len({owner.record["pid"] for _, owner in read_claims(tmp_path / "r").values()} - {os.getpid()}) == 2


def test_a_worker_that_dies_in_a_second_pass(tmp_path, long_pair):
    """Its rows are written by another one: the same numbers."""
    _, train = long_pair
    wide = reduce_store(train, tmp_path / "whole", 8, rows=1000, dtype="float32")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.as_current(),
    ):
        client.run(_die_once, str(tmp_path / "died"))
        found = reduce_store(train, tmp_path / "s", like=wide, dtype="float32", storage=Storage(1000, 2))
    assert (tmp_path / "died").exists()
    assert_allclose(found.rows(), wide.rows(), atol=1e-6)
    assert found.verify() == []


def _die_once(mark):
    """Let the first of the workers to get to its third block die."""
    from ooc_influence.compress import passes

    real, count = passes._append, [0]

    def dying(*given):
        count[0] += 1
        if count[0] == 3 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    passes._append = dying


def test_a_cluster_without_workers_is_refused(tmp_path, long_pair):
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.as_current(),
        pytest.raises(InputError, match="without: start a worker"),
    ):
        fit_fisher(long_pair[1])

"""What runs of ours share with others: the cores of a machine, and the bits of a result."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from ooc_influence import fit_fisher, influence_scores, parallel, process
from ooc_influence.influence import scores
from ooc_influence.linalg import Team, backend
from ooc_influence.process import limit_blas


def threads_of_blas():
    """Of libraries with a limit for the process: tasks that came earlier keep theirs in one with a limit a thread."""
    blas = [part for part in threadpool_info() if part["user_api"] == "blas"]
    return max(part["num_threads"] for part in blas if part.get("threading_layer") != "openmp")


@pytest.mark.parametrize(("tasks", "told", "expected"), [(4, 4, 1), (1, 4, 4), (2, 4, 2), (1, 1, 1)])
def test_lazy_scores_use_the_cores_once(pair, monkeypatch, tasks, told, expected):
    """As many tasks as Dask runs, times the threads of each one's BLAS; never more than the process was told."""
    query, train = pair
    fit_fisher(train)
    lazy = influence_scores(query, train)
    wanted = lazy.compute(scheduler="synchronous")
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 64 * 4 * train.k)
    monkeypatch.setattr(parallel, "cores", lambda: 4)
    libraries = process._libraries  # but for those with a limit a thread: that of a new one is the environment's
    monkeypatch.setattr(process, "_libraries", lambda *, of_threads: [] if of_threads else libraries(of_threads=False))
    lazy = influence_scores(query, train)
    assert lazy.numblocks[-1] == 8
    found, gate, plain = [], threading.Barrier(tasks, timeout=30), scores.score_tiles

    def score_tiles(*args):
        gate.wait()  # all of them are running
        found.append(threads_of_blas())
        gate.wait()
        yield from plain(*args)

    monkeypatch.setattr(scores, "score_tiles", score_tiles)
    with limit_blas(told):
        result = lazy.compute(scheduler="synchronous" if tasks == 1 else "threads", num_workers=tasks)
        assert threads_of_blas() == told
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert max(found[:tasks]) == expected


@pytest.mark.parametrize("gain", [1.0, 1.25, 3.0])
def test_a_stopwatch_does_not_choose_between_equals(monkeypatch, gain):
    noise = np.random.default_rng(0)

    def timed(engine, total, block, team):
        return (1.0 if isinstance(engine, backend.NumpyEngine) else gain) * noise.uniform(1, 1.2)

    monkeypatch.setattr(backend, "timed_square", timed)
    monkeypatch.setattr(backend, "_TRIAL", (16, 32))
    with Team() as team:
        chosen = {type(backend._fastest(False, team)) for _ in range(30)}
    assert chosen == {backend.NumpyEngine if gain > 2 else backend.ScipyEngine}

from __future__ import annotations

import contextlib
import importlib
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import random_rows
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence.errors import InputError
from ooc_influence.linalg import MatrixAccumulator, Team, symmetric_eigen
from ooc_influence.linalg.backend import NumpyEngine, ScipyEngine, TorchEngine, add_product
from ooc_influence.parallel import Stripe, blas_threads, check_workers, cut_stripes, run_stripes
from ooc_influence.progress import Progress, tick


@pytest.mark.parametrize(("k", "threads"), [(1, 4), (7, 1), (300, 2), (1100, 1), (1100, 3)])
@pytest.mark.parametrize("engine", [ScipyEngine(), NumpyEngine(), TorchEngine()], ids=lambda engine: engine.name)
def test_accumulator_is_the_dense_sum(k, engine, threads):
    importlib.import_module("torch")
    rows = random_rows(1000, k)
    with Team(threads) as team:
        accumulator = MatrixAccumulator(k, None, engine, team)
        for start in range(0, 1000, 300):
            accumulator.add(rows[start : start + 300])
        accumulator.add(rows[:200], sign=-1.0)
        accumulator.add(rows[:200])
        found = accumulator.total()
    expected = rows.astype(np.float64).T @ rows.astype(np.float64)
    assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    assert_array_equal(found, found.T)


def test_a_temporary_tile_does_not_grow_with_the_columns():
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((16, columns), np.float32) for columns in (600, 20_000))
    total = np.zeros((600, 20_000), np.float32)
    tracemalloc.start()
    try:
        NumpyEngine().add_product(total, left, right, -1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 2**20
    assert_allclose(total, -left.T @ right, atol=1e-5)


def test_accumulator_folds_to_float64():
    """A million equal numbers: float32 alone would be off by per cent."""
    block = np.full((4096, 1), 0.1, np.float32)
    accumulator = MatrixAccumulator(1)
    for _ in range(256):
        accumulator.add(block)
    assert_allclose(accumulator.total()[0, 0], 4096 * 256 * float(np.float32(0.1)) ** 2, rtol=2e-6)


def test_accumulator_refuses_what_blas_would_misread():
    with pytest.raises(TypeError):
        MatrixAccumulator(3).add(np.zeros((2, 3)))
    with pytest.raises(TypeError):
        MatrixAccumulator(3).add(np.zeros((3, 2), np.float32).T)


def test_a_team_raises_what_its_work_raises():
    done = []
    for threads in (1, 3):
        with Team(threads) as team, pytest.raises(ZeroDivisionError):
            team.run([lambda: done.append(1), lambda: 1 // 0])
    assert len(done) == 2


def test_products_are_added_in_place():
    left, right = random_rows(50, 7), random_rows(50, 3, 1)
    total = np.asfortranarray(random_rows(7, 3, 2))
    expected = total + left.astype(np.float64).T @ right
    add_product(total, left, right)
    assert_allclose(total, expected, atol=1e-6 * np.abs(expected).max())
    with pytest.raises(TypeError):
        add_product(total, left, right.astype(np.float64))


def test_eigen():
    matrix = random_rows(50, 20).astype(np.float64)
    matrix = matrix.T @ matrix
    values, vectors = symmetric_eigen(matrix.copy())
    assert (np.diff(values) <= 0).all()
    assert (values >= 0).all()
    assert_allclose(vectors * values @ vectors.T, matrix, atol=1e-12 * values[0])


@pytest.mark.parametrize(("n", "block", "count"), [(100, 32, 3), (1, 32, 3), (64, 32, 2), (1000, 1, 7)])
def test_stripes_cover_all_rows_on_the_grid(n, block, count):
    stripes = cut_stripes(0, n, block, count)
    assert 1 <= len(stripes) <= count
    assert [stripe.start for stripe in stripes] == [0, *(stripe.stop for stripe in stripes[:-1])]
    assert stripes[-1].stop == n
    assert all(stripe.start % block == 0 and stripe.start < stripe.stop for stripe in stripes)


def _rows(stripe, key):
    tick(key, stripe.stop - stripe.start)
    return stripe.stop - stripe.start


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_results_in_order_and_summed(slots):
    stripes = [Stripe(0, 5), Stripe(5, 6), Stripe(6, 10)]
    with Progress("test", 10, False) as bar:
        assert run_stripes(_rows, stripes, bar, slots=slots) == [5, 1, 4]
        assert run_stripes(_rows, stripes, bar, slots=slots, reduce=lambda a, b: a + b) == 10


@pytest.mark.parametrize("count", range(1, 18))
def test_sums_are_added_in_the_same_order_in_one_slot_as_in_several(count):
    stripes = [Stripe(number, number + 1) for number in range(count)]
    orders = []
    with Progress("test", count, False) as bar:
        for slots in (1, 2):
            orders.append(
                run_stripes(
                    lambda stripe, key: str(stripe.start), stripes, bar, slots=slots, reduce=lambda a, b: f"({a} {b})"
                )
            )
    assert orders[0] == orders[1]


def test_one_slot_holds_few_results_at_a_time():
    """Of 64 parts that are added, no more than log₂ of their number, and the one that is made."""

    class Part:
        held = most = 0

        def __init__(self):
            Part.held += 1
            Part.most = max(Part.most, Part.held)

        def __del__(self):
            Part.held -= 1

    with Progress("test", 64, False) as bar:
        stripes = [Stripe(number, number + 1) for number in range(64)]
        run_stripes(lambda stripe, key: Part(), stripes, bar, slots=1, reduce=lambda a, b: Part())
    assert Part.most <= 8


def test_progress_counts_shows_and_stops(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("rows", 10, True) as bar:
        tick(bar.key, 4)
        assert bar._bar.n == 4
    assert "rows" in capsys.readouterr().err
    silent = Progress("rows", 10, None)
    with contextlib.suppress(ValueError), silent:
        tick(silent.key, 1)
        raise ValueError
    with pytest.raises(InterruptedError):
        tick(silent.key, 1)
    assert capsys.readouterr().err == ""


def test_workers():
    assert check_workers(None) == 1
    assert check_workers(3) == 3
    with pytest.raises(InputError, match="workers >= 1"):
        check_workers(0)


def test_blas_threads_share_the_cores():
    from threadpoolctl import threadpool_info

    with blas_threads(10_000):
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}

"""The Gram side agrees with the Fisher side, for fewer rows than columns and for more."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import random_rows, write_store
from numpy.testing import assert_allclose

from ooc_influence import GradientStore, fit_fisher, self_influence
from ooc_influence.cli.main import main
from ooc_influence.curvature import Curvature, choose_side, fit_gram
from ooc_influence.errors import MemoryBudgetError, SingularFisherError, StaleCurvatureError


def assert_near(found, expected, share=1e-5):
    assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore:.*effective dimension")
@pytest.mark.parametrize(("n", "k"), [(60, 2000), (300, 40)])
def test_both_sides_agree(tmp_path, n, k):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, k)).astype(np.float32) / np.sqrt(1 + np.arange(k, dtype=np.float32))
    train = write_store(tmp_path / "t.zarr", rows)
    with GradientStore.open(train.path, "a") as store:
        store.drop([4, 20])
    train = GradientStore.open(train.path)
    weights = rng.uniform(0, 2, n)
    gram, fisher = fit_gram(train, weights=weights), fit_fisher(train, weights=weights)
    assert gram.rows == fisher.rows == n - 2
    assert_allclose(gram.trace, fisher.trace, rtol=1e-6)
    value = gram.damping_value()
    assert_allclose(value, fisher.damping_value(), rtol=1e-6)
    queries = rng.normal(size=(5, k)) @ np.diag(np.linspace(0.1, 1, k))
    values = [value, 10 * value]
    assert_near(gram.precondition(queries, values), fisher.precondition(queries, values))
    single = queries.astype(np.float32)
    assert_near(gram.self_influence(single, values), fisher.self_influence(single, values))
    assert_allclose(gram.outside_share(queries), fisher.outside_share(queries), atol=1e-4)
    assert_allclose(gram.effective_dimension(value), fisher.effective_dimension(value), rtol=1e-4)  # float32 sums' tail
    live = np.setdiff1d(np.arange(n), [4, 20])
    assert_near(self_influence(train, curvature="gram")[live], self_influence(train)[live])


@pytest.mark.filterwarnings("ignore:.*effective dimension")
def test_it_serves_where_nothing_else_is_fitted(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(20, 60))
    found = fit_gram(train)
    assert np.isfinite(self_influence(train)).all()
    assert fit_gram(train).attrs["fit"] == found.attrs["fit"]
    with pytest.raises(SingularFisherError):
        self_influence(train, damping=0)
    with GradientStore.open(train.path, "a") as store:
        store.drop([3])
    now = GradientStore.open(train.path)
    with pytest.raises(StaleCurvatureError):
        self_influence(now)
    again = fit_gram(now)
    expected = np.delete(now.rows(), 3, axis=0).astype(np.float64)
    assert_near(Curvature.open(again.path).fisher(), expected.T @ expected / 19, 1e-6)


def test_a_small_budget_is_refused(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(200, 60))
    with pytest.raises(MemoryBudgetError, match="gram for 200 rows of k=60 needs"):
        fit_gram(train, memory="10MiB")


def test_the_cheaper_side():
    assert choose_side(10, 20) == "gram"
    assert choose_side(20, 10) == "fisher"


@pytest.mark.filterwarnings("ignore:.*effective dimension")
def test_the_command(tmp_path, capsys):
    train = write_store(tmp_path / "t.zarr", random_rows(20, 60))
    with pytest.raises(SystemExit) as stopped:
        main(["fisher", str(train.path), "--side", "auto", "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "gram"

"""Scores written as float16: those of float32 to three digits, whatever their size and unit."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_rows, write_store
from numpy.testing import assert_array_equal

import ooc_influence.influence.scores as scores_module
from ooc_influence import GradientStore, fit_fisher, influence_scores, module_influence
from ooc_influence.cli.main import cli
from ooc_influence.errors import InputError, StoreExistsError

N, K, Q = 300, 40, 7


@pytest.fixture(params=[1e-12, 1.0, 1e12], ids=["tiny", "usual", "huge"])
def stores(tmp_path, request):
    """Rows of one size, but for a single large one; a dropped row and a dropped query."""
    rows = random_rows(N, K) * np.float32(request.param)
    rows[17] *= 50
    written = [write_store(tmp_path / "train", rows), write_store(tmp_path / "query", random_rows(Q, K, 1))]
    for store, row in zip(written, (5, 2), strict=True):
        with GradientStore.open(store.path, "a") as opened:
            opened.drop([row])
    fit_fisher(written[0].path)
    return [GradientStore.open(store.path) for store in written]


def error(array, expected):
    """The largest error, over the largest score of a query."""
    found = array[...].astype(np.float64) * array.attrs["scale_factor"]
    assert array.dtype == np.float16
    assert_array_equal(np.isnan(found), np.isnan(expected))
    return np.nanmax(np.abs(found - expected) / np.nanmax(np.abs(expected), axis=-1, initial=1e-300)[..., None])


@pytest.mark.parametrize("unit", ["none", "train", "cosine"])
def test_they_are_the_scores_to_three_digits(stores, tmp_path, unit):
    train, query = stores
    for number, options in enumerate(({"damping": [0.1, 10.0]}, {"curvature": False})):
        options |= {"normalize": unit}
        expected = influence_scores(query, train, **options).compute().astype(np.float64)
        written = influence_scores(query, train, tmp_path / f"s{number}", scores_dtype="float16", **options)
        assert np.frexp(written.attrs["scale_factor"])[0] == 0.5
        assert error(written, expected) < 2**-11


def test_they_are_of_several_checkpoints_and_modules_too(stores, tmp_path):
    train, query = stores
    options = {"normalize": "none", "rows": [np.arange(200), np.arange(100, N)]}
    expected = influence_scores([query] * 2, [train] * 2, **options).compute()
    written = influence_scores([query] * 2, [train] * 2, tmp_path / "c", scores_dtype="float16", **options)
    assert error(written, expected) < 2**-11
    parts = module_influence(query, train, out=tmp_path / "m", scores_dtype="float16")
    assert error(parts, module_influence(query, train, out=tmp_path / "m32")[...].astype(np.float64)) < 2**-11


def test_they_resume_as_they_began(stores, tmp_path):
    train, query = stores
    written = influence_scores(query, train, tmp_path / "s", scores_dtype="float16")
    before = written[...]
    (tmp_path / "s" / "c.0.0").unlink()
    array = scores_module.writable_array(scores_module.array_store(scores_module.parse_path(tmp_path / "s")))
    array.attrs["complete"] = False
    assert_array_equal(influence_scores(query, train, tmp_path / "s", scores_dtype="float16")[...], before)
    with pytest.raises(StoreExistsError):
        influence_scores(query, train, tmp_path / "s")


def test_what_is_refused(stores, tmp_path, monkeypatch):
    train, query = stores
    with pytest.raises(InputError, match="lazy scores are float32"):
        influence_scores(query, train, scores_dtype="float16")
    with pytest.raises(InputError, match="received 'int8'"):
        influence_scores(query, train, tmp_path / "s", scores_dtype="int8")
    monkeypatch.setattr(scores_module, "_SLACK", 1e-9)  # as if rows were larger than their norms say
    with pytest.raises(InputError, match="write them as float32"):
        influence_scores(query, train, tmp_path / "s", scores_dtype="float16", curvature=False)


def test_the_command(stores, tmp_path):
    train, query = stores
    asked = ["score", str(query.path), str(train.path), "--out", str(tmp_path / "s"), "--scores-dtype", "float16"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    assert "float16, times" in result.output

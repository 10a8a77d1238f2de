"""Queries minus the mean of controls: scores are those of the difference, everywhere that queries are scored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import roomy, write_store
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run, stores  # noqa: F401 - fixtures

from ooc_influence import (
    GradientStore,
    fit_fisher,
    group_influence,
    influence_scores,
    module_influence,
    rerank,
    sketch_store,
    token_influence,
    top_influential,
)
from ooc_influence.errors import InputError, MismatchError, StoreExistsError
from ooc_influence.report import describe_scoring

K, N, Q, C = 24, 300, 7, 5


@pytest.fixture(scope="module")
def contrast(tmp_path_factory):
    """Queries, controls of which one is dropped, the train store, and a store of the differences."""
    folder = tmp_path_factory.mktemp("contrast")
    generator = np.random.default_rng(0)
    sizes = np.exp(-np.arange(K) / 4)
    query, controls, train = ((generator.standard_normal((rows, K)) * sizes).astype(np.float32) for rows in (Q, C, N))
    made = {"q": query, "c": controls, "t": train, "d": query - np.delete(controls, 2, 0).mean(0),
            "m": query.mean(0, keepdims=True) - np.delete(controls, 2, 0).mean(0)}  # fmt: skip
    opened = {name: write_store(folder / f"{name}.zarr", rows) for name, rows in made.items()}
    with GradientStore.open(opened["c"].path, "a") as store:
        store.drop([2])
    fit_fisher(opened["t"])
    return {name: GradientStore.open(store.path) for name, store in opened.items()}


def close(found, expected):
    assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", [{}, {"normalize": "cosine"}, {"normalize": "train"}, {"curvature": False},
                                     {"damping": [0.1, 2.0]}])  # fmt: skip
def test_scores_are_those_of_the_difference(contrast, options):
    query, controls, train = (contrast[name] for name in "qct")
    asked = {"memory": roomy(), **options}
    found = influence_scores(query, train, minus=controls, **asked).compute()
    close(found, influence_scores(contrast["d"], train, **asked).compute())
    of_mean = influence_scores(query, train, minus=controls.path, average_queries=True, **asked).compute()
    close(of_mean, influence_scores(contrast["m"], train, **asked).compute())
    lists = top_influential(query, train, top=5, minus=controls, **asked)
    expected = top_influential(contrast["d"], train, top=5, **asked)
    assert_array_equal(lists.proponents.rows, expected.proponents.rows)
    assert lists.settings["minus"] == str(controls.path)
    assert str(controls.path) in describe_scoring(lists.settings)
    assert "minus" not in expected.settings


def test_scores_are_differences_of_scores(contrast):
    """Against float64: q F⁻¹ g minus the mean of c F⁻¹ g."""
    query, controls, train = (contrast[name] for name in "qct")
    live = np.delete(controls.rows().astype(float), 2, 0)
    rows = train.rows().astype(float)
    fisher = rows.T @ rows / N
    inverse = np.linalg.inv(fisher + 0.1 * np.trace(fisher) / K * np.eye(K))
    expected = query.rows() @ inverse @ rows.T - (live @ inverse @ rows.T).mean(0)
    close(influence_scores(query, train, minus=controls, damping=0.1).compute(), expected)


def test_groups_modules_and_sketches(contrast, tmp_path):
    query, controls, train = (contrast[name] for name in "qct")
    by = np.arange(N) % 3
    close(group_influence(query, train, by, minus=controls).sums, group_influence(contrast["d"], train, by).sums)
    found, expected = (
        module_influence(first, train, top=4, **more)["fc"].proponents.rows
        for first, more in ((query, {"minus": controls}), (contrast["d"], {}))
    )
    assert_array_equal(found, expected)
    sketch = sketch_store(train, tmp_path / "sketch.zarr", 16)
    lists = top_influential(query, train, top=5, minus=controls, sketch=sketch, recall=1)
    assert_array_equal(lists.proponents.rows, top_influential(contrast["d"], train, top=5).proponents.rows)


def test_several_checkpoints_have_controls_each(contrast):
    query, controls, train, difference = (contrast[name] for name in "qctd")
    found = influence_scores([query] * 2, [train] * 2, minus=[controls] * 2).compute()
    close(found, influence_scores([difference] * 2, [train] * 2).compute())
    with pytest.raises(InputError, match=r"controls \(--minus\) for each of 2 checkpoints; received 1"):
        influence_scores([query] * 2, [train] * 2, minus=controls)


def test_other_controls_are_another_request(contrast, tmp_path):
    """What was written with others, or none, is not continued."""
    query, controls, train = (contrast[name] for name in "qct")
    scores = influence_scores(query, train, minus=controls, out=tmp_path / "s.zarr")
    assert scores.attrs["minus"] == str(controls.path)
    for minus in (None, query):
        with pytest.raises(StoreExistsError):
            influence_scores(query, train, minus=minus, out=tmp_path / "s.zarr")


def test_controls_that_are_refused(contrast, tmp_path):
    query, controls, train = (contrast[name] for name in "qct")
    with pytest.raises(MismatchError, match="like="):
        influence_scores(query, train, minus=write_store(tmp_path / "k.zarr", np.ones((3, K + 1))))
    dropped = write_store(tmp_path / "n.zarr", np.ones((1, K)))
    with GradientStore.open(dropped.path, "a") as store:
        store.drop([0])
    with pytest.raises(InputError, match=r"rows of controls that are not dropped .* \(--minus\)"):
        influence_scores(query, train, minus=dropped.path)
    with pytest.raises(InputError, match="combine"):
        influence_scores([query] * 2, [train] * 2, minus=[controls] * 2, combine="margins")
    with pytest.raises(InputError, match="queries alone to look at token by token"):
        token_influence(query, train, None, minus=controls)
    with pytest.raises(InputError, match="queries alone to rank again"):
        rerank(query, train, None, None, (None, None), minus=controls)
    lists = top_influential(query, train, top=3, minus=controls)
    with pytest.raises(InputError, match="queries alone to look at token by token"):
        token_influence(query, train, None, lists=lists)


def test_the_command_line(run, stores):  # noqa: F811
    found = run("top test.zarr train.zarr --top 3 --average-queries --minus test.zarr --json")
    assert found[0] == 0, found
    scores = [each["score"] for each in json.loads(found[1])["queries"][0]["proponents"]]
    assert_allclose(scores, 0, atol=1e-6)
    code, out, _ = run("score test.zarr train.zarr --out s.zarr --minus train.zarr")
    assert code == 0
    assert "queries minus the mean of train.zarr" in out
    expected = influence_scores("test.zarr", "train.zarr", minus="train.zarr").compute()
    assert np.abs(expected - influence_scores("test.zarr", "train.zarr").compute()).max() > 0

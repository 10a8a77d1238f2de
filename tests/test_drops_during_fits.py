"""Rows dropped while a curvature is fitted: what it holds is what it records, whenever the drop comes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import random_rows, write_store
from numpy.testing import assert_allclose
from test_top import force

from ooc_influence import Curvature, GradientStore, fit_fisher, fit_gram
from ooc_influence.curvature import dual, fit, primal
from ooc_influence.errors import StaleCurvatureError
from ooc_influence.linalg import WeightedRows, rows, spectrum

DROPPED, LATER = [3, 150], [7, 120, 298]
MOMENTS = {
    "digest": [(GradientStore, "rows_digest")],
    "tombstones": [(rows.WeightedRows, "dropped_now")],
    "chosen": [(fit, "choose_rows")],
    "compared": [(fit, "fit_staleness")],
    "recorded": [(primal.FittedRows, "of")],
    "claimed": [(fit, "ClaimedOutput")],
    "reading": [(rows, "read_blocks")],
    "written": [(fit, "write_curvature"), (dual, "write_curvature")],
}


def drop_at(monkeypatch, moment, path, numbers):
    """Drop rows, as another process would, right after the first call of what marks a moment."""
    left = [numbers]
    for holder, name in MOMENTS[moment]:
        plain = getattr(holder, name)

        def call(*args, plain=plain, **options):
            found = plain(*args, **options)
            if left:
                GradientStore.open(path, "a").drop(left.pop())
            return found

        monkeypatch.setattr(holder, name, call)


def live_fisher(train):
    """F of the live rows, (k, k) float64."""
    live = train.rows()[~train.dropped].astype(np.float64)
    return len(live), live.T @ live / len(live)


@pytest.fixture
def train(tmp_path):
    store = write_store(tmp_path / "train.zarr", random_rows(300, 12))
    with GradientStore.open(store.path, "a") as writer:
        writer.drop(DROPPED)  # so that marks are read
    return GradientStore.open(store.path)


def ways(name, monkeypatch):
    """Return how to fit: the way and its options."""
    if name in ("tiles", "rows", "sums"):
        force(monkeypatch, name)
        return fit_fisher, {"rank": 12}
    return {"gram": (fit_gram, {}), "whole": (fit_fisher, {}), "diagonal": (fit_fisher, {"blocks": "diagonal"})}[name]


@pytest.mark.parametrize(
    ("way", "moment"),
    [("whole", moment) for moment in MOMENTS]
    + [
        (way, moment) for way in ("diagonal", "tiles", "rows", "gram") for moment in ("compared", "recorded", "reading")
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_an_increment_after_a_drop_during_a_fit(train, monkeypatch, way, moment, second):
    fit, options = ways(way, monkeypatch)
    if second:  # the drop comes while an earlier fit is brought up to date
        fit(train, **options)
        with GradientStore.open(train.path, "a") as store:
            store.drop([40])
    with monkeypatch.context() as patch:
        drop_at(patch, moment, train.path, LATER)
        fit(GradientStore.open(train.path), **options)
    now = GradientStore.open(train.path)
    fit(now, **options)
    found = Curvature.open(fit(now, **options).path)
    m, expected = live_fisher(now)
    assert found.rows == m
    if way == "diagonal":
        assert_allclose(found.eigenvalues, np.diagonal(expected), rtol=1e-6)
    elif way == "rows":
        assert_allclose(found.eigenvalues, np.linalg.eigvalsh(expected)[::-1], rtol=1e-4)
    else:
        assert_allclose(found.fisher(), expected, rtol=0, atol=1e-6 * expected.max())


def test_partial_sums_that_hold_a_row_dropped_since_are_not_used(train, monkeypatch):
    """The digest of partial results says which rows they hold, not which were live a moment later."""

    def killed(plain, *args, **options):
        for number, block in enumerate(plain(*args, **options)):
            if number == 3:
                raise InterruptedError
            yield block

    with monkeypatch.context() as patch:
        patch.setattr("ooc_influence.memory.MemoryBudget.plan", lambda budget, model: 16)
        patch.setattr("ooc_influence.linalg.accumulate.FOLD_ROWS", 16)
        drop_at(patch, "chosen", train.path, LATER)
        plain = rows.read_blocks
        patch.setattr(rows, "read_blocks", lambda *args, **options: killed(plain, *args, **options))
        with pytest.raises(InterruptedError):
            fit_fisher(GradientStore.open(train.path))
        assert list(train.path.glob("curvature/.default.partial/rows-*"))
    now = GradientStore.open(train.path)
    found = fit_fisher(now)
    m, expected = live_fisher(now)
    assert found.rows == m
    assert_allclose(found.fisher(), expected, rtol=0, atol=1e-6 * expected.max())


def test_a_curvature_whose_sums_lack_rows_it_records_is_fitted_again(train):
    """As earlier versions wrote them, where rows were dropped during a fit."""
    found = fit_fisher(train)
    marks = found.path / "zarr.json"
    text = json.loads(marks.read_text())
    facts = text["attributes"]["ooc_influence_curvature"]
    facts["rows"], facts["rows_digest"] = facts["rows"] - 2, "of another moment"
    marks.write_text(json.dumps(text))
    with pytest.raises(StaleCurvatureError):
        Curvature.open(found.path).check(train)
    again = fit_fisher(train)
    m, expected = live_fisher(train)
    assert again.rows == m
    assert_allclose(again.fisher(), expected, rtol=0, atol=1e-6 * expected.max())


@pytest.mark.parametrize("way", ["Fisher", "Gram", "subspace"])
def test_a_basis_is_of_one_set_of_rows(train, monkeypatch, way):
    """Rows dropped between its passes, or between two tiles of one."""
    m, expected = live_fisher(train)
    chosen = WeightedRows.of(train, [(0, 100), (100, 300)])
    assert chosen.live == m
    plain, left = WeightedRows.blocks, [LATER]

    def blocks(*args, **options):
        for block in plain(*args, **options):
            if left:
                GradientStore.open(train.path, "a").drop(left.pop())
            yield block

    ways_of = spectrum.spectrum_solvers
    monkeypatch.setattr(
        spectrum, "spectrum_solvers", lambda *a: [one for one in ways_of(*a) if one.name.startswith(way)]
    )
    monkeypatch.setattr(spectrum, "PRODUCT_ROWS", 64)
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**10)
    monkeypatch.setattr(WeightedRows, "blocks", blocks)
    found = spectrum.top_spectrum(chosen, 4, progress=False)
    assert not left
    assert_allclose(found.eigenvalues, np.linalg.eigvalsh(expected)[::-1][:4], rtol=1e-4)

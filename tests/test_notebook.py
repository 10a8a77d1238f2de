"""What notebooks see: reprs, frames, datasets, figures; names from a corpus are text there, never markup."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import ooc_influence as ooc
from ooc_influence.errors import InputError, MissingExtraError
from ooc_influence.evaluate import recall_at

FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def stores(pair):
    query, train = pair
    ooc.fit_fisher(train)
    return query, ooc.GradientStore.open(train.path)


def test_xarray_opens_a_store(stores):
    xarray = pytest.importorskip("xarray")
    train = stores[1]
    raw = xarray.open_zarr(str(train.path), consolidated=False)
    assert dict(raw.sizes) == {"row": 500, "stored": 40, "chunk": 8}
    assert_array_equal(raw.loss, train.loss)
    tree = xarray.open_datatree(str(train.path), engine="zarr", consolidated=False)
    assert "/curvature/default" in tree.groups
    found = train.to_xarray()
    assert_array_equal(found.gradients[3:70].values, train.rows(3, 70))
    assert_array_equal(found.grad_norm, train.grad_norm)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_frames_and_datasets_of_every_format(fixture):
    pandas, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    store = ooc.GradientStore.open(fixture)
    frame, dataset = store.to_pandas(), store.to_xarray()
    assert isinstance(frame, pandas.DataFrame)
    assert isinstance(dataset, xarray.Dataset)
    assert frame["id"].tolist() == dataset["id"].values.tolist() == store.ids().tolist()
    assert frame.index[frame["dropped"]].tolist() == [4]
    assert set(frame.columns) == {"id", "loss", "grad_norm", "dropped", "label", "source"}
    assert_allclose(dataset["gradients"].values, store.rows())


def test_results_as_frames(stores):
    pytest.importorskip("pandas")
    query, train = stores
    found = ooc.top_influential(query, train, top=4, damping=[0.1, 1.0])
    frame = found.to_pandas()
    assert len(frame) == 2 * 7 * 2 * 4
    one = frame[(frame["damping"] == found.damping[1]) & (frame["query"] == 2) & (frame["side"] == "opponents")]
    assert_array_equal(one["row"], found.opponents.rows[1, 2])
    assert_array_equal(one["score"], found.opponents.scores[1, 2])
    groups = ooc.group_influence(query, train, np.arange(500) % 3)
    table = groups.to_pandas().pivot(index="query", columns="group", values="sum")
    assert_allclose(table.values, groups.sums)
    assert len(ooc.group_influence(query, train, np.arange(500) % 3, damping=[0.1, 1]).to_pandas()) == 2 * 7 * 3
    spectrum = ooc.Curvature.open(train.path / "curvature" / "default").to_pandas()
    assert spectrum["cumulative_share"].iloc[-1] == pytest.approx(1)


def test_reprs_are_short_and_escaped(stores):
    query, train = stores
    found = ooc.top_influential(query, train, top=2)
    assert repr(found).startswith("<TopInfluential 7 queries, 2 proponents")
    groups = ooc.group_influence(query, train, np.array([HOSTILE, "b"])[np.arange(500) % 2])
    assert repr(groups).startswith("<GroupInfluence 7 queries, 2 groups of 500 rows")
    curvature = ooc.Curvature.open(train.path / "curvature" / "default")
    for shown in (found, groups, curvature, train):
        text = shown._repr_html_()
        assert text.startswith("<table>")
        assert "<script" not in text
    assert "&lt;script&gt;" in groups._repr_html_()
    assert "500" in train._repr_html_()


def test_lists_in_a_table_end_where_scores_change_sign(stores):
    query, train = stores
    text = ooc.top_influential(query, train, top=500)._repr_html_()
    lines = [re.findall("<td>(.*?)</td>", line) for line in text.split("<tr>") if "<td>" in line]
    assert len(lines) == 7
    for _, proponents, opponents in lines:
        assert "(+" in proponents
        assert "(-" not in proponents
        assert "(-" in opponents
        assert "(+" not in opponents


def test_plots_are_figures(stores):
    figures = pytest.importorskip("matplotlib.figure")
    train = stores[1]
    curvature = ooc.Curvature.open(train.path / "curvature" / "default")
    figure = ooc.plot.spectrum(curvature)
    assert isinstance(figure, figures.Figure)
    lines = figure.axes[0].lines[0].get_ydata(), figure.axes[1].lines[0]
    assert_allclose(lines[0], curvature.eigenvalues[curvature.eigenvalues > 0])
    value = lines[1].get_xdata()[20]
    assert lines[1].get_ydata()[20] == pytest.approx(curvature.effective_dimension(value))

    values = ooc.self_influence(train)
    flagged = np.arange(500) % 10 == 0
    curve = ooc.plot.mislabel_curve({"self-influence": values, "loss": train.loss}, flagged).axes[0].lines[0]
    for share in (0.1, 0.5):
        assert curve.get_ydata()[round(500 * share)] == pytest.approx(recall_at(values, flagged, share))
    values[3] = np.nan
    axis = ooc.plot.self_influence(values, flagged, bins=9).axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 499
    assert "1 not drawn" in axis.get_title()
    for call in (
        lambda: ooc.plot.spectrum(train.path),
        lambda: ooc.plot.self_influence("train.zarr"),
        lambda: ooc.plot.mislabel_curve({"a": "b"}, flagged),
        lambda: ooc.plot.self_influence(np.zeros(3)),
        lambda: ooc.plot.self_influence(np.ones((2, 3))),
        lambda: ooc.plot.mislabel_curve(values, np.zeros(500, bool)),
        lambda: ooc.plot.mislabel_curve(values[:3], flagged),
    ):
        with pytest.raises(InputError, match="expected"):
            call()


def test_a_missing_library_is_named(stores, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        stores[1].to_pandas()
    with pytest.raises(MissingExtraError, match="pip install xarray"):
        stores[1].to_xarray()

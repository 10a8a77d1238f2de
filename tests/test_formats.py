"""Stores of every format version are still read: one fixture each."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from make_fixture import LAYERS, NAMES, ROWS
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import Curvature, Dropout, GradientStore, fit_fisher, self_influence, upgrade_store
from ooc_influence.curvature import resolve_curvature
from ooc_influence.errors import StoreFormatError

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = FIXTURES / "format-1.zarr"
EVERY = pytest.mark.parametrize("fixture", sorted(FIXTURES.iterdir()), ids=lambda path: path.stem)


@EVERY
def test_every_format_is_read(fixture):
    store = GradientStore.open(fixture)
    assert store.attrs["format"] == int(fixture.stem.removeprefix("format-"))
    assert store.shape == (11, 6)
    assert store.verify() == []
    assert_allclose(store.rows(), ROWS, atol=2.0**-11 * np.abs(ROWS).max())
    assert store.ids().tolist() == NAMES
    assert_array_equal(store.column("label"), np.arange(11) % 3)
    assert store.column("source")[-1] == "ç"
    assert np.flatnonzero(store.small("dropped")).tolist() == [4]
    assert Dropout.from_dict(dict(store.attrs["compressor"])) == Dropout(k=6, seed=3)
    assert [module.layer for module in store.mask.modules] == LAYERS


@EVERY
def test_its_curvature_is_up_to_date(fixture):
    store = GradientStore.open(fixture)
    curvature = resolve_curvature(store, None)
    assert isinstance(curvature, Curvature)
    live = np.delete(store.rows().astype(np.float64), 4, axis=0)
    assert_allclose(curvature.fisher(), live.T @ live / 10, atol=1e-6)
    assert np.isnan(self_influence(store)[4])


def test_it_is_upgraded_then_appended_to(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "s.zarr")
    with GradientStore.open(tmp_path / "s.zarr", "a") as store, pytest.raises(StoreFormatError, match="upgrade"):
        store.append(ROWS[:1], loss=[0.0], ids=["x"], columns={"label": [1], "source": ["q"]})
    before = GradientStore.open(tmp_path / "s.zarr")
    assert upgrade_store(tmp_path / "s.zarr")
    assert not upgrade_store(tmp_path / "s.zarr")
    after = GradientStore.open(tmp_path / "s.zarr")
    assert (after.attrs["format"], after.rows_digest()) == (2, before.rows_digest())
    assert resolve_curvature(after, None).rows == 10
    with GradientStore.open(tmp_path / "s.zarr", "a") as store:
        store.append(ROWS[:3], loss=np.zeros(3), ids=["x", "y", "z"], columns={"label": [1, 2, 3], "source": ["q"] * 3})
    store = GradientStore.open(tmp_path / "s.zarr")
    assert (store.n, store.verify()) == (14, [])
    assert fit_fisher(store).rows == 13

"""Stores of every format version are still read: one fixture each."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from make_fixture import LAYERS, NAMES, rows_of, write
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import (
    Curvature,
    Dropout,
    GradientStore,
    compact_store,
    fit_fisher,
    merge_stores,
    self_influence,
    upgrade_store,
)
from ooc_influence.curvature import resolve_curvature
from ooc_influence.errors import MismatchError, StoreFormatError

FIXTURES = Path(__file__).parent / "fixtures"
OLDER = pytest.mark.parametrize("name", ["format-1", "format-2", "format-2-int8"])
SIGNS = FIXTURES / "format-3-sign.zarr"
EVERY = pytest.mark.parametrize("fixture", sorted({*FIXTURES.iterdir()} - {SIGNS}), ids=lambda path: path.stem)


@EVERY
def test_every_format_is_read(fixture):
    store = GradientStore.open(fixture)
    assert store.attrs["format"] == int(fixture.stem.split("-")[1])
    rows = rows_of(store.k)
    assert store.shape == (11, 20 if store.attrs["format"] == 3 else 6)
    assert store.verify() == []
    step = {"float16": 2.0**-11, "int8": 1 / 127}[store.layout.dtype]
    assert_allclose(store.rows(), rows, atol=step * np.abs(rows).max())
    assert store.ids().tolist() == NAMES
    assert_array_equal(store.column("label"), np.arange(11) % 3)
    assert store.column("source")[-1] == "ç"
    assert np.flatnonzero(store.small("dropped")).tolist() == [4]
    assert Dropout.from_dict(dict(store.attrs["compressor"])) == Dropout(k=store.k, seed=3)
    assert [module.layer for module in store.mask.modules] == LAYERS


def test_signs_are_read_and_written_as_ever(tmp_path):
    """The same bits and scales for the same rows; how they decode is in test_signs.py."""
    store = GradientStore.open(SIGNS)
    assert store.verify() == []
    assert (store.layout.dtype, store.shape) == ("sign", (11, 20))
    write(tmp_path / "again", 20, "sign")
    again = GradientStore.open(tmp_path / "again")
    assert_array_equal(store.raw_rows(0, 11), again.raw_rows(0, 11))
    assert_array_equal(store.small("row_scale"), again.small("row_scale"))
    assert_array_equal(store.rows(), again.rows())
    assert np.corrcoef(store.rows().ravel(), rows_of(20).ravel())[0, 1] > 0.7
    assert np.flatnonzero(store.small("dropped")).tolist() == [4]


@EVERY
def test_its_curvature_is_up_to_date(fixture):
    store = GradientStore.open(fixture)
    curvature = resolve_curvature(store, None)
    assert isinstance(curvature, Curvature)
    live = np.delete(store.rows().astype(np.float64), 4, axis=0)
    assert_allclose(curvature.fisher(), live.T @ live / 10, atol=1e-6)
    assert np.isnan(self_influence(store)[4])


@OLDER
def test_it_is_upgraded_then_appended_to(tmp_path, name):
    rows = rows_of(6)[:3] * 3
    shutil.copytree(FIXTURES / f"{name}.zarr", tmp_path / "s.zarr")
    with GradientStore.open(tmp_path / "s.zarr", "a") as store, pytest.raises(StoreFormatError, match="upgrade"):
        store.append(rows[:1], loss=[0.0], ids=["x"], columns={"label": [1], "source": ["q"]})
    before = GradientStore.open(tmp_path / "s.zarr")
    assert upgrade_store(tmp_path / "s.zarr")
    assert not upgrade_store(tmp_path / "s.zarr")
    after = GradientStore.open(tmp_path / "s.zarr")
    assert (after.attrs["format"], after.rows_digest()) == (3, before.rows_digest())
    assert resolve_curvature(after, None).rows == 10
    with GradientStore.open(tmp_path / "s.zarr", "a") as store:
        store.append(rows, loss=np.zeros(3), ids=["x", "y", "z"], columns={"label": [1, 2, 3], "source": ["q"] * 3})
    store = GradientStore.open(tmp_path / "s.zarr")
    assert (store.n, store.verify(), store.layout.block) == (14, [], None)
    assert_array_equal(store.rows(0, 11), before.rows())
    assert_allclose(store.rows(11), rows, atol=np.abs(rows).max() / 127)
    assert fit_fisher(store).rows == 13


def test_rows_without_blocks_merge_and_compact_as_they_are(tmp_path):
    """int8 rows of format 2 keep their bytes; with rows of format 3 they do not go together."""
    source = GradientStore.open(FIXTURES / "format-2-int8.zarr")
    made = compact_store(source, tmp_path / "c.zarr")
    assert_array_equal(made.rows(), np.delete(source.rows(), 4, axis=0))
    merged = merge_stores([made], tmp_path / "m.zarr")
    assert (merged.layout.block, merged.attrs["format"], merged.verify()) == (None, 3, [])
    assert_array_equal(merged.rows(), made.rows())
    new = GradientStore.create(
        tmp_path / "n.zarr", source.mask, dtype="int8", ids="str", columns=source.layout.columns,
        attributes={"model": source.attrs["model"], "loss_kind": source.attrs["loss_kind"]},
    )  # fmt: skip
    with pytest.raises(MismatchError, match="the block of"):
        merge_stores([made, new], tmp_path / "x.zarr")

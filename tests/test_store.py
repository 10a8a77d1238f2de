"""The store: what is written comes back, whatever the chunking; only committed rows are visible."""

from __future__ import annotations

import mmap
import pickle

import numpy as np
import pytest
import zarr
from conftest import random_rows, whole_mask, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import GradientStore, Storage
from ooc_influence.errors import (
    InputError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreFormatError,
    StoreNotFoundError,
)
from ooc_influence.store import read_blocks
from ooc_influence.store.local import LocalArrayStore

TOLERANCE = {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_come_back(tmp_path, dtype):
    scale = np.exp(np.random.default_rng(2).normal(size=(200, 1)) * 12).astype(np.float32)
    rows = random_rows(200, 33) * scale  # from 1e-15 to 1e+15: bare float16 would lose both ends
    rows[7] = 0
    rows[8] *= 2.0**50 / np.abs(rows[8]).max()
    store = write_store(tmp_path / "s.zarr", rows, dtype=dtype)
    assert store.shape == (200, 33)
    assert store.committed == 200
    assert store.verify() == []
    largest = np.abs(rows).max(axis=1, keepdims=True)
    assert (np.abs(store.rows() - rows) <= TOLERANCE[dtype] * largest).all()
    assert_array_equal(store.small("loss"), np.arange(200, dtype=np.float32))
    assert_allclose(store.small("grad_norm"), np.linalg.norm(rows, axis=1), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    chunk_rows=st.integers(1, 17),
    group_chunks=st.integers(1, 4),
    reopen=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_any_appends_any_chunks(tmp_path_factory, sizes, chunk_rows, group_chunks, reopen):
    path = tmp_path_factory.mktemp("any") / "s.zarr"
    rows = random_rows(sum(sizes), 5)
    names = [f"row é {number}" for number in range(len(rows))]
    store = GradientStore.create(
        path, whole_mask(5), dtype="float32", storage=Storage(chunk_rows, group_chunks), ids="str",
        columns={"label": "int64"},
    )  # fmt: skip
    first = 0
    for size, again in zip(sizes, reopen, strict=False):
        part = slice(first, first + size)
        labels = np.arange(len(rows))[part] % 3
        store.append(rows[part], loss=np.zeros(size), ids=names[part], columns={"label": labels})
        first += size
        if again:
            store.close()
            store = GradientStore.open(path, "a")
            assert store.n == first
    store.close()
    store = GradientStore.open(path)
    assert_array_equal(store.rows(), rows)
    assert store.ids().tolist() == names
    assert_array_equal(store.column("label"), np.arange(len(rows)) % 3)
    assert store.verify() == []


def test_raw_rows_are_mapped_not_copied(tmp_path):
    store = write_store(tmp_path / "s.zarr", random_rows(100, 8), dtype="float16")
    view = store.rows(64, 90, raw=True)
    base = view
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert view.dtype == np.float16
    before = store.rows(64, 90)
    view[...] = 0  # copy on write: it never reaches the file
    assert_array_equal(store.rows(64, 90), before)


def test_plain_zarr_and_dask_read_it(tmp_path):
    rows = random_rows(100, 8)
    store = write_store(tmp_path / "s.zarr", rows)
    group = zarr.open_group(str(store.path), mode="r")
    assert_array_equal(group["gradients"][...], rows)
    assert {name for name, _ in group.members()} >= {"gradients", "row_scale", "loss", "commits", "mask", "curvature"}
    assert_array_equal(store.to_dask().compute(), rows)
    assert_array_equal(store.to_dask()[70:80, 2:4].sum(axis=0).compute(), rows[70:80, 2:4].sum(axis=0))


def test_blocks_lie_on_one_grid(tmp_path):
    rows = random_rows(100, 8)
    seen = {}
    for chunk_rows in (7, 64):
        store = write_store(tmp_path / f"{chunk_rows}.zarr", rows, chunk_rows=chunk_rows)
        blocks = [(block.start, block.stop, block.gradients.copy()) for block in read_blocks(store, 32, 100, 32)]
        seen[chunk_rows] = [(start, stop) for start, stop, _ in blocks]
        assert_array_equal(np.concatenate([part for *_, part in blocks]), rows[32:])
    assert seen[7] == seen[64] == [(32, 64), (64, 96), (96, 100)]


def test_readers_go_on_seeing_what_they_opened(tmp_path):
    rows = random_rows(100, 8)
    reader = write_store(tmp_path / "s.zarr", rows[:70])
    lazy = reader.to_dask()
    with GradientStore.open(reader.path, "a") as store:
        store.append(rows[70:], loss=np.zeros(30))
    assert reader.shape == (70, 8)
    assert_array_equal(reader.rows(), rows[:70])
    assert_array_equal(lazy.compute(), rows[:70])
    assert pickle.loads(pickle.dumps(reader)).n == 70
    reader.reload()
    assert_array_equal(reader.rows(), rows)


def test_uncommitted_rows_are_invisible(tmp_path):
    """Data in place without a commit record is what a crash between the two leaves."""
    rows = random_rows(100, 8)
    store = write_store(tmp_path / "s.zarr", rows)
    commits = zarr.open_array(str(store.path / "commits"), mode="r+")
    commits[1] = 0
    assert GradientStore.open(store.path).n == 64
    with GradientStore.open(store.path, "a") as again:
        again.append(rows[64:], loss=np.zeros(36))
    assert_array_equal(GradientStore.open(store.path).rows(), rows)


def test_rows_never_written_read_as_nan_for_plain_zarr(tmp_path):
    store = GradientStore.create(tmp_path / "s.zarr", whole_mask(4), planned_rows=10)
    assert store.n == 0
    assert np.isnan(zarr.open_group(str(store.path), mode="r")["gradients"][...]).all()


@pytest.mark.parametrize("name", ["gradients/c.0.0", "loss/c.0", "row_scale/c.0", "grad_norm/c.0"])
def test_a_flipped_bit_is_found(tmp_path, name):
    store = write_store(tmp_path / "s.zarr", random_rows(100, 8), dtype="float16")
    path = store.path / name
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert [(start, stop) for start, stop, _ in GradientStore.open(store.path).verify()] == [(0, 64)]


@pytest.mark.parametrize("name", ["commits/c.0", "mask/00000/weight/c.0"])
def test_a_flipped_bit_in_what_no_record_covers_is_found(tmp_path, name):
    store = write_store(tmp_path / "s.zarr", random_rows(100, 8))
    path = store.path / name
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamagedError):
        _ = GradientStore.open(store.path).mask


def test_a_missing_or_short_chunk_raises(tmp_path):
    store = write_store(tmp_path / "s.zarr", random_rows(100, 8))
    path = store.path / "gradients" / "c.1.0"
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(StoreDamagedError, match=r"expected 2048 bytes .* received 2040"):
        GradientStore.open(store.path).rows()
    path.unlink()
    with pytest.raises(StoreDamagedError, match="received no file"):
        GradientStore.open(store.path).rows()
    assert_array_equal(GradientStore.open(store.path).rows(0, 64), random_rows(100, 8)[:64])
    assert len(GradientStore.open(store.path).verify()) == 1


def test_a_damaged_last_chunk_is_not_appended_to(tmp_path):
    store = write_store(tmp_path / "s.zarr", random_rows(100, 8))
    path = store.path / "gradients" / "c.1.0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="rows 64-100"):
        GradientStore.open(store.path, "a").append(random_rows(1, 8), loss=[0.0])


def test_two_writers_one_is_refused(tmp_path):
    rows = random_rows(100, 8)
    first = GradientStore.open(write_store(tmp_path / "s.zarr", rows[:50]).path, "a")
    second = GradientStore.open(first.path, "a")
    first.append(rows[50:60], loss=np.zeros(10))
    with pytest.raises(StoreBusyError, match=r"received one: process "):
        second.append(rows[60:], loss=np.zeros(40))
    first.close()
    second.append(rows[60:], loss=np.zeros(40))
    second.close()
    assert_array_equal(GradientStore.open(first.path).rows(), rows)


def test_dropped_rows_are_marked_and_grow_with_the_store(tmp_path):
    path = write_store(tmp_path / "s.zarr", random_rows(100, 8)).path
    with GradientStore.open(path, "a") as store:
        before = store.rows_digest()
        store.drop([3, 99, 3])
        assert store.rows_digest() != before
        store.append(random_rows(150, 8), loss=np.zeros(150))
    store = GradientStore.open(path)
    assert np.flatnonzero(store.small("dropped")).tolist() == [3, 99]
    assert store.verify() == []
    with pytest.raises(InputError, match="row numbers"):
        GradientStore.open(path, "a").drop([250])


def test_stray_partial_files_are_removed(tmp_path):
    path = write_store(tmp_path / "s.zarr", random_rows(10, 8)).path
    stray = path / "gradients" / ".c.3.0.abc.partial"
    stray.write_bytes(b"x")
    with GradientStore.open(path, "a") as store:
        store.append(random_rows(1, 8), loss=[0.0])
    assert not stray.exists()


def test_bad_input(tmp_path):
    rows = random_rows(10, 8)
    with pytest.raises(StoreNotFoundError, match="no such path"):
        GradientStore.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        GradientStore.open(tmp_path)
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w", zarr_format=3)
    with pytest.raises(StoreFormatError, match="another Zarr group"):
        GradientStore.open(tmp_path / "other.zarr")
    store = write_store(tmp_path / "s.zarr", rows)
    with pytest.raises(StoreExistsError, match="expected nothing at"):
        GradientStore.create(store.path, whole_mask(8))
    with pytest.raises(InputError, match="opened to append"):
        store.append(rows, loss=np.zeros(10))
    with pytest.raises(InputError, match=r"shape \(b, 8\)"):
        GradientStore.open(store.path, "a").append(rows[:, :3], loss=np.zeros(10))
    with pytest.raises(InputError, match=r"expected loss of shape \(10,\)"):
        GradientStore.open(store.path, "a").append(rows, loss=np.zeros(9))
    with pytest.raises(InputError, match="per-row values for nothing"):
        GradientStore.open(store.path, "a").append(rows, loss=np.zeros(10), ids=list("abcdefghij"))
    with pytest.raises(InputError, match="start <= stop <= 10"):
        store.rows(5, 11)
    with pytest.raises(InputError, match="fsspec URL"):
        GradientStore.open("gopher://bucket/s.zarr")
    group = zarr.open_group(str(store.path), mode="r+")
    attrs = dict(group.attrs["ooc_influence"])
    group.attrs["ooc_influence"] = attrs | {"format": 4}
    with pytest.raises(StoreFormatError, match="upgrade"):
        GradientStore.open(store.path)
    group.attrs["ooc_influence"] = attrs | {"layout": attrs["layout"] | {"k": -3}}
    with pytest.raises(StoreFormatError, match="edited or damaged"):
        GradientStore.open(store.path)


def test_committing_does_not_read_old_records_again(tmp_path, monkeypatch):
    store = GradientStore.create(
        tmp_path / "s.zarr", whole_mask(4), dtype="float32", storage=Storage(chunk_rows=1, group_chunks=1)
    )
    rows = random_rows(40, 4)
    store.append(rows[:20], loss=np.zeros(20))
    opened = []
    original = LocalArrayStore.get

    async def counted(self, key, *rest, **named):
        if key.startswith("commits/c."):
            opened.append(key)
        return await original(self, key, *rest, **named)

    monkeypatch.setattr(LocalArrayStore, "get", counted)
    store.append(rows[20:], loss=np.zeros(20))
    store.flush()
    assert store.n == 40
    assert_array_equal(store.rows(), rows)
    assert len(opened) <= 20  # at most the file being written
    store.close()
    assert GradientStore.open(store.path).n == 40


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = write_store("~/s.zarr", random_rows(8, 4))
    assert made.path == tmp_path / "s.zarr"
    assert GradientStore.open("file://~/s.zarr").n == 8
    with pytest.raises(InputError, match="whose home folder is unknown"):
        GradientStore.open("~nobody-of-this-name/s.zarr")
    monkeypatch.chdir(tmp_path)
    assert write_store("./~", random_rows(8, 4)).path == tmp_path / "~"

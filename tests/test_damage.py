"""Damage of every kind of file is found, named by rows, and mended by running the extraction again."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import random_rows, whole_mask
from numpy.testing import assert_array_equal
from test_faults import contents, planned

import ooc_influence.store
from ooc_influence import (
    Dropout,
    GradientStore,
    Storage,
    extract_gradients,
    fit_fisher,
    self_influence,
    top_influential,
)
from ooc_influence.curvature import resolve_curvature
from ooc_influence.errors import OocInfluenceError, StoreBusyError, StoreDamagedError, StoreFormatError
from ooc_influence.store import Damage

ROWS = random_rows(50, 6)
STORAGE = Storage(chunk_rows=4, group_chunks=2)
NAMES = [f"row {number}" for number in range(50)]


def fill(path, first=0):
    with GradientStore.open(path, "a") as store:
        while store.writer().next_row < 50:
            start = store.writer().next_row
            stop = 50 if store.writer().rows_left is None else start + store.writer().rows_left
            part = slice(start, stop)
            store.append(ROWS[part], loss=np.arange(50)[part], ids=NAMES[part], columns={"label": np.arange(50)[part]})
    return GradientStore.open(path)


@pytest.fixture(scope="module", params=[None, "zstd"])
def original(tmp_path_factory, request):
    storage = Storage(4, 2, request.param)
    path = tmp_path_factory.mktemp("damage") / "s.zarr"
    GradientStore.create(
        path, whole_mask(6), storage=storage, ids="str", columns={"label": "int64"}, dtype="int8",
        column_scale=np.arange(1, 7),
    ).close()  # fmt: skip
    made = fill(path)
    fit_fisher(made)
    with GradientStore.open(made.path, "a") as again:
        again.drop([9])
    fit_fisher(GradientStore.open(made.path), name="second")
    return path


PLAIN = pytest.mark.parametrize("original", [None], indirect=True)  # where a codec makes no difference


@pytest.fixture
def store(original, tmp_path):
    """A copy, to be harmed."""
    return GradientStore.open(shutil.copytree(original, tmp_path / "s.zarr"))


def flip(path, where=0.4):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def swap(path):
    other = path.with_name(path.name.replace("c.3", "c.4"))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


def delete(path):
    path.unlink()


ROW_FILES = ["gradients/c.3.0", "row_scale/c.3", "loss/c.3", "grad_norm/c.3", "example_id/c.3", "columns/label/c.3"]


@pytest.mark.parametrize(
    ("name", "harm"),
    [(ROW_FILES[0], harm) for harm in (flip, cut, delete, swap)]
    + list(zip(ROW_FILES[1:], [flip, cut, delete, swap, flip], strict=True)),
)
def test_damaged_rows_are_found_given_up_and_written_again(store, name, harm):
    expected, before = contents(store.path), store.rows_digest()
    if name.startswith("gradients"):
        where = {flip: 0.4, swap: 0.4}.get(harm, 0)
        flip(store.path / name, where) if harm is flip else harm(store.path / name)
        touched = {12, 16} if harm is swap else {12}
    else:
        harm(store.path / name)
        touched = {24, 28, 32, 36} if harm is swap else {24, 28}
    found = GradientStore.open(store.path).verify(workers=2)
    rows = {part.start for part in found}
    assert rows, found
    assert rows <= touched
    assert harm is flip or rows == touched
    assert GradientStore.open(store.path, "a").verify(repair=True, workers=1) == found
    after = GradientStore.open(store.path)
    assert after.verify() == []
    assert after.committed == 50 - sum(part.stop - part.start for part in found)
    assert after.n == min(rows)
    again = fill(store.path)
    assert (again.n, again.verify(), again.rows_digest()) == (50, [], before)
    assert contents(store.path) == expected
    assert top_influential(again, again, curvature="second").proponents.rows.shape == (50, 10)


@pytest.mark.parametrize("harm", [flip, cut, delete])
def test_damaged_commit_records(store, harm):
    expected = contents(store.path)
    harm(store.path / "commits" / "c.3")
    with pytest.raises(StoreDamagedError, match="verify"):
        GradientStore.open(store.path)
    found = GradientStore.open(store.path, "a", damaged=True).verify(repair=True)
    assert [part[:2] for part in found] == [(24, 32)]
    assert GradientStore.open(store.path).committed == 42
    fill(store.path)
    assert contents(store.path) == expected


@pytest.mark.parametrize(
    ("name", "harm"),
    [("mask/00000/rows/c.0", flip), ("mask/00000/weight/c.0", cut), ("column_scale/c.0", delete),
     ("dropped/c.1", flip), ("dropped/c.1", delete), ("curvature/default/sum-00000/c.0.0.0", cut),
     ("curvature/second/eigenvalues/c.0", flip), ("curvature/second/eigenvalues/c.0", delete)],
)  # fmt: skip
def test_damage_that_is_not_of_rows(store, name, harm):
    harm(store.path / name)
    found = GradientStore.open(store.path, damaged=True).verify()
    assert len(found) == 1, found
    assert found[0].start is None
    part = name.split("/")[1] if name.startswith("curvature") else name.split("/")[0]
    assert part in found[0].reason
    assert GradientStore.open(store.path, "a", damaged=True).verify(repair=True) == found  # there is nothing to give up
    assert GradientStore.open(store.path, damaged=True).committed == 50


@PLAIN
@pytest.mark.parametrize(
    ("name", "harm"), [("eigenvectors/c.0.0", flip), ("eigenvectors/c.0.0", delete), ("eigenvectors/zarr.json", delete)]
)
def test_damaged_eigenvectors_are_named_by_whatever_reads_them(store, name, harm):
    harm(store.path / "curvature" / "second" / name)
    for call in (
        lambda train, own: self_influence(train, curvature=own),
        lambda train, own: top_influential(train, train, 3, curvature=own),
    ):
        with pytest.raises((StoreDamagedError, StoreFormatError), match="eigenvectors"):
            call(GradientStore.open(store.path), "second")


@PLAIN
def test_every_bit_of_the_metadata_is_noticed_or_harmless(store):
    """A flipped bit in any zarr.json never yields other rows: an error of ours, or the same store."""
    expected = store.rows()
    outcomes = set()
    for path in sorted(store.path.rglob("zarr.json")):
        whole = path.read_bytes()
        if "curvature" in path.parts:
            continue
        for at in range(0, len(whole), 11 if len(whole) < 3000 else 29):
            data = bytearray(whole)
            data[at] ^= 1 << (at % 7)
            path.write_bytes(data)
            try:
                opened = GradientStore.open(store.path)
                assert opened.shape == store.shape
                assert_array_equal(opened.rows(), expected)
                assert np.flatnonzero(opened.dropped).tolist() == [9]
                assert opened.has_dropped
                assert opened.mask.k == 6
                outcomes.add("harmless")
            except OocInfluenceError:
                outcomes.add("noticed")
            path.write_bytes(whole)
    assert outcomes == {"harmless", "noticed"}


def edit(path, **changes):
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | changes))


PICKLE = [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}]


@PLAIN
@pytest.mark.parametrize("change", [{"codecs": PICKLE}, {"data_type": {"name": "object"}}])
@pytest.mark.parametrize("name", ["gradients", "mask/00000/rows", "column_scale", "curvature/second/sum-00000"])
def test_metadata_that_ask_for_other_code_are_refused(store, name, change):
    edit(store.path / name / "zarr.json", **change)

    def use():
        opened = GradientStore.open(store.path)
        _ = opened.mask, opened.rows(), resolve_curvature(opened, "second").fisher()

    with pytest.raises(OocInfluenceError, match="known codecs and data types"):
        use()
    assert ["known codecs" in part.reason for part in look(store.path)] == [True]


def look(path):
    """What verify finds; an error on opening as if it were damage."""
    try:
        return GradientStore.open(path, damaged=True).verify(workers=1)
    except StoreFormatError as error:
        return [Damage(None, None, str(error))]


@PLAIN
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_consolidated_metadata_are_passed_over(store):
    """Copies of the metadata, as Zarr can make them, are old after an append and could ask for anything."""
    zarr.consolidate_metadata(str(store.path))
    metadata = json.loads((store.path / "zarr.json").read_text())
    copies = metadata["consolidated_metadata"]["metadata"]
    copies["gradients"]["shape"][0] = 3
    copies["mask/00000/rows"]["codecs"] = PICKLE
    (store.path / "zarr.json").write_text(json.dumps(metadata))
    opened = GradientStore.open(store.path)
    assert_array_equal(opened.rows(), store.rows())
    assert (opened.mask.k, opened.verify()) == (6, [])


@PLAIN
@pytest.mark.parametrize("shape", [[10**12], [10**18], [-5]])
@pytest.mark.parametrize("name", ["commits", "mask/00000/weight", "column_scale"])
def test_shapes_edited_by_hand_take_no_memory(store, name, shape):
    edit(store.path / name / "zarr.json", shape=shape)
    with pytest.raises(OocInfluenceError, match=r"zarr\.json|files of \d+ bytes|metadata"):
        _ = [GradientStore.open(store.path).mask, GradientStore.open(store.path).rows()]


def test_nothing_in_a_store_can_be_a_pickle():
    """The room that reads stores imports nothing that turns bytes into code."""
    files = sorted(Path(ooc_influence.store.__file__).parent.glob("*.py"))
    assert len(files) > 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            named = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            named |= {node.id} if isinstance(node, ast.Name) else set()
            named |= {node.arg} if isinstance(node, ast.keyword) else set()
            assert not named & {"pickle", "cloudpickle", "marshal", "dill", "eval", "exec", "allow_pickle"}, file


@PLAIN
def test_attributes_edited_by_hand(store):
    from ooc_influence.store.layout import attributes_digest

    path = store.path / "zarr.json"
    written = path.read_text()
    for change in (
        {"k": -3}, {"k": 10**30}, {"k": 7}, {"chunk_rows": 0}, {"columns": {"../../x": "str"}},
        {"columns": {"label": "object"}}, {"codec": "pickle"}, {"dtype": "complex128"}, {"planned_rows": -1},
        {"k": True}, {"group_chunks": 3}, {"column_scale": 1}, {"nonsense": 1},
        {"block": 0}, {"block": 4}, {"block": None}, {"dtype": "float32"},
    ):  # fmt: skip
        for digest in (True, False):
            metadata = json.loads(written)
            attrs = metadata["attributes"]["ooc_influence"]
            attrs["layout"] |= change
            if digest:  # somebody who knows what he does
                attrs["digest"] = attributes_digest(attrs)
            path.write_text(json.dumps(metadata))
            with pytest.raises(StoreFormatError):
                GradientStore.open(store.path)
    path.write_text(written)
    GradientStore.open(store.path)


def test_numbers_that_are_not_finite_are_found(tmp_path):
    """Written by other hands, with a record that fits."""
    from ooc_influence.store.commits import Slot

    bad_values = {"float32": np.nan, "float16": np.inf, "bfloat16": 0x7F80, "int8": -128, "int8-linear": -128,
                  "int4": 0x88}  # fmt: skip
    for dtype, bad in bad_values.items():
        path = tmp_path / dtype
        with GradientStore.create(path, whole_mask(6), dtype=dtype, storage=STORAGE) as store:
            store.append(ROWS[:10], loss=np.zeros(10))
            store.flush()
            slot = Slot.empty(store.layout)
            slot.gradients[:] = bad
            small = {name: np.zeros(4, np.float32) for name in store.layout.row_arrays}
            store.writer().append_raw(np.array(store.raw_rows(0, 2)), {n: v[:2] for n, v in small.items()})
            store.writer().append_raw(slot.gradients[:3], {n: v[:3] for n, v in small.items()})
        found = GradientStore.open(path).verify()
        assert [(part.start, part.stop, part.reason) for part in found] == [(12, 15, "3 rows with NaN or Inf")]


def test_repeated_ids_are_found(tmp_path, monkeypatch):
    for at_once in (100, 3):
        monkeypatch.setattr("ooc_influence.store.reader.IDS_AT_ONCE", at_once)
        path = tmp_path / str(at_once)
        with GradientStore.create(path, whole_mask(6), storage=STORAGE, ids="str") as store:
            for start in (0, 10, 20):
                store.append(ROWS[:10], loss=np.zeros(10), ids=[f"{start}-{row}" for row in range(10)])
            store.append(ROWS[:1], loss=[0.0], ids=["10-4"])
        found = GradientStore.open(path).verify()
        assert [part.reason for part in found] == ["id '10-4' is that of rows 14 and 30"]


def test_a_planned_store_is_repaired_in_its_ranges_only(tmp_path):
    path = planned(tmp_path / "s.zarr", [(0, 24), (24, 48)])
    expected = contents(path)
    flip(path / "gradients" / "c.3.0")
    delete(path / "gradients" / "c.12.0")
    assert [part[:2] for part in GradientStore.open(path).verify()] == [(9, 12), (36, 39)]
    with GradientStore.open(path, "a") as busy:
        busy.writer(24, 48)
        with pytest.raises(StoreBusyError):
            GradientStore.open(path, "a").verify(repair=True)
    GradientStore.open(path, "a").verify(repair=True)
    rows = random_rows(48, 4)
    for start, stop, hole in ((0, 24, 9), (24, 48, 36)):
        with GradientStore.open(path, "a") as store:
            writer = store.writer(start, stop)
            assert (writer.next_row, writer.rows_left) == (hole, 3)
            store.append(rows[hole : hole + 3], loss=np.zeros(3))
    assert contents(path) == expected


def test_extraction_refills_what_a_repair_gave_up(tmp_path):
    """Several gaps, inside batches and across them; bit for bit, and only the batches that hold them are computed."""
    from models import Mlp, batches, data, loss, make

    calls = []

    def counted(model, batch):
        calls.append(len(batch[0]))
        return loss(model, batch)

    def extract(path):
        source = batches(*data(Mlp, 100), 7)
        return extract_gradients(make(Mlp), counted, source, path, compressor=Dropout(k=60), storage=Storage(4, 3))

    whole = extract(tmp_path / "s.zarr")
    expected = contents(whole.path)
    shutil.copytree(whole.path, tmp_path / "copy.zarr")
    for chunk in (2, 3, 9, 17):
        flip(whole.path / "gradients" / f"c.{chunk}.0")
    found = GradientStore.open(whole.path, "a").verify(repair=True)
    assert [part[:2] for part in found] == [(8, 12), (12, 16), (36, 40), (68, 72)]
    assert GradientStore.open(whole.path).committed == 84
    calls.clear()
    assert extract(whole.path).n == 100
    assert contents(whole.path) == expected
    assert len(calls) <= 2 + 2 + 2 + 1 + 2  # rows 8-16, 36-40, 68-72 and a look at the first batch

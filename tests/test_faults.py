"""Every write of a run fails once: what was committed stays, the next run completes the store bit for bit."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from conftest import random_rows, whole_mask, write_store
from numpy.testing import assert_array_equal

from ooc_influence import (
    Curvature,
    GradientStore,
    Storage,
    fit_fisher,
    influence_scores,
    self_influence,
    top_influential,
)
from ooc_influence.errors import (
    InputError,
    NonFiniteError,
    StaleCurvatureError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreWriteError,
)
from ooc_influence.store.local import LocalArrayStore

ROWS = random_rows(13, 4)
CUTS = (2, 7, 13)  # where the run flushes or closes: inside a chunk, inside a group, behind one
STORAGE = Storage(chunk_rows=3, group_chunks=2)


class CrashError(Exception):
    """Stands for the process's death: nothing is written any more."""


@pytest.fixture
def crash_at(monkeypatch):
    """Let every write from the given one on fail; return how many were tried."""
    put = LocalArrayStore._put
    state = {"limit": None, "count": 0}

    def counted(self, path, value):
        state["count"] += 1
        if state["limit"] is not None and state["count"] > state["limit"]:
            raise CrashError
        put(self, path, value)

    monkeypatch.setattr(LocalArrayStore, "_put", counted)

    def arm(limit):
        state.update(limit=limit, count=0)
        return state

    return arm


def fill(path):
    """Append what is missing of ROWS, closing at every other cut."""
    store = GradientStore.open(path, "a")
    try:
        for number, stop in enumerate(CUTS):
            if store.n < stop:
                part = slice(store.n, stop)
                labels = [f"r{row}" for row in range(part.start, stop)]
                store.append(ROWS[part], loss=np.arange(len(ROWS))[part], columns={"name": labels})
                store.flush() if number % 2 else store.close()
        store.writer()  # with nothing left to append, closing still cuts the arrays that a crash left long
    finally:
        store.close()


def create(path):
    GradientStore.create(path, whole_mask(4), dtype="float32", storage=STORAGE, columns={"name": "str"}).close()


def contents(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file != path / "zarr.json" and not file.name.startswith(".claim")
    }


def test_every_write_fails_once(tmp_path, crash_at):
    create(tmp_path / "whole.zarr")
    state = crash_at(None)
    fill(tmp_path / "whole.zarr")
    writes = state["count"]
    assert writes > 60
    expected = contents(tmp_path / "whole.zarr")
    for limit in range(writes):
        crash_at(None)
        path = tmp_path / f"{limit}.zarr"
        create(path)
        crash_at(limit)
        with pytest.raises(CrashError):
            fill(path)
        crash_at(None)
        store = GradientStore.open(path)
        assert_array_equal(store.rows(), ROWS[: store.n])
        assert store.column("name").tolist() == [f"r{row}" for row in range(store.n)]
        assert store.verify() == []
        fill(path)
        assert contents(path) == expected, limit


def test_a_failed_writer_says_so_until_it_is_reopened(tmp_path, crash_at):
    create(tmp_path / "s.zarr")
    store = GradientStore.open(tmp_path / "s.zarr", "a")
    crash_at(0)
    store.append(ROWS[:2], loss=np.zeros(2), columns={"name": ["x"] * 2})
    with pytest.raises(CrashError):
        store.flush()
    crash_at(None)
    for again in (store.flush, lambda: store.append(ROWS[:1], loss=[0.0], columns={"name": ["x"]})):
        with pytest.raises(StoreWriteError, match="open it again"):
            again()
    store.close()
    fill(store.path)
    assert_array_equal(GradientStore.open(store.path).rows(), ROWS)


def planned(path, ranges, rows=48):
    """A planned store of groups of 6 rows, with the given ranges written."""
    GradientStore.create(path, whole_mask(4), dtype="float32", storage=STORAGE, planned_rows=rows).close()
    for start, stop in ranges:
        with GradientStore.open(path, "a") as store:
            store.writer(start, stop)
            store.append(random_rows(48, 4)[start:stop], loss=np.zeros(stop - start))
    return path


def test_a_planned_store_keeps_all_ranges(tmp_path):
    path = planned(tmp_path / "s.zarr", [(0, 12), (24, 48)])
    with GradientStore.open(path, "a") as store:
        assert (store.n, store.committed) == (12, 36)
        store.drop([3])
        with pytest.raises(InputError, match="whole groups of 6 of 48 rows"):
            store.append(ROWS, loss=np.zeros(len(ROWS)))
    assert GradientStore.open(path).committed == 36
    assert GradientStore.open(path).verify() == []
    (path / "gradients" / "c.13.0").unlink()
    assert [part[:2] for part in GradientStore.open(path).verify()] == [(39, 42)]


@pytest.mark.parametrize("bounds", [(0, 5), (3, 12), (0, 49), (-6, 6), (6, 6)])
def test_ranges_are_whole_groups(tmp_path, bounds):
    path = planned(tmp_path / "s.zarr", [])
    with pytest.raises(InputError, match="whole groups"):
        GradientStore.open(path, "a").writer(*bounds)


def test_overlapping_ranges_are_refused_and_rows_stay_inside(tmp_path):
    path = planned(tmp_path / "s.zarr", [])
    first, second, third = (GradientStore.open(path, "a") for _ in range(3))
    first.writer(0, 12)
    with pytest.raises(StoreBusyError, match=r"rows-0-12"):
        second.writer(6, 24)
    third.writer(12, 24)
    with pytest.raises(InputError, match="at most 12 more rows"):
        first.append(random_rows(13, 4), loss=np.zeros(13))
    for store in (first, third):
        store.close()
    second.writer(6, 24)
    second.close()


def test_a_claim_does_not_outlive_its_owner_in_a_forked_child(tmp_path):
    create(tmp_path / "s.zarr")
    store = GradientStore.open(tmp_path / "s.zarr", "a")
    store.writer()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        store.close()
        with GradientStore.open(tmp_path / "s.zarr", "a") as again:
            assert again.writer().next_row == 0
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["columns/name/c.0", "loss/c.0", "gradients/c.0.0"])
def test_a_missing_file_is_damage_not_zeros(tmp_path, name):
    create(tmp_path / "s.zarr")
    fill(tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / name).unlink()
    store = GradientStore.open(tmp_path / "s.zarr")
    with pytest.raises(StoreDamagedError, match="received no file"):
        store.rows() if name.startswith("g") else store.small(name.rpartition("/")[0])
    assert store.verify()


def test_missing_commit_records_are_damage_not_an_end(tmp_path):
    create(tmp_path / "s.zarr")
    fill(tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / "commits" / "c.1").unlink()
    with pytest.raises(StoreDamagedError, match="received no file"):
        GradientStore.open(tmp_path / "s.zarr", "a")


def test_rows_that_are_not_finite_are_refused(tmp_path):
    path = write_store(tmp_path / "s.zarr", random_rows(10, 4)).path
    rows = random_rows(3, 4)
    rows[1, 2] = np.inf
    with GradientStore.open(path, "a") as store:
        with pytest.raises(NonFiniteError, match=r"in rows 11:"):
            store.append(rows, loss=np.zeros(3))
        with pytest.raises(NonFiniteError, match=r"in rows 12:"):
            store.append(random_rows(3, 4), loss=[0, 0, np.nan])
        store.append(random_rows(3, 4) * 1e-25, loss=np.zeros(3))
    assert GradientStore.open(path).n == 13
    assert (GradientStore.open(path).small("grad_norm") > 0).all()
    fit_fisher(path)
    with GradientStore.open(path, "a") as store:
        store.append(random_rows(1, 4) * 1e25, loss=[0.0])
    with pytest.raises(NonFiniteError, match="overflow"), np.errstate(all="ignore"):
        fit_fisher(path)


def test_a_fit_replaces_nothing_but_a_curvature(tmp_path, pair):
    _, train = pair
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for place in (tmp_path / "mine", train.path, tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(StoreExistsError, match="a curvature or nothing"):
            fit_fisher(train, out=place)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    fit_fisher(train, out=tmp_path / "f.zarr")
    other = write_store(tmp_path / "other.zarr", random_rows(30, 40, 7))
    with pytest.raises(StoreExistsError, match="of another store"):
        fit_fisher(other, out=tmp_path / "f.zarr")


def test_a_fit_that_fails_keeps_the_old_one(pair, crash_at):
    _, train = pair
    before = fit_fisher(train).fisher()
    crash_at(3)
    with pytest.raises(CrashError):
        fit_fisher(train, refit=True)
    crash_at(None)
    assert_array_equal(Curvature.open(train.path / "curvature" / "default").fisher(), before)
    assert [path.name for path in (train.path / "curvature").iterdir() if path.is_dir()] == ["default"]


def test_fits_at_once_do_not_break_each_other(pair):
    query, train = pair
    errors = []

    def fit():
        try:
            for _ in range(3):
                fit_fisher(train, refit=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert np.isfinite(influence_scores(query, train).compute()).all()


def test_a_replaced_curvature_is_noticed(pair):
    query, train = pair
    curvature = fit_fisher(train)
    lazy = influence_scores(query, train)
    fit_fisher(train, refit=True)
    with pytest.raises(StaleCurvatureError, match="newer fit"):
        _ = Curvature.open(curvature.path).__reduce__()[0](*curvature.__reduce__()[1])
    with pytest.raises(StaleCurvatureError, match="newer fit"):
        lazy.compute()


def test_lazy_arrays_are_named_by_what_they_hold(pair):
    query, train = pair
    fit_fisher(train)
    first, names = influence_scores(query, train, damping=1.0), set()
    names |= {first.name, influence_scores(query, train, damping=1.0).name}
    assert len(names) == 1
    with GradientStore.open(train.path, "a") as store:
        store.drop([1])
    train = GradientStore.open(train.path)
    fit_fisher(train)
    assert influence_scores(query, train, damping=1.0).name not in names


def test_a_dropped_query_gets_no_rows(tmp_path, pair):
    query, train = pair
    fit_fisher(train)
    with GradientStore.open(query.path, "a") as store:
        store.drop(np.arange(7) == 2)
    query = GradientStore.open(query.path)
    top = top_influential(query, train, top=3)
    assert top.proponents.rows[2].tolist() == [-1, -1, -1]
    assert np.isnan(top.proponents.scores[2]).all()
    assert top.to_dict()["queries"][2]["proponents"] == []
    assert len(top.to_dict()["queries"][1]["opponents"]) == 3
    assert np.isnan(influence_scores(query, train).compute()[2]).all()


@pytest.mark.parametrize("rows", [[7], [-1], [1.5], np.zeros(6, bool), "x"])
def test_bad_rows_to_drop(pair, rows):
    with GradientStore.open(pair[0].path, "a") as store, pytest.raises(InputError, match="row numbers in"):
        store.drop(rows if not isinstance(rows, str) else np.array(["x"]))


def test_indexing_like_numpy(pair):
    query, _ = pair
    rows = query.rows()
    for key in (
        slice(None, None, -1),
        slice(5, 1, -2),
        slice(-3, None),
        (slice(1, 4), 2),
        (slice(0, 0),),
        -1,
        (3, 4),
        2,
    ):
        assert_array_equal(query[key], rows[key])
    assert_array_equal(np.stack(list(query)), rows)
    with pytest.raises(IndexError):
        query[7]


def test_relative_paths_survive_a_change_of_folder(tmp_path, pair, monkeypatch):
    query, train = pair
    fit_fisher(train)
    monkeypatch.chdir(tmp_path)
    lazy = influence_scores("query.zarr", "train.zarr")
    monkeypatch.chdir("/")
    assert_array_equal(lazy.compute(), influence_scores(query, train).compute())


def test_a_pickled_reader_keeps_its_rows_and_their_digest(tmp_path):
    import pickle

    reader = write_store(tmp_path / "s.zarr", random_rows(70, 4))
    data, digest = pickle.dumps(reader), reader.rows_digest()
    with GradientStore.open(reader.path, "a") as store:
        store.append(random_rows(3, 4), loss=np.zeros(3))
    again = pickle.loads(data)
    assert (again.n, again.rows_digest(), again.verify()) == (70, digest, [])
    assert len(self_influence(again, curvature=fit_fisher(again, out=tmp_path / "f.zarr"))) == 70


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"planned_rows": 0}, "planned_rows >= 1"),
        ({"columns": {"../x": "str"}}, "column name"),
        ({"columns": {"zarr.json": "str"}}, "column name"),
        ({"columns": {"": "str"}}, "column name"),
    ],
)
def test_bad_layouts_leave_nothing(tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        GradientStore.create(tmp_path / "s.zarr", whole_mask(4), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (["a", "\udc80"], "UTF-8 can hold"),
        ([1, 2], "dtype str; received int64"),
        ([None, "b"], "numbers, booleans or strings"),
    ],
)
def test_bad_columns_lose_nothing(tmp_path, values, match):
    create(tmp_path / "s.zarr")
    with GradientStore.open(tmp_path / "s.zarr", "a") as store:
        store.append(ROWS[:2], loss=np.zeros(2), columns={"name": ["x", "y"]})
        with pytest.raises(InputError, match=match):
            store.append(ROWS[:2], loss=np.zeros(2), columns={"name": values})
    assert GradientStore.open(tmp_path / "s.zarr").n == 2


def test_whole_numbers_too_large_for_int64(tmp_path):
    store = GradientStore.create(tmp_path / "s.zarr", whole_mask(4), ids="int64")
    with pytest.raises(InputError, match="2\\^63"):
        store.append(ROWS[:1], loss=[0.0], ids=[2**63 + 5])

"""The basis of another store that a store refers to: read where it is needed, and only where one may look."""

from __future__ import annotations

import json
import shutil

import fsspec
import pytest
from conftest import random_rows
from fsspec.implementations.memory import MemoryFileSystem
from numpy.testing import assert_array_equal
from test_second_pass import LOSS, ROWS, K, R, make_wide

from ooc_influence import GradientStore, fit_curvature, fit_fisher, influence_scores, module_influence, reduce_store
from ooc_influence.curvature.costs import fit_size
from ooc_influence.curvature.rows import choose_rows
from ooc_influence.errors import InputError, OocInfluenceError, StoreFormatError, StoreNotFoundError, StoreReadError
from ooc_influence.store import paths, reduction
from ooc_influence.store.layout import attributes_digest


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """A train store, and a query store that refers to its basis."""
    monkeypatch.setattr(reduction, "COPIED_BYTES", 100)
    train = reduce_store(make_wide(tmp_path / "wide", ROWS, LOSS), tmp_path / "t", R, dtype="float32")
    query = reduce_store(make_wide(tmp_path / "q", random_rows(9, K, 1), LOSS[:9]), tmp_path / "ql", like=train.path)
    assert not (query.path / "basis").exists()
    return train.path, query.path


def refer(home, **changes):
    """Change what a store says of its reduction, as whoever made it could."""
    file = home / "zarr.json"
    text = json.loads(file.read_text())
    attrs = text["attributes"]["ooc_influence"]
    attrs["reduction"] |= changes
    attrs["digest"] = attributes_digest(attrs)
    file.write_text(json.dumps(text))
    return GradientStore.open(home)


ASKED = []


class Requests(MemoryFileSystem):
    """A network that notes who asks for something."""

    protocol = "evilnet"
    store, pseudo_dirs = {}, [""]

    def __getattribute__(self, name):
        if name in ("info", "ls", "cat_file", "_open", "isfile", "exists", "pipe_file"):
            ASKED.append(name)
        return super().__getattribute__(name)


@pytest.fixture
def network():
    fsspec.register_implementation("evilnet", Requests, clobber=True)
    ASKED.clear()
    return ASKED


def test_the_basis_is_not_read_to_ask_whether_there_is_one(stores, monkeypatch):
    monkeypatch.setattr("ooc_influence.store.view.load_reduction", lambda *given: 1 / 0)
    train, query = (GradientStore.open(path) for path in stores)
    assert train.is_reduced
    fit_fisher(train)
    fit_curvature(train, name="c")
    assert fit_size(choose_rows(train)).modules == ()
    with pytest.raises(InputError, match="blocks='module'"):
        fit_fisher(train, blocks="module", name="m")
    influence_scores(query, train).compute()
    with pytest.raises(OocInfluenceError):
        module_influence(query, train)
    assert train.basis_path == str(train.path)
    assert query.basis_path == str(train.path)


def test_a_foreign_store_makes_no_requests(stores, network):
    query = refer(stores[1], path="evilnet://collector/who-are-you")
    fit_fisher(query)
    with pytest.raises(InputError, match=r"received .*ql, which refers to evilnet://collector/who-are-you: if you"):
        _ = query.reduction
    with pytest.raises(OocInfluenceError):
        reduce_store(make_wide(stores[1].parent / "w", ROWS, LOSS), stores[1].parent / "o", like=query)
    assert query.verify() == []
    assert network == []


def test_what_its_user_has_opened_is_followed(stores, network, monkeypatch):
    monkeypatch.setattr(paths, "_opened", set())
    basis = GradientStore.open(stores[0]).reduction.vectors
    url = "memory://somewhere/train"
    fsspec.filesystem("memory").put(str(stores[0]) + "/", "/somewhere/train/", recursive=True)
    query = refer(stores[1], path=url)
    with pytest.raises(InputError, match="open that store first"):
        _ = query.reduction
    GradientStore.open(url)
    assert_array_equal(query.reduction.vectors, basis)


def test_where_a_store_may_refer_to(network):
    for home, path, follows in [
        ("memory://bucket/q", "memory://bucket/t", True),
        ("memory://bucket/q", "memory://other/t", False),
        ("memory://bucket/q", "/etc", False),
        ("memory://bucket/q", "evilnet://bucket/t", False),
        ("/data/q", "/data/t", True),
        ("/data/q", "file:///data/t", True),
        ("/data/q", "http://x/t", False),
        ("/data/q", 7, False),
        ("/data/q", None, False),
        ("/data/q", "simplecache::evilnet://x/t", False),
    ]:
        if follows:
            assert str(paths.parse_reference(path, paths.parse_path(home))) in (path, path.removeprefix("file://"))
        else:
            with pytest.raises(InputError, match="refers to"):
                paths.parse_reference(path, paths.parse_path(home))
        assert network == []


def test_a_basis_that_is_not_there(stores):
    shutil.rmtree(stores[0] / "basis")
    with pytest.raises(StoreNotFoundError, match="expected the basis of"):
        _ = GradientStore.open(stores[1]).reduction
    shutil.rmtree(stores[0])
    with pytest.raises(StoreNotFoundError, match="expected the basis of"):
        _ = GradientStore.open(stores[1]).reduction
    stores[0].write_text("a file")
    with pytest.raises((StoreNotFoundError, StoreReadError), match="the basis of"):
        _ = GradientStore.open(stores[1]).reduction


@pytest.mark.parametrize("changes", [{"seed": "x", "name": "gaussian"}, {"name": "sjlt"}, {"name": "what"}])
def test_reductions_that_are_none(stores, changes):
    store = refer(stores[1], **changes)
    with pytest.raises(StoreFormatError):
        _ = store.reduction


@pytest.mark.parametrize("changes", [{"name": None}, {"digest": 7}])
def test_facts_that_are_none(stores, changes):
    with pytest.raises(StoreFormatError):
        refer(stores[1], **changes)

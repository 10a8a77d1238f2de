"""Lists of dampings, units, averaged queries, groups, modules, several checkpoints, devices: against the oracle."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from conftest import random_rows, roomy, whole_mask, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import (
    GradientStore,
    OocInfluenceWarning,
    Storage,
    fit_fisher,
    group_influence,
    influence_scores,
    module_influence,
    self_influence,
    top_influential,
)
from ooc_influence.errors import (
    InputError,
    MemoryBudgetError,
    MismatchError,
    SingularFisherError,
    StoreBusyError,
    StoreExistsError,
)
from ooc_influence.influence.tiles import ScoreParts
from ooc_influence.store import GaussianReduction, LayerShape, Mask, ModuleMask

pytestmark = pytest.mark.filterwarnings("ignore:the rows of .* are taken for the same")  # they have no ids
K, N, Q = 40, 500, 7
DAMPINGS = [0.03, 0.1, 2.0]


def close(found, expected, tolerance=1e-5):
    assert np.isfinite(expected).any()
    assert_allclose(found, expected, rtol=0, atol=tolerance * np.nanmax(np.abs(expected)))


def check_top(rows, expected, top):
    """The rows are the first of a sort by score, but for ties to rounding."""
    assert rows.shape[-1] == top
    ordered = -np.sort(-expected, axis=-1)[..., :top]
    close(np.take_along_axis(expected, rows, -1), ordered, 1e-6)
    assert all(len(set(own)) == top for own in rows.reshape(-1, top).tolist())


def fitted(folder, name, seed=0, **options):
    train = write_store(folder / f"{name}.zarr", random_rows(N, K, seed), **options)
    fit_fisher(train)
    return train


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return write_store(folder / "query.zarr", random_rows(Q, K, seed=1)), fitted(folder, "train")


def preconditioned(train, factor=0.1):
    """(F + λI)⁻¹, dense."""
    matrix = oracle.fisher(train.rows())
    return np.linalg.inv(matrix + oracle.damping(matrix, factor) * np.eye(K))


def expected_scores(query, train, factor=0.1, normalize=None, inverse=None):
    q, g = query.rows().astype(np.float64), train.rows().astype(np.float64)
    inverse = preconditioned(train, factor) if inverse is None else inverse
    scores = q @ inverse @ g.T
    if normalize is not None:
        scores /= np.sqrt(np.einsum("ij,jk,ik->i", g, inverse, g))
    if normalize == "cosine":
        scores /= np.sqrt(np.einsum("ij,jk,ik->i", q, inverse, q))[:, None]
    return scores


@pytest.mark.parametrize("normalize", [None, "train", "cosine"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_many_dampings_and_units(tmp_path, fit, normalize, device):
    query, train = fit
    options = {"normalize": normalize, "damping": DAMPINGS, "device": device, "memory": roomy()}
    expected = np.stack([expected_scores(query, train, factor, normalize) for factor in DAMPINGS])
    lazy = influence_scores(query, train, **options)
    assert lazy.shape == (3, Q, N)
    close(lazy.compute(), expected)
    written = influence_scores(query, train, out=tmp_path / "s.zarr", **options)
    close(written[...], lazy.compute(), 1e-6)
    assert written.attrs["dims"] == ["damping", "query", "train"]
    assert_allclose(written.attrs["damping"], [oracle.damping(oracle.fisher(train.rows()), f) for f in DAMPINGS], 1e-6)
    top = top_influential(query, train, top=6, **options)
    check_top(top.proponents.rows, expected, 6)
    check_top(top.opponents.rows, -expected, 6)
    close(top.opponents.scores, np.sort(expected, axis=2)[..., :6])
    one = top_influential(query, train, top=6, **options | {"damping": DAMPINGS[1]})
    assert_array_equal(one.proponents.rows, top.at(1).proponents.rows)
    assert json.loads(json.dumps(top.to_dict()))["by_damping"][1]["damping"] == one.damping
    if normalize == "cosine":
        assert np.abs(lazy.compute()).max() <= 1 + 1e-6


@pytest.mark.parametrize("device", [None, "cpu"])
def test_self_influence_of_many_dampings(fit, device):
    _, train = fit
    found = self_influence(train, damping=DAMPINGS, device=device, memory=roomy())
    assert found.shape == (3, N)
    for own, factor in zip(found, DAMPINGS, strict=True):
        value = oracle.damping(oracle.fisher(train.rows()), factor)
        close(own, oracle.self_influence(train.rows(), value))
        assert_allclose(self_influence(train, damping=factor, device=device, memory=roomy()), own, rtol=1e-5)
    absolute = self_influence(train, damping=[0.5], damping_mode="absolute", memory=roomy())
    close(absolute[0], oracle.self_influence(train.rows(), 0.5))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_plain_dot_products(fit, device):
    query, train = fit
    options = {"curvature": False, "device": device, "memory": roomy()}
    close(influence_scores(query, train, **options).compute(), query.rows() @ train.rows().T, 1e-6)
    cosine = influence_scores(query, train, normalize="cosine", **options).compute()
    close(cosine, expected_scores(query, train, normalize="cosine", inverse=np.eye(K)), 1e-6)
    top = top_influential(query, train, top=3, **options)
    check_top(top.proponents.rows, query.rows() @ train.rows().T, 3)
    assert np.isnan(top.outside_share).all()
    assert top.to_dict()["queries"][0]["outside_share"] is None
    close(self_influence(train, **options), np.square(train.rows()).sum(1), 1e-6)
    with pytest.raises(InputError, match="no damping without a curvature"):
        influence_scores(query, train, curvature=False, damping=0.1)


def test_rows_without_gradient_score_zero(tmp_path):
    rows = random_rows(60, K)
    rows[[3, 50]] = 0
    train, query = write_store(tmp_path / "t.zarr", rows), write_store(tmp_path / "q.zarr", rows[:5])
    fit_fisher(train)
    for normalize in ("train", "cosine"):
        found = influence_scores(query, train, normalize=normalize).compute()
        assert np.isfinite(found).all()
        assert_array_equal(found[:, [3, 50]], 0)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Query and train stores with columns and a few dropped rows."""
    tmp_path = tmp_path_factory.mktemp("labelled")
    label = np.array(["cat", "dog", "eel"])[np.random.default_rng(0).integers(0, 3, N)]
    stores = []
    for name, rows, labels in (("t", random_rows(N, K), label), ("q", random_rows(30, K, 1), label[:30])):
        path = tmp_path / f"{name}.zarr"
        storage = Storage(chunk_rows=64, group_chunks=3)
        store = GradientStore.create(
            path, whole_mask(K), dtype="float32", columns={"label": "str", "doc": "int64"}, storage=storage
        )
        with store:
            docs = np.arange(len(rows)) // 4
            store.append(rows, loss=np.zeros(len(rows)), columns={"label": labels.tolist(), "doc": docs})
        with GradientStore.open(path, "a") as store:
            store.drop([5, 9])
        stores.append(GradientStore.open(path))
    fit_fisher(stores[0])
    return stores[1], stores[0]


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_sums_by_group(labelled, normalize, device, monkeypatch):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**13)  # blocks of 64 rows
    query, train = labelled
    options = {"normalize": normalize, "memory": roomy()}
    full = influence_scores(query, train, damping=DAMPINGS, **options).compute()
    named = {"label": train.column("label"), "doc": train.column("doc"), "id": np.arange(N)}
    for by, values in named.items():
        found = group_influence(query, train, by, damping=DAMPINGS, device=device, workers=2, **options)
        names = np.unique(values)
        assert found.names.tolist() == names.tolist()
        members = (values == names[:, None]) & ~train.dropped
        assert_array_equal(found.counts, members.sum(1))
        expected = np.stack([full[..., own].sum(-1) for own in members], -1)
        expected[:, query.dropped] = np.nan  # of a group without rows, too
        close(found.sums, expected)
    assert np.isnan(found.sums[:, [5, 9]]).all()
    assert np.isnan(found.means[..., [5, 9]]).all()  # the ids of dropped rows: no row
    one = group_influence(query, train, train.column("doc") % 2, **options)
    assert one.sums.shape == (30, 2)
    assert_allclose(one.means * one.counts, one.sums)
    assert json.loads(json.dumps(one.to_dict()))["sums"][5] == [None, None]


def test_bad_groups(labelled):
    query, train = labelled
    with pytest.raises(InputError, match=r"expected one of id, doc, label|one of id, label, doc"):
        group_influence(query, train, "colour")
    with pytest.raises(InputError, match="a group for each of 500 rows"):
        group_influence(query, train, [1, 2])


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_averaged_queries(labelled, normalize, tmp_path):
    query, train = labelled
    live = ~query.dropped
    means = {
        True: {"mean": query.rows()[live].mean(0)},
        "label": {name: query.rows()[live & (query.column("label") == name)].mean(0) for name in ("cat", "dog", "eel")},
    }
    for average, expected in means.items():
        other = write_store(tmp_path / f"means-{average}.zarr", np.stack(list(expected.values())))
        options = {"normalize": normalize, "damping": [0.1, 1.0], "memory": roomy()}
        found = influence_scores(query, train, average_queries=average, **options).compute()
        close(found, influence_scores(other, train, **options).compute())
        top = top_influential(query, train, top=4, average_queries=average, **options)
        assert top.query_ids.tolist() == list(expected)
        check_top(top.proponents.rows, found, 4)
    full = influence_scores(query, train).compute()
    close(influence_scores(query, train, average_queries=True).compute()[0], full[live].mean(0))


def test_a_group_of_dropped_queries_is_nan(tmp_path, labelled):
    query, train = labelled
    query = GradientStore.open(shutil.copytree(query.path, tmp_path / "q.zarr"))
    with GradientStore.open(query.path, "a") as store:
        store.drop(np.flatnonzero(query.column("doc") == 3))
    query = GradientStore.open(query.path)
    scores = influence_scores(query, train, average_queries="doc").compute()
    assert np.flatnonzero(np.isnan(scores).all(1)).tolist() == [3]
    assert (top_influential(query, train, average_queries="doc").proponents.rows[3] == -1).all()


def parts_mask(*sizes):
    modules = []
    for number, size in enumerate(sizes):
        entries = np.arange(size, dtype=np.int32)
        layer = LayerShape(f"layer{number}", "linear", (1, max(1, size)), False)
        modules.append(ModuleMask(layer, np.zeros_like(entries), entries, np.ones(size, np.float32)))
    return Mask(tuple(modules))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_parts_by_module_add_up(tmp_path, device):
    stores = []
    for name, rows in (("t", random_rows(300, K)), ("q", random_rows(9, K, 1))):
        with GradientStore.create(tmp_path / name, parts_mask(7, 0, 30, 3), dtype="float32") as store:
            store.append(rows, loss=np.zeros(len(rows)))
        stores.append(GradientStore.open(tmp_path / name))
    train, query = stores
    fit_fisher(train)
    options = {"device": device, "memory": roomy()}
    names = ["layer0", "layer2", "layer3"]
    x = query.rows() @ preconditioned(train)
    columns = [slice(0, 7), slice(7, 37), slice(37, 40)]
    expected = np.stack([x[:, own] @ train.rows()[:, own].T for own in columns])
    written = module_influence(query, train, out=tmp_path / "m.zarr", **options)
    assert (written.shape, written.attrs["modules"]) == ((3, 9, 300), names)
    assert written.attrs["dims"] == ["module", "query", "train"]
    close(written[...], expected)
    close(written[...].sum(0), influence_scores(query, train, **options).compute())
    assert_array_equal(module_influence(query, train, out=tmp_path / "m.zarr", **options)[...], written[...])
    top = module_influence(query, train, top=5, **options)
    assert list(top) == names
    for name, own in zip(names, expected, strict=True):
        check_top(top[name].proponents.rows, own, 5)
    many = module_influence(query, train, out=tmp_path / "l.zarr", damping=DAMPINGS, normalize="cosine", **options)
    assert many.shape == (3, 3, 9, 300)
    close(many[...].sum(1), influence_scores(query, train, damping=DAMPINGS, normalize="cosine", **options).compute())


def test_reduced_rows_have_no_modules(tmp_path):
    reduction = GaussianReduction(K, 8, 0)
    with GradientStore.create(tmp_path / "t", whole_mask(K), reduction=reduction, dtype="float32") as store:
        store.append(random_rows(50, 8), loss=np.zeros(50))
    fit_fisher(store)
    with pytest.raises(InputError, match="reduced to 8 numbers that mix the modules"):
        module_influence(store, store, top=3)
    for wrong in ({}, {"top": 3, "out": tmp_path / "x"}):
        with pytest.raises(InputError, match="either top= or out="):
            module_influence(store, store, **wrong)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("checkpoints")
    queries = [write_store(tmp_path / f"q{c}.zarr", random_rows(Q, K, 10 + c)) for c in range(3)]
    return queries, [fitted(tmp_path, f"t{c}", c) for c in range(3)]


@pytest.mark.parametrize("normalize", [None, "train"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_several_checkpoints_are_averaged(tmp_path, checkpoints, normalize, device):
    queries, trains = checkpoints
    options = {"normalize": normalize, "damping": DAMPINGS, "memory": roomy(), "device": device}
    single = [influence_scores(q, t, **options).compute() for q, t in zip(queries, trains, strict=True)]
    found = influence_scores(queries, trains, **options)
    close(found.compute(), np.mean(single, axis=0))
    written = influence_scores(queries, trains, out=tmp_path / "s.zarr", **options)
    close(written[...], found.compute(), 1e-6)
    assert len(written.attrs["train"]) == 3
    top = top_influential(queries, trains, top=5, **options)
    check_top(top.proponents.rows, np.mean(single, axis=0), 5)
    assert np.shape(top.damping) == (3, 3)
    own = self_influence(trains, damping=DAMPINGS, memory=roomy(), device=device)
    close(own, np.mean([self_influence(t, damping=DAMPINGS, memory=roomy()) for t in trains], axis=0))
    sums = group_influence(queries, trains, np.arange(N) % 4, **options).sums
    close(sums, np.stack([np.mean(single, axis=0)[..., g::4].sum(-1) for g in range(4)], -1))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_row_is_credited_by_the_checkpoints_that_saw_it(checkpoints, device):
    queries, trains = checkpoints
    generator = np.random.default_rng(0)
    seen = generator.random((3, N)) < 0.5
    seen[0] |= ~seen.any(0)
    seen[:, :4] = [[True] * 4, [False] * 4, [False] * 4]  # one checkpoint saw them
    seen[:, 4:9] = False  # none did
    rows = [seen[0], np.flatnonzero(seen[1]), seen[2]]
    single = np.stack([influence_scores(q, t).compute() for q, t in zip(queries, trains, strict=True)])
    with np.errstate(invalid="ignore"):
        expected = (single * seen[:, None]).sum(0) / seen.sum(0)
    options = {"rows": rows, "device": device, "memory": roomy()}
    found = influence_scores(queries, trains, **options).compute()
    close(found, expected)
    assert np.flatnonzero(np.isnan(found[0])).tolist() == [4, 5, 6, 7, 8]
    top = top_influential(queries, trains, top=N, **options)
    assert not np.isin([4, 5, 6, 7, 8], top.proponents.rows).any()
    own = self_influence(trains, **options)
    one = np.stack([self_influence(t) for t in trains])
    with np.errstate(invalid="ignore"):
        close(own, (one * seen).sum(0) / seen.sum(0))
    group = group_influence(queries, trains, np.zeros(N, int), **options)
    close(group.sums[:, 0], np.nansum(expected, axis=1))
    assert group.counts.tolist() == [N - 5]
    alone = influence_scores(queries[0], trains[0], rows=[2, 3]).compute()
    assert np.flatnonzero(~np.isnan(alone[0])).tolist() == [2, 3]


def test_checkpoints_that_do_not_go_together(tmp_path, checkpoints):
    queries, trains = checkpoints
    with pytest.raises(InputError, match="for each checkpoint; received 2, 3 and 3"):
        influence_scores(queries[:2], trains)
    with pytest.raises(InputError, match="for each checkpoint; received 3, 3 and 1"):
        influence_scores(queries, trains, curvature=["default"])
    with pytest.raises(InputError, match="an entry for each of 3 checkpoints"):
        influence_scores(queries, trains, rows=[None, None])
    for wrong in ([0, N], np.ones(3, bool), [0.5], []):
        with pytest.raises(InputError, match=r"rows as numbers in \[0, 500\)"):
            influence_scores(queries, trains, rows=[None, None, wrong])
    short = write_store(tmp_path / "short.zarr", random_rows(N - 1, K))
    fit_fisher(short)
    with pytest.raises(MismatchError, match="the same rows in every checkpoint"):
        influence_scores(queries[:2], [trains[0], short])
    named = []
    for seed in (0, 1):
        store = GradientStore.create(tmp_path / f"ids{seed}", whole_mask(K), ids="int64", dtype="float32")
        with store:
            store.append(random_rows(50, K), loss=np.zeros(50), ids=seed + np.arange(50))
        fit_fisher(store)
        named.append(GradientStore.open(store.path))
    with pytest.raises(MismatchError, match=r"whose (numbers|ids) differ"):
        self_influence(named)


def test_what_lies_outside_the_span_is_told(tmp_path):
    rows = random_rows(12, K)
    train = write_store(tmp_path / "t.zarr", rows)
    inside = rows[:3] + rows[3:6]
    far = np.linalg.svd(rows)[2][20:23].astype(np.float32)  # orthogonal to every row
    query = write_store(tmp_path / "q.zarr", np.concatenate([inside, far, inside + far]))
    fit_fisher(train)
    share = np.square(far).sum(1) / np.square(inside + far).sum(1)
    with pytest.warns(OocInfluenceWarning, match=r"of 9 queries have more than 90% .* \(up to 100%\)"):
        top = top_influential(query, train, top=2)
    assert_allclose(top.outside_share, np.concatenate([np.zeros(3), np.ones(3), share]), atol=1e-5)
    with pytest.warns(OocInfluenceWarning, match="outside the span"):
        written = influence_scores(query, train, out=tmp_path / "s.zarr")
    assert_allclose(written.attrs["outside_share"], top.outside_share)
    assert_allclose(top.to_dict()["queries"][4]["outside_share"], 1, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int8-linear", "int4", "sign"])
@pytest.mark.parametrize("scale", [None, "column"])
def test_a_device_decodes_every_representation(tmp_path, dtype, scale, monkeypatch):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**13)
    options = {"column_scale": np.linspace(0.5, 2, 37)} if scale else {}
    train = write_store(tmp_path / "t.zarr", random_rows(300, 37), dtype=dtype, chunk_rows=50, **options)
    query = write_store(tmp_path / "q.zarr", random_rows(5, 37, 1), dtype=dtype, **options)
    with GradientStore.open(train.path, "a") as store:
        store.drop([7, 250])
    train = GradientStore.open(train.path)
    here, there = (influence_scores(query, train, curvature=False, device=d).compute() for d in (None, "cpu"))
    assert_allclose(there, here, rtol=0, atol=1e-6 * np.nanmax(np.abs(here)))
    assert_array_equal(np.flatnonzero(np.isnan(there[0])), [7, 250])
    products = query.rows() @ np.where(train.dropped[:, None], np.nan, train.rows()).T
    assert_allclose(here, products, rtol=0, atol=1e-5 * np.nanmax(np.abs(here)))
    squares = np.square(np.where(train.dropped[:, None], np.nan, train.rows())).sum(1)
    energy = train.layout.encoding.energy
    assert_allclose(self_influence(train, curvature=False, device="cpu"), energy * squares, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int8-linear", "int4"])
def test_cuda(tmp_path, dtype):
    train = write_store(tmp_path / "t.zarr", random_rows(5000, 256), dtype=dtype, chunk_rows=300)
    query = write_store(tmp_path / "q.zarr", random_rows(40, 256, 1), dtype=dtype)
    fit_fisher(train)
    for normalize in (None, "cosine"):
        options = {"normalize": normalize, "damping": DAMPINGS, "memory": roomy()}
        here, there = (influence_scores(query, train, device=d, **options).compute() for d in (None, "cuda"))
        close(there, here)
        tops = [top_influential(query, train, top=20, device=d, **options) for d in (None, "cuda")]
        close(tops[1].proponents.scores, tops[0].proponents.scores)
        sums = [group_influence(query, train, np.arange(5000) % 7, device=d, **options).sums for d in (None, "cuda")]
        close(sums[1], sums[0])
    close(self_influence(train, device="cuda"), self_influence(train))


def test_bad_options(fit):
    query, train = fit
    with pytest.raises(InputError, match="normalize 'none', 'cosine'"):
        influence_scores(query, train, normalize="length")
    with pytest.raises(InputError, match="expected a device such as"):
        top_influential(query, train, device="nonsense")
    with pytest.raises(InputError, match="True, False or a column"):
        top_influential(query, train, average_queries=3)
    with pytest.raises(InputError, match="expected one of id to group"):
        top_influential(query, train, average_queries="label")
    for wrong in ([], [[0.1]], "much"):
        with pytest.raises(InputError, match="damping as a number or a list of numbers"):
            self_influence(train, damping=wrong)
    with pytest.raises(InputError, match="damping >= 0"):
        self_influence(train, damping=[0.1, -1.0])


def test_several_lambdas_need_an_inverse_each(tmp_path):
    train = write_store(tmp_path / "t.zarr", random_rows(12, K))
    fit_fisher(train)
    with pytest.raises(SingularFisherError, match="rank 12"):
        influence_scores(train, train, damping=[0.1, 0.0])


def test_memory_of_every_mode_is_refused_in_time(fit):
    query, train = fit
    for call in (
        lambda: influence_scores(query, train, damping=DAMPINGS, memory="1MiB"),
        lambda: top_influential(query, train, normalize="cosine", memory="1MiB"),
        lambda: group_influence(query, train, np.zeros(N), memory="1MiB"),
        lambda: self_influence(train, damping=DAMPINGS, memory="1MiB"),
    ):
        with pytest.raises(MemoryBudgetError, match=r"needs .* budget 1 MiB: use .*--memory"):
            call()


def recording(computed, run, function, stripes, *args, **options):
    computed.extend(stripes)
    return run(function, stripes, *args, **options)


def test_finished_parts_are_not_computed_again(tmp_path, fit, monkeypatch):
    """A call that fails half way goes on where it was; another call's parts, or anything else, are refused."""
    import ooc_influence.checkpoint
    import ooc_influence.influence.tiles

    files, tiles = ooc_influence.checkpoint, ooc_influence.influence.tiles

    query, train = fit
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**13)
    monkeypatch.setattr(tiles, "_PART_BYTES", 64 * 4 * K)  # a part a block
    calls = {
        "top": lambda **more: top_influential(query, train, top=5, memory=roomy(), **more).proponents.rows,
        "self": lambda **more: self_influence(train, damping=DAMPINGS, memory=roomy(), **more),
        "group": lambda **more: group_influence(query, train, np.arange(N) % 3, memory=roomy(), **more).sums,
    }
    for name, call in calls.items():
        folder = tmp_path / name
        expected = call()
        written = []
        original = files.write_bytes

        def fails(path, data, written=written, original=original):
            if len(written) == 5:
                raise KeyboardInterrupt
            written.append(path)
            original(path, data)

        monkeypatch.setattr(files, "write_bytes", fails)
        with pytest.raises(KeyboardInterrupt):
            call(resume=folder)
        monkeypatch.setattr(files, "write_bytes", original)
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
        assert len(kept) == 4
        with pytest.raises(StoreExistsError, match="of another call"):
            self_influence(train, damping=0.7, resume=folder)
        computed = []
        run = tiles.run_stripes
        monkeypatch.setattr(tiles, "run_stripes", partial(recording, computed, run))
        assert_allclose(call(resume=folder), expected, rtol=1e-12)
        monkeypatch.setattr(tiles, "run_stripes", run)
        assert len(computed) == 8 - 4
        assert not folder.exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(StoreExistsError, match="something else"):
        self_influence(train, resume=tmp_path / "other")


def test_a_folder_of_parts_is_used_by_one_call_at_a_time(tmp_path, fit, monkeypatch):
    """The same call made twice at once: the second is refused, and takes nothing from the first."""
    folder, train = tmp_path / "parts", fit[1]
    expected, refusals = self_influence(train), []

    def call_again(key, rows):
        with pytest.raises(StoreBusyError, match=r"no other writer of .*parts"):
            self_influence(train, resume=folder)
        refusals.append(rows)

    module = sys.modules["ooc_influence.influence.self_scores"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "tick", call_again)
        assert_array_equal(self_influence(train, resume=folder), expected)
    assert refusals
    assert not folder.exists()
    with monkeypatch.context() as patch:  # one that failed holds nothing
        patch.setattr(module, "tick", lambda key, rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self_influence(train, resume=folder)
    assert_array_equal(self_influence(train, resume=folder), expected)
    assert not folder.exists()


@pytest.mark.parametrize(
    "text", ['{"format": 1, "lr": 1}', '{"digest": 3}', "[1]", "{", "\xff", '{"digest": "a", "b": 1}']
)
def test_settings_of_something_else(tmp_path, fit, text):
    """A foreign settings.json, such as of retraining runs, is neither read as ours nor written over."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "settings.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreExistsError, match="received something else: choose another path"):
        self_influence(fit[1], resume=folder)
    assert (folder / "settings.json").read_text(encoding="latin-1") == text


def test_what_others_put_beside_the_parts_stays(tmp_path, fit):
    folder = tmp_path / "parts"
    self_influence(fit[1], resume=folder)
    assert not folder.exists()
    parts = ScoreParts(folder, "digest")
    with parts.claimed():
        (folder / "notes.txt").write_text("mine")
        for name in ("values-0-64.npz", "0-7-64-128.npz"):
            (folder / name).write_bytes(b"a part")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def described(path, rows, ids=None, **columns):
    """A store with ids and columns."""
    kinds = {name: {"i": "int64", "f": "float64", "U": "str"}[np.asarray(v).dtype.kind] for name, v in columns.items()}
    with GradientStore.create(path, whole_mask(rows.shape[1]), dtype="float32", ids=ids and "str", columns=kinds) as s:
        s.append(rows, loss=np.zeros(len(rows)), ids=ids, columns=columns)
    return GradientStore.open(path)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"label": [0, 1, 2]}, {"label": [0, 2, 1]}, "values of 'label' differ"),
        ({"label": ["a", "b", "c"]}, {"label": ["a", "b", "d"]}, "values of 'label' differ"),
        ({"ids": ["0", "1", "2"]}, {"ids": ["0", "1", "3"]}, "ids differ"),
        ({"ids": ["0", "1", "2"]}, {"label": [0, 1, 2]}, "ids differ"),
        ({"ids": ["0", "1", "2"], "text_digest": [5, 6, 7]}, {"ids": ["0", "1", "2"], "text_digest": [5, 6, 8]},
         "values of 'text_digest' differ"),
        ({"ids": ["0", "1", "2"], "guess": [0, 1, 2]}, {"ids": ["0", "1", "2"], "guess": [1, 1, 1]}, None),
        ({"label": [0, 1, 2], "margin": [0.5, 1.5, 2.5]}, {"label": [0, 1, 2], "margin": [0.1, 0.2, 0.3]}, None),
        ({"text_digest": [5, 6, 7], "n_tokens": [1, 2, 3]}, {"text_digest": [5, 6, 7], "n_tokens": [1, 2, 4]}, None),
    ],
)  # fmt: skip
def test_checkpoints_with_other_rows(tmp_path, one, other, said):
    """Of stores without ids, whatever both keep of a row tells; the document's text where they keep its digest."""
    rows = random_rows(3, 4)
    stores = [described(tmp_path / f"{at}.zarr", rows, **own) for at, own in enumerate((one, other))]
    if said is None:
        assert self_influence(stores, curvature=False).shape == (3,)
    else:
        with pytest.raises(MismatchError, match=said):
            self_influence(stores, curvature=False)


def test_checkpoints_that_nothing_compares(tmp_path):
    rows = random_rows(3, 4)
    stores = [write_store(tmp_path / f"{name}.zarr", rows) for name in "ab"]
    with pytest.warns(OocInfluenceWarning, match=r"taken for the same examples.*3 of each: extract with ids"):
        assert self_influence(stores, curvature=False).shape == (3,)
    assert self_influence([stores[0]] * 2, curvature=False).shape == (3,)

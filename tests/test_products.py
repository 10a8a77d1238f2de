"""Quick products and their bounds, and lists that are the same whichever product found their rows."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_rows, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import ooc_influence.influence.products as products_module
import ooc_influence.influence.search as search
import ooc_influence.influence.trial as trial
from ooc_influence import (
    Curvature,
    GradientStore,
    fit_fisher,
    influence_scores,
    module_influence,
    parallel,
    top_influential,
)
from ooc_influence.errors import InputError
from ooc_influence.influence.engine import Entries, HostEngine
from ooc_influence.influence.exact import exact_scores
from ooc_influence.influence.heap import Bounds, TopKHeap
from ooc_influence.influence.lists import _TILE_SCORES
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.store import Encoding, LayerShape, Mask, ModuleMask, Storage

FORMS = ("float32", "float16", "bfloat16", "int8", "int8-linear", "int4", "sign")
POOL = HostEngine()
KINDS = ("normal", "heavy", "tiny", "huge", "subnormal", "zero", "one entry", "cancelling", "mixed")


def products_of(form):
    return trial.product_names(form in ("int8-linear", "sign"))


def adversarial(kind, shape, seed):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal(shape)
    if kind == "heavy":
        rows = np.exp(6 * rows) * np.sign(generator.standard_normal(shape))
    elif kind == "one entry":
        rows[:, generator.integers(shape[1])] *= 1e6
    elif kind == "cancelling":
        rows[:, 1::2] = -rows[:, : shape[1] // 2 * 2 : 2][:, : rows[:, 1::2].shape[1]]
    elif kind == "mixed":
        rows *= 10.0 ** generator.integers(-30, 8, (shape[0], 1))
        rows[::5] = 0
    rows *= {"tiny": 1e-25, "huge": 1e15, "subnormal": 1e-41, "zero": 0}.get(kind, 1)
    return rows.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    k=st.sampled_from([1, 3, 64, 200, 513, 1100]),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    seed=st.integers(0, 2**20),
    piece=st.sampled_from([2**16, 100]),
)
def test_no_score_is_further_off_than_its_bound(form, k, kinds, seed, piece):
    """Against the exact scores that lists are made of, for rows and queries chosen to break the bound."""
    stored = Encoding.of(form, k)
    rows = adversarial(kinds[0], (24, k), seed)
    raw, scale = np.empty((24, stored.columns), stored.dtype), np.empty(24, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        stored.encode_into(rows, raw, scale)
    as_stored = stored.as_stored
    queries = adversarial(kinds[1], (5, stored.stored_columns if as_stored else k), seed + 1)
    queries /= search.query_units([queries])[:, None]
    decoded = np.empty((24, queries.shape[1]), np.float32)
    read = stored.read_stored_into if as_stored else stored.decode_into
    read(raw, scale, decoded)
    exact = queries.astype(np.float64) @ decoded.T.astype(np.float64)
    room = np.abs(queries).astype(np.float64) @ np.abs(decoded).T.astype(np.float64)
    for name in products_of(form):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial._KINDS[name], "piece", piece)
            patch.setattr(products_module, "_UNPACKED_AT_ONCE", 24 * piece)
            patch.setattr(products_module, "_LEAST_UNPACKED", 8)
            product = trial.make_product(name, stored, None, queries, (slice(None),), POOL, as_stored=as_stored)
            found = np.full((1, 5, 24), np.nan, np.float32)
            errors = product.multiply(raw, scale, found).errors
        bounds = product.bounds(errors, found)[0]
        finite = np.isfinite(bounds)
        # the bound holds for the exact score's own rounding too, which this truth does not have
        assert (np.abs(found[0] - exact) <= bounds)[finite].all(), (name, np.abs(found[0] - exact).max())
        if name != "float32" and piece > k and kinds == ("normal", "normal") and k >= 64:
            assert (bounds < 0.05 * room.max()).all()  # a bound that lets everything in would hold as well


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    top=st.integers(1, 9),
    width=st.sampled_from([0.0, 0.01, 0.5, 100.0]),
    step=st.integers(1, 90),
    ties=st.booleans(),
)
def test_a_heap_of_bounded_scores_finds_the_exact_list(seed, top, width, step, ties):
    """Of scores off by anything up to their bounds; the exact ones are asked for, and only of rows in question."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((3, 400)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    lists, rows = generator.uniform(0, width, (3, 1)), generator.uniform(0, 1, (1, 400, 1))
    error = (lists @ rows[0].T) * generator.uniform(-1, 1, scores.shape) * 0.999

    def rescore(numbers, which):
        return scores[numbers, which]

    heap = TopKHeap(3, top, 400, rescore)
    for start in range(0, 400, step):
        part = slice(start, start + step)
        tile = (scores[:, part] + error[:, part]).astype(np.float32)
        bounds = Bounds.make(lists * 1.001 + 1e-6, np.zeros(3, np.int64), rows[:, part], 0.0)
        heap.add(tile, start, POOL, 1, bounds)
    numbers, which = heap.entries()
    if width == 0.01 and not ties:
        assert len(which) < 3 * (top + 30)
    heap.replace(None, scores[numbers, which])
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    assert_array_equal(heap.best()[1], expected)
    assert_array_equal(heap.best()[0], np.take_along_axis(scores, expected, 1))


def test_bounds_of_entries_are_those_of_the_tile():
    generator = np.random.default_rng(0)
    lists, rows = generator.uniform(size=(6, 2)), generator.uniform(size=(2, 5, 2))
    bounds = Bounds.make(lists, np.array([0, 0, 1, 1, 0, 1]), rows, 0.5)
    entries = Entries(np.array([2, 4]), np.array([3, 1]), np.array([-2.0, 4.0], np.float32))
    expected = [lists[2] @ rows[1, 3] + 1, lists[4] @ rows[0, 1] + 2]
    np.testing.assert_allclose(bounds.of(entries), expected, rtol=1e-5)
    np.testing.assert_allclose(bounds.largest()[2], (lists[2] * rows[1].max(0)).sum())


def same_lists(found, expected):
    for side in ("proponents", "opponents"):
        assert_array_equal(getattr(found, side).rows, getattr(expected, side).rows)
        assert_array_equal(getattr(found, side).scores, getattr(expected, side).scores)


def brute_force(query, train, top):
    """The lists by a stable sort of all exact scores."""
    scoring = ScoreRequest.open(query, train, {"curvature": False, "normalize": "none"}, lists=True)
    work = scoring.work(64)
    queries = work.read_as_rows(scoring.precondition(0, scoring.q).arrays)
    units = search.query_units(queries)
    pairs = np.divmod(np.arange(scoring.q * scoring.n), scoring.n)
    scaled = [queries[0] / units[:, None]]
    scores = exact_scores(POOL, work, None, scaled, *pairs, batch=100).reshape(scoring.q, -1) * units[:, None]
    scores[:, train.dropped] = np.nan
    rows = np.argsort(np.where(np.isnan(scores), np.inf, -scores), axis=1, kind="stable")[:, :top]
    return rows, np.take_along_axis(scores, rows, 1)


@pytest.mark.parametrize("form", FORMS)
def test_lists_are_those_of_all_exact_scores_by_every_product(tmp_path, form):
    """With ties, rows of zeros, dropped rows and a dropped query, rows of very different size."""
    rows = random_rows(700, 150) * np.exp(np.random.default_rng(5).normal(0, 2, (700, 1))).astype(np.float32)
    rows[100:130] = rows[7]
    rows[300:360] = 0
    train = write_store(tmp_path / "t.zarr", rows, dtype=form, chunk_rows=37)
    query = write_store(tmp_path / "q.zarr", random_rows(9, 150, seed=2), dtype="float32")
    for store, dropped in ((train, [7, 103, 512]), (query, [4])):
        with GradientStore.open(store.path, "a") as opened:
            opened.drop(rows=dropped)
    train, query = GradientStore.open(train.path), GradientStore.open(query.path)
    expected = brute_force(query, train, 12)
    options = {"curvature": False, "normalize": "none"}
    for name in products_of(form):
        found = top_influential(query, train, top=12, product=name, **options)
        live = np.delete(np.arange(9), 4)
        assert_array_equal(found.proponents.rows[live], expected[0][live])
        assert_array_equal(found.proponents.scores[live], expected[1][live])
        assert (found.proponents.rows[4] == -1).all()
        assert np.isnan(found.opponents.scores[4]).all()
        assert found.search["product"] == name
        assert 0 < found.search["rescored"] < 0.3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", ["train", "cosine"])
def test_lists_in_units_whose_norms_are_sums_of_squares(tmp_path, form, unit):
    """By a diagonal curvature, or none: found from the rows beside the scores. Rows of zeros score zero."""
    sizes = np.exp(np.random.default_rng(5).normal(0, 3, (500, 1)))
    rows = (random_rows(500, 150) * sizes).astype(np.float32)
    rows[40:80] = 0
    rows[90] *= 1e-22  # its squares are lost in float32
    train = write_store(tmp_path / "t.zarr", rows, dtype=form, chunk_rows=37)
    query = write_store(tmp_path / "q.zarr", random_rows(7, 150, seed=2))
    if form != "sign":
        fit_fisher(train, name="diagonal", blocks="diagonal")
    seen = np.delete(np.arange(500), 33)
    for curvature, damping in (("diagonal", [0.01, 10.0]), (False, None)):
        options = {"curvature": curvature, "damping": damping, "normalize": unit, "top": 15, "rows": seen}
        if form == "sign":  # the squares of their numbers have a factor, and are not summed here
            lists = top_influential(query, train, **(options | {"curvature": False, "damping": None}))
            assert lists.search["rescored"] is None
            continue
        lists = {name: top_influential(query, train, product=name, **options) for name in ("float32", "bfloat16")}
        same_lists(lists["bfloat16"], lists["float32"])
        assert lists["bfloat16"].search["product"] == "bfloat16"
        inverse = np.ones((1, 150))
        if curvature:
            fitted = Curvature.open(train.path / "curvature" / "diagonal")
            inverse = fitted.precondition(np.ones((1, 150)), fitted.lambdas(damping, "relative"))[:, 0]
        expected = np.stack([normalised(query, train, each, unit) for each in inverse])
        expected[..., 33] = -np.inf
        rows_found = np.atleast_3d(lists["bfloat16"].proponents.rows).reshape(len(inverse), 7, 15)
        scores = lists["bfloat16"].proponents.scores.reshape(rows_found.shape)
        wanted = -np.sort(-expected, axis=-1)[..., :15]
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        np.testing.assert_allclose(
            np.take_along_axis(expected, rows_found, -1), wanted, rtol=0, atol=1e-6 * wanted.max()
        )
        if not curvature:  # the same by all scores
            scores = influence_scores(query, train, curvature=False, normalize=unit, rows=seen).compute()
            np.testing.assert_allclose(scores[:, 90], expected[0, :, 90], rtol=1e-4)


@pytest.mark.parametrize("size", [1e-24, 1e-12, 1e22])
def test_rows_whose_squares_are_beyond_float32(tmp_path, size):
    """All of them, or one, in the unit of their norms, which are found in float64."""
    rows = random_rows(200, 60)
    for which in (slice(None), slice(5, 6)):
        scaled = rows.copy()
        scaled[which] *= np.float32(size)
        train = write_store(tmp_path / f"t{which.stop}.zarr", scaled, dtype="float32")
        query = write_store(tmp_path / f"q{which.stop}.zarr", random_rows(4, 60, seed=2))
        expected = normalised(query, train, np.ones(60), "train")
        options = {"curvature": False, "normalize": "train", "top": 20}
        found = {name: top_influential(query, train, product=name, **options) for name in ("float32", "bfloat16")}
        same_lists(found["bfloat16"], found["float32"])
        assert_array_equal(found["float32"].proponents.rows, np.argsort(-expected, axis=1, kind="stable")[:, :20])
        assert (found["bfloat16"].search["rescored"] < 0.5) == (size == 1e-12 or which.stop is not None)


def normalised(query, train, inverse, unit):
    """Scores by a diagonal inverse, in float64."""
    g, q = (store.rows().astype(np.float64) for store in (train, query))
    sizes = [np.sqrt(np.square(rows) @ inverse) for rows in (g, q)]
    scores = q * inverse @ g.T / np.where(sizes[0] > 0, sizes[0], 1)
    return scores / sizes[1][:, None] if unit == "cosine" else scores


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Rows of three modules, at two checkpoints that saw different rows, with dampings."""
    folder = tmp_path_factory.mktemp("modules")
    sizes = (40, 90, 30)
    parts = []
    for number, size in enumerate(sizes):
        entries = np.arange(size, dtype=np.int32)
        layer = LayerShape(f"layer{number}", "linear", (1, size), False)
        parts.append(ModuleMask(layer, np.zeros_like(entries), entries, np.ones(size, np.float32)))
    stores, storage = {}, Storage(chunk_rows=41, group_chunks=3)
    for seed in range(2):
        for name, n in (("train", 300), ("query", 6)):
            path = folder / f"{name}{seed}.zarr"
            with GradientStore.create(
                path, Mask(tuple(parts)), dtype="int8-linear", storage=storage, ids="int64"
            ) as store:
                store.append(random_rows(n, 160, seed=seed + 2 * n), loss=np.full(n, 0.5), ids=np.arange(n))
            stores[name, seed] = GradientStore.open(path)
        fit_fisher(stores["train", seed])
    return stores


def test_modules_checkpoints_and_dampings_by_every_product(modules):
    several = ([modules["query", seed] for seed in range(2)], [modules["train", seed] for seed in range(2)])
    seen = [np.arange(0, 260), np.arange(40, 300)]
    options = {"damping": [0.1, 3.0], "rows": seen, "top": 7, "normalize": "none"}
    expected = top_influential(*several, product="float32", **options)
    for name in ("bfloat16", "int8"):
        found = top_influential(*several, product=name, **options)
        same_lists(found, expected)
        assert found.search == {"product": name, "rescored": found.search["rescored"]}
    alone = (modules["query", 0], modules["train", 0])
    by_module = {}
    for name in ("float32", "bfloat16", "int8"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "choose_product", lambda *args, name=name, **options: name)
            by_module[name] = module_influence(*alone, top=5, damping=[0.1, 3.0], normalize="none")
    for name in ("bfloat16", "int8"):
        for module, lists in by_module["float32"].items():
            same_lists(by_module[name][module], lists)


def test_neither_tiles_nor_workers_nor_threads_change_a_bit(tmp_path, monkeypatch):
    train = write_store(tmp_path / "t.zarr", random_rows(900, 130), dtype="float16", chunk_rows=100)
    query = write_store(tmp_path / "q.zarr", random_rows(11, 130, seed=2))
    fit_fisher(train)
    expected = top_influential(query, train, top=20)
    for scores, workers in ((1000, None), (11 * 7, 1), (2**22, 3)):
        monkeypatch.setattr("ooc_influence.influence.lists._TILE_SCORES", scores)
        for product in ("float32", "bfloat16"):
            same_lists(top_influential(query, train, top=20, workers=workers, product=product), expected)


def test_scores_of_a_pair_do_not_depend_on_others(tmp_path):
    """Alone, in a batch, in threads: every bit is the same."""
    train = write_store(tmp_path / "t.zarr", random_rows(50, 1500), dtype="float16", chunk_rows=9)
    query = write_store(tmp_path / "q.zarr", random_rows(5, 1500, seed=2))
    scoring = ScoreRequest.open(query, train, {"curvature": False}, lists=True)
    work, queries = scoring.work(64), scoring.precondition(0, 5).arrays
    lists, rows = np.divmod(np.arange(250), 50)
    together = exact_scores(POOL, work, None, queries, lists, rows, 50)
    assert_array_equal(together, exact_scores(POOL, work, None, queries, lists, rows, 7))
    alone = [exact_scores(POOL, work, None, queries, lists[[at]], rows[[at]], 50)[0] for at in range(250)]
    assert_array_equal(together, alone)
    exact = queries[0].astype(np.float64) @ train.rows().astype(np.float64).T
    np.testing.assert_allclose(together.reshape(5, 50), exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_the_quickest_accurate_product_is_chosen(monkeypatch, caplog):
    """A product that is quick and wrong is not taken, nor one that this PyTorch does not have."""
    form = Encoding.of("int8-linear", 64)
    pool = SimpleNamespace(divide=POOL.divide, threads=1)
    monkeypatch.setattr(trial, "_chosen", {})
    taken = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.1}
    monkeypatch.setattr(trial._Trial, "time", lambda self, product: taken[product.name])
    choose = lambda: trial.choose_product(form, 64, 100, 2**30, pool, as_stored=True)  # noqa: E731
    assert choose() == "int8"
    assert trial.choose_product(form, 64, 1, 1000, pool, as_stored=True) == "float32"  # not worth a trial
    exact = products_module.multiply_whole

    def wrong(left, rows, out):
        exact(left, rows, out)
        out += 3000

    monkeypatch.setattr(products_module, "multiply_whole", wrong)
    trial._chosen.clear()
    with caplog.at_level("INFO", "ooc_influence"):
        assert choose() == "bfloat16"
    assert "less accurate" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(trial._Trial, "time", lambda self, product: taken[product.name])
    monkeypatch.setattr(trial, "_chosen", {})
    monkeypatch.delattr(torch, "_int_mm")
    assert choose() == "bfloat16"
    trial._chosen.clear()
    taken["bfloat16"] = 0.95  # hardly quicker
    assert choose() == "float32"


def test_a_trial_holds_little_more_than_a_tile(monkeypatch):
    """As a pass does: whatever the number of queries, at most two sets of scores and some parts of them."""
    form, tile = Encoding.of("int8-linear", 64), 4 * _TILE_SCORES
    monkeypatch.setattr(trial._Trial, "time", lambda self, product: 1.0)
    for queries in (256, 2048):
        tracemalloc.start()
        trial._quickest(trial.product_names(True), form, 64, queries, POOL, True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * tile


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_pytorch_has_one_thread_in_each_of_ours(monkeypatch, name, threads):
    """And as many as before in the caller's, also where there is a single piece."""
    form, rows = Encoding.of("int8-linear", 64), random_rows(3000, 64)
    raw, scale = np.empty((3000, 64), form.dtype), np.empty(3000, np.float32)
    form.encode_into(rows, raw, scale)
    monkeypatch.setattr(parallel._task, "threads", threads, raising=False)
    pool = HostEngine()
    product = trial.make_product(name, form, None, random_rows(5, 64), (slice(None),), pool, as_stored=True)
    seen, before = [], torch.get_num_threads()
    for method in ("_products", "_multiply"):
        if hasattr(product, method):
            inner = getattr(product, method)
            watched = lambda *args, inner=inner: (seen.append(torch.get_num_threads()), inner(*args))[1]  # noqa: E731
            monkeypatch.setattr(product, method, watched)
    torch.set_num_threads(3)
    try:
        for count in (3000, 7, 1):
            product.multiply(raw[:count], scale[:count], np.empty((1, 5, count), np.float32))
        assert len(seen) > 3
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        pool.__exit__()
        torch.set_num_threads(before)


def test_products_that_rows_cannot_have(tmp_path):
    rows = random_rows(40, 30)
    train, query = write_store(tmp_path / "t.zarr", rows, dtype="float16"), write_store(tmp_path / "q.zarr", rows[:2])
    fit_fisher(train)
    with pytest.raises(InputError, match=r"expected product one of auto, float32, bfloat16 .*; received 'int8'"):
        top_influential(query, train, product="int8")
    with pytest.raises(InputError, match=r"expected product auto or float32 .*; received 'bfloat16'"):
        top_influential(query, train, product="bfloat16", normalize="train")  # norms by all of F
    with pytest.raises(InputError, match="received 'fast'"):
        top_influential(query, train, product="fast")
    found = top_influential(query, train, normalize="train")
    assert found.search == {"product": "float32", "rescored": None}
    assert found.to_dict()["search"] == found.search

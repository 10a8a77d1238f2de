"""Sums over rows of whole numbers by integer products: against float64, whatever the scales and the workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_rows, write_store
from numpy.testing import assert_array_equal
from test_top import force

from ooc_influence import GradientStore, checkpoint, fit_fisher
from ooc_influence.curvature import sums
from ooc_influence.linalg import MatrixAccumulator, Team, WeightedRows, Whitening, rows, whole
from ooc_influence.linalg.backend import ScipyEngine
from ooc_influence.process import limit_openmp
from ooc_influence.store import Encoding

N, K = 1024, 120


@pytest.fixture
def used(monkeypatch):
    """Take whole numbers wherever rows can be grouped, in small products; what they multiplied is counted."""
    for name, value in (("_NARROWEST", 1), ("_WORTH_TRYING", 0), ("_STRIP", 13), ("_WIDTH", 50)):
        monkeypatch.setattr(whole, name, value)
    monkeypatch.setattr(rows, "_FEWEST_PER_SCALE", 0)
    monkeypatch.setattr(whole, "_quicker", lambda *args: True)
    monkeypatch.setattr(whole, "_chosen", {})
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 4 * K * 64)
    counts, plain = [], whole.WholeEngine.add_product

    def counted(self, total, left, right, sign=1.0):
        counts.append(len(left))
        plain(self, total, left, right, sign)

    monkeypatch.setattr(whole.WholeEngine, "add_product", counted)
    return counts


def uneven_rows(n=N, k=K, seed=0):
    """Random rows of very different sizes, some of them zeros."""
    generator = np.random.default_rng(seed)
    found = random_rows(n, k, seed) * np.exp(generator.normal(0, 1, (n, 1))).astype(np.float32)
    found[::50] *= 1e6
    found[1::50] *= 1e-12
    found[2::50] = 0
    return found


def assert_is_fisher(found, store, live=None):
    """Compare every entry with float64's, by the root of its diagonal entries."""
    exact = store.rows() if live is None else store.rows()[live]
    exact = exact.astype(np.float64)
    expected = exact.T @ exact / len(exact)
    assert_near(found, expected)


def assert_near(found, expected):
    size = np.sqrt(np.diag(expected))
    assert size.min() > 0
    assert np.abs((found - expected) / size / size[:, None]).max() < 1e-6


def test_products_of_all_small_shapes_are_exact():
    numbers = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, (80, 90)).astype(np.int8))
    for m in (1, 2, 3, 5, 8, 16, 31, 64, 80):
        for a in (1, 2, 3, 8, 17, 40):
            for b in (1, 2, 3, 8, 17, 40):
                for left, right in (
                    (numbers[-m:, :a], numbers[-m:, 90 - b :]),
                    (numbers[-m:, :a].contiguous(), numbers[-m:, 90 - b :].contiguous()),
                ):
                    out = torch.empty((a, b), dtype=torch.int32)
                    whole.cross_whole(left, right, out)
                    assert_array_equal(out, left.numpy().astype(int).T @ right.numpy().astype(int))


def test_sums_of_many_rows_do_not_overflow():
    count = whole._MOST_ROWS + 3
    buffer = np.full((count, 2), -128, np.int8)
    grouped = whole.RowGrouper(count, [(0, 2)], None).group([(buffer, np.ones(count, np.float32))], None)
    total = np.zeros((2, 2), np.float32)
    whole.WholeEngine().add_square(total, grouped)
    assert total[0, 1] == np.float32(count * 128**2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [1, 255, 256, 600, 1100])
def test_the_engine_adds_like_the_others(k, threads):
    """Two accumulators of the same rows, as numbers and grouped; blocks are subtracted too."""
    generator = np.random.default_rng(k)
    codes = generator.integers(-127, 128, (900, k)).astype(np.int8)
    scale = np.exp2(generator.integers(-20, 20, 900) / 8).astype(np.float32)
    numbers, grouper = codes * scale[:, None], whole.RowGrouper(300, [(0, k)], None)
    with Team(threads) as team:
        found, plain = (MatrixAccumulator(k, None, engine, team) for engine in (whole.WholeEngine(), ScipyEngine()))
        for start, sign in ((0, 1.0), (300, 1.0), (600, 1.0), (300, -1.0)):
            part = slice(start, start + 300)
            pieces = [(codes[start : start + 120], scale[start : start + 120]),
                      (codes[start + 120 : start + 300], scale[start + 120 : start + 300])]  # fmt: skip
            found.add(grouper.group(pieces, None), sign=sign)
            plain.add(numbers[part], sign=sign)
        kept = np.r_[0:300, 600:900]
        exact = numbers[kept].astype(np.float64).T @ numbers[kept].astype(np.float64)
        atol = 1e-6 * np.abs(exact).max()
        np.testing.assert_allclose(found.total(), exact, rtol=0, atol=atol)
        np.testing.assert_allclose(plain.total(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_fisher_is_float64s(tmp_path, monkeypatch, used, way, workers, scaled):
    column_scale = np.geomspace(0.1, 2, K).astype(np.float32) if scaled else None
    store = write_store(tmp_path / "t.zarr", uneven_rows(), dtype="int8-linear", column_scale=column_scale)
    options = {"workers": workers}
    if way == "tiles":
        force(monkeypatch, way)
        options["rank"] = K
    found = fit_fisher(store, **options)
    assert used
    assert_is_fisher(found.fisher(), store)
    with GradientStore.open(store.path, "a") as writer:
        writer.append(uneven_rows(100, seed=9), loss=np.zeros(100))
        writer.drop([1, 3, 4, 500, 1050])
    del used[:]
    now = GradientStore.open(store.path)
    again = fit_fisher(now, **options)
    assert used
    assert_is_fisher(again.fisher(), now, np.setdiff1d(np.arange(N + 100), [1, 3, 4, 500, 1050]))


def test_workers_and_chosen_rows(tmp_path, used):
    store = write_store(tmp_path / "t.zarr", uneven_rows(), dtype="int8-linear")
    one, more = (fit_fisher(store, workers=workers, refit=True).fisher() for workers in (1, 3))
    assert_near(one, more)
    del used[:]
    chosen = np.sort(np.random.default_rng(0).choice(N, 300, replace=False))
    assert_is_fisher(fit_fisher(store, rows=chosen, name="some").fisher(), store, chosen)
    assert used


def test_an_interrupted_fit_resumes(tmp_path, monkeypatch, used):
    """With other products, too: what is kept are sums."""
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    monkeypatch.setattr("ooc_influence.linalg.accumulate.FOLD_ROWS", 64)
    store = write_store(tmp_path / "t.zarr", uneven_rows(), dtype="int8-linear")
    plain, seen = rows.read_raw_blocks, []

    def stopping(*args, **options):
        for block in plain(*args, **options):
            if len(seen) == 6:
                raise KeyboardInterrupt
            seen.append(block.stop)
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(rows, "read_raw_blocks", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit_fisher(store, workers=1)
    monkeypatch.setattr(sums, "choose_whole_engine", lambda *args: None)
    read, numbers = [], rows.read_blocks
    monkeypatch.setattr(
        rows, "read_blocks", lambda *a, **o: (read.append(b.stop - b.start) or b for b in numbers(*a, **o))
    )
    found = fit_fisher(store, workers=1)
    assert sum(read) == N - 6 * 64
    assert_is_fisher(found.fisher(), store)


def test_grouped_blocks_are_the_same_rows(tmp_path):
    """Whitened, some columns, dropped rows: the sums of both kinds of blocks are the same."""
    column_scale = np.geomspace(0.1, 2, K).astype(np.float32)
    path = write_store(tmp_path / "t.zarr", uneven_rows(), dtype="int8-linear", column_scale=column_scale).path
    with GradientStore.open(path, "a") as writer:
        writer.drop([5, 100, 1000])
    store = GradientStore.open(path)
    chosen = replace(WeightedRows.of(store, [(10, 1000)]), whitening=Whitening(np.linspace(1, 3, K), {}))
    columns = [(90, 120), (3, 40)]
    engine, total, exact, live = whole.WholeEngine(), np.zeros((67, 67), np.float32), np.zeros((67, 67)), []
    for block in chosen.grouped_blocks(0, 990, 200, columns=columns):
        engine.add_square(total, block.rows)
        live.append((block.start, block.stop, block.live))
    for block in chosen.blocks(0, 990, 200, columns=columns):
        exact += block.rows.T.astype(np.float64) @ block.rows
        assert live.pop(0) == (block.start, block.stop, block.live)
    assert_near(np.triu(total) + np.triu(total, 1).T, exact)


def test_scales_are_on_a_grid(tmp_path):
    """Rows alike in size share a handful of scales; each is at most 2^(1/8) of what the row needs."""
    values = random_rows(500, 64)
    form = Encoding.of("int8-linear", 64)
    codes, scale = np.empty((500, 64), np.int8), np.empty(500, np.float32)
    form.encode_into(values, codes, scale)
    steps = 8 * np.log2(scale.astype(np.float64))
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)
    share = scale / (np.abs(values).max(axis=1) / 127)
    assert share.min() > 0.9999999
    assert share.max() < 2**0.125 * 1.000001
    store = write_store(tmp_path / "t.zarr", values, dtype="int8-linear")
    assert WeightedRows.of(store, [(0, 500)]).rows_per_scale(500) > 20


@pytest.mark.parametrize("case", ["weights", "weighting", "float16", "scales", "tiny", "large"])
def test_other_rows_are_numbers(tmp_path, monkeypatch, used, case):
    values = uneven_rows()
    if case == "tiny":
        values[7] *= 1e-20
    if case == "large":
        values[7] = 1e16
    dtype = "float16" if case == "float16" else "int8-linear"
    store = write_store(tmp_path / "t.zarr", values, dtype=dtype, attributes={"loss_kind": "cross_entropy"})
    if case == "scales":
        monkeypatch.setattr(rows, "_FEWEST_PER_SCALE", 1000)
    weights = {"weights": np.linspace(0.1, 1, N), "weighting": "ggn"}.get(case)
    found = fit_fisher(store, weights=weights)
    assert not used
    if weights is None:
        assert_is_fisher(found.fisher(), store)


def test_the_quicker_accurate_products_are_chosen(monkeypatch, caplog):
    monkeypatch.setattr(whole, "_TRIAL", (64, 96))
    monkeypatch.setattr(whole, "_chosen", {})
    seconds = {"whole numbers": 1.0, "SciPy ssyrk": 1.3}
    monkeypatch.setattr(whole, "timed_square", lambda engine, *args: seconds[engine.name])
    choose = lambda side=512, group=16, count=2**30: whole.choose_whole_engine(  # noqa: E731
        ScipyEngine(), [side], count, group, Team()
    )
    assert choose() is not None
    assert choose(side=500) is choose(group=0) is choose(count=1000) is None
    whole._chosen.clear()
    seconds["SciPy ssyrk"] = 1.1
    assert choose() is None
    whole._chosen.clear()
    seconds["SciPy ssyrk"] = 10.0
    exact = whole.cross_whole

    def wrong(left, right, out):
        exact(left, right, out)
        out += 30

    with caplog.at_level("INFO", "ooc_influence"), monkeypatch.context() as patch:
        patch.setattr(whole, "cross_whole", wrong)
        assert choose() is None
    assert "less accurate" in caplog.text
    whole._chosen.clear()
    with caplog.at_level("INFO", "ooc_influence"), monkeypatch.context() as patch:
        patch.delattr(torch, "_int_mm")
        assert choose() is None
    assert "no products of whole numbers here" in caplog.text


def test_threads_of_openmp_are_restored():
    before = torch.get_num_threads()
    with limit_openmp(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

"""Fits on a device: the same curvature as the BLAS makes, from every representation, whatever is chosen of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_rows, write_store
from numpy.testing import assert_allclose
from test_fisher import modules  # noqa: F401 - a fixture
from test_top import force

from ooc_influence import GradientStore, checkpoint, fit_fisher
from ooc_influence.cli.main import main
from ooc_influence.curvature import fit_gram, sums
from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.linalg import accumulate, backend, device

pytestmark = pytest.mark.filterwarnings("ignore:.*effective dimension")
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]  # fmt: skip


def assert_near(found, expected, share=1e-6):
    assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**14)
    monkeypatch.setattr(accumulate, "FOLD_ROWS", 100)
    monkeypatch.setattr(device, "_TILE", 16)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int8-linear", "int4"])
def test_sums(tmp_path, where, dtype):
    options = {"column_scale": np.linspace(0.5, 2, 37)} if dtype == "int8" else {}
    train = write_store(tmp_path / "t.zarr", random_rows(700, 37), dtype=dtype, chunk_rows=50, **options)
    with GradientStore.open(train.path, "a") as store:
        store.drop([7, 250])
    train = GradientStore.open(train.path)
    here = fit_fisher(train)
    there = fit_fisher(train, device=where, workers=2, name="there")
    assert there.rows == here.rows == 698
    assert_near(there.fisher(), here.fisher())
    assert_near(there.eigenvalues, here.eigenvalues)


@pytest.mark.parametrize("where", DEVICES)
def test_chosen_rows(tmp_path, where):
    loss = np.random.default_rng(1).uniform(0.05, 3, 600).astype(np.float32)
    loss[9] = 0
    store = write_store(tmp_path / "t.zarr", random_rows(0, 30), dtype="float16")
    with GradientStore.open(store.path, "a") as store:
        store.append(random_rows(600, 30), loss=loss)
        store.drop([3, 400])
    train = GradientStore.open(store.path)
    for options in (
        {"weights": "ggn"}, {"weights": np.linspace(0, 2, 600)}, {"rows": (100, 450), "weights": "ggn"},
        {"rows": np.arange(0, 600, 7)}, {"sample": 200, "seed": 1},
    ):  # fmt: skip
        here = fit_fisher(train, refit=True, force_weights=True, **options)
        there = fit_fisher(train, device=where, name="there", refit=True, force_weights=True, **options)
        assert_near(there.fisher(), here.fisher())
        assert (there.rows, there.attrs["clipped"]) == (here.rows, here.attrs["clipped"])
        assert_allclose(there.attrs.get("sampling_error", 0), here.attrs.get("sampling_error", 0), rtol=1e-5)


@pytest.mark.parametrize("where", DEVICES)
def test_modules(modules, where):  # noqa: F811
    here, there = fit_fisher(modules, blocks="module"), fit_fisher(modules, blocks="module", device=where, name="there")
    assert_near(there.fisher(), here.fisher())


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("way", ["whole", "sums", "rows"])
def test_tops(tmp_path, where, way, monkeypatch):
    force(monkeypatch, way)
    train = write_store(tmp_path / "t.zarr", random_rows(500, 90), dtype="float16")
    options = {"rank": 12, "weights": np.linspace(0.1, 2, 500)}
    here = fit_fisher(train, **options)
    there = fit_fisher(train, device=where, name="there", workers=2, **options)
    assert there.attrs["way"] == way
    assert_near(there.eigenvalues, here.eigenvalues, 1e-5)
    assert_allclose(there.trace, here.trace, rtol=1e-6)
    queries, values = random_rows(4, 90, 3), [here.damping_value()]
    assert_near(there.precondition(queries, values), here.precondition(queries, values), 1e-4)


@pytest.mark.parametrize("where", DEVICES)
def test_gram(tmp_path, where):
    train = write_store(tmp_path / "t.zarr", random_rows(40, 300), dtype="float16")
    here, there = fit_gram(train), fit_gram(train, device=where, name="there")
    assert_near(there.eigenvalues, here.eigenvalues)
    assert_near(there.fisher(), here.fisher())


def test_an_interrupted_fit_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    train = write_store(tmp_path / "t.zarr", random_rows(2000, 30))
    plain, added = sums._RunningSums.add, []

    def stopping(self, rows, live, clipped):
        added.append(len(rows))
        if sum(added) > 1000 and len(added) < 10**6:
            raise KeyboardInterrupt
        plain(self, rows, live, clipped)

    monkeypatch.setattr(sums._RunningSums, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_fisher(train, device="cpu")
    assert "run it again to resume" in caplog.text
    monkeypatch.setattr(
        sums._RunningSums, "add", lambda self, *block: (added.append(len(block[0])), plain(self, *block))
    )
    added.clear()
    found = fit_fisher(train, device="cpu")
    assert 0 < sum(added) < 1800
    rows = train.rows().astype(np.float64)
    assert_near(found.fisher(), rows.T @ rows / 2000)


def test_refusals(tmp_path, monkeypatch, capsys):
    train = write_store(tmp_path / "t.zarr", random_rows(300, 40))
    with pytest.raises(InputError, match="expected a device such as"):
        fit_fisher(train, device="abacus")
    monkeypatch.setattr(backend, "free_bytes", lambda name: 2**14)
    with pytest.raises(MemoryBudgetError, match=r"fisher for k=40 needs .* on cpu, which has 16 KiB free: use fewer"):
        fit_fisher(train, device="cpu")
    with pytest.raises(MemoryBudgetError, match=r"gram for 300 rows of k=40 needs .* on cpu"):
        fit_gram(train, device="cpu")
    with pytest.raises(SystemExit):
        main(["fisher", str(train.path), "--device", "cpu"])
    assert "which has 16 KiB free" in capsys.readouterr().err

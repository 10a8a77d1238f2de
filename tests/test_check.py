"""Stored scores held against uncompressed ones on some samples: by the dense formula, in any groups; the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from models import Mlp, Twice, batches, data, loss, make
from numpy.testing import assert_allclose
from scipy.stats import spearmanr
from test_cli import run  # noqa: F401 - a fixture

from ooc_influence import Dropout, Gaussian, extract_gradients
from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.evaluate import agreement, check

N = 72


def parts(kind=Mlp, n=N, size=8):
    return make(kind), loss, batches(*data(kind, n), size)


def extract(path, compressor, kind=Mlp):
    return extract_gradients(*parts(kind), path, compressor=compressor, dtype="float32")


def oracle(stored, full, damping):
    """Rank correlations of scores and self-influence by (F + λI)⁻¹ itself, in float64."""
    rows = np.arange(len(full)) % 8 != 0
    value, found = damping * np.square(stored[rows]).sum() / rows.sum() / stored.shape[1], []
    for G in (stored, full):
        train = G[rows]
        inverse = np.linalg.inv(train.T @ train / len(train) + value * np.eye(G.shape[1]))
        found.append((G[~rows] @ inverse @ train.T, ((train @ inverse) * train).sum(1)))
    (scores, own), (true, true_own) = found
    top = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10 for a, b in zip(scores, true, strict=True)]
    each = [spearmanr(a, b)[0] for a, b in zip(scores, true, strict=True)]
    return np.mean(each), np.mean(top), spearmanr(own, true_own)[0]


@pytest.mark.parametrize("kind", [Mlp, Twice])
@pytest.mark.parametrize("compressor", [Dropout(k=60), Gaussian(k=40)], ids=repr)
def test_against_the_dense_formula(tmp_path, kind, compressor, monkeypatch):
    p = sum(values.numel() for values in make(kind).parameters())
    store = extract(tmp_path / "s", compressor, kind)
    stored = store.rows().astype(np.float64)
    full = extract(tmp_path / "f", Dropout(k=p), kind).rows().astype(np.float64)
    found = check(store, *parts(kind), rows=N, dampings=(0.01, 3.0), folder=tmp_path)
    assert (found.rows, found.queries, found.p, found.k) == (63, 9, p, store.k)
    assert [each.damping for each in found.agreement] == [0.01, 0.1, 3.0]
    for each in found.agreement:
        expected = oracle(stored, full, each.damping)
        assert_allclose([each.scores, each.top, each.self_influence], expected, atol=2e-3)
    monkeypatch.setattr(agreement, "_ENTRY_BYTES", 10**9)  # layer by layer
    monkeypatch.setattr(agreement.MemoryBudget, "of", lambda memory: agreement.MemoryBudget(10**12, 0))
    apart = check(store, *parts(kind), rows=N, dampings=(0.01, 3.0), folder=tmp_path)
    assert_allclose([a.scores for a in apart.agreement], [a.scores for a in found.agreement], atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_everything_kept_agrees_wholly(tmp_path):
    p = sum(values.numel() for values in make(Mlp).parameters())
    found = check(extract(tmp_path / "s", Dropout(k=p)), *parts(), rows=40)
    assert min(each.scores for each in found.agreement) > 0.999
    assert found.advice == ("At the default damping stored scores rank close to uncompressed ones.",)
    assert found.rows + found.queries == 40


def test_advice(tmp_path):
    found = check(extract(tmp_path / "s", Dropout(k=8)), *parts(), rows=N)
    text = str(found)
    assert "far from" in text or "roughly like" in text
    assert "--sampling importance" in text
    assert "--k" in text
    assert "default" in text


def test_refusals(tmp_path):
    store = extract(tmp_path / "s", Dropout(k=60))
    with pytest.raises(InputError, match="at least 32 rows"):
        check(store, *parts(), rows=20)
    with pytest.raises(InputError, match="data with 20"):
        check(store, *parts(n=20), rows=64)
    with pytest.raises(InputError, match="dampings > 0"):
        check(store, *parts(), dampings=(0.0,))
    with pytest.raises(MemoryBudgetError, match=r"layer first needs .* for whole gradients .* fewer --rows"):
        check(store, *parts(), memory="1MiB")


def test_the_command(run):  # noqa: F811
    assert run("extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200")[0] == 0
    code, out, err = run("check --store train.zarr --recipe my_recipe.py:recipe --split train --rows 40 --json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["queries"], len(found["agreement"])) == (35, 5, 4)
    code, out, _ = run("check --store train.zarr --recipe my_recipe.py:recipe --split train --rows 40 --damping 2")
    assert code == 0
    assert out.count("\n") >= 5
    for text, message in (
        ("--recipe my_recipe.py:recipe --text body", "--text with --model"),
        ("", "received both or neither"),
        ("--recipe my_recipe.py:recipe --split train --rows 3", "at least 32"),
    ):
        code, _, err = run(f"check --store train.zarr {text}")
        assert code == 2
        assert message in err

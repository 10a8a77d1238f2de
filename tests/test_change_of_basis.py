"""Rows of all entries, turned into the mask and basis of another store: those that extraction with it has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import interrupt_third_append
from models import Mlp, batches, data, loss, make, sample_loss
from numpy.testing import assert_allclose, assert_array_equal
from oracle import per_sample_gradients
from test_cli import run  # noqa: F401 - a fixture
from test_kronecker import MODELS, extracted, full, rotated

from ooc_influence import (
    Dropout,
    GradientStore,
    Identity,
    KroneckerBasis,
    Storage,
    collect,
    extract_gradients,
    influence_scores,
    reduce_store,
    rerank,
    rewrite_store,
)
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.store import Mask

SOME = Dropout(k=50, basis=KroneckerBasis(samples=16))


def entries(kind, path):
    return extracted(kind, path, Dropout(k=1)).mask.p


@pytest.mark.parametrize(("before", "sampling"), [(None, "importance"), (KroneckerBasis(samples=5), "grid")])
@pytest.mark.parametrize("kind", MODELS)
def test_turned_rows_are_those_that_extraction_has(tmp_path, kind, before, sampling):
    """From the parameters' own coordinates, and from the basis of another pilot."""
    p = entries(kind, tmp_path / "p")
    expected = extracted(kind, tmp_path / "e", Dropout(50, sampling=sampling, basis=KroneckerBasis(samples=16)))
    limit = 2e-5 * np.abs(expected.rows()).max()
    rows = extracted(kind, tmp_path / "rows", Dropout(k=p, basis=before))
    turned = rewrite_store(rows, tmp_path / "turned", like=expected, dtype="float32")
    assert turned.mask.digest == expected.mask.digest
    assert turned.attrs["compressor"] == expected.attrs["compressor"]
    assert_allclose(turned.rows(), expected.rows(), atol=limit)
    for name in ("loss", "grad_norm"):
        assert_array_equal(turned.small(name), rows.small(name))


@pytest.mark.parametrize("kind", MODELS)
def test_a_basis_is_undone(tmp_path, kind):
    """Back into the parameters' own coordinates: autograd's gradients."""
    p = entries(kind, tmp_path / "p")
    rows = extracted(kind, tmp_path / "r", Dropout(k=p, basis="kronecker"))
    reference = extracted(kind, tmp_path / "l", Dropout(k=p))
    turned = rewrite_store(rows, tmp_path / "t", like=str(reference.path), dtype="float32")
    expected = np.concatenate([layer.reshape(24, -1) for layer in full(kind, rows)], 1)
    assert_allclose(turned.rows(), expected, atol=2e-5 * np.abs(expected).max())


def test_signs_are_of_the_turned_rows(tmp_path):
    """With the whitening, and the self-influence, of the basis that they are turned into."""
    rows = extracted(Mlp, tmp_path / "r", Dropout(k=entries(Mlp, tmp_path / "p")))
    expected = extracted(Mlp, tmp_path / "e", SOME)
    signs = rewrite_store(rows, tmp_path / "s", like=expected)
    of_expected = rewrite_store(expected, tmp_path / "o")
    assert_array_equal(signs.column_scale, of_expected.column_scale)
    assert signs.layout.columns == of_expected.layout.columns != {}
    for name in signs.layout.columns:
        assert_allclose(signs.column(name), of_expected.column(name), rtol=1e-4)
    same = np.sign(signs.rows()) == np.sign(of_expected.rows())
    assert same.mean() > 0.999


def test_turned_rows_are_ranked_again(tmp_path):
    """With exact scores, in the whole of the basis that they were turned into."""
    x, y = data(Mlp, 24)
    rows, target = extracted(Mlp, tmp_path / "r", Identity()), extracted(Mlp, tmp_path / "e", SOME)
    turned = rewrite_store(rows, tmp_path / "t", like=target, dtype="float32")
    both = batches(x, y, 8), batches(x, y, 8)
    found, expected = (
        rerank(target, train, make(Mlp), loss, both, candidates=9, top=4).proponents for train in (turned, target)
    )
    assert_array_equal(found.rows, expected.rows)
    assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_turning_resumes(tmp_path, monkeypatch):
    rows = extracted(Mlp, tmp_path / "r", Dropout(k=entries(Mlp, tmp_path / "p")))
    expected = extracted(Mlp, tmp_path / "e", SOME)
    monkeypatch.setattr("ooc_influence.compress.representation._BLOCK_BYTES", 4 * 4 * rows.k)
    interrupt_third_append(monkeypatch)
    how = {"like": expected, "dtype": "float32", "storage": Storage(4, 1)}
    with pytest.raises(KeyboardInterrupt):
        rewrite_store(rows, tmp_path / "t", **how)
    assert GradientStore.open(tmp_path / "t").n == 8
    assert_allclose(rewrite_store(rows, tmp_path / "t", **how).rows(), expected.rows(), atol=1e-5)
    other = extracted(Mlp, tmp_path / "o", Dropout(k=50, seed=1, basis=KroneckerBasis(samples=16)))
    with pytest.raises(MismatchError, match="rewrite to another path"):
        rewrite_store(rows, tmp_path / "t", **how | {"like": other})
    with pytest.raises(MismatchError, match="rewrite to another path"):
        rewrite_store(rows, tmp_path / "t", dtype="float32")


def test_rows_that_cannot_be_turned(tmp_path):
    p = entries(Mlp, tmp_path / "p")
    target, rows = extracted(Mlp, tmp_path / "e", SOME), extracted(Mlp, tmp_path / "r", Dropout(k=p))
    part = extracted(Mlp, tmp_path / "part", Dropout(k=p - 1))
    with pytest.raises(InputError, match=rf"expected rows with all {p} entries .* with {p - 1}: .*Identity\(\)"):
        rewrite_store(part, tmp_path / "x", like=target)
    other = extracted(Mlp, tmp_path / "o", SOME, modules="last")
    with pytest.raises(MismatchError, match=r"the layers of .*first"):
        rewrite_store(rows, tmp_path / "x", like=other)
    with pytest.raises(MismatchError, match=r"the layers of .*first"):
        rewrite_store(extracted(Mlp, tmp_path / "l", Dropout(k=35), modules="last"), tmp_path / "x", like=target)
    reduced = reduce_store(target, tmp_path / "d", r=4)
    for source, like in ((rows, reduced), (reduced, target)):
        with pytest.raises(InputError, match="whose rows are reduced"):
            rewrite_store(source, tmp_path / "x", like=like)
    modules = rows.mask.modules
    zeros = replace(modules[0], weight=np.where(modules[0].rows == 1, 0, modules[0].weight).astype(np.float32))
    with GradientStore.create(tmp_path / "z", Mask((zeros, *modules[1:])), dtype="float32") as zeroed:
        zeroed.append(rows.rows(), loss=np.zeros(24))
    with pytest.raises(InputError, match=r"multiplies some by zero: .* metric="):
        rewrite_store(tmp_path / "z", tmp_path / "x", like=target)
    assert not (tmp_path / "x").exists()


def test_averages_of_a_training_are_asked_in_the_basis_of_its_end(tmp_path, run):  # noqa: F811
    """Collected without a pilot, turned by the command: EK-FAC's scores of the mean of each sample's gradients."""
    model, (x, y) = make(Mlp), data(Mlp, 24)
    optimizer, layers = torch.optim.SGD(model.parameters(), lr=0.1), extracted(Mlp, tmp_path / "p", SOME).mask.modules
    path, gradients = tmp_path / "rows.zarr", []
    with collect(model, path, compressor=Identity(), average=True, dtype="float32") as collector:
        for rows in torch.arange(24).split(8) * 2:
            samples = [(x[row], y[row]) for row in rows.tolist()]
            gradients.append(per_sample_gradients(model, sample_loss, samples, [each.layer for each in layers]))
            with collector.step(rows):
                loss(model, (x[rows], y[rows])).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    how = {"compressor": SOME, "pilot": batches(x, y, 8), "dtype": "float32"}
    queries = extract_gradients(model, loss, batches(x[:5], y[:5], 5), tmp_path / "queries.zarr", **how)
    code, _, error = run(f"rewrite {path} {tmp_path}/turned.zarr --like {queries.path} --dtype float32")
    assert code == 0, error
    means, first, expected = np.concatenate(gradients).reshape(2, 24, -1).mean(0), 0, np.zeros((5, 24))
    columns = 0
    for module in queries.mask.modules:
        size, count = module.layer.entries, len(module.rows)
        own = rotated(module, means[:, first : first + size].reshape(24, *module.layer.shape))
        inverse = 1 / (module.basis.second_moment + 0.1 * module.basis.mean_moment)
        expected += queries.rows()[:, columns : columns + count] * inverse @ own.T
        first, columns = first + size, columns + count
    scores = influence_scores(queries, tmp_path / "turned.zarr", curvature="kronecker", damping=0.1).compute()
    assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    samples = batches(x[:5], y[:5], 5), batches(x, y, 8)
    with pytest.raises(MismatchError, match="losses"):  # those of averages are of the whole training
        rerank(queries, tmp_path / "turned.zarr", model, loss, samples, candidates=5, top=3)

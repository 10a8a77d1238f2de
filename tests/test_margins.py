"""Checkpoints combined by margins: against the formula in float64, and what must not change the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import random_rows, roomy, whole_mask
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - fixture

from ooc_influence import (
    GradientStore,
    Storage,
    fit_fisher,
    group_influence,
    influence_scores,
    module_influence,
    top_influential,
)
from ooc_influence.errors import InputError

C, K, N, Q = 3, 20, 200, 9


def write(path, rows, losses, kind="cross_entropy"):
    storage = Storage(chunk_rows=32, group_chunks=2)
    create = {"dtype": "float32", "storage": storage, "attributes": {"loss_kind": kind}, "columns": {"half": "int64"}}
    with GradientStore.create(path, whole_mask(rows.shape[1]), **create) as store:
        store.append(rows, loss=losses, columns={"half": np.arange(len(rows)) % 2})
    return GradientStore.open(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Query stores, train stores: each has fitted other rows than the next one, to errors from 1e-4 to 1."""
    folder = tmp_path_factory.mktemp("margins")
    generator = np.random.default_rng(0)
    queries, trains = [], []
    for number in range(C):
        losses = -np.log1p(-(10 ** generator.uniform(-4, -0.01, N + Q))).astype(np.float32)
        rows = random_rows(N + Q, K, number) * (1 - np.exp(-losses))[:, None]
        trains.append(write(folder / f"t{number}", rows[:N], losses[:N]))
        queries.append(write(folder / f"q{number}", rows[N:], losses[N:]))
        fit_fisher(trains[-1], weights="trak")
    return queries, trains


def parts(checkpoints):
    """Plain scores (C, q, n), and errors 1 − p of queries (C, q) and rows (C, n), float64."""
    queries, trains = checkpoints
    plain = [influence_scores(q, t, memory=roomy()).compute() for q, t in zip(queries, trains, strict=True)]
    errors = [[1 - np.exp(-np.float64(store.loss)) for store in stores] for stores in checkpoints]
    return np.stack(plain).astype(np.float64), *map(np.stack, errors)


def by_hand(plain, of_queries, of_rows, seen=None, rows=True):
    seen = np.ones(of_rows.shape, bool) if seen is None else seen
    of_rows = of_rows if rows else np.ones_like(of_rows)
    margins = plain / of_queries[:, :, None] / of_rows[:, None]
    mean = (margins * seen[:, None]).sum(0) / seen.sum(0)
    return mean * of_queries.mean(0)[:, None] * of_rows.mean(0)


def close(found, expected):
    assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("combine", ["query-margins", "margins"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_margins_and_errors_are_averaged_each_by_itself(tmp_path, checkpoints, combine, device):
    expected = by_hand(*parts(checkpoints), rows=combine == "margins")
    options = {"combine": combine, "device": device, "memory": roomy()}
    lazy = influence_scores(*checkpoints, **options).compute()
    close(lazy, expected)
    assert np.abs(lazy - influence_scores(*checkpoints).compute()).max() > 0.1 * np.abs(lazy).max()  # not the mean
    written = influence_scores(*checkpoints, out=tmp_path / "scores", **options)
    close(written[...], expected)
    assert written.attrs["combine"] == combine
    top = top_influential(*checkpoints, top=5, **options)
    assert_array_equal(top.proponents.rows, np.argsort(-expected, axis=1)[:, :5])
    groups = group_influence(*checkpoints, by="half", **options)
    close(groups.sums, np.stack([expected[:, 0::2].sum(1), expected[:, 1::2].sum(1)], 1))
    (module,) = module_influence(*checkpoints, top=5, **options).values()
    assert_array_equal(module.proponents.rows, top.proponents.rows)


@pytest.mark.parametrize("workers", [1, 3])
def test_block_sizes_and_workers_do_not_matter(tmp_path, checkpoints, workers):
    narrow = influence_scores(
        *checkpoints, out=tmp_path / "scores", combine="margins", workers=workers, damping=[0.1, 1]
    )
    wide = influence_scores(*checkpoints, combine="margins", damping=[0.1, 1], memory=roomy()).compute()
    close(narrow[...], wide)


def test_one_checkpoint_has_its_plain_scores(checkpoints):
    query, train = checkpoints[0][0], checkpoints[1][0]
    close(influence_scores(query, train, combine="margins").compute(), influence_scores(query, train).compute())


def test_rows_are_credited_by_those_that_saw_them(checkpoints):
    seen = np.random.default_rng(1).random((C, N)) < 0.6
    seen[0] |= ~seen.any(0)
    found = influence_scores(*checkpoints, combine="margins", rows=list(seen)).compute()
    close(found, by_hand(*parts(checkpoints), seen))
    found = influence_scores(*checkpoints, combine="query-margins", rows=list(seen)).compute()
    close(found, by_hand(*parts(checkpoints), seen, rows=False))


def test_averaged_queries_are_means_of_their_scores(checkpoints):
    expected = by_hand(*parts(checkpoints))
    found = influence_scores(*checkpoints, combine="margins", average_queries=True).compute()
    close(found[0], expected.mean(0))
    halves = influence_scores(*checkpoints, combine="margins", average_queries="half").compute()
    close(halves, np.stack([expected[0::2].mean(0), expected[1::2].mean(0)]))


def test_a_loss_of_zero_and_dropped_rows(tmp_path):
    stores = []
    for number in range(2):
        losses = np.linspace(0, 2, 64, dtype=np.float32)
        stores.append(write(tmp_path / f"{number}", random_rows(64, K, number), losses))
        GradientStore.open(stores[-1].path, "a").drop([3])
        stores[-1] = GradientStore.open(stores[-1].path)
        fit_fisher(stores[-1])
    queries = [write(tmp_path / f"q{number}", random_rows(Q, K, 7), np.ones(Q)) for number in range(2)]
    found = influence_scores(queries, stores, combine="margins").compute()
    assert np.flatnonzero(np.isnan(found).any(0)).tolist() == [3]
    means = influence_scores(stores, stores, combine="margins", average_queries=True).compute()
    assert np.flatnonzero(np.isnan(means[0])).tolist() == [3]


def test_what_has_no_margins_is_refused(tmp_path, checkpoints):
    queries, trains = checkpoints
    with pytest.raises(InputError, match="expected combine 'mean', 'query-margins', 'margins'; received 'trak'"):
        influence_scores(queries, trains, combine="trak")
    with pytest.raises(InputError, match="without normalize; received 'cosine'"):
        influence_scores(queries, trains, combine="margins", normalize="cosine")
    other = write(tmp_path / "other", random_rows(Q, K), np.ones(Q), kind="mse")
    with pytest.raises(InputError, match=r"received 'mse' in .*other: give loss_kind"):
        influence_scores(other, trains[0], combine="margins")


def test_the_command_takes_it(run, checkpoints):  # noqa: F811
    (first, *others), trains = checkpoints
    also = " ".join(f"--also {q.path} {t.path}" for q, t in zip(others, trains[1:], strict=True))
    code, out, _ = run(f"top {first.path} {trains[0].path} --top 3 --combine margins --json {also}")
    assert code == 0
    expected = top_influential(*checkpoints, top=3, combine="margins")
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))

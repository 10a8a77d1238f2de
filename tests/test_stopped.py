"""Work that a watcher stops says that it was stopped, not that a disk is full: InterruptedError is an OSError."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_rows, whole_mask
from test_top import force

from ooc_influence import (
    GradientStore,
    fit_fisher,
    fit_gram,
    gram_matrix,
    group_influence,
    influence_scores,
    merge_stores,
    reduce_store,
    self_influence,
    top_influential,
)
from ooc_influence.errors import refused
from ooc_influence.progress import watched

CALLS = {
    "scores": lambda query, train, out: influence_scores(query, train, out=out),
    "top": lambda query, train, out: top_influential(query, train, resume=out),
    "self": lambda query, train, out: self_influence(train, resume=out),
    "groups": lambda query, train, out: group_influence(query, train, np.arange(train.n) % 3, resume=out),
    "whole": lambda query, train, out: fit_fisher(train, out=out),
    "tiles": lambda query, train, out: fit_fisher(train, rank=3, out=out),
    "gram": lambda query, train, out: fit_gram(train, out=out),
    "matrix": lambda query, train, out: gram_matrix(train, out),
    "reduce": lambda query, train, out: reduce_store(train, out, 4),
    "merge": lambda query, train, out: merge_stores([train, query], out),
}


def stopped_after(calls):
    """Return a watcher that stops the work at its ``calls``-th step."""
    left = [calls]

    def watch(label, done, total):
        left[0] -= 1
        if left[0] < 0 and done:
            raise InterruptedError("stopped by its user")

    return watch


@pytest.mark.parametrize("name", CALLS)
def test_a_stop_is_told_as_a_stop(tmp_path, pair, monkeypatch, name):
    query, train = pair
    if name == "tiles":
        force(monkeypatch, "tiles")
    monkeypatch.setattr("ooc_influence.curvature.dual.KEPT_BYTES", 0)  # on disk
    fit_fisher(train)
    steps = 0
    for calls in range(100):
        try:
            with watched(stopped_after(calls)):
                CALLS[name](query, train, tmp_path / f"out-{calls}")
        except InterruptedError:
            steps += 1
        else:
            break
    assert steps


def test_the_writers_thread_tells_a_stop(tmp_path, monkeypatch):
    def stopped(*given, **options):
        raise InterruptedError("stopped")

    store = GradientStore.create(tmp_path / "s.zarr", whole_mask(6))
    store.append(random_rows(10, 6), loss=np.zeros(10))
    monkeypatch.setattr("ooc_influence.store.commits.Committer._write_gradients", stopped)
    with pytest.raises(InterruptedError, match=r"^stopped$"):
        store.flush()


def test_no_message_is_made_of_a_stop():
    with pytest.raises(InterruptedError, match="by its user"):
        refused("to write", InterruptedError("by its user"))

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from ooc_influence.errors import InputError
from ooc_influence.evaluate import auc, fuse_ranks, recall_at
from ooc_influence.report import draw_images, table


def test_auc_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(0)
    scores, flagged = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[flagged] for b in scores[~flagged]]
    assert auc(scores, flagged) == pytest.approx(np.mean(pairs))
    assert auc([3, 1, 2], [True, False, False]) == 1


def test_fused_ranks():
    one, other = np.array([[3.0, 1, 2, np.nan]]), np.array([[-5.0, 7, 7, 0]])
    wanted = 1 / (60 + np.array([1, 3, 2, 4])) + 1 / (60 + np.array([4, 1.5, 1.5, 3]))
    assert_allclose(fuse_ranks(one, other), wanted[None])
    assert_allclose(fuse_ranks(one, 10 * one + 1, k=0), 2 / np.array([[1, 3, 2, 4]]))
    for bad in ((), (one, other[:, :3]), (one[0],)):
        with pytest.raises(InputError, match="of one shape"):
            fuse_ranks(*bad)
    with pytest.raises(InputError, match="k >= 0"):
        fuse_ranks(one, k=-1)


def test_recall():
    assert recall_at([5, 4, 3, 2, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0, 0, 1], 0.3) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="fraction"):
        recall_at([1, 2], [True, False], 0)
    with pytest.raises(InputError, match="some rows flagged"):
        auc([1, 2], [True, True])
    with pytest.raises(InputError, match="flags"):
        auc([1, 2, 3], [True, False])


def test_text():
    lines = table(("name", "value"), [("a", 1.23456), ("long name", 10)]).splitlines()
    assert lines == ["name       value", "---------  -----", "a          1.235", "long name     10"]
    picture = draw_images([np.eye(2), 1 - np.eye(2)], [["x"], ["y"]], gap=1)
    assert picture.splitlines() == ["x    y", "██     ██", "  ██ ██"]

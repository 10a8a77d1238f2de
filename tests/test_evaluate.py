from __future__ import annotations

import numpy as np
import pytest

from ooc_influence.errors import InputError
from ooc_influence.evaluate import auc, recall_at
from ooc_influence.report import draw_images, table


def test_auc_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(0)
    scores, flagged = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[flagged] for b in scores[~flagged]]
    assert auc(scores, flagged) == pytest.approx(np.mean(pairs))
    assert auc([3, 1, 2], [True, False, False]) == 1


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

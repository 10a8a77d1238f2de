from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import Dropout
from ooc_influence.errors import InputError
from ooc_influence.store import LayerShape

LAYERS = [LayerShape("a", "linear", (5, 7), True), LayerShape("b", "linear", (3, 4), False)]


def flat(mask):
    """Kept entries as numbers over all layers together."""
    parts, first = [], 0
    for module in mask.modules:
        parts.append(first + module.rows.astype(int) * module.layer.shape[1] + module.cols)
        first += module.layer.entries
    return np.concatenate(parts)


def test_dict_round_trip():
    compressor = Dropout(k=77, seed=5)
    assert Dropout.from_dict(compressor.to_dict()) == compressor
    assert compressor.to_dict()["name"] == "dropout"
    for bad in ({"name": "other"}, {"name": "dropout", "what": 1}, {"name": "dropout", "k": 0}):
        with pytest.raises(InputError):
            Dropout.from_dict(bad)


@pytest.mark.parametrize("k", [1, 20, 46])
def test_a_mask_keeps_k_distinct_entries(k):
    mask = Dropout(k=k).draw(LAYERS)
    kept = flat(mask)
    assert mask.k == len(np.unique(kept)) == k
    assert mask.p == 47
    assert kept.min() >= 0
    assert kept.max() < 47
    assert_allclose(np.concatenate([module.weight for module in mask.modules]), np.sqrt(47 / k), rtol=1e-6)
    assert mask.digest == Dropout(k=k).draw(LAYERS).digest
    assert mask.digest != Dropout(k=k, seed=1).draw(LAYERS).digest


def test_k_equal_p_is_the_identity():
    mask = Dropout(k=47).draw(LAYERS)
    assert_array_equal(flat(mask), np.arange(47))
    assert all((module.weight == 1).all() for module in mask.modules)


def test_every_entry_has_the_same_chance_and_dot_products_are_unbiased():
    """Over 4000 seeds: inclusion within 5 standard errors of k/p, the mean stored dot product of the full one."""
    generator = np.random.default_rng(0)
    g, h = generator.normal(size=(2, 47))
    counts, products = np.zeros(47), []
    for seed in range(4000):
        kept = flat(Dropout(k=10, seed=seed).draw(LAYERS))
        counts[kept] += 1
        products.append(4.7 * g[kept] @ h[kept])
    error = np.sqrt(10 / 47 * 37 / 47 / 4000)
    assert np.abs(counts / 4000 - 10 / 47).max() < 5 * error
    assert abs(np.mean(products) - g @ h) < 5 * np.std(products) / np.sqrt(4000)


def test_drawing_costs_k_not_p():
    """8 billion entries: an array over them would not fit."""
    layers = [LayerShape(str(number), "linear", (16384, 16384), False) for number in range(30)]
    mask = Dropout(k=100_000).draw(layers)
    assert mask.k == len(np.unique(flat(mask))) == 100_000


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_bad_k(k):
    with pytest.raises(InputError, match="k >= 1"):
        Dropout(k=k)


@pytest.mark.parametrize("seed", [-1, None, 1.5, "a"])
def test_bad_seed(seed):
    with pytest.raises(InputError, match="seed >= 0"):
        Dropout(seed=seed)


def test_numpy_integers_are_whole_numbers():
    assert Dropout(k=np.int64(4)) == Dropout(k=4)


def test_bad_settings():
    with pytest.raises(InputError, match=r"k <= p = 47.*received k = 48"):
        Dropout(k=48).draw(LAYERS)
    with pytest.raises(InputError, match="sampling"):
        Dropout(sampling="other")

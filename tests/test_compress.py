from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import Dropout
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.linalg import parse_weighting, row_weights
from ooc_influence.store import LayerShape, PilotMoments

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


ROOTS = np.random.default_rng(5).uniform(0, 3, (2, 40))


def pilot(zero=()):
    """Moments of the two layers; rows of the first named in ``zero`` were never seen to move."""
    first = ROOTS[0][:5].copy()
    first[list(zero)] = 0
    return [PilotMoments(0, first**2, ROOTS[0][5:12] ** 2), PilotMoments(1, ROOTS[1][:3] ** 2, ROOTS[1][3:7] ** 2)]


@pytest.mark.parametrize("sampling", ["importance", "grid"])
def test_stored_dot_products_are_unbiased(sampling):
    """Over 4000 seeds, for vectors that also move where the pilot saw nothing: within 5 standard errors."""
    generator = np.random.default_rng(0)
    g, h = generator.normal(size=(2, 47))
    products, counts, expected = [], np.zeros(47), np.zeros(47)
    for seed in range(4000):
        mask = Dropout(k=12, sampling=sampling, seed=seed).draw(LAYERS, pilot(zero=(1, 3)))
        kept, weight = flat(mask), np.concatenate([module.weight for module in mask.modules]).astype(float)
        assert len(np.unique(kept)) == len(kept) == mask.k
        products.append((weight**2 * g[kept]) @ h[kept])
        counts[kept] += 1
        expected[kept] += weight**-2.0  # π of those kept
    products = np.array(products)
    assert abs(products.mean() - g @ h) < 5 * products.std() / np.sqrt(4000)
    assert counts.min() > 0
    assert products.std() > 0
    share = expected / counts
    assert_allclose(counts / 4000, share, atol=5 * np.sqrt(0.25 / 4000))
    if sampling == "grid":
        assert_allclose(share, 12 / 47, rtol=1e-5)


def test_importance_prefers_what_the_pilot_saw_move():
    """Entries are drawn in proportion to the product of root mean squares, and about k of them are kept."""
    layers = [LayerShape("a", "linear", (200, 300), False), LayerShape("b", "linear", (100, 100), False)]
    generator = np.random.default_rng(0)
    moments = [PilotMoments(n, generator.exponential(size=s[0]) ** 2, generator.exponential(size=s[1]) ** 2)
               for n, s in enumerate(layer.shape for layer in layers)]  # fmt: skip
    compressor = Dropout(k=5000, sampling="importance")
    mask = compressor.draw(layers, moments)
    assert abs(mask.k - 5000) < 5 * np.sqrt(5000)
    assert mask.digest == compressor.draw(layers, moments).digest
    scale = [np.sqrt(np.outer(m.rows, m.cols)) for m in moments]
    whole = sum(part.sum() for part in scale)
    for module, part in zip(mask.modules, scale, strict=True):
        q = 0.95 * part / whole + 0.05 / 70000
        share = module.weight.astype(float) ** -2
        draws = np.log1p(-share) / np.log1p(-q[module.rows, module.cols])
        assert_allclose(draws, np.median(draws), rtol=1e-3)  # one number of draws explains every π
    kept = np.mean([part[m.rows, m.cols].mean() for m, part in zip(mask.modules, scale, strict=True)])
    assert kept > 1.2 * np.mean([part.mean() for part in scale])


def test_importance_needs_moments_that_fit():
    compressor = Dropout(k=10, sampling="importance")
    with pytest.raises(InputError, match="pilot moments"):
        compressor.draw(LAYERS)
    with pytest.raises(InputError, match=r"moments of \(3, 4\)"):
        compressor.draw(LAYERS, [PilotMoments(1, np.ones(3), np.ones(5))])
    with pytest.raises(NonFiniteError):
        compressor.draw(LAYERS, [PilotMoments(1, np.full(3, np.nan), np.ones(4))])
    still = compressor.draw(LAYERS, [PilotMoments(1, np.zeros(3), np.ones(4))])  # nothing moved: uniform
    assert still.k > 5


@pytest.mark.slow
def test_masks_of_a_seven_billion_parameter_model(tmp_path):
    """k = 1,000,000 of 6.9 billion entries, on the meta device: less than 300 MB."""
    script = """
import json, time, numpy as np, torch
from ooc_influence import Dropout
from ooc_influence.extract.selection import select_layers
from ooc_influence.memory import PeakMemory
from ooc_influence.store import PilotMoments

W, LAYERS, VOCABULARY = 4096, 32, 50432
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = torch.nn.LayerNorm(W), torch.nn.LayerNorm(W)
        self.qkv, self.out = torch.nn.Linear(W, 3 * W), torch.nn.Linear(W, W)
        self.up, self.down = torch.nn.Linear(W, 4 * W), torch.nn.Linear(4 * W, W)
with torch.device("meta"):
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, W), *[Block() for _ in range(LAYERS)],
                                torch.nn.LayerNorm(W), torch.nn.Linear(W, VOCABULARY, bias=False))
layers = select_layers(model, None).layers
p = sum(layer.entries for layer in layers)
generator = np.random.default_rng(0)
moments = [PilotMoments(n, generator.exponential(size=l.shape[0]), generator.exponential(size=l.shape[1]))
           for n, l in enumerate(layers)]
Dropout(k=1000).draw(layers)
found = {}
for sampling in ("uniform", "importance", "grid"):
    began = time.perf_counter()
    with PeakMemory() as memory:
        mask = Dropout(k=1_000_000, sampling=sampling).draw(layers, moments)
    found[sampling] = (mask.k, time.perf_counter() - began, (memory.peak - memory.start) / 1e6)
    del mask
print(json.dumps({"p": p} | found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 6.8e9 < found.pop("p") < 7e9
    for sampling, (k, _, megabytes) in found.items():
        assert abs(k - 1e6) < 0.02e6, sampling
        assert megabytes < 300, sampling


def test_row_weights_are_the_gauss_newton_matrix_and_trak_s():
    """Of a two-class model: Σ w g gᵀ is Σ p(1-p) ∇m∇mᵀ, and Σ ∇m∇mᵀ, with m the margin."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(30, 4)), generator.choice([-1, 1], 30)
    theta = generator.normal(size=4)
    margin = y * (x @ theta)
    p = 1 / (1 + np.exp(-margin))
    dm = y[:, None] * x
    g = -(1 - p)[:, None] * dm
    losses = -np.log(p)
    for name, weight in (("ggn", p * (1 - p)), ("trak", np.ones(30))):
        w = row_weights(losses, name)
        assert_allclose((g * w[:, None]).T @ g, (dm * weight[:, None]).T @ dm, rtol=1e-9)
    assert_array_equal(row_weights(losses, None), np.ones(30))
    assert np.isfinite(row_weights(np.array([0.0, 1e4]), "ggn")).all()
    for bad, attributes in (("other", {"loss_kind": "cross_entropy"}), ("ggn", {"loss_kind": None}), ("trak", {})):
        with pytest.raises(InputError):
            parse_weighting(bad, attributes)

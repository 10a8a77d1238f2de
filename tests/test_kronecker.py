"""Rows in the Kronecker basis: rotated autograd gradients, EK-FAC's Λ, exact inclusion probabilities."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from models import Encoder, Mlp, Twice, batches, data, loss, make, sample_loss
from numpy.testing import assert_allclose
from oracle import per_sample_gradients
from torch import nn

from ooc_influence import (
    Dropout,
    GradientStore,
    KroneckerBasis,
    Storage,
    extract_gradients,
    influence_scores,
    init_store,
)
from ooc_influence.compress.kronecker import WhitenedEnergy, draw_entries, draw_grids
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError, StoreWriteError
from ooc_influence.store import LayerShape, PilotMoments


class Convolutions(nn.Module):
    """Convolutions with stride and padding, one of them grouped, and a normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 6, 2, padding=1), nn.Conv2d(6, 6, 2, groups=3)
        self.norm, self.last = nn.GroupNorm(2, 6), nn.Linear(6, 5)

    def forward(self, x):
        h = torch.tanh(self.first(x.view(len(x), 1, 3, 4)))
        return self.last(self.norm(torch.tanh(self.grouped(h))).flatten(2).mean(2))


class Tokens(nn.Module):
    """An embedding, a normalisation, a layer over tokens of which the last are padding."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8, padding_idx=0), nn.LayerNorm(8)
        self.middle, self.last = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        h = torch.tanh(self.middle(self.norm(self.embed(x)))) * (x != 0).unsqueeze(2)
        return self.last(h.sum(1))


class Tied(nn.Module):
    """An embedding whose weight is the unembedding's too, with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embed(x)))).mean(1)


TOKENS = (Tokens, Tied)
MODELS = [Mlp, Twice, Convolutions, *TOKENS]


def extracted(kind, path, compressor, *, n=24, size=8, **options):
    x, y = data(Encoder if kind in TOKENS else Mlp, n)
    return extract_gradients(make(kind), loss, batches(x, y, size), path, compressor=compressor, dtype="float32",
                             **options)  # fmt: skip


def full(kind, store, n=24):
    """Every sample's full gradient by layers, float64."""
    x, y = data(Encoder if kind in TOKENS else Mlp, n)
    layers = [module.layer for module in store.mask.modules]
    rows = per_sample_gradients(make(kind), sample_loss, list(zip(x, y, strict=True)), layers)
    edges = np.cumsum([0, *(layer.entries for layer in layers)])
    return [rows[:, a:b].reshape(n, *layer.shape) for a, b, layer in zip(edges[:-1], edges[1:], layers, strict=True)]


def rotated(module, gradients):
    """The kept entries of U_Sᵀ G U_A, weighted, from full gradients (n, rows, columns)."""
    basis = module.basis
    left = np.eye(module.layer.shape[0])[:, module.rows]
    right = np.eye(module.layer.shape[1])[:, module.cols]
    if basis.left is not None:
        left = basis.left[:, np.searchsorted(np.unique(module.rows), module.rows)]
    if basis.right is not None:
        right = basis.right[:, np.searchsorted(np.unique(module.cols), module.cols)]
    return module.weight * np.einsum("nij,im,jm->nm", gradients, left, right, optimize=True)


@pytest.mark.parametrize("sampling", ["importance", "grid"])
@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_rotated_gradients(tmp_path, kind, sampling):
    compressor = Dropout(k=50, sampling=sampling, basis=KroneckerBasis(samples=16))
    store = extracted(kind, tmp_path / "s.zarr", compressor)
    assert store.attrs["verification"]["checked"]
    assert store.attrs["verification"]["share"] > 0.9
    assert abs(store.k - 50) < 40
    expected = [rotated(*pair) for pair in zip(store.mask.modules, full(kind, store), strict=True)]
    expected = np.concatenate(expected, 1)
    assert_allclose(store.rows(), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("kind", MODELS)
def test_all_entries_are_ek_fac(tmp_path, kind, scope):
    """With k = p: eigenvectors of the dense second moments, orthonormal, and Λ the mean square of what is stored."""
    p = sum(m.layer.entries for m in extracted(kind, tmp_path / "p.zarr", Dropout(k=1)).mask.modules)
    store = extracted(kind, tmp_path / "s.zarr", Dropout(k=p, basis=KroneckerBasis(24, damping_scope=scope)))
    assert store.k == p
    gradients, first = full(kind, store), 0
    of_model = np.square(np.concatenate([part.reshape(24, -1) for part in gradients], 1)).mean()
    for module, of_layer in zip(store.mask.modules, gradients, strict=True):
        rows = rotated(module, of_layer)
        assert_allclose(module.basis.second_moment, np.square(rows).mean(0), atol=1e-5 * np.square(rows).mean(0).max())
        of_scope = np.square(of_layer).mean() if scope == "layer" else of_model
        assert_allclose(module.basis.mean_moment, of_scope, rtol=1e-5)
        for vectors in (module.basis.left, module.basis.right):
            if vectors is not None:
                assert_allclose(vectors.T @ vectors, np.eye(len(vectors)), atol=1e-5)
        assert_allclose(np.square(rows).sum(), np.square(of_layer).sum(), rtol=1e-4)
        first += rows.shape[1]


def test_the_basis_is_of_second_moments(tmp_path):
    """A and S of a layer that sees one vector a sample: dense eigenvectors of what autograd says."""
    store = extracted(Mlp, tmp_path / "s.zarr", Dropout(k=400, basis=KroneckerBasis(samples=24)))
    x, _ = data(Mlp, 24)
    inputs = torch.cat([x, torch.ones(24, 1)], 1).double().numpy()
    module = next(m for m in store.mask.modules if m.layer.name == "first")
    a = inputs.T @ inputs / 24
    values = np.linalg.eigvalsh(a)[::-1]
    rayleigh = np.einsum("ij,ik,kj->j", module.basis.right, a, module.basis.right)
    assert_allclose(rayleigh, values[np.unique(module.cols)], rtol=1e-4, atol=1e-5)
    gradient = full(Mlp, store)[0][:, :, -1]  # of the bias: δ itself
    s = gradient.T @ gradient / 24
    values = np.linalg.eigvalsh(s)[::-1]
    rayleigh = np.einsum("ij,ik,kj->j", module.basis.left, s, module.basis.left)
    assert_allclose(rayleigh, values[np.unique(module.rows)], rtol=1e-4, atol=1e-5 * values[0])


def test_vocabularies_and_shared_weights_keep_their_rows(tmp_path):
    store = extracted(Tied, tmp_path / "s.zarr", Dropout(k=100, basis="kronecker"))
    sides = {m.layer.name: (m.basis.left is not None, m.basis.right is not None) for m in store.mask.modules}
    assert sides == {"embed": (False, True), "middle": (True, True), "head": (False, False)}


@pytest.mark.parametrize("size", [1, 5, 24])
def test_rows_do_not_depend_on_batches(tmp_path, size):
    compressor = Dropout(k=120, basis=KroneckerBasis(samples=24))
    one = extracted(Tokens, tmp_path / "one.zarr", compressor, size=8)
    x, y = data(Encoder, 24)
    extract_gradients(make(Tokens), loss, batches(x, y, size), tmp_path / "two.zarr", like=one, dtype="float32")
    assert_allclose(GradientStore.open(tmp_path / "two.zarr").rows(), one.rows(), atol=1e-5 * np.abs(one.rows()).max())


def test_a_killed_run_resumes_in_its_basis(tmp_path):
    compressor = Dropout(k=120, basis=KroneckerBasis(samples=16))
    whole = extracted(Mlp, tmp_path / "whole.zarr", compressor)
    x, y = data(Mlp, 24)
    part = batches(x, y, 8)
    extract_gradients(make(Mlp), loss, part[:2], tmp_path / "two.zarr", compressor=compressor, dtype="float32",
                      pilot=part)  # fmt: skip
    resumed = extract_gradients(make(Mlp), loss, part, tmp_path / "two.zarr", compressor=compressor, dtype="float32")
    assert resumed.mask_digest == whole.mask_digest
    np.testing.assert_array_equal(resumed.rows(), whole.rows())


def test_shards_fill_a_store_in_the_basis(tmp_path):
    compressor = Dropout(k=120, basis=KroneckerBasis(samples=16))
    whole = extracted(Mlp, tmp_path / "whole.zarr", compressor)
    x, y = data(Mlp, 24)
    split, options = batches(x, y, 8), {"compressor": compressor, "dtype": "float32"}
    init_store(make(Mlp), tmp_path / "two.zarr", 24, per_sample_loss=loss, pilot=split, **options,
               storage=Storage(chunk_rows=4, group_chunks=1))  # fmt: skip
    for shard in (1, 0):
        extract_gradients(make(Mlp), loss, split, tmp_path / "two.zarr", shard=(shard, 2), **options,
                          storage=Storage(chunk_rows=4, group_chunks=1))  # fmt: skip
    two = GradientStore.open(tmp_path / "two.zarr")
    assert two.mask_digest == whole.mask_digest
    assert_allclose(two.rows(), whole.rows(), atol=1e-6 * np.abs(whole.rows()).max())


def test_a_store_of_another_basis_is_refused(tmp_path):
    one, two = (
        extracted(Mlp, tmp_path / f"{n}.zarr", Dropout(k=120, basis=KroneckerBasis(samples=n))) for n in (8, 24)
    )
    with pytest.raises(MismatchError):
        influence_scores(one, two, curvature=False)
    assert np.isfinite(influence_scores(one, one, curvature=False)).all()


def test_factors_of_sampled_labels(tmp_path):
    """Labels drawn by the model make another basis, the same one each time; a loss that draws none is refused."""
    basis = KroneckerBasis(samples=16, labels="sampled", seed=3)
    one, two = (extracted(Mlp, tmp_path / f"{n}.zarr", Dropout(k=60, basis=basis)) for n in range(2))
    assert one.mask_digest == two.mask_digest
    for n, other in enumerate((KroneckerBasis(samples=16, labels="sampled"), KroneckerBasis(samples=16))):
        assert extracted(Mlp, tmp_path / f"o{n}.zarr", Dropout(k=60, basis=other)).mask_digest != one.mask_digest
    x, y = data(Mlp, 24)

    def plain(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(InputError, match="a loss that draws labels"):
        extract_gradients(
            make(Mlp), plain, batches(x, y, 8), tmp_path / "p.zarr", compressor=Dropout(k=60, basis=basis)
        )


LAYERS = [LayerShape("a", "linear", (9, 7), True), LayerShape("b", "linear", (5, 12), False)]
MOMENTS = [
    PilotMoments(number, 2.0 ** -np.arange(shape[0]), 3.0 ** -np.arange(shape[1]))
    for number, shape in ((0, (9, 7)), (1, (5, 12)))
]


@pytest.mark.parametrize("draw", [draw_entries, draw_grids])
def test_inclusion_probabilities_are_exact(draw):
    """Entries are kept as often as their weights say; so estimates are unbiased over draws."""
    energy, runs = WhitenedEnergy(LAYERS, MOMENTS, KroneckerBasis(damping=0.03)), 2000
    counts, estimates = [np.zeros(layer.shape) for layer in LAYERS], []
    stated = [np.full(layer.shape, np.nan) for layer in LAYERS]
    values = [np.random.default_rng(1).random(layer.shape) for layer in LAYERS]
    sizes = []
    for seed in range(runs):
        drawn = draw(energy, 30, np.random.default_rng(seed))
        sizes.append(sum(len(rows) for rows, _, _ in drawn))
        estimates.append(0.0)
        for count, chance, value, (rows, cols, of_entries) in zip(counts, stated, values, drawn, strict=True):
            np.add.at(count, (rows, cols), 1)
            chance[rows, cols] = of_entries
            estimates[-1] += (value[rows, cols] / of_entries).sum()
    for count, chance in zip(counts, stated, strict=True):
        drawn_once = ~np.isnan(chance)
        assert drawn_once.mean() > 0.9
        error = (count / runs - chance)[drawn_once]
        assert np.abs(error).max() < 5 * 0.5 / np.sqrt(runs)
    assert abs(np.mean(sizes) - 30) < 0.5
    total = sum(value.sum() for value in values)
    assert abs(np.mean(estimates) - total) < 5 * np.std(estimates) / np.sqrt(runs)
    if draw is draw_entries:
        assert set(sizes) <= {29, 30, 31}


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_energy_is_whitened(scope):
    energy = WhitenedEnergy(LAYERS, MOMENTS, KroneckerBasis(damping=0.1, damping_scope=scope))
    first, moment = (np.outer(each.rows, each.cols) for each in MOMENTS)
    mean = moment.mean() if scope == "layer" else np.concatenate([first.ravel(), moment.ravel()]).mean()
    (_, block), *rest = energy.blocks(1)
    assert not rest
    assert_allclose(block, moment / (moment + 0.1 * mean))
    assert_allclose(energy.sums(1)[0], block.sum(1))
    assert_allclose(energy.means[1], mean)


def test_factors_that_do_not_fit_take_more_passes_or_are_refused(tmp_path):
    from ooc_influence.extract.factors import factor_groups, factor_memory
    from ooc_influence.memory import MemoryBudget

    layers = [LayerShape(f"fc{n}", "linear", (2048, 2048), False) for n in range(6)]
    sides = [(True, True)] * 6
    price = MemoryBudget(0, 0).price(factor_memory(layers[:2], sides[:2]))
    assert factor_groups(layers, sides, MemoryBudget(price, 0)) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(MemoryBudgetError, match="second moments of 1 layer, up to 2048 x 2048"):
        factor_groups(layers, sides, MemoryBudget(price // 4, 0))


def test_eigenvectors_that_do_not_fit_the_disk_are_refused(tmp_path, monkeypatch):
    """Before a pass over the pilot, with the room they need."""
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(StoreWriteError, match=r"KiB free in .* for the eigenvectors .* received 100 B: set TMPDIR"):
        extracted(Mlp, tmp_path / "store.zarr", Dropout(k=120, basis="kronecker"))
    assert not (tmp_path / "store.zarr").exists()


def test_passes_do_not_change_the_basis(tmp_path, monkeypatch):
    from ooc_influence.extract import pilot

    compressor = Dropout(k=120, basis=KroneckerBasis(samples=16))
    one = extracted(Mlp, tmp_path / "one.zarr", compressor)
    monkeypatch.setattr(pilot, "factor_groups", lambda layers, sides, budget: [[n] for n in range(len(layers))])
    assert extracted(Mlp, tmp_path / "two.zarr", compressor).mask_digest == one.mask_digest


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: KroneckerBasis(damping=0), "damping > 0"),
        (lambda: KroneckerBasis(samples=0), "samples >= 1"),
        (lambda: KroneckerBasis(labels="true"), "labels one of"),
        (lambda: Dropout(k=5, basis="svd"), "basis 'kronecker'"),
    ],
)
def test_settings_are_checked(make_it, message):
    with pytest.raises(InputError, match=message):
        make_it()


def test_settings_are_recorded():
    compressor = Dropout(k=64, basis=KroneckerBasis(samples=8, damping=0.1))
    assert compressor.sampling == "grid"
    assert Dropout.from_dict(compressor.to_dict()) == compressor
    assert "basis" not in Dropout(k=64).to_dict()


def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 5))


def test_a_plan_of_the_basis_is_what_extraction_takes(tmp_path):
    """Bytes kept and multiplications, from shapes on the meta device, against a store and a count of FLOP."""
    from torch.utils.flop_counter import FlopCounterMode

    from ooc_influence.extract import BasisPlan
    from ooc_influence.extract.gather import MaskGatherer
    from ooc_influence.extract.taps import tapped
    from ooc_influence.memory import MemoryBudget

    torch.manual_seed(1)
    data = [(torch.randn(16, 7, 64), torch.randint(0, 5, (16,))) for _ in range(2)]
    model, k = wide_model(), 500

    def mean_loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    compressor = Dropout(k=k, basis=KroneckerBasis(samples=32))
    store = extract_gradients(model, mean_loss, data, tmp_path / "s.zarr", compressor=compressor)
    plan = BasisPlan.of(wide_model().to("meta"), k, MemoryBudget(2**30, 0))
    assert plan.passes == 1
    assert plan.scratch == 4 * (128**2 + 65**2 + 5**2 + 129**2)
    kept = store.mask.basis_bytes + 12 * store.k
    assert kept / 1.5 < plan.kept < kept * 1.5
    layers = [module.layer for module in store.mask.modules]
    rows, gatherer = torch.zeros(16, store.k), MaskGatherer(store.mask, torch.device("cpu"))
    with tapped(model, layers, torch.device("cpu")) as taps:
        calls = []
        taps.run(mean_loss, data[0], lambda b: lambda *call: calls.append(call))
    with FlopCounterMode(display=False) as gathering, torch.no_grad():
        for call in calls:
            gatherer.add(rows, *call)
    with FlopCounterMode(display=False) as forward:
        model(data[0][0])
    ratio = gathering.get_total_flops() / forward.get_total_flops()
    assert ratio / 1.5 < plan.rotation < ratio * 1.5


def test_a_basis_that_does_not_fit_is_priced(capsys):
    import ooc_influence as ooc

    rates = {"gflops": 100.0, "read_rate": 1e9}
    planned = ooc.plan(100, 500, model=wide_model(), memory="8GiB", **rates)["Kronecker basis"]
    assert planned.refusal is None
    assert "1 pass to sum factors" in planned.note
    refused = ooc.plan(100, 500, model=nn.Linear(20_000, 5), memory="8GiB", **rates)["Kronecker basis"]
    assert "second moments of 1 layer, up to 5 x 20001" in refused.refusal

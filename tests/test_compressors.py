"""What dropout is compared with: projections of full gradients, their maps from a seed, stores made with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import Encoder, Mlp, Twice, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture

import ooc_influence as ooc
from ooc_influence import (
    Dropout,
    Gaussian,
    GradientStore,
    Grass,
    Identity,
    LoGra,
    Pca,
    Rademacher,
    Sjlt,
    extract_gradients,
    fit_fisher,
    init_store,
    self_influence,
    top_influential,
)
from ooc_influence import memory as memory_room
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError
from ooc_influence.store import GaussianReduction, LayerShape, LograReduction, RademacherReduction, SjltReduction

pytestmark = pytest.mark.filterwarnings("ignore:.*effective dimension")  # of so few rows
N = 40
P = sum(values.numel() for values in make(Mlp).parameters())
RIVALS = [
    Gaussian(50, 3), Rademacher(50, 3), Sjlt(50, 3), Sjlt(50, 3, nonzeros=4), Grass(30, 3, kept=200),
    Grass(30, 3, nonzeros=3, kept=200), Identity(), Pca(20, pilot=N), LoGra(4, 6, 3), LoGra(5, 100),
]  # fmt: skip


def extract(path, n=N, *, size=8, **options):
    options = {"dtype": "float32", "loss_kind": "cross_entropy"} | options
    return extract_gradients(make(Mlp), loss, batches(*data(Mlp, n), size), path, **options)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Full gradients, (n, p) float64; tests of layers hold them against torch.func."""
    store = extract(tmp_path_factory.mktemp("full") / "s.zarr", compressor=Dropout(k=P))
    return store.rows().astype(np.float64)


def matrix(store):
    """The whole map of a store's full gradients, (p, r): mask and weights, then the blocks of its reduction."""
    places, first = [], 0
    for module in store.mask.modules:
        height, width = module.layer.shape
        places.append(first + module.rows.astype(np.int64) * width + module.cols)
        first += height * width
    kept = np.zeros((P, store.mask.k))
    kept[np.concatenate(places), np.arange(store.mask.k)] = np.concatenate([m.weight for m in store.mask.modules])
    if store.reduction is None:
        return kept
    if isinstance(store.reduction, LograReduction):
        return logra_matrix(store)
    return kept @ np.concatenate([block for _, block in store.reduction.blocks(100)])


def logra_matrix(store):
    """Layer by layer, P_out ⊗ P_in on the layer's flattened gradient."""
    found = np.zeros((sum(module.layer.entries for module in store.mask.modules), store.mask.k))
    first = column = 0
    for number, module in enumerate(store.mask.modules):
        if not len(module.rows):
            first += module.layer.entries
            continue
        sides = (int(module.rows.max()) + 1, int(module.cols.max()) + 1)
        part = np.kron(*(factor.astype(np.float64) for factor in store.reduction.factors(number, module.layer, sides)))
        found[first : first + len(part), column : column + part.shape[1]] = part
        first, column = first + len(part), column + part.shape[1]
    return found


@pytest.mark.parametrize("compressor", RIVALS, ids=repr)
def test_rows_are_full_gradients_times_a_matrix(tmp_path, full, compressor):
    store = extract(tmp_path / "s.zarr", compressor=compressor)
    expected = full @ matrix(store)
    tolerance = 1e-5 * np.abs(expected).max()
    assert_allclose(store.rows(), expected, atol=tolerance)
    assert_allclose(extract(tmp_path / "t.zarr", compressor=compressor, size=7).rows(), expected, atol=tolerance)
    query = extract(tmp_path / "q.zarr", 5, like=store)
    assert_allclose(query.rows(), store.rows(0, 5), atol=tolerance)
    again = GradientStore.open(store.path)
    assert type(compressor).from_dict(again.attrs["compressor"]) == compressor
    assert again.columns_digest == store.columns_digest
    fit_fisher(store)
    rows = store.rows().astype(np.float64)
    fisher = rows.T @ rows / N
    damped = fisher + 0.1 * np.trace(fisher) / min(N, len(fisher)) * np.eye(len(fisher))
    scores = query.rows() @ np.linalg.solve(damped, rows.T)
    found = top_influential(query, store, top=3)
    best = np.sort(scores, axis=1)[:, ::-1][:, :3]
    assert_allclose(found.proponents.scores, best, atol=1e-4 * np.abs(scores).max())
    assert_allclose(self_influence(store), (rows * np.linalg.solve(damped, rows.T).T).sum(1), rtol=1e-3)
    assert store.verify() == []


@pytest.mark.parametrize("compressor", [Sjlt(50, 3), Grass(30, 3, kept=200), Pca(20, pilot=N)], ids=repr)
def test_an_interrupted_run_and_shards_go_on(tmp_path, compressor):
    whole = extract(tmp_path / "whole.zarr", compressor=compressor)
    extract(tmp_path / "s.zarr", 17, compressor=compressor, pilot=batches(*data(Mlp, N), 8))
    assert_allclose(extract(tmp_path / "s.zarr", compressor=compressor).rows(), whole.rows(), atol=1e-6)
    more = {"per_sample_loss": loss, "pilot": batches(*data(Mlp, N), 8), "loss_kind": "cross_entropy"}
    init_store(make(Mlp), tmp_path / "i.zarr", N, compressor=compressor, dtype="float32", **more)
    for number in range(2):
        extract(tmp_path / "i.zarr", compressor=compressor, shard=(number, 2))
    assert_allclose(GradientStore.open(tmp_path / "i.zarr").rows(), whole.rows(), atol=1e-6)


@pytest.mark.parametrize("kind", [GaussianReduction, RademacherReduction, SjltReduction, "sjlt in ranges"])
def test_dot_products_are_kept_without_bias(kind):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2, 1500)) + 0.2
    rows[:, 3] *= 20  # a large entry, where sparse maps vary most
    found = []
    for seed in range(400):
        drawn = SjltReduction(1500, 40, seed, 5) if isinstance(kind, str) else kind(1500, 40, seed)
        reduced = rows @ np.concatenate([block for _, block in drawn.blocks(1)])
        found.append(reduced[0] @ reduced[1])
    assert abs(np.mean(found) - rows[0] @ rows[1]) < 4 * np.std(found) / np.sqrt(len(found))


def test_logra_keeps_dot_products_without_bias():
    layer = LayerShape("a", "linear", (9, 14), True)
    G, H = np.random.default_rng(0).standard_normal((2, 9, 14)) + 0.3
    found = []
    for seed in range(600):
        left, right = LograReduction(20, 20, seed).factors(1, layer, (4, 5))
        found.append(((left.T @ G @ right) * (left.T @ H @ right)).sum())
    assert abs(np.mean(found) - (G * H).sum()) < 4 * np.std(found) / np.sqrt(len(found))


@pytest.mark.filterwarnings("ignore:LoGra leaves out")
@pytest.mark.filterwarnings("ignore:gradients cover")
@pytest.mark.parametrize(
    ("kind", "modules"), [(Encoder, ["encoder.linear1", "encoder.linear2", "last"]), (Twice, None)]
)
def test_logra_of_tokens_and_of_layers_called_twice(tmp_path, kind, modules):
    stores = []
    names = dict(make(kind).named_parameters())
    p = sum(v.numel() for name, v in names.items() if modules is None or name.rsplit(".", 1)[0] in modules)
    for name, compressor in (("full", Dropout(k=p)), ("logra", LoGra(3, 4, 1))):
        stores.append(extract_gradients(make(kind), loss, batches(*data(kind, 12), 5), tmp_path / name,
                                        compressor=compressor, modules=modules, dtype="float32"))  # fmt: skip
    expected = stores[0].rows().astype(np.float64) @ logra_matrix(stores[1])
    assert_allclose(stores[1].rows(), expected, atol=1e-5 * np.abs(expected).max())
    assert stores[1].k < p


@pytest.mark.filterwarnings("ignore:LoGra leaves out")
def test_logra_of_a_model_with_tied_embeddings(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6)
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.inner(self.embed(ids))).mean(1))

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 11, (8, 5))
    inner, everything = (
        extract_gradients(model, loss, batches(ids, ids[:, 0], 4), tmp_path / name, compressor=compressor,
                          modules=modules, dtype="float32")
        for name, compressor, modules in (("inner", Dropout(k=42), ["inner"]), ("all", LoGra(2, 3), None))
    )  # fmt: skip
    assert [module.layer.tied for module in everything.mask.modules] == [("head",), ()]
    expected = inner.rows().astype(np.float64) @ logra_matrix(everything)[-42:]
    assert_allclose(everything.rows(), expected, atol=1e-5 * np.abs(expected).max())


def test_logra_names_what_it_leaves_out(tmp_path):
    linear, other = LayerShape("a", "linear", (4, 5), True), LayerShape("n", "layer_norm", (5, 2), True)
    with pytest.warns(ooc.OocInfluenceWarning, match=r"leaves out 1 layers that are not linear, 33.3% .*: n"):
        mask = LoGra(2, 3).draw([linear, other])
    assert [len(module.rows) for module in mask.modules] == [6, 0]
    with pytest.raises(InputError, match="linear layers for LoGra"):
        LoGra().draw([other])


@pytest.mark.parametrize("nonzeros", [1, 3, 7])
def test_a_sparse_map_has_one_entry_in_each_range(nonzeros):
    drawn = SjltReduction(2500, 30, 1, nonzeros)
    places, signs = (np.concatenate(parts) for parts in zip(*map(drawn.entries, (0, 1024, 2048)), strict=True))
    edges = np.arange(nonzeros + 1) * 30 // nonzeros
    assert ((places >= edges[:-1]) & (places < edges[1:])).all()
    assert_array_equal(np.unique(places), np.arange(30))
    assert_allclose(np.abs(signs), nonzeros**-0.5, rtol=1e-6)
    counts = np.bincount(places[:, 0], minlength=edges[1])[: edges[1]]
    assert (abs(counts - 2500 / edges[1]) < 5 * np.sqrt(2500 / edges[1])).all()
    assert abs(np.sign(signs).mean()) < 5 / np.sqrt(signs.size)
    for first in (0, 1024, 2048):  # blocks do not depend on each other
        assert_array_equal(drawn.block(first), SjltReduction(2500, 30, 1, nonzeros).block(first))


def test_what_differs_is_told(tmp_path):
    stores = [extract(tmp_path / f"{n}.zarr", compressor=each) for n, each in enumerate([*RIVALS, Sjlt(50, 4)])]
    assert len({store.columns_digest for store in stores}) == len(stores)
    fit_fisher(stores[0])
    with pytest.raises(MismatchError):
        top_influential(stores[1], stores[0])


@pytest.mark.parametrize(
    ("make_it", "text"),
    [
        (lambda: Sjlt(5, nonzeros=6), "nonzeros <= k = 5"),
        (lambda: Sjlt(5, nonzeros=0), "nonzeros >= 1"),
        (lambda: Grass(50, kept=49), "kept >= 50"),
        (lambda: Gaussian(0), "k >= 1"),
        (lambda: Pca(0), "r >= 1"),
        (lambda: Gaussian.from_dict({"name": "sjlt", "k": 5}), "settings of Gaussian"),
        (lambda: Sjlt.from_dict({"name": "sjlt", "size": 5}), "settings of Sjlt"),
    ],
)
def test_refusals(make_it, text):
    with pytest.raises(InputError, match=text):
        make_it()


def test_sizes_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"k <= p = {P}"):
        extract(tmp_path / "s.zarr", compressor=Gaussian(P + 1))
    monkeypatch.setattr(memory_room, "available", lambda: 0)
    for compressor in (Gaussian(5), Identity(), Pca(5)):
        with pytest.raises(MemoryBudgetError, match=r"needs .* budget .* use Dropout or Grass"):
            extract(tmp_path / "s.zarr", compressor=compressor)
    extract(tmp_path / "s.zarr", compressor=Grass(5, kept=20))


def test_the_command(tmp_path, run, monkeypatch):  # noqa: F811
    line = "extract --recipe my_recipe.py:recipe --split train --store {}.zarr --compressor {}"
    for number, (text, expected) in enumerate(
        {
            "gaussian --k 30 --seed 2": Gaussian(30, 2),
            "rademacher --k 30": Rademacher(30),
            "sjlt --k 30 --nonzeros 2": Sjlt(30, 0, 2),
            "grass --k 100 --dims 20 --seed 1": Grass(20, 1, 1, 100),
            "pca --dims 10 --pilot 30": Pca(10, 30),
            "identity": Identity(),
            "logra --rank-out 3 --rank-in 5": LoGra(3, 5),
        }.items()
    ):
        code, _, err = run(line.format(number, text))
        assert code == 0, err
        assert GradientStore.open(f"{number}.zarr").attrs["compressor"] == expected.to_dict()
    for text, message in {
        "identity --k 5": "expected no further options with --compressor identity; received --k",
        "gaussian --sampling importance": "expected --k, --seed with --compressor gaussian; received --sampling",
        "dropout --rank-in 2": "--rank-in with --compressor logra",
        "dropout --nonzeros 2": "--nonzeros with --compressor sjlt or grass",
    }.items():
        code, _, err = run(line.format("bad", text))
        assert code == 2
        assert message in err
    assert ooc.Sjlt is Sjlt

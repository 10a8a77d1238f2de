"""Exact re-ranking: EK-FAC of dense float64 gradients on the candidates, from any data, by the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models import Encoder, Mlp, Twice, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture

from ooc_influence import (
    BudgetBatches,
    Dropout,
    GradientStore,
    KroneckerBasis,
    extract_gradients,
    fit_fisher,
    influence_scores,
    init_store,
    rerank,
    top_influential,
)
from ooc_influence.errors import InputError, MemoryBudgetError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:gradients cover")
N, Q = 80, 5
BASIS = {"sampling": "grid", "basis": KroneckerBasis(samples=40)}


def stores(folder, kind=Mlp, *, k=70, dtype="sign", basis=BASIS, **options):
    """A model with its data, a train store, and a query store."""
    model, train, queries = make(kind), batches(*data(kind, N), 16), batches(*data(kind, Q, seed=1), 2)
    compressor = Dropout(k=k, **basis)
    store = extract_gradients(model, loss, train, folder / "t", compressor=compressor, dtype=dtype, **options)
    query = extract_gradients(model, loss, queries, folder / "q", like=store, dtype="float32")
    return model, (queries, train), query, store


def exact(folder, kind=Mlp, basis=BASIS, **options):
    """Scores with every entry kept, which are EK-FAC's (tests/test_kronecker.py)."""
    p = sum(parameter.numel() for parameter in make(kind).parameters() if parameter.requires_grad)
    while True:
        try:
            _, _, query, train = stores(folder, kind, k=p, dtype="float32", basis=basis)
        except InputError as error:  # of other layers than the selected ones
            p = int(str(error).partition("p = ")[2].partition(",")[0])
        else:
            return influence_scores(query, train, curvature="kronecker", **options).compute()


def check(found, scores, top):
    for side, sign in (("proponents", 1), ("opponents", -1)):
        ranking = getattr(found, side)
        order = np.argsort(-sign * scores, axis=1, kind="stable")[:, :top]
        assert_array_equal(ranking.rows, order)
        wanted = np.take_along_axis(scores, order, 1)
        assert_allclose(ranking.scores, wanted, rtol=1e-4, atol=1e-4 * abs(scores).max())


@pytest.mark.parametrize("kind", [Mlp, Encoder, Twice])
@pytest.mark.parametrize("normalize", ["none", "train", "cosine"])
def test_all_candidates_are_in_the_order_of_dense_ekfac(tmp_path, kind, normalize):
    model, samples, query, train = stores(tmp_path, kind)
    (tmp_path / "all").mkdir()
    found = rerank(query, train, model, loss, samples, candidates=N, top=7, normalize=normalize)
    check(found, exact(tmp_path / "all", kind, normalize=normalize), 7)
    first = top_influential(query, train, top=N, curvature="kronecker", normalize=normalize)
    stored = dict(zip(first.proponents.rows[2].tolist(), first.proponents.scores[2].tolist(), strict=True))
    wanted = [stored[row] for row in found.proponents.rows[2].tolist()]
    assert_allclose(found.proponents.stored[2], wanted, rtol=1e-6)
    assert found.settings["rerank"] == {"candidates": N, "damping": 0.03}


def test_a_basis_of_the_whole_model_s_damping_and_sampled_labels(tmp_path):
    basis = {"sampling": "importance", "basis": KroneckerBasis(samples=40, damping_scope="model", labels="sampled")}
    model, samples, query, train = stores(tmp_path, basis=basis)
    (tmp_path / "all").mkdir()
    found = rerank(query, train, model, loss, samples, candidates=N, top=7, damping=0.2)
    check(found, exact(tmp_path / "all", basis=basis, damping=0.2), 7)


def test_only_candidates_are_ranked_again(tmp_path):
    model, samples, query, train = stores(tmp_path, k=40)
    found = rerank(query, train, model, loss, samples, candidates=6, top=6)
    first = top_influential(query, train, top=6, curvature="kronecker")
    for number in range(Q):
        candidates = {*first.proponents.rows[number].tolist(), *first.opponents.rows[number].tolist()}
        assert set(found.proponents.rows[number].tolist()) <= candidates
    assert (np.diff(found.proponents.scores) <= 0).all()
    assert (np.diff(found.opponents.scores) >= 0).all()


def test_kept_factors_and_small_budgets_give_the_same(tmp_path, monkeypatch):
    """Layer by layer, a sample at a time; kept factors are not computed again."""
    model, samples, query, train = stores(tmp_path)
    wanted = rerank(query, train, model, loss, samples, candidates=20, top=5)
    extract_gradients(  # resumed: nothing is missing but the factors
        model, loss, samples[1], tmp_path / "t", compressor=Dropout(k=70, **BASIS), dtype="sign", keep_factors=True
    )
    held = GradientStore.open(tmp_path / "t")
    assert sorted(path.name for path in (tmp_path / "t" / "factors").iterdir()) == ["0", "1", "2"]
    monkeypatch.setattr("ooc_influence.influence.rerank.keep_factors", None)
    monkeypatch.setattr("ooc_influence.memory.WORKING", 0)
    groups = []
    monkeypatch.setattr("ooc_influence.extract.full_basis.FullBasis.mask", watched(groups))
    for entries in (10**6, 450):
        monkeypatch.setattr("ooc_influence.influence.rerank.MemoryBudget.of", budget_of(entries))
        found = rerank(query, held, model, loss, samples, candidates=20, top=5)
        assert_array_equal(found.proponents.rows, wanted.proponents.rows)
        assert_allclose(found.proponents.scores, wanted.proponents.scores, rtol=1e-5)
    assert groups == [[0, 1, 2], [0], [1], [2]]
    monkeypatch.setattr("ooc_influence.influence.rerank.MemoryBudget.of", budget_of(390))
    with pytest.raises(MemoryBudgetError, match="whole gradients of 1 layer, up to 400"):
        rerank(query, held, model, loss, samples, candidates=20, top=5)


def watched(groups):
    from ooc_influence.extract.full_basis import FullBasis

    real = FullBasis.mask

    def mask(self, numbers):
        groups.append(list(numbers))
        return real(self, numbers)

    return mask


def budget_of(entries):
    """A budget for a row of some entries with the queries of these tests, and nothing else."""
    from ooc_influence.memory import MemoryBudget

    return classmethod(lambda cls, memory: MemoryBudget(entries * (40 + 8 * Q + 12), 0))


def test_factors_of_shards_and_after_a_kill(tmp_path, monkeypatch):
    model, (_, train), _, _ = stores(tmp_path)
    compressor = Dropout(k=120, **BASIS)
    how = {"compressor": compressor, "per_sample_loss": loss, "pilot": train, "keep_factors": True}
    calls = []

    def dying(self, mask, *more):
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ooc_influence.extract.full_basis._save", dying)
        with pytest.raises(KeyboardInterrupt):
            extract_gradients(model, loss, train, tmp_path / "k", compressor=compressor, keep_factors=True)
    assert GradientStore.open(tmp_path / "k").n == N  # the rows are there
    extract_gradients(model, loss, train, tmp_path / "k", compressor=compressor, keep_factors=True)
    init_store(model, tmp_path / "s", N, **how)
    for store in (tmp_path / "k", tmp_path / "s"):
        assert sorted(path.name for path in (store / "factors").iterdir()) == ["0", "1", "2"]


def test_every_form_of_data(tmp_path):
    model, samples, query, train = stores(tmp_path, keep_factors=True)
    (x, y), (qx, qy) = data(Mlp, N), data(Mlp, Q, seed=1)
    wanted = rerank(query, train, model, loss, samples, candidates=20, top=5)

    def collate(part):
        return tuple(map(torch.stack, zip(*part, strict=True)))

    items, asked = list(zip(x, y, strict=True)), list(zip(qx, qy, strict=True))
    forms = {
        "budget": [BudgetBatches(part, collate, batch_size=9) for part in (asked, items)],
        "loader": [torch.utils.data.DataLoader(part, batch_size=7) for part in (asked, items)],
        "callable": [lambda first, part=part: iter(part) for part in samples],
    }
    for name, form in forms.items():
        found = rerank(query, train, model, loss, tuple(form), candidates=20, top=5)
        assert_array_equal(found.proponents.rows, wanted.proponents.rows, err_msg=name)
        assert_allclose(found.proponents.scores, wanted.proponents.scores, rtol=1e-4, err_msg=name)


def test_averaged_rows_are_averaged_again(tmp_path):
    paths = []
    for seed in (3, 4):
        torch.save(make(Mlp, seed).state_dict(), tmp_path / f"{seed}.pt")
        paths.append(tmp_path / f"{seed}.pt")
    model, samples, query, train = stores(tmp_path, checkpoints=paths)
    (tmp_path / "all").mkdir()
    p = sum(each.numel() for each in model.parameters())
    _, _, whole_query, whole = stores(tmp_path / "all", k=p, dtype="float32", checkpoints=paths)
    found = rerank(query, train, model, loss, samples, candidates=N, top=5)
    check(found, influence_scores(whole_query, whole, curvature="kronecker").compute(), 5)


def test_dropped_queries_and_a_fitted_curvature(tmp_path):
    model, samples, query, train = stores(tmp_path, dtype="float32")
    sampled = extract_gradients(model, loss, samples[1], tmp_path / "s", like=train, labels="sampled")
    fit_fisher(sampled, prior="kronecker")
    GradientStore.open(query.path, "a").drop([1])
    query = GradientStore.open(query.path)
    wanted = rerank(query, train, model, loss, samples, candidates=N, top=5)
    fitted = rerank(
        query, train, model, loss, samples, candidates=N, top=5, curvature=sampled.path / "curvature/default"
    )
    assert_array_equal(fitted.proponents.rows, wanted.proponents.rows)  # exact scores are of the basis alone
    assert not np.allclose(fitted.proponents.stored[0], wanted.proponents.stored[0])
    assert (wanted.proponents.rows[1] == -1).all()
    assert np.isnan(wanted.proponents.scores[1]).all()


def test_what_cannot_be_ranked_again_is_refused(tmp_path):
    model, samples, query, train = stores(tmp_path)
    plain = extract_gradients(model, loss, samples[1], tmp_path / "p", compressor=Dropout(k=50))
    other = (samples[0], batches(*data(Mlp, N, seed=9), 16))
    fewer = (samples[0], samples[1][:2])
    for message, call in {
        "for a train store in a Kronecker basis": lambda: extract_gradients(
            model, loss, samples[1], tmp_path / "x", compressor=Dropout(k=50), keep_factors=True
        ),
        "which keeps them": lambda: extract_gradients(
            model, loss, samples[1], tmp_path / "x", like=train, keep_factors=True
        ),
        "expected stores in a Kronecker basis": lambda: rerank(plain, plain, model, loss, samples),
        "as many candidates as are listed": lambda: rerank(query, train, model, loss, samples, candidates=3, top=5),
        "one relative damping": lambda: rerank(query, train, model, loss, samples, damping=[0.1, 1]),
        "single queries": lambda: rerank(query, train, model, loss, samples, average_queries=True),
        "expected the model of": lambda: rerank(query, train, make(Mlp, 5), loss, samples),
        "have the losses stored": lambda: rerank(query, train, model, loss, other),
        "expected data with sample": lambda: rerank(query, train, model, loss, fewer),
    }.items():
        with pytest.raises((InputError, MismatchError), match=message):
            call()


def test_the_command_with_a_recipe(run):  # noqa: F811 - the fixture
    line = "extract --recipe my_recipe.py:recipe --store {} --split {}"
    assert run(line.format("t.zarr", "train") + " --k 100 --basis kronecker --dtype sign --keep-factors")[0] == 0
    assert run(line.format("q.zarr", "test") + " --like t.zarr --dtype float32")[0] == 0
    code, out, err = run("top q.zarr t.zarr --rerank 20 --recipe my_recipe.py:recipe --top 3 --json")
    assert code == 0, err
    entry = json.loads(out)["queries"][0]["proponents"][0]
    assert entry.keys() == {"row", "id", "score", "stored_score"}
    code, out, err = run("top q.zarr t.zarr --rerank 20 --recipe my_recipe.py:recipe --top 3")
    assert code == 0, err
    assert "stored" in out
    for extra, message in {
        "--rerank 20": "--model or --recipe with --rerank",
        "--model x": "expected --rerank",
        "--rerank 20 --recipe my_recipe.py:recipe --also q.zarr t.zarr": "--rerank or --also",
        "--rerank 20 --model nowhere": "expected a model at nowhere",
    }.items():
        code, _, err = run(f"top q.zarr t.zarr {extra}")
        assert (code, message in err) == (2, True), err

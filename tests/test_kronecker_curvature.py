"""Curvature of a Kronecker basis, and fits of rows above it, against dense float64 formulas on the stored numbers."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from conftest import roomy
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from test_report import data_of

from ooc_influence import (
    Dropout,
    Eigenbasis,
    GradientStore,
    KroneckerBasis,
    Storage,
    extract_gradients,
    fit_curvature,
    fit_fisher,
    fit_gram,
    group_influence,
    influence_scores,
    module_influence,
    reduce_store,
    self_influence,
    top_influential,
)
from ooc_influence.cli.main import main
from ooc_influence.curvature import Curvature, fit_kronecker, resolve_curvature
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    MismatchError,
    OocInfluenceWarning,
    SingularFisherError,
)
from ooc_influence.report import write_report
from ooc_influence.store import LayerShape, Mask, ModuleBasis, ModuleMask

SHAPES = {"a": (4, 5), "b": (3, 4), "c": (1, 6)}
KEPT = {"a": 12, "b": 12, "c": 0}
K, SAMPLED = 24, {"labels": {"kind": "sampled"}}


def make_mask(seed=0):
    """Three layers, of one of which nothing is kept; Λ spans four orders of magnitude."""
    rng, modules = np.random.default_rng(seed), []
    for name, shape in SHAPES.items():
        entries = shape[0] * shape[1]
        kept = np.sort(rng.choice(entries, KEPT[name], replace=False))
        moments = np.geomspace(1e2, 1e-2, entries)[kept]
        basis = ModuleBasis(None, None, moments, float(np.geomspace(1e2, 1e-2, entries).mean()))
        rows, cols = (index.astype(np.int32) for index in np.divmod(kept, shape[1]))
        weight = rng.uniform(1, 3, len(kept)).astype(np.float32)
        modules.append(ModuleMask(LayerShape(name, "linear", shape, False), rows, cols, weight, basis))
    return Mask(tuple(modules))


MASK = make_mask()
LAYERS = [module for module in MASK.modules if len(module.rows)]
LAMBDA = np.concatenate([module.basis.second_moment for module in LAYERS])
MEANS = np.repeat([module.basis.mean_moment for module in LAYERS], [len(module.rows) for module in LAYERS])
WEIGHT = np.concatenate([module.weight for module in LAYERS]).astype(np.float64)


def make_rows(n, seed=0):
    """Stored rows: of entries with about the second moments Λ, correlated, times their weights."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, K)) + 0.6 * rng.normal(size=(n, 3)) @ np.random.default_rng(9).normal(size=(3, K))
    return (mixed * np.sqrt(LAMBDA) * WEIGHT).astype(np.float32)


def make_store(path, n, seed=0, *, mask=MASK, chunk_rows=16, **attributes):
    storage = Storage(chunk_rows=chunk_rows, group_chunks=2)
    with GradientStore.create(path, mask, dtype="float32", storage=storage, attributes=attributes) as store:
        store.append(make_rows(n, seed), loss=np.linspace(0.1, 2, n))
    return GradientStore.open(path)


@pytest.fixture
def stores(tmp_path):
    return make_store(tmp_path / "query.zarr", 5, 1), make_store(tmp_path / "train.zarr", 90)


def prior_scale(damping=0.03):
    return np.sqrt(LAMBDA + damping * MEANS)


def ekfac(queries, rows, damping):
    return (np.float64(queries) / (LAMBDA + damping * MEANS)) @ np.float64(rows).T


def above_prior(queries, rows, sampled, shrinkage, damping=0.03):
    """z_qᵀ (R̃ᵀR̃/m + λ'I)⁻¹ z_i of whitened rows, λ' = shrinkage · tr/k."""
    queries, rows, sampled = (np.float64(part) / prior_scale(damping) for part in (queries, rows, sampled))
    F = sampled.T @ sampled / len(sampled)
    return queries @ np.linalg.solve(F + shrinkage * np.trace(F) / K * np.eye(K), rows.T)


def close(found, expected, share=1e-5):
    assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("curvature", [None, "kronecker"])
def test_a_basis_is_a_curvature(stores, tmp_path, curvature):
    """Scores of all kinds, at any damping, without any fit."""
    query, train = stores
    q, z = query.rows(), train.rows()
    options = {"curvature": curvature, "memory": roomy()}
    close(influence_scores(query, train, **options).compute(), ekfac(q, z, 0.03))
    dampings = [0.01, 0.3]
    expected = np.array([ekfac(q, z, damping) for damping in dampings])
    own = np.array([np.diag(ekfac(z, z, damping)) for damping in dampings])
    close(influence_scores(query, train, damping=dampings, workers=2, **options).compute(), expected)
    assert_allclose(self_influence(train, damping=dampings, **options), own, rtol=1e-5)
    top = top_influential(query, train, top=4, damping=0.3, normalize="train", **options)
    ranks = np.argsort(-expected[1] / np.sqrt(own[1]), axis=1, kind="stable")
    assert_array_equal(top.proponents.rows, ranks[:, :4])
    assert top.damping == pytest.approx(0.3 * MEANS.mean())
    labels = np.arange(90) % 3
    sums = group_influence(query, train, labels, damping=0.01, **options).sums
    close(sums, np.stack([expected[0][:, labels == label].sum(1) for label in range(3)], axis=1))
    modules = module_influence(query, train, damping=0.3, out=tmp_path / "modules.zarr", **options)
    for name, part in (("a", slice(0, 12)), ("b", slice(12, 24))):
        each = (np.float64(q) / (LAMBDA + 0.3 * MEANS))[:, part] @ np.float64(z[:, part]).T
        close(modules[modules.attrs["modules"].index(name)], each)
    both = influence_scores([query, query], [train, train], damping=0.3, curvature=["kronecker", curvature])
    close(both.compute(), expected[1])
    absolute = (np.float64(q) / (LAMBDA + 0.5)) @ np.float64(z).T
    close(influence_scores(query, train, damping=0.5, damping_mode="absolute", **options).compute(), absolute)


@pytest.mark.filterwarnings("ignore:the rows of")  # they have no ids
def test_margins_of_checkpoints(tmp_path):
    """Each checkpoint's own basis curvature; margins and errors are averaged each by itself."""
    losses = {"loss_kind": "cross_entropy"}
    trains = [make_store(tmp_path / f"train{seed}", 90, seed, **losses) for seed in (0, 2)]
    queries = [make_store(tmp_path / f"query{seed}", 5, seed, **losses) for seed in (1, 3)]
    found = influence_scores(queries, trains, curvature="kronecker", combine="margins", memory=roomy()).compute()
    plain = [ekfac(query.rows(), train.rows(), 0.03) for query, train in zip(queries, trains, strict=True)]
    close(found, np.mean(plain, axis=0))  # of equal errors, the margins' mean is that of the scores
    assert np.abs(plain[0] - plain[1]).max() > 0.1 * np.abs(found).max()
    with GradientStore.open(trains[1].path, "a") as store:
        store.append(make_rows(1, 5), loss=[0.5])
    with GradientStore.open(trains[0].path, "a") as store:
        store.append(make_rows(1, 6), loss=[0.01])
    options = {"curvature": "kronecker", "combine": "margins", "memory": roomy()}
    found = influence_scores(queries, [train.path for train in trains], **options).compute()[:, -1]
    errors = 1 - np.exp(-np.array([0.01, 0.5]))
    last = [ekfac(query.rows(), make_rows(1, seed), 0.03)[:, 0] for query, seed in zip(queries, (6, 5), strict=True)]
    close(found, np.mean([each / error for each, error in zip(last, errors, strict=True)], 0) * errors.mean())


def test_the_prior_itself(stores, tmp_path):
    train = stores[1]
    prior = resolve_curvature(train, "kronecker")
    assert (prior.kind, prior.d, prior.damping) == ("kronecker", K, 0.03)
    assert_array_equal(prior.eigenvalues, LAMBDA)
    lambdas = prior.lambdas(0.2)
    assert_allclose(lambdas, [[0.2 * MEANS[0], 0.2 * MEANS[-1]]])
    damped = LAMBDA + 0.2 * MEANS
    again = pickle.loads(pickle.dumps(prior))
    assert_allclose(again.precondition(np.eye(K), lambdas)[0], np.diag(1 / damped))
    assert again.__dask_tokenize__() == prior.__dask_tokenize__()
    assert_allclose(prior.effective_dimension(lambdas[0]), (LAMBDA / damped).sum())
    assert_allclose(prior.fisher(), np.diag(LAMBDA))
    assert json.dumps(prior.facts())
    assert "kronecker" in repr(prior)
    with GradientStore.open(train.path, "a") as store:  # it is of no rows: never stale
        store.drop([1])
        store.append(make_rows(3, 8), loss=np.ones(3))
    self_influence(GradientStore.open(train.path), curvature=prior)
    other = make_store(tmp_path / "like.zarr", 4, 3)
    self_influence(other, curvature=prior)
    named = make_store(tmp_path / "named.zarr", 4, 3, compressor={"basis": {"damping": 0.1, "samples": 64}})
    assert (resolve_curvature(named, None).damping, resolve_curvature(named, None).rows) == (0.1, 64)
    stranger = make_store(tmp_path / "other.zarr", 4, 3, mask=make_mask(1))
    with pytest.raises(MismatchError):
        self_influence(stranger, curvature=prior)


def test_dead_entries(tmp_path):
    """A layer without any moment is damped like the others; λ = 0 is refused."""
    first, *others = MASK.modules
    dead = ModuleBasis(None, None, np.zeros(len(first.rows)), 0.0)
    mask = Mask((ModuleMask(first.layer, first.rows, first.cols, first.weight, dead), *others))
    train = make_store(tmp_path / "t.zarr", 20, mask=mask)
    prior = resolve_curvature(train, "kronecker")
    assert_allclose(prior.lambdas(0.1), [[0.05 * MEANS[-1], 0.1 * MEANS[-1]]])
    assert_allclose(prior.outside_share(np.eye(K)), [1] * 12 + [0] * 12)
    with pytest.raises(SingularFisherError):
        self_influence(train, curvature=prior, damping=0.0)
    sampled = make_store(tmp_path / "s.zarr", 20, mask=mask, **SAMPLED)
    assert np.isfinite(self_influence(train, curvature=fit_fisher(sampled, prior="kronecker"))).all()


@pytest.mark.parametrize("workers", [1, 3])
def test_moments_measured_again(stores, tmp_path, workers):
    query, train = stores
    found = fit_kronecker(train, workers=workers, memory=roomy())
    moments = np.square(np.float64(train.rows())).mean(0) / WEIGHT**2
    assert (found.kind, found.rows) == ("kronecker", 90)
    assert_allclose(found.eigenvalues, moments, rtol=1e-6)
    means = []
    for part, mean in ((slice(0, 12), MEANS[0]), (slice(12, 24), MEANS[-1])):
        squares = WEIGHT[part] ** 2
        means.append(mean * (squares @ moments[part]) / (squares @ LAMBDA[part]))
    assert_allclose(found.lambdas(1.0), [means], rtol=1e-6)
    expected = (np.float64(query.rows()) / (moments + 0.03 * np.repeat(means, 12))) @ np.float64(train.rows()).T
    close(influence_scores(query, train).compute(), expected)  # the fitted one, now that there is one
    again = pickle.loads(pickle.dumps(found))
    assert_array_equal(again.eigenvalues, found.eigenvalues)
    assert fit_kronecker(train).attrs["fit"] == found.attrs["fit"]
    with GradientStore.open(train.path, "a") as store:
        store.drop([3, 60])
        store.append(make_rows(20, 5), loss=np.ones(20))
    now = GradientStore.open(train.path)
    updated = fit_kronecker(now)
    live = np.delete(np.float64(now.rows()), [3, 60], axis=0)
    assert_allclose(updated.eigenvalues, np.square(live).mean(0) / WEIGHT**2, rtol=1e-6)
    assert updated.attrs["taken"] > 0  # by subtraction
    elsewhere = make_store(tmp_path / "sampled.zarr", 30, 7, **SAMPLED)
    moments = np.square(np.float64(elsewhere.rows())).mean(0) / WEIGHT**2
    other = fit_kronecker(elsewhere)
    assert_allclose(other.precondition(np.eye(K), [[1.0, 2.0]])[0], np.diag(1 / (moments + np.repeat([1.0, 2.0], 12))),
                    rtol=1e-6)  # fmt: skip
    self_influence(now, curvature=other)
    self_influence(now, curvature=str(other.path))


def test_one_damping_for_the_whole_model(tmp_path):
    """With the scope "model" a fit keeps one λ for all layers, of the energy of all of them."""
    modules = [replace(each, basis=replace(each.basis, mean_moment=5.0)) for each in MASK.modules]
    basis = {"name": "dropout", "k": K, "basis": {"samples": 9, "damping": 0.3, "damping_scope": "model"}}
    train = make_store(tmp_path / "train.zarr", 40, mask=replace(MASK, modules=tuple(modules)), compressor=basis)
    rows = np.float64(train.rows())
    close(influence_scores(train, train, memory=roomy()).compute(), (rows / (LAMBDA + 0.3 * 5)) @ rows.T)
    moments = np.square(rows).mean(0) / WEIGHT**2
    mean = 5 * (WEIGHT**2 @ moments) / (WEIGHT**2 @ LAMBDA)
    assert_allclose(fit_kronecker(train).lambdas(1.0), [[mean, mean]], rtol=1e-6)


def test_lists_have_a_default_damping_of_their_own(tmp_path):
    """Where the basis has one: in lists, in settings and in reports; scores and dampings that are given keep theirs."""
    basis = {"name": "dropout", "k": K, "basis": {"samples": 9, "damping": 0.3, "list_damping": 40.0}}
    train = make_store(tmp_path / "train.zarr", 30, compressor=basis)
    fit_kronecker(train)
    for curvature in ("kronecker", "default"):
        found = resolve_curvature(train, curvature)
        assert (found.damping, found.list_damping) == (0.3, 40.0)
        options = {"curvature": curvature, "memory": roomy()}
        lists = top_influential(train, train, top=3, **options)
        assert lists.settings["damping"] == 40.0
        asked = top_influential(train, train, top=3, damping=40.0, **options)
        assert_array_equal(lists.proponents.scores, asked.proponents.scores)
        assert top_influential(train, train, top=3, damping=0.3, **options).settings["damping"] == 0.3
        own, given = (influence_scores(train, train, **how, **options).compute() for how in ({}, {"damping": 0.3}))
        assert_array_equal(own, given)
    page = write_report(train, tmp_path / "report", train, memory=roomy())
    index = data_of(page, "index")
    assert index["settings"]["damping"] == 40.0
    marked = resolve_curvature(train, None).damping_value(40.0)
    assert_allclose([index["settings"]["lambda"], index["spectrum"]["lambda"]], marked, rtol=1e-4)


def test_all_entries_kept_and_measured_on_all_rows_are_ekfac(tmp_path):
    """Means are those of Λ where nothing is left out."""
    layer = LayerShape("fc", "linear", (3, 4), False)
    index = [part.ravel().astype(np.int32) for part in np.indices((3, 4))]
    basis = ModuleBasis(None, None, np.full(12, 7.0), 7.0)
    mask = Mask((ModuleMask(layer, *index, np.ones(12, np.float32), basis),))
    rows = np.random.default_rng(0).normal(size=(50, 12)) * np.linspace(0.1, 3, 12)
    with GradientStore.create(tmp_path / "t.zarr", mask, dtype="float32") as store:
        store.append(rows.astype(np.float32), loss=np.zeros(50))
    train = GradientStore.open(tmp_path / "t.zarr")
    z = np.float64(train.rows())
    moments = np.square(z).mean(0)
    fit_kronecker(train)
    expected = (np.square(z) / (moments + 0.1 * moments.mean())).sum(1)
    assert_allclose(self_influence(train, damping=0.1), expected, rtol=1e-5)


@pytest.fixture
def sampled(tmp_path):
    return make_store(tmp_path / "sampled.zarr", 60, 4, **SAMPLED)


@pytest.mark.parametrize("method", ["primal", "dual"])
@pytest.mark.parametrize("workers", [1, 3])
def test_rows_above_the_prior(stores, sampled, method, workers):
    query, train = stores
    q, z, r = query.rows(), train.rows(), sampled.rows()
    options = {"workers": workers, "memory": roomy()}
    found = fit_curvature(sampled, method=method, prior="kronecker", name="mix", **options)
    assert found.kind == {"primal": "whole", "dual": "gram"}[method]
    assert_allclose(found.column_scale, prior_scale(), rtol=1e-12)
    assert (found.damping, found.attrs["prior"]["damping"]) == (20, 0.03)
    close(influence_scores(query, train, curvature=found, **options).compute(), above_prior(q, z, r, 20))
    dampings = [0.5, 1e3]
    expected = np.array([above_prior(q, z, r, each) for each in dampings])
    mixed = Curvature.open(found.path)
    close(influence_scores(query, train, curvature=mixed, damping=dampings, **options).compute(), expected)
    own = [np.diag(above_prior(z, z, r, each)) for each in dampings]
    assert_allclose(self_influence(train, curvature=mixed, damping=dampings, **options), own, rtol=2e-5)
    top = top_influential(query, train, top=3, curvature=pickle.loads(pickle.dumps(mixed)), **options)
    assert_array_equal(top.proponents.rows, np.argsort(-above_prior(q, z, r, 20), axis=1)[:, :3])
    assert_allclose(top.outside_share, 0)
    plain = np.float64(r).T @ np.float64(r) / len(r)
    close(found.fisher(), plain)
    other = fit_curvature(sampled, method=method, prior="kronecker", prior_damping=0.3, shrinkage=5, name="mix")
    assert other.attrs["fit"] != found.attrs["fit"]
    close(influence_scores(query, train, curvature=other).compute(), above_prior(q, z, r, 5, 0.3))


def test_the_ends_of_shrinkage(stores, sampled):
    """Much: the order of the prior alone; none: that of the rows alone."""
    query, train = stores
    q, z, r = query.rows(), train.rows(), np.float64(sampled.rows())
    found = fit_fisher(sampled, prior="kronecker")
    many = influence_scores(query, train, curvature=found, damping=1e9).compute()
    expected = ekfac(q, z, 0.03)
    close(many / np.abs(many).max(), expected / np.abs(expected).max())
    few = influence_scores(query, train, curvature=found, damping=1e-9).compute()
    close(few, np.float64(q) @ np.linalg.solve(r.T @ r / len(r), np.float64(z).T), 1e-4)


@pytest.mark.parametrize("more", [{"rank": 6}, {"blocks": "module"}, {"blocks": "diagonal"}])
def test_other_kinds_above_the_prior(stores, sampled, more):
    query, train = stores
    found = fit_fisher(sampled, prior="kronecker", **more)
    q, z, r = (np.float64(part) / prior_scale() for part in (query.rows(), train.rows(), sampled.rows()))
    F = r.T @ r / len(r)
    mean = np.full(K, np.trace(F) / K)
    if "rank" in more:
        e, V = np.linalg.eigh(F)
        F = (V[:, -6:] * e[-6:]) @ V[:, -6:].T
        F += e[:-6].mean() * (np.eye(K) - V[:, -6:] @ V[:, -6:].T)
    elif more["blocks"] == "module":
        F[:12, 12:] = F[12:, :12] = 0
        mean = np.repeat([np.trace(F[:12, :12]) / 12, np.trace(F[12:, 12:]) / 12], 12)
    else:
        F = np.diag(np.diag(F))
    expected = q @ np.linalg.solve(F + np.diag(20 * mean), z.T)
    close(influence_scores(query, train, curvature=found).compute(), expected, 1e-4)


def test_the_division_of_the_work_changes_nothing(sampled, tmp_path, monkeypatch):
    whole = fit_fisher(sampled, prior="kronecker", weights=np.linspace(0, 2, 60))
    others = make_store(tmp_path / "other.zarr", 60, 4, chunk_rows=7, **SAMPLED)
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**9)
    for device in (None, "cpu"):
        found = fit_fisher(
            others, prior="kronecker", weights=np.linspace(0, 2, 60), workers=2, device=device, refit=True
        )
        close(found.fisher(), whole.fisher(), 1e-6)
        assert_allclose(found.lambdas(), whole.lambdas(), rtol=1e-6)


def test_appended_and_dropped_rows_are_whitened_too(sampled):
    fit_fisher(sampled, prior="kronecker")
    with GradientStore.open(sampled.path, "a") as store:
        store.drop([2, 3])
        store.append(make_rows(9, 11), loss=np.ones(9))
    now = GradientStore.open(sampled.path)
    found = fit_fisher(now, prior="kronecker")
    assert found.attrs["taken"] > 0
    live = np.delete(np.float64(now.rows()), [2, 3], axis=0)
    close(found.fisher(), live.T @ live / len(live), 1e-6)
    plain = fit_fisher(now)  # another prior is another fit
    assert not plain.has_prior
    close(plain.fisher(), live.T @ live / len(live), 1e-6)


def test_a_prior_that_was_measured(stores, sampled):
    query, train = stores
    prior = fit_kronecker(train)
    found = fit_fisher(sampled, prior=prior, prior_damping=0.1)
    assert_allclose(found.column_scale, np.sqrt(prior.eigenvalues + np.repeat(prior.lambdas(0.1)[0], 12)))
    assert np.isfinite(influence_scores(query, train, curvature=found).compute()).all()


def test_what_a_fit_takes_by_itself(stores, sampled, caplog):
    """Of a Kronecker basis its moments, of sampled labels the rows above them; the quicker method of both."""
    caplog.set_level("INFO", "ooc_influence")
    found = fit_curvature(stores[1])
    assert (found.kind, found.path.name) == ("kronecker", "default")
    assert "needs no fit" in caplog.text
    mixed = fit_curvature(sampled)
    assert mixed.has_prior
    assert (mixed.kind, mixed.path.name) == ("whole", "default")
    few = fit_curvature(sampled, rows=(0, 10), name="few")
    assert (few.kind, few.has_prior) == ("gram", True)
    assert fit_fisher(sampled, prior="kronecker", rows=(0, 10), name="same").kind == "gram"
    assert fit_curvature(sampled, method="primal", name="rows").has_prior is False


def test_rows_of_the_datasets_labels_are_warned_of(stores):
    with pytest.warns(OocInfluenceWarning, match="labels='sampled'"):
        fit_fisher(stores[1], prior="kronecker")


def test_refusals(stores, sampled, tmp_path):
    train = stores[1]
    with pytest.raises(InputError, match="prior='kronecker' with"):
        fit_fisher(sampled, shrinkage=3)
    for wrong in (0, -1, float("inf")):
        with pytest.raises(InputError, match="> 0"):
            fit_fisher(sampled, prior="kronecker", shrinkage=wrong)
        with pytest.raises(InputError, match="> 0"):
            fit_fisher(sampled, prior="kronecker", prior_damping=wrong)
    fit_gram(train, name="rows")
    with pytest.raises(InputError, match="of kind 'gram'"):
        fit_fisher(train, prior="rows")
    with pytest.raises(InputError, match="another name than 'kronecker'"):
        fit_kronecker(train, name="kronecker")
    with pytest.raises(InputError, match="leave one of them out"):
        fit_curvature(train, method="kronecker", rank=3)
    plain = make_store(tmp_path / "plain.zarr", 6, mask=Mask(tuple(
        ModuleMask(module.layer, module.rows, module.cols, module.weight) for module in MASK.modules)))  # fmt: skip
    with pytest.raises(InputError, match="Kronecker basis"):
        fit_kronecker(plain)
    with pytest.raises(CurvatureNotFoundError):
        self_influence(plain)
    with pytest.raises(CurvatureNotFoundError):
        self_influence(plain, curvature="kronecker")


def test_the_command(stores, sampled, capsys):
    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert stopped.value.code == 0, err
        return out

    facts = json.loads(run("fisher", stores[1].path, "--json"))
    assert (facts["kind"], facts["method"], facts["damping"]) == ("kronecker", "kronecker", 0.03)
    assert "--curvature kronecker" in run("fisher", stores[1].path, "--method", "kronecker", "--name", "again")
    facts = json.loads(run("fisher", sampled.path, "--prior", "kronecker", "--shrinkage", "8", "--json"))
    assert (facts["damping"], facts["prior"]["shrinkage"], facts["method"]) == (8, 8, "primal")
    out = run("self-influence", stores[1].path, "--curvature", sampled.path / "curvature" / "default", "--damping", "1")
    assert out
    out = run("self-influence", stores[1].path, "--curvature", "kronecker", "--damping", "0.01", "--damping", "1")
    assert out


@pytest.fixture
def reduced(stores, tmp_path):
    """Query and train store in the top 10 directions of whitened columns."""
    query, train = stores
    few = reduce_store(train, tmp_path / "few.zarr", 10, dtype="float32", memory=roomy())
    return reduce_store(query, tmp_path / "few-query.zarr", like=few, dtype="float32", memory=roomy()), few


def test_a_reduction_is_of_whitened_columns(stores, reduced):
    """Plain products of stored numbers are the prior's scores in the span of the directions kept."""
    z, q = (np.float64(part.rows()) / prior_scale() for part in reversed(stores))
    e, V = np.linalg.eigh(z.T @ z / len(z))
    V, e = V[:, ::-1][:, :10], e[::-1]
    query, train = reduced
    facts = train.attrs["reduction"]
    assert facts["whitened"] == 0.03
    assert facts["left_out"] == pytest.approx(1 - e[:10].sum() / e.sum(), rel=1e-4)
    assert train.attrs["measured"]["left_out"] == pytest.approx(facts["left_out"], rel=1e-4)
    assert_allclose(train.grad_norm, np.linalg.norm(z, axis=1), rtol=1e-5)
    expected = q @ V @ V.T @ z.T
    close(influence_scores(query, train, curvature="kronecker", memory=roomy()).compute(), expected)
    close(influence_scores(query, train, memory=roomy()).compute(), expected)
    close(influence_scores(query, train, curvature=False).compute(), expected)
    assert_allclose(self_influence(train), np.square(z @ V).sum(1), rtol=1e-5)
    with pytest.raises(InputError, match="no damping with rows that were whitened"):
        self_influence(train, curvature="kronecker", damping=0.1)
    assert fit_curvature(train).kind == "kronecker"  # which is there without a fit
    assert not (train.path / "curvature" / "default").exists()
    with pytest.raises(InputError, match="columns are reduced"):
        fit_kronecker(train)


def test_rows_above_the_prior_in_reduced_columns(reduced, sampled, tmp_path):
    query, train = reduced
    few = reduce_store(sampled, tmp_path / "few-sampled.zarr", like=train, dtype="float32", memory=roomy())
    q, z, r = (np.float64(part.rows()) for part in (query, train, few))
    F = r.T @ r / len(r)
    expected = q @ np.linalg.solve(F + 20 * np.trace(F) / 10 * np.eye(10), z.T)
    with GradientStore.open(few.path, "a") as store:
        store.record(**SAMPLED)
    found = fit_curvature(GradientStore.open(few.path))
    assert found.has_prior
    close(influence_scores(query, train, curvature=found).compute(), expected)
    with pytest.raises(InputError, match="no prior_damping"):
        fit_fisher(GradientStore.open(few.path), prior="kronecker", prior_damping=0.1)


def test_a_reduction_of_whitened_columns_is_rotated(stores, tmp_path):
    options = {"dtype": "float32", "memory": roomy()}
    train = reduce_store(stores[1], tmp_path / "few.zarr", 10, rows=30, **options)
    query = reduce_store(stores[0], tmp_path / "few-query.zarr", like=train, **options)
    turned = reduce_store(train, tmp_path / "turned.zarr", rotate=True, **options)
    asked = reduce_store(query, tmp_path / "asked.zarr", like=turned, **options)
    spectrum = np.square(np.float64(turned.rows())).sum(0)
    assert (np.diff(spectrum) < 0).all()
    assert turned.attrs["reduction"]["whitened"] == 0.03
    expected = influence_scores(query, train, curvature="kronecker").compute()
    close(influence_scores(asked, turned, curvature="kronecker").compute(), expected)
    wide = reduce_store(stores[0], tmp_path / "wide.zarr", like=turned, **options)
    close(influence_scores(wide, turned, curvature="kronecker").compute(), expected)


def test_extraction_reduces_whitened_rows(tmp_path):
    """Rows of a model: the reduced ones are the wide ones times the basis, norms and energies whitened ones."""
    model, samples = make(Mlp), batches(*data(Mlp, 60), 16)
    basis = KroneckerBasis(samples=40, damping=0.1)
    wide = extract_gradients(
        model, loss, samples, tmp_path / "wide.zarr", compressor=Dropout(k=70, basis=basis), dtype="float32"
    )
    compressor = Dropout(k=70, basis=basis, reduce=Eigenbasis(9, pilot=50))
    few = extract_gradients(model, loss, samples, tmp_path / "few.zarr", compressor=compressor, dtype="float32")
    assert few.mask_digest == wide.mask_digest
    assert few.attrs["reduction"]["whitened"] == 0.1
    close(few.rows(), wide.rows() @ few.reduction.vectors)
    prior = resolve_curvature(wide, None)
    whitened = np.float64(wide.rows()) / np.sqrt(1 / np.diag(prior.precondition(np.eye(wide.k), prior.lambdas())[0]))
    assert_allclose(few.grad_norm, np.linalg.norm(whitened, axis=1), rtol=1e-5)
    kept = np.square(np.float64(few.rows())).sum() / np.square(whitened).sum()
    assert few.attrs["measured"]["left_out"] == pytest.approx(1 - kept, rel=1e-4)
    assert kept > 0.5
    close(influence_scores(few, few).compute(), np.float64(few.rows()) @ np.float64(few.rows()).T)


def test_reports_and_info(stores, reduced, tmp_path, capsys):
    for number, (query, train) in enumerate((stores, reduced)):
        write_report(train, tmp_path / f"r{number}", queries=query, suspects=5)
        spectrum = data_of(tmp_path / f"r{number}", "index")["spectrum"]
        assert spectrum["facts"]["kind"] == "kronecker"
        assert len(spectrum["curve"]) > 10
        with pytest.raises(SystemExit):
            main(["info", str(train.path), "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert facts["curvature"] == {"kronecker": "of the basis itself, without a fit"}

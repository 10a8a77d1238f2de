"""Errors of compressed influence against their bounds, over many draws."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import block_diag

from ooc_influence import Dropout
from ooc_influence.compress import variance_factors
from ooc_influence.errors import InputError
from ooc_influence.evaluate import ExactInfluence, reduction_bounds
from ooc_influence.store import GaussianReduction, LayerShape, PilotMoments, RademacherReduction, SjltReduction

LAYERS = [LayerShape("a", "linear", (5, 7), True), LayerShape("b", "linear", (3, 4), False)]
P, N, K, VALUE, SEEDS = 47, 20, 12, 0.3, 400


def gradients():
    """Rows and queries whose coordinates differ in size, as the pilot of importance sampling saw it."""
    generator = np.random.default_rng(0)
    sides = [generator.uniform(0.1, 2, size) for size in (5, 7, 3, 4)]
    scale = np.concatenate([np.outer(sides[0], sides[1]).ravel(), np.outer(sides[2], sides[3]).ravel()])
    rows = generator.normal(size=(N + 3, P)) * scale
    pilot = [PilotMoments(0, sides[0] ** 2, sides[1] ** 2), PilotMoments(1, sides[2] ** 2, sides[3] ** 2)]
    return ExactInfluence(rows[:N], rows[N:]), pilot


def matrices(name, pilot):
    """Yield S of many draws, (K, P), with the bounds of its mask."""
    maps = {"gaussian": GaussianReduction, "rademacher": RademacherReduction, "sjlt": SjltReduction}
    for seed in range(SEEDS):
        if name in maps:
            yield maps[name](P, K, seed).block(0).T.astype(np.float64)
            continue
        mask = Dropout(k=K, sampling=name, seed=seed).draw(LAYERS, pilot)
        yield oracle.keep(np.eye(P), mask).T


def bounds(name, exact, pilot, seed=0):
    if name in ("uniform", "importance"):
        dropout = Dropout(k=K, sampling=name, seed=seed)
        return exact.dropout_bounds(variance_factors(dropout, LAYERS, pilot), VALUE)
    return exact.projection_bounds(K, VALUE)


def test_exact_influence_is_that_of_the_oracle():
    exact, _ = gradients()
    assert_allclose(exact.scores(VALUE), oracle.scores(exact.queries, exact.gradients, VALUE), rtol=1e-9)
    damped = oracle.fisher(exact.gradients) + VALUE * np.eye(P)
    assert_allclose(exact.products(VALUE), np.linalg.solve(damped, exact.queries.T).T, rtol=1e-8)
    assert exact.trace == pytest.approx(np.trace(oracle.fisher(exact.gradients)))


@pytest.mark.parametrize("name", ["uniform", "importance", "gaussian", "rademacher", "sjlt"])
def test_mean_squared_errors_stay_within_the_bounds(name):
    """Means over 400 draws, within 4 standard errors; and the bounds are not idle: at least half is reached."""
    exact, pilot = gradients()
    X, v = exact.gradients, exact.products(VALUE)
    sums, errors, scores, products = [], [], [], []
    for S in matrices(name, pilot):
        E = S.T @ S - np.eye(P)
        sums.append(np.square(X @ E @ v.T).sum(0))
        errors.append(np.square(X @ E @ X.T).sum())
        found = exact.measure(lambda rows, S=S: rows @ S.T, VALUE)
        root = np.sqrt(sums[-1])
        exact_scores, size = np.linalg.norm(exact.scores(VALUE), axis=1), np.linalg.norm(v, axis=1)
        assert (found.scores * exact_scores <= root * (1 + 1e-9)).all()  # for each draw, whatever it is
        assert (found.ihvp * size <= root / (2 * np.sqrt(N * VALUE)) * (1 + 1e-9)).all()
        assert found.fisher == pytest.approx(np.sqrt(errors[-1]) / N / np.linalg.norm(exact.kernel))
        scores.append(np.square(found.scores))
        products.append(np.square(found.ihvp))
    limit = bounds(name, exact, pilot)
    eta = np.square(limit.scores * exact_scores)
    kernel = np.square(limit.fisher * np.linalg.norm(exact.kernel) * N)
    for measured, bound in ((np.array(sums), eta), (np.array(errors), kernel)):
        mean, error = measured.mean(0), measured.std(0) / np.sqrt(SEEDS)
        assert (mean <= bound + 4 * error).all()
        assert (mean >= 0.5 * bound - 4 * error).all()
    if name == "gaussian":
        assert (np.abs(np.array(sums).mean(0) - eta) < 4 * np.array(sums).std(0) / np.sqrt(SEEDS)).all()
    assert (np.sqrt(np.mean(scores, 0)) <= limit.scores).all()
    assert (np.sqrt(np.mean(products, 0)) <= limit.ihvp).all()


def rotated_gradients(n):
    """Gradients of two layers, sums of outer products, in the eigenvectors of their factors; and the pilot's moments.

    Returns U, (P, P), the rotated rows, (n, P), and the moments.
    """
    generator, bases, rows, moments = np.random.default_rng(3), [], [], []
    for number, (height, width) in enumerate(layer.shape for layer in LAYERS):
        mixing = [generator.normal(size=(size, size)) * 1.8 ** -np.arange(size) for size in (height, width)]
        delta, x = (generator.normal(size=(n, 3, len(each))) @ each.T for each in mixing)
        values, vectors = zip(
            *(np.linalg.eigh(np.einsum("nti,ntj->ij", a, a) / (3 * n)) for a in (delta, x)), strict=True
        )
        moments.append(PilotMoments(number, 3 * values[0], values[1]))
        bases.append(np.kron(vectors[0], vectors[1]))
        rows.append(np.einsum("nti,ntj->nij", delta, x).reshape(n, -1) @ bases[-1])
    return block_diag(*bases), np.concatenate(rows, 1), moments


@pytest.mark.parametrize("sampling", ["importance", "grid"])
def test_entries_in_a_rotated_basis(sampling):
    """The identities are those of any compression; EK-FAC's scores are unbiased, and off by η."""
    U, rotated, moments = rotated_gradients(N + 3)
    X, queries = rotated[:N], rotated[N:]
    exact, plain = ExactInfluence(X, queries), ExactInfluence(X @ U.T, queries @ U.T)
    assert_allclose(exact.scores(VALUE), plain.scores(VALUE), rtol=1e-9)
    assert_allclose(exact.products(VALUE) @ U.T, plain.products(VALUE), rtol=1e-7, atol=1e-12)
    second_moment = np.square(X).mean(0) + VALUE
    of_prior, v = (queries / second_moment) @ X.T, exact.products(VALUE)
    chance, sums, squares = np.full(P, np.nan), [], []
    for seed in range(2 * SEEDS):
        S = oracle.keep(np.eye(P), Dropout(k=K, sampling=sampling, seed=seed, basis="kronecker").draw(LAYERS, moments))
        scale = np.square(S).sum(1)
        chance[scale > 0] = 1 / scale[scale > 0]
        eta = (v * (scale - 1)) @ X.T
        found = exact.measure(lambda rows, S=S: rows @ S, VALUE)
        assert (found.scores * np.linalg.norm(exact.scores(VALUE), axis=1) <= np.linalg.norm(eta, axis=1) + 1e-9).all()
        stored = (queries / second_moment) @ S @ (X @ S).T
        assert_allclose(stored - of_prior, ((queries / second_moment) * (scale - 1)) @ X.T, atol=1e-9)
        sums.append(stored)
        squares.append(np.square(eta).sum(1))
    error = np.std(sums, 0) / np.sqrt(len(sums))
    assert (np.abs(np.mean(sums, 0) - of_prior) < 5 * error + 1e-9).all()
    independent = np.square(v) @ (np.nan_to_num(1 / chance - 1) * exact.energies)
    assert ((np.mean(squares, 0) > 0.6 * independent) & (np.mean(squares, 0) < 1.3 * independent)).all()


def test_a_reduction_adds_what_it_leaves_out():
    exact, pilot = gradients()
    for seed in range(20):
        dropout = Dropout(k=30, sampling="importance", seed=seed)
        S = oracle.keep(np.eye(P), dropout.draw(LAYERS, pilot)).T
        rows, queries = exact.gradients @ S.T, exact.queries @ S.T
        V = np.linalg.eigh(rows.T @ rows)[1][:, ::-1]
        wide = exact.measure(lambda part, S=S: part @ S.T, VALUE)
        for r in (4, 12, N):
            found = exact.measure(lambda part, S=S, V=V, r=r: part @ S.T @ V[:, :r], VALUE)
            limit = reduction_bounds(rows, queries, wide, exact, r, VALUE)  # beyond the mask's own, measured
            for name in ("fisher", "ihvp", "scores"):
                assert np.all(getattr(found, name) <= getattr(limit, name) * (1 + 1e-9)), name
        assert_allclose(found.scores, wide.scores)


def test_which_gradients_dropout_suits():
    """Equal energies: below the Gaussian bound; a few coordinates with all of it: far above, unless drawn by it."""
    generator = np.random.default_rng(1)
    even = np.sign(generator.normal(size=(N, P)))
    few = even * np.where(np.arange(P) < 3, 5.0, 0.01)
    for rows, better in ((even, True), (few, False)):
        exact = ExactInfluence(rows, rows[:2])
        rank = exact.trace**2 / np.square(exact.kernel).sum()
        uniform = exact.dropout_bounds(variance_factors(Dropout(k=K), LAYERS), VALUE).fisher
        gaussian = exact.projection_bounds(K, VALUE).fisher
        assert (uniform < gaussian) is better
        assert bool(exact.concentration() < 1 + 1 / rank) is better
    ideal = exact.energies / exact.energies.sum()  # drawn in proportion to the energy, K times
    drawn = K * ideal * (1 - ideal) ** (K - 1) / np.square(-np.expm1(K * np.log1p(-ideal)))
    assert exact.dropout_bounds(drawn, VALUE).fisher < gaussian


def test_all_entries_kept_is_no_error():
    exact, _ = gradients()
    assert not variance_factors(Dropout(k=P), LAYERS).any()
    found = exact.measure(lambda rows: rows, VALUE)
    assert found.fisher < 1e-12
    assert (found.scores < 1e-9).all()


def test_refusals():
    exact, pilot = gradients()
    with pytest.raises(InputError, match="grid"):
        variance_factors(Dropout(k=5, sampling="grid"), LAYERS, pilot)
    with pytest.raises(InputError, match="moments"):
        variance_factors(Dropout(k=5, sampling="importance"), LAYERS)
    with pytest.raises(InputError, match="damping > 0"):
        exact.scores(0.0)
    with pytest.raises(InputError, match=r"\(q, p\)"):
        ExactInfluence(exact.gradients, exact.queries[:, 1:])

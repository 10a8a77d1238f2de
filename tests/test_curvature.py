"""The one formula of curvatures, with scaled columns, against dense matrices in float64, however cut in blocks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from conftest import random_rows, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import fit_curvature, fit_fisher, fit_gram
from ooc_influence.curvature import Curvature, eigen
from ooc_influence.curvature.eigen import BlockSpectrum, EigenBlock, EigenVectors
from ooc_influence.errors import InputError, StoreDamagedError
from ooc_influence.store import create_array, map_chunk, open_group

RANKS = {"whole": (7, 5, 9), "low rank": (3, 2, 4), "gram": (3, 2, 4), "mixed": (7, 2, 9)}


def write_block(folder, number, columns, kind, rank, rng):
    """An eigenblock on disk, and the matrix it stands for."""
    width = columns.stop - columns.start
    spectrum = np.sort(rng.uniform(0.5, 3, rank))[::-1]
    if kind == "diagonal":
        return EigenBlock(columns, spectrum, None), np.diag(spectrum)
    vectors = np.linalg.qr(rng.standard_normal((width, width)))[0][:, :rank]
    array = create_array(folder, f"v{number}", vectors.shape, (2, rank), "float64", codec="crc32c")
    array[...] = vectors
    rest = 0.3 if kind in ("low rank", "mixed") and rank < width else 0.0
    source = EigenVectors(vectors.shape, lambda: folder, f"v{number}", lambda: None)
    matrix = (vectors * spectrum) @ vectors.T + rest * (np.eye(width) - vectors @ vectors.T)
    return EigenBlock(columns, spectrum, source, rest, width - rank, keeps=kind != "gram"), matrix


@pytest.fixture(params=[None, 0], ids=["in memory", "streamed"])
def held(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(eigen, "HELD_BYTES", request.param)


@pytest.mark.parametrize("kind", ["whole", "diagonal", "low rank", "gram", "mixed"])
@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_against_a_dense_matrix(tmp_path, held, kind, scaled):
    """F = D (⊕ V diag(e) Vᵀ + t (I − V Vᵀ)) D: products, norms and shares, one λ for all blocks or one for each."""
    rng, group, d = np.random.default_rng(0), open_group(str(tmp_path / "v.zarr"), "w"), 21
    edges, blocks, dense = [0, 7, 12, 21], [], np.zeros((d, d))
    for number, (first, last) in enumerate(pairwise(edges)):
        rank = last - first if kind == "diagonal" else RANKS[kind][number]
        block, matrix = write_block(group, number, slice(first, last), kind, rank, rng)
        blocks.append(block)
        dense[first:last, first:last] = matrix
    scale = rng.uniform(0.2, 4, d) if scaled else np.ones(d)
    spectrum = BlockSpectrum(blocks, scale if scaled else None)
    rows = rng.standard_normal((40, d)).astype(np.float32)
    for lambdas in (np.array([0.01, 0.5, 20.0]), np.array([[0.1, 2.0, 0.7], [30.0, 0.02, 1.0]])):
        found, norms = spectrum.precondition(rows, lambdas), spectrum.self_influence(rows, lambdas)
        assert (found.dtype, norms.dtype) == (np.float64, np.float32)
        for answer, squares, value in zip(found, norms, lambdas, strict=True):
            damping = np.repeat(np.broadcast_to(value, 3), np.diff(edges))
            damped = scale[:, None] * (dense + np.diag(damping)) * scale
            expected = np.linalg.solve(damped, rows.T.astype(np.float64)).T
            assert_allclose(answer, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())
            assert_allclose(squares, (rows * expected).sum(1), rtol=1e-5)
    vectors, turned = spectrum.eigenvectors, rows / scale
    assert_allclose(vectors.T @ vectors, np.eye(len(spectrum.eigenvalues)), atol=1e-12)
    inside = np.square(turned @ vectors).sum(1) / np.square(turned).sum(1)
    assert_allclose(spectrum.outside_share(rows), 1 - inside, atol=1e-10)
    assert_allclose(spectrum.outside_share(np.zeros((1, d))), 0)
    exact = np.linalg.eigvalsh(dense)
    each = zip(pairwise(edges), (0.1, 2.0, 0.7), strict=True)
    spectra = [(np.linalg.eigvalsh(dense[a:b, a:b]), value) for (a, b), value in each]
    dimensions = sum((values / (values + value)).sum() for values, value in spectra)
    assert_allclose(spectrum.effective_dimension(0.4), (exact / (exact + 0.4)).sum())
    assert_allclose(spectrum.effective_dimension(np.array([0.1, 2.0, 0.7])), dimensions)
    assert spectrum.least_dimension(0.4) <= spectrum.effective_dimension(0.4) + 1e-12


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["whole", "diagonal"])
def test_cutting_a_block_changes_nothing(tmp_path, kind, scaled):
    """A block that is a direct sum, as one and as its parts."""
    rng, group = np.random.default_rng(1), open_group(str(tmp_path / "v.zarr"), "w")
    cuts = enumerate([(0, 4), (4, 9)])
    parts = [write_block(group, number, slice(a, b), kind, b - a, rng)[0] for number, (a, b) in cuts]
    scale = rng.uniform(0.2, 4, 9) if scaled else None
    cut = BlockSpectrum(parts, scale)
    values, vectors = cut.eigenvalues, cut.eigenvectors
    array = create_array(group, "whole", (9, 9), (2, 9), "float64", codec="crc32c")
    array[...] = vectors
    source = None if kind == "diagonal" else EigenVectors((9, 9), lambda: group, "whole", lambda: None)
    whole = BlockSpectrum([EigenBlock(slice(0, 9), values, source)], scale)
    rows = rng.standard_normal((5, 9)).astype(np.float32)
    assert_allclose(whole.precondition(rows, [0.1, 3]), cut.precondition(rows, [0.1, 3]), rtol=1e-10)
    assert_allclose(whole.self_influence(rows, [0.1, 3]), cut.self_influence(rows, [0.1, 3]), rtol=1e-5)
    assert_allclose(whole.outside_share(rows), cut.outside_share(rows), atol=1e-12)


@pytest.mark.parametrize("fit", [
    lambda train: fit_fisher(train),
    lambda train: fit_fisher(train, blocks="diagonal"),
    lambda train: fit_fisher(train, rank=6),
    lambda train: fit_gram(train),
])  # fmt: skip
def test_fits_are_of_the_formula(tmp_path, fit):
    """What was fitted, rebuilt densely from its eigenvalues and eigenvectors, damps as it says."""
    train = write_store(tmp_path / "t.zarr", random_rows(18, 30))
    curvature = fit(train)
    assert type(curvature) is Curvature
    (block,) = curvature.blocks
    vectors = curvature.eigenvectors
    dense = (vectors * (curvature.eigenvalues - block.rest)) @ vectors.T + block.rest * np.eye(30)
    assert_allclose(block.matrix(), dense, atol=1e-12)
    rows = random_rows(4, 30, 2)
    for value, answer in zip(curvature.lambdas([0.1, 4.0]), curvature.precondition(rows, curvature.lambdas([0.1, 4.0])),
                             strict=True):  # fmt: skip
        expected = np.linalg.solve(dense + value * np.eye(30), rows.T.astype(np.float64)).T
        assert_allclose(answer, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def streamed(path, monkeypatch, rank=None):
    """A curvature of rows of 30 numbers whose eigenvectors are in chunks of 4 rows, none of them kept in memory."""
    monkeypatch.setattr(eigen, "HELD_BYTES", 0)
    monkeypatch.setattr(eigen, "CHUNK_TARGET", 8 * 4 * (rank or 30))
    return fit_fisher(write_store(path, random_rows(18, 30)), rank=rank)


@pytest.mark.parametrize("rank", [None, 6])
def test_eigenvectors_are_mapped_twice_a_query_and_checked_once(tmp_path, monkeypatch, rank):
    """There and back; how much of a row is outside their span is known on the way."""
    kept = fit_fisher(write_store(tmp_path / "k.zarr", random_rows(18, 30)), rank=rank)
    curvature, mapped, queries = streamed(tmp_path / "t.zarr", monkeypatch, rank), [], random_rows(3, 30, 1)

    def recorded(array, number, *, check):
        mapped.append((number, check))
        return map_chunk(array, number, check=check)

    monkeypatch.setattr(eigen, "map_chunk", recorded)
    monkeypatch.setattr(eigen, "read_part", None)
    monkeypatch.setattr(eigen, "read_array", None)
    for number in range(2):
        shares = np.full(3, np.nan)
        found = curvature.precondition(queries, curvature.lambdas(), shares)
        assert mapped == [(chunk, number == 0 and time == 0) for time in range(2) for chunk in range(8)]
        mapped.clear()
        monkeypatch.undo() if number else None
    assert_allclose(found, kept.precondition(queries, kept.lambdas()), rtol=1e-9, atol=1e-9 * np.abs(found).max())
    assert_allclose(shares, kept.outside_share(queries), atol=1e-9)
    assert shares.max() > 0.1


@pytest.mark.parametrize("harm", ["bit", "short", "missing"])
def test_damaged_eigenvectors_are_refused(tmp_path, monkeypatch, harm):
    curvature = streamed(tmp_path / "t.zarr", monkeypatch)
    file = curvature.path / "eigenvectors" / "c.3.0"
    data = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-8] if harm == "short" else bytes([data[0] ^ 1]) + data[1:])
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match=r"eigenvectors/c\.3\.0"):
            curvature.precondition(random_rows(2, 30), curvature.lambdas())


@pytest.mark.parametrize("kind", ["whole", "diagonal", "low rank", "gram", "mixed"])
@pytest.mark.parametrize("scaled", [False, True])
def test_shares_of_a_pass_are_those_asked_for_alone(tmp_path, held, kind, scaled):
    rng, group = np.random.default_rng(0), open_group(str(tmp_path / "v.zarr"), "w")
    edges = [0, 7, 12, 21]
    blocks = [
        write_block(group, number, slice(a, b), kind, b - a if kind == "diagonal" else RANKS[kind][number], rng)[0]
        for number, (a, b) in enumerate(pairwise(edges))
    ]
    spectrum = BlockSpectrum(blocks, rng.uniform(0.2, 4, 21) if scaled else None)
    rows, shares = rng.standard_normal((20, 21)).astype(np.float32), np.empty(20)
    rows[3] = 0
    found = spectrum.precondition(rows, np.array([0.1, 3.0]), shares)
    assert_allclose(found, spectrum.precondition(rows, np.array([0.1, 3.0])), rtol=1e-12)
    assert_array_equal(shares, spectrum.outside_share(rows))  # a resumed call writes either into its result
    assert shares[3] == 0


def test_lambdas_must_be_one_or_one_for_each_block(tmp_path):
    curvature = fit_curvature(write_store(tmp_path / "t.zarr", random_rows(60, 8)))
    assert curvature.lambdas([0.1, None]).shape == (2, 1)
    with pytest.raises(InputError, match="shape"):
        curvature.precondition(random_rows(2, 8), np.ones((1, 2)))
    with pytest.raises(InputError, match="shape"):
        curvature.self_influence(random_rows(2, 8), 0.1)

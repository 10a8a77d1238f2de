"""Rows of signs: rotated, packed and scaled as their oracle says; unbiased; the same bits however they are written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import interrupt_third_append, random_rows, roomy, whole_mask, write_store
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import hadamard
from scipy.stats import spearmanr

from ooc_influence import (
    BudgetBatches,
    Dropout,
    GradientStore,
    KroneckerBasis,
    Storage,
    compact_store,
    extract_gradients,
    fit_fisher,
    fit_gram,
    influence_scores,
    merge_stores,
    reduce_store,
    rewrite_store,
    self_influence,
    top_influential,
)
from ooc_influence.cli.main import cli
from ooc_influence.errors import InputError, MismatchError, NonFiniteError, OocInfluenceWarning
from ooc_influence.extract.packing import SignPacker
from ooc_influence.extract.sink import StorePlan
from ooc_influence.linalg import LayerMoments, device_signs
from ooc_influence.store import Encoding, sign_flips


def rotation(form):
    """R, dense: flips, zeros up to whole transforms, then a transform of every ``count``-th number."""
    size, count = form.block, form.stored_columns // form.block
    padded = np.zeros((size * count, form.k))
    padded[: form.k] = np.diag(np.float64(sign_flips(form.k, size)))
    return (np.kron(hadamard(size), np.eye(count))) @ padded


def coded(rows, form):
    raw, scale = np.zeros((len(rows), form.columns), np.uint8), np.zeros(len(rows), np.float32)
    form.encode_into(rows, raw, scale)
    out = np.full_like(rows, np.nan)
    form.decode_into(raw, scale, out)
    return raw, scale, out


@pytest.mark.parametrize("k", [1, 7, 50, 64, 100, 1000, 2500, pytest.param(5003, marks=pytest.mark.slow)])
def test_rows_are_what_the_oracle_says(k):
    form = Encoding.of("sign", k)
    rows = random_rows(9, k) if k < 2000 else np.random.default_rng(0).normal(size=(9, k)).astype(np.float32)
    rows[3], rows[4, : k // 2] = 0, 0
    raw, scale, found = coded(rows, form)
    R = rotation(form)
    assert_allclose(R.T @ R, np.eye(k), atol=1e-6)
    rotated = np.float64(rows) @ R.T
    live = np.abs(rotated).sum(1) > 0
    norms = np.square(np.float64(rows)).sum(1)
    assert_allclose(scale[live], norms[live] / np.abs(rotated[live]).sum(1), rtol=1e-5)
    assert_array_equal(found[3], 0)
    width = form.stored_columns
    bits = np.unpackbits(raw, axis=1)
    certain = np.abs(rotated) > 1e-5 * np.abs(rotated).max()  # others may round to either side
    assert_array_equal((bits[:, :width] > 0)[certain], (rotated >= 0)[certain])
    assert not bits[:, width:].any()
    signs = 2.0 * bits[:, :width] - 1
    assert_allclose(found, scale[:, None] * (signs @ R), atol=1e-5 * np.abs(found).max())
    assert_allclose((found * np.float64(rows)).sum(1), norms, rtol=1e-4)
    assert raw.shape[1] == -(-width // 8) <= -(-k // 8) * 1.13 + 1


def test_bits_do_not_depend_on_the_rows_beside_them():
    rows = np.random.default_rng(1).normal(size=(40, 3000)).astype(np.float32)
    form = Encoding.of("sign", 3000)
    whole = coded(rows, form)
    for part in (slice(0, 1), slice(7, 19), slice(39, 40)):
        for all_rows, own in zip(whole, coded(rows[part], form), strict=True):
            assert_array_equal(all_rows[part], own)


NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_DEVICE])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("k", [1, 7, 1000, 5003])
def test_devices_pack_the_same_bits(k, scaled, device):
    form = Encoding.of("sign", k)
    rows = np.random.default_rng(4).normal(size=(9, k)).astype(np.float32)
    rows[3], rows[5] = 0, 1e25 * rows[5]
    columns = np.geomspace(1, 1e3, k, dtype=np.float32) if scaled else None
    raw, scale = np.zeros((9, form.columns), np.uint8), np.zeros(9, np.float32)
    form.encode_into(rows, raw, scale, columns)
    values = [None if each is None else torch.from_numpy(each).to(device) for each in (rows, columns)]
    packed, scales = device_signs.encode(values[0], form, values[1])
    assert_array_equal(packed.cpu().numpy(), raw)
    assert_allclose(scales.cpu().numpy(), scale, rtol=1e-5)


@pytest.mark.parametrize("device", ["host", "device"])
def test_samples_that_are_not_finite_are_skipped_as_of_other_rows(tmp_path, monkeypatch, device):
    """Packed on the host or, with its code, on a device; in batches by a budget and in the caller's own."""
    x, y = data(Mlp, 24)
    x[5] = float("nan")
    how = {"compressor": Dropout(k=80, basis=KroneckerBasis(5)), "on_nonfinite": "skip"}
    budget = BudgetBatches(list(range(24)), lambda chosen: (x[chosen], y[chosen]), lengths=8 * [1, 2, 3], tokens=7)
    if device == "device":
        monkeypatch.setattr(SignPacker, "__call__", packed_as_on_a_device)
    for name, source in (("budget", budget), ("own", batches(x, y, 5))):
        numbers = extract_gradients(make(Mlp), loss, source, tmp_path / f"{name}-f", dtype="float32", **how)
        signs = extract_gradients(make(Mlp), loss, source, tmp_path / name, dtype="sign", **how)
        raw, scale = np.zeros_like(signs.raw_rows(0, 24)), np.zeros(24, np.float32)
        signs.layout.encoding.encode_into(numbers.rows(), raw, scale, signs.column_scale)
        live = np.arange(24) != 5
        assert_array_equal(np.flatnonzero(signs.dropped), [5])
        assert np.unpackbits(signs.raw_rows(0, 24)[live] ^ raw[live]).mean() < 1e-3  # numbers next to zero
        assert_allclose(signs.small("row_scale")[live], scale[live], rtol=1e-4)
        assert_allclose(signs.small("grad_norm")[live], numbers.small("grad_norm")[live], rtol=1e-4)
        assert_allclose(self_influence(signs, memory=roomy())[live], self_influence(numbers, memory=roomy())[live],
                        rtol=1e-3)  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"rows 5"):
        extract_gradients(make(Mlp), loss, budget, tmp_path / "r", dtype="sign", **(how | {"on_nonfinite": "raise"}))


def packed_as_on_a_device(self, rows):
    own = SignPacker(self._encoding, self._column_scale, self._kept, torch.device("meta"))
    own._weights = [torch.from_numpy(weights) for weights in self._kept.weights.values()]
    own._divisor = torch.from_numpy(self._column_scale)
    packed = rows.new_empty((len(rows), self._encoding.columns), dtype=torch.uint8)
    sums = rows.new_empty((len(rows), 1 + len(own._weights)), dtype=torch.float64)
    own._pack_on_device(rows, packed, sums)
    return packed, sums


def test_appending_encoded_rows_of_another_form_is_refused(tmp_path):
    store = GradientStore.create(tmp_path / "s", whole_mask(30), dtype="sign")
    with store, pytest.raises(InputError, match=r"as uint8 of shape \(2, 4\); received uint8, \(2, 5\)"):
        store.append_encoded(np.zeros((2, 5), np.uint8), np.ones(2), loss=np.ones(2), grad_norm=np.ones(2))


def test_products_are_unbiased_over_rotations():
    """Rows that are permuted at random are rotated at random. Of one entry, the transform spreads over its own part."""
    k, generator, form = 512, np.random.default_rng(2), Encoding.of("sign", 512)
    for row in (generator.standard_t(2, k), np.eye(k)[5], np.r_[np.ones(8), np.zeros(k - 8)]):
        query = generator.normal(size=k)
        errors = []
        for _ in range(400):
            order, flips = generator.permutation(k), generator.choice([-1.0, 1.0], k)
            _, _, found = coded((row * flips)[order].astype(np.float32)[None], form)
            errors.append((query * flips)[order] @ found[0] - query @ row)
        bound = np.linalg.norm(query) * np.linalg.norm(row) / np.sqrt(k)
        assert abs(np.mean(errors)) < 5 * np.std(errors) / np.sqrt(400)
        spread = np.sqrt(k / form.block) if np.count_nonzero(row) == 1 else 1
        assert np.std(errors) < 1.2 * spread * bound


@pytest.fixture(params=["scaled", "as they are"])
def stores(tmp_path, request):
    """The same rows as numbers and as signs: divided by column scales, or as they are."""
    factors = np.geomspace(1, 1e3, 600, dtype=np.float32) if request.param == "scaled" else np.ones(600, np.float32)
    rows, scale = random_rows(200, 600) * factors, factors if request.param == "scaled" else None
    written = [write_store(tmp_path / dtype, rows, dtype=dtype, chunk_rows=32, column_scale=scale)
               for dtype in ("float32", "sign")]  # fmt: skip
    query = write_store(tmp_path / "query", random_rows(12, 600, seed=1) / factors)
    return query, *written


def test_scores_of_signs(stores):
    query, numbers, signs = stores
    assert signs.layout.encoding.row_bytes == 80
    exact, found = (influence_scores(query, train, curvature=False).compute() for train in (numbers, signs))
    assert_allclose(found, query.rows() @ signs.rows().T, rtol=1e-4, atol=1e-5 * np.abs(found).max())
    assert np.mean([spearmanr(a, b).statistic for a, b in zip(exact, found, strict=True)]) > 0.6
    squares = [self_influence(train, curvature=False, memory=roomy()) for train in (numbers, signs)]
    scale = signs.column_scale if signs.layout.column_scale else 1
    whitened = [np.square(np.float64(train.rows()) / scale).sum(1) for train in (numbers, signs)]
    assert_allclose(whitened[1] * signs.layout.encoding.energy, whitened[0], rtol=0.2)
    assert np.abs(np.log(squares[1] / squares[0])).mean() < 0.3
    lists = top_influential(query, signs, top=5, curvature=False, memory=roomy())
    assert_array_equal(lists.proponents.rows, np.argsort(-found, axis=1, kind="stable")[:, :5])


@pytest.mark.filterwarnings("ignore:the rows of")  # they have no ids
@pytest.mark.parametrize("device", [None, "cpu"])
def test_signs_are_multiplied_by_rotated_queries(stores, device, monkeypatch):
    """The same scores as of rows that are rotated back, of several checkpoints, with and without dropped rows."""
    query, numbers, signs = stores
    with GradientStore.open(signs.path, "a") as store:
        store.drop([5])
    signs = GradientStore.open(signs.path)
    options = {"curvature": False, "memory": roomy(), "device": device}
    expected = query.rows() @ np.where(signs.dropped[:, None], np.nan, signs.rows()).T
    both = (expected + query.rows() @ numbers.rows().T) / 2
    monkeypatch.setattr("ooc_influence.store.signs.rotate_back", None)
    monkeypatch.setattr("ooc_influence.linalg.device_signs.rotate_back", None)
    found = influence_scores(query, signs, **options).compute()
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(expected)))
    monkeypatch.undo()
    found = influence_scores([query, query], [signs, numbers], **options).compute()
    assert_allclose(found, both, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(both)))


def test_second_moments_are_refused(stores, tmp_path):
    _, _, signs = stores
    for call in (fit_fisher, fit_gram, lambda store: reduce_store(store, tmp_path / "r", 8)):
        with pytest.raises(InputError, match="whose rows are signs: extract some"):
            call(signs)


def test_stores_are_copied_bit_by_bit(stores, tmp_path):
    _, _, signs = stores
    with GradientStore.open(signs.path, "a") as store:
        store.drop([3, 77])
        store.append(random_rows(5, 600, seed=3), loss=np.ones(5))
    signs = GradientStore.open(signs.path)
    assert not signs.verify()
    merged, compacted = merge_stores([signs], tmp_path / "m"), compact_store(signs, tmp_path / "c")
    assert_array_equal(merged.raw_rows(0, 205), signs.raw_rows(0, 205))
    assert_array_equal(compacted.rows(), np.delete(signs.rows(), [3, 77], axis=0))
    assert_array_equal(signs.rows(3, 90)[:, 5:9], np.asarray(signs.to_dask()[3:90, 5:9]))


def test_extraction_divides_by_the_whitening(tmp_path):
    x, y = data(Mlp, 24)
    how = {"compressor": Dropout(k=80, basis=KroneckerBasis(24, damping=0.1))}
    numbers = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "f", dtype="float32", **how)
    signs = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s", dtype="sign", **how)
    assert signs.mask_digest == numbers.mask_digest
    scale = LayerMoments.of(signs.mask).scale(0.1)
    assert_allclose(signs.column_scale, scale, rtol=1e-6)
    _, _, expected = coded((numbers.rows() / signs.column_scale).astype(np.float32), signs.layout.encoding)
    assert_allclose(signs.rows(), expected * signs.column_scale, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    query = extract_gradients(make(Mlp), loss, batches(x[:5], y[:5], 5), tmp_path / "q", like=signs)
    assert query.layout.dtype == "float16"
    exact, found = (influence_scores(query, train).compute() for train in (numbers, signs))
    assert np.mean([spearmanr(a, b).statistic for a, b in zip(exact, found, strict=True)]) > 0.5
    assert_array_equal(extract_gradients(make(Mlp), loss, batches(x, y, 3), tmp_path / "b", dtype="sign", **how).shape,
                       signs.shape)  # fmt: skip
    for damping in (None, 0.01, 0.1, 1.0):  # kept of the numbers; at others, estimated
        asked = [self_influence(train, damping=damping, memory=roomy()) for train in (numbers, signs)]
        assert_allclose(asked[1], asked[0], rtol=1e-4)
    with pytest.warns(OocInfluenceWarning, match="at the relative damping 0.1: at 0.0005, 300 they say less"):
        influence_scores(query, signs, damping=[0.0005, 0.001, 0.1, 100, 300])
    several = [self_influence(train, damping=[0.1, 0.3], memory=roomy()) for train in (numbers, signs)]
    assert np.abs(np.log(several[1] / several[0])).mean() < 0.5
    assert_allclose(influence_scores(query, signs, damping=0.1, normalize="train").compute(),
                    found / np.sqrt(self_influence(numbers, damping=0.1)), rtol=1e-4, atol=1e-6)  # fmt: skip
    with pytest.raises(InputError, match="expected no column called self_influence"):
        extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "o", dtype="sign",
                          columns={"self_influence_0.1": np.zeros(24)}, **how)  # fmt: skip
    with pytest.raises(InputError, match="curvature='kronecker'"):
        fit_fisher(signs)


def test_a_resumed_store_keeps_its_own_column_scale(tmp_path, monkeypatch):
    """Also where an earlier version whitened at another damping."""
    x, y = data(Mlp, 24)
    how = {"compressor": Dropout(k=80, basis=KroneckerBasis(24)), "dtype": "sign",
           "storage": Storage(chunk_rows=8, group_chunks=1)}  # fmt: skip
    whole = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "whole", **how)
    extract_gradients(make(Mlp), loss, batches(x[:8], y[:8], 8), tmp_path / "s", pilot=batches(x, y, 8), **how)
    own = StorePlan.column_scale.func
    monkeypatch.setattr(StorePlan, "column_scale", property(lambda plan: 2 * own(plan)))
    resumed = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s", pilot=batches(x, y, 8), **how)
    assert_array_equal(resumed.raw_rows(0, 24), whole.raw_rows(0, 24))
    assert_array_equal(resumed.small("row_scale"), whole.small("row_scale"))


def test_rewritten_rows_are_those_that_extraction_writes(tmp_path, monkeypatch):
    """Whatever their representation was, and in two runs."""
    x, y = data(Mlp, 40)
    how = {"compressor": Dropout(k=80, basis=KroneckerBasis(24)), "storage": Storage(chunk_rows=8, group_chunks=1),
           "columns": {"label": y}, "ids": [f"r{number}" for number in range(40)]}  # fmt: skip
    numbers = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "f", dtype="float32", **how)
    signs = extract_gradients(make(Mlp), loss, batches(x, y, 8), tmp_path / "s", dtype="sign", **how)
    with GradientStore.open(numbers.path, "a") as store:
        store.drop([7, 30])
    numbers = GradientStore.open(numbers.path)
    monkeypatch.setattr("ooc_influence.compress.representation._BLOCK_BYTES", 8 * 4 * numbers.k)
    interrupt_third_append(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        rewrite_store(numbers, tmp_path / "r", storage=how["storage"])
    written = rewrite_store(numbers, tmp_path / "r", storage=how["storage"])
    assert_array_equal(written.raw_rows(0, 40), signs.raw_rows(0, 40))
    for name in signs.layout.row_arrays:
        assert_array_equal(written.small(name), signs.small(name))
    assert_array_equal(np.flatnonzero(written.dropped), [7, 30])
    assert_array_equal(written.column_scale, signs.column_scale)
    assert not written.verify()
    small = rewrite_store(numbers, tmp_path / "i", dtype="int8")
    assert_allclose(small.rows(), numbers.rows(), atol=0.05 * np.abs(numbers.rows()).max())
    with pytest.raises(MismatchError, match="rewrite to another path"):
        rewrite_store(small, tmp_path / "r")
    with pytest.raises(InputError, match="whose rows are signs"):
        rewrite_store(signs, tmp_path / "n", dtype="float32")
    result = CliRunner().invoke(cli, ["rewrite", str(numbers.path), str(tmp_path / "c"), "--json"])
    assert result.exit_code == 0, result.output
    assert_array_equal(GradientStore.open(tmp_path / "c").raw_rows(0, 40), signs.raw_rows(0, 40))


def test_extreme_rows_have_exact_scales():
    """Squares that float32 cannot hold."""
    form = Encoding.of("sign", 40)
    rows = np.random.default_rng(3).normal(size=(3, 40)).astype(np.float32) * np.float32([[1e25], [1e-25], [0]])
    _, _, found = coded(rows, form)
    exact = np.square(np.float64(rows)).sum(1)
    assert_allclose((np.float64(found) * rows).sum(1), exact, rtol=1e-5)


def test_masks_without_a_basis_have_no_scale(tmp_path):
    with GradientStore.create(tmp_path / "s", whole_mask(30), dtype="sign") as store:
        store.append(random_rows(4, 30), loss=np.ones(4))
    assert GradientStore.open(tmp_path / "s").column_scale is None

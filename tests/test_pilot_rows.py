"""Rows that a pilot has computed are not computed again, and are those that the extraction would compute."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import BudgetBatches, Dropout, Eigenbasis, GradientStore, KroneckerBasis, Storage, extract_gradients
from ooc_influence.checkpoint import ResumableOutput
from ooc_influence.errors import InputError, MismatchError, NonFiniteError
from ooc_influence.extract import data as data_module
from ooc_influence.extract import pilot_rows
from ooc_influence.extract.passes import DataPass
from ooc_influence.extract.pilot import Pilot
from ooc_influence.extract.pilot_rows import KnownRows, RowKeeper

N, BATCH, SAMPLES = 96, 8, 40
BASIS = Dropout(k=60, basis=KroneckerBasis(SAMPLES))
REDUCED = Dropout(k=60, basis=KroneckerBasis(SAMPLES), reduce=Eigenbasis(8, pilot=64))


class Counted:
    """A loss that counts its calls and the samples in them, and fails at a call."""

    def __init__(self, fails_at=None):
        self.calls, self.samples, self.fails_at = 0, 0, fails_at

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("interrupted")
        losses = loss(model, batch)
        self.samples += len(losses)
        return losses


def as_list(x=None, n=N):
    source, labels = data(Mlp, n)
    return batches(source if x is None else x, labels, BATCH)


def as_budget(x=None, n=N):
    """Samples of different cost, so that batches mix the order."""
    source, labels = data(Mlp, n)
    source = source if x is None else x
    lengths = np.random.default_rng(0).integers(2, 9, n)

    def collate(samples):
        return torch.stack([source[number] for number in samples]), labels[samples]

    return BudgetBatches(list(range(n)), collate, lengths=lengths, tokens=30)


FORMS = {"list": as_list, "budget": as_budget}


def extract(path, source, function=loss, **options):
    options = {"compressor": BASIS, "dtype": "float32", "storage": Storage(chunk_rows=4)} | options
    return extract_gradients(make(Mlp), function, source, path, **options)


@pytest.fixture
def computed_all(monkeypatch):
    """Extract without the pilot's rows."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Pilot, "known_rows", lambda pilot, plan, store: KnownRows())
            return extract(*args, **options)

    return run


@pytest.fixture
def looked_up(monkeypatch):
    """The numbers of samples whose rows were looked up."""
    numbers, original = [], DataPass._look_up

    def look_up(self, some):
        numbers.extend(some.tolist())
        return original(self, some)

    monkeypatch.setattr(DataPass, "_look_up", look_up)
    return numbers


@pytest.fixture
def always(monkeypatch):
    """Save sums after every batch."""
    monkeypatch.setattr("ooc_influence.checkpoint.INTERVAL", 0.0)
    monkeypatch.setattr("ooc_influence.checkpoint._SHARE", 0.0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data_module, "_BLOCK_ROWS", 20)
    monkeypatch.setattr(data_module, "LARGEST_BLOCK", 1)


def norms(store):
    return store.small("grad_norm", 0, store.n)


def same(found, expected, form):
    """To the bit where the batches are the same, otherwise to rounding."""
    assert found.mask_digest == expected.mask_digest
    rows, wanted = found.rows(), expected.rows()
    if form == "list":
        assert_array_equal(rows, wanted)
        assert_array_equal(norms(found), norms(expected))
    else:
        assert_allclose(rows, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        assert_allclose(norms(found), norms(expected), rtol=1e-5)
    assert_allclose(found.small("loss", 0, found.n), expected.small("loss", 0, found.n), rtol=1e-5)
    assert_array_equal(found.ids(), expected.ids())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"compressor": REDUCED}, {"dtype": "float16"}], ids=["wide", "reduced", "half"]
)
def test_rows_are_those_computed(tmp_path, computed_all, looked_up, form, options):
    ids = [f"s{number}" for number in range(N)]
    again, once = Counted(), Counted()
    expected = computed_all(tmp_path / "again", FORMS[form](), again, ids=ids, **options)
    assert not looked_up
    found = extract(tmp_path / "once", FORMS[form](), once, ids=ids, **options)
    same(found, expected, form)
    known = SAMPLES - BATCH if form == "list" else SAMPLES  # the first batch of a list is run, with all its checks
    assert len(set(looked_up)) == len(looked_up) == known
    compared = BATCH if form == "list" else 4  # samples whose losses are compared
    assert once.samples == again.samples - known + compared
    assert found.attrs["verification"]["checked"]
    assert not list(tmp_path.glob(".*pilot*"))


@pytest.mark.parametrize("form", FORMS)
def test_signs_are_those_computed(tmp_path, computed_all, looked_up, form):
    expected = computed_all(tmp_path / "again", FORMS[form](), dtype="sign")
    found = extract(tmp_path / "once", FORMS[form](), dtype="sign")
    assert looked_up
    of_pilot = np.array(sorted(looked_up))
    assert_allclose(
        found.rows()[of_pilot], expected.rows()[of_pilot], rtol=1e-5, atol=1e-5 * np.abs(expected.rows()).max()
    )
    same(found, expected, form)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("wide", "list"), ("reduced", "list"), ("sign", "budget"),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (
            ("wide", "budget"), ("reduced", "budget"), ("sign", "list")
        )),
    ],
)  # fmt: skip
def test_a_run_killed_anywhere_is_the_same_to_the_bit(tmp_path, always, small_blocks, form, kind):
    """In any pass, after any batch: whatever was kept, batches and rows are those of an uninterrupted run."""
    options = {"wide": {}, "reduced": {"compressor": REDUCED}, "sign": {"dtype": "sign"}}[kind]
    whole = Counted()
    expected = extract(tmp_path / "whole", FORMS[form](), whole, **options)
    interrupted = 0
    for fails_at in range(4, whole.calls + 1, 3 if kind == "wide" else 6):
        path = tmp_path / f"at{fails_at}"
        failing = Counted(fails_at)
        with contextlib.suppress(RuntimeError):  # but in the self-check, which a failure only ends
            extract(path, FORMS[form](), failing, **options)
        interrupted += failing.calls == fails_at
        if failing.calls == fails_at:
            extract(path, FORMS[form](), **options)
        found = GradientStore.open(path)
        assert found.mask_digest == expected.mask_digest
        assert_array_equal(found.rows(), expected.rows())
        assert_array_equal(norms(found), norms(expected))
        assert not [each for each in tmp_path.iterdir() if "pilot" in each.name]
        shutil.rmtree(path)
    assert interrupted >= 3


KILLED = textwrap.dedent(f"""
    import os, signal, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import ooc_influence.checkpoint as checkpoint
    from ooc_influence.extract import data
    checkpoint.INTERVAL = checkpoint._SHARE = 0.0
    data._BLOCK_ROWS, data.LARGEST_BLOCK = 20, 1
    import test_pilot_rows as tests
    calls = []
    def loss(model, batch):
        calls.append(1)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return tests.loss(model, batch)
    tests.extract(sys.argv[1], tests.as_budget(), loss)
""")


def test_a_process_killed_among_its_rows(tmp_path, small_blocks, looked_up):
    """The resumed run takes the rest of the pilot's rows from where the killed one kept them."""
    whole = Counted()
    expected = extract(tmp_path / "whole", as_budget(), whole)
    looked_up.clear()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "s"), str(whole.calls - 1)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    found = extract(tmp_path / "s", as_budget())
    assert 0 < len(looked_up) < SAMPLES
    rows = expected.rows()
    assert_allclose(found.rows(), rows, rtol=0, atol=1e-5 * np.abs(rows).max())  # another process may round otherwise


@pytest.mark.parametrize("form", FORMS)
def test_all_rows_known_are_still_checked(tmp_path, looked_up, form):
    """Where the pilot has all samples, a batch is run: gathered entries are compared with autograd."""
    count = Counted()
    found = extract(tmp_path / "s", FORMS[form](n=32), count, compressor=Dropout(k=60, basis=KroneckerBasis(256)))
    assert len(looked_up) == (32 if form == "budget" else 32 - BATCH)
    assert found.attrs["verification"]["checked"]
    assert found.n == 32
    model = make(Mlp)

    def another(_, batch):  # the model of another: no gradient reaches the tapped layers
        return loss(model, batch)

    with pytest.raises(InputError, match="reaches none of them"):
        extract(tmp_path / "t", FORMS[form](n=32), another)


def other_labels():
    return Dropout(k=60, basis=KroneckerBasis(SAMPLES, labels="sampled"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sampled basis", "sampled rows", "sample", "pilot", "checkpoints", "product"])
def test_other_rows_than_the_pilots_are_computed(tmp_path, computed_all, looked_up, form, kind):
    options = {
        "sampled basis": {"compressor": other_labels()},
        "sampled rows": {"labels": "sampled"},
        "sample": {"sample": 60},
        "pilot": {"pilot": FORMS[form]()},
        "checkpoints": {"checkpoints": [make(Mlp, 1).state_dict()]},
        "product": {"compressor": Dropout(k=60, basis=KroneckerBasis(SAMPLES, moments="product"))},
    }[kind]
    found = extract(tmp_path / "once", FORMS[form](), **options)
    assert not looked_up
    same(found, computed_all(tmp_path / "again", FORMS[form](), **options), "list")


def test_loaders_are_read_as_before(tmp_path, looked_up):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(Mlp, N)), batch_size=BATCH)
    extract(tmp_path / "s", loader)
    assert not looked_up


@pytest.mark.parametrize("form", FORMS)
def test_batches_that_are_not_finite_are_computed(tmp_path, computed_all, looked_up, form):
    x, _ = data(Mlp, N)
    x = x.clone()
    x[0] = float("nan")  # which is in the pilot
    found = extract(tmp_path / "once", FORMS[form](x), on_nonfinite="skip")
    expected = computed_all(tmp_path / "again", FORMS[form](x), on_nonfinite="skip")
    assert looked_up
    assert 0 not in looked_up
    assert_array_equal(found.small("dropped", 0, N), expected.small("dropped", 0, N))
    same(found, expected, form)
    with pytest.raises(NonFiniteError):
        extract(tmp_path / "raise", FORMS[form](x))


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_other_data_are_not_used(tmp_path, caplog, monkeypatch, looked_up, form):
    """Between the pilot and the first row, the data changes: losses differ, so all rows are computed."""

    def interrupted(*args, **options):
        raise RuntimeError("interrupted")

    x, _ = data(Mlp, N)
    with monkeypatch.context() as patch:
        patch.setattr("ooc_influence.extract.extraction.fill", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            extract(tmp_path / "s", FORMS[form](), compressor=REDUCED)
    assert list(tmp_path.glob(".s.pilot-sums.partial/rows-*"))
    found = extract(tmp_path / "s", FORMS[form](3 * x), compressor=REDUCED)
    assert not looked_up
    assert "the pilot's rows are of other data or another loss" in caplog.text
    wide = extract(tmp_path / "wide", FORMS[form](3 * x), like=found, compressor=None)
    assert_allclose(found.rows(), wide.rows(), rtol=0, atol=1e-5 * np.abs(wide.rows()).max())
    assert not list(tmp_path.glob("*pilot*"))


def test_data_that_changed_among_rows_is_refused(tmp_path, small_blocks):
    x, _ = data(Mlp, N)
    whole = Counted()
    extract(tmp_path / "whole", as_budget(), whole)
    with pytest.raises(RuntimeError, match="interrupted"):
        extract(tmp_path / "s", as_budget(), Counted(whole.calls - 1))
    with pytest.raises(MismatchError, match="losses"):
        extract(tmp_path / "s", as_budget(3 * x))


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_cannot_be_read_are_computed(tmp_path, computed_all, caplog, monkeypatch, form):
    monkeypatch.setattr(pilot_rows, "_CHUNK_BYTES", 1)
    expected = computed_all(tmp_path / "again", FORMS[form]())
    original = Pilot.known_rows

    def damaged(pilot, plan, store):
        known = original(pilot, plan, store)
        for part in known._parts:  # of all rows: those of a first batch are not looked up
            for path in Path(part).rglob("c.*"):
                path.unlink()
        return known

    monkeypatch.setattr(Pilot, "known_rows", damaged)
    same(extract(tmp_path / "once", FORMS[form]()), expected, form)
    assert "rows of the pilot cannot be read" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_kept_rows_are_bounded(tmp_path, computed_all, looked_up, monkeypatch, form):
    monkeypatch.setattr(pilot_rows, "LARGEST", 20 * 4 * 60)
    monkeypatch.setattr(pilot_rows, "BLOCK_BYTES", 1)
    expected = computed_all(tmp_path / "again", FORMS[form]())
    same(extract(tmp_path / "once", FORMS[form]()), expected, form)
    assert 0 < len(looked_up) <= 20


def test_parts_after_the_sums_are_removed(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    mask = Dropout(k=5).draw([module.layer for module in extract(tmp_path / "s", as_list()).mask.modules])
    output, k = ResumableOutput(tmp_path / "parts", {"digest": "one"}), mask.k
    output.begin()
    rows = torch.arange(6 * k, dtype=torch.float32).reshape(6, k)
    for low in (0, 2, 4):
        keeper = RowKeeper(output, mask, lambda low=low: rows[low : low + 2])
        keeper.begin(low // 2)
        keeper.add(np.array([9 - low, 8 - low]), torch.tensor([0.1, 0.2]) + low, finite=True)
        keeper.add(np.array([90]), torch.tensor([0.1]), finite=False)
        keeper.write()
    known = KnownRows(output, mask)
    assert known.numbers.tolist() == [4, 5, 6, 7, 8, 9]
    assert_array_equal(known.rows(np.array([9, 4])), rows[[0, 5]])
    assert_array_equal(known.losses(np.array([9, 4])), np.float32([0.1, 4.2]))
    assert known.covers(np.array([4, 9]))
    assert not known.covers(np.array([3, 4]))
    RowKeeper(output, mask, lambda: rows).begin(1)
    assert KnownRows(output, mask).numbers.tolist() == [8, 9]
    other = Dropout(k=5, seed=1).draw([module.layer for module in mask.modules])
    assert not len(KnownRows(output, other).numbers)
    assert not len(KnownRows(ResumableOutput(tmp_path / "parts", {"digest": "two"}), mask).numbers)
    assert not len(KnownRows().numbers)

"""A pilot that was killed resumes: what its passes had summed is beside the store, and the mask is the same."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_array_equal

from ooc_influence import Dropout, Eigenbasis, KroneckerBasis, extract_gradients
from ooc_influence.checkpoint import ResumableOutput
from ooc_influence.extract import pilot as pilot_module
from ooc_influence.extract.pilot import MomentSums
from ooc_influence.extract.pilot_sums import PilotParts, Position
from ooc_influence.store import tree_bytes

N, BATCH = 96, 8
COMPRESSORS = {
    "importance": Dropout(k=60, sampling="importance", pilot=64),
    "kronecker": Dropout(k=60, basis=KroneckerBasis(64)),
    "sampled labels": Dropout(k=60, basis=KroneckerBasis(64, labels="sampled")),
    "reduced": Dropout(k=60, basis=KroneckerBasis(64), reduce=Eigenbasis(8, pilot=64)),
}


@pytest.fixture
def always(monkeypatch):
    """Save after every batch, and sum the factors of each layer in a pass of its own."""
    monkeypatch.setattr("ooc_influence.checkpoint.INTERVAL", 0.0)
    monkeypatch.setattr("ooc_influence.checkpoint._SHARE", 0.0)
    monkeypatch.setattr(pilot_module, "factor_groups", lambda layers, sides, budget: [[n] for n in range(len(layers))])


class Counted:
    """A loss that fails at a call, once."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("interrupted")
        return loss(model, batch)


def extract(path, function, compressor, x=None):
    source, labels = data(Mlp, N)
    how = {"compressor": compressor, "dtype": "float32"}
    return extract_gradients(make(Mlp), function, batches(source if x is None else x, labels, BATCH), path, **how)


def same(found, expected):
    assert found.mask_digest == expected.mask_digest
    assert_array_equal(found.rows(), expected.rows())


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_it_resumes_at_the_batch(tmp_path, always, kind):
    """Wherever it fails, in any pass: the store is that of a run without an interruption, few batches run again."""
    whole = Counted()
    expected = extract(tmp_path / "whole", whole, COMPRESSORS[kind])
    of_pilot = whole.calls - N // BATCH
    assert of_pilot >= 64 // BATCH
    for fails_at in sorted({4, of_pilot // 2, of_pilot - 1}):  # not in the self-check, which a failure only ends
        first, path = Counted(fails_at), tmp_path / f"at{fails_at}"
        with pytest.raises(RuntimeError, match="interrupted"):
            extract(path, first, COMPRESSORS[kind])
        again = Counted()
        same(extract(path, again, COMPRESSORS[kind]), expected)
        assert again.calls <= whole.calls - fails_at + 8  # the last batch of each pass, and those of the self-check
        assert not [each for each in tmp_path.iterdir() if "pilot" in each.name]


def test_sums_of_other_data_are_not_used(tmp_path, always, caplog):
    x, _ = data(Mlp, N)
    with pytest.raises(RuntimeError, match="interrupted"):
        extract(tmp_path / "s", Counted(5), COMPRESSORS["kronecker"])
    found = extract(tmp_path / "s", loss, COMPRESSORS["kronecker"], 3 * x)
    assert "is of other data or another loss" in caplog.text
    same(found, extract(tmp_path / "fresh", loss, COMPRESSORS["kronecker"], 3 * x))


def test_sums_of_other_settings_are_removed(tmp_path, always):
    with pytest.raises(RuntimeError, match="interrupted"):
        extract(tmp_path / "s", Counted(5), COMPRESSORS["kronecker"])
    other = Dropout(k=50, basis=KroneckerBasis(48))
    again = Counted()
    same(extract(tmp_path / "s", again, other), extract(tmp_path / "fresh", loss, other))
    assert not list(tmp_path.glob("*pilot*"))


def test_nothing_is_left_of_a_short_one(tmp_path):
    """Within the seconds between two savings, nothing is kept."""
    with pytest.raises(RuntimeError, match="interrupted"):
        extract(tmp_path / "s", Counted(5), COMPRESSORS["kronecker"])
    assert list(tmp_path.iterdir()) == []


def test_sums_and_losses_are_kept_as_they_are(tmp_path):
    """Losses that are not finite, and sums of nothing yet."""
    sums, output = MomentSums(()), ResumableOutput(tmp_path / "parts", {})
    parts, position = PilotParts(output), Position()
    position.add(torch.tensor([1.0, float("nan"), float("inf")]), finite=False)
    parts.save("factors 1/2", position, sums)
    found = parts.resume("factors 1/2", sums)
    assert (found.batches, found.seen, found.skipped) == (1, 3, 3)
    assert found.has(torch.tensor([1.0, float("nan"), float("inf")]))
    assert not found.has(torch.tensor([1.1, float("nan"), float("inf")]))
    assert not found.has(torch.tensor([1.0, float("nan")]))
    assert parts.resume("factors 2/2", sums) == Position()


def test_sums_take_their_own_size_on_disk(tmp_path):
    """Of an adapter's hundreds of layers most are small: a chunk is no larger than its array."""

    class Sums:
        samples, identity = 1, "sums"

        def state(self):
            shapes = [(16, 16)] * 20 + [(3000, 1000), (7, 3), (1, 5)]
            return {}, {f"sum{number}": np.ones(shape) for number, shape in enumerate(shapes)}

    sums, output = Sums(), ResumableOutput(tmp_path / "parts", {})
    PilotParts(output).save("factors 1/2", Position(), sums)
    size = sum(values.nbytes for values in sums.state()[1].values())
    assert size < tree_bytes(tmp_path) < 1.01 * size + 23 * 2000  # each array's description


KILLED = textwrap.dedent(f"""
    import os, signal, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import ooc_influence.checkpoint as checkpoint
    checkpoint.INTERVAL = checkpoint._SHARE = 0.0
    import test_pilot_resumes as tests
    calls = []
    def loss(model, batch):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return tests.loss(model, batch)
    tests.extract(sys.argv[1], loss, tests.COMPRESSORS["kronecker"])
""")


def test_it_resumes_after_a_kill(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.glob(".s.pilot-sums.partial"))
    again = Counted()
    found = extract(tmp_path / "s", again, COMPRESSORS["kronecker"])
    whole = Counted()
    expected = extract(tmp_path / "whole", whole, COMPRESSORS["kronecker"])
    assert again.calls < whole.calls
    same(found, expected)
    assert np.isfinite(found.rows()).all()
    assert not [each for each in tmp_path.iterdir() if "pilot" in each.name]

"""No model family is silently wrong: what is stored is autograd's gradient, or the run is refused with our own error.

``python tools/bench/families.py`` makes the table of docs/families.md of the same families.
"""

from __future__ import annotations

import logging

import pytest
import torch
from families import FAMILIES, MODES, QUICK, TOLERANCE, Family, examine, oracle
from families.base import Case, plain_loss, vectors
from torch import nn

_WITHOUT = {"torch_layers", "timm_layers", "sharing"}  # fields that need nothing else than PyTorch
_CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(autouse=True)
def quiet():
    """Hugging Face warns of small models; that is not what is looked at."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _CASES)
def test_right_or_refused(name):
    """Every stored entry is autograd's, the share claimed is not more than what is right; else an error of ours."""
    family = FAMILIES[name]
    if family.field not in _WITHOUT or name == "conv1d-shares-weight":
        pytest.importorskip("peft" if family.field == "adapters" else "transformers")
    case = family.case()
    expected = oracle(case)
    for mode in MODES:
        found = examine(family, mode, case, expected)
        assert found.outcome in ("right", "refused", "refused late"), (mode, found.message, found.worst)


def test_quick_ones_exist():
    assert set(QUICK) <= set(FAMILIES)
    assert len(FAMILIES) >= 75


def small(model: nn.Module) -> Family:
    return Family("small", "sharing", lambda: Case(model, plain_loss, vectors(6)))


def test_the_comparison_sees_one_wrong_entry():
    """What judges is judged: one entry that is wrong by a thousandth of the largest is found, and named."""
    torch.manual_seed(0)
    family = small(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)))
    found = examine(family, "default")
    assert (found.outcome, found.share, found.parameters) == ("right", 1.0, 101)
    assert found.worst < 1e-5
    case = family.case()
    expected = oracle(case)
    largest = max(abs(expected[1][2][name]).max() for name in ("2.weight", "2.bias"))
    expected[1][2]["2.weight"][3] += 5 * TOLERANCE * largest
    found = examine(family, "default", case, expected)
    assert found.outcome == "wrong"
    assert found.worst_layer == "2 (Linear)"
    assert found.share == pytest.approx(56 / 101)


def test_the_comparison_sees_crashes():
    def loss(model, batch):
        raise RuntimeError("of the loss")

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    case = Case(model, plain_loss, vectors(6))
    expected = oracle(case)
    case.loss = loss
    found = examine(small(model), "default", case, expected)
    assert (found.outcome, found.message) == ("crashed", "RuntimeError: of the loss")

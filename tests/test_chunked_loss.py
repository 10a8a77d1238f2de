"""Cross-entropy in chunks: the plain one's losses and gradients, its precision, and little memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vmap

from ooc_influence import cross_entropy
from ooc_influence.extract import chunked_loss
from ooc_influence.extract.chunked_loss import _plain, chunked_cross_entropy
from ooc_influence.memory import PeakMemory, release_freed

N, CLASSES = 37, 11


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
def problem(request, monkeypatch):
    """Logits and labels, in chunks of 5 tokens."""
    monkeypatch.setattr(chunked_loss, "_AT_ONCE_CPU", 5 * CLASSES)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(N, CLASSES, generator=generator)).to(request.param).requires_grad_()
    return logits, torch.randint(CLASSES, (N,), generator=generator)


def close(found, expected, dtype):
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("some", [False, True])
def test_losses_and_gradients_are_those_of_plain_operations(problem, some):
    logits, labels = problem
    index = torch.arange(N).flip(0)[3:-4:2] if some else None
    chosen = labels if index is None else labels[index]
    weights = torch.linspace(-1, 2, len(chosen))
    losses = chunked_cross_entropy(logits, chosen, index)
    expected = _plain(logits if index is None else logits[index], chosen)
    assert losses.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    close(losses, expected, losses.dtype)
    (found,) = torch.autograd.grad((losses * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert found.dtype == logits.dtype
    close(found, wanted, logits.dtype)
    if some:
        assert not found[~torch.isin(torch.arange(N), index)].any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own use, for its decompositions
@pytest.mark.parametrize("some", [False, True])
def test_forward_mode_is_the_plain_operations_own(problem, some):
    logits, labels = problem
    index = torch.arange(N).flip(0)[3:-4:2] if some else None
    chosen = labels if index is None else labels[index]
    tangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.detach(), tangent)
        found = forward_ad.unpack_dual(chunked_cross_entropy(dual, chosen, index))
        wanted = forward_ad.unpack_dual(_plain(dual if index is None else dual[index], chosen))
    close(found.primal, wanted.primal, found.primal.dtype)
    torch.testing.assert_close(found.tangent, wanted.tangent, rtol=1e-5, atol=1e-5 * float(wanted.tangent.abs().max()))
    with forward_ad.dual_level():  # with a graph as well: both ways together
        dual = forward_ad.make_dual(logits, tangent)
        mixed = forward_ad.unpack_dual(chunked_cross_entropy(dual, chosen, index))
        assert mixed.primal.requires_grad
        torch.testing.assert_close(mixed.tangent.detach(), wanted.tangent, rtol=1e-5, atol=1e-4)


def test_it_is_exact_where_the_model_is_confident():
    """Losses and gradients far below float32's rounding of one, and far above."""
    for margin in (-200.0, -3.0, 0.0, 30.0, 80.0):
        values = [[margin, 0.0, -1.0], [0.0, margin, -2.0]]
        logits = torch.tensor(values, requires_grad=True)
        exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0, 1])
        found, wanted = chunked_cross_entropy(logits, labels), _plain(exact, labels)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)  # the exponent is rounded
        found.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=0)


def test_masked_classes_count_for_nothing():
    logits = torch.tensor([[0.5, float("-inf"), 1.0]], requires_grad=True)
    losses = chunked_cross_entropy(logits, torch.tensor([0]))
    losses.sum().backward()
    assert losses.item() == pytest.approx(np.log1p(np.exp(0.5)))
    assert logits.grad[0, 1] == 0
    assert logits.grad.isfinite().all()


def test_it_is_differentiated_twice(problem):
    logits, labels = problem
    if logits.dtype == torch.bfloat16:
        pytest.skip("two roundings")
    seconds = []
    for loss in (chunked_cross_entropy, _plain):
        (first,) = torch.autograd.grad(loss(logits, labels).sum(), logits, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), logits)[0])
    close(*seconds, logits.dtype)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transforms_see_single_operations(problem):
    logits, labels = problem
    logits = logits.detach().float()

    def loss(row, label):
        return cross_entropy(row[None], label[None])[0]

    each = vmap(grad(loss))(logits, labels)
    (together,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), labels).sum(), logits)
    close(each, together, torch.float32)
    direction = torch.ones_like(logits)
    _, change = jvp(lambda values: cross_entropy(values, labels), (logits.detach(),), (direction,))
    close(change, (together * direction).sum(1), torch.float32)


def test_it_holds_no_copies_of_the_logits():
    """Beside the logits: their gradient, and a chunk."""
    logits = torch.randn(512, 32_768, requires_grad=True)
    labels = torch.randint(32_768, (512,))
    size = logits.numel() * 4
    chunked_cross_entropy(logits[:8], labels[:8]).sum().backward()
    logits.grad = None
    peaks = []
    for loss in (chunked_cross_entropy, _plain):
        release_freed()
        with PeakMemory(0.0005) as watch:
            loss(logits, labels).sum().backward()
        peaks.append((watch.peak - watch.start) / size)
        logits.grad = None
    assert peaks[0] < 1.5
    assert peaks[1] > 3  # what is measured is there

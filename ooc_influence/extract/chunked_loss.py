"""Cross-entropy that is exact where the model is confident, some tokens at a time.

It is computed as ℓ = log(1 + Σ_{c≠y} exp(z_c − z_y)) = softplus(o − z_y) with o = logsumexp_{c≠y} z_c. Log-softmax
returns ℓ = 0 once p_y rounds to 1; this form keeps ℓ's relative precision down to 1e-38.

Its gradient is σ(o − z_y) exp(z_c − o) for c ≠ y, and −σ(o − z_y) for y. Logits of large vocabularies are the largest
tensors of a language model's pass: as plain operations, the loss and its gradient hold half a dozen copies of them in
float32. Here nothing is kept beside the logits but a number a token, and the gradient in the logits' own precision. The
derivative in forward mode is found in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F  # noqa: N812 - the community's name
from torch import Tensor

_AT_ONCE_CPU, _AT_ONCE = 2**20, 2**25  # logits worked on at once in float32: on a CPU few, for its cache


def chunked_cross_entropy(logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of tokens.

    Parameters
    ----------
    logits : (n, classes) float
        Scores before the softmax.
    labels : (m,) int
        Targets.
    index : (m,) int, optional
        Which tokens, each once; default all.

    Returns
    -------
    (m,) float32 (float64 for float64 logits)
    """
    labels = labels.long()
    dual = _dual(logits)
    if dual is not None:
        found: Tensor = forward_ad.make_dual(*_with_derivative(*dual, labels, index))
        return found
    if _transformed(logits):
        return _plain(logits if index is None else logits[index], labels)
    losses: Tensor = _ChunkedCrossEntropy.apply(logits, labels, index)[0]
    return losses


def _transformed(logits: Tensor) -> bool:
    """Whether something looks into single operations: torch.func's transforms, forward mode, the compiler."""
    functorch: Any = torch._C._functorch
    return (
        functorch.is_functorch_wrapped_tensor(logits) or forward_ad._current_level >= 0 or torch.compiler.is_compiling()
    )


def _dual(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return logits and their derivative in forward mode; None for others, and where a graph is recorded as well."""
    functorch: Any = torch._C._functorch
    if forward_ad._current_level < 0 or functorch.is_functorch_wrapped_tensor(logits) or torch.is_grad_enabled():
        return None
    primal, tangent = forward_ad.unpack_dual(logits)
    return None if tangent is None else (primal, tangent)


def _with_derivative(logits: Tensor, tangent: Tensor, labels: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the losses, (m,), and their derivatives for those of the logits: σ(o − z_y) (Σ exp(z − o) ż − ż_y)."""
    losses, along = (torch.empty(len(labels), dtype=_wide(logits), device=logits.device) for _ in range(2))
    for part, where, values, chosen, own in _parts(logits, labels, index):
        moving = tangent[where].to(values.dtype)
        others = torch.logsumexp(values.scatter_(1, chosen, float("-inf")), 1)
        losses[part] = F.softplus(others - own)
        mean = values.sub_(others.unsqueeze(1)).exp_().mul_(moving).sum(1)  # 0 of the label's own
        along[part] = torch.sigmoid(others - own) * (mean - moving.gather(1, chosen).squeeze(1))
    return losses, along


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(_wide(logits))
    chosen = labels.unsqueeze(1)
    others = torch.logsumexp(logits.scatter(1, chosen, float("-inf")), 1)
    return F.softplus(others - logits.gather(1, chosen).squeeze(1))


def _parts(logits: Tensor, labels: Tensor, index: Tensor | None) -> Iterator[tuple[slice, Any, Tensor, Tensor, Tensor]]:
    """Yield tokens, where their logits are, these in float32 (a copy), the labels (·, 1) and their logits."""
    step = max(1, (_AT_ONCE_CPU if logits.device.type == "cpu" else _AT_ONCE) // logits.shape[1])
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        where: Any = part if index is None else index[part]
        values = logits[where].to(_wide(logits), copy=index is None)
        chosen = labels[part].unsqueeze(1)
        yield part, where, values, chosen, values.gather(1, chosen).squeeze(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        losses, others = (torch.empty(len(labels), dtype=_wide(logits), device=logits.device) for _ in range(2))
        for part, _, values, chosen, own in _parts(logits, labels, index):
            others[part] = torch.logsumexp(values.scatter_(1, chosen, float("-inf")), 1)
            losses[part] = F.softplus(others[part] - own)
        ctx.save_for_backward(logits, labels, others, index)
        ctx.mark_non_differentiable(others)
        return losses, others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, others, index = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            losses = _plain(logits if index is None else logits[index], labels)
            return (*torch.autograd.grad(losses, logits, gradients[0], create_graph=True), None, None)
        found = torch.empty_like(logits) if index is None else torch.zeros_like(logits)
        for part, where, values, chosen, own in _parts(logits, labels, index):
            factor = torch.sigmoid(others[part] - own).mul_(gradients[0][part]).unsqueeze(1)
            values.sub_(others[part].unsqueeze(1)).exp_().mul_(factor).scatter_(1, chosen, -factor)
            found[where] = values.to(found.dtype)
        return found, None, None

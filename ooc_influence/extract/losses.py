"""Per-sample losses that are exact where the model is confident.

Cross-entropy is computed as ℓ = log(1 + Σ_{c≠y} exp(z_c − z_y)) = softplus(logsumexp_{c≠y} z_c − z_y). Log-softmax
returns ℓ = 0 once p_y rounds to 1; this form keeps ℓ's relative precision down to 1e-38, which row weights such as
1/expm1(ℓ) need.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name
from torch import Tensor

from ooc_influence.errors import InputError


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each sample.

    Parameters
    ----------
    logits : (b, classes) float
        Scores before the softmax; at least two classes.
    labels : (b,) int
        The correct classes.

    Returns
    -------
    (b,) float32 (float64 for float64 logits)

    Raises
    ------
    InputError
        For other shapes.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise InputError(
            f"expected logits (b, classes >= 2) and labels (b,); received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = labels.long().unsqueeze(1)
    others = torch.logsumexp(logits.scatter(1, chosen, float("-inf")), 1)
    return F.softplus(others - logits.gather(1, chosen).squeeze(1))


def token_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Return the cross-entropy of each sequence over its target tokens.

    Parameters
    ----------
    logits : (b, t, classes) float
        Scores for the token at the same index of ``labels``: shift them before the call.
    labels : (b, t) int
        Target tokens; ``ignore_index`` marks positions that do not count.
    reduction : {"mean", "sum"}
        Over a sample's own target tokens.

    Returns
    -------
    (b,) float32; 0 for a sample without target tokens

    Raises
    ------
    InputError
        For other shapes or another reduction.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise InputError(
            f"expected logits (b, t, classes) and labels (b, t); received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise InputError(f"expected reduction 'mean' or 'sum'; received {reduction!r}")
    counted = labels != ignore_index
    losses = cross_entropy(logits.flatten(0, 1), labels.masked_fill(~counted, 0).flatten()).view(labels.shape)
    total = losses.masked_fill(~counted, 0.0).sum(1)
    return total / counted.sum(1).clamp(min=1) if reduction == "mean" else total

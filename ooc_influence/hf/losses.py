"""Per-sample losses of Hugging Face models.

Token losses are computed at target positions only, so that logits of prompts and padding are never copied to float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ooc_influence.extract import binary_cross_entropy, cross_entropy
from ooc_influence.hf.labels import LabelLoss
from ooc_influence.hf.padding import PAD, padding_token
from ooc_influence.hf.pretokenised import IGNORED
from ooc_influence.hf.unembedding import Targets, target_losses


class CausalLoss:
    """Cross-entropy of a language model over each sample's target tokens.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Over a sample's own target tokens.
    """

    def __init__(self, reduction: Literal["mean", "sum"] = "mean") -> None:
        self._mean = reduction == "mean"

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the losses, (b,) float32; 0 for a sample without target tokens."""
        targets = Targets.of(batch["labels"], IGNORED)
        losses = target_losses(model, batch, targets)
        total = losses.new_zeros(len(batch["labels"])).index_add(0, targets.sample, losses)
        return total / self._divisor(batch) if self._mean else total

    def of_tokens(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return what each token adds to its sample's loss, (b, t) float32, at the token itself; 0 at others."""
        targets = Targets.of(batch["labels"], IGNORED)
        losses = target_losses(model, batch, targets)
        found = losses.new_zeros(batch["labels"].shape).index_put((targets.sample, targets.position), losses)
        return found / self._divisor(batch).unsqueeze(1) if self._mean else found

    @staticmethod
    def _divisor(batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum(1).clamp(min=1)


class PolicyGradientLoss(CausalLoss):
    """-A Σ_t log π(y_t) of each sample, with its advantage A: the loss whose descent is the policy gradient's ascent.

    Williams 1992 (REINFORCE), at the policy that the rollouts are of, where an importance ratio is 1. With
    ``reduction="mean"``, divided by the sample's own target tokens, as GRPO does (arXiv 2402.03300).
    """

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the losses, (b,) float32, of either sign."""
        losses = super().__call__(model, batch)
        return losses * batch["advantage"].to(losses.dtype)

    def of_tokens(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return what each token adds to its sample's loss, (b, t) float32, at the token itself; 0 at others."""
        losses = super().of_tokens(model, batch)
        return losses * batch["advantage"].to(losses.dtype).unsqueeze(1)


class SignedLoss:
    """Σ_t s_t √(w_t/T) ℓ_t with random signs s_t: rows whose outer products estimate Σ_t (w_t/T) ∇ℓ_t ∇ℓ_tᵀ.

    The expectation over signs is a token-level Gauss-Newton matrix: one more pass over a sample of documents makes a
    curvature of them. With T the sample's target tokens it belongs to rows of mean losses.

    Parameters
    ----------
    weights : {"ggn"} or None
        w_t = 1/expm1(ℓ_t), or 1.
    mean : bool
        Divide by T, for train rows of mean losses.
    """

    def __init__(self, weights: Literal["ggn"] | None = None, *, mean: bool = True) -> None:
        self._ggn, self._mean = weights == "ggn", mean

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the signed sums, (b,) float32."""
        targets = Targets.of(batch["labels"], IGNORED)
        losses = target_losses(model, batch, targets)
        factor = batch["signs"][targets.sample, targets.position]
        if self._ggn:
            factor = factor * torch.expm1(losses.detach().clamp(min=1e-6)).rsqrt()
        if self._mean:
            counts = (batch["labels"][:, 1:] != IGNORED).sum(1).clamp(min=1)
            factor = factor * counts.rsqrt()[targets.sample]
        return losses.new_zeros(len(batch["labels"])).index_add(0, targets.sample, losses * factor)


def class_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the outputs of a sequence classifier, (b, outputs) float32 (float64 for a float64 model)."""
    with padding_token(model, batch.get(PAD)):
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ClassificationLoss:
    """The loss of a sequence classifier, of each text by itself, as ``transformers`` computes it.

    Parameters
    ----------
    kind : {"cross_entropy", "binary_cross_entropy", "mean_squared_error"}
        For ``labels`` (b,) of one class each; (b, outputs) of marks from 0 to 1; (b,) or (b, outputs) of numbers. The
        latter two are means over a text's outputs.
    """

    def __init__(self, kind: LabelLoss = "cross_entropy") -> None:
        self._kind = kind

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the losses, (b,) float32."""
        logits, labels = class_logits(model, batch), batch["labels"]
        if self._kind == "cross_entropy":
            return cross_entropy(logits, labels)
        wanted = labels.to(logits.dtype).reshape(logits.shape)
        if self._kind == "binary_cross_entropy":
            return binary_cross_entropy(logits, wanted)
        return (logits - wanted).square().mean(1)

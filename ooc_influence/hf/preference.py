"""Losses of preferences: a chosen and a rejected sequence a sample, with a reference model or without.

Rafailov et al. 2023 (arXiv 2305.18290, equation 7): with log p(y|x) the sum over the targets of a sequence,

    loss = -log σ(β [(log p(chosen) - log p(rejected)) - (log p_ref(chosen) - log p_ref(rejected))])

Without a reference the second difference is 0. Gradients are of the model's own terms; the reference has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name
from torch import Tensor, nn

from ooc_influence.errors import InputError
from ooc_influence.hf.losses import CausalLoss
from ooc_influence.hf.padding import Collator


class PairCollator:
    """Pads chosen and rejected sequences on the right and makes tensors of them.

    Parameters
    ----------
    pad : int
        The token to pad with; it is masked.
    """

    def __init__(self, pad: int) -> None:
        self._collate = Collator(pad)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (b, 2, t): the chosen one first."""
        flat = [
            {"input_ids": ids, "labels": labels}
            for row in rows for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
        ]  # fmt: skip
        return {name: tensor.unflatten(0, (len(rows), 2)) for name, tensor in self._collate(flat).items()}


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Run a PEFT model as its base, and leave which parameters require a gradient as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


class PreferenceLoss:
    """-log σ(β margin) of each pair, by the module's formula.

    Parameters
    ----------
    beta : float
        The factor β, above 0.
    reference : nn.Module, "adapter" or None
        The reference model; the model itself without its PEFT adapter; or none, for the plain log-odds.

    Raises
    ------
    InputError
        For another beta.
    """

    def __init__(self, beta: float = 0.1, reference: nn.Module | str | None = None) -> None:
        if not 0 < beta < float("inf"):
            raise InputError(f"expected beta > 0 (--beta); received {beta}")
        self._beta, self._reference = beta, reference
        self._sums = CausalLoss("sum")

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the losses, (b,) float32 (float64 for a float64 model)."""
        flat = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        expected = self._reference_margin(model, flat)  # before the model's own pass, which has its adapter
        margin = self._margin(model, flat)
        return F.softplus(-self._beta * (margin if expected is None else margin - expected))

    def _margin(self, model: Any, flat: dict[str, Tensor]) -> Tensor:
        """Return log p(chosen) - log p(rejected) of each pair."""
        losses = self._sums(model, flat).view(-1, 2)
        return losses[:, 1] - losses[:, 0]

    def _reference_margin(self, model: Any, flat: dict[str, Tensor]) -> Tensor | None:
        reference = self._reference
        if reference is None:
            return None
        with torch.no_grad():
            if isinstance(reference, nn.Module):
                return self._margin(reference.to(flat["input_ids"].device), flat)
            with without_adapter(model):
                return self._margin(model, flat)

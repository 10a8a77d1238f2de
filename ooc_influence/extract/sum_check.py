"""The check of rows that are collected in training, where single samples' losses need not be known.

Entries summed over the samples of a batch must be the gradients that parameters receive from its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ooc_influence.extract.check import Disagreement, GradientCheck
from ooc_influence.extract.layers import Use
from ooc_influence.extract.selection import Trained
from ooc_influence.extract.sink import StorePlan
from ooc_influence.store import LograReduction


class SumCheck:
    """Compares entries of a batch, summed over its samples, with the gradients that parameters receive."""

    def __init__(self, uses: list[Use], device: torch.device, plan: StorePlan, model: nn.Module) -> None:
        self._mask = None if isinstance(plan.reduction, LograReduction) else plan.mask
        self._check = GradientCheck(uses, device, Trained.of(model), self._mask)
        self._layers = {use.layer for use in uses} - set(plan.mask.empty_modules)
        self._noted: list[tuple[Use, Any, Any]] = []

    @contextmanager
    def watching(self, b: int) -> Iterator[None]:
        """Read the gradients of a batch of b samples that parameters receive meanwhile."""
        self._noted.clear()
        self._check.start(dict.fromkeys(range(b), 1.0), self._layers)
        with self._check.following():
            yield

    def noting(self, add: Callable[[Use, Any, Any], None]) -> Callable[[Use, Any, Any], None]:
        """Return a receiver that keeps what it passes on: which entries to compare is known after the pass."""

        def receive(use: Use, x: Any, delta: Any) -> None:
            self._noted.append((use, x, delta))
            add(use, x, delta)

        return receive

    def disagreeing(self, rows: Tensor, b: int) -> list[Disagreement]:
        """Return the layers whose entries differ."""
        compared, gathered = self._check.gather_into(b)
        with torch.no_grad():
            for use, x, delta in self._noted:
                compared(use, x, delta)
        self._noted.clear()
        return self._check.compare(gathered(), None if self._mask is None else rows) + self._check.uncalled()

    @property
    def decided(self) -> bool:
        """Whether gradients were finite, so that something was compared."""
        return bool(self._check.errors) or not self._check.verifiable

    def facts(self) -> dict[str, Any]:
        """Return what a store records."""
        return self._check.facts() | {"of": "sums over a batch"}

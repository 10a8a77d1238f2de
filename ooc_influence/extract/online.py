"""Choosing among the samples of a batch while a model trains: by scores of their rows, before the pass that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.store import GradientStore

Floats = npt.NDArray[np.floating[Any]]


class Selector(Protocol):
    """What chooses samples.

    Attributes
    ----------
    store : GradientStore
        A store whose mask and basis rows must have.
    """

    store: GradientStore

    def scores(self, rows: Tensor) -> Tensor:
        """Return the scores of rows (b, columns) on the queries, (q, b)."""

    def weigh(self, scores: Floats) -> Any:
        """Return by what samples' losses are multiplied, (b,), from their scores (q, b)."""


@dataclass(frozen=True, eq=False)
class ChosenSamples:
    """A batch's samples.

    Attributes
    ----------
    rows : (b, columns) tensor
        Their rows, as they are stored.
    norms : (b,) tensor
        The masked rows' norms.
    weights : (b,) float32 tensor
        By what their losses are to be multiplied.
    scores : (b,) float32
        Means over the queries.
    """

    rows: Tensor
    norms: Tensor
    weights: Tensor
    scores: Floats

    @property
    def columns(self) -> dict[str, list[float]]:
        """The rows' columns."""
        return {"score": self.scores.tolist(), "chosen": self.weights.tolist()}


def choose_samples(selector: Selector, rows: Tensor, norms: Tensor) -> ChosenSamples:
    """Choose among samples with rows (b, columns) as they are stored, and the norms (b,) of their masked rows.

    Raises
    ------
    InputError
        If the selector's weights are not a finite number of at least 0 for each sample.
    """
    scores = selector.scores(rows).float().cpu().numpy()
    weights = np.asarray(selector.weigh(scores), np.float32)
    if weights.shape != (len(rows),) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError(f"expected a weight of at least 0 for each of {len(rows)} samples; received {weights!r}")
    return ChosenSamples(rows, norms, torch.from_numpy(weights).to(rows.device), scores.mean(axis=0))

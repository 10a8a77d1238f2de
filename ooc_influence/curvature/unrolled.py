"""The derivative of a training's final weights with respect to the gradient of each step, entry by entry.

A step of AdamW, with β₁ = a and β₂ = b (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101)::

    m' = a m + (1 - a) g        v' = b v + (1 - b) g²
    θ' = (1 - η δ) θ - η m̂ / (√v̂ + ε)        m̂ = m' / (1 - aᵗ),  v̂ = v' / (1 - bᵗ)

with weight decay δ; Adam adds δ θ to g instead. For SGD u' = μ u + (1 - τ) g with g for u' at the first step, and
θ' = θ - η u', or θ - η (g + μ u') in Nesterov's form. Backwards, with adjoints (derivatives of the final θ) of θ, m, v
that begin as 1, 0, 0, each step applies the chain rule in the opposite order; the adjoint of g is what is asked for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.segments import Segments
from ooc_influence.store import LoggedColumns, StepRecord

Values = npt.NDArray[np.float64]


class Unrolled:
    """The adjoints of the weights and of the optimiser's state, (k,) each, carried backwards step by step.

    Parameters
    ----------
    columns : LoggedColumns
        The optimiser's algorithm, and which parameter each column is of.
    between : Segments, optional
        The curvatures by which gradients follow the weights; default 0. Where a step would go beyond the minimum of
        that parabola, less, so that it just reaches it.
    """

    def __init__(self, columns: LoggedColumns, between: Segments | None = None) -> None:
        k = len(columns.owner)
        self._owner, self._between = np.maximum(columns.owner, 0), between
        self._owned = columns.owner >= 0
        self._adam = columns.facts["algorithm"] == "adam"
        self._weight, self._first, self._second = np.ones(k), np.zeros(k), np.zeros(k)

    def step(self, record: StepRecord, held: StepRecord) -> Values:
        """Go back over a step; return minus the derivative of the final weights with respect to its gradient, (k,).

        Parameters
        ----------
        record : StepRecord
            The step.
        held : StepRecord
            The one whose moments are taken for it: itself, where they were recorded.
        """
        scalars = record.scalars[self._owner].T
        stepped = self._owned & (scalars[6] > 0)
        if self._adam:
            gradient, first, second, reach = self._adam_step(record, held, scalars, stepped)
        else:
            gradient, first, second, reach = self._sgd_step(scalars)
        follows = scalars[2]
        if self._between is not None:
            curvature = self._between.at(record.step) * record.factor * record.total
            follows = follows + np.minimum(curvature, 1 / np.maximum(reach, 1e-300))
        weight = self._weight * (1 - scalars[0] * scalars[1]) + follows * gradient
        self._weight = np.where(stepped, weight, self._weight)
        self._first = np.where(stepped, first, self._first)
        self._second = np.where(stepped, second, self._second)
        return np.where(stepped, -gradient, 0.0)

    def _adam_step(
        self, record: StepRecord, held: StepRecord, scalars: Values, stepped: npt.NDArray[np.bool_]
    ) -> tuple[Values, Values, Values, Values]:
        """Return the adjoints of the gradient and of the state before a step, and how far a unit of gradient moves."""
        lr, _, _, beta1, beta2, eps, count = scalars
        assert held.vectors is not None
        then = scalars if held is record else held.scalars[self._owner].T
        m, v, g = held.vectors.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.sqrt(v / (1 - then[4] ** then[6]))
            mean = m / (1 - then[3] ** then[6])
            rate = lr / (root + eps)
            first = self._first - self._weight * rate / (1 - beta1**count)
            pull = self._weight * rate * mean / (2 * root * (root + eps) * (1 - beta2**count))
        moved = stepped & (v > 0)  # else the entry has had no gradient yet, and the step left it where it was
        first = np.where(moved, first, self._first)
        second = self._second + np.where(moved, pull, 0.0)
        seen = g if held is record else np.where(moved, mean, 0.0)
        gradient = (1 - beta1) * first + 2 * (1 - beta2) * seen * second
        return gradient, beta1 * first, beta2 * second, np.where(moved, rate, 0.0)

    def _sgd_step(self, scalars: Values) -> tuple[Values, Values, Values, Values]:
        lr, _, _, momentum, dampening, nesterov, state = scalars
        direct = -lr * self._weight
        fresh = state == 1
        buffer = self._first + direct * np.where(nesterov > 0, momentum, 1)
        share = np.where(fresh, 1.0, 1 - dampening)
        plain = momentum == 0
        gradient = np.where(plain, direct, share * buffer + np.where(nesterov > 0, direct, 0))
        first = np.where(plain | fresh, 0.0, momentum * buffer)
        return gradient, first, self._second, lr * np.where(plain, 1, share / np.maximum(1 - momentum, 1e-300))

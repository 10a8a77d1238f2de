"""What a reduction leaves out of the rows it is applied to: Σ w (‖g‖² − ‖g M‖²) / Σ w ‖g‖², measured as they pass.

The share that a basis knows is that of the rows it was made from, which it was chosen to keep: other rows lose more,
several times as much where the pilot was small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg import ONE_LABEL, Weighting, row_weights
from ooc_influence.store import GradientStore


class Share(NamedTuple):
    """How much of some live rows was kept: sums of their squared norms, weighted.

    Attributes
    ----------
    kept, whole : float
        Of reduced rows, and of masked ones.
    rows : int
        Rows summed.
    """

    kept: float = 0.0
    whole: float = 0.0
    rows: int = 0

    @classmethod
    def of(
        cls, reduced: npt.NDArray[Any], norms: npt.NDArray[Any], losses: npt.NDArray[Any],
        live: npt.NDArray[np.bool_], weights: Weighting | None,
    ) -> Share:  # fmt: skip
        """Return the share of reduced rows (b, r) whose masked rows had ``norms`` (b,)."""
        weight = np.where(live, row_weights(losses, weights), 0)
        kept = np.einsum("ij,ij->i", reduced, reduced).astype(np.float64)
        whole = np.where(live, norms, 0).astype(np.float64)
        return cls(float(weight @ kept), float(weight @ np.square(whole)), int(live.sum()))

    def plus(self, other: Share) -> Share:
        """Return the share of both sets of rows together."""
        return Share(self.kept + other.kept, self.whole + other.whole, self.rows + other.rows)

    @property
    def left_out(self) -> float:
        """The share of the trace that was left out."""
        return max(0.0, 1 - self.kept / self.whole) if self.whole > 0 else 0.0

    def record(self, store: GradientStore) -> Share:
        """Add this to what a store's attribute ``measured`` says of the rows written before; return the sum."""
        held = store.attrs.get("measured") or {}
        total = self.plus(Share(*(held.get(name, 0) for name in Share._fields)))
        if self.rows:
            store.record(measured=total._asdict() | {"left_out": total.left_out})
        return total


def basis_weights(attributes: Any, facts: Any) -> Weighting | None:
    """Return the weights of a basis, for rows whose recorded loss they hold for; else none."""
    found: Weighting | None = (facts or {}).get("weights")
    return found if attributes.get("loss_kind") == ONE_LABEL else None

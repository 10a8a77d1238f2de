"""Damping, computed in this one place: λ = damping · tr(F)/d (relative) or λ = damping (absolute).

F is the curvature actually used and d its side, zero eigenvalues counted. λ is an argument of every call and never
stored: what is stored is the undamped spectrum.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, SingularFisherError
from ooc_influence.options import DampingMode

DEFAULT_DAMPING = 0.1  # relative; near the best in the evaluation that accompanied the design


def damping_value(
    eigenvalues: npt.NDArray[np.float64],
    d: int,
    trace: float,
    damping: float,
    mode: DampingMode = "relative",
) -> float:
    """Return λ.

    Parameters
    ----------
    eigenvalues : (r,)
        The undamped spectrum, as far as it is known.
    d : int
        Side of F.
    trace : float
        tr(F).
    damping : float
        The factor (relative) or λ itself (absolute).
    mode : {"relative", "absolute"}
        Which.

    Raises
    ------
    InputError
        For a negative or non-finite damping or an unknown mode.
    SingularFisherError
        If λ is zero and F has no inverse.
    """
    if mode not in ("relative", "absolute"):
        raise InputError(f"expected damping_mode 'relative' or 'absolute'; received {mode!r}")
    if not math.isfinite(damping) or damping < 0:
        raise InputError(f"expected damping >= 0; received {damping}")
    value = damping * trace / d if mode == "relative" else damping
    if trace == 0:
        raise SingularFisherError(
            "expected a Fisher matrix that is not zero; received one of rows without any gradient: check the loss and "
            "the tapped layers"
        )
    if value == 0:
        # far above rounding, which an inverse magnifies
        safe = float(eigenvalues.max(initial=0.0) * d * np.finfo(np.float32).eps)
        rank = int((eigenvalues > safe).sum())
        if rank < d:
            raise SingularFisherError(
                f"expected damping > 0 for a Fisher matrix of numerical rank {rank} < {d}; received 0: "
                f"use the default, {DEFAULT_DAMPING}"
            )
    return float(value)


def spectrum_floor(eigenvalues: npt.NDArray[np.float64]) -> float:
    """Return the eigenvalue below which one is zero but for the rounding of sums in float32: ε₃₂ times their sum.

    F is summed with errors of about ε₃₂ √(F_ii F_jj), so no eigenvalue is off by much more than ε₃₂ tr(F); measured:
    0.17 of that, at most, for matrices with and without full rank, and spectra flat to falling as j⁻⁴.
    """
    return float(np.maximum(eigenvalues, 0).sum() * np.finfo(np.float32).eps)


def resolved(eigenvalues: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which eigenvalues are above :func:`spectrum_floor`."""
    return np.asarray(eigenvalues > spectrum_floor(eigenvalues))

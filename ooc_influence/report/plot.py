"""Plots as matplotlib figures, for notebooks and papers: a spectrum, a mislabel curve, self-influence.

Figures are made without pyplot: none is shown or kept open unless the caller does so; a notebook shows the one that a
cell returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import Curvature
from ooc_influence.errors import InputError
from ooc_influence.progress import optional_library
from ooc_influence.report.facts import dimension_curve, resolved_eigenvalues

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(columns: int = 1) -> tuple[Figure, list[Any]]:
    figures = optional_library("matplotlib.figure", "plots")
    figure = figures.Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _numbers(values: npt.ArrayLike, what: str) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected {what} as numbers (n,); received {values!r}") from error


def spectrum(curvature: Curvature, damping: float | None = None) -> Figure:
    """Return a figure of F's eigenvalues beside the effective dimension d(λ) = Σ e/(e + λ).

    Parameters
    ----------
    curvature : Curvature
        What :func:`fit_fisher` or :func:`fit_gram` returned.
    damping : float, optional
        Relative damping to mark; default the curvature's own.

    Raises
    ------
    InputError
        For anything but a curvature, or one without any positive eigenvalue.
    MissingExtraError
        Without matplotlib.
    """
    if not isinstance(curvature, Curvature):
        raise InputError(
            f"expected a Curvature; received {curvature!r}: give Curvature.open(path), or what a fit returned"
        )
    values = resolved_eigenvalues(curvature)
    if not len(values):
        raise InputError(f"expected a curvature with positive eigenvalues; received {curvature!r}")
    chosen = curvature.damping_value(damping)
    figure, (left, right) = _figure(2)
    left.loglog(np.arange(1, len(values) + 1), values)
    left.axhline(chosen, color="C1", linestyle="--", label=f"λ = {chosen:.3g}")
    left.set(
        xlabel="number", ylabel="eigenvalue", title=f"Spectrum of F, {len(values)} of {curvature.d} above rounding"
    )
    _, lambdas, dimensions = zip(*dimension_curve(curvature), strict=True)
    right.semilogx(lambdas, dimensions)
    dimension = curvature.effective_dimension(curvature.lambdas(damping)[0])
    right.plot([chosen], [dimension], "o", color="C1", label=f"d(λ) = {dimension:.1f}")
    right.set(xlabel="λ", ylabel="d(λ)", title="Effective dimension")
    left.legend()
    right.legend()
    return figure


def mislabel_curve(scores: npt.ArrayLike | Mapping[str, npt.ArrayLike], flagged: npt.ArrayLike) -> Figure:
    """Return a figure of the share of wrong labels found against the share of rows checked, highest scores first.

    Parameters
    ----------
    scores : (n,) float, or a mapping of name to (n,)
        Higher is more suspect: self-influence, the loss. NaN (a dropped row) is checked last.
    flagged : (n,) bool
        The rows that are wrong.

    Raises
    ------
    InputError
        If they are not numbers, shapes differ, or all rows or none are flagged.
    MissingExtraError
        Without matplotlib.
    """
    named = scores if isinstance(scores, Mapping) else {"score": scores}
    marks = np.asarray(flagged, bool)
    figure, (axis,) = _figure()
    if marks.ndim != 1 or not 0 < marks.sum() < len(marks):
        raise InputError(f"expected flags (n,), some set and some not; received {int(marks.sum())} of {marks.size} set")
    checked = np.arange(len(marks) + 1) / len(marks)
    for name, ranking in named.items():
        values = _numbers(ranking, f"scores {name!r}")
        if values.shape != marks.shape:
            raise InputError(f"expected scores {name!r} of shape {marks.shape}; received {values.shape}")
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
        axis.plot(checked, np.concatenate([[0], np.cumsum(marks[order]) / marks.sum()]), label=name)
    axis.plot([0, marks.mean(), 1], [0, 1, 1], color="0.6", linestyle=":", label="best possible")
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="chance")
    axis.set(xlabel="share of rows checked", ylabel="share of wrong labels found", title="Wrong labels found")
    axis.legend()
    return figure


def self_influence(values: npt.ArrayLike, flagged: npt.ArrayLike | None = None, bins: int = 60) -> Figure:
    """Return a histogram of self-influence, on a logarithmic axis.

    Parameters
    ----------
    values : (n,) float
        What :func:`ooc_influence.self_influence` returned; NaN and zeros are counted in the title, not drawn.
    flagged : (n,) bool, optional
        Rows to draw on their own, such as known wrong labels.
    bins : int
        Bars.

    Raises
    ------
    InputError
        If they are not numbers, shapes differ, or no value is positive.
    MissingExtraError
        Without matplotlib.
    """
    numbers = _numbers(values, "values")
    marks = np.zeros(numbers.shape, bool) if flagged is None else np.asarray(flagged, bool)
    if numbers.ndim != 1 or marks.shape != numbers.shape:
        raise InputError(f"expected values (n,) and flags (n,); received {numbers.shape} and {marks.shape}")
    drawn = np.isfinite(numbers) & (numbers > 0)
    if not drawn.any():
        raise InputError("expected some positive self-influence; received none: were all rows dropped?")
    low, high = numbers[drawn].min(), numbers[drawn].max()
    edges = np.geomspace(low, high, bins + 1) if high > low else np.array([low / 2, low * 2])
    figure, (axis,) = _figure()
    axis.hist(numbers[drawn & ~marks], edges, label="rows", color="C0", alpha=0.8)
    if flagged is not None:
        axis.hist(numbers[drawn & marks], edges, label="flagged", color="C1", alpha=0.8)
        axis.legend()
    left_out = int((~drawn).sum())
    axis.set_xscale("log")
    axis.set(
        xlabel="self-influence",
        ylabel="rows",
        title=f"Self-influence of {int(drawn.sum())} rows" + (f" ({left_out} not drawn)" if left_out else ""),
    )
    return figure

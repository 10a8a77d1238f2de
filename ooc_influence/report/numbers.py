"""What a page's plots are drawn from: a spectrum with d(λ), histograms, group sums as a table; a few kilobytes each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import Curvature
from ooc_influence.curvature.damping import resolved
from ooc_influence.influence.groups import GroupInfluence
from ooc_influence.store import GradientStore

_BINS = 48
_POINTS = 600  # of a spectrum
_LEVELS = np.logspace(-4, 2, 61)  # relative dampings
_GROUPS = 40  # columns of a heat map; the others are added up
_QUERIES = 200  # its rows
_OTHERS = "(others)"


def spectrum_points(curvature: Curvature, chosen: float, factor: float | None) -> dict[str, Any]:
    """Return eigenvalues above rounding by number, thinned evenly in the logarithm, and d(λ) at many dampings.

    Parameters
    ----------
    curvature : Curvature
        Whose.
    chosen : float
        λ that the scores were computed with.
    factor : float, optional
        The relative damping that it comes from, if it was relative.
    """
    values = np.sort(curvature.eigenvalues[resolved(curvature.eigenvalues)])[::-1]
    places = np.arange(len(values))
    if len(values) > _POINTS:
        places = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(np.int64)) - 1
    curve = []
    for level in _LEVELS if curvature.trace > 0 else ():
        own = curvature.damping_value(float(level))
        curve.append([float(level), float(own), curvature.effective_dimension(own)])
    facts = curvature.facts()
    return {
        "facts": facts,
        "numbers": (places + 1).tolist(),
        "eigenvalues": values[places].tolist(),
        "positive": len(values),
        "d": curvature.d,
        "trace": curvature.trace,
        "mean": curvature.trace / curvature.d,
        "curve": curve,
        "lambda": float(chosen),
        "damping": factor,
        "dimension": curvature.effective_dimension(chosen) if chosen > 0 else float(len(values)),
    }


def histogram(name: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    """Return counts in bins, even in the logarithm where positive values span much; zeros and NaN are told apart."""
    found = np.asarray(values, np.float64)
    finite = found[np.isfinite(found)]
    positive = finite[finite > 0]
    log = len(positive) > 0 and not (finite < 0).any() and positive.max() > 50 * max(np.median(positive), 1e-300)
    log = bool(log or (len(positive) > 0 and positive.max() > 1e3 * positive.min() and len(positive) == len(finite)))
    drawn = positive if log else finite
    if not len(drawn):
        edges, counts = np.array([0.0, 1.0]), np.array([0])
    elif drawn.min() == drawn.max():
        edges, counts = np.array([drawn.min() - 0.5, drawn.min() + 0.5]), np.array([len(drawn)])
    else:
        low, high = drawn.min(), drawn.max()
        edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
        edges[0], edges[-1] = low, high  # to rounding they are not
        counts = np.histogram(drawn, edges)[0]
    quantiles = np.quantile(finite, [0, 0.05, 0.5, 0.95, 1]).tolist() if len(finite) else []
    return {
        "name": name,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "log": log,
        "zeros": int((finite == 0).sum()) if log else 0,
        "missing": int(len(found) - len(finite)),
        "quantiles": quantiles,
    }


def heat_map(by: str, groups: GroupInfluence, query: GradientStore) -> dict[str, Any]:
    """Return sums by group as a table.

    Its lines are means over the queries of each value of the same column, or else of their label or source; where they
    have none of these, the first queries. Groups beyond the strongest are added up.
    """
    sums, counts, names = groups.sums, groups.counts, [str(name) for name in groups.names.tolist()]
    column = next((name for name in (by, "label", "source") if name in query.layout.columns), None)
    lines, labels = sums, [str(name) for name in groups.query_ids.tolist()]
    if column is not None:
        values, codes = np.unique(query.column(column), return_inverse=True)
        live = ~np.isnan(sums).any(1)
        kept = np.unique(codes[live])
        lines = np.array([sums[live & (codes == code)].mean(0) for code in kept]).reshape(len(kept), len(names))
        labels = [str(value) for value in values[kept].tolist()]
    shown = lines[:_QUERIES]
    if len(names) > _GROUPS:
        strong = np.argsort(-np.nan_to_num(np.abs(shown)).sum(0), kind="stable")
        first, rest = np.sort(strong[: _GROUPS - 1]), strong[_GROUPS - 1 :]
        shown = np.concatenate([shown[:, first], shown[:, rest].sum(1, keepdims=True)], axis=1)
        counts = np.concatenate([counts[first], counts[rest].sum(keepdims=True)])
        names = [names[place] for place in first] + [_OTHERS]
    return {
        "by": by,
        "queries_by": column,
        "groups": names,
        "counts": counts.tolist(),
        "queries": labels[:_QUERIES],
        "left_out": max(0, len(labels) - _QUERIES),
        "sums": shown.tolist(),
    }

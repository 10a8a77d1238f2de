"""What was ticked on a page of label errors, read back from the file it exported, checked against the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import open_records
from ooc_influence.curvature import Curvature, resolved
from ooc_influence.errors import InputError, MismatchError, OocInfluenceError
from ooc_influence.influence import GroupInfluence
from ooc_influence.memory import format_bytes
from ooc_influence.options import DampingMode
from ooc_influence.store import GradientStore, claimed_rows, missing_spans, names, read_claims, tree_bytes

_ACTIONS = ("drop", "relabel")
_FORMULA = tuple("'=+-@\t\r")  # cells that begin so were written behind an apostrophe: spreadsheets compute the others


class Decision(NamedTuple):
    """What to do with a row.

    Attributes
    ----------
    row : int
        Its number.
    id : str
        Its id, as text.
    action : {"drop", "relabel"}
        What.
    new_label, note : str
        As typed; empty where nothing was.
    """

    row: int
    id: str
    action: str
    new_label: str
    note: str


def read_decisions(path: str | Path, store: GradientStore) -> list[Decision]:
    """Return what a file exported from a report says of rows of a store.

    Raises
    ------
    InputError
        If it cannot be read, names no row, or a record is no decision.
    MismatchError
        If a row has another id in the store: the report was of another one.
    """
    place = Path(path)
    if not {".csv", ".jsonl"} & {suffix.lower() for suffix in place.suffixes}:
        raise InputError(f"expected label-errors.csv or .jsonl, as a report exports it; received {place}")
    found = [_decision(record, number, place) for number, record in enumerate(open_records(place))]
    if not found:
        raise InputError(f"expected rows in {place}; received none: tick some on the page of label errors, then export")
    rows = np.array([own.row for own in found], np.int64)
    if not 0 <= rows.min() <= rows.max() < store.n:
        raise MismatchError(
            f"expected rows from 0 to {store.n - 1} of {store.path} in {place}; received {int(rows.min())} to "
            f"{int(rows.max())}: the report was of another store"
        )
    for own, name in zip(found, store.ids(rows).tolist(), strict=True):
        if own.id != str(name):
            raise MismatchError(
                f"expected row {own.row} of {store.path} to be {own.id!r}, as in {place}; received {str(name)!r}: the "
                "report was of another store"
            )
    return found


def _decision(record: dict[str, Any], number: int, path: Path) -> Decision:
    spreadsheet = path.suffix.lower() == ".csv"
    values = {name: _plain(record.get(name), spreadsheet) for name in ("row", "id", "action", "new_label", "note")}
    if not values["row"].isdigit() or values["action"] not in _ACTIONS:
        raise InputError(
            f"expected row, id and action ({' or '.join(_ACTIONS)}) in record {number} of {path}; received {record}"
        )
    return Decision(int(values["row"]), *(values[name] for name in ("id", "action", "new_label", "note")))


def _plain(value: Any, spreadsheet: bool) -> str:
    text = "" if value is None else str(value)
    return text[1:] if spreadsheet and text.startswith("'") and text[1:].startswith(_FORMULA) else text


_BINS = 48
_POINTS = 600  # of a spectrum
_LEVELS = np.logspace(-4, 2, 61)  # relative dampings
_GROUPS = 40  # columns of a heat map; the others are added up
_QUERIES = 200  # its rows
_OTHERS = "(others)"


def spectrum_points(curvature: Curvature, damping: float | None, mode: DampingMode) -> dict[str, Any]:
    """Return eigenvalues above rounding by number, thinned evenly in the logarithm, and d(λ) at many dampings.

    Parameters
    ----------
    curvature : Curvature
        Whose.
    damping : float, optional
        What the scores were computed with; by default the curvature's own.
    mode : {"relative", "absolute"}
        Its unit.
    """
    chosen, lambdas = curvature.damping_value(damping, mode), curvature.lambdas(damping, mode)
    values = np.sort(curvature.eigenvalues[resolved(curvature.eigenvalues)])[::-1]
    places = np.arange(len(values))
    if len(values) > _POINTS:
        places = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(np.int64)) - 1
    curve = []
    for level in _LEVELS.tolist() if curvature.trace > 0 else ():
        dimension = curvature.effective_dimension(curvature.lambdas(level)[0])
        curve.append([level, curvature.damping_value(level), dimension])
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
        "lambda": chosen,
        "damping": (curvature.damping if damping is None else damping) if mode == "relative" else None,
        "dimension": curvature.effective_dimension(lambdas[0]) if chosen > 0 else float(len(values)),
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


_LISTED = 20  # of what is missing: more would scroll away


def describe(store: Any) -> str:
    """Return a store in a line, and what its reduction leaves out."""
    facts, lines = store.attrs.get("reduction") or {}, [repr(store)]
    if "left_out" in facts:
        left_out = f"{facts['left_out']:.2%} of the trace of the {facts['pilot_rows']} rows the basis is made from"
        lines.append(f"{facts['columns']} of {facts['rows']} directions leave out {left_out}")
    if "measured" in store.attrs:
        measured = store.attrs["measured"]
        lines.append(f"and {measured['left_out']:.2%} of that of the {measured['rows']} rows written")
    return "\n".join([*lines, *_verified(store)])


def verification_facts(store: Any) -> dict[str, Any] | None:
    """Return what of a store's rows was compared with autograd, and what they do not cover; None where unrecorded."""
    found = store.attrs.get("verification")
    if found is None:
        return None
    left_out = sorted(found.get("left_out", {}).items(), key=lambda item: -item[1]["share"])
    named = [f"{name} ({each['reason']}, {each['share']:.2%})" for name, each in left_out[:_LISTED]]
    unverified = [f"{name} ({reason})" for name, reason in list(found.get("unverified", {}).items())[:_LISTED]]
    return {
        "checked": found["checked"], "share": found.get("share"), "worst_error": found.get("worst_error"),
        "worst_layer": found.get("worst_layer"), "tolerance": found.get("tolerance"), "left_out": named,
        "unverified": unverified,
    }  # fmt: skip


def _verified(store: Any) -> list[str]:
    """Return in words what was verified of a store's rows."""
    facts = verification_facts(store)
    if facts is None:
        return []
    if not facts["checked"]:
        lines = ["entries were not compared with autograd"]
    else:
        worst = "" if facts["worst_error"] is None else f" (largest difference {facts['worst_error']:.1e})"
        lines = [f"{facts['share']:.2%} of the trained parameters verified against autograd{worst}"]
    lines += [f"not covered: {', '.join(facts['left_out'])}"] if facts["left_out"] else []
    return lines + ([f"not verifiable: {', '.join(facts['unverified'])}"] if facts["unverified"] else [])


def store_facts(store: Any) -> dict[str, Any]:
    """Return what ``info`` tells about a store, without its layers and curvatures."""
    size = tree_bytes(store.path)
    attrs, layout = store.attrs, store.layout
    return {
        "store": str(store.path),
        "rows": store.n,
        "committed": store.committed,
        "planned": layout.planned_rows,
        "missing": _missing(store),
        "dropped": int(store.dropped.sum()) if store.has_dropped else 0,
        "k": store.k,
        "p": attrs["p"],
        "dtype": layout.dtype,
        "codec": layout.codec,
        "column_scale": layout.column_scale,
        "reduction": attrs.get("reduction"),
        "measured": attrs.get("measured"),
        "batching": attrs.get("batching"),
        "chunk_rows": layout.chunk_rows,
        "chunks": len(store.records),
        "bytes": size,
        "size": format_bytes(size),
        "compressor": attrs.get("compressor"),
        "covered": attrs.get("covered"),
        "verification": verification_facts(store),
        "mask_digest": store.mask_digest,
        "rows_digest": store.rows_digest(),
        "model": attrs.get("model"),
        "loss_kind": attrs.get("loss_kind"),
        "ids": layout.ids,
        "columns": layout.columns,
        "made_from": attrs.get("made_from"),
        "origin": attrs.get("origin"),
        "created": attrs["created"],
        "format": attrs["format"],
        "version": attrs["version"],
        "writers": _writers(store),
    }


def _missing(store: Any) -> list[list[int]]:
    """Return the first row ranges that are planned, or lie before committed rows, and are not committed."""
    spans = missing_spans(store.records, store.layout, 0, store.layout.planned_rows)
    return [[start, stop] for start, stop in spans if stop is not None][:_LISTED]


def _writers(store: Any) -> list[dict[str, Any]]:
    """Return who writes, or wrote and was not finished, and how far each is."""
    found = []
    for name, (_, owner) in sorted(read_claims(store.path).items()):
        rows = claimed_rows(name)
        if rows is None or (owner.released and rows[1] is None):
            continue
        start, stop = rows
        size = store.layout.chunk_rows
        held = store.committed_rows[start // size : None if stop is None else -(-stop // size)]
        state = "finished" if owner.released else ("alive" if owner.alive() else "dead")
        if owner.released and stop is not None and held.sum() < stop - start:
            state = "stopped"
        found.append(
            {"rows": f"{start}-{'end' if stop is None else stop}", "committed": int(held.sum()), "state": state,
             "host": owner.record.get("host"), "pid": owner.record.get("pid")}
        )  # fmt: skip
    return found


def layer_facts(store: Any) -> list[dict[str, Any]]:
    """Return the tapped layers, and how many entries of each are kept."""
    return [
        {"layer": module.layer.name or "(the model)", "kind": module.layer.kind,
         "shape": "x".join(map(str, module.layer.shape)), "kept": len(module.rows), "entries": module.layer.entries}
        for module in store.mask.modules
    ]  # fmt: skip


def curvature_states(store: Any) -> dict[str, str]:
    """Return the curvatures fitted on a store, and whether each is up to date, or what is wrong with it."""
    found = {}
    for name in names(store.path / "curvature"):
        if name.startswith(".") or name == "zarr.json":
            continue
        try:
            Curvature.open(store.path / "curvature" / name).check(store)
            found[name] = "up to date"
        except OocInfluenceError as error:
            found[name] = str(error)
    return found

"""Facts of a store and its curvatures, tables and small images for a terminal, and the decisions a page exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import open_records
from ooc_influence.curvature import PRIOR, TRAJECTORY, Curvature, find_effects, has_prior, resolved
from ooc_influence.errors import InputError, MismatchError, OocInfluenceError, counted
from ooc_influence.memory import format_bytes
from ooc_influence.store import GradientStore, claimed_rows, exists, missing_spans, names, read_claims, tree_bytes

_LISTED = 20  # of what is missing: more would scroll away


def describe(store: GradientStore) -> str:
    """Return a store in a line, what its reduction leaves out, and how its rows were verified."""
    reduction, lines = store.attrs.get("reduction") or {}, [repr(store)]
    if store.attrs.get("compressor"):
        lines.append(_describe_compressor(store.attrs["compressor"]))
    if "left_out" in reduction:
        left_out = (
            f"{reduction['left_out']:.2%} of the trace of the {reduction['pilot_rows']} rows the basis is made from"
        )
        lines.append(f"{reduction['columns']} of {reduction['rows']} directions leave out {left_out}")
    if "measured" in store.attrs:
        measured = store.attrs["measured"]
        lines.append(f"and {measured['left_out']:.2%} of that of the {measured['rows']} rows written")
    labels = store.attrs.get("labels") or {}
    earlier = store.attrs.get("checkpoints") or ()
    if earlier:
        lines.append(f"rows averaged over {len(earlier) + 1} checkpoints, in the basis of the last one")
    if labels.get("kind") == "sampled":
        draws = counted(labels["draws"], "draw of each sample", "draws of each sample")
        lines.append(f"labels sampled from the model, {draws}, seed {labels['seed']}")
    verification = verification_facts(store)
    if verification is None:
        return "\n".join(lines)
    if verification["checked"]:
        error = verification["worst_error"]
        worst = "" if error is None else f" (largest difference {error:.1e})"
        lines.append(f"{verification['share']:.2%} of the trained parameters verified against autograd{worst}")
    else:
        lines.append("entries were not compared with autograd")
    for what, kind in (("not covered", "left_out"), ("not verifiable", "unverified")):
        lines += [f"{what}: {', '.join(verification[kind])}"] if verification[kind] else []
    return "\n".join(lines)


def _describe_compressor(compressor: Mapping[str, Any]) -> str:
    settings = ", ".join(_setting(name, value) for name, value in compressor.items() if name != "name")
    return f"compressor {compressor['name']}: {settings}{'' if 'reduce' in compressor else ', not reduced'}"


def _setting(name: str, value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"{name}={value}"
    return f"{name}=({', '.join(_setting(*pair) for pair in value.items())})"


_UNITS = {
    "none": "not normalised", "train": "divided by the train row's norm", "cosine": "divided by both norms",
}  # fmt: skip


def describe_scoring(settings: Mapping[str, Any]) -> str:
    """Return in a line what scores were computed with, defaults included: :attr:`TopInfluential.settings`."""
    unit, curvature, minus = _UNITS[settings["normalize"]], settings["curvature"], settings.get("minus")
    if minus is not None:
        unit += f", queries minus the mean of {', '.join(minus) if isinstance(minus, list) else minus}"
    curvatures = curvature if isinstance(curvature, list) else [curvature]
    if all(each is None for each in curvatures):
        return f"scores: no curvature (dot products), {unit}"
    values = np.ravel([value for value in np.atleast_1d(settings["damping"]) if value is not None])
    dampings = ", ".join(f"{value:.4g}" for value in dict.fromkeys(values.tolist()))
    used = ", ".join("none" if each is None else each for each in curvatures)
    if not len(values):
        return f"scores: {used}, {unit}"
    return f"scores: curvature {used}, {settings['damping_mode']} damping {dampings}, {unit}"


def describe_search(search: Mapping[str, Any]) -> str | None:
    """Return in a line how a sketch found the rows of lists, from :attr:`TopInfluential.search`; None without one."""
    if "sketch" not in search:
        return None
    found = f"candidates: {search['candidates']:,} for each list, by {search['sketch']}: "
    if search["measured"] is None:
        scanned = search["scanned_queries"]
        return (
            f"{found}all lists are proven complete; {search['rescored']:.2%} of the scores were computed for it, and "
            f"{scanned} of {search['queries']} queries were compared with all rows"
        )
    measured = f"{search['recall']:.1%} of the best rows are among them, measured on {search['measured']}"
    if "queries" not in search:
        return found + measured
    proven = (
        f"recall is proven for {search['proven_queries']} of {search['queries']} queries "
        f"({search['proven_share']:.1%} of listed rows)"
    )
    return found + (proven if search["proven_queries"] == search["queries"] else f"{proven}; for the rest, {measured}")


def verification_facts(store: GradientStore) -> dict[str, Any] | None:
    """Return how a store's rows were compared with autograd, and what they do not cover; None where unrecorded."""
    record = store.attrs.get("verification")
    if record is None:
        return None
    left_out = sorted(record.get("left_out", {}).items(), key=lambda item: -item[1]["share"])
    return {
        "checked": record["checked"],
        **{name: record.get(name) for name in ("share", "worst_error", "worst_layer", "tolerance")},
        "left_out": [f"{name} ({each['reason']}, {each['share']:.2%})" for name, each in left_out[:_LISTED]],
        "unverified": [f"{name} ({why})" for name, why in list(record.get("unverified", {}).items())[:_LISTED]],
    }


def store_facts(store: GradientStore) -> dict[str, Any]:
    """Return what ``info`` prints of a store, without its layers and curvatures."""
    size = tree_bytes(store.path)
    attrs, layout = store.attrs, store.layout
    missing = missing_spans(store.records, layout, 0, layout.planned_rows)  # planned, or before committed rows
    return {
        "store": str(store.path),
        "rows": store.n,
        "committed": store.committed,
        "planned": layout.planned_rows,
        "missing": [[start, stop] for start, stop in missing if stop is not None][:_LISTED],
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
        "labels": attrs.get("labels"),
        "sample": attrs.get("sample"),
        "checkpoints": attrs.get("checkpoints"),
        "ids": layout.ids,
        "columns": layout.columns,
        "made_from": attrs.get("made_from"),
        "origin": attrs.get("origin"),
        "created": attrs["created"],
        "format": attrs["format"],
        "version": attrs["version"],
        "writers": _writers(store),
    }


def _writers(store: GradientStore) -> list[dict[str, Any]]:
    """Return who is writing, or stopped before the end, and how far each is."""
    writers = []
    for name, (_, owner) in sorted(read_claims(store.path).items()):
        rows = claimed_rows(name)
        if rows is None or (owner.released and rows[1] is None):
            continue
        start, stop = rows
        size = store.layout.chunk_rows
        committed = int(store.committed_rows[start // size : None if stop is None else -(-stop // size)].sum())
        state = "finished" if owner.released else ("alive" if owner.alive() else "dead")
        if owner.released and stop is not None and committed < stop - start:
            state = "stopped"
        writers.append(
            {"rows": f"{start}-{'end' if stop is None else stop}", "committed": committed, "state": state,
             "host": owner.record.get("host"), "pid": owner.record.get("pid")}
        )  # fmt: skip
    return writers


def layer_facts(store: GradientStore) -> list[dict[str, Any]]:
    """Return the tapped layers, and how many entries of each are kept."""
    return [
        {"layer": module.layer.name or "(the model)", "kind": module.layer.kind,
         "shape": "x".join(map(str, module.layer.shape)), "kept": len(module.rows), "entries": module.layer.entries}
        for module in store.mask.modules
    ]  # fmt: skip


_DECADES = (-4, 2)  # of the relative dampings at which d(λ) is drawn; wider where scores use another
_FARTHEST = 12  # decades


def resolved_eigenvalues(curvature: Curvature) -> npt.NDArray[np.float64]:
    """Return the eigenvalues above rounding, descending."""
    return np.sort(curvature.eigenvalues[resolved(curvature.eigenvalues)])[::-1]


def dimension_curve(curvature: Curvature, used: float = 0.0) -> list[list[float]]:
    """Return relative damping, λ and d(λ) at ten dampings a decade; where a call cannot choose one, as if it could.

    ``used`` is the λ of the scores, which is among the dampings' decades.
    """
    takes = curvature.takes_damping
    low, high = _DECADES
    if used > 0:
        decade = np.log10(used / (curvature.damping_value(1.0) if takes else 1.0))
        low = max(-_FARTHEST, min(low, int(np.floor(decade))))
        high = min(_FARTHEST, max(high, int(np.ceil(decade))))
    levels = np.logspace(low, high, 10 * (high - low) + 1).tolist()
    if not takes:
        return [[level, level, curvature.effective_dimension(level)] for level in levels]
    return [[level, curvature.damping_value(level), curvature.effective_dimension(curvature.lambdas(level)[0])]
            for level in levels]  # fmt: skip


def curvature_states(store: GradientStore) -> dict[str, str]:
    """Return the curvatures fitted on a store, and whether each is up to date, or what is wrong with it."""
    states = {PRIOR: "of the basis itself, without a fit"} if has_prior(store) else {}
    for name in names(store.path / "curvature"):
        if name.startswith(".") or name == "zarr.json":
            continue
        try:
            Curvature.open(store.path / "curvature" / name).check(store)
            states[name] = "up to date"
        except OocInfluenceError as error:
            states[name] = str(error)
    if exists(store.path / TRAJECTORY):
        try:
            find_effects(store, TRAJECTORY)
            states[TRAJECTORY] = "up to date"
        except OocInfluenceError as error:
            states[TRAJECTORY] = str(error)
    return states


_SHADES = " ░▒▓█"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an aligned text table; numbers go right, text left, floats with four significant digits."""
    cells = [[f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value) for value in row]
             for row in rows]  # fmt: skip
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]
    align = [str.rjust if rows and isinstance(value, (int, float, np.number)) else str.ljust
             for value in (rows[0] if rows else header)]  # fmt: skip
    lines = [list(header), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(to(text, width) for to, text, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )


def draw_images(images: Sequence[npt.NDArray[Any]], captions: Sequence[Sequence[str]], gap: int = 3) -> str:
    """Return grey images (h, w), values in [0, 1], side by side, two characters a pixel, captions (lines) above."""
    width = 2 * images[0].shape[1]
    width = max(width, *(len(line) for lines in captions for line in lines))
    rows = [(" " * gap).join(lines[number].ljust(width) for lines in captions) for number in range(len(captions[0]))]
    for row in range(images[0].shape[0]):
        parts = []
        for image in images:
            levels = np.clip(np.rint(np.asarray(image[row], float) * (len(_SHADES) - 1)), 0, len(_SHADES) - 1)
            parts.append("".join(_SHADES[int(level)] * 2 for level in levels).ljust(width))
        rows.append((" " * gap).join(parts))
    return "\n".join(line.rstrip() for line in rows)


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
    file = Path(path)
    if not {".csv", ".jsonl"} & {suffix.lower() for suffix in file.suffixes}:
        raise InputError(f"expected label-errors.csv or .jsonl, as a report exports it; received {file}")
    decisions = [_decision(record, number, file) for number, record in enumerate(open_records(file))]
    if not decisions:
        raise InputError(f"expected rows in {file}; received none: tick some on the page of label errors, then export")
    rows = np.array([decision.row for decision in decisions], np.int64)
    if not 0 <= rows.min() <= rows.max() < store.n:
        raise MismatchError(
            f"expected rows from 0 to {store.n - 1} of {store.path} in {file}; received {int(rows.min())} to "
            f"{int(rows.max())}: the report was of another store"
        )
    for decision, name in zip(decisions, store.ids(rows).tolist(), strict=True):
        if decision.id != str(name):
            raise MismatchError(
                f"expected row {decision.row} of {store.path} to be {decision.id!r}, as in {file}; received "
                f"{str(name)!r}: the report was of another store"
            )
    return decisions


def _decision(record: dict[str, Any], number: int, path: Path) -> Decision:
    spreadsheet = path.suffix.lower() == ".csv"
    values = {name: _cell_text(record.get(name), spreadsheet) for name in ("row", "id", "action", "new_label", "note")}
    if not values["row"].isdigit() or values["action"] not in _ACTIONS:
        raise InputError(
            f"expected row, id and action ({' or '.join(_ACTIONS)}) in record {number} of {path}; received {record}"
        )
    return Decision(int(values["row"]), *(values[name] for name in ("id", "action", "new_label", "note")))


def _cell_text(value: Any, spreadsheet: bool) -> str:
    text = "" if value is None else str(value)
    return text[1:] if spreadsheet and text.startswith("'") and text[1:].startswith(_FORMULA) else text

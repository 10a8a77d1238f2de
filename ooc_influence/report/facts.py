"""What there is to know of a store: its rows, how they were made, who writes, its layers and curvatures."""

from __future__ import annotations

from typing import Any

from ooc_influence.curvature import Curvature
from ooc_influence.errors import OocInfluenceError
from ooc_influence.memory import format_bytes
from ooc_influence.store import missing_spans, names, tree_bytes
from ooc_influence.store.claim import claimed_rows, read_claims
from ooc_influence.store.commits import rows_in

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
        held = rows_in(store.records)[start // size : None if stop is None else -(-stop // size)]
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

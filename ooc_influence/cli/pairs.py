"""What the commands over train rows and queries share: their arguments, and the calls that these stand for."""

from __future__ import annotations

from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.errors import InputError, counted

both = options.several(click.argument("query", type=options.PATH), click.argument("train", type=options.PATH))
pairing = options.several(
    click.option("--also", nargs=2, multiple=True, type=options.PATH, metavar="QUERY TRAIN",
                 help="Another checkpoint's stores of the same rows; scores are averaged. May be repeated."),
    options.dot,
    click.option("--average-by", metavar="COLUMN", help="One query for each value of a column of QUERY."),
    options.where,
)  # fmt: skip


def first(stores: Any) -> Any:
    """Return the store, or the first of several checkpoints' stores, which have the same rows."""
    return stores[0] if isinstance(stores, list) else stores


def paired(query: str, train: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a library call that the options of a command stand for."""
    also, column, minus = settings.pop("also"), settings.pop("average_by"), settings.pop("minus")
    if settings["average_queries"] and column is not None:
        raise InputError("expected --average-queries or --average-by; received both")
    queries = [query, *(pair[0] for pair in also)] if also else query
    found = arguments((train, *(pair[1] for pair in also)), settings)
    controls = None if not minus else (list(minus) if len(minus) > 1 else minus[0])
    averaged = {} if column is None else {"average_queries": column}
    return {"query": queries, **found, "minus": controls} | averaged


def arguments(trains: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that train stores and the options of every scoring command stand for."""
    cache, size = settings.pop("cache"), settings.pop("cache_size")
    stores = [options.open_train(path, cache, size) for path in trains]
    curvature, damping, rows = settings["curvature"], settings["damping"], settings["rows"]
    if settings.pop("dot"):
        if curvature:
            raise InputError("expected --dot or --curvature; received both")
        curvature = (False,)
    for name, values in (("--curvature", curvature), ("--rows", rows)):
        if len(values) > 1 and len(values) != len(trains):
            raise InputError(f"expected {name} once for each of {len(trains)} checkpoints; received {len(values)}")
    trained_on = [_read_rows(path) for path in rows]
    several = len(trains) > 1
    if several and len(trained_on) == 1:
        raise InputError(f"expected --rows once for each of {len(trains)} checkpoints ('all': all); received 1")
    return settings | {
        "train": stores if several else stores[0],
        "curvature": None if not curvature else (list(curvature) if len(curvature) > 1 else curvature[0]),
        "damping": None if not damping else (list(damping) if len(damping) > 1 else damping[0]),
        "rows": None if not trained_on else (trained_on if several else trained_on[0]),
        "progress": True,
    }


def _read_rows(path: str) -> Any:
    import numpy as np

    if path == "all":
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"expected row numbers or a mask in a .npy file; received {path}: {error}") from error


def print_scores(scores: Any, out: str, as_json: bool) -> None:
    """Print where scores were written, of how many queries and rows."""
    sizes = dict(zip(scores.attrs["dims"], scores.shape, strict=True))
    facts = {"scores": out, "queries": sizes["query"], "rows": sizes["train"], "damping": scores.attrs["damping"]}
    facts |= {"normalize": scores.attrs["normalize"], "outside_share": scores.attrs["outside_share"]}
    facts |= {"modules": scores.attrs["modules"]} if "module" in sizes else {}
    more = "".join(f"{sizes[name]} {label} x " for name, label in (("damping", "dampings"), ("module", "modules"))
                   if name in sizes)  # fmt: skip
    size = f"{counted(sizes['query'], 'query', 'queries')} x {counted(sizes['train'], 'row')}"
    scale = scores.attrs.get("scale_factor")
    size += "" if scale is None else f", {scores.dtype}, times {scale:g}"
    facts |= {"dtype": str(scores.dtype), "scale_factor": scale}
    from ooc_influence.report import describe_scoring

    settings = {name: scores.attrs[name] for name in ("curvature", "damping")}
    settings |= {"damping_mode": "absolute", "normalize": scores.attrs["normalize"] or "none"}
    settings |= {"minus": scores.attrs["minus"]} if "minus" in scores.attrs else {}
    options.print_result(as_json, facts, lambda: f"{out}: {more}{size}\n{describe_scoring(settings)}")

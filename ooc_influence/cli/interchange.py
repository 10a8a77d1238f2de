"""The commands that hand rows and scores to other programs, and take rows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.errors import InputError, counted
from ooc_influence.options import ExportOptions, ImportOptions

_ONE: dict[str, Any] = {"multiple": False, "default": None}
_OF_ROWS = ("curvature", "damping", "damping_mode", "precondition", "normalize", "dtype", "index")


@click.command()
@click.argument("store", type=options.PATH)
@click.option(
    "-o", "--output", required=True, type=options.PATH, metavar="FILE",
    help="The file to write: .npy, .parquet or .faiss; of scores .npy, .parquet, .csv or .jsonl.",
)  # fmt: skip
@options.flags(
    ExportOptions,
    curvature=_ONE | {"help": "Curvature of --precondition and --normalize. Default: 'default' in the train store."},
    damping=_ONE | {"help": "Damping factor. Default: that of top (the curvature's)."},
)
@options.cache
@options.as_json
def export(store: str, output: str, cache: str | None, cache_size: str, as_json: bool, **settings: Any) -> None:
    """Write the live rows of STORE, or of scores that 'score' wrote, to a file that other programs read.

    Train rows are exported as they are stored, and queries with --precondition TRAIN: the largest inner products are
    then the proponents of 'top'. A FAISS index takes 4 bytes of memory for each number, to build and to search it.
    """
    from ooc_influence import export_rows, export_scores
    from ooc_influence.interchange import find_scores

    if find_scores(store) is not None:
        asked = [f"--{name.replace('_', '-')}" for name in options.given(_OF_ROWS)]
        if asked:
            raise InputError(f"expected {', '.join(asked)} with a gradient store; received scores, {store}")
        facts = export_scores(store, output, progress=True)
        size = " x ".join(map(str, facts["shape"])) if "shape" in facts else counted(facts["lines"], "line")
        options.print_result(as_json, facts, lambda: f"{output}: {size}, scores of {store}")
        return
    opened = options.open_train(store, cache, cache_size)
    facts = export_rows(opened, output, progress=True, **settings)
    options.print_result(as_json, facts, lambda: _told(facts))


def _told(facts: dict[str, Any]) -> str:
    """Return what was exported, and what inner products with it are."""
    from ooc_influence.memory import format_bytes

    done, rows = facts["settings"], counted(facts["rows"], "row")
    lines = [f"{facts['out']}: {rows} of {facts['columns']} {facts['dtype']} numbers, {format_bytes(facts['bytes'])}"]
    if "row_numbers" in facts:
        lines.append(f"{facts['row_numbers']}: the row number of each line")
    if "index" in facts:
        kind, memory = facts["index"]["factory"], format_bytes(facts["index"]["memory"])
        lines.append(f"FAISS {kind}, by inner product; ids are row numbers; takes {memory} of memory to search")
    unit = "" if done["normalize"] == "none" else f", in the unit {done['normalize']}"
    if done["preconditioned_for"] is not None:
        what = "plain dot products" if done["curvature"] is None else f"scores at damping {done['damping']:g}"
        lines.append(f"queries: inner products with rows of {done['preconditioned_for']} are {what}{unit}")
    elif unit:
        damping = "" if done["curvature"] is None else f" at damping {done['damping']:g}"
        lines.append(f"train rows divided by their norms{damping}{unit}: export queries alike")
    else:
        lines.append("rows as they are stored: export queries with --precondition, for inner products that are scores")
    return "\n".join(lines)


@click.command("import")
@click.argument("file", type=options.PATH)
@click.option("--store", required=True, type=options.PATH, metavar="PATH|URL",
              help="The store to make, or to continue.")  # fmt: skip
@options.flags(ImportOptions)
@options.codec
@options.as_json
def import_command(file: str, store: str, codec: str | None, as_json: bool, **settings: Any) -> None:
    """Write rows that something else computed to a store: FILE is .npy (n, k), or .parquet with a column of lists.

    After an interruption, the same command continues where it was; after rows were added to FILE, it adds them.
    """
    from ooc_influence import import_rows

    if not file.lower().endswith(".parquet"):
        settings |= {name: _read_values(name, settings[name]) for name in ("ids", "loss")}
        settings["columns"] = _read_columns(settings["columns"])
    elif settings["columns"] is not None:
        settings["columns"] = settings["columns"].split(",")
    result = import_rows(file, store, storage=options.chunking(codec), progress=True, **settings)
    options.print_store(as_json, result)


def _read_values(name: str, path: str | None) -> Any:
    """Return a value for each row from a .npy file, or ids from the lines of a .txt file."""
    import numpy as np

    if path is None:
        return None
    endings = (".npy", ".txt") if name == "ids" else (".npy",)
    if Path(path).suffix.lower() not in endings:
        raise InputError(f"expected --{name} in a file {' or '.join(endings)}; received {path}")
    try:
        if Path(path).suffix.lower() == ".txt":
            return Path(path).read_text("utf-8").splitlines()
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a value for each row in {path} (--{name}); received {error}") from error


def _read_columns(path: str | None) -> dict[str, Any] | None:
    """Return the columns of a table, a list of values each."""
    from ooc_influence.corpus import open_records

    if path is None:
        return None
    columns: dict[str, list[Any]] = {}
    for number, record in enumerate(open_records(path)):
        if number and set(record) != set(columns):
            raise InputError(
                f"expected the columns {', '.join(columns)} in every line of {path}; received {', '.join(record)} in "
                f"line {number}"
            )
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return columns

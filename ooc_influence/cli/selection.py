"""The command ``select``: which rows to keep, and the documents they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import options, pairs
from ooc_influence.cli.help import SCORING, SectionedCommand
from ooc_influence.errors import InputError, counted
from ooc_influence.options import SelectOptions


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("query", "keep", "out", "data", "tasks", "redundancy", "quota", "drop"),
)  # fmt: skip
@click.argument("train", type=options.PATH)
@click.option("--queries", "query", required=True, type=options.PATH, metavar="Q",
              help="Query store of the targets: of a validation set, not the test set.")  # fmt: skip
@click.option("--keep", required=True, metavar="SHARE|N",
              help="How much of TRAIN to keep: 10%, 0.1 or a number of rows (or documents).")  # fmt: skip
@click.option("--out", required=True, type=options.PATH, metavar="FILE",
              help="What to write: the rows' documents (.jsonl, .parquet), or their ids (.txt).")  # fmt: skip
@click.option("--data", type=options.PATH, metavar="FILE",
              help="The documents of TRAIN. Default: those it was made from.")  # fmt: skip
@click.option(
    "--query-data",
    type=options.PATH,
    metavar="FILE",
    help="The documents of the targets. Default: those they were made from.",
)
@click.option("--id", "id_field", metavar="FIELD",
              help="Field of --data with the ids that TRAIN has. Default: as extracted, or 'id'.")  # fmt: skip
@click.option("--quota", multiple=True, metavar="COLUMN[:VALUE]=SHARE",
              help="Share of what is kept that a value of a column of TRAIN may have, each or this one; "
              "COLUMN=proportional: as much as of TRAIN. May be repeated, for values of one column.")  # fmt: skip
@click.option("--by", multiple=True, metavar="COLUMN",
              help="Count what is kept by this column; may be repeated. Default: source and label.")  # fmt: skip
@click.option("--no-controls", is_flag=True,
              help="Do not write a random and a BM25 choice of the same size beside it.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random choice.")
@options.table
@options.flags(SelectOptions)
@click.option("--also", nargs=2, multiple=True, type=options.PATH, metavar="QUERY TRAIN",
              help="Another checkpoint's stores of the same rows; scores are averaged. May be repeated.")  # fmt: skip
@options.dot
@options.where
def select(
    train: str, query: str, keep: str, out: str, output: str | None, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Choose the rows of TRAIN to keep for some targets, and write the documents they were made from.

    Documents are copied as they are, in their order. Beside them: as many chosen at random, and by BM25.
    """
    from ooc_influence import select_rows
    from ooc_influence.report import (
        Corpus,
        check_kind,
        check_table,
        selection_blocks,
        selection_counts,
        write_selection,
        write_table,
    )

    check_kind(Path(out))
    target = None if output is None else check_table(output)
    also, by, seed = settings.pop("also"), settings.pop("by"), settings.pop("seed")
    data, query_data, id_field = (settings.pop(name) for name in ("data", "query_data", "id_field"))
    seed = None if settings.pop("no_controls") else seed
    if id_field is not None and data is None:
        raise InputError("expected --data with --id; received none: it names a field of these documents")
    settings["quotas"] = _parse_quotas(settings.pop("quota"))
    arguments = pairs.arguments((train, *(pair[1] for pair in also)), settings)
    first = pairs.first(arguments["train"])
    if arguments["unit"] is None and first.layout.columns.get("document") == "int64":
        arguments["unit"] = "document"
    queries = [query, *(pair[0] for pair in also)] if also else query
    selection = select_rows(queries, keep=keep, **arguments)
    targets = options.open_train(query, None, "0")
    corpus = None if data is None else Corpus(data, id=id_field)
    written = write_selection(
        selection, targets, first, out, data=corpus,
        query_data=query_data, seed=seed, progress=arguments["progress"],
    )  # fmt: skip
    if target is not None:
        write_table(target, selection_blocks(selection, first, corpus))
    others = {name: control.rows for name, control in written.controls.items()}
    facts = {
        "out": out, "kept": len(selection.rows), "candidates": len(selection.candidates.rows),
        "kept_rows": int(selection.kept.sum()), "documents": written.documents,
        "controls": {name: str(control.path) for name, control in written.controls.items()},
        "missing": written.missing, "by": selection_counts(selection, first, by or None, others),
        "settings": selection.settings,
    }  # fmt: skip
    options.print_result(as_json, facts, lambda: _selection_text(facts))


def _parse_quotas(quotas: tuple[str, ...]) -> Any:
    """Return COLUMN=SHARE and COLUMN:VALUE=SHARE as the library takes them."""
    found: dict[str, Any] = {}
    for text in quotas:
        name, equals, share = text.rpartition("=")
        column, colon, value = name.partition(":")
        if not equals or not column or not share or (colon and not value):
            raise InputError(f"expected --quota COLUMN=SHARE or COLUMN:VALUE=SHARE; received {text!r}")
        if column in found and not (colon and isinstance(found[column], dict)):
            raise InputError(f"expected one --quota of all values of {column}, or one for each; received {text!r} too")
        if colon:
            found.setdefault(column, {})[value] = share
        else:
            found[column] = share
    return found or None


def _selection_text(facts: dict[str, Any]) -> str:
    from ooc_influence.report import describe_scoring, table

    unit = facts["settings"]["unit"]
    what = {None: "rows", "document": "documents"}.get(unit, f"values of {unit!r}")
    lines = [f"{facts['out']}: {facts['kept']} of {facts['candidates']} {what}"]
    if unit is not None:
        lines[0] += f", {counted(facts['kept_rows'], 'row')} of the store"
    lines += [f"{path}: as many, {name}" for name, path in facts["controls"].items()]
    lines += [f"no {name} choice: {reason}" for name, reason in facts["missing"].items()]
    parts = ["\n".join(lines)]
    for column, entries in facts["by"].items():
        names = [name for name in entries[0] if name != "value"] if entries else []
        rows = [(str(entry["value"]), *(f"{entry[name]:.1%}" if name == "share" else entry[name] for name in names))
                for entry in entries]  # fmt: skip
        parts.append(table((column, *names), rows))
    return "\n\n".join([*parts, describe_scoring(facts["settings"])])

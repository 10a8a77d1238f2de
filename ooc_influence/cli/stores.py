"""The commands that look at stores and change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.errors import InputError, counted
from ooc_influence.options import AverageOptions, ReduceOptions, RewriteOptions, SketchOptions


@click.command()
@click.argument("store", type=options.PATH)
@options.as_json
def info(store: str, as_json: bool) -> None:
    """Show what is in a store, and how far its writers are."""
    from ooc_influence import GradientStore
    from ooc_influence.report import curvature_states, layer_facts, store_facts, table

    opened = GradientStore.open(store)
    facts = store_facts(opened) | {"layers": layer_facts(opened), "curvature": curvature_states(opened)}

    def text() -> str:
        lines = [(name, value) for name, value in _flat(facts) if not name.startswith(("layers", "writers"))]
        parts = [table(("what", "value"), lines)]
        for name in ("layers", "writers"):
            if facts[name]:
                parts.append(table(tuple(facts[name][0]), [tuple(row.values()) for row in facts[name]]))
        return "\n\n".join(parts)

    options.print_result(as_json, facts, text)


@click.command()
@click.argument("store", type=options.PATH)
@click.option("--repair", is_flag=True, help="Discard damaged chunks: the next extraction writes just those again.")
@click.option("--workers", type=int, metavar="N", help="Ranges of rows worked on at once. Default: one a core.")
@options.memory
@options.cluster
@options.as_json
def verify(store: str, repair: bool, workers: int | None, memory: str | None, as_json: bool) -> int:
    """Check every committed chunk of STORE. Exit code 1 and a list of bad rows where something is wrong."""
    from ooc_influence import GradientStore

    opened = GradientStore.open(store, "a" if repair else "r", damaged=True)
    checked = opened.committed
    damage = opened.verify(repair=repair, workers=workers, memory=memory, progress=True)

    def text() -> str:
        if not damage:
            return f"{store}: {counted(checked, 'committed row')}, nothing wrong"
        lines = [
            f"rows {part.start}-{part.stop}: {part.reason}" if part.start is not None else part.reason
            for part in damage
        ]
        end = "the rows listed are discarded: run the extraction again to write them" if repair else ""
        end = end or "run with --repair to discard the rows listed, then the extraction again to write them"
        return "\n".join([*lines, end])

    options.print_result(
        as_json, {"store": store, "checked_rows": checked, "damage": [part._asdict() for part in damage]}, text
    )
    return 1 if damage else 0


@click.command()
@click.argument("store", type=options.PATH)
@click.argument("ids", nargs=-1, required=True)
@options.as_json
def ids(store: str, ids: tuple[str, ...], as_json: bool) -> int:
    """Show the rows of STORE that have these example ids. Exit code 1 where one is not there."""
    from ooc_influence import GradientStore
    from ooc_influence.report import table

    opened = GradientStore.open(store)
    example_ids = options.parse_ids(opened, ids)
    numbers = opened.find(example_ids).tolist()
    lines = []
    for name, row in zip(example_ids, numbers, strict=True):
        line: dict[str, Any] = {"id": name, "row": None if row < 0 else row}
        for what in ("loss", "grad_norm", "dropped"):
            line[what] = None if row < 0 else opened.small(what, row, row + 1)[0].item()
        lines.append(line)

    def text() -> str:
        rows = [tuple("-" if value is None else value for value in line.values()) for line in lines]
        return table(tuple(lines[0]), rows)

    options.print_result(as_json, {"rows": lines}, text)
    return 1 if min(numbers) < 0 else 0


@click.command()
@click.argument("store", type=options.PATH)
@click.argument("rows", nargs=-1)
@click.option("--ids", "by_id", is_flag=True, help="ROWS are example ids, not row numbers.")
@click.option("--file", "file", type=click.File(), help="Read further rows, one a line ('-': standard input).")
@click.option("--from", "decisions", type=options.PATH, metavar="FILE",
              help="Drop the rows in a file: a table that 'top', 'self-influence' or 'select' wrote (-o; .parquet, "
              ".csv or .jsonl with a column row or id), ids in a .txt file, or what was ticked on a report's page of "
              "label errors, of which rows to relabel stay.")  # fmt: skip
@click.option("--others", is_flag=True, help="Drop all other rows: those named stay.")
@click.option("--relabelled", is_flag=True, help="With --from: drop rows to relabel too; their gradients are of the "
              "old label.")  # fmt: skip
@options.as_json
def drop(
    store: str,
    rows: tuple[str, ...],
    by_id: bool,
    file: Any,
    decisions: str | None,
    others: bool,
    relabelled: bool,
    as_json: bool,
) -> None:
    """Mark ROWS of STORE (numbers or ranges such as 10-20, both ends included) as removed.

    Their numbers stay; they are NaN in scores and absent from top lists and the next fit. 'compact' rewrites a store
    without them.
    """
    from ooc_influence import GradientStore

    named = [*rows, *(line.strip() for line in file or () if line.strip())]
    if not named and decisions is None:
        raise InputError("expected rows to drop; received none: give numbers, ids with --ids, or --from FILE")
    if relabelled and decisions is None:
        raise InputError("expected --from FILE with --relabelled; received none: it says what is to be relabelled")
    with GradientStore.open(store, "a") as opened:
        if by_id:
            example_ids = options.parse_ids(opened, named)
            numbers = opened.find(example_ids).tolist()
            missing = [name for name, row in zip(example_ids, numbers, strict=True) if row < 0]
            if missing:
                raise InputError(f"expected ids of {store}; received {missing[:5]}, which no row has")
        else:
            numbers = [number for text in named for number in _parse_range(text)]
        more, kept = ([], []) if decisions is None else _read_file(decisions, opened, relabelled)
        numbers += more
        if others:
            if decisions is not None and kept:
                raise InputError("expected rows to stay with --others; received rows to relabel: leave --others out")
            numbers = _others(numbers, opened.n)
        before = int(opened.dropped.sum())
        opened.drop(numbers)
        total = int(opened.dropped.sum())
    facts = {"store": store, "named": len(numbers), "newly_dropped": total - before, "dropped": total}
    facts |= {"to_relabel": kept}
    all_of = f"{total} of {counted(opened.n, 'row')}"
    text = f"{store}: {counted(total - before, 'row')} newly dropped, {all_of} in all; fit the curvature again"
    if kept:
        were, them = ("was left as it is", "it") if len(kept) == 1 else ("were left as they are", "them")
        text += f"\n{counted(len(kept), 'row')} to relabel {were} (--relabelled drops {them} too)"
    options.print_result(as_json, facts, lambda: text)


def _others(rows: list[int], n: int) -> list[int]:
    """Return all other rows of ``n``."""
    import numpy as np

    beyond = [row for row in rows if row >= n]
    if not rows or beyond:
        raise InputError(f"expected rows of {n} that stay, with --others; received {beyond[:5] or 'none'}")
    numbers: list[int] = np.setdiff1d(np.arange(n), rows).tolist()
    return numbers


def _read_file(path: str, store: Any, relabelled: bool) -> tuple[list[int], list[int]]:
    """Return the rows that a file names, and those that it says are to be relabelled, which stay."""
    from ooc_influence.corpus import open_records
    from ooc_influence.report import read_decisions, read_rows

    if "action" not in next(iter(open_records(path)), {}):
        if relabelled:
            raise InputError(f"expected a report's export with --relabelled; received {path}, which relabels nothing")
        return read_rows(path, store).tolist(), []
    made = read_decisions(path, store)
    kept = [each.row for each in made if each.action == "relabel" and not relabelled]
    return [each.row for each in made if each.action == "drop" or relabelled], kept


def _parse_range(text: str) -> range:

    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and (not last.isdigit() or int(last) < int(first))):
        raise InputError(f"expected a row number or a range such as 10-20; received {text!r}")
    return range(int(first), int(last or first) + 1)


@click.command()
@click.argument("store", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.as_json
def compact(store: str, out: str, as_json: bool) -> None:
    """Write STORE without its dropped rows to OUT. Row numbers change; STORE stays as it is."""
    from ooc_influence import compact_store
    from ooc_influence.report import store_facts

    result = compact_store(store, out, progress=True)
    options.print_result(as_json, store_facts(result), lambda: repr(result))


@click.command()
@click.argument("sources", type=options.PATH, nargs=-1, required=True)
@click.option("--out", required=True, type=options.PATH, metavar="PATH|URL", help="The store to make.")
@click.option("--move", is_flag=True, help="Remove each source when all rows are in the new store.")
@options.as_json
def merge(sources: tuple[str, ...], out: str, move: bool, as_json: bool) -> None:
    """Concatenate SOURCES, stores of one mask and model, into a new store."""
    from ooc_influence import merge_stores
    from ooc_influence.report import store_facts

    result = merge_stores(sources, out, move=move, progress=True)
    options.print_result(as_json, store_facts(result), lambda: repr(result))


@click.command()
@click.argument("store", type=options.PATH)
@options.as_json
def upgrade(store: str, as_json: bool) -> None:
    """Convert a STORE of an older format to the present one, in place."""
    from ooc_influence import GradientStore, upgrade_store

    changed = upgrade_store(store)
    version = GradientStore.open(store).attrs["format"]
    facts = {"store": store, "format": version, "upgraded": changed}
    options.print_result(as_json, facts, lambda: f"{store}: {'now' if changed else 'already'} of format {version}")


@click.command()
@click.argument("wide", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option("--dims", "r", type=int, metavar="R", help="Numbers stored a row. Default: 1024; with --rotate as many "
              "as there are.")  # fmt: skip
@options.flags(ReduceOptions)
@options.codec
@options.where
def reduce(wide: str, codec: str | None, cache: str | None, cache_size: str, as_json: bool, **settings: Any) -> None:
    """Write the rows of WIDE in the largest directions of their eigenbasis to OUT.

    After an interruption, the same command continues where it was, with the same basis.
    """
    from ooc_influence import Storage, reduce_store

    opened = options.open_train(wide, cache, cache_size)
    result = reduce_store(opened, storage=Storage(codec=codec), progress=True, **settings)
    options.print_store(as_json, result)


@click.command()
@click.argument("store", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.flags(RewriteOptions)
@options.codec
@options.where
def rewrite(store: str, codec: str | None, cache: str | None, cache_size: str, as_json: bool, **settings: Any) -> None:
    """Write the rows of STORE in another representation to OUT: as signs, by default.

    With --like, rows of all entries are turned into the mask and Kronecker basis of another store.

    After an interruption, the same command continues where it was.
    """
    from ooc_influence import rewrite_store

    opened = options.open_train(store, cache, cache_size)
    result = rewrite_store(opened, storage=options.chunking(codec), progress=True, **settings)
    options.print_store(as_json, result)


@click.command()
@click.argument("store", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option("--by", default="example", show_default=True, metavar="COLUMN",
              help="Column of whole numbers or strings, for each value of which there is one average.")  # fmt: skip
@click.option("--start", type=options.PATH, metavar="STORE", help="Averages of earlier rows, to be continued.")
@options.flags(AverageOptions)
@options.codec
@options.as_json
def average(store: str, out: str, codec: str | None, as_json: bool, **settings: Any) -> None:
    """Write the averages of the rows of STORE to OUT: one row for each example that a training collected.

    After an interruption, the same command continues where it was.
    """
    from ooc_influence import average_rows

    result = average_rows(store, out, storage=options.chunking(codec), progress=True, **settings)
    options.print_store(as_json, result)


@click.command()
@click.argument("train", type=options.PATH)
@click.argument("out", type=options.PATH, required=False)
@click.option("--dims", "r", type=int, metavar="R", help="Numbers stored a row. Default: 256.")
@options.flags(SketchOptions)
@options.where
def sketch(train: str, out: str | None, cache: str | None, cache_size: str, as_json: bool, **settings: Any) -> None:
    """Write a sketch of TRAIN to OUT: a small store of the same rows that finds candidates for 'top --sketch'.

    Without OUT, beside TRAIN: train.sketch.zarr for train.zarr. After an interruption, the same command continues where
    it was; after rows were added to TRAIN, it adds them.
    """
    from ooc_influence import sketch_store

    opened = options.open_train(train, cache, cache_size)
    result = sketch_store(opened, out, progress=True, **settings)
    options.print_store(as_json, result)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            lines.append((f"{prefix}{name}", str(value)))
    return lines

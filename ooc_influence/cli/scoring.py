"""The commands that fit a curvature and write numbers of rows: scores, self-influence, sums by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import options, pairs
from ooc_influence.cli.help import SCORING, SectionedCommand
from ooc_influence.errors import InputError, writing
from ooc_influence.options import FisherOptions, ListOptions, ScoreOptions, SelfInfluenceOptions, TrajectoryOptions


def _parse_rows(_: click.Context, __: click.Parameter, value: str | None) -> slice | None:
    """Return A:B as a slice; either may be missing."""
    if value is None:
        return None
    first, colon, last = value.partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError:
        raise click.BadParameter(f"expected A:B; received {value}") from None


@click.command()
@click.argument("train", type=options.PATH)
@click.option("--method", type=click.Choice(["auto", "primal", "dual", "kronecker"]), default="auto",
              show_default=True,
              help="What is fitted: the Fisher matrix (primal), the rows' Gram matrix, for fewer rows than columns "
              "(dual), second moments in a Kronecker basis (kronecker), or what suits TRAIN and costs least "
              "(auto).")  # fmt: skip
@options.flags(FisherOptions, rows={"callback": _parse_rows})
@options.where
def fisher(train: str, cache: str | None, cache_size: str, as_json: bool, **settings: Any) -> None:
    """Fit the curvature of TRAIN, by its Fisher matrix or what replaces it, and save it there."""
    from ooc_influence import fit_curvature

    store = options.open_train(train, cache, cache_size)
    curvature = fit_curvature(store, progress=True, **settings)
    options.print_result(as_json, curvature.facts(), lambda: _told(curvature))


@click.command()
@click.argument("store", type=options.PATH)
@options.flags(TrajectoryOptions)
@options.codec
@options.as_json
def trajectory(store: str, codec: str | None, as_json: bool, **settings: Any) -> None:
    """Write what each row of a training did to the final weights, for '--curvature trajectory'.

    STORE has rows that were collected with the optimiser's steps (collect(optimizer=), hf.collect_callback). After an
    interruption, the same command continues where it was.
    """
    from ooc_influence import fit_trajectory

    result = fit_trajectory(store, storage=options.chunking(codec), progress=True, **settings)
    options.print_store(as_json, result)


def _told(curvature: Any) -> str:
    """Return a curvature in words: what it is, and where none was needed."""
    if curvature.kind != "kronecker":
        return repr(curvature)
    return f"{curvature!r}\nThe basis has such a curvature without any fit: --curvature kronecker."


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("out", "output", "curvature", "damping", "normalize"),
)  # fmt: skip
@pairs.both
@click.option("--out", required=True, type=options.PATH, metavar="PATH",
              help="The Zarr array (queries, rows) to write, or to continue.")  # fmt: skip
@options.table
@options.flags(ScoreOptions)
@pairs.pairing
def score(query: str, train: str, out: str, output: str | None, as_json: bool, **settings: Any) -> None:
    """Write the influence of every row of TRAIN on every query of QUERY to a Zarr array.

    Chunks that are written stay: the same command continues with those that are missing.
    """
    from ooc_influence import influence_scores

    pair = pairs.paired(query, train, settings)
    target = None if output is None else _pairs_table(output, query, pair)
    scores: Any = influence_scores(**pair, out=out)
    if target is not None:
        from ooc_influence.report import write_scores_table

        write_scores_table(target, scores, options.open_train(query, None, "0"), pairs.first(pair["train"]))
    pairs.print_scores(scores, out, as_json)


def _pairs_table(output: str, query: str, pair: dict[str, Any]) -> Path:
    """Return where to write scores as lines, checked: that there are not too many."""
    from ooc_influence.influence import parse_groups
    from ooc_influence.report import check_pairs, check_table

    if isinstance(pair["damping"], list):
        raise InputError("expected one --damping with --output; received several: leave --output out, or give one")
    average, store = pair["average_queries"], options.open_train(query, None, "0")
    queries = store.n if average is False else 1 if average is True else len(parse_groups(average, store).names)
    check_pairs(queries, pairs.first(pair["train"]).n)
    return check_table(output)


@click.command(
    "self-influence",
    cls=SectionedCommand, sections=SCORING,
    first=("count", "out", "output", "curvature", "damping"),
)  # fmt: skip
@click.argument("train", type=options.PATH)
@click.option("--also", multiple=True, type=options.PATH, metavar="TRAIN",
              help="Another checkpoint's store; values are averaged.")  # fmt: skip
@click.option("--top", "count", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many rows to show.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False), help="Write all values to this .npy file.")
@options.table
@options.flags(SelfInfluenceOptions)
@options.dot
@options.where
def self_influence_command(
    train: str,
    also: tuple[str, ...],
    count: int,
    out: str | None,
    output: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show the rows of TRAIN with the largest self-influence: candidates for wrong labels."""
    import numpy as np

    from ooc_influence.influence import ScoreRequest, self_scores
    from ooc_influence.options import complete, select
    from ooc_influence.report import check_table, describe_scoring, table
    from ooc_influence.store import check_writable

    target = None if output is None else check_table(output)
    if out is not None:
        check_writable(Path(out), missing_folders=False)
    arguments = pairs.arguments((train, *also), settings)
    asked = complete(SelfInfluenceOptions, select(SelfInfluenceOptions, arguments))
    scoring = ScoreRequest.open(None, arguments["train"], asked)
    values = self_scores(scoring, asked)
    if out is not None:
        with writing(f"to write {out}"), Path(out).open("wb") as file:
            np.save(file, values)
    store = pairs.first(arguments["train"])
    levels, orders = [], []
    for level in np.atleast_2d(values):
        order = np.argsort(np.where(np.isnan(level), np.inf, -level), kind="stable")[:count]
        order = order[~np.isnan(level[order])]
        orders.append(order)
        columns = (order.tolist(), store.ids(order).tolist(), level[order].tolist())
        lines = zip(*columns, strict=True)
        levels.append([{"row": row, "id": name, "self_influence": value} for row, name, value in lines])
    if target is not None:
        _write_self_influence(target, store, orders, np.atleast_2d(values), arguments["damping"])
    tables = [table(("row", "id", "self-influence"), [tuple(row.values()) for row in rows]) for rows in levels]
    facts: dict[str, Any] = {"n": store.n, "rows": levels[0], "settings": scoring.settings}
    if values.ndim == 2:
        facts = {"n": store.n, "damping": arguments["damping"], "by_damping": levels, "settings": scoring.settings}
        tables = [f"damping {value}\n\n{text}" for value, text in zip(arguments["damping"], tables, strict=True)]
    options.print_result(as_json, facts, lambda: "\n\n".join([*tables, describe_scoring(scoring.settings)]))


def _write_self_influence(target: Path, store: Any, orders: list[Any], values: Any, dampings: Any) -> None:
    """Write the rows listed to a table, those of one damping after the other."""
    import numpy as np

    from ooc_influence.report import RowTable, row_blocks, write_table

    rows = RowTable(store, None, np.concatenate(orders))
    several = isinstance(dampings, list)

    def blocks() -> Any:
        for number, (order, level) in enumerate(zip(orders, values, strict=True)):
            more = {"damping": np.full(len(order), dampings[number])} if several else {}
            yield from row_blocks(rows, order, {"self_influence": level[order], **more})

    write_table(target, blocks())


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("by", "count", "output", "curvature", "damping", "normalize"),
)  # fmt: skip
@pairs.both
@click.option("--by", required=True, metavar="COLUMN", help="The column of TRAIN whose values are groups, or 'id'.")
@click.option("--top", "count", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many groups of each query to show, largest sums first.")  # fmt: skip
@options.table
@options.flags(ListOptions)
@pairs.pairing
def groups(
    query: str, train: str, by: str, count: int, output: str | None, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Show the influence of groups of rows of TRAIN (labels, sources, documents) on each query: sums and means."""
    import numpy as np

    from ooc_influence import group_influence
    from ooc_influence.report import check_table, describe_scoring, group_blocks, table, write_table

    target = None if output is None else check_table(output)
    influence = group_influence(**pairs.paired(query, train, settings), by=by)
    if target is not None:
        write_table(target, group_blocks(influence))

    def text() -> str:
        parts = []
        several = influence.sums.ndim == 3
        for level, sums in enumerate(influence.sums if several else influence.sums[None]):
            means = influence.means[level] if several else influence.means
            title = f"damping {influence.damping[level]}, " if several else ""
            for number, name in enumerate(influence.query_ids.tolist()):
                order = np.argsort(-sums[number], kind="stable")[:count]
                columns = (influence.names[order], influence.counts[order], sums[number][order], means[number][order])
                lines = list(zip(*columns, strict=True))
                parts.append(f"{title}query {name}\n{table((by, 'rows', 'sum', 'mean'), lines)}")
        return "\n\n".join([*parts, describe_scoring(influence.settings)])

    options.print_result(as_json, influence.to_dict(), text)

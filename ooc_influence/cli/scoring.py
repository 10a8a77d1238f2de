"""The commands that score train rows: options in, a library call, its result as text or JSON."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.errors import counted


@click.command()
@click.argument("query", type=options.PATH)
@click.argument("train", type=options.PATH)
@click.option(
    "--out",
    required=True,
    type=options.PATH,
    metavar="PATH",
    help="The Zarr array (queries, rows) to write, or to go on with.",
)
@options.pairing
@options.scoring
def score(query: str, train: str, out: str, as_json: bool, **given: Any) -> None:
    """Write the influence of every row of TRAIN on every query of QUERY to a Zarr array.

    Chunks that are written stay: the same command goes on with those that are missing.
    """
    from ooc_influence import influence_scores

    scores: Any = influence_scores(**_paired(query, train, given), out=out)
    _print_scores(scores, out, as_json)


def _print_scores(scores: Any, out: str, as_json: bool) -> None:
    sizes = dict(zip(scores.attrs["dims"], scores.shape, strict=True))
    facts = {"scores": out, "queries": sizes["query"], "rows": sizes["train"], "damping": scores.attrs["damping"]}
    facts |= {"normalize": scores.attrs["normalize"], "outside_share": scores.attrs["outside_share"]}
    facts |= {"modules": scores.attrs["modules"]} if "module" in sizes else {}
    more = "".join(f"{sizes[name]} {label} x " for name, label in (("damping", "dampings"), ("module", "modules"))
                   if name in sizes)  # fmt: skip
    size = f"{counted(sizes['query'], 'query', 'queries')} x {counted(sizes['train'], 'row')}"
    options.print_result(as_json, facts, lambda: f"{out}: {more}{size}")


@click.command()
@click.argument("query", type=options.PATH)
@click.argument("train", type=options.PATH)
@click.option("--top", "count", type=int, default=10, show_default=True, help="How many of each.")
@options.pairing
@options.resume
@options.scoring
def top(query: str, train: str, count: int, resume: str | None, as_json: bool, **given: Any) -> None:
    """Show each query's strongest proponents and opponents among the rows of TRAIN."""
    from ooc_influence import top_influential

    found = top_influential(**_paired(query, train, given), top=count, resume=resume)
    options.print_result(as_json, found.to_dict(), lambda: _by_damping(found, partial(_lists, count)))


def _by_damping(found: Any, text: Any) -> str:
    if found.dampings is None:
        return str(text(found))
    parts = (found.at(number) for number in range(found.dampings))
    return "\n\n".join(f"damping {own.damping}\n\n{text(own)}" for own in parts)


def _lists(asked: int, found: Any) -> str:
    from ooc_influence.report import table

    parts = []
    for number, name in enumerate(found.query_ids.tolist()):
        sides = found.of_query(number)
        pairs = zip_longest(*([own[1:] for own in side] for side in sides.values()), fillvalue=("", ""))
        lines = [table(("proponent", "score", "opponent", "score"), [left + right for left, right in pairs])]
        short = [_found(len(own), side) for side, own in sides.items() if len(own) < asked]
        if short:
            lines.append(f"{', '.join(short)}: no other row has a score of that sign")
        outside = found.outside_share[number]
        title = f"query {name}" + (f" ({outside:.0%} outside the training spectrum)" if outside >= 0.005 else "")
        parts.append("\n".join([title, *(["dropped"] if (found.proponents.rows[number] < 0).all() else lines)]))
    return "\n\n".join(parts)


def _found(count: int, side: str) -> str:
    return f"only {counted(count, side[:-1])}" if count else f"no {side}"


@click.command("self-influence")
@click.argument("train", type=options.PATH)
@click.option(
    "--also", multiple=True, type=options.PATH, metavar="TRAIN", help="Another checkpoint's store; values are averaged."
)
@click.option(
    "--top", "count", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows to show."
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write all values to this .npy file.")
@options.resume
@options.scoring
def self_influence_command(
    train: str, also: tuple[str, ...], count: int, out: str | None, as_json: bool, **given: Any
) -> None:
    """Show the rows of TRAIN that speak most for themselves: candidates for wrong labels."""
    import numpy as np

    from ooc_influence import self_influence
    from ooc_influence.report import table
    from ooc_influence.store import check_writable

    if out is not None:
        check_writable(Path(out), missing_folders=False)
    arguments = _common((train, *also), given)
    values = self_influence(**arguments)
    if out is not None:
        _save(Path(out), values)
    store = arguments["train"][0] if also else arguments["train"]
    header, parts, lists = ("row", "id", "self-influence"), [], []
    for own in np.atleast_2d(values):
        order = np.argsort(np.where(np.isnan(own), np.inf, -own), kind="stable")[:count]
        order = order[~np.isnan(own[order])]
        lists.append(
            [
                {"row": row, "id": name, "self_influence": value}
                for row, name, value in zip(order.tolist(), store.ids(order).tolist(), own[order].tolist(), strict=True)
            ]
        )
        parts.append(table(header, [tuple(row.values()) for row in lists[-1]]))
    several = values.ndim == 2
    facts: dict[str, Any] = {"n": store.n, "rows": lists[0]}
    if several:
        facts = {"n": store.n, "damping": arguments["damping"], "by_damping": lists}
        parts = [f"damping {value}\n\n{part}" for value, part in zip(arguments["damping"], parts, strict=True)]
    options.print_result(as_json, facts, lambda: "\n\n".join(parts))


def _save(out: Path, values: Any) -> None:
    import numpy as np

    from ooc_influence.errors import writing

    with writing(f"to write {out}"), out.open("wb") as file:
        np.save(file, values)


@click.command()
@click.argument("query", type=options.PATH)
@click.argument("train", type=options.PATH)
@click.option("--by", required=True, metavar="COLUMN", help="The column of TRAIN whose values are groups, or 'id'.")
@click.option("--top", "count", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many groups of each query to show, largest sums first.")  # fmt: skip
@options.pairing
@options.resume
@options.scoring
def groups(query: str, train: str, by: str, count: int, resume: str | None, as_json: bool, **given: Any) -> None:
    """Show the influence of groups of rows of TRAIN (labels, sources, documents) on each query: sums and means."""
    import numpy as np

    from ooc_influence import group_influence
    from ooc_influence.report import table

    found = group_influence(**_paired(query, train, given), by=by, resume=resume)

    def text() -> str:
        parts = []
        for level, sums in enumerate(found.sums if found.sums.ndim == 3 else found.sums[None]):
            means = (found.means if found.means.ndim == 3 else found.means[None])[level]
            title = f"damping {found.damping[level]}, " if found.sums.ndim == 3 else ""
            for number, name in enumerate(found.query_ids.tolist()):
                order = np.argsort(-sums[number], kind="stable")[:count]
                columns = (found.names[order], found.counts[order], sums[number][order], means[number][order])
                lines = list(zip(*columns, strict=True))
                parts.append(f"{title}query {name}\n{table((by, 'rows', 'sum', 'mean'), lines)}")
        return "\n\n".join(parts)

    options.print_result(as_json, found.to_dict(), text)


@click.command()
@click.argument("query", type=options.PATH)
@click.argument("train", type=options.PATH)
@click.option("--top", "count", type=int, help="How many of each, by module.")
@click.option(
    "--out", type=options.PATH, metavar="PATH", help="Instead: the Zarr array (modules, queries, rows) to write."
)
@options.pairing
@options.scoring
def modules(query: str, train: str, count: int | None, out: str | None, as_json: bool, **given: Any) -> None:
    """Show or write the part of each score that runs through each module; the parts add up to the score."""
    from ooc_influence import module_influence

    found: Any = module_influence(**_paired(query, train, given), top=count, out=out)
    if out is not None:
        _print_scores(found, out, as_json)
        return
    assert count is not None  # the call refuses neither
    facts, lists = {name: own.to_dict() for name, own in found.items()}, partial(_lists, count)
    options.print_result(
        as_json, facts, lambda: "\n\n".join(f"module {n}\n\n{_by_damping(own, lists)}" for n, own in found.items())
    )


def _paired(query: str, train: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a library call that options stand for."""
    from ooc_influence.errors import InputError

    also = given.pop("also")
    average, column = given.pop("average_queries"), given.pop("average_by")
    if average and column is not None:
        raise InputError("expected --average-queries or --average-by; received both")
    queries: Any = [query, *(pair[0] for pair in also)] if also else query
    found = _common((train, *(pair[1] for pair in also)), given)
    return {"query": queries, "average_queries": column if column is not None else average, **found}


def _common(trains: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that train stores and the options of every scoring command stand for."""
    from ooc_influence.errors import InputError

    cache, size = given.pop("cache"), given.pop("cache_size")
    stores = [options.open_train(path, cache, size) for path in trains]
    curvature, damping, rows = given.pop("curvature"), given.pop("damping"), given.pop("rows")
    if given.pop("dot"):
        if curvature:
            raise InputError("expected --dot or --curvature; received both")
        curvature = (False,)
    several = len(trains) > 1
    for name, values in (("--curvature", curvature), ("--rows", rows)):
        if len(values) > 1 and len(values) != len(trains):
            raise InputError(f"expected {name} once for each of {len(trains)} checkpoints; received {len(values)}")
    marks = [_read_rows(path) for path in rows]
    if several and len(marks) == 1:
        raise InputError(f"expected --rows once for each of {len(trains)} checkpoints ('all': all); received 1")
    return {
        "train": stores if several else stores[0],
        "curvature": None if not curvature else (list(curvature) if len(curvature) > 1 else curvature[0]),
        "damping": None if not damping else (list(damping) if len(damping) > 1 else damping[0]),
        "rows": None if not marks else (marks if several else marks[0]),
        "progress": options.show_progress(),
        **given,
    }


def _read_rows(path: str) -> Any:
    import numpy as np

    from ooc_influence.errors import InputError

    if path == "all":
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"expected row numbers or marks in a .npy file; received {path}: {error}") from error


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
@click.option(
    "--method",
    type=click.Choice(["primal", "dual", "auto"]),
    default="primal",
    show_default=True,
    help="primal: the Fisher matrix; dual: the Gram matrix of the rows, for fewer rows than columns; auto: the cheaper "
    "one that fits.",
)
@click.option("--name", help="Name of the curvature in the store: by default 'default', or 'gram' with --method dual.")
@click.option("--out", type=options.PATH, metavar="PATH", help="Save it there instead of in the store.")
@click.option("--refit", is_flag=True, help="Fit again although an up-to-date curvature is there.")
@click.option("--rows", metavar="A:B", callback=_parse_rows, help="Use rows A to B - 1 only.")
@click.option("--sample", type=int, metavar="N", help="Use N of them, drawn at random; tells the error of F expected.")
@click.option("--seed", type=int, default=0, show_default=True, help="What the sample is drawn with.")
@click.option("--weights", type=click.Choice(["ggn", "trak"]), help="Weigh rows by their losses.")
@click.option("--force-weights", is_flag=True, help="Whatever the loss is.")
@click.option("--blocks", type=click.Choice(["module", "diagonal"]),
              help="One matrix for each module; or the diagonal only, for a rotated store.")  # fmt: skip
@click.option("--rank", type=int, metavar="R", help="Keep the top R eigenvectors only: any number of columns fits.")
@click.option("--device", help="Multiply rows there, such as cuda. Default: NumPy's or SciPy's BLAS.")
@options.workers
@options.memory
@options.cluster
@options.cache
@options.cache_size
@options.as_json
def fisher(train: str, method: Any, cache: str | None, cache_size: str, as_json: bool, **given: Any) -> None:
    """Compute and factorise the Fisher matrix of TRAIN, and save it there."""
    from ooc_influence import fit_curvature

    opened = options.open_train(train, cache, cache_size)
    curvature = fit_curvature(opened, method=method, progress=options.show_progress(), **given)
    options.print_result(as_json, curvature.facts(), lambda: repr(curvature))

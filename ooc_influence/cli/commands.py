"""The commands that compute: options in, a library call, its result as text or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import extraction, options, stores


@click.command()
@click.argument("train")
@click.option("--name", default="default", show_default=True, help="Name of the curvature in the store.")
@click.option("--out", metavar="PATH", help="Save it there instead of in the store.")
@click.option("--refit", is_flag=True, help="Fit again although an up-to-date curvature is there.")
@options.workers
@options.memory
@options.cache
@options.cache_size
@options.as_json
def fisher(train: str, cache: str | None, cache_size: str, as_json: bool, **given: Any) -> None:
    """Compute and factorise the Fisher matrix of TRAIN, and save it there."""
    from ooc_influence import fit_fisher

    opened = options.open_train(train, cache, cache_size)
    curvature = fit_fisher(opened, progress=options.show_progress(), **given)
    value = curvature.damping_value()
    facts = {
        "curvature": str(curvature.path),
        "k": curvature.d,
        "rows": curvature.rows,
        "trace": curvature.trace,
        "largest_eigenvalue": float(curvature.eigenvalues[0]),
        "default_damping": value,
        "effective_dimension": curvature.effective_dimension(value),
    }
    options.print_result(as_json, facts, lambda: repr(curvature))


@click.command()
@click.argument("query")
@click.argument("train")
@click.option("--out", required=True, metavar="PATH", help="The Zarr array (queries, rows) to write.")
@options.scoring
def score(query: str, train: str, out: str, cache: str | None, cache_size: str, as_json: bool, **given: Any) -> None:
    """Write the influence of every row of TRAIN on every query of QUERY to a Zarr array."""
    from ooc_influence import influence_scores

    scores: Any = influence_scores(
        query, options.open_train(train, cache, cache_size), out=out, progress=options.show_progress(), **given
    )
    facts = {"scores": out, "queries": scores.shape[0], "rows": scores.shape[1], "damping": scores.attrs["damping"]}
    options.print_result(as_json, facts, lambda: f"{out}: {scores.shape[0]} queries x {scores.shape[1]} rows")


@click.command()
@click.argument("query")
@click.argument("train")
@click.option("--top", "count", type=int, default=10, show_default=True, help="How many of each.")
@options.scoring
def top(query: str, train: str, count: int, cache: str | None, cache_size: str, as_json: bool, **given: Any) -> None:
    """Show each query's strongest proponents and opponents among the rows of TRAIN."""
    from ooc_influence import top_influential
    from ooc_influence.report import table

    opened = options.open_train(train, cache, cache_size)
    found = top_influential(query, opened, top=count, progress=options.show_progress(), **given)

    def text() -> str:
        parts = []
        for number, name in enumerate(found.query_ids.tolist()):
            sides = (found.proponents, found.opponents)
            columns = [column for side in sides for column in (side.ids[number], side.scores[number])]
            header = ("proponent", "score", "opponent", "score")
            lines = [] if found.proponents.rows[number, 0] < 0 else list(zip(*columns, strict=True))
            parts.append(f"query {name}\n{table(header, lines) if lines else 'dropped'}")
        return "\n\n".join(parts)

    options.print_result(as_json, found.to_dict(), text)


@click.command("self-influence")
@click.argument("train")
@click.option(
    "--top", "count", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows to show."
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write all values to this .npy file.")
@options.scoring
def self_influence_command(
    train: str, count: int, out: str | None, cache: str | None, cache_size: str, as_json: bool, **given: Any
) -> None:
    """Show the rows of TRAIN that speak most for themselves: candidates for wrong labels."""
    import numpy as np

    from ooc_influence import self_influence
    from ooc_influence.errors import InputError
    from ooc_influence.report import table

    store = options.open_train(train, cache, cache_size)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise InputError(f"expected a folder to write {out} to; received none: make it first")
    values = self_influence(store, progress=options.show_progress(), **given)
    if out is not None:
        with Path(out).open("wb") as file:
            np.save(file, values)
    order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")[:count]
    order = order[~np.isnan(values[order])]
    rows = [
        {"row": row, "id": name, "self_influence": value}
        for row, name, value in zip(order.tolist(), store.ids(order).tolist(), values[order].tolist(), strict=True)
    ]
    header = ("row", "id", "self-influence")
    options.print_result(
        as_json, {"n": len(values), "rows": rows}, lambda: table(header, [tuple(row.values()) for row in rows])
    )


@click.command()
@click.option("--out", default="demo-output", show_default=True, metavar="DIR", help="Where stores and pictures go.")
@click.option("--rows", type=int, help="Grow the train store to this many rows by passes over augmented images.")
@click.option("--k", type=int, default=1024, show_default=True, help="Gradient entries kept of each image.")
@click.option("--memory", metavar="SIZE", default="1GiB", show_default=True, help="Memory budget.")
@options.as_json
def demo(out: str, rows: int | None, k: int, memory: str, as_json: bool) -> None:
    """Find wrong labels among real handwritten digits, from training the model to the pictures."""
    from ooc_influence.cli.demo import run_demo

    result = run_demo(out, rows=rows, k=k, memory=memory, progress=options.show_progress(), quiet=as_json)
    if as_json:
        click.echo(json.dumps(result))


ALL = (
    demo, extraction.init, extraction.extract, fisher, score, top, self_influence_command, stores.info, stores.verify,
    stores.ids, stores.drop, stores.compact, stores.merge, stores.reduce, stores.upgrade,
)  # fmt: skip

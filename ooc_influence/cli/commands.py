"""The commands: options in, a library call, its result as text or JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
_memory = click.option("--memory", metavar="SIZE", help="Memory budget, such as 4GiB. Default: half of what is free.")
_workers = click.option("--workers", type=int, metavar="N", help="Row stripes at once. Default: one, with all cores.")
_curvature = click.option("--curvature", metavar="NAME|PATH", help="Which curvature. Default: 'default' in TRAIN.")
_damping = click.option("--damping", type=float, help="Damping factor. Default: the curvature's (0.1, relative).")
_mode = click.option(
    "--damping-mode",
    type=click.Choice(["relative", "absolute"]),
    default="relative",
    show_default=True,
    help="relative: λ = damping · tr(F)/k; absolute: λ = damping.",
)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_scoring = _options(_curvature, _damping, _mode, _workers, _memory, _json)


def _show_progress() -> bool:
    return sys.stderr.isatty()


def _print(as_json: bool, result: Mapping[str, Any], text: Callable[[], str]) -> None:
    click.echo(json.dumps(result, default=str) if as_json else text())


@click.command()
@click.option("--recipe", "recipe_name", required=True, metavar="FILE.py:FUNCTION|MODULE:FUNCTION",
              help="A function that returns (model, per_sample_loss, splits) or an ooc_influence.Recipe.")  # fmt: skip
@click.option("--split", metavar="NAME", help="Which of the recipe's splits; needed where there are several.")
@click.option("--store", required=True, metavar="PATH", help="The store to write, or to go on with.")
@click.option("--like", metavar="TRAIN", help="Make a query store with the mask of this train store.")
@click.option("--k", type=int, default=4096, show_default=True, help="Gradient entries kept of each sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the mask.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True,
              help="Representation on disk; float16 has a scale a row.")  # fmt: skip
@click.option("--modules", multiple=True, metavar="PATTERN", help="Layers by name pattern; may be repeated.")
@click.option("--device", help="Where to run, such as cuda. Default: where the model is.")
@_json
def extract(
    recipe_name: str,
    split: str | None,
    store: str,
    like: str | None,
    k: int,
    seed: int,
    dtype: str,
    modules: tuple[str, ...],
    device: str | None,
    as_json: bool,
) -> None:
    """Extract compressed per-sample gradients into a store.

    A run that was stopped goes on where it was when the same command runs again.
    """
    from ooc_influence import Dropout, extract_gradients
    from ooc_influence.cli.recipes import choose_split, load_recipe
    from ooc_influence.errors import InputError
    from ooc_influence.store import parse_path

    parse_path(store)
    given = {click.get_current_context().get_parameter_source(name) for name in ("k", "seed")}
    if like is not None and (modules or click.core.ParameterSource.COMMANDLINE in given):
        raise InputError("expected --like without --k, --seed and --modules; received both: --like fixes the mask")
    compressor = None if like else Dropout(k=k, seed=seed)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints must not end up in our output
        recipe = load_recipe(recipe_name)
        data = choose_split(recipe, split)
        result = extract_gradients(
            recipe.model,
            recipe.per_sample_loss,
            data.batches,
            store,
            compressor=compressor,
            like=like,
            modules=list(modules) or None,
            dtype=dtype,
            device=device,
            ids=data.ids,
            columns=data.columns,
            loss_kind=recipe.loss_kind,
            progress=_show_progress(),
        )
    _print(as_json, _store_facts(result), lambda: repr(result))


@click.command()
@click.argument("train")
@click.option("--name", default="default", show_default=True, help="Name of the curvature in the store.")
@click.option("--out", metavar="PATH", help="Save it there instead of in the store.")
@click.option("--refit", is_flag=True, help="Fit again although an up-to-date curvature is there.")
@_options(_workers, _memory, _json)
def fisher(
    train: str, name: str, out: str | None, refit: bool, workers: int | None, memory: str | None, as_json: bool
) -> None:
    """Compute and factorise the Fisher matrix of TRAIN, and save it there."""
    from ooc_influence import fit_fisher

    curvature = fit_fisher(
        train, name=name, out=out, refit=refit, workers=workers, memory=memory, progress=_show_progress()
    )
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
    _print(as_json, facts, lambda: repr(curvature))


@click.command()
@click.argument("query")
@click.argument("train")
@click.option("--out", required=True, metavar="PATH", help="The Zarr array (queries, rows) to write.")
@_scoring
def score(query: str, train: str, out: str, as_json: bool, **options: Any) -> None:
    """Write the influence of every row of TRAIN on every query of QUERY to a Zarr array."""
    from ooc_influence import influence_scores

    scores: Any = influence_scores(query, train, out=out, progress=_show_progress(), **options)
    facts = {"scores": out, "queries": scores.shape[0], "rows": scores.shape[1], "damping": scores.attrs["damping"]}
    _print(as_json, facts, lambda: f"{out}: {scores.shape[0]} queries x {scores.shape[1]} rows")


@click.command()
@click.argument("query")
@click.argument("train")
@click.option("--top", "count", type=int, default=10, show_default=True, help="How many of each.")
@_scoring
def top(query: str, train: str, count: int, as_json: bool, **options: Any) -> None:
    """Show each query's strongest proponents and opponents among the rows of TRAIN."""
    from ooc_influence import top_influential
    from ooc_influence.report import table

    found = top_influential(query, train, top=count, progress=_show_progress(), **options)

    def text() -> str:
        parts = []
        for number, name in enumerate(found.query_ids.tolist()):
            sides = (found.proponents, found.opponents)
            columns = [column for side in sides for column in (side.ids[number], side.scores[number])]
            header = ("proponent", "score", "opponent", "score")
            lines = [] if found.proponents.rows[number, 0] < 0 else list(zip(*columns, strict=True))
            parts.append(f"query {name}\n{table(header, lines) if lines else 'dropped'}")
        return "\n\n".join(parts)

    _print(as_json, found.to_dict(), text)


@click.command("self-influence")
@click.argument("train")
@click.option(
    "--top", "count", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows to show."
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write all values to this .npy file.")
@_scoring
def self_influence_command(train: str, count: int, out: str | None, as_json: bool, **options: Any) -> None:
    """Show the rows of TRAIN that speak most for themselves: candidates for wrong labels."""
    import numpy as np

    from ooc_influence import GradientStore, self_influence
    from ooc_influence.errors import InputError
    from ooc_influence.report import table

    store = GradientStore.open(train)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise InputError(f"expected a folder to write {out} to; received none: make it first")
    values = self_influence(store, progress=_show_progress(), **options)
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
    _print(as_json, {"n": len(values), "rows": rows}, lambda: table(header, [tuple(row.values()) for row in rows]))


@click.command()
@click.argument("store")
@_json
def info(store: str, as_json: bool) -> None:
    """Show what is in a store."""
    from ooc_influence import GradientStore
    from ooc_influence.report import table

    opened = GradientStore.open(store)
    facts = _store_facts(opened) | {"curvature": _curvatures(opened)}
    _print(as_json, facts, lambda: table(("what", "value"), [(name, value) for name, value in _flat(facts)]))


@click.command()
@click.option("--out", default="demo-output", show_default=True, metavar="DIR", help="Where stores and pictures go.")
@click.option("--rows", type=int, help="Grow the train store to this many rows by passes over augmented images.")
@click.option("--k", type=int, default=1024, show_default=True, help="Gradient entries kept of each image.")
@click.option("--memory", metavar="SIZE", default="1GiB", show_default=True, help="Memory budget.")
@_json
def demo(out: str, rows: int | None, k: int, memory: str, as_json: bool) -> None:
    """Find wrong labels among real handwritten digits, from training the model to the pictures."""
    from ooc_influence.cli.demo import run_demo

    result = run_demo(out, rows=rows, k=k, memory=memory, progress=_show_progress(), quiet=as_json)
    if as_json:
        click.echo(json.dumps(result))


def _store_facts(store: Any) -> dict[str, Any]:
    from ooc_influence.memory import format_bytes
    from ooc_influence.store import tree_bytes

    size = tree_bytes(store.path)
    attrs = store.attrs
    return {
        "store": str(store.path),
        "rows": store.n,
        "committed": store.committed,
        "planned": store.layout.planned_rows,
        "k": store.k,
        "p": attrs["p"],
        "dtype": store.layout.dtype,
        "chunk_rows": store.layout.chunk_rows,
        "bytes": size,
        "size": format_bytes(size),
        "compressor": attrs.get("compressor"),
        "covered": attrs.get("covered"),
        "model": attrs.get("model"),
        "loss_kind": attrs.get("loss_kind"),
        "ids": store.layout.ids,
        "columns": store.layout.columns,
        "created": attrs["created"],
        "version": attrs["version"],
    }


def _curvatures(store: Any) -> dict[str, str]:
    from ooc_influence.curvature import Curvature
    from ooc_influence.errors import OocInfluenceError

    found = {}
    for path in sorted(path for path in (store.path / "curvature").glob("[!.]*") if path.is_dir()):
        try:
            Curvature(path).check(store)
            found[path.name] = "up to date"
        except OocInfluenceError as error:
            found[path.name] = str(error)
    return found


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            lines.append((f"{prefix}{name}", str(value)))
    return lines


ALL = (demo, extract, fisher, score, top, self_influence_command, info)

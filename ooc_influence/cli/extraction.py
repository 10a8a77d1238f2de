"""The commands that need a model: ``init`` and ``extract``."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.stores import store_facts


def _arguments(given: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the recipe, its split, and what ``init_store`` and ``extract_gradients`` are to be called with."""
    from ooc_influence import Dropout, Storage
    from ooc_influence.cli.recipes import choose_split, load_recipe
    from ooc_influence.errors import InputError
    from ooc_influence.store import parse_path

    parse_path(given["store"])
    source = click.get_current_context().get_parameter_source
    asked = click.core.ParameterSource.COMMANDLINE in (source("k"), source("seed"))
    if given["like"] is not None and (given["modules"] or asked):
        raise InputError("expected --like without --k, --seed and --modules; received both: --like fixes the mask")
    recipe = load_recipe(given["recipe_name"])
    arguments = {
        "compressor": None if given["like"] else Dropout(k=given["k"], seed=given["seed"]),
        "like": given["like"],
        "modules": list(given["modules"]) or None,
        "dtype": given["dtype"],
        "storage": Storage(codec=given["codec"]),
        "loss_kind": recipe.loss_kind,
        "check_model": not given["other_model"],
    }
    return recipe, choose_split(recipe, given["split"]), arguments


@click.command()
@options.building
@click.option("--shard", metavar="I/N", help="Be writer I of N (from 0) that fill one store together; see init.")
@click.option("--device", help="Where to run, such as cuda. Default: where the model is.")
@options.as_json
def extract(shard: str | None, device: str | None, as_json: bool, **given: Any) -> None:
    """Extract compressed per-sample gradients into a store.

    A run that was stopped goes on where it was when the same command runs again.
    """
    from ooc_influence import extract_gradients

    place = _parse_shard(shard)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints must not end up in our output
        recipe, data, arguments = _arguments(given)
        result = extract_gradients(
            recipe.model,
            recipe.per_sample_loss,
            data.batches,
            given["store"],
            device=device,
            ids=data.ids,
            columns=data.columns,
            shard=place,
            progress=options.show_progress(),
            **arguments,
        )
    options.print_result(as_json, store_facts(result), lambda: repr(result))


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    from ooc_influence.errors import InputError

    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(f"expected --shard I/N with 0 <= I < N, such as 0/4; received {text!r}")
    return int(index), int(count)


@click.command()
@options.building
@click.option(
    "--rows", type=int, help="Rows of the whole store. Default: as many as the split has, where that is known."
)
@options.as_json
def init(rows: int | None, as_json: bool, **given: Any) -> None:
    """Make the empty store that 'extract --shard' runs fill together.

    Fixes its rows, mask and settings once. Run again with more --rows to make room for further data.
    """
    from ooc_influence import init_store
    from ooc_influence.errors import InputError
    from ooc_influence.extract import row_types

    with contextlib.redirect_stdout(sys.stderr):
        recipe, data, arguments = _arguments(given)
        known, ids, columns = row_types(data.batches, data.ids, data.columns)
        wanted = known if rows is None else rows
        if wanted is None:
            raise InputError("expected --rows, since the split does not tell its length; received none")
        result = init_store(recipe.model, given["store"], wanted, ids=ids, columns=columns, **arguments)
    options.print_result(as_json, store_facts(result), lambda: f"{result!r}, {wanted} rows planned")

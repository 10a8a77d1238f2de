"""The command that holds stored scores against uncompressed ones on some samples of the user's own model."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.allocator import keep_freed_memory
from ooc_influence.cli.extraction import check_source


@click.command()
@click.option(
    "--store", required=True, type=options.PATH, metavar="PATH|URL", help="The store whose compression is looked at."
)
@click.option(
    "--recipe",
    "recipe_name",
    type=options.PATH,
    metavar="FILE.py:FUNCTION|MODULE:FUNCTION",
    help="As the store was made with.",
)
@click.option(
    "--model",
    type=options.PATH,
    metavar="DIR|ID",
    help="Instead: a Hugging Face model, or a PEFT adapter; with --data.",
)
@click.option("--data", type=options.PATH, metavar="FILE", help="Documents, as for extract.")
@click.option("--split", metavar="NAME", help="Which split, of a recipe or a datasets folder that has several.")
@click.option(
    "--rows", type=int, default=256, show_default=True, help="Samples to compare on; one in eight is a query."
)
@click.option("--damping", "dampings", type=float, multiple=True, metavar="X",
              help="Relative dampings beside the default; may be repeated. Default: 0.01, 1, 10.")  # fmt: skip
@click.option("--device", help="Where to run, such as cuda. Default: where the model is.")
@options.memory
@options.documents
@options.as_json
def check(rows: int, dampings: tuple[float, ...], memory: str | None, as_json: bool, **given: Any) -> None:
    """Say how well the scores of a store agree with uncompressed ones, on a few hundred samples.

    Gradients of the same samples are taken as the store has them, and whole; both are scored with the F of these rows.
    """
    from ooc_influence.evaluate.agreement import SWEEP
    from ooc_influence.evaluate.agreement import check as run
    from ooc_influence.extract.recipe_file import running

    keep_freed_memory()
    # what the user's code prints must not end up in our output
    with contextlib.redirect_stdout(sys.stderr), running(given["recipe_name"]):
        model, per_sample_loss, batches = _parts(given)
        found = run(
            given["store"], model, per_sample_loss, batches, rows=rows, dampings=dampings or SWEEP,
            device=given["device"], memory=memory, progress=options.show_progress(),
        )  # fmt: skip
    options.print_result(as_json, found.to_dict(), lambda: str(found))


def _parts(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return model, loss and batches."""
    from ooc_influence.errors import InputError

    check_source(given)
    if given["output"] == "curvature":
        raise InputError("expected gradients to check; received --output curvature: leave it out")
    if given["recipe_name"] is not None:
        from ooc_influence.extract.recipe_file import choose_split, load_recipe

        recipe = load_recipe(given["recipe_name"])
        return recipe.model, recipe.per_sample_loss, choose_split(recipe, given["split"]).batches
    from ooc_influence.hf.extraction import open_job

    kept = ("store", "recipe_name", "model", "data")
    named = {name: value for name, value in given.items() if name not in kept and value not in (None, (), False)}
    job = open_job(given["model"], given["data"], progress=options.show_progress(), **named)
    return job.model, job.per_sample_loss, job.batches

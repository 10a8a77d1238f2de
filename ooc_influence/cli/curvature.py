"""The command that fits a curvature: options in, a library call, its facts as text or JSON."""

from __future__ import annotations

from typing import Any

import click

from ooc_influence.cli import options


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
    "--side",
    type=click.Choice(["fisher", "gram", "auto"]),
    default="fisher",
    show_default=True,
    help="gram: by the rows' products, for fewer rows than columns; auto: the cheaper one that fits.",
)
@click.option("--name", help="Name of the curvature in the store: by default 'default', or 'gram' for that side.")
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
def fisher(train: str, side: Any, cache: str | None, cache_size: str, as_json: bool, **given: Any) -> None:
    """Compute and factorise the Fisher matrix of TRAIN, and save it there."""
    from ooc_influence import fit_curvature

    opened = options.open_train(train, cache, cache_size)
    curvature = fit_curvature(opened, side=side, progress=options.show_progress(), **given)
    options.print_result(as_json, curvature.facts(), lambda: repr(curvature))

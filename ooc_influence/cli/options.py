"""What the commands share: options, opening a store behind a cache, printing a result as text or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
memory = click.option("--memory", metavar="SIZE", help="Memory budget, such as 4GiB. Default: half of what is free.")
workers = click.option("--workers", type=int, metavar="N", help="Row stripes at once. Default: one, with all cores.")
cache = click.option("--cache", metavar="DIR", help="Keep chunks of a train store on object storage in this folder.")
cache_size = click.option(
    "--cache-size", metavar="SIZE", default="20GiB", show_default=True, help="What the folder may hold."
)


def several(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return one decorator that applies several, in the order they are to be listed."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


scoring = several(
    click.option("--curvature", metavar="NAME|PATH", help="Which curvature. Default: 'default' in TRAIN."),
    click.option("--damping", type=float, help="Damping factor. Default: the curvature's (0.1, relative)."),
    click.option(
        "--damping-mode",
        type=click.Choice(["relative", "absolute"]),
        default="relative",
        show_default=True,
        help="relative: λ = damping · tr(F)/k; absolute: λ = damping.",
    ),
    workers, memory, cache, cache_size, as_json,
)  # fmt: skip

building = several(
    click.option("--recipe", "recipe_name", required=True, metavar="FILE.py:FUNCTION|MODULE:FUNCTION",
                 help="A function that returns (model, per_sample_loss, splits) or an ooc_influence.Recipe."),
    click.option("--split", metavar="NAME", help="Which of the recipe's splits; needed where there are several."),
    click.option("--store", required=True, metavar="PATH|URL", help="The store to write, or to go on with."),
    click.option("--like", metavar="TRAIN", help="Make a query store with the mask of this train store."),
    click.option("--k", type=int, default=4096, show_default=True, help="Gradient entries kept of each sample."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the mask."),
    click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32", "int8", "int4"]), default="float16",
                 show_default=True, help="Representation on disk; float16, int8 and int4 have a scale a row."),
    click.option("--codec", type=click.Choice(["zstd", "blosc", "lz4", "gzip"]),
                 help="Compress chunks; they can then not be mapped. Default: none."),
    click.option("--modules", multiple=True, metavar="PATTERN", help="Layers by name pattern; may be repeated."),
    click.option("--other-model", is_flag=True,
                 help="Go on although the model is not the one the store was made with; this is recorded."),
)  # fmt: skip


def show_progress() -> bool:
    """Return whether somebody looks at stderr."""
    return sys.stderr.isatty()


def print_result(json_wanted: bool, result: Mapping[str, Any], text: Callable[[], str]) -> None:
    """Print a result as one line of JSON, or as text."""
    click.echo(json.dumps(result, default=str) if json_wanted else text())


def open_train(train: str, cache: str | None, cache_size: str) -> Any:
    """Open the store to read from, behind a cache if there is one."""
    from ooc_influence import ChunkCache, GradientStore

    return GradientStore.open(train, cache=ChunkCache(cache, cache_size) if cache else None)

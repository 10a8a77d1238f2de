"""The commands that compute: options in, a library call, its result as text or JSON."""

from __future__ import annotations

import json
from typing import Any

import click

from ooc_influence.cli import cluster, extraction, options, planning, scoring, stores


@click.command()
@click.argument("train")
@click.option("--name", default="default", show_default=True, help="Name of the curvature in the store.")
@click.option("--out", metavar="PATH", help="Save it there instead of in the store.")
@click.option("--refit", is_flag=True, help="Fit again although an up-to-date curvature is there.")
@options.workers
@options.memory
@options.cluster
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
    demo, extraction.init, extraction.extract, fisher, scoring.score, scoring.top, scoring.self_influence_command,
    scoring.groups, scoring.modules, planning.plan, cluster.cluster_script, stores.info, stores.verify, stores.ids,
    stores.drop, stores.compact, stores.merge, stores.reduce, stores.upgrade,
)  # fmt: skip

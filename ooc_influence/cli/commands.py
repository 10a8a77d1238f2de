"""The commands that compute: options in, a library call, its result as text or JSON."""

from __future__ import annotations

import json

import click

from ooc_influence.cli import checking, cluster, curvature, extraction, options, planning, reporting, scoring, stores


@click.command()
@click.option(
    "--out",
    default="demo-output",
    show_default=True,
    type=options.PATH,
    metavar="DIR",
    help="Where stores and pictures go.",
)
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
    demo, extraction.init, extraction.extract, curvature.fisher, scoring.score, scoring.top,
    scoring.self_influence_command, scoring.groups, scoring.modules, reporting.report, reporting.serve, checking.check,
    planning.plan, cluster.cluster_script,
    stores.info, stores.verify, stores.ids, stores.drop, stores.compact, stores.merge, stores.reduce, stores.upgrade,
)  # fmt: skip

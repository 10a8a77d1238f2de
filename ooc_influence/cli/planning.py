"""``plan``: what a corpus will take, before anything runs."""

from __future__ import annotations

from typing import Any

import click

from ooc_influence.cli import options


@click.command()
@click.option("--rows", type=int, required=True, metavar="N", help="Train rows.")
@click.option("--k", type=int, required=True, help="Gradient entries kept of each row.")
@click.option("--queries", type=int, default=100, show_default=True, metavar="Q", help="Query rows.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32", "int8", "int4"]), default="float16",
              show_default=True, help="Representation on disk.")  # fmt: skip
@click.option("--reduce", type=int, metavar="R", help="Numbers that kept entries are reduced to. Default: none.")
@click.option("--top", type=int, default=100, show_default=True, help="Rows of a top list.")
@click.option("--dampings", type=int, default=1, show_default=True, help="Damping values at once.")
@options.memory
@click.option("--workers", type=int, default=1, show_default=True, metavar="W", help="Row stripes at once.")
@click.option("--gflops", type=float, help="10^9 float32 FLOP in a second. Default: measured here.")
@click.option("--read-rate", metavar="SIZE", help="Bytes read from the disk in a second. Default: measured here.")
@click.option(
    "--folder",
    default=".",
    type=options.PATH,
    metavar="DIR",
    help="Where the stores will be: the disk measured. Default: here.",
)
@options.as_json
def plan(as_json: bool, read_rate: str | None, **given: Any) -> int:
    """Show what each stage will take: disk, memory, arithmetic, time. Exit code 1 where one does not fit the budget.

    Nothing is written but a file of 128 MiB for the two seconds in which the machine is measured.
    """
    from ooc_influence.memory import parse_bytes
    from ooc_influence.planning import plan as make_plan

    found = make_plan(read_rate=None if read_rate is None else parse_bytes(read_rate), **given)
    options.print_result(as_json, found.to_dict(), lambda: _text(found))
    return 0 if found.fits else 1


def _text(found: Any) -> str:
    from ooc_influence.memory import format_bytes
    from ooc_influence.report import table

    lines = []
    for stage in found.stages:
        lines.append(
            (
                stage.name,
                format_bytes(stage.disk) if stage.disk else "-",
                "the model's" if stage.peak is None else format_bytes(stage.peak),
                "the model's" if stage.flops is None else f"{stage.flops / 1e9:.3g}",
                "the model's" if stage.seconds is None else _duration(stage.seconds),
                "no" if stage.refusal else "yes" if stage.peak is not None else "",
            )
        )
    header = ("stage", "disk", "peak memory", "GFLOP", "time", "fits")
    notes = [f"{stage.name}: {stage.refusal or stage.note}" for stage in found.stages if stage.refusal or stage.note]
    ends = [f"budget {format_bytes(found.budget)} a process", f"this machine: {found.rates}"]
    return "\n".join([table(header, lines), "", *notes, *ends])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

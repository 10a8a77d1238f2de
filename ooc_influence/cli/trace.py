"""The command ``trace``: from a model and documents to pages, in one run."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.help import EXTRACTION, SectionedCommand
from ooc_influence.errors import InputError
from ooc_influence.options import TraceOptions

_SHOWN_QUERIES, _SHOWN_ROWS, _SHOWN_TEXT = 3, 3, 100  # of the answer in the terminal: queries, rows, characters


@click.command(
    cls=SectionedCommand, sections=EXTRACTION,
    first=("model", "data", "queries", "out", "messages", "prompt", "completion", "id", "documents", "yes"),
)  # fmt: skip
@click.argument("run", type=options.PATH, required=False)
@click.option("--model", type=options.PATH, metavar="DIR|ID", help="The fine-tuned model, or a PEFT adapter.")
@click.option("--data", type=options.PATH, metavar="FILE", help="The documents it was trained on: .jsonl, .csv, .tsv, "
              ".parquet, .json, .txt (or .gz, .zst of these), 'dir/*.jsonl', a datasets folder.")  # fmt: skip
@click.option("--queries", type=options.PATH, metavar="FILE", help="The answers to be explained, with their questions.")
@click.option("-o", "--out", type=options.PATH, metavar="DIR", help="The folder of the run: its stores, lists, pages "
              "and settings.")  # fmt: skip
@options.flags(TraceOptions)
@options.yes
@click.option("--open", "open_page", is_flag=True, help="Open the page in a browser at the end.")
@options.as_json
def trace(run: str | None, out: str | None, yes: bool, open_page: bool, as_json: bool, **settings: Any) -> None:
    """Find which training documents a model's answers come from, and write pages about it.

    Extracts the gradients of both sets of documents, fits what is needed, makes lists, and writes pages in which the
    tokens that carry a score light up. The same command continues an interrupted run; RUN, the run.yaml that every run
    leaves in its folder, repeats one.
    """
    click.echo("loading PyTorch", err=True)
    from ooc_influence.tracing import read_settings
    from ooc_influence.tracing import trace as run_trace

    asked = {name: settings[name] for name in options.given(settings)}
    if run is not None:
        asked = read_settings(run) | asked
        out = out or asked.pop("out", None) or _folder_of(run)
    asked.pop("out", None)
    lacking = [name for name in ("model", "data", "queries") if asked.get(name) is None]
    if lacking or out is None:
        names = ", ".join(f"--{name}" for name in [*lacking, *([] if out else ["out"])])
        raise InputError(f"expected {names}, or the run.yaml of an earlier run; received none")

    model, data, queries = (asked.pop(name) for name in ("model", "data", "queries"))
    with contextlib.redirect_stdout(sys.stderr):  # what other libraries print
        confirm = None if yes else options.confirm
        found = run_trace(model, data, queries, out, confirm=confirm, **{**asked, "progress": True})
    facts = {"folder": str(found.folder), "page": str(found.page), "rows": found.train.n, "queries": found.queries.n}
    options.print_result(as_json, facts, lambda: _answer(found))
    if open_page:
        click.launch(str(found.page))


def _folder_of(run: str) -> str | None:
    """Return the folder that a run's own file is in; None for another file."""
    from ooc_influence.tracing import RUN

    return str(Path(run).parent) if Path(run).name == RUN else None


def _answer(found: Any) -> str:
    """Return the first queries' strongest passages as text, and where the rest is."""
    from ooc_influence.report import describe_scoring

    lines = []
    with (found.folder / "answers.jsonl").open(encoding="utf-8") as file:
        for _, line in zip(range(_SHOWN_QUERIES), file, strict=False):
            entry = json.loads(line)
            lines += [_short(entry["text"]), ""]
            for each in entry["proponents"][:_SHOWN_ROWS]:
                lines.append(f"  {each['score']:+10.4g}  {each['id']}: {_short(each['text'])}")
            lines.append("")
    return "\n".join([*lines, describe_scoring(found.lists.settings), f"open {found.page}"])


def _short(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words if len(words) <= _SHOWN_TEXT else f"{words[: _SHOWN_TEXT - 1]}…"

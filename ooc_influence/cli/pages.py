"""The commands that show rows as pages: in a folder, or served with queries typed in."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.help import SCORING, SectionedCommand
from ooc_influence.errors import InputError
from ooc_influence.options import ReportOptions

_FIELDS = ("text", "label", "source", "id", "image")
_pages = options.several(
    click.option("--queries", type=options.PATH, metavar="Q",
                 help="Query store whose proponents and opponents to show."),
    click.option("--data", type=options.PATH, metavar="FILE",
                 help="Where the texts of STORE's rows are: .jsonl, .csv, .tsv, .parquet, .json, .txt (or .gz, .zst "
                 "of these), 'dir/*.jsonl', a datasets folder."),
    click.option("--query-data", type=options.PATH, metavar="FILE", help="Where the texts of the queries are."),
    click.option("--text", metavar="FIELD", help="Field with the text. Default: as extracted; text; prompt and "
                 "completion; messages."),
    click.option("--label", metavar="FIELD", help="Field with the label. Default: the column or field 'label'."),
    click.option("--source", metavar="FIELD", help="Field with the source. Default: the column or field 'source'."),
    click.option("--id", metavar="FIELD", help="Field with the ids that the store has. Default: as extracted, or "
                 "'id'."),
    click.option("--image", metavar="FIELD", help="Field with an image's path, below the folder of the data file."),
    click.option("--images", type=options.PATH, metavar="FILE.npy",
                 help="Images of STORE's rows, (n, h, w) or (n, h, w, c), in place of --data."),
    click.option("--query-images", type=options.PATH, metavar="FILE.npy",
                 help="Images of the queries, in the same form."),
    options.flags(
        ReportOptions, without=("device",),
        curvature={"multiple": False, "help": "Curvature to use. Default: 'default' in STORE."},
        damping={"multiple": False, "help": "Damping factor. Default: the curvature's (0.1, relative)."},
    ),
    options.dot, options.where,
)  # fmt: skip


_loading = options.several(
    options.loading, click.option("--device", help="Where the model runs, such as cuda. Default: the CPU.")
)


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("out", "queries", "data", "query_data", "model", "token_rows", "by", "top", "curvature", "damping"),
)  # fmt: skip
@click.argument("store", type=options.PATH)
@click.option("-o", "--out", required=True, type=options.PATH, metavar="DIR",
              help="The folder to write; an earlier report is replaced.")  # fmt: skip
@click.option("--model", type=options.PATH, metavar="DIR|ID",
              help="Show texts token by token, with each token's share of the score, by this Hugging Face language "
              "model: the one that STORE was made with.")  # fmt: skip
@_loading
@_pages
def report(store: str, out: str, as_json: bool, **settings: Any) -> None:
    """Write pages about STORE to a folder that opens from disk: examples, label errors, spectrum, groups.

    Open DIR/index.html in a browser; nothing is loaded from anywhere else.
    """
    from ooc_influence.report import write_report

    model, loading = settings.pop("model"), {"device": settings.pop("device"), **options.pop_loading(settings)}
    arguments = _report_arguments(store, settings)
    if model is None and (named := options.given([*options.LOADING, "device", "token_rows"])):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise InputError(f"expected --model with {flags}; received none: name the model that STORE was made with")
    if model is not None and arguments["queries"] is not None and settings["token_rows"]:
        from ooc_influence import hf

        model = hf.load(model, **loading)
    folder = write_report(out=out, model=model, **arguments)
    facts = {"report": str(folder), "open": str(folder / "index.html")}
    options.print_result(as_json, facts, lambda: f"open {facts['open']}")


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("model", "recipe", "typed", "queries", "data", "query_data", "port"),
)  # fmt: skip
@click.argument("store", type=options.PATH)
@click.option("--model", type=options.PATH, metavar="DIR|ID",
              help="Take new queries with this Hugging Face model, the one STORE was made with.")  # fmt: skip
@click.option("--recipe", type=options.PATH, metavar="FILE.py:FUNCTION",
              help="Take them with a recipe that has query=.")  # fmt: skip
@click.option("--typed", type=click.Choice(["text", "prompt", "chat"]), default="text", show_default=True,
              help="What is typed, with --model: running text, or a prompt and a completion (chat: through the "
              "tokenizer's template).")  # fmt: skip
@_loading
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this machine's "
              "own let the network in.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--no-token", is_flag=True, help="Let anybody ask who reaches the port.")
@_pages
def serve(store: str, host: str, port: int, no_token: bool, as_json: bool, **settings: Any) -> None:
    """Serve pages about STORE on this machine, and take new queries. Ctrl-C ends it.

    A query typed or pasted is extracted as the rows of STORE were; its proponents come from STORE.
    """
    from ooc_influence.report.server import live_report
    from ooc_influence.report.server import serve as run

    loading = {"device": settings.pop("device"), **options.pop_loading(settings)}
    model = _query_model(settings.pop("model"), settings.pop("recipe"), settings.pop("typed"), loading)

    def started(url: str) -> None:
        options.print_result(as_json, {"url": url}, lambda: f"open {url} (Ctrl-C ends it)")
        sys.stdout.flush()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _report_arguments(store, settings)
    with live_report(model=model, listen=(host, port), token=not no_token, **arguments) as server:
        run(server, started)
    click.echo("stopped", err=True)


def _query_model(name: str | None, recipe: str | None, typed: str, loading: dict[str, Any]) -> Any:
    from ooc_influence.report.live_query import HuggingFaceModel, RecipeModel

    if name is not None and recipe is not None:
        raise InputError("expected --model or --recipe; received both")
    if name is not None:
        return HuggingFaceModel(name, typed, **loading)
    if recipe is None:
        return None
    from ooc_influence.extract import load_recipe

    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints must not end up in our output
        return RecipeModel(load_recipe(recipe), recipe)


def _report_arguments(store: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a report that options stand for."""
    from ooc_influence.report import Corpus

    if settings.pop("dot"):
        if settings["curvature"] is not None:
            raise InputError("expected --dot or --curvature; received both")
        settings["curvature"] = False
    train = options.open_train(store, settings.pop("cache"), settings.pop("cache_size"))
    fields = {name: settings.pop(name) for name in _FIELDS}
    data, images = settings.pop("data"), settings.pop("images")
    query_data, query_images = settings.pop("query_data"), settings.pop("query_images")
    if data is None and query_data is None and any(fields.values()):
        raise InputError("expected --data or --query-data with the names of fields; received neither")
    data_fields = query_fields = fields
    if data is not None and query_data is not None:  # queries may have fewer fields, or others
        data_fields, query_fields = _fields_of(data, fields), _fields_of(query_data, fields)
        # a field that neither has is refused where it is looked for
        data_fields |= {name: field for name, field in fields.items() if name not in query_fields}
    return settings | {
        "store": train,
        "data": Corpus(data, images=images, **(data_fields if data else {})),
        "query_data": Corpus(query_data, images=query_images, **(query_fields if query_data else {})),
        "by": list(settings["by"]) or None,
        "progress": True,
    }


def _fields_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return those of the fields that a file's documents have."""
    from ooc_influence.corpus import open_documents

    names = open_documents(path).column_names
    return {name: field for name, field in fields.items() if field in names}

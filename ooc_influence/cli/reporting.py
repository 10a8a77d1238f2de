"""The commands that make pages: ``report`` writes a folder, ``serve`` answers new queries too."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ooc_influence.cli import options

_LOADING = ("adapter", "tokenizer", "revision", "dtype", "device", "trust_remote_code")
_FIELDS = ("text", "label", "source", "id", "image")

examples = options.several(
    click.option("--queries", type=options.PATH, metavar="Q",
                 help="Query store whose proponents and opponents to show."),
    click.option("--data", type=options.PATH, metavar="FILE",
                 help="Where the texts of STORE's rows are: .jsonl, .csv, .tsv, .parquet, .json, .txt (or .gz, .zst "
                 "of these), 'dir/*.jsonl', a datasets folder."),
    click.option("--query-data", type=options.PATH, metavar="FILE", help="The same of the queries."),
    click.option("--text", metavar="FIELD", help="Field with the text. Default: as extracted; text; prompt and "
                 "completion; messages."),
    click.option("--label", metavar="FIELD", help="Field with the label. Default: the column or field 'label'."),
    click.option("--source", metavar="FIELD", help="Field with the source. Default: the column or field 'source'."),
    click.option("--id", metavar="FIELD", help="Field with the ids that the store has. Default: as extracted, or "
                 "'id'."),
    click.option("--image", metavar="FIELD", help="Field with an image's path, below the folder of the data file."),
    click.option("--images", type=options.PATH, metavar="FILE.npy",
                 help="Instead: images of STORE's rows, (n, h, w) or (n, h, w, c)."),
    click.option("--query-images", type=options.PATH, metavar="FILE.npy", help="The same of the queries."),
    click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Proponents and opponents of "
                 "a query."),
    click.option("--suspects", type=click.IntRange(min=1), default=500, show_default=True, help="Rows on the page of "
                 "label errors, by self-influence and by loss."),
    click.option("--by", multiple=True, metavar="COLUMN", help="Sum scores by this column; may be repeated. Default: "
                 "label and source."),
    click.option("--title", help="Of the pages. Default: the store's name."),
    click.option("--curvature", type=options.PATH, metavar="NAME|PATH",
                 help="Which curvature. Default: 'default' in STORE."),
    click.option("--dot", is_flag=True, help="No curvature: plain dot products of gradients."),
    click.option("--damping", type=float, help="Damping factor. Default: the curvature's (0.1, relative)."),
    click.option("--damping-mode", type=click.Choice(["relative", "absolute"]), default="relative", show_default=True,
                 help="relative: λ = damping · tr(F)/d; absolute: λ = damping."),
    click.option("--normalize", type=click.Choice(["cosine", "train"]),
                 help="cosine: scores in [-1, 1]; train: divide by the train row's norm (RelatIF)."),
    options.workers, options.memory, options.cluster, options.cache, options.cache_size,
)  # fmt: skip


@click.command()
@click.argument("store", type=options.PATH)
@click.option(
    "-o",
    "--out",
    required=True,
    type=options.PATH,
    metavar="DIR",
    help="The folder to write; an earlier report is replaced.",
)
@examples
@options.as_json
def report(store: str, out: str, as_json: bool, **given: Any) -> None:
    """Write pages about STORE to a folder that opens from disk: examples, label errors, spectrum, groups.

    Open DIR/index.html in a browser; nothing is loaded from anywhere else.
    """
    from ooc_influence.report import write_report

    written = write_report(out=out, **arguments(store, given))
    facts = {"report": str(written), "open": str(written / "index.html")}
    options.print_result(as_json, facts, lambda: f"open {facts['open']}")


@click.command()
@click.argument("store", type=options.PATH)
@examples
@click.option("--model", type=options.PATH, metavar="DIR|ID",
              help="Take new queries with this Hugging Face model, the one STORE was made "
              "with.")  # fmt: skip
@click.option(
    "--recipe", type=options.PATH, metavar="FILE.py:FUNCTION", help="Take them with a recipe that has query=."
)
@click.option("--typed", type=click.Choice(["text", "prompt", "chat"]), default="text", show_default=True,
              help="What is typed, with --model: running text, or a prompt and a completion (chat: through the "
              "tokenizer's template).")  # fmt: skip
@click.option("--adapter", type=options.PATH, metavar="DIR", help="A PEFT adapter to put on the model.")
@click.option("--tokenizer", type=options.PATH, metavar="DIR|ID", help="Where the tokenizer is, if not with the model.")
@click.option("--revision", help="Of the hub's repository.")
@click.option("--model-dtype", "dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16", "8bit"]),
              default="auto", show_default=True, help="Of the model's weights; auto: as saved.")  # fmt: skip
@click.option("--device", help="Where the model runs, such as cuda. Default: the CPU.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this machine's "
              "own let the network in.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--no-token", is_flag=True, help="Let anybody ask who reaches the port.")
@options.as_json
def serve(store: str, host: str, port: int, no_token: bool, as_json: bool, **given: Any) -> None:
    """Serve pages about STORE on this machine, and take new queries. Ctrl-C ends it.

    A query typed or pasted is extracted as the rows of STORE were; its proponents come from STORE.
    """
    import signal

    from ooc_influence.report.server import live_report
    from ooc_influence.report.server import serve as run

    loading = {name: given.pop(name) for name in _LOADING}
    model = _model(given.pop("model"), given.pop("recipe"), given.pop("typed"), loading)

    def started(url: str) -> None:
        options.print_result(as_json, {"url": url}, lambda: f"open {url} (Ctrl-C ends it)")
        sys.stdout.flush()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with live_report(model=model, listen=(host, port), token=not no_token, **arguments(store, given)) as server:
        run(server, started)
    click.echo("stopped", err=True)


def _model(name: str | None, recipe: str | None, typed: str, loading: dict[str, Any]) -> Any:
    from ooc_influence.errors import InputError
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


def arguments(store: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a library call that options stand for."""
    from ooc_influence.errors import InputError
    from ooc_influence.report import Corpus

    if given.pop("dot"):
        if given["curvature"] is not None:
            raise InputError("expected --dot or --curvature; received both")
        given["curvature"] = False
    opened = options.open_train(store, given.pop("cache"), given.pop("cache_size"))
    fields = {name: given.pop(name) for name in _FIELDS}
    data, images = given.pop("data"), given.pop("images")
    query_data, query_images = given.pop("query_data"), given.pop("query_images")
    if data is None and query_data is None and any(fields.values()):
        raise InputError("expected --data or --query-data with the names of fields; received neither")
    if data is not None and query_data is not None:  # queries may have fewer fields, or others
        known, asked = _fields_of(data, fields), _fields_of(query_data, fields)
        known |= {name: field for name, field in fields.items() if name not in asked}  # refused where it is looked for
    else:
        known = asked = fields
    by = given.pop("by")
    return {
        "store": opened,
        "data": Corpus(data, images=images, **(known if data else {})),
        "query_data": Corpus(query_data, images=query_images, **(asked if query_data else {})),
        "by": list(by) or None,
        "progress": options.show_progress(),
        **given,
    }


def _fields_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return those of the fields that a file's documents have."""
    from ooc_influence.corpus import open_documents

    names = open_documents(path).column_names
    return {name: field for name, field in fields.items() if field in names}

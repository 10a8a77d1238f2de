"""The command line: its commands, how it ends, and what it says after an error or an interruption."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import click

from ooc_influence._version import __version__
from ooc_influence.cli import (
    cluster,
    extraction,
    interchange,
    lists,
    options,
    pages,
    scoring,
    selection,
    stores,
    trace,
    verification,
)
from ooc_influence.cli.help import SectionedGroup
from ooc_influence.errors import InputError, OocInfluenceError, OocInfluenceWarning, refused


@click.command()
@click.option("--out", default="demo-output", show_default=True, type=options.PATH, metavar="DIR",
              help="Where stores and pictures go.")  # fmt: skip
@click.option("--rows", type=int, help="Grow the train store to this many rows by passes over augmented images.")
@click.option("--k", type=int, default=1024, show_default=True, help="Gradient entries kept of each image.")
@click.option("--memory", metavar="SIZE", default="1GiB", show_default=True, help="Memory budget.")
@options.as_json
def demo(out: str, rows: int | None, k: int, memory: str, as_json: bool) -> None:
    """Find wrong labels among real handwritten digits, from training the model to the pictures."""
    from ooc_influence.cli.demo import run_demo

    result = run_demo(out, rows=rows, k=k, memory=memory, progress=True, quiet=as_json)
    if as_json:
        click.echo(json.dumps(result))


ALL = (
    trace.trace, demo, extraction.init, extraction.extract, scoring.fisher, scoring.trajectory, scoring.score,
    lists.top, scoring.self_influence_command, scoring.groups, lists.modules, selection.select, pages.report,
    pages.serve, verification.verify_influence, extraction.check, extraction.plan, cluster.cluster_script,
    stores.info, stores.verify, stores.ids, stores.drop, stores.compact, stores.merge, stores.reduce, stores.rewrite,
    stores.average, stores.sketch, stores.upgrade, interchange.export, interchange.import_command,
)  # fmt: skip


_python_format = warnings.formatwarning


@click.group(cls=SectionedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ooc-influence")
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def cli(traceback: bool) -> None:
    """Training-data attribution at corpus scale.

    Extract compressed per-sample gradients of a PyTorch model into a store on disk, fit the Fisher matrix of its rows,
    and score every training example's influence on a query: positive scores are proponents, negative ones opponents.
    """


for command in ALL:
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = _format_warning
    try:
        code: Any = cli.main(arguments, prog_name="ooc-influence", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"interrupted: {_resuming(arguments)}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        if "--traceback" in arguments:
            raise
        if isinstance(error, PermissionError):
            error = InputError(refused("to read and write what the command needs", error))
        if isinstance(error, OocInfluenceError):
            click.echo(f"error: {_one_line(error)}", err=True)
            sys.exit(2)
        kind = type(error).__name__
        click.echo(
            f"error: unexpected {kind}: {_one_line(error)} (ooc-influence --traceback ... shows where)", err=True
        )
        sys.exit(1)


_CONTINUED = "trace", "extract", "init", "demo", "reduce", "rewrite", "average", "trajectory", "sketch", "import"


def _resuming(arguments: list[str]) -> str:
    """Return how to continue after an interruption."""
    command = next((name for name in arguments if name in cli.commands), "")
    again = "run the same command again, it continues"
    if command in _CONTINUED:
        return f"what is committed stays; {again} where it was"
    if command == "fisher":
        return f"sums and passes saved so far stay; {again} from there"
    if command == "verify-influence":
        return f"finished runs stay; {again} with those that are missing"
    if command == "score" or (command == "modules" and "--out" in " ".join(arguments)):
        return f"finished chunks stay; {again} with those that are missing"
    if command in ("top", "self-influence", "groups", "select"):
        if any(argument.startswith("--resume") for argument in arguments):
            return f"finished parts stay; {again} with those that are missing"
        return "run the same command again, it starts again; with --resume DIR it would continue where it was"
    return "nothing is half done; run the same command again, it starts again"


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, OocInfluenceWarning):
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()

"""What commands share: flags made from :mod:`ooc_influence.options`, results as text or JSON, the process's memory."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from ooc_influence.errors import InputError
from ooc_influence.options import (
    DampingScope,
    DocumentOptions,
    ExtractionOptions,
    LoadingOptions,
    Option,
    Weighting,
    definitions,
)

F = TypeVar("F", bound=Callable[..., Any])


class _PathText(click.types.StringParamType):
    """A path or a URL, or a name that stands for one: text, which a shell completes as a file or folder."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PATH = _PathText()


def several(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return one decorator that applies several, in the order they are to be listed."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def flags(
    kind: type[Any], *, only: tuple[str, ...] = (), without: tuple[str, ...] = (), **changes: dict[str, Any]
) -> Callable[[F], F]:
    """Return a decorator that gives a command the flags of a kind of options, by the names of the library's keywords.

    Parameters
    ----------
    kind : type
        A kind of :mod:`ooc_influence.options`.
    only, without : tuple of str
        Options to take, or to leave out. Those of the library alone are always left out.
    **changes
        Settings of ``click.option`` that differ here, by option.
    """
    chosen = {
        name: option
        for name, option in definitions(kind).items()
        if option.help and name not in without and (not only or name in only)
    }
    return several(*(_flag(name, option, changes.get(name, {})) for name, option in chosen.items()))


def _flag(name: str, option: Option, changes: dict[str, Any]) -> Callable[[Any], Any]:
    settings: dict[str, Any] = {"help": option.help}
    if isinstance(option.default, bool):
        settings["is_flag"] = True
        if option.default:  # the flag turns it off
            settings["callback"] = lambda context, parameter, value: not value
    else:
        kinds = {"path": PATH, int: click.INT if option.least is None else click.IntRange(min=option.least)}
        kind = click.Choice(option.choices) if option.choices else kinds.get(option.kind, option.kind)
        settings |= {"type": kind, "metavar": option.metavar, "multiple": option.multiple}
        if not option.multiple:
            settings |= {"default": option.default, "show_default": option.default is not None}
    return click.option(option.flag or f"--{name.replace('_', '-')}", name, **settings | changes)


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask before long work.")
memory = flags(ExtractionOptions, only=("memory",))
dot = click.option("--dot", is_flag=True, help="Use no curvature: plain dot products of gradients.")
table = click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="FILE",
    help="Also write the result as a table, .parquet, .csv or .jsonl: a line a row, with ids, columns and texts.",
)
codec = click.option(
    "--codec", type=click.Choice(["zstd", "blosc", "lz4", "gzip"]),
    help="Compress chunks; they cannot be memory-mapped then. Default: none.",
)  # fmt: skip
cache = several(
    click.option("--cache", type=PATH, metavar="DIR",
                 help="Keep chunks of a train store on object storage in this folder."),
    click.option("--cache-size", metavar="SIZE", default="20GiB", show_default=True,
                 help="Size limit of the folder of --cache."),
)  # fmt: skip


def cluster(function: F) -> F:
    """Let a command run on a Dask cluster: its work goes to the workers of the scheduler named, if one is."""

    @click.option("--scheduler", metavar="ADDRESS", help="Run on this Dask scheduler's workers, as tcp://host:8786.")
    @click.option(
        "--scheduler-file",
        type=PATH,
        metavar="FILE",
        help="Run on workers of the Dask scheduler that wrote this file.",
    )
    @functools.wraps(function)
    def call(*args: Any, scheduler: str | None, scheduler_file: str | None, **options: Any) -> Any:
        from ooc_influence.cli.cluster import connected

        with connected(scheduler, scheduler_file):
            return function(*args, **options)

    return call  # type: ignore[return-value]


where = several(cluster, cache, as_json)  # what commands over the rows of a store have beside their options

source = several(
    click.option("--recipe", "recipe_name", type=PATH, metavar="FILE.py:FUNCTION|MODULE:FUNCTION",
                 help="A function that returns (model, per_sample_loss, splits) or an ooc_influence.Recipe."),
    click.option("--model", type=PATH, metavar="DIR|ID",
                 help="A Hugging Face model, or a PEFT adapter; with --data, in place of --recipe."),
    click.option("--data", type=PATH, metavar="FILE|DIR|ID",
                 help="Documents: .jsonl, .csv, .tsv, .parquet, .json, .txt (or .gz, .zst of these), 'dir/*.jsonl', a "
                 "folder of one kind of these, a datasets folder, or a data set of the hub as org/name."),
    click.option("--split", metavar="NAME", help="Which split, of a recipe, a folder or a data set that has several."),
)  # fmt: skip
documents = flags(DocumentOptions)
LOADING = ("adapter", "tokenizer", "revision", "trust_remote_code", "model_dtype")
model_dtype = flags(DocumentOptions, only=LOADING[-1:])
loading = several(flags(LoadingOptions, only=LOADING), model_dtype)


def pop_loading(settings: dict[str, Any]) -> dict[str, Any]:
    """Take from options how a Hugging Face model is loaded (:func:`ooc_influence.hf.load`)."""
    found = {name: settings.pop(name) for name in LOADING}
    return {("dtype" if name == "model_dtype" else name): value for name, value in found.items()}


building = several(
    source,
    click.option("--store", required=True, type=PATH, metavar="PATH|URL", help="The store to write, or to continue."),
    click.option("--compressor", default="dropout", show_default=True,
                 type=click.Choice(["dropout", "gaussian", "rademacher", "sjlt", "grass", "logra", "pca", "identity"]),
                 help="How gradients are compressed (docs/compressors.md)."),
    click.option("--row-bytes", metavar="SIZE", help="Choose entries and representation for this size of a row, such "
                 "as 8kB, by what is measured on language models: signs in a Kronecker basis; below 3 kB, int8 numbers "
                 "of an eigenbasis."),
    click.option("--k", type=int, help="Gradient entries kept of each sample, or numbers that a projection of all "
                 "makes. Default: 4096; with --model 65536."),
    click.option("--basis", type=click.Choice(["parameters", "kronecker"]),
                 help="Coordinates of the gradients whose entries are kept: the parameters' own, or those of each "
                 "layer's Kronecker basis. Default: parameters; with --model, of language models, kronecker."),
    click.option("--basis-damping", type=float, metavar="X", help="Relative damping at which entries are drawn in a "
                 "Kronecker basis, and the default of its curvature. Default: 0.03; of an adapter 0.3."),
    click.option("--damping-scope", type=click.Choice(get_args(DampingScope)),
                 help="Whether --basis-damping is relative to a mean over each layer, or over the whole model. "
                 "Default: layer; of an adapter model."),
    click.option("--sampling", type=click.Choice(["uniform", "importance", "grid"]),
                 help="How entries are chosen. Default: uniform; with --model importance; in a Kronecker basis grid."),
    click.option("--dims", type=int, metavar="R", help="Reduce kept entries to R numbers, the largest directions of "
                 "their eigenbasis; 0: do not. Default: 0; with --model 4096 if the store would exceed 64 GiB."),
    click.option("--pilot", type=int, metavar="N",
                 help="Rows that the eigenbasis of --dims is made from. Default: 4 R."),
    click.option("--basis-weights", type=click.Choice(get_args(Weighting)),
                 help="Row weights of the eigenbasis of --dims. Default: none."),
    click.option("--rank-out", type=int, metavar="N", help="Rows kept of a layer by logra. Default: 16."),
    click.option("--rank-in", type=int, metavar="N", help="Columns kept of a layer by logra. Default: 16."),
    click.option("--nonzeros", type=int, metavar="N", help="Nonzeros of each entry in sjlt and grass. Default: 1."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the mask or projection."),
    codec,
    click.option("--adam", type=PATH, metavar="FILE|DIR",
                 help="Weight entries with this Adam state (a file or checkpoint)."),
    flags(ExtractionOptions),
)  # fmt: skip


def confirm(work: str) -> bool:
    """Ask whether to do long work; refuse where nobody can be asked."""
    if not sys.stdin.isatty():
        raise InputError(f"expected --yes for {work} where nobody can be asked; received none")
    return click.confirm(f"This takes {work}. Start?", err=True)


def print_result(json_wanted: bool, result: Mapping[str, Any], text: Callable[[], str]) -> None:
    """Print a result as one line of JSON, or as text."""
    click.echo(json.dumps(result, default=str) if json_wanted else text())


def print_store(json_wanted: bool, store: Any) -> None:
    """Print what is in a store that was written."""
    from ooc_influence.report import describe, store_facts

    print_result(json_wanted, store_facts(store), lambda: describe(store))


def chunking(codec: str | None) -> Any:
    """Return chunks with the codec that was asked for; None where none was."""
    from ooc_influence import Storage

    return None if codec is None else Storage(codec=codec)


def given(names: Iterable[str]) -> list[str]:
    """Return which options are on the command line."""
    source = click.get_current_context().get_parameter_source
    return [name for name in names if source(name) is click.core.ParameterSource.COMMANDLINE]


def parse_ids(store: Any, names: Iterable[str]) -> list[Any]:
    """Return example ids as a store has them: text, or whole numbers."""
    if store.layout.ids == "str":
        return list(names)
    try:
        return [int(name) for name in names]
    except ValueError as error:
        raise InputError(f"expected ids that are whole numbers, as in {store.path}; received {error}") from error


def open_train(train: str, cache: str | None, cache_size: str) -> Any:
    """Open the store to read from, behind a cache if there is one."""
    from ooc_influence import ChunkCache, GradientStore

    return GradientStore.open(train, cache=ChunkCache(cache, cache_size) if cache else None)


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory, unless the environment sets ``MALLOC_...``; return whether it does.

    glibc returns large blocks to the system as soon as they are freed, and a model on a CPU takes the same gigabytes of
    activations again with every batch: touching fresh pages then costs as much as the arithmetic. Only the command line
    does this, for its own process; budgets do not count that memory (:meth:`ooc_influence.memory.MemoryBudget.of`).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

"""Memory that a model gives back is kept for its next batch.

glibc returns large blocks to the system as soon as they are freed, and a model on a CPU takes the same gigabytes of
activations again with every batch: touching fresh pages then costs as much as the arithmetic. Only the command line
does this, for its own process. What a budget counts as held is without it: :func:`ooc_influence.memory.held_now`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory, unless the environment sets ``MALLOC_...``; return whether it does."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


F = TypeVar("F", bound=Callable[..., Any])


class _PathText(click.types.StringParamType):
    """A path or a URL, or a name that stands for one: text, which a shell completes as a file or folder."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PATH = _PathText()

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
memory = click.option("--memory", metavar="SIZE", help="Memory budget, such as 4GiB. Default: half of what is free.")
workers = click.option("--workers", type=int, metavar="N", help="Row stripes at once. Default: one, with all cores.")
cache = click.option(
    "--cache", type=PATH, metavar="DIR", help="Keep chunks of a train store on object storage in this folder."
)
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


def cluster(function: F) -> F:
    """Let a command run on a Dask cluster: its work goes to the workers of the scheduler named, if one is."""

    @click.option("--scheduler", metavar="ADDRESS", help="Run on this Dask scheduler's workers, as tcp://host:8786.")
    @click.option("--scheduler-file", type=PATH, metavar="FILE", help="The same, by the file that the scheduler wrote.")
    @functools.wraps(function)
    def call(*args: Any, scheduler: str | None, scheduler_file: str | None, **given: Any) -> Any:
        from ooc_influence.cli.cluster import connected

        with connected(scheduler, scheduler_file):
            return function(*args, **given)

    return call  # type: ignore[return-value]


scoring = several(
    click.option("--curvature", multiple=True, type=PATH, metavar="NAME|PATH",
                 help="Which curvature. Default: 'default' in TRAIN. With --also, once for all or once for each."),
    click.option("--dot", is_flag=True, help="No curvature: plain dot products of gradients."),
    click.option("--damping", type=float, multiple=True,
                 help="Damping factor; may be repeated. Default: the curvature's (0.1, relative)."),
    click.option("--damping-mode", type=click.Choice(["relative", "absolute"]), default="relative", show_default=True,
                 help="relative: λ = damping · tr(F)/d; absolute: λ = damping."),
    click.option("--rows", multiple=True, type=PATH, metavar="FILE",
                 help="Rows the checkpoint was trained on, others are not "
                 "scored: numbers or marks in a .npy file. With --also, once for each; 'all': all."),
    click.option("--device", help="Multiply there, such as cuda. Default: NumPy's BLAS."),
    workers, memory, cluster, cache, cache_size, as_json,
)  # fmt: skip

pairing = several(
    click.option("--also", nargs=2, multiple=True, type=PATH, metavar="QUERY TRAIN",
                 help="Another checkpoint's stores of the same rows; scores are averaged. May be repeated."),
    click.option("--combine", type=click.Choice(["mean", "query-margins", "margins"]), default="mean",
                 show_default=True, help="How checkpoints are averaged: scores; with every model the same say on a "
                 "query; margins as TRAK does."),
    click.option("--normalize", type=click.Choice(["cosine", "train"]),
                 help="cosine: scores in [-1, 1]; train: divide by the train row's norm (RelatIF)."),
    click.option("--average-queries", is_flag=True, help="One query: the mean of all."),
    click.option("--average-by", metavar="COLUMN", help="One query for each value of a column of QUERY."),
)  # fmt: skip

resume = click.option(
    "--resume",
    type=PATH,
    metavar="DIR",
    help="Keep finished parts there: the same command goes on from them. Removed at the end.",
)

building = several(
    click.option("--recipe", "recipe_name", type=PATH, metavar="FILE.py:FUNCTION|MODULE:FUNCTION",
                 help="A function that returns (model, per_sample_loss, splits) or an ooc_influence.Recipe."),
    click.option("--model", type=PATH, metavar="DIR|ID",
                 help="Instead: a Hugging Face model, or a PEFT adapter; with --data."),
    click.option("--data", type=PATH, metavar="FILE",
                 help="Documents: .jsonl, .csv, .tsv, .parquet, .json, .txt (or .gz, .zst of these), 'dir/*.jsonl', a "
                 "datasets folder."),
    click.option("--split", metavar="NAME", help="Which split, of a recipe or a datasets folder that has several."),
    click.option("--store", required=True, type=PATH, metavar="PATH|URL", help="The store to write, or to go on with."),
    click.option("--like", type=PATH, metavar="TRAIN",
                 help="Make a query store with the mask and basis of this train store."),
    click.option("--compressor", default="dropout", show_default=True,
                 type=click.Choice(["dropout", "gaussian", "rademacher", "sjlt", "grass", "logra", "pca", "identity"]),
                 help="How gradients are compressed (docs/compressors.md)."),
    click.option("--k", type=int, help="Gradient entries kept of each sample, or numbers that a projection of all "
                 "makes. Default: 4096; with --model 65536."),
    click.option("--sampling", type=click.Choice(["uniform", "importance", "grid"]),
                 help="How entries are chosen. Default: uniform; with --model importance."),
    click.option("--dims", type=int, metavar="R", help="Reduce kept entries to R numbers, the top of their eigenbasis; "
                 "0: do not. Default: 0; with --model 4096."),
    click.option("--pilot", type=int, metavar="N", help="Rows that eigenbasis is made from. Default: 4 R."),
    click.option("--basis-weights", type=click.Choice(["ggn", "trak"]), help="Row weights of that eigenbasis."),
    click.option("--rank-out", type=int, metavar="N", help="Rows kept of a layer by logra. Default: 16."),
    click.option("--rank-in", type=int, metavar="N", help="Columns kept of a layer by logra. Default: 16."),
    click.option("--nonzeros", type=int, metavar="N", help="Of each entry in sjlt and grass. Default: 1."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the mask or projection."),
    click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32", "int8", "int4"]), default="float16",
                 show_default=True, help="Representation on disk; float16, int8 and int4 have a scale a row."),
    click.option("--codec", type=click.Choice(["zstd", "blosc", "lz4", "gzip"]),
                 help="Compress chunks; they can then not be mapped. Default: none."),
    click.option("--modules", multiple=True, metavar="PATTERN",
                 help="Layers by name pattern; '!PATTERN', in quotes, leaves some out. May be repeated."),
    click.option("--fallback", is_flag=True, help="Tap layers of unknown kinds too, at their full gradients' cost."),
    click.option("--adam", type=PATH, metavar="FILE|DIR",
                 help="Weigh entries with this Adam state (a file or checkpoint)."),
    click.option("--no-check", is_flag=True, help="Store rows without comparing the first samples' entries with "
                 "autograd's gradients; recorded."),
    click.option("--other-model", is_flag=True,
                 help="Go on although the model is not the one the store was made with; this is recorded."),
    click.option("--device", help="Where to run, such as cuda. Default: where the model is."),
    click.option("--memory", metavar="SIZE", help="Budget of making an eigenbasis. Default: half of what is free."),
)  # fmt: skip

documents = several(
    click.option("--text", metavar="FIELD", help="Running text. Default: the field 'text'."),
    click.option("--prompt", metavar="FIELD", help="With --completion: only the completion's tokens are targets."),
    click.option("--completion", metavar="FIELD", help="See --prompt."),
    click.option("--messages", metavar="FIELD", help="A chat; the tokens of the assistant's last reply are targets."),
    click.option("--label", metavar="FIELD", help="With --text: the class, for sequence classification."),
    click.option("--chat", is_flag=True, help="Put prompt and completion through the tokenizer's chat template."),
    click.option("--id", metavar="FIELD", help="The document's name. Default: its number."),
    click.option("--keep", multiple=True, metavar="FIELD", help="Keep a field as a column; may be repeated."),
    click.option("--on-missing", type=click.Choice(["raise", "skip"]),
                 help="Documents whose text is missing: stop and name the first, or leave them out. Default: raise."),
    click.option("--max-length", type=int, metavar="N", help="Tokens of a row. Default: the model's context."),
    click.option("--tokens", type=int, metavar="N",
                 help="Tokens of a batch, padding included. Default: 8192; on a CPU 2048."),
    click.option("--batch-size", type=int, metavar="N", help="Most rows of a batch."),
    click.option("--loss-reduction", "reduction", type=click.Choice(["mean", "sum"]),
                 help="Of token losses. Default: mean."),
    click.option("--task", type=click.Choice(["causal-lm", "classification"]), help="Default: as the model says."),
    click.option("--model-dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16", "8bit"]),
                 help="Of the model's weights. Default: as saved."),
    click.option("--adapter", type=PATH, metavar="DIR", help="A PEFT adapter to put on the model."),
    click.option("--tokenizer", type=PATH, metavar="DIR|ID", help="Where the tokenizer is, if not with the model."),
    click.option("--revision", help="Of the hub's repository."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    click.option("--allow-pickle", is_flag=True, help="Load weights that are not in safetensors."),
    click.option("--output", type=click.Choice(["gradients", "curvature"]),
                 help="curvature: rows of randomly signed token gradients, for a Gauss-Newton matrix; needs --like."),
    click.option("--documents", type=int, metavar="N", help="Use N documents, spread evenly. Default: all."),
    click.option("--token-weights", "weights", type=click.Choice(["ggn"]), help="Of curvature rows. Default: none."),
    click.option("--sign-seed", type=int, help="Of curvature rows. Default: 0."),
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

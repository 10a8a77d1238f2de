"""The commands that need a model: ``init`` and ``extract``."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.options import keep_freed_memory

_FIELDS = ("text", "prompt", "completion", "messages", "label", "chat", "id", "keep")
_PREPARING = (
    "max_length", "tokens", "batch_size", "reduction", "task", "model_dtype", "adapter", "tokenizer", "revision",
    "trust_remote_code", "allow_pickle", "output", "documents", "weights", "sign_seed", "on_missing",
)  # fmt: skip
_MASK = ("compressor", "k", "sampling", "dims", "pilot", "basis_weights", "nonzeros", "rank_out", "rank_in", "seed")
_BASELINES = {  # the options that each takes, by the names of its arguments
    "gaussian": {"k": "k", "seed": "seed"},
    "rademacher": {"k": "k", "seed": "seed"},
    "sjlt": {"k": "k", "seed": "seed", "nonzeros": "nonzeros"},
    "grass": {"kept": "k", "k": "dims", "seed": "seed", "nonzeros": "nonzeros"},
    "logra": {"rank_out": "rank_out", "rank_in": "rank_in", "seed": "seed"},
    "pca": {"r": "dims", "pilot": "pilot", "weights": "basis_weights"},
    "identity": {},
}


def _asked(names: tuple[str, ...]) -> list[str]:
    """Return which options were given on the command line."""
    source = click.get_current_context().get_parameter_source
    return [name for name in names if source(name) is click.core.ParameterSource.COMMANDLINE]


def _compressor(given: dict[str, Any]) -> Any:
    """Return the compressor that options ask for; None for the default, or where a train store fixes it."""
    from ooc_influence import Dropout, Eigenbasis
    from ooc_influence.errors import InputError

    asked = _asked(_MASK)
    if given["like"] is not None:
        if asked or given["modules"] or given["fallback"]:
            raise InputError(
                "expected --like without --compressor, --k, --sampling, --dims, --seed and --modules; received both: "
                "--like fixes the mask"
            )
        return None
    if given["model"] is not None and not asked:
        return None
    if given["compressor"] != "dropout":
        return _rival(given["compressor"], given, asked)
    for option, owner in (("nonzeros", "sjlt or grass"), ("rank_out", "logra"), ("rank_in", "logra")):
        if given[option] is not None:
            named = option.replace("_", "-")
            raise InputError(f"expected --{named} with --compressor {owner}; received it with dropout")
    wide = given["model"] is not None
    from ooc_influence.compress import DEFAULT_REDUCED, DEFAULT_WIDE

    dims = given["dims"] if given["dims"] is not None else (DEFAULT_REDUCED if wide else 0)
    if not dims and (given["pilot"] is not None or given["basis_weights"] is not None):
        raise InputError("expected --dims with --pilot and --basis-weights; received none: they belong to a reduction")
    return Dropout(
        k=given["k"] if given["k"] is not None else (DEFAULT_WIDE if wide else 4096),
        sampling=given["sampling"] or ("importance" if wide else "uniform"),
        seed=given["seed"],
        reduce=Eigenbasis(dims, given["pilot"], given["basis_weights"]) if dims else None,
    )


def _rival(name: str, given: dict[str, Any], asked: list[str]) -> Any:
    """Return a compressor that dropout is compared with."""
    import ooc_influence
    from ooc_influence.errors import InputError

    taken = _BASELINES[name]
    foreign = [option for option in asked if option not in ("compressor", *taken.values())]
    if foreign:
        known = ", ".join(f"--{option.replace('_', '-')}" for option in taken.values()) or "no further options"
        raise InputError(
            f"expected {known} with --compressor {name}; received --{foreign[0].replace('_', '-')}: leave it out"
        )
    settings = {argument: given[option] for argument, option in taken.items() if given[option] is not None}
    return getattr(ooc_influence, "LoGra" if name == "logra" else name.capitalize())(**settings)


def _common(given: dict[str, Any], *, divided: bool = False) -> dict[str, Any]:
    """Return what extraction and initialisation take, from a recipe or for a Hugging Face model.

    Where shards are ``divided`` among tasks, these load what is given by its path.
    """
    from ooc_influence import AdamMetric, Storage
    from ooc_influence.store import parse_path

    parse_path(given["store"])
    check_source(given)
    return {
        "compressor": _compressor(given),
        "like": given["like"],
        "modules": list(given["modules"]) or None,
        "dtype": given["dtype"],
        "device": given["device"],
        "memory": given["memory"],
        "progress": options.show_progress(),
        "storage": Storage(codec=given["codec"]),
        "fallback": given["fallback"],
        "metric": given["adam"] if given["adam"] is None or divided else AdamMetric(given["adam"]),
        "check_model": not given["other_model"],
        "check_gradients": not given["no_check"],
    }


def check_source(given: dict[str, Any]) -> None:
    """Check that a recipe, or a model with data, is named, and only what goes with it.

    Raises
    ------
    InputError
        If not.
    """
    from ooc_influence.errors import InputError

    if (given["recipe_name"] is None) == (given["model"] is None):
        raise InputError("expected either --recipe, or --model with --data; received both or neither")
    if (given["model"] is None) != (given["data"] is None):
        raise InputError("expected --model and --data together; received one of them")
    if given["recipe_name"] is not None:
        misplaced = _asked(_FIELDS + _PREPARING)
        if misplaced:
            raise InputError(
                f"expected --{misplaced[0].replace('_', '-')} with --model; received it with --recipe, which says it"
            )


def _origin(given: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded about a recipe's store."""
    return {"recipe": given["recipe_name"], "split": given["split"]}


def _hugging_face(given: dict[str, Any], common: dict[str, Any], more: dict[str, Any], **how: Any) -> Any:
    """Run an extraction, all shards of one, or make the store for one, for ``--model`` and ``--data``."""
    from ooc_influence import hf

    options_of = ("storage", "fallback", "check_model", "check_gradients", "metric", "memory")
    further = {name: common.pop(name) for name in options_of}
    named = {name: given[name] for name in (*_FIELDS, *_PREPARING) if given[name] not in (None, (), False)}
    run: Any = hf.extract_shards if "shards" in how else hf.extract
    return run(
        given["model"], given["data"], given["store"], split=given["split"], options=further | more, **how, **common,
        **named,
    )  # fmt: skip


@click.command()
@options.building
@click.option("--shard", metavar="I/N", help="Be writer I of N (from 0) that fill one store together; see init.")
@click.option(
    "--shards",
    type=int,
    metavar="N",
    help="Divide the store into N shards and extract all of them: one "
    "task each with --scheduler, one after the other without. Default with --scheduler: one a worker.",
)
@click.option("--on-nonfinite", type=click.Choice(["raise", "skip"]), default="raise", show_default=True,
              help="Samples with NaN or Inf: stop and name them, or record them as dropped rows.")  # fmt: skip
@options.documents
@options.cluster
@options.as_json
def extract(shard: str | None, shards: int | None, on_nonfinite: str, as_json: bool, **given: Any) -> None:
    """Extract compressed per-sample gradients into a store, of a recipe or of a Hugging Face model and a file.

    A run that was stopped goes on where it was when the same command runs again.
    """
    from ooc_influence import extract_gradients, extract_shards
    from ooc_influence.errors import InputError
    from ooc_influence.extract import choose_split, load_recipe, running
    from ooc_influence.parallel import ambient_client
    from ooc_influence.report import describe, store_facts

    place = _parse_shard(shard)
    keep_freed_memory()
    more: dict[str, Any] = {"on_nonfinite": on_nonfinite}
    divided = shards is not None or (place is None and ambient_client() is not None)
    if place is not None and (shards is not None or ambient_client() is not None):
        raise InputError("expected --shard I/N, or --shards N and --scheduler; received both: shards run there by task")
    # what the user's code prints must not end up in our output
    with contextlib.redirect_stdout(sys.stderr), running(given["recipe_name"]):
        common = _common(given, divided=divided)
        if given["model"] is not None and divided:
            result = _hugging_face(given, common, more, shards=shards)
        elif given["model"] is not None:
            result = _hugging_face(given, common, more | {"shard": place})
        elif divided:
            result = extract_shards(
                given["recipe_name"], given["store"], split=given["split"], shards=shards, origin=_origin(given),
                **common, **more,
            )  # fmt: skip
        else:
            recipe = load_recipe(given["recipe_name"])
            data = choose_split(recipe, given["split"])
            result = extract_gradients(
                recipe.model, recipe.per_sample_loss, data.batches, given["store"], ids=data.ids, columns=data.columns,
                loss_kind=recipe.loss_kind, shard=place, origin=_origin(given), **common, **more,
            )  # fmt: skip
    options.print_result(as_json, store_facts(result), lambda: describe(result))


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    from ooc_influence.errors import InputError

    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(f"expected --shard I/N with 0 <= I < N, such as 0/4; received {text!r}")
    return int(index), int(count)


@click.command()
@options.building
@click.option(
    "--rows", type=int, help="Rows of the whole store. Default: as many as the data has, where that is known."
)
@options.documents
@options.as_json
def init(rows: int | None, as_json: bool, **given: Any) -> None:
    """Make the empty store that 'extract --shard' runs fill together.

    Fixes its rows, mask, basis and settings once. Run again with more --rows to make room for further data.
    """
    from ooc_influence import init_store
    from ooc_influence.errors import InputError
    from ooc_influence.extract import choose_split, load_recipe, row_types, running
    from ooc_influence.report import describe, store_facts

    keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr), running(given["recipe_name"]):
        common = _common(given)
        if given["model"] is not None:
            if rows is not None:
                raise InputError("expected --rows with --recipe only; received it with --model, whose data tells")
            result = _hugging_face(given, common, {}, rows_only=True)
            wanted: int | None = result.layout.planned_rows
        else:
            recipe = load_recipe(given["recipe_name"])
            data = choose_split(recipe, given["split"])
            known, ids, columns = row_types(data.batches, data.ids, data.columns)
            wanted = known if rows is None else rows
            if wanted is None:
                raise InputError("expected --rows, since the split does not tell its length; received none")
            result = init_store(
                recipe.model, given["store"], wanted, ids=ids, columns=columns, loss_kind=recipe.loss_kind,
                per_sample_loss=recipe.per_sample_loss, pilot=data.batches, origin=_origin(given), **common,
            )  # fmt: skip
    options.print_result(as_json, store_facts(result), lambda: f"{describe(result)}, {wanted} rows planned")


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


@click.command()
@click.option(
    "--store", required=True, type=options.PATH, metavar="PATH|URL", help="The store whose compression is looked at."
)
@click.option(
    "--recipe",
    "recipe_name",
    type=options.PATH,
    metavar="FILE.py:FUNCTION|MODULE:FUNCTION",
    help="As the store was made with.",
)
@click.option(
    "--model",
    type=options.PATH,
    metavar="DIR|ID",
    help="Instead: a Hugging Face model, or a PEFT adapter; with --data.",
)
@click.option("--data", type=options.PATH, metavar="FILE", help="Documents, as for extract.")
@click.option("--split", metavar="NAME", help="Which split, of a recipe or a datasets folder that has several.")
@click.option(
    "--rows", type=int, default=256, show_default=True, help="Samples to compare on; one in eight is a query."
)
@click.option("--damping", "dampings", type=float, multiple=True, metavar="X",
              help="Relative dampings beside the default; may be repeated. Default: 0.01, 1, 10.")  # fmt: skip
@click.option("--device", help="Where to run, such as cuda. Default: where the model is.")
@options.memory
@options.documents
@options.as_json
def check(rows: int, dampings: tuple[float, ...], memory: str | None, as_json: bool, **given: Any) -> None:
    """Say how well the scores of a store agree with uncompressed ones, on a few hundred samples.

    Gradients of the same samples are taken as the store has them, and whole; both are scored with the F of these rows.
    """
    from ooc_influence.evaluate import SWEEP
    from ooc_influence.evaluate import check as run
    from ooc_influence.extract import running

    keep_freed_memory()
    # what the user's code prints must not end up in our output
    with contextlib.redirect_stdout(sys.stderr), running(given["recipe_name"]):
        model, per_sample_loss, batches = _parts(given)
        found = run(
            given["store"], model, per_sample_loss, batches, rows=rows, dampings=dampings or SWEEP,
            device=given["device"], memory=memory, progress=options.show_progress(),
        )  # fmt: skip
    options.print_result(as_json, found.to_dict(), lambda: str(found))


def _parts(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return model, loss and batches."""
    from ooc_influence.errors import InputError

    check_source(given)
    if given["output"] == "curvature":
        raise InputError("expected gradients to check; received --output curvature: leave it out")
    if given["recipe_name"] is not None:
        from ooc_influence.extract import choose_split, load_recipe

        recipe = load_recipe(given["recipe_name"])
        return recipe.model, recipe.per_sample_loss, choose_split(recipe, given["split"]).batches
    from ooc_influence.hf import open_job

    kept = ("store", "recipe_name", "model", "data")
    named = {name: value for name, value in given.items() if name not in kept and value not in (None, (), False)}
    job = open_job(given["model"], given["data"], progress=options.show_progress(), **named)
    return job.model, job.per_sample_loss, job.batches

"""The commands that need a model, ``init``, ``extract`` and ``check``, and ``plan``, which says what they will take."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.help import EXTRACTION, SectionedCommand
from ooc_influence.cli.options import keep_freed_memory
from ooc_influence.errors import InputError
from ooc_influence.options import CheckOptions, DocumentOptions, ExtractionOptions, PlanOptions, Sharded, definitions

_DOCUMENTS = [name for name in definitions(DocumentOptions) if name != "split"]  # a recipe says all of these itself
_MASK = (
    "compressor", "row_bytes", "k", "basis", "basis_damping", "damping_scope", "sampling", "dims", "pilot",
    "basis_weights", "nonzeros", "rank_out", "rank_in", "seed",
)  # fmt: skip
_ARGUMENTS = {  # the options of each, by the names of its arguments
    "gaussian": {"k": "k", "seed": "seed"},
    "rademacher": {"k": "k", "seed": "seed"},
    "sjlt": {"k": "k", "seed": "seed", "nonzeros": "nonzeros"},
    "grass": {"kept": "k", "k": "dims", "seed": "seed", "nonzeros": "nonzeros"},
    "logra": {"rank_out": "rank_out", "rank_in": "rank_in", "seed": "seed"},
    "pca": {"r": "dims", "pilot": "pilot", "weights": "basis_weights"},
    "identity": {},
}


_WITH_ROW_BYTES = ("row_bytes", "seed", "basis_damping", "damping_scope")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _compressor(settings: dict[str, Any]) -> Any:
    """Return the compressor that options ask for; None for the default, or where a train store fixes it."""
    from ooc_influence import Dropout, Eigenbasis
    from ooc_influence.compress import DefaultDropout, kronecker_basis

    asked = options.given(_MASK)
    if settings["like"] is not None:
        if asked or settings["modules"] or settings["fallback"]:
            raise InputError(
                "expected --like without --compressor, --k, --sampling, --dims, --seed and --modules; received both: "
                "--like fixes the mask"
            )
        return None
    if settings["row_bytes"] is not None:
        return _row_budget(settings)
    wide = settings["model"] is not None
    if wide and not asked:
        return None
    if settings["compressor"] != "dropout":
        return _baseline(settings["compressor"], settings, asked)
    for option, owner in (("nonzeros", "sjlt or grass"), ("rank_out", "logra"), ("rank_in", "logra")):
        if settings[option] is not None:
            raise InputError(f"expected {_flag(option)} with --compressor {owner}; received it with dropout")
    dims, k, basis, seed = settings["dims"] or 0, settings["k"], settings["basis"], settings["seed"]
    if not dims and (settings["pilot"] is not None or settings["basis_weights"] is not None):
        raise InputError("expected --dims with --pilot and --basis-weights; received none: they belong to a reduction")
    reduction: Any = Eigenbasis(dims, settings["pilot"], settings["basis_weights"]) if dims else None
    damping, scope = settings["basis_damping"], settings["damping_scope"]
    if basis != "kronecker" and not (wide and basis is None) and (damping is not None or scope is not None):
        raise InputError("expected --basis kronecker with --basis-damping and --damping-scope; received another basis")
    if wide:
        reduction = False if settings["dims"] == 0 else reduction
        return DefaultDropout(k, settings["sampling"], basis, damping, scope, seed, reduction)
    kronecker = kronecker_basis(damping, scope) if basis == "kronecker" else None
    return Dropout(4096 if k is None else k, settings["sampling"], seed, reduce=reduction, basis=kronecker)


def _row_budget(settings: dict[str, Any]) -> Any:
    """Return the compressor for a size of rows, which says their representation, too."""
    from ooc_influence import RowBudget
    from ooc_influence.compress import kronecker_basis

    foreign = [name for name in options.given((*_MASK, "dtype")) if name not in _WITH_ROW_BYTES]
    if foreign:
        raise InputError(f"expected --row-bytes without {_flag(foreign[0])}; received both: leave one of them out")
    damping, scope = settings["basis_damping"], settings["damping_scope"]
    basis = None if damping is None and scope is None else kronecker_basis(damping, scope)
    return RowBudget(settings["row_bytes"], settings["seed"], basis)


def _baseline(name: str, settings: dict[str, Any], asked: list[str]) -> Any:
    """Return a compressor that dropout is compared with."""
    from ooc_influence.compress import BASELINES

    arguments = _ARGUMENTS[name]
    foreign = [option for option in asked if option not in ("compressor", *arguments.values())]
    if foreign:
        possible = ", ".join(map(_flag, arguments.values())) or "no further options"
        raise InputError(f"expected {possible} with --compressor {name}; received {_flag(foreign[0])}: leave it out")
    named = {argument: settings[option] for argument, option in arguments.items() if settings[option] is not None}
    return BASELINES[name](**named)


def check_source(settings: dict[str, Any]) -> None:
    """Check that a recipe, or a model with data, is named, and only what goes with it.

    Raises
    ------
    InputError
        If not.
    """
    if (settings["recipe_name"] is None) == (settings["model"] is None):
        raise InputError("expected either --recipe, or --model with --data; received both or neither")
    if (settings["model"] is None) != (settings["data"] is None):
        raise InputError("expected --model and --data together; received one of them")
    if settings["recipe_name"] is not None:
        misplaced = options.given(_DOCUMENTS)
        if misplaced:
            raise InputError(f"expected {_flag(misplaced[0])} with --model; received it with --recipe, which says it")


def _library_options(settings: dict[str, Any], *, divided: bool = False) -> dict[str, Any]:
    """Return the options of extraction and initialisation, from a recipe or for a Hugging Face model.

    Where shards are ``divided`` among tasks, these load what is given by its path.
    """
    from ooc_influence import AdamMetric, Storage
    from ooc_influence.store import parse_path

    parse_path(settings["store"])
    check_source(settings)
    adam, compressor = settings["adam"], _compressor(settings)
    named = _named(ExtractionOptions, settings)
    if settings["row_bytes"] is not None:
        named["dtype"] = compressor.dtype
    return named | {
        "compressor": compressor,
        "modules": list(settings["modules"]) or None,
        "checkpoints": () if settings["checkpoints"] == ("none",) else list(settings["checkpoints"]) or None,
        "progress": True,
        "storage": Storage(codec=settings["codec"]),
        "metric": adam if adam is None or divided else AdamMetric(adam),
    }


def _named(kind: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in definitions(kind) if name in settings}


def _origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded about a recipe's store."""
    return {"recipe": settings["recipe_name"], "split": settings["split"]}


def _parse_shard(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(f"expected --shard I/N with 0 <= I < N, such as 0/4; received {text!r}")
    return int(index), int(count)


@click.command(
    cls=SectionedCommand, sections=EXTRACTION,
    first=("model", "recipe_name", "data", "store", "like", "messages", "prompt", "completion", "id", "row_bytes"),
)  # fmt: skip
@options.building
@click.option("--shards", type=int, metavar="N",
              help="Divide the store into N shards and extract all of them: one task each with --scheduler, one after "
              "the other without. Default with --scheduler: one a worker.")  # fmt: skip
@options.flags(Sharded, shard={"callback": _parse_shard})
@options.documents
@options.cluster
@options.as_json
def extract(
    shard: tuple[int, int] | None, shards: int | None, on_nonfinite: str, as_json: bool, **settings: Any
) -> None:
    """Extract compressed per-sample gradients into a store, of a recipe or of a Hugging Face model and a file.

    After an interruption, the same command continues where it was.
    """
    from ooc_influence import extract_gradients, extract_shards
    from ooc_influence.extract import choose_split, load_recipe, running
    from ooc_influence.parallel import ambient_client
    from ooc_influence.report import describe, store_facts

    keep_freed_memory()
    on_cluster = ambient_client() is not None
    divided = shards is not None or (shard is None and on_cluster)
    if shard is not None and (shards is not None or on_cluster):
        raise InputError("expected --shard I/N, or --shards N and --scheduler; received both: shards run there by task")
    # what the user's code prints must not end up in our output
    with contextlib.redirect_stdout(sys.stderr), running(settings["recipe_name"]):
        chosen = _library_options(settings, divided=divided) | {"on_nonfinite": on_nonfinite}
        if settings["model"] is not None:
            from ooc_influence import hf

            files = (settings["model"], settings["data"], settings["store"])
            chosen |= _named(DocumentOptions, settings)
            if divided:
                store = hf.extract_shards(*files, shards=shards, **chosen)
            else:
                store = hf.extract(*files, shard=shard, **chosen)
        elif divided:
            store = extract_shards(
                settings["recipe_name"], settings["store"], split=settings["split"], shards=shards,
                origin=_origin(settings), **chosen,
            )  # fmt: skip
        else:
            recipe = load_recipe(settings["recipe_name"])
            data = choose_split(recipe, settings["split"])
            store = extract_gradients(
                recipe.model, recipe.per_sample_loss, data.batches, settings["store"], ids=data.ids,
                columns=data.columns, loss_kind=recipe.loss_kind, shard=shard, origin=_origin(settings), **chosen,
            )  # fmt: skip
    options.print_result(as_json, store_facts(store), lambda: describe(store))


@click.command(
    cls=SectionedCommand, sections=EXTRACTION,
    first=("model", "recipe_name", "data", "store", "like", "messages", "prompt", "completion", "id", "row_bytes"),
)  # fmt: skip
@options.building
@click.option(
    "--rows", type=int, help="Rows of the whole store. Default: as many as the data has, where that is known."
)
@options.documents
@options.as_json
def init(rows: int | None, as_json: bool, **settings: Any) -> None:
    """Make the empty store that 'extract --shard' runs fill together.

    Fixes its rows, mask, basis and settings once. Run again with more --rows to make room for further data.
    """
    from ooc_influence import init_store
    from ooc_influence.extract import RowChoice, choose_split, load_recipe, row_types, running
    from ooc_influence.report import describe, store_facts

    keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr), running(settings["recipe_name"]):
        chosen = _library_options(settings)
        if settings["model"] is not None:
            from ooc_influence import hf

            if rows is not None:
                raise InputError("expected --rows with --recipe only; received it with --model, whose data tells")
            chosen |= _named(DocumentOptions, settings)
            store = hf.extract(settings["model"], settings["data"], settings["store"], rows_only=True, **chosen)
            planned = store.layout.planned_rows
        else:
            recipe = load_recipe(settings["recipe_name"])
            data = choose_split(recipe, settings["split"])
            choice = RowChoice(settings["sample"], settings["draws"])
            counted_rows, ids, columns = row_types(data.batches, data.ids, data.columns, choice)
            planned = counted_rows if rows is None else rows
            if planned is None:
                raise InputError("expected --rows, since the split does not tell its length; received none")
            store = init_store(
                recipe.model, settings["store"], planned, ids=ids, columns=columns, loss_kind=recipe.loss_kind,
                per_sample_loss=recipe.per_sample_loss, pilot=data.batches, origin=_origin(settings), **chosen,
            )  # fmt: skip
    options.print_result(as_json, store_facts(store), lambda: f"{describe(store)}, {planned} rows planned")


@click.command()
@click.option("--rows", type=int, required=True, metavar="N", help="Train rows.")
@click.option("--k", type=int, required=True, help="Gradient entries kept of each row.")
@options.flags(PlanOptions)
@options.as_json
def plan(as_json: bool, read_rate: str | None, **settings: Any) -> int:
    """Show what each stage will take: disk, memory, arithmetic, time. Exit code 1 where one does not fit the budget.

    Nothing is written but a file of 128 MiB for the seconds in which the machine is measured. Where the folder holds
    stores, chunks of them are read.
    """
    from ooc_influence.memory import parse_bytes
    from ooc_influence.planning import plan as make_plan

    if settings["model"] is not None:
        from ooc_influence import hf

        settings["model"] = hf.load_shapes(settings["model"])
    stages = make_plan(read_rate=None if read_rate is None else parse_bytes(read_rate), **settings)
    options.print_result(as_json, stages.to_dict(), lambda: _plan_text(stages))
    return 0 if stages.fits else 1


def _plan_text(estimate: Any) -> str:
    from ooc_influence.memory import format_bytes
    from ooc_influence.report import table

    lines = []
    for stage in estimate.stages:
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
    notes = [f"{stage.name}: {stage.refusal or stage.note}" for stage in estimate.stages if stage.refusal or stage.note]
    ends = [f"budget {format_bytes(estimate.budget)} a process", f"this machine: {estimate.rates}"]
    return "\n".join([table(header, lines), "", *notes, *ends])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@click.command(
    cls=SectionedCommand, sections=EXTRACTION,
    first=("store", "model", "recipe_name", "data", "split", "rows"),
)  # fmt: skip
@click.option("--store", required=True, type=options.PATH, metavar="PATH|URL",
              help="The store whose compression is checked, with the recipe or model it was made with.")  # fmt: skip
@options.source
@options.flags(CheckOptions)
@options.documents
@options.as_json
def check(rows: int, dampings: tuple[float, ...], memory: str | None, as_json: bool, **settings: Any) -> None:
    """Say how well the scores of a store agree with uncompressed ones, on a few hundred samples.

    Gradients of the same samples are taken as the store has them, and whole; both are scored with the F of these rows.
    """
    from ooc_influence.evaluate import check as run
    from ooc_influence.extract import running

    keep_freed_memory()
    # what the user's code prints must not end up in our output
    with contextlib.redirect_stdout(sys.stderr), running(settings["recipe_name"]):
        asked: Any = {"dampings": dampings} if dampings else {}
        agreement = run(
            settings["store"], *_model_and_batches(settings), rows=rows, device=settings["device"], memory=memory,
            progress=True, **asked,
        )  # fmt: skip
    options.print_result(as_json, agreement.to_dict(), lambda: str(agreement))


def _model_and_batches(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return model, loss and batches."""
    check_source(settings)
    if settings["output"] == "curvature":
        raise InputError("expected gradients to check; received --output curvature: leave it out")
    if settings["recipe_name"] is not None:
        from ooc_influence.extract import choose_split, load_recipe

        recipe = load_recipe(settings["recipe_name"])
        return recipe.model, recipe.per_sample_loss, choose_split(recipe, settings["split"]).batches
    from ooc_influence import hf

    asked: Any = _named(DocumentOptions, settings) | {"device": settings["device"]}
    job = hf.prepare(settings["model"], settings["data"], progress=True, **asked)
    return job.model, job.per_sample_loss, job.batches

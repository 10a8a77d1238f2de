"""The command ``verify-influence``: a causal test of scores, by training again without the rows they name."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.cli.help import VERIFICATION, SectionedCommand
from ooc_influence.errors import InputError
from ooc_influence.options import LoraOptions, VerifyOptions, definitions

_LORA = ("model", "data", "query_data", "model_dtype", *(name for name in definitions(LoraOptions) if name != "task"))


@click.command(
    "verify-influence", cls=SectionedCommand, sections=VERIFICATION,
    first=("out", "queries", "ids", "remove", "seeds", "model", "function", "epochs", "yes"),
)  # fmt: skip
@click.argument("query", type=options.PATH)
@click.argument("train", type=options.PATH)
@click.option("--out", required=True, type=options.PATH, metavar="DIR",
              help="The folder in which finished runs are kept: the same command continues from them.")  # fmt: skip
@options.flags(
    VerifyOptions,
    curvature={"multiple": False, "help": "Curvature to use. Default: 'default' in TRAIN."},
    damping={"multiple": False, "help": "Damping factor. Default: the curvature's."},
    device={"help": "Where models are trained and scores multiplied, such as cuda. Default: the CPU."},
)
@click.option("--query", "ids", multiple=True, metavar="ID",
              help="Test the query of this id; may be repeated. Default: some, spread evenly.")  # fmt: skip
@options.dot
@click.option("--train", "function", type=options.PATH, metavar="FILE.py:FUNCTION",
              help="How to train: a function that returns (train, loss), with train(indices) a model and "
              "loss(model, queries) their losses. Default: a LoRA, on the documents TRAIN was made of.")  # fmt: skip
@click.option("--model", type=options.PATH, metavar="DIR|ID",
              help="For the LoRA: the model that training began with; or an adapter, whose base model and settings are "
              "taken. Default: as TRAIN recorded.")  # fmt: skip
@click.option("--data", type=options.PATH, metavar="FILE",
              help="For the LoRA: the documents of TRAIN. Default: where they were.")  # fmt: skip
@click.option("--query-data", type=options.PATH, metavar="FILE",
              help="For the LoRA: the documents of QUERY. Default: where they were.")  # fmt: skip
@options.flags(LoraOptions, without=("task",))
@options.model_dtype
@options.yes
@options.as_json
def verify_influence(
    query: str, train: str, out: str, function: str | None, yes: bool, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Test scores by training again: without each query's strongest rows in TRAIN, and without random ones.

    Shows by how much more the queries' losses rise without the strongest rows, with an interval in which the luck of a
    random choice counts, and what the scores predict.
    """
    from ooc_influence.evaluate import load_training
    from ooc_influence.evaluate import verify_influence as run

    lora = {name: settings.pop(name) for name in _LORA}
    ids = list(settings.pop("ids"))
    if settings.pop("dot"):
        if settings["curvature"] is not None:
            raise InputError("expected --dot or --curvature; received both")
        settings["curvature"] = False
    if ids and options.given(["queries"]):
        raise InputError("expected --queries or --query; received both")
    stores = [options.open_train(path, None, "0") for path in (query, train)]
    if ids:
        settings["queries"] = options.parse_ids(stores[0], ids)
    with contextlib.redirect_stdout(sys.stderr):  # what a training prints
        if function is None:
            training: Any = _lora(stores, lora, settings["device"])
        else:
            needless = options.given(_LORA)
            if needless:
                flags = definitions(LoraOptions)
                (name, *_) = needless
                flag = (flags[name].flag if name in flags else None) or f"--{name.replace('_', '-')}"
                raise InputError(f"expected {flag} for a LoRA; received it with --train: leave one of them out")
            training = load_training(function)
        confirm = None if yes else options.confirm
        asked: dict[str, Any] = {**settings, "progress": True}
        found = run(stores[0], stores[1], training, out, confirm=confirm, **asked)
    options.print_result(as_json, found.to_dict(), lambda: _text(found))


def _lora(stores: list[Any], settings: dict[str, Any], device: str | None) -> Any:
    from ooc_influence import hf

    model, dtype, data = settings.pop("model"), settings.pop("model_dtype"), settings.pop("data")
    how: Any = {"data": (settings.pop("query_data"), data), "dtype": dtype, "device": device, **settings}
    return hf.lora_training(stores[0], stores[1], model, **how)


def _text(found: Any) -> str:
    from ooc_influence.report import describe_scoring

    return f"{found}\n{describe_scoring(found.settings)}"

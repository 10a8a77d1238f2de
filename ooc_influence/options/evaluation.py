"""Options of measuring: retraining, removal tests, checks, plans."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from ooc_influence.options.documents import LoadingOptions
from ooc_influence.options.option import Option
from ooc_influence.options.scoring import DampedOptions, Normalized
from ooc_influence.options.shared import DTYPE_NAMES, DTYPES, Budgeted, Reporting

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ooc_influence.store import PathLike


# fmt: off
class RetrainOptions(Reporting, total=False):
    """How models are retrained."""

    settings: Annotated[Mapping[str, Any] | None, Option(
        None, "mapping, optional",
        "What the runs depend on besides the rows (learning rate, epochs, data version), JSON values: a folder of runs "
        "with other settings is refused.")]
    workers: Annotated[int, Option(
        1, "int",
        "Processes that train at once; each has its share of the cores. With more than one, ``train`` and ``measure`` "
        "are sent to them: functions of a module, in a script that guards its start with ``__name__ == '__main__'``.")]


class VerifyOptions(DampedOptions, Normalized, total=False):
    """What a removal test of scores takes."""

    queries: Annotated[int | Sequence[Any], Option(
        5, "int or sequence of ids",
        "How many of the queries to test, spread evenly over those that are not dropped; or the ids of some (row "
        "numbers, where the query store has no ids).",
        "How many of the queries to test, spread evenly.", kind=int, metavar="N", least=1)]
    remove: Annotated[int, Option(
        10, "int", "How many of a query's strongest proponents to remove, and how many random rows.",
        "How many of a query's strongest rows to remove, and how many random ones.", kind=int, metavar="K", least=1)]
    seeds: Annotated[int, Option(
        3, "int", "Seeds of training, each with random rows of its own.",
        "Seeds of training, each with random rows of its own.", kind=int, metavar="S", least=1)]
    controls: Annotated[int, Option(
        2, "int", "Random choices of rows for each seed, which all queries are compared with.",
        "Random choices of rows for each seed.", kind=int, metavar="C", least=1)]
    processes: Annotated[int, Option(
        1, "int",
        "Models trained at once, each in a process of its own with its share of the cores. With more than one, the "
        "training is sent to them: what :func:`load_training` or :func:`ooc_influence.hf.lora_training` returned, or "
        "functions of a module.",
        "Models trained at once.", kind=int, metavar="P", least=1)]


class LoraOptions(LoadingOptions, total=False):
    """How a LoRA is trained."""

    rank: Annotated[int | None, Option(
        None, "int, optional", "The LoRA's rank; default the adapter's where the model is one, or 16.",
        "The LoRA's rank. Default: the adapter's, or 16.", kind=int, metavar="R", least=1)]
    alpha: Annotated[float | None, Option(
        None, "float, optional", "Its scale; default the adapter's, or twice the rank.",
        "Its scale. Default: the adapter's, or twice the rank.", kind=float, metavar="A")]
    targets: Annotated[Sequence[str], Option(
        (), "sequence of str", "The ends of the names of the layers it is put on; default the adapter's, or all "
        "linear layers but the unembedding.",
        "Layers it is put on, by the ends of their names; may be repeated. Default: the adapter's, or all linear ones.",
        metavar="NAME", multiple=True, flag="--target")]
    epochs: Annotated[int, Option(
        3, "int", "Passes over the rows.", "Passes over the rows.", kind=int, metavar="E", least=1)]
    learning_rate: Annotated[float, Option(
        5e-4, "float", "Of AdamW at the start; it falls linearly to 0.",
        "Learning rate of AdamW at the start; it falls linearly to 0.", kind=float, metavar="X")]
    batch_size: Annotated[int, Option(
        8, "int", "Rows of a step; their gradients are added up over as many parts as a budget of tokens asks for.",
        "Rows of a step.", kind=int, metavar="B", least=1)]


class CheckOptions(Budgeted, Reporting, total=False):
    """What a check of a store against uncompressed scores takes."""

    rows: Annotated[int, Option(
        256, "int", "Samples, at least 32; one in eight becomes a query.",
        "Samples to compare on; one in eight is a query.", kind=int)]
    dampings: Annotated[Sequence[float], Option(
        (0.01, 0.1, 1.0, 10.0), "sequence of float",
        "Relative dampings to compare at; the default one is always among them.",
        "Relative dampings beside the default; may be repeated. Default: 0.01, 1, 10.", kind=float, metavar="X",
        multiple=True, flag="--damping")]
    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where to run; default where the model is.",
        "Where to run, such as cuda. Default: where the model is.")]
    folder: Annotated["str | Path | None", Option(
        None, "path, optional", "Where temporary rows are written; default the system's folder for such files.")]


class PlanOptions(Budgeted, total=False):
    """What a plan is for."""

    queries: Annotated[int, Option(100, "int", "Query rows.", "Query rows.", kind=int, metavar="Q")]
    dtype: Annotated[str, Option(
        "float16", DTYPE_NAMES, "Representation on disk.",
        "Representation on disk.", choices=DTYPES)]
    reduce: Annotated[int | None, Option(
        None, "int, optional", "Numbers that kept entries are reduced to.",
        "Numbers that kept entries are reduced to. Default: none.", kind=int, metavar="R")]
    model: Annotated["torch.nn.Module | None", Option(
        None, "torch.nn.Module, optional", "With a Kronecker basis: the model, which may be on the meta device.",
        "With a Kronecker basis: a Hugging Face model, of which only the configuration is read.", kind="path",
        metavar="DIR|ID")]
    top: Annotated[int, Option(100, "int", "Rows of a top list.", "Rows of a top list.", kind=int)]
    dampings: Annotated[int, Option(1, "int", "Damping values at once.", "Damping values at once.", kind=int)]
    workers: Annotated[int, Option(
        1, "int", "Ranges of rows worked on at once in a process.", "Ranges of rows worked on at once.", kind=int,
        metavar="W")]
    gflops: Annotated[float | None, Option(
        None, "float, optional", "10⁹ float32 FLOP in a second; default measured here, in about two seconds.",
        "Speed of float32 products, in 10^9 operations a second. Default: measured here.", kind=float)]
    read_rate: Annotated[float | None, Option(
        None, "float, optional", "Bytes read in a second; default measured here.",
        "Bytes read from the disk in a second. Default: measured here.", metavar="SIZE")]
    folder: Annotated["PathLike", Option(
        ".", "path", "Where the stores will be: the disk that is measured.",
        "Where the stores will be: the disk that is measured.", kind="path", metavar="DIR")]
# fmt: on

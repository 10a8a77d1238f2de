"""Options of measuring: retraining, checks, plans."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from ooc_influence.options.option import Option
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

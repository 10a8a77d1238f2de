"""Options of making a store, and of making one from another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_args

from ooc_influence.options.fitting import Weighting
from ooc_influence.options.option import Option
from ooc_influence.options.shared import DTYPE_NAMES, DTYPES, Reporting, Striped

if TYPE_CHECKING:
    import numpy.typing as npt

    from ooc_influence.store import GradientStore, PathLike, Reduction, Storage


# fmt: off
class RewriteOptions(Reporting, total=False):
    """What writing rows in another representation takes."""

    dtype: Annotated[str, Option(
        "sign", DTYPE_NAMES, "Representation of the new rows.",
        "Representation of the new rows.", choices=DTYPES)]
    storage: Annotated["Storage | None", Option(
        None, "Storage, optional", "Chunking and codec; default that of a new store, with the codec of this one.")]


class ReduceOptions(Striped, total=False):
    """What a reduction of a wide store takes."""

    rows: Annotated[int | None, Option(
        None, "int, optional",
        "Rows the basis is made from, spread evenly over the store; default all of them, up to 131,072 or 64 for each "
        "number kept. Fewer take less time, and leave out more of the other rows.",
        "Rows the basis is made from. Default: all, up to 131072 or 64 R.", kind=int, metavar="N", flag="--pilot")]
    weights: Annotated[Weighting | None, Option(
        None, '{"ggn", "trak"}, optional',
        "Weights of these rows (:mod:`ooc_influence.linalg.rows`), for one-label cross-entropy.",
        "Row weights of the basis. Default: none.", choices=get_args(Weighting))]
    like: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "A reduced train store whose basis to use instead: makes a query store. ``wide`` has its mask, or is reduced "
        "with the basis that ``like`` was rotated from.",
        "Use the basis of this reduced train store: makes a query store.", kind="path", metavar="TRAIN")]
    rotate: Annotated[bool, Option(
        False, "bool", "``wide`` is reduced already: write its rows in the eigenbasis of the F of all of them.",
        "WIDE is reduced already: rotate it to the eigenbasis of the F of all its rows.")]
    dtype: Annotated[str | None, Option(
        None, DTYPE_NAMES + ", optional",
        "Representation on disk; default float16, or that of an already reduced store.",
        "Representation on disk. Default: float16; with --rotate as WIDE.", choices=DTYPES)]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]


class SketchOptions(Striped, total=False):
    """What a sketch takes."""

    query: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "Queries to measure with how many candidates lists need; default some of the train rows.",
        "Measure with these queries how many candidates lists need. Default: with some rows of TRAIN.", kind="path",
        metavar="QUERY")]
    rows: Annotated[int | None, Option(
        None, "int, optional",
        "Rows the basis is made from, spread evenly over the store; default all of them, up to 131,072.",
        "Rows the basis is made from. Default: all, up to 131072.", kind=int, metavar="N", flag="--pilot")]
    dtype: Annotated[str, Option(
        "int8-linear", DTYPE_NAMES, "Representation on disk.", "Representation on disk.", choices=DTYPES)]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]


class CreateOptions(TypedDict, total=False):
    """What a new store is created with."""

    dtype: Annotated[str, Option(
        "float16", DTYPE_NAMES,
        "Representation of the rows; float16 has a scale a row, int8 and int4 one for every 16 columns.")]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]
    planned_rows: Annotated[int | None, Option(
        None, "int, optional", "Rows in all, where several writers divide the store.")]
    ids: Annotated[str | None, Option(
        None, '{"str", "int64"}, optional', "Type of the rows' ids; None for no ids.")]
    columns: Annotated[Mapping[str, str] | None, Option(
        None, "mapping of str to str, optional", "Name to dtype (bool, int64, float64, str) of per-row columns.")]
    reduction: Annotated["Reduction | Mapping[str, Any] | None", Option(
        None, "Reduction or mapping, optional",
        "What masked rows are multiplied by before they are stored; as a mapping, the facts of one that is kept in "
        "another store (with its ``path``).")]
    column_scale: Annotated["npt.ArrayLike | None", Option(
        None, "(k,), optional",
        "Positive numbers that rows are divided by before they are encoded and multiplied by on reading.")]
    attributes: Annotated[Mapping[str, Any] | None, Option(
        None, "mapping, optional", "What else to record (compressor, model fingerprint, loss kind); JSON values.")]
    exist_ok: Annotated[bool, Option(
        False, "bool",
        "Open the store that another process created in the meantime, if it has the same mask, instead of failing.")]
# fmt: on

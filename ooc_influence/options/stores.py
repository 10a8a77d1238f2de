"""Options of making a store, and of making one from another."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_args

from ooc_influence.options.extraction import Writing
from ooc_influence.options.fitting import Weighting
from ooc_influence.options.option import Option
from ooc_influence.options.scoring import Damped, Normalize
from ooc_influence.options.shared import DTYPE_NAMES, DTYPES, Budgeted, Derived, Reporting, Striped

if TYPE_CHECKING:
    import numpy.typing as npt

    from ooc_influence.interchange import MaskDescription
    from ooc_influence.store import GradientStore, PathLike, Reduction, Storage

ExportDtype = Literal["float32", "float16"]
IndexKind = Literal["flat", "ivf"]


# fmt: off
class RewriteOptions(Derived, total=False):
    """What writing rows in another representation takes."""

    dtype: Annotated[str, Option(
        "sign", DTYPE_NAMES, "Representation of the new rows.",
        "Representation of the new rows.", choices=DTYPES)]
    like: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "A store whose mask, and Kronecker basis, the new rows get; it is of the same layers. ``store`` then has all "
        "entries of these (k = p), in any basis. By default its own mask.",
        "Turn the rows, which have all entries of their layers, into the mask and basis of this store.",
        kind="path", metavar="STORE")]


class AverageOptions(Derived, total=False):
    """What averaging rows takes."""

    dtype: Annotated[str | None, Option(
        None, DTYPE_NAMES + ", optional", "Representation of the averages, not ``sign``; default that of the rows.",
        "Representation of the averages, not sign. Default: that of the rows.", choices=DTYPES)]


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


class ExportOptions(Damped, Budgeted, Reporting, total=False):
    """What an export of rows takes."""

    precondition: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "The train store of these query rows: rows are written times (F + λI)⁻¹ of its curvature, so that their inner "
        "products with exported train rows are influence scores. Default: rows as they are stored.",
        "Rows are queries for this store: write them times (F + λI)⁻¹ of its curvature. Default: as stored.",
        kind="path", metavar="TRAIN")]
    normalize: Annotated[Normalize, Option(
        "none", '{"none", "cosine", "train"}',
        "The unit of the inner products, as of :func:`influence_scores`: train rows are divided by their norms "
        '√(gᵀ (F + λI)⁻¹ g) for ``"cosine"`` and ``"train"``, queries (``precondition``) for ``"cosine"`` only. Give '
        "both halves the same.",
        "Divide train rows by √(gᵀ (F + λI)⁻¹ g) for cosine and train, queries for cosine: the unit of top.",
        choices=get_args(Normalize))]
    dtype: Annotated[ExportDtype, Option(
        "float32", '{"float32", "float16"}',
        "Of the numbers; rows that float16 does not hold to three digits are refused.",
        "Of the numbers; rows that float16 does not hold to three digits are refused.",
        choices=get_args(ExportDtype))]
    index: Annotated[IndexKind | None, Option(
        None, '{"flat", "ivf"}, optional',
        "Kind of a FAISS index, of inner products: ``flat`` (default) compares every row; ``ivf`` those in the cells "
        "nearest to a query, about 4√n of them, and may miss some.",
        "Kind of a FAISS index: flat compares every row; ivf those of the nearest cells, and may miss some. Default: "
        "flat.", choices=get_args(IndexKind))]


class ImportOptions(Writing, Reporting, total=False):
    """What an import of rows takes."""

    ids: Annotated["Sequence[Any] | npt.ArrayLike | str | None", Option(
        None, "(n,) int or str, optional",
        "An id for each row; of a Parquet file, the name of a column, by default ``id`` where there is one.",
        "Ids of the rows: a .npy or .txt file, an id a line; of a Parquet file a column. Default: none, or the column "
        "id.", kind="path", metavar="FILE|COLUMN")]
    columns: Annotated["Mapping[str, Any] | Sequence[str] | None", Option(
        None, "mapping of str to (n,), or sequence of str, optional",
        "Further values of each row (bool, int, float, str) by name; of a Parquet file, the names of columns, by "
        "default all others of these types.",
        "Further values of the rows: a table (.parquet, .csv, .jsonl) with a line for each; of a Parquet file names of "
        "columns, with commas. Default: none, or all others.", kind="path", metavar="FILE|COLUMNS")]
    loss: Annotated["npt.ArrayLike | str | None", Option(
        None, "(n,), optional",
        "Per-sample losses; of a Parquet file, the name of a column, by default ``loss`` where there is one. Without "
        "them zeros are recorded.",
        "Losses of the rows: a .npy file; of a Parquet file a column. Default: zeros, or the column loss.",
        kind="path", metavar="FILE|COLUMN")]
    grad_norm: Annotated["npt.ArrayLike | str | None", Option(
        None, "(n,), optional",
        "Norms to record, like ``loss``; by default those of the rows, or a Parquet file's column ``grad_norm``.")]
    column: Annotated[str | None, Option(
        None, "str, optional",
        "The column of a Parquet file whose lists are the rows; default the only one that holds lists of numbers.",
        "Column of a Parquet file whose lists are the rows. Default: the only one of lists.", metavar="NAME")]
    mask: Annotated["MaskDescription | None", Option(
        None, "Mask, mapping, sequence of mappings or path, optional",
        "Which gradient entry each number is: a :class:`Mask`, or for each module in turn its ``name``, the ``shape`` "
        "of its weight, the flat ``indices`` kept (default all) and ``weights`` that entries were multiplied by "
        "(default 1), as JSON values or a JSON file. Default: nothing is known of the numbers, and rows can be "
        "compared with those imported ``like`` them only.",
        "JSON file that says which gradient entry each number is. Default: nothing is known of them.", kind="path",
        metavar="FILE.json")]
    like: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "A store whose mask, reduction and model these rows are of, such as the train store of queries: they can be "
        "compared with its rows.",
        "Rows are of the same entries and model as those of this store, such as queries for TRAIN.", kind="path",
        metavar="STORE")]
    loss_kind: Annotated[str | None, Option(
        None, "str, optional",
        'Which loss it is, recorded: ``"cross_entropy"`` for one-label cross-entropy; row weights need to know.',
        "Which loss it is, such as cross_entropy.", metavar="NAME")]
    dtype: Annotated[str | None, Option(
        None, DTYPE_NAMES + ", optional", "Representation on disk; default float32.",
        "Representation on disk. Default: float32.", choices=DTYPES)]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]
# fmt: on

"""The options of scoring, fitting, extracting, reporting and planning, each defined once.

A definition holds an option's type, its default, what it does, and how the command line names it. Functions take them
as ``**options: Unpack[ScoringOptions]``, which type checkers read; :func:`takes` gives such a function the signature,
the defaults and the docstring's entries, and refuses unknown names; commands make their flags from them
(:mod:`ooc_influence.cli.options`). Nothing here imports NumPy or PyTorch.
"""

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict, TypeVar, cast, get_args

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    import torch

    from ooc_influence.compress import Compressor
    from ooc_influence.curvature import Curvature
    from ooc_influence.extract import AdamMetric, Batches, BudgetBatches, CheckpointSource, ModuleSelection
    from ooc_influence.store import GradientStore, PathLike, Reduction, Storage

AnyCurvature: TypeAlias = "Curvature | PathLike | Literal[False] | None"

DampingMode = Literal["relative", "absolute"]
Normalize = Literal["none", "cosine", "train"]
Combine = Literal["mean", "query-margins", "margins"]
Product = Literal["auto", "float32", "bfloat16", "int8"]
ProductName = Literal["float32", "bfloat16", "int8"]
ScoresDtype = Literal["float32", "float16"]
Weighting = Literal["ggn", "trak"]
Blocks = Literal["module", "diagonal"]
OnNonFinite = Literal["raise", "skip"]
LabelKind = Literal["dataset", "sampled"]
DampingScope = Literal["layer", "model"]
Task = Literal["causal-lm", "classification"]
Preference = Literal["dpo", "log-odds"]
Turns = Literal["last", "all"]
DTYPES = ("float16", "bfloat16", "float32", "int8", "int8-linear", "int4", "sign")
_DTYPES = "{" + ", ".join(f'"{name}"' for name in DTYPES) + "}"


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes
    ----------
    default : object
        Its value where none is given.
    type : str
        Its type, as docstrings say it.
    doc : str
        What it does, for docstrings.
    help : str
        What it does, for the command line; options without are of the library alone.
    kind : type or "path"
        What the command line parses a value as.
    metavar : str, optional
        What stands for a value in the command line's help.
    choices : tuple of str
        The values it may have.
    multiple : bool
        Whether the flag may be repeated.
    least : int, optional
        The least whole number it may be, checked by the command line.
    flag : str, optional
        The flag, where it is not named like the option; of an option that is True by default, what turns it off.
    """

    default: Any
    type: str
    doc: str
    help: str = ""
    kind: Any = str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    multiple: bool = False
    least: int | None = None
    flag: str | None = None


# fmt: off
class Reporting(TypedDict, total=False):
    """What every long call takes."""

    progress: Annotated[bool | None, Option(None, "bool, optional", "Show a progress line; silent by default.")]


class Budgeted(TypedDict, total=False):
    """What a call within a memory budget takes."""

    memory: Annotated[int | str | None, Option(
        None, "int or str, optional",
        'Memory budget of the process, such as ``"4GiB"``; default half of what is free, on a cluster half of a '
        "worker's limit.",
        "Memory budget, such as 4GiB. Default: half of what is free.", metavar="SIZE")]


class Striped(Budgeted, Reporting, total=False):
    """What a call takes whose rows are divided among workers."""

    workers: Annotated[int | None, Option(
        None, "int, optional",
        "Ranges of rows worked on at once; default one with all cores, or the slots of the ambient Dask cluster.",
        "Ranges of rows worked on at once. Default: one, with all cores.", kind=int, metavar="N")]


class Resumable(TypedDict, total=False):
    """What a call takes that can keep its finished parts."""

    resume: Annotated["PathLike | None", Option(
        None, "path, optional",
        "A folder to keep finished parts in: the same call, interrupted or killed, continues from them. It is removed "
        "at the end.",
        "Keep finished parts in this folder: the same command continues from them. Removed at the end.",
        kind="path", metavar="DIR")]


class DampedOptions(Striped, total=False):
    """Which curvature and λ scores are computed with."""

    curvature: Annotated["AnyCurvature | Sequence[AnyCurvature]", Option(
        None, "Curvature, str, path or False, or a list with one for each checkpoint",
        'An object, a name in the train store, or a path; default the one named ``"default"``. False: none, for plain '
        'dot products g_qᵀ g_i (with ``normalize="cosine"`` the cosine of the gradients).',
        "Curvature to use. Default: 'default' in TRAIN. With --also, one for all or one for each checkpoint.",
        kind="path", metavar="NAME|PATH", multiple=True)]
    damping: Annotated[float | Sequence[float] | None, Option(
        None, "float or sequence of float, optional",
        "Relative (λ = damping · tr(F)/min(d, m), m the rows of the fit) or absolute; default the curvature's own, "
        "0.1 relative (of a Kronecker basis 0.03 of each layer's mean; of an adapter's 0.3 of the whole model's, in "
        "lists of rows 3000). A sequence gives results an axis of λ in front; the rows are read once for all.",
        "Damping factor; may be repeated. Default: the curvature's (0.1, relative).", kind=float, multiple=True)]
    damping_mode: Annotated[DampingMode, Option(
        "relative", '{"relative", "absolute"}', "What ``damping`` means.",
        "relative: λ = damping · tr(F)/min(d, m); absolute: λ = damping.", choices=get_args(DampingMode))]
    device: Annotated[str | None, Option(
        None, "str, optional", 'Multiply there with torch, such as ``"cuda"``; default NumPy\'s BLAS.',
        "Multiply there, such as cuda. Default: NumPy's BLAS.")]


class ScoringOptions(DampedOptions, total=False):
    """What every score takes."""

    rows: Annotated[Any, Option(
        None, "(m,) int or (n,) bool, or a list with one of these or None for each checkpoint",
        "The train rows a checkpoint was trained on. A row's score is the mean over the checkpoints that saw it; NaN "
        "where none did.",
        "Rows the checkpoint was trained on, as row numbers or a mask in a .npy file; others are not scored. With "
        "--also, one for each checkpoint ('all': every row).", kind="path", metavar="FILE", multiple=True)]


class Normalized(TypedDict, total=False):
    """The unit of scores."""

    normalize: Annotated[Normalize | None, Option(
        None, '{"none", "cosine", "train"}, optional',
        'The unit. With |g| = √(gᵀ (F + λI)⁻¹ g), the root of self-influence: ``"cosine"`` divides by |g_q| and |g_i|, '
        'so scores are in [-1, 1]; ``"train"`` by |g_i| only, which lowers rows that influence every query (RelatIF, '
        "arXiv 2003.11630). A row without gradient scores 0. Default: ``\"train\"`` in lists of a language model's "
        "rows (``loss_kind`` begins with ``token_cross_entropy``), ``\"none\"`` elsewhere, in arrays and sums too.",
        "cosine: scores in [-1, 1]; train: divide by the train row's norm (RelatIF). Default: none; in lists of a "
        "language model's rows train.", choices=get_args(Normalize))]


class PairOptions(ScoringOptions, Normalized, total=False):
    """What scores of queries against train rows take."""

    average_queries: Annotated[bool | str, Option(
        False, "bool or str",
        "True: one query, the mean of all. A column of the query store: one query for each of its values.",
        "One query: the mean of all.")]
    minus: Annotated["GradientStore | PathLike | Sequence[GradientStore | PathLike] | None", Option(
        None, "GradientStore or path, or a list with one for each checkpoint, optional",
        "A store of controls, extracted like the queries: the mean of its rows is subtracted from every query, or mean "
        "of queries. A score is then the difference of a row's influence on both, before any norm.",
        "A store of controls, whose mean gradient is subtracted from every query. With --also, once for each "
        "checkpoint.", kind="path", metavar="CONTROLS", multiple=True)]
    combine: Annotated[Combine, Option(
        "mean", '{"mean", "query-margins", "margins"}',
        "How several checkpoints are combined: by the mean of their scores; or, for one-label cross-entropy, by "
        "margins of the queries, or of queries and rows as TRAK does (:mod:`ooc_influence.influence.checkpoints`).",
        "How checkpoints are combined: by the mean of their scores, by margins of the queries, or by margins of "
        "queries and rows as TRAK does.", choices=get_args(Combine))]


class ScoreOptions(PairOptions, total=False):
    """What scores of all rows take."""

    scores_dtype: Annotated[ScoresDtype, Option(
        "float32", '{"float32", "float16"}',
        "Representation of scores that are written (``out``). float16 takes half the room and has three digits: scores "
        "are then those stored times the array's attribute ``scale_factor``, a power of two.",
        "Representation of the scores; float16 ones count times the attribute scale_factor.",
        choices=get_args(ScoresDtype))]


class ListOptions(PairOptions, Resumable, total=False):
    """What sums over groups take, and top lists among others."""


class TopOptions(ListOptions, total=False):
    """What top lists take."""

    product: Annotated[Product, Option(
        "auto", '{"auto", "float32", "bfloat16", "int8"}',
        "The product that finds the rows of lists; those rows are scored again in float32, so lists are the same for "
        "all. Default: the quickest on this machine. ``int8`` is for rows of ``int8-linear`` and ``sign``.",
        "Product that finds the rows of lists, which are the same for all. Default: the quickest here.",
        choices=get_args(Product))]
    sketch: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "A sketch of the train rows (:func:`sketch_store`), which names the candidates for lists; their scores are "
        "those of the train rows themselves.",
        "Find candidates in this sketch of TRAIN, made by 'sketch'; their scores are exact.", kind="path",
        metavar="SKETCH")]
    recall: Annotated[float, Option(
        0.99, "float",
        "With ``sketch``: the share of the best rows that its candidates should hold. How many candidates that takes "
        "is measured with some queries, once for each setting of curvature, damping and unit. With 1, every row that "
        "can be in a list is scored, and lists are those without a sketch.",
        "With --sketch: the share of the best rows that candidates should hold; with 1, lists are proven complete.",
        kind=float, metavar="SHARE")]
    prove: Annotated[bool, Option(
        False, "bool",
        "With ``sketch``: also say which lists are proven complete (``TopInfluential.proven``), for which the search "
        "among the sketch's rows takes about 1.6 times as long. ``recall=1`` includes it.",
        "With --sketch: also say which lists are proven complete, which takes longer.")]


class SelfInfluenceOptions(ScoringOptions, Resumable, total=False):
    """What self-influence takes."""


class SelectOptions(ScoringOptions, Resumable, total=False):
    """What a selection of train rows takes."""

    tasks: Annotated[str | None, Option(
        None, "str, optional",
        "A column of the query store whose values are tasks. Queries of a task count as one, the mean of their "
        "gradients, and a row's score is its highest over the tasks. Default: all queries are one task.",
        "Column of the targets whose values are tasks: a row's score is its highest over the tasks. Default: one "
        "task.", metavar="COLUMN")]
    normalize: Annotated[Normalize, Option(
        "cosine", '{"none", "cosine", "train"}',
        "The unit of scores, as of :func:`influence_scores`; here ``\"cosine\"`` is the default, so that tasks are "
        "compared in one unit and rows of large gradients are not preferred.",
        "cosine: scores in [-1, 1]; train: divide by the train row's norm; none: neither.",
        choices=get_args(Normalize))]
    redundancy: Annotated[float, Option(
        0.0, "float",
        "How much a row counts for less that resembles rows chosen before, from 0 (not at all) to 1: its gain is "
        "its score times 1 - redundancy · c, with c its largest cosine, in the inner product of the scores, with a "
        "row chosen before it (0 where that is negative).",
        "From 0 to 1: how much a row counts for less that resembles rows already chosen.", kind=float,
        metavar="SHARE")]
    quotas: Annotated["Mapping[str, Any] | None", Option(
        None, "mapping, optional",
        "A column of the train store and what its values may have of the rows chosen: a share for each (0.3 or "
        '``"30%"``), a mapping of values to shares, or ``"proportional"``: the shares they have of the rows there '
        "are.")]
    unit: Annotated[str | None, Option(
        None, "str, optional",
        "A column of the train store, such as ``\"document\"``: rows of the same value are chosen together, by the "
        "score of the best of them. Default: every row by itself.",
        "Column of TRAIN whose equal values are chosen together, by the best of them. Default: document, where "
        "there is one.", metavar="COLUMN")]
    drop: Annotated[bool, Option(
        False, "bool",
        "Choose what to remove: a row's (or unit's) score is then its lowest, over tasks, and the rows left out are "
        "those that harm a task most.",
        "Choose what to remove instead: leave out the rows that harm a task most.")]


class ReportOptions(DampedOptions, Normalized, total=False):
    """What a report takes."""

    top: Annotated[int, Option(
        10, "int", "Proponents and opponents of each query.", "Proponents and opponents of a query.", kind=int,
        least=1)]
    suspects: Annotated[int, Option(
        500, "int", "Rows on the page of label errors: this many of largest self-influence, and of largest loss.",
        "Rows on the page of label errors, by self-influence and by loss.", kind=int, least=1)]
    by: Annotated[Sequence[str] | None, Option(
        None, "sequence of str, optional",
        "Columns of the store to sum scores by; default label and source, where they have few values.",
        "Sum scores by this column; may be repeated. Default: label and source.", metavar="COLUMN", multiple=True)]
    bm25: Annotated[bool, Option(
        True, "bool",
        "Show where a search for a query's words (BM25) has each example, where texts are given; all documents are "
        "read twice for it.",
        "Leave out where a search for a query's words (BM25) has each example, for which all documents are read "
        "twice.", flag="--no-bm25")]
    token_rows: Annotated[int, Option(
        5, "int",
        "With a language model: rows of each list, proponents and opponents, that are shown token by token; 0: none.",
        "With --model: rows of each list, proponents and opponents, that are shown token by token; 0: none.", kind=int,
        metavar="N", least=0)]
    title: Annotated[str | None, Option(
        None, "str, optional", "Title of the pages; default the store's name.",
        "Title of the pages. Default: the store's name.")]


class RowOptions(Striped, total=False):
    """Which rows a curvature is of, and how they are weighted."""

    rows: Annotated[Any, Option(
        None, "slice, (start, stop), row numbers or (n,) bool, optional",
        "Use these rows only; default all, those appended later included.",
        "Use rows A to B - 1 only.", metavar="A:B")]
    sample: Annotated[int | None, Option(
        None, "int, optional",
        "Use this many of the live ones, drawn at random without replacement. The error this is expected to make in F, "
        "as a share of its Frobenius norm, is recorded.",
        "Use N of them, drawn at random; shows the error of F to expect.", kind=int, metavar="N")]
    seed: Annotated[int, Option(
        0, "int", "Seed of the sample, and of the start of a subspace iteration.", "Seed of the sample.", kind=int)]
    weights: Annotated["Weighting | npt.ArrayLike | None", Option(
        None, '{"ggn", "trak"} or (n,) array, optional',
        "w; default 1. The named ones follow from the rows' losses (:mod:`ooc_influence.linalg.rows`).",
        "Weight rows by their losses.", choices=get_args(Weighting))]
    force_weights: Annotated[bool, Option(
        False, "bool",
        "Accept named weights although the store does not say that its losses are one-label cross-entropy.",
        "Weight rows whatever the loss is.")]


class KeptOptions(RowOptions, total=False):
    """What every fit takes: the rows, and where its result is kept."""

    name: Annotated[str | None, Option(
        None, "str, optional",
        'Name of the curvature in the store; default ``"default"``, or ``"gram"`` where the dual method was asked for. '
        'Scores find either.',
        "Name of the curvature in the store. Default: 'default', with --method dual 'gram'.")]
    out: Annotated["PathLike | None", Option(
        None, "path, optional", "Save it there instead (for a store that cannot be written).",
        "Save it there instead of in the store.", kind="path", metavar="PATH")]
    refit: Annotated[bool, Option(
        False, "bool", "Fit again although there is an up-to-date curvature; by default that one is returned.",
        "Fit again although there is an up-to-date curvature.")]


class FittingOptions(KeptOptions, total=False):
    """What a fit of products of rows takes."""

    prior: Annotated["Curvature | PathLike | None", Option(
        None, "Curvature, str or path, optional",
        'Fit above this prior: ``"kronecker"``, which the mask of a store in a Kronecker basis brings along, or a '
        "curvature from :func:`fit_kronecker`. F is then that of the rows divided by D = √(Λ + λ), and the curvature "
        "is D (F + λ'I) D: the prior alone where λ' is large, the rows alone where it is small. For rows of labels "
        "sampled from the model.",
        "Fit above this prior: 'kronecker', that of the basis, or the path of a curvature of that kind.", kind="path",
        metavar="NAME|PATH")]
    prior_damping: Annotated[float | None, Option(
        None, "float, optional",
        "λ of the prior, relative to each layer's mean; default that of the basis, 0.03.",
        "Relative damping of the prior. Default: that of the basis, 0.03.", kind=float, metavar="X")]
    shrinkage: Annotated[float | None, Option(
        None, "float, optional",
        "λ' relative to the mean square of the whitened rows' entries, recorded as the curvature's damping, which a "
        "``damping`` of a call replaces; default 20.",
        "Weight of the prior against the rows, the damping of scores. Default: 20.", kind=float, metavar="X")]
    device: Annotated[str | None, Option(
        None, "str, optional",
        'Multiply rows there, such as ``"cuda"`` (for the Gram matrix in float64); default the BLAS of NumPy or SciPy.',
        "Multiply rows there, such as cuda. Default: the BLAS of NumPy or SciPy.")]


class FisherOptions(FittingOptions, total=False):
    """What a fit of the Fisher matrix takes."""

    blocks: Annotated[Blocks | None, Option(
        None, '{"module", "diagonal"}, optional',
        "Instead of the whole, one Fisher matrix for each module's columns, with a spectrum and a λ of its own; or the "
        "diagonal only, which F nearly is in a rotated store.",
        "One matrix for each module; or the diagonal only, for a rotated store.", choices=get_args(Blocks))]
    rank: Annotated[int | None, Option(
        None, "int, optional",
        "Find and keep the ``rank`` largest eigenvalues and their eigenvectors only, by the quickest way that fits the "
        "budget (:mod:`ooc_influence.curvature.costs`): any number of columns fits. The rest of the trace counts as "
        "spread evenly over the other directions.",
        "Keep the R largest eigenvalues and their eigenvectors only: any number of columns fits.", kind=int,
        metavar="R")]


class RewriteOptions(Reporting, total=False):
    """What writing rows in another representation takes."""

    dtype: Annotated[str, Option(
        "sign", _DTYPES, "Representation of the new rows.",
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
        None, _DTYPES + ", optional",
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
        "int8-linear", _DTYPES, "Representation on disk.", "Representation on disk.", choices=DTYPES)]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]


class CreateOptions(TypedDict, total=False):
    """What a new store is created with."""

    dtype: Annotated[str, Option(
        "float16", _DTYPES,
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


class ExtractionOptions(Budgeted, Reporting, total=False):
    """What of a model's gradients is stored, and how."""

    compressor: Annotated["Compressor | Callable[[int], Compressor] | None", Option(
        None, "Dropout, Gaussian, Rademacher, Sjlt, Grass, LoGra, Pca or Identity, optional",
        "What to keep of each gradient; default ``Dropout()``. Also a function of p, the entries of the tapped layers, "
        "that returns one.")]
    like: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "A train store whose mask to use instead: makes a query store. The model must be the same.",
        "Make a query store with the mask and basis of this train store.", kind="path", metavar="TRAIN")]
    modules: Annotated["ModuleSelection", Option(
        None, "str, sequence of str, callable, optional",
        "Layers to tap: name patterns or a predicate ``(name, module) -> bool``; default every supported layer, or "
        "those that are trained where the others are frozen. Patterns that begin with ``!`` leave layers out.",
        "Layers by name pattern; '!PATTERN', in quotes, leaves some out. May be repeated.", metavar="PATTERN",
        multiple=True)]
    fallback: Annotated[bool, Option(
        False, "bool",
        "Tap selected layers of unknown kinds too, through ``torch.func``, at the cost of their full gradients.",
        "Tap layers of unknown kinds too, at the cost of their full gradients.")]
    dtype: Annotated[str, Option(
        "float16", _DTYPES,
        "Representation on disk; float16, int8, int4 and sign have a float32 scale a row.",
        "Representation on disk; float16, int8, int4 and sign have a scale a row.", choices=DTYPES)]
    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where to run; default where the model is.",
        "Where to run, such as cuda. Default: where the model is.")]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]
    labels: Annotated[LabelKind, Option(
        "dataset", '{"dataset", "sampled"}',
        '``"sampled"``: losses of this package (:func:`cross_entropy`, :func:`token_cross_entropy`, those of Hugging '
        "Face models) replace the labels by draws from the model's predictions, so that F of the rows is the true "
        "Fisher matrix. A draw depends on seed, row and token alone. If the loss draws none, a warning says so, and "
        "rows have the data set's labels.",
        "sampled: draw labels from the model's predictions, for rows whose F is the true Fisher matrix.",
        choices=get_args(LabelKind))]
    label_seed: Annotated[int, Option(0, "int", "Seed of sampled labels.", "Seed of sampled labels.", kind=int)]
    draws: Annotated[int, Option(
        1, "int",
        "Rows of each sample, with labels drawn for each: of m samples, row d · m + j is draw d of sample j, with its "
        "columns and, followed by ``/draw1`` and so on, its id.",
        "Rows of each sample, with labels drawn for each.", kind=int, metavar="D", least=1)]
    sample: Annotated[int | None, Option(
        None, "int, optional", "Use this many samples, spread evenly over the data; default all.",
        "Use N samples, spread evenly over the data. Default: all.", kind=int, metavar="N", least=1)]
    checkpoints: Annotated["Sequence[CheckpointSource] | CheckpointSource | None", Option(
        None, "sequence of path, state dict or module, optional",
        "Earlier checkpoints of the same training, as files of tensors, folders of a model or adapter, or a folder of "
        "several, as a Trainer leaves it. Rows are the mean of the gradients at these and at the model, which is the "
        "last one and alone decides the mask, the basis and sampled labels. With ``like``, by default those of the "
        "train store, found at the paths it recorded; ``()`` for the model alone.",
        "Average rows over the model, which is the last one, and these checkpoints: files, folders, or a folder of "
        "several, as a Trainer leaves it. May be repeated. Default with --like: those of TRAIN; 'none' for the model "
        "alone.", kind="path", metavar="PATH|none", multiple=True)]
    keep_factors: Annotated[bool, Option(
        False, "bool",
        "Keep all eigenvectors and second moments of the Kronecker basis in the store's folder, for exact re-ranking "
        "(:func:`rerank`), which otherwise computes them each time. About 20 bytes for each entry of the layers.",
        "Keep the whole Kronecker basis beside the rows, for top --rerank: about 20 bytes an entry of the layers.")]
    metric: Annotated["AdamMetric | None", Option(
        None, "AdamMetric, optional", "Weight entries as the optimiser that trained the model did.")]
    check_model: Annotated[bool, Option(
        True, "bool",
        "Refuse another model than the one ``store`` or ``like`` was made with; False warns and records it instead.",
        "Continue although the model is not the one the store was made with; this is recorded.", flag="--other-model")]
    check_gradients: Annotated[bool, Option(
        True, "bool",
        "Compare entries of the first and the last sample of the first batch with autograd's gradients of the loss "
        "before a row is stored, for about one and a half training steps of two samples; what was verified is "
        "recorded. A layer whose samples cannot be told apart, or whose weight is used without calling it, is left "
        "out and named; one that differs goes through the fallback where that is allowed.",
        "Store rows without comparing the first samples' entries with autograd's gradients; this is recorded.",
        flag="--no-check")]


class InitOptions(ExtractionOptions, total=False):
    """What fixes a store that extraction fills."""

    loss_kind: Annotated[str | None, Option(
        None, "str, optional",
        'Which loss it is, recorded: ``"cross_entropy"`` for one-label cross-entropy; row weights need to know.')]
    pilot: Annotated["Batches | BudgetBatches | None", Option(
        None, "iterable or callable, optional",
        "Batches for the pilot that importance sampling and an eigenbasis need; default some of the data, spread "
        "evenly where it can be addressed (a list, a DataLoader, a budget), else the first batches.")]
    origin: Annotated[Mapping[str, Any] | None, Option(
        None, "mapping, optional",
        "What a new store's rows are made from, JSON values by name, such as the model's path and the data's: "
        "recorded, and shown by ``info`` and on a report's page.")]


class Sharded(TypedDict, total=False):
    """How a run writes."""

    shard: Annotated[tuple[int, int] | None, Option(
        None, "(int, int), optional",
        "This process is writer i of N (from 0) that fill one store together, on one machine or several that see the "
        "same folder or object store. The number of rows has to be known: from the batches, or from "
        ":func:`init_store`. A writer whose share is finished does nothing.",
        "Be writer I of N (from 0) that fill one store together; see init.", metavar="I/N")]
    on_nonfinite: Annotated[OnNonFinite, Option(
        "raise", '{"raise", "skip"}',
        "What to do with a sample whose loss or gradient has NaN or Inf: stop and name it, or record it as a dropped "
        "row.",
        "Samples with NaN or Inf: stop and name them, or record them as dropped rows.", choices=get_args(OnNonFinite))]


class ExtractOptions(InitOptions, Sharded, total=False):
    """What an extraction takes."""


class LoadingOptions(TypedDict, total=False):
    """How a Hugging Face model is loaded."""

    task: Annotated[Task | None, Option(
        None, '{"causal-lm", "classification"}, optional',
        "What to load it for; default what its adapter, or its configuration, says.",
        "What the model is for. Default: as its configuration says.", choices=get_args(Task))]
    adapter: Annotated["str | Path | None", Option(
        None, "str or path, optional",
        "A PEFT adapter to put on it. One with a classifier's head says how many classes there are.",
        "A PEFT adapter to put on the model.", kind="path", metavar="DIR")]
    tokenizer: Annotated["str | Path | None", Option(
        None, "str or path, optional", "Where the tokenizer is, if not with the model.",
        "Where the tokenizer is, if not with the model.", kind="path", metavar="DIR|ID")]
    revision: Annotated[str | None, Option(
        None, "str, optional", "Revision of the hub's repository.", "Revision of the hub's repository.")]
    trust_remote_code: Annotated[bool, Option(
        False, "bool", "Run Python code that comes with the model.", "Run Python code that comes with the model.")]
    allow_pickle: Annotated[bool, Option(
        False, "bool", "Load weights from ``.bin`` files too (with ``weights_only``).",
        "Load weights that are not in safetensors.")]


class FieldOptions(TypedDict, total=False):
    """Which fields of a document are what."""

    text: Annotated[str | None, Option(
        None, "str, optional",
        "Field with running text. Where no form is named, the first of these that documents have: ``text``; "
        "``prompt`` and ``completion``; ``messages`` or ``prompt`` with a server's ``choices`` or ``outputs``; "
        "``messages``.",
        "Field with running text. Default: 'text', or what documents have.", metavar="FIELD")]
    prompt: Annotated[str | None, Option(
        None, "str, optional", "Field with a prompt: only the tokens of ``completion`` are targets.",
        "Field with a prompt, with --completion: only the completion's tokens are targets.", metavar="FIELD")]
    completion: Annotated[str | None, Option(
        None, "str, optional",
        "Field with the completion of ``prompt``, or with the last reply of ``messages``: a text, or answers as "
        "servers write them, of which the first counts (:func:`ooc_influence.corpus.first_answer`).",
        "Field with the completion of --prompt, or the last reply of --messages: a text, or a server's answers.",
        metavar="FIELD")]
    messages: Annotated[str | None, Option(
        None, "str, optional",
        "Field with a chat, put through the tokenizer's template; the tokens of the assistant's replies that ``turns`` "
        "names are targets.",
        "Field with a chat: the tokens of the assistant's last reply are targets, or of all (--turns).",
        metavar="FIELD")]
    chosen: Annotated[str | None, Option(
        None, "str, optional",
        "Field with the preferred one of two completions of ``prompt``, or of two chats; with ``rejected``. A row is a "
        "pair, its loss :class:`ooc_influence.hf.PreferenceLoss`.",
        "Field with the preferred one of two completions of --prompt, or of two chats; with --rejected.",
        metavar="FIELD")]
    rejected: Annotated[str | None, Option(
        None, "str, optional", "Field with the other one.", "Field with the other one.", metavar="FIELD")]
    turns: Annotated[Turns, Option(
        "last", '{"last", "all"}',
        "With chats: whether the assistant's last reply is learned, or all of its replies but those with "
        '``"weight": 0``.',
        "With chats: whether the assistant's last reply is learned, or all of them.", choices=get_args(Turns))]
    tools: Annotated[str | None, Option(
        None, "str, optional",
        "With chats: field with the tools that the chat template shows, a list of objects or its JSON.",
        "With chats: field with the tools that the chat template shows.", metavar="FIELD")]
    input_ids: Annotated[str | None, Option(
        None, "str, optional",
        "Field with tokens, a list of the model's token numbers without padding on the left: all but the first are "
        "targets.",
        "Field with a list of tokens, made beforehand: all but the first are targets.", metavar="FIELD")]
    input_labels: Annotated[str | None, Option(
        None, "str, optional",
        "With ``input_ids``: field with a label for each token, the token itself (not shifted), or -100 where it is no "
        "target.",
        "With --input-ids: field with a label for each token: the token itself, or -100 where it is no target.",
        metavar="FIELD")]
    doc_ids: Annotated[str | None, Option(
        None, "str, optional",
        "With ``input_ids``: field with a whole number for each token that says which of several documents packed "
        "together it is of. Each is a row of its own, and the number a column, ``doc_id``.",
        "With --input-ids: field with a whole number for each token, which of several documents packed together it is "
        "of. Each is a row of its own.", metavar="FIELD")]
    label: Annotated[str | None, Option(
        None, "str, optional", "With ``text``: field with the class, for sequence classification.",
        "With --text: field with the class, for sequence classification.", metavar="FIELD")]
    advantage: Annotated[str | None, Option(
        None, "str, optional",
        "Field with the advantage A of a rollout: the loss is -A times the mean, or sum, of the target tokens' "
        "log-probabilities (:class:`ooc_influence.hf.PolicyGradientLoss`).",
        "Field with the advantage of a rollout: the loss is minus it times the mean (or sum) of the targets' "
        "log-probabilities.", metavar="FIELD")]
    chat: Annotated[bool, Option(
        False, "bool", "Put prompt and completion through the chat template, as a user's and an assistant's turn.",
        "Put prompt and completion through the tokenizer's chat template.")]
    id: Annotated[str | None, Option(
        None, "str, optional", "Field with the document's name; default its number.",
        "Field with the document's name. Default: its number.", metavar="FIELD")]
    keep: Annotated[Sequence[str], Option(
        (), "sequence of str", "Further fields, kept as columns.", "Keep a field as a column; may be repeated.",
        metavar="FIELD", multiple=True)]


class ReadingOptions(FieldOptions, LoadingOptions, total=False):
    """How rows are made of documents, and the model is loaded."""

    split: Annotated[str | None, Option(None, "str, optional", "Which split, of a folder that has several.")]
    config: Annotated[str | None, Option(
        None, "str, optional", "Which configuration of a data set of the hub, or of a copy of it in a folder.",
        "Which configuration of a data set of the hub.", metavar="NAME")]
    streaming: Annotated[bool, Option(
        False, "bool",
        "Read a data set of the hub as a stream, of which only the first ``documents`` are downloaded.",
        "Read a data set of the hub as a stream: only the first --documents are downloaded.")]
    on_missing: Annotated[OnNonFinite, Option(
        "raise", '{"raise", "skip"}', "Documents whose text is missing: name the first and stop, or leave them out.",
        "Documents whose text is missing: name the first and stop, or leave them out.", choices=get_args(OnNonFinite))]
    max_length: Annotated[int | None, Option(
        None, "int, optional", "Tokens of a row; default the model's context.",
        "Tokens of a row. Default: the model's context.", kind=int, metavar="N")]
    tokens: Annotated[int | None, Option(
        None, "int, optional", "Tokens of a batch, padding included; default 8192, on a CPU 2048.",
        "Tokens of a batch, padding included. Default: 8192; on a CPU 2048.", kind=int, metavar="N")]
    batch_size: Annotated[int | None, Option(
        None, "int, optional", "Most rows of a batch.", "Most rows of a batch.", kind=int, metavar="N")]
    reduction: Annotated[Literal["mean", "sum"], Option(
        "mean", '{"mean", "sum"}', "Whether a row's loss is the mean or the sum of its tokens' losses.",
        "Whether a row's loss is the mean or the sum of its tokens' losses.", choices=("mean", "sum"),
        flag="--loss-reduction")]
    preference: Annotated[Preference, Option(
        "dpo", '{"dpo", "log-odds"}',
        "Loss of ``chosen`` and ``rejected``: DPO's, or its form without a reference, -log σ(β (log p(chosen) - "
        "log p(rejected))). Log-probabilities are sums over targets.",
        "Loss of --chosen and --rejected: DPO's, or its form without a reference.", choices=get_args(Preference))]
    beta: Annotated[float, Option(
        0.1, "float", "The factor β of that loss.", "The factor β of that loss.", kind=float)]
    reference: Annotated["str | Path | None", Option(
        None, "str or path, optional",
        "DPO's reference model; default the model without its PEFT adapter.",
        "DPO's reference model. Default: the model without its adapter.", kind="path", metavar="DIR|ID")]
    model_dtype: Annotated[str, Option(
        "auto", '{"auto", "float32", "bfloat16", "float16", "8bit"}',
        "Type of the model's weights; auto: as saved. 8bit needs ``bitsandbytes``.",
        "Type of the model's weights; auto: as saved.", choices=("auto", "float32", "bfloat16", "float16", "8bit"))]
    documents: Annotated[int | None, Option(
        None, "int, optional", "Use this many documents, spread evenly, or the first of a stream; default all.",
        "Use N documents, spread evenly, or the first of a stream. Default: all.", kind=int, metavar="N")]


class DocumentOptions(ReadingOptions, total=False):
    """How rows are made of documents, and of what gradients."""

    output: Annotated[Literal["gradients", "curvature"], Option(
        "gradients", '{"gradients", "curvature"}',
        '``"curvature"``: rows of randomly signed token gradients (:class:`SignedLoss`), for a Gauss-Newton matrix; '
        'with '
        "``like``.",
        "curvature: rows of randomly signed token gradients, for a Gauss-Newton matrix; needs --like.",
        choices=("gradients", "curvature"))]
    weights: Annotated[Literal["ggn"] | None, Option(
        None, '{"ggn"}, optional', "Weights of the tokens of curvature rows; default none.",
        "Weights of the tokens of curvature rows. Default: none.", choices=("ggn",), flag="--token-weights")]
    sign_seed: Annotated[int, Option(
        0, "int", "Seed of the signs of curvature rows.", "Seed of the signs of curvature rows.", kind=int)]


class JobOptions(DocumentOptions, Reporting, total=False):
    """How a Hugging Face model and rows of documents are made ready."""

    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where the model is loaded to; default the CPU.")]


class HuggingFaceOptions(DocumentOptions, ExtractionOptions, Sharded, total=False):
    """What an extraction from a Hugging Face model takes."""


class TraceOptions(ReadingOptions, Budgeted, Reporting, total=False):
    """What a run from a model and documents to pages takes."""

    row_bytes: Annotated[int | str | None, Option(
        None, "int or str, optional",
        'Choose entries and representation for this size of a row, such as ``"8kB"`` (:class:`RowBudget`); default '
        "65,536 float16 numbers.",
        "Size of a row, such as 8kB. Default: 131 kB.", metavar="SIZE")]
    damping: Annotated[float | None, Option(
        None, "float, optional", "Relative damping of the scores; default the curvature's own for lists.",
        "Relative damping of the scores. Default: the curvature's own for lists.", kind=float, metavar="X")]
    top: Annotated[int, Option(
        10, "int", "Proponents and opponents of each query.", "Proponents and opponents of a query.", kind=int,
        least=1)]
    token_rows: Annotated[int, Option(
        5, "int", "Proponents, and opponents, of each query whose tokens are shown with their shares of the score; 0 "
        "for none.",
        "Proponents, and opponents, of a query whose tokens are shown with their shares of the score; 0: none.",
        kind=int, least=0)]
    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where the model runs; default the CPU.",
        "Where the model runs, such as cuda. Default: the CPU.")]


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
        "float16", _DTYPES, "Representation on disk.",
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
        "10^9 float32 FLOP in a second. Default: measured here.", kind=float)]
    read_rate: Annotated[float | None, Option(
        None, "float, optional", "Bytes read in a second; default measured here.",
        "Bytes read from the disk in a second. Default: measured here.", metavar="SIZE")]
    folder: Annotated["PathLike", Option(
        ".", "path", "Where the stores will be: the disk that is measured.",
        "Where the stores will be: the disk that is measured.", kind="path", metavar="DIR")]
# fmt: on


Options = TypeVar("Options", bound=Mapping[str, Any])
Function = TypeVar("Function", bound=Callable[..., Any])
_LAST = ("device", "workers", "memory", "progress")  # what a call takes from the machine, listed after what it does


def definitions(kind: type[Any]) -> dict[str, Option]:
    """Return the options of a kind by name, in the order they are listed."""
    options = {name: get_args(hint)[1] for name, hint in kind.__annotations__.items()}
    order = sorted(options, key=lambda name: _LAST.index(name) if name in _LAST else -1)
    return {name: options[name] for name in order}


def complete(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """Return options with the defaults of those that are missing."""
    defaults = {name: option.default for name, option in definitions(kind).items()}
    return cast(Options, {**defaults, **options})


def select(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """Return those options that are of a kind."""
    return cast(Options, {name: options[name] for name in definitions(kind) if name in options})


def takes(kind: type[Any]) -> Callable[[Function], Function]:
    """Give a function that takes ``**options: Unpack[kind]`` the signature, defaults and docstring of its options.

    The docstring's entry ``**options`` is replaced by one for each option; calls get every option, and unknown names
    are refused with a :class:`TypeError` that names the closest one.
    """
    options = definitions(kind)
    defaults = {name: option.default for name, option in options.items()}

    def decorate(function: Function) -> Function:
        signature = _signature(function, kind, options)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            for name in named:
                if name not in signature.parameters:
                    raise TypeError(_unexpected(function.__name__, name, signature.parameters))
            return function(*arguments, **(defaults | named))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = document(function.__doc__ or "", options)
        return cast(Function, call)

    return decorate


def _signature(function: Callable[..., Any], kind: type[Any], options: Mapping[str, Option]) -> inspect.Signature:
    """Return a function's signature with each option in the place of ``**options``."""
    signature = inspect.signature(function)
    explicit = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    further = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_annotation(kind, name)
        )
        for name, option in options.items()
    ]
    return signature.replace(parameters=[*explicit, *further])


def _annotation(kind: type[Any], name: str) -> Any:
    annotation = get_args(kind.__annotations__[name])[0]
    return getattr(annotation, "__forward_arg__", annotation)


def _unexpected(function: str, name: str, parameters: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, parameters, n=1)
    return f"{function}() got an unexpected keyword argument {name!r}" + (
        f". Did you mean {close[0]!r}?" if close else ""
    )


def document(doc: str, options: Mapping[str, Option]) -> str:
    """Return a docstring in which the entry ``**options`` is replaced by one for each option."""
    lines = doc.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith("**options"))
    indent = len(lines[start]) - len(lines[start].lstrip())
    stop = start + 1
    while stop < len(lines) and lines[stop].startswith(" " * (indent + 1)):
        stop += 1
    entries = []
    for name, option in options.items():
        entries.append(f"{' ' * indent}{name} : {option.type}")
        entries.append(textwrap.indent("\n".join(textwrap.wrap(option.doc, 116 - indent)), " " * (indent + 4)))
    return "\n".join([*lines[:start], *entries, *lines[stop:]])

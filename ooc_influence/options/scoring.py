"""Options of scoring: scores, lists, self-influence, selections, pages."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict, get_args

from ooc_influence.options.option import Option
from ooc_influence.options.shared import Resumable, Striped

if TYPE_CHECKING:
    from ooc_influence.curvature import Curvature
    from ooc_influence.store import GradientStore, PathLike

AnyCurvature: TypeAlias = "Curvature | PathLike | Literal[False] | None"
DampingMode = Literal["relative", "absolute"]
Normalize = Literal["none", "cosine", "train"]
Combine = Literal["mean", "query-margins", "margins"]
Product = Literal["auto", "float32", "bfloat16", "int8"]
ProductName = Literal["float32", "bfloat16", "int8"]
ScoresDtype = Literal["float32", "float16"]


# fmt: off
class Damped(TypedDict, total=False):
    """Which curvature and λ there are."""

    curvature: Annotated["AnyCurvature | Sequence[AnyCurvature]", Option(
        None, "Curvature, str, path or False, or a list with one for each checkpoint",
        'An object, a name in the train store, or a path; default the one named ``"default"``. False: none, for plain '
        'dot products g_qᵀ g_i (with ``normalize="cosine"`` the cosine of the gradients). ``"trajectory"``: dot '
        "products with what the rows of a training did to its final weights (:func:`fit_trajectory`).",
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
        "What --damping is: relative (λ = damping · tr(F)/min(d, m)) or absolute (λ = damping).",
        choices=get_args(DampingMode))]


class DampedOptions(Damped, Striped, total=False):
    """Which curvature and λ scores are computed with, and where."""

    device: Annotated[str | None, Option(
        None, "str, optional", 'Multiply there with torch, such as ``"cuda"``; default NumPy\'s BLAS.',
        "Where to multiply, such as cuda. Default: NumPy's BLAS on the CPU.")]


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
        "Divide scores by both norms (cosine: they are in [-1, 1]) or by the train row's (train: RelatIF). Default: "
        "none; in lists of a language model's rows train.", choices=get_args(Normalize))]


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
        "Divide scores by both norms (cosine), by the train row's (train) or by none.",
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
# fmt: on

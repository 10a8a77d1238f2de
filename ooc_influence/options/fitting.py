"""Options of fitting a curvature."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from ooc_influence.options.option import Option
from ooc_influence.options.shared import Derived, Striped

if TYPE_CHECKING:
    import numpy.typing as npt

    from ooc_influence.curvature import Curvature
    from ooc_influence.store import PathLike

Weighting = Literal["ggn", "trak"]
Blocks = Literal["module", "diagonal"]
Between = Literal["diagonal", "kronecker"]


# fmt: off
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
        "Save the curvature there instead of in the store.", kind="path", metavar="PATH")]
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


class TrajectoryOptions(Derived, total=False):
    """What the effects of a training's rows on the final weights take."""

    between: Annotated[Between | None, Option(
        None, '{"diagonal", "kronecker"}, optional',
        "Let the gradients of later steps follow the weights, by a curvature of the mean loss that is diagonal in the "
        "rows' entries: the mean square of the rows' entries, or Λ of their Kronecker basis. Default: later gradients "
        "are held.",
        "Let gradients of later steps follow the weights, by the mean squares of the rows' entries or the Λ of their "
        "Kronecker basis. Default: they are held.", choices=get_args(Between))]
    segments: Annotated[int, Option(
        1, "int",
        'With ``between="diagonal"``, take the mean squares of each of this many segments of the training apart, of as '
        "many steps each, from the rows that were collected in it, as SOURCE (arXiv 2405.12186) does.",
        "With --between diagonal, take the mean squares of each of L segments of the training apart, as SOURCE does.",
        kind=int, metavar="L")]
    dtype: Annotated[str, Option(
        "float16", '{"float16", "bfloat16", "float32"}', "Representation of the effects on disk.",
        "Representation of the effects.", choices=("float16", "bfloat16", "float32"))]
    out: Annotated["PathLike | None", Option(
        None, "path, optional",
        "Write the effects there instead of to the folder ``trajectory`` of the store; scores take this path.",
        "Write the effects there instead of into the store; --curvature takes this path.", kind="path",
        metavar="PATH")]
    refit: Annotated[bool, Option(
        False, "bool", "Write them again although they are there; by default these are returned.",
        "Write them again although they are there.")]
# fmt: on

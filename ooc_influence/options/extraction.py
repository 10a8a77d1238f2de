"""Options of extracting gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_args

from ooc_influence.options.option import Option
from ooc_influence.options.shared import DTYPE_NAMES, DTYPES, Budgeted, Reporting

if TYPE_CHECKING:
    import torch

    from ooc_influence.compress import Compressor
    from ooc_influence.extract import AdamMetric, Batches, BudgetBatches, CheckpointSource, ModuleSelection, Selector
    from ooc_influence.store import GradientStore, PathLike, Storage

OnNonFinite = Literal["raise", "skip"]
LabelKind = Literal["dataset", "sampled"]
DampingScope = Literal["layer", "model"]


# fmt: off
class KeptEntries(TypedDict, total=False):
    """What is kept of a model's gradients, and how."""

    compressor: Annotated["Compressor | Callable[[int], Compressor] | None", Option(
        None, "Dropout, Gaussian, Rademacher, Sjlt, Grass, LoGra, Pca or Identity, optional",
        "What to keep of each gradient; default ``Dropout()``. Also a function of p, the entries of the tapped layers, "
        "that returns one.")]
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
        "float16", DTYPE_NAMES,
        "Representation on disk; float16, int8, int4 and sign have a float32 scale a row.",
        "Representation on disk; float16, int8, int4 and sign have a scale a row.", choices=DTYPES)]
    storage: Annotated["Storage | None", Option(None, "Storage, optional", "Chunking and codec.")]


class ExtractionOptions(KeptEntries, Budgeted, Reporting, total=False):
    """What of a model's gradients is stored, and how."""

    like: Annotated["GradientStore | PathLike | None", Option(
        None, "GradientStore or path, optional",
        "A train store whose mask to use instead: makes a query store. The model must be the same.",
        "Make a query store with the mask and basis of this train store.", kind="path", metavar="TRAIN")]
    device: Annotated["torch.device | str | None", Option(
        None, "torch.device or str, optional", "Where to run; default where the model is.",
        "Where to run, such as cuda. Default: where the model is.")]
    labels: Annotated[LabelKind, Option(
        "dataset", '{"dataset", "sampled"}',
        '``"sampled"``: losses of this package (:func:`cross_entropy`, :func:`token_cross_entropy`, those of Hugging '
        "Face models) replace the labels by draws from the model's predictions, so that F of the rows is the true "
        "Fisher matrix. A draw depends on seed, row and token alone. If the loss draws none, a warning says so, and "
        "rows have the data set's labels.",
        "Whether labels are the data's, or drawn from the model's predictions (sampled), for rows whose F is the true "
        "Fisher matrix.",
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


class Described(TypedDict, total=False):
    """What rows are of."""

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


class InitOptions(ExtractionOptions, Described, total=False):
    """What fixes a store that extraction fills."""


class Writing(TypedDict, total=False):
    """What is done with rows that cannot be written."""

    on_nonfinite: Annotated[OnNonFinite, Option(
        "raise", '{"raise", "skip"}',
        "What to do with a sample whose loss or gradient has NaN or Inf: stop and name it, or record it as a dropped "
        "row.",
        "Samples with NaN or Inf: stop and name them, or record them as dropped rows.", choices=get_args(OnNonFinite))]


class Sharded(Writing, total=False):
    """How a run writes."""

    shard: Annotated[tuple[int, int] | None, Option(
        None, "(int, int), optional",
        "This process is writer i of N (from 0) that fill one store together, on one machine or several that see the "
        "same folder or object store. The number of rows has to be known: from the batches, or from "
        ":func:`init_store`. A writer whose share is finished does nothing.",
        "Be writer I of N (from 0) that fill one store together; see init.", metavar="I/N")]


class ExtractOptions(InitOptions, Sharded, total=False):
    """What an extraction takes."""


class CollectOptions(KeptEntries, Described, Writing, Budgeted, Reporting, total=False):
    """What is collected of a training."""

    loss: Annotated[Literal["mean", "sum"], Option(
        "mean", '{"mean", "sum"}',
        "Whether a batch's loss is the mean of its samples' losses or their sum, where a step is not given weights.")]
    every: Annotated[int, Option(1, "int", "Collect the rows of every such step.")]
    average: Annotated[bool, Option(
        False, "bool",
        "Store one row for each sample, the average of its rows over the steps that it is in. Rows are added to the "
        "averages by :meth:`Collector.fold`, at the end of an epoch, and when the context ends.")]
    optimizer: Annotated["torch.optim.Optimizer | Literal[True] | None", Option(
        None, "torch.optim.Optimizer, optional",
        "Record the state of this optimiser (SGD, Adam or AdamW of torch) at the kept entries at each step, for "
        ":func:`fit_trajectory`, and, in a column ``weight``, by what each sample's loss was multiplied. True for that "
        "of a Trainer.")]
    optimizer_every: Annotated[int, Option(
        1, "int",
        "Record Adam's moments at every such step; in between, those of the last are taken, and the mean gradient for "
        "the batch's.")]
    columns: Annotated[Sequence[str], Option(
        (), "sequence of str", "Further per-row values that every step is given, such as ``epoch`` or ``lr``.")]
    select: Annotated["Selector | None", Option(
        None, "OnlineSelection, optional",
        "Choose among each batch's samples by their scores on fixed queries (:func:`online_selection`), whose mask "
        "rows then have. Every step calls ``select`` of what it yields; columns ``score`` and ``chosen`` say what was "
        "chosen.")]
    check_gradients: Annotated[bool, Option(
        True, "bool",
        "Compare the entries of the first batch, summed over its samples, with the gradients that parameters receive.")]
# fmt: on

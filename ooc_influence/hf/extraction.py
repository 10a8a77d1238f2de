"""Extraction for Hugging Face models: a model, a file, a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import numpy as np

from ooc_influence.compress import DefaultDropout, RowBudget
from ooc_influence.corpus import Documents, is_hub_id, local_path, usual_form
from ooc_influence.errors import InputError, StoreNotFoundError, counted
from ooc_influence.extract import (
    BudgetBatches,
    RowChoice,
    by_path,
    even_numbers,
    extract_gradients,
    init_store,
    loaded,
    parse_device,
    run_shards,
)
from ooc_influence.hf.labels import Labels
from ooc_influence.hf.losses import CausalLoss, ClassificationLoss, PolicyGradientLoss, SignedLoss, class_logits
from ooc_influence.hf.models import Loaded, load, load_reference, open_documents
from ooc_influence.hf.padding import ClassifierCollator, Collator, choose_side, context_length, longest_row
from ooc_influence.hf.preference import PairCollator, PreferenceLoss
from ooc_influence.hf.samples import SPANS, Samples
from ooc_influence.hf.tokens import Fields
from ooc_influence.options import (
    ExtractionOptions,
    FieldOptions,
    HuggingFaceOptions,
    JobOptions,
    LoadingOptions,
    definitions,
    select,
    takes,
)
from ooc_influence.store import GradientStore, PathLike, StorePath, column_dtype, parse_path

logger = logging.getLogger("ooc_influence")
_TOKENS, _TOKENS_CPU = 8192, 2048  # of a batch, by default: on a CPU, more gain nothing and their logits take GiBs


class Job(NamedTuple):
    """A model and its data, ready for :func:`extract_gradients`.

    Attributes
    ----------
    model : nn.Module
        The model.
    per_sample_loss : callable
        Its loss.
    batches : BudgetBatches
        The rows.
    samples : Samples
        What they are made from.
    loss_kind : str
        As recorded.
    """

    model: Any
    per_sample_loss: Any
    batches: BudgetBatches
    samples: Samples
    loss_kind: str


@takes(JobOptions)
def prepare(model: str | Path | Loaded, data: Any, **options: Unpack[JobOptions]) -> Job:
    """Load a model and make rows of documents.

    Parameters
    ----------
    model, data
        As for :func:`extract`.
    **options : JobOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError
        For settings that do not go together, or data that cannot be read.
    """
    asked: dict[str, Any] = dict(select(FieldOptions, options))
    forms = ("text", "prompt", "completion", "messages", "chosen", "rejected", "input_ids")
    if all(asked[name] is None for name in forms):
        data = _open(data, options)
        form = {"text": "text"} if asked["label"] is not None else usual_form(data)
        asked |= form
        if form != {"text": "text"}:
            logger.info("fields of %s: %s", data.name, ", ".join(f"{kind} {name}" for kind, name in form.items()))
    fields = Fields(**{**asked, "keep": tuple(asked["keep"])})
    if not isinstance(model, Loaded):
        device = None if options["device"] is None else str(options["device"])
        model = load(model, dtype=options["model_dtype"], device=device, **select(LoadingOptions, options))
    return _make_job(model, data, fields, options)


def job_of(store: GradientStore, loaded: Loaded, data: Any = None, *, progress: bool | None = None) -> Job:
    """Return a loaded model and the samples that a store's rows were made of, by what the store recorded.

    Parameters
    ----------
    store : GradientStore
        Made by :func:`extract`.
    loaded : Loaded
        Its model.
    data : str, path or object, optional
        Its documents; by default those at the path it recorded.
    progress : bool, optional
        Show a progress line; silent by default.

    Raises
    ------
    InputError
        For a store that recorded no fields, or no path of documents where none are given, or other documents.
    """
    fields, path = recorded_documents(store, data)
    origin = store.attrs["origin"]
    names = definitions(JobOptions)
    recorded = {name: value for name, value in (origin | fields).items() if name in names}
    recorded["documents"] = origin.get("chosen_documents")  # "documents" are all that the file has
    defaults = {name: option.default for name, option in names.items()}
    return _make_job(loaded, path, Fields(**fields), cast(JobOptions, {**defaults, **recorded, "progress": progress}))


def recorded_documents(store: GradientStore, data: Any = None) -> tuple[dict[str, Any], Any]:
    """Return the fields of the documents that a store recorded, and the documents: ``data``, or their recorded path.

    Raises
    ------
    InputError
        For a store that recorded none.
    """
    origin = store.attrs.get("origin") or {}
    fields, path = origin.get("fields"), origin.get("data") if data is None else data
    if not fields or path is None:
        raise InputError(
            f"expected a store made from documents, which records where they are; received {store.path}: name them "
            "(--data, --query-data), or give the recipe (--recipe; of verify-influence, --train)"
        )
    return fields, path


def _make_job(loaded: Loaded, data: Any, fields: Fields, options: JobOptions) -> Job:
    output, batch_size, max_length = options["output"], options["batch_size"], options["max_length"]
    documents = options["documents"]
    if output not in ("gradients", "curvature"):
        raise InputError(f"expected output 'gradients' or 'curvature'; received {output!r}")
    if (loaded.task == "classification") != (fields.label is not None):
        raise InputError(
            f"expected {'text and label' if fields.label is None else 'no label'} for a model for {loaded.task}; "
            f"received label={fields.label!r}"
        )
    if output == "curvature" and loaded.task != "causal-lm":
        raise InputError(
            "expected a language model for output='curvature'; received a classifier, whose rows are curvature already"
        )
    if output == "curvature" and (fields.chosen is not None or fields.advantage is not None):
        raise InputError(
            "expected texts, completions, chats or tokens for output='curvature'; received "
            f"{'preferences' if fields.advantage is None else 'advantages'}: it is of token losses"
        )
    per_sample_loss, kind = _loss(loaded, fields, options)
    source = _open(data, options)
    numbers = None
    if documents is not None and documents < len(source):
        numbers = even_numbers(len(source), documents)
    limit = longest_row(loaded.model, alone=batch_size == 1)
    if max_length is not None and limit is not None and max_length > limit:
        alone = longest_row(loaded.model, alone=True) or limit
        more = f": or batch_size=1 (--batch-size 1), for up to {alone}" if alone >= max_length else ""
        raise InputError(f"expected max_length <= {limit}, the model's context; received {max_length}{more}")
    length = max_length or context_length(loaded.model, loaded.tokenizer)
    labels = None
    if fields.label is not None:
        labels = Labels(loaded.model.config, source.features.get(fields.label), fields.label)
    samples = Samples(
        source,
        loaded.tokenizer,
        fields,
        length,
        labels=labels,
        numbers=numbers,
        on_missing=options["on_missing"],
        progress=options["progress"],
    )
    for count, lack in ((samples.without_target, "a target token"), (samples.missing, "a text")):
        if count:
            without = f"without {lack}"
            logger.warning(counted(count, f"document {without} is left out", f"documents {without} are left out"))
    if samples.truncated:
        logger.warning("%s cut to %d tokens", counted(samples.truncated, "text is", "texts are"), length)
    tokens_to_pad = (getattr(loaded.tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "unk"))
    pad = next((token for token in tokens_to_pad if token is not None), 0)
    collate: Any = Collator(int(pad), options["sign_seed"] if output == "curvature" else None)
    if fields.chosen is not None:
        collate = PairCollator(int(pad))
    if labels is not None:
        collate = _classifier_collator(loaded, samples, batch_size)
    tokens = options["tokens"]
    if tokens is None:
        tokens = _TOKENS_CPU if loaded.model.device.type == "cpu" else _TOKENS
    batches = BudgetBatches(samples, collate, lengths=samples.lengths, tokens=tokens, batch_size=batch_size)
    if labels is not None:
        per_sample_loss, kind = ClassificationLoss(labels.loss), labels.loss
    return Job(loaded.model, per_sample_loss, batches, samples, kind)


def _open(data: Any, options: JobOptions) -> Documents:
    return open_documents(
        data, options["split"], config=options["config"], streaming=options["streaming"], first=options["documents"]
    )


def _loss(loaded: Loaded, fields: Fields, options: JobOptions) -> tuple[Any, str]:
    """Return the loss of a language model, and its kind."""
    preference, reference, beta = options["preference"], options["reference"], options["beta"]
    reduction, weights = options["reduction"], options["weights"]
    if fields.chosen is None:
        default = {name: option.default for name, option in definitions(JobOptions).items()}
        foreign = [name for name in ("preference", "beta", "reference") if cast(Any, options)[name] != default[name]]
        if foreign:
            raise InputError(
                f"expected {foreign[0]} (--{foreign[0]}) with chosen and rejected; received it without: name their "
                "fields (--chosen, --rejected)"
            )
        if options["output"] == "curvature":
            return SignedLoss(weights, mean=reduction == "mean"), f"signed_tokens_{weights or 'plain'}"
        if fields.advantage is not None:
            return PolicyGradientLoss(reduction), f"policy_gradient_{reduction}"
        return CausalLoss(reduction), f"token_cross_entropy_{reduction}"
    if preference == "log-odds":
        if reference is not None:
            raise InputError("expected --preference dpo with a reference; received log-odds, which has none")
        return PreferenceLoss(beta), f"preference_log_odds_{beta:g}"
    if preference != "dpo":
        raise InputError(f"expected preference 'dpo' or 'log-odds' (--preference); received {preference!r}")
    if reference is None:
        if not hasattr(loaded.model, "disable_adapter"):
            raise InputError(
                "expected a reference for DPO's loss of a model without an adapter; received none: give the model that "
                "training began with (--reference), or leave the reference out of the loss (--preference log-odds)"
            )
        return PreferenceLoss(beta, "adapter"), f"preference_dpo_{beta:g}"
    other = load_reference(
        reference, dtype=options["model_dtype"], trust_remote_code=options["trust_remote_code"],
        allow_pickle=options["allow_pickle"],
    )  # fmt: skip
    sizes = [int(model.get_input_embeddings().weight.shape[0]) for model in (other, loaded.model)]
    if sizes[0] < sizes[1]:
        raise InputError(
            f"expected a reference with the model's vocabulary of {sizes[1]} tokens; received {reference} with "
            f"{sizes[0]}: give the model that training began with (--reference)"
        )
    return PreferenceLoss(beta, other), f"preference_dpo_{beta:g}"


def _classifier_collator(loaded: Loaded, samples: Samples, batch_size: int | None) -> ClassifierCollator:
    """Return the collator that pads texts on the side that the classifier expects."""
    make = partial(ClassifierCollator.of, loaded.model, loaded.tokenizer)
    lengths = samples.lengths
    if batch_size == 1 or lengths.min() == lengths.max():
        return make()  # nothing will be padded
    shortest = int(lengths.argmin())
    longer = int(np.where(lengths > lengths[shortest], lengths, lengths.max()).argmin())
    return make(choose_side(loaded.model, samples[shortest], samples[longer], make, class_logits))


@takes(HuggingFaceOptions)
def extract(
    model: str | Path | Loaded,
    data: Any,
    store: PathLike,
    *,
    rows_only: bool = False,
    **options: Unpack[HuggingFaceOptions],
) -> GradientStore:
    """Extract gradients of a Hugging Face model over a file of documents.

    Without a ``compressor``: 65536 entries (fewer for small models), of language models in the Kronecker basis, else of
    parameters by importance; reduced to 4096 numbers only where the store would be larger than 64 GiB.

    Parameters
    ----------
    model : str, path or Loaded
        A folder or hub id (of a model, or a PEFT adapter); or what :func:`load` returned.
    data : path or object
        A file, a pattern such as ``dir/*.jsonl``, a folder, a data set of the hub, or an object:
        :func:`ooc_influence.corpus.open_documents`.
    store : path
        The store to write, or to resume.
    rows_only : bool
        Make the store for ``shard=`` writers to fill, and its mask and basis, without any rows.
    **options : HuggingFaceOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading; a row a document, or several where one is longer than the context.

    Raises
    ------
    InputError
        For fields, files or models that cannot be used together.
    MissingExtraError
        Without the extra ``hf``.
    OocInfluenceError
        See :func:`extract_gradients`.
    """
    if options["output"] == "curvature" and options["like"] is None:
        raise InputError("expected like=, a train store, for output='curvature'; received none: it fixes the mask")
    if options["output"] == "curvature" and options["labels"] == "sampled":
        raise InputError(
            "expected either output='curvature' or labels='sampled' (--output curvature, --labels sampled); received "
            "both: random signs already stand for the labels' distribution"
        )
    if options["labels"] == "sampled" and (options["chosen"] is not None or options["advantage"] is not None):
        raise InputError(
            "expected labels='dataset' (--labels) for preferences and advantages; received 'sampled': their losses are "
            "no log-probability of a label that could be drawn"
        )
    job = prepare(model, data, **select(JobOptions, options))
    settings = select(ExtractionOptions, options)
    rows = RowChoice(options["sample"], options["draws"]).count(len(job.samples)) or 0
    compressor: Any = settings["compressor"]
    if compressor is None and settings["like"] is None:
        compressor = DefaultDropout()
    adapter = hasattr(job.model, "peft_config")
    if isinstance(compressor, RowBudget) and adapter:
        settings["compressor"] = compressor.for_adapter()
    if isinstance(compressor, DefaultDropout):
        settings["compressor"] = compressor.sized(rows, settings["dtype"], job.loss_kind, adapter=adapter)
    if options["output"] == "curvature" and settings["checkpoints"] is None:
        settings["checkpoints"] = ()  # a curvature is the model's own
    if settings["device"] == "auto":
        settings["device"] = None
    record: Any = {"loss_kind": job.loss_kind, "origin": _origin(model, data, job, options)}
    ids, columns = job.samples.ids(), _columns(job.samples, store)
    if rows_only:
        kinds = {name: column_dtype(values[:64]) for name, values in columns.items()}
        return init_store(
            job.model, store, rows, ids="str", columns=kinds, per_sample_loss=job.per_sample_loss,
            pilot=job.batches, **settings, **record,
        )  # fmt: skip
    parse_device(job.model, settings["device"])
    return extract_gradients(
        job.model, job.per_sample_loss, job.batches, store, ids=ids, columns=columns, shard=options["shard"],
        on_nonfinite=options["on_nonfinite"], **settings, **record,
    )  # fmt: skip


def extract_shards(
    model: str | Path,
    data: str | Path,
    store: PathLike,
    *,
    shards: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> GradientStore:
    """Extract on the ambient Dask cluster, each worker loading model and documents from where they are.

    Parameters
    ----------
    model, data : str or path
        As for :func:`extract`; workers must see them.
    store : path
        The store to write; workers must see it.
    shards : int, optional
        As for :func:`ooc_influence.extract_shards`.
    progress : bool, optional
        Show a progress line; silent by default.
    **options
        As for :func:`extract`; ``metric`` is a path.

    Returns
    -------
    GradientStore
        Open for reading.

    Raises
    ------
    InputError, ClusterError
        As for :func:`ooc_influence.extract_shards`, and for models or data given as objects.
    OocInfluenceError
        See :func:`extract`.
    """
    if not isinstance(model, (str, Path)) or not isinstance(data, (str, Path)):
        raise InputError("expected paths of the model and the data for shards; received objects: workers load them")
    path = parse_path(store)
    source = str(Path(model).absolute()) if Path(model).exists() else str(model)  # or a name on the hub
    documents = str(data)
    if not is_hub_id(data):
        documents = os.path.abspath(local_path(data))  # noqa: PTH100 - of a pattern, too
    write = partial(_extract, source, documents, path, by_path(options))
    return run_shards(path, partial(write, rows_only=True), write, shards, progress)


def _extract(model: str, data: str, store: StorePath, options: dict[str, Any], **more: Any) -> None:
    extract(model, data, store, **loaded(options), **more)


def _origin(model: Any, data: Any, job: Job, options: HuggingFaceOptions) -> dict[str, Any]:
    """Return the record of a store's model and documents, by which a row's text is found again."""
    samples = job.samples
    recorded = (
        "split", "config", "streaming", "adapter", "revision", "reduction", "output", "weights", "sign_seed",
        "on_missing", "preference", "beta", "reference",
    )  # fmt: skip
    asked: Mapping[str, Any] = options
    defaults = {name: option.default for name, option in definitions(HuggingFaceOptions).items()}
    return {
        "model": str(getattr(job.model, "name_or_path", "")) if isinstance(model, Loaded) else str(model),
        "data": str(data) if isinstance(data, (str, Path)) else None,
        "documents": samples.documents, "fields": samples.fields.all, "max_length": samples.max_length,
        **({} if asked["documents"] is None else {"chosen_documents": asked["documents"]}),
        **{name: _as_json(asked[name]) for name in recorded if asked[name] != defaults[name]},
    }  # fmt: skip


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _columns(samples: Samples, store: PathLike) -> dict[str, Any]:
    """Return the columns of rows; for a store made before there were spans, without them."""
    columns = samples.columns()
    try:
        present = GradientStore.open(store).layout.columns
    except StoreNotFoundError:
        return columns
    return {name: values for name, values in columns.items() if name in present or name not in SPANS}

"""Extraction for Hugging Face models: a model, a file, a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ooc_influence.compress import DEFAULT_REDUCED, DEFAULT_WIDE, Compressor, Dropout, Eigenbasis
from ooc_influence.corpus import local_path
from ooc_influence.errors import InputError, StoreNotFoundError, counted
from ooc_influence.extract import (
    BudgetBatches,
    ModuleSelection,
    by_path,
    extract_gradients,
    init_store,
    loaded,
    parse_device,
    run_shards,
)
from ooc_influence.hf.labels import Labels
from ooc_influence.hf.losses import CausalLoss, ClassificationLoss, SignedLoss, class_logits
from ooc_influence.hf.models import Loaded, load, open_documents
from ooc_influence.hf.padding import ClassifierCollator, Collator, choose_side, context_length, longest_row
from ooc_influence.hf.samples import SPANS, Samples
from ooc_influence.hf.tokens import Fields
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


def prepare(
    model: str | Path | Loaded,
    data: Any,
    fields: Fields,
    *,
    split: str | None = None,
    max_length: int | None = None,
    tokens: int | None = None,
    batch_size: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    output: Literal["gradients", "curvature"] = "gradients",
    documents: int | None = None,
    weights: Literal["ggn"] | None = None,
    sign_seed: int = 0,
    on_missing: Literal["raise", "skip"] = "raise",
    progress: bool | None = None,
    **loading: Any,
) -> Job:
    """Load a model and make rows of a file; see :func:`extract`.

    Raises
    ------
    InputError
        For settings that do not go together, or data that cannot be read.
    """
    loaded = model if isinstance(model, Loaded) else load(model, **loading)
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
    source = open_documents(data, split)
    numbers = None
    if documents is not None and documents < len(source):
        numbers = np.unique(np.linspace(0, len(source) - 1, documents).round().astype(np.int64))
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
        on_missing=on_missing,
        progress=progress,
    )
    for count, lack in ((samples.without_target, "a target token"), (samples.missing, "a text")):
        if count:
            without = f"without {lack}"
            logger.warning(counted(count, f"document {without} is left out", f"documents {without} are left out"))
    if samples.truncated:
        logger.warning("%s cut to %d tokens", counted(samples.truncated, "text is", "texts are"), length)
    tokens_to_pad = (getattr(loaded.tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "unk"))
    pad = next((token for token in tokens_to_pad if token is not None), 0)
    collate: Any = Collator(int(pad), sign_seed if output == "curvature" else None)
    if labels is not None:
        collate = _classifier_collator(loaded, samples, batch_size)
    if tokens is None:
        tokens = _TOKENS_CPU if loaded.model.device.type == "cpu" else _TOKENS
    batches = BudgetBatches(samples, collate, lengths=samples.lengths, tokens=tokens, batch_size=batch_size)
    kind: str = "cross_entropy" if labels is None else labels.loss
    loss: Any = None if labels is None else ClassificationLoss(labels.loss)
    if loaded.task == "causal-lm":
        loss, kind = CausalLoss(reduction), f"token_cross_entropy_{reduction}"
        if output == "curvature":
            loss, kind = SignedLoss(weights, mean=reduction == "mean"), f"signed_tokens_{weights or 'plain'}"
    return Job(loaded.model, loss, batches, samples, kind)


def _classifier_collator(loaded: Loaded, samples: Samples, batch_size: int | None) -> ClassifierCollator:
    """Return the collator that pads texts on the side that the classifier expects."""
    make = partial(ClassifierCollator.of, loaded.model, loaded.tokenizer)
    lengths = samples.lengths
    if batch_size == 1 or lengths.min() == lengths.max():
        return make()  # nothing will be padded
    shortest = int(lengths.argmin())
    longer = int(np.where(lengths > lengths[shortest], lengths, lengths.max()).argmin())
    return make(choose_side(loaded.model, samples[shortest], samples[longer], make, class_logits))


def open_job(
    model: str | Path | Loaded,
    data: Any,
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    label: str | None = None,
    id: str | None = None,  # noqa: A002 - the field's name is what users call it
    keep: Sequence[str] = (),
    chat: bool = False,
    device: torch.device | str | None = None,
    **preparing: Any,
) -> Job:
    """Return model, loss and batches of documents; the arguments are those of :func:`extract`.

    Raises
    ------
    InputError
        See :func:`extract`.
    """
    if all(field is None for field in (text, prompt, completion, messages)):
        text = "text"
    if "model_dtype" in preparing:
        preparing["dtype"] = preparing.pop("model_dtype")
    if device is not None and not isinstance(model, Loaded):
        preparing["device"] = str(device)
    return prepare(model, data, Fields(text, prompt, completion, messages, label, id, tuple(keep), chat), **preparing)


def extract(
    model: str | Path | Loaded,
    data: Any,
    store: PathLike,
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    label: str | None = None,
    id: str | None = None,  # noqa: A002 - the field's name is what users call it
    keep: Sequence[str] = (),
    chat: bool = False,
    compressor: Compressor | None = None,
    like: GradientStore | PathLike | None = None,
    modules: ModuleSelection = None,
    dtype: str = "float16",
    device: torch.device | str | None = None,
    rows_only: bool = False,
    options: dict[str, Any] | None = None,
    progress: bool | None = None,
    **preparing: Any,
) -> GradientStore:
    """Extract gradients of a Hugging Face model over a file of documents.

    Parameters
    ----------
    model : str, path or Loaded
        A folder or hub id (of a model, or a PEFT adapter); or what :func:`load` returned.
    data : path or object
        A file, a pattern such as ``dir/*.jsonl``, a folder saved by ``datasets``, or an object:
        :func:`ooc_influence.corpus.open_documents`.
    store : path
        The store to write, or to resume.
    text, prompt, completion, messages, label, id, keep, chat
        Which fields are what: :class:`Fields`. Default: the field ``text``.
    compressor : Dropout, Gaussian, Rademacher, Sjlt, Grass, LoGra, Pca or Identity, optional
        Default: importance dropout of 65536 entries, reduced to 4096 numbers (fewer for small models or data).
    like : GradientStore or path, optional
        Make a query store of this train store.
    modules, dtype, device, progress
        As for :func:`extract_gradients`.
    rows_only : bool
        Make the store for ``shard=`` writers to fill, and its mask and basis, without any rows.
    options : dict, optional
        Further arguments of :func:`extract_gradients`: ``shard``, ``storage``, ``on_nonfinite``, ...
    **preparing
        ``split`` of a folder; ``on_missing="skip"`` to leave out documents whose text is missing; ``max_length`` of a
        row in tokens; ``tokens`` and ``batch_size``, the budget of a batch; ``reduction`` of token losses, "mean" or
        "sum"; ``output="curvature"`` for rows with random signs
        (:class:`SignedLoss`; with ``like``, ``documents``, ``weights``, ``sign_seed``); and those of :func:`load`:
        ``task``, ``model_dtype``, ``adapter``, ``tokenizer``, ``revision``, ``trust_remote_code``, ``allow_pickle``.

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
    if preparing.get("output") == "curvature" and like is None:
        raise InputError("expected like=, a train store, for output='curvature'; received none: it fixes the mask")
    job = open_job(
        model, data, text=text, prompt=prompt, completion=completion, messages=messages, label=label, id=id, keep=keep,
        chat=chat, device=device, progress=progress, **preparing,
    )  # fmt: skip
    chosen: Any = compressor
    if compressor is None and like is None:
        chosen = partial(default_compressor, rows=len(job.samples))
    arguments = {
        "compressor": chosen, "like": like, "modules": modules, "dtype": dtype, "loss_kind": job.loss_kind,
        "progress": progress, "device": None if device == "auto" else device, **(options or {}),
    }  # fmt: skip
    arguments["origin"] = _origin(model, data, job, preparing)
    ids, columns = job.samples.ids(), _columns(job.samples, store)
    if rows_only:
        kinds = {name: column_dtype(values[:64]) for name, values in columns.items()}
        arguments = {name: value for name, value in arguments.items() if name not in ("shard", "on_nonfinite")}
        return init_store(
            job.model, store, len(job.samples), ids="str", columns=kinds, per_sample_loss=job.per_sample_loss,
            pilot=job.batches, **arguments,
        )  # fmt: skip
    parse_device(job.model, arguments["device"])
    return extract_gradients(job.model, job.per_sample_loss, job.batches, store, ids=ids, columns=columns, **arguments)


def extract_shards(
    model: str | Path,
    data: str | Path,
    store: PathLike,
    *,
    shards: int | None = None,
    progress: bool | None = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
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
    options, **arguments
        As for :func:`extract`.

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
    documents = os.path.abspath(local_path(data))  # noqa: PTH100 - of a pattern, too
    write = partial(_extract, source, documents, path, by_path(options or {}), by_path(arguments))
    return run_shards(path, partial(write, rows_only=True), write, shards, progress)


def _extract(
    model: str, data: str, store: StorePath, options: dict[str, Any], arguments: dict[str, Any], *,
    shard: tuple[int, int] | None = None, rows_only: bool = False,
) -> None:  # fmt: skip
    extract(model, data, store, rows_only=rows_only, options=loaded(options) | {"shard": shard}, **arguments)


def default_compressor(p: int, rows: int) -> Dropout:
    """Return importance dropout reduced to an eigenbasis, of sizes that a model's p entries and its data can fill."""
    k = min(DEFAULT_WIDE, p)
    r = min(DEFAULT_REDUCED, k, max(1, rows // 2))
    return Dropout(k=k, sampling="importance", reduce=Eigenbasis(r=r))


def _origin(model: Any, data: Any, job: Job, preparing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a store's model and documents, by which a row's text is found again."""
    samples, named = job.samples, ("split", "adapter", "revision", "reduction", "output", "weights", "sign_seed")
    return {
        "model": str(getattr(job.model, "name_or_path", "")) if isinstance(model, Loaded) else str(model),
        "data": str(data) if isinstance(data, (str, Path)) else None,
        "documents": samples.documents, "fields": samples.fields.all, "max_length": samples.max_length,
        **{name: preparing[name] for name in named if preparing.get(name) is not None},
    }  # fmt: skip


def _columns(samples: Samples, store: PathLike) -> dict[str, Any]:
    """Return the columns of rows; for a store made before there were spans, without them."""
    columns = samples.columns()
    try:
        present = GradientStore.open(store).layout.columns
    except StoreNotFoundError:
        return columns
    return {name: values for name, values in columns.items() if name in present or name not in SPANS}

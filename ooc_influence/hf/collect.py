"""Rows of a transformers Trainer's own training: a callback that collects them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ooc_influence.errors import InputError, MismatchError
from ooc_influence.extract import Collector, PerSampleLoss, collect, earlier_rows
from ooc_influence.hf.training_pilot import training_pilot
from ooc_influence.options import CollectOptions, takes
from ooc_influence.store import PathLike

_STATE = "ooc_influence.json"  # in a checkpoint's folder: where the store was when it was saved
_NOT_BEGUN = {"generation": 0, "rows": 0, "step": -1}  # the state of a store before anything was collected
_IGNORED = -100  # the label of a token that is no target


class CollectCallback:
    """Collects per-sample gradients while a Trainer trains; made by :func:`collect_callback`.

    Checkpoints of the Trainer hold where the store was: a training that continues from one continues the store.
    """

    def __init__(
        self, trainer: Any, store: PathLike, ids: str, options: CollectOptions, *, start_epoch: float = 0.0,
        per_sample_loss: PerSampleLoss | None = None,
    ) -> None:  # fmt: skip
        self._trainer, self._path, self._ids, self._options = trainer, store, ids, options
        self._start_epoch, self._loss = start_epoch, per_sample_loss
        self._collector: Collector | None = None
        self._restored: dict[str, int] | None = None  # of the checkpoint that training continues from
        self._training_step: Callable[..., Tensor] | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):  # the other events
            return lambda *_, **__: None
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        """Open the store, or continue it from the checkpoint that training continues from."""
        _refuse(args)
        self._restored = self._read(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._training_step = self._trainer.training_step
        self._trainer.training_step = self._step
        self._begin_if_due(state)

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Open the store at the epoch that collection starts with."""
        self._begin_if_due(state)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Fold the epoch's rows into the averages, where these are made."""
        if self._collector is not None and self._options["average"]:
            self._collector.fold()

    def _read(self, checkpoint: Path, step: int) -> dict[str, int] | None:
        """Return where the store was at a checkpoint; None for a training from its start."""
        path = checkpoint / _STATE
        if step and path.is_file():
            return dict(json.loads(path.read_text("utf-8")))
        there = earlier_rows(self._path, average=self._options["average"])
        if step or there:
            raise MismatchError(
                f"expected a training from its start and no rows at {self._path}, or both from one checkpoint, with "
                f"{path}; received step {step} and {there} rows: continue from a checkpoint that was saved while rows "
                "were collected, or collect to another path"
            )
        return None

    def _begin_if_due(self, state: Any) -> None:
        if self._collector is not None or float(state.epoch or 0.0) < self._start_epoch:
            return
        trainer = self._trainer
        own: Any = {**self._options, "columns": ("epoch", "lr"), "loss": "mean"}
        own["loss_kind"] = own["loss_kind"] or _loss_kind(trainer)
        loss, pilot = training_pilot(trainer, self._ids, self._loss)
        own["pilot"] = pilot if own["pilot"] is None else own["pilot"]
        self._collector = collect(trainer.accelerator.unwrap_model(trainer.model), self._path, loss, **own)
        self._collector.__enter__()
        if self._restored is not None:
            try:
                self._collector.load_state_dict(self._restored)
            except BaseException as error:
                self._close(type(error))
                raise

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, **more: Any) -> Tensor:
        """Do the Trainer's training step on a batch, whose rows are collected."""
        trainer, collector = self._trainer, self._collector
        assert self._training_step is not None
        ids = inputs.pop(self._ids, None)
        if ids is None:
            raise InputError(
                f"expected the ids of samples as {self._ids!r} in every batch; received {', '.join(inputs)}: keep the "
                "column (remove_unused_columns=False), and have the data collator pass it on"
            )
        if collector is None:
            return self._training_step(model, inputs, num_items_in_batch, **more)
        weights, scale = _weights(trainer, inputs, len(ids), num_items_in_batch)
        lr = trainer.optimizer.param_groups[0]["lr"]
        values = {"epoch": float(trainer.state.epoch or 0.0), "lr": float(lr)}
        with collector.step(ids, step=trainer.state.global_step, weights=weights, scale=scale, **values):
            return self._training_step(model, inputs, num_items_in_batch, **more)

    def on_save(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        """Commit the rows so far, and say in the checkpoint how many they are."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
        own = _NOT_BEGUN if self._collector is None else self._collector.state_dict()
        path.write_text(json.dumps(own), "utf-8")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the store: from now on it is of the trained model."""
        self._close()

    def _close(self, kind: type[BaseException] | None = None) -> None:
        collector, self._collector = self._collector, None
        if self._training_step is not None:
            self._trainer.training_step, self._training_step = self._training_step, None
        if collector is not None:
            collector.__exit__(kind)


@takes(CollectOptions)
def collect_callback(
    trainer: Any, store: PathLike, *, ids: str = "example_id", start_epoch: float = 0.0,
    per_sample_loss: PerSampleLoss | None = None, **options: Unpack[CollectOptions],
) -> CollectCallback:  # fmt: skip
    """Return a callback that collects per-sample gradients while a transformers Trainer trains.

    Rows are those of the Trainer's own backward passes (:func:`ooc_influence.collect`), of a language model of the mean
    loss over a sample's targets, with columns ``step``, ``epoch`` and ``lr``. Batches need the ids of their samples.

    Parameters
    ----------
    trainer : transformers.Trainer
        The Trainer, or one of TRL's that has its training step, such as ``SFTTrainer``.
    store : path
        The store to write, or to continue with ``trainer.train(resume_from_checkpoint=...)``.
    ids : str
        The batches' entry with the ids. The data collator has to pass it on, and the Trainer to keep it
        (``remove_unused_columns=False``); the model does not see it.
    start_epoch : float
        The epoch to begin with, counted from 0: the compressor's pilot is of the model as it is then.
    per_sample_loss : callable (model, batch) -> (b,) tensor, optional
        The loss of single samples for the pilot; default that of a language model, the mean over a sample's targets.
    **options : CollectOptions
        See :mod:`ooc_influence.options`. ``columns`` and ``loss`` are the callback's. ``pilot`` is by default some of
        the Trainer's training data; with ``average=True`` rows are folded at the end of every epoch.

    Returns
    -------
    CollectCallback

    Raises
    ------
    InputError
        When training begins, for several processes or float16 with a scaled loss, or batches without ids.
    MismatchError
        When training begins, if the store and the checkpoint are not of one training.
    OocInfluenceError
        See :func:`ooc_influence.collect`.

    Examples
    --------
    >>> trainer.add_callback(hf.collect_callback(trainer, "rows.zarr", compressor=ooc.Dropout(k=4096)))
    >>> trainer.train()
    """
    return CollectCallback(trainer, store, ids, options, start_epoch=start_epoch, per_sample_loss=per_sample_loss)


def _refuse(args: Any) -> None:
    if args.world_size > 1 or args.n_gpu > 1:
        raise InputError(
            f"expected a training in one process on one device to collect from; received {args.world_size} processes "
            f"and {args.n_gpu} GPUs"
        )
    if args.fp16:
        raise InputError("expected bfloat16 or float32 to collect from; received fp16: use bf16=True")


def _loss_kind(trainer: Any) -> str | None:
    return "token_cross_entropy_mean" if getattr(trainer, "_loss_shifts_labels", False) else None


def _weights(trainer: Any, inputs: dict[str, Any], b: int, items: Any) -> tuple[Tensor | None, float]:
    """Return by what the samples' own losses are multiplied in the batch's, (b,), and by what that is."""
    labels = inputs.get("labels")
    scaled = (
        trainer.loss_is_scaled_for_ga
        if getattr(trainer, "loss_is_scaled_for_ga", None) is not None
        else (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    )
    scale = 1.0 if scaled else 1.0 / getattr(trainer, "current_gradient_accumulation_steps", 1)
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] != b:
        return None, scale
    targets = (labels[:, 1:] != _IGNORED).sum(1).clamp(min=1).float()
    total = targets.sum() if items is None else torch.as_tensor(items, dtype=torch.float32)
    return targets / total, scale

"""Rows of a transformers Trainer's own training: a callback that collects them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError
from ooc_influence.extract import Collector, collect
from ooc_influence.options import CollectOptions, takes
from ooc_influence.store import GradientStore, PathLike

_STATE = "ooc_influence.json"  # in a checkpoint's folder: where the store was when it was saved
_IGNORED = -100  # the label of a token that is no target


class CollectCallback:
    """Collects per-sample gradients while a Trainer trains; made by :func:`collect_callback`.

    Checkpoints of the Trainer hold where the store was: a training that continues from one continues the store.
    """

    def __init__(self, trainer: Any, store: PathLike, ids: str, options: CollectOptions) -> None:
        self._trainer, self._path, self._ids, self._options = trainer, store, ids, options
        self._collector: Collector | None = None
        self._training_step: Callable[..., Tensor] | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):  # the other events
            return lambda *_, **__: None
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        """Open the store, or continue it from the checkpoint that training continues from."""
        _refuse(args)
        trainer = self._trainer
        own: Any = {**self._options, "columns": ("epoch", "lr"), "loss": "mean"}
        own["loss_kind"] = own["loss_kind"] or _loss_kind(trainer)
        if own["optimizer"] is True:
            own["optimizer"] = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # that accelerate wraps
        self._collector = collect(trainer.accelerator.unwrap_model(trainer.model), self._path, **own)
        self._collector.__enter__()
        self._continue(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        self._training_step = trainer.training_step
        trainer.training_step = self._step

    def _continue(self, checkpoint: Path, step: int) -> None:
        assert self._collector is not None
        path = checkpoint / _STATE
        if step and path.is_file():
            self._collector.load_state_dict(json.loads(path.read_text("utf-8")))
            return
        try:
            there = GradientStore.open(self._path).n
        except StoreNotFoundError:
            there = 0
        if step or there:
            self._close()
            raise MismatchError(
                f"expected a training from its start and no rows at {self._path}, or both from one checkpoint, with "
                f"{path}; received step {step} and {there} rows: continue from a checkpoint that was saved while rows "
                "were collected, or collect to another path"
            )

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, **more: Any) -> Tensor:
        """Do the Trainer's training step on a batch, whose rows are collected."""
        trainer, collector = self._trainer, self._collector
        assert collector is not None
        assert self._training_step is not None
        ids = inputs.pop(self._ids, None)
        if ids is None:
            raise InputError(
                f"expected the ids of samples as {self._ids!r} in every batch; received {', '.join(inputs)}: keep the "
                "column (remove_unused_columns=False), and have the data collator pass it on"
            )
        weights, scale = _weights(trainer, inputs, len(ids), num_items_in_batch)
        lr = trainer.optimizer.param_groups[0]["lr"]
        values = {"epoch": float(trainer.state.epoch or 0.0), "lr": float(lr)}
        with collector.step(ids, step=trainer.state.global_step, weights=weights, scale=scale, **values):
            return self._training_step(model, inputs, num_items_in_batch, **more)

    def on_save(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        """Commit the rows so far, and say in the checkpoint how many they are."""
        assert self._collector is not None
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
        path.write_text(json.dumps(self._collector.state_dict()), "utf-8")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the store: from now on it is of the trained model."""
        self._close()

    def _close(self) -> None:
        collector, self._collector = self._collector, None
        if self._training_step is not None:
            self._trainer.training_step, self._training_step = self._training_step, None
        if collector is not None:
            collector.__exit__(None)


@takes(CollectOptions)
def collect_callback(
    trainer: Any, store: PathLike, *, ids: str = "example_id", **options: Unpack[CollectOptions]
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
    **options : CollectOptions
        See :mod:`ooc_influence.options`. ``columns`` and ``loss`` are the callback's.

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
    return CollectCallback(trainer, store, ids, options)


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

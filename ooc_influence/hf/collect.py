"""Rows of a transformers Trainer's own training: a callback that collects them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from ooc_influence.errors import InputError, MismatchError, listed, warn
from ooc_influence.extract import Collector, ModuleSelection, PerSampleLoss, collect, earlier_rows
from ooc_influence.hf.trainers import reader_of, replaced, unhooked_head
from ooc_influence.hf.training_pilot import training_pilot
from ooc_influence.options import CollectOptions, takes
from ooc_influence.store import PathLike

_STATE = "ooc_influence.json"  # in a checkpoint's folder: where the store was when it was saved


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
        self._restored: dict[str, Any] | None = None  # of the checkpoint that training continues from
        self._training_step: Callable[..., Tensor] | None = None
        self._undo = ExitStack()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):  # the other events
            return lambda *_, **__: None
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        """Open the store, or continue it from the checkpoint that training continues from."""
        trainer = self._trainer
        self._undo.__exit__(InterruptedError, InterruptedError(), None)  # of a training that was interrupted
        self._collector = None
        _refuse(trainer, args)
        self._reader = reader = reader_of(trainer, self._ids)
        reader.check()
        self._restored = self._saved_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)
        with ExitStack() as undo:
            undo.enter_context(reader.reading())
            self._training_step = trainer.training_step
            undo.enter_context(replaced(trainer, "training_step", self._step))
            self._begin_if_due(args, state, undo)
            self._undo = undo.pop_all()

    def on_step_begin(self, args: Any, state: Any, *__: Any, **___: Any) -> None:
        """Open the store at the epoch that collection starts with."""
        self._begin_if_due(args, state, self._undo)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Fold the epoch's rows into the averages, where these are made."""
        if self._collector is not None and self._options["average"]:
            self._collector.fold()

    def _saved_state(self, checkpoint: Path, step: int) -> Any:
        """Return where the store was when a training was saved; None for one that begins."""
        path = checkpoint / _STATE
        if step and path.is_file():
            return json.loads(path.read_text("utf-8"))
        there = earlier_rows(self._path, average=self._options["average"])
        if step or there:
            raise MismatchError(
                f"expected a training from its start and no rows at {self._path}, or both from one checkpoint, with "
                f"{path}; received step {step} and {there} rows: continue from a checkpoint that was saved while rows "
                "were collected, or collect to another path"
            )
        return None

    def _begin_if_due(self, args: Any, state: Any, undo: ExitStack) -> None:
        if self._collector is not None or float(state.epoch or 0.0) < self._start_epoch:
            return
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        loss, pilot = self._loss, None
        if not any(hasattr(each, "full_tensor") for each in model.parameters()):  # one process cannot run it otherwise
            loss, pilot = training_pilot(trainer, self._ids, loss)
        own: Any = {**self._options, "columns": ("epoch", "lr"), "loss": "mean"}
        own["loss_kind"] = own["loss_kind"] or self._reader.loss_kind
        own["modules"] = _without(own["modules"], unhooked_head(model))
        own["pilot"] = pilot if own["pilot"] is None else own["pilot"]
        if own["optimizer"] is True:
            own["optimizer"] = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # that accelerate wraps
        if args.fp16:
            own["on_nonfinite"] = "skip"  # the scale is found by losses that overflow, of steps that are not taken
        collector = collect(model, self._path, loss, **own)
        with ExitStack() as begun:
            begun.enter_context(collector)
            if self._restored is not None:
                collector.load_state_dict(self._restored)
            undo.push(begun.pop_all())
        self._collector = collector

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **more: Any) -> Tensor:
        """Do the Trainer's training step on a batch, whose rows are collected."""
        trainer, collector = self._trainer, self._collector
        assert self._training_step is not None
        batch = self._reader.read(inputs, num_items_in_batch)
        if collector is None:
            return self._training_step(model, batch.inputs, num_items_in_batch, **more)
        lr = trainer.optimizer.param_groups[0]["lr"]
        values = {"epoch": float(trainer.state.epoch or 0.0), "lr": float(lr)}
        with collector.step(
            batch.ids, step=trainer.state.global_step, weights=batch.weights, scale=batch.scale,
            sequences=batch.sequences, **values,
        ):  # fmt: skip
            return self._training_step(model, batch.inputs, num_items_in_batch, **more)

    def on_save(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        """Commit the rows so far, and say in the checkpoint how many they are."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
        collected = self._not_begun() if self._collector is None else self._collector.state_dict()  # of all processes
        if state.is_world_process_zero:
            path.write_text(json.dumps(collected), "utf-8")

    def _not_begun(self) -> dict[str, Any]:
        """Return the state of a store before anything was collected."""
        processes = self._trainer.args.world_size
        return {"generation": 0, "rows": 0 if processes == 1 else [0] * processes, "step": -1, "records": 0}

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the store: from now on it is of the trained model."""
        self._collector = None
        self._undo.close()


@takes(CollectOptions)
def collect_callback(
    trainer: Any, store: PathLike, *, ids: str = "example_id", start_epoch: float = 0.0,
    per_sample_loss: PerSampleLoss | None = None, **options: Unpack[CollectOptions],
) -> CollectCallback:  # fmt: skip
    """Return a callback that collects per-sample gradients while a transformers Trainer trains.

    Rows are those of the Trainer's own backward passes (:func:`ooc_influence.collect`), of a language model of the mean
    loss over a sample's targets, with columns ``step``, ``epoch`` and ``lr``. Batches need the ids of their samples.
    Of TRL's ``DPOTrainer``, a row is of a pair, and of its ``GRPOTrainer``, of a completion.

    Parameters
    ----------
    trainer : transformers.Trainer
        The Trainer, or ``SFTTrainer``, ``DPOTrainer`` or ``GRPOTrainer`` of TRL. In several processes, each has one.
    store : path
        The store to write, or to continue with ``trainer.train(resume_from_checkpoint=...)``.
    ids : str
        The batches' entry with the ids. The data collator has to pass it on, and the Trainer to keep it
        (``remove_unused_columns=False``); the model does not see it. Of ``GRPOTrainer``, the data set's column.
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
        For ``select``, which needs a loop that weighs single samples' losses. When training begins, for several GPUs
        in one process, DeepSpeed, other trainers of TRL, or settings by which a sample has no loss of its own; for
        batches without ids.
    MismatchError
        When training begins, if the store and the checkpoint are not of one training.
    OocInfluenceError
        See :func:`ooc_influence.collect`.

    Examples
    --------
    >>> trainer.add_callback(hf.collect_callback(trainer, "rows.zarr", compressor=ooc.Dropout(k=4096)))
    >>> trainer.train()
    """
    if options["select"] is not None:
        raise InputError(
            "expected a training loop of your own to choose samples in, since a Trainer's loss is of a whole batch; "
            "received select= for a Trainer: use ooc.collect, or choose the data beforehand (select_rows)"
        )
    return CollectCallback(trainer, store, ids, options, start_epoch=start_epoch, per_sample_loss=per_sample_loss)


def _refuse(trainer: Any, args: Any) -> None:
    if args.n_gpu > 1:
        raise InputError(
            f"expected a process for each GPU to collect from; received one for {args.n_gpu}: start the training with "
            "torchrun or accelerate launch"
        )
    kind = str(getattr(trainer.accelerator.distributed_type, "value", "NO"))
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise InputError(
            f"expected a training in one process, with DistributedDataParallel or FSDP2, to collect from; received "
            f"{kind}: extract rows from checkpoints (extract_gradients)"
        )
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in trainer.model_wrapped.modules()):
        raise InputError(
            "expected FSDP2 to collect from; received FullyShardedDataParallel: set fsdp_version=2 in fsdp_config"
        )


def _without(modules: ModuleSelection, names: Sequence[str]) -> ModuleSelection:
    """Return a selection of layers without some of them, which are named in a warning."""
    if not names:
        return modules
    warn(
        f"{listed(names, 3)} left out: TRL computes log-probabilities from the weight without calling the layer, so "
        "that it has no rows"
    )
    if callable(modules):
        return lambda name, module: name not in names and modules(name, module)
    patterns: list[Any] = [modules] if isinstance(modules, str) else list(modules or ())
    return [*patterns, *(f"!{name}" for name in names)]

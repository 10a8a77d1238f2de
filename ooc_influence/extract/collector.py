"""Rows collected while a model trains: gathered in the backward passes that train it, with none of their own.

Taps stay on the model in its own mode, and parameters receive their gradients: nothing of the training changes. With a
batch's loss L = c Σ_s w_s ℓ_s, the gradient of a layer's output holds c w_s δ_s at sample s, so that gathered entries
are divided by c w_s.

A training loop need not have single samples' losses to compare rows with. So on the first batch, entries summed over
its samples must be the gradients that parameters receive; and where the losses are given (:meth:`Step.record`), the
first and the last are differentiated by themselves, to find out whether samples mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from operator import itemgetter
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError, UnsupportedModelError, listed
from ooc_influence.extract.check import Disagreement, GradientCheck, LayersDisagreeError
from ooc_influence.extract.data import Batching, RowMetadata, as_list
from ooc_influence.extract.extraction import Settings, adjusting, parse_device, plan_store
from ooc_influence.extract.fingerprint import fingerprint_as
from ooc_influence.extract.layers import Use, find_uses, named_layers
from ooc_influence.extract.optimizer import OptimizerRecorder
from ooc_influence.extract.packing import SignPacker
from ooc_influence.extract.passes import ModelSetup, PendingTransfer, RowGatherer
from ooc_influence.extract.pilot import Pilot
from ooc_influence.extract.selection import Trained
from ooc_influence.extract.sink import Sink, StorePlan
from ooc_influence.extract.taps import PerSampleLoss, Taps, tapped_in_training
from ooc_influence.options import CollectOptions, takes
from ooc_influence.store import WEIGHT, GradientStore, LograReduction, PathLike, parse_path

Weights = npt.ArrayLike | Tensor
_COLUMNS = ("example", "step")  # of every row; a sample has a row for each step that it is in


@takes(CollectOptions)
def collect(
    model: nn.Module, store: PathLike, per_sample_loss: PerSampleLoss | None = None, **options: Unpack[CollectOptions]
) -> Collector:
    """Return what collects compressed per-sample gradients of a model while it trains, into a store.

    Rows come from the backward passes that train the model. Parameters after any number of steps are those of a
    training without it, to the bit. A sample has a row for each step that it is in. Columns ``example`` and ``step``
    say which, so that ``group_influence(..., by="example")`` adds up those of a sample.

    Parameters
    ----------
    model : torch.nn.Module
        The model, in training.
    store : path
        The store to write, or, in a training that was interrupted, to continue (:meth:`Collector.load_state_dict`).
    per_sample_loss : callable (model, batch) -> (b,) tensor, optional
        The loss of each sample, for a ``pilot``.
    **options : CollectOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Collector
        A context: the loop's steps are inside it.

    Raises
    ------
    InputError
        For a compressor that needs a pilot without data for one.
    UnsupportedModelError
        For batch norms that train, which mix the samples of a batch, compiled models, and ``FullyShardedDataParallel``.
    MismatchError
        If ``store`` holds rows of other layers or settings.

    Examples
    --------
    >>> with ooc.collect(model, "train.zarr", compressor=ooc.Dropout(k=4096), columns=["epoch"]) as collector:
    ...     for epoch, (ids, x, y) in batches:
    ...         with collector.step(ids, epoch=epoch):
    ...             loss = F.cross_entropy(model(x), y)
    ...             loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    if options["every"] < 1:
        raise InputError(f"expected every >= 1; received {options['every']}")
    _refuse(model)
    settings, device = Settings.of(options), parse_device(model, None)  # type: ignore[arg-type]
    pilot = None
    if per_sample_loss is not None and options["pilot"] is not None:
        setup = ModelSetup(model, per_sample_loss, device, options["progress"], options["check_gradients"])
        pilot = Pilot(setup, options["pilot"], options["memory"])
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # a training draws what it would without it
        plan = adjusting(settings, lambda settings: plan_store(model, settings, store, pilot))
    plan.attributes["collected"] = {"every": options["every"], "loss": options["loss"]}
    with suppress(StoreNotFoundError):  # the weights have changed since the store was made
        plan = replace(plan, attributes=plan.attributes | {"model": dict(GradientStore.open(store).attrs["model"])})
    return Collector(model, store, plan, options)


def _refuse(model: nn.Module) -> None:
    """Refuse models whose samples have no gradients of their own, or whose layers do not call hooks."""
    modules = named_layers(model)
    mixing = [
        name for name, each in modules.items() if each.training and isinstance(each, nn.modules.batchnorm._BatchNorm)
    ]
    if mixing:
        raise UnsupportedModelError(
            "expected layers that compute each sample by itself; received batch norms in training mode "
            f"({listed(mixing, 3)}): a sample has no gradient of its own there. Freeze their statistics (.eval()), use "
            "another norm, or extract rows from checkpoints (extract_gradients)"
        )
    if any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in model.modules()):
        raise UnsupportedModelError(
            "expected a model that is not compiled; received one that is, whose layers call no hooks: collect without "
            "torch.compile, or extract rows from checkpoints (extract_gradients)"
        )
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules()):
        raise UnsupportedModelError(
            "expected a model that is whole in each process; received FullyShardedDataParallel: collect from a "
            "training in one process, or extract rows from checkpoints (extract_gradients)"
        )


class Step:
    """A batch whose rows are being collected; made by :meth:`Collector.step`."""

    def __init__(self, collector: Collector | None, count: int) -> None:
        self._collector, self._count = collector, count
        self.losses: npt.NDArray[np.float32] | None = None
        self.received = False  # whether a layer's gradient was

    def record(self, losses: Tensor) -> None:
        """Record the samples' own losses, (b,), which are stored with the rows; before or after the backward pass.

        Before it, on the first batch, single losses are differentiated too, to find out whether samples mix.

        Raises
        ------
        InputError
            For anything but a loss for each sample.
        UnsupportedModelError
            If a sample's loss depends on other samples.
        """
        if losses.shape != (self._count,):
            raise InputError(f"expected a loss for each of {self._count} samples; received {tuple(losses.shape)}")
        if self._collector is not None:
            self.losses = losses.detach().float().cpu().numpy()
            self._collector._probe(losses)


class Collector:
    """Collects rows while a model trains; made by :func:`collect`, and used as a context.

    Attributes
    ----------
    path : path
        The store's.
    every : int
        Rows are collected of every such step.
    """

    def __init__(self, model: nn.Module, path: PathLike, plan: StorePlan, options: CollectOptions) -> None:
        self.path, self.every = path, options["every"]
        self._model, self._plan, self._options = model, plan, options
        self._device = parse_device(model, None)
        self._mean = options["loss"] == "mean"
        self._uses = find_uses(model, [module.layer for module in plan.mask.modules])
        self._gatherer = RowGatherer(plan.mask, self._device, plan.reduction)
        self._step = -1
        self._sink: Sink | None = None
        self._taps: Taps | None = None
        self._packer: SignPacker | None = None
        self._check: _SumCheck | None = None
        self._recorder: OptimizerRecorder | None = None
        if options["optimizer"] is not None:
            recorded = options["optimizer_every"], options["optimizer_metric"]
            self._recorder = OptimizerRecorder(options["optimizer"], plan.mask, plan.reduction, self._uses, *recorded)
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._taps = undo.enter_context(
                tapped_in_training(self._model, self._uses, self._device, self._plan.mask.empty_modules)
            )
            metadata = RowMetadata.of(None, self._sources())
            self._sink = Sink(self.path, self._plan, metadata, Batching(), None, None, self._options["on_nonfinite"])
            undo.callback(self._sink.close)
            self._packer = self._sink.packer(self._device)
            if self._options["check_gradients"]:
                self._check = _SumCheck(self._uses, self._device, self._plan, self._model)
            if self._recorder is not None:
                self._recorder.open(parse_path(self.path))
                undo.callback(self._recorder.close)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None and self._sink is not None:
            self._sink.record(model=_facts(self._model))
        self._flush_optimizer()
        self._undo.close()

    def _sources(self) -> dict[str, Callable[[Any], Any]]:
        """Return where the columns of rows come from: what :meth:`step` was given."""
        given = self._options["columns"]
        own = _COLUMNS if self._recorder is None else (*_COLUMNS, WEIGHT)
        if set(given) & set(own):
            raise InputError(f"expected columns beside {' and '.join(own)}; received {', '.join(given)}")
        return {name: itemgetter(name) for name in (*own, *given)}

    @contextmanager
    def step(
        self, ids: Any, *, step: int | None = None, weights: Weights | None = None, scale: float = 1.0, **columns: Any
    ) -> Iterator[Step]:
        """Collect the rows of a batch: its forward and backward pass are inside the context.

        Parameters
        ----------
        ids : sequence or tensor
            The ids of its samples, (b,) of str or int.
        step : int, optional
            The number of the training step; default one more than the last. Several batches may have the same, as
            where gradients are accumulated.
        weights : (b,) array, optional
            w, by which the samples' losses are multiplied in the loss; default 1/b, or 1 with ``loss="sum"``. Where a
            batch's loss is a mean over its tokens, and rows are to be those of means over a sample's own tokens, they
            are the samples' shares of the batch's tokens.
        scale : float
            c, by which the loss was multiplied: that of a ``GradScaler``, or one over the number of batches that
            gradients are accumulated over.
        **columns
            The values of the columns that :func:`collect` was given: one, or (b,).

        Yields
        ------
        Step

        Raises
        ------
        InputError
            For weights, columns or losses that do not match.
        LayersDisagreeError
            If the entries of the first batch are not autograd's gradients.
        NonFiniteError
            For NaN or Inf, unless ``on_nonfinite="skip"``.
        """
        self._step = self._step + 1 if step is None else int(step)
        names = as_list(ids)
        if self._recorder is not None:
            self._recorder.start(self._step, collected=not self._step % self.every)
        if self._step % self.every:
            yield Step(None, len(names))
            return
        if self._taps is None or self._sink is None:
            raise InputError("expected a step inside the collector's context; received one outside: use 'with'")
        multipliers = scale * self._weights(weights, len(names))
        batch = {"example": names, "step": [self._step] * len(names), **self._columns(columns, len(names))}
        now = Step(self, len(names))
        rows = self._gatherer.room(len(names))
        watching = nullcontext() if self._check is None else self._check.watching(len(names))
        with watching, self._taps.receiving(len(names), self._receiver(rows, now)):
            yield now
        if not now.received:
            raise InputError(
                "expected the forward and the backward pass of the model inside a step; received no gradient of any "
                "layer: put both into it"
            )
        if self._check is not None:
            self._finish_check(rows, len(names))
        if self._recorder is not None:
            batch[WEIGHT] = multipliers.tolist()
            self._recorder.end(sum(batch[WEIGHT]))
        self._store(batch, rows / multipliers[:, None], now.losses)
        if self._recorder is not None and self._recorder.flush_due:
            self._flush_optimizer()

    def _receiver(self, rows: Tensor, now: Step) -> Callable[[Use, Any, Any], None]:
        add = self._gatherer.adding(rows)
        add = add if self._check is None else self._check.noting(add)

        def receive(use: Use, x: Any, delta: Any) -> None:
            now.received = True
            add(use, x, delta)

        return receive

    def _weights(self, weights: Weights | None, b: int) -> Tensor:
        if weights is None:
            return torch.full((b,), 1 / b if self._mean else 1.0, device=self._device)
        found = torch.as_tensor(weights, dtype=torch.float32, device=self._device)
        if found.shape != (b,) or not bool((found > 0).all()):
            raise InputError(f"expected positive weights of {b} samples; received {tuple(found.shape)}: {weights!r}")
        return found

    def _columns(self, columns: Mapping[str, Any], b: int) -> dict[str, list[Any]]:
        expected = set(self._options["columns"])
        if set(columns) != expected:
            raise InputError(
                f"expected values of {', '.join(sorted(expected)) or 'no further columns'}; received "
                f"{', '.join(sorted(columns)) or 'none'}: name the columns of all steps in collect(columns=...)"
            )
        found = {name: as_list(value) if np.ndim(value) else [value] * b for name, value in columns.items()}
        for name, values in found.items():
            if len(values) != b:
                raise InputError(f"expected one {name} for each of {b} samples; received {len(values)}")
        return found

    def _probe(self, losses: Tensor) -> None:
        """On the first batch, find out whether samples mix."""
        if self._check is not None and self._taps is not None and losses.requires_grad and len(losses) > 1:
            self._taps.probe(losses)

    def _finish_check(self, rows: Tensor, b: int) -> None:
        """Compare the first batch's entries with autograd's gradients of the parameters, once."""
        check, self._check = self._check, None
        assert check is not None
        assert self._sink is not None
        disagree = check.disagreeing(rows, b)
        if disagree:
            raise LayersDisagreeError.of(disagree)
        self._sink.verified(check.facts())

    def _store(self, batch: Any, rows: Tensor, losses: npt.NDArray[np.float32] | None) -> None:
        assert self._sink is not None
        reduced, norms = self._gatherer.reduced(rows)
        values = rows.new_zeros(len(rows)) if losses is None else torch.from_numpy(losses)
        computed = PendingTransfer.of(self._packer, values, reduced, norms).result()
        self._sink.take(batch, self._sink.next_row, computed)

    def state_dict(self) -> dict[str, int]:
        """Commit what was collected, and return what belongs into a checkpoint of the training: rows and step."""
        assert self._sink is not None
        if self._sink.store is not None:
            self._sink.store.flush()
        self._flush_optimizer()
        recorded = {} if self._recorder is None else {"records": len(self._recorder)}
        return {"rows": self._sink.next_row, "step": self._step, **recorded}

    def _flush_optimizer(self) -> None:
        """Write the optimiser's records beside the rows, once there is a store."""
        if self._recorder is not None and self._sink is not None and self._sink.store is not None:
            self._recorder.flush()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a checkpoint of the training: rows that were collected after it are dropped.

        Raises
        ------
        MismatchError
            If the store has fewer rows.
        """
        assert self._sink is not None
        there = self._sink.next_row
        if there < state["rows"]:
            raise MismatchError(
                f"expected at least {state['rows']} rows in {self.path}, as when the checkpoint was saved; received "
                f"{there}: continue from an earlier checkpoint, or collect to another path"
            )
        if there > state["rows"]:
            assert self._sink.store is not None
            self._sink.store.drop(np.arange(state["rows"], there))
        if self._recorder is not None:
            if "records" not in state:
                raise MismatchError(
                    "expected a checkpoint of a training whose optimiser was recorded; received one without: continue "
                    "without optimizer=, or collect to another path"
                )
            self._recorder.truncate(state["records"])
        self._step = state["step"]


class _SumCheck:
    """Compares entries of a batch, summed over its samples, with the gradients that parameters receive."""

    def __init__(self, uses: list[Use], device: torch.device, plan: StorePlan, model: nn.Module) -> None:
        self._mask = None if isinstance(plan.reduction, LograReduction) else plan.mask
        self._check = GradientCheck(uses, device, Trained.of(model), self._mask)
        self._layers = {use.layer for use in uses} - set(plan.mask.empty_modules)
        self._noted: list[tuple[Use, Any, Any]] = []

    @contextmanager
    def watching(self, b: int) -> Iterator[None]:
        """Read the gradients of a batch of b samples that parameters receive meanwhile."""
        self._check.start(dict.fromkeys(range(b), 1.0), self._layers)
        with self._check.following():
            yield

    def noting(self, add: Callable[[Use, Any, Any], None]) -> Callable[[Use, Any, Any], None]:
        """Return a receiver that keeps what it passes on: which entries to compare is known after the pass."""

        def receive(use: Use, x: Any, delta: Any) -> None:
            self._noted.append((use, x, delta))
            add(use, x, delta)

        return receive

    def disagreeing(self, rows: Tensor, b: int) -> list[Disagreement]:
        """Return the layers whose entries differ."""
        compared, gathered = self._check.gather_into(b)
        with torch.no_grad():
            for use, x, delta in self._noted:
                compared(use, x, delta)
        self._noted.clear()
        return self._check.compare(gathered(), None if self._mask is None else rows)

    def facts(self) -> dict[str, Any]:
        """Return what a store records."""
        return self._check.facts() | {"of": "sums over a batch"}


def _facts(model: nn.Module) -> dict[str, Any]:
    return {"fingerprint": fingerprint_as(model, None), "class": type(model).__name__}

"""Rows collected while a model trains: gathered in the backward passes that train it, with none of their own.

Taps stay on the model in its own mode, and parameters receive their gradients: nothing of the training changes. With a
batch's loss L = c Σ_s w_s ℓ_s, the gradient of a layer's output holds c w_s δ_s at sample s, so that gathered entries
are divided by c w_s.

A training loop need not have single samples' losses to compare rows with. So on the first batch, entries summed over
its samples must be the gradients that parameters receive; and where the losses are given (:meth:`Step.record`), the
first and the last are differentiated by themselves, to find out whether samples mix.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from operator import itemgetter
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError, UnsupportedModelError, listed
from ooc_influence.extract.averages import Averages
from ooc_influence.extract.check import Disagreement, GradientCheck, LayersDisagreeError
from ooc_influence.extract.data import RowMetadata, as_list
from ooc_influence.extract.extraction import Settings, adjusting, parse_device, plan_store
from ooc_influence.extract.fingerprint import fingerprint_as
from ooc_influence.extract.layers import Use, find_uses, named_layers
from ooc_influence.extract.online import ChosenSamples, Selector, choose_samples
from ooc_influence.extract.optimizer import OptimizerRecorder
from ooc_influence.extract.packing import SignPacker
from ooc_influence.extract.passes import ModelSetup, PendingTransfer, RowGatherer
from ooc_influence.extract.pilot import Pilot, remove_pilot
from ooc_influence.extract.ranks import Ranks, open_sink
from ooc_influence.extract.selection import Trained
from ooc_influence.extract.sink import Sink, StorePlan, open_existing
from ooc_influence.extract.taps import PerSampleLoss, Taps, tapped_in_training
from ooc_influence.options import CollectOptions, takes
from ooc_influence.store import WEIGHT, GradientStore, LograReduction, PathLike, parse_path

Weights = npt.ArrayLike | Tensor
_COLUMNS = ("example", "step")  # of every row; a sample has a row for each step that it is in
_CHOSEN = ("score", "chosen")  # of every row where samples are chosen


@takes(CollectOptions)
def collect(
    model: nn.Module, store: PathLike, per_sample_loss: PerSampleLoss | None = None, **options: Unpack[CollectOptions]
) -> Collector:
    """Return what collects compressed per-sample gradients of a model while it trains, into a store.

    Rows come from the backward passes that train the model. Parameters after any number of steps are those of a
    training without it, to the bit. A sample has a row for each step that it is in. Columns ``example`` and ``step``
    say which, so that ``group_influence(..., by="example")`` adds up those of a sample. With ``average=True`` it has
    one row, their average; the store is there once the context has ended.

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
        For a compressor that needs a pilot without data for one, or a compressor beside ``select``, whose queries have
        theirs; for averages of signs or not on a local disk; and for averages, or an optimiser's record, of a training
        in several processes.
    UnsupportedModelError
        For batch norms that train, which mix the samples of a batch, and ``FullyShardedDataParallel``.
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
    model = _inner(model)
    _refuse(model)
    selector, ranks, device = options["select"], Ranks.current(), parse_device(model, None)
    _check_combination(options, ranks)
    averages = _averages(store, options)
    home = store if averages is None else averages.reference()  # what has the mask already, or will be made first
    like = None if selector is None else selector.store
    settings = replace(Settings.of(options), like=like, in_training=True)  # type: ignore[arg-type]
    pilot = None
    if per_sample_loss is not None and options["pilot"] is not None:
        if ranks is not None and any(hasattr(each, "full_tensor") for each in model.parameters()):
            raise UnsupportedModelError(
                "expected a model that is whole in each process, to run a pilot in one of them; received one with "
                "sharded parameters: use a compressor that needs no pilot, or DistributedDataParallel"
            )
        setup = ModelSetup(model, per_sample_loss, device, options["progress"], options["check_gradients"])
        pilot = Pilot(setup, options["pilot"], options["memory"])

    def make_plan() -> StorePlan:
        return adjusting(settings, lambda settings: plan_store(model, settings, home, pilot))

    with _same_draws():  # a training draws what it would without it
        plan = make_plan() if ranks is None or pilot is None else ranks.from_first(make_plan)
    plan.attributes["collected"] = {"every": options["every"], "loss": options["loss"]}
    if ranks is not None:
        plan.attributes["collected"]["processes"] = ranks.count
    return Collector(model, store, plan, options, ranks=ranks, averages=averages)


def _check_combination(options: CollectOptions, ranks: Ranks | None) -> None:
    """Refuse options that do not go together."""
    if ranks is not None and (options["optimizer"] is not None or options["average"]):
        asked = "average=True" if options["average"] else "optimizer="
        raise InputError(
            f"expected a training in one process for {asked}; received one in {ranks.count}: collect single rows "
            "without it, and average them afterwards (average_rows)"
        )
    if options["average"] and options["optimizer"] is not None:
        raise InputError(
            "expected single rows to record an optimiser with, whose effects differ from step to step; received "
            "average=True too: collect either"
        )


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside what DistributedDataParallel and torch.compile wrap it in."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inside = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
        assert isinstance(inside, nn.Module)
        model = inside
    return model


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leave the random numbers of PyTorch, NumPy and Python as they were, whatever a pilot's data draws."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def earlier_rows(store: PathLike, *, average: bool = False) -> int:
    """Return how many rows, or averages, there are of an earlier training."""
    try:
        return GradientStore.open(Averages(store).reference() if average else store).committed
    except StoreNotFoundError:
        return 0


def _averages(store: PathLike, options: CollectOptions) -> Averages | None:
    """Return where averages are made, if they are to be; refuse what cannot be averaged."""
    if not options["average"]:
        with suppress(StoreNotFoundError):
            if "averaged" in GradientStore.open(store).attrs:
                raise MismatchError(
                    f"expected single rows at {store}, or nothing; received averages: continue them with average=True, "
                    "or collect to another path"
                )
        return None
    if options["dtype"] == "sign":
        raise InputError(
            "expected averages of numbers; received dtype='sign': collect float16 rows, and rewrite the averages as "
            "signs (rewrite_store)"
        )
    return Averages(store)


def _refuse(model: nn.Module) -> None:
    """Refuse models whose samples have no gradients of their own, or that free their weights while they train."""
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
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules()):
        raise UnsupportedModelError(
            "expected a model sharded with torch.distributed.fsdp.fully_shard; received FullyShardedDataParallel: wrap "
            "it with fully_shard, or extract rows from checkpoints (extract_gradients)"
        )


class Step:
    """A batch whose rows are being collected; made by :meth:`Collector.step`."""

    def __init__(self, collector: Collector | None, count: int) -> None:
        self._collector, self._count = collector, count
        self.losses: npt.NDArray[np.float32] | None = None
        self.chosen: ChosenSamples | None = None
        self.owners: Tensor | None = (
            None  # the sample of each sequence that the model computes, where there are several
        )
        self.received = False  # whether a layer's gradient was, of the pass that trains

    def of_samples(self, rows: Tensor) -> Tensor:
        """Return the rows of samples, (b, k), the sums of those of their sequences."""
        return (
            rows if self.owners is None else rows.new_zeros(self._count, rows.shape[1]).index_add_(0, self.owners, rows)
        )

    def select(self, losses: Tensor) -> Tensor:
        """Return by what to multiply the samples' losses, (b,), as the ``select=`` of :func:`collect` chooses.

        Takes one backward pass through the activations, before the one that trains. Losses are recorded. In steps that
        are not collected, every sample counts 1.

        Parameters
        ----------
        losses : (b,) tensor
            The samples' own losses, with their graph.

        Raises
        ------
        InputError
            For anything but a loss for each sample, or a collector without ``select``.
        UnsupportedModelError
            If a sample's loss depends on other samples.
        """
        self.record(losses)
        if self._collector is None:
            return torch.ones_like(losses)
        self.chosen = self._collector._choose(losses, self)
        return self.chosen.weights.to(losses.dtype)

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
            if self.owners is None:
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

    def __init__(
        self, model: nn.Module, path: PathLike, plan: StorePlan, options: CollectOptions, *,
        ranks: Ranks | None = None, averages: Averages | None = None,
    ) -> None:  # fmt: skip
        self._ranks = ranks
        self.path, self.every = path, options["every"]
        self._averages = averages
        self._model, self._plan, self._options = model, plan, options
        self._device = parse_device(model, None)
        self._mean = options["loss"] == "mean"
        self._uses = find_uses(model, [module.layer for module in plan.mask.modules])
        self._gatherer = RowGatherer(plan.mask, self._device, plan.reduction)
        self._selector: Selector | None = options["select"]
        self._step, self._scale = -1, 1.0
        self._sink: Sink | None = None
        self._taps: Taps | None = None
        self._packer: SignPacker | None = None
        self._check: _SumCheck | None = None
        self._recorder: OptimizerRecorder | None = None
        if options["optimizer"] is not None:
            self._recorder = OptimizerRecorder(
                options["optimizer"], plan.mask, plan.reduction, self._uses, options["optimizer_every"]
            )
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._taps = undo.enter_context(
                tapped_in_training(self._model, self._uses, self._device, self._plan.mask.empty_modules)
            )
            if self._averages is not None:
                undo.callback(self._averages.close)
                self._averages.open()
            undo.callback(self._close_sink)
            self._open_sink()
            if self._options["check_gradients"]:
                self._check = _SumCheck(self._uses, self._device, self._plan, self._model)
            if self._recorder is not None:
                self._recorder.open(parse_path(self.path))
                undo.callback(self._recorder.close)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._undo:
            self._flush_optimizer()
            if kind is not None or self._sink is None:
                return
            if self._ranks is None or self._ranks.index == 0:
                remove_pilot(self.path if self._averages is None else self._averages.first)
            if self._averages is None:
                self._sink.finish(model=_facts(self._model))
                return
            self.fold()
            self._close_sink()
            self._averages.publish(_facts(self._model))

    @property
    def _rows(self) -> PathLike:
        """Where rows are written."""
        return self.path if self._averages is None else self._averages.journal

    def _open_sink(self) -> None:
        latest = self.path if self._averages is None else self._averages.latest
        with suppress(StoreNotFoundError):  # the weights have changed since the store was made
            model = {"model": dict(GradientStore.open(latest).attrs["model"])}
            self._plan = replace(self._plan, attributes=self._plan.attributes | model)
            open_existing(latest, self._plan)
        metadata = RowMetadata.of(None, self._sources())
        self._sink = open_sink(self._rows, self._plan, metadata, self._ranks, self._options["on_nonfinite"])
        self._packer = self._sink.packer(self._device)

    def _close_sink(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.close()

    def fold(self) -> None:
        """Add the rows collected since the last time to the averages, at the end of an epoch, say; ``average=True``.

        Until then they take their own room on the disk. The end of the context does it, too.

        Raises
        ------
        InputError
            Of a collector of single rows.
        """
        if self._averages is None:
            raise InputError("expected averages to fold rows into; received a collector of single rows: average=True")
        self._close_sink()
        try:
            self._averages.fold(self._options["storage"], self._options["progress"])
        finally:
            self._open_sink()

    def _sources(self) -> dict[str, Callable[[Any], Any]]:
        """Return where the columns of rows come from: what :meth:`step` was given."""
        given = self._options["columns"]
        own = (
            *_COLUMNS,
            *(() if self._selector is None else _CHOSEN),
            *(() if self._recorder is None else (WEIGHT,)),
        )
        reserved = own if self._averages is None else (*own, "rows")
        if set(given) & set(reserved):
            raise InputError(f"expected columns beside {', '.join(reserved)}; received {', '.join(given)}")
        return {name: itemgetter(name) for name in (*own, *given)}

    @contextmanager
    def step(
        self, ids: Any, *, step: int | None = None, weights: Weights | None = None, scale: float = 1.0,
        sequences: Sequence[int] | None = None, **columns: Any,
    ) -> Iterator[Step]:  # fmt: skip
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
        sequences : (m,) sequence of int, optional
            The sample, by its index in ``ids``, that each of m sequences of the model's batch is of, where a sample has
            several, such as a chosen and a rejected one; default one each.
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
        if self._averages is not None:
            self._averages.check_step(names)
        self._scale, multipliers = scale, scale * self._weights(weights, len(names))
        batch = {"example": names, "step": [self._step] * len(names), **self._columns(columns, len(names))}
        now = Step(self, len(names))
        now.owners = None if sequences is None else _owners(sequences, len(names), self._device)
        gathering = self._selector is None or self._check is not None  # samples that are chosen have their rows already
        count = len(names) if now.owners is None else len(now.owners)
        rows = self._gatherer.room(count if gathering else 0)
        watching = nullcontext() if self._check is None else self._check.watching(count)
        with watching, self._taps.receiving(count, self._receiver(rows, now) if gathering else _nothing):
            yield now
        if now.received and self._check is not None:
            self._finish_check(rows, count)
        if self._selector is None:
            rows = self._divided(rows, multipliers, now)
        else:
            chosen = self._chosen(now)
            rows, multipliers = chosen.rows, multipliers * chosen.weights
            batch |= chosen.columns
        self._end_of_step(batch, multipliers)
        self._store(batch, rows, now.losses)
        if self._recorder is not None and self._recorder.flush_due:
            self._flush_optimizer()

    def _end_of_step(self, batch: dict[str, list[Any]], multipliers: Tensor) -> None:
        """Have the optimiser's recorder note the batch's gradient, and by what its samples count in it."""
        if self._recorder is not None:
            batch[WEIGHT] = multipliers.tolist()
            self._recorder.end(sum(batch[WEIGHT]))

    def _divided(self, rows: Tensor, multipliers: Tensor, now: Step) -> Tensor:
        """Return the rows of the samples' own losses, once there was a pass."""
        if not now.received:
            raise InputError(
                "expected the forward and the backward pass of the model inside a step; received no gradient of any "
                "layer: put both into it, and call torch.compile before the collector's context"
            )
        return now.of_samples(rows) / multipliers[:, None]

    def _choose(self, losses: Tensor, now: Step) -> ChosenSamples:
        """Choose among a batch's samples, by a backward pass of its own."""
        if self._selector is None or self._taps is None:
            raise InputError("expected select= in collect to choose samples by; received none: give it, or leave this")
        rows = self._gatherer.room(len(losses) if now.owners is None else len(now.owners))
        self._taps.differentiate(losses.sum() * self._scale, self._gatherer.adding(rows))
        rows = now.of_samples(rows) / self._scale
        return choose_samples(self._selector, rows, self._gatherer.reduced(rows)[0])

    def _chosen(self, now: Step) -> ChosenSamples:
        """Return what was chosen in a step."""
        if now.chosen is None:
            raise InputError("expected Step.select in every step of a collector with select=; received a step without")
        return now.chosen

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
        """Compare the first batch's entries with autograd's gradients of the parameters; the next's if it overflows."""
        check, self._check = self._check, None
        assert check is not None
        assert self._sink is not None
        disagree = check.disagreeing(rows, b)
        if disagree:
            raise LayersDisagreeError.of(disagree)
        if check.decided:
            self._sink.verified(check.facts())
        else:
            self._check = check

    def _store(self, batch: Any, rows: Tensor, losses: npt.NDArray[np.float32] | None) -> None:
        assert self._sink is not None
        self._note_losses(losses is not None)
        reduced, norms = self._gatherer.reduced(rows)
        values = rows.new_zeros(len(rows)) if losses is None else torch.from_numpy(losses)
        computed = PendingTransfer.of(self._packer, values, reduced, norms).result()
        self._sink.take(batch, self._sink.next_row, computed)

    def _note_losses(self, there: bool) -> None:
        """Check that either all rows or none have a loss, and record which: weights of rows need them."""
        assert self._sink is not None
        store = self._sink.store
        facts = (self._plan.attributes if store is None else store.attrs)["collected"]
        if facts.get("losses", there) != there:
            expected, received = ("losses" if each else "no losses" for each in (not there, there))
            raise InputError(
                f"expected {expected} of this step, as of those before; received {received}: call Step.record in every "
                "step, or in none"
            )
        if store is None:
            facts["losses"] = there

    def state_dict(self) -> dict[str, Any]:
        """Commit what was collected, and return what belongs into a checkpoint of the training: rows and step.

        Of a training in several processes, each has to make this call; what it returns is the same. Of averages, what
        this and the last state refer to is kept, and what earlier ones need is removed.
        """
        assert self._sink is not None
        rows = self._sink.commit()
        self._flush_optimizer()
        recorded = {} if self._recorder is None else {"records": len(self._recorder)}
        averaged = {} if self._averages is None else self._averages.state(rows)
        return {"rows": rows, "step": self._step, **recorded, **averaged}

    def _flush_optimizer(self) -> None:
        """Write the optimiser's records beside the rows, once there is a store."""
        if self._recorder is not None and self._sink is not None and self._sink.store is not None:
            self._recorder.flush()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the training: rows that were collected after it are dropped.

        Raises
        ------
        MismatchError
            If the store has fewer rows, or those of another number of processes, or averages that the checkpoint refers
            to are gone.
        """
        rows = state["rows"]
        if self._averages is not None:
            self._close_sink()
            try:
                rows = self._averages.restore(state)
            finally:
                self._open_sink()
        assert self._sink is not None
        self._sink.drop_from(rows)
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
        self._noted.clear()
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

    @property
    def decided(self) -> bool:
        """Whether gradients were finite, so that something was compared."""
        return bool(self._check.errors) or not self._check.verifiable

    def facts(self) -> dict[str, Any]:
        """Return what a store records."""
        return self._check.facts() | {"of": "sums over a batch"}


def _nothing(*_: Any) -> None:
    """Receive nothing."""


def _owners(sequences: Sequence[int], b: int, device: torch.device) -> Tensor:
    owners = torch.as_tensor(sequences, device=device)
    if owners.dim() != 1 or owners.is_floating_point() or set(owners.tolist()) != set(range(b)):
        raise InputError(f"expected the index of each sequence's sample, of {b} samples; received {sequences!r}")
    return owners


def _facts(model: nn.Module) -> dict[str, Any]:
    return {"fingerprint": fingerprint_as(model, None), "class": type(model).__name__}

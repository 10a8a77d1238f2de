"""Rows collected while a model trains: gathered in the backward passes that train it, with none of their own.

Taps stay on the model in its own mode, and parameters receive their gradients: nothing of the training changes. With a
batch's loss L = c Σ_s w_s ℓ_s, the gradient of a layer's output holds c w_s δ_s at sample s, so that gathered entries
are divided by c w_s.

A training loop need not have single samples' losses to compare rows with. So on the first batch, entries summed over
its samples must be the gradients that parameters receive; and where the losses are given (:meth:`Step.record`), the
first and the last are differentiated by themselves, to find out whether samples mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from operator import itemgetter
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.errors import InputError, MismatchError
from ooc_influence.extract.check import LayersDisagreeError
from ooc_influence.extract.collected_rows import CollectedRows
from ooc_influence.extract.data import as_list
from ooc_influence.extract.extraction import parse_device
from ooc_influence.extract.fingerprint import fingerprint_as
from ooc_influence.extract.layers import Use, find_uses
from ooc_influence.extract.online import ChosenSamples, Selector, choose_samples
from ooc_influence.extract.optimizer import OptimizerRecorder
from ooc_influence.extract.passes import RowGatherer
from ooc_influence.extract.sum_check import SumCheck
from ooc_influence.extract.taps import Taps, tapped_in_training
from ooc_influence.options import CollectOptions
from ooc_influence.store import WEIGHT, parse_path

Weights = npt.ArrayLike | Tensor
_COLUMNS = ("example", "step")  # of every row; a sample has a row for each step that it is in
_CHOSEN = ("score", "chosen")  # of every row where samples are chosen


class Step:
    """A batch whose rows are being collected; made by :meth:`Collector.step`."""

    def __init__(self, collector: Collector | None, count: int, scale: float = 1.0) -> None:
        self._collector, self._count, self.scale = collector, count, scale
        self.losses: npt.NDArray[np.float32] | None = None
        self.chosen: ChosenSamples | None = None
        self.owners: Tensor | None = None  # the sample of each sequence of the model's batch, where there are several
        self.received = False  # whether a layer's gradient was, of the pass that trains

    def of_samples(self, rows: Tensor) -> Tensor:
        """Return the rows of samples, (b, k), the sums of those of their sequences."""
        if self.owners is None:
            return rows
        return rows.new_zeros(self._count, rows.shape[1]).index_add_(0, self.owners, rows)

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
            if self.owners is None:  # otherwise samples have several sequences
                self._collector._probe(losses)


class Collector:
    """Collects rows while a model trains; made by :func:`~ooc_influence.collect`, and used as a context.

    Attributes
    ----------
    path : path
        The store's.
    every : int
        Rows are collected of every such step.
    """

    def __init__(self, model: nn.Module, output: CollectedRows, options: CollectOptions) -> None:
        self.path, self.every = output.path, options["every"]
        self._model, self._output, self._options = model, output, options
        mask, reduction = output.plan.mask, output.plan.reduction
        self._device = parse_device(model, None)
        self._mean = options["loss"] == "mean"
        self._uses = find_uses(model, [module.layer for module in mask.modules])
        self._gatherer = RowGatherer(mask, self._device, reduction)
        self._selector: Selector | None = options["select"]
        self._step = -1
        self._taps: Taps | None = None
        self._check: SumCheck | None = None
        self._recorder: OptimizerRecorder | None = None
        if options["optimizer"] is not None:
            recorded = options["optimizer_every"], options["optimizer_metric"]
            self._recorder = OptimizerRecorder(options["optimizer"], mask, reduction, self._uses, *recorded)
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        plan = self._output.plan
        with ExitStack() as undo:
            self._taps = undo.enter_context(
                tapped_in_training(self._model, self._uses, self._device, plan.mask.empty_modules)
            )
            undo.callback(self._output.close)
            self._output.open(self._sources(), self._device)
            if self._options["check_gradients"]:
                self._check = SumCheck(self._uses, self._device, plan, self._model)
            if self._recorder is not None:
                self._recorder.open(parse_path(self.path))
                undo.callback(self._recorder.close)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._undo:
            self._flush_optimizer()
            if kind is None:
                self._output.finish(
                    {"fingerprint": fingerprint_as(self._model, None), "class": type(self._model).__name__}
                )

    def fold(self) -> None:
        """Add the rows collected since the last time to the averages, at the end of an epoch, say; ``average=True``.

        Until then they take their own room on the disk. The end of the context does it, too.

        Raises
        ------
        InputError
            Of a collector of single rows.
        """
        self._output.fold()

    def _sources(self) -> dict[str, Callable[[Any], Any]]:
        """Return where the columns of rows come from: what :meth:`step` was given."""
        requested = self._options["columns"]
        recorded = (
            *_COLUMNS,
            *(() if self._selector is None else _CHOSEN),
            *(() if self._recorder is None else (WEIGHT,)),
        )
        reserved = (*recorded, *self._output.reserved)
        if set(requested) & set(reserved):
            raise InputError(f"expected columns beside {', '.join(reserved)}; received {', '.join(requested)}")
        return {name: itemgetter(name) for name in (*recorded, *requested)}

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
        if self._taps is None:
            raise InputError("expected a step inside the collector's context; received one outside: use 'with'")
        self._output.check_step(names)
        multipliers = scale * self._weights(weights, len(names))
        batch = {"example": names, "step": [self._step] * len(names), **self._columns(columns, len(names))}
        now = Step(self, len(names), scale)
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
            rows, norms = self._gatherer.reduced(self._divided(rows, multipliers, now))
        else:
            chosen = self._chosen(now)
            rows, norms, multipliers = chosen.rows, chosen.norms, multipliers * chosen.weights
            batch |= chosen.columns
        self._end_of_step(batch, multipliers)
        self._output.take(batch, now.losses, rows, norms)
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
        self._taps.differentiate(losses.sum() * now.scale, self._gatherer.adding(rows))
        return choose_samples(self._selector, *self._gatherer.reduced(now.of_samples(rows) / now.scale))

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
        factors = torch.as_tensor(weights, dtype=torch.float32, device=self._device)
        if factors.shape != (b,) or not bool((factors > 0).all()):
            raise InputError(f"expected positive weights of {b} samples; received {tuple(factors.shape)}: {weights!r}")
        return factors

    def _columns(self, columns: Mapping[str, Any], b: int) -> dict[str, list[Any]]:
        expected = set(self._options["columns"])
        if set(columns) != expected:
            raise InputError(
                f"expected values of {', '.join(sorted(expected)) or 'no further columns'}; received "
                f"{', '.join(sorted(columns)) or 'none'}: name the columns of all steps in collect(columns=...)"
            )
        by_name = {name: as_list(value) if np.ndim(value) else [value] * b for name, value in columns.items()}
        for name, values in by_name.items():
            if len(values) != b:
                raise InputError(f"expected one {name} for each of {b} samples; received {len(values)}")
        return by_name

    def _probe(self, losses: Tensor) -> None:
        """On the first batch, find out whether samples mix."""
        if self._check is not None and self._taps is not None and losses.requires_grad and len(losses) > 1:
            self._taps.probe(losses)

    def _finish_check(self, rows: Tensor, b: int) -> None:
        """Compare the first batch's entries with autograd's gradients of the parameters; the next's if it overflows."""
        check, self._check = self._check, None
        assert check is not None
        disagree = check.disagreeing(rows, b)
        if disagree:
            raise LayersDisagreeError.of(disagree)
        if check.decided:
            self._output.sink.verified(check.facts())
        else:
            self._check = check

    def state_dict(self) -> dict[str, Any]:
        """Commit what was collected, and return what belongs into a checkpoint of the training: rows and step.

        Of a training in several processes, each has to make this call; what it returns is the same. Of averages, what
        this and the last state refer to is kept, and what earlier ones need is removed.
        """
        rows = self._output.state()
        self._flush_optimizer()
        recorded = {} if self._recorder is None else {"records": len(self._recorder)}
        return {**rows, "step": self._step, **recorded}

    def _flush_optimizer(self) -> None:
        """Write the optimiser's records beside the rows, once there is a store."""
        if self._recorder is not None and self._output.made:
            self._recorder.flush()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the training: rows that were collected after it are dropped.

        Raises
        ------
        MismatchError
            If the store has fewer rows, or those of another number of processes, or averages that the checkpoint refers
            to are gone.
        """
        self._output.restore(state)
        if self._recorder is not None:
            if "records" not in state:
                raise MismatchError(
                    "expected a checkpoint of a training whose optimiser was recorded; received one without: continue "
                    "without optimizer=, or collect to another path"
                )
            self._recorder.truncate(state["records"])
        self._step = state["step"]


def _nothing(*_: Any) -> None:
    """Receive nothing."""


def _owners(sequences: Sequence[int], b: int, device: torch.device) -> Tensor:
    owners = torch.as_tensor(sequences, device=device)
    if owners.dim() != 1 or owners.is_floating_point() or set(owners.tolist()) != set(range(b)):
        raise InputError(f"expected the index of each sequence's sample, of {b} samples; received {sequences!r}")
    return owners

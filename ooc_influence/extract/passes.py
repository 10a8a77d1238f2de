"""Passes over the data: the model runs over batches, and the gathered rows go to the sink."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError, MemoryBudgetError, listed, warn
from ooc_influence.extract.checkpoints import Checkpoint
from ooc_influence.extract.data import (
    Batches,
    Batching,
    BudgetBatches,
    Numbers,
    batch_size,
    open_batches,
    to_device,
)
from ooc_influence.extract.gather import MaskGatherer, make_reducer
from ooc_influence.extract.layers import Use
from ooc_influence.extract.losses import active_draws, rows_of_batch, sampled_labels
from ooc_influence.extract.packing import SignPacker
from ooc_influence.extract.pilot_rows import KnownRows, same_losses
from ooc_influence.extract.sink import Computed, Sink
from ooc_influence.extract.taps import PerSampleLoss, Taps, out_of_memory, tapped
from ooc_influence.linalg import LayerMoments
from ooc_influence.linalg.device import send_array
from ooc_influence.memory import BATCH_COPIES, BLOCK_BYTES, available, format_bytes
from ooc_influence.progress import Progress
from ooc_influence.store import LograReduction, Mask, Reduction

logger = logging.getLogger("ooc_influence")
_LOOKED_UP = 4  # copies of known rows that are held together: as read, whitened, squared, stored


@dataclass(frozen=True)
class ModelSetup:
    """A model, its loss, and how it is run."""

    model: torch.nn.Module
    per_sample_loss: PerSampleLoss
    device: torch.device
    progress: bool | None = None
    check: bool = True  # whether gathered entries are compared with autograd
    label_seed: int | None = None  # of labels sampled from the model; None for the data set's


class RowGatherer:
    """Computes a batch's rows: kept entries or projected numbers, times the reduction.

    With ``checkpoints`` of the model, the mean of the rows at all of them and at the model as it is, whose losses are
    returned.
    """

    def __init__(
        self, mask: Mask, device: torch.device, reduction: Reduction | None = None,
        checkpoints: Sequence[Checkpoint] = (),
    ) -> None:  # fmt: skip
        self._k, self._device, self._checkpoints = mask.k, device, checkpoints
        self.row_bytes = 4 * mask.k  # of a row before the reduction
        logra = reduction if isinstance(reduction, LograReduction) else None
        self._gather = MaskGatherer(mask, device, logra)
        self._masked = logra is None
        self._reduce = None if reduction is None or logra else make_reducer(reduction, device)
        damping = None if reduction is None else reduction.facts.get("whitened")
        self._whitening = None
        if damping is not None:
            self._whitening = send_array((1 / LayerMoments.of(mask).scale(damping)).astype(np.float32), device)

    def __call__(self, taps: Taps, per_sample_loss: PerSampleLoss, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (b,), compressed gradients (b, k) float32 and masked norms (b,) of a batch, on the device.

        Norms are of whitened rows where the reduction is of these.
        """
        losses, rows = self._masked_rows(taps, per_sample_loss, batch)
        for checkpoint in self._checkpoints:
            with checkpoint.loaded(taps.model):
                rows += self._masked_rows(taps, per_sample_loss, batch)[1]
        if self._checkpoints:
            rows /= len(self._checkpoints) + 1
        return losses, *self.reduced(rows)

    def room(self, b: int) -> Tensor:
        """Return zeros for the masked rows of b samples, (b, k), if they fit the free memory."""
        _check_memory(b, self._k)
        return torch.zeros((b, self._k), device=self._device)

    def adding(self, rows: Tensor) -> Callable[[Use, Any, Any], None]:
        """Return a receiver (use, x, δ) that adds a use's entries to masked rows (b, k)."""
        return lambda use, x, delta: self._gather.add(rows, use, x, delta)

    def reduced(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return masked rows (b, k) times the reduction, (b, columns), and their norms (b,), on the device."""
        whole = rows if self._whitening is None else rows * self._whitening
        norms = torch.linalg.vector_norm(whole, dim=1, dtype=torch.float64)
        return rows if self._reduce is None else self._reduce(rows), norms

    def _masked_rows(self, taps: Taps, per_sample_loss: PerSampleLoss, batch: Any) -> tuple[Tensor, Tensor]:
        """Return losses (b,) and rows before the reduction (b, k) of a batch, with the model as it is."""
        rows = torch.empty(0)

        def receiver(b: int) -> Any:
            nonlocal rows
            rows = self.room(b)
            return self.adding(rows)

        losses = taps.run(per_sample_loss, batch, receiver, (lambda: rows) if self._masked else None)
        return losses, rows


def _check_memory(b: int, k: int) -> None:
    """Refuse a batch whose rows do not fit the free memory; small ones are not checked."""
    size = int(BATCH_COPIES * 4 * b * k)
    if size <= BLOCK_BYTES or size <= (free := available(size)):
        return
    fits = free * b // size
    smaller = f"batches of at most {fits}, BudgetBatches, whose budget shrinks by itself, or " if fits else ""
    raise MemoryBudgetError(
        f"a batch of {b} samples with {k} entries each needs {format_bytes(size)}, {format_bytes(free)} are free: use "
        f"{smaller}a compressor that keeps fewer entries"
    )


class PendingTransfer:
    """What :class:`Computed` holds of a batch, being copied from the device."""

    def __init__(self, *values: Tensor) -> None:
        self._event = None
        if values[0].is_cuda:
            pinned = [torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for v in values]
            for host, value in zip(pinned, values, strict=True):
                host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._sources, values = values, tuple(pinned)  # the sources must outlive the copy
        self._values = values

    @classmethod
    def of(cls, packer: SignPacker | None, losses: Tensor, rows: Tensor, norms: Tensor) -> PendingTransfer:
        """Start copying a batch's results in the form that the sink takes, which a packer makes (:class:`Sink`)."""
        sums = losses.new_empty((len(losses), 0), dtype=torch.float64)
        if packer is not None:
            rows, sums = packer(rows)
        return cls(losses, rows, sums, norms)

    def result(self) -> Computed:
        """Wait for the copies to the host, and return them."""
        if self._event is not None:
            self._event.synchronize()
        losses, rows, sums, norms = (value.cpu() for value in self._values)
        return Computed(losses.float().numpy(), rows.numpy(), sums.numpy(), norms.float().numpy())


class DataPass:
    """What both kinds of passes share: running the model, rows that are known, the progress line."""

    def __init__(
        self, sink: Sink, taps: Taps, gatherer: RowGatherer, setup: ModelSetup, bar: Progress,
        known: KnownRows | None = None,
    ) -> None:  # fmt: skip
        self._sink, self._taps, self._gatherer, self._bar = sink, taps, gatherer, bar
        self._loss, self._device = setup.per_sample_loss, setup.device
        self._packer = sink.packer(setup.device)
        self._tokens, self._began, self._labels_seen = 0, time.perf_counter(), False
        self._known = known or KnownRows()
        self._compared = self._computed = False  # whether losses of known rows were, whether a batch was

    def _compute(self, batch: Any) -> tuple[int, PendingTransfer]:
        """Run the model on a batch on the device; return its number of samples and the pending results."""
        losses, rows, norms = self._gatherer(self._taps, self._loss, batch)
        if self._taps.silent:
            self._warn_silent()
        draws = active_draws()
        if draws is not None and not self._labels_seen:
            self._sink.labels_drawn(draws.used)
            self._labels_seen = True
        facts = self._taps.verification()
        if facts is not None:
            self._sink.verified(facts)
        self._computed = True
        return len(losses), self._transfer(losses, rows, norms)

    def _transfer(self, losses: Tensor, rows: Tensor, norms: Tensor) -> PendingTransfer:
        """Start copying a batch's results to the host, in the form that the sink takes."""
        return PendingTransfer.of(self._packer, losses, rows, norms)

    def _look_up(self, numbers: Numbers) -> Computed | None:
        """Return the results for samples whose rows are known; None where these cannot be read."""
        rows = self._known.rows(numbers)
        if rows is None:
            return None
        losses = torch.from_numpy(self._known.losses(numbers)).to(self._device)
        return self._transfer(losses, *self._gatherer.reduced(torch.from_numpy(rows).to(self._device))).result()

    def _still_known(self, numbers: Numbers, batch: Any) -> bool:
        """Whether known rows are of this data: at first, the losses of a batch of known samples are compared."""
        if not self._compared:
            self._compared = True
            losses = self._taps.losses(self._loss, to_device(batch, self._device))
            if not same_losses(losses.float(), self._known.losses(numbers)):
                logger.warning("the pilot's rows are of other data or another loss, and not used")
                self._known = KnownRows()
        return len(self._known.numbers) > 0

    def _report(self, rows: int, tokens: int | None) -> None:
        self._bar.advance(rows)
        self._tokens += tokens or 0
        passed = max(1e-9, time.perf_counter() - self._began)
        notes = {"disk wait": f"{self._sink.waited / passed:.0%}"}
        if self._tokens:
            notes["tokens/s"] = f"{self._tokens / passed:.3g}"
        self._bar.note(**notes)

    def _check_end(self, row: int) -> None:
        sink = self._sink
        if sink.store is None:
            raise InputError("expected batches with samples; received none: the data set is empty")
        if sink.stop is not None and sink.next_row < sink.stop:
            raise InputError(
                f"expected samples for rows up to {sink.stop}; received {row}: give batches of the whole data set"
            )

    def _warn_silent(self) -> None:
        """Warn, once, of tapped layers that the first computed batch did not reach; if it reached none, refuse."""
        names = sorted(name or "(the model)" for name in self._taps.silent)
        if self._taps.all_silent:
            raise InputError(
                "expected the loss to use the layers of the model given; received one that reaches none of them: is "
                "per_sample_loss calling another model?"
            )
        self._taps.silent.clear()
        warn(f"no gradient reached these layers in the first batch, their entries are zero there: {listed(names, 8)}")


class BatchPass(DataPass):
    """A pass over the caller's own batches, in their order."""

    _sizes_agree: bool | None = None  # whether a batch's first tensor has its size; known after one batch
    _waiting: tuple[Any, int, PendingTransfer] | None = None  # the previous batch, its first row, its results

    def read(self, batches: Batches, first_row: int) -> None:
        """Read the batches to their end, or to the end of this writer's range."""
        sink = self._sink
        row, source = open_batches(batches, first_row, sink.next_row)
        self._bar.advance(sink.own_rows(first_row, row - first_row))
        for batch in source:
            if sink.stop is not None and row >= sink.stop:
                break
            try:
                with rows_of_batch(row):
                    count = self._one(batch, row)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise InputError(
                    f"expected the batch of rows from {row} on to fit the device; received out of memory: use smaller "
                    "batches, or BudgetBatches, whose budget shrinks by itself"
                ) from error
            self._report(sink.own_rows(row, count), token_count(batch))
            row += count
        self._finish()
        self._check_end(row)

    def _one(self, batch: Any, row: int) -> int:
        """Skip a batch, or compute it and store its rows; return its number of samples.

        The first batch is always run: its losses show whether the data is still the same.
        """
        size = None if self._sizes_agree is False else batch_size(batch)
        done = size is not None and row + size <= self._sink.next_row
        if done and self._sizes_agree:
            return size or 0
        if size is not None and self._sizes_agree and self._computed and self._take_known(batch, row, size):
            return size
        moved = to_device(batch, self._device)
        compare = done or (size is None and row < self._sink.next_row)
        losses = self._taps.losses(self._loss, moved) if compare else None
        if losses is not None and row + len(losses) <= self._sink.next_row:
            count = len(losses)
            self._sink.check_same_data(batch, row, losses.float().cpu().numpy())
        else:
            count, pending = self._compute(moved)
            if self._sizes_agree and size != count:
                raise InputError(
                    f"expected one loss for each of the batch's {size} samples; received {count}: "
                    "the first tensor of a batch needs one entry a sample on axis 0"
                )
            self._finish()
            self._waiting = (batch, row, pending)
            if self._device.type != "cuda":
                self._finish()
        self._sizes_agree = size == count
        return count

    def _take_known(self, batch: Any, row: int, size: int) -> bool:
        """Store the rows of a batch if all of them are known; return whether they are."""
        numbers = np.arange(row, row + size)
        if not self._known.covers(numbers) or not self._still_known(numbers, batch):
            return False
        computed = self._look_up(numbers)
        if computed is None:
            return False
        self._finish()
        self._sink.take(batch, row, computed)
        return True

    def _finish(self) -> None:
        """Store the rows of the previous batch, which were copied while this one ran."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            batch, row, pending = waiting
            self._sink.take(batch, row, pending.result())


class _Block:
    """The results for the missing samples ``low`` to ``end`` of a block ``first`` to ``last``, in the caller's order.

    ``known`` says for each sample of the block whether its row is known: such a row is not replaced.
    """

    def __init__(self, first: int, last: int, low: int, end: int) -> None:
        self.first, self.numbers, self.known = first, np.arange(first, last), np.zeros(last - first, bool)
        self._low, self._end = low, end
        self.rows: Computed | None = None

    def missing(self, part: Numbers) -> npt.NDArray[np.bool_]:
        """Return which samples of a part are missing, (b,)."""
        return (part >= self._low) & (part < self._end) & ~self.known[part - self.first]

    def put(self, part: Numbers, computed: Computed) -> None:
        """Put in the results for a part, those that are missing."""
        self.rows = computed.room(self._end - self._low) if self.rows is None else self.rows
        self.rows.put(np.where(self.missing(part), part - self._low, -1), computed)


class BudgetPass(DataPass):
    """A pass over samples batched by a budget, block by block."""

    def read(self, source: BudgetBatches, row_bytes: int, first_row: int) -> None:
        """Read all samples, or those of this writer's range; ``row_bytes`` are those of a row that leaves a batch."""
        sink = self._sink
        stop = first_row + len(source) if sink.stop is None else min(sink.stop, first_row + len(source))
        self._bar.advance(sink.own_rows(first_row, sink.next_row - first_row))
        self._check_start(source, first_row)
        for first, last in source.blocks(row_bytes, max(sink.start, sink.next_row) - first_row):
            if first + first_row >= stop:
                break
            self._block(source, first, last, first_row)
        self._check_end(first_row + len(source))

    def _check_start(self, source: BudgetBatches, first_row: int) -> None:
        """Compare the losses of a few finished rows with those stored: the data must still be the same."""
        sink = self._sink
        finished = np.arange(sink.start, sink.next_row) - first_row
        finished = finished[finished >= 0][-4:]
        if sink.store is None or not len(finished):
            return
        batch = to_device(source.load(finished), self._device)
        with rows_of_batch(first_row + finished):
            losses = self._taps.losses(self._loss, batch).float().cpu().numpy()
        sink.check_same_data(None, first_row + int(finished[0]), losses)

    def _block(self, source: BudgetBatches, first: int, last: int, first_row: int) -> None:
        """Compute a block's missing rows, and store them in the caller's order.

        Batches are cut from the samples whose rows are not known, whether they are missing or not: so a resumed run
        has the batches of one that was not interrupted.
        """
        sink = self._sink
        low = max(first, sink.next_row - first_row)
        end = last if sink.stop is None else min(last, sink.stop - first_row)
        block = _Block(first, last, low, end)
        self._put_known(source, block, first_row)
        todo = [part for part in source.cut(block.numbers[~block.known]) if block.missing(part).any()]
        if not todo and not self._computed:  # a first batch, for what is checked on it
            todo = source.cut(block.numbers[block.known][:2])[:1]
        self._compute_parts(source, todo, block, first_row)
        if block.rows is not None:
            sink.take(None, first_row + low, block.rows)
        if source.halved:
            sink.record(batching=source.settings())

    def _put_known(self, source: BudgetBatches, block: _Block, first_row: int) -> None:
        """Put the known rows of a block into it, a few at a time: the same ones together, whichever are missing."""
        numbers = block.numbers[np.isin(block.numbers, self._known.numbers)]
        missing = numbers[block.missing(numbers)]
        if not len(missing):
            block.known[numbers - block.first] = True
            return
        part = source.cut(missing[:4])[0]
        with rows_of_batch(first_row + part):
            if not self._still_known(part, source.load(part)):
                return
        size = max(1, BLOCK_BYTES // (_LOOKED_UP * self._gatherer.row_bytes))
        for group in np.split(numbers, range(size, len(numbers), size)):
            own = int(block.missing(group).sum())
            computed = self._look_up(group) if own else None
            if computed is not None:
                block.put(group, computed)
                self._report(own, None)
            block.known[group - block.first] = computed is not None or not own

    def _compute_parts(self, source: BudgetBatches, todo: list[Numbers], block: _Block, first_row: int) -> None:
        """Run the model on batches, and on smaller ones where they do not fit; put their rows into a block."""
        waiting: tuple[Numbers, PendingTransfer] | None = None
        while todo:
            part = todo.pop(0)
            if source.halved and source.padded(part)[1] > (source.tokens or np.inf) and len(part) > 1:
                todo = source.cut(part) + todo
                continue
            with rows_of_batch(first_row + part):
                computed = self._compute_or_none(source.load(part))
            if computed is None:
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                todo = source.halve(part) + todo
                continue
            count, pending = computed
            if count != len(part):
                raise InputError(f"expected one loss for each of {len(part)} samples; received {count}")
            if waiting is not None:
                block.put(waiting[0], waiting[1].result())
            waiting = (part, pending)
            missing = block.missing(part)
            self._report(int(missing.sum()), int(source.lengths[part[missing]].sum()))
        if waiting is not None:
            block.put(waiting[0], waiting[1].result())

    def _compute_or_none(self, batch: Any) -> tuple[int, PendingTransfer] | None:
        """Run the model on a batch; None if it does not fit. On return nothing refers to its tensors any more."""
        try:
            return self._compute(to_device(batch, self._device))
        except MemoryBudgetError:
            return None
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None


def token_count(batch: Any) -> int | None:
    """Return the tokens of a Hugging Face batch without its padding; None for others."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor):
            return int(mask.sum())
        ids = batch.get("input_ids")
        return ids.numel() if isinstance(ids, Tensor) else None
    return None


def fill(
    sink: Sink, setup: ModelSetup, batches: Batches | BudgetBatches, batching: Batching, *,
    total: int | None, label: str = "extract", checkpoints: Sequence[Checkpoint] = (), known: KnownRows | None = None,
) -> None:  # fmt: skip
    """Run the model over the batches whose rows are missing; ``total``: their samples, if that is known.

    Rows that are ``known``, by sample number, are stored as they are.
    """
    plan = sink.plan
    with (
        nullcontext() if setup.label_seed is None else sampled_labels(setup.label_seed),
        tapped(
            setup.model,
            [module.layer for module in plan.mask.modules],
            setup.device,
            skip=plan.mask.empty_modules,
            probe=batching.check_independence,
            check=setup.check,
            mask=None if isinstance(plan.reduction, LograReduction) else plan.mask,
        ) as taps,
        Progress(label, total if sink.stop is None else sink.own_rows(0, sink.stop), setup.progress) as bar,
    ):
        parts = (sink, taps, RowGatherer(plan.mask, setup.device, plan.reduction, checkpoints), setup, bar, known)
        if isinstance(batches, BudgetBatches):
            BudgetPass(*parts).read(batches, sink.row_bytes, batching.first_row)
        else:
            BatchPass(*parts).read(batches, batching.first_row)

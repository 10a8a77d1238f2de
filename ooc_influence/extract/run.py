"""Compressed gradients of a batch: what the taps hand over, gathered into the columns of the mask."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError, MemoryBudgetError, warn
from ooc_influence.extract.batching import Batches, BudgetBatches, Numbers, batch_size, open_batches, to_device
from ooc_influence.extract.gather import MaskGatherer, make_reducer
from ooc_influence.extract.sink import Computed, Sink
from ooc_influence.extract.taps import PerSampleLoss, Taps, out_of_memory
from ooc_influence.memory import BLOCK_BYTES, available, format_bytes
from ooc_influence.progress import Progress
from ooc_influence.store import LograReduction, Mask, Reduction

Floats = npt.NDArray[np.float32]
# of a batch's rows at the peak, on the host: themselves, a layer's part, the writer's (measured: 3.3 to 3.5)
_COPIES = 3.5


class RowGatherer:
    """Computes the kept entries of every sample of a batch, or the projected numbers of its layers.

    Parameters
    ----------
    mask : Mask
        The kept entries, k in all.
    device : torch.device
        Where rows are put together; layers may be on others.
    reduction : Reduction, optional
        What rows are multiplied by.
    """

    def __init__(self, mask: Mask, device: torch.device, reduction: Reduction | None = None) -> None:
        self._k, self._device = mask.k, device
        logra = reduction if isinstance(reduction, LograReduction) else None
        self._gather = MaskGatherer(mask, device, logra)
        self._masked = logra is None
        self._reduce = None if reduction is None or logra else make_reducer(reduction, device)

    def __call__(self, taps: Taps, per_sample_loss: PerSampleLoss, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (b,), compressed gradients (b, k) float32 and masked norms (b,) of a batch, on the device.

        Raises
        ------
        InputError, UnsupportedModelError
            See :meth:`Taps.run`.
        MemoryBudgetError
            If the rows do not fit the memory that is free.
        """
        rows = torch.empty(0)

        def receiver(b: int) -> Any:
            nonlocal rows
            _check_room(b, self._k)
            rows = torch.zeros((b, self._k), device=self._device)
            return lambda use, x, delta: self._gather.add(rows, use, x, delta)

        losses = taps.run(per_sample_loss, batch, receiver, (lambda: rows) if self._masked else None)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return losses, rows if self._reduce is None else self._reduce(rows), norms


def _check_room(b: int, k: int) -> None:
    """Refuse a batch whose rows would have the process killed; small ones are not looked at."""
    need = int(_COPIES * 4 * b * k)
    if need <= BLOCK_BYTES or need <= (free := available(need)):
        return
    fits = free * b // need
    smaller = f"batches of at most {fits}, BudgetBatches, whose budget shrinks by itself, or " if fits else ""
    raise MemoryBudgetError(
        f"a batch of {b} samples with {k} entries each needs {format_bytes(need)}, {format_bytes(free)} are free: use "
        f"{smaller}a compressor that keeps fewer entries"
    )


class PendingTransfer:
    """Losses, rows and norms of a batch, on their way from the device."""

    def __init__(self, *values: Tensor) -> None:
        self._event = None
        if values[0].is_cuda:
            pinned = [torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for v in values]
            for host, value in zip(pinned, values, strict=True):
                host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._sources, values = values, tuple(pinned)  # sources must outlive the copy
        self._values = values

    def result(self) -> Computed:
        """Wait for the copies to the host, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return Computed(*(value.float().cpu().numpy() for value in self._values))


class _Waiting(NamedTuple):
    batch: Any
    row: int
    computed: PendingTransfer


class Run:
    """What both ways through the data share: the model's side, the progress line."""

    def __init__(
        self, target: Sink, taps: Taps, gatherer: RowGatherer, per_sample_loss: PerSampleLoss, device: torch.device,
        bar: Progress,
    ) -> None:  # fmt: skip
        self._target, self._taps, self._gatherer, self._loss = target, taps, gatherer, per_sample_loss
        self._device, self._bar = device, bar
        self._tokens, self._began = 0, time.perf_counter()

    def _compute(self, batch: Any) -> tuple[int, PendingTransfer]:
        """Run the model on a batch on the device; return its number of samples and what is on its way."""
        losses, rows, norms = self._gatherer(self._taps, self._loss, batch)
        if self._taps.silent:
            self._warn_silent()
        facts = self._taps.verification()
        if facts is not None:
            self._target.verified(facts)
        return len(losses), PendingTransfer(losses, rows, norms)

    def _report(self, rows: int, tokens: int | None) -> None:
        self._bar.advance(rows)
        self._tokens += tokens or 0
        passed = max(1e-9, time.perf_counter() - self._began)
        notes = {"disk wait": f"{self._target.waited / passed:.0%}"}
        if self._tokens:
            notes["tokens/s"] = f"{self._tokens / passed:.3g}"
        self._bar.note(**notes)

    def _check_end(self, row: int) -> None:
        target = self._target
        if target.store is None:
            raise InputError("expected batches with samples; received none: the data set is empty")
        if target.stop is not None and target.next_row < target.stop:
            raise InputError(
                f"expected samples for rows up to {target.stop}; received {row}: give batches of the whole data set"
            )

    def _warn_silent(self) -> None:
        """Say, once, which tapped layers the first computed batch did not reach; all of them is an error."""
        names = sorted(name or "(the model)" for name in self._taps.silent)
        if self._taps.all_silent:
            raise InputError(
                "expected the loss to use the layers of the model given; received one that reaches none of them: is "
                "per_sample_loss calling another model?"
            )
        self._taps.silent.clear()
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warn(f"no gradient reached these layers in the first batch, their entries are zero there: {named}")


class BatchRun(Run):
    """Through the caller's own batches, in their order."""

    _sizes_hold: bool | None = None  # whether a batch's first tensor tells its size; known after one batch
    _waiting: _Waiting | None = None

    def read(self, batches: Batches, first_row: int) -> None:
        """Read the batches to their end, or to the end of this writer's range.

        Raises
        ------
        InputError
            If there are none, or too few for the range.
        """
        target = self._target
        row, source = open_batches(batches, first_row, target.next_row)
        self._bar.advance(target.own(first_row, row - first_row))
        for batch in source:
            if target.stop is not None and row >= target.stop:
                break
            try:
                count = self._one(batch, row)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise InputError(
                    f"expected the batch of rows from {row} on to fit the device; received out of memory: use smaller "
                    "batches, or BudgetBatches, whose budget shrinks by itself"
                ) from error
            self._report(target.own(row, count), token_count(batch))
            row += count
        self._finish()
        self._check_end(row)

    def _one(self, batch: Any, row: int) -> int:
        """Pass over a batch, or compute it and store its rows; return its number of samples.

        The first batch is always looked at: its losses show whether the data is still the same.
        """
        size = None if self._sizes_hold is False else batch_size(batch)
        done = size is not None and row + size <= self._target.next_row
        if done and self._sizes_hold:
            return size or 0
        moved = to_device(batch, self._device)
        look = done or (size is None and row < self._target.next_row)
        losses = self._taps.losses(self._loss, moved) if look else None
        if losses is not None and row + len(losses) <= self._target.next_row:
            count = len(losses)
            self._target.check_same_data(batch, row, losses.float().cpu().numpy())
        else:
            count, computed = self._compute(moved)
            self._check_size(size, count)
            self._finish()
            self._waiting = _Waiting(batch, row, computed)
            if self._device.type != "cuda":
                self._finish()
        self._sizes_hold = size == count
        return count

    def _finish(self) -> None:
        """Store the rows of the batch before, whose copy ran beside this one."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._target.take(waiting.batch, waiting.row, waiting.computed.result())

    def _check_size(self, size: int | None, count: int) -> None:
        if self._sizes_hold and size != count:
            raise InputError(
                f"expected one loss for each of the batch's {size} samples; received {count}: "
                "the first tensor of a batch needs one entry a sample on axis 0"
            )


class BudgetRun(Run):
    """Through samples batched by a budget, block by block."""

    def read(self, source: BudgetBatches, k: int, first_row: int) -> None:
        """Read all samples, or those of this writer's range.

        Raises
        ------
        InputError
            If there are none, or a sample does not fit the device.
        """
        target = self._target
        stop = first_row + len(source) if target.stop is None else min(target.stop, first_row + len(source))
        self._bar.advance(target.own(first_row, target.next_row - first_row))
        self._check_start(source, first_row)
        for first, last in source.blocks(k, max(target.start, target.next_row) - first_row):
            if first + first_row >= stop:
                break
            self._block(source, k, first, last, first_row)
        self._check_end(first_row + len(source))

    def _check_start(self, source: BudgetBatches, first_row: int) -> None:
        """Check that a few finished rows have the losses stored: that it is still the same data."""
        target = self._target
        finished = np.arange(target.start, target.next_row) - first_row
        finished = finished[finished >= 0][-4:]
        if target.store is None or not len(finished):
            return
        batch = to_device(source.load(finished), self._device)
        losses = self._taps.losses(self._loss, batch).float().cpu().numpy()
        target.check_same_data(None, first_row + int(finished[0]), losses)

    def _block(self, source: BudgetBatches, k: int, first: int, last: int, first_row: int) -> None:
        """Compute a block's missing rows, and store them in the caller's order."""
        target = self._target
        low = max(first, target.next_row - first_row)
        end = last if target.stop is None else min(last, target.stop - first_row)
        numbers = np.arange(first, last)
        block = Computed.empty(end - low, k)
        todo = [part for part in source.cut(numbers) if ((part >= low) & (part < end)).any()]
        waiting: tuple[Numbers, PendingTransfer] | None = None
        while todo:
            part = todo.pop(0)
            if source.halved and source.padded(part)[1] > (source.tokens or np.inf) and len(part) > 1:
                todo = source.cut(part) + todo
                continue
            found = self._compute_or_none(source.load(part))
            if found is None:
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                todo = source.halve(part) + todo
                continue
            count, computed = found
            if count != len(part):
                raise InputError(f"expected one loss for each of {len(part)} samples; received {count}")
            if waiting is not None:
                block.put(waiting[0] - low, waiting[1].result())
            waiting = (part, computed)
            mine = (part >= low) & (part < end)
            self._report(int(mine.sum()), int(source.lengths[part[mine]].sum()))
        if waiting is not None:
            block.put(waiting[0] - low, waiting[1].result())
        target.take(None, first_row + low, block)
        if source.halved:
            target.record(batching=source.settings())

    def _compute_or_none(self, batch: Any) -> tuple[int, PendingTransfer] | None:
        """Run the model on a batch; None where it does not fit. On return nothing holds its tensors any more."""
        try:
            return self._compute(to_device(batch, self._device))
        except MemoryBudgetError:
            return None
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None


def token_count(batch: Any) -> int | None:
    """Return the tokens of a batch that says which are padding; None for others."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor):
            return int(mask.sum())
        ids = batch.get("input_ids")
        return ids.numel() if isinstance(ids, Tensor) else None
    return None

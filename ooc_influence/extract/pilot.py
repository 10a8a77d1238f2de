"""The pilot: a look at some samples before the mask is drawn and the basis chosen.

For importance sampling, one pass sums squares of every layer's inputs and output gradients. For a reduction, wide rows
of more samples go into a store of their own beside the one to be made, which a killed run finds again; their
eigenbasis then becomes part of the real store, and the pilot's is removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ooc_influence.compress import PilotMoments
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.extract.batching import Batches, BudgetBatches, batch_size, count_rows, to_device
from ooc_influence.extract.entries import BiasEntries
from ooc_influence.extract.layers import Use
from ooc_influence.extract.tapping import tapped
from ooc_influence.extract.taps import PerSampleLoss
from ooc_influence.memory import parse_bytes
from ooc_influence.progress import Progress
from ooc_influence.store import LayerShape, StorePath

logger = logging.getLogger("ooc_influence")


@dataclass(frozen=True)
class PilotData:
    """What a pilot is run on.

    Attributes
    ----------
    model : nn.Module
        The model.
    per_sample_loss : callable
        Its loss.
    batches : iterable or callable
        The pilot's own batches, or the data to take some from.
    device : torch.device
        Where to run.
    progress : bool or None
        Show a progress line.
    memory : int, str or None
        Budget for what is made of the pilot's rows.
    check : bool
        Compare what layers hand over with autograd.
    verification : dict
        What that found, once a pass was made.
    """

    model: torch.nn.Module
    per_sample_loss: PerSampleLoss
    batches: Batches | BudgetBatches
    device: torch.device
    progress: bool | None
    memory: int | str | None = None
    check: bool = True
    verification: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_bytes(self.memory)  # a mistake is told before the model runs

    def take(self, samples: int) -> Iterator[Any]:
        """Yield batches with at least ``samples`` samples, spread over the data where they can be addressed."""
        return take_evenly(self.batches, samples)

    def count(self) -> int | None:
        """Return how many samples there are, where that is known without reading them."""
        return len(self.batches) if isinstance(self.batches, BudgetBatches) else count_rows(self.batches)

    def part(self, samples: int) -> Batches | BudgetBatches:
        """Return the batches of :meth:`take`, to be read as often as needed and never held all at once."""
        if isinstance(self.batches, BudgetBatches):
            return self.batches.part(np.array(_even(len(self.batches), samples), np.int64))
        return _Taken(self.batches, samples)

    def moments(self, layers: Sequence[LayerShape], samples: int) -> list[PilotMoments]:
        """Return second moments of every layer's rows and columns over ``samples`` samples.

        Batches with NaN or Inf do not count: the extraction that follows names the samples, or skips them.

        Raises
        ------
        InputError, UnsupportedModelError
            See :meth:`Taps.run`.
        NonFiniteError
            If no batch is finite.
        """
        sums, skipped = MomentSums(layers), 0
        with (
            tapped(self.model, layers, self.device, probe=True, check=self.check) as taps,
            Progress("pilot", samples, self.progress) as bar,
        ):
            for batch in self.take(samples):
                part = MomentSums(layers)
                losses = taps.run(self.per_sample_loss, to_device(batch, self.device), part.receiver)
                part.samples = len(losses)
                if part.finite:
                    sums.join(part)
                else:
                    skipped += len(losses)
                bar.advance(len(losses))
            self.verification.update(taps.verification() or {})
        if skipped:
            if not sums.samples:
                raise NonFiniteError(
                    "expected finite pilot gradients; received NaN or Inf in every batch: check data and loss", []
                )
            logger.warning("batches with NaN or Inf, of %d samples, do not count in the pilot", skipped)
        return sums.result()

    def verify(self, layers: Sequence[LayerShape]) -> None:
        """Compare what layers hand over for a first batch with autograd.

        Raises
        ------
        InputError, UnsupportedModelError
            See :meth:`Taps.run`.
        """
        with tapped(self.model, layers, self.device, check=True) as taps:
            for batch in self.take(2):
                taps.run(self.per_sample_loss, to_device(batch, self.device), lambda b: lambda use, x, delta: None)
                break
            self.verification.update(taps.verification() or {})


class _Taken:
    def __init__(self, batches: Batches, samples: int) -> None:
        self._batches, self._samples = batches, samples

    def __iter__(self) -> Iterator[Any]:
        return take_evenly(self._batches, self._samples)


def take_evenly(batches: Batches | BudgetBatches, samples: int) -> Iterator[Any]:
    """Yield batches that hold at least ``samples`` samples, evenly over the data or, of a stream, from its start.

    Raises
    ------
    InputError
        For a one-shot iterator, which the extraction could not read again.
    """
    if isinstance(batches, Iterator):
        raise InputError(
            "expected batches that can be read twice, once for the pilot; received an iterator: give a list, a "
            "DataLoader or a callable start_row -> iterable, or the pilot's own batches with pilot="
        )
    taken = 0
    for batch in _spread(batches, samples):
        if taken >= samples:
            return
        taken += batch_size(batch) or 1
        yield batch


def _spread(batches: Batches | BudgetBatches, samples: int) -> Iterable[Any]:
    if isinstance(batches, (list, tuple)) and batches:
        sizes = [batch_size(batch) or 1 for batch in batches]
        count = max(1, -(-samples // max(sizes)))
        while count < len(batches) and sum(sizes[place] for place in _even(len(batches), count)) < samples:
            count += 1  # the last batch, which is always among them, may be short
        return [batches[place] for place in _even(len(batches), count)]
    if isinstance(batches, BudgetBatches):
        numbers = np.array(_even(len(batches), samples), np.int64)
        return (batches.load(part) for part in (batches.cut(numbers) if len(numbers) else []))
    data = torch.utils.data
    if isinstance(batches, data.DataLoader) and batches.batch_size and hasattr(batches.dataset, "__getitem__"):
        size, collate, dataset = batches.batch_size, batches.collate_fn, batches.dataset
        places = _even(len(dataset), samples)  # type: ignore[arg-type]
        return (collate([dataset[place] for place in places[low : low + size]]) for low in range(0, len(places), size))
    return batches(0) if callable(batches) else batches


def _even(count: int, wanted: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted)).tolist()})


class MomentSums:
    """Sums of squares of layers' inputs and output gradients, in the product form of the entries."""

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self.samples = 0
        self._layers = layers
        self._sums: dict[tuple[int, str], list[Any]] = {}

    def receiver(self, b: int) -> Callable[[Use, Any, Any], None]:
        """Return what takes a batch of ``b`` samples; what an earlier try of it left is forgotten."""
        self._sums.clear()
        return self.add

    def add(self, use: Use, x: Any, delta: Any) -> None:
        """Add one module's input and output gradient of a batch."""
        found = use.kind.moments(use.shape, use.module, x, delta)
        parts = [found.rows.cpu().numpy(), found.cols.cpu().numpy(), found.tokens]
        sums = self._sums.setdefault((use.layer, use.shape.name), [0.0, 0.0, 0])
        for place, part in enumerate(parts):
            sums[place] = sums[place] + part

    @property
    def finite(self) -> bool:
        """Whether the sums are without NaN and Inf."""
        return all(np.isfinite(rows).all() and np.isfinite(cols).all() for rows, cols, _ in self._sums.values())

    def join(self, other: MomentSums) -> None:
        """Add the sums over other samples."""
        self.samples += other.samples
        for key, parts in other._sums.items():
            held = self._sums.setdefault(key, [0.0, 0.0, 0])
            self._sums[key] = [mine + part for mine, part in zip(held, parts, strict=True)]

    def result(self) -> list[PilotMoments]:
        """Return the moments of every layer that received gradients; of a tied weight those of each of its uses."""
        if not self.samples:
            raise InputError("expected pilot batches with samples; received none: the data set is empty")
        found = []
        for (number, _), (rows, cols, tokens) in sorted(self._sums.items(), key=lambda item: item[0]):
            height, width = self._layers[number].shape
            if len(rows) != height:
                continue  # a weight shared in another form: its other uses tell
            full = np.zeros(width)  # a tied module may lack the bias column
            full[: min(width, len(cols))] = cols[:width] / max(1, tokens)
            if self._layers[number].kind == BiasEntries.kind:
                full[:] = 1.0
            found.append(PilotMoments(number, rows / self.samples, full))
        return found


def pilot_path(path: StorePath) -> StorePath:
    """Return where the pilot's wide rows are kept until the store at ``path`` is there."""
    return path.with_name(f"{path.name}.pilot")

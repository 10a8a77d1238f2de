"""Batches: moved to the device, counted without running the model, advanced past finished rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ooc_influence.errors import InputError, warn

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


@dataclass(frozen=True)
class Batching:
    """How batches are read.

    Attributes
    ----------
    first_row : int
        Store row of the first sample of ``batches``. 0 where they are the whole data; to add further data to a store
        of n rows, give n: a run that was killed then resumes inside the added part.
    check_independence : bool
        Check on the first batch that no sample's loss depends on another sample (one extra backward pass).
    """

    first_row: int = 0
    check_independence: bool = True

    def __post_init__(self) -> None:
        if self.first_row < 0:
            raise InputError(f"expected first_row >= 0; received {self.first_row}")


@dataclass(frozen=True)
class Shard:
    """One of several writers that fill a store together: a contiguous share of its whole chunk groups.

    Attributes
    ----------
    index, count : int
        This writer and how many there are.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(f"expected shard (i, N) with 0 <= i < N; received ({self.index}, {self.count})")

    @classmethod
    def parse(cls, shard: tuple[int, int] | None) -> Shard | None:
        """Return the shard that ``(i, N)`` means; None where there is none.

        Raises
        ------
        InputError
            For anything but two whole numbers with 0 <= i < N.
        """
        if shard is None:
            return None
        numbers = tuple(shard) if isinstance(shard, (tuple, list)) else ()
        if len(numbers) != 2 or not all(type(number) is int for number in numbers):
            raise InputError(f"expected shard (i, N), two whole numbers; received {shard!r}")
        return cls(*numbers)

    def range(self, rows: int, group_rows: int) -> tuple[int, int]:
        """Return this writer's rows of a store of ``rows``, ``start`` to ``stop``, cut at groups; may be empty."""
        groups = -(-rows // group_rows)
        edges = (groups * self.index // self.count, groups * (self.index + 1) // self.count)
        return edges[0] * group_rows, min(rows, edges[1] * group_rows)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor on ``device``: tensors, tuples, lists, dicts, objects with ``.to``."""
    if isinstance(batch, Mapping) and not hasattr(batch, "to"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_make") and not hasattr(batch, "to"):
        return type(batch)._make(to_device(value, device) for value in batch)
    if type(batch) in (list, tuple):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, Tensor) and batch.is_inference():  # autograd cannot follow those
        with torch.inference_mode(False):
            return batch.to(device, copy=True)
    if not hasattr(batch, "to"):
        return batch
    moved = batch.to(device)
    return batch if moved is None else moved  # some classes move themselves and return nothing


def batch_size(batch: Any) -> int | None:
    """Return how many samples a batch holds, from its first tensor or array; None where that is not to be seen."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return len(batch) if batch.ndim else None
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    return next((size for size in map(batch_size, values) if size is not None), None)


def open_batches(batches: Batches, first_row: int, next_row: int) -> tuple[int, Iterable[Any]]:
    """Return the store row of the first sample to come, and the batches.

    A callable is asked for what starts at ``next_row``; an iterable starts where it starts.
    """
    if callable(batches):
        return max(first_row, next_row), batches(max(0, next_row - first_row))
    _warn_if_shuffled(batches)
    return first_row, batches


def _warn_if_shuffled(batches: Any) -> None:
    data = torch.utils.data
    sampler = getattr(getattr(batches, "batch_sampler", None), "sampler", getattr(batches, "sampler", None))
    if isinstance(sampler, (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)):
        warn(
            "batches come from a shuffling DataLoader: row numbers will not be data set indices and a killed run "
            "cannot resume; use shuffle=False"
        )


def count_rows(batches: Batches) -> int | None:
    """Return how many samples there are where that is known without reading them: a DataLoader or a list."""
    if isinstance(batches, (list, tuple)):
        sizes = [batch_size(batch) for batch in batches]
        return None if None in sizes else sum(size or 0 for size in sizes)
    if getattr(batches, "drop_last", False) or not isinstance(
        getattr(batches, "sampler", None), (torch.utils.data.SequentialSampler, torch.utils.data.RandomSampler)
    ):
        return None
    try:
        return len(batches.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return None

"""Batches: moved to the device, counted without running the model, advanced past finished rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ooc_influence.errors import InputError, OocInfluenceWarning

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
class Sharding:
    """One of several writers that fill a store together.

    Attributes
    ----------
    index, count : int
        This writer and how many there are.
    rows : int
        Rows of the whole store. Writer ``index`` owns a contiguous share of whole chunk groups.
    """

    index: int
    count: int
    rows: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count or self.rows < 1:
            raise InputError(
                f"expected 0 <= index < count and rows >= 1; received index={self.index}, count={self.count}, "
                f"rows={self.rows}"
            )

    def group_chunks(self, chunk_rows: int, most: int) -> int:
        """Return the chunks a group may have so that every writer gets a share."""
        return max(1, min(most, -(-self.rows // chunk_rows) // self.count))

    def range(self, group_rows: int) -> tuple[int, int]:
        """Return this writer's rows, ``start`` to ``stop``, cut at groups.

        Raises
        ------
        InputError
            If there are more writers than groups of rows.
        """
        groups = -(-self.rows // group_rows)
        if self.count > groups:
            raise InputError(
                f"expected at most {groups} writers for {self.rows} rows in chunks of {group_rows}; received "
                f"{self.count}: use fewer, or smaller chunks (Storage(chunk_rows=...))"
            )
        edges = (groups * self.index // self.count, groups * (self.index + 1) // self.count)
        return edges[0] * group_rows, min(self.rows, edges[1] * group_rows)


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
        warnings.warn(
            "batches come from a shuffling DataLoader: row numbers will not be data set indices and a killed run "
            "cannot resume; use shuffle=False",
            OocInfluenceWarning,
            stacklevel=5,
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

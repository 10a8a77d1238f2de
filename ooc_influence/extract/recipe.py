"""A recipe: what the command line needs to run somebody's model, as a Python function returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ooc_influence.extract.batching import Batches
from ooc_influence.extract.metadata import RowSource


@dataclass(frozen=True)
class Split:
    """Named data: batches, and what belongs to each row.

    Attributes
    ----------
    batches : iterable or callable
        As for :func:`extract_gradients`.
    ids, columns
        As for :func:`extract_gradients`.
    """

    batches: Batches
    ids: RowSource | None = None
    columns: Mapping[str, RowSource] | None = None


@dataclass(frozen=True)
class Recipe:
    """A model, its per-sample loss and its data; what the function named by ``--recipe`` returns.

    Attributes
    ----------
    model : torch.nn.Module
        The trained model.
    per_sample_loss : callable (model, batch) -> (b,) tensor
        Its loss.
    splits : mapping of str to Split or batches
        The data, by name (``"train"``, ``"test"``).
    loss_kind : str, optional
        As for :func:`extract_gradients`.
    query : callable (str) -> batch, optional
        Makes a batch of what somebody types or pastes as a new query (``serve``), one sample or several.
    """

    model: Any
    per_sample_loss: Any
    splits: Mapping[str, Split | Batches]
    loss_kind: str | None = None
    query: Any = None

    def split(self, name: str) -> Split:
        """Return a split by name.

        Raises
        ------
        KeyError
            If there is none of that name.
        """
        found = self.splits[name]
        return found if isinstance(found, Split) else Split(found)

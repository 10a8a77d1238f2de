"""What is kept of the gradients of language models where the caller does not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ooc_influence.compress.compressor import Eigenbasis
from ooc_influence.compress.dropout import Dropout
from ooc_influence.store import Encoding, Representation, parse_representation

WIDE, REDUCED = 65536, 4096  # entries kept, and numbers they are reduced to
LARGEST_STORE = 64 * 2**30  # bytes; rows of larger stores are reduced


@dataclass(frozen=True)
class DefaultDropout:
    """Importance dropout, reduced only if the store would be larger than 64 GiB.

    A reduction to r directions keeps what the rows it is made from have in common; of few rows that says little about
    queries.

    Parameters
    ----------
    k : int, optional
        Entries kept; default 65536, or all where there are fewer.
    sampling : {"uniform", "importance", "grid"}
        As for :class:`Dropout`.
    seed : int
        Of the choice.
    """

    k: int | None = None
    sampling: Literal["uniform", "importance", "grid"] = "importance"
    seed: int = 0

    def sized(self, rows: int, dtype: str) -> Callable[[int], Dropout]:
        """Return what makes the compressor of a model's p entries, for a store of so many rows."""
        return partial(self._make, rows=rows, dtype=parse_representation(dtype))

    def _make(self, p: int, rows: int, dtype: Representation) -> Dropout:
        k = min(WIDE, p) if self.k is None else self.k
        whole = rows * Encoding.of(dtype, k).row_bytes
        reduction = Eigenbasis(r=min(REDUCED, k, max(1, rows // 2))) if whole > LARGEST_STORE else None
        return Dropout(k=k, sampling=self.sampling, seed=self.seed, reduce=reduction)

"""Squared norms gᵀ (F + λI)⁻¹ g of train rows that are kept somewhere, so that they need not be computed again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from typing_extensions import override

from ooc_influence.influence.engine import Floats
from ooc_influence.store import GradientStore, StorePath, array_store


class RowNorms(ABC):
    """Where rows' squared norms are, for each λ."""

    @abstractmethod
    def squares(self, store: GradientStore, start: int, stop: int) -> Floats:
        """Return those of rows ``start`` to ``stop`` of a store, (L, stop - start) float32."""


@dataclass(frozen=True)
class ColumnNorms(RowNorms):
    """Columns of the store, one for each λ."""

    names: tuple[str, ...]

    @override
    def squares(self, store: GradientStore, start: int, stop: int) -> Floats:
        return np.asarray([store.small(f"columns/{name}", start, stop) for name in self.names], np.float32)


@dataclass(frozen=True)
class SavedNorms(RowNorms):
    """A Zarr array (L, n) beside a sketch; ``digest`` is of all that its values depend on."""

    path: StorePath
    digest: str

    @override
    def squares(self, store: GradientStore, start: int, stop: int) -> Floats:
        return np.asarray(_open(self.path, self.digest)[:, start:stop], np.float32)


@lru_cache(4)
def _open(path: StorePath, digest: str) -> zarr.Array[Any]:
    return zarr.open_array(array_store(path, read_only=True), mode="r")

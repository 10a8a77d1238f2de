"""Dropout compression: keep k of p gradient entries (arXiv 2509.15651).

A uniform mask keeps every set of k entries with the same probability, drawn over all entries of all selected layers
together, and multiplies each kept entry by √(p/k). Entry e is kept with probability k/p, so for gradients g and h::

    E[Σ_kept (p/k) g_e h_e] = Σ_e g_e h_e

stored dot products estimate full ones without bias. At k = p the mask is the identity with weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store import LayerShape, Mask, ModuleMask


@dataclass(frozen=True)
class Dropout:
    """Keep ``k`` randomly chosen gradient entries.

    Parameters
    ----------
    k : int
        Entries kept of each per-sample gradient; the numbers stored a row.
    sampling : {"uniform"}
        How they are chosen.
    seed : int
        Seed of the choice.

    Raises
    ------
    InputError
        For a k below 1 or an unknown sampling.
    """

    k: int = 4096
    sampling: Literal["uniform"] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise InputError(f"expected a whole number {name} >= {least}; received {value!r}")
            object.__setattr__(self, name, int(value))
        if self.sampling != "uniform":
            raise InputError(f"expected sampling 'uniform'; received {self.sampling!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, with the compressor's name under ``"name"``."""
        return {"name": "dropout"} | asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the compressor that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described another one.
        """
        settings = dict(values)
        if settings.pop("name", None) != "dropout":
            raise InputError(f"expected the settings of a dropout compressor; received {values!r}")
        try:
            return cls(**settings)
        except TypeError as error:
            raise InputError(f"expected the settings of a dropout compressor; received {values!r}") from error

    def draw(self, layers: Sequence[LayerShape]) -> Mask:
        """Draw the mask over all entries of ``layers``.

        Time and memory are O(k) where k is well below p.

        Raises
        ------
        InputError
            If k is larger than p.
        """
        p = sum(layer.entries for layer in layers)
        if self.k > p:
            raise InputError(
                f"expected k <= p = {p}, the gradient entries of the selected layers; received k = {self.k}: "
                f"use k={p} to keep all of them"
            )
        generator = np.random.Generator(np.random.PCG64(self.seed))
        kept = np.arange(p) if self.k == p else np.sort(generator.choice(p, self.k, replace=False, shuffle=False))
        weight = np.float32(np.sqrt(p / self.k))
        modules = []
        first = low = 0
        for layer in layers:
            high = low + int(np.searchsorted(kept[low:], first + layer.entries))
            modules.append(_module_mask(layer, kept[low:high] - first, weight))
            first, low = first + layer.entries, high
        return Mask(tuple(modules))


def _module_mask(layer: LayerShape, entries: npt.NDArray[np.int64], weight: np.float32) -> ModuleMask:
    rows, cols = np.divmod(entries, layer.shape[1])
    return ModuleMask(layer, rows.astype(np.int32), cols.astype(np.int32), np.full(len(rows), weight, np.float32))

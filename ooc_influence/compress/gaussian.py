"""Gaussian projection of full gradients: the compressor that dropout is compared with.

Every entry is kept and the row of p numbers multiplied by a dense (p, k) matrix of independent N(0, 1/k): dot products
are kept without bias, at a cost of O(p k) a sample (Johnson and Lindenstrauss 1984; TRAK, arXiv 2303.14186).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ooc_influence.compress.dropout import Dropout
from ooc_influence.errors import InputError
from ooc_influence.store import GaussianReduction, LayerShape, Mask, PilotMoments, RademacherReduction


@dataclass(frozen=True)
class Gaussian:
    """Project full gradients to ``k`` numbers with a Gaussian matrix, generated from the seed in blocks.

    Parameters
    ----------
    k : int
        Numbers stored a row.
    seed : int
        Seed of the matrix.

    Raises
    ------
    InputError
        For a k below 1 or a negative seed.
    """

    k: int = 4096
    seed: int = 0

    name: ClassVar[str] = "gaussian"
    pilot_samples: ClassVar[int] = 0
    reduce: ClassVar[None] = None

    def __post_init__(self) -> None:
        Dropout(k=self.k, seed=self.seed)  # the same checks

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, with the compressor's name under ``"name"``."""
        return {"name": self.name, "k": self.k, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the compressor that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described another one.
        """
        if values.get("name") != cls.name or set(values) != {"name", "k", "seed"}:
            raise InputError(f"expected the settings of a {cls.name} projection; received {values!r}")
        return cls(values["k"], values["seed"])

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Return the mask that keeps every entry."""
        p = sum(layer.entries for layer in layers)
        if self.k > p:
            raise InputError(f"expected k <= p = {p}; received k = {self.k}: use Dropout(k={p}) to keep all entries")
        return Dropout(k=p).draw(layers)

    def generated(self, mask: Mask) -> GaussianReduction:
        """Return the projection of rows under ``mask``."""
        return GaussianReduction(mask.k, self.k, self.seed)


@dataclass(frozen=True)
class Rademacher(Gaussian):
    """Project full gradients with a matrix of independent signs over √k (Achlioptas 2003); see :class:`Gaussian`.

    The cost is that of the Gaussian projection, but for drawing the matrix: one random bit an entry.
    """

    name: ClassVar[str] = "rademacher"

    def generated(self, mask: Mask) -> GaussianReduction:
        """Return the projection of rows under ``mask``."""
        return RademacherReduction(mask.k, self.k, self.seed)

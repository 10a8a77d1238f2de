"""The reduction: a linear map from masked rows (k' entries) to stored rows (r numbers), row @ M with M (k', r).

Two kinds. A *stored* one keeps M as an array of the store: the top eigenvectors of the masked rows' Fisher matrix. A
*generated* one is drawn from a seed, block by block: a Gaussian projection. Rows of two stores are comparable if mask
and reduction are equal, which their digests tell.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import StoreDamagedError, StoreFormatError
from ooc_influence.store.arrays import CHUNK_TARGET, create_array, open_group, read_array
from ooc_influence.store.place import array_store, parse_path

if TYPE_CHECKING:
    from ooc_influence.store.view import StoreView

FloatRows = npt.NDArray[np.float32]
COPIED_BYTES = 256 * 2**20  # a query store copies a basis below this; of a larger one it keeps path and digest
_BLOCK_ROWS = 1024  # of a generated map, from a generator of its own


class Reduction(ABC):
    """A map from masked rows (b, rows) to stored ones (b, columns).

    Attributes
    ----------
    rows, columns : int
        Entries of a masked row, numbers of a stored one.
    """

    rows: int
    columns: int

    @property
    @abstractmethod
    def digest(self) -> str:
        """Changes with the map."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a store records about it: JSON values."""

    @abstractmethod
    def blocks(self, step: int) -> Iterator[tuple[int, FloatRows]]:
        """Yield ``(first, M[first : first + step])`` from the top down."""

    @abstractmethod
    def save(self, group: Any) -> None:
        """Write what cannot be generated below Zarr group ``group``."""


class StoredReduction(Reduction):
    """The top of an eigenbasis of masked rows.

    Parameters
    ----------
    vectors : (k', r) float32
        Eigenvectors as columns.
    eigenvalues : (r,) float64
        Of the (weighted) Fisher matrix they were taken from, largest first.
    mean_square : (r,) float64
        Mean square of the pilot's reduced rows, column by column: the eigenvalues, where rows were not weighted.
    facts : mapping
        ``trace``, ``left_out`` (share of the trace beyond r), ``weights``, ``pilot_rows``.
    """

    def __init__(
        self,
        vectors: FloatRows,
        eigenvalues: npt.NDArray[np.float64],
        mean_square: npt.NDArray[np.float64],
        facts: Mapping[str, Any],
    ) -> None:
        self.vectors, self.eigenvalues, self.mean_square = vectors, eigenvalues, mean_square
        self.rows, self.columns = vectors.shape
        self._facts = dict(facts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of M."""
        digest = hashlib.sha256()
        for _, block in self.blocks(_BLOCK_ROWS):
            digest.update(np.ascontiguousarray(block, "<f4").data)
        return digest.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """See :class:`Reduction`."""
        fixed = {"name": "eigenbasis", "rows": self.rows, "columns": self.columns, "digest": self.digest}
        return {**self._facts, **fixed}

    def blocks(self, step: int) -> Iterator[tuple[int, FloatRows]]:
        """See :class:`Reduction`."""
        for first in range(0, self.rows, step):
            yield first, self.vectors[first : first + step]

    def column_scale(self, floor: float = 1e-4) -> FloatRows:
        """Return what columns are divided by when quantised, √(mean square + ``floor`` · sum of all), (r,)."""
        held = self.mean_square + floor * self.mean_square.sum() + np.finfo(np.float32).tiny
        return np.asarray(np.sqrt(held), np.float32)

    def save(self, group: Any) -> None:
        """Write vectors and eigenvalues as ``basis/...``."""
        target = group.create_group("basis")
        chunk = max(1, min(self.rows, CHUNK_TARGET // (4 * self.columns)))
        array = create_array(target, "vectors", self.vectors.shape, (chunk, self.columns), "float32", check=True)
        for first in range(0, self.rows, chunk):
            array[first : first + chunk] = self.vectors[first : first + chunk]
        for name in ("eigenvalues", "mean_square"):
            kept = create_array(target, name, (self.columns,), (self.columns,), "float64", check=True)
            kept[...] = getattr(self, name)

    @classmethod
    def load(cls, group: Any, facts: Mapping[str, Any]) -> StoredReduction:
        """Read what :meth:`save` wrote and check its digest.

        Raises
        ------
        StoreDamagedError
            If it is not what was written.
        """
        source = group["basis"]
        vectors, eigenvalues, mean_square = (
            read_array(source, name) for name in ("vectors", "eigenvalues", "mean_square")
        )
        own = {
            name: value for name, value in facts.items() if name not in ("name", "rows", "columns", "digest", "path")
        }
        found = cls(vectors, eigenvalues, mean_square, own)
        if found.digest != facts["digest"]:
            raise StoreDamagedError(
                f"expected basis digest {str(facts['digest'])[:12]}; received {found.digest[:12]} from "
                f"{group.store_path}: it was changed or damaged; restore it from a backup"
            )
        return found


class GaussianReduction(Reduction):
    """A dense Gaussian projection: entries of M are independent N(0, 1/columns), drawn from a seed.

    E[M Mᵀ] = I, so dot products are kept without bias (Johnson and Lindenstrauss 1984; TRAK, arXiv 2303.14186).
    """

    name = "gaussian"

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self.rows, self.columns, self.seed = rows, columns, seed

    def save(self, group: Any) -> None:
        """See :class:`Reduction`; there is nothing to write."""

    @property
    def facts(self) -> dict[str, Any]:
        """See :class:`Reduction`."""
        own = {"name": self.name, "rows": self.rows, "columns": self.columns, "seed": self.seed}
        return own | {"digest": self.digest}

    @property
    def digest(self) -> str:
        """SHA-256 of the sizes and the seed."""
        return hashlib.sha256(repr((self.name, self.rows, self.columns, self.seed)).encode()).hexdigest()

    def blocks(self, step: int) -> Iterator[tuple[int, FloatRows]]:
        """See :class:`Reduction`; ``step`` is rounded to whole blocks of the generator."""
        for first in range(0, self.rows, _BLOCK_ROWS):
            rows = min(_BLOCK_ROWS, self.rows - first)
            generator = np.random.Generator(np.random.Philox(key=[self.seed, first]))
            drawn = generator.standard_normal((rows, self.columns), np.float32)
            drawn *= np.float32(self.columns**-0.5)
            yield first, drawn


class RademacherReduction(GaussianReduction):
    """The same with entries ±1/√columns (Achlioptas 2003), 64 signs from each word of the generator."""

    name = "rademacher"

    def blocks(self, step: int) -> Iterator[tuple[int, FloatRows]]:
        """See :class:`GaussianReduction`."""
        for first in range(0, self.rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, self.rows - first) * self.columns
            words = np.random.Philox(key=[self.seed, first]).random_raw(-(-count // 64))
            bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
            signs = (bits.astype(np.float32) * 2 - 1) * np.float32(self.columns**-0.5)
            yield first, signs.reshape(-1, self.columns)


def load_reduction(group: Any, facts: Mapping[str, Any]) -> Reduction:
    """Return the reduction that a store's attributes describe, from the store or where they say it is.

    Raises
    ------
    StoreFormatError
        For one of an unknown name.
    StoreDamagedError
        If it is not the one that was recorded.
    """
    for kind in (GaussianReduction, RademacherReduction):
        if facts["name"] == kind.name:
            return kind(int(facts["rows"]), int(facts["columns"]), int(facts["seed"]))
    if facts["name"] != "eigenbasis":
        raise StoreFormatError(
            f"expected a reduction 'eigenbasis', 'gaussian' or 'rademacher'; received {facts['name']!r}: upgrade"
        )
    path = facts.get("path")
    if path is not None:
        group = open_group(array_store(parse_path(path), read_only=True), "r")
    return StoredReduction.load(group, facts)


def kept_at(store: StoreView) -> str | None:
    """Return where a store made like this one finds the basis, if that is too large to be copied; else None."""
    reduction = store.reduction
    if not isinstance(reduction, StoredReduction) or reduction.vectors.nbytes <= COPIED_BYTES:
        return None
    return str((store.attrs.get("reduction") or {}).get("path") or store.path)


def columns_digest(mask_digest: str, reduction: Mapping[str, Any] | None) -> str:
    """Return the digest of what a store's columns mean: of the mask, and of the reduction where there is one."""
    if reduction is None:
        return mask_digest
    return hashlib.sha256(f"{mask_digest} {reduction['digest']}".encode()).hexdigest()

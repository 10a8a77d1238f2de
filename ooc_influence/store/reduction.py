"""The reduction: a linear map from masked rows (k' entries) to stored rows (r numbers), row @ M with M (k', r).

Two kinds. A *stored* one keeps M as an array of the store: the top eigenvectors of the masked rows' Fisher matrix. A
*generated* one is drawn from a seed, block by block: a random projection, dense or sparse. Rows of two stores are
comparable if the digests of mask and reduction are equal.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.errors import (
    OocInfluenceError,
    StoreDamagedError,
    StoreFormatError,
    StoreNotFoundError,
    StoreReadError,
)
from ooc_influence.store.arrays import CHUNK_TARGET, create_array, open_group, read_array
from ooc_influence.store.mask import LayerShape
from ooc_influence.store.paths import StorePath, array_store, parse_reference

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
        """A digest that changes with the map."""

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
    @override
    def facts(self) -> dict[str, Any]:
        fixed = {"name": "eigenbasis", "rows": self.rows, "columns": self.columns, "digest": self.digest}
        return {**self._facts, **fixed}

    @override
    def blocks(self, step: int) -> Iterator[tuple[int, FloatRows]]:
        for first in range(0, self.rows, step):
            yield first, self.vectors[first : first + step]

    def column_scale(self, floor: float = 1e-4) -> FloatRows:
        """Return what columns are divided by when quantised, √(mean square + ``floor`` · sum of all), (r,)."""
        squares = self.mean_square + floor * self.mean_square.sum() + np.finfo(np.float32).tiny
        return np.asarray(np.sqrt(squares), np.float32)

    def save(self, group: Any) -> None:
        """Write vectors and eigenvalues as ``basis/...``."""
        target = group.create_group("basis")
        chunk = max(1, min(self.rows, CHUNK_TARGET // (4 * self.columns)))
        array = create_array(target, "vectors", self.vectors.shape, (chunk, self.columns), "float32", codec="crc32c")
        for first in range(0, self.rows, chunk):
            array[first : first + chunk] = self.vectors[first : first + chunk]
        for name in ("eigenvalues", "mean_square"):
            kept = create_array(target, name, (self.columns,), (self.columns,), "float64", codec="crc32c")
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
        further = {
            name: value for name, value in facts.items() if name not in ("name", "rows", "columns", "digest", "path")
        }
        reduction = cls(vectors, eigenvalues, mean_square, further)
        if reduction.digest != facts["digest"]:
            raise StoreDamagedError(
                f"expected basis digest {str(facts['digest'])[:12]}; received {reduction.digest[:12]} from "
                f"{group.store_path}: it was changed or damaged; restore it from a backup"
            )
        return reduction


class GeneratedReduction(Reduction):
    """A map drawn from a seed, in blocks of 1024 rows, each a function of the seed and of its first row.

    E[M Mᵀ] = I: dot products are kept without bias.
    """

    name: ClassVar[str]

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self.rows, self.columns, self.seed = rows, columns, seed

    @override
    def save(self, group: Any) -> None:
        """Do nothing: the seed is all there is."""

    @property
    def settings(self) -> dict[str, int]:
        """Its settings, besides its kind."""
        return {"rows": self.rows, "columns": self.columns, "seed": self.seed}

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"name": self.name, **self.settings, "digest": self.digest}

    @property
    def digest(self) -> str:
        """SHA-256 of kind and settings."""
        return hashlib.sha256(repr((self.name, *self.settings.values())).encode()).hexdigest()

    @override
    def blocks(self, step: int) -> Iterator[tuple[int, FloatRows]]:
        """``step`` is rounded to whole blocks of the generator."""
        for first in range(0, self.rows, _BLOCK_ROWS):
            yield first, self.block(first)

    def block_rows(self, first: int) -> int:
        """Return the number of rows of the block that starts at row ``first``."""
        return min(_BLOCK_ROWS, self.rows - first)

    @abstractmethod
    def block(self, first: int) -> FloatRows:
        """Return the block of M from row ``first`` on, a multiple of 1024."""


class GaussianReduction(GeneratedReduction):
    """Entries are independent N(0, 1/columns) (Johnson and Lindenstrauss 1984; TRAK, arXiv 2303.14186)."""

    name = "gaussian"

    @override
    def block(self, first: int) -> FloatRows:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, first]))
        drawn = generator.standard_normal((self.block_rows(first), self.columns), np.float32)
        drawn *= np.float32(self.columns**-0.5)
        return drawn


class RademacherReduction(GeneratedReduction):
    """Entries are ±1/√columns (Achlioptas 2003), 64 signs from each word of the generator."""

    name = "rademacher"

    @override
    def block(self, first: int) -> FloatRows:
        count = self.block_rows(first) * self.columns
        words = np.random.Philox(key=[self.seed, first]).random_raw(-(-count // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
        signs = (bits.astype(np.float32) * 2 - 1) * np.float32(self.columns**-0.5)
        return signs.reshape(-1, self.columns)


class SjltReduction(GeneratedReduction):
    """Each row has ``nonzeros`` entries ±1/√nonzeros, one in each of as many ranges of columns.

    CountSketch for one (Charikar, Chen and Farach-Colton 2002); else Kane and Nelson's block construction (2014). Each
    entry takes a word of the generator: its lowest bit is the sign, its upper half, times the
    range's width, the column.
    """

    name = "sjlt"

    def __init__(self, rows: int, columns: int, seed: int, nonzeros: int = 1) -> None:
        super().__init__(rows, columns, seed)
        self.nonzeros = nonzeros

    @property
    @override
    def settings(self) -> dict[str, int]:
        return {**super().settings, "nonzeros": self.nonzeros}

    def entries(self, first: int) -> tuple[npt.NDArray[np.int64], FloatRows]:
        """Return the columns (b, nonzeros) and values of the entries of the block from row ``first`` on."""
        shape = (self.block_rows(first), self.nonzeros)
        words = np.random.Philox(key=[self.seed, first]).random_raw(shape)
        edges = np.arange(self.nonzeros + 1, dtype=np.uint64) * np.uint64(self.columns) // np.uint64(self.nonzeros)
        columns = edges[:-1] + ((words >> np.uint64(32)) * np.diff(edges) >> np.uint64(32))
        signs = ((words & np.uint64(1)).astype(np.float32) * 2 - 1) * np.float32(self.nonzeros**-0.5)
        return columns.astype(np.int64), signs

    @override
    def block(self, first: int) -> FloatRows:
        columns, signs = self.entries(first)
        block = np.zeros((len(columns), self.columns), np.float32)
        np.put_along_axis(block, columns, signs, axis=1)
        return block


class LograReduction(GeneratedReduction):
    """Projections of each linear layer from both sides, before its gradient is built (LoGra, arXiv 2405.13954).

    The mask then says not which entries are kept, but how many projected rows and columns of each layer. There is no
    map of kept entries: ``block`` is the identity.
    """

    name = "logra"

    def factors(self, number: int, layer: LayerShape, ranks: tuple[int, int]) -> tuple[FloatRows, FloatRows]:
        """Return P_out (out, out') and P_in (in, in') of layer ``number``, the identity for a side not projected."""
        projections = []
        for side, (size, rank) in enumerate(zip(layer.shape, ranks, strict=True)):
            if rank == size:
                projections.append(np.eye(size, dtype=np.float32))
                continue
            generator = np.random.Generator(np.random.Philox(key=[self.seed, 2 * number + side]))
            drawn = generator.standard_normal((size, rank), np.float32)
            projections.append(drawn * np.float32(max(1, rank) ** -0.5))
        return projections[0], projections[1]

    @override
    def block(self, first: int) -> FloatRows:
        return np.eye(self.block_rows(first), self.columns, first, dtype=np.float32)


_GENERATED = {kind.name: kind for kind in (GaussianReduction, LograReduction, RademacherReduction, SjltReduction)}


def load_reduction(group: Any, facts: Mapping[str, Any], home: StorePath) -> Reduction:
    """Return the reduction of the store at ``home``, read from there or from the store that its attributes refer to.

    Raises
    ------
    StoreFormatError
        For one of an unknown name, or settings that are none.
    InputError
        If it is said to be on another file system (:func:`parse_reference`).
    StoreNotFoundError, StoreReadError
        If it is not where it is said to be.
    StoreDamagedError
        If it is not the one that was recorded.
    """
    generated = _GENERATED.get(facts["name"])
    if generated is not None:
        try:
            return generated(**{name: int(value) for name, value in facts.items() if name not in ("name", "digest")})
        except (TypeError, ValueError) as error:
            raise StoreFormatError(
                f"expected the settings of a reduction {facts['name']} in {home}; received others ({error}): restore "
                "its zarr.json from a backup"
            ) from error
    if facts["name"] != "eigenbasis":
        raise StoreFormatError(
            f"expected a reduction eigenbasis, {', '.join(_GENERATED)}; received {facts['name']!r}: upgrade "
            "ooc_influence"
        )
    if facts.get("path") is None:
        return StoredReduction.load(group, facts)
    path = parse_reference(facts["path"], home)
    try:
        return StoredReduction.load(open_group(array_store(path, read_only=True), "r"), facts)
    except OocInfluenceError:
        raise
    except (FileNotFoundError, KeyError) as error:
        raise StoreNotFoundError(
            f"expected the basis of {home} in the store {path}; received none: move that store back"
        ) from error
    except Exception as error:  # whatever an object store's client makes of a bucket, key or permission
        raise StoreReadError(
            f"expected to read the basis of {home} from {path}; received {type(error).__name__}: {error}: check the "
            "path, the credentials and the connection"
        ) from error


def is_shared(facts: Mapping[str, Any]) -> bool:
    """Return whether a reduction is a basis so large that further stores refer to it instead of copying it."""
    return facts.get("name") == "eigenbasis" and 4 * facts.get("rows", 0) * facts.get("columns", 0) > COPIED_BYTES


def columns_digest(mask_digest: str, reduction: Mapping[str, Any] | None) -> str:
    """Return the digest of what a store's columns mean: of the mask, and of the reduction where there is one."""
    if reduction is None:
        return mask_digest
    return hashlib.sha256(f"{mask_digest} {reduction['digest']}".encode()).hexdigest()

"""The arithmetic on a block of train rows: by NumPy's BLAS here, by torch on a device.

Both work on blocks of one grid and return NumPy arrays; what lies between (the block, its products) is theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import Curvature
from ooc_influence.errors import InputError, MissingExtraError
from ooc_influence.influence.aggregate import Codes, weighted_sums
from ooc_influence.store import GradientStore, read_blocks

Floats = npt.NDArray[np.float32]


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` where they are multiplied; valid until the next block.

    Attributes
    ----------
    start, stop : int
        Row numbers.
    values : (stop - start, k) float32
        The rows: an array of the engine.
    dropped : (stop - start,) bool or None
        Which are dropped; None where none is.
    """

    start: int
    stop: int
    values: Any
    dropped: npt.NDArray[np.bool_] | None


class Found(NamedTuple):
    """Numbers of a tile (m, b): their places, row by row and ascending within a row, and values."""

    numbers: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: Floats


class Engine(ABC):
    """What score tiles are made with."""

    @abstractmethod
    def blocks(self, store: GradientStore, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        """Yield the blocks of rows ``start`` to ``stop``; see :func:`read_blocks`."""

    @abstractmethod
    def array(self, values: npt.NDArray[Any]) -> Any:
        """Return a NumPy array as one of this engine."""

    @abstractmethod
    def empty(self, *shape: int) -> Any:
        """Return an uninitialised float32 array of this engine."""

    @abstractmethod
    def multiply(self, left: Any, rows: Any, out: Any) -> None:
        """Write left @ rowsᵀ, (m, k) and (b, k), into ``out`` (m, b)."""

    @abstractmethod
    def sums(self, rows: Any, codes: Codes, weights: Floats) -> tuple[Codes, Any]:
        """Return the sums of rows by group; see :func:`weighted_sums`."""

    @abstractmethod
    def quadratic(self, curvature: Curvature | None, values: Sequence[float], rows: Any) -> Floats:
        """Return gᵀ (F + λI)⁻¹ g for each λ and row, (L, b); ‖g‖², (1, b), without a curvature."""

    @abstractmethod
    def above(self, tile: Any, limits: Floats, most: int) -> Found | None:
        """Return what of a tile (m, b) exceeds the limit of its row, (m,); None where that is more than ``most``."""

    @abstractmethod
    def host(self, tile: Any) -> Floats:
        """Return an array of the engine as a NumPy one."""

    @property
    @abstractmethod
    def context(self) -> AbstractContextManager[Any]:
        """What its work runs in."""


class HostEngine(Engine):
    """NumPy and the BLAS behind it."""

    context = nullcontext()

    def blocks(self, store: GradientStore, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        """See :class:`Engine`."""
        for block in read_blocks(store, start, stop, block_rows):
            yield Rows(block.start, block.stop, block.gradients, block.dropped)

    def array(self, values: npt.NDArray[Any]) -> Any:
        """See :class:`Engine`."""
        return values

    def empty(self, *shape: int) -> Any:
        """See :class:`Engine`."""
        return np.empty(shape, np.float32)

    def multiply(self, left: Any, rows: Any, out: Any) -> None:
        """See :class:`Engine`."""
        np.matmul(left, rows.T, out=out)

    def sums(self, rows: Any, codes: Codes, weights: Floats) -> tuple[Codes, Any]:
        """See :class:`Engine`."""
        return weighted_sums(rows, codes, weights)

    def quadratic(self, curvature: Curvature | None, values: Sequence[float], rows: Any) -> Floats:
        """See :class:`Engine`."""
        if curvature is None:
            squares: Floats = np.einsum("ij,ij->i", rows, rows)
            return squares[None]
        return curvature.self_influence(rows, values)

    def above(self, tile: Any, limits: Floats, most: int) -> Found | None:
        """See :class:`Engine`."""
        exceeding = tile > limits[:, None]
        if np.count_nonzero(exceeding) > most:
            return None
        places = np.flatnonzero(exceeding)
        numbers, columns = np.divmod(places, tile.shape[1])
        return Found(numbers, columns, tile[numbers, columns])

    def host(self, tile: Any) -> Floats:
        """See :class:`Engine`."""
        return np.asarray(tile)


def parse_device(device: str | None) -> str | None:
    """Return the name of a torch device that is there; None for NumPy.

    Raises
    ------
    InputError
        If torch knows no such device, or it is not there.
    MissingExtraError
        If torch is not installed.
    """
    if device is None:
        return None
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"expected torch for device={device!r}; received none: pip install torch") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"expected a device such as 'cpu' or 'cuda'; received {device!r} ({reason}): choose another"
        ) from error
    return str(device)


def make_engine(device: str | None) -> Engine:
    """Return what computes on a device; None: NumPy."""
    if device is None:
        return HostEngine()
    from ooc_influence.influence.device import DeviceEngine

    return DeviceEngine(device)

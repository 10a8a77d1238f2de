"""Blocks of rows to import, with their ids, losses, norms and columns, and what gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store import column_dtype

Floats = npt.NDArray[np.float32]
Values = dict[str, npt.NDArray[Any]]
KINDS = "fiub"  # of numbers that rows may be
NOT_COLUMNS = ("loss", "grad_norm")  # values with arrays of their own, that every store has


@dataclass(frozen=True)
class ImportedBlock:
    """Some rows.

    Attributes
    ----------
    start : int
        The number of the first.
    rows : (b, k) float32
        Their numbers.
    values : dict of str to (b,)
        Their ``example_id``, ``loss``, ``grad_norm`` and ``columns/<name>``, of these what there is.
    """

    start: int
    rows: Floats
    values: Values

    def part(self, low: int, high: int) -> ImportedBlock:
        """Return its rows ``low`` to ``high``, counted from its first."""
        values = {name: array[low:high] for name, array in self.values.items()}
        return ImportedBlock(self.start + low, self.rows[low:high], values)


class Source(ABC):
    """Rows to import.

    Attributes
    ----------
    k : int
        Numbers a row.
    n : int or None
        Rows; None where they are not counted beforehand.
    dtypes : dict of str to str
        The stored dtype of their ids and columns, by the names of :class:`ImportedBlock`.
    has_loss : bool
        Whether losses are among their values.
    """

    k: int
    n: int | None
    dtypes: dict[str, str]
    has_loss: bool

    @abstractmethod
    def blocks(self, start: int) -> Iterator[ImportedBlock]:
        """Yield the rows from ``start`` on."""


def parse_dtypes(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the stored dtypes of ids and columns."""
    dtypes = {name: column_dtype(values) for name, values in given.items() if name not in NOT_COLUMNS}
    check_ids(dtypes.get("example_id"))
    return dtypes


def check_ids(dtype: str | None) -> None:
    """Check that ids of a stored dtype, None for no ids, are whole numbers or strings."""
    if dtype not in (None, "int64", "str"):
        raise InputError(f"expected ids that are whole numbers or strings; received {dtype}")


def to_rows(block: Any, k: int | None, start: int) -> Floats:
    """Return a block as float32 rows."""
    array = np.asarray(block)
    if (
        array.ndim != 2
        or array.dtype.kind not in KINDS
        or not array.shape[1]
        or array.shape[1] != (k or array.shape[1])
    ):
        expected = "(b, k)" if k is None else f"(b, {k})"
        raise InputError(
            f"expected rows of numbers {expected} from row {start} on; received {array.dtype} of shape {array.shape}"
        )
    with np.errstate(over="ignore"):  # what float32 does not hold is not finite, and refused as such
        return np.ascontiguousarray(array, np.float32)

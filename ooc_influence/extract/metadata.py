"""What belongs to each row beside its gradient: ids and columns, from sequences or from the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.store import column_dtype

RowSource = Sequence[Any] | np.ndarray[Any, Any] | Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class RowMetadata:
    """Where the ids and columns of rows come from.

    Attributes
    ----------
    sources : mapping of str to sequence or callable
        By array path (``"example_id"``, ``"columns/<name>"``): a value for each sample, indexed by sample number, or
        a function of the batch.
    """

    sources: Mapping[str, RowSource]

    @classmethod
    def of(cls, ids: RowSource | None, columns: Mapping[str, RowSource] | None) -> RowMetadata:
        """Return the metadata of an extraction's ``ids`` and ``columns``."""
        if columns is not None and not isinstance(columns, Mapping):
            raise InputError(f"expected columns as a mapping of name to values; received {type(columns).__name__}")
        named = {} if ids is None else {"example_id": ids}
        return cls(named | {f"columns/{name}": source for name, source in (columns or {}).items()})

    def check_length(self, samples: int | None) -> None:
        """Check that sequences have one value for each of the samples, where their number is known.

        Raises
        ------
        InputError
            Naming the first that has not.
        """
        for name, source in self.sources.items():
            if samples is not None and hasattr(source, "__len__") and len(source) != samples:
                raise InputError(
                    f"expected {samples} values of {name}, one for each sample of batches; received {len(source)}"
                )

    def check_ids(self) -> None:
        """Check that ids given as a sequence do not repeat.

        Raises
        ------
        InputError
            Naming one that does.
        """
        source = self.sources.get("example_id")
        if source is None or callable(source) or not hasattr(source, "__len__"):
            return  # taken, or refused, batch by batch
        seen = set()
        for value in (v for low in range(0, len(source), 1024) for v in _plain(source[low : low + 1024])):
            if not isinstance(value, (str, int, np.integer)):
                return  # not ids at all, which is said where their type is looked at
            if value in seen:
                raise InputError(
                    f"expected ids that do not repeat; received {value!r} twice: give every sample its own"
                )
            seen.add(value)

    def take(self, batch: Any, first: int, count: int) -> dict[str, list[Any]]:
        """Return the values of a batch's ``count`` rows, by array path; ``first`` is its first sample's number.

        Raises
        ------
        InputError
            If there are not ``count`` of them.
        """
        return {name: _take(source, name, batch, first, count) for name, source in self.sources.items()}

    def dtypes(self, taken: Mapping[str, list[Any]]) -> dict[str, str]:
        """Return the stored dtype of each array, from all its values where they are known, else from the batch's.

        Raises
        ------
        InputError
            If the values are not numbers, booleans or strings, or ids not whole numbers or strings.
        """
        found = {}
        for name, source in self.sources.items():
            known = isinstance(source, (list, tuple, np.ndarray, Tensor))
            values = _plain(source) if known else taken[name]  # of a function or a lookup, this batch's
            try:
                found[name] = column_dtype(values)
            except InputError as error:
                raise InputError(f"{error} (in {name})") from error
        if found.get("example_id", "str") not in ("str", "int64"):
            raise InputError(f"expected ids that are whole numbers or strings; received {found['example_id']}")
        return found


def _plain(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _take(source: RowSource, name: str, batch: Any, first: int, count: int) -> list[Any]:
    try:
        values = _plain(source(batch) if callable(source) else source[first : first + count])
        found: list[Any] = values.tolist() if isinstance(values, np.ndarray) else list(values)
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(
            f"expected {name} as a sequence with one value a sample, or a function of the batch that returns one; "
            f"received {type(source).__name__} ({error})"
        ) from error
    if len(found) != count:
        raise InputError(f"expected {count} values of {name} for rows {first}-{first + count}; received {len(found)}")
    return found

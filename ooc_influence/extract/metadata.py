"""What belongs to each row beside its gradient: ids and columns, from sequences or from the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.repeats import Repeats
from ooc_influence.store import column_dtype

_AT_ONCE = 2**14  # values looked at together
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
        """Check that ids given as a sequence do not repeat, as texts; the memory is that of a part of them.

        Raises
        ------
        InputError
            Naming one that does.
        """
        source = self.sources.get("example_id")
        if source is None or callable(source) or not hasattr(source, "__len__"):
            return  # taken, or refused, batch by batch
        if getattr(source, "distinct", False):
            return  # they were looked at when they were made
        with Repeats() as repeats:
            for low in range(0, len(source), _AT_ONCE):
                values = _listed(source[low : low + _AT_ONCE])
                if not all(isinstance(value, (str, int, np.integer)) for value in values):
                    return  # not ids at all, which is said where their type is looked at
                repeats.add([str(value) for value in values])
            pair = repeats.find(lambda numbers: [str(_at(source, number)) for number in numbers.tolist()])
        if pair is not None:
            one, other = (_at(source, number) for number in pair)
            received = f"{one!r} twice" if one == other else f"{one!r} and {other!r}, which are the same as text"
            raise InputError(f"expected ids that do not repeat; received {received}: give every sample its own")

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
                found[name] = _dtype(values)
            except InputError as error:
                raise InputError(f"{error} (in {name})") from error
        if found.get("example_id", "str") not in ("str", "int64"):
            raise InputError(f"expected ids that are whole numbers or strings; received {found['example_id']}")
        return found


def _dtype(values: Any) -> str:
    """Return the stored dtype of values: of a long list from its parts, since an array of all may be much larger."""
    if isinstance(values, np.ndarray) or len(values) <= _AT_ONCE:
        return column_dtype(values)
    kinds = {column_dtype(values[low : low + _AT_ONCE]) for low in range(0, len(values), _AT_ONCE)}
    return next(kind for kind in ("str", "float64", "int64", "bool") if kind in kinds)


def _plain(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _listed(values: Any) -> list[Any]:
    plain = _plain(values)
    return plain.tolist() if isinstance(plain, np.ndarray) else list(plain)


def _at(source: Any, number: int) -> Any:
    return _listed(source[number : number + 1])[0]


def _take(source: RowSource, name: str, batch: Any, first: int, count: int) -> list[Any]:
    try:
        found = _listed(source(batch) if callable(source) else source[first : first + count])
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(
            f"expected {name} as a sequence with one value a sample, or a function of the batch that returns one; "
            f"received {type(source).__name__} ({error})"
        ) from error
    if len(found) != count:
        raise InputError(f"expected {count} values of {name} for rows {first}-{first + count}; received {len(found)}")
    return found

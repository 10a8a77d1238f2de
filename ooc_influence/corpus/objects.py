"""Documents that are objects of a program: datasets, tables, frames, lists of dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from ooc_influence.corpus.documents import Documents, first_fields
from ooc_influence.errors import InputError

_KINDS = "a path, a datasets.Dataset or DatasetDict, a pandas DataFrame, a PyArrow Table, or a list of dictionaries"


def object_documents(data: Any, split: str | None, name: str | None = None) -> Documents:
    """Return the documents that an object holds; ``name`` is what messages call it.

    Raises
    ------
    InputError
        For objects of other kinds, or a split that is not there.
    """
    kind, module = type(data).__name__, type(data).__module__.partition(".")[0]
    name = name or f"the {kind} given"
    if module == "datasets" and kind.startswith("Iterable"):
        raise InputError(
            f"expected documents by number; received {name}, which can only be read in order: load it without "
            "streaming=True, or make a Dataset of it with datasets.Dataset.from_generator(lambda: iter(data))"
        )
    if isinstance(data, Mapping) and module == "datasets":
        return DatasetDocuments(_choose(data, split, name), name)
    if module == "datasets":
        return DatasetDocuments(data, name)
    if module == "pandas" and hasattr(data, "iloc"):
        return _FrameDocuments(data, name)
    if module == "pyarrow" and hasattr(data, "to_pylist"):
        return _TableDocuments(data, name)
    if isinstance(data, Sequence) and all(isinstance(record, Mapping) for record in data):
        return _ListDocuments(data, name)
    raise InputError(f"expected {_KINDS}; received {kind}")


def _choose(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None or split not in splits:
        raise InputError(f"expected one of the splits {', '.join(splits)} of {name} (--split); received {split!r}")
    return splits[split]


class DatasetDocuments(Documents):
    """A ``datasets.Dataset``."""

    def __init__(self, dataset: Any, name: str) -> None:
        super().__init__(name, dataset.column_names)
        self._dataset = dataset.with_format(None)  # a user's format is for training
        self._chosen = self._dataset
        self.features = dataset.features or {}
        self.fingerprint = {"dataset": dataset._fingerprint}

    def __len__(self) -> int:
        return len(self._dataset)

    @override
    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        names = [name for name in fields if name in self.column_names]
        if not names or not len(numbers):
            return [{} for _ in numbers]
        if names != self._chosen.column_names:
            self._chosen = self._dataset.select_columns(names)  # other fields are not even decoded
        columns = self._chosen[list(numbers)]
        return [dict(zip(names, values, strict=True)) for values in zip(*(columns[n] for n in names), strict=True)]


class _TableDocuments(Documents):
    """A PyArrow table."""

    def __init__(self, table: Any, name: str) -> None:
        super().__init__(name, table.column_names)
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        names = [name for name in fields if name in self.column_names]
        if not names:
            return [{} for _ in numbers]
        found: list[dict[str, Any]] = self._table.select(names).take(list(numbers)).to_pylist()
        return found


class _FrameDocuments(Documents):
    """A pandas DataFrame; what it calls missing is missing."""

    def __init__(self, frame: Any, name: str) -> None:
        super().__init__(name, [str(column) for column in frame.columns])
        self._frame = frame.set_axis(self.column_names, axis="columns")

    def __len__(self) -> int:
        return len(self._frame)

    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        names = [name for name in fields if name in self.column_names]
        part = self._frame[names].iloc[list(numbers)]
        columns = [[_plain(value) for value in part[name].tolist()] for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)] or [{} for _ in numbers]


class _ListDocuments(Documents):
    """A list of dictionaries."""

    def __init__(self, records: Sequence[Mapping[str, Any]], name: str) -> None:
        super().__init__(name, first_fields(records[:1024]))
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        records = (self._records[number] for number in numbers)
        return [{name: record[name] for name in fields if name in record} for record in records]


def _plain(value: Any) -> Any:
    """Return a cell's value; None where a frame has nothing."""
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value)):
        return None
    return value

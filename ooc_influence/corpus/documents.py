"""Documents by number, whatever they are stored in: only the fields that are used, only when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ooc_influence.errors import InputError

_LOOKED_AT = 1024  # documents whose fields are looked at first, and documents read at a time


class Documents(ABC):
    """Documents by number.

    Attributes
    ----------
    name : str
        What messages call them: a path, or what kind of object.
    column_names : list of str
        Fields; of JSON, which has no header, those of the first 1024 documents.
    features : mapping of str to Any
        What ``datasets`` knows of fields, such as the names of classes. Empty for all else.
    textual : bool
        Whether values are text because the file has no other type, as in CSV.
    fingerprint : mapping or None
        JSON values that tell these documents from others and from what they were before a change; None if nothing does.
    """

    name: str
    column_names: list[str]
    features: Mapping[str, Any]
    textual: bool
    fingerprint: Mapping[str, Any] | None

    def __init__(self, name: str, column_names: Sequence[str]) -> None:
        self.name, self.column_names = name, list(column_names)
        self.features, self.textual, self.fingerprint = {}, False, None

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def read(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Return these fields of some documents; a document that lacks one has no such key.

        Raises
        ------
        InputError
            If a document cannot be read.
        """

    def has_field(self, field: str) -> bool:
        """Return whether any document has a field; all are looked at if the first have it not."""
        if field in self.column_names:
            return True
        return any(
            field in record
            for low in range(_LOOKED_AT, len(self), _LOOKED_AT)
            for record in self.read(range(low, min(len(self), low + _LOOKED_AT)), [field])
        )

    def __getitem__(self, key: int | str) -> Any:
        """Return the document of a number, or a field of all."""
        if isinstance(key, str):
            starts = range(0, len(self), _LOOKED_AT)
            parts = (self.read(range(low, min(len(self), low + _LOOKED_AT)), [key]) for low in starts)
            return [record.get(key) for part in parts for record in part]
        if not -len(self) <= key < len(self):
            raise IndexError(f"document {key} of {len(self)}")
        return self.read([key % len(self)], self.column_names)[0]


def first_fields(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fields of some documents, in the order of their first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def check_some(documents: Documents) -> Documents:
    """Return the documents.

    Raises
    ------
    InputError
        If there are none.
    """
    if not len(documents):
        raise InputError(f"expected documents in {documents.name}; received none: it is empty")
    return documents

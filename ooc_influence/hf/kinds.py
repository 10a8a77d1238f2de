"""What kind of column a field becomes: known once every document's value was seen, the same for all rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ooc_influence.texts import as_text

_WHOLE = re.compile(r"0|-?[1-9][0-9]*")
_EXACT = 2**53  # whole numbers up to here are floats without a loss


class FieldKind:
    """The kind of a field's values.

    Parameters
    ----------
    textual : bool
        They come from a file that has text only, as CSV: numbers are those texts that are written as numbers are.

    """

    def __init__(self, textual: bool) -> None:
        self._textual = textual
        self._kinds: set[str] = set()

    def add(self, values: Iterable[Any]) -> None:
        """Look at further values."""
        self._kinds.update(_textual_kind(value) if self._textual else _kind(value) for value in values)

    @property
    def kind(self) -> str:
        """What all values seen so far can be without a loss; a missing number is NaN, a missing text is empty."""
        kinds = self._kinds
        if kinds in ({"bool"}, {"int64"}):
            return next(iter(kinds))
        if kinds and kinds - {"missing"} and kinds <= {"int64", "float64", "missing"}:
            return "float64"
        if kinds and kinds - {"missing"} and kinds <= {"int64", "long"}:
            return "int64"
        return "str"


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if abs(value) <= _EXACT else "long" if -(2**63) <= value < 2**63 else "str"
    return "float64" if isinstance(value, float) else "str"


def _textual_kind(value: str | None) -> str:
    if value is None:
        return "missing"
    if _WHOLE.fullmatch(value):
        return _kind(int(value))
    try:
        number = float(value)
    except ValueError:
        return "str"
    return "float64" if repr(number) == value and number - number == 0 else "str"


def as_kind(value: Any, kind: str) -> Any:
    """Return a value as a column of its kind has it."""
    if kind == "float64":
        return float("nan") if value is None else float(value)
    if kind == "int64":
        return int(value)
    return value if kind == "bool" else as_text(value)

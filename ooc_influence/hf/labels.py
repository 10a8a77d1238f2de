"""What kind of column a field becomes: known once every document's value was seen, the same for all rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.document_text import as_text
from ooc_influence.errors import InputError

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
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
    if _INTEGER.fullmatch(value):
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


LabelLoss = Literal["cross_entropy", "binary_cross_entropy", "mean_squared_error"]
Label = int | float | list[float]
_LOSSES: dict[str, LabelLoss] = {
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
    "regression": "mean_squared_error",
}
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named
_TRUTH = {"true": True, "false": False}
_SHOWN = 8  # names, in a message
_AT_ONCE = 4096  # documents whose labels are read together
_REMEMBERED = 4096  # values of one class


class Labels:
    """The labels of documents as a model's loss takes them.

    Parameters
    ----------
    config : PretrainedConfig
        The model's: ``num_labels``, ``problem_type``, ``id2label`` and ``label2id``.
    feature : datasets feature, optional
        The type of the documents' field. ``ClassLabel`` names its numbers, which are mapped by these names; a list
        means several classes.
    field : str
        The field, for messages.

    Attributes
    ----------
    loss : {"cross_entropy", "binary_cross_entropy", "mean_squared_error"}
        Which loss they are for.
    classes : int
        Outputs of the model.

    Raises
    ------
    InputError
        For a model whose names contradict each other, or that chooses among fewer than two classes.
    """

    def __init__(self, config: Any, feature: Any = None, field: str = "label") -> None:
        self.classes, self._field = int(config.num_labels), field
        listed = getattr(feature, "feature", feature)  # of a list, what it lists
        self.loss = _loss_of(config, several=listed is not feature or isinstance(feature, list))
        self._undecided = self.loss == "cross_entropy" and getattr(config, "problem_type", None) is None
        given = getattr(listed, "names", None)
        self._given = list(given) if isinstance(given, (list, tuple)) else None
        self._ids = _names(config, self.classes)
        self._folded = _folded(self._ids)
        self._named = not all(_UNNAMED.fullmatch(name) for name in self._ids)
        self._hot, self._known = self._given is None, True  # can lists be marks of every class, or name classes
        self._seen: dict[tuple[type, Any], int] = {}
        if self.loss == "cross_entropy" and self.classes < 2:
            raise InputError(
                f"expected a classifier of at least two classes; received num_labels={self.classes} with "
                "problem_type='single_label_classification', whose loss is always 0"
            )

    def check(self, numbers: npt.NDArray[np.int64], read: Callable[[npt.NDArray[np.int64]], list[Any]]) -> None:
        """Read the labels of all documents once, and settle how lists are meant.

        Parameters
        ----------
        numbers : (m,) int64
            The documents.
        read : callable (numbers) -> list
            Returns the labels of some of them.

        Raises
        ------
        InputError
            Naming the first document whose label is none of the model's.
        """
        if self._undecided and len(numbers) and isinstance(read(numbers[:1])[0], (list, tuple, np.ndarray)):
            self.loss = "binary_cross_entropy"
        several = self.loss == "binary_cross_entropy"
        for number, value in _pairs(numbers, read):
            if several:
                self._narrow(value, number)
            else:
                self(value, number)
        if several and self._hot and self._known and len(numbers):
            raise self._refusal(
                int(numbers[0]), read(numbers[:1])[0],
                "lists of classes and marks for every class look alike here: write classes by name, or marks as 0.0 "
                "and 1.0",
            )  # fmt: skip

    def __call__(self, value: Any, number: int) -> Label:
        """Return what the loss takes for the label of a document: a class, a number, or a number for every output.

        Raises
        ------
        InputError
            If it is no label of the model's.
        """
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise self._refusal(number, value, "leave the document out, or label it")
        if self.loss == "cross_entropy":
            return self._remembered(value, number)
        if self.loss == "mean_squared_error":
            return self._number(value, number) if self.classes == 1 else self._numbers(value, number)
        if self._hot:
            return [float(mark) for mark in value]
        marks = [0.0] * self.classes
        for item in value:
            marks[self._class(item, number, value)] = 1.0
        return marks

    def _remembered(self, value: Any, number: int) -> int:
        key = (type(value), value) if isinstance(value, (str, int, float)) else None  # True is not 1 here
        if key is None or key not in self._seen:
            found = self._class(value, number, value)
            if key is None or len(self._seen) >= _REMEMBERED:
                return found
            self._seen[key] = found
        return self._seen[key]

    def _class(self, item: Any, number: int, value: Any) -> int:
        """Return the class that an item, of a document's label ``value``, means."""
        if isinstance(item, str):
            return self._by_text(item, number, value)
        if isinstance(item, (bool, np.bool_)):
            return self._by_truth(bool(item), number, value)
        if isinstance(item, (int, np.integer)) or (isinstance(item, float) and item.is_integer()):
            index = int(item)
            if self._given is not None and self._named and 0 <= index < len(self._given):
                return self._by_text(self._given[index], number, value, f"{self._given[index]!r}, its number {index}")
            return self._by_number(index, number, value)
        raise self._refusal(number, value, "give the name of a class, or its number")

    def _by_text(self, text: str, number: int, value: Any, shown: str | None = None) -> int:
        name = text.strip()
        if name in self._ids:
            return self._ids[name]
        if name.casefold() in self._folded:
            return self._folded[name.casefold()]
        if _WHOLE.fullmatch(name):
            return self._by_number(int(name.partition(".")[0]), number, value)
        if name.casefold() in _TRUTH:
            return self._by_truth(_TRUTH[name.casefold()], number, value)
        raise self._refusal(number, value, "rename the labels, or give numbers of classes", shown)

    def _by_truth(self, value: bool, number: int, whole: Any) -> int:
        named = self._folded.get(str(value).casefold())
        if named is not None:
            return named
        if self.classes != 2:
            raise self._refusal(number, whole, "give the name of a class, or its number")
        return int(value)

    def _by_number(self, index: int, number: int, value: Any) -> int:
        if not 0 <= index < self.classes:
            advice = "leave documents without a label out" if index < 0 else "give the model that has this class"
            raise self._refusal(number, value, advice)
        if self._ids.get(str(index), index) != index:
            raise self._refusal(
                number, value, f"the model calls class {self._ids[str(index)]} '{index}': write names as text"
            )
        return index

    def _narrow(self, value: Any, number: int) -> None:
        """Note whether a document's list can be marks (0 to 1, one for each class), and whether it can be classes."""
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
            raise self._refusal(number, value, "this model gives several labels: list the classes of each document")
        items = list(value)
        numeric = all(isinstance(item, (bool, int, float, np.number, np.bool_)) for item in items)
        hot = numeric and len(items) == self.classes and all(0 <= float(item) <= 1 for item in items)
        whole = all(isinstance(item, (str, int, np.integer)) and not isinstance(item, bool) for item in items)
        found = [self._class(item, number, value) for item in items] if whole and not (hot and self._hot) else []
        known = whole and (len(set(found)) == len(found) if found else len(set(items)) == len(items))
        self._hot, self._known = self._hot and hot, self._known and known
        if not (self._hot or self._known):
            raise self._refusal(
                number, value, f"list distinct classes, or a number from 0 to 1 for each of {self.classes}"
            )

    def _number(self, value: Any, number: int) -> float:
        if self._given is not None:
            raise self._refusal(number, value, "this model predicts a number, these are classes: cast them to numbers")
        items = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        try:
            found = [float(item) for item in items]
        except (TypeError, ValueError):
            found = []
        if len(found) != 1 or not math.isfinite(found[0]):
            raise self._refusal(number, value, "this model predicts a number: give numbers")
        return found[0]

    def _numbers(self, value: Any, number: int) -> list[float]:
        items = list(value) if isinstance(value, (list, tuple, np.ndarray)) else []
        if len(items) != self.classes:
            raise self._refusal(number, value, f"this model predicts {self.classes} numbers: list them")
        return [self._number(item, number) for item in items]

    def _refusal(self, number: int, value: Any, advice: str, shown: str | None = None) -> InputError:
        if self.loss == "mean_squared_error":
            wanted = "a number" if self.classes == 1 else f"{self.classes} numbers"
        else:
            names = sorted(self._ids, key=lambda name: self._ids[name])
            more = ", ..." if len(names) > _SHOWN else ""
            which = "one" if self.loss == "cross_entropy" else "a list"
            wanted = f"{which} of the model's {self.classes} labels ({', '.join(names[:_SHOWN])}{more})"
        return InputError(
            f"expected {wanted} in field {self._field!r} of document {number}; received {shown or repr(value)}: "
            f"{advice}"
        )


def _loss_of(config: Any, *, several: bool) -> LabelLoss:
    kind = getattr(config, "problem_type", None)
    if kind is None:
        if config.num_labels == 1:
            return "mean_squared_error"
        return "binary_cross_entropy" if several else "cross_entropy"
    return _LOSSES[kind]


def _names(config: Any, classes: int) -> dict[str, int]:
    """Return the model's classes by name."""
    found: dict[str, int] = {}
    pairs = [(name, index) for index, name in (getattr(config, "id2label", None) or {}).items()]
    for name, index in [*pairs, *(getattr(config, "label2id", None) or {}).items()]:
        if found.setdefault(str(name), int(index)) != int(index):
            raise InputError(
                f"expected id2label and label2id of the model's configuration to agree; received {name!r} as class "
                f"{found[str(name)]} and as {index}: correct its config.json"
            )
    return {name: index for name, index in found.items() if 0 <= index < classes}


def _folded(ids: Mapping[str, int]) -> dict[str, int]:
    """Return classes by name without regard to case, where that leaves one."""
    found: dict[str, set[int]] = {}
    for name, index in ids.items():
        found.setdefault(name.casefold(), set()).add(index)
    return {name: next(iter(indices)) for name, indices in found.items() if len(indices) == 1}


def _pairs(
    numbers: npt.NDArray[np.int64], read: Callable[[npt.NDArray[np.int64]], list[Any]]
) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(numbers), _AT_ONCE):
        part = numbers[start : start + _AT_ONCE]
        yield from zip(part.tolist(), read(part), strict=True)

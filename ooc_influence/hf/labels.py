"""Kinds of columns that fields become, and labels of documents as a model's loss takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import as_text
from ooc_influence.errors import InputError

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_EXACT = 2**53  # whole numbers up to here are floats without a loss


class FieldKind:
    """The kind of a field's column: settled once every document's value was seen, the same for all rows.

    In a ``textual`` file, such as CSV, texts that are written as numbers are count as numbers.
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
        if kinds - {"missing"} and kinds <= {"int64", "float64", "missing"}:
            return "float64"
        return "int64" if kinds and kinds <= {"int64", "long"} else "str"


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
    return "float64" if repr(number) == value and math.isfinite(number) else "str"


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
_REMEMBERED = 4096  # labels whose class is looked up once


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
        element = getattr(feature, "feature", feature)  # of a list, what it lists
        problem = getattr(config, "problem_type", None)
        if problem is not None:
            self.loss = _LOSSES[problem]
        elif self.classes == 1:
            self.loss = "mean_squared_error"
        else:
            lists = element is not feature or isinstance(feature, list)
            self.loss = "binary_cross_entropy" if lists else "cross_entropy"
        self._undecided = self.loss == "cross_entropy" and problem is None
        names = getattr(element, "names", None)
        self._feature_names = list(names) if isinstance(names, (list, tuple)) else None
        self._class_of = _classes_by_name(config, self.classes)
        self._class_of_folded = _without_case(self._class_of)
        self._named = not all(_UNNAMED.fullmatch(name) for name in self._class_of)
        self._lists_are_marks, self._lists_are_classes = self._feature_names is None, True  # as far as was seen
        self._remembered: dict[tuple[type, Any], int] = {}
        if self.loss == "cross_entropy" and self.classes < 2:
            raise InputError(
                f"expected a classifier of at least two classes; received num_labels={self.classes} with "
                "problem_type='single_label_classification', whose loss is always 0"
            )

    def check(self, numbers: npt.NDArray[np.int64], read: Callable[[npt.NDArray[np.int64]], list[Any]]) -> None:
        """Read the labels of all documents once, and settle what lists mean.

        ``read`` returns the labels of some of the documents, (m,) int64. An InputError names the first document whose
        label is none of the model's.
        """
        if self._undecided and len(numbers) and isinstance(read(numbers[:1])[0], (list, tuple, np.ndarray)):
            self.loss = "binary_cross_entropy"
        look = self._look_at_list if self.loss == "binary_cross_entropy" else self
        for start in range(0, len(numbers), _AT_ONCE):
            part = numbers[start : start + _AT_ONCE]
            for number, value in zip(part.tolist(), read(part), strict=True):
                look(value, number)
        ambiguous = self._lists_are_marks and self._lists_are_classes
        if self.loss == "binary_cross_entropy" and ambiguous and len(numbers):
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
            key = (type(value), value) if isinstance(value, (str, int, float)) else None  # True is not 1 here
            if key not in self._remembered:
                index = self._class(value, number, value)
                if key is None or len(self._remembered) >= _REMEMBERED:
                    return index
                self._remembered[key] = index
            return self._remembered[key]
        if self.loss == "mean_squared_error":
            return self._number(value, number) if self.classes == 1 else self._numbers(value, number)
        if self._lists_are_marks:
            return [float(mark) for mark in value]
        marks = [0.0] * self.classes
        for item in value:
            marks[self._class(item, number, value)] = 1.0
        return marks

    def _class(self, item: Any, number: int, value: Any) -> int:
        """Return the class that an item, of a document's label ``value``, means."""
        if isinstance(item, str):
            return self._by_text(item, number, value)
        if isinstance(item, (bool, np.bool_)):
            return self._by_truth(bool(item), number, value)
        if isinstance(item, (int, np.integer)) or (isinstance(item, float) and item.is_integer()):
            index, names = int(item), self._feature_names
            if names is not None and self._named and 0 <= index < len(names):
                return self._by_text(names[index], number, value, f"{names[index]!r}, its number {index}")
            return self._by_number(index, number, value)
        raise self._refusal(number, value, "give the name of a class, or its number")

    def _by_text(self, text: str, number: int, value: Any, shown: str | None = None) -> int:
        name = text.strip()
        folded = name.casefold()
        if name in self._class_of:
            return self._class_of[name]
        if folded in self._class_of_folded:
            return self._class_of_folded[folded]
        if _WHOLE.fullmatch(name):
            return self._by_number(int(name.partition(".")[0]), number, value)
        if folded in _TRUTH:
            return self._by_truth(_TRUTH[folded], number, value)
        raise self._refusal(number, value, "rename the labels, or give numbers of classes", shown)

    def _by_truth(self, truth: bool, number: int, value: Any) -> int:
        named = self._class_of_folded.get(str(truth).casefold())
        if named is not None:
            return named
        if self.classes != 2:
            raise self._refusal(number, value, "give the name of a class, or its number")
        return int(truth)

    def _by_number(self, index: int, number: int, value: Any) -> int:
        if not 0 <= index < self.classes:
            advice = "leave documents without a label out" if index < 0 else "give the model that has this class"
            raise self._refusal(number, value, advice)
        named = self._class_of.get(str(index), index)
        if named != index:
            raise self._refusal(number, value, f"the model calls class {named} '{index}': write names as text")
        return index

    def _look_at_list(self, value: Any, number: int) -> None:
        """Note whether a document's list can be marks (0 to 1, one for each class), and whether it can be classes."""
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
            raise self._refusal(number, value, "this model gives several labels: list the classes of each document")
        items = list(value)
        numeric = all(isinstance(item, (bool, int, float, np.number, np.bool_)) for item in items)
        marks = numeric and len(items) == self.classes and all(0 <= float(item) <= 1 for item in items)
        self._lists_are_marks = self._lists_are_marks and marks
        classes = all(isinstance(item, (str, int, np.integer)) and not isinstance(item, bool) for item in items)
        if classes and not self._lists_are_marks:
            items = [self._class(item, number, value) for item in items]
        self._lists_are_classes = self._lists_are_classes and classes and len(set(items)) == len(items)
        if not (self._lists_are_marks or self._lists_are_classes):
            raise self._refusal(
                number, value, f"list distinct classes, or a number from 0 to 1 for each of {self.classes}"
            )

    def _number(self, value: Any, number: int) -> float:
        if self._feature_names is not None:
            raise self._refusal(number, value, "this model predicts a number, these are classes: cast them to numbers")
        items = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        try:
            (result,) = (float(item) for item in items)
        except (TypeError, ValueError):
            result = math.nan
        if not math.isfinite(result):
            raise self._refusal(number, value, "this model predicts a number: give numbers")
        return result

    def _numbers(self, value: Any, number: int) -> list[float]:
        items = list(value) if isinstance(value, (list, tuple, np.ndarray)) else []
        if len(items) != self.classes:
            raise self._refusal(number, value, f"this model predicts {self.classes} numbers: list them")
        return [self._number(item, number) for item in items]

    def _refusal(self, number: int, value: Any, advice: str, shown: str | None = None) -> InputError:
        if self.loss == "mean_squared_error":
            wanted = "a number" if self.classes == 1 else f"{self.classes} numbers"
        else:
            names = sorted(self._class_of, key=lambda name: self._class_of[name])
            more = ", ..." if len(names) > _SHOWN else ""
            which = "one" if self.loss == "cross_entropy" else "a list"
            wanted = f"{which} of the model's {self.classes} labels ({', '.join(names[:_SHOWN])}{more})"
        return InputError(
            f"expected {wanted} in field {self._field!r} of document {number}; received {shown or repr(value)}: "
            f"{advice}"
        )


def _classes_by_name(config: Any, classes: int) -> dict[str, int]:
    pairs = [(name, index) for index, name in (getattr(config, "id2label", None) or {}).items()]
    pairs += (getattr(config, "label2id", None) or {}).items()
    indices: dict[str, int] = {}
    for name, index in pairs:
        if indices.setdefault(str(name), int(index)) != int(index):
            raise InputError(
                f"expected id2label and label2id of the model's configuration to agree; received {name!r} as class "
                f"{indices[str(name)]} and as {index}: correct its config.json"
            )
    return {name: index for name, index in indices.items() if 0 <= index < classes}


def _without_case(class_of: Mapping[str, int]) -> dict[str, int]:
    """Return classes by case-folded name, where that names one class only."""
    indices: dict[str, set[int]] = {}
    for name, index in class_of.items():
        indices.setdefault(name.casefold(), set()).add(index)
    return {name: next(iter(several)) for name, several in indices.items() if len(several) == 1}

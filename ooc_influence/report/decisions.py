"""What was ticked on a page of label errors, read back from the file it exported, checked against the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ooc_influence.corpus import open_records
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.store import GradientStore

_ACTIONS = ("drop", "relabel")
_FORMULA = tuple("'=+-@\t\r")  # cells that begin so were written behind an apostrophe: spreadsheets compute the others


class Decision(NamedTuple):
    """What to do with a row.

    Attributes
    ----------
    row : int
        Its number.
    id : str
        Its id, as text.
    action : {"drop", "relabel"}
        What.
    new_label, note : str
        As typed; empty where nothing was.
    """

    row: int
    id: str
    action: str
    new_label: str
    note: str


def read_decisions(path: str | Path, store: GradientStore) -> list[Decision]:
    """Return what a file exported from a report says of rows of a store.

    Raises
    ------
    InputError
        If it cannot be read, names no row, or a record is no decision.
    MismatchError
        If a row has another id in the store: the report was of another one.
    """
    file = Path(path)
    if not {".csv", ".jsonl"} & {suffix.lower() for suffix in file.suffixes}:
        raise InputError(f"expected label-errors.csv or .jsonl, as a report exports it; received {file}")
    decisions = [_decision(record, number, file) for number, record in enumerate(open_records(file))]
    if not decisions:
        raise InputError(f"expected rows in {file}; received none: tick some on the page of label errors, then export")
    rows = np.array([decision.row for decision in decisions], np.int64)
    if not 0 <= rows.min() <= rows.max() < store.n:
        raise MismatchError(
            f"expected rows from 0 to {store.n - 1} of {store.path} in {file}; received {int(rows.min())} to "
            f"{int(rows.max())}: the report was of another store"
        )
    for decision, name in zip(decisions, store.ids(rows).tolist(), strict=True):
        if decision.id != str(name):
            raise MismatchError(
                f"expected row {decision.row} of {store.path} to be {decision.id!r}, as in {file}; received "
                f"{str(name)!r}: the report was of another store"
            )
    return decisions


def _decision(record: dict[str, Any], number: int, path: Path) -> Decision:
    spreadsheet = path.suffix.lower() == ".csv"
    values = {name: _cell_text(record.get(name), spreadsheet) for name in ("row", "id", "action", "new_label", "note")}
    if not values["row"].isdigit() or values["action"] not in _ACTIONS:
        raise InputError(
            f"expected row, id and action ({' or '.join(_ACTIONS)}) in record {number} of {path}; received {record}"
        )
    return Decision(int(values["row"]), *(values[name] for name in ("id", "action", "new_label", "note")))


def _cell_text(value: Any, spreadsheet: bool) -> str:
    text = "" if value is None else str(value)
    return text[1:] if spreadsheet and text.startswith("'") and text[1:].startswith(_FORMULA) else text

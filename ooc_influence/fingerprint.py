"""Fingerprints: digests that tell models, masks, settings and rows apart, and the one check that two things agree."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import MismatchError

_DIGEST = re.compile(r"(?:\d:)?([0-9a-f]{12})[0-9a-f]{52}")  # a SHA-256, behind the version of a model's fingerprint
_LONGEST = 200  # characters of a value in a message


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its mappings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def array_digest(values: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of an array's bytes, in the order of its entries."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def check_same(
    source: object, expected: Mapping[str, Any], received: Mapping[str, Any], advice: str, *, other: object = None
) -> None:
    """Check that two things that belong together have the same fingerprints, digests or settings.

    Parameters
    ----------
    source : object
        What the expected values are of, such as a store's path.
    expected, received : mapping of str to value
        By the same names, which the message uses.
    advice : str
        What to do if they differ.
    other : object, optional
        What the received values are of; by default what the caller gave.

    Raises
    ------
    MismatchError
        If they differ, with both values: of mappings, the entries that differ.
    """
    names = [name for name in expected if expected[name] != received[name]]
    if not names:
        return
    one, two = zip(*(_in_words(expected[name], received[name]) for name in names), strict=True)
    where = "" if other is None else f" of {other}"
    raise MismatchError(
        f"expected the {' and '.join(names)} of {source}, {' and '.join(one)}; received {' and '.join(two)}{where}: "
        f"{advice}"
    )


def check_same_rows(
    source: object,
    first: int,
    expected: Mapping[str, npt.NDArray[Any]],
    received: Mapping[str, npt.NDArray[Any]],
    advice: str,
    *,
    rtol: float = 0.0,
    agreeing: float = 1.0,
) -> None:
    """Check that rows are still of the same data, by values that are stored of each.

    Parameters
    ----------
    source : object
        The store that the rows are in.
    first : int
        The number of the first row.
    expected, received : mapping of str to (m,) array
        Stored values and those of the data, by what they are, such as ``"losses"``.
    advice : str
        What to do if they differ.
    rtol : float
        Relative tolerance of numbers; 0 for equality.
    agreeing : float
        The least share of rows that must agree.

    Raises
    ------
    MismatchError
        If they differ.
    """
    for name, stored in expected.items():
        values = received[name]
        same_shape = stored.shape == values.shape
        close = np.isclose(stored, values, rtol=rtol, atol=1e-6) if same_shape and rtol else stored == values
        if not same_shape or np.count_nonzero(close) < agreeing * len(stored):
            raise MismatchError(
                f"expected rows {first}-{first + len(stored)} to have the {name} stored in {source}; received others: "
                f"{advice}"
            )


def checkpoint_names(attributes: Mapping[str, Any]) -> str:
    """Return the checkpoints that a store recorded, the beginnings of their fingerprints."""
    recorded = attributes.get("checkpoints") or ()
    return ", ".join(each["fingerprint"].partition(":")[2][:12] for each in recorded) or "none"


def _in_words(expected: Any, received: Any) -> tuple[str, str]:
    """Return two values for a message, a digest by its beginning; of mappings, the entries that differ."""
    if not isinstance(expected, Mapping) or not isinstance(received, Mapping):
        return _short(expected), _short(received)
    names = [name for name in {**expected, **received} if expected.get(name) != received.get(name)]
    pairs = [(name, expected.get(name), received.get(name)) for name in names]
    one = ", ".join(_entry(name, value, other) for name, value, other in pairs)
    two = ", ".join(_entry(name, value, other) for name, other, value in pairs)
    return one[:_LONGEST], two[:_LONGEST]


def _entry(name: str, value: Any, other: Any) -> str:
    """Return an entry of a mapping in words; of one that is a mapping itself, what differs from ``other``."""
    if value is None:
        return f"no {name}"
    if not isinstance(value, Mapping):
        return f"{name} {value}"
    kept = {key: entry for key, entry in value.items() if entry is not None}
    text, _ = _in_words(value, other) if isinstance(other, Mapping) else _in_words(kept, {})
    return f"{name} with {text}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    digest = _DIGEST.fullmatch(text)
    return digest[1] if digest else text[:_LONGEST]

"""Documents that are tokens already, also several packed into one row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.hf.chats import Span

IGNORED = -100  # the label of a token that is no target, as PyTorch's losses have it


def pretokenised(
    tokenizer: Any, number: int, record: dict[str, Any], ids: str, labels: str | None, documents: str | None
) -> tuple[list[int], tuple[Span, ...], tuple[Span, ...]]:
    """Return tokens, spans of targets, and spans of the documents packed in a row; none where it is one document.

    What follows the last target, such as padding, is cut. ``ids``, ``labels`` and ``documents`` are names of fields.

    Raises
    ------
    InputError
        For lists that are none of whole numbers or of another length, tokens that the tokenizer does not have, labels
        that are shifted, and padding on the left.
    """
    tokens = _whole_numbers(number, ids, record)
    strange = tokens[(tokens < 0) | (tokens >= len(tokenizer))]
    if len(strange):
        raise InputError(
            f"expected tokens from 0 to {len(tokenizer) - 1} in field {ids!r} of document {number}; received "
            f"{strange[0]}: give the tokenizer they were made with (--tokenizer)"
        )
    wanted = tokens if labels is None else _whole_numbers(number, labels, record, len(tokens))
    wrong = np.flatnonzero((wanted != tokens) & (wanted != IGNORED))
    if len(wrong):
        raise InputError(
            f"expected labels that are the token at the same index or {IGNORED} in document {number}; received "
            f"{wanted[wrong[0]]} for token {wrong[0]}, which is {tokens[wrong[0]]}: do not shift them"
        )
    pad = tokenizer.pad_token_id
    padded = pad is not None and pad not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    if padded and len(tokens) > 1 and tokens[0] == pad and wanted[0] == IGNORED:
        raise InputError(
            f"expected tokens without padding on the left in document {number}; received {pad}, the tokenizer's "
            "padding, first: pad on the right, or not at all"
        )
    targets = _runs(wanted != IGNORED)
    length = targets[-1][1] if targets else 0
    packed: tuple[Span, ...] = ()
    if documents is not None:
        changes = np.flatnonzero(np.diff(_whole_numbers(number, documents, record, len(tokens)))) + 1
        spans = pairwise([0, *changes.tolist(), len(tokens)])
        packed = tuple((low, min(high, length)) for low, high in spans if low < length)
    return tokens[:length].tolist(), targets, packed


def _whole_numbers(number: int, name: str, record: dict[str, Any], length: int | None = None) -> npt.NDArray[np.int64]:
    """Return a field that is a list of whole numbers, of a length where one is given."""
    value = record[name]
    try:
        numbers = np.asarray(value) if isinstance(value, (list, tuple, np.ndarray)) else np.zeros((), object)
    except ValueError:  # lists of different lengths
        numbers = np.zeros((), object)
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
        raise InputError(
            f"expected a list of whole numbers in field {name!r} of document {number}; received "
            f"{_described(numbers, value)}"
        )
    if length is not None and len(numbers) != length:
        raise InputError(
            f"expected one number a token, {length}, in field {name!r} of document {number}; received {len(numbers)}"
        )
    return numbers.astype(np.int64)


def _described(numbers: npt.NDArray[Any], value: Any) -> str:
    if numbers.dtype.kind in "fb":
        return "floats" if numbers.dtype.kind == "f" else "booleans"
    return (
        f"a list of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else type(value).__name__
    )


def _runs(marked: npt.NDArray[np.bool_]) -> tuple[Span, ...]:
    """Return the spans of marked tokens."""
    edges = np.flatnonzero(np.diff(marked, prepend=False, append=False)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))

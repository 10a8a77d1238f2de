"""Documents as rows of tokens: what is read, what is a target, where long documents are cut.

A document longer than the context becomes several rows. Each row but the first begins with the last token of the one
before, as context, so every token but a document's first is a target in exactly one row. Only numbers are kept for
every row (document, start, length, the characters it spans, a digest of the document's text); the text is read and
tokenised again when a batch needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.hf.collator import IGNORED
from ooc_influence.hf.documents import check_fields
from ooc_influence.hf.fields import Fields
from ooc_influence.hf.tokens import Tokeniser, Tokens
from ooc_influence.progress import Progress
from ooc_influence.texts import text_digest, text_of

_AT_ONCE = 512  # documents tokenised together
SPANS = ("char_start", "char_stop", "text_digest")  # columns that find a row's passage in its document


class RowColumn(Sequence[Any]):
    """A value for each row, looked up by number when it is asked for."""

    def __init__(self, samples: Samples, field: str | None, *, piece: bool = False) -> None:
        self._samples, self._field, self._piece = samples, field, piece

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        rows = range(len(self))[key]
        documents = self._samples.document[rows.start : rows.stop]
        values: list[Any] = documents.tolist() if self._field is None else self._samples.field(self._field, documents)
        if not self._piece:
            return values
        pieces = self._samples.piece[rows.start : rows.stop].tolist()
        return [str(value) if number < 0 else f"{value}#{number}" for value, number in zip(values, pieces, strict=True)]


class Samples:
    """Rows of tokens made from documents.

    Parameters
    ----------
    documents : Dataset
        From :func:`open_documents`.
    tokenizer : PreTrainedTokenizer
        The model's.
    fields : Fields
        What is what.
    max_length : int
        Tokens a row may have.
    labels : mapping of str to int, optional
        Numbers of the classes.
    numbers : (m,) int, optional
        Documents to use; default all.
    progress : bool or None
        Show a progress line while documents are counted.

    Attributes
    ----------
    document, lengths, n_tokens : (n,) int64
        Of each row: its document, its tokens, its target tokens.
    piece : (n,) int64
        Which piece of its document; -1 where it is the only one.
    char_start, char_stop : (n,) int64
        The characters of its document's text (:mod:`ooc_influence.texts`) that it is made from; -1 of a piece whose
        tokens do not tell: a chat's, or of a tokenizer without offsets.
    text_digest : (n,) int64
        A digest of its document's text.
    documents, max_length : int
        Documents of the file, and tokens a row may have.
    without_target, truncated : int
        Documents left out since they have no target, and texts to be classified that were cut.

    Raises
    ------
    InputError
        For fields that documents lack, values of another type, or a tokenizer without what is needed.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any,
        fields: Fields,
        max_length: int,
        *,
        labels: dict[str, int] | None = None,
        numbers: npt.NDArray[np.int64] | None = None,
        progress: bool | None = None,
    ) -> None:
        if max_length < 2:
            raise InputError(f"expected max_length >= 2; received {max_length}")
        check_fields(documents, fields.named)
        self._documents, self.fields = documents, fields
        self._tokenise = Tokeniser(tokenizer, fields)
        self.documents, self.max_length, self._labels = len(documents), max_length, labels
        self.without_target = self.truncated = 0
        self._tokens = lru_cache(maxsize=2 * _AT_ONCE)(self._tokenise_one)
        self._index(np.arange(len(documents)) if numbers is None else numbers, progress)
        if not len(self):
            raise InputError("expected documents with target tokens; received none that has any")

    def _index(self, numbers: npt.NDArray[np.int64], progress: bool | None) -> None:
        rows: list[npt.NDArray[np.int64]] = []
        with Progress("tokens", len(numbers), progress) as bar:
            for low in range(0, len(numbers), _AT_ONCE):
                part = numbers[low : low + _AT_ONCE].tolist()
                records = self._records(part)
                for number, record, tokens in zip(part, records, self._tokenise(part, records), strict=True):
                    found = self._cut(number, len(tokens.ids), tokens.first)
                    rows.append(
                        np.hstack([found, self._spans(found, tokens, text_of(record, self.fields.parts) or "")])
                    )
                bar.advance(len(part))
        table = np.concatenate(rows) if rows else np.empty((0, 8), np.int64)
        (
            self.document, self.piece, self._start, self.lengths, self.n_tokens,
            self.char_start, self.char_stop, self.text_digest,
        ) = (np.ascontiguousarray(column) for column in table.T)  # fmt: skip

    def _records(self, numbers: list[int]) -> list[dict[str, Any]]:
        names = list(self.fields.parts.values())
        columns = self._documents[numbers] if numbers else {}
        return [
            dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)
        ]

    def _spans(self, rows: npt.NDArray[np.int64], tokens: Tokens, text: str) -> npt.NDArray[np.int64]:
        """Return the characters from and to that each row of a document is made from, and its text's digest."""
        found = np.empty((len(rows), 3), np.int64)
        found[:, 2] = text_digest(text)
        for at, (start, length) in enumerate(rows[:, 2:4].tolist()):
            low = 0 if start == 0 else tokens.characters(start)[0]
            high = len(text) if start + length >= len(tokens.ids) else tokens.characters(start + length - 1)[1]
            found[at, :2] = (low, high) if min(low, high) >= 0 else (-1, -1)
        return found

    def _cut(self, number: int, length: int, first: int) -> npt.NDArray[np.int64]:
        """Return the rows (document, piece, start, length, targets) of a document whose targets begin at ``first``."""
        if self.fields.label is not None:
            self.truncated += length > self.max_length
            return np.array([[number, -1, 0, min(length, self.max_length), 1]])
        found = []
        for start in range(0, max(1, length - 1), self.max_length - 1):
            stop = min(length, start + self.max_length)
            targets = stop - max(start + 1, first)
            if targets > 0:
                found.append((number, start // (self.max_length - 1), start, stop - start, targets))
        self.without_target += not found
        rows = np.array(found, np.int64).reshape(-1, 5)
        if length <= self.max_length:
            rows[:, 1] = -1
        return rows

    def __len__(self) -> int:
        return len(self.document)

    def field(self, name: str, documents: npt.NDArray[np.int64]) -> list[Any]:
        """Return a field of some documents."""
        return list(self._documents.select(documents.tolist(), keep_in_memory=True)[name])

    def ids(self) -> RowColumn:
        """Return each row's name: its document's, with ``#piece`` where that has several rows."""
        return RowColumn(self, self.fields.id, piece=True)

    def columns(self) -> dict[str, Any]:
        """Return what is kept of each row: its attributes here that are numbers, and the fields asked for."""
        kept: dict[str, Any] = {
            "document": self.document, "n_tokens": self.n_tokens, **{name: getattr(self, name) for name in SPANS},
        }  # fmt: skip
        return kept | {name: RowColumn(self, name) for name in self.fields.keep}

    def __getitem__(self, row: Any) -> dict[str, Any]:
        number, start, length = int(self.document[row]), int(self._start[row]), int(self.lengths[row])
        ids, first = self._tokens(number)[:2]
        piece = ids[start : start + length]
        found: dict[str, Any] = {"row": int(row), "input_ids": piece}
        if self.fields.label is not None:
            return found | {"labels": self._label(self._documents[number][self.fields.label])}
        unseen = max(1, first - start)  # the first token has nothing to be predicted from
        return found | {"labels": [IGNORED] * min(unseen, length) + piece[unseen:]}

    def _label(self, value: Any) -> int:
        if isinstance(value, str):
            if value not in (self._labels or {}):
                raise InputError(f"expected one of the model's labels {sorted(self._labels or {})}; received {value!r}")
            return (self._labels or {})[value]
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"expected a label as a whole number or text; received {value!r}")
        return value

    def _tokenise_one(self, number: int) -> Tokens:
        found = self._tokenise([number], self._records([number]))[0]
        return found._replace(spans=())  # many are held, and these were for the index

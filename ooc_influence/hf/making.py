"""Rows made of documents in one pass: tokenised, cut, their numbers written, ids and columns looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.hf.fields import Fields
from ooc_influence.hf.index import Counts, Row, RowWriter
from ooc_influence.hf.kinds import FieldKind
from ooc_influence.hf.tokens import Tokeniser, Tokens
from ooc_influence.progress import Progress
from ooc_influence.repeats import Repeats
from ooc_influence.texts import as_text, text_digest, text_of

AT_ONCE = 512  # documents read together
_CHARACTERS = 2**20  # of documents tokenised together: offsets take a hundred bytes a token
_SKIP = "fill it in, or leave such documents out with on_missing='skip' (--on-missing skip)"

Numbered = tuple[int, dict[str, Any]]  # a document


class RowMaker:
    """Makes the rows of documents.

    Parameters
    ----------
    documents : Documents
        What they are made from.
    tokenise : Tokeniser
        Their tokens.
    fields, max_length, on_missing, numbers
        As for :class:`~ooc_influence.hf.samples.Samples`.
    """

    def __init__(
        self, documents: Any, tokenise: Tokeniser, fields: Fields, max_length: int, on_missing: str,
        numbers: npt.NDArray[np.int64] | None,
    ) -> None:  # fmt: skip
        self._documents, self._tokenise, self._fields, self._max_length = documents, tokenise, fields, max_length
        self._on_missing, self._parts = on_missing, fields.parts
        self._numbers: Sequence[int] | npt.NDArray[np.int64] = range(len(documents)) if numbers is None else numbers

    def settings(self) -> dict[str, Any]:
        """Return JSON values that settle, beside documents and tokenizer, what is made."""
        chosen = None
        if isinstance(self._numbers, np.ndarray):
            chosen = hashlib.blake2b(self._numbers.tobytes(), digest_size=16).hexdigest()
        return {"fields": self._fields.all, "max_length": self._max_length, "on_missing": self._on_missing,
                "numbers": chosen}  # fmt: skip

    def make(self, folder: Path, progress: bool | None) -> None:
        """Write the rows to a folder.

        Raises
        ------
        InputError
            Naming a document that lacks a text or an id, or two rows of one name.
        """
        fields, counts = self._fields, Counts()
        textual = self._documents.textual
        kinds = {name: FieldKind(textual) for name in fields.keep}
        with (
            RowWriter(folder) as writer, Repeats() as repeats, Progress("tokens", len(self._numbers), progress) as bar
        ):  # fmt: skip
            for low in range(0, len(self._numbers), AT_ONCE):
                some = [int(number) for number in self._numbers[low : low + AT_ONCE]]
                documents = list(self._usable(some, counts))
                for name, kind in kinds.items():
                    kind.add(record.get(name) for _, record in documents)
                for group in _groups(documents):
                    rows = [self._rows(*own, counts) for own in zip(group, self._tokenise(group), strict=True)]
                    writer.append([row for some in rows for row in some])
                    repeats.add([name for own, some in zip(group, rows, strict=True)
                                 for name in self._names(own, [piece for _, piece, *_ in some])])  # fmt: skip
                bar.advance(len(some))
            counts.kinds = {name: kind.kind for name, kind in kinds.items()}
            found = writer.finish(counts)
            self._check_ids(repeats, found["document"], found["piece"])

    def _usable(self, numbers: list[int], counts: Counts) -> Iterator[Numbered]:
        """Yield documents that have all that is needed."""
        records = self._documents.read(numbers, self._fields.used)
        for number, record in zip(numbers, records, strict=True):
            lacking = self._tokenise.lacking(record)
            if lacking is None:
                yield number, record
            elif self._on_missing == "skip":
                counts.missing += 1
            else:
                raise InputError(f"expected a text in document {number} of {self._documents.name}; received {lacking}: "
                                 f"{_SKIP}")  # fmt: skip

    def _rows(self, document: Numbered, tokens: Tokens, counts: Counts) -> list[Row]:
        """Return a document's rows: the columns of the index."""
        number, record = document
        text = text_of(record, self._parts) or ""
        digest, last = text_digest(text), len(tokens.ids)
        rows: list[Row] = []
        for piece, start, length, targets in self._cut(number, tokens, counts):
            if tokens.passage is not None:
                rows.append((number, piece, start, length, targets, *tokens.passage, digest))
                continue
            low = 0 if start == 0 else tokens.characters(start)[0]
            high = len(text) if start + length >= last else tokens.characters(start + length - 1)[1]
            known = (low, high) if low >= 0 and high >= 0 else (-1, -1)
            rows.append((number, piece, start, length, targets, *known, digest))
        return rows

    def _cut(self, number: int, tokens: Tokens, counts: Counts) -> list[tuple[int, int, int, int]]:
        """Return the rows (piece, start, length, targets) of a document."""
        length, first, most = len(tokens.ids), tokens.first, self._max_length
        if self._fields.label is not None:
            if not length:
                raise InputError(
                    f"expected a text to classify in document {number}; received one that the tokenizer makes no token "
                    "of: leave it out"
                )
            counts.truncated += tokens.passage is not None
            return [(-1, 0, length, 1)]
        found = []
        for start in range(0, max(1, length - 1), most - 1):
            stop = min(length, start + most)
            targets = stop - max(start + 1, first)
            if targets > 0:
                found.append((start // (most - 1) if length > most else -1, start, stop - start, targets))
        counts.without_target += not found
        return found

    def _names(self, document: Numbered, pieces: list[int]) -> list[str]:
        """Return the names of a document's rows where it has an id; numbers of documents do not repeat."""
        if self._fields.id is None:
            return []
        number, record = document
        value = record.get(self._fields.id)
        if value is None or isinstance(value, (list, dict)):
            raise InputError(
                f"expected a number or text in field {self._fields.id!r} (--id) of document {number}; received "
                f"{'none' if value is None else type(value).__name__}: give every document an id"
            )
        return row_names([as_text(value)] * len(pieces), pieces)

    def _check_ids(self, repeats: Repeats, document: npt.NDArray[np.int64], piece: npt.NDArray[np.int64]) -> None:
        field = str(self._fields.id)

        def names(rows: npt.NDArray[np.int64]) -> list[str]:
            records = self._documents.read(document[rows].tolist(), self._fields.used)
            return row_names([as_text(record.get(field)) for record in records], piece[rows].tolist())

        found = repeats.find(names)
        if found is not None:
            first, second = document[list(found)].tolist()
            raise InputError(
                f"expected ids that do not repeat; received {names(np.array(found[:1]))[0]!r} in documents {first} and "
                f"{second}: give every document its own, or leave --id out"
            )


def row_names(names: Sequence[Any], pieces: Sequence[int]) -> list[str]:
    """Return rows' names: the document's, with ``#piece`` where it has several rows."""
    return [str(name) if piece < 0 else f"{name}#{piece}" for name, piece in zip(names, pieces, strict=True)]


def _groups(documents: Sequence[Numbered]) -> Iterator[list[Numbered]]:
    """Yield documents in groups of a bounded number of characters, a document at least."""
    group: list[Numbered] = []
    held = 0
    for number, record in documents:
        length = sum(len(value) if isinstance(value, str) else len(str(value)) for value in record.values())
        if group and held + length > _CHARACTERS:
            yield group
            group, held = [], 0
        group.append((number, record))
        held += length
    if group:
        yield group

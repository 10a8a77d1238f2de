"""Documents as rows of tokens: what is read, what is a target, where long documents are cut.

A document longer than the context becomes several rows. Each row but the first begins with the last token of the one
before, as context, so every token but a document's first is a target in exactly one row. Only numbers are kept for
every row (document, start, length, the characters it spans, a digest of the document's text), on disk
(:mod:`ooc_influence.hf.index`); the text is read and tokenised again when a batch needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.hf.collator import IGNORED
from ooc_influence.hf.documents import check_fields
from ooc_influence.hf.fields import Fields
from ooc_influence.hf.index import RowIndex, open_index
from ooc_influence.hf.kinds import as_kind
from ooc_influence.hf.labels import Labels
from ooc_influence.hf.making import AT_ONCE, RowMaker, row_names
from ooc_influence.hf.tokens import Tokeniser
from ooc_influence.hf.truncation import check_room
from ooc_influence.texts import as_text, text_digest, text_of

_HELD = 2**22  # tokens of documents that are held for further rows of theirs
SPANS = ("char_start", "char_stop", "text_digest")  # columns that find a row's passage in its document


class RowColumn(Sequence[Any]):
    """A value for each row, looked up by number when it is asked for.

    Attributes
    ----------
    distinct : bool
        Whether no value is there twice, which was checked when the rows were made.
    """

    def __init__(self, samples: Samples, field: str | None, *, piece: bool = False) -> None:
        self._samples, self._field, self._piece = samples, field, piece
        self.distinct = piece

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        rows = range(len(self))[key]
        documents = self._samples.document[rows.start : rows.stop]
        if not self._piece:
            return documents.tolist() if self._field is None else self._samples.field(self._field, documents)
        names = documents.tolist()
        if self._field is not None:
            names = [as_text(value) for value in self._samples.field(self._field, documents, kept=False)]
        return row_names(names, self._samples.piece[rows.start : rows.stop].tolist())


class Samples:
    """Rows of tokens made from documents.

    Parameters
    ----------
    documents : Documents
        From :func:`open_documents`.
    tokenizer : PreTrainedTokenizer
        The model's.
    fields : Fields
        What is what.
    max_length : int
        Tokens a row may have.
    labels : Labels, optional
        What the classifier's labels mean, where there is a field of them.
    numbers : (m,) int, optional
        Documents to use; default all.
    on_missing : {"raise", "skip"}
        Documents whose text is missing (a field that is null or not there, a chat without a reply): stop and name the
        first, or leave them out. An empty text is a text.
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
    without_target, truncated, missing : int
        Documents left out since they have no target, texts to be classified that were cut, and documents left out
        since their text is missing.

    Raises
    ------
    InputError
        For fields that documents lack, values of another type, ids that repeat, labels that are none of the model's,
        texts to be classified without a token, or a tokenizer without what is needed.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any,
        fields: Fields,
        max_length: int,
        *,
        labels: Labels | None = None,
        numbers: npt.NDArray[np.int64] | None = None,
        on_missing: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> None:
        if max_length < 2:
            raise InputError(f"expected max_length >= 2; received {max_length}")
        if on_missing not in ("raise", "skip"):
            raise InputError(f"expected on_missing 'raise' or 'skip'; received {on_missing!r}")
        texts = list(fields.parts.values())
        named = [field for field in (fields.label, fields.id) if field is not None]
        missing = on_missing == "skip"  # then the first documents may lack their texts
        check_fields(documents, named if missing else texts + named, [*(texts if missing else ()), *fields.keep])
        self._documents, self.fields, self._tokenise = documents, fields, Tokeniser(tokenizer, fields, max_length)
        self.documents, self.max_length, self._labels = len(documents), max_length, labels
        if fields.label is not None:
            check_room(tokenizer, max_length)
        maker = RowMaker(documents, self._tokenise, fields, max_length, on_missing, numbers)
        self._index = open_index(documents, maker.settings(), tokenizer, lambda folder: maker.make(folder, progress))
        self._held: OrderedDict[int, tuple[npt.NDArray[np.int32], int]] = OrderedDict()
        self._held_tokens = 0
        self._last: tuple[bytes, list[dict[str, Any]]] = (b"", [])
        self._take(self._index)
        if not len(self):
            raise InputError("expected documents with target tokens; received none that has any")
        if labels is not None:
            labels.check(self.document, self._labels_of)

    def _take(self, index: RowIndex) -> None:
        found, counts = index.columns, index.counts
        self.document, self.piece, self._start = found["document"], found["piece"], found["start"]
        self.lengths, self.n_tokens = found["lengths"], found["n_tokens"]
        self.char_start, self.char_stop = found["char_start"], found["char_stop"]
        self.text_digest = found["text_digest"]
        self.without_target, self.truncated, self.missing = counts.without_target, counts.truncated, counts.missing
        self._kinds = counts.kinds

    def __len__(self) -> int:
        return len(self.document)

    def field(self, name: str, documents: npt.NDArray[np.int64], *, kept: bool = True) -> list[Any]:
        """Return a field of some documents, as its column has it or, if not ``kept``, as the file says."""
        own, places = np.unique(documents, return_inverse=True)
        if self._last[0] != own.tobytes():  # all fields of a block of rows are asked for one after the other
            self._last = own.tobytes(), self._read(own.tolist())
        records = self._last[1]
        kind = self._kinds.get(name) if kept else None
        values = [as_kind(record.get(name), kind) if kind else record.get(name) for record in records]
        return [values[place] for place in places.tolist()]

    def _read(self, documents: list[int]) -> list[dict[str, Any]]:
        """Return what documents have beside their texts, which are long."""
        texts = set(self.fields.parts.values()) - {self.fields.id, self.fields.label, *self.fields.keep}
        found = []
        for low in range(0, len(documents), AT_ONCE):
            for record in self._documents.read(documents[low : low + AT_ONCE], self.fields.used):
                found.append({name: value for name, value in record.items() if name not in texts})
        return found

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
        ids, first = self._tokens(number, int(self.text_digest[row]), start + length)
        piece = ids[start : start + length].tolist()
        found: dict[str, Any] = {"row": int(row), "input_ids": piece}
        if self._labels is not None:
            return found | {"label": self._labels(self._labels_of(self.document[row : row + 1])[0], number)}
        unseen = max(1, first - start)  # the first token has nothing to be predicted from
        return found | {"labels": [IGNORED] * min(unseen, length) + piece[unseen:]}

    def _labels_of(self, documents: npt.NDArray[np.int64]) -> list[Any]:
        """Return what the file says of some documents' labels."""
        field = self.fields.label or ""
        return [record.get(field) for record in self._documents.read(documents.tolist(), [field])]

    def _tokens(self, number: int, digest: int, least: int) -> tuple[npt.NDArray[np.int32], int]:
        """Return a document's tokens and the first target, checked against what its rows were made from."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        record = self._documents.read([number], self.fields.used)[0]
        text = text_of(record, self.fields.parts) or ""
        tokens = None if text_digest(text) != digest else self._tokenise([(number, record)])[0]
        if tokens is None or len(tokens.ids) < least:
            raise InputError(
                f"expected document {number} of {self._documents.name} to be as it was when its rows were counted; "
                "received another text or other tokens: leave the file as it is, and run again"
            )
        self._held[number] = np.array(tokens.ids, np.int32), tokens.first
        self._held_tokens += len(tokens.ids)
        while len(self._held) > 1 and self._held_tokens > _HELD:
            self._held_tokens -= len(self._held.popitem(last=False)[1][0])
        return self._held[number]

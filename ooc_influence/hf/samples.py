"""Documents as rows of tokens: what is read, what is a target, where long documents are cut.

A document longer than the context becomes several rows. Each row but the first begins with the last token of the one
before, as context, so every token but a document's first is a target in exactly one row. Only numbers are kept for
every row (document, start, length, the characters it spans, a digest of the document's text); the text is read and
tokenised again when a batch needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.hf.documents import check_fields
from ooc_influence.progress import Progress
from ooc_influence.texts import BETWEEN, text_digest, text_of

_AT_ONCE = 512  # documents tokenised together
SPANS = ("char_start", "char_stop", "text_digest")  # columns that find a row's passage in its document
IGNORED = -100  # the label of a token that is no target


@dataclass(frozen=True)
class Fields:
    """Which fields of a document are what.

    Attributes
    ----------
    text : str or None
        Running text.
    prompt, completion : str or None
        A pair of which only the completion's tokens are targets.
    messages : str or None
        A chat, through the tokenizer's template; the last message's tokens are targets.
    label : str or None
        With ``text``: the class, for sequence classification.
    id : str or None
        The document's name; default its number.
    keep : tuple of str
        Further fields, kept as columns.
    chat : bool
        Put prompt and completion through the chat template, as a user's and an assistant's turn.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    label: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        pair = (self.prompt, self.completion)
        forms = [self.text is not None, any(pair), self.messages is not None]
        if sum(forms) != 1 or (any(pair) and not all(pair)) or (self.label is not None and self.text is None):
            raise InputError(
                "expected one of text, prompt and completion, text and label, or messages; received "
                f"text={self.text!r}, prompt={self.prompt!r}, completion={self.completion!r}, "
                f"messages={self.messages!r}, label={self.label!r}"
            )

    @property
    def parts(self) -> dict[str, str]:
        """The fields that make up a document's text, by what they are."""
        kinds = ("text", "prompt", "completion", "messages")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}

    @property
    def all(self) -> dict[str, Any]:
        """All that is set, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def named(self) -> list[str | None]:
        """All fields that documents must have."""
        return [self.text, self.prompt, self.completion, self.messages, self.label, self.id, *self.keep]


class Tokens(NamedTuple):
    """A document's tokens.

    Attributes
    ----------
    ids : list of int
        The tokens.
    first : int
        The first target.
    spans : tuple of (Encoding or None, int, int)
        How tokens map to characters: from which encoding, which token and which character on. Empty if not known.
    """

    ids: list[int]
    first: int
    spans: tuple[tuple[Any, int, int], ...] = ()

    def characters(self, token: int) -> tuple[int, int]:
        """Return the characters that a token is of, from and to; (-1, -1) if that is not known."""
        for encoding, start, offset in reversed(self.spans):
            if encoding is None:
                break
            if start <= token < start + len(encoding.offsets):
                low, high = encoding.offsets[token - start]
                return offset + low, offset + high
        return -1, -1


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
        self._documents, self._tokenizer, self.fields = documents, tokenizer, fields
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

    def _tokenise(self, numbers: list[int], records: list[dict[str, Any]]) -> list[Tokens]:
        """Return each document's tokens."""
        parts = self.fields.parts
        if "messages" in parts:
            return [self._chat(record[parts["messages"]]) for record in records]
        if "prompt" in parts:
            return [self._pair(str(record[parts["prompt"]]), str(record[parts["completion"]])) for record in records]
        texts = [record[parts["text"]] for record in records]
        for number, text in zip(numbers, texts, strict=True):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise InputError(f"expected text in field {parts['text']!r} of document {number}; received {kind}")
        if not texts:
            return []
        found = self._tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)
        encodings = found.encodings or [None] * len(texts)  # of tokenizers without offsets
        return [
            Tokens(list(ids), 1, ((encoding, 0, 0),))
            for ids, encoding in zip(found["input_ids"], encodings, strict=True)
        ]

    def _pair(self, prompt: str, completion: str) -> Tokens:
        if self.fields.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._chat(turns)
        encoded = [self._tokenizer(prompt, add_special_tokens=True, verbose=False)]
        encoded.append(self._tokenizer(completion, add_special_tokens=False, verbose=False))
        before, after = (found["input_ids"] for found in encoded)
        first, second = ((found.encodings or [None])[0] for found in encoded)
        eos = self._tokenizer.eos_token_id
        if eos is not None and before and before[-1] == eos:
            before = before[:-1]  # some tokenizers end every text
        spans = (first, 0, 0), (second, len(before), len(prompt) + len(BETWEEN))
        return Tokens([*before, *after, *([] if eos is None else [eos])], len(before), spans)

    def _chat(self, messages: Any) -> Tokens:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise InputError("expected a tokenizer with a chat template; received one without: use prompt/completion")
        turns = [dict(message) for message in messages]
        if not turns:
            return Tokens([], 0)
        whole, before = (
            self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (
                self._tokenizer.apply_chat_template(turns, tokenize=False),
                self._tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True),
            )
        )
        if whole[: len(before)] != before:
            raise InputError(
                "expected a chat template that keeps earlier turns when one is added; received one that changes them: "
                "write prompt and completion yourself"
            )
        return Tokens(whole, len(before))


class Collator:
    """Pads rows of tokens on the right and makes tensors of them.

    Parameters
    ----------
    pad : int
        The token to pad with; it is masked.
    sign_seed : int, optional
        Give every token a random sign of its own, ``signs`` (b, t), a function of seed, row and place.
    """

    def __init__(self, pad: int, sign_seed: int | None = None) -> None:
        self._pad, self._seed = pad, sign_seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` (b, t) and ``labels`` ((b, t), or (b,) classes)."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        classes = isinstance(rows[0]["labels"], int)
        labels = torch.tensor([row["labels"] for row in rows]) if classes else torch.full_like(ids, IGNORED)
        for at, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[at, :length], mask[at, :length] = torch.tensor(row["input_ids"]), 1
            if not classes:
                labels[at, :length] = torch.tensor(row["labels"])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._seed is not None:
            signs = np.ones((len(rows), longest), np.float32)
            for at, row in enumerate(rows):
                generator = np.random.Generator(np.random.Philox(key=[self._seed, row["row"]]))
                length = len(row["input_ids"])
                signs[at, :length] = 2.0 * generator.integers(0, 2, length) - 1
            batch["signs"] = torch.from_numpy(signs)
        return batch

"""Documents as rows of tokens: what is read, what is a target, where long documents are cut.

A document longer than the context becomes several rows. Each row but the first begins with the last token of the one
before, as context, so every token but a document's first is a target in exactly one row. Only numbers are kept for
every row (document, start, length); the text is read and tokenised again when a batch needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.hf.documents import check_fields
from ooc_influence.progress import Progress

_AT_ONCE = 512  # documents tokenised together
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
    def named(self) -> list[str | None]:
        """All fields that documents must have."""
        return [self.text, self.prompt, self.completion, self.messages, self.label, self.id, *self.keep]


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
        self._max, self._labels = max_length, labels
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
                for number, (ids, first) in zip(part, self._tokenise(part), strict=True):
                    rows.append(self._cut(number, len(ids), first))
                bar.advance(len(part))
        table = np.concatenate(rows) if rows else np.empty((0, 5), np.int64)
        self.document, self.piece, self._start, self.lengths, self.n_tokens = (
            np.ascontiguousarray(column) for column in table.T
        )

    def _cut(self, number: int, length: int, first: int) -> npt.NDArray[np.int64]:
        """Return the rows (document, piece, start, length, targets) of a document whose targets begin at ``first``."""
        if self.fields.label is not None:
            self.truncated += length > self._max
            return np.array([[number, -1, 0, min(length, self._max), 1]])
        found = []
        for start in range(0, max(1, length - 1), self._max - 1):
            stop = min(length, start + self._max)
            targets = stop - max(start + 1, first)
            if targets > 0:
                found.append((number, start // (self._max - 1), start, stop - start, targets))
        self.without_target += not found
        rows = np.array(found, np.int64).reshape(-1, 5)
        if length <= self._max:
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
        """Return what is kept of each row: ``document``, ``n_tokens`` and the fields asked for."""
        kept: dict[str, Any] = {"document": self.document, "n_tokens": self.n_tokens}
        return kept | {name: RowColumn(self, name) for name in self.fields.keep}

    def __getitem__(self, row: Any) -> dict[str, Any]:
        number, start, length = int(self.document[row]), int(self._start[row]), int(self.lengths[row])
        ids, first = self._tokens(number)
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

    def _tokenise_one(self, number: int) -> tuple[list[int], int]:
        return self._tokenise([number])[0]

    def _tokenise(self, numbers: list[int]) -> list[tuple[list[int], int]]:
        """Return each document's tokens and where its targets begin."""
        fields, documents = self.fields, self._documents[numbers] if numbers else {}
        if fields.messages is not None:
            return [self._chat(messages) for messages in documents[fields.messages]]
        if fields.prompt is not None:
            assert fields.completion is not None
            pairs = zip(documents[fields.prompt], documents[fields.completion], strict=True)
            return [self._pair(str(prompt), str(completion)) for prompt, completion in pairs]
        assert fields.text is not None
        texts = documents[fields.text]
        for number, text in zip(numbers, texts, strict=True):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise InputError(f"expected text in field {fields.text!r} of document {number}; received {kind}")
        ids = self._tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        return [(list(found), 1) for found in ids]

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        if self.fields.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._chat(turns)
        before = self._tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"]
        after = self._tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        eos = self._tokenizer.eos_token_id
        if eos is not None and before and before[-1] == eos:
            before = before[:-1]  # some tokenizers end every text
        return [*before, *after, *([] if eos is None else [eos])], len(before)

    def _chat(self, messages: Any) -> tuple[list[int], int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise InputError("expected a tokenizer with a chat template; received one without: use prompt/completion")
        turns = [dict(message) for message in messages]
        if not turns:
            return [], 0
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
        return whole, len(before)


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

"""From a document's fields to its tokens: running text, a prompt with its completion, a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ooc_influence.errors import InputError
from ooc_influence.hf.chats import Chats
from ooc_influence.hf.fields import Fields
from ooc_influence.hf.truncation import truncate
from ooc_influence.texts import BETWEEN


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
    passage : (int, int) or None
        Of a text to be classified that was cut: the characters that are left, from and to; (-1, -1) if not known.
    """

    ids: list[int]
    first: int
    spans: tuple[tuple[Any, int, int], ...] = ()
    passage: tuple[int, int] | None = None

    def characters(self, token: int) -> tuple[int, int]:
        """Return the characters that a token is of, from and to; (-1, -1) if that is not known."""
        for encoding, start, offset in reversed(self.spans):
            if encoding is None:
                break
            if start <= token < start + len(encoding.offsets):
                low, high = encoding.offsets[token - start]
                return offset + low, offset + high
        return -1, -1


class Tokeniser:
    """Makes tokens of documents.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        The model's.
    fields : Fields
        What is what.
    max_length : int
        Tokens that texts to be classified are cut to; others become several rows.
    """

    def __init__(self, tokenizer: Any, fields: Fields, max_length: int) -> None:
        self._tokenizer, self._fields, self._max_length = tokenizer, fields, max_length
        self._parts = fields.parts
        self._chats = Chats(tokenizer)

    def lacking(self, record: dict[str, Any]) -> str | None:
        """Return in words which text a document lacks: a field that is missing or null, or a chat's reply."""
        for name in self._parts.values():
            if record.get(name) is None:
                return f"{'null in' if name in record else 'no'} field {name!r}"
        messages = self._fields.messages
        return None if messages is None else self._chats.lacking(record[messages])

    def __call__(self, documents: Sequence[tuple[int, dict[str, Any]]]) -> list[Tokens]:
        """Return the tokens of documents, numbers and records, that lack nothing.

        Raises
        ------
        InputError
            Naming the document whose text is no text, or whose chat the template does not take.
        """
        parts = self._parts
        if "messages" in parts:
            return [Tokens(*self._chats.tokens(number, record[parts["messages"]])) for number, record in documents]
        for number, record in documents:
            for name in parts.values():
                _check_text(number, name, record[name])
        if "prompt" in parts:
            return [self._pair(number, record[parts["prompt"]], record[parts["completion"]])
                    for number, record in documents]  # fmt: skip
        return self._texts([record[parts["text"]] for _, record in documents])

    def _texts(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        found = self._tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)
        encodings = found.encodings or [None] * len(texts)  # of tokenizers without offsets
        made = [
            Tokens(list(ids), 1, ((encoding, 0, 0),))
            for ids, encoding in zip(found["input_ids"], encodings, strict=True)
        ]
        if self._fields.label is None:
            return made
        return [self._fitting(text, tokens) for text, tokens in zip(texts, made, strict=True)]

    def _fitting(self, text: str, tokens: Tokens) -> Tokens:
        """Return a text's tokens as the tokenizer cuts them where they are too many to be classified at once."""
        if len(tokens.ids) <= self._max_length:
            return tokens
        ids, passage = truncate(self._tokenizer, text, self._max_length)
        return Tokens(ids, 1, passage=passage)

    def _pair(self, number: int, prompt: str, completion: str) -> Tokens:
        if self._fields.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return Tokens(*self._chats.tokens(number, turns))
        encoded = [self._tokenizer(prompt, add_special_tokens=True, verbose=False)]
        encoded.append(self._tokenizer(completion, add_special_tokens=False, verbose=False))
        before, after = (found["input_ids"] for found in encoded)
        first, second = ((found.encodings or [None])[0] for found in encoded)
        eos = self._tokenizer.eos_token_id
        if eos is not None and before and before[-1] == eos:
            before = before[:-1]  # some tokenizers end every text
        spans = (first, 0, 0), (second, len(before), len(prompt) + len(BETWEEN))
        return Tokens([*before, *after, *([] if eos is None else [eos])], len(before), spans)


def _check_text(number: int, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(
            f"expected text in field {name!r} of document {number}; received {type(value).__name__}: write it as text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected Unicode text in field {name!r} of document {number}; received half a surrogate pair, "
            f"character {error.start}: repair the text"
        ) from error

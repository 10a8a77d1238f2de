"""Tokens of documents: which fields are what, texts, pairs, and chats through the tokenizer's template."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ooc_influence.corpus import BETWEEN
from ooc_influence.errors import InputError


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
        A chat, through the tokenizer's template; the tokens of the assistant's last reply are targets.
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
    def used(self) -> list[str]:
        """All fields that are read, each once."""
        named = (*self.parts.values(), self.label, self.id, *self.keep)
        return [name for name in dict.fromkeys(named) if name is not None]


_PART = "\ufffd"  # what decoding shows of a character that is not complete
_LONGEST = 8  # tokens that a character may be made of, and more


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it; joined, they are the decoded text.

    A character made of several tokens is the text of its last one, the others' is empty.
    """

    def decoded(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start = done = 0  # of a short window: decoding a token needs the one before it, for its space
    for stop in range(1, len(ids) + 1):
        before, now = decoded(ids[start:done]), decoded(ids[start:stop])
        unfinished = now.endswith(_PART) and stop - done < _LONGEST and stop < len(ids)
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            start, done = done, stop
    return texts


_REPLIES = ("assistant", "model")  # roles of what is learned
_ADVICE = "write prompt and completion yourself (--prompt, --completion)"


class Chats:
    """Renders chats with a tokenizer's template, and tokenises them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def lacking(self, messages: Any) -> str | None:
        """Return in words what a chat lacks to be learned from; None if nothing, or if it is no chat at all."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(map(_is_turn, messages)):
            return None  # refused, when it is tokenised
        if not messages:
            return "no messages"
        roles = dict.fromkeys(str(turn["role"]) for turn in messages)
        return None if set(roles) & set(_REPLIES) else f"messages of {', '.join(roles)} only, no assistant's reply"

    def tokens(self, number: int, messages: Any) -> tuple[list[int], int]:
        """Return the tokens of a chat (of document ``number``) up to its last reply, and which is the first of that."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise InputError("expected a tokenizer with a chat template; received one without: use prompt/completion")
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise InputError(
                f"expected a list of messages in document {number}; received {type(messages).__name__}: give objects "
                "with role and content"
            )
        odd = next((turn for turn in messages if not _is_turn(turn)), None)
        if odd is not None:
            keys = ", ".join(map(str, odd)) if isinstance(odd, Mapping) else type(odd).__name__
            raise InputError(f"expected messages with role and content in document {number}; received one with {keys}")
        turns = [dict(turn) for turn in messages]
        while turns[-1]["role"] not in _REPLIES:
            turns.pop()
        whole = self._render(number, turns)
        reply_start = self._reply_start(number, turns, whole)
        encoded = self._tokenizer(whole, add_special_tokens=False, verbose=False)
        ids = list(encoded["input_ids"])
        if encoded.encodings:
            stops = np.array([stop for _, stop in encoded.encodings[0].offsets], np.int64)
            return ids, int(np.searchsorted(np.maximum.accumulate(stops), reply_start, side="right"))
        before = self._tokenizer(whole[:reply_start], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[: len(before)] != before:  # a tokenizer without offsets
            raise InputError(
                f"expected a reply that begins with a token of its own in document {number}; received one whose first "
                f"token has characters of the template: {_ADVICE}"
            )
        return ids, len(before)

    def _reply_start(self, number: int, turns: list[dict[str, Any]], whole: str) -> int:
        """Return the character of the rendered chat that the last turn, the reply, begins at.

        That is the end of the template's generation prompt. Where there is none, or another one before this reply (some
        templates open a thought that the reply lacks), it is where another text in the reply's place would begin.
        """
        invited, plain = (self._try(turns[:-1], add_generation_prompt=asked) for asked in (True, False))
        if invited is not None and invited != plain and whole.startswith(invited):
            return len(invited)
        mark = "reply"
        while mark in whole:
            mark += "0"
        marked = self._render(number, [*turns[:-1], {"role": turns[-1]["role"], "content": mark}])
        head = marked.partition(mark)[0]
        start = len(os.path.commonprefix([head, whole]))  # noqa: RUF071 - of characters
        if mark not in marked or (start < len(head) and not (plain and start >= len(plain))):
            raise InputError(
                f"expected a chat template that shows a reply as it is in document {number}; received one that changes "
                f"it, or earlier turns with it: {_ADVICE}"
            )
        return start

    def _render(self, number: int, turns: list[dict[str, Any]]) -> str:
        text = self._try(turns)
        if text is not None:
            return text
        raise InputError(
            f"expected messages that the tokenizer's chat template accepts in document {number}; received "
            f"{type(self._error).__name__}: {self._error}: change them, or {_ADVICE}"
        ) from self._error

    def _try(self, turns: list[dict[str, Any]], **options: Any) -> str | None:
        """Return turns as the template renders them; None where it raises."""
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except Exception as error:  # of the template, which is a program
            self._error = error
            return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" in turn and "content" in turn


class Tokens(NamedTuple):
    """A document's tokens, of which ``first`` is the first target.

    ``spans`` map tokens to characters: from which encoding, which token and which character on; empty if not known.
    ``passage`` is, of a text to be classified that was cut, the characters left, from and to; (-1, -1) if not known.
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
    """Makes tokens of documents. Texts to classify are cut to ``max_length`` tokens; others become several rows."""

    def __init__(self, tokenizer: Any, fields: Fields, max_length: int) -> None:
        self._tokenizer, self._fields, self._max_length = tokenizer, fields, max_length
        self._parts = fields.parts
        self._chats = Chats(tokenizer)
        special = 0 if fields.label is None else tokenizer.num_special_tokens_to_add(pair=False)
        if fields.label is not None and max_length <= special:
            raise InputError(
                f"expected max_length > {special}, the special tokens that the tokenizer adds; received {max_length}"
            )

    def lacking(self, record: dict[str, Any]) -> str | None:
        """Return in words which text a document lacks: a field that is missing or null, or a chat's reply."""
        for name in self._parts.values():
            if record.get(name) is None:
                return f"{'null in' if name in record else 'no'} field {name!r}"
        messages = self._fields.messages
        return None if messages is None else self._chats.lacking(record[messages])

    def __call__(self, documents: Sequence[tuple[int, dict[str, Any]]]) -> list[Tokens]:
        """Return the tokens of documents, numbers and records, that lack nothing.

        An InputError names the document whose text is no text, or whose chat the template does not accept.
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
        encoded = self._tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)
        encodings = encoded.encodings or [None] * len(texts)  # of tokenizers without offsets
        cut = self._fields.label is not None
        return [
            self._truncated(text) if cut and len(ids) > self._max_length else Tokens(list(ids), 1, ((encoding, 0, 0),))
            for text, ids, encoding in zip(texts, encoded["input_ids"], encodings, strict=True)
        ]

    def _truncated(self, text: str) -> Tokens:
        """Return the tokens of a text as the tokenizer cuts it to be classified, and the characters they are of."""
        words, most = self._tokenizer, self._max_length
        encoded = words(text, add_special_tokens=True, truncation=True, max_length=most, verbose=False)
        ids = list(encoded["input_ids"])
        if len(ids) > most:
            raise InputError(
                f"expected a tokenizer that cuts texts to {most} tokens; received {type(words).__name__}, which does "
                "not: shorten them yourself"
            )
        spans = [
            span
            for encoding in (encoded.encodings or ())[:1]
            for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
            if not special and span[1] > span[0]
        ]
        passage = (-1, -1)
        if spans:
            passage = (spans[0][0], len(text)) if words.truncation_side == "left" else (0, spans[-1][1])
        return Tokens(ids, 1, passage=passage)

    def _pair(self, number: int, prompt: str, completion: str) -> Tokens:
        if self._fields.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return Tokens(*self._chats.tokens(number, turns))
        encoded = [self._tokenizer(prompt, add_special_tokens=True, verbose=False)]
        encoded.append(self._tokenizer(completion, add_special_tokens=False, verbose=False))
        before, after = (each["input_ids"] for each in encoded)
        first, second = ((each.encodings or [None])[0] for each in encoded)
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

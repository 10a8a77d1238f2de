"""Which fields of a document are what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ooc_influence.document_text import BETWEEN
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
        named = (self.text, self.prompt, self.completion, self.messages, self.label, self.id, *self.keep)
        return [name for name in dict.fromkeys(named) if name is not None]


def check_room(tokenizer: Any, max_length: int) -> None:
    """Check that rows have room for a token beside the special ones.

    Raises
    ------
    InputError
        If not.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= special:
        raise InputError(
            f"expected max_length > {special}, the special tokens that the tokenizer adds; received {max_length}"
        )


def truncate(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], tuple[int, int]]:
    """Return a text's tokens, at most ``max_length``, and the characters they are of, from and to.

    The characters are (-1, -1) of a tokenizer without offsets.

    Raises
    ------
    InputError
        If the tokenizer does not cut it.
    """
    made = tokenizer(text, add_special_tokens=True, truncation=True, max_length=max_length, verbose=False)
    ids = list(made["input_ids"])
    if len(ids) > max_length:
        raise InputError(
            f"expected a tokenizer that cuts texts to {max_length} tokens; received {type(tokenizer).__name__}, which "
            "does not: shorten them yourself"
        )
    if not made.encodings:
        return ids, (-1, -1)
    encoding = made.encodings[0]
    spans = [
        span
        for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        if not special and span[1] > span[0]
    ]
    if not spans:
        return ids, (-1, -1)
    left = tokenizer.truncation_side == "left"
    return ids, (spans[0][0], len(text)) if left else (0, spans[-1][1])


_REPLIES = ("assistant", "model")  # roles of what is learned
_ADVICE = "write prompt and completion yourself (--prompt, --completion)"


class Chats:
    """Renders chats and tokenises them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        With a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def lacking(self, messages: Any) -> str | None:
        """Return in words what a chat lacks to be learned from."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(map(_is_turn, messages)):
            return None  # refused, when it is tokenised
        if not messages:
            return "no messages"
        roles = dict.fromkeys(str(turn["role"]) for turn in messages)
        return None if set(roles) & set(_REPLIES) else f"messages of {', '.join(roles)} only, no assistant's reply"

    def tokens(self, number: int, messages: Any) -> tuple[list[int], int]:
        """Return the tokens of a chat up to its last reply, and which is the first of that reply.

        Parameters
        ----------
        number : int
            The document's, for messages.
        messages : list of mapping
            Turns with ``role`` and ``content``, a reply among them.

        Raises
        ------
        InputError
            For messages of another form, or that the template does not take.
        """
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise InputError("expected a tokenizer with a chat template; received one without: use prompt/completion")
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise InputError(
                f"expected a list of messages in document {number}; received {type(messages).__name__}: give objects "
                "with role and content"
            )
        odd = next((turn for turn in messages if not _is_turn(turn)), None)
        if odd is not None:
            held = ", ".join(map(str, odd)) if isinstance(odd, Mapping) else type(odd).__name__
            raise InputError(f"expected messages with role and content in document {number}; received one with {held}")
        turns = [dict(turn) for turn in messages]
        last = max(at for at, turn in enumerate(turns) if turn["role"] in _REPLIES)
        whole = self._render(number, turns[: last + 1])
        return self._cut(number, whole, self._reply_start(number, turns[: last + 1], whole))

    def _cut(self, number: int, whole: str, boundary: int) -> tuple[list[int], int]:
        found = self._tokenizer(whole, add_special_tokens=False, verbose=False)
        ids = list(found["input_ids"])
        if found.encodings:
            stops = np.array([stop for _, stop in found.encodings[0].offsets], np.int64)
            return ids, int(np.searchsorted(np.maximum.accumulate(stops), boundary, side="right"))
        before = self._tokenizer(whole[:boundary], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[: len(before)] != before:  # a tokenizer without offsets
            raise InputError(
                f"expected a reply that begins with a token of its own in document {number}; received one whose first "
                f"token has characters of the template: {_ADVICE}"
            )
        return ids, len(before)

    def _reply_start(self, number: int, turns: list[dict[str, Any]], whole: str) -> int:
        """Return the character of the rendered chat that the last turn, the reply, begins at.

        It is where the template's invitation to reply ends, or, where that is not what stands before this reply (some
        open a thought that it lacks) or there is none, where another text in its place would begin.
        """
        invited, plain = (self._try(turns[:-1], add_generation_prompt=asked) for asked in (True, False))
        if invited is not None and invited != plain and whole.startswith(invited):
            return len(invited)
        mark = "reply"
        while mark in whole:
            mark += "0"
        marked = self._render(number, [*turns[:-1], {"role": turns[-1]["role"], "content": mark}])
        head = marked.partition(mark)[0]
        start = _shared(head, whole)
        if mark not in marked or (start < len(head) and not (plain and start >= len(plain))):
            raise InputError(
                f"expected a chat template that shows a reply as it is in document {number}; received one that changes "
                f"it, or earlier turns with it: {_ADVICE}"
            )
        return start

    def _render(self, number: int, turns: list[dict[str, Any]]) -> str:
        found = self._try(turns)
        if isinstance(found, str):
            return found
        raise InputError(
            f"expected messages that the tokenizer's chat template takes in document {number}; received "
            f"{type(self._error).__name__}: {self._error}: change them, or {_ADVICE}"
        ) from self._error

    def _try(self, turns: list[dict[str, Any]], **options: Any) -> str | None:
        """Return turns as the template renders them; None where it raises."""
        try:
            found: str = self._tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except Exception as error:  # of the template, which is a program
            self._error = error
            return None
        return found


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" in turn and "content" in turn


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

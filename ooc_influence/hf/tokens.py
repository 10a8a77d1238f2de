"""Tokens of documents: which fields are what, texts, pairs, and chats through the tokenizer's template."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from ooc_influence.corpus import BETWEEN
from ooc_influence.errors import InputError
from ooc_influence.options import Turns


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
        A chat, through the tokenizer's template; the tokens of the assistant's replies that ``turns`` names are
        targets.
    tools : str or None
        With ``messages``: the tools that the template shows, a list of objects or its JSON.
    label : str or None
        With ``text``: the class, for sequence classification.
    id : str or None
        The document's name; default its number.
    keep : tuple of str
        Further fields, kept as columns.
    chat : bool
        Put prompt and completion through the chat template, as a user's and an assistant's turn.
    turns : {"last", "all"}
        With ``messages``: whether the assistant's last reply is learned, or all of them.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    tools: str | None = None
    label: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    chat: bool = False
    turns: Turns = "last"

    def __post_init__(self) -> None:
        pair = (self.prompt, self.completion)
        forms = [self.text is not None, any(pair), self.messages is not None]
        if sum(forms) != 1 or (any(pair) and not all(pair)) or (self.label is not None and self.text is None):
            raise InputError(
                "expected one of text, prompt and completion, text and label, or messages; received "
                f"text={self.text!r}, prompt={self.prompt!r}, completion={self.completion!r}, "
                f"messages={self.messages!r}, label={self.label!r}"
            )
        if self.turns not in get_args(Turns):
            raise InputError(f"expected turns 'last' or 'all' (--turns); received {self.turns!r}")
        if self.messages is None and (self.turns != "last" or self.tools is not None):
            named = "tools (--tools)" if self.turns == "last" else "turns='all' (--turns all)"
            raise InputError(f"expected {named} with messages (--messages); received it without: name the chat's field")

    @property
    def parts(self) -> dict[str, str]:
        """The fields that make up a document's text, by what they are."""
        kinds = ("text", "prompt", "completion", "messages")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}

    @property
    def all(self) -> dict[str, Any]:
        """All that is set, by name."""
        return {name: value for name, value in asdict(self).items() if value and (name, value) != ("turns", "last")}

    @property
    def used(self) -> list[str]:
        """All fields that are read, each once."""
        named = (*self.parts.values(), self.tools, self.label, self.id, *self.keep)
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
Span = tuple[int, int]  # from and to, of characters or of tokens


class Chats:
    """Renders chats with a tokenizer's template, and tokenises them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        The model's.
    turns : {"last", "all"}
        Which of the assistant's replies are learned. Of all, those with ``"weight": 0`` are not.
    """

    def __init__(self, tokenizer: Any, turns: Turns = "last") -> None:
        self._tokenizer, self._turns = tokenizer, turns

    def lacking(self, messages: Any) -> str | None:
        """Return in words what a chat lacks to be learned from; None if nothing, or if it is no chat at all."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(map(_is_turn, messages)):
            return None  # refused, when it is tokenised
        if not messages:
            return "no messages"
        roles = dict.fromkeys(str(turn["role"]) for turn in messages)
        return None if set(roles) & set(_REPLIES) else f"messages of {', '.join(roles)} only, no assistant's reply"

    def tokens(self, number: int, messages: Any, tools: Any = None) -> tuple[list[int], tuple[Span, ...]]:
        """Return the tokens of a chat (of document ``number``) up to its last reply, and the spans of the targets."""
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
        chat = _Chat(self._tokenizer, number, turns, _tools_of(number, tools))
        last = len(turns) - 1
        learned = [last]
        if self._turns == "all":
            learned = [turn for turn, said in enumerate(turns) if said["role"] in _REPLIES and said.get("weight") != 0]
        return chat.tokenised([(chat.start(turn), chat.stop(turn)) for turn in learned])


def _tools_of(number: int, tools: Any) -> list[Any] | None:
    """Return the tools of a document, which may be written as JSON."""
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools) if tools else None
    if tools is None or (isinstance(tools, Sequence) and not isinstance(tools, str)):
        return list(tools) if tools else None
    raise InputError(
        f"expected a list of tools, or its JSON, in document {number} (--tools); received {type(tools).__name__}"
    )


class _Chat:
    """A chat that ends with a reply, and where each reply is in the characters that the template makes of it."""

    def __init__(
        self, tokenizer: Any, number: int, turns: list[dict[str, Any]], tools: list[Any] | None = None
    ) -> None:
        self._tokenizer, self._number, self._turns = tokenizer, number, turns
        self._more: dict[str, Any] = {} if tools is None else {"tools": tools}
        self._error: Exception | None = None
        self._whole = self._render(turns)
        self._mark = "reply"
        while self._mark in self._whole:
            self._mark += "0"

    def tokenised(self, spans: Sequence[Span]) -> tuple[list[int], tuple[Span, ...]]:
        """Return the tokens, and those that have characters of some spans.

        A token of both template and reply is learned, too.
        """
        encoded = self._tokenizer(self._whole, add_special_tokens=False, verbose=False)
        ids = list(encoded["input_ids"])
        if encoded.encodings:
            offsets = np.array(encoded.encodings[0].offsets, np.int64).reshape(-1, 2)
            starts, stops = np.maximum.accumulate(offsets, axis=0).T
            lows = np.searchsorted(stops, [low for low, _ in spans], side="right")
            highs = np.searchsorted(starts, [high for _, high in spans], side="left")
            return ids, _joined(zip(lows.tolist(), highs.tolist(), strict=True))
        return ids, _joined((self._tokens_before(ids, low), self._tokens_before(ids, high)) for low, high in spans)

    def _tokens_before(self, ids: list[int], character: int) -> int:
        """Return how many of the tokens are of what comes before a character, from a tokenizer without offsets."""
        before = self._tokenizer(self._whole[:character], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[: len(before)] != before:
            raise InputError(
                f"expected a reply that begins with a token of its own in document {self._number}; received one whose "
                f"first token has characters of the template: {_ADVICE}"
            )
        return len(before)

    def start(self, turn: int) -> int:
        """Return the character that a reply begins at.

        That is the end of the template's generation prompt. Where there is none, or another one before this reply (some
        templates open a thought that the reply lacks), it is where another text in the reply's place would begin.
        """
        before = self._turns[:turn]
        invited, plain = (self._try(before, add_generation_prompt=asked) for asked in (True, False))
        if invited is not None and invited != plain and self._whole.startswith(invited):
            return len(invited)
        head, _ = self._around(turn)
        start = len(os.path.commonprefix([head, self._whole]))  # noqa: RUF071 - of characters
        known = plain if turn == len(self._turns) - 1 or self._whole.startswith(plain or "") else None
        if start < len(head) and not (known and start >= len(known)):
            raise self._changed()
        return start

    def stop(self, turn: int) -> int:
        """Return the character that a reply ends at, with what the template ends its turn with.

        That is what follows another text in the reply's place where it is the last turn. A template may end the last
        turn by more than others (an end of the text beside one of the turn): then it is the special tokens, and what
        is between them, that both have.
        """
        if turn == len(self._turns) - 1:
            return len(self._whole)
        _, tail = self._around(turn)
        _, ending = self._around(turn, alone=True)
        if not self._whole.endswith(tail):
            raise self._changed()
        if tail.startswith(ending):
            return len(self._whole) - len(tail) + len(ending)
        common = 0
        for wanted, found in zip(*map(self._by_special_tokens, (ending, tail)), strict=False):
            if wanted != found:
                break
            common += len(wanted)
        if not common:
            raise InputError(
                f"expected a chat template that ends every reply as it ends the last in document {self._number}; "
                f"received one that does not: learn the last one only (--turns last), or {_ADVICE}"
            )
        return len(self._whole) - len(tail) + common

    def _by_special_tokens(self, text: str) -> list[str]:
        """Return a text in pieces, every special token one of them."""
        tokens = sorted({str(token) for token in self._tokenizer.get_added_vocab()}, key=len, reverse=True)
        return [piece for piece in re.split(f"({'|'.join(map(re.escape, tokens))})", text) if piece] if tokens else []

    def _around(self, turn: int, *, alone: bool = False) -> tuple[str, str]:
        """Return what the template writes before and after another text in place of a reply.

        With ``alone``, the chat ends with it. Some templates show a call of a tool and no text beside it, others both.
        """
        before, reply, after = self._turns[:turn], self._turns[turn], [] if alone else self._turns[turn + 1 :]
        bare = {"role": reply["role"], "content": self._mark}
        for said in [bare] if turn == len(self._turns) - 1 else [{**reply, "content": self._mark}, bare]:
            marked = self._try([*before, said, *after])
            head, found, tail = (marked or "").partition(self._mark)
            if found and self._mark not in tail:
                return head, tail
        if marked is None:
            self._render([*before, bare, *after])
        raise self._changed()

    def _changed(self) -> InputError:
        return InputError(
            f"expected a chat template that shows a reply as it is in document {self._number}; received one that "
            f"changes it, or earlier turns with it: {_ADVICE}"
        )

    def _render(self, turns: list[dict[str, Any]]) -> str:
        text = self._try(turns)
        if text is not None:
            return text
        raise InputError(
            f"expected messages that the tokenizer's chat template accepts in document {self._number}; received "
            f"{type(self._error).__name__}: {self._error}: change them, or {_ADVICE}"
        ) from self._error

    def _try(self, turns: list[dict[str, Any]], **options: Any) -> str | None:
        """Return turns as the template renders them; None where it raises."""
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **self._more, **options))
        except Exception as error:  # of the template, which is a program
            self._error = error
            return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" in turn and "content" in turn


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return spans in their order, those that meet or overlap as one, without empty ones."""
    joined: list[Span] = []
    for low, high in spans:
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        elif low < high:
            joined.append((low, high))
    return tuple(joined)


class Tokens(NamedTuple):
    """A document's tokens, and which are targets: those of some spans, from and to, in their order.

    ``spans`` map tokens to characters: from which encoding, which token and which character on; empty if not known.
    ``passage`` is, of a text to be classified that was cut, the characters left, from and to; (-1, -1) if not known.
    """

    ids: list[int]
    targets: tuple[Span, ...]
    spans: tuple[tuple[Any, int, int], ...] = ()
    passage: tuple[int, int] | None = None

    def targets_in(self, start: int, stop: int) -> int:
        """Return how many targets a row of the tokens ``start`` to ``stop`` has, whose first is never one."""
        return sum(max(0, min(high, stop) - max(low, start + 1)) for low, high in self.targets)

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
        self._chats = Chats(tokenizer, fields.turns)
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
            tools = self._fields.tools or ""
            return [Tokens(*self._chats.tokens(number, record[parts["messages"]], record.get(tools)))
                    for number, record in documents]  # fmt: skip
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
            self._truncated(text)
            if cut and len(ids) > self._max_length
            else Tokens(list(ids), ((1, len(ids)),), ((encoding, 0, 0),))
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
        return Tokens(ids, ((1, len(ids)),), passage=passage)

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
        ids = [*before, *after, *([] if eos is None else [eos])]
        return Tokens(ids, ((len(before), len(ids)),), spans)


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

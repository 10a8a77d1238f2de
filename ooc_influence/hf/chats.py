"""Chats through a tokenizer's template: their tokens, and which of these are of the assistant's replies."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ooc_influence.errors import InputError
from ooc_influence.options import Turns

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

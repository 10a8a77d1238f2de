"""A chat as tokens, through the tokenizer's template: the targets are those of the assistant's last reply.

Where the reply begins is looked for in the characters of the rendered chat. A token that has characters of the reply
is a target, also where the template's last line break and the reply's first are one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ooc_influence.errors import InputError

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

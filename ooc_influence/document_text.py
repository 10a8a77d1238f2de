r"""The text of a document: what is tokenised, what pages show, and a digest that tells one text from another.

    text                     as it is
    prompt and completion    ``<prompt>\n\n<completion>``
    messages                 ``<role>: <content>`` of each turn, ``\n\n`` between them

A row that is a piece of a document is a span of characters of this text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import date, time
from typing import Any

BETWEEN = "\n\n"  # prompt and completion, and turns of a chat
USUAL: tuple[dict[str, str], ...] = (
    {"text": "text"},
    {"prompt": "prompt", "completion": "completion"},
    {"messages": "messages"},
)  # fields looked for where none is named


def as_text(value: Any) -> str:
    """Return a field's value as text: of dates ISO 8601, of lists and objects JSON, of nothing an empty text."""
    if value is None:
        return ""
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=as_text)
    return str(value)


def text_of(record: Mapping[str, Any], fields: Mapping[str, str | None]) -> str | None:
    """Return the text of a document; None where one of the fields is missing, or its messages are not of text.

    Parameters
    ----------
    record : mapping
        The document.
    fields : mapping
        Names of its fields by what they are: ``text``, or ``prompt`` and ``completion``, or ``messages``.
    """
    names = [fields[kind] for kind in ("text", "prompt", "completion", "messages") if fields.get(kind) is not None]
    if not names or any(name is None or record.get(name) is None for name in names):
        return None
    if fields.get("messages") is None:
        return BETWEEN.join(as_text(record[name]) for name in names if name is not None)
    turns = record[fields["messages"] or ""]
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns
    ):
        return None
    return BETWEEN.join(f"{turn.get('role')}: {turn['content']}" for turn in turns)


def text_digest(text: str) -> int:
    """Return the first 8 bytes of a text's BLAKE2b as a signed number, little-endian."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )

"""Which fields of a document are what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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

"""From a document's fields to its tokens: running text, a prompt with its completion, a chat."""

from __future__ import annotations

from typing import Any, NamedTuple

from ooc_influence.errors import InputError
from ooc_influence.hf.fields import Fields
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


class Tokeniser:
    """Makes tokens of documents.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        The model's.
    fields : Fields
        What is what.
    """

    def __init__(self, tokenizer: Any, fields: Fields) -> None:
        self._tokenizer, self._fields = tokenizer, fields

    def __call__(self, numbers: list[int], records: list[dict[str, Any]]) -> list[Tokens]:
        """Return each document's tokens."""
        parts = self._fields.parts
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
        if self._fields.chat:
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

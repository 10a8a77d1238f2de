"""Tokens of documents: which fields are what, texts, prompts with completions, chats, and tokens made beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, get_args

from ooc_influence.corpus import BETWEEN, answer_text, first_answer
from ooc_influence.errors import InputError
from ooc_influence.hf.chats import Chats, Span
from ooc_influence.hf.pretokenised import pretokenised
from ooc_influence.options import Turns


@dataclass(frozen=True)
class Fields:
    """Which fields of a document are what.

    Attributes
    ----------
    text : str or None
        Running text.
    prompt, completion : str or None
        A pair of which only the completion's tokens are targets. A completion is a text, or a list of answers as
        servers write them, of which the first counts (:func:`ooc_influence.corpus.first_answer`).
    messages : str or None
        A chat, through the tokenizer's template; the tokens of the assistant's replies that ``turns`` names are
        targets. With ``completion``, that is its last reply.
    chosen, rejected : str or None
        A preference: two completions of ``prompt``, or two chats (which ``prompt``, a list of messages, may begin).
    tools : str or None
        With chats: the tools that the template shows, a list of objects or its JSON.
    input_ids, input_labels, doc_ids : str or None
        Tokens; which of them are targets (the token itself, or -100); and which document of a packed row each is of.
    label : str or None
        With ``text``: the class, for sequence classification.
    advantage : str or None
        A number for each document, of a policy gradient's loss.
    id : str or None
        The document's name; default its number.
    keep : tuple of str
        Further fields, kept as columns.
    chat : bool
        Put prompt and completion through the chat template, as a user's and an assistant's turn.
    turns : {"last", "all"}
        With chats: whether the assistant's last reply is learned, or all of them.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tools: str | None = None
    input_ids: str | None = None
    input_labels: str | None = None
    doc_ids: str | None = None
    label: str | None = None
    advantage: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    chat: bool = False
    turns: Turns = "last"

    def __post_init__(self) -> None:
        preference = (self.chosen, self.rejected)
        pair: tuple[str | None, ...] = (self.prompt, self.completion) if not any(preference) else (self.completion,)
        if self.messages is not None and self.prompt is None:
            pair = ()  # a completion follows the messages
        forms = [self.text is not None, any(pair), self.messages is not None, self.input_ids is not None,
                 any(preference)]  # fmt: skip
        halves = any(any(both) and not all(both) for both in (pair, preference))
        if sum(forms) != 1 or halves or (self.label is not None and self.text is None):
            kinds = ("text", "prompt", "completion", "messages", "chosen", "rejected", "input_ids", "label")
            received = (f"{kind}={getattr(self, kind)!r}" for kind in kinds if getattr(self, kind) is not None)
            raise InputError(
                "expected one of text, prompt and completion, text and label, messages, chosen and rejected, or "
                f"input_ids; received {', '.join(received) or 'none'}"
            )
        if self.advantage is not None and (self.label is not None or any(preference)):
            raise InputError(
                "expected advantage (--advantage) with a text, a completion, a chat or tokens; received it with "
                f"{'label' if self.label is not None else 'chosen and rejected'}: leave it out"
            )
        self._check_chats()
        further = "input_labels" if self.input_labels is not None else "doc_ids"
        if self.input_ids is None and getattr(self, further) is not None:
            raise InputError(
                f"expected {further} (--{further.replace('_', '-')}) with input_ids (--input-ids); received it "
                "without: name the field of the tokens"
            )

    def _check_chats(self) -> None:
        if self.turns not in get_args(Turns):
            raise InputError(f"expected turns 'last' or 'all' (--turns); received {self.turns!r}")
        chats = self.messages is not None or self.chosen is not None
        if not chats and (self.turns != "last" or self.tools is not None):
            named = "tools (--tools)" if self.turns == "last" else "turns='all' (--turns all)"
            raise InputError(f"expected {named} with messages (--messages); received it without: name the chat's field")

    @property
    def parts(self) -> dict[str, str]:
        """The fields that make up a document's text, by what they are."""
        kinds = ("text", "prompt", "completion", "messages", "chosen", "rejected", "input_ids", "input_labels",
                 "doc_ids")  # fmt: skip
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}

    @property
    def all(self) -> dict[str, Any]:
        """All that is set, by name."""
        return {name: value for name, value in asdict(self).items() if value and (name, value) != ("turns", "last")}

    @property
    def used(self) -> list[str]:
        """All fields that are read, each once."""
        named = (*self.parts.values(), self.tools, self.label, self.advantage, self.id, *self.keep)
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


class Tokens(NamedTuple):
    """A document's tokens, and which are targets: those of some spans, from and to, in their order.

    ``spans`` map tokens to characters: from which encoding, which token and which character on; empty if not known.
    ``passage`` is, of a text to be classified that was cut, the characters left, from and to; (-1, -1) if not known.
    ``packed`` are the spans of the documents that a packed row is made of; empty where all tokens are of one.
    ``split`` is, of a preference, how many tokens the chosen one has, which the rejected one's follow; else 0.
    """

    ids: list[int]
    targets: tuple[Span, ...]
    spans: tuple[tuple[Any, int, int], ...] = ()
    passage: tuple[int, int] | None = None
    packed: tuple[Span, ...] = ()
    split: int = 0

    @property
    def padded(self) -> int:
        """Tokens, of a preference those of both after padding to the longer."""
        return 2 * max(self.split, len(self.ids) - self.split) if self.split else len(self.ids)

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
        completion = self._parts.get("completion")
        if completion is not None and first_answer(record[completion]) is None:
            return f"no answer in field {completion!r}"
        answered = completion is not None and "messages" in self._parts
        kinds = () if answered else ("messages", "chosen", "rejected")
        chats = (self._parts[kind] for kind in kinds if kind in self._parts)
        return next((lack for name in chats if (lack := self._chats.lacking(record[name])) is not None), None)

    def __call__(self, documents: Sequence[tuple[int, dict[str, Any]]]) -> list[Tokens]:
        """Return the tokens of documents, numbers and records, that lack nothing.

        An InputError names the document whose text is no text, or whose chat the template does not accept.
        """
        parts = self._parts
        if "messages" in parts:
            return [self._chat(number, record) for number, record in documents]
        if "input_ids" in parts:
            return [self._pretokenised(number, record) for number, record in documents]
        if "chosen" in parts:
            return [self._preference(number, record) for number, record in documents]
        for number, record in documents:
            for kind, name in parts.items():
                _check_text(number, name, answer_text(record[name]) if kind == "completion" else record[name])
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

    def _chat(self, number: int, record: dict[str, Any]) -> Tokens:
        """Return the tokens of a chat, which a completion may follow."""
        messages, tools = record[self._parts["messages"]], record.get(self._fields.tools or "")
        completion = self._parts.get("completion")
        if completion is not None and isinstance(messages, Sequence) and not isinstance(messages, str):
            answer = first_answer(record[completion])
            if not isinstance(answer, Mapping):
                _check_text(number, completion, answer)
                answer = {"role": "assistant", "content": answer}
            turn = {name: part for name, part in answer.items() if name != "finish_reason"}
            messages = [*messages, turn]
        return Tokens(*self._chats.tokens(number, messages, tools))

    def _preference(self, number: int, record: dict[str, Any]) -> Tokens:
        """Return the tokens of the chosen completion or chat, and after them those of the rejected one."""
        names = [name for kind, name in self._parts.items() if kind != "prompt"]
        prompt = self._parts.get("prompt")
        values = [record[name] for name in names] + ([] if prompt is None else [record[prompt]])
        if not any(isinstance(value, str) for value in values):
            before = list(record[prompt]) if prompt is not None and isinstance(record[prompt], Sequence) else []
            tools = record.get(self._fields.tools or "")
            chats = (record[name] for name in names)
            both = [Tokens(*self._chats.tokens(number, [*before, *chat] if before else chat, tools)) for chat in chats]
        elif prompt is None or not all(isinstance(value, str) for value in values):
            kinds = (
                f"{name} {type(record[name]).__name__}" for name in [*names, *([] if prompt is None else [prompt])]
            )
            raise InputError(
                f"expected texts with a prompt (--prompt), or lists of messages, in document {number}; received "
                f"{', '.join(kinds)}"
            )
        else:
            for name in (prompt, *names):
                _check_text(number, name, record[name])
            both = [self._pair(number, record[prompt], record[name]) for name in names]
        chosen, rejected = both
        begins = [each.ids[: each.targets[-1][0]] if each.targets else each.ids for each in both]
        if self._fields.turns == "last" and begins[0] != begins[1]:
            raise InputError(
                f"expected chosen and rejected chats that differ in the last reply in document {number}; received "
                "ones that differ before it: learn all replies (--turns all)"
            )
        split = len(chosen.ids)
        further = tuple((split + low, split + high) for low, high in rejected.targets)
        return Tokens([*chosen.ids, *rejected.ids], (*chosen.targets, *further), passage=(-1, -1), split=split)

    def _pretokenised(self, number: int, record: dict[str, Any]) -> Tokens:
        parts = self._parts
        names = parts["input_ids"], parts.get("input_labels"), parts.get("doc_ids")
        ids, targets, packed = pretokenised(self._tokenizer, number, record, *names)
        return Tokens(ids, targets, passage=(-1, -1), packed=packed)

    def _pair(self, number: int, prompt: str, answer: Any) -> Tokens:
        completion, whole = answer_text(answer), first_answer(answer)
        cut = isinstance(whole, Mapping) and whole.get("finish_reason") == "length"  # then no end was generated
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
        ids = [*before, *after, *([] if eos is None or cut else [eos])]
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

"""Rows of tokens made from documents.

A few numbers describe each row. They are computed once and kept on disk, where every process that uses the same file,
fields, tokenizer and length maps them. Tokens are made when a row is used; a digest shows whether its document's text
is still the one that the numbers were computed from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import CachedFolder, Documents, as_text, cached_folder, text_digest, text_of
from ooc_influence.errors import InputError
from ooc_influence.hf.chats import Chats, Span
from ooc_influence.hf.labels import FieldKind, Labels, as_kind
from ooc_influence.hf.pretokenised import IGNORED, pretokenised
from ooc_influence.hf.tokens import Fields, Tokeniser, Tokens
from ooc_influence.progress import Progress
from ooc_influence.scratch import ArrayFile, Repeats, map_array

COLUMNS = ("document", "piece", "start", "lengths", "n_tokens", "char_start", "char_stop", "text_digest")
_WORTH_KEEPING = 4096  # documents; the rows of fewer are made in a second or two

Numbers = npt.NDArray[np.int64]
Row = tuple[int, ...]  # a number of each of COLUMNS


@dataclass
class Counts:
    """What was seen while rows were made: documents, texts and kinds of columns, as :class:`Samples` has them."""

    without_target: int = 0
    truncated: int = 0
    missing: int = 0
    kinds: dict[str, str] = field(default_factory=dict)


class RowIndex:
    """The numbers of every row, (n,) int64 by the names of ``COLUMNS``, mapped from a folder; and what was counted."""

    def __init__(self, folder: CachedFolder) -> None:
        self._folder = folder  # removed with it where it is temporary
        self.columns = {name: map_array(folder.path / f"{name}.i8", np.int64) for name in COLUMNS}
        self.counts = Counts(**json.loads((folder.path / "counts.json").read_text()))


@cache
def _code_digest() -> str:
    """Return a digest of the modules that decide what rows are: other versions of them make other rows."""
    modules = dict.fromkeys(inspect.getfile(code) for code in _MAKERS)
    return _digest(b"".join(Path(file).read_bytes() for file in modules))


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what a tokenizer makes of a text, and of its settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = sorted(tokenizer.get_vocab().items(), key=str)
    else:
        words = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # those are of the last call
    names = ("special_tokens_map", "chat_template", "truncation_side", "model_max_length", "init_kwargs")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    text = json.dumps([type(tokenizer).__name__, words, settings], sort_keys=True, default=str)
    return _digest(text.encode("utf-8", "surrogatepass"))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


AT_ONCE = 512  # documents read together
_CHARACTERS = 2**20  # of documents tokenised together: offsets take a hundred bytes a token
_SKIP = "fill it in, or leave such documents out with on_missing='skip' (--on-missing skip)"

Numbered = tuple[int, dict[str, Any]]  # a document


class RowMaker:
    """Makes the rows of documents; its arguments are those of :class:`Samples`."""

    def __init__(
        self, documents: Documents, tokenise: Tokeniser, fields: Fields, max_length: int, on_missing: str,
        numbers: Numbers | None,
    ) -> None:  # fmt: skip
        self._documents, self._tokenise, self._fields, self._max_length = documents, tokenise, fields, max_length
        self._on_missing, self._chosen = on_missing, numbers

    def settings(self) -> dict[str, Any]:
        """Return JSON values that decide, beside documents and tokenizer, what the rows are."""
        chosen = None if self._chosen is None else _digest(self._chosen.tobytes())
        return {"fields": self._fields.all, "max_length": self._max_length, "on_missing": self._on_missing,
                "numbers": chosen}  # fmt: skip

    def make(self, folder: Path, progress: bool | None) -> None:
        """Write the rows to a folder; an InputError names a document without text or id, or two rows of one name."""
        counts = Counts()
        kinds = {name: FieldKind(self._documents.textual) for name in self._fields.keep}
        numbers: Any = range(len(self._documents)) if self._chosen is None else self._chosen
        with ExitStack() as stack:
            files = [stack.enter_context(ArrayFile(np.int64, folder / f"{name}.i8")) for name in COLUMNS]
            repeats = stack.enter_context(Repeats())
            bar = stack.enter_context(Progress("tokens", len(numbers), progress))
            for low in range(0, len(numbers), AT_ONCE):
                some = [int(number) for number in numbers[low : low + AT_ONCE]]
                documents = list(self._usable(some, counts))
                for name, kind in kinds.items():
                    kind.add(record.get(name) for _, record in documents)
                for group in _groups(documents):
                    tokens = self._tokenise(group)
                    rows = [row for pair in zip(group, tokens, strict=True) for row in self._rows(*pair, counts)]
                    table = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
                    for file, column in zip(files, table.T, strict=True):
                        file.append(column)
                    if self._fields.id is not None:
                        repeats.add(self._names(dict(group), table))
                bar.advance(len(some))
            counts.kinds = {name: kind.kind for name, kind in kinds.items()}
            (folder / "counts.json").write_text(json.dumps(asdict(counts)))
            document_column, piece_column = (file.finish() for file in files[:2])
            self._check_ids(repeats, document_column, piece_column)

    def _usable(self, numbers: list[int], counts: Counts) -> Iterator[Numbered]:
        """Yield documents that have all that is needed."""
        records = self._documents.read(numbers, self._fields.used)
        for number, record in zip(numbers, records, strict=True):
            lacking = self._tokenise.lacking(record)
            if lacking is None:
                yield number, record
            elif self._on_missing == "skip":
                counts.missing += 1
            else:
                raise InputError(f"expected a text in document {number} of {self._documents.name}; received {lacking}: "
                                 f"{_SKIP}")  # fmt: skip

    def _rows(self, document: Numbered, tokens: Tokens, counts: Counts) -> list[Row]:
        """Return a document's rows: the columns of the index."""
        number, record = document
        if self._fields.advantage is not None:
            finite_number(record.get(self._fields.advantage), number)
        text = text_of(record, self._fields.parts) or ""
        digest, last = document_digest(record, self._fields), len(tokens.ids)
        rows: list[Row] = []
        for piece, start, length, targets in self._cut(number, tokens, counts):
            low, high = tokens.passage or (
                0 if start == 0 else tokens.characters(start)[0],
                len(text) if start + length >= last else tokens.characters(start + length - 1)[1],
            )
            rows.append(
                (number, piece, start, length, targets, *((low, high) if min(low, high) >= 0 else (-1, -1)), digest)
            )
        return rows

    def _cut(self, number: int, tokens: Tokens, counts: Counts) -> list[tuple[int, int, int, int]]:
        """Return the rows (piece, start, length, targets) of a document."""
        length, most = len(tokens.ids), self._max_length
        if self._fields.label is not None:
            if not length:
                raise InputError(
                    f"expected a text to classify in document {number}; received one that the tokenizer makes no token "
                    "of: leave it out"
                )
            counts.truncated += tokens.passage is not None
            return [(-1, 0, length, 1)]
        if tokens.split:
            return self._pair(number, tokens, counts)
        rows = []
        for low, high in tokens.packed or ((0, length),):
            for start in range(low, max(low + 1, high - 1), most - 1):
                rows.append((start, min(high, start + most)))
        pieces = [
            (piece if len(rows) > 1 else -1, start, stop - start, targets)
            for piece, (start, stop) in enumerate(rows)
            if (targets := tokens.targets_in(start, stop)) > 0
        ]
        counts.without_target += not pieces
        return pieces

    def _pair(self, number: int, tokens: Tokens, counts: Counts) -> list[tuple[int, int, int, int]]:
        """Return the row of a preference, whose two sequences cannot be cut."""
        split, stop = tokens.split, len(tokens.ids)
        longest = max(split, stop - split)
        if longest > self._max_length:
            raise InputError(
                f"expected chosen and rejected of at most {self._max_length} tokens; received {longest} in document "
                f"{number}: raise max_length (--max-length) up to the model's context, or leave it out"
            )
        targets = tokens.targets_in(0, split), tokens.targets_in(split, stop)
        counts.without_target += not all(targets)
        return [(-1, 0, tokens.padded, sum(targets))] if all(targets) else []

    def _names(self, records: dict[int, dict[str, Any]], table: Numbers) -> list[str]:
        """Return the names of rows by their documents' ids."""
        names: dict[int, str] = {}
        for number, record in records.items():
            value = record.get(self._fields.id or "")
            if value is None or isinstance(value, (list, dict)):
                raise InputError(
                    f"expected a number or text in field {self._fields.id!r} (--id) of document {number}; received "
                    f"{'none' if value is None else type(value).__name__}: give every document an id"
                )
            names[number] = as_text(value)
        return row_names([names[number] for number in table[:, 0].tolist()], table[:, 1].tolist())

    def _check_ids(self, repeats: Repeats, document: Numbers, piece: Numbers) -> None:
        field = str(self._fields.id)

        def names(rows: Numbers) -> list[str]:
            records = self._documents.read(document[rows].tolist(), self._fields.used)
            return row_names([as_text(record.get(field)) for record in records], piece[rows].tolist())

        equal = repeats.find(names)
        if equal is not None:
            first, second = document[list(equal)].tolist()
            raise InputError(
                f"expected ids that do not repeat; received {names(np.array(equal[:1]))[0]!r} in documents {first} and "
                f"{second}: give every document its own, or leave --id out"
            )


def row_names(names: Iterable[Any], pieces: Sequence[int]) -> list[str]:
    """Return rows' names: the document's, with ``#piece`` where it has several rows."""
    return [str(name) if piece < 0 else f"{name}#{piece}" for name, piece in zip(names, pieces, strict=True)]


def finite_number(value: Any, number: int) -> float:
    """Return the advantage that a document says, in CSV as text."""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float, str))
    with suppress(ValueError):
        if not wrong and math.isfinite(float(value)):
            return float(value)
    raise InputError(
        f"expected a finite number as the advantage (--advantage) of document {number}; received "
        f"{'none' if value is None else repr(value)}"
    )


def document_digest(record: dict[str, Any], fields: Fields) -> int:
    """Return a digest of a document's text; where it has none, of the fields that it is made from."""
    text = text_of(record, fields.parts)
    return text_digest(as_text([record.get(name) for name in fields.parts.values()]) if text is None else text)


def _groups(documents: Sequence[Numbered]) -> Iterator[list[Numbered]]:
    """Yield documents in groups of a bounded number of characters, a document at least."""
    group: list[Numbered] = []
    characters = 0
    for number, record in documents:
        length = sum(len(value) if isinstance(value, str) else len(str(value)) for value in record.values())
        if group and characters + length > _CHARACTERS:
            yield group
            group, characters = [], 0
        group.append((number, record))
        characters += length
    if group:
        yield group


_MAKERS = (RowMaker, Tokeniser, Chats, pretokenised, FieldKind, text_of)  # in these modules it is decided what rows are
_CACHED = 2**22  # tokens of documents that are kept in memory for further rows of theirs
SPANS = ("char_start", "char_stop", "text_digest")  # columns that find a row's passage in its document


class RowColumn(Sequence[Any]):
    """A value for each of n rows, read when it is asked for.

    Attributes
    ----------
    distinct : bool
        Whether no value is there twice, which was checked when the rows were made.
    """

    def __init__(self, n: int, read: Callable[[slice], list[Any]], *, distinct: bool = False) -> None:
        self._n, self._read, self.distinct = n, read, distinct

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        start, stop, _ = key.indices(self._n)
        return self._read(slice(start, stop))


class _Kept(NamedTuple):
    """What is kept in memory of a document's :class:`Tokens`."""

    ids: npt.NDArray[np.int32]
    targets: tuple[Span, ...]
    split: int


class Samples:
    """Rows of tokens made from documents.

    Parameters
    ----------
    documents : Documents
        From :func:`open_documents`.
    tokenizer : PreTrainedTokenizer
        The model's.
    fields : Fields
        What is what.
    max_length : int
        Tokens a row may have.
    labels : Labels, optional
        What the classifier's labels mean, where there is a field of them.
    numbers : (m,) int, optional
        Documents to use; default all.
    on_missing : {"raise", "skip"}
        Documents whose text is missing (a field that is null or not there, a chat without a reply): stop and name the
        first, or leave them out. An empty text is a text.
    progress : bool or None
        Show a progress line while documents are counted.

    Attributes
    ----------
    document, lengths, n_tokens : (n,) int64
        Of each row: its document, its tokens, its target tokens.
    piece : (n,) int64
        Which piece of its document; -1 where it is the only one.
    char_start, char_stop : (n,) int64
        The characters of its document's text (:mod:`ooc_influence.corpus`) that it is made from; -1 for a chat,
        or where the tokenizer has no offsets.
    text_digest : (n,) int64
        A digest of its document's text; of its tokens, where it has these only.
    documents, max_length : int
        Documents of the file, and tokens a row may have.
    without_target, truncated, missing : int
        Documents left out since they have no target, texts to be classified that were cut, and documents left out
        since their text is missing.

    Raises
    ------
    InputError
        For fields that documents lack, values of another type, ids that repeat, labels that are none of the model's,
        texts to be classified without a token, or a tokenizer without what is needed.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any,
        fields: Fields,
        max_length: int,
        *,
        labels: Labels | None = None,
        numbers: npt.NDArray[np.int64] | None = None,
        on_missing: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> None:
        if max_length < 2:
            raise InputError(f"expected max_length >= 2; received {max_length}")
        if on_missing not in ("raise", "skip"):
            raise InputError(f"expected on_missing 'raise' or 'skip'; received {on_missing!r}")
        texts = list(fields.parts.values())
        named = [field for field in (fields.label, fields.advantage, fields.id) if field is not None]
        missing = on_missing == "skip"  # then the first documents may lack their texts
        _check_fields(documents, named if missing else texts + named, [*(texts if missing else ()), *fields.keep])
        self._documents, self.fields, self._tokenise = documents, fields, Tokeniser(tokenizer, fields, max_length)
        self.documents, self.max_length, self._labels = len(documents), max_length, labels
        maker = RowMaker(documents, self._tokenise, fields, max_length, on_missing, numbers)
        key = None
        if documents.fingerprint is not None and len(documents) >= _WORTH_KEEPING:
            libraries = {name: version(name) for name in ("transformers", "tokenizers")}
            key = {"documents": documents.fingerprint, "settings": maker.settings(), "libraries": libraries,
                   "code": _code_digest(), "tokenizer": _tokenizer_digest(tokenizer)}  # fmt: skip
        self._index = RowIndex(cached_folder("rows", key, lambda folder: maker.make(folder, progress)))
        columns, counts = self._index.columns, self._index.counts
        self.document, self.piece, self._start = columns["document"], columns["piece"], columns["start"]
        self.lengths, self.n_tokens = columns["lengths"], columns["n_tokens"]
        self.char_start, self.char_stop = columns["char_start"], columns["char_stop"]
        self.text_digest = columns["text_digest"]
        self.without_target, self.truncated, self.missing = counts.without_target, counts.truncated, counts.missing
        self._token_cache: OrderedDict[int, _Kept] = OrderedDict()
        self._cached_tokens = 0
        self._last_read: tuple[bytes, list[dict[str, Any]]] = (b"", [])
        if not len(self):
            raise InputError("expected documents with target tokens; received none that has any")
        if labels is not None:
            labels.check(self.document, self._labels_of)

    def __len__(self) -> int:
        return len(self.document)

    def _field(self, name: str, documents: Numbers) -> list[Any]:
        """Return a field of some documents, as the file says."""
        distinct, index = np.unique(documents, return_inverse=True)
        if self._last_read[0] != distinct.tobytes():  # all fields of a block of rows are asked for one after the other
            self._last_read = distinct.tobytes(), self._read(distinct.tolist())
        records = self._last_read[1]
        return [records[number].get(name) for number in index.tolist()]

    def _read(self, documents: list[int]) -> list[dict[str, Any]]:
        """Return what documents have beside their texts, which are long."""
        fields = self.fields
        texts = set(fields.parts.values()) - {fields.id, fields.label, fields.advantage, *fields.keep}
        return [
            {name: value for name, value in record.items() if name not in texts}
            for low in range(0, len(documents), AT_ONCE)
            for record in self._documents.read(documents[low : low + AT_ONCE], self.fields.used)
        ]

    def ids(self) -> RowColumn:
        """Return each row's name: its document's, with ``#piece`` where that has several rows."""

        def read(rows: slice) -> list[str]:
            documents, field = self.document[rows], self.fields.id
            names = documents.tolist() if field is None else map(as_text, self._field(field, documents))
            return row_names(names, self.piece[rows].tolist())

        return RowColumn(len(self), read, distinct=True)

    def columns(self) -> dict[str, Any]:
        """Return what is kept of each row: its attributes here that are numbers, and the fields asked for."""
        kept: dict[str, Any] = {
            "document": self.document, "n_tokens": self.n_tokens, **{name: getattr(self, name) for name in SPANS},
        }  # fmt: skip
        if self.fields.advantage is not None:
            kept["advantage"] = RowColumn(len(self), self._advantages)
        if self.fields.doc_ids is not None:
            kept["doc_id"] = RowColumn(len(self), self._doc_ids)
        return kept | {name: RowColumn(len(self), partial(self._kept, name)) for name in self.fields.keep}

    def _doc_ids(self, rows: slice) -> list[int]:
        """Return which document of its packed row each row is."""
        name = str(self.fields.doc_ids)
        documents = self._documents.read(self.document[rows].tolist(), [name])
        return [int(record[name][start]) for record, start in zip(documents, self._start[rows].tolist(), strict=True)]

    def _advantages(self, rows: slice) -> list[float]:
        numbers, field = self.document[rows], self.fields.advantage or ""
        return [
            finite_number(value, number) for value, number in zip(self._field(field, numbers), numbers, strict=True)
        ]

    def _kept(self, name: str, rows: slice) -> list[Any]:
        kind = self._index.counts.kinds[name]
        return [as_kind(value, kind) for value in self._field(name, self.document[rows])]

    def __getitem__(self, row: Any) -> dict[str, Any]:
        number, start, length = int(self.document[row]), int(self._start[row]), int(self.lengths[row])
        kept = self._tokens(number, int(self.text_digest[row]), start + length)
        piece = kept.ids[start : start + length].tolist()
        sample: dict[str, Any] = {"row": int(row), "input_ids": piece}
        if self._labels is not None:
            return sample | {"label": self._labels(self._values(self.fields.label, number), number)}
        if self.fields.advantage is not None:
            sample["advantage"] = finite_number(self._values(self.fields.advantage, number), number)
        labels = [IGNORED] * len(piece)
        for low, high in kept.targets:
            inside = slice(max(1, low - start), max(1, high - start))  # the first has nothing to be predicted from
            labels[inside] = piece[inside]
        if kept.split:
            labels[kept.split] = IGNORED
            halves = slice(kept.split), slice(kept.split, None)
            return sample | {"input_ids": [piece[half] for half in halves], "labels": [labels[half] for half in halves]}
        return sample | {"labels": labels}

    def _values(self, field: str | None, number: int) -> Any:
        """Return what the file says in a field of a document."""
        return self._documents.read([number], [field or ""])[0].get(field or "")

    def _labels_of(self, documents: npt.NDArray[np.int64]) -> list[Any]:
        """Return what the file says of some documents' labels."""
        field = self.fields.label or ""
        return [record.get(field) for record in self._documents.read(documents.tolist(), [field])]

    def _tokens(self, number: int, digest: int, least: int) -> _Kept:
        """Return a document's tokens, checked against what its rows were made from."""
        if number in self._token_cache:
            self._token_cache.move_to_end(number)
            return self._token_cache[number]
        record = self._documents.read([number], self.fields.used)[0]
        same = document_digest(record, self.fields) == digest
        tokens = self._tokenise([(number, record)])[0] if same else None
        if tokens is None or tokens.padded < least:
            raise InputError(
                f"expected document {number} of {self._documents.name} to be as it was when its rows were counted; "
                "received another text or other tokens: leave the file as it is, and run again"
            )
        self._token_cache[number] = _Kept(np.array(tokens.ids, np.int32), tokens.targets, tokens.split)
        self._cached_tokens += len(tokens.ids)
        while len(self._token_cache) > 1 and self._cached_tokens > _CACHED:
            self._cached_tokens -= len(self._token_cache.popitem(last=False)[1].ids)
        return self._token_cache[number]


def _check_fields(documents: Documents, everywhere: Sequence[str], somewhere: Sequence[str]) -> None:
    """Check that the first documents have the fields of all, and that any has those of some, before all are read."""
    lacking = [field for field in everywhere if field not in documents.column_names]
    lacking += [field for field in somewhere if not lacking and not documents.has_field(field)]
    if lacking:
        names = ", ".join(documents.column_names)
        raise InputError(f"expected a field {lacking[0]!r}; received documents with {names}")

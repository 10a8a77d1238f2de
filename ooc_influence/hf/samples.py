"""The rows that documents make, on disk: made once, mapped by every process that uses the same documents.

Of each row a few numbers are kept, none in memory. Whoever uses the same file, fields, tokenizer and length finds them
there; that the text is still the one they were made from is seen by its digest when the row is used.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import CachedFolder, cached_folder
from ooc_influence.document_text import as_text, text_digest, text_of
from ooc_influence.errors import InputError
from ooc_influence.hf.labels import FieldKind, Labels, as_kind
from ooc_influence.hf.models import check_fields
from ooc_influence.hf.padding import IGNORED
from ooc_influence.hf.tokens import Fields, Tokeniser, Tokens, check_room
from ooc_influence.progress import Progress
from ooc_influence.repeats import Repeats
from ooc_influence.scratch import ArrayFile, map_array

COLUMNS = ("document", "piece", "start", "lengths", "n_tokens", "char_start", "char_stop", "text_digest")
_WORTH_KEEPING = 4096  # documents; the rows of fewer are made in a second or two

Numbers = npt.NDArray[np.int64]
Row = tuple[int, ...]  # a number of each of COLUMNS


@dataclass
class Counts:
    """What was seen while rows were made.

    Attributes
    ----------
    without_target, truncated, missing : int
        Documents that made no row, texts that were cut, documents left out since their text is missing.
    kinds : dict of str to str
        Kinds of the columns of fields.
    """

    without_target: int = 0
    truncated: int = 0
    missing: int = 0
    kinds: dict[str, str] = field(default_factory=dict)


class RowIndex:
    """Numbers of every row, mapped from a folder.

    Attributes
    ----------
    columns : dict of str to (n,) int64
        By the names of ``COLUMNS``.
    counts : Counts
        What was seen while they were made.
    """

    def __init__(self, folder: CachedFolder) -> None:
        self._folder = folder  # removed with it where it is temporary
        self.columns = {name: map_array(folder.path / f"{name}.i8", np.int64) for name in COLUMNS}
        self.counts = Counts(**json.loads((folder.path / "counts.json").read_text()))


class RowWriter:
    """Writes the numbers of rows to a folder, in order. A context that closes its files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: ArrayFile(np.int64, folder / f"{name}.i8") for name in COLUMNS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.__exit__(*error)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows."""
        table = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
        for file, column in zip(self._files.values(), table.T, strict=True):
            file.append(column)

    def finish(self, counts: Counts) -> dict[str, Numbers]:
        """Write what was seen; return the columns."""
        (self._folder / "counts.json").write_text(json.dumps(asdict(counts)))
        return {name: file.finish() for name, file in self._files.items()}


def open_index(documents: Any, settings: dict[str, Any], tokenizer: Any, make: Callable[[Path], None]) -> RowIndex:
    """Return the rows of documents, found where they were kept, or made now.

    Parameters
    ----------
    documents : Documents
        What they are made from.
    settings : dict
        JSON values that settle, beside documents and tokenizer, what is made.
    tokenizer : PreTrainedTokenizer
        What they are made with.
    make : callable
        Makes them with a :class:`RowWriter` in an empty folder.
    """
    key = None
    if documents.fingerprint is not None and len(documents) >= _WORTH_KEEPING:
        libraries = {name: version(name) for name in ("transformers", "tokenizers")}
        key = {"documents": documents.fingerprint, "settings": settings, "libraries": libraries, "code": _code_digest(),
               "tokenizer": tokenizer_digest(tokenizer)}  # fmt: skip
    return RowIndex(cached_folder("rows", key, make))


@functools.cache
def _code_digest() -> str:
    """Return a digest of the modules that decide what rows are: other versions of them make other rows."""
    modules = dict.fromkeys(inspect.getfile(code) for code in (RowMaker, Tokeniser, FieldKind, text_of))
    return hashlib.blake2b(b"".join(Path(file).read_bytes() for file in modules), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what a tokenizer makes of a text, and of its settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = sorted(tokenizer.get_vocab().items(), key=str)
    else:
        words = json.loads(backend.to_str())
        words.pop("padding", None)  # of the last call
        words.pop("truncation", None)
    names = ("special_tokens_map", "chat_template", "truncation_side", "model_max_length", "init_kwargs")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    text = json.dumps([type(tokenizer).__name__, words, settings], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


AT_ONCE = 512  # documents read together
_CHARACTERS = 2**20  # of documents tokenised together: offsets take a hundred bytes a token
_SKIP = "fill it in, or leave such documents out with on_missing='skip' (--on-missing skip)"

Numbered = tuple[int, dict[str, Any]]  # a document


class RowMaker:
    """Makes the rows of documents.

    Parameters
    ----------
    documents : Documents
        What they are made from.
    tokenise : Tokeniser
        Their tokens.
    fields, max_length, on_missing, numbers
        As for :class:`~ooc_influence.hf.samples.Samples`.
    """

    def __init__(
        self, documents: Any, tokenise: Tokeniser, fields: Fields, max_length: int, on_missing: str,
        numbers: npt.NDArray[np.int64] | None,
    ) -> None:  # fmt: skip
        self._documents, self._tokenise, self._fields, self._max_length = documents, tokenise, fields, max_length
        self._on_missing, self._parts = on_missing, fields.parts
        self._numbers: Sequence[int] | npt.NDArray[np.int64] = range(len(documents)) if numbers is None else numbers

    def settings(self) -> dict[str, Any]:
        """Return JSON values that settle, beside documents and tokenizer, what is made."""
        chosen = None
        if isinstance(self._numbers, np.ndarray):
            chosen = hashlib.blake2b(self._numbers.tobytes(), digest_size=16).hexdigest()
        return {"fields": self._fields.all, "max_length": self._max_length, "on_missing": self._on_missing,
                "numbers": chosen}  # fmt: skip

    def make(self, folder: Path, progress: bool | None) -> None:
        """Write the rows to a folder.

        Raises
        ------
        InputError
            Naming a document that lacks a text or an id, or two rows of one name.
        """
        fields, counts = self._fields, Counts()
        textual = self._documents.textual
        kinds = {name: FieldKind(textual) for name in fields.keep}
        with (
            RowWriter(folder) as writer, Repeats() as repeats, Progress("tokens", len(self._numbers), progress) as bar
        ):  # fmt: skip
            for low in range(0, len(self._numbers), AT_ONCE):
                some = [int(number) for number in self._numbers[low : low + AT_ONCE]]
                documents = list(self._usable(some, counts))
                for name, kind in kinds.items():
                    kind.add(record.get(name) for _, record in documents)
                for group in _groups(documents):
                    rows = [self._rows(*own, counts) for own in zip(group, self._tokenise(group), strict=True)]
                    writer.append([row for some in rows for row in some])
                    repeats.add([name for own, some in zip(group, rows, strict=True)
                                 for name in self._names(own, [piece for _, piece, *_ in some])])  # fmt: skip
                bar.advance(len(some))
            counts.kinds = {name: kind.kind for name, kind in kinds.items()}
            found = writer.finish(counts)
            self._check_ids(repeats, found["document"], found["piece"])

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
        text = text_of(record, self._parts) or ""
        digest, last = text_digest(text), len(tokens.ids)
        rows: list[Row] = []
        for piece, start, length, targets in self._cut(number, tokens, counts):
            if tokens.passage is not None:
                rows.append((number, piece, start, length, targets, *tokens.passage, digest))
                continue
            low = 0 if start == 0 else tokens.characters(start)[0]
            high = len(text) if start + length >= last else tokens.characters(start + length - 1)[1]
            known = (low, high) if low >= 0 and high >= 0 else (-1, -1)
            rows.append((number, piece, start, length, targets, *known, digest))
        return rows

    def _cut(self, number: int, tokens: Tokens, counts: Counts) -> list[tuple[int, int, int, int]]:
        """Return the rows (piece, start, length, targets) of a document."""
        length, first, most = len(tokens.ids), tokens.first, self._max_length
        if self._fields.label is not None:
            if not length:
                raise InputError(
                    f"expected a text to classify in document {number}; received one that the tokenizer makes no token "
                    "of: leave it out"
                )
            counts.truncated += tokens.passage is not None
            return [(-1, 0, length, 1)]
        found = []
        for start in range(0, max(1, length - 1), most - 1):
            stop = min(length, start + most)
            targets = stop - max(start + 1, first)
            if targets > 0:
                found.append((start // (most - 1) if length > most else -1, start, stop - start, targets))
        counts.without_target += not found
        return found

    def _names(self, document: Numbered, pieces: list[int]) -> list[str]:
        """Return the names of a document's rows where it has an id; numbers of documents do not repeat."""
        if self._fields.id is None:
            return []
        number, record = document
        value = record.get(self._fields.id)
        if value is None or isinstance(value, (list, dict)):
            raise InputError(
                f"expected a number or text in field {self._fields.id!r} (--id) of document {number}; received "
                f"{'none' if value is None else type(value).__name__}: give every document an id"
            )
        return row_names([as_text(value)] * len(pieces), pieces)

    def _check_ids(self, repeats: Repeats, document: npt.NDArray[np.int64], piece: npt.NDArray[np.int64]) -> None:
        field = str(self._fields.id)

        def names(rows: npt.NDArray[np.int64]) -> list[str]:
            records = self._documents.read(document[rows].tolist(), self._fields.used)
            return row_names([as_text(record.get(field)) for record in records], piece[rows].tolist())

        found = repeats.find(names)
        if found is not None:
            first, second = document[list(found)].tolist()
            raise InputError(
                f"expected ids that do not repeat; received {names(np.array(found[:1]))[0]!r} in documents {first} and "
                f"{second}: give every document its own, or leave --id out"
            )


def row_names(names: Sequence[Any], pieces: Sequence[int]) -> list[str]:
    """Return rows' names: the document's, with ``#piece`` where it has several rows."""
    return [str(name) if piece < 0 else f"{name}#{piece}" for name, piece in zip(names, pieces, strict=True)]


def _groups(documents: Sequence[Numbered]) -> Iterator[list[Numbered]]:
    """Yield documents in groups of a bounded number of characters, a document at least."""
    group: list[Numbered] = []
    held = 0
    for number, record in documents:
        length = sum(len(value) if isinstance(value, str) else len(str(value)) for value in record.values())
        if group and held + length > _CHARACTERS:
            yield group
            group, held = [], 0
        group.append((number, record))
        held += length
    if group:
        yield group


_HELD = 2**22  # tokens of documents that are held for further rows of theirs
SPANS = ("char_start", "char_stop", "text_digest")  # columns that find a row's passage in its document


class RowColumn(Sequence[Any]):
    """A value for each row, looked up by number when it is asked for.

    Attributes
    ----------
    distinct : bool
        Whether no value is there twice, which was checked when the rows were made.
    """

    def __init__(self, samples: Samples, field: str | None, *, piece: bool = False) -> None:
        self._samples, self._field, self._piece = samples, field, piece
        self.distinct = piece

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        rows = range(len(self))[key]
        documents = self._samples.document[rows.start : rows.stop]
        if not self._piece:
            return documents.tolist() if self._field is None else self._samples.field(self._field, documents)
        names = documents.tolist()
        if self._field is not None:
            names = [as_text(value) for value in self._samples.field(self._field, documents, kept=False)]
        return row_names(names, self._samples.piece[rows.start : rows.stop].tolist())


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
        The characters of its document's text (:mod:`ooc_influence.document_text`) that it is made from; -1 for a chat,
        or where the tokenizer has no offsets.
    text_digest : (n,) int64
        A digest of its document's text.
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
        named = [field for field in (fields.label, fields.id) if field is not None]
        missing = on_missing == "skip"  # then the first documents may lack their texts
        check_fields(documents, named if missing else texts + named, [*(texts if missing else ()), *fields.keep])
        self._documents, self.fields, self._tokenise = documents, fields, Tokeniser(tokenizer, fields, max_length)
        self.documents, self.max_length, self._labels = len(documents), max_length, labels
        if fields.label is not None:
            check_room(tokenizer, max_length)
        maker = RowMaker(documents, self._tokenise, fields, max_length, on_missing, numbers)
        self._index = open_index(documents, maker.settings(), tokenizer, lambda folder: maker.make(folder, progress))
        self._held: OrderedDict[int, tuple[npt.NDArray[np.int32], int]] = OrderedDict()
        self._held_tokens = 0
        self._last: tuple[bytes, list[dict[str, Any]]] = (b"", [])
        self._take(self._index)
        if not len(self):
            raise InputError("expected documents with target tokens; received none that has any")
        if labels is not None:
            labels.check(self.document, self._labels_of)

    def _take(self, index: RowIndex) -> None:
        found, counts = index.columns, index.counts
        self.document, self.piece, self._start = found["document"], found["piece"], found["start"]
        self.lengths, self.n_tokens = found["lengths"], found["n_tokens"]
        self.char_start, self.char_stop = found["char_start"], found["char_stop"]
        self.text_digest = found["text_digest"]
        self.without_target, self.truncated, self.missing = counts.without_target, counts.truncated, counts.missing
        self._kinds = counts.kinds

    def __len__(self) -> int:
        return len(self.document)

    def field(self, name: str, documents: npt.NDArray[np.int64], *, kept: bool = True) -> list[Any]:
        """Return a field of some documents, as its column has it or, if not ``kept``, as the file says."""
        own, places = np.unique(documents, return_inverse=True)
        if self._last[0] != own.tobytes():  # all fields of a block of rows are asked for one after the other
            self._last = own.tobytes(), self._read(own.tolist())
        records = self._last[1]
        kind = self._kinds.get(name) if kept else None
        values = [as_kind(record.get(name), kind) if kind else record.get(name) for record in records]
        return [values[place] for place in places.tolist()]

    def _read(self, documents: list[int]) -> list[dict[str, Any]]:
        """Return what documents have beside their texts, which are long."""
        texts = set(self.fields.parts.values()) - {self.fields.id, self.fields.label, *self.fields.keep}
        found = []
        for low in range(0, len(documents), AT_ONCE):
            for record in self._documents.read(documents[low : low + AT_ONCE], self.fields.used):
                found.append({name: value for name, value in record.items() if name not in texts})
        return found

    def ids(self) -> RowColumn:
        """Return each row's name: its document's, with ``#piece`` where that has several rows."""
        return RowColumn(self, self.fields.id, piece=True)

    def columns(self) -> dict[str, Any]:
        """Return what is kept of each row: its attributes here that are numbers, and the fields asked for."""
        kept: dict[str, Any] = {
            "document": self.document, "n_tokens": self.n_tokens, **{name: getattr(self, name) for name in SPANS},
        }  # fmt: skip
        return kept | {name: RowColumn(self, name) for name in self.fields.keep}

    def __getitem__(self, row: Any) -> dict[str, Any]:
        number, start, length = int(self.document[row]), int(self._start[row]), int(self.lengths[row])
        ids, first = self._tokens(number, int(self.text_digest[row]), start + length)
        piece = ids[start : start + length].tolist()
        found: dict[str, Any] = {"row": int(row), "input_ids": piece}
        if self._labels is not None:
            return found | {"label": self._labels(self._labels_of(self.document[row : row + 1])[0], number)}
        unseen = max(1, first - start)  # the first token has nothing to be predicted from
        return found | {"labels": [IGNORED] * min(unseen, length) + piece[unseen:]}

    def _labels_of(self, documents: npt.NDArray[np.int64]) -> list[Any]:
        """Return what the file says of some documents' labels."""
        field = self.fields.label or ""
        return [record.get(field) for record in self._documents.read(documents.tolist(), [field])]

    def _tokens(self, number: int, digest: int, least: int) -> tuple[npt.NDArray[np.int32], int]:
        """Return a document's tokens and the first target, checked against what its rows were made from."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        record = self._documents.read([number], self.fields.used)[0]
        text = text_of(record, self.fields.parts) or ""
        tokens = None if text_digest(text) != digest else self._tokenise([(number, record)])[0]
        if tokens is None or len(tokens.ids) < least:
            raise InputError(
                f"expected document {number} of {self._documents.name} to be as it was when its rows were counted; "
                "received another text or other tokens: leave the file as it is, and run again"
            )
        self._held[number] = np.array(tokens.ids, np.int32), tokens.first
        self._held_tokens += len(tokens.ids)
        while len(self._held) > 1 and self._held_tokens > _HELD:
            self._held_tokens -= len(self._held.popitem(last=False)[1][0])
        return self._held[number]

"""Records of a corpus that are needed, copied to a temporary file in one pass, then found by key.

Memory holds a key and a place for each record needed, never the corpus. Nothing needs to be seekable.
"""

from __future__ import annotations

import array
import json
import re
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import open_records
from ooc_influence.document_text import USUAL, as_text, text_digest, text_of
from ooc_influence.errors import InputError, MismatchError, OocInfluenceWarning
from ooc_influence.report.images import ImageFolder, open_images
from ooc_influence.store import GradientStore

Key = int | str


class Spool:
    """Records copied to a temporary file, by key. A context that removes the file.

    Attributes
    ----------
    count : int
        Records read.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the context
        self._places: dict[Key, int] = {}
        self._every = array.array("q")  # places by record number, where all are wanted
        self.count = 0

    @classmethod
    def fill(cls, path: Path, wanted: Collection[Key], id_field: str | None, split: str | None = None) -> Self:
        """Copy the records whose number, or whose ``id_field`` as text, is wanted; a range from 0: all numbers.

        Raises
        ------
        InputError
            As for :func:`open_records`; for records without that field, or an id that repeats.
        """
        spool = cls()
        try:
            for number, parse in enumerate(open_records(path, split)):
                spool.count += 1
                if id_field is None and number not in wanted:
                    continue
                if isinstance(wanted, range):
                    spool._every.append(spool._write(parse()))
                    continue
                record = parse()
                key: Key = number
                if id_field is not None:
                    if id_field not in record:
                        raise InputError(
                            f"expected a field {id_field!r} in record {number} of {path}; received {', '.join(record)}"
                        )
                    key = as_text(record[id_field])
                if key in wanted:
                    spool._add(key, record, path)
        except BaseException:
            spool.close()
            raise
        return spool

    def _add(self, key: Key, record: dict[str, Any], path: Path) -> None:
        if key in self._places:
            raise InputError(f"expected ids that do not repeat in {path}; received {key!r} twice")
        self._places[key] = self._write(record)

    def _write(self, record: dict[str, Any]) -> int:
        place = self._file.tell()
        self._file.write(json.dumps(record, default=as_text).encode() + b"\n")
        return place

    def __contains__(self, key: Key) -> bool:
        return key in self._places or (isinstance(key, int) and 0 <= key < len(self._every))

    def __getitem__(self, key: Key) -> dict[str, Any]:
        self._file.seek(self._places[key] if key in self._places else self._every[int(key)])
        found: dict[str, Any] = json.loads(self._file.readline())
        return found

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


TEXT_LIMIT = 4000  # characters of an example in a page
_AT_ONCE = 8192  # rows whose records are looked for
_PIECE = re.compile(r"#\d+$")  # a document that has several rows
_SOURCES = ("source", "document_source", "url")
_SHOWN_ELSEWHERE = ("label", "source", "char_start", "char_stop", "text_digest")


@dataclass(frozen=True)
class Corpus:
    """Where the examples of a store are, and which of their fields are what.

    Attributes
    ----------
    path : str or Path, optional
        As for :func:`ooc_influence.corpus.open_documents`.
    text : str, optional
        The field with the text. Default: the fields that the store was extracted from, or ``text``, or ``prompt`` and
        ``completion``, or ``messages``, or the whole record.
    label, source : str, optional
        Fields with these; default the store's columns of that name, then the records' fields.
    id : str, optional
        The field with the ids that the store has.
    image : str, optional
        A field with the path of an image, below the folder of ``path``.
    images : array, or path of a ``.npy`` file, optional
        Images by row, (n, h, w) or (n, h, w, c): whole numbers up to 255, or floats.
    split : str, optional
        Which split of a folder.
    """

    path: str | Path | None = None
    text: str | None = None
    label: str | None = None
    source: str | None = None
    id: str | None = None
    image: str | None = None
    images: Any = None
    split: str | None = None

    @classmethod
    def of(cls, data: Corpus | str | Path | None) -> Corpus:
        """Return a corpus for what a caller gave: one, the path of a file, or nothing."""
        return data if isinstance(data, Corpus) else cls(data)


class Examples:
    """Rows of a store as JSON-ready values. A context that holds a temporary file.

    Parameters
    ----------
    store : GradientStore
        What the rows are in.
    corpus : Corpus
        Where their text and images are.
    rows : (m,) int64
        All rows that will be asked for.
    pictures : ImageFolder
        Where images are written.
    """

    def __init__(
        self, store: GradientStore, corpus: Corpus, rows: npt.NDArray[np.int64], pictures: ImageFolder
    ) -> None:
        self.store, self._corpus, self._pictures = store, corpus, pictures
        self._images = open_images(corpus.images, store.n)
        self._origin = store.attrs.get("origin") or {}
        self._spool: Spool | None = None
        if corpus.path is not None:
            self._spool = self._read(Path(corpus.path), rows)

    def _read(self, path: Path, rows: npt.NDArray[np.int64]) -> Spool:
        field = self._corpus.id
        by_row = not self._by_document and field is None
        if by_row and self.store.layout.ids is not None:
            first = next(iter(open_records(path, self._corpus.split)), dict)()
            field = "id" if "id" in first else None
        self._id_field = field
        every = field is None and len(rows) == self.store.n  # then numbers alone, 8 bytes a record
        wanted: Collection[Key] = range(2**62) if every else {key for keys in self._keys(rows) for key in keys}
        spool = Spool.fill(path, wanted, field, self._corpus.split)
        expected, what = (self.store.n, "rows") if by_row else (self._origin.get("documents"), "documents")
        if field is None and expected is not None and spool.count != expected:
            spool.close()
            raise MismatchError(
                f"expected a record for each of {expected} {what} of {self.store.path}; received {spool.count} in "
                f"{path}: give the file the store was made from, or name the field with its ids (--id)"
            )
        lacking = self._lacking(spool, rows)
        if len(rows) and lacking == len(rows):
            spool.close()
            raise MismatchError(
                f"expected records of the rows of {self.store.path} in {path}; received none of the {len(rows)} looked "
                f"for, such as {self._keys(rows[:1])[0][0]!r}: give the field with the ids (--id), or another file"
            )
        if lacking:
            warnings.warn(f"{lacking} of {len(rows)} examples have no record in {path}", OocInfluenceWarning, 4)
        return spool

    def _lacking(self, spool: Spool, rows: npt.NDArray[np.int64]) -> int:
        parts = (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
        return sum(all(key not in spool for key in keys) for part in parts for keys in self._keys(part))

    @property
    def _by_document(self) -> bool:
        return self._corpus.id is None and self.store.layout.columns.get("document") == "int64"

    def _keys(self, rows: npt.NDArray[np.int64]) -> list[list[Key]]:
        """Return for each row the keys of its record, the likeliest first."""
        if self._id_field is not None:
            names = [str(name) for name in self.store.ids(rows).tolist()]
            return [list(dict.fromkeys([name, _PIECE.sub("", name)])) for name in names]
        numbers = self.store.values("columns/document", rows) if self._by_document else rows
        return [[number] for number in numbers.tolist()]

    def describe(self, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return what a page shows of each of some rows."""
        if not len(rows):
            return []
        store = self.store
        columns = {name: store.values(f"columns/{name}", rows).tolist() for name in store.layout.columns}
        losses, norms = (store.values(name, rows).tolist() for name in ("loss", "grad_norm"))
        dropped = store.values("dropped", rows).tolist() if store.has_dropped else [False] * len(rows)
        keys = self._keys(rows) if self._spool is not None else [[] for _ in rows]
        found = []
        for at, (row, name) in enumerate(zip(rows.tolist(), store.ids(rows).tolist(), strict=True)):
            own = {column: values[at] for column, values in columns.items()}
            key = next((key for key in keys[at] if self._spool is not None and key in self._spool), None)
            record = {} if key is None or self._spool is None else self._spool[key]
            entry = {"row": row, "id": str(name), "loss": losses[at], "norm": norms[at], "dropped": dropped[at]}
            found.append(entry | self._details(row, own, record))
        return found

    def _details(self, row: int, own: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        corpus = self._corpus
        text, where = self._passage(row, own, record) if record else (None, {})
        labels = ("label", str(self._origin.get("fields", {}).get("label", "label")))
        found: dict[str, Any] = {
            "text": text if text is None else text[:TEXT_LIMIT],
            "cut": max(0, len(text or "") - TEXT_LIMIT),
            "label": _first(own, record, corpus.label, labels),
            "source": _first(own, record, corpus.source, _SOURCES),
            "more": where | {name: value for name, value in own.items() if name not in _SHOWN_ELSEWHERE},
        }
        if self._images is not None:
            found |= self._pictures.write(row, self._images[row])
        elif corpus.image is not None and corpus.path is not None and record:
            if corpus.image not in record:
                raise InputError(
                    f"expected a field {corpus.image!r} (--image); received records with {', '.join(record)}"
                )
            place = record[corpus.image]
            found |= self._pictures.copy(row, Path(corpus.path).parent, place) if place else {}
        return found

    def _passage(self, row: int, own: dict[str, Any], record: dict[str, Any]) -> tuple[str, dict[str, str]]:
        """Return the text that a row is made from, and which part of its document that is.

        Raises
        ------
        InputError
            If the record has no such field.
        MismatchError
            If the document of this number is another one than the row was made from.
        """
        chosen, extracted = self._corpus.text, text_of(record, self._origin.get("fields") or {})
        same = extracted is not None and text_digest(extracted) == own.get("text_digest")
        if self._by_document and extracted is not None and "text_digest" in own and not same:
            raise MismatchError(
                f"expected in record {own['document']} of {self._corpus.path} the text that row {row} of "
                f"{self.store.path} was made from; received another text: give the file the store was made from, or "
                "name the field with its ids (--id)"
            )
        start, stop = own.get("char_start", -1), own.get("char_stop", -1)
        if chosen is None and same and extracted is not None and 0 <= start < stop < len(extracted) + (start > 0):
            return extracted[start:stop], {"characters": f"{start:,} to {stop:,} of {len(extracted):,}"}
        return _shown(record, chosen, extracted), {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._spool is not None:
            self._spool.close()


def _first(own: dict[str, Any], record: dict[str, Any], field: str | None, names: tuple[str, ...]) -> str | None:
    """Return the value of a field of the record, or the first found in the store's columns or the record, as text."""
    if field is not None:
        if record and field not in record and field not in own:
            raise InputError(f"expected a field {field!r}; received records with {', '.join(record)}")
        names = (field,)
    for values in (own, record):
        for name in names:
            if values.get(name) is not None:
                return as_text(values[name])
    return None


def _shown(record: dict[str, Any], field: str | None, extracted: str | None) -> str:
    """Return the text of a record: of the field asked for, the fields it was extracted from, or the usual ones.

    Raises
    ------
    InputError
        If it has no such field.
    """
    if field is not None:
        if field not in record:
            raise InputError(f"expected a field {field!r} (--text); received records with {', '.join(record)}")
        return as_text(record[field])
    usual = (text_of(record, fields) for fields in USUAL)
    found = extracted if extracted is not None else next((text for text in usual if text is not None), None)
    return json.dumps(record, ensure_ascii=False, indent=1) if found is None else found

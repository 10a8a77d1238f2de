"""Examples of a page: a row's text, found by number or id in the files that it was extracted from, and its image.

No image is copied as it is: what a page shows was decoded by pillow, is a bitmap and at most :data:`LARGEST_IMAGE` a
side. A file says its size before it is decoded; one of more than :data:`PIXELS` is not (a kilobyte can hold a
gigapixel).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import (
    USUAL,
    Documents,
    answer_start,
    as_text,
    open_documents,
    question_start,
    text_digest,
    text_of,
)
from ooc_influence.errors import InputError, MismatchError, warn, writing
from ooc_influence.progress import optional_library
from ooc_influence.store import GradientStore

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
        """Return the corpus itself, the corpus of a file, or one without examples."""
        return data if isinstance(data, Corpus) else cls(data)


class Examples:
    """Rows of a store as JSON-ready values; ``rows``, (m,) int64, are all that will be asked for.

    Memory holds, where rows are matched by id, a name and a number for each row, never the documents.
    """

    def __init__(
        self, store: GradientStore, corpus: Corpus, rows: npt.NDArray[np.int64], pictures: ImageFolder
    ) -> None:
        self.store, self._corpus, self._pictures = store, corpus, pictures
        self._images = open_images(corpus.images, store.n)
        self._origin = store.attrs.get("origin") or {}
        usual = [name for form in USUAL for name in form.values()]
        recorded = self._origin.get("fields", {})
        extracted = [name for kind, name in recorded.items() if isinstance(name, str) and kind != "turns"]
        asked = [name for name in (corpus.text, corpus.label, corpus.source, corpus.image) if name is not None]
        self._fields = list(dict.fromkeys([*asked, *extracted, *usual, "label", *_SOURCES]))
        self._by_document = corpus.id is None and store.layout.columns.get("document") == "int64"
        self._documents: Documents | None = None
        if corpus.path is not None:
            self._documents = open_documents(corpus.path, corpus.split)
            self._match(self._documents, rows)

    def _match(self, documents: Documents, rows: npt.NDArray[np.int64]) -> None:
        """Settle how the document of a row is found, and check that the rows' documents are there."""
        store, path, self._id_field = self.store, self._corpus.path, self._corpus.id
        by_row = not self._by_document and self._id_field is None
        if by_row and store.layout.ids is not None and "id" in documents.column_names:
            self._id_field = "id"
        expected, what = (store.n, "rows") if by_row else (self._origin.get("documents"), "documents")
        if self._id_field is not None:
            self._numbers = self._find_ids(documents, self._id_field, rows)
        elif expected is not None and len(documents) != expected:
            raise MismatchError(
                f"expected a record for each of {expected} {what} of {store.path}; received {len(documents)} in "
                f"{path}: give the file the store was made from, or name the field with its ids (--id)"
            )
        parts = (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
        lacking = sum(self.document_numbers(part).count(None) for part in parts)
        if len(rows) and lacking == len(rows):
            raise MismatchError(
                f"expected records of the rows of {store.path} in {path}; received none of the {len(rows)} looked for, "
                f"such as {store.ids(rows[:1]).tolist()[0]!r}: give the field with the ids (--id), or another file"
            )
        if lacking:
            warn(f"{lacking} of {len(rows)} examples have no record in {path}")

    def _find_ids(self, documents: Documents, field: str, rows: npt.NDArray[np.int64]) -> dict[str, int]:
        """Return the numbers of the documents that rows are named after, by name."""
        parts = (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
        wanted = {name for part in parts for names in self._names(part) for name in names}
        numbers: dict[str, int] = {}
        for number, record in enumerate(documents.read_all([field])):
            if field not in record:
                raise InputError(
                    f"expected a field {field!r} in record {number} of {self._corpus.path}; received "
                    f"{', '.join(documents[number])}"
                )
            name = as_text(record[field])
            if name in numbers:
                raise InputError(f"expected ids that do not repeat in {self._corpus.path}; received {name!r} twice")
            if name in wanted:
                numbers[name] = number
        return numbers

    def _names(self, rows: npt.NDArray[np.int64]) -> list[tuple[str, str]]:
        """Return the names that the document of each row may have: the row's, and without the number of its piece."""
        return [(str(name), _PIECE.sub("", str(name))) for name in self.store.ids(rows).tolist()]

    @property
    def documents(self) -> int:
        """How many documents there are; 0 without a corpus of texts."""
        return 0 if self._documents is None else len(self._documents)

    @property
    def opened(self) -> Documents:
        """The documents, of a corpus that has some."""
        assert self._documents is not None
        return self._documents

    def texts(self) -> Iterator[str]:
        """Yield the texts of all documents."""
        assert self._documents is not None
        return map(self._whole_text, self._documents.read_all(self._fields))

    def text_of(self, number: int) -> str:
        """Return the text of a document."""
        assert self._documents is not None
        return self._whole_text(self._documents.read([number], self._fields)[0])

    def _whole_text(self, record: dict[str, Any]) -> str:
        if self._corpus.text is not None:
            return as_text(record.get(self._corpus.text))
        forms = (self._origin.get("fields") or {}, *USUAL)
        return next((text for fields in forms if (text := text_of(record, fields)) is not None), "")

    def document_numbers(self, rows: npt.NDArray[np.int64]) -> list[int | None]:
        """Return the number of the document of each row; None where there is none."""
        if self._documents is None:
            return [None] * len(rows)
        if self._id_field is not None:
            return [self._numbers.get(name, self._numbers.get(whole)) for name, whole in self._names(rows)]
        numbers = self.store.values("columns/document", rows) if self._by_document else rows
        return [number if number < len(self._documents) else None for number in numbers.tolist()]

    def describe(self, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return what a page shows of each of some rows."""
        if not len(rows):
            return []
        store = self.store
        columns = {name: store.values(f"columns/{name}", rows).tolist() for name in store.layout.columns}
        losses, norms = (store.values(name, rows).tolist() for name in ("loss", "grad_norm"))
        dropped = store.values("dropped", rows).tolist() if store.has_dropped else [False] * len(rows)
        names, documents = store.ids(rows).tolist(), self.document_numbers(rows)
        return [
            {"row": row, "id": str(names[index]), "loss": losses[index], "norm": norms[index],
             "dropped": dropped[index],
             **self._details(row, {name: values[index] for name, values in columns.items()}, documents[index])}
            for index, row in enumerate(rows.tolist())
        ]  # fmt: skip

    def passages(self, rows: npt.NDArray[np.int64]) -> list[str | None]:
        """Return the whole text that each of some rows is made from; None where a row has no document."""
        wanted = [name for name in ("text_digest", "char_start", "char_stop") if name in self.store.layout.columns]
        columns = {name: self.store.values(f"columns/{name}", rows).tolist() for name in wanted}
        texts: list[str | None] = []
        for index, (row, number) in enumerate(zip(rows.tolist(), self.document_numbers(rows), strict=True)):
            own: dict[str, Any] = {name: values[index] for name, values in columns.items()}
            record = {} if number is None else self.opened.read([number], self._fields)[0]
            texts.append(None if number is None else self._passage(row, own, record, number)[0])
        return texts

    def _details(self, row: int, columns: dict[str, Any], number: int | None) -> dict[str, Any]:
        corpus = self._corpus
        record: dict[str, Any] = {}
        text, where = None, dict[str, str]()
        if self._documents is not None and number is not None:
            record = self._documents.read([number], self._fields)[0]
            text, where = self._passage(row, columns, record, number)
        labels = ("label", str(self._origin.get("fields", {}).get("label", "label")))
        details: dict[str, Any] = {
            "text": text if text is None else text[:TEXT_LIMIT],
            "cut": max(0, len(text or "") - TEXT_LIMIT),
            "label": self._first(columns, record, corpus.label, labels),
            "source": self._first(columns, record, corpus.source, _SOURCES),
            "more": where | {name: value for name, value in columns.items() if name not in _SHOWN_ELSEWHERE},
        }
        details |= self._exchange(record, where)
        if self._images is not None:
            details |= self._pictures.write(row, self._images[row])
        elif corpus.image is not None and corpus.path is not None and number is not None:
            if corpus.image not in record:
                raise self._lacking(f"{corpus.image!r} (--image)")
            path = record[corpus.image]
            details |= self._pictures.copy(row, Path(corpus.path).parent, path) if path else {}
        return details

    def _passage(
        self, row: int, columns: dict[str, Any], record: dict[str, Any], number: int
    ) -> tuple[str, dict[str, str]]:
        """Return the text that a row is made from, and which part of its document that is.

        Raises
        ------
        InputError
            If the record has no such field.
        MismatchError
            If the document of this number is another one than the row was made from.
        """
        extracted = text_of(record, self._origin.get("fields") or {})
        same = extracted is not None and text_digest(extracted) == columns.get("text_digest")
        if self._by_document and extracted is not None and "text_digest" in columns and not same:
            raise MismatchError(
                f"expected in record {number} of {self._corpus.path} the text that row {row} of {self.store.path} was "
                "made from; received another text: give the file the store was made from, or name the field with its "
                "ids (--id)"
            )
        if self._corpus.text is not None:
            if self._corpus.text not in record:
                raise self._lacking(f"{self._corpus.text!r} (--text)")
            return as_text(record[self._corpus.text]), {}
        start, stop = columns.get("char_start", -1), columns.get("char_stop", -1)
        if same and extracted is not None and 0 <= start < stop < len(extracted) + (start > 0):
            return extracted[start:stop], {"characters": f"{start:,} to {stop:,} of {len(extracted):,}"}
        texts = (extracted, *(text_of(record, fields) for fields in USUAL))
        text = next((text for text in texts if text is not None), None)
        if text is None and self._documents is not None:
            text = json.dumps(self._documents[number], ensure_ascii=False, indent=1, default=as_text)
        return text or "", {}

    def _exchange(self, record: dict[str, Any], where: dict[str, str]) -> dict[str, int]:
        """Return where in a whole text its ``answer`` begins, and of a chat the ``question``, if a page shows that."""
        if where or self._corpus.text is not None or not record:
            return {}
        forms = (self._origin.get("fields") or {}, *USUAL)
        fields = next((fields for fields in forms if text_of(record, fields) is not None), {})
        starts = {"question": question_start(record, fields), "answer": answer_start(record, fields)}
        return {name: start for name, start in starts.items() if start is not None and start < TEXT_LIMIT}

    def _first(
        self, columns: dict[str, Any], record: dict[str, Any], field: str | None, names: tuple[str, ...]
    ) -> str | None:
        """Return the value of a field, or of the first of some names in the columns or the record, as text."""
        if field is not None:
            if record and field not in record and field not in columns:
                raise self._lacking(repr(field))
            names = (field,)
        values = (each[name] for each in (columns, record) for name in names if each.get(name) is not None)
        return next(map(as_text, values), None)

    def _lacking(self, field: str) -> InputError:
        names = "" if self._documents is None else ", ".join(self._documents.column_names)
        return InputError(f"expected a field {field}; received records with {names}")


LARGEST_IMAGE = 512  # pixels a side
PIXELS = 2**26  # of an image that is decoded
_TOO_LARGE = f"more than {PIXELS // 10**6} million pixels"
_RUN_A_PROGRAM = ("EPS", "WMF")  # Ghostscript, the system's own
_CHANNELS = (1, 3, 4)


def open_images(images: Any, n: int) -> Any:
    """Return images by row, mapped where they are in a ``.npy`` file; None where there are none.

    Raises
    ------
    InputError
        If they are no array (n, h, w) or (n, h, w, c), or of another number of rows.
    """
    if images is None:
        return None
    if isinstance(images, (str, Path)):
        try:
            images = np.load(images, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"expected images as a .npy file; received {images}: {error}") from error
    shape = np.shape(images)
    if len(shape) not in (3, 4) or shape[0] != n or (len(shape) == 4 and not {shape[1], shape[3]} & set(_CHANNELS)):
        raise InputError(f"expected images ({n}, h, w) or ({n}, h, w, 1, 3 or 4); received shape {shape}")
    return images


class UnseenError(ValueError):
    """Why an image is not shown, in a page's words."""


class ImageFolder:
    """The images of one store in a page's folder. An image that cannot be shown is counted, and the page says why."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder / "images" / name, f"images/{name}"
        self._unseen: dict[int, str] = {}

    @property
    def unreadable(self) -> int:
        """Images that are not shown."""
        return len(self._unseen)

    def write(self, row: int, image: Any) -> dict[str, str]:
        """Write an array as the image of a row, once; return what :meth:`copy` does."""
        library = optional_library("PIL.Image", "images")
        return self._put(row, lambda: _as_bitmap(np.asarray(image), library))

    def copy(self, row: int, root: Path, name: Any) -> dict[str, str]:
        """Write an image file below ``root`` as the image of a row.

        Returned is its path in the page, as ``image``; or, as ``unseen``, why there is none.
        """
        library = optional_library("PIL.Image", "images")
        return self._put(row, lambda: _decode(library, root, name))

    def _put(self, row: int, make: Callable[[], Any]) -> dict[str, str]:
        target = self._folder / f"{row}.png"
        if row in self._unseen:  # an example is on many pages
            return {"unseen": self._unseen[row]}
        if not target.exists():
            try:
                picture = make()
                picture.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
            except Exception as error:  # whatever decoders raise: one bad file among thousands is no reason to stop
                reason = str(error) if isinstance(error, UnseenError) else type(error).__name__
                self._unseen[row] = f"image not shown: {reason}"
                return {"unseen": self._unseen[row]}
            with writing(f"to write an image to {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
                picture.save(target, "PNG")
        return {"image": f"{self._name}/{row}.png"}


def _decode(library: Any, root: Path, name: Any) -> Any:
    """Return the image in a file, decoded no larger than it has to be; its decoder may raise anything."""
    path = (root / str(name)).resolve()
    if not path.is_relative_to(root.resolve()):  # a corpus names files: only its own may be shown
        raise UnseenError("not below the folder of the data")
    if not path.is_file():
        raise UnseenError("no such file")
    library.init()
    formats = [name for name in library.ID if name not in _RUN_A_PROGRAM]
    with warnings.catch_warnings():
        warnings.simplefilter("error", library.DecompressionBombWarning)
        try:
            opened = library.open(path, formats=formats)
        except (library.DecompressionBombError, library.DecompressionBombWarning) as error:
            raise UnseenError(_TOO_LARGE) from error
        except library.UnidentifiedImageError as error:
            raise UnseenError("no image that can be read") from error
    with opened as picture:
        picture.draft(None, (LARGEST_IMAGE, LARGEST_IMAGE))  # a JPEG is decoded smaller
        if picture.width * picture.height > PIXELS:
            raise UnseenError(_TOO_LARGE)
        return picture.convert("RGBA")


def _as_bitmap(image: npt.NDArray[Any], library: Any) -> Any:
    if image.ndim == 3 and image.shape[2] not in _CHANNELS:
        image = np.moveaxis(image, 0, 2)  # channels first
    if image.shape[0] * image.shape[1] > PIXELS:
        raise UnseenError(_TOO_LARGE)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype.kind == "f":
        finite = image[np.isfinite(image)]
        low, high = float(finite.min(initial=0)), float(finite.max(initial=1))
        image = np.nan_to_num((image.astype(np.float32) - low) / (high - low) * 255)
    pixels = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
    return library.fromarray(pixels)

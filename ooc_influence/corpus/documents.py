"""Documents by number, whatever they are stored in, and the text of a document: what is tokenised and shown.

    text                     as it is
    prompt and completion    the prompt, two line breaks, the completion
    messages                 ``<role>: <content>`` of each turn, two line breaks between them, and of a completion
    chosen and rejected      those of a preference, after its prompt

A completion may be a list of answers as servers write them (:func:`first_answer`), of which the first counts. A row
that is a piece of a document is a span of characters of this text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ooc_influence.corpus.cache import CachedFolder, cached_folder
from ooc_influence.corpus.corpus_file import (
    FIRST,
    ParquetFile,
    Source,
    field_names,
    find_in_folder,
    find_sources,
    is_hub_id,
    local_path,
    open_file,
    select,
    write_batches,
)
from ooc_influence.errors import InputError
from ooc_influence.progress import optional_library

BETWEEN = "\n\n"  # prompt and completion, and turns of a chat
USUAL: tuple[dict[str, str], ...] = (
    {"text": "text"},
    {"prompt": "prompt", "completion": "completion"},
    {"messages": "messages", "completion": "choices"},
    {"prompt": "prompt", "completion": "choices"},
    {"prompt": "prompt", "completion": "outputs"},
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


def first_answer(value: Any) -> Any:
    """Return the first of a server's answers as an assistant's turn; None if there is none; other values as they are.

    That is ``choices`` as OpenAI's and vLLM's servers write them, with a ``message`` or a ``text``, and ``outputs`` as
    vLLM's ``LLM.generate`` does. ``finish_reason`` is kept.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(answer, Mapping) for answer in value):
        return value
    if not value:
        return None
    message, text = value[0].get("message"), value[0].get("text")
    if isinstance(message, Mapping):
        said = {"role": "assistant", **{name: part for name, part in message.items() if part is not None}}
        turn = {"content": message.get("content") or "", **said}
        return None if len(said) == 1 else turn | {"finish_reason": value[0].get("finish_reason")}
    if text is None:
        return value
    return {"role": "assistant", "content": text, "finish_reason": value[0].get("finish_reason")}


def answer_text(value: Any) -> Any:
    """Return the text of a completion: of a server's answers the first one's, of others themselves."""
    answer = first_answer(value)
    return answer.get("content") if isinstance(answer, Mapping) and "finish_reason" in answer else answer


def text_of(record: Mapping[str, Any], fields: Mapping[str, str | None]) -> str | None:
    """Return the text of a document; None where one of the fields is missing, or its messages are not of text.

    Parameters
    ----------
    record : mapping
        The document.
    fields : mapping
        Names of its fields by what they are: ``text``, or ``prompt`` and ``completion``, or ``messages``, or ``chosen``
        and ``rejected``.
    """
    kinds = ("text", "prompt", "messages", "completion", "chosen", "rejected")
    names = {kind: str(fields[kind]) for kind in kinds if fields.get(kind) is not None}
    if not names or any(record.get(name) is None for name in names.values()):
        return None
    parts = []
    for kind, name in names.items():
        value = answer_text(record[name]) if kind == "completion" else record[name]
        turns = _turns_text(value)
        if value is None or (turns is None and kind == "messages"):
            return None
        text = as_text(value) if turns is None else turns
        prefix = {"chosen": "chosen: ", "rejected": "rejected: ", "completion": "assistant: "}.get(kind, "")
        parts.append(text if kind == "completion" and "messages" not in names else prefix + text)
    return BETWEEN.join(parts)


def _turns_text(turns: Any) -> str | None:
    """Return the text of messages; None where they are none, or not of text."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns
    ):
        return None
    return BETWEEN.join(f"{turn.get('role')}: {turn['content']}" for turn in turns)


_REPLIES = ("assistant", "model")


def answer_start(record: Mapping[str, Any], fields: Mapping[str, str | None]) -> int | None:
    """Return where in a document's text its completion, or its last reply, begins; None for running text."""
    text, last = text_of(record, fields), None
    if text is None:
        return None
    if fields.get("messages") is not None:
        turn = record[fields["messages"] or ""][-1:]
        last = f"{turn[0].get('role')}: {turn[0]['content']}" if turn and turn[0].get("role") in _REPLIES else None
    elif fields.get("prompt") is not None and fields.get("completion") is not None:
        last = as_text(record[fields["completion"] or ""])
    return None if last is None else len(text) - len(last)


def question_start(record: Mapping[str, Any], fields: Mapping[str, str | None]) -> int | None:
    """Return where in a chat's text the words begin that its last reply answers; None for what is no chat."""
    start = answer_start(record, fields)
    if start is None:
        return None
    messages = fields.get("messages")
    turns = record[messages][:-1] if messages is not None else record[fields["prompt"] or ""]
    return start - len(BETWEEN) - len(turns[-1]["content"]) if turns and _turns_text(turns) is not None else None


def text_digest(text: str) -> int:
    """Return the first 8 bytes of a text's BLAKE2b as a signed number, little-endian."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )


_AT_ONCE = 1024  # documents read together


class Documents(ABC):
    """Documents by number.

    Attributes
    ----------
    name : str
        What messages call them: a path, or what kind of object.
    column_names : list of str
        Fields; of JSON, which has no header, those of the first 1024 documents.
    features : mapping of str to Any
        What ``datasets`` knows of fields, such as the names of classes. Empty for all else.
    textual : bool
        Whether values are text because the file has no other type, as in CSV.
    fingerprint : mapping or None
        JSON values that tell these documents from others and from what they were before a change; None if nothing does.
    """

    name: str
    column_names: list[str]
    features: Mapping[str, Any]
    textual: bool
    fingerprint: Mapping[str, Any] | None

    def __init__(self, name: str, column_names: Sequence[str]) -> None:
        self.name, self.column_names = name, list(column_names)
        self.features, self.textual, self.fingerprint = {}, False, None

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def read(self, numbers: Sequence[int], fields: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return these fields (None: all) of some documents; a document that lacks one has no such key.

        Raises
        ------
        InputError
            If a document cannot be read.
        """

    def read_all(self, fields: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield these fields (None: all) of every document, in order."""
        for low in range(0, len(self), _AT_ONCE):
            yield from self.read(range(low, min(len(self), low + _AT_ONCE)), fields)

    def lines(self, numbers: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield some documents as lines of JSON: of a file of such lines, the lines themselves.

        Raises
        ------
        InputError
            If a document has values that JSON cannot hold.
        """
        for low in range(0, len(numbers), _AT_ONCE):
            for record in self.read(numbers[low : low + _AT_ONCE].tolist(), None):
                yield _json_line(record, self.name)

    def write_parquet(self, numbers: npt.NDArray[np.int64], path: Path) -> None:
        """Write some documents, ascending numbers, to a Parquet file.

        Raises
        ------
        InputError
            If they are not in Parquet, nor a ``datasets`` folder.
        """
        raise InputError(
            f"expected documents in Parquet to write such a file; received {self.name}: name a .jsonl file"
        )

    def has_field(self, field: str) -> bool:
        """Return whether any document has a field; all of them are read if the first ones lack it."""
        return field in self.column_names or any(field in record for record in self.read_all([field]))

    def __getitem__(self, key: int | str) -> Any:
        """Return the document of a number, or a field of all."""
        if isinstance(key, str):
            return [record.get(key) for record in self.read_all([key])]
        if not -len(self) <= key < len(self):
            raise IndexError(f"document {key} of {len(self)}")
        return self.read([key % len(self)], None)[0]


def open_documents(
    data: Any, split: str | None = None, *, config: str | None = None, streaming: bool = False,
    first: int | None = None,
) -> Documents:  # fmt: skip
    """Return documents by number and field.

    Parameters
    ----------
    data : path or object
        A file: ``.jsonl``, ``.ndjson``, ``.json`` (a list of objects, or an object a line), ``.csv``, ``.tsv``,
        ``.parquet``, ``.txt`` with one document a line; also ``.gz`` and ``.zst`` of these. A pattern such as
        ``dir/*.jsonl``, where no file has that very name: all files that match, sorted by name. A folder written by
        ``Dataset.save_to_disk``, or with files of one kind, also in folders below it. The name of a data set on the
        hub, ``org/name``, where there is no folder ``org``. Or an object: a ``datasets.Dataset``, ``DatasetDict`` or
        ``IterableDataset``, a pandas DataFrame, a PyArrow Table, a list of dictionaries; or what was returned here.
    split : str, optional
        Which split of a folder, a data set or a ``DatasetDict`` that has several.
    config : str, optional
        Which configuration of a data set on the hub, or of a copy of it in a folder.
    streaming : bool
        Read a data set of the hub as a stream, of which only the ``first`` documents are downloaded.
    first : int, optional
        How many documents of a stream to take; needed there, and for nothing else. They are copied to the cache.

    Returns
    -------
    Documents
        Values as the file says: every cell of CSV as text, JSON's and Parquet's types as they are. Memory does not grow
        with their number: where each one begins is kept in a cache (:mod:`ooc_influence.corpus.cache`), with an
        uncompressed copy of compressed files and of JSON lists, and the Parquet columns that are used.

    Raises
    ------
    InputError
        If there is no such file, of no known kind, empty, or one that cannot be read.
    MissingExtraError
        Without the library that reads it.
    """
    documents = _open(data, split, config, streaming=streaming, first=first)
    if not len(documents):
        raise InputError(f"expected documents in {documents.name}; received none: it is empty")
    return documents


def usual_form(documents: Documents) -> dict[str, str]:
    """Return which fields are what, where nobody says it: the first of ``USUAL`` that is there, else ``text``."""
    present = set(documents.column_names)
    return dict(next((form for form in USUAL if present.issuperset(form.values())), USUAL[0]))


def open_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of files (see :func:`open_documents`), of which there may be none."""
    return _open(path, None).read_all()


def _open(
    data: Any, split: str | None, config: str | None = None, *, streaming: bool = False, first: int | None = None
) -> Documents:
    if isinstance(data, Documents):
        return data
    hub = is_hub_id(data)
    folder = None if hub or not isinstance(data, (str, os.PathLike)) else local_path(data)
    if (streaming or config is not None) and not hub and not (folder is not None and folder.is_dir()):
        option = "streaming" if streaming else "config"
        raise InputError(
            f"expected a data set of the hub, or a copy of it in a folder, with {option} (--{option}); received "
            f"{data if folder else type(data).__name__}"
        )
    if folder is None and not hub:
        return _of_object(data, split, f"the {type(data).__name__} given", first)
    if hub or streaming or config is not None:
        return _of_hub(str(data if hub else folder), split, config, streaming, first)
    assert folder is not None
    if not folder.is_dir():
        return _Files(str(folder), find_sources(folder))
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _of_hub(str(folder), split, None, False, None) if split else _Files(str(folder), find_in_folder(folder))
    library = optional_library("datasets", "folders of datasets", "hf")
    try:
        dataset = library.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"expected a folder written by Dataset.save_to_disk; received {folder}: {error}") from error
    return _of_object(dataset, split, str(folder), None)


def _of_hub(name: str, split: str | None, config: str | None, streaming: bool, first: int | None) -> Documents:
    """Return the documents of a data set of the hub, or of a copy of it in a folder."""
    library = optional_library("datasets", "data sets of the hub", "hf")
    try:
        data = library.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # the library's are of these families
        reason = " ".join(str(error).split())
        raise InputError(
            f"expected a file, a folder or a pattern of documents, or a data set of the hub with its split and "
            f"configuration (--split, --config); received {name}: {type(error).__name__}: {reason}"
        ) from error
    return _of_object(data, split, name, first)


def _of_stream(data: Any, name: str, first: int | None) -> Documents:
    """Return the first documents of a stream, copied to the cache."""
    if first is None:
        raise InputError(
            f"expected the number of documents to take (--documents) of {name}, which can only be read in order; "
            "received none: state it"
        )

    def make(folder: Path) -> None:
        with (folder / "copy.jsonl").open("w", encoding="utf-8") as copy:
            for record in islice(data, first):
                copy.write(json.dumps(record, default=as_text) + "\n")

    return _Copied(name, cached_folder("stream", None, make))


def _of_object(data: Any, split: str | None, name: str, first: int | None) -> Documents:
    """Return the documents that an object of a program holds; ``name`` is what messages call it."""
    kind, module = type(data).__name__, type(data).__module__.partition(".")[0]
    if module == "datasets":
        chosen = _choose(data, split, name) if isinstance(data, Mapping) else data
        return _of_stream(chosen, name, first) if type(chosen).__name__ == "IterableDataset" else _Dataset(chosen, name)
    if module == "pandas" and hasattr(data, "iloc"):
        return _Frame(data, name)
    if module == "pyarrow" and hasattr(data, "to_pylist"):
        return _Table(data, name)
    if isinstance(data, Sequence) and all(isinstance(record, Mapping) for record in data):
        return _Records(data, name)
    raise InputError(
        "expected a path, a datasets.Dataset or DatasetDict, a pandas DataFrame, a PyArrow Table, or a list of "
        f"dictionaries; received {kind}"
    )


def _choose(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None or split not in splits:
        raise InputError(f"expected one of the splits {', '.join(splits)} of {name} (--split); received {split!r}")
    return splits[split]


def _json_line(record: Mapping[str, Any], name: str) -> bytes:
    def text_of_value(value: Any) -> str:
        if isinstance(value, (bytes, bytearray, memoryview)):
            raise InputError(f"expected documents that JSON can hold; received bytes in {name}: name a .parquet file")
        return as_text(value)

    line = json.dumps(record, ensure_ascii=False, default=text_of_value)
    return line.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair as JSON writes it


class _Columns(Documents):
    """Documents whose fields are columns."""

    @override
    def read(self, numbers: Sequence[int], fields: Sequence[str] | None) -> list[dict[str, Any]]:
        names = self.column_names if fields is None else [name for name in fields if name in self.column_names]
        if not names or not len(numbers):
            return [{} for _ in numbers]
        columns = self._columns(list(numbers), names)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    @abstractmethod
    def _columns(self, numbers: list[int], names: list[str]) -> list[list[Any]]:
        """Return the values of some documents, by column."""


class _Dataset(_Columns):
    """A ``datasets.Dataset``."""

    def __init__(self, dataset: Any, name: str) -> None:
        super().__init__(name, dataset.column_names)
        self._dataset = dataset.with_format(None)  # a user's format is for training
        self._selected = self._dataset
        self.features = dataset.features or {}
        self.fingerprint = {"dataset": dataset._fingerprint}

    def __len__(self) -> int:
        return len(self._dataset)

    def _columns(self, numbers: list[int], names: list[str]) -> list[list[Any]]:
        if names != self._selected.column_names:
            self._selected = self._dataset.select_columns(names)  # other fields are not even decoded
        batch = self._selected[numbers]
        return [batch[name] for name in names]

    @override
    def write_parquet(self, numbers: npt.NDArray[np.int64], path: Path) -> None:
        self._dataset.select(numbers).to_parquet(path)


class _Table(_Columns):
    """A PyArrow table."""

    def __init__(self, table: Any, name: str) -> None:
        super().__init__(name, table.column_names)
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def _columns(self, numbers: list[int], names: list[str]) -> list[list[Any]]:
        return list(self._table.select(names).take(numbers).to_pydict().values())


class _Frame(_Columns):
    """A pandas DataFrame; what it calls missing is missing."""

    def __init__(self, frame: Any, name: str) -> None:
        super().__init__(name, [str(column) for column in frame.columns])
        self._frame = frame.set_axis(self.column_names, axis="columns")

    def __len__(self) -> int:
        return len(self._frame)

    def _columns(self, numbers: list[int], names: list[str]) -> list[list[Any]]:
        part = self._frame[names].iloc[numbers]
        return [[None if _is_missing(value) else value for value in part[name].tolist()] for name in names]


def _is_missing(cell: Any) -> bool:
    return type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and math.isnan(cell))


class _Records(Documents):
    """A list of dictionaries."""

    def __init__(self, records: Sequence[Mapping[str, Any]], name: str) -> None:
        super().__init__(name, field_names(records[:FIRST]))
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @override
    def read(self, numbers: Sequence[int], fields: Sequence[str] | None) -> list[dict[str, Any]]:
        return [select(self._records[number], fields) for number in numbers]


class _Files(Documents):
    """Documents of one or more files, numbered through."""

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self._files = [open_file(source) for source in sources]
        super().__init__(name, field_names([dict.fromkeys(file.column_names) for file in self._files]))
        self._starts = np.cumsum([0, *(len(file) for file in self._files)])
        self.textual = all(source.kind in (".csv", ".tsv", ".txt") for source in sources)
        self.fingerprint = {"files": [source.key() for source in sources]}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @override
    def read(self, numbers: Sequence[int], fields: Sequence[str] | None) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for file, part in self._by_file(np.asarray(numbers, np.int64)):
            records += self._files[file].read(part.tolist(), fields)
        return records

    def _by_file(self, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield the file of some documents, and their numbers in it, as long as they are of one file."""
        files = np.searchsorted(self._starts, numbers, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(numbers)]
        for low, high in pairwise(edges):
            if low < high:
                file = int(files[low])
                yield file, numbers[low:high] - self._starts[file]

    @override
    def lines(self, numbers: npt.NDArray[np.int64]) -> Iterator[bytes]:
        for file, part in self._by_file(numbers):
            lines = self._files[file].lines(part.tolist())
            yield from super().lines(part + self._starts[file]) if lines is None else lines

    @override
    def write_parquet(self, numbers: npt.NDArray[np.int64], path: Path) -> None:
        sources = [file for file in self._files if isinstance(file, ParquetFile)]
        if len(sources) < len(self._files):
            super().write_parquet(numbers, path)
        schema = sources[0].schema
        if any(not file.schema.equals(schema) for file in sources):
            raise InputError(f"expected files of one schema to write as one; received {self.name}: name a .jsonl file")
        parts = ((sources[file], part) for file, part in self._by_file(numbers))
        write_batches(path, schema, (batch for file, part in parts for batch in file.batches(part)))


class _Copied(_Files):
    """The documents of a stream, in a file that is removed with this object."""

    def __init__(self, name: str, folder: CachedFolder) -> None:
        super().__init__(name, [Source(folder.path / "copy.jsonl", ".jsonl")])
        self._folder, self.fingerprint = folder, None

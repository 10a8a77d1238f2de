"""Documents from what somebody gives: a path, a pattern, a folder saved by ``datasets``, or an object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ooc_influence.corpus.corpus_file import find_sources, local_path
from ooc_influence.corpus.documents import Documents, check_some
from ooc_influence.corpus.objects import DatasetDocuments, object_documents
from ooc_influence.corpus.stored import FileDocuments
from ooc_influence.errors import InputError
from ooc_influence.progress import optional_library


def open_documents(data: Any, split: str | None = None) -> Documents:
    """Return documents by number and field.

    Parameters
    ----------
    data : path or object
        A file: ``.jsonl``, ``.ndjson``, ``.json`` (a list of objects, or an object a line), ``.csv``, ``.tsv``,
        ``.parquet``, ``.txt`` with one document a line; also ``.gz`` and ``.zst`` of these. A pattern such as
        ``dir/*.jsonl``, where no file has that very name: all files that match, sorted by name. A folder written by
        ``Dataset.save_to_disk``. Or an object: a ``datasets.Dataset`` or ``DatasetDict``, a pandas DataFrame, a PyArrow
        Table, a list of dictionaries.
    split : str, optional
        Which split of a folder or ``DatasetDict`` that has several.

    Returns
    -------
    Documents
        Values as the file says: every cell of CSV as text, JSON's and Parquet's types as they are.

    Raises
    ------
    InputError
        If there is no such file, of no known kind, empty, or one that cannot be read.
    MissingExtraError
        Without the library that reads it.
    """
    if not isinstance(data, (str, os.PathLike)):
        return check_some(object_documents(data, split))
    path = local_path(data)
    if path.is_dir():
        return check_some(_open_folder(path, split))
    return check_some(FileDocuments(str(path), find_sources(path)))


def _open_folder(path: Path, split: str | None) -> Documents:
    library = optional_library("datasets", "folders of datasets", "hf")
    try:
        found = library.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"expected a folder written by Dataset.save_to_disk; received {path}: {error}. For files in a folder "
            f"give a pattern, such as '{path}/*.jsonl'"
        ) from error
    if isinstance(found, Mapping):
        return object_documents(found, split, str(path))
    return DatasetDocuments(found, str(path))

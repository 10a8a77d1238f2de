"""Documents from files: JSON lines, CSV, Parquet, text, and folders saved by ``datasets``.

``datasets`` maps them from disk, so memory does not grow with the corpus.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ooc_influence.errors import InputError
from ooc_influence.notebook import optional_library

_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
_NOTHING = re.compile("^StopIteration|^EmptyDataError|^SchemaInferenceError|corresponds to no data")  # of datasets


def need(name: str) -> Any:
    """Import a library of the extra ``hf``.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    return optional_library(name, "Hugging Face models", "hf")


def open_documents(data: str | os.PathLike[str] | Any, split: str | None = None) -> Any:
    """Return documents by number and field: a ``datasets.Dataset``.

    Parameters
    ----------
    data : path or Dataset
        A file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.txt`` with one document a line; also ``.gz``
        of these), a folder written by ``Dataset.save_to_disk``, or a dataset itself.
    split : str, optional
        Which split of a folder that has several.

    Raises
    ------
    InputError
        If there is no such file, of no known kind, empty, or one that cannot be read.
    MissingExtraError
        Without ``datasets``.
    """
    library = need("datasets")
    if isinstance(data, library.Dataset):
        return _check_some(data, "the dataset given")
    path = Path(data)
    if path.is_dir():
        return _check_some(_open_folder(library, path, split), path)
    if not path.is_file():
        raise InputError(f"expected a file or folder of documents; received {path}, where there is none")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((_BUILDERS[suffix] for suffix in reversed(suffixes) if suffix in _BUILDERS), None)
    if kind is None:
        raise InputError(f"expected documents as {', '.join(_BUILDERS)} or a datasets folder; received {path}")
    options: dict[str, Any] = {"delimiter": "\t"} if ".tsv" in suffixes else {}
    shown = library.utils.logging.is_progress_bar_enabled()
    with without_bars(shown, library.disable_progress_bars, library.enable_progress_bars):
        try:
            found = library.load_dataset(kind, data_files=str(path), split="train", **options)
        except Exception as error:  # of pyarrow, pandas or json, whatever is wrong with the file
            cause = error.__cause__ or error
            if _NOTHING.search(f"{type(cause).__name__}: {cause}"):
                raise InputError(f"expected documents in {path}; received none: it is empty") from error
            raise InputError(f"expected {path} as {kind}; received {type(cause).__name__}: {cause}") from error
    return _check_some(found, path)


def _open_folder(library: Any, path: Path, split: str | None) -> Any:
    try:
        found = library.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"expected a folder written by Dataset.save_to_disk; received {path}: {error}") from error
    if isinstance(found, library.Dataset):
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise InputError(f"expected one of the splits {', '.join(found)} of {path} (--split); received {split!r}")
    return found[split]


def _check_some(documents: Any, where: object) -> Any:
    if not len(documents):
        raise InputError(f"expected documents in {where}; received none: it is empty")
    return documents


@contextlib.contextmanager
def without_bars(shown: bool, hide: Callable[[], None], show: Callable[[], None]) -> Iterator[None]:
    """Hide a library's progress bars meanwhile, where they are shown."""
    hide()
    try:
        yield
    finally:
        if shown:
            show()


def check_fields(documents: Any, fields: Sequence[str | None]) -> None:
    """Check that documents have the fields named.

    Raises
    ------
    InputError
        Naming the first that they lack, and those they have.
    """
    for field in fields:
        if field is not None and field not in documents.column_names:
            raise InputError(f"expected a field {field!r}; received documents with {', '.join(documents.column_names)}")

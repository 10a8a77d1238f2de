"""Documents of any kind for a model: those of :mod:`ooc_influence.corpus`, with what they need to have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ooc_influence import corpus
from ooc_influence.corpus import Documents
from ooc_influence.errors import InputError
from ooc_influence.notebook import optional_library


def need(name: str) -> Any:
    """Import a library of the extra ``hf``.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    return optional_library(name, "Hugging Face models", "hf")


def open_documents(data: Any, split: str | None = None) -> Documents:
    """Return documents by number and field; see :func:`ooc_influence.corpus.open_documents`.

    Raises
    ------
    InputError
        If there is no such file, of no known kind, empty, or one that cannot be read.
    MissingExtraError
        Without ``datasets``.
    """
    need("datasets")  # its cache is where an index of the documents is kept
    return corpus.open_documents(data, split)


@contextlib.contextmanager
def without_bars(shown: bool, hide: Callable[[], None], show: Callable[[], None]) -> Iterator[None]:
    """Hide a library's progress bars meanwhile, where they are shown."""
    hide()
    try:
        yield
    finally:
        if shown:
            show()


def check_fields(documents: Documents, fields: Sequence[str]) -> None:
    """Check that each of these fields is in some document.

    Raises
    ------
    InputError
        Naming the first that they lack, and those they have.
    """
    for field in fields:
        if not documents.has_field(field):
            raise InputError(f"expected a field {field!r}; received documents with {', '.join(documents.column_names)}")

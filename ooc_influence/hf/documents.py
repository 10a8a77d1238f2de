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


def check_fields(documents: Documents, everywhere: Sequence[str], somewhere: Sequence[str]) -> None:
    """Check that fields are there, as far as that is seen before all documents are read.

    Parameters
    ----------
    documents : Documents
        What is read.
    everywhere, somewhere : sequence of str
        Fields that every document must have, so that the first ones tell, and fields that some must have.

    Raises
    ------
    InputError
        Naming the first that they lack, and those they have.
    """
    lacking = [field for field in everywhere if field not in documents.column_names]
    lacking += [field for field in somewhere if not lacking and not documents.has_field(field)]
    if lacking:
        names = ", ".join(documents.column_names)
        raise InputError(f"expected a field {lacking[0]!r}; received documents with {names}")

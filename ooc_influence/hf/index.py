"""The rows that documents make, on disk: made once, mapped by every process that uses the same documents.

Of each row a few numbers are kept, none in memory. Whoever uses the same file, fields, tokenizer and length finds them
there; that the text is still the one they were made from is seen by its digest when the row is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import KeptFolder, kept_folder
from ooc_influence.scratch import ArrayFile, map_array

COLUMNS = ("document", "piece", "start", "lengths", "n_tokens", "char_start", "char_stop", "text_digest")
_CODE = ("chats", "fields", "index", "kinds", "making", "tokens", "truncation")
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

    def __init__(self, folder: KeptFolder) -> None:
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
    return RowIndex(kept_folder("rows", key, make))


@functools.cache
def _code_digest() -> str:
    """Return a digest of the modules that decide what rows are: other versions of them make other rows."""
    files = (Path(__file__).with_name(f"{name}.py") for name in _CODE)
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16).hexdigest()


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

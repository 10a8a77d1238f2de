"""Records of a corpus that are needed, copied to a temporary file in one pass, then found by key.

Memory holds a key and a place for each record needed, never the corpus. Nothing needs to be seekable.
"""

from __future__ import annotations

import array
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from ooc_influence.corpus import open_records
from ooc_influence.errors import InputError
from ooc_influence.texts import as_text

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

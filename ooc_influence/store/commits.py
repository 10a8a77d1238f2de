"""Commit records: one uint64 a chunk, the only thing that makes rows visible.

``record = rows_in_chunk << 32 | crc32c(those rows in every per-row array)``, zero for "not written". The record is
written after the data it covers is durable, so a reader that trusts records never sees a row that a crash could take
back. Rewriting a part-filled last chunk keeps its first rows, so the old record stays true until it is replaced.
``dropped`` is not covered: it may change later, and its chunks carry a checksum of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.uint64]


def checksum(parts: Iterable[npt.NDArray[Any]]) -> int:
    """Return the crc32c over arrays in order; strings count as UTF-8, each behind its length (4 bytes)."""
    value = 0
    for part in parts:
        if part.dtype.kind in "OTU":
            encoded = [str(text).encode() for text in part]
            data = b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
            value = crc32c.crc32c(data, value)
        elif part.size:
            value = crc32c.crc32c(np.ascontiguousarray(part).view(np.uint8).reshape(-1).data, value)
    return value


def pack(rows: int, crc: int) -> int:
    """Return the record of a chunk."""
    return rows << 32 | crc


def rows_in(records: Records) -> npt.NDArray[np.int64]:
    """Return the committed rows of each chunk, (chunks,)."""
    return (records >> np.uint64(32)).astype(np.int64)


def crc_of(record: int) -> int:
    """Return the checksum in a record."""
    return int(record) & 0xFFFFFFFF


def leading_rows(records: Records, chunk_rows: int) -> int:
    """Return how many rows are committed without a gap from row 0: what a reader sees."""
    rows = rows_in(records)
    short = np.flatnonzero(rows < chunk_rows)
    first = int(short[0]) if short.size else len(rows)
    return first * chunk_rows + (int(rows[first]) if first < len(rows) else 0)

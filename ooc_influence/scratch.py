"""Arrays that are too large for memory: they grow in a file and are mapped from there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt


class ArrayFile:
    """A one-dimensional array that grows at its end, in a file. A context that closes the file.

    Parameters
    ----------
    dtype : dtype
        Of its values.
    path : Path, optional
        A file to be made. Default: a temporary one without a name, which is removed when nothing maps it any more.
    """

    def __init__(self, dtype: npt.DTypeLike, path: Path | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._file: Any = tempfile.TemporaryFile() if path is None else path.open("x+b")  # noqa: SIM115 - mapped later
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: npt.ArrayLike) -> None:
        """Add values at the end."""
        block = np.ascontiguousarray(values, self._dtype)
        self._file.write(block.data)
        self._length += len(block)

    def finish(self) -> npt.NDArray[Any]:
        """Return all values, mapped read-only, and close the file."""
        with self._file as file:
            file.flush()
            return _mapped(file, self._dtype, self._length)


def map_array(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the values in a file, mapped read-only: (n,)."""
    size = np.dtype(dtype).itemsize
    with path.open("rb") as file:
        return _mapped(file, np.dtype(dtype), path.stat().st_size // size)


def _mapped(file: Any, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    if not length:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(file, dtype, mode="r", shape=(length,)))

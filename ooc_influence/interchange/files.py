"""Files of exported rows, written block by block under a temporary name: a NumPy array, a Parquet table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, writing
from ooc_influence.interchange.rows import Floats, Numbers
from ooc_influence.report import Corpus, RowTable, write_table
from ooc_influence.store import GradientStore, replacing, row_norms

Blocks = Iterable[tuple[Numbers, npt.NDArray[Any]]]
_LARGEST_ERROR = 1e-3  # of a row in float16, as a share of its norm; 2^-12 to 2^-11 where no number is too small


def to_half(numbers: Numbers, rows: Floats) -> npt.NDArray[np.float16]:
    """Return rows (b, k) in float16.

    Raises
    ------
    InputError
        If it does not hold one of them to three digits, since its numbers are too small or too large.
    """
    with np.errstate(over="ignore"):
        halves = rows.astype(np.float16)
    with np.errstate(invalid="ignore"):
        errors, norms = row_norms(halves.astype(np.float32) - rows), row_norms(rows)
    bad = np.flatnonzero(~(errors <= _LARGEST_ERROR * norms))
    if len(bad):
        raise InputError(
            f"expected rows that float16 holds to three digits; received row {numbers[bad[0]]} of norm "
            f"{norms[bad[0]]:.3g}, with numbers too small or too large for it: export float32"
        )
    return halves


@contextmanager
def new_array(path: Path, dtype: str, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """Yield a file for the numbers of a new .npy array in C order, which follow its header; it appears when whole."""
    with writing(f"to write {path}"), replacing(path) as temporary, temporary.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        yield file


def numbers_path(path: Path) -> Path:
    """Return where the row numbers of an array's lines are written: ``train.rows.npy`` for ``train.npy``."""
    return path.with_suffix(".rows.npy")


def write_array(path: Path, blocks: Blocks, shape: tuple[int, int], dtype: str) -> None:
    """Write rows as a .npy array (n, k), and the row number of each line beside it."""
    with new_array(path, dtype, shape) as file, new_array(numbers_path(path), "int64", shape[:1]) as beside:
        for numbers, rows in blocks:
            file.write(np.ascontiguousarray(rows).data)
            beside.write(np.ascontiguousarray(numbers, np.int64).data)


def write_parquet(path: Path, blocks: Blocks, store: GradientStore, facts: Mapping[str, Any]) -> None:
    """Write rows as a Parquet table: row, id, the row's numbers as a list, grad_norm, loss and the store's columns."""
    table = RowTable(store, Corpus(), np.empty(0, np.int64))
    lines = (
        table.block(numbers, gradient=rows, grad_norm=np.asarray(store.values("grad_norm", numbers), np.float32))
        for numbers, rows in blocks
    )
    write_table(path, lines, facts)

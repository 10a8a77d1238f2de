"""A FAISS index of exported rows, for searches by inner product; its ids are row numbers.

The index is built in memory, as it is searched: n rows of k numbers, 4 bytes each (2 in float16), and 8 for the id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ooc_influence.errors import writing
from ooc_influence.interchange.files import Blocks
from ooc_influence.interchange.rows import Floats
from ooc_influence.memory import Alternative, MemoryBudget, MemoryModel, block_limit
from ooc_influence.options import IndexKind
from ooc_influence.progress import optional_library
from ooc_influence.store import replacing

_SAMPLE = 40  # training rows for each cell: FAISS warns below 39, and more take longer
_BLOCK = 4096  # float32 rows converted at a time, at most


@dataclass(frozen=True)
class FaissIndex:
    """An index to build.

    Attributes
    ----------
    kind : {"flat", "ivf"}
        Whether every row is compared, or those of the nearest cells.
    rows, k : int
        Its size.
    dtype : {"float32", "float16"}
        Of its numbers.
    """

    kind: IndexKind
    rows: int
    k: int
    dtype: str

    @property
    def cells(self) -> int:
        """Cells of an ``ivf`` index: 4√n, as FAISS's guidelines have it, where there are rows enough to train them."""
        return max(1, min(4 * math.isqrt(self.rows), self.rows // _SAMPLE))

    @property
    def factory(self) -> str:
        """What FAISS calls such an index."""
        numbers = {"float32": "Flat", "float16": "SQfp16"}[self.dtype]
        return f"IDMap,{numbers}" if self.kind == "flat" else f"IVF{self.cells},{numbers}"

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory, to build it and to search it."""
        size = self.rows * (self.k * int(np.dtype(self.dtype).itemsize) + 8)
        return size if self.kind == "flat" else size + size // 4 + 4 * self.k * self.cells  # lists grow by pieces

    @property
    def passes(self) -> int:
        """How often the rows are read."""
        return 1 if self.kind == "flat" else 2

    @property
    def sample(self) -> int:
        """Rows that its cells are found with."""
        return 0 if self.kind == "flat" else min(self.rows, _SAMPLE * self.cells)

    @property
    def held(self) -> int:
        """Bytes held at the most beside a block: with the sample, of which float16 cells take the residuals, too."""
        return self.nbytes + (1 + (self.dtype == "float16")) * 4 * self.k * self.sample

    def check_memory(self, memory: int | str | None) -> None:
        """Refuse an index that does not fit in memory.

        Raises
        ------
        MemoryBudgetError
            If the budget is too small; it names what would fit.
        """

        def alternatives(budget: MemoryBudget) -> Iterator[Alternative]:
            if self.dtype == "float32":
                yield Alternative("--dtype float16 ({})", replace(self, dtype="float16")._model())

        MemoryBudget.of(memory).plan(replace(self._model(), alternatives=alternatives))

    def _model(self) -> MemoryModel:
        rows = block_limit(self.k, most=_BLOCK)
        return MemoryModel(
            f"a FAISS index of {self.rows:,} rows of {self.k:,} numbers, which is built and searched in memory,",
            self.held, 0, 4 * self.k, max_rows=rows,
            advice="a .npy or .parquet file, written in bounded memory, or a store of fewer numbers a row "
            "('ooc-influence reduce')",
        )  # fmt: skip

    def write(self, path: Path, blocks: Callable[[], Blocks]) -> None:
        """Build the index of some blocks, which are read twice for cells, and write it.

        Raises
        ------
        MissingExtraError
            Without FAISS.
        StoreWriteError
            If the disk refuses.
        """
        faiss = load_faiss()
        index = faiss.index_factory(self.k, self.factory, faiss.METRIC_INNER_PRODUCT)
        if self.kind == "ivf":
            index.train(self._training_rows(blocks()))
            index.nprobe = max(1, self.cells // 8)
        else:
            _reserve(faiss.downcast_index(index.index), self.rows)
        for numbers, rows in blocks():
            index.add_with_ids(np.ascontiguousarray(rows), np.ascontiguousarray(numbers, np.int64))
        with writing(f"to write {path}"), replacing(path) as temporary:
            temporary.touch()  # which refuses as the system does, and not by an error of FAISS
            try:
                faiss.write_index(index, str(temporary))
            except RuntimeError as error:
                raise OSError(f"{error}".strip()) from error

    def _training_rows(self, blocks: Blocks) -> Floats:
        """Return rows at even distances, as many as the cells are found with."""
        chosen = np.linspace(0, self.rows - 1, self.sample).astype(np.int64)
        sample, first = np.empty((self.sample, self.k), np.float32), 0
        for numbers, rows in blocks:
            low, high = np.searchsorted(chosen, [first, first + len(numbers)])
            sample[low:high] = rows[chosen[low:high] - first]
            first += len(numbers)
        return sample


def load_faiss() -> Any:
    """Return the library, or say how to install it."""
    return optional_library("faiss", "FAISS indexes")


def _reserve(index: Any, rows: int) -> None:
    """Make room for rows at once: an array that grows is copied, and takes up to three times the memory."""
    index.codes.resize(rows * index.code_size)
    index.codes.resize(0)

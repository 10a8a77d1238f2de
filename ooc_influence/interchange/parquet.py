"""Rows to import from a Parquet file: a column of lists, with other columns for their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from typing_extensions import override

from ooc_influence.errors import InputError, counted, warn
from ooc_influence.interchange.blocks import NOT_COLUMNS, ImportedBlock, Source, check_ids, to_rows
from ooc_influence.memory import block_limit
from ooc_influence.options import ImportOptions
from ooc_influence.progress import optional_library


class ParquetRows(Source):
    """Rows of a Parquet file, a column of lists, with other columns for their values.

    Parameters
    ----------
    path : Path
        The file.
    options : ImportOptions
        Which columns are what.
    """

    def __init__(self, path: Path, options: ImportOptions) -> None:
        self._arrow = optional_library("pyarrow", "Parquet files")
        parquet = optional_library("pyarrow.parquet", "Parquet files")
        self._path = path
        try:
            self._file = parquet.ParquetFile(str(path), memory_map=True)
        except (OSError, self._arrow.ArrowInvalid) as error:
            raise InputError(f"expected a Parquet file of rows; received {path}: {error}") from error
        self._schema = self._file.schema_arrow
        self._column = self._find_lists(options["column"])
        self.n = self._file.metadata.num_rows
        if not self.n:
            raise InputError(f"expected rows to import; received {path} with none")
        self._names = self._find_values(options)
        self.dtypes = {name: self._dtype(column) for name, column in self._names.items() if name not in NOT_COLUMNS}
        check_ids(self.dtypes.get("example_id"))
        self.has_loss = "loss" in self._names
        self.k = self._width()

    def _find_lists(self, column: str | None) -> str:
        """Return the column whose lists are the rows."""
        types = self._arrow.types
        lists = [
            field.name for field in self._schema
            if (types.is_list(field.type) or types.is_large_list(field.type) or types.is_fixed_size_list(field.type))
            and (types.is_floating(field.type.value_type) or types.is_integer(field.type.value_type))
        ]  # fmt: skip
        if column is None and len(lists) == 1:
            return str(lists[0])
        if column is None or column not in lists:
            received = "none given" if column is None else repr(column)
            raise InputError(
                f"expected the column of {self._path} whose lists are rows (column=, --column), one of "
                f"{', '.join(lists) or 'none there'}; received {received}"
            )
        return column

    def _find_values(self, options: ImportOptions) -> dict[str, str]:
        """Return the columns of values by what they are."""
        there, names = set(self._schema.names) - {self._column}, {}
        asked: Mapping[str, Any] = options
        for name, option, usual in (("example_id", "ids", "id"), ("loss",) * 3, ("grad_norm",) * 3):
            given: Any = asked[option]
            if given is not None and not (isinstance(given, str) and given in there):
                shown = repr(given) if isinstance(given, str) else "an array"
                raise InputError(f"expected {option} as the name of a column of {self._path}; received {shown}")
            if given is not None or usual in there:
                names[name] = given or usual
        chosen: Any = options["columns"]
        if chosen is None:
            chosen = [name for name in self._schema.names if name in there - set(names.values()) - {"row"}]
            odd = [name for name in chosen if self._kind(name) is None]
            if odd:
                warn(f"columns {', '.join(odd)} of {self._path} are left out: their values are no numbers or strings")
            chosen = [name for name in chosen if name not in odd]
        elif isinstance(chosen, (str, Mapping)) or not isinstance(chosen, Sequence) or set(chosen) - there:
            raise InputError(f"expected columns as names of columns of {self._path}; received {str(chosen)[:80]}")
        return names | {f"columns/{name}": name for name in chosen}

    def _kind(self, column: str) -> str | None:
        kind, types = self._schema.field(column).type, self._arrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = (("bool", types.is_boolean), ("int64", types.is_integer), ("float64", types.is_floating))
        if types.is_string(kind) or types.is_large_string(kind):
            return "str"
        return next((name for name, test in tests if test(kind)), None)

    def _dtype(self, column: str) -> str:
        kind = self._kind(column)
        if kind is None:
            raise InputError(
                f"expected numbers, booleans or strings in column {column!r} of {self._path}; received "
                f"{self._schema.field(column).type}"
            )
        return kind

    def _width(self) -> int:
        kind = self._schema.field(self._column).type
        if self._arrow.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        batch = next(self._file.iter_batches(1, columns=[self._column]))
        rows = batch.column(0).to_pylist()
        if not rows[0]:
            raise InputError(f"expected lists of numbers in {self._column!r} of {self._path}; received an empty one")
        return len(rows[0])

    @override
    def blocks(self, start: int) -> Iterator[ImportedBlock]:
        first, groups = 0, []
        for group in range(self._file.num_row_groups):
            stop = first + self._file.metadata.row_group(group).num_rows
            if stop > start:
                groups.append((group, first))
            first = stop
        names = dict.fromkeys([self._column, *self._names.values()])
        for group, begin in groups:
            low = begin
            for batch in self._file.iter_batches(block_limit(self.k), row_groups=[group], columns=list(names)):
                block = self._block(batch, low)
                low += batch.num_rows
                if low > start:
                    yield block.part(max(0, start - block.start), len(block.rows))

    def _block(self, batch: Any, start: int) -> ImportedBlock:
        lists = batch.column(batch.schema.get_field_index(self._column))
        flat = lists.flatten()
        if lists.null_count or flat.null_count or len(flat) != self.k * len(lists) or not self._even(lists):
            raise InputError(
                f"expected lists of {self.k} numbers in column {self._column!r} of {self._path}; received others, or "
                f"none, in rows {start}-{start + len(lists)}"
            )
        rows = to_rows(flat.to_numpy(zero_copy_only=False).reshape(len(lists), self.k), self.k, start)
        values = {}
        for name, column in self._names.items():
            array = batch.column(batch.schema.get_field_index(column))
            if array.null_count:
                raise InputError(
                    f"expected a value in every row of column {column!r} of {self._path}; received none in "
                    f"{counted(array.null_count, 'row')} of {start}-{start + len(lists)}: fill them, or leave the "
                    "column out"
                )
            values[name] = self._values(array)
        return ImportedBlock(start, rows, values)

    def _even(self, lists: Any) -> bool:
        """Return whether all lists have as many numbers as the first."""
        if self._arrow.types.is_fixed_size_list(lists.type):
            return True
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        return bool((lengths == self.k).all())

    def _values(self, array: Any) -> npt.NDArray[Any]:
        if self._arrow.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        found: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return found

"""Where imported rows come from: an array in memory or on disk, blocks one after the other, or a Parquet file.

Each gives blocks of rows with their ids, losses, norms and columns, from any row on, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.interchange.arrays import ArrayRows, StreamedRows
from ooc_influence.interchange.blocks import Source
from ooc_influence.interchange.parquet import ParquetRows
from ooc_influence.options import ImportOptions
from ooc_influence.store import expand_home, is_local, parse_path


def open_source(rows: Any, options: ImportOptions) -> Source:
    """Return where rows come from, checked as far as that reads none of them.

    Raises
    ------
    InputError
        For what is no array of rows, or values that do not fit it.
    MissingExtraError
        For a Parquet file without pyarrow.
    """
    if isinstance(rows, (str, Path)):
        if not is_local(parse_path(str(rows))):
            raise InputError(f"expected a local file of rows; received {rows}: copy it here first")
        path = expand_home(rows)
        if path.suffix.lower() == ".parquet":
            return ParquetRows(path, options)
        rows = _map_array(path)
    if options["column"] is not None:
        raise InputError(f"expected a Parquet file with column (--column); received {type(rows).__name__}")
    asked: Mapping[str, Any] = options
    for name in ("ids", "loss", "grad_norm"):
        if isinstance(asked[name], str):
            raise InputError(f"expected {name} as an array with a value a row; received {asked[name]!r}")
    if options["columns"] is not None and not isinstance(options["columns"], Mapping):
        raise InputError("expected columns as a mapping of names to arrays; received no mapping")
    values = {"example_id": options["ids"], "loss": options["loss"], "grad_norm": options["grad_norm"]}
    values |= {f"columns/{name}": array for name, array in (options["columns"] or {}).items()}
    given = {name: _parse_values(name, array) for name, array in values.items() if array is not None}
    if hasattr(rows, "detach") and not hasattr(rows, "__array_interface__"):  # a tensor
        rows = _as_array(rows)
    if hasattr(rows, "shape") and hasattr(rows, "dtype"):
        return ArrayRows(rows, given)
    if isinstance(rows, Iterable):
        return StreamedRows(rows, given)
    raise InputError(
        f"expected rows as an array (n, k), an iterable of blocks, or a .npy or .parquet file; received "
        f"{type(rows).__name__}"
    )


def _map_array(path: Path) -> npt.NDArray[Any]:
    """Return a .npy file as a memory map."""
    if path.suffix.lower() != ".npy":
        raise InputError(f"expected rows in a .npy or .parquet file; received {path}")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError) as error:
        raise InputError(f"expected an array of rows in {path}; received {error}") from error


def _as_array(tensor: Any) -> npt.NDArray[Any]:
    """Return a tensor as an array, without a copy where it is on the CPU."""
    try:
        array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    except TypeError as error:
        raise InputError(
            f"expected rows of a type that NumPy has; received {tensor.dtype}: convert them, with .float()"
        ) from error
    return array


def _parse_values(name: str, values: Any) -> Any:
    """Return a value for each row as an array."""
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.dtype.kind == "U":
        array = array.astype(object)
    if array.ndim != 1:
        raise InputError(f"expected {name.removeprefix('columns/')} of one value a row; received shape {array.shape}")
    return array

"""Rows as a caller gives them, checked and made ready to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.store.encoding import FloatRows
from ooc_influence.store.layout import Layout, column_dtype, numpy_dtype


def parse_rows(
    layout: Layout,
    first_row: int,
    gradients: npt.ArrayLike,
    loss: npt.ArrayLike,
    grad_norm: npt.ArrayLike | None,
    metadata: Mapping[str, Any],
) -> tuple[FloatRows, dict[str, npt.NDArray[Any]]]:
    """Return float32 rows (b, k) and, by array path, their small values (b,).

    Parameters
    ----------
    layout : Layout
        Of the store they are for.
    first_row : int
        Number the first row will have; errors name rows by number.
    gradients, loss, grad_norm
        As for :meth:`GradientStore.append`.
    metadata : mapping of str to (b,)
        Ids and columns by array path.

    Raises
    ------
    InputError
        For a wrong shape or type, or missing or unknown ids or columns.
    NonFiniteError
        For NaN or Inf in a gradient or loss.
    """
    rows = np.ascontiguousarray(gradients, np.float32)
    if rows.ndim != 2 or rows.shape[1] != layout.k:
        raise InputError(f"expected gradients of shape (b, {layout.k}); received {rows.shape}")
    if set(metadata) != set(layout.metadata):
        raise InputError(
            f"expected per-row values for {sorted(layout.metadata) or 'nothing'}; received {sorted(metadata)}: "
            "ids and columns are fixed when a store is created"
        )
    losses, norms = np.asarray(loss, np.float32), _norms(rows)
    small: dict[str, npt.NDArray[Any]] = {"loss": losses}
    small["grad_norm"] = np.asarray(norms if grad_norm is None else grad_norm, np.float32)
    if len(rows):
        small |= {name: _parse_column(name, layout.metadata[name], values) for name, values in metadata.items()}
    for name, values in small.items():
        if values.shape != (len(rows),):
            raise InputError(f"expected {name} of shape ({len(rows)},); received {values.shape}")
    ids = small.get("example_id")
    _refuse(first_row, ~(np.isfinite(norms) & np.isfinite(losses)), ids)
    if ids is not None and len(set(ids.tolist())) < len(ids):
        names = ids.tolist()
        again = next(name for name in names if names.count(name) > 1)
        raise InputError(f"expected ids that do not repeat; received {again!r} for several rows")
    return rows, small


def _parse_column(name: str, dtype: str, values: Any) -> npt.NDArray[Any]:
    received = column_dtype(values)
    if received != dtype and not (dtype == "float64" and received == "int64"):
        raise InputError(f"expected {name} of dtype {dtype}; received {received}")
    if dtype == "str":
        try:
            "".join(map(str, values)).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"expected {name} of text that UTF-8 can hold; received {error.object[error.start]!r}"
            ) from error
    return np.asarray(values, numpy_dtype(dtype))


def _norms(rows: FloatRows) -> npt.NDArray[np.float64]:
    norms: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return norms  # in float64: float32 squares under- and overflow


def check_finite(first_row: int, rows: FloatRows, losses: FloatRows, ids: Sequence[Any] | None) -> None:
    """Check gradients (b, k) and losses (b,) of rows from ``first_row`` on.

    Raises
    ------
    NonFiniteError
        Naming the rows, and their ids if given, with NaN or Inf.
    """
    _refuse(first_row, ~(np.isfinite(_norms(rows)) & np.isfinite(losses)), ids)


def _refuse(first_row: int, bad: npt.NDArray[np.bool_], ids: Any) -> None:
    if not bad.any():
        return
    places = np.flatnonzero(bad)
    named = ", ".join(f"{first_row + at}" + ("" if ids is None else f" ({ids[at]})") for at in places[:10])
    more = f" and {len(places) - 10} more" if len(places) > 10 else ""
    raise NonFiniteError(
        f"expected finite losses and gradients; received NaN or Inf in rows {named}{more}: mend or leave out these "
        "samples, then run again",
        [first_row + int(at) for at in places],
    )

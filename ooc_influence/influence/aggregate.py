"""Sums of rows by group, one block at a time: a sparse matrix of weights times the block."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.store import GradientStore

Codes = npt.NDArray[np.int64]


class Grouping(NamedTuple):
    """Which group each row belongs to.

    Attributes
    ----------
    names : (G,)
        What the groups are called, in order.
    codes : (n,) int64
        Each row's place in ``names``.
    """

    names: npt.NDArray[Any]
    codes: Codes


def parse_groups(by: str | npt.ArrayLike, store: GradientStore) -> Grouping:
    """Return the groups that a column of ``store``, its ids (``"id"``) or an array with a value for each row make.

    Raises
    ------
    InputError
        If there is no such column, or the array has another length.
    """
    if isinstance(by, str):
        if by != "id" and by not in store.layout.columns:
            known = ", ".join(["id", *store.layout.columns])
            raise InputError(f"expected one of {known} to group {store.path} by; received {by!r}")
        values = store.ids() if by == "id" else store.column(by)
    else:
        values = np.asarray(by)
        if values.shape != (store.n,):
            raise InputError(f"expected a group for each of {store.n} rows; received values of shape {values.shape}")
    names, codes = np.unique(values, return_inverse=True)
    return Grouping(names, codes.astype(np.int64))


def weighted_sums(rows: Any, codes: Codes, weights: npt.NDArray[np.float32]) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Return the groups with rows of weight above zero, (d,), and Σ weight · row of each, (d, k) float32.

    Parameters
    ----------
    rows : (b, k) float32
        A block.
    codes, weights : (b,)
        Each row's group and weight.
    """
    from scipy.sparse import csr_array

    held = np.flatnonzero(weights)
    groups, places = np.unique(codes[held], return_inverse=True)
    order = np.argsort(places, kind="stable")
    ends = np.searchsorted(places[order], np.arange(len(groups) + 1))
    shape = (len(groups), len(rows))
    return groups, csr_array((weights[held][order], held[order], ends), shape=shape) @ rows

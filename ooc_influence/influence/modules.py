"""Scores module by module: the part of a score that a layer's kept entries make.

score_m(q, i) = Σ_{j in m} x_qj g_ij with x_q = (F + λI)⁻¹ g_q: the parts of all modules add up to the score. Reduced
rows mix the modules' entries, so there are no parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import zarr

from ooc_influence.errors import InputError, MismatchError
from ooc_influence.influence.checkpoints import Stores
from ooc_influence.influence.ranking import TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.scores import write_scores
from ooc_influence.influence.tiles import Columns
from ooc_influence.influence.topk import find_top
from ooc_influence.options import ListOptions, PairOptions, complete, takes
from ooc_influence.store import GradientStore, PathLike, parse_path


@takes(PairOptions)
def module_influence(
    query: Stores,
    train: Stores,
    *,
    top: int | None = None,
    out: PathLike | None = None,
    **options: Unpack[PairOptions],
) -> Mapping[str, TopInfluential] | zarr.Array[Any]:
    """Return the influence that runs through each module, as top lists or as scores on disk.

    The norms of a unit (``normalize=``) are those of whole rows, so the parts still add up to the score.

    Parameters
    ----------
    query, train : GradientStore or path, or lists of them
        (q, k) and (n, k), not reduced; lists for several checkpoints.
    top : int, optional
        Return this many proponents and opponents of each query by each module.
    out : path, optional
        Write all scores there instead; resumable, as for :func:`influence_scores`.
    **options : PairOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    mapping of str to TopInfluential, or (M, q, n) float32
        By module name; or the Zarr array written, its attribute ``modules`` the names in order, (L, M, q, n) for a list
        of dampings.

    Raises
    ------
    InputError
        For reduced stores, or both or neither of ``top`` and ``out``.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, StoreExistsError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    if (top is None) == (out is None):
        raise InputError("expected either top= or out= (--top or --out); received both or neither")
    scoring = ScoreRequest.open(query, train, options)
    names, columns = module_columns([own.train for own in scoring.checkpoints])
    if out is not None:
        return write_scores(scoring, parse_path(out), columns, options, modules=names)
    assert top is not None
    lists = find_top(scoring, top, columns, complete(ListOptions, options))
    return {name: lists.ranked(scoring, number) for number, name in enumerate(names)}


def module_columns(stores: Sequence[GradientStore]) -> tuple[list[str], Columns]:
    """Return the names of the modules that keep entries, and each one's columns in each store.

    Raises
    ------
    InputError
        If rows are reduced.
    MismatchError
        If the stores' modules differ.
    """
    found: list[dict[str, slice]] = []
    for store in stores:
        if store.is_reduced:
            raise InputError(
                f"expected rows that hold kept entries; received {store.path}, reduced to {store.k} numbers that mix "
                "the modules: extract without a reduction (--dims 0)"
            )
        edges = np.cumsum([0, *(len(module.rows) for module in store.mask.modules)]).tolist()
        found.append(
            {
                module.layer.name: slice(edges[number], edges[number + 1])
                for number, module in enumerate(store.mask.modules)
                if len(module.rows)
            }
        )
    if any(list(own) != list(found[0]) for own in found):
        raise MismatchError(
            "expected the same modules in every checkpoint's store; received stores that differ: extract them with the "
            "same modules="
        )
    return list(found[0]), tuple(tuple(own.values()) for own in found)

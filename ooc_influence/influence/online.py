"""Scores of samples on fixed queries while a model trains, to choose what it trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.fingerprint import check_same
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.options import Damped, takes
from ooc_influence.store import GradientStore, PathLike, as_store

Scores = npt.NDArray[np.float32]


def positive_scores(scores: Scores) -> npt.NDArray[np.bool_]:
    """Return which samples have a positive mean score over the queries: training on them lowers the queries' loss.

    Parameters
    ----------
    scores : (q, b) float32
        Scores of b samples on q queries.
    """
    return np.asarray(scores.mean(axis=0) > 0)


class OnlineSelection:
    """Chooses among the samples of each batch of a training; made by :func:`online_selection`.

    Attributes
    ----------
    store : GradientStore
        The queries.
    """

    def __init__(
        self, store: GradientStore, weigh: Callable[[Scores], Any], train: GradientStore | None, options: Damped
    ) -> None:
        self.store, self._weigh, self._train, self._options = store, weigh, train, options
        self._queries = self._preconditioned(store)

    def refresh(self, query: GradientStore | PathLike) -> None:
        """Score by other queries from now on, such as the same ones at the weights that the training has reached.

        Parameters
        ----------
        query : GradientStore or path
            (q, k), of the same mask.

        Raises
        ------
        MismatchError
            For another mask.
        OocInfluenceError
            As for :func:`online_selection`.
        """
        store = as_store(query)
        check_same(
            self.store.path, {"mask": self.store.mask_digest}, {"mask": store.mask_digest},
            "extract the queries with the same compressor, or like= the first ones", other=store.path,
        )  # fmt: skip
        self.store, self._queries = store, self._preconditioned(store)

    def scores(self, rows: Tensor) -> Tensor:
        """Return the scores of rows (b, k) on the queries, (q, b)."""
        self._queries = self._queries.to(rows.device)
        return self._queries @ rows.T

    def weigh(self, scores: Scores) -> Any:
        """Return by what samples' losses are multiplied, (b,), from their scores (q, b)."""
        return self._weigh(scores)

    def _preconditioned(self, store: GradientStore) -> Tensor:
        train = store if self._train is None else self._train
        request = ScoreRequest.open(store, train, self._options)  # type: ignore[arg-type]
        if request.several:
            raise InputError(f"expected one damping; received {self._options['damping']}")
        queries = request.precondition(0, request.q)
        if queries.dropped.any():
            raise InputError(
                f"expected queries that are not dropped; received {int(queries.dropped.sum())} that are: extract the "
                "others alone"
            )
        return torch.from_numpy(queries.arrays[0])


@takes(Damped)
def online_selection(
    query: GradientStore | PathLike,
    weigh: Callable[[Scores], Any] = positive_scores,
    train: GradientStore | PathLike | None = None,
    **options: Unpack[Damped],
) -> OnlineSelection:
    """Return what chooses among the samples of each batch of a training, by their scores on fixed queries.

    For ``select=`` of :func:`ooc_influence.collect`. The rows that are scored are those that are stored, at the weights
    of their step; the queries stay what they are while the weights change (:meth:`OnlineSelection.refresh`).

    Parameters
    ----------
    query : GradientStore or path
        (q, k), the queries, in memory from now on. Their mask is the collected store's.
    weigh : callable (q, b) float32 -> (b,), optional
        Returns by what the samples' losses are multiplied, at least 0, from their scores; default
        :func:`positive_scores`, which leaves out the others.
    train : GradientStore or path, optional
        The store that the queries were made ``like``, for its curvature; without one, scores are dot products.
    **options : Damped
        See :mod:`ooc_influence.options`.

    Returns
    -------
    OnlineSelection

    Raises
    ------
    InputError
        For dropped queries, several dampings, or a curvature without ``train``.
    OocInfluenceError
        As for :func:`influence_scores`.

    Examples
    --------
    >>> selection = ooc.online_selection("query.zarr")
    >>> with ooc.collect(model, "steps.zarr", select=selection) as collector:
    ...     for ids, x, y in batches:
    ...         with collector.step(ids) as step:
    ...             losses = F.cross_entropy(model(x), y, reduction="none")
    ...             (step.select(losses) * losses).mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    if train is None and (options["curvature"] not in (None, False) or options["damping"] is not None):
        raise InputError(
            "expected train= for a curvature and a damping; received queries alone: give the store that they were made "
            "like"
        )
    asked = options if train is not None else Damped({**options, "curvature": False})
    return OnlineSelection(as_store(query), weigh, None if train is None else as_store(train), asked)

"""Exact re-ranking: the strongest rows' gradients are computed again, and compared whole, in the whole Kronecker basis.

Stored rows keep some entries, with fewer bits; they find candidates among all rows. The candidates' order is then that
of EK-FAC (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296) without any compression.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch

from ooc_influence.errors import InputError
from ooc_influence.extract import (
    Batches,
    BudgetBatches,
    FullBasis,
    ModelSetup,
    PerSampleLoss,
    Pilot,
    Samples,
    batches_of_rows,
    check_model,
    exact_scores,
    factors_path,
    keep_factors,
    open_checkpoints,
    parse_device,
    recorded_checkpoints,
)
from ooc_influence.fingerprint import check_same_rows
from ooc_influence.influence.ranking import Ranking, TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.topk import find_top
from ooc_influence.linalg import kronecker_dampings
from ooc_influence.memory import MemoryBudget
from ooc_influence.options import TopOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike, as_store, parse_path

_QUERIES = 16  # at a time: their gradients are held


@takes(TopOptions)
def rerank(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    model: torch.nn.Module,
    per_sample_loss: PerSampleLoss,
    data: tuple[Batches | BudgetBatches, Batches | BudgetBatches],
    candidates: int = 200,
    top: int = 10,
    **options: Unpack[TopOptions],
) -> TopInfluential:
    """Return each query's strongest rows, the candidates that stored rows name in the order of exact EK-FAC scores.

    Parameters
    ----------
    query, train : GradientStore or path
        (q, k) and (n, k), in a Kronecker basis.
    model, per_sample_loss
        As the stores were extracted with.
    data : tuple of batches
        The samples that the query store, and the train store, were extracted from. Their losses are compared with those
        stored.
    candidates : int
        Proponents, and opponents, of each query whose gradients are computed again.
    top : int
        How many of each to return.
    **options : TopOptions
        See :mod:`ooc_influence.options`. ``damping``, one, is that of the exact scores; where ``curvature`` is one that
        was fitted, it is that of the first scores, and the exact ones have the basis's own.

    Returns
    -------
    TopInfluential
        With exact scores; what stored rows gave is in ``stored`` of the rankings.

    Raises
    ------
    InputError
        For stores in no Kronecker basis, several dampings or averaged queries, or fewer candidates than ``top``.
    MismatchError
        For another model, or other samples, than the stores were extracted from.
    MemoryBudgetError
        If a single layer's factors and gradients do not fit.
    OocInfluenceError
        As for :func:`top_influential`.
    """
    asked: Any = dict(options)
    stores = as_store(query), as_store(train)
    _check(stores[1], candidates, top, asked)
    fitted = asked["curvature"] not in (None, "kronecker")
    if not fitted:
        asked["curvature"] = "kronecker"
    setup = ModelSetup(model, per_sample_loss, parse_device(model, None), asked["progress"])
    check_model(stores[1], model, "give the model that the stores were extracted with")
    scoring = ScoreRequest.open(*stores, asked, lists=True)
    first = find_top(scoring, candidates, None, asked).ranked(scoring, 0)
    dampings = kronecker_dampings(stores[1])
    own: Any = dampings["list_damping"] or dampings["damping"]
    damping = float(own if fitted or asked["damping"] is None else asked["damping"])
    exact = _Exact(stores, setup, data, damping, str(scoring.settings["normalize"]), asked["memory"])
    with ExitStack() as stack:
        basis = exact.basis(stack)
        proponents, opponents = exact.ordered(basis, first, top)
    settings = {**first.settings, "rerank": {"candidates": candidates, "damping": damping}}
    return replace(first, proponents=proponents, opponents=opponents, settings=settings, proven=None)


def _check(train: GradientStore, candidates: int, top: int, options: dict[str, Any]) -> None:
    if options["minus"] is not None:
        raise InputError("expected queries alone to rank again; received ones minus controls (--minus)")
    if not train.mask.has_basis:
        raise InputError(
            f"expected stores in a Kronecker basis to rank again; received {train.path}, in the parameters' own: "
            "extract with basis='kronecker' (--basis kronecker)"
        )
    if not 1 <= top <= candidates:
        raise InputError(f"expected as many candidates as are listed, {top}, or more; received {candidates}")
    if np.ndim(options["damping"]) or options["damping_mode"] != "relative":
        raise InputError("expected one relative damping to rank again with; received others: leave them out")
    if options["average_queries"] is not False or options["combine"] != "mean":
        raise InputError("expected single queries to rank again; received means of queries, or of checkpoints")
    if (train.attrs.get("labels") or {}).get("kind", "dataset") != "dataset":
        raise InputError(f"expected rows of the data set's labels; received {train.path}, of sampled ones")


@dataclass(frozen=True)
class _Exact:
    stores: tuple[GradientStore, GradientStore]
    setup: ModelSetup
    data: tuple[Batches | BudgetBatches, Batches | BudgetBatches]
    damping: float
    normalize: str
    memory: int | str | None

    def basis(self, stack: ExitStack) -> FullBasis:
        """Return the whole basis: as kept beside the train store, or made in a temporary folder."""
        train = self.stores[1]
        kept = FullBasis.open(train, factors_path(train))
        if kept is not None:
            return kept
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ooc_influence-factors-"))
        return keep_factors(Pilot(self.setup, self.data[1], self.memory), train, parse_path(folder) / "factors")

    def ordered(self, basis: FullBasis, first: TopInfluential, top: int) -> tuple[Ranking, Ranking]:
        """Return both sides' rankings by exact scores."""
        stored = [first.proponents, first.opponents]
        numbers = [np.unique(rows[rows >= 0]) for rows in np.concatenate([each.rows for each in stored], 1)]
        live = [query for query, rows in enumerate(numbers) if len(rows)]
        shape = len(numbers), min(top, stored[0].rows.shape[1])
        sides = [(np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)) for _ in stored]
        parts = [live[low : low + _QUERIES] for low in range(0, len(live), _QUERIES)]
        train, budget = self.stores[1], MemoryBudget.of(self.memory)
        checkpoints = open_checkpoints(self.setup.model, recorded_checkpoints(train))
        wanted = [np.unique(np.concatenate([numbers[query] for query in part])) for part in parts]
        passes = [len(list(basis.passes(budget, len(part)))) for part in parts]
        total = sum(count * len(rows) for count, rows in zip(passes, wanted, strict=True))
        with Progress("rerank", total, self.setup.progress) as bar:
            for part, rows in zip(parts, wanted, strict=True):
                found = self._scores(basis, np.array(part), rows, budget, checkpoints, bar.advance)
                for place, query in enumerate(part):
                    of_query = found[place, np.searchsorted(rows, numbers[query])]
                    for (out_rows, out_scores), sign in zip(sides, (1, -1), strict=True):
                        order = np.lexsort((numbers[query], -sign * of_query))[: shape[1]]
                        out_rows[query, : len(order)] = numbers[query][order]
                        out_scores[query, : len(order)] = of_query[order]
        rankings = [
            Ranking(rows, scores, train.ids(np.maximum(rows, 0)), _stored_scores(stored, rows))
            for rows, scores in sides
        ]  # fmt: skip
        return rankings[0], rankings[1]

    def _scores(
        self, basis: FullBasis, queries: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], budget: MemoryBudget,
        checkpoints: Sequence[Any], advance: Callable[[int], None],
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        """Return exact scores of rows, (q, m), in the unit asked for; the samples must be those of the stores."""
        chosen = [
            Samples(batches_of_rows(store.attrs, batches), numbers)
            for store, batches, numbers in zip(self.stores, self.data, (queries, rows), strict=True)
        ]
        found = exact_scores(
            self.setup, basis, chosen[0], chosen[1], damping=self.damping, budget=budget, checkpoints=checkpoints,
            advance=advance,
        )  # fmt: skip
        for store, samples, losses in zip(self.stores, chosen, (found.query_losses, found.losses), strict=True):
            expected = np.array([store.small("loss", row, row + 1)[0] for row in samples.numbers.tolist()])
            check_same_rows(
                store.path, int(samples.numbers[0]), {"losses": expected}, {"losses": losses},
                "give the data, and the loss, that the store was extracted from", rtol=1e-2,
            )  # fmt: skip
        scores = found.products
        if self.normalize in ("train", "cosine"):
            scores = scores / np.sqrt(np.where(found.squares > 0, found.squares, 1))
        if self.normalize == "cosine":
            scores = scores / np.sqrt(np.where(found.query_squares > 0, found.query_squares, 1))[:, None]
        return scores.astype(np.float32)


def _stored_scores(stored: Sequence[Ranking], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the first scores of rows (q, top), from the rankings that named them."""
    found = np.full(rows.shape, np.nan, np.float32)
    for query, numbers in enumerate(rows):
        scores = {int(row): score for each in stored for row, _, score in each.of_query(query)}
        found[query] = [scores.get(int(row), np.nan) for row in numbers]
    return found

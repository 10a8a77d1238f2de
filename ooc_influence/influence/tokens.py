"""Influence token by token: which tokens of a document carry its score, and which tokens of a query ask for it.

A score is linear in the document's gradient, which is the sum of its tokens' gradients: the share of a token t is
∇ℓ_tᵀ (F + λI)⁻¹ g_q, the derivative of ℓ_t along the preconditioned query. All tokens of a document take one pass in
forward mode, and nothing is stored for each token. The other way round, the tokens of a query share the sum of its
proponents' scores. Tokens of language models' documents were scored so by Grosse et al. 2023 (arXiv 2308.03296,
section 3.3.1), whose gradients took one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
import torch

from ooc_influence.curvature import resolve_curvature
from ooc_influence.errors import InputError
from ooc_influence.extract import (
    Batches,
    BudgetBatches,
    Derivatives,
    PartLosses,
    batches_of_rows,
    check_model,
    directional_derivatives,
    numbered_batches,
    open_checkpoints,
    parameter_direction,
    parse_device,
    recorded_checkpoints,
    tapped,
    to_device,
)
from ooc_influence.fingerprint import array_digest, check_same_rows
from ooc_influence.hf import CausalLoss, Job, Loaded, job_of, token_texts
from ooc_influence.influence.ranking import TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.topk import top_influential
from ooc_influence.options import TopOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike, as_store

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TokenInfluence:
    """A query's listed rows, token by token.

    Attributes
    ----------
    query : int
        The query's row.
    rows : (m,) int64
        Train rows: proponents, then opponents, as they are listed.
    scores : (m,) float32
        Their scores, by the rows as they are stored.
    tokens : list of (t,) float32
        Of each row, the share of every token in its score; t as the losses have it, padding included. Their sum is the
        score, up to what the store's representation rounds.
    query_tokens : (t,) float32
        The share of every token of the query in the sum of its proponents' scores.
    texts : list of list of str, or None
        Of each row, its tokens' texts, where the model is a Hugging Face model.
    query_text : list of str, or None
        Those of the query.
    """

    query: int
    rows: npt.NDArray[np.int64]
    scores: Floats
    tokens: list[Floats]
    query_tokens: Floats
    texts: list[list[str]] | None = None
    query_text: list[str] | None = None


@takes(TopOptions)
def token_influence(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    model: torch.nn.Module | Loaded,
    token_losses: PartLosses | None = None,
    data: tuple[Any, Any] | None = None,
    lists: TopInfluential | None = None,
    *,
    top: int = 10,
    queries: Sequence[int] | None = None,
    **options: Unpack[TopOptions],
) -> list[TokenInfluence]:
    """Return, for each query, the share of every token in the scores of the rows listed for it.

    Parameters
    ----------
    query, train : GradientStore or path
        (q, k) and (n, k).
    model : torch.nn.Module or hf.Loaded
        The model that the stores were extracted with; a language model from :func:`ooc_influence.hf.load` knows the
        losses, and finds the documents where the stores recorded them.
    token_losses : callable (model, batch) -> (b, t) tensor, optional
        What each token adds to its sample's loss: sums over t are the losses that the stores were extracted with.
    data : tuple of batches, optional
        The samples that the query store, and the train store, were extracted from; for a Hugging Face model, their
        documents. Their losses are compared with those stored.
    lists : TopInfluential, optional
        The lists; by default those of :func:`top_influential` with ``top`` and the options.
    top : int
        Proponents and opponents of each query.
    queries : sequence of int, optional
        The queries' rows; default all.
    **options : TopOptions
        See :mod:`ooc_influence.options`. Where lists are given, theirs count.

    Returns
    -------
    list of TokenInfluence

    Raises
    ------
    InputError
        For several checkpoints, dampings, or averaged queries, losses that are not (b, t), or LoGra's projections.
    UnsupportedModelError
        For quantised weights, or a model that cannot be differentiated along a direction.
    MismatchError
        For another model, or other samples, than the stores were extracted from.
    OocInfluenceError
        As for :func:`top_influential`.

    Examples
    --------
    >>> found = ooc.token_influence("query.zarr", "train.zarr", ooc.hf.load("model"), top=5)
    >>> found[0].texts[0][found[0].tokens[0].argmax()]  # the token of the first proponent that counts most

    Of another model:

    >>> losses = lambda model, batch: F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none")
    >>> found = ooc.token_influence("query.zarr", "train.zarr", model, losses, (queries, documents), top=5)
    """
    shares = open_shares(query, train, model, token_losses, data, lists, top=top, **options)
    return shares.of(range(shares.request.q) if queries is None else [int(number) for number in queries])


@takes(TopOptions)
def open_shares(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    model: torch.nn.Module | Loaded,
    token_losses: PartLosses | None = None,
    data: tuple[Any, Any] | None = None,
    lists: TopInfluential | None = None,
    *,
    top: int = 10,
    **options: Unpack[TopOptions],
) -> Shares:
    """Return what computes the shares of single queries, opened and checked.

    Parameters
    ----------
    query, train, model, token_losses, data, lists, top
        As for :func:`token_influence`.
    **options : TopOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    OocInfluenceError
        As for :func:`token_influence`.
    """
    stores = as_store(query), as_store(train)
    asked: Any = dict(options)
    if asked["average_queries"] is not False:
        raise InputError("expected single queries to look at token by token; received averaged ones")
    if asked["minus"] is not None or (lists is not None and "minus" in lists.settings):
        raise InputError("expected queries alone to look at token by token; received ones minus controls (--minus)")
    if lists is None:
        lists = top_influential(*stores, top, **asked)
    if lists.dampings is not None:
        raise InputError("expected lists for one damping; received several: take one of them, lists.at(number)")
    asked |= {name: lists.settings[name] for name in ("curvature", "damping", "damping_mode", "normalize")}
    if asked["curvature"] is None:
        asked |= {"curvature": False, "damping": None}
    elif not resolve_curvature(stores[1], asked["curvature"]).takes_damping:
        asked["damping"] = None
    request = ScoreRequest.open(*stores, asked, lists=True)
    source = _source(stores, model, token_losses, data)
    check_model(stores[1], source.model, "give the model that the stores were extracted with")
    return Shares(request, stores, source, lists, asked["progress"])


class _Source(NamedTuple):
    """A model, the losses of its tokens, the samples of the query and of the train store, and their tokens' texts."""

    model: torch.nn.Module
    losses: PartLosses
    data: tuple[Batches | BudgetBatches, Batches | BudgetBatches]
    texts: tuple[Callable[[int], list[str]], ...] | None = None


def _source(
    stores: tuple[GradientStore, GradientStore], model: torch.nn.Module | Loaded, losses: PartLosses | None,
    data: tuple[Any, Any] | None,
) -> _Source:  # fmt: skip
    if not isinstance(model, Loaded):
        if losses is None or data is None:
            raise InputError(
                "expected token_losses and data beside a model; received none: give both, or a language model from "
                "ooc_influence.hf.load"
            )
        return _Source(model, losses, data)
    if losses is not None:
        raise InputError("expected no token_losses with a Hugging Face model, which has its own; received some")
    jobs = [job_of(store, model, path) for store, path in zip(stores, data or (None, None), strict=True)]
    loss = jobs[1].per_sample_loss
    if not isinstance(loss, CausalLoss):
        raise InputError(
            f"expected stores of a language model's gradients; received {stores[1].path}, whose losses are "
            f"{stores[1].attrs.get('loss_kind')}"
        )

    def texts(job: Job) -> Callable[[int], list[str]]:
        return lambda row: token_texts(model.tokenizer, job.samples[row]["input_ids"])

    batches: Any = tuple(job.batches for job in jobs)
    return _Source(model.model, loss.of_tokens, batches, tuple(map(texts, jobs)))


@dataclass(frozen=True)
class Shares:
    """The shares of tokens of any queries of opened stores, and of the rows that lists name for them."""

    request: ScoreRequest
    stores: tuple[GradientStore, GradientStore]
    source: _Source
    lists: TopInfluential
    progress: bool | None

    @property
    def digest(self) -> str:
        """A digest of all that the shares depend on: stores, curvature, unit, and the rows in lists."""
        rows = [array_digest(side.rows) for side in (self.lists.proponents, self.lists.opponents)]
        return self.request.digest(kind="tokens", rows=rows)

    def of(self, queries: Sequence[int]) -> list[TokenInfluence]:
        """Return the shares of some queries."""
        listed = [self._listed(number) for number in queries]
        total = sum(len(rows) + 1 for rows, _ in listed)
        with Progress("tokens", total, self.progress) as bar:
            return [
                self._of_query(number, rows, scores, bar.advance)
                for number, (rows, scores) in zip(queries, listed, strict=True)
            ]

    def _listed(self, number: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return a query's listed rows and their scores by stored rows: proponents, then opponents."""
        lists = self.lists
        if not 0 <= number < len(lists.query_ids):
            raise InputError(f"expected queries below {len(lists.query_ids)}; received {number}")
        sides = lists.of_query(number)
        entries = [(row, score) for side in ("proponents", "opponents") for row, _, score in sides[side]]
        stored = {
            row: score for ranking in (lists.proponents, lists.opponents)
            for row, score in (ranking.stored_scores(number) or {}).items()
        }  # fmt: skip
        rows = np.array([row for row, _ in entries], np.int64)
        return rows, np.array([stored.get(row, score) for row, score in entries], np.float32)

    def _of_query(
        self, number: int, rows: npt.NDArray[np.int64], scores: Floats, advance: Callable[[int], None]
    ) -> TokenInfluence:
        """Return the shares of the tokens of a query and of the rows listed for it."""
        query, train = self.stores
        if not len(rows):
            advance(1)
            return TokenInfluence(number, rows, scores, [], np.zeros(0, np.float32))
        checkpoint = self.request.checkpoints[0]
        preconditioned = self.request.precondition(number, number + 1).arrays[0][0]
        stored = np.concatenate([train.rows(row, row + 1) for row in rows.tolist()]).astype(np.float32)
        unit = _ratio(scores, stored @ preconditioned)  # of the lists: a norm's inverse, or 1
        tokens = self._derivatives(1, rows, preconditioned, advance)
        shares = [factor * values for factor, values in zip(unit, tokens, strict=True)]
        back = stored
        if checkpoint.curvature is not None:
            back = checkpoint.curvature.precondition(stored, checkpoint.lambdas)[0].astype(np.float32)
        own = query.rows(number, number + 1).astype(np.float32)[0]
        wanted = np.where(scores > 0, _ratio(scores, back @ own), 0).astype(np.float32)
        (of_query,) = self._derivatives(0, np.array([number]), wanted @ back, advance)
        if self.source.texts is None:
            return TokenInfluence(number, rows, scores, shares, of_query)
        text, texts = self.source.texts[0](number), [self.source.texts[1](row) for row in rows.tolist()]
        shares = [values[: len(words)] for values, words in zip(shares, texts, strict=True)]
        return TokenInfluence(number, rows, scores, shares, of_query[: len(text)], texts, text)

    def _derivatives(
        self, side: int, rows: npt.NDArray[np.int64], vector: Floats, advance: Callable[[int], None]
    ) -> list[Floats]:
        """Return the derivatives of the token losses of some rows of a store along a vector of its columns."""
        store, model = self.stores[side], self.source.model
        device, numbers = parse_device(model, None), np.unique(rows)
        found: dict[int, Floats] = {}
        losses = np.zeros(len(numbers), np.float32)
        direction = parameter_direction(model, self.stores[1], vector)
        earlier = open_checkpoints(model, recorded_checkpoints(store))
        with tapped(model, [], device):
            for places, batch in numbered_batches(batches_of_rows(store.attrs, self.source.data[side]), numbers):
                moved = to_device(batch, device)
                values = _checked(directional_derivatives(model, self.source.losses, moved, direction), len(places))
                losses[places], along = values.losses.sum(1).cpu().numpy(), values.along
                for checkpoint in earlier:  # rows are means over checkpoints
                    with checkpoint.loaded(model):
                        along = along + directional_derivatives(model, self.source.losses, moved, direction).along
                shares = (along / (len(earlier) + 1)).float().cpu().numpy()
                found |= {int(numbers[place]): own for place, own in zip(places, shares, strict=True)}
                advance(len(places))
        expected = np.concatenate([store.small("loss", row, row + 1) for row in numbers.tolist()])
        coarse = any(each.dtype in (torch.bfloat16, torch.float16) for each in model.parameters())
        check_same_rows(
            store.path, int(numbers[0]), {"losses": expected}, {"losses": losses},
            "give the data that the store was extracted from, and token losses that add up to its loss",
            rtol=0.1 if coarse else 1e-2, agreeing=0.5 if coarse else 1.0,  # attention is computed in another way
        )  # fmt: skip
        return [found[row] for row in rows.tolist()]


def _ratio(scores: Floats, products: Floats) -> Floats:
    """Return scores over products; 0 where a product is zero, as its score then is."""
    return np.divide(scores, products, out=np.zeros_like(scores), where=products != 0)


def _checked(values: Derivatives, b: int) -> Derivatives:
    if values.along.dim() != 2 or len(values.along) != b:
        raise InputError(
            f"expected token_losses to return (b, t), here ({b}, t); received shape {tuple(values.along.shape)}: "
            "return what each token adds to its sample's loss"
        )
    return values

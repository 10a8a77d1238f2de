"""Per-sample losses that are exact where the model is confident, with labels of the data or drawn from the model.

Cross-entropy keeps its relative precision down to 1e-38, which row weights such as 1/expm1(ℓ) need, and logits are not
copied (:mod:`ooc_influence.extract.chunked_loss`).

Inside :func:`sampled_labels` these losses replace the labels they are given by draws from softmax(logits), so that rows
estimate the true Fisher matrix instead of the empirical one (Martens 2020, arXiv 1412.1193, section 5). A draw inverts
the cumulative probabilities at one uniform number, a hash of the seed, the store's row and the number of the target
within the sample. It is therefore the same in any batch, order, shard or resumed run, except where that number is
within the logits' rounding of the boundary between two classes: hardly ever in float32, for some tokens in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the community's name
from torch import Tensor

from ooc_influence.errors import InputError, UnsupportedModelError
from ooc_influence.extract.chunked_loss import chunked_cross_entropy

Numbers = npt.NDArray[np.int64]
# probabilities worked on at once while labels are drawn, 12 bytes each: on a CPU few, for its cache
_AT_ONCE_CPU, _AT_ONCE = 2**18, 2**24


def cross_entropy(logits: Tensor, labels: Tensor, *, sample: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each sample.

    Parameters
    ----------
    logits : (b, classes) float
        Scores before the softmax; at least two classes.
    labels : (b,) int
        The correct classes.
    sample : (b,) int, optional
        Where these are the tokens of fewer samples, the index in the batch of the sample that each belongs to, a
        sample's tokens in their order. Only sampled labels need it.

    Returns
    -------
    (b,) float32 (float64 for float64 logits)

    Raises
    ------
    InputError
        For other shapes.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise InputError(
            f"expected logits (b, classes >= 2) and labels (b,); received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    draws = _active()
    if draws is not None:
        samples = len(labels) if sample is None else None
        numbers = np.arange(len(labels)) if sample is None else sample.cpu().numpy().astype(np.int64)
        labels = draws.labels(logits, numbers, samples)
    return chunked_cross_entropy(logits, labels)


def cross_entropy_at(logits: Tensor, index: Tensor, labels: Tensor, sample: Tensor) -> Tensor:
    """Return the cross-entropy of some tokens, (m,), without a copy of their logits.

    Parameters
    ----------
    logits : (tokens, classes) float
        Scores before the softmax.
    index, labels : (m,) int
        Which tokens, and their targets.
    sample : (m,) int
        As for :func:`cross_entropy`.
    """
    draws = _active()
    if draws is not None:
        labels = draws.labels(logits, sample.cpu().numpy().astype(np.int64), None, index)
    return chunked_cross_entropy(logits, labels, index)


def token_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Return the cross-entropy of each sequence over its target tokens.

    Parameters
    ----------
    logits : (b, t, classes) float
        Scores for the token at the same index of ``labels``: shift them before the call.
    labels : (b, t) int
        Target tokens; ``ignore_index`` marks positions that do not count.
    reduction : {"mean", "sum"}
        Over a sample's own target tokens.

    Returns
    -------
    (b,) float32; 0 for a sample without target tokens

    Raises
    ------
    InputError
        For other shapes or another reduction.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise InputError(
            f"expected logits (b, t, classes) and labels (b, t); received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise InputError(f"expected reduction 'mean' or 'sum'; received {reduction!r}")
    counted = labels != ignore_index
    tokens, targets = logits.flatten(0, 1), labels.masked_fill(~counted, 0).flatten()
    draws = _active()
    if draws is not None:
        index = counted.flatten().nonzero().squeeze(1)
        sample = index.cpu().numpy() // max(1, labels.shape[1])
        targets = targets.long().index_copy(0, index, draws.labels(tokens, sample, len(labels), index))
    losses = chunked_cross_entropy(tokens, targets).view(labels.shape)
    total = losses.masked_fill(~counted, 0.0).sum(1)
    return total / counted.sum(1).clamp(min=1) if reduction == "mean" else total


def binary_cross_entropy(logits: Tensor, marks: Tensor) -> Tensor:
    """Return each sample's mean cross-entropy over outputs that are decided independently.

    Parameters
    ----------
    logits : (b, outputs) float
        Scores before the sigmoid.
    marks : (b, outputs) float
        From 0 to 1.

    Returns
    -------
    (b,) of the logits' dtype
    """
    draws = _active()
    if draws is not None:
        marks = draws.marks(logits)
    return F.binary_cross_entropy_with_logits(logits, marks.to(logits.dtype), reduction="none").mean(1)


class LabelDraws:
    """Draws labels while losses run; :func:`sampled_labels` makes one.

    Attributes
    ----------
    seed : int
        Of the draws.
    used : bool
        Whether a loss has drawn labels yet.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.used = seed, False
        self._rows: int | Numbers | None = None
        self._targets = np.zeros(0, np.int64)  # of each sample, in this run of the loss
        self._samples: list[int] = []  # of each call that has one row of logits, or one sequence, a sample
        self._keys: list[Numbers] = []  # sample and target of the labels drawn in the last run
        self._drawn: list[Tensor] = []  # these labels
        self._repeated: Numbers | None = None  # samples of the last run that a run repeats

    @contextmanager
    def rows(self, rows: int | Numbers) -> Iterator[None]:
        """Say which store rows the samples of a batch are: (b,) int, or the row of its first sample."""
        before, self._rows = self._rows, rows
        self._begin()
        try:
            yield
        finally:
            self._rows = before

    @contextmanager
    def repeating(self, samples: Sequence[int]) -> Iterator[None]:
        """Have the loss run on some samples of the last run's batch, in this order, with the labels drawn there.

        Drawn again, they could be others: a model without its taps, or another batch, may round differently.
        """
        before, self._repeated = self._repeated, np.array(samples, np.int64)
        try:
            with self.rows(self._row_numbers(self._repeated)):
                yield
        finally:
            self._repeated = before

    def run(self, per_sample_loss: Callable[[Any, Any], Any], model: Any, batch: Any) -> Any:
        """Run a loss, once, over a batch whose rows were said.

        Raises
        ------
        InputError
            If it is not clear which sample some logits belong to.
        """
        self._begin()
        losses = per_sample_loss(model, batch)
        for samples in self._samples if isinstance(losses, Tensor) and losses.dim() else ():
            if samples != len(losses):
                raise InputError(
                    f"expected one row of logits for each of the {len(losses)} losses, where labels are sampled; "
                    f"received {samples}: use token_cross_entropy, or give cross_entropy the sample of each (sample=)"
                )
        return losses

    def labels(self, logits: Tensor, sample: Numbers, samples: int | None, index: Tensor | None = None) -> Tensor:
        """Return labels (m,) drawn from the softmax of logits (n, classes), or of those at ``index`` (m,).

        ``sample`` (m,) says which sample each belongs to, ``samples`` how many there are, where that is known.
        """

        def draw(uniform: Tensor) -> Tensor:
            drawn = torch.empty(len(uniform), dtype=torch.int64, device=logits.device)
            step = max(1, (_AT_ONCE_CPU if logits.device.type == "cpu" else _AT_ONCE) // logits.shape[1])
            for low in range(0, len(uniform), step):
                part = slice(low, low + step)
                scores = logits.detach()[part if index is None else index[part]]
                drawn[part] = _invert(scores, uniform[part])
            return drawn

        return self._draw(draw, sample, samples, logits.device)

    def marks(self, logits: Tensor) -> Tensor:
        """Return marks (b, outputs), 1 with the probability that logits give, else 0."""
        b, outputs = logits.shape
        probability = torch.sigmoid(logits.detach().double()).flatten()
        sample = np.repeat(np.arange(b), outputs)
        marks = self._draw(lambda uniform: uniform < probability, sample, b, logits.device)
        return marks.view(b, outputs).to(logits.dtype)

    def _begin(self) -> None:
        self._targets, self._samples = self._targets[:0], []
        if self._repeated is None:
            self._keys, self._drawn = [], []

    def _row_numbers(self, sample: Numbers) -> Numbers:
        if self._rows is None:
            raise InputError("expected the rows of a batch whose labels are sampled; received none: use rows()")
        if not isinstance(self._rows, np.ndarray):
            return self._rows + sample
        if sample.max(initial=-1) >= len(self._rows):
            raise InputError(
                f"expected logits of {len(self._rows)} samples, where labels are sampled; received more: use "
                "token_cross_entropy, or give cross_entropy the sample of each (sample=)"
            )
        return np.asarray(self._rows[sample])

    def _draw(
        self, draw: Callable[[Tensor], Tensor], sample: Numbers, samples: int | None, device: torch.device
    ) -> Tensor:
        """Return the values (m,) that ``draw`` makes of uniform numbers (m,), or those drawn in the run repeated."""
        self.used = True
        if samples is not None:
            self._samples.append(samples)
        target, rows = self._next_targets(sample), self._row_numbers(sample)
        keys = (sample if self._repeated is None else self._repeated[sample]) << 32 | target
        if self._repeated is not None:
            earlier = np.concatenate([np.empty(0, np.int64), *self._keys])
            order = np.argsort(earlier)
            position = np.searchsorted(earlier[order], keys)
            if len(keys) and position.max() < len(order) and (earlier[order][position] == keys).all():
                return torch.cat(self._drawn)[torch.from_numpy(order[position]).to(device)]
        with torch.no_grad():
            values = draw(torch.from_numpy(_hash_to_unit(self.seed, rows, target)).to(device))
        if self._repeated is None:
            self._keys.append(keys)
            self._drawn.append(values)
        return values

    def _next_targets(self, sample: Numbers) -> Numbers:
        """Return which target of its sample each is, from 0, earlier calls in this run counted."""
        counts = np.bincount(sample, minlength=len(self._targets))
        earlier = np.zeros_like(counts)
        earlier[: len(self._targets)] = self._targets
        self._targets = earlier + counts
        order, target = np.argsort(sample, kind="stable"), np.empty_like(sample)
        target[order] = np.arange(len(sample)) - (np.cumsum(counts) - counts)[sample[order]]
        return np.asarray(target + earlier[sample])


_drawing: ContextVar[LabelDraws | None] = ContextVar("drawing", default=None)
_contexts: list[LabelDraws] = []  # of all threads


@contextmanager
def sampled_labels(seed: int = 0) -> Iterator[LabelDraws]:
    """Have this package's losses draw labels from the model's predictions, in this thread and meanwhile.

    Parameters
    ----------
    seed : int
        Of the draws.

    Yields
    ------
    LabelDraws
        Tell its ``rows`` which rows a batch's samples are before the loss runs.

    Examples
    --------
    >>> with ooc_influence.extract.sampled_labels(seed=0) as draws, draws.rows(first_row):
    ...     losses = per_sample_loss(model, batch)
    """
    draws = LabelDraws(seed)
    token = _drawing.set(draws)
    _contexts.append(draws)
    try:
        yield draws
    finally:
        _contexts.remove(draws)
        _drawing.reset(token)


def active_draws() -> LabelDraws | None:
    """Return what draws labels in this thread now; None outside of :func:`sampled_labels`."""
    return _drawing.get()


def _active() -> LabelDraws | None:
    # gradient checkpoints run a loss again in the backward pass, on a GPU in another thread, piece by piece
    if _contexts and torch._C._current_graph_task_id() != -1:
        raise UnsupportedModelError(
            "expected a loss that is not computed again in the backward pass, where labels are sampled; received one "
            "inside a gradient checkpoint: leave it out of the checkpoint, or use labels='dataset'"
        )
    return _drawing.get()


def rows_of_batch(rows: int | Numbers) -> AbstractContextManager[None]:
    """Say which store rows the samples of a batch are, (b,) or the first one's, in case labels are drawn."""
    draws = active_draws()
    return nullcontext() if draws is None else draws.rows(rows)


def repeating_samples(samples: Sequence[int]) -> AbstractContextManager[None]:
    """Say that a loss runs again on some samples of the batch, in this order, with the labels it drew, if it did."""
    draws = active_draws()
    return nullcontext() if draws is None else draws.repeating(samples)


def run_loss(per_sample_loss: Callable[[Any, Any], Any], model: Any, batch: Any) -> Any:
    """Run a loss, once, over a batch."""
    draws = active_draws()
    return per_sample_loss(model, batch) if draws is None else draws.run(per_sample_loss, model, batch)


def _invert(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return the first class of each row whose cumulative probability exceeds a number."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sums = (wide - wide.amax(1, keepdim=True)).exp_().cumsum(1, dtype=torch.float64)
    wanted = uniform.unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)


def _hash_to_unit(seed: int, rows: Numbers, targets: Numbers) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) by SplitMix64's mixing function (Steele, Lea and Flood 2014) of seed, row and target."""
    mixed = _mix(np.array([seed % 2**64], np.uint64))
    for values in (rows, targets):
        mixed = _mix(mixed ^ values.astype(np.uint64))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))

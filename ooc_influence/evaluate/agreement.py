"""How well a store's compressed scores agree with uncompressed ones, on a few hundred samples of the user's own model.

Gradients of the same samples are extracted twice: as the store has them, and in full. Full ones are never in memory
together: a group of layers at a time, only their products K = Σ_layers G Gᵀ (n, n) are kept. Seven of eight samples
make F, the others are queries. Both kinds of scores come from K alone, with m the rows of F (Woodbury's identity):

    G_q (F + λI)⁻¹ G_tᵀ = m K_qt (K_tt + mλI)⁻¹ ,    self-influence = m diag(K_tt (K_tt + mλI)⁻¹) ,

at the same λ = damping · tr(F)/min(k, n) of the stored rows, since stored products estimate full ones, with n the rows
of the store: the λ of its own curvature. F of so few rows is not that of the corpus: what is compared is the
compression, everything else being equal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from ooc_influence.compress import Identity
from ooc_influence.curvature import DEFAULT_DAMPING
from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.extract import PerSampleLoss, extract_gradients, parse_device, part_of, recorded_checkpoints
from ooc_influence.memory import MemoryBudget, format_bytes
from ooc_influence.options import CheckOptions, takes
from ooc_influence.store import GradientStore, LayerShape, PathLike, as_store

Matrix = npt.NDArray[np.float64]
_TOP = 10
_ENTRY_BYTES = 40  # of a group's entries while its rows are taken: mask, indices, a batch of rows, its copy
_GOOD, _FAIR, _GAIN = 0.9, 0.7, 0.05  # of a rank correlation; a difference worth telling
_LEAST_ROWS = 32


@dataclass(frozen=True)
class Agreement:
    """Agreement at one damping.

    Attributes
    ----------
    damping : float
        Relative: λ = damping · tr(F)/min(k, n).
    scores : float
        Spearman's rank correlation of stored and whole scores over train rows, mean over queries.
    top : float
        Share of the ten strongest proponents that both have, mean over queries.
    self_influence : float
        Spearman's rank correlation of self-influence.
    """

    damping: float
    scores: float
    top: float
    self_influence: float


@dataclass(frozen=True)
class CheckResult:
    """The result of :func:`check`.

    Attributes
    ----------
    rows, queries : int
        Samples that F was made of, and others that were scored against them.
    p, k : int
        Entries of a whole gradient; numbers stored.
    agreement : tuple of Agreement
        At each damping.
    advice : tuple of str
        In words.
    """

    rows: int
    queries: int
    p: int
    k: int
    agreement: tuple[Agreement, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.queries} queries against {self.rows} rows; {self.k} numbers stored of {self.p} entries, "
            "F of these rows on both sides",
            "damping    scores    top 10    self-influence   (rank correlation, overlap, rank correlation)",
        ]
        for each in self.agreement:
            mark = "  default" if each.damping == DEFAULT_DAMPING else ""
            lines.append(
                f"{each.damping:7g}   {each.scores:7.3f}   {each.top:7.3f}   {each.self_influence:15.3f}{mark}"
            )
        return "\n".join([*lines, *self.advice])


@takes(CheckOptions)
def check(
    store: GradientStore | PathLike,
    model: torch.nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Any,
    **options: Unpack[CheckOptions],
) -> CheckResult:
    """Compare a store's scores with uncompressed ones on a few samples.

    Parameters
    ----------
    store : GradientStore or path
        The store: its mask, its basis, its representation.
    model, per_sample_loss, batches
        As it was extracted with (:func:`extract_gradients`); some of the samples are taken, spread over the data where
        batches can be addressed.
    **options : CheckOptions
        See :mod:`ooc_influence.options`. Full gradients are computed for groups of layers that fit ``memory``.

    Raises
    ------
    InputError
        For too few rows, or a damping that is not positive.
    MemoryBudgetError
        If the gradients of one layer do not fit.
    OocInfluenceError
        See :func:`extract_gradients`.
    """
    train = as_store(store)
    rows, dampings = options["rows"], options["dampings"]
    if isinstance(rows, bool) or rows < _LEAST_ROWS:
        raise InputError(f"expected at least {_LEAST_ROWS} rows to compare on; received {rows!r}")
    if any(not damping > 0 for damping in dampings):
        raise InputError(f"expected dampings > 0; received {list(dampings)}")
    layers = [module.layer for module in train.mask.modules]
    checkpoints = recorded_checkpoints(train)
    budget = MemoryBudget.of(options["memory"])
    groups = list(_groups(layers, rows, budget.limit - budget.reserved))
    sample = part_of(batches, rows)
    how: dict[str, Any] = {"device": parse_device(model, options["device"]), "progress": options["progress"]}
    with tempfile.TemporaryDirectory(prefix=".ooc_influence-check-", dir=options["folder"]) as name:
        compressed = extract_gradients(
            model, per_sample_loss, sample, Path(name) / "stored", like=train, dtype=train.layout.dtype, **how
        )
        n = compressed.n
        if n < _LEAST_ROWS:
            raise InputError(f"expected at least {_LEAST_ROWS} samples to compare on; received data with {n}")
        stored, whole = _products(compressed), np.zeros((n, n))
        for number, group in enumerate(groups):
            whole += _products(
                extract_gradients(
                    model, per_sample_loss, sample, Path(name) / f"whole-{number}", compressor=Identity(),
                    dtype="float32", modules=group, check_gradients=False, checkpoints=checkpoints, **how,
                )
            )  # fmt: skip
    agreement = compare(stored, whole, min(train.k, max(n, train.n)), sorted({*dampings, DEFAULT_DAMPING}))
    queries, p = len(range(0, n, 8)), sum(layer.entries for layer in layers)
    return CheckResult(n - queries, queries, p, train.k, agreement, tuple(_advice(train, agreement)))


def compare(stored: Matrix, whole: Matrix, dimension: int, dampings: Sequence[float]) -> tuple[Agreement, ...]:
    """Return how products of stored rows (n, n) agree with those of whole ones; every eighth row is a query.

    λ is a damping times the trace of F of the stored rows over ``dimension``.
    """
    numbers = np.arange(len(stored))
    queries, rows = numbers[::8], np.delete(numbers, numbers[::8])
    m, agreement = len(rows), []
    for damping in dampings:
        value = damping * float(np.trace(stored[np.ix_(rows, rows)])) / m / dimension
        scores, selves = zip(*(_scores(K, queries, rows, value) for K in (stored, whole)), strict=True)
        correlations = [_spearman(left, right) for left, right in zip(*scores, strict=True)]
        best = [np.argsort(-each, axis=1, kind="stable")[:, :_TOP] for each in scores]
        overlap = [len(np.intersect1d(left, right)) / best[0].shape[1] for left, right in zip(*best, strict=True)]
        agreement.append(
            Agreement(damping, float(np.mean(correlations)), float(np.mean(overlap)), _spearman(selves[0], selves[1]))
        )
    return tuple(agreement)


def _scores(K: Matrix, queries: Any, rows: Any, value: float) -> tuple[Matrix, Matrix]:
    m = len(rows)
    inner = K[np.ix_(rows, rows)]
    factor = np.linalg.solve(inner + m * value * np.eye(m), np.concatenate([inner, K[np.ix_(rows, queries)]], axis=1))
    return m * factor[:, m:].T, m * np.diagonal(factor[:, :m])


def _spearman(left: Matrix, right: Matrix) -> float:
    ranks = [rankdata(values) for values in (left, right)]
    if any(np.ptp(values) == 0 for values in ranks):
        return float(np.array_equal(*ranks))
    return float(np.corrcoef(*ranks)[0, 1])


def _groups(layers: Sequence[LayerShape], rows: int, free: int) -> Iterator[list[LayerShape]]:
    """Cut layers into groups whose gradients fit: entries of the mask, and all rows to multiply."""
    each = _ENTRY_BYTES + 8 * rows
    group: list[LayerShape] = []
    for layer in layers:
        if each * layer.entries > free:
            raise MemoryBudgetError(
                f"check of layer {layer.name} needs {format_bytes(each * layer.entries)} for whole gradients of {rows} "
                f"rows, budget {format_bytes(max(0, free))} beside what the process holds: use fewer --rows, or more "
                "--memory"
            )
        if group and each * (layer.entries + sum(other.entries for other in group)) > free:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _products(store: GradientStore) -> Matrix:
    rows = store.rows()
    products = np.zeros((len(rows), len(rows)))
    step = max(1, 2**24 // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step].astype(np.float64)
        products += part @ part.T
    return products


def _advice(store: GradientStore, agreement: Sequence[Agreement]) -> Iterator[str]:
    default = next(each for each in agreement if each.damping == DEFAULT_DAMPING)
    best = max(agreement, key=lambda each: each.scores)
    worst = min(default.scores, default.self_influence)
    level = "close to" if worst >= _GOOD else "roughly like" if worst >= _FAIR else "far from"
    yield f"At the default damping stored scores rank {level} uncompressed ones."
    if best.scores > default.scores + _GAIN:
        yield (
            f"At a damping of {best.damping:g} compression changes scores less ({best.scores:.3f} against "
            f"{default.scores:.3f}); whether it attributes better is another question."
        )
    if worst >= _GOOD:
        return
    settings = store.attrs.get("compressor") or {}
    if settings.get("sampling", "importance") != "importance":
        yield "Importance sampling (--sampling importance) keeps more of the same number of entries."
    left_out = float((store.attrs.get("reduction") or {}).get("left_out", 0.0))
    if left_out > 1 - _GOOD:
        yield f"The reduction leaves out {left_out:.0%} of the gradients' energy: more --dims, or a larger --pilot."
    yield "More entries (--k) bring stored products closer to whole ones: their variance falls as 1/k."

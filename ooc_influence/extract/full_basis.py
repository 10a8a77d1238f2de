"""The whole Kronecker basis of a store: all entries of every layer, for exact EK-FAC scores of a few rows.

The pilot of the store's own basis is run again, and for each layer all eigenvectors and the Λ of all entries are kept,
in a store without rows whose mask keeps every entry of that layer: a folder a layer, read one or a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.compress import KroneckerBasis, WhitenedEnergy, all_entries
from ooc_influence.errors import InputError, StoreNotFoundError, counted
from ooc_influence.extract.checkpoints import Checkpoint
from ooc_influence.extract.data import Batches, BudgetBatches, Numbers, cut_batches, numbered_batches, to_device
from ooc_influence.extract.factors import grouped
from ooc_influence.extract.fingerprint import fingerprint_as
from ooc_influence.extract.losses import rows_of_batch
from ooc_influence.extract.passes import ModelSetup, RowGatherer
from ooc_influence.extract.pilot import Pilot
from ooc_influence.extract.taps import Taps, tapped
from ooc_influence.fingerprint import check_same
from ooc_influence.linalg import LayerMoments, basis_settings, damping_scope, mean_moments
from ooc_influence.linalg.device import send_array
from ooc_influence.memory import MemoryBudget, MemoryModel
from ooc_influence.store import GradientStore, LayerShape, Mask, ModuleMask, StorePath, check_extracted, exists

FOLDER = "factors"  # in the store's folder, where they are kept
_ENTRY_BYTES = 20 + 8 + 12  # of an entry: its place, weight and Λ in a mask; squares or a scale; working copies
_ROW_BYTES = 12  # of an entry of a row: itself, a layer's part, a square or product
_MOST_ROWS = 64


def factors_path(store: GradientStore) -> StorePath:
    """Return where a store's whole basis is kept."""
    return store.path / FOLDER


def _empty_mask(layer: LayerShape) -> ModuleMask:
    return ModuleMask(layer, np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def _mask_of(layers: Sequence[LayerShape], full: dict[int, ModuleMask]) -> Mask:
    return Mask(tuple(full.get(number) or _empty_mask(layer) for number, layer in enumerate(layers)))


def _pass_memory(layers: Sequence[LayerShape], numbers: Sequence[int], queries: int) -> MemoryModel:
    entries = sum(layers[number].entries for number in numbers)
    largest = max((layers[number] for number in numbers), key=lambda layer: layer.entries)
    sizes = f"up to {largest.entries} entries ({largest.name or 'the model'})"
    stage = f"whole gradients of {counted(len(numbers), 'layer')}, {sizes}"
    fixed, per_row = (_ENTRY_BYTES + 8 * queries) * entries, _ROW_BYTES * entries
    return MemoryModel(stage, fixed, 0, per_row, min_rows=1, max_rows=_MOST_ROWS)


@dataclass(frozen=True)
class FullBasis:
    """All entries of every layer in a Kronecker basis.

    Attributes
    ----------
    path : StorePath
        Where they are: a store without rows for each layer, named by its number.
    layers : tuple of LayerShape
        The layers.
    means : tuple of float
        What damping is relative to, for each layer.
    """

    path: StorePath
    layers: tuple[LayerShape, ...]
    means: tuple[float, ...]

    @classmethod
    def open(cls, train: GradientStore, path: StorePath) -> FullBasis | None:
        """Return the whole basis at a path; None where it is not there, or not complete.

        Raises
        ------
        MismatchError
            If it is of another store's layers, basis or model.
        """
        layers = tuple(module.layer for module in train.mask.modules)
        sums = []
        for number, layer in enumerate(layers):
            try:
                store = GradientStore.open(path / str(number))
            except StoreNotFoundError:
                return None
            expected, received = _identity(train), store.attrs.get("full_basis") or {}
            check_same(
                train.path, expected, {name: received.get(name) for name in expected},
                f"remove {path}, which is of another run", other=path,
            )  # fmt: skip
            sums.append(float(received["mean"]) * layer.entries)
        entries = [layer.entries for layer in layers]
        return cls(path, layers, tuple(mean_moments(sums, entries, damping_scope(train))))

    def mask(self, numbers: Sequence[int]) -> Mask:
        """Return a mask that keeps all entries of some layers, and none of the others."""
        return _mask_of(self.layers, {number: self._module(number) for number in numbers})

    def _module(self, number: int) -> ModuleMask:
        """Return a layer's mask, with what its damping is relative to; of one without gradient any λ serves."""
        kept = GradientStore.open(self.path / str(number)).mask.modules[0]
        assert kept.basis is not None
        return replace(kept, basis=replace(kept.basis, mean_moment=self.means[number] or max(self.means)))

    def passes(self, budget: MemoryBudget, queries: int) -> Iterator[tuple[list[int], int]]:
        """Yield layers, by number, whose gradients fit a budget together, and rows at a time, with some queries.

        Raises
        ------
        MemoryBudgetError
            If those of a single layer do not fit.
        """
        groups = grouped(len(self.layers), lambda numbers: _pass_memory(self.layers, numbers, queries), budget)
        for numbers in groups:
            yield numbers, budget.plan(_pass_memory(self.layers, numbers, queries))


def _identity(train: GradientStore) -> dict[str, Any]:
    """Return what a whole basis has in common with its store."""
    return {"mask": train.mask_digest, "model": train.model_fingerprint, "basis": basis_settings(train.attrs)}


def keep_factors(pilot: Pilot, train: GradientStore, path: StorePath) -> FullBasis:
    """Return the whole basis of a store at a path, made there from the pilot's samples where it is missing.

    Parameters
    ----------
    pilot : Pilot
        With the model, loss and data of the store.
    train : GradientStore
        In a Kronecker basis, not reduced.
    path : StorePath
        Where.

    Raises
    ------
    InputError
        For a store in no such basis.
    MemoryBudgetError
        If a single layer's factors or entries do not fit.
    StoreWriteError
        If the disk refuses.
    """
    settings = basis_settings(train.attrs)
    if not settings or not train.mask.has_basis:
        raise InputError(
            f"expected a store in a Kronecker basis; received {train.path}, which is in the parameters' own: extract "
            "with basis='kronecker' (--basis kronecker)"
        )
    found = FullBasis.open(train, path)
    if found is not None:
        return found
    basis, layers = KroneckerBasis(**settings), [module.layer for module in train.mask.modules]
    with pilot.labels(basis):
        factors = pilot.factors(layers, basis.samples)
        energy = WhitenedEnergy(layers, factors.moments, replace(basis, damping_scope="layer"))
        budget = MemoryBudget.of(pilot.memory)
        missing = [number for number in range(len(layers)) if not exists(path / str(number))]
        groups = grouped(len(missing), lambda part: _pass_memory(layers, [missing[n] for n in part], 0), budget)
        for group in groups:
            numbers = [missing[number] for number in group]
            rows = budget.plan(_pass_memory(layers, numbers, 0))
            full = {number: factors.basis_of(number, all_entries(layers[number]), energy) for number in numbers}
            mask = _mask_of(layers, full)
            if basis.moments == "measured":
                mask = pilot.measure(mask, basis.samples, "layer", rows)
            _save(mask, numbers, path, train)
    found = FullBasis.open(train, path)
    assert found is not None
    return found


def _save(mask: Mask, numbers: Sequence[int], path: StorePath, train: GradientStore) -> None:
    for number in numbers:
        module = mask.modules[number]
        assert module.basis is not None
        facts = _identity(train) | {"mean": module.basis.mean_moment}
        made = GradientStore.create(
            path / str(number), Mask((module,)), dtype="float32", attributes={"full_basis": facts}, exist_ok=True
        )
        made.close()


@dataclass(frozen=True, eq=False)
class ExactScores:
    """EK-FAC scores of whole gradients.

    Attributes
    ----------
    products : (q, m) float64
        Σ_e g_qe g_ie / (Λ_e + λ).
    query_squares, squares : (q,) and (m,) float64
        The same of each query, and of each row, with itself.
    query_losses, losses : (q,) and (m,) float32
        Losses of the samples.
    """

    products: npt.NDArray[np.float64]
    query_squares: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    query_losses: npt.NDArray[np.float32]
    losses: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Samples:
    """Some samples of a data set.

    Attributes
    ----------
    batches : iterable, callable or BudgetBatches
        The data, as for :func:`extract_gradients`.
    numbers : (m,) int64
        Which of its samples, ascending.
    """

    batches: Batches | BudgetBatches
    numbers: Numbers


def exact_scores(
    setup: ModelSetup, basis: FullBasis, queries: Samples, rows: Samples, *, damping: float, budget: MemoryBudget,
    checkpoints: Sequence[Checkpoint] = (), advance: Callable[[int], None] = lambda rows: None,
) -> ExactScores:  # fmt: skip
    """Return EK-FAC scores of whole gradients, layer group by layer group, without more than some rows of one.

    Parameters
    ----------
    setup : ModelSetup
        The model and its loss.
    basis : FullBasis
        Eigenvectors and Λ.
    queries, rows : Samples
        What is scored against what.
    damping : float
        λ relative to the mean Λ of each layer, or of the model.
    budget : MemoryBudget
        Decides how many layers are taken at a time: each group is a pass over the samples.
    checkpoints : sequence of Checkpoint
        Earlier ones that gradients are averaged over.
    advance : callable
        Called with the number of rows as they are done.

    Raises
    ------
    MemoryBudgetError
        If a single layer does not fit.
    """
    products = np.zeros((len(queries.numbers), len(rows.numbers)))
    query_squares, squares = np.zeros(len(queries.numbers)), np.zeros(len(rows.numbers))
    query_losses, losses = (np.zeros(len(each.numbers), np.float32) for each in (queries, rows))
    for numbers, most in basis.passes(budget, len(queries.numbers)):
        mask = basis.mask(numbers)
        scale = send_array((1 / np.square(LayerMoments.of(mask).scale(damping))).astype(np.float32), setup.device)
        gatherer = RowGatherer(mask, setup.device, None, checkpoints)
        with tapped(setup.model, basis.layers, setup.device, skip=mask.empty_modules) as taps:
            whole = torch.empty((len(queries.numbers), mask.k), device=setup.device)
            for places, values, found in _gradients(setup, taps, gatherer, queries, most):
                whole[torch.from_numpy(places)], query_losses[places] = found, values
            query_squares += _squares(whole, scale)
            whole *= scale
            for places, values, found in _gradients(setup, taps, gatherer, rows, most):
                products[:, places] += (found @ whole.t()).double().cpu().numpy().T
                squares[places] += _squares(found, scale)
                losses[places] = values
                advance(len(places))
    return ExactScores(products, query_squares, squares, query_losses, losses)


def _gradients(
    setup: ModelSetup, taps: Taps, gatherer: RowGatherer, samples: Samples, most: int
) -> Iterator[tuple[Numbers, npt.NDArray[np.float32], Tensor]]:
    """Yield at most some samples at a time: which they are, their losses (b,), and their gradients (b, k)."""
    for places, batch in numbered_batches(samples.batches, samples.numbers):
        for part, cut in cut_batches(batch, most):
            with rows_of_batch(samples.numbers[places[part]]):
                losses, rows, _ = gatherer(taps, setup.per_sample_loss, to_device(cut, setup.device))
            yield places[part], losses.float().cpu().numpy(), rows


def _squares(rows: Tensor, scale: Tensor) -> npt.NDArray[np.float64]:
    """Return Σ scale · row² of rows (b, k), one at a time."""
    values: npt.NDArray[np.float64] = torch.stack([(row.square() @ scale).double() for row in rows]).cpu().numpy()
    return values


def check_model(train: GradientStore, model: torch.nn.Module, advice: str, *, other: object = None) -> None:
    """Refuse a model that is not the one that a store was made with.

    Raises
    ------
    InputError
        For imported rows.
    MismatchError
        With ``advice``; ``other`` names the model in the message.
    """
    check_extracted(train)
    expected = train.model_fingerprint
    received = fingerprint_as(model, expected)
    check_same(train.path, {"model": expected}, {"model": received}, advice, other=other)

"""The factors of a Kronecker basis: second moments of layers' inputs and output gradients, and their eigenvectors.

For a layer with inputs x and output gradients δ they are A = E[x xᵀ] and S = E[δ δᵀ] over tokens (Martens and Grosse
2015, arXiv 1503.05671; convolutions through their unfolded inputs: Grosse and Martens 2016, arXiv 1602.01407). Tokens
whose δ is zero, such as padding, do not count. A side of :data:`DIAGONAL_FROM` features or more, a vocabulary, stays in
its own coordinates, as do layers that are no outer product: normalisations, biases, layers that are run again.

Sums are float64. Layers are divided into groups whose sums fit a budget of memory, and each group is a pass over the
pilot's samples; eigenvectors wait in files until it is known which of them are kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.compress import KroneckerBasis, WhitenedEnergy
from ooc_influence.errors import InputError, MemoryBudgetError, StoreWriteError, counted, writing
from ooc_influence.extract.entries import BiasEntries, wide
from ooc_influence.extract.layers import Use, find_uses
from ooc_influence.extract.selection import ModuleSelection, select_layers
from ooc_influence.linalg import mean_moments, symmetric_eigen
from ooc_influence.memory import MemoryBudget, MemoryModel, format_bytes
from ooc_influence.scratch import ArrayFile
from ooc_influence.store import LayerShape, Mask, ModuleBasis, ModuleMask, PilotMoments

DIAGONAL_FROM = 30_000  # features; the widest side of a hidden layer in use is 29,568, the smallest vocabularies 30,522
_SUM_BYTES = 8 + 4  # of each entry of A and S: its sum, and a batch's part until all of the batch is finite
_SOLVER_BYTES = 3 * 8  # of the matrix whose eigenvectors are computed
Floats = npt.NDArray[np.float64]
Sides = tuple[bool, bool]  # whether rows, and columns, of the entry matrix are rotated


def rotated_sides(layers: Sequence[LayerShape], uses: Sequence[Use]) -> list[Sides]:
    """Return which sides of each layer are rotated: those that can be in every module that uses its weight."""
    return [_sides_of(layer, [use for use in uses if use.layer == number]) for number, layer in enumerate(layers)]


def _sides_of(layer: LayerShape, uses: Sequence[Use]) -> Sides:
    left, right = (size < DIAGONAL_FROM for size in layer.shape)
    for use in uses:
        same = use.own or (use.shared.get("weight") == "weight" and _inputs(use.shape) == _inputs(layer))
        of_rows, of_cols = use.kind.rotates(use.module) if same else (False, False)
        left, right = left and of_rows, right and of_cols
    one_orientation = len({use.kind.kind == "transposed_linear" for use in uses}) == 1
    return (left, right) if one_orientation else (False, False)


def _inputs(shape: LayerShape) -> tuple[int, int]:
    return shape.shape[0], shape.shape[1] - shape.bias


def _squares(layers: Sequence[LayerShape], sides: Sequence[Sides]) -> list[list[int]]:
    """Return the entries of each layer's matrices of moments, or of eigenvectors, one for each rotated side."""
    return [[n**2 for n, full in zip(layer.shape, rotated, strict=True) if full]
            for layer, rotated in zip(layers, sides, strict=True)]  # fmt: skip


def scratch_bytes(layers: Sequence[LayerShape], sides: Sequence[Sides]) -> int:
    """Return the size of the temporary files with all eigenvectors."""
    return 4 * sum(map(sum, _squares(layers, sides)))


def check_scratch(layers: Sequence[LayerShape], sides: Sequence[Sides]) -> None:
    """Check that all eigenvectors fit the disk of temporary files.

    Raises
    ------
    StoreWriteError
        If they do not.
    """
    folder, needed = tempfile.gettempdir(), scratch_bytes(layers, sides)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreWriteError(
            f"expected {format_bytes(needed)} free in {folder} for the eigenvectors of the Kronecker basis; received "
            f"{format_bytes(free)}: set TMPDIR to a folder of a larger disk, or leave the largest layers out with "
            "modules= (--modules)"
        )


def factor_memory(layers: Sequence[LayerShape], sides: Sequence[Sides]) -> MemoryModel:
    """Return the memory that layers' factors take while a pass sums them and their eigenvectors are computed."""
    squares = _squares(layers, sides)
    sums = _SUM_BYTES * sum(map(sum, squares)) + 16 * sum(sum(layer.shape) for layer in layers)
    largest = max(layers, key=lambda layer: layer.entries)
    return MemoryModel(
        f"second moments of {counted(len(layers), 'layer')}, up to {largest.shape[0]} x {largest.shape[1]} "
        f"({largest.name or 'the model'})",
        sums + _SOLVER_BYTES * max(map(max, filter(None, squares)), default=0), 0, 0,
        advice="leave the largest layers out with modules= (--modules)",
    )  # fmt: skip


def factor_groups(layers: Sequence[LayerShape], sides: Sequence[Sides], budget: MemoryBudget) -> list[list[int]]:
    """Divide layers, by number, into groups whose factors fit a budget: each is a pass over the pilot's samples.

    Raises
    ------
    MemoryBudgetError
        If a single layer's do not fit.
    """
    return grouped(
        len(layers), lambda numbers: factor_memory([layers[n] for n in numbers], [sides[n] for n in numbers]), budget
    )


def grouped(count: int, make: Callable[[Sequence[int]], MemoryModel], budget: MemoryBudget) -> list[list[int]]:
    """Divide the numbers below ``count``, in their order, into groups whose memory models fit a budget.

    Raises
    ------
    MemoryBudgetError
        If that of a single number does not fit.
    """
    groups: list[list[int]] = []
    for number in range(count):
        joined = [*groups[-1], number] if groups else [number]
        if groups and budget.fits(make(joined)):
            groups[-1] = joined
            continue
        budget.plan(make([number]))
        groups.append([number])
    return groups


@dataclass(frozen=True)
class BasisPlan:
    """What the Kronecker basis of a model takes, from the shapes of its layers alone.

    Attributes
    ----------
    passes : int or None
        Over the pilot's samples, to sum the factors; None where a layer's do not fit the budget.
    memory : MemoryModel
        Of the factors of the largest group of layers or, where it does not fit, of the largest layer.
    scratch : int
        Bytes of temporary files with all eigenvectors.
    kept : int
        Bytes of the eigenvectors that a store keeps with about k entries on grids, its weights and second moments.
    rotation : float
        Multiplications of rotating activations and forming the kept entries, relative to those of the forward pass
        through the same layers.
    """

    passes: int | None
    memory: MemoryModel
    scratch: int
    kept: int
    rotation: float

    @classmethod
    def of(cls, model: nn.Module, k: int, budget: MemoryBudget, modules: ModuleSelection = None) -> BasisPlan:
        """Plan for a model, which may be on the meta device, and about ``k`` kept entries.

        Raises
        ------
        InputError
            If no module is selected, or k is larger than their entries.
        """
        layers, _, _ = select_layers(model, modules)
        p = sum(layer.entries for layer in layers)
        if not 1 <= k <= p:
            raise InputError(f"expected k from 1 to p = {p}, the gradient entries of the model; received {k}")
        sides = rotated_sides(layers, find_uses(model, layers))
        try:
            groups = factor_groups(layers, sides, budget)
        except MemoryBudgetError:
            groups = []
        of_groups = [factor_memory([layers[n] for n in group], [sides[n] for n in group]) for group in groups]
        alone = [factor_memory([layer], [rotated]) for layer, rotated in zip(layers, sides, strict=True)]
        kept = forward = rotation = 0.0
        for layer, rotated in zip(layers, sides, strict=True):
            numbers = np.sqrt(layer.entries * k / p) * np.sqrt(np.array(layer.shape) / np.array(layer.shape[::-1]))
            numbers = np.minimum(layer.shape, np.maximum(1, numbers))
            vectors = [size * count for size, count, full in zip(layer.shape, numbers, rotated, strict=True) if full]
            kept += 4 * sum(vectors) + 20 * float(numbers.prod())
            if any(rotated):
                forward += layer.entries if rotated[0] or layer.shape[0] < DIAGONAL_FROM else 0
                rotation += sum(vectors) + float(numbers.prod())
        return cls(
            len(groups) or None, max(of_groups or alone, key=budget.price), scratch_bytes(layers, sides), int(kept),
            rotation / forward if forward else 0.0,
        )  # fmt: skip


class _Factors(NamedTuple):
    """Sums of one use of a layer: (R, R) or (R,), (C, C) or (C,), and the tokens summed over."""

    rows: Tensor
    cols: Tensor
    tokens: int

    def plus(self, rows: Tensor, cols: Tensor, tokens: int) -> _Factors:
        """Return them with those of a batch, in place; where the batch is, if they were restored elsewhere."""
        of_rows, of_cols = self.rows.to(rows.device).add_(rows), self.cols.to(cols.device).add_(cols)
        return _Factors(of_rows, of_cols, self.tokens + tokens)


class FactorSums:
    """Sums of second moments over a pilot's batches, of the layers ``group``."""

    def __init__(self, layers: Sequence[LayerShape], sides: Sequence[Sides], group: Sequence[int]) -> None:
        self.samples = 0
        self._layers, self._sides, self._group = layers, sides, frozenset(group)
        self._sums: dict[tuple[int, str], _Factors] = {}
        self._batch: dict[tuple[int, str], _Factors] = {}

    def receiver(self, b: int) -> Callable[[Use, Any, Any], None]:
        """Return the receiver of a batch of ``b`` samples, without what an earlier attempt at it added."""
        self._batch = {}
        return self._receive

    def _receive(self, use: Use, x: Any, delta: Any) -> None:
        if use.layer not in self._group:
            return
        key = use.layer, use.shape.name
        rows, cols, tokens = self._of(use, x, delta)
        earlier = self._batch.get(key)  # of another call in this batch
        if earlier is not None:
            rows, cols, tokens = earlier.rows + rows, earlier.cols + cols, earlier.tokens + tokens
        self._batch[key] = _Factors(rows, cols, tokens)

    def _of(self, use: Use, x: Any, delta: Any) -> _Factors:
        full_rows, full_cols = self._sides[use.layer]
        if not (full_rows or full_cols):
            return _Factors(*use.kind.moments(use.shape, use.module, x, delta))
        layer = self._layers[use.layer]
        rows, cols = (operand.flatten(0, 1) for operand in use.kind.operands(use.module, x, delta))
        moving = ((cols if rows.dim() == 1 else rows) != 0).any(1)
        rows, cols = rows[moving], cols[moving]
        if cols.shape[1] < layer.shape[1]:
            cols = torch.cat([cols, cols.new_ones((len(cols), 1))], 1)
        if rows.dim() == 1:
            of_rows = torch.bincount(rows, minlength=layer.shape[0])
        else:
            of_rows = _second_moment(rows, full=full_rows)
        return _Factors(of_rows, _second_moment(cols, full=full_cols), len(rows))

    def finish_batch(self, b: int) -> bool:
        """Add the sums of a batch of ``b`` samples; return False, without adding them, if they are not finite."""
        if not all(bool(value.isfinite().all()) for each in self._batch.values() for value in (each.rows, each.cols)):
            return False
        self.samples += b
        for key, (rows, cols, tokens) in self._batch.items():
            total = self._sums.get(key)
            if total is None:
                self._sums[key] = _Factors(rows.double(), cols.double(), tokens)
            else:
                self._sums[key] = total.plus(rows, cols, tokens)
        self._batch = {}
        return True

    @property
    def identity(self) -> Any:
        """See :class:`ooc_influence.extract.pilot_sums.PilotSums`."""
        return sorted(self._group)

    def state(self) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
        """See :class:`ooc_influence.extract.pilot_sums.PilotSums`."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for number, (rows, cols, _) in enumerate(self._sums.values()):
            arrays |= {f"rows{number}": rows.cpu().numpy(), f"cols{number}": cols.cpu().numpy()}
        return [[*key, sums.tokens] for key, sums in self._sums.items()], arrays

    def restore(self, facts: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """See :class:`ooc_influence.extract.pilot_sums.PilotSums`."""
        self._sums = {
            (layer, name): _Factors(
                torch.from_numpy(arrays[f"rows{number}"]), torch.from_numpy(arrays[f"cols{number}"]), tokens
            )
            for number, (layer, name, tokens) in enumerate(facts)
        }

    def solve(self, factors: KroneckerFactors) -> None:
        """Compute the eigenvectors of this group's layers, and the moments in their basis."""
        check_samples(self.samples)
        for number in sorted(self._group):
            uses = [self._sums.pop(key) for key in sorted(self._sums) if key[0] == number]
            if uses:
                self._solve(number, uses, factors)

    def _solve(self, number: int, uses: list[_Factors], factors: KroneckerFactors) -> None:
        layer, sides = self._layers[number], self._sides[number]
        moments: list[list[Floats]] = []  # of rows and of columns, use by use
        for side, (size, full) in enumerate(zip(layer.shape, sides, strict=True)):
            of_uses = [(use.rows, use.cols)[side] for use in uses]
            if full:
                others = [(use.cols, use.rows)[side] for use in uses]
                values, vectors = _eigenbasis(of_uses, others)
                factors.keep(number, side, vectors, size)
            else:
                values = [value.double().cpu().numpy() for value in of_uses]
            moments.append(values)
        for rows, cols, use in zip(*moments, uses, strict=True):
            if any(sides) or len(rows) == layer.shape[0]:  # else a weight shared in another form: its other uses count
                cols = column_moments(layer, cols, use.tokens)
                factors.moments.append(PilotMoments(number, rows / self.samples, cols))


def _second_moment(values: Tensor, *, full: bool) -> Tensor:
    """Return Σ v vᵀ over rows of values (N, size), or Σ v², in float32 or wider."""
    values = values.to(wide(values.dtype))
    return values.t() @ values if full else values.square().sum(0, dtype=torch.float64)


def _eigenbasis(moments: list[Tensor], others: list[Tensor]) -> tuple[list[Floats], Tensor]:
    """Return the second moments of each use along eigenvectors, (size,), and these (size, size), largest first.

    The uses of a tied weight share a basis: that of the sum of their moments, each times the trace of its other side,
    which is what it adds to Λ.
    """
    if len(moments) == 1:
        values, vectors = _eigen(moments[0])
        return [values], vectors
    masses = [float(other.diagonal().sum() if other.dim() == 2 else other.sum()) for other in others]
    vectors = _eigen(torch.stack([mass * moment for mass, moment in zip(masses, moments, strict=True)]).sum(0))[1]
    along = [torch.einsum("ij,ij->j", vectors, moment @ vectors).clamp(min=0) for moment in moments]
    return [value.cpu().numpy() for value in along], vectors


def _eigen(matrix: Tensor) -> tuple[Floats, Tensor]:
    """Return eigenvalues and eigenvectors, largest first; on the host ``matrix`` is overwritten."""
    if matrix.device.type == "cpu":
        values, vectors = symmetric_eigen(matrix.numpy())
        return values, torch.from_numpy(np.ascontiguousarray(vectors))
    ascending = torch.linalg.eigh(matrix)
    return ascending.eigenvalues.flip(0).clamp(min=0).cpu().numpy(), ascending.eigenvectors.flip(1)


def column_moments(layer: LayerShape, cols: Floats, tokens: int) -> Floats:
    """Return the mean of a layer's column moments over tokens; a tied module may lack the bias column."""
    if layer.kind == BiasEntries.kind:
        return np.ones(layer.shape[1])
    full = np.zeros(layer.shape[1])
    full[: len(cols)] = cols[: layer.shape[1]] / max(1, tokens)
    return full


@dataclass
class KroneckerFactors:
    """What a pilot learns: each layer's eigenvectors, in temporary files, and the second moments in their basis.

    Attributes
    ----------
    moments : list of PilotMoments
        Of every use of every layer that received gradients.
    """

    moments: list[PilotMoments] = field(default_factory=list)
    _vectors: dict[tuple[int, int], npt.NDArray[np.float32]] = field(default_factory=dict)

    def keep(self, layer: int, side: int, vectors: Tensor, size: int) -> None:
        """Write a side's eigenvectors (size, size), the largest eigenvalue's first, to a temporary file."""
        with writing("to write eigenvectors to a temporary file"), ArrayFile(np.float32) as file:
            for column in vectors.t().split(max(1, 2**22 // size)):
                file.append(column.float().cpu().numpy().ravel())
            self._vectors[layer, side] = file.finish().reshape(size, size)  # one eigenvector a row

    def basis_of(self, number: int, kept: ModuleMask, energy: WhitenedEnergy) -> ModuleMask:
        """Return a layer's mask with its basis; Λ is K-FAC's product of eigenvalues."""
        sides = []
        for side, indices in enumerate((kept.rows, kept.cols)):
            vectors = self._vectors.get((number, side))
            sides.append(None if vectors is None else np.ascontiguousarray(vectors[np.unique(indices)].T))
        moment = energy.moment(number, kept.rows.astype(np.int64), kept.cols.astype(np.int64))
        return replace(kept, basis=ModuleBasis(sides[0], sides[1], moment, energy.means[number]))

    def apply(self, mask: Mask, basis: KroneckerBasis) -> Mask:
        """Return a mask of entries in the basis, with the eigenvectors of those kept."""
        energy = WhitenedEnergy([module.layer for module in mask.modules], self.moments, basis)
        modules = tuple(self.basis_of(number, kept, energy) for number, kept in enumerate(mask.modules))
        return replace(mask, modules=modules)


def check_samples(samples: int) -> None:
    """Check that a pass over a pilot's batches met samples."""
    if not samples:
        raise InputError("expected pilot batches with samples; received none: the data set is empty")


def measured(mask: Mask, squares: Floats, samples: int, scope: str) -> Mask:
    """Return a mask with Λ as it was measured.

    The sum of a layer's Λ, over kept and other entries, is estimated without bias from the kept ones: Σ Λ_e/π_e.

    Parameters
    ----------
    mask : Mask
        Entries in a Kronecker basis.
    squares : (k,) float64
        Sums of the squares of weighted entries over samples.
    samples : int
        How many.
    scope : {"layer", "model"}
        Whose mean damping is relative to.
    """
    check_samples(samples)
    edges = np.cumsum([len(kept.rows) for kept in mask.modules])[:-1]
    parts = [part / samples for part in np.split(squares, edges)]
    entries = [kept.layer.entries for kept in mask.modules]
    means = mean_moments([float(part.sum()) for part in parts], entries, scope)
    modules = []
    for kept, part, mean in zip(mask.modules, parts, means, strict=True):
        if kept.basis is not None and len(kept.rows):
            moment = part / np.square(kept.weight.astype(np.float64))
            kept = replace(kept, basis=replace(kept.basis, second_moment=moment, mean_moment=mean))
        modules.append(kept)
    return replace(mask, modules=tuple(modules))

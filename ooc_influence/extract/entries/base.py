"""What a layer kind has to answer: its entry matrix, how kept entries are gathered, what a pilot learns of them.

The entries of a layer form a matrix (:class:`~ooc_influence.store.LayerShape`). From the layer's input x and its
output's gradient δ, both with the batch on axis 0, a kind computes the kept entries of every sample's gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.store import LayerShape, ModuleMask

Indices = npt.NDArray[np.int64]
MaskIndices = npt.NDArray[np.int32]


class Moments(NamedTuple):
    """Second moments of the entries over a pilot batch, in product form.

    Entry (i, j)'s second moment is estimated by ``rows[i] * cols[j]`` after division by the samples and the tokens.

    Attributes
    ----------
    rows : (R,) float64
        Σ over samples and tokens of δ_i².
    cols : (C,) float64
        Σ over samples and tokens of x_j²; the bias column is the number of tokens.
    tokens : int
        Tokens summed over.
    """

    rows: Tensor
    cols: Tensor
    tokens: int


class Operands(NamedTuple):
    """The factors of a gradient: entry (i, j) of sample s is Σ_t rows[s, t, i] · cols[s, t, j].

    Attributes
    ----------
    rows : (b, t, R) float, or (b, t) int
        The factor of the entry matrix's rows; indices, where it is one-hot.
    cols : (b, t, C) float
        That of its columns, without a bias column, which is 1.
    """

    rows: Tensor
    cols: Tensor


class Located(NamedTuple):
    """The positions of some entries in one of a layer's parameters."""

    parameter: str  # its name in the module
    entries: Indices  # which of the entries, (m,)
    positions: Indices  # theirs in the flattened parameter, (m,)


class Entries(ABC):
    """The kept entries of one layer, ready to be gathered.

    Parameters
    ----------
    kept : ModuleMask
        The entries and their weights; m of them.
    module : nn.Module
        The layer.
    device : torch.device
        Where its activations are.
    """

    kind: ClassVar[str]
    whole_call: ClassVar[bool] = False  # whether x is the layer's whole call (calls.Call), and δ a list, one per output

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        self.entries = len(kept.rows)
        self.layer = kept.layer
        self._module = module
        self._rows = torch.from_numpy(kept.rows).long().to(device)
        self._cols = torch.from_numpy(kept.cols).long().to(device)
        self._weight = torch.from_numpy(kept.weight).to(device)
        is_bias = (self._cols == kept.layer.shape[1] - 1) & kept.layer.bias
        self._bias_entries = torch.nonzero(is_bias).flatten()

    @classmethod
    @abstractmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """Return the entry matrix of a module of this kind; None for another module."""

    @classmethod
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters whose entries this kind covers, by their names in the module."""
        parameters = {name: module._parameters.get(name) for name in ("weight", "bias")}
        return {name: parameter for name, parameter in parameters.items() if parameter is not None}

    @classmethod
    def locate(cls, layer: LayerShape, module: nn.Module, rows: MaskIndices, cols: MaskIndices) -> list[Located]:
        """Return the positions of entries (rows, cols) in the module's parameters: of the weight, then of the bias."""
        is_bias = (cols == layer.shape[1] - 1) & layer.bias
        weight = np.flatnonzero(~is_bias)
        located = []
        if len(weight):
            positions = cls.weight_positions(layer, rows[weight].astype(np.int64), cols[weight])
            located.append(Located("weight", weight, positions))
        if is_bias.any():
            located.append(Located("bias", np.flatnonzero(is_bias), rows[is_bias].astype(np.int64)))
        return located

    @classmethod
    def weight_positions(cls, layer: LayerShape, rows: Indices, cols: MaskIndices) -> Indices:
        """Return the positions of entries (rows, cols) in the flattened weight, here stored as the entry matrix."""
        return rows * (layer.shape[1] - layer.bias) + cols

    @classmethod
    def entries_at(
        cls, layer: LayerShape, module: nn.Module, parameter: str, positions: Indices
    ) -> tuple[Indices, Indices]:
        """Return the entries (rows, cols) at positions of a flattened parameter; the inverse of :meth:`locate`."""
        width = layer.shape[1] - layer.bias
        if parameter == "bias":
            return positions, np.full_like(positions, width)
        return positions // width, positions % width

    @classmethod
    def strays(cls, module: nn.Module, x: Any, delta: Any, b: int, sample: int) -> bool:
        """Return whether δ of one sample's loss has finite entries other than zero at another of the ``b`` samples."""
        return reaches_others(delta.reshape(b, -1), sample)

    @classmethod
    @abstractmethod
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        """Return the entries' second moments over a pilot batch."""

    @classmethod
    def rotates(cls, module: nn.Module) -> tuple[bool, bool]:
        """Return whether the rows, and the columns, of the entry matrix can be rotated; then there are operands."""
        return False, False

    @classmethod
    def operands(cls, module: nn.Module, x: Any, delta: Any) -> Operands:
        """Return the factors of every sample's gradient."""
        raise NotImplementedError

    @classmethod
    def weight_matrix(cls, gradient: Tensor) -> Tensor:
        """Return the gradient of the weight of a kind that rotates as the entry matrix has it."""
        return gradient.reshape(len(gradient), -1)

    @classmethod
    def channels_first(cls, module: nn.Module) -> bool:
        """Return whether features are on axis 1 of x and δ rather than on the last axis."""
        return False

    @classmethod
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        """Return whether ``b`` samples can be told apart in x and δ, as :mod:`..separation` arranged them."""
        return bool(x.dim() >= 1)

    @abstractmethod
    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries without their weights, (b, m) float32 or wider."""

    def __call__(self, x: Any, delta: Any) -> Tensor:
        """Return the weighted entries, (b, m) float32."""
        return self.gather(x, delta).float().mul_(self._weight)


_OWNERS = (
    nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm,
)  # fmt: skip


def is_coded(tensor: Tensor) -> bool:
    """Return whether a weight is stored in a quantised code, which autograd has no gradient for."""
    return tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def computes_weights(module: nn.Module) -> bool:
    """Return whether a layer's weight or bias is computed from other parameters: parametrised, pruned."""
    if not isinstance(module, _OWNERS):
        return False
    own = module._parameters.keys() | module._buffers.keys()
    return any(getattr(module, name, None) is not None and name not in own for name in ("weight", "bias"))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that products of ``dtype`` are summed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def square_sums(value: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return sums of squares over axes, float64."""
    return value.to(wide(value.dtype)).square().sum(dim, dtype=torch.float64)


def with_bias_column(layer: LayerShape, cols: Tensor, tokens: int) -> Tensor:
    """Return the columns' moments with that of the bias, whose input is 1, appended if the layer has one."""
    return torch.cat([cols, cols.new_tensor([tokens])]) if layer.bias else cols


def reaches_others(delta: Tensor, sample: int) -> bool:
    """Return whether δ (b, ...) has finite entries other than zero at another sample than ``sample``."""
    reached = ((delta != 0) & delta.isfinite()).reshape(len(delta), -1).any(1)
    reached[sample] = False
    return bool(reached.any())

"""Sampled per-sample gradients of convolutions in one, two or three dimensions.

With the padded input x (b, in, ...), entry (o, c, κ) of sample s's weight gradient is
Σ_y δ[s, o, y] · x[s, c, stride·y + dilation·κ] over output positions y; c counts the channels of o's group. Entries are
gathered kernel offset by kernel offset: at each, the inputs are a strided view and no unfolded copy is made.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from ooc_influence.extract.entries.base import Entries, Moments, Operands, square_sums, wide, with_bias_column
from ooc_influence.store import LayerShape, ModuleMask

_TILE = 2**19  # values of one gathered operand
_PRODUCT_GAIN = 8  # multiplications of a GEMM that cost as much as a gathered one


class ConvEntries(Entries):
    """``Conv1d``, ``Conv2d``, ``Conv3d`` with stride, padding, dilation and groups; columns are (channel, offset)."""

    kind = "conv"

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        width = kept.layer.shape[1] - kept.layer.bias
        self._offsets: list[tuple[tuple[int, ...], Tensor, Tensor, Tensor]] = []
        kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
        size = int(np.prod(kernel))
        channels, outputs_of_group = width // size, kept.layer.shape[0] // int(module.groups)  # type: ignore[arg-type]
        for number, offset in enumerate(itertools.product(*map(range, kernel))):
            entries = torch.nonzero((self._cols < width) & (self._cols % size == number)).flatten()
            if len(entries):
                rows = self._rows[entries]
                inputs = self._cols[entries] // size + (rows // outputs_of_group) * channels
                self._offsets.append((offset, entries, rows, inputs))

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        kind = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)
        if kind is None or type(module).forward is not kind.forward:
            return None
        if type(module)._conv_forward is not kind._conv_forward:  # type: ignore[attr-defined]
            return None
        bias = module.bias is not None
        weight: Any = module.weight
        return LayerShape(name, cls.kind, (len(weight), weight[0].numel() + int(bias)), bias)

    @classmethod
    @override
    def channels_first(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    @override
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        return bool(x.dim() == len(module.kernel_size) + 2)  # type: ignore[arg-type]

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # all offsets of the kernel see the same inputs, except at the border
        tokens = delta.numel() // delta.shape[1]
        rows = square_sums(delta.transpose(0, 1).flatten(1), 1)
        inputs = x.transpose(0, 1).flatten(1).to(wide(x.dtype)).square().mean(1, dtype=torch.float64) * tokens
        size = int(np.prod(module.kernel_size))  # type: ignore[arg-type]
        channels = (layer.shape[1] - layer.bias) // size
        cols = inputs.view(-1, channels).mean(0).repeat_interleave(size)  # groups share their columns
        return Moments(rows, with_bias_column(layer, cols, tokens), tokens)

    @classmethod
    @override
    def rotates(cls, module: nn.Module) -> tuple[bool, bool]:
        plain = int(module.groups) == 1  # type: ignore[arg-type]  # the rows of several groups see different inputs
        return plain, plain

    @classmethod
    @override
    def operands(cls, module: nn.Module, x: Any, delta: Any) -> Operands:
        """Return δ and unfolded inputs: (channel, offset) at each output position."""
        offsets = itertools.product(*map(range, module.kernel_size))  # type: ignore[arg-type]
        padded, sizes = _pad(module, x), delta.shape[2:]
        views = [_at(module, padded, offset, sizes).flatten(2) for offset in offsets]
        return Operands(delta.flatten(2).transpose(1, 2), torch.stack(views, 2).flatten(1, 2).transpose(1, 2))

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of x (b, in, ...) and δ (b, out, ...)."""
        dtype = wide(delta.dtype)
        padded = _pad(self._module, x)
        sizes, d = delta.shape[2:], delta.flatten(2).to(dtype)
        out = torch.zeros((len(x), self.entries), dtype=dtype, device=x.device)
        for offset, entries, rows, inputs in self._offsets:
            out[:, entries] = self._at_offset(_at(self._module, padded, offset, sizes), d, rows, inputs)
        if len(self._bias_entries):
            out[:, self._bias_entries] = d.sum(2).index_select(1, self._rows[self._bias_entries])
        return out

    def _at_offset(self, view: Tensor, d: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
        """Return Σ_y δ[:, rows, y] x[:, inputs, y] for the inputs at one offset of the kernel, (b, m)."""
        distinct_rows, at_rows = torch.unique(rows, return_inverse=True)
        distinct, at_inputs = torch.unique(inputs, return_inverse=True)
        x = view.index_select(1, distinct).flatten(2).to(d.dtype)
        if len(distinct_rows) * len(distinct) <= _PRODUCT_GAIN * len(rows):
            product = torch.bmm(d.index_select(1, distinct_rows), x.transpose(1, 2))
            return product.flatten(1).index_select(1, at_rows * len(distinct) + at_inputs)
        step = max(1, _TILE // (d.shape[0] * d.shape[2]))
        parts = []
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            parts.append(d.index_select(1, rows[part]).mul_(x.index_select(1, at_inputs[part])).sum(2))
        return torch.cat(parts, 1)


def _pad(module: Any, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def _at(module: Any, padded: Tensor, offset: tuple[int, ...], sizes: torch.Size) -> Tensor:
    """Return the padded inputs that one offset of the kernel meets at each output position: a view."""
    window = [
        slice(k * dilation, k * dilation + stride * (size - 1) + 1, stride)
        for k, dilation, stride, size in zip(offset, module.dilation, module.stride, sizes, strict=True)
    ]
    return padded[(slice(None), slice(None), *window)]

"""Sampled per-sample gradients of a linear layer, without the full gradient.

For an input x (b, t, in) and an output gradient δ (b, t, out), entry (i, j) of sample s's weight gradient is
Σ_t δ[s, t, i] x[s, t, j]; its bias gradient is Σ_t δ[s, t, i]. m kept entries cost O(t·m) per sample. They are computed
in one of four ways, chosen by cost:

- token-major: for a few samples at a time, columns of δ and x are gathered, multiplied and summed over t;
- feature-major: x and δ are transposed once, then each entry is a dot product of two runs of t numbers
  (``torch.sparse.sampled_addmm``), where kept entries are many compared to the features;
- kernel: on a GPU with Triton, one kernel gathers, multiplies and sums;
- product: one small GEMM per sample over the distinct rows and columns of the kept entries, where these are few
  compared to the entries: a grid, a mask of nearly everything, importance sampling of a layer with a few strong
  features.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the community's name
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from ooc_influence.extract.entries.base import (
    Entries,
    Indices,
    MaskIndices,
    Moments,
    Operands,
    is_coded,
    square_sums,
    wide,
    with_bias_column,
)
from ooc_influence.store import LayerShape, LograReduction, ModuleMask

_CPU_TILE = 2**19  # values of one gathered operand: two float32 tiles of 2 MiB stay in the shared cache
_GPU_TILE = 2**25  # on a GPU, few large launches
_FEW_THREADS = 1  # up to which index_select, a fifth cheaper but serial along the last axis, is the quicker one
_PRODUCT_GAIN = 3  # multiplications of a GEMM that cost as much as a gathered one
_QUANTISED = ("8bit", "4bit", "Quant", "HQQ", "FP8", "WQLinear", "Awq", "Bit")  # in the class names of such layers


class LinearEntries(Entries):
    """``torch.nn.Linear``, and quantised layers that compute the same: the weight is never read."""

    kind = "linear"

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        inputs = kept.layer.shape[1] - kept.layer.bias
        self._bias_rows = self._rows[self._bias_entries]
        self._kernel_entries = (self._rows.int(), self._cols.int())  # the kernel handles the bias column
        self._cols = self._cols.clamp(max=max(0, inputs - 1))  # bias entries are overwritten
        self._sparse: Tensor | None = None
        in_order = bool((self._rows[1:] >= self._rows[:-1]).all())  # as masks are drawn
        self._many = in_order and 2 * self.entries >= inputs + kept.layer.shape[0]
        self._grid = _grid(self._rows, self._cols)

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if not (_plain(module) or _quantised(module)):
            return None
        bias = getattr(module, "bias", None) is not None
        return LayerShape(name, cls.kind, (int(module.out_features), int(module.in_features) + int(bias)), bias)  # type: ignore[arg-type]

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        tokens = delta.numel() // delta.shape[-1]
        cols = square_sums(x.reshape(-1, x.shape[-1]), 0)
        rows = square_sums(delta.reshape(-1, delta.shape[-1]), 0)
        return Moments(rows, with_bias_column(layer, cols, tokens), tokens)

    @classmethod
    @override
    def rotates(cls, module: nn.Module) -> tuple[bool, bool]:
        return True, True

    @classmethod
    @override
    def operands(cls, module: nn.Module, x: Any, delta: Any) -> Operands:
        b = len(x)
        return Operands(delta.reshape(b, -1, delta.shape[-1]), x.reshape(b, -1, x.shape[-1]))

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of x (b, ..., in) and δ (b, ..., out)."""
        delta, x = self.operands(self._module, x, delta)
        if self._grid is None and self.entries and x.shape[1] > 1 and usable(x):
            return sampled_outer(x, delta, *self._kernel_entries)
        out = self._weights(x, delta)
        if len(self._bias_entries):
            summed = delta.sum(1, dtype=wide(delta.dtype))
            out.index_copy_(1, self._bias_entries, summed.index_select(1, self._bias_rows).to(out.dtype))
        return out

    def _weights(self, x: Tensor, delta: Tensor) -> Tensor:
        if self._grid is not None and x.shape[1] > 1:
            return self._product(x, delta, *self._grid)
        if self._many and x.shape[1] > 1 and x.device.type == "cpu":
            return self._feature_major(x, delta)
        return self._token_major(x, delta, _GPU_TILE if x.is_cuda else _CPU_TILE)

    def _product(self, x: Tensor, delta: Tensor, rows: Tensor, cols: Tensor, indices: Tensor) -> Tensor:
        dtype = wide(delta.dtype)
        xs = x if len(cols) == x.shape[2] else x.index_select(2, cols)
        ds = delta if len(rows) == delta.shape[2] else delta.index_select(2, rows)
        out = torch.empty((x.shape[0], self.entries), dtype=dtype, device=x.device)
        buffer = torch.empty((len(rows), len(cols)), dtype=dtype, device=x.device)
        for sample in range(len(x)):  # one at a time: the product stays in cache
            torch.mm(ds[sample].t().to(dtype), xs[sample].to(dtype), out=buffer)
            torch.index_select(buffer.view(-1), 0, indices, out=out[sample])
        return out

    def _token_major(self, x: Tensor, delta: Tensor, tile: int) -> Tensor:
        b, t, _ = x.shape
        dtype = wide(delta.dtype)
        out = x.new_empty((b, self.entries), dtype=dtype)
        samples = max(1, min(b, tile // (t * max(1, min(self.entries, 1024)))))
        width = max(1, min(self.entries, tile // (t * samples)))
        for low in range(0, b, samples):
            high = min(b, low + samples)
            d, a = delta[low:high].reshape(-1, delta.shape[2]), x[low:high].reshape(-1, x.shape[2])
            for first in range(0, self.entries, width):
                part = slice(first, first + width)
                product = _take(d, self._rows[part]).to(dtype)
                product.mul_(_take(a, self._cols[part]))
                out[low:high, part] = product.view(high - low, t, -1).sum(1) if t > 1 else product
        return out

    def _feature_major(self, x: Tensor, delta: Tensor) -> Tensor:
        dtype = wide(delta.dtype)
        out = torch.empty((len(x), self.entries), dtype=dtype)
        pattern = self._pattern(dtype)
        for sample in range(len(x)):
            d, a = delta[sample].t().to(dtype), x[sample].to(dtype)
            out[sample] = torch.sparse.sampled_addmm(pattern, d, a, beta=0.0).values()
        return out

    def _pattern(self, dtype: torch.dtype) -> Tensor:
        """Return the kept entries as a sparse matrix: the pattern of the products to compute."""
        if self._sparse is None or self._sparse.dtype != dtype:
            height, width = self.layer.shape[0], self.layer.shape[1] - self.layer.bias
            starts = torch.bincount(self._rows, minlength=height).cumsum(0)
            starts = torch.cat([starts.new_zeros(1), starts])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse", UserWarning)  # "in beta state"
                self._sparse = torch.sparse_csr_tensor(
                    starts, self._cols, torch.zeros(self.entries, dtype=dtype), size=(height, width)
                )
        return self._sparse


def _take(values: Tensor, columns: Tensor) -> Tensor:
    """Return columns of values (tokens, features); by gathering, parallel over tokens, where threads are many."""
    if values.is_cuda or torch.get_num_threads() <= _FEW_THREADS:
        return values.index_select(1, columns)
    return values.gather(1, columns.expand(len(values), -1))


class TransposedLinearEntries(LinearEntries):
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored (in, out)."""

    kind = "transposed_linear"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf") or getattr(module, "weight", None) is None:
            return None
        inputs, outputs = module.weight.shape  # type: ignore[misc]
        bias = getattr(module, "bias", None) is not None
        return LayerShape(name, cls.kind, (int(outputs), int(inputs) + int(bias)), bias)

    @classmethod
    @override
    def weight_positions(cls, layer: LayerShape, rows: Indices, cols: MaskIndices) -> Indices:
        return cols.astype(np.int64) * layer.shape[0] + rows

    @classmethod
    @override
    def weight_matrix(cls, gradient: Tensor) -> Tensor:
        return gradient.t()

    @classmethod
    @override
    def entries_at(
        cls, layer: LayerShape, module: nn.Module, parameter: str, positions: Indices
    ) -> tuple[Indices, Indices]:
        if parameter == "bias":
            return super().entries_at(layer, module, parameter, positions)
        return positions % layer.shape[0], positions // layer.shape[0]


def _grid(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return distinct rows and columns and each entry's index in their product, where that product is worth it."""
    if not len(rows):
        return None
    distinct_rows, at_rows = torch.unique(rows, return_inverse=True)
    distinct_cols, at_cols = torch.unique(cols, return_inverse=True)
    if len(distinct_rows) * len(distinct_cols) > _PRODUCT_GAIN * len(rows):
        return None
    return distinct_rows, distinct_cols, at_rows * len(distinct_cols) + at_cols


def _plain(module: nn.Module) -> bool:
    """Return whether a module is torch's linear layer, or of a class with a forward that computes the same."""
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    if module.weight.is_meta or is_coded(module.weight):
        return False
    x = torch.linspace(-1.0, 2.0, 2 * module.in_features).view(2, -1).to(module.weight)
    with torch.inference_mode(False), torch.no_grad():
        try:
            output = module.forward(x)
            expected = F.linear(x, module.weight, module.bias)
        except Exception:  # it takes other arguments
            return False
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(output, expected, rtol=tolerance, atol=tolerance)


def _quantised(module: nn.Module) -> bool:
    """Return whether a module is a linear layer with a quantised weight, of any library.

    A float weight that is trained while the layer computes with its rounded values (BitNet's) is not one: its gradient
    passes through the rounding.
    """
    sizes = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    if not sizes or any(True for _ in module.children()) or type(module).forward is nn.Linear.forward:
        return False
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    if weight is not None:
        return is_coded(weight)
    codes = (p for p in module.parameters(recurse=False) if p is not module._parameters.get("bias"))
    return all(is_coded(p) for p in codes) and any(part in type(module).__name__ for part in _QUANTISED)


class LograEntries:
    """The projected numbers of a layer, gathered as :class:`Entries` gathers kept entries.

    ``number`` is the layer's in the mask.
    """

    def __init__(self, kept: ModuleMask, number: int, reduction: LograReduction, device: torch.device) -> None:
        self.entries, self._layer = len(kept.rows), kept.layer
        self._left, self._right = (
            torch.from_numpy(factor).to(device) for factor in reduction.factors(number, kept.layer, _ranks(kept))
        )

    def __call__(self, x: Any, delta: Any) -> Tensor:
        """Return the numbers, (b, m) float32."""
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        delta = delta.reshape(delta.shape[0], -1, delta.shape[-1])
        inputs = x.shape[-1]
        right = x.to(wide(x.dtype)) @ self._right[:inputs].to(wide(x.dtype))
        if self._layer.bias:
            right = right + self._right[inputs].to(right.dtype)
        left = delta.to(wide(delta.dtype)) @ self._left.to(wide(delta.dtype))
        return torch.einsum("bto,bti->boi", left, right.to(left.dtype)).reshape(len(x), -1).float()


def _ranks(kept: ModuleMask) -> tuple[int, int]:
    """Return how many rows and columns are stored of a layer."""
    return (int(kept.rows[-1]) + 1, int(kept.cols[-1]) + 1) if len(kept.rows) else (0, 0)


_BLOCK_ENTRIES, _BLOCK_TOKENS = 128, 32
_PROGRAMS = 1024  # enough of them to fill a large GPU


@functools.cache
def _kernel() -> Any:
    """Return the compiled kernel; None if Triton is not installed."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def sampled_outer_kernel(
        x, delta, rows, cols, out, tokens, entries, inputs, span,
        x_sample, x_token, x_feature, d_sample, d_token, d_feature,
        BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(0).to(tl.int64)
        part = tl.program_id(2)
        index = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        kept = index < entries
        row = tl.load(rows + index, mask=kept, other=0).to(tl.int64)
        col = tl.load(cols + index, mask=kept, other=0).to(tl.int64)
        bias = col == inputs
        first = part * span
        last = tl.minimum(tokens, first + span)
        total = tl.zeros([BLOCK_E], dtype=tl.float32)
        for start in range(first, last, BLOCK_T):
            token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = (token < last)[:, None] & kept[None, :]
            d = tl.load(
                delta + sample * d_sample + token[:, None] * d_token + row[None, :] * d_feature, mask=inside, other=0.0
            )
            a = tl.load(
                x + sample * x_sample + token[:, None] * x_token + col[None, :] * x_feature,
                mask=inside & (bias == 0)[None, :], other=1.0,
            )  # fmt: skip
            total += tl.sum(d.to(tl.float32) * a.to(tl.float32), axis=0)
        samples = tl.num_programs(0)
        tl.store(out + (part * samples + sample) * entries + index, total, mask=kept)

    return sampled_outer_kernel


def usable(x: Tensor) -> bool:
    """Return whether the kernel runs where ``x`` is: on a GPU with Triton, or under Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    small = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return small and (x.is_cuda or interpreted) and _kernel() is not None


def sampled_outer(x: Tensor, delta: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return sampled entries of every sample's outer product.

    Parameters
    ----------
    x : (b, t, in)
        Inputs, of any strides.
    delta : (b, t, out)
        Output gradients.
    rows, cols : (m,) int32
        Which entries; ``cols == in`` is the bias.

    Returns
    -------
    (b, m) float32
    """
    (b, t, inputs), entries = x.shape, len(rows)
    blocks = -(-entries // _BLOCK_ENTRIES)
    parts = max(1, min(-(-t // _BLOCK_TOKENS), _PROGRAMS // max(1, b * blocks)))
    span = -(-t // (parts * _BLOCK_TOKENS)) * _BLOCK_TOKENS
    parts = -(-t // span)
    out = torch.empty((parts, b, entries), dtype=torch.float32, device=x.device)
    _kernel()[(b, blocks, parts)](
        x, delta, rows, cols, out, t, entries, inputs, span, *x.stride(), *delta.stride(),
        BLOCK_E=_BLOCK_ENTRIES, BLOCK_T=_BLOCK_TOKENS,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)

"""Sampled per-sample gradients of a linear layer, without the full gradient.

For an input x (b, t, in) and an output gradient δ (b, t, out), entry (i, j) of sample s's weight gradient is
Σ_t δ[s, t, i] x[s, t, j]; its bias gradient is Σ_t δ[s, t, i]. m kept entries cost O(t·m) a sample. Two orders of
gathering, both in tiles that stay in cache; which is faster depends on whether transposing all features costs more
than gathering the kept ones with a stride:

- token-major: for a few samples at a time, columns of δ and x are gathered, multiplied and summed over t;
- feature-major: x and δ are transposed once, then whole rows of b·t values are gathered by blocks of entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ooc_influence.store import ModuleMask

_CPU_TILE = 2**19  # values of one gathered operand: two float32 tiles of 2 MiB stay in the shared cache
_GPU_TILE = 2**25  # on a GPU, few large launches


class EntryGather:
    """The kept entries of one linear layer, ready to be gathered.

    Parameters
    ----------
    mask : ModuleMask
        The kept entries and their weights; m of them.
    device : torch.device
        Where the layer's activations are.
    """

    def __init__(self, mask: ModuleMask, device: torch.device) -> None:
        self.entries = len(mask.rows)
        columns = mask.layer.shape[1]
        rows = torch.from_numpy(mask.rows).long()
        cols = torch.from_numpy(mask.cols).long()
        inputs = columns - 1 if mask.layer.bias else columns
        at = torch.nonzero(cols == inputs).flatten() if mask.layer.bias else cols[:0]
        self._features = inputs + mask.layer.shape[0]
        self._bias_at = at.to(device)
        self._bias_rows = rows[at].to(device)
        self._rows = rows.to(device)
        self._cols = cols.clamp(max=inputs - 1).to(device)  # bias entries are overwritten
        self._weight = torch.from_numpy(mask.weight).to(device)

    def __call__(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return the weighted entries, (b, m) float32, of x (b, t, in) and δ (b, t, out)."""
        tile = _GPU_TILE if x.is_cuda else _CPU_TILE
        if self.entries < self._features or x.shape[1] == 1 or x.is_cuda:
            out = self._token_major(x, delta, tile)
        else:
            out = self._feature_major(x, delta, tile)
        if len(self._bias_at):
            summed = delta.sum(1, dtype=torch.promote_types(delta.dtype, torch.float32))
            out.index_copy_(1, self._bias_at, summed.index_select(1, self._bias_rows).to(out.dtype))
        return out.mul_(self._weight)

    def _token_major(self, x: Tensor, delta: Tensor, tile: int) -> Tensor:
        b, t, _ = x.shape
        out = x.new_empty((b, self.entries), dtype=torch.float32)
        samples = max(1, min(b, tile // (t * max(1, min(self.entries, 1024)))))
        width = max(1, min(self.entries, tile // (t * samples)))
        accumulate = torch.promote_types(delta.dtype, torch.float32)
        for low in range(0, b, samples):
            high = min(b, low + samples)
            d, a = delta[low:high].reshape(-1, delta.shape[2]), x[low:high].reshape(-1, x.shape[2])
            for first in range(0, self.entries, width):
                part = slice(first, first + width)
                # gather works in parallel over tokens, index_select along the last axis does not
                product = d.gather(1, self._rows[part].expand(len(d), -1)).to(accumulate)
                product.mul_(a.gather(1, self._cols[part].expand(len(a), -1)))
                out[low:high, part] = product.view(high - low, t, -1).sum(1) if t > 1 else product
        return out

    def _feature_major(self, x: Tensor, delta: Tensor, tile: int) -> Tensor:
        b, t, _ = x.shape
        accumulate = torch.promote_types(delta.dtype, torch.float32)
        xs = x.reshape(b * t, -1).t().to(accumulate).contiguous()
        ds = delta.reshape(b * t, -1).t().to(accumulate).contiguous()
        out = torch.empty((self.entries, b), dtype=accumulate, device=x.device)
        width = max(1, min(self.entries, 2 * tile // (b * t)))
        left, right = xs.new_empty((width, b * t)), xs.new_empty((width, b * t))
        for first in range(0, self.entries, width):
            last = min(self.entries, first + width)
            product, other = left[: last - first], right[: last - first]
            torch.index_select(ds, 0, self._rows[first:last], out=product)
            torch.index_select(xs, 0, self._cols[first:last], out=other)
            product.mul_(other)
            torch.sum(product.view(last - first, b, t), 2, out=out[first:last])
        return out.t().float().contiguous()

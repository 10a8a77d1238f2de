"""A Triton kernel for sampled outer products: out[s, e] = Σ_t δ[s, t, rows[e]] · x[s, t, cols[e]], in float32.

A program takes a block of entries of one sample and a range of its tokens, gathers both sides, multiplies and sums.
Ranges of tokens are added up afterwards in a fixed order, so the result does not depend on the schedule. A column equal
to the number of inputs is the bias: its input is one. The torch form in :mod:`.linear` is the oracle and the fallback.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

_BLOCK_ENTRIES, _BLOCK_TOKENS = 128, 32
_PROGRAMS = 1024  # enough of them to fill a large GPU


@functools.cache
def _kernel() -> Any:
    """Return the compiled kernel; None where Triton is not installed."""
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
        places = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        there = places < entries
        row = tl.load(rows + places, mask=there, other=0).to(tl.int64)
        col = tl.load(cols + places, mask=there, other=0).to(tl.int64)
        bias = col == inputs
        first = part * span
        last = tl.minimum(tokens, first + span)
        total = tl.zeros([BLOCK_E], dtype=tl.float32)
        for start in range(first, last, BLOCK_T):
            token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = (token < last)[:, None] & there[None, :]
            d = tl.load(
                delta + sample * d_sample + token[:, None] * d_token + row[None, :] * d_feature, mask=inside, other=0.0
            )
            a = tl.load(
                x + sample * x_sample + token[:, None] * x_token + col[None, :] * x_feature,
                mask=inside & (bias == 0)[None, :], other=1.0,
            )  # fmt: skip
            total += tl.sum(d.to(tl.float32) * a.to(tl.float32), axis=0)
        samples = tl.num_programs(0)
        tl.store(out + (part * samples + sample) * entries + places, total, mask=there)

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

"""Fused mixture-of-experts weights of Hugging Face models, and their routers.

The experts' weights are parameters of three dimensions, (experts, out, in) or (experts, in, out), used by one call with
the tokens of all samples, (samples · tokens, features), and the experts they are routed to. The module runs again for
each sample's tokens; at every product by an expert's weight the kept entries are gathered as those of a linear layer.
The entry matrix is (rows, C): the parameters one after the other, cut into runs of C entries.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ooc_influence.extract.entries.base import Moments, square_sums, wide
from ooc_influence.extract.entries.calls import Call, Layout, Patch, find_layout, pull_back
from ooc_influence.extract.entries.func import FuncEntries
from ooc_influence.store import LayerShape

_ROWS = 2**20  # runs of entries whose second moments a pilot tells apart, where the weights' widths allow it
_SORTED = ("expert_size", "tokens_per_expert", "batch_size")  # arguments of experts that see tokens sorted by expert
_ROUTERS = ("router", "gate", "gating")


class ExpertEntries(FuncEntries):
    """Experts' weights in parameters of three dimensions; routers whose weight is a parameter of their own."""

    kind = "experts"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if not (_experts(module) or _router(module)):
            return None
        parameters = cls.parameters(module).values()
        numel = sum(p.numel() for p in parameters)
        width = math.gcd(*(p.shape[-1] for p in parameters))
        fits = (run for run in range(1, width + 1) if width % run == 0 and numel // run <= _ROWS)
        run = next(fits, width)
        return LayerShape(name, cls.kind, (numel // run, run), False) if numel // run < 2**31 else None

    @classmethod
    @override
    def layout(cls, module: nn.Module, call: Call, accept: Callable[[Layout], bool] | None = None) -> Layout | None:
        # tokens may be repeated for every expert (Llama 4)
        first = next(iter(cls.parameters(module).values()))
        return find_layout(module, call, len(first) if first.dim() == 3 else 1, accept)

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # for every weight the product of the squares of δ and x, averaged over each run
        parameters, layout = cls.parameters(module), cls.known_layout(module, x)
        sums = _Squares(x.outputs[0].device)
        rows = torch.zeros(layer.shape[0], dtype=torch.float64, device=x.outputs[0].device)
        starts, first = {}, 0
        for name, parameter in parameters.items():
            starts[name] = first
            first += parameter.numel()
        for sample in range(x.samples):
            for name, value in pull_back(module, parameters, x, layout, delta, sample, sums.add).items():
                squares = value.detach().reshape(-1, layer.shape[1]).to(wide(value.dtype)).square()
                row = starts[name] // layer.shape[1]
                rows[row : row + len(squares)] += squares.mean(1, dtype=torch.float64)
        sums.add_to(rows, starts, layer.shape[1])
        return Moments(rows, rows.new_full((layer.shape[1],), float(x.samples)), x.samples)


class _Squares:
    """Sums of squares at every product, in the form of a linear layer's moments."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[Patch, tuple[Tensor, Tensor, int]] = {}

    def add(self, patch: Patch, x: Tensor, delta: Tensor) -> None:
        """Add a product's factors."""
        outputs, inputs, tokens = self._sums.get(patch, (0.0, 0.0, 0))
        self._sums[patch] = square_sums(delta, 0) + outputs, square_sums(x, 0) + inputs, tokens + len(x)

    def add_to(self, rows: Tensor, starts: dict[str, int], run: int) -> None:
        """Add the mean of every run of entries to its row."""
        for patch, (outputs, inputs, tokens) in self._sums.items():
            start, (down, along) = starts[patch.parameter] + patch.offset, patch.strides
            major, minor, step, wide_step = outputs, inputs, along, down
            if down < along:
                major, minor, step, wide_step = inputs, outputs, down, along
            first = torch.arange(len(major), device=self._device)[:, None]
            if step == 1 and start % run == 0 and wide_step % run == 0 and len(minor) % run == 0:
                means = torch.outer(major, minor.view(-1, run).mean(1)) / tokens
                offsets = torch.arange(len(minor) // run, device=self._device)
                index = start // run + first * (wide_step // run) + offsets
            else:
                means = torch.outer(major, minor) / (tokens * run)
                offsets = torch.arange(len(minor), device=self._device) * step
                index = (start + first * wide_step + offsets) // run
            rows.index_add_(0, index.flatten(), means.flatten())


def _experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of many experts and sees the tokens in the samples' order."""
    own = [p for p in module._parameters.values() if p is not None]
    if "expert" not in type(module).__name__.lower() or not any(p.dim() == 3 for p in own):
        return False
    experts = {len(p) for p in own if p.dim()}
    if len(experts) != 1 or any(p.dim() not in (2, 3) or not p.is_floating_point() for p in own):
        return False
    return not set(_SORTED) & set(inspect.signature(type(module).forward).parameters)


def _router(module: nn.Module) -> bool:
    """Return whether a module routes tokens to experts with a weight of its own."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if not type(module).__name__.lower().endswith(_ROUTERS) or any(True for _ in module.children()):
        return False
    weight = own.get("weight")
    return weight is not None and weight.dim() == 2 and hasattr(module, "num_experts") and hasattr(module, "top_k")

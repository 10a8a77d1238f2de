"""Per-sample gradients of a bias by itself: entry i is Σ_t δ[t, i].

For layers of any kind whose weight is frozen, or is another layer's (a tied unembedding with a bias).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ooc_influence.extract.entries.base import Entries, Moments, Place, wide
from ooc_influence.store import LayerShape, ModuleMask


class BiasEntries(Entries):
    """The bias of a layer whose output is something plus its bias; the entry matrix is (features, 1)."""

    kind = "bias"

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        self._channels = self.channels_first(module)

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`."""
        bias = module._parameters.get("bias")
        return None if bias is None else LayerShape(name, cls.kind, (bias.numel(), 1), True)

    @classmethod
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """See :class:`Entries`."""
        return {name: p for name, p in super().parameters(module).items() if name == "bias"}

    @classmethod
    def channels_first(cls, module: nn.Module) -> bool:
        """See :class:`Entries`; convolutions, batch and group normalisation."""
        return isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm))

    @classmethod
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        """See :class:`Entries`."""
        d = _tokens(delta, layer.shape[0], cls.channels_first(module))
        tokens = d.shape[0] * d.shape[1]
        rows = d.to(wide(d.dtype)).square().sum((0, 1), dtype=torch.float64)
        return Moments(rows, rows.new_full((1,), float(tokens)), tokens)

    @classmethod
    def locate(
        cls, layer: LayerShape, module: nn.Module, rows: npt.NDArray[np.int32], cols: npt.NDArray[np.int32]
    ) -> list[Place]:
        """See :class:`Entries`."""
        return [Place("bias", np.arange(len(rows)), rows.astype(np.int64))]

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of δ (b, ..., features) or (b, features, ...)."""
        d = _tokens(delta, self.layer.shape[0], self._channels)
        return d.sum(1, dtype=wide(d.dtype)).index_select(1, self._rows)


def _tokens(delta: Tensor, features: int, channels: bool) -> Tensor:
    """Return δ as (b, tokens, features)."""
    if channels:
        return delta.reshape(len(delta), features, -1).transpose(1, 2)
    return delta.reshape(len(delta), -1, features)

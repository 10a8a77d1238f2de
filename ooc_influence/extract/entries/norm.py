"""Per-sample gradients of a bias by itself: entry i is Σ_t δ[t, i].

For layers of any kind whose weight is frozen, or is another layer's (a tied unembedding with a bias).
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from ooc_influence.extract.entries.base import Entries, Moments, Place, split_bias, wide
from ooc_influence.store import LayerShape, ModuleMask


class BiasEntries(Entries):
    """The bias of a layer whose output is something plus its bias; the entry matrix is (features, 1)."""

    kind = "bias"

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        self._channels = self.channels_first(module)

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        bias = module._parameters.get("bias")
        return None if bias is None else LayerShape(name, cls.kind, (bias.numel(), 1), True)

    @classmethod
    @override
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in super().parameters(module).items() if name == "bias"}

    @classmethod
    @override
    def channels_first(cls, module: nn.Module) -> bool:
        """Convolutions, batch and group normalisation."""
        return isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm))

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        d = _tokens(delta, layer.shape[0], cls.channels_first(module))
        tokens = d.shape[0] * d.shape[1]
        rows = d.to(wide(d.dtype)).square().sum((0, 1), dtype=torch.float64)
        return Moments(rows, rows.new_full((1,), float(tokens)), tokens)

    @classmethod
    @override
    def locate(
        cls, layer: LayerShape, module: nn.Module, rows: npt.NDArray[np.int32], cols: npt.NDArray[np.int32]
    ) -> list[Place]:
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


class NormEntries(Entries):
    """What all normalisations share: elementwise weights over features."""

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        at_bias = (self._cols == kept.layer.shape[1] - 1) & kept.layer.bias
        self._bias_at, self._weight_at = torch.nonzero(at_bias).flatten(), torch.nonzero(~at_bias).flatten()

    @classmethod
    def shape_of(cls, name: str, module: nn.Module) -> LayerShape | None:
        """Return the entry matrix of a module with elementwise weights; None without any."""
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None:
            return None
        return LayerShape(name, cls.kind, (weight.numel(), 1 + (bias is not None)), bias is not None)

    @classmethod
    @abstractmethod
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        """Return features ``rows`` of x̂, (b, t, m), float32 or wider."""

    @classmethod
    def features(cls, layer: LayerShape, value: Tensor) -> Tensor:
        """Return ``value`` as (b, tokens, features); here features are the last axes."""
        return value.reshape(value.shape[0], -1, layer.shape[0])

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        """Moments of x̂, which has unit variance by construction."""
        d = cls.features(layer, delta)
        tokens = d.shape[0] * d.shape[1]
        rows = d.to(wide(d.dtype)).square().sum((0, 1), dtype=torch.float64)
        return Moments(rows, rows.new_full((layer.shape[1],), float(tokens)), tokens)

    @classmethod
    @override
    def locate(
        cls, layer: LayerShape, module: nn.Module, rows: npt.NDArray[np.int32], cols: npt.NDArray[np.int32]
    ) -> list[Place]:
        at, places = split_bias(layer, rows, cols)
        return [Place("weight", at, rows[at].astype(np.int64)), *places]

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of x and δ, which have one shape."""
        d = self.features(self.layer, delta)
        d = d.index_select(2, self._rows).to(wide(d.dtype))
        if len(self._weight_at):
            rows = self._rows[self._weight_at]
            scaled = self.normalised(self._module, x, rows).to(d.dtype)
            d[:, :, self._weight_at] = d[:, :, self._weight_at] * scaled
        return d.sum(1)


def _scaled(x: Tensor, rows: Tensor, mean: Tensor | float, var: Tensor, eps: float) -> Tensor:
    """Return (x − mean) / √(var + ε) for chosen features of x (b, t, features)."""
    kept = x.index_select(2, rows).to(wide(x.dtype))
    return (kept - mean) * torch.rsqrt(var + eps)


class LayerNormEntries(NormEntries):
    """``torch.nn.LayerNorm``."""

    kind = "layer_norm"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        plain = isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward
        return cls.shape_of(name, module) if plain else None

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1, module.weight.numel())
        var, mean = torch.var_mean(flat.to(wide(x.dtype)), 2, correction=0, keepdim=True)
        return _scaled(flat, rows, mean, var, module.eps)


class RMSNormEntries(NormEntries):
    """``torch.nn.RMSNorm`` and Hugging Face's forms, whose weight may be added to one: x̂ = x / √(mean x² + ε)."""

    kind = "rms_norm"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        return cls.shape_of(name, module) if _is_rms_norm(module) else None

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        eps = _eps(module)
        flat = x.reshape(len(x), -1, module.weight.numel())
        norm = torch.linalg.vector_norm(flat, dim=2, keepdim=True, dtype=wide(x.dtype))
        var = norm.square() / flat.shape[2]
        return _scaled(flat, rows, 0.0, var, torch.finfo(module.weight.dtype).eps if eps is None else eps)


class GroupNormEntries(NormEntries):
    """``torch.nn.GroupNorm``: features are channels, on axis 1."""

    kind = "group_norm"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        plain = isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward
        return cls.shape_of(name, module) if plain else None

    @classmethod
    @override
    def channels_first(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    @override
    def features(cls, layer: LayerShape, value: Tensor) -> Tensor:
        return value.reshape(value.shape[0], value.shape[1], -1).transpose(1, 2)

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        whole = F.group_norm(x.to(wide(x.dtype)), module.num_groups, eps=module.eps)
        return whole.flatten(2).transpose(1, 2).index_select(2, rows)


class BatchNormEntries(GroupNormEntries):
    """``torch.nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm``, which in evaluation mode do not mix samples."""

    kind = "batch_norm"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            return None
        plain = type(module).forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
        return cls.shape_of(name, module) if plain else None

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        mean, var = (value[rows].to(wide(x.dtype)) for value in (module.running_mean, module.running_var))
        return _scaled(x.reshape(*x.shape[:2], -1).transpose(1, 2), rows, mean, var, module.eps)


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        found = getattr(module, name, None)
        if isinstance(found, float):
            return found
    return None


def _is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMSNorm: by its class, or, of another library, by what it computes."""
    if isinstance(module, getattr(nn, "RMSNorm", ())):
        return type(module).forward is nn.RMSNorm.forward
    weight = module._parameters.get("weight")
    odd = set(module._parameters) != {"weight"} or weight is None or weight.dim() != 1 or _eps(module) is None
    if odd or any(True for _ in module.children()) or not type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
        return False
    if len(inspect.signature(module.forward).parameters) > 1:  # a residual or a gate may come with the input
        return False
    assert weight is not None
    if weight.is_meta:
        return type(module).__name__.endswith("RMSNorm")
    with torch.inference_mode(False), torch.no_grad():
        try:
            probe = copy.deepcopy(module).to("cpu", torch.float32)
            x = torch.linspace(-1.0, 2.0, 3 * len(weight)).view(1, 3, -1)
            found, scaled = probe(x), RMSNormEntries.normalised(probe, x, torch.arange(len(weight)))
            plain: Any = probe.weight
        except Exception:
            return False
        return any(found.shape == x.shape and torch.allclose(found, scaled * w, atol=1e-4) for w in (plain, 1 + plain))

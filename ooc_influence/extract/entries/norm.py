"""Per-sample gradients of normalisations, and of a bias by itself: entry i is Σ_t δ[t, i].

Biases by themselves are those of layers of any kind whose weight is frozen, or belongs to another layer (a tied
unembedding with a bias).
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from ooc_influence.extract.entries.base import Entries, Moments, square_sums, wide
from ooc_influence.store import LayerShape, ModuleMask


class FeatureEntries(Entries):
    """What biases and normalisations share: one weight or bias per feature, which all tokens use."""

    @classmethod
    @override
    def channels_first(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm))

    @classmethod
    def features(cls, layer: LayerShape, module: nn.Module, value: Tensor) -> Tensor:
        """Return ``value`` as (b, tokens, features)."""
        if cls.channels_first(module):
            return value.reshape(len(value), layer.shape[0], -1).transpose(1, 2)
        return value.reshape(len(value), -1, layer.shape[0])

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # inputs are normalised, or 1: their mean square is 1
        d = cls.features(layer, module, delta)
        tokens = d.shape[0] * d.shape[1]
        rows = square_sums(d, (0, 1))
        return Moments(rows, rows.new_full((layer.shape[1],), float(tokens)), tokens)


class BiasEntries(FeatureEntries):
    """The bias of a layer whose output is something plus its bias; the entry matrix is (features, 1)."""

    kind = "bias"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        bias = module._parameters.get("bias")
        return None if bias is None else LayerShape(name, cls.kind, (bias.numel(), 1), True)

    @classmethod
    @override
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in super().parameters(module).items() if name == "bias"}

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of δ (b, ..., features) or (b, features, ...)."""
        d = self.features(self.layer, self._module, delta)
        return d.sum(1, dtype=wide(d.dtype)).index_select(1, self._rows)


class NormEntries(FeatureEntries):
    """What all normalisations share: elementwise weights, and perhaps biases."""

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        is_weight = torch.ones(self.entries, dtype=torch.bool, device=device)
        is_weight[self._bias_entries] = False
        self._weight_entries = torch.nonzero(is_weight).flatten()

    @classmethod
    @abstractmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Return whether a module computes this kind's function."""

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """None without elementwise weights."""
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or not cls.recognises(module):
            return None
        return LayerShape(name, cls.kind, (weight.numel(), 1 + (bias is not None)), bias is not None)

    @classmethod
    @abstractmethod
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        """Return features ``rows`` of x̂, (b, t, m), float32 or wider."""

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of x and δ, which have one shape."""
        d = self.features(self.layer, self._module, delta)
        d = d.index_select(2, self._rows).to(wide(d.dtype))
        if len(self._weight_entries):
            rows = self._rows[self._weight_entries]
            scaled = self.normalised(self._module, x, rows).to(d.dtype)
            d[:, :, self._weight_entries] = d[:, :, self._weight_entries] * scaled
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
    def recognises(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1, module.weight.numel()).to(wide(x.dtype))
        # all features: on a CPU this takes a sixth of the time of torch.var_mean
        return F.layer_norm(flat, flat.shape[2:], eps=module.eps).index_select(2, rows)


class RMSNormEntries(NormEntries):
    """``torch.nn.RMSNorm`` and Hugging Face's forms, whose weight may be added to one: x̂ = x / √(mean x² + ε)."""

    kind = "rms_norm"

    @classmethod
    @override
    def recognises(cls, module: nn.Module) -> bool:
        return _is_rms_norm(module)

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
    def recognises(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        whole = F.group_norm(x.to(wide(x.dtype)), module.num_groups, eps=module.eps)
        return whole.flatten(2).transpose(1, 2).index_select(2, rows)


class BatchNormEntries(NormEntries):
    """``torch.nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm``, which in evaluation mode do not mix samples."""

    kind = "batch_norm"

    @classmethod
    @override
    def recognises(cls, module: nn.Module) -> bool:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            return False
        return type(module).forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)

    @classmethod
    @override
    def normalised(cls, module: Any, x: Tensor, rows: Tensor) -> Tensor:
        mean, var = (value[rows].to(wide(x.dtype)) for value in (module.running_mean, module.running_var))
        return _scaled(x.reshape(*x.shape[:2], -1).transpose(1, 2), rows, mean, var, module.eps)


def _eps(module: nn.Module) -> float | None:
    values = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in values if isinstance(value, float)), None)


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
            output, scaled = probe(x), RMSNormEntries.normalised(probe, x, torch.arange(len(weight)))
            plain: Any = probe.weight
        except Exception:
            return False
        return any(
            output.shape == x.shape and torch.allclose(output, scaled * w, atol=1e-4) for w in (plain, 1 + plain)
        )

"""Layers as timm has them, rebuilt: classes that inherit from PyTorch's and compute something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from families.base import CLASSES, Case, families_of, plain_loss, vectors

family = families_of(__name__)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm with the activation inside (EfficientNet, MobileNetV3, DenseNet of timm)."""

    def __init__(self, features: int, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__(features)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class ScaledBatchNorm(nn.BatchNorm1d):
    """Batch norm of (b, t, features), which it transposes, times a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x.transpose(1, 2)).transpose(1, 2)


class GroupNormAct(nn.GroupNorm):
    """Group norm with the activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over channels on axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StdConv2d(nn.Conv2d):
    """A convolution that standardises its weight, in ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight), self.bias, self.stride, self.padding)


class StdConvInside(nn.Conv2d):
    """The same in ``_conv_forward``: ``forward`` is PyTorch's."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, standardised(weight), bias)


class ScaledStdConv2d(nn.Conv2d):
    """NFNet's: standardised, with a gain for each output."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight) * self.gain, self.bias, self.stride, self.padding)


class SameConv2d(nn.Conv2d):
    """A convolution that pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0)


def standardised(weight: Tensor) -> Tensor:
    """Return a weight with mean 0 and variance 1 for each output."""
    var, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(var + 1e-6)


class SqueezeExcite(nn.Module):
    """Channels weighed by their means."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(features, 4, 1), nn.Conv2d(4, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class ChannelsLast(nn.Module):
    """What follows sees (b, places, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class GatedRMSNorm(nn.Module):
    """Mamba2's: an RMSNorm of an input times a gate."""

    def __init__(self, features: int, *, residual: bool = False) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(features)), 1e-6
        self.residual = residual

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x + gate if self.residual else x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Gated(nn.Module):
    """A network that calls its norm with two arguments."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.gate, self.norm, self.head = nn.Linear(6, 8), nn.Linear(6, 8), norm, nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x), self.gate(x))).mean(1)


GatedLlamaRMSNorm = type("GatedLlamaRMSNorm", (GatedRMSNorm,), {})


class OneBitLinear(nn.Linear):
    """A linear layer with a floating-point weight and a name that sounds quantised."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.weight - self.weight.mean(), self.bias)


class BitNetLinear(nn.Module):
    """The same without PyTorch's class."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.square(), self.weight)


def images_through(*layers: nn.Module, channels: int = 8) -> Case:
    """Return layers between a stem of a number of channels and a classifier."""
    stem = nn.Conv2d(3, channels, 3, padding=1)
    model = nn.Sequential(stem, *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(CLASSES))
    case = Case(model, plain_loss, vectors(3, 8, 8))
    with torch.no_grad():
        model(case.batches[0][0])
    return case


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "timm-batch-norm-act": lambda: [BatchNormAct2d(8), nn.Conv2d(8, 8, 3), BatchNormAct2d(8, F.hardswish)],
    "timm-group-norm-act": lambda: [GroupNormAct(4, 8)],
    "timm-layer-norm-2d": lambda: [LayerNorm2d(8)],
    "timm-std-conv": lambda: [StdConv2d(8, 8, 3)],
    "timm-std-conv-inside": lambda: [StdConvInside(8, 8, 3)],
    "timm-scaled-std-conv": lambda: [ScaledStdConv2d(8, 8, 3)],
    "timm-same-conv": lambda: [SameConv2d(8, 8, 2)],
    "timm-squeeze-excite": lambda: [nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.SiLU(inplace=True),
        SqueezeExcite(8)],
    "timm-layer-scale": lambda: [LayerScale(8), nn.GELU()],
    "timm-mobilenet-v3": lambda: [nn.Conv2d(8, 8, 3, groups=8), BatchNormAct2d(8, F.hardswish), SqueezeExcite(8),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)],
}  # fmt: skip
for _name, _layers in LAYERS.items():
    family(_name, partial(lambda layers: images_through(*layers()), _layers))


@family("transposing-batch-norm")
def transposing_batch_norm() -> Case:
    """Batch norm of tokens."""
    model = nn.Sequential(nn.Linear(6, 8), ScaledBatchNorm(8), nn.Tanh(), nn.Flatten(), nn.Linear(32, CLASSES))
    return Case(model, plain_loss, vectors(4, 6))


def gated(norm: nn.Module) -> Case:
    """Return a network with a gated norm."""
    return Case(Gated(norm), plain_loss, vectors(4, 6))


family("gated-rms-norm", partial(lambda: gated(GatedLlamaRMSNorm(8))))
family("residual-rms-norm", partial(lambda: gated(GatedLlamaRMSNorm(8, residual=True))))


def linear_like(layer: nn.Module) -> Case:
    """Return a network with a look-alike of a linear layer."""
    return Case(nn.Sequential(nn.Linear(6, 8), layer, nn.Tanh(), nn.Linear(8, CLASSES)), plain_loss, vectors(6))


family("bit-linear", lambda: linear_like(OneBitLinear(8, 8)))
family("bit-net-linear", lambda: linear_like(BitNetLinear(8, 8)))

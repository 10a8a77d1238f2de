"""Adapters of PEFT's layers whose parameters are not layers by themselves: IA3, VeRA, LoHa, LoRA on an embedding, DoRA.

Their layer's call uses them, so it is run again for each sample. They are few against the layer they adapt, and the
layer's own weights are no entries. Which parameters they are follows from the active adapters, not from what requires a
gradient: a model loaded for inference has the same entries.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ooc_influence.extract.entries.func import FuncEntries
from ooc_influence.store import LayerShape

_CALLED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)  # layers of their own


class AdapterEntries(FuncEntries):
    """A layer of PEFT's, by the parameters of its active adapters."""

    kind = "adapter"

    @classmethod
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """See :class:`Entries`."""
        active: Any = getattr(module, "active_adapters", ())
        names: Any = getattr(module, "adapter_layer_names", ())
        wrapped = hasattr(module, "base_layer") and isinstance(names, (tuple, list))
        found: dict[str, nn.Parameter] = {}
        for name in names if wrapped else ():
            for adapter in active:
                held = _adapter(module._modules.get(name), adapter)
                if isinstance(held, nn.Parameter):
                    found[f"{name}.{adapter}"] = held
                elif held is not None and (not isinstance(held, _CALLED) or _decomposed(module, adapter)):
                    found |= {f"{name}.{adapter}.{inner}": p for inner, p in held.named_parameters()}
        return {name: p for name, p in found.items() if p.is_floating_point()}

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`."""
        return super().describe(name, module) if hasattr(module, "adapter_layer_names") else None


def _adapter(container: nn.Module | None, name: str) -> nn.Module | nn.Parameter | None:
    """Return what a container holds for an adapter."""
    if not isinstance(container, (nn.ParameterDict, nn.ModuleDict)) or name not in container:
        return None
    found: nn.Module | nn.Parameter = container[name]
    return found


def _decomposed(module: nn.Module, adapter: str) -> bool:
    """Return whether an adapter's layers are called with something else than tokens (DoRA's norm of their product)."""
    return _adapter(module._modules.get("lora_magnitude_vector"), adapter) is not None

"""Which layers of a model are tapped, and what the others hold.

A layer is supported when its per-sample gradient follows from its input and its output's gradient by a rule we have:
today ``torch.nn.Linear`` (weight and bias).
"""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ooc_influence.errors import MismatchError, OocInfluenceWarning, UnsupportedModelError
from ooc_influence.store import LayerShape

ModuleSelection = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
_SAMPLED_ENTRIES = 64  # of each tensor, in a model's fingerprint


def select_layers(model: nn.Module, modules: ModuleSelection) -> tuple[list[LayerShape], float]:
    """Return the layers to tap, in the model's order, and the share of its parameters they hold.

    Parameters
    ----------
    model : nn.Module
        The model.
    modules : str, sequence of str, callable or None
        Name patterns (``"encoder.*.fc?"``) or a predicate ``(name, module) -> bool``; None selects every layer.

    Warns
    -----
    OocInfluenceWarning
        Naming selected layers that hold parameters and are not supported.

    Raises
    ------
    UnsupportedModelError
        If no selected layer can be tapped.
    """
    wanted = _predicate(modules)
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers: list[LayerShape] = []
    untapped: dict[str, str] = {}
    tapped = 0
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not (own or isinstance(module, nn.Linear)) or not wanted(name, module):
            continue
        reason = _unsupported(module, users)
        if reason:
            untapped[name or "(the model)"] = reason
            continue
        layers.append(_linear_shape(name, module))
        tapped += layers[-1].entries
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if m._parameters}) or ["no layer with parameters"]
        raise UnsupportedModelError(
            f"expected at least one selected nn.Linear layer; received modules={modules!r} on a model with "
            f"{', '.join(kinds)}: widen the selection"
        )
    share = tapped / max(1, sum(p.numel() for p in model.parameters()))
    if untapped:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(untapped.items())[:8])
        more = f" and {len(untapped) - 8} more" if len(untapped) > 8 else ""
        warnings.warn(
            f"gradients cover {share:.1%} of the model's parameters; not covered: {named}{more}",
            OocInfluenceWarning,
            stacklevel=4,
        )
    return layers, share


def _predicate(modules: ModuleSelection) -> Callable[[str, nn.Module], bool]:
    if modules is None:
        return lambda name, module: True
    if callable(modules):
        return modules
    patterns = [modules] if isinstance(modules, str) else list(modules)
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _unsupported(module: nn.Module, users: Counter[int]) -> str | None:
    """Return why a module cannot be tapped; None where it can."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is not nn.Linear.forward:
        return kind.__name__
    if any(getattr(module, name) is not None and name not in module._parameters for name in ("weight", "bias")):
        return "its weight is computed from other parameters"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "used inside MultiheadAttention without being called"
    if any(users[id(p)] > 1 for p in (module.weight, module.bias) if p is not None):
        return "shares its parameters with another layer"
    return None


def _linear_shape(name: str, module: nn.Module) -> LayerShape:
    assert isinstance(module, nn.Linear)
    bias = module.bias is not None
    return LayerShape(name, "linear", (module.out_features, module.in_features + int(bias)), bias)


def find_layers(model: nn.Module, layers: Sequence[LayerShape]) -> None:
    """Check that a model has the layers a mask was drawn for.

    Raises
    ------
    MismatchError
        Naming the first that is missing or of another shape.
    """
    modules = dict(model.named_modules())
    for layer in layers:
        module = modules.get(layer.name)
        found = _linear_shape(layer.name, module) if isinstance(module, nn.Linear) else None
        if found != layer:
            raise MismatchError(
                f"expected layer {layer.name!r} with entries {layer.shape}, as in the train store; received "
                f"{found.shape if found else 'none of that name'}: use the model the train store was made with"
            )


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the model: names, shapes, dtypes and a seeded sample of every tensor's entries."""
    digest = hashlib.sha256()
    generator = np.random.Generator(np.random.PCG64(0))
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.numel() and not tensor.is_meta:
            places = torch.from_numpy(generator.integers(0, tensor.numel(), _SAMPLED_ENTRIES))
            values: Any = tensor.detach().reshape(-1)[places.to(tensor.device)].cpu()
            digest.update(values.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()

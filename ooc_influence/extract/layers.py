"""Which layers of a model are tapped, and what the others hold.

A layer is supported when one of the kinds in :mod:`.entries` describes it. By default every supported layer is tapped;
of a model that is partly frozen, those that are trained.
"""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ooc_influence.errors import MismatchError, OocInfluenceWarning, UnsupportedModelError
from ooc_influence.extract.entries import KINDS, Entries, FuncEntries, computes_weights, own_parameters
from ooc_influence.store import LayerShape

ModuleSelection = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
_SAMPLED_ENTRIES = 64  # of each tensor, in a model's fingerprint
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # compile, FSDP, checkpointing
_PARALLEL = ("DistributedDataParallel", "DataParallel")  # hold the model as "module"
_NAMED = 8  # layers not covered, in the warning


class Use(NamedTuple):
    """One module that feeds a layer's entries: the layer itself, or another that is tied to its weight.

    Attributes
    ----------
    layer : int
        Which of the mask's layers.
    shape : LayerShape
        The entry matrix of this very module.
    module : nn.Module
        The module.
    """

    layer: int
    shape: LayerShape
    module: nn.Module

    @property
    def kind(self) -> type[Entries]:
        """The module's kind."""
        return KINDS[self.shape.kind]

    @property
    def name(self) -> str:
        """Its name, for messages."""
        return self.shape.name or "(the model)"


def clean_name(model: nn.Module, name: str) -> str:
    """Return a module's or tensor's name without what compiling, FSDP, DDP or checkpoint wrappers put into it."""
    if type(model).__name__ in _PARALLEL:
        name = name.removeprefix("module").removeprefix(".")
    for wrapper in _WRAPPERS:
        name = f"{name}.".replace(wrapper, "")[:-1] if name else name
    return name.rstrip(".")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by clean name; of a wrapper and what it wraps, the inner one."""
    return {clean_name(model, name): module for name, module in model.named_modules()}


def describe(name: str, module: nn.Module, *, fallback: bool = False) -> LayerShape | None:
    """Return the entry matrix of a module of a known kind; None for another, and for one with computed weights."""
    if computes_weights(module):
        return FuncEntries.describe(name, module) if fallback else None
    for kind in KINDS.values():
        if kind is FuncEntries and not fallback:
            continue
        found = kind.describe(name, module)
        if found is not None:
            return found
    return None


class Selection(NamedTuple):
    """What is tapped.

    Attributes
    ----------
    layers : list of LayerShape
        In the model's order.
    share : float
        The share of the (trained) parameters they hold.
    """

    layers: list[LayerShape]
    share: float


def select_layers(model: nn.Module, modules: ModuleSelection, *, fallback: bool = False) -> Selection:
    """Return the layers to tap, and the share of the model's parameters they hold.

    Parameters
    ----------
    model : nn.Module
        The model.
    modules : str, sequence of str, callable or None
        Name patterns (``"encoder.*.fc?"``) or a predicate ``(name, module) -> bool``; None selects every supported
        layer, or, of a model with frozen and trained parameters, those with trained ones.
    fallback : bool
        Tap layers of unknown kinds too, through ``torch.func``.

    Warns
    -----
    OocInfluenceWarning
        Naming selected layers that hold parameters and are not supported, with their share.

    Raises
    ------
    UnsupportedModelError
        If no selected layer can be tapped.
    """
    trained = _trained(model) if modules is None else None
    wanted = _predicate(modules)
    total = sum(p.numel() for p in model.parameters() if trained is None or id(p) in trained)
    layers: dict[int, LayerShape] = {}  # by the identity of the weight, or of the module
    covered: set[int] = set()
    missed: dict[str, tuple[str, list[nn.Parameter]]] = {}
    inside = _inside_others(model, fallback=fallback)
    foreign = _used_by_unknown(model, fallback=fallback)
    for name, module in named_layers(model).items():
        own = list(own_parameters(module).values()) if computes_weights(module) else list(module.parameters(False))
        if trained is not None and not any(id(p) in trained for p in own):
            continue
        if not wanted(name, module) or id(module) in inside:
            continue
        if any(id(p) in foreign for p in own) and describe(name, module, fallback=fallback) is not None:
            reason: str | None = "shares its parameters with a layer of an unknown kind"
        else:
            reason = _take(name, module, layers, covered, fallback=fallback)
        if reason and own:
            missed[name or "(the model)"] = (reason, [p for p in own if id(p) not in covered])
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if m._parameters}) or ["no layer with parameters"]
        raise UnsupportedModelError(
            f"expected at least one selected layer of a known kind ({', '.join(k for k in KINDS if k != 'func')}); "
            f"received modules={modules!r} on a model with {', '.join(kinds)}: widen the selection, or use "
            "fallback=True (--fallback)"
        )
    tapped = sum(p.numel() for p in model.parameters() if id(p) in covered)
    _warn_missed(missed, tapped / max(1, total), total)
    return Selection(list(layers.values()), tapped / max(1, total) if total else 1.0)


def _take(
    name: str, module: nn.Module, layers: dict[int, LayerShape], covered: set[int], *, fallback: bool
) -> str | None:
    """Add a module to the layers, or to the layer it is tied to; return why it cannot be."""
    shape = describe(name, module, fallback=fallback)
    if shape is None:
        return _reason(module)
    own = own_parameters(module) if shape.kind == FuncEntries.kind else dict(module._parameters)
    parameters = {n: p for n, p in own.items() if p is not None}
    shared = [n for n, p in parameters.items() if id(p) in covered]
    weight = parameters.get("weight")
    if not shared:
        layers[id(module if weight is None else weight)] = shape
        covered.update(id(p) for p in parameters.values())
        return None
    first = layers.get(id(weight))
    if first is None or shape.kind not in ("linear", "embedding") or first.kind not in ("linear", "embedding"):
        return "shares its parameters with another layer"
    if first.shape[0] != shape.shape[0] or first.shape[1] - first.bias != shape.shape[1] - shape.bias:
        return "shares its parameters with another layer"
    layers[id(weight)] = replace(first, tied=(*first.tied, name))
    return "its bias: its weight is another layer's" if "bias" in parameters and "bias" not in shared else None


def _reason(module: nn.Module) -> str:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "used inside MultiheadAttention without being called"
    if computes_weights(module):
        return "its weight is computed from other parameters"
    return type(module).__name__


def _warn_missed(missed: Mapping[str, tuple[str, list[nn.Parameter]]], share: float, total: int) -> None:
    if not missed:
        return
    sizes = {name: sum(p.numel() for p in own) / max(1, total) for name, (_, own) in missed.items()}
    first = sorted(missed, key=lambda name: -sizes[name])[:_NAMED]
    named = ", ".join(f"{name} ({missed[name][0]}, {sizes[name]:.1%})" for name in first)
    more = f" and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
    warnings.warn(
        f"gradients cover {share:.1%} of the model's parameters; not covered: {named}{more}: fallback=True "
        "(--fallback) covers them at the cost of their full gradients",
        OocInfluenceWarning,
        stacklevel=5,
    )


def _trained(model: nn.Module) -> set[int] | None:
    """Return the parameters that are trained, where a model has some and others that are not."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return trained if trained and len(trained) < len(list(model.parameters())) else None


def _inside_others(model: nn.Module, *, fallback: bool) -> set[int]:
    """Return the modules that belong to another layer: what computes its weight, and what a fallback covers with it."""
    attention = (nn.MultiheadAttention,) if fallback else ()
    found = [m for m in model.modules() if isinstance(m, attention) or computes_weights(m)]
    return {id(child) for m in found for child in m.modules() if child is not m}


def _used_by_unknown(model: nn.Module, *, fallback: bool) -> set[int]:
    """Return parameters that several modules own, one of them of no known kind: their gradient would lack a part."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return {
        key
        for key, found in owners.items()
        if len(found) > 1 and any(describe(name, module, fallback=fallback) is None for name, module in found)
    }


def warn_if_training(model: nn.Module) -> None:
    """Say that a model in training mode is used in evaluation mode, where that makes a difference."""
    drops = [
        name for name, module in named_layers(model).items()
        if module.training and (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        )
    ]  # fmt: skip
    if drops:
        more = f" and {len(drops) - 1} more" if len(drops) > 1 else ""
        warnings.warn(
            f"the model is in training mode with layers that behave otherwise there ({drops[0]}{more}): gradients are "
            "those of evaluation mode",
            OocInfluenceWarning,
            stacklevel=3,
        )


def _predicate(modules: ModuleSelection) -> Callable[[str, nn.Module], bool]:
    if modules is None:
        return lambda name, module: True
    if callable(modules):
        return modules
    patterns = [modules] if isinstance(modules, str) else list(modules)
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def find_uses(model: nn.Module, layers: Sequence[LayerShape]) -> list[Use]:
    """Return the modules that feed the entries a mask was drawn for.

    Raises
    ------
    MismatchError
        Naming the first that is missing or of another shape.
    """
    modules = named_layers(model)
    uses = []
    for number, layer in enumerate(layers):
        module = modules.get(layer.name)
        found = None if module is None else describe(layer.name, module, fallback=layer.kind == FuncEntries.kind)
        if module is None or found is None or replace(layer, tied=()) != found:
            raise MismatchError(
                f"expected layer {layer.name!r} of kind {layer.kind} with entries {layer.shape}, as in the train "
                f"store; received {f'{found.kind} {found.shape}' if found else 'none of that name'}: use the model the "
                "train store was made with"
            )
        uses.append(Use(number, found, module))
        for name in layer.tied:
            other = modules.get(name)
            shape = None if other is None else describe(name, other)
            if other is None or shape is None or other._parameters.get("weight") is not module._parameters["weight"]:
                raise MismatchError(
                    f"expected layer {name!r} to share the weight of {layer.name!r}, as in the train store; received "
                    "a model where it does not: tie them, or use the model the train store was made with"
                )
            uses.append(Use(number, shape, other))
    return uses


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the model: names, shapes, dtypes and a seeded sample of every tensor's entries."""
    digest = hashlib.sha256()
    generator = np.random.Generator(np.random.PCG64(0))
    for name, tensor in sorted(_tensors(model)):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.numel() and not tensor.is_meta:
            places = torch.from_numpy(generator.integers(0, tensor.numel(), _SAMPLED_ENTRIES))
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # sharded over processes
            values: Any = whole.detach().reshape(-1)[places.to(whole.device)].cpu()
            digest.update(values.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            yield clean_name(model, name), tensor

"""A model's layers: their names, their kinds, and the modules that feed the entries of a mask.

A layer is supported if one of the kinds in :mod:`.entries` describes it: if it computes that kind's function, not if it
merely inherits from its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ooc_influence.errors import MismatchError, listed, warn
from ooc_influence.extract.entries import KINDS, BiasEntries, Entries, FuncEntries, computes_weights
from ooc_influence.store import LayerShape

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # compile, FSDP, checkpointing
_PARALLEL = ("DistributedDataParallel", "DataParallel")  # hold the model as "module"


@dataclass(frozen=True, eq=False)
class Use:
    """One module that feeds a layer's entries: the layer itself, or another that shares a parameter with it."""

    layer: int  # its number in the mask
    shape: LayerShape  # the entry matrix of this very module
    module: nn.Module
    shared: Mapping[str, str]  # of another module: the layer's parameters that it shares, and its own names for them
    first: tuple[LayerShape, nn.Module]  # the layer's own entry matrix and module

    @property
    def kind(self) -> type[Entries]:
        """The module's kind."""
        return KINDS[self.shape.kind]

    @property
    def name(self) -> str:
        """Its name, for messages."""
        return self.shape.name or "(the model)"

    @property
    def own(self) -> bool:
        """Whether it is the layer's own module."""
        return self.module is self.first[1]


def clean_name(model: nn.Module, name: str) -> str:
    """Return a module's or tensor's name without the parts that compile, FSDP, DDP or checkpoint wrappers add."""
    if type(model).__name__ in _PARALLEL:
        name = name.removeprefix("module").removeprefix(".")
    for wrapper in _WRAPPERS:
        name = f"{name}.".replace(wrapper, "")[:-1] if name else name
    return name.rstrip(".")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by clean name; the inner one of a wrapper and the module it wraps."""
    return {clean_name(model, name): module for name, module in model.named_modules()}


def describe(name: str, module: nn.Module, *, fallback: bool = False) -> LayerShape | None:
    """Return the entry matrix of a module of a known kind; None for another, and for one with computed weights."""
    if computes_weights(module):
        return FuncEntries.describe(name, module) if fallback else None
    for kind in KINDS.values():
        if kind is BiasEntries or (kind is FuncEntries and not fallback):
            continue
        shape = kind.describe(name, module)
        if shape is not None:
            return shape
    return None


def restrict(shape: LayerShape, parameters: set[str]) -> LayerShape | None:
    """Return the entry matrix of some of a layer's parameters: all, the weight or the bias; None for others."""
    if not shape.bias:
        return shape if "weight" in parameters else None
    if parameters == {"bias"}:
        return LayerShape(shape.name, BiasEntries.kind, (shape.shape[0], 1), True)
    if parameters == {"weight"}:
        return replace(shape, shape=(shape.shape[0], shape.shape[1] - 1), bias=False)
    return shape


def _described_as(layer: LayerShape, module: nn.Module) -> LayerShape | None:
    """Return the entry matrix of a module as a mask has it: of the same kind and the same parameters."""
    kind = KINDS.get(layer.kind)
    if kind is None or (computes_weights(module) and kind is not FuncEntries):
        return None
    shape = kind.describe(layer.name, module)
    return restrict(shape, {"weight"}) if shape is not None and shape.bias and not layer.bias else shape


def find_uses(model: nn.Module, layers: Sequence[LayerShape]) -> list[Use]:
    """Return the modules that feed the entries a mask was drawn for; one that is missing or differs is refused."""
    modules = named_layers(model)
    uses = []
    for number, layer in enumerate(layers):
        module = modules.get(layer.name)
        shape = None if module is None else _described_as(layer, module)
        if module is None or shape is None or replace(layer, tied=()) != shape:
            raise MismatchError(
                f"expected layer {layer.name!r} of kind {layer.kind} with entries {layer.shape}, as in the train "
                f"store; received {f'{shape.kind} {shape.shape}' if shape else 'none of that name and kind'}: use the "
                "model the train store was made with"
            )
        first = (shape, module)
        uses.append(Use(number, shape, module, {}, first))
        uses += [_tied(number, layer, name, modules.get(name), first) for name in layer.tied]
    return uses


def _tied(
    number: int, layer: LayerShape, name: str, other: nn.Module | None, first: tuple[LayerShape, nn.Module]
) -> Use:
    """Return the use of a layer's parameters by another module."""
    shape = None if other is None else describe(name, other, fallback=True)
    if other is not None and shape is not None:
        others = KINDS[shape.kind].parameters(other)
        shared = {name: tied for name, p in layer_parameters(*first).items() for tied, q in others.items() if p is q}
        if shared:
            return Use(number, shape, other, shared, first)
    raise MismatchError(
        f"expected layer {name!r} to share the weight of {layer.name!r}, as in the train store; received a model where "
        "it does not: tie them, or use the model the train store was made with"
    )


def layer_parameters(shape: LayerShape, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a layer's entries are of, by their names in its module."""
    kind = KINDS[shape.kind]
    parameters = kind.parameters(module)
    return parameters if shape.bias or kind.whole_call else {n: p for n, p in parameters.items() if n != "bias"}


def warn_if_training(model: nn.Module) -> None:
    """Warn that a model in training mode is used in evaluation mode, if that makes a difference."""
    drops = [
        name for name, module in named_layers(model).items()
        if module.training and (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        )
    ]  # fmt: skip
    if drops:
        warn(
            f"the model is in training mode with layers that behave otherwise there ({listed(drops, 1)}): gradients "
            "are those of evaluation mode"
        )
